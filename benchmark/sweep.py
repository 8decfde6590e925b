"""Run a script over a grid of its flags, in one process, and choose on held-out images.

Usage    python benchmark/sweep.py robust_kd.py --grid alpha=0.2,0.6,1 -- --demo
         python benchmark/sweep.py robust_kd.py --grid teacher-es=9,6,3 -- --teacher-save-every 3
         python benchmark/sweep.py robust_kd.py --grid lr=.1,.2 --baseline "--loss at --epochs 200"
         python benchmark/sweep.py robust_kd.py --grid lam=0.5,5/6,1 -- --loss ard+ --seeds 0 1
Grid     Every combination is one call of the script's own main with the flags after `--`; data are
         read once, teachers are shared as the script does it. The same command goes on where it
         stopped: a finished run is not run again. Early stops of one teacher: the longest first,
         with --teacher-save-every; then no other teacher is trained.
Table    A line for each combination: test accuracies of the last epoch, mean and deviation over
         seeds, and those on the held-out training images.
Choice   As Table 2 of paper 2, but on the held-out images: RKD-Acc. has the highest accuracy of
         those that lose at most 2 points of robustness to the baseline; RKD-Rob. the highest
         robustness of those that lose at most 2 points of accuracy. --baseline: the flags of that
         run (appended to the others); without it no line is barred.
Figure   With matplotlib: robustness against accuracy with the Pareto front; with one flag that is
         varied, accuracy against it. PREFIX.json and PREFIX.png are written.
"""

import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import plumbing

ROOT = Path(__file__).resolve().parent.parent
LOSS = 0.02  # of accuracy or robustness to the baseline that the paper allows


def parse_args(argv=None):
    """The flags of this program; `combinations` are the values and flags of each run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("script", help="robust_kd.py, ...")
    add("--grid", nargs="+", required=True, metavar="FLAG=VALUE,...", help="flags and their values")
    add("--baseline", metavar="FLAGS", help="what the lines under the table compare with")
    add("--robust", metavar="METRIC", help="None: aa_acc if it was measured, else pgdN_acc")
    add("--out", metavar="PREFIX", help="of the files; None: of the grid, with the runs")
    args = parser.parse_args(argv[:at])
    args.flags, args.script = argv[at + 1 :], Path(args.script).stem
    if not (ROOT / f"{args.script}.py").is_file() or args.script in (
        "common",
        "images",
        "plumbing",
    ):
        parser.error(f"script: there is no {args.script}.py to sweep")
    if "--name" in args.flags:
        parser.error("--name: a sweep leaves the names of its runs to the script")
    grid = {}
    for item in args.grid:
        flag, _, values = item.partition("=")
        flag = flag.removeprefix("--")
        if not re.fullmatch(r"[\w-]+", flag) or not all(values.split(",")):
            parser.error(f"--grid: expected FLAG=VALUE,VALUE, got {item!r}")
        if flag in grid:
            parser.error(f"--grid: {flag} stands there twice")
        grid[flag] = list(dict.fromkeys(values.split(",")))
    args.grid = grid
    args.combinations = [
        (dict(zip(grid, values)), [*args.flags, *options(zip(grid, values))])
        for values in itertools.product(*grid.values())
    ]
    for _, flags in args.combinations:  # all of them before the first one runs
        parsed(args.script, flags)
    if args.baseline is not None:
        parsed(args.script, baseline(args))
    return args


def options(pairs):
    """[(flag, value)] -> ['--flag=value', ...]."""
    return [f"--{flag}={value}" for flag, value in pairs]


def baseline(args):
    """The flags of the run with which the others are compared."""
    return [*args.flags, *shlex.split(args.baseline)]


def parsed(script, flags):
    """The script's own namespace of the flags; an unknown flag is one line, like all errors."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(script).parse_args(flags)
    except SystemExit:
        line = text.getvalue().removeprefix("error: ").strip()
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", line):
            line = f"{unknown[1]}: {script}.py has no such flag"
        common.fail(line)


# ------------------------------------------------------------------------------------------------
# Numbers


def run_one(script, flags):
    """Run the script with the flags; -> (numbers of each seed, the line with which it failed)."""
    try:
        importlib.import_module(script).main(flags)
    except SystemExit as end:
        if end.code in (130, 141, 143):  # what stops the script stops the sweep too
            raise
        if end.code:
            return [], f"status {end.code}"
    with contextlib.redirect_stdout(io.StringIO()):
        runs = plumbing.per_seed(parsed(script, flags))
    folders = [Path(run.runs) / script / f"{run.name}-s{run.seed}" for run in runs]
    return [numbers(folder) for folder in folders], ""


def numbers(folder):
    """{metric: accuracy} of a finished run: test, last epoch; val_*: held-out, last epoch."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = [row for row in rows[-1]["summary"] if "best" not in row["model"]]
    students = [row for row in summary if re.match(r"student(?![\w-])", row["model"])]
    stages = [row for row in rows[:-1] if row.get("stage") == "student"] or rows[:-1]
    held_out = {k: v for k, v in (stages or [{}])[-1].items() if k.startswith("val_")}
    return {k: v for k, v in (students or summary)[0].items() if k.endswith("_acc")} | held_out


def combine(seeds):
    """[{metric: value}] of the seeds -> {metric: (mean, std)}, the std 0 for one seed."""
    shared = [key for key in seeds[0] if all(key in one for one in seeds)] if seeds else []
    columns = {key: [one[key] for one in seeds] for key in shared}
    return {k: (mean(v), stdev(v) if len(v) > 1 else 0.0) for k, v in columns.items()}


def pareto(points):
    """Indices of the (x, y) that no other point beats in one and equals in the other."""
    beaten = [any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    return [i for i, is_beaten in enumerate(beaten) if not is_beaten]


def choose(lines, best, bound, limit):
    """The line with the highest held-out `best` of those with `bound` at least `limit`; or None."""
    able = [line for line in lines if best in line and bound in line]
    able = [line for line in able if limit is None or line[bound][0] >= limit]
    return max(able, key=lambda line: line[best][0], default=None)


def selection(lines, base, robust):
    """The sentences under the table: RKD-Acc. and RKD-Rob., chosen on the held-out images."""
    held_out = next((k for line in lines for k in line if re.match("val_(pgd|aa)", k)), None)
    if held_out is None:
        return ["No choice: no accuracies under attack on held-out images (--val-size)."]
    text = "" if base else " (no --baseline: no condition)"
    found = []
    for name, best, bound in [
        ("Acc", "val_clean_acc", held_out),
        ("Rob", held_out, "val_clean_acc"),
    ]:
        limit = base[bound][0] - LOSS if base else None
        line = choose(lines, best, bound, limit)
        if line is None:
            found.append(f"RKD-{name}.: no line loses at most {LOSS:g} of {bound} ({limit:.4f})")
            continue
        values = ", ".join(f"{flag} {value}" for flag, value in line["values"].items())
        held = " and ".join(f"{line[k][0]:.4f}" for k in ("val_clean_acc", held_out))
        test = " and ".join(f"{line[k][0]:.4f}" for k in ("clean_acc", robust))
        found.append(f"RKD-{name}.: {values}; held-out {held}, test {test}{text}")
    return found


# ------------------------------------------------------------------------------------------------
# Output


def show(lines, base, robust):
    """Print the table and the choice; -> the sentences of the choice."""
    rows, flags = [], list(lines[0]["values"])
    nothing = {flag: None for flag in flags} | {flags[0]: "baseline"}
    for line in [{"values": nothing} | base] * bool(base) + lines:
        cells = dict(line["values"])
        for key in ("clean_acc", robust, *(k for k in line if k.startswith("val_"))):
            if key in line:
                middle, spread = line[key]
                cells[key] = f"{middle:.4f}" + f" +- {spread:.4f}" * (spread > 0)
        rows.append(cells | ({"failed": line["failed"]} if line.get("failed") else {}))
    sentences = selection([line for line in lines if not line["failed"]], base, robust)
    print("", common.table(rows), "", *sentences, sep="\n", flush=True)
    return sentences


def draw(path, lines, base, robust):
    """Write the figure: the plane with its Pareto front, or accuracies against the one flag."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if robust in line and "clean_acc" in line]
    flags = list(lines[0]["values"]) if lines else []
    if not lines:
        return
    figure, axis = pyplot.subplots(figsize=(5.5, 4.5))
    if len(flags) == 1:
        names = [line["values"][flags[0]] for line in lines]
        places = [float(n) if re.fullmatch(r"[\d.]+", n) else i for i, n in enumerate(names)]
        for key in ("clean_acc", robust):
            middle, spread = zip(*(line[key] for line in lines))
            axis.errorbar(places, middle, spread, marker="o", capsize=3, label=key)
        axis.set(xlabel=flags[0], ylabel="accuracy", xticks=places)
        axis.set_xticklabels(names)
    else:
        points = [(line["clean_acc"][0], line[robust][0]) for line in lines]
        spreads = [(line["clean_acc"][1], line[robust][1]) for line in lines]
        first, *others = flags
        for value in dict.fromkeys(line["values"][first] for line in lines):  # a colour for each
            of = [i for i, line in enumerate(lines) if line["values"][first] == value]
            (x, y), (x_std, y_std) = (zip(*(pairs[i] for i in of)) for pairs in (points, spreads))
            axis.errorbar(x, y, y_std, x_std, "o", markersize=5, label=f"{first} {value}")
        front = sorted(points[i] for i in pareto(points))
        ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none"}
        axis.plot(*zip(*front), color="black", linewidth=1, label="Pareto front", **ring)
        for line, point in zip(lines, points):
            text = ", ".join(line["values"][flag] for flag in others)
            axis.annotate(text, point, xytext=(6, 3), textcoords="offset points", fontsize=7)
        if base and robust in base:
            axis.plot(base["clean_acc"][0], base[robust][0], "k*", markersize=9, label="baseline")
        axis.set(xlabel="clean accuracy", ylabel=robust.replace("_acc", " accuracy"))
        axis.set_title(f"next to each point: {', '.join(others)}", fontsize=9)
        axis.margins(0.1)
    axis.legend(fontsize=7)
    figure.tight_layout()
    common.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


@contextlib.contextmanager
def data_once():
    """common.load_data reads the same data once; a caller may change its Data, not another's."""
    read = common.load_data
    kept = functools.lru_cache(maxsize=2)(read)
    common.load_data = lambda *args, **options: copy.copy(kept(*args, **options))
    try:
        yield
    finally:
        common.load_data = read


def main(argv=None):
    """Run the grid, print one table and the choice, write the JSON and the figure."""
    args, lines, base = parse_args(argv), [], {}
    with data_once():
        if args.baseline is not None:
            seeds, failed = run_one(args.script, baseline(args))
            if failed:
                common.fail(f"--baseline: the run failed ({failed})")
            base = combine(seeds)
        for values, flags in args.combinations:
            seeds, failed = run_one(args.script, flags)
            lines.append({"values": values, "failed": failed} | combine(seeds))
    keys = dict.fromkeys(key for line in lines for key in line)
    attacks = [k for k in ("aa_acc", *keys) if k in keys and re.fullmatch(r"(aa|pgd\d+)_acc", k)]
    robust = args.robust or (attacks or ["clean_acc"])[0]
    sentences = show(lines, base, robust)
    runs = parsed(args.script, args.combinations[0][1]).runs
    asked = {"script": args.script, "grid": args.grid, "flags": args.flags}
    digest = common.derive_seed("sweep", asked, args.baseline)  # another sweep, another file
    prefix = Path(args.out or Path(runs) / args.script / f"sweep-{digest:016x}"[:14])
    record = asked | {"lines": lines, "choice": sentences}
    record["baseline"] = {"flags": args.baseline} | base
    text = json.dumps(record, indent=1) + "\n"
    json_file, picture = Path(f"{prefix}.json"), Path(f"{prefix}.png")
    common.write_atomically(json_file, lambda file: file.write(text.encode()))
    draw(picture, lines, base, robust)
    print("\nwritten:", *filter(Path.exists, (json_file, picture)))
    if any(line["failed"] for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    common.start(main)
