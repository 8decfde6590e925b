"""Run the commands that give the numbers printed in the three papers, and keep what they give.

Usage    python benchmark/run.py --list paper3              # its commands, and seeds that have run
         python benchmark/run.py paper3 table2              # a table of a paper, with seed 0
         python benchmark/run.py paper2 --seed 0 1 2        # all of a paper: take a GPU
         python benchmark/report.py                         # then: docs/RESULTS.md
Numbers  benchmark/printed.csv, a line for each printed number, opens in a spreadsheet.
         paper       paper1: noisy collaboration, paper2: robust distillation (numbered as in the
                     submission to TMLR), paper3: the adversarial context
         table       tables, figures and text; choices: what a paper leaves open, made otherwise
         net, metric the row and the column of summary.json that this number is compared with
         printed     accuracies in percent, with the deviation where the paper prints one
         command     gives the number here; empty where nothing is trained
Result   benchmark/results/COMMAND-sSEED.json: command, versions, flags, rows of the summary. What
         has a result is not run again. AutoAttack and CINIC-10, which the scripts do not
         evaluate, are evaluated from their models; CINIC-10 where data/cinic10.npz is there.
Stop     Ctrl-C or a kill at any time: the same command goes on from the last epoch. A command that
         fails is named at the end, and the next one runs. All share the teachers in RUNS/teachers.
"""

import csv
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import ROOT, evaluation_attack

PRINTED = ROOT / "benchmark/printed.csv"
RESULTS = ROOT / "benchmark/results"
# Metrics that eval_robustness.py evaluates after the run, and its attack for each
EVALUATED = {"aa_acc": "aa", "pgd7_acc": "pgd7", "cinic_acc": "cinic"}
CINIC = ROOT / "data/cinic10.npz"  # made by benchmark/prepare.py


def parse_args(argv=None):
    """The flags as a namespace, with `rows`: the lines of the CSV that are asked for."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="papers and tables, such as paper2 table3")
    add("--seed", type=common.whole_or_0, nargs="+", default=[0], help="seeds to run, in turn")
    add("--list", action="store_true", help="show the commands and their results, run nothing")
    add("--printed", default=str(PRINTED), help="CSV file of the printed numbers")
    add("--results", default=str(RESULTS), help="folder of the JSON results")
    add("--runs", default=str(ROOT / "runs/benchmark"), help="folder of the runs")
    args = parser.parse_args(argv)
    if not (args.words or args.list):
        parser.error("WORD: give a paper or a table; --list shows what there is")
    args.rows = read_printed(args.printed)
    known = set()
    for column in ("paper", "table"):
        names = {row[column] for row in args.rows}
        chosen = names & set(args.words)
        args.rows = [row for row in args.rows if not chosen or row[column] in chosen]
        known |= names
    if not set(args.words) <= known:
        parser.error(f"WORD: {args.printed} has no lines of {' '.join(args.words)}; try --list")
    return args


def read_printed(path):
    """The lines of the CSV of printed numbers, a dict each."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark before it
        return list(csv.DictReader(file))


def read_results(folder):
    """{(command, seed): record} of the JSON files in a folder; what is none is a UserError."""
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        record = common.read_json(path)
        try:
            records[record["command"], record["seed"]] = record
        except (TypeError, KeyError):
            raise common.UserError(f"{path}: not a result of benchmark/run.py") from None
    return records


def name_of(command):
    """The command as the name of its run and of its result, cut if it is long."""
    name = re.sub(r"[^\w.,=+]+", "-", command.removeprefix("python ").replace(".py", ""))
    return name if len(name) <= 150 else f"{name[:140]}-{zlib.crc32(name.encode()):08x}"


def missing(rows, record):
    """{(net, metric)} of lines of the CSV that a record, which may be None, does not have."""
    wanted = {(row["net"], row["metric"]) for row in rows}
    if not CINIC.exists():
        wanted = {(net, metric) for net, metric in wanted if metric != "cinic_acc"}
    there = record["rows"] if record else []
    return wanted - {(row["net"], metric) for row in there for metric in row}


def call(words):
    """Run one of our scripts in a process of its own; a UserError if it fails."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise common.UserError(f"python {shlex.join(words)}: status {status}")


def evaluate(rows, record, folder):
    """Add the metrics of EVALUATED that are missing to the rows of a record."""
    files = {row["net"]: str(folder / row["file"]) for row in record["rows"] if row.get("file")}
    flags = record["flags"]
    for net, metric in sorted(missing(rows, record)):
        if metric not in EVALUATED:
            raise common.UserError(f"{record['command']}: its summary has no {metric} of {net}")
        if net == "ensemble":
            evaluated = {net: [file for key, file in files.items() if key.startswith("teacher")]}
        else:
            nets = [net, "best"] if net == "student" and "best" in files else [net]
            evaluated = {key: [files[key]] for key in nets}
        for key, paths in evaluated.items():
            result = folder / f"{key}-{metric}.json"
            words = ["eval_robustness.py", *paths, "--attack", EVALUATED[metric]]
            words += ["--data", flags["data"], "--eps", str(evaluation_attack(flags)[0])]
            words += ["--json", str(result)]
            if metric == "cinic_acc":
                words += ["--cinic", str(CINIC)]
            if len(paths) > 1:
                words.append("--ensemble")
            if "test_subset" in flags:
                words += ["--n", str(flags["test_subset"])]
            call(words)
            (found,) = common.read_json(result)["rows"]
            for row in record["rows"]:
                if row["net"] == key:
                    row[metric] = found[metric]


def run(command, seed, rows, args, before):
    """Train and evaluate a command with a seed, and write its result; raises UserError.

    before: the record that is there already, or None; what it has of EVALUATED stays.
    """
    script, *flags = shlex.split(command.removeprefix("python "))
    runs = Path(args.runs).resolve()
    name = name_of(command)
    call([script, *flags, "--seed", str(seed), "--name", name, "--runs", str(runs)])
    folder = runs / script.removesuffix(".py") / f"{name}-s{seed}"
    config = common.read_json(folder / "config.json")
    flags = {key: value for key, value in config["flags"].items() if value is not None}
    record = {"command": command, "seed": seed}
    record |= {key: config[key] for key in ("commit", "python", "torch", "gpu")}
    record |= {"flags": flags, "rows": common.read_summary(folder)}
    for row in record["rows"]:
        if row.get("file"):  # seeds that share a teacher have one net, and not two
            row["digest"] = common.weights_digest(folder / row["file"])
        for old in before["rows"] if before else []:
            if old["net"] == row["net"] and old.get("digest") == row.get("digest"):
                row |= {metric: old[metric] for metric in EVALUATED if metric in old}
    evaluate(rows, record, folder)
    for row in record["rows"]:
        row.pop("file", None)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    common.write_json(Path(args.results) / f"{name}-s{seed}.json", record)


def main(argv=None):
    """Run what is asked for and has no result, or show it."""
    args = parse_args(argv)
    records = read_results(args.results)
    rows_of = {}  # command -> its lines in the CSV
    for row in args.rows:
        if row["command"]:
            rows_of.setdefault(row["command"], []).append(row)
    if args.list:
        shown = []
        for command, rows in rows_of.items():
            seeds = [str(seed) for other, seed in records if other == command]
            tables = dict.fromkeys(f"{row['paper']} {row['table']}" for row in rows)
            shown.append({"of": ", ".join(tables), "ran": " ".join(seeds), "command": command})
        print(common.table(shown))
        return
    failures = []
    for seed in args.seed:
        for command, rows in rows_of.items():
            before = records.get((command, seed))
            if missing(rows, before):
                try:
                    run(command, seed, rows, args, before)
                except common.UserError as error:
                    failures.append(f"seed {seed}: {error}")
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
        raise SystemExit(1)
    print("\nall of these commands have their results; next: python benchmark/report.py")


if __name__ == "__main__":
    common.start(main, stopped="the same command goes on from there:")
