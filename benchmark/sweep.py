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
Written  PREFIX.json and, with matplotlib, PREFIX.png (benchmark/plots.py sweep): robustness against
         accuracy with the Pareto front; with one flag that is varied, accuracy against it.
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
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import plots
from benchmark.records import deviation

SCRIPTS = (
    "fickle_teacher",
    "messy_collab",
    "robust_kd",
    "soft_randomization",
    "teacher_free_kd",
)
ALLOWED_LOSS = 0.02  # of accuracy or robustness, compared with the baseline; from the paper


def parse_args(argv=None):
    """The flags as a namespace, with `combinations`: (values, flags of the script) of each run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("script", help="script to run, for example robust_kd.py")
    add("--grid", nargs="+", required=True, metavar="FLAG=VALUE,...", help="flags and their values")
    add("--baseline", metavar="FLAGS", help="flags of the run that the lines are compared with")
    add("--robust", metavar="METRIC", help="robustness to show (default: aa_acc, else pgdN_acc)")
    add("--out", metavar="PREFIX", help="start of the files' names (default: made of the grid)")
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 :]
    args.script = Path(args.script).stem
    if args.script not in SCRIPTS:
        parser.error(f"script: there is no {args.script}.py to sweep; one of {', '.join(SCRIPTS)}")
    if "--name" in args.flags:
        parser.error("--name: a sweep leaves the names of its runs to the script")
    args.grid = parse_grid(args.grid, parser.error)
    args.combinations = []
    for chosen in itertools.product(*args.grid.values()):
        values = dict(zip(args.grid, chosen))
        flags = [*args.flags, *(f"--{flag}={value}" for flag, value in values.items())]
        args.combinations.append((values, flags))
    for _, flags in args.combinations:  # all of them before the first one runs
        parse_script_flags(args.script, flags)
    if args.baseline is not None:
        parse_script_flags(args.script, baseline_flags(args))
    return args


def parse_grid(items, error):
    """['alpha=0.2,0.6', ...] -> {'alpha': ['0.2', '0.6'], ...}."""
    grid = {}
    for item in items:
        flag, _, values = item.partition("=")
        flag = flag.removeprefix("--")
        if not re.fullmatch(r"[\w-]+", flag) or not all(values.split(",")):
            error(f"--grid: expected FLAG=VALUE,VALUE, got {item!r}")
        if flag in grid:
            error(f"--grid: {flag} is given twice; put all its values into one list")
        grid[flag] = list(dict.fromkeys(values.split(",")))
    return grid


def baseline_flags(args):
    """The flags of the run with which the others are compared."""
    return [*args.flags, *shlex.split(args.baseline)]


def parse_script_flags(script, flags):
    """The script's own namespace of the flags; raises UserError."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a preset says what it sets
            return importlib.import_module(script).parse_args(flags)
    except common.UserError as error:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", str(error))
        if unknown:
            raise common.UserError(f"{unknown[1]}: {script}.py has no such flag") from None
        raise


# ------------------------------------------------------------------------------------------------
# Numbers


def run_one(script, flags):
    """Run the script with the flags: -> (accuracies of each seed, error message or None)."""
    try:
        summaries = importlib.import_module(script).main(flags)
    except common.UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return [], str(error)
    args = parse_script_flags(script, flags)
    accuracies = []
    for seed, rows in zip(args.seeds or [args.seed], summaries):
        folder = Path(args.runs) / script / f"{args.name}-s{seed}"
        accuracies.append(student_accuracies(rows) | held_out_accuracies(folder))
    return accuracies, None


def student_accuracies(rows):
    """{metric: accuracy} of the student's last epoch in the summary of a run."""
    last_epochs = [row for row in rows if "best" not in row["model"]]
    students = [row for row in last_epochs if re.match(r"student(?![\w-])", row["model"])]
    row = (students or last_epochs)[0]
    return {metric: number for metric, number in row.items() if metric.endswith("_acc")}


def held_out_accuracies(folder):
    """{val_...: accuracy} of the last epoch of the student, or of the last stage without one."""
    log = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
    rows = [json.loads(line) for line in log.splitlines()]
    rows = [row for row in rows if row["stage"] == "student"] or rows
    if not rows:
        return {}
    return {metric: number for metric, number in rows[-1].items() if metric.startswith("val_")}


def combine(seeds):
    """[{metric: value}] of the seeds -> {metric: (mean, std)}, the std 0 for one seed."""
    combined = {}
    for metric in seeds[0] if seeds else ():
        values = [accuracies[metric] for accuracies in seeds if metric in accuracies]
        if len(values) == len(seeds):
            combined[metric] = (mean(values), deviation(values))
    return combined


def choose(lines, best, bound, limit):
    """The line with the highest held-out `best` of those with `bound` at least `limit`; or None."""
    able = [line for line in lines if best in line and bound in line]
    if limit is not None:
        able = [line for line in able if line[bound][0] >= limit]
    return max(able, key=lambda line: line[best][0], default=None)


def describe_choices(lines, baseline, robust):
    """The sentences under the table: RKD-Acc. and RKD-Rob., chosen on the held-out images."""
    attacked = [key for line in lines for key in line if key.startswith(("val_pgd", "val_aa"))]
    if not attacked:
        return ["No choice: no accuracies under attack on held-out images (--val-size)."]
    clean, attacked = "val_clean_acc", attacked[0]
    sentences = []
    for name, best, bound in [("RKD-Acc.", clean, attacked), ("RKD-Rob.", attacked, clean)]:
        limit = baseline[bound][0] - ALLOWED_LOSS if baseline else None
        line = choose(lines, best, bound, limit)
        if line is None:
            limited = f"no line loses at most {ALLOWED_LOSS:g} of {bound} ({limit:.4f})"
            sentences.append(f"{name}: {limited}")
            continue
        values = ", ".join(f"{flag} {value}" for flag, value in line["values"].items())
        held_out = f"{line[clean][0]:.4f} and {line[attacked][0]:.4f}"
        test = f"{line['clean_acc'][0]:.4f} and {line[robust][0]:.4f}"
        sentence = f"{name}: {values}; held-out {held_out}, test {test}"
        if not baseline:
            sentence += " (no --baseline: no condition)"
        sentences.append(sentence)
    return sentences


# ------------------------------------------------------------------------------------------------
# Output


def show(lines, baseline, robust, sentences):
    """Print the table, the baseline first, and the sentences."""
    flags = list(lines[0]["values"])
    if baseline:
        names = dict.fromkeys(flags) | {flags[0]: "baseline"}
        lines = [{"values": names, "failed": None} | baseline, *lines]
    rows = []
    for line in lines:
        row = dict(line["values"])
        held_out = [key for key in line if key.startswith("val_")]
        for metric in ("clean_acc", robust, *held_out):
            if metric not in line:
                continue
            middle, spread = line[metric]
            row[metric] = f"{middle:.4f}"
            if spread > 0:
                row[metric] += f" +- {spread:.4f}"
        if line["failed"]:
            row["failed"] = line["failed"]
        rows.append(row)
    print("", common.table(rows), "", *sentences, sep="\n", flush=True)


@contextlib.contextmanager
def data_read_once():
    """common.load_data reads the same data once; a caller may change its Data, not another's."""
    read = common.load_data
    cached = functools.lru_cache(maxsize=2)(read)
    common.load_data = lambda *args, **options: copy.copy(cached(*args, **options))
    try:
        yield
    finally:
        common.load_data = read


def main(argv=None):
    """Run the grid, print one table and the choice, write the JSON and the figure."""
    args = parse_args(argv)
    baseline, lines = {}, []
    with data_read_once():
        if args.baseline is not None:
            seeds, failed = run_one(args.script, baseline_flags(args))
            if failed:
                raise common.UserError(f"--baseline: the run failed: {failed}")
            baseline = combine(seeds)
        for values, flags in args.combinations:
            seeds, failed = run_one(args.script, flags)
            lines.append({"values": values, "failed": failed} | combine(seeds))
    attacks = {key for line in lines for key in line if re.fullmatch(r"(aa|pgd\d+)_acc", key)}
    robust = args.robust or min(attacks, default="clean_acc")  # aa_acc is before pgdN_acc
    sentences = describe_choices([line for line in lines if not line["failed"]], baseline, robust)
    show(lines, baseline, robust, sentences)
    record = {
        "script": args.script,
        "grid": args.grid,
        "flags": args.flags,
        "robust": robust,
        "lines": lines,
        "choice": sentences,
        "baseline": {"flags": args.baseline} | baseline,
    }
    prefix = args.out or default_prefix(args)
    written = [Path(f"{prefix}.json")]
    common.write_json(written[0], record)
    if plots.draw_sweep(Path(f"{prefix}.png"), record):
        written.append(Path(f"{prefix}.png"))
    print("\nwritten:", *written)
    if any(line["failed"] for line in lines):
        raise SystemExit(1)


def default_prefix(args):
    """<runs>/<script>/sweep-<digest>: another grid, flags or baseline has other files."""
    asked = {"script": args.script, "grid": args.grid, "flags": args.flags}
    digest = common.derive_seed("sweep", asked, args.baseline)
    runs = parse_script_flags(args.script, args.combinations[0][1]).runs
    return Path(runs) / args.script / f"sweep-{digest:016x}"[:14]


if __name__ == "__main__":
    common.start(main)
