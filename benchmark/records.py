"""The results of the papers' rows: what run.py writes, and what report.py and plots.py read.

A record is the JSON of one run with one seed, benchmark/results/<row>-s<seed>.json: the command,
versions, device and commit, the flags, for each stage the seconds an epoch and the last and best
epoch, and `rows`, the summary of the run and what was evaluated afterwards. Accuracies in [0, 1].
"""

import functools
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import tables

ROOT = Path(__file__).resolve().parent.parent
METRIC_NAMES = {
    "clean_acc": "clean",
    "aa_acc": "AutoAttack",
    "cinic_acc": "CINIC-10",
    "mca_acc": "mCA",
    "others_acc": "other digits",
    "digit_acc": "that digit",
    "millions": "million weights",
    "entropy": "entropy, nats",
}
# How the columns of a summary begin in which teacher_free_kd.py --omit-digit writes these metrics
DIGIT_COLUMNS = {"others_acc": "without_", "digit_acc": "only_"}


def read_records(folder: Path | str) -> dict:
    """{(run, seed): record} of the JSON files in a folder; a damaged file is named and left out."""
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            records[record["run"], record["seed"]] = record
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path} is no result of benchmark/run.py", file=sys.stderr)
    return records


def value(record: dict, take: str, metric: str, best: bool = False):
    """A number or histogram of the net that the summary calls `take` or `take (...)`; or None.

    best: the value of the epoch that was best on held-out images, instead of the last epoch's.
    """
    name = re.compile(rf"{re.escape(take)}(_best)?(?![\w-])")
    for row in record["rows"]:
        if not name.match(row["model"]) or ("best" in row["model"]) != best:
            continue
        if isinstance(row.get(metric), int | float | list):
            return row[metric]
        if metric in DIGIT_COLUMNS and "bias" not in row["model"]:
            for column, number in row.items():
                if column.startswith(DIGIT_COLUMNS[metric]):
                    return number
            return None
    return None


@functools.cache
def counted(run: str) -> dict:
    """{macs, weights, millions} of a row's `count NET CLASSES SIZE CHANNELS`.

    macs: multiply-adds of one image; weights: without biases and norms; millions: all parameters.
    """
    net, *numbers = run.split()[1:]
    classes, size, channels = map(int, numbers)
    with torch.device("meta"):
        model = common.build_model(net, classes, channels=channels, size=size).eval()
        x = torch.empty(1, channels, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return {
        "macs": counter.get_total_flops() // 2,
        "weights": sum(p.numel() for p in model.parameters() if p.dim() > 1),
        "millions": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def is_count(run: str) -> bool:
    """Whether a row's run trains nothing and counts the weights of a net."""
    return run.startswith("count ")


def is_size(metric: str) -> bool:
    """Whether a metric is a count or an entropy, and no accuracy."""
    return not metric.endswith("_acc")


def measured(row: tables.Row, metric: str, records: dict, best: bool = False) -> list:
    """Our values of a row's metric, one a seed, in the paper's units; [] if there are none."""
    if is_count(row.run):
        return [] if best else [counted(row.run)[metric]]
    values, nets = [], set()
    for (run, seed), record in sorted(records.items()):
        if run != row.run:
            continue
        net = record.get("weights", {}).get(row.take, seed)
        if net in nets:  # two seeds that measured the same net count as one
            continue
        nets.add(net)
        number = value(record, row.take, metric, best)
        if number is not None:
            values.append(number if is_size(metric) else 100 * number)
    return values


def points_by_paper(records: dict) -> dict:
    """{paper: [(printed, ours, printed std, our std)]} of all accuracies in percent."""
    points = {}
    for row in tables.ROWS:
        if row.table.endswith("-choices"):
            continue
        for metric, (printed, std) in row.printed.items():
            ours = measured(row, metric, records)
            if printed is not None and ours and not is_size(metric):
                point = (printed, mean(ours), std or 0.0, deviation(ours))
                points.setdefault(row.table[:6], []).append(point)
    return points


def curves(rows: list, records: dict) -> dict:
    """{(metric, line): [(x, mean, std)]} of the rows that differ in one rate, sigma or epoch."""
    lines = {}
    for row in rows:
        varied = re.findall(r"\b((?:sigma|dropout|r|corruption|ES|alpha|beta) ([\d.]+))", row.name)
        if len(varied) != 1:
            continue
        text, x = varied[0]
        line = row.name.replace(text, "").strip(", ") or text.split()[0]
        for metric in row.printed:
            ours = measured(row, metric, records)
            if ours:
                lines.setdefault((metric, line), []).append((float(x), mean(ours), deviation(ours)))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def probability_shares(records: dict) -> dict:
    """{row of paper 1's Figure 8: share of the softmax probabilities in each of equal bins}."""
    shares = {}
    for row in tables.ROWS:
        if "entropy" in row.printed:
            histograms = measured(row, "probabilities", records)  # one a seed
            if histograms:
                shares[row.name] = [mean(bin_of_seeds) for bin_of_seeds in zip(*histograms)]
    return shares


def deviation(values: list[float]) -> float:
    """Standard deviation of the seeds (n - 1); 0 of one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def table_title(table: str) -> str:
    """'paper2-table3' -> 'Table 3'."""
    name = table.split("-", 1)[1]
    numbered = re.fullmatch(r"(table|figure)(\d+)", name)
    if numbered:
        return f"{numbered[1].title()} {numbered[2]}"
    return {"text": "Text", "a3": "Appendix A.3", "choices": "Open choices"}[name]


def metric_title(metric: str) -> str:
    """How a metric is called in pages and figures."""
    pgd = re.fullmatch(r"pgd(\d+)(_conditional)?_acc", metric)
    if not pgd:
        return METRIC_NAMES.get(metric, metric)
    condition = ", of those right when clean" if pgd[2] else ""
    return f"PGD-{pgd[1]}{condition}"
