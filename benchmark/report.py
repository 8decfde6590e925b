"""Write docs/RESULTS.md and the table of the README from benchmark/results/*.json.

Usage    python benchmark/report.py                       # after python benchmark/run.py
Verdict  A rule, RULE below, which the page repeats; nothing in the page is typed by hand.
Figures  With matplotlib, of what has been measured (benchmark/plots.py results): all printed
         values against ours, a curve for each figure that varies a rate or a sigma, and the
         histograms of paper 1's Figure 8.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import plots, tables
from benchmark.records import (
    ROOT,
    deviation,
    is_count,
    is_size,
    measured,
    metric_title,
    read_records,
    table_title,
)

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
INTRODUCTION = (
    "Every number printed in the three papers, next to ours. Accuracies in percent; mean"
    " and standard deviation over seeds. The best epoch is chosen on held-out training"
    " images, and shown where it is not the last."
)
PAPERS = {
    "paper1": "Noisy collaboration ([1910.05057](https://arxiv.org/abs/1910.05057))",
    "paper2": "On the benefits of knowledge distillation for adversarial robustness "
    "([2203.07159](https://arxiv.org/abs/2203.07159)), in the text of its [TMLR submission]"
    "(https://openreview.net/forum?id=e25HGDzfTu)",
    "paper3": "Distillation in an adversarial context",
}
VERDICTS = ["reproduced", "direction only", "not reproduced", "not run"]
COLUMNS = [
    "line",
    "number",
    "paper",
    "here, last epoch",
    "best epoch",
    "seeds",
    "difference",
    "in stds",
    "verdict",
]
README_COLUMNS = ["line", "number", "paper", "here", "seeds", "verdict"]
README_LINES = 10  # at most so many
MARKS = "<!-- results: begin -->", "<!-- results: end -->"


def parse_args(argv=None):
    """The flags of this program as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--results", default=str(ROOT / "benchmark/results"), help="folder with the JSON results")
    add("--page", default=str(ROOT / "docs/RESULTS.md"), help="file of the page to be written")
    add("--readme", default=str(ROOT / "README.md"), help="file with the two marks, to be updated")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# The rule of the verdicts


def tolerance(metric: str, printed: float, std: float | None) -> float:
    """How far our mean may lie from the printed value."""
    if is_size(metric):
        decimals = len(f"{printed:g}".partition(".")[2])
        return 0.5 * 10.0**-decimals
    band = ROBUST_BAND if metric.startswith(("pgd", "aa")) else BAND
    return max(2 * (std or 0), band)


def is_same_direction(ours, ours_of_baseline, printed, printed_of_baseline) -> bool:
    """Whether our values differ from those of the baseline in the direction of the paper's.

    With two or more seeds the gap must be larger than its standard error.
    """
    gap = mean(ours) - mean(ours_of_baseline)
    error = 0.0
    if min(len(ours), len(ours_of_baseline)) > 1:
        variances = [deviation(v) ** 2 / len(v) for v in (ours, ours_of_baseline)]
        error = sum(variances) ** 0.5
    return gap * (printed - printed_of_baseline) > 0 and abs(gap) > error


def verdict(row: tables.Row, metric: str, records: dict) -> str:
    """One of VERDICTS, or "-" where the paper prints no value."""
    printed, std = row.printed[metric]
    ours = measured(row, metric, records)
    if printed is None:
        return "-"
    if not ours:
        return "not run"
    if abs(mean(ours) - printed) <= tolerance(metric, printed, std) + 1e-9:
        return "reproduced"
    for base in tables.ROWS:
        if (base.table, base.name) != (row.table, row.baseline) or metric not in base.printed:
            continue
        ours_of_baseline = measured(base, metric, records)
        printed_of_baseline = base.printed[metric][0]
        if not ours_of_baseline or printed_of_baseline is None:
            continue
        if is_same_direction(ours, ours_of_baseline, printed, printed_of_baseline):
            return "direction only"
        return "not reproduced"
    return "not reproduced"


# ------------------------------------------------------------------------------------------------
# Text of the pages


def format_values(values: list[float]) -> str:
    """'98.71 ± 0.05', '98.71' of one seed, '-' of none; large sizes with commas."""
    if not values:
        return "-"
    if values[0] == int(values[0]) and abs(values[0]) > 1000:
        return f"{values[0]:,.0f}"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {deviation(values):.2f}"


def format_printed(metric: str, printed: float | None, std: float | None) -> str:
    """A value of a paper as the paper prints it, '-' for none."""
    if printed is None:
        return "-"
    if printed > 1000:
        return f"{printed:,.0f}"
    if is_size(metric):
        return f"{printed:g}"
    return f"{printed:.2f}" if std is None else f"{printed:.2f} ± {std:.2f}"


def cells(row: tables.Row, metric: str, records: dict) -> list[str]:
    """The cells of a number, one for each of COLUMNS."""
    printed, std = row.printed[metric]
    ours = measured(row, metric, records)
    difference, in_stds = "-", "-"
    if ours and printed is not None:
        gap = mean(ours) - printed
        difference = f"{gap:+.2f}"
        if std:
            in_stds = f"{gap / std:+.1f}"
    return [
        row.name,
        metric_title(metric),
        format_printed(metric, printed, std),
        format_values(ours),
        format_values(measured(row, metric, records, best=True)),
        str(len(ours)) if ours and not is_count(row.run) else "-",
        difference,
        in_stds,
        verdict(row, metric, records),
    ]


def markdown(columns: list, lines: list) -> str:
    """Lines of cells as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(rows: list, records: dict) -> str:
    """How the numbers of the rows were measured: a part for each kind of machine and attack."""
    runs = {row.run for row in rows}
    attacked = any(metric.startswith(("pgd", "aa")) for row in rows for metric in row.printed)
    seeds_of = {}  # description -> seeds
    for (run, seed), record in sorted(records.items()):
        if run not in runs:
            continue
        flags = record["flags"]
        text = f"{record['gpu'] or 'CPU'}, torch {record['torch']}, commit {record['commit']}"
        text += f"; {flags.get('test_subset') or 'all'} test images"
        if attacked:
            step = flags.get("step_size") or flags["eps"] / 4
            text += f"; eps {255 * flags['eps']:.3g}/255, PGD step {255 * step:.3g}/255"
            text += f", {flags.get('restarts') or 1} start(s)"
        seeds_of.setdefault(text, set()).add(seed)
    if not seeds_of:
        return ""
    parts = []
    for text, seeds in seeds_of.items():
        parts.append(f"{text}; seeds {', '.join(map(str, sorted(seeds)))}")
    return "Measured: " + "; ".join(parts) + "."


def section(table: str, rows: list, records: dict) -> str:
    """The part of the page for a table or figure of a paper."""
    is_choices = table.endswith("-choices")
    parts = [f"### {table_title(table)}", f"`benchmark/run.py {table}`"]
    for reason in dict.fromkeys(row.reason for row in rows if row.reason and not row.printed):
        parts.append(f"Not run: {reason}.")

    pairs = [(row, metric) for row in rows for metric in row.printed]
    shown = []
    for row, metric in pairs:
        has_value = row.printed[metric][0] is not None and not is_choices
        if has_value or measured(row, metric, records):
            shown.append((row, metric))
    if shown:
        lines = []
        for row, metric in shown:
            line = cells(row, metric, records)
            if row.reason:
                line[-1] += f": {row.reason}"
            lines.append(line)
        parts.append(markdown(COLUMNS, lines))
    hidden = {row.run for row, _ in pairs} - {row.run for row, _ in shown}
    if hidden:
        parts.append(f"{len(hidden)} runs without a result here.")

    notes = {}
    for row, metric in shown:
        if verdict(row, metric, records) in ("direction only", "not reproduced") and row.note:
            notes[row.id] = f"- {row.name}: {row.note}."
    if notes:
        parts.append("What may explain the differences:\n\n" + "\n".join(notes.values()))
    if is_choices:
        nearest = nearest_choices(rows, records)
        if nearest:
            parts.append("Nearest to the paper:\n\n" + "\n".join(nearest))
    provenance = origin([row for row, _ in shown], records)
    if provenance:
        parts.append(provenance)
    if shown and not is_choices:
        runs = dict.fromkeys(row.run for row in rows if row.run and not is_count(row.run))
        commands = "\n".join(runs)
        parts.append(f"<details><summary>commands</summary>\n\n```\n{commands}\n```\n\n</details>")
    return "\n\n".join(parts)


def nearest_choices(choice_rows: list, records: dict) -> list[str]:
    """Lines for the page: which open choice of a headline row comes nearest to the paper."""
    lines = []
    rows_by_id = {row.id: row for row in tables.ROWS}
    for row in filter(None, map(rows_by_id.get, tables.CHOICES)):
        candidates = {"the default": row}
        for choice in choice_rows:
            same_paper = choice.table[:6] == row.table[:6]
            if same_paper and choice.name.startswith(f"{row.name}: "):
                candidates[choice.name.split(": ")[1]] = choice
        gaps = {}  # choice -> its largest gap, in units of the tolerance
        for name, candidate in candidates.items():
            ours = {metric: measured(candidate, metric, records) for metric in row.printed}
            if all(ours.values()):
                gaps[name] = max(
                    abs(mean(ours[metric]) - printed) / tolerance(metric, printed, std)
                    for metric, (printed, std) in row.printed.items()
                )
        if len(gaps) > 1:
            best = min(gaps, key=gaps.get)
            title = table_title(row.table)
            lines.append(f"- {title}, {row.name}: {best}, of {len(gaps)} tried.")
    return lines


def count_verdicts(paper: str, records: dict) -> dict:
    """{verdict: how many printed numbers of the paper}, sizes and accuracies together."""
    counts = dict.fromkeys(VERDICTS, 0)
    for row in tables.ROWS:
        if row.table.startswith(paper) and not row.table.endswith("-choices"):
            for metric in row.printed:
                text = verdict(row, metric, records)
                if text in counts:
                    counts[text] += 1
    return counts


def page(records: dict, figures: list[Path]) -> str:
    """The text of docs/RESULTS.md."""
    overview = []
    for paper, name in PAPERS.items():
        counts = count_verdicts(paper, records)
        overview.append([name, sum(counts.values()), *counts.values()])
    parts = [
        "# Results",
        "Written by `benchmark/report.py` from `benchmark/results/*.json`.",
        INTRODUCTION,
        RULE,
        markdown(["paper", "printed numbers", *VERDICTS], overview),
        *(f"![{path.stem}]({path.name})" for path in figures),
    ]
    for paper, name in PAPERS.items():
        parts.append(f"## {name}")
        rows_of = {}
        for row in tables.ROWS:
            if row.table.startswith(paper):
                rows_of.setdefault(row.table, []).append(row)
        parts += [section(table, rows, records) for table, rows in rows_of.items()]
    return "\n\n".join(parts) + "\n"


def headline(records: dict) -> str:
    """The table of the README: measured headline rows, a line a run, and the count of numbers.

    Of rows that share a run and a net, the first; README_LINES lines at most.
    """
    lines = {}
    for row in tables.ROWS:
        verdicts = {verdict(row, metric, records) for metric in row.printed}
        is_run = bool(verdicts & {"reproduced", "direction only", "not reproduced"})
        if row.turn != "a" or is_count(row.run) or not is_run:
            continue
        numbers = [dict(zip(COLUMNS, cells(row, metric, records))) for metric in row.printed]
        line = [
            f"paper {row.table[5]}, {table_title(row.table)}: {row.name}",
            " / ".join(number["number"] for number in numbers),
            " / ".join(number["paper"] for number in numbers),
            " / ".join(number["here, last epoch"] for number in numbers),
            max(number["seeds"] for number in numbers),
            " / ".join(number["verdict"] for number in numbers),
        ]
        lines.setdefault((row.run, row.take), line)
    total = dict.fromkeys(VERDICTS, 0)
    for paper in PAPERS:
        for text, count in count_verdicts(paper, records).items():
            total[text] += count
    counts = ", ".join(f"{count} {text}" for text, count in total.items())
    summary = (
        f"Of {sum(total.values())} printed numbers: {counts}; "
        "all of them are in [docs/RESULTS.md](docs/RESULTS.md)."
    )
    if not lines:
        return summary
    return markdown(README_COLUMNS, list(lines.values())[:README_LINES]) + "\n\n" + summary


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    common.write_atomically(path, lambda file: file.write(text.encode()))


def main(argv=None):
    """Write the page, the figures beside it and the part of the README between the marks."""
    args = parse_args(argv)
    page_path, readme = Path(args.page), Path(args.readme)
    old = readme.read_text() if readme.exists() else ""
    if MARKS[0] not in old or MARKS[1] not in old:
        lines = " and ".join(MARKS)
        raise common.UserError(f"--readme: {readme} has no lines {lines}; add them")
    records = {
        key: record
        for key, record in read_records(args.results).items()
        if record.get("scale") == "full"
    }
    figures = plots.draw_results(records, page_path.parent)
    write_text(page_path, page(records, figures))
    before, after = old.split(MARKS[0])[0], old.split(MARKS[1])[1]
    write_text(readme, f"{before}{MARKS[0]}\n{headline(records)}\n{MARKS[1]}{after}")
    print(f"{page_path}, {readme}: {len(records)} results")


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
