"""Run the rows of tables.py that are not done yet: the papers' tables, number by number.

Usage    python benchmark/run.py --list                      # what is left, in order
         python benchmark/run.py table3 --minutes 120        # both papers' Table 3, two hours of it
         python benchmark/run.py paper1 paper2-table5        # a paper, a table
         python benchmark/run.py paper2-choices --seeds 1    # one open choice at a time
         python benchmark/run.py --prepare                   # parts of CIFAR-10 as data sets
         python benchmark/run.py --scale tiny                # every command, tiny nets, on a CPU
         python benchmark/report.py                          # then: docs/RESULTS.md and the README
Order    by turn (tables.py), then by seed. Without names: all rows. A run that several rows share
         is made once; all runs share their teachers in RUNS/teachers.
Result   benchmark/results/<row>-s<seed>.json, a few KB: flags, versions, GPU, commit, seconds an
         epoch, every metric of the last and of the best epoch. AutoAttack and other images, where
         a script does not evaluate them, are evaluated from its models.
Stop     Ctrl-C, --minutes or a kill at any time: the same command goes on where it stopped.
Waits    A row whose script, flag, data or teacher is not there is listed with what it waits for.
         A teacher that another row trains is there once that row has been run in the same --runs.
Minutes  what the same training took on this device: with another seed, or with other values of
         flags that do not change the work of an epoch. Otherwise --list shows none: not measured.
Tiny     Results and runs are kept in runs/tiny, marked, and never reported.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import corruptions, report, tables, trajectories
from benchmark.records import ROOT, is_count, read_records, table_title, value

# What eval_robustness.py is asked for, for a metric that a script's summary does not have
ATTACKS = {
    "aa_acc": "aa",
    "cinic_acc": "cinic",
    "mca_acc": "corruptions",
    "clean_acc": "clean",
    "entropy": "calibration",
}
# Other images below --data that an attack of eval_robustness.py needs, and how they are made
OTHER_IMAGES = {
    "cinic": ("cinic10.npz", "made by benchmark/prepare.py cinic10"),
    "corruptions": ("CIFAR-10-C", "made by benchmark/corruptions.py"),
}
# Files that a run needs below --data, and where they come from
FILES = {
    "cifar10_ddpm.npz": "storage.googleapis.com/dm-adversarial-robustness",
    "cifar100_ddpm.npz": "storage.googleapis.com/dm-adversarial-robustness",
    "cifar10_edm_1m.npz": "huggingface.co P2333/DM-Improves-AT, cifar10/1m.npz",
    "cifar100_edm_1m.npz": "huggingface.co P2333/DM-Improves-AT, cifar100/1m.npz",
    "planes-cars.npz": "made by this program of cifar10.npz",
}
# Flags that decide how long an epoch takes: what was measured with the same values is an estimate
FLAGS_OF_SPEED = (
    "data",
    "model",
    "width",
    "loss",
    "method",
    "steps",
    "batch_size",
    "teacher_model",
    "teacher_width",
    "teachers",
    "teacher_training",
    "train_subset",
    "precision",
)
# --scale tiny: appended to every command; a flag that is given twice has the last value
TINY = {
    "--data": "shapes",
    "--train-subset": "60",
    "--test-subset": "12",
    "--val-size": "12",
    "--batch-size": "16",
    "--epochs": "1",
    "--teacher-epochs": "1",
    "--device": "cpu",
}
TINY_OF_SCRIPT = {
    "robust_kd": {"--teacher-batch-size": "16", "--steps": "1"},
    "teacher_free_kd": {"--steps": "1"},
    "fickle_teacher": {"--teacher-model": "mlp-16", "--restarts": "1"},
    "messy_collab": {"--teacher-model": "mlp-16", "--restarts": "1"},
    "soft_randomization": {"--teacher-model": "mlp-16", "--restarts": "1"},
}
TINY_IF_GIVEN = {  # these only replace what a command gives
    "--teacher-es": "1",
    "--milestones": "1",
    "--teacher-save-every": "1",
}
TINY_EVALUATION = {
    "--n": "12",
    "--queries": "20",
    "--steps": "3",
    "--targets": "2",
    "--batch-size": "12",
}
TIME_IS_OVER = "the minutes are over; the same command goes on from its last epoch"


def parse_args(argv=None):
    """The flags of this program as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help="paper, table or row (default: all rows)")
    add("--list", action="store_true", help="show what is left and what it takes, run nothing")
    add("--prepare", action="store_true", help="make the data sets that are parts of cifar10.npz")
    add("--minutes", type="positive", help="stop after so many minutes (default: when all is done)")
    add(
        "--seeds",
        type="positive int",
        help="at most so many seeds of a row (default: as in tables.py)",
    )
    add("--scale", choices=["full", "tiny"], default="full", help="tiny: test the commands")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if present")
    add("--data", default="data", help="folder with the data sets")
    add("--runs", help="folder of the runs (default: runs/benchmark or runs/tiny)")
    add("--finished", metavar="RUNS", help="also take finished runs with the same flags from here")
    add("--results", help="folder of the results (default: benchmark/results, runs/tiny/results)")
    args = parser.parse_args(argv)
    for name in args.tables:
        if not any(is_selected(row, [name]) for row in tables.ROWS):
            parser.error(f"TABLE: no row is called {name}; --list shows the names")
    if args.scale == "tiny":
        args.runs = args.runs or str(ROOT / "runs/tiny")
        args.results = args.results or str(ROOT / "runs/tiny/results")
    else:
        args.runs = args.runs or str(ROOT / "runs/benchmark")
        args.results = args.results or str(ROOT / "benchmark/results")
    args.evaluated = set()  # what --scale tiny has evaluated
    return args


def is_selected(row, names):
    """Whether a name means the row: its paper, its table, that without the paper, or its id."""
    paper, table = row.table.split("-", 1)
    return not names or bool({row.id, row.table, paper, table} & set(names))


def name_of(run):
    """The id of the first row that has a run: the name of its folder and of its result."""
    return next(row.id for row in tables.ROWS if row.run == run)


# ------------------------------------------------------------------------------------------------
# Commands


def script_of(run):
    """'robust_kd.py --loss at' -> 'robust_kd'."""
    return run.split(".py", 1)[0]


def folder_of(run, seed, args):
    """The folder of a run."""
    return Path(args.runs) / script_of(run) / f"{name_of(run)}-s{seed}"


def teacher_of_row(run):
    """(row's id, epochs) of a run's `--teacher-ckpt {ROW:EPOCHS}`; None without it."""
    reference = re.search(r"\{(.+):(\d+)\}", run)
    return (reference[1], int(reference[2])) if reference else None


def teacher_path(run, args):
    """The file of the teacher of teacher_of_row; None before the run of that row has begun."""
    row_id, epochs = teacher_of_row(run)
    if args.scale == "tiny":
        epochs = 1
    teacher_run = next(row.run for row in tables.ROWS if row.id == row_id)
    folder = folder_of(teacher_run, 0, args)
    config = common.read_json(folder / "config.json")
    return config and trajectories.teacher_of(folder, config, epochs)


def flags_of(run, args):
    """The flags with which a run is started, without its name and seed."""
    flags = shlex.split(run)[1:]
    if teacher_of_row(run):
        flags[flags.index("--teacher-ckpt") + 1] = str(teacher_path(run, args))
    for i, flag in enumerate(flags):
        if flag.startswith("data/"):
            flags[i] = f"{args.data}/{flag.removeprefix('data/')}"
        elif flag.startswith("runs/"):
            flags[i] = f"{args.runs}/{flag.removeprefix('runs/')}"
    if args.scale == "tiny":
        flags += tiny_flags(script_of(run), flags, args)
    else:
        flags += ["--device", args.device]
    return [*flags, "--data-root", args.data]


def tiny_flags(script, flags, args):
    """Flags that make a command one of a tiny net, few images and one epoch."""
    tiny = TINY | TINY_OF_SCRIPT[script] | {"--model": "mlp-16"}
    for flag, replaced in TINY_IF_GIVEN.items():
        if flag in flags:
            tiny[flag] = replaced
    if "--extra-data" in flags:
        tiny["--extra-data"] = f"{args.runs}/extra.npz"
    if "vanilla" in flags:  # real digits: Table 2 leaves one out
        tiny |= {"--data": "mnist", "--teacher-model": "mlp-16"}
    model = flags[flags.index("--model") + 1] if "--model" in flags else ""
    if "--width" in flags or model.startswith("resnet"):
        del tiny["--model"]
        tiny["--width"] = "1/16"
    elif "self-distillation" in flags or model.startswith("wrn"):
        tiny["--model"] = "wrn-10-1-silu" if model.endswith("-silu") else "wrn-10-1"
    if script == "robust_kd" and "--teacher-model" in flags:
        tiny |= {"--teacher-model": "wrn-10-1-silu", "--teacher-width": "1"}
    return [word for pair in tiny.items() for word in pair]


@functools.cache
def parse_flags(script, flags):
    """-> (the script's namespace of the flags, None) or (None, why they cannot be parsed)."""
    try:
        module = importlib.import_module(script)
    except ModuleNotFoundError:
        return None, f"{script}.py"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a preset says what it sets
            return module.parse_args(list(flags)), None
    except common.UserError as error:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", str(error))
        return None, unknown[1] if unknown else str(error)


def script_flags(run, args):
    """-> (the script's namespace of a run, None) or (None, why it cannot be parsed)."""
    return parse_flags(script_of(run), tuple(flags_of(run, args)))


def waits_for(run, args):
    """What a run waits for: a script, a flag, a file or a teacher; None if it can be started."""
    if is_count(run):
        return None
    reference = teacher_of_row(run)
    if reference:
        path = teacher_path(run, args)
        if path is None or not path.exists():
            row_id, epochs = reference
            return f"the teacher of {epochs} epochs, which the row {row_id} trains"
    _, error = script_flags(run, args)
    if error:
        return error
    root = Path(args.data)
    if args.scale == "tiny":
        mnist = root / "mnist.npz"
        return str(mnist) if "vanilla" in run and not mnist.exists() else None
    for name in re.findall(r"data/(\S+\.npz)", run):
        can_be_made = name == "planes-cars.npz" and (root / "cifar10.npz").exists()
        if not can_be_made and not (root / name).exists():
            return f"{root / name} ({FILES[name]})"
    if "tiny-imagenet" in run and not (root / "tiny-imagenet.npz").exists():
        return f"{root}/tiny-imagenet.npz (made by benchmark/prepare.py)"
    return None


# ------------------------------------------------------------------------------------------------
# What a run takes


def estimated_minutes(run, records, device, args):
    """Minutes by the record of a run with the same FLAGS_OF_SPEED on the device; None: no record.

    The student's epochs are scaled, its teachers and its evaluation are taken as they were. device:
    "cpu", the name of a GPU, or "cuda" for any GPU.
    """
    flags = common.run_flags(script_flags(run, args)[0])
    for record in records.values():
        on_device = record["device"] == device or (device == "cuda" and record["gpu"])
        if not on_device or script_of(record["run"]) != script_of(run):
            continue
        if any(flags.get(name) != record["flags"].get(name) for name in FLAGS_OF_SPEED):
            continue
        seconds = record.get("evaluation_seconds", 0)
        for stage, measured in record["stages"].items():
            epochs = measured["epochs"]
            if stage == "student" and flags.get("epochs") and record["flags"].get("epochs"):
                epochs = flags["epochs"]
            seconds += epochs * measured["seconds_per_epoch"]
        return seconds / 60
    return None


# ------------------------------------------------------------------------------------------------
# Results


def missing_pairs(rows, record):
    """The (take, metric) of the rows that the record, or None, does not have yet."""
    pairs = {(row.take, metric) for row in rows for metric in row.printed}
    if record is None:
        return pairs
    return {(take, metric) for take, metric in pairs if value(record, take, metric) is None}


def teacher_files(folder):
    """The files of a finished run's teachers, by its summary."""
    rows = common.read_json(folder / "summary.json")
    return [folder / row["file"] for row in rows if row["model"].startswith("teacher")]


def describe_stage(rows):
    """What a record keeps of a stage: epochs, speed, last and best epoch."""

    def score(row):
        return sum(number for key, number in row.items() if key.startswith("val_"))

    return {
        "epochs": len(rows),
        "seconds_per_epoch": float(np.mean([row["seconds"] for row in rows])),
        "images_per_second": float(np.median([row["images_per_second"] for row in rows])),
        "last": rows[-1],
        "best": max(rows, key=score),
    }


def to_record(folder, run, seed, teachers, args):
    """The record of a finished run: what its folder and its teachers' say, in a few KB."""
    config = common.read_json(folder / "config.json")
    given = {flag[2:].replace("-", "_") for flag in shlex.split(run) if flag.startswith("--")}
    flags = {k: v for k, v in config["flags"].items() if k in given or v is not None}
    stages = common.read_log(folder)
    for i, teacher in enumerate(teachers):
        epochs = common.read_log(teacher.parent).get("teacher")
        if epochs:  # a file given by --teacher-ckpt may lie there alone
            stages["teacher" if i == 0 else f"teacher{i + 1}"] = epochs
    files = {take: folder / f"{take}.pt" for take in ("student", "student-alone")}
    if teachers:
        files["teacher"] = teachers[0]
    rows = []
    for row in common.without_files(common.read_json(folder / "summary.json")):
        rows.append({k: v for k, v in row.items() if isinstance(v, str | int | float | None)})
    return {
        "row": name_of(run),
        "run": run,
        "seed": seed,
        "scale": args.scale,
        "command": f"python {run} --seed {seed}",  # without the paths of this machine
        "commit": config["commit"],
        "python": config["python"],
        "torch": config["torch"],
        "gpu": config["gpu"],
        "device": config["gpu"] or "cpu",
        "model": flags["model"],
        "flags": flags,
        "stages": {stage: describe_stage(epochs) for stage, epochs in stages.items()},
        "weights": {
            take: common.weights_digest(path) for take, path in files.items() if path.exists()
        },
        "rows": rows,
    }


# ------------------------------------------------------------------------------------------------
# Running


def call(script, flags, log_file, seconds, args):
    """Run a script for so many seconds at most: -> None or the line with which it failed."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "a") as log:
        print(f"\n$ python {script}.py {shlex.join(flags)}", file=log, flush=True)
        if args.scale == "tiny":  # hundreds of seconds-long runs: one process
            return call_here(script, flags, log)
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True)
        try:
            error = process.communicate(timeout=seconds)[1]
        except BaseException as stop:  # its checkpoint is of the last epoch: nothing is lost
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            if isinstance(stop, subprocess.TimeoutExpired):
                return TIME_IS_OVER
            raise
    if process.returncode:
        return f"status {process.returncode}: {error.strip()[-300:]}"
    return None


def call_here(script, flags, log):
    """Run a script's main in this process: -> None or the line with which it failed."""
    try:
        with contextlib.redirect_stdout(log):
            importlib.import_module(script).main(flags)
    except Exception as error:  # a crash of one row must not hide the next
        return f"{type(error).__name__}: {error}"
    return None


def attacks_for(pairs, args):
    """{take: attacks} that give the (take, metric) pairs; other images only where they are."""
    attacks = {}
    for take, metric in sorted(pairs):
        name = ATTACKS.get(metric, metric.split("_")[0])
        if name not in ATTACKS.values() and not name.startswith("pgd"):
            continue
        if args.scale == "tiny" or not lacks_images(name, args):
            attacks.setdefault(take, set()).add(name)
    return {take: sorted(names) for take, names in attacks.items()}


def lacks_images(attack, args):
    """Whether the attack needs other images that are not below --data."""
    return attack in OTHER_IMAGES and not (Path(args.data) / OTHER_IMAGES[attack][0]).exists()


def evaluation_flags(take, files, attacks, flags, args):
    """The flags of eval_robustness.py for some files of a run with `flags`."""
    argv = [str(path) for path in files]
    if take == "ensemble":
        argv.append("--ensemble")
    argv += ["--attack", *attacks, "--data", flags["data"], "--data-root", args.data]
    argv += ["--device", args.device if args.scale == "full" else "cpu"]
    for name in ("eps", "step_size", "restarts"):
        if flags.get(name) is not None:
            argv += [f"--{name.replace('_', '-')}", str(flags[name])]
    root = args.data if args.scale == "full" else args.runs
    for name, (file, _) in OTHER_IMAGES.items():
        if name in attacks:
            argv += [f"--{name}", f"{root}/{file}"]
    if args.scale == "tiny":
        argv += [word for pair in TINY_EVALUATION.items() for word in pair]
    return argv


def evaluate(folder, pairs, record, teachers, log_file, seconds, args):
    """Evaluate a run's nets for the pairs, into record["rows"]: -> None or what failed."""
    ends = time.monotonic() + seconds
    for take, attacks in attacks_for(pairs, args).items():
        job = (record["run"].split()[0], take, *attacks)
        if args.scale == "tiny" and job in args.evaluated:  # seconds each: once for a script
            continue
        args.evaluated.add(job)
        if take in ("teacher", "ensemble"):
            files = teachers if take == "ensemble" else teachers[:1]
            names = ["teacher"]
            if not files:
                return f"{folder / 'summary.json'} names no teacher"
        else:
            files = [folder / f"{take}.pt"]
            names = [take]
            if take == "student" and (folder / "student_best.pt").exists():
                files.append(folder / "student_best.pt")
                names.append("student_best")
        if take == "ensemble":
            names = ["ensemble"]
        result = folder / f"{take}-{'-'.join(attacks)}.json"
        argv = evaluation_flags(take, files, attacks, record["flags"], args)
        argv += ["--json", str(result)]
        failure = call("eval_robustness", argv, log_file, ends - time.monotonic(), args)
        if failure:
            return failure
        for name, row in zip(names, common.read_json(result)["rows"], strict=True):
            kept = {key: number for key, number in row.items() if isinstance(number, int | float)}
            clean = row.get("calibration", {}).get("clean")
            if clean:
                kept |= {"entropy": clean["entropy"], "probabilities": clean["probabilities"]}
            record["rows"].append({"model": name} | kept | {"attacks": " ".join(attacks)})
    return None


def find_finished(run, seed, args):
    """The folder of a finished run with the same flags below --finished; None without one."""
    if not args.finished:
        return None
    flags = common.run_flags(script_flags(run, args)[0]) | {"seed": seed}
    for path in Path(args.finished).glob(f"{script_of(run)}/*/config.json"):
        is_finished = (path.parent / "summary.json").exists()
        if is_finished and common.read_json(path)["flags"] == flags:
            return path.parent
    return None


def execute(run, seed, rows, seconds, records, args):
    """Train and evaluate a run of a seed and write its result: -> None or what failed."""
    ends = time.monotonic() + seconds
    name = f"{name_of(run)}-s{seed}"
    log_file = Path(args.runs) / "logs" / f"{name}.log"
    folder = find_finished(run, seed, args)
    if folder is None:
        folder = folder_of(run, seed, args)
        flags = flags_of(run, args)
        flags += ["--name", name_of(run), "--seed", str(seed), "--runs", args.runs]
        failure = call(script_of(run), flags, log_file, seconds, args)
        if failure:
            return failure
    teachers = teacher_files(folder)
    record = to_record(folder, run, seed, teachers, args)
    record["evaluation_seconds"] = 0.0
    if (run, seed) in records:
        old = records[run, seed]
        record["rows"] += [row for row in old["rows"] if "attacks" in row]
        record["evaluation_seconds"] = old.get("evaluation_seconds", 0.0)
    began = time.monotonic()
    pairs = missing_pairs(rows, record)
    failure = evaluate(folder, pairs, record, teachers, log_file, ends - began, args)
    record["evaluation_seconds"] += time.monotonic() - began
    common.write_json(Path(args.results) / f"{name}.json", record)
    return failure


# ------------------------------------------------------------------------------------------------
# The plan


def form(run):
    """The run without its numbers: --scale tiny runs one of each form, and parses all."""
    return re.sub(r"(?<= )[\d./]+(?= |$)|(?<=:)\d+(?=\})", "#", run)


def list_jobs(args):
    """[{turn, run, seed, rows}] of the selected rows in the order in which they are run."""
    jobs, run_of_form = {}, {}
    for place, row in enumerate(tables.ROWS):
        if not row.run or is_count(row.run) or not is_selected(row, args.tables):
            continue
        seeds = min(row.seeds, args.seeds or row.seeds)
        if args.scale == "tiny":
            if row.run != run_of_form.setdefault(form(row.run), row.run):
                continue
            seeds = 1
        for seed in range(seeds):
            turn = "b" if row.turn == "a" and seed > 0 else row.turn
            job = jobs.setdefault(
                (row.run, seed),
                {"turn": turn, "run": row.run, "seed": seed, "rows": [], "place": place},
            )
            job["rows"].append(row)
            if (turn, place) < (job["turn"], job["place"]):
                job |= {"turn": turn, "place": place}
    return sorted(jobs.values(), key=lambda job: (job["turn"], job["seed"], job["place"]))


def plan(args, device):
    """The jobs that are not done, with `waits` (what they wait for) and `minutes` (an estimate)."""
    records, left, coming = read_records(args.results), [], set()
    for job in list_jobs(args):
        run, seed = job["run"], job["seed"]
        record = records.get((run, seed))
        pairs = missing_pairs(job["rows"], record)
        if record and (args.scale == "tiny" or not attacks_for(pairs, args)):
            continue
        job["waits"], job["minutes"], job["partly"] = waits_for(run, args), None, None
        reference = teacher_of_row(run)
        job["comes_later"] = bool(reference) and reference[0] in coming
        if job["waits"] is None:
            job["minutes"] = estimated_minutes(run, records, device, args)
        if job["waits"] is None or job["comes_later"]:
            coming.update(row.id for row in tables.ROWS if row.run == run)
        for metric in sorted({metric for _, metric in pairs}):
            attack = ATTACKS.get(metric)
            if args.scale == "full" and lacks_images(attack, args):
                file, command = OTHER_IMAGES[attack]
                job["partly"] = f"{metric}: {args.data}/{file} ({command})"
        left.append(job)
    return left


def show(left, total):
    """Print what is left: a line a run, the minutes that were measured, and what waits."""
    rows = []
    for job in left:
        minutes = None if job["minutes"] is None else f"{job['minutes']:.1f}"
        rows.append(
            {
                "row": name_of(job["run"]),
                "turn": job["turn"],
                "seed": job["seed"],
                "minutes": minutes,
                "waits for": job["waits"] or job["partly"],
            }
        )
    if rows:
        print(common.table(rows))
    ready = [job for job in left if not job["waits"]]
    measured = [job["minutes"] for job in ready if job["minutes"] is not None]
    print(f"\n{total - len(left)} of {total} runs are done; {len(ready)} are left,", end=" ")
    if measured:
        print(f"{sum(measured) / 60:,.1f} hours of {len(measured)} by what was measured,", end=" ")
    print(f"{len(ready) - len(measured)} not measured; {len(left) - len(ready)} wait")


def compare(args):
    """Print the selected tables, paper against here, with the verdicts of report.py."""
    records = read_records(args.results)
    for table in dict.fromkeys(row.table for row in tables.ROWS):
        lines = []
        for row in tables.ROWS:
            if row.table == table and is_selected(row, args.tables):
                for metric in row.printed:
                    lines.append(dict(zip(report.COLUMNS, report.cells(row, metric, records))))
        if lines:
            print(f"\n{table[:5]} {table[5]}, {table_title(table)}\n{common.table(lines)}")


def run_all(left, args):
    """Run what fits of the jobs, one after the other: -> the lines of those that failed."""
    ends = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    failures, has_begun = [], False
    for job in left:
        seconds = min(ends - time.monotonic(), 1e6)
        too_long = job["minutes"] is not None and job["minutes"] * 60 > seconds
        if seconds <= 0 or (has_begun and too_long) or (job["waits"] and not job["comes_later"]):
            continue
        text = f"{name_of(job['run'])} seed {job['seed']}"
        waits = waits_for(job["run"], args)
        if waits:
            print(f"{text}: waits for {waits}", flush=True)
            continue
        has_begun, began = True, time.monotonic()
        if args.scale == "full":
            minutes = "not measured yet"
            if job["minutes"] is not None:
                minutes = f"about {job['minutes']:.1f} min"
            print(f"{text}: {minutes}, progress in {args.runs}/logs", flush=True)
        records = read_records(args.results)
        failure = execute(job["run"], job["seed"], job["rows"], seconds, records, args)
        spent = f"{(time.monotonic() - began) / 60:.1f} min"
        if failure is None:
            print(f"{text}: {spent}", flush=True)
        else:
            print(f"{text}: {spent}  FAILED: {failure}", flush=True)
            if failure != TIME_IS_OVER:
                failures.append(f"{text}: {failure}")
    return failures


# ------------------------------------------------------------------------------------------------
# Data


def prepare(args):
    """Make the small files that the runs of this scale need."""
    cifar10, planes_cars = Path(args.data) / "cifar10.npz", Path(args.data) / "planes-cars.npz"
    is_needed = any("planes-cars" in job["run"] for job in list_jobs(args))
    if is_needed and cifar10.exists() and not planes_cars.exists():
        make_planes_cars(cifar10, planes_cars)
    if args.scale == "tiny":
        make_tiny_images(Path(args.runs))
        if any("mca_acc" in row.printed for job in list_jobs(args) for row in job["rows"]):
            out = str(Path(args.runs) / OTHER_IMAGES["corruptions"][0])
            corruptions.main(["--data", "shapes", "--n", TINY_EVALUATION["--n"], "--out", out])


def prepare_from_cifar10(root):
    """--prepare: make the data sets of `root` that are made of its cifar10.npz."""
    cifar10 = root / "cifar10.npz"
    if not cifar10.exists():
        advice = "python -c 'import common; common.load_data(\"cifar10\")' makes it"
        raise common.UserError(f"--prepare: there is no {cifar10}; {advice}")
    for name, make in {"planes-cars": make_planes_cars, "cifar10-16": make_cifar10_16}.items():
        path = root / f"{name}.npz"
        if not path.exists():
            make(cifar10, path)
        print(f"{path} is there")


def make_tiny_images(folder):
    """Write 200 images of noise, and ten of them as CINIC-10, for --scale tiny."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "extra.npz", image=images, label=np.arange(200) % 10)
    np.savez(folder / OTHER_IMAGES["cinic"][0], x_test=images[:10], y_test=np.arange(10))


def make_planes_cars(cifar10, planes_cars):
    """Write the planes and cars of one .npz, CIFAR-10, to another one, in their order."""
    arrays = common.read_npz(cifar10)
    chosen = {"classes": common.CLASS_NAMES["cifar10"][:2]}
    for part in ("train", "test"):
        keep = arrays[f"y_{part}"] < 2
        for key in (f"x_{part}", f"y_{part}"):
            chosen[key] = arrays[key][keep]
    common.write_atomically(planes_cars, lambda file: np.savez(file, **chosen))


def make_cifar10_16(cifar10, small):
    """Write CIFAR-10 with 16 x 16 pixels, each the mean of 2 x 2, from one .npz to another one."""
    arrays = common.read_npz(cifar10) | {"classes": common.CLASS_NAMES["cifar10"]}
    for key in ("x_train", "x_test"):
        x = arrays[key]  # uint8 (N, 32, 32, 3)
        sums = x[:, ::2, ::2].astype(np.float32)
        for row, column in ((0, 1), (1, 0), (1, 1)):
            sums += x[:, row::2, column::2]
        arrays[key] = (sums / 4).round().astype(np.uint8)
    common.write_atomically(small, lambda file: np.savez(file, **arrays))


def main(argv=None):
    """Show what is left; unless --list, run what fits, write results, show what is left then."""
    args = parse_args(argv)
    if args.prepare:
        prepare_from_cifar10(Path(args.data))
        return
    device = "cuda" if args.device == "cuda" else "cpu"
    if args.device != "cpu" and args.scale == "full" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    total, left = len(list_jobs(args)), plan(args, device)
    if args.list:
        show(left, total)
        return
    prepare(args)
    failures = run_all(left, args)
    if args.tables and args.scale == "full":
        compare(args)
        print()
    show(plan(args, device), total)
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    common.start(main, stopped="the same command goes on from there:")
