"""Write docs/RESULTS.md and the table of the README from benchmark/results/*.json.

Usage    python benchmark/report.py                       # after python benchmark/run.py
Verdict  A rule, RULE below, which the page repeats; nothing in the page is typed by hand.
Figures  With matplotlib, of what has been measured: all printed values against ours, a curve for
         each figure that varies a rate or a sigma, the histograms of paper 1's Figure 8. Without
         results there are none.
"""

import re
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import robustness, run, tables

ROOT = Path(__file__).resolve().parent.parent
BAND, ROBUST_BAND = 1.0, 0.7  # points that two trainings of one recipe may differ by
RULE = f"""\
- **reproduced**: our mean lies within twice the paper's standard deviation of its value, or within
  {BAND} points (clean images) or {ROBUST_BAND} (attacked ones) where that is more or no deviation
  is printed; a size: the same when rounded as printed.
- **direction only**: not so, but it differs from the line that the paper compares it with in the
  same direction as in the paper, with two or more seeds by more than the standard error of that
  difference.
- **not reproduced**: neither.
- **not run**: no result here yet. **-**: the paper prints no value."""
PAPERS = {
    "paper1": "Noisy collaboration ([1910.05057](https://arxiv.org/abs/1910.05057))",
    "paper2": "On the benefits of knowledge distillation for adversarial robustness "
    "([2203.07159](https://arxiv.org/abs/2203.07159)), in the text of its [TMLR submission]"
    "(https://openreview.net/forum?id=e25HGDzfTu)",
    "paper3": "Distillation in an adversarial context",
}
VERDICTS = ["reproduced", "direction only", "not reproduced", "not run"]
NAMES = {"clean_acc": "clean", "aa_acc": "AutoAttack", "cinic_acc": "CINIC-10", "mca_acc": "mCA"}
NAMES |= {"others_acc": "other digits", "digit_acc": "that digit", "millions": "million weights"}
NAMES |= {"entropy": "entropy, nats"}
MOST = 10  # lines in the README
MARKS = "<!-- results: begin -->", "<!-- results: end -->"


def parse_args(argv=None):
    """The flags of this program."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--results", default=str(ROOT / "benchmark/results"), help="folder of the results")
    add("--page", default=str(ROOT / "docs/RESULTS.md"), help="the page to write")
    add("--readme", default=str(ROOT / "README.md"), help="the page with the two marks")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# Numbers


def is_size(metric):
    """Whether the metric counts something, and is no accuracy."""
    return not metric.endswith("_acc")


def measured(row, metric, done, best=False):
    """Our values of a metric, a value a seed, in the units of the paper."""
    if row.run.startswith("count "):
        return [] if best else [run.counted(row.run)[metric]]
    found, nets = [], set()
    for (command, seed), record in sorted(done.items()):
        net = record.get("weights", {}).get(row.take, seed)
        if command == row.run and net not in nets:  # the same net again is not another seed
            nets.add(net)
            found.append(run.value(record, row.take, metric, best))
    return [value if is_size(metric) else 100 * value for value in found if value is not None]


def tolerance(metric, value, std):
    """How far our mean may lie from the printed value."""
    if is_size(metric):
        return 0.5 * 10.0 ** -len(f"{value:g}".partition(".")[2])
    return max(2 * (std or 0), ROBUST_BAND if re.match("pgd|aa", metric) else BAND)


def same_direction(row, metric, ours, others, value):
    """Whether ours differ from the baseline's as the paper's do: (value of the paper, values)."""
    base, theirs = others
    gap, paper = mean(ours) - mean(theirs), value - base
    error = 0.0
    if min(len(ours), len(theirs)) > 1:
        error = (stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs)) ** 0.5
    return gap * paper > 0 and abs(gap) > error


def verdict(row, metric, done):
    """One of VERDICTS, or "-" where the paper prints no value."""
    value, std = row.printed[metric]
    ours = measured(row, metric, done)
    if value is None:
        return "-"
    if not ours:
        return "not run"
    if abs(mean(ours) - value) <= tolerance(metric, value, std) + 1e-9:
        return "reproduced"
    for base in tables.ROWS:
        if (base.table, base.name) == (row.table, row.baseline) and metric in base.printed:
            others = base.printed[metric][0], measured(base, metric, done)
            if others[0] is not None and others[1]:
                right = same_direction(row, metric, ours, others, value)
                return "direction only" if right else "not reproduced"
    return "not reproduced"


# ------------------------------------------------------------------------------------------------
# Pages


def number(values):
    """'98.71 ± 0.05', '98.71' of one seed, '-' of none; sizes as they are."""
    if not values:
        return "-"
    if values[0] == int(values[0]) and abs(values[0]) > 1000:
        return f"{values[0]:,.0f}"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def title(table):
    """'paper2-table3' -> 'Table 3'."""
    name = table.split("-", 1)[1]
    named = re.fullmatch(r"(table|figure)(\d+)", name)
    known = {"text": "Text", "a3": "Appendix A.3", "choices": "Open choices"}
    return f"{named[1].title()} {named[2]}" if named else known[name]


def label(metric):
    """How a metric is called in the pages."""
    found = re.fullmatch(r"pgd(\d+)(_conditional)?_acc", metric)
    conditional = ", of those right when clean" if found and found[2] else ""
    return f"PGD-{found[1]}{conditional}" if found else NAMES.get(metric, metric)


def cells(row, metric, done):
    """The cells of a number: line, metric, paper, here, seeds, difference, in stds, verdict."""
    value, std = row.printed[metric]
    ours, best = measured(row, metric, done), measured(row, metric, done, best=True)
    paper = "-"
    if value is not None:
        paper = f"{value:,.0f}" if value > 1000 else f"{value:g}" if is_size(metric) else None
        paper = paper or f"{value:.2f}" + (f" ± {std:.2f}" if std is not None else "")
    gap = mean(ours) - value if ours and value is not None else None
    difference = "-" if gap is None else f"{gap:+.2f}"
    stds = f"{gap / std:+.1f}" if gap is not None and std else "-"
    seeds = str(len(ours)) if ours and not row.run.startswith("count ") else "-"
    here = [number(ours), number(best), seeds, difference, stds]
    return [row.name, label(metric), paper, *here, verdict(row, metric, done)]


def markdown(head, rows):
    """Rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(rows, done):
    """How the numbers of the rows were measured: a sentence for each kind of machine and attack."""
    runs, found = {row.run for row in rows}, {}
    for (command, seed), record in sorted(done.items()):
        if command in runs:
            flags = record["flags"]
            text = f"{record['gpu'] or 'CPU'}, torch {record['torch']}, commit {record['commit']}"
            text += f"; {flags.get('test_subset') or 'all'} test images"
            if any(re.match("pgd|aa", metric) for row in rows for metric in row.printed):
                step = flags.get("step_size") or flags["eps"] / 4
                text += f"; eps {255 * flags['eps']:.3g}/255, PGD step {255 * step:.3g}/255"
                text += f", {flags.get('restarts') or 1} start(s)"
            found.setdefault(text, set()).add(seed)
    lines = [f"{text}; seeds {', '.join(map(str, sorted(s)))}" for text, s in found.items()]
    return "Measured: " + "; ".join(lines) + "." if lines else ""


HEAD = ["line", "number", "paper", "here, last epoch", "best epoch", "seeds", "difference"]
HEAD += ["in stds", "verdict"]


def section(table, rows, done):
    """The part of the page for a table or figure."""
    parts = [f"### {title(table)}", f"`benchmark/run.py {table}`"]
    for reason in {row.reason: None for row in rows if row.reason and not row.printed}:
        parts.append(f"Not run: {reason}.")
    pairs = [(row, metric) for row in rows for metric in row.printed]
    shown = [(r, m) for r, m in pairs if r.printed[m][0] is not None or measured(r, m, done)]
    if table.endswith("-choices"):
        shown = [(r, m) for r, m in shown if measured(r, m, done)]
    if shown:
        lines = [cells(row, metric, done) for row, metric in shown]
        for line, (row, _) in zip(lines, shown):
            line[-1] += f": {row.reason}" if row.reason else ""
        parts.append(markdown(HEAD, lines))
    hidden = len({row.run for row, _ in pairs} - {row.run for row, _ in shown})
    if hidden:
        parts.append(f"{hidden} runs without a result here.")
    wrong = unique(row for row, m in shown if verdict(row, m, done) in VERDICTS[1:3])
    notes = [f"- {row.name}: {row.note}." for row in wrong if row.note]
    if notes:
        parts.append("What may explain the differences:\n\n" + "\n".join(notes))
    if table.endswith("-choices"):
        parts += nearest(rows, done)
    if how := origin([row for row, _ in shown], done):
        parts.append(how)
    commands = {row.run: row.name for row in rows if row.run[:6] != "count " and row.run}
    if shown and not table.endswith("-choices"):
        lines = "\n".join(f"{command}" for command in commands)
        parts.append(f"<details><summary>commands</summary>\n\n```\n{lines}\n```\n\n</details>")
    return "\n\n".join(parts)


def nearest(rows, done):
    """A list for the page: which open choice of a headline row comes nearest to the paper."""
    found = []
    by_id = {row.id: row for row in tables.ROWS}
    for row in filter(None, map(by_id.get, tables.CHOICES)):
        tried = [r for r in rows if r.name.startswith(f"{row.name}: ")]
        tried, gaps = [r for r in tried if r.table[:6] == row.table[:6]], {}
        for name, one in [("the default", row), *((r.name.split(": ")[1], r) for r in tried)]:
            ours = {metric: measured(one, metric, done) for metric in row.printed}
            if all(ours.values()):
                gaps[name] = max(
                    abs(mean(ours[m]) - value) / tolerance(m, value, std)
                    for m, (value, std) in row.printed.items()
                )
        if len(gaps) > 1:
            choice = min(gaps, key=gaps.get)
            found.append(f"- {title(row.table)}, {row.name}: {choice}, of {len(gaps)} tried.")
    return ["Nearest to the paper:\n\n" + "\n".join(found)] if found else []


def unique(rows):
    """The rows, each once."""
    return list({row.id: row for row in rows}.values())


def counts(paper, done):
    """{verdict: how many printed numbers of the paper}, sizes and the rest together."""
    found = dict.fromkeys(VERDICTS, 0)
    for row in tables.ROWS:
        if row.table.startswith(paper) and not row.table.endswith("-choices"):
            for metric in row.printed:
                if (text := verdict(row, metric, done)) != "-":
                    found[text] += 1
    return found


def page(done, figures):
    """The text of docs/RESULTS.md."""
    head = ["paper", "printed numbers", *VERDICTS]
    rows = []
    for paper, name in PAPERS.items():
        found = counts(paper, done)
        rows.append([name, sum(found.values()), *found.values()])
    parts = ["# Results", "Written by `benchmark/report.py` from `benchmark/results/*.json`."]
    parts += ["Every number printed in the three papers, next to ours. Accuracies in percent; mean"
              " and standard deviation over seeds. The best epoch is chosen on held-out training"
              " images, and shown where it is not the last."]  # fmt: skip
    parts += [RULE, markdown(head, rows)]
    parts += [f"![{path.stem}]({path.name})" for path in figures]
    for paper, name in PAPERS.items():
        parts.append(f"## {name}")
        for table in dict.fromkeys(r.table for r in tables.ROWS if r.table.startswith(paper)):
            parts.append(section(table, [r for r in tables.ROWS if r.table == table], done))
    return "\n\n".join(parts) + "\n"


def headline(done):
    """The table of the README: measured headline rows, a line a run, and the count of numbers.

    Of rows that share a run and print the same, the first; MOST lines at most.
    """
    lines = {}
    for row in tables.ROWS:
        texts = {verdict(row, metric, done) for metric in row.printed}
        if row.turn == "a" and not row.run.startswith("count") and texts & set(VERDICTS[:3]):
            parts = [cells(row, metric, done) for metric in row.printed]
            _, numbers, paper, here, *_, text = [" / ".join(column) for column in zip(*parts)]
            name = f"paper {row.table[5]}, {title(row.table)}: {row.name}"
            seeds = max(part[5] for part in parts)
            lines.setdefault((row.run, row.take), [name, numbers, paper, here, seeds, text])
    total = {v: sum(counts(paper, done)[v] for paper in PAPERS) for v in VERDICTS}
    text = ", ".join(f"{total[v]} {v}" for v in VERDICTS)
    text = f"Of {sum(total.values())} printed numbers: {text}; "
    head = ["line", "number", "paper", "here", "seeds", "verdict"]
    parts = [markdown(head, list(lines.values())[:MOST])] if lines else []
    return "\n\n".join([*parts, text + "all of them are in [docs/RESULTS.md](docs/RESULTS.md)."])


# ------------------------------------------------------------------------------------------------
# Figures


def curves(rows, done):
    """{(metric, line): [(value, mean, std)]} of rows whose names hold a rate or a sigma."""
    found = {}
    for row in rows:
        names = re.finditer(r"\b(sigma|dropout|r|corruption|ES|alpha|beta) ([\d.]+)", row.name)
        name, *more = [*names, None]  # what varies, if it is one thing
        name = None if len(more) > 1 else name
        for metric in row.printed if name else ():
            if ours := measured(row, metric, done):
                line = row.name.replace(name[0], "").strip(", ") or name[1]
                spread = stdev(ours) if len(ours) > 1 else 0.0
                point = (float(name[2]), mean(ours), spread)
                found.setdefault((metric, line), []).append(point)
    return {key: sorted(points) for key, points in found.items() if len(points) > 1}


def draw(done, folder):
    """Write the figures of what has been measured; -> their paths, [] without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []

    def save(figure, name):
        figure.tight_layout()
        common.write_atomically(folder / name, lambda f: figure.savefig(f, format="png", dpi=80))
        pyplot.close(figure)
        paths.append(folder / name)

    points = {}
    for row in tables.ROWS:
        for metric, (value, std) in row.printed.items():
            ours = measured(row, metric, done)
            if value is not None and ours and not is_size(metric) and "choices" not in row.table:
                error = stdev(ours) if len(ours) > 1 else 0.0
                points.setdefault(row.table[:6], []).append((value, mean(ours), std or 0.0, error))
    if points:
        figure, axis = pyplot.subplots(figsize=(5, 5))
        low = min(min(p[:2]) for group in points.values() for p in group)
        axis.plot([low, 100], [low, 100], color="gray", linewidth=0.5)
        for paper, group in points.items():
            x, y, x_error, y_error = zip(*group)
            axis.errorbar(x, y, y_error, x_error, fmt=".", label=f"{paper[:5]} {paper[5]}")
        axis.set(xlabel="printed, %", ylabel="here, %")
        axis.legend()
        save(figure, "results.png")
    for table in dict.fromkeys(row.table for row in tables.ROWS):
        lines = curves([row for row in tables.ROWS if row.table == table], done)
        metrics = list(dict.fromkeys(metric for metric, _ in lines))
        if metrics:
            figure, axes = pyplot.subplots(1, len(metrics), squeeze=False)
            figure.set_size_inches(4.5 * len(metrics), 3.5)
            for axis, metric in zip(axes[0], metrics):
                for (of, line), points_of in lines.items():
                    if of == metric:
                        axis.errorbar(*zip(*points_of), marker=".", label=line)
                axis.set(
                    ylabel=f"{label(metric)}, %", title=f"{table[:5]} {table[5]}, {title(table)}"
                )
                axis.legend(fontsize=6)
            save(figure, f"results-{table}.png")
    shares = {}  # softmax probabilities, the mean over seeds
    for row in tables.ROWS:
        if "entropy" in row.printed and (ours := measured(row, "probabilities", done)):
            shares[row.name] = [mean(bins) for bins in zip(*ours)]
    if shares:
        figure, axis = pyplot.subplots(figsize=(5.5, 4))
        robustness.draw_probabilities(axis, shares)
        save(figure, "results-paper1-figure8.png")
    return paths


def main(argv=None):
    """Write the page, the figures beside it and the part of the README between the marks."""
    args = parse_args(argv)
    done = run.read_results(args.results)
    done = {key: record for key, record in done.items() if record.get("scale") == "full"}
    page_path, readme = Path(args.page), Path(args.readme)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    text = page(done, draw(done, page_path.parent))
    common.write_atomically(page_path, lambda file: file.write(text.encode()))
    old = readme.read_text() if readme.exists() else ""
    if MARKS[0] not in old or MARKS[1] not in old:
        common.fail(f"--readme: {readme} has no lines {MARKS[0]} and {MARKS[1]}")
    before, after = old.split(MARKS[0])[0], old.split(MARKS[1])[1]
    new = f"{before}{MARKS[0]}\n{headline(done)}\n{MARKS[1]}{after}"
    common.write_atomically(readme, lambda file: file.write(new.encode()))
    print(f"{page_path}, {readme}: {len(done)} results")


if __name__ == "__main__":
    common.start(main)
