"""Write docs/RESULTS.md: the numbers printed in the papers that have been measured, beside ours.

Usage    python benchmark/report.py                       # after benchmark/run.py
Numbers  benchmark/printed.csv and benchmark/results/*.json; no number in the page is typed by hand.
"""

import re
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import ROOT, evaluation_attack
from benchmark.run import PRINTED, RESULTS, read_printed, read_results

PAPERS = {
    "paper1": "Noisy collaboration ([1910.05057](https://arxiv.org/abs/1910.05057))",
    "paper2": "On the benefits of knowledge distillation for adversarial robustness "
    "([2203.07159](https://arxiv.org/abs/2203.07159)), in the text of its [TMLR submission]"
    "(https://openreview.net/forum?id=e25HGDzfTu)",
    "paper3": "Distillation in an adversarial context",
}
METRIC_NAMES = {
    "clean_acc": "clean",
    "aa_acc": "AutoAttack",
    "cinic_acc": "CINIC-10",
    "macs": "multiply-adds",
}
INTRODUCTION = """\
# Results

Written by `python benchmark/report.py` from `benchmark/results/*.json` and
[printed.csv](../benchmark/printed.csv). The latter has every number that the three papers print,
with the command that gives it here: `python benchmark/run.py paper3 table2` runs a table. This page
shows what has been run.

Accuracies are in percent, "here" after the last epoch, with the standard deviation over the seeds.
The best epoch is chosen on held-out training images, and shown where it is not the last."""
COLUMNS = ["line", "number", "printed", "here", "seeds", "difference", "best epoch"]


def parse_args(argv=None):
    """The flags of this program as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--printed", default=str(PRINTED), help="CSV file of the printed numbers")
    add("--results", default=str(RESULTS), help="folder of the JSON results")
    add("--page", default=str(ROOT / "docs/RESULTS.md"), help="file of the page to be written")
    return parser.parse_args(argv)


def metric_title(metric):
    """How a metric is called in pages: pgd20_acc is PGD-20, without_1_acc without 1."""
    pgd = re.fullmatch(r"pgd(\d+)(_conditional)?_acc", metric)
    if pgd:
        condition = ", of those right when clean" if pgd[2] else ""
        return f"PGD-{pgd[1]}{condition}"
    return METRIC_NAMES.get(metric, metric.removesuffix("_acc").replace("_", " "))


def measured(row, records, net=None):
    """Our values of a line of the CSV, one a seed, in its units: of its net, or of another one."""
    if row["metric"] == "million parameters":
        model = common.build_model(row["net"])
        return [] if net else [sum(p.numel() for p in model.parameters()) / 1e6]
    values, digests = [], set()
    for (command, seed), record in sorted(records.items()):
        wanted = net or row["net"]
        if wanted == "best" and all(found["net"] != "best" for found in record["rows"]):
            wanted = "student"  # its last epoch was the best one
        for found in record["rows"] if command == row["command"] else []:
            digest = found.get("digest", seed)
            if found["net"] == wanted and digest not in digests:
                digests.add(digest)  # two seeds that measured the same net count as one
                if row["metric"] in found:
                    scale = 100 if row["metric"].endswith("_acc") else 1
                    values.append(scale * found[row["metric"]])
    return values


def number_text(value):
    """12.345 -> 12.35; large counts with commas."""
    return f"{value:,.0f}" if value > 1000 else f"{value:.2f}"


def values_text(values):
    """'98.71 ± 0.05', '98.71' of one seed, '-' of none; large counts have no deviation."""
    if not values:
        return "-"
    text = number_text(mean(values))
    if len(values) > 1 and mean(values) <= 1000:
        text += f" ± {stdev(values):.2f}"
    return text


def cells(row, records):
    """The cells of a line of the CSV, one for each of COLUMNS."""
    ours = measured(row, records)
    printed = float(row["printed"])
    best = []
    if row["net"] == "student" and row["metric"].endswith("_acc"):
        best = measured(row, records, "best")
    spread = f" ± {row['deviation']}" if row["deviation"] else ""
    return [
        row["line"],
        metric_title(row["metric"]),
        number_text(printed) + spread,
        values_text(ours),
        len(ours) if row["command"] else "-",
        f"{mean(ours) - printed:+.2f}",
        values_text(best),
    ]


def markdown(columns, lines):
    """Lines of cells as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(rows, records):
    """How the numbers of some lines were measured: a part for each kind of machine and attack."""
    commands = {row["command"] for row in rows}
    attacked = any(row["metric"].startswith(("pgd", "aa")) for row in rows)
    seeds_of = {}  # description -> seeds
    for (command, seed), record in sorted(records.items()):
        if command in commands:
            flags = record["flags"]
            text = f"{record['gpu'] or 'CPU'}, torch {record['torch']}, commit {record['commit']}"
            text += f"; {flags.get('test_subset') or 'all'} test images"
            if attacked:
                eps, step = evaluation_attack(flags)
                text += f"; eps {255 * eps:.3g}/255, PGD step {255 * step:.3g}/255"
                text += f", {flags.get('eval_restarts', 1)} start(s)"
            seeds_of.setdefault(text, set()).add(seed)
    parts = [f"{text}; seeds {', '.join(map(str, sorted(s)))}" for text, s in seeds_of.items()]
    return f"Measured: {'; '.join(parts)}." if parts else ""


def section(table, rows, records):
    """The part of the page for the measured lines of a table."""
    numbered = re.fullmatch(r"(table|figure)(\d+)", table)
    if numbered:
        title = f"{numbered[1].title()} {numbered[2]}"
    else:
        title = {"text": "Text", "choices": "Open choices, made otherwise"}[table]
    remarks = dict.fromkeys(row["remark"] for row in rows if row["remark"])
    commands = dict.fromkeys(row["command"] for row in rows if row["command"])
    parts = [f"### {title}", markdown(COLUMNS, [cells(row, records) for row in rows])]
    parts += ["\n".join(f"- {remark}" for remark in remarks), origin(rows, records)]
    if commands:
        parts.append("\n".join(["```", *commands, "```"]))
    return "\n\n".join(part for part in parts if part)


def page(printed, records):
    """The text of docs/RESULTS.md."""
    shown = [row for row in printed if measured(row, records)]
    overview = []
    for paper, name in PAPERS.items():
        counts = []
        for rows in (printed, shown):
            of_paper = [r for r in rows if (r["paper"], r["table"] != "choices") == (paper, True)]
            counts.append(len(of_paper))
        overview.append([name, *counts])
    parts = [INTRODUCTION, markdown(["paper", "printed numbers", "measured here"], overview)]
    for paper, name in PAPERS.items():
        tables = {}
        for row in shown:
            if row["paper"] == paper:
                tables.setdefault(row["table"], []).append(row)
        if tables:
            parts.append(f"## {name}")
        parts += [section(table, rows, records) for table, rows in tables.items()]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    """Write the page."""
    args = parse_args(argv)
    records = read_results(args.results)
    text = page(read_printed(args.printed), records)
    common.write_atomically(Path(args.page), lambda file: file.write(text.encode()))
    print(f"{args.page}: {len(records)} results")


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
