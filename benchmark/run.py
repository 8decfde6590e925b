"""Run the rows of tables.py that are not done yet: the papers' tables, number by number.

Usage    python benchmark/run.py --list                      # what is left, in order, and its cost
         python benchmark/run.py --list --device cuda        # its cost on a GPU, here or not
         python benchmark/run.py table3 --minutes 120        # both papers' Table 3, two hours of it
         python benchmark/run.py paper1 paper2-table5        # a paper, a table
         python benchmark/run.py paper2-choices --seeds 1    # one open choice at a time
         python benchmark/run.py --prepare                   # only the data/planes-cars.npz of some
         python benchmark/run.py --scale tiny                # every command, tiny nets, on a CPU
         python benchmark/report.py                          # then: docs/RESULTS.md and the README
Order    by turn (tables.py), then by seed. Without names: all rows. A run that several rows share
         is made once; teachers are shared as the scripts do it, through one folder of runs.
Result   benchmark/results/<row>-s<seed>.json, a few KB: flags, versions, GPU, commit, seconds an
         epoch, every metric of the last and of the best epoch. AutoAttack and other images, where
         a script does not evaluate them, are evaluated from its checkpoints.
Stop     Ctrl-C, --minutes or a kill at any time: the same command goes on where it stopped.
Waits    A row whose script, flag, data or teacher is not there is listed with what it waits for.
         A teacher that another row trains is there once that row has been run in the same --runs.
Minutes  multiply-adds over what this device was measured to do with the same net in an earlier
         result, or else over a guess, which is then called "estimate, not measured".
Tiny     Results and runs are kept in runs/tiny, marked, and never reported.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import images
import plumbing
from benchmark import tables

ROOT = Path(__file__).resolve().parent.parent
GUESS = {"cpu": 2e10, "cuda": 3e13}  # multiply-adds a second of training, if none was measured
IMAGES = {"mnist": 60_000, "tiny-imagenet": 100_000}  # others: 50,000
# What is asked of eval_robustness.py for a metric that a script's summary does not have
ATTACKS = {"aa_acc": "aa", "cinic_acc": "cinic", "mca_acc": "corruptions", "clean_acc": "clean"}
ATTACKS |= {"entropy": "calibration"}
CINIC = "CINIC-10"  # the folder below --data
# Files that a run needs below --data, and where they come from
FILES = {
    "cifar10_ddpm.npz": "storage.googleapis.com/dm-adversarial-robustness",
    "cifar100_ddpm.npz": "storage.googleapis.com/dm-adversarial-robustness",
    "cifar10_edm_1m.npz": "huggingface.co P2333/DM-Improves-AT, cifar10/1m.npz",
    "cifar100_edm_1m.npz": "huggingface.co P2333/DM-Improves-AT, cifar100/1m.npz",
    "planes-cars.npz": "made by this program of cifar10.npz",
}
# --scale tiny: appended to every command; flags that are given there are replaced by these
TINY = "--data shapes --train-subset 60 --test-subset 12 --val-size 12 --batch-size 16 --epochs 1"
TINY += " --teacher-epochs 1 --device cpu"
TINY_SCRIPT = {"robust_kd": "--teacher-batch-size 16 --steps 1", "teacher_free_kd": "--steps 1"}
TINY_NOISY = "--teacher-model mlp-16 --restarts 1"
TINY_REPLACED = {"--teacher-es": "1", "--milestones": "1", "--extra-data": "{data}/extra.npz"}
TINY_REPLACED |= {"--teacher-save-every": "1"}
TINY_EVALUATION = "--n 12 --queries 20 --steps 3 --targets 2 --batch-size 12 --cinic-per-class 1"


def parse_args(argv=None):
    """The flags of this program; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add(
        "tables", nargs="*", metavar="TABLE", help="table3, paper2-table3, paper1, a row; none: all"
    )
    add("--list", action="store_true", help="show what is left and its cost, run nothing")
    add("--prepare", action="store_true", help="make planes-cars.npz of cifar10.npz, run nothing")
    add("--minutes", type=common.positive, help="begin what fits into so many; None: all")
    add("--seeds", type=common.count, help="at most so many seeds of a row; None: see tables.py")
    add("--scale", choices=["full", "tiny"], default="full", help="tiny: tests of the commands")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    add("--data", default="data", help="the folder with the data sets")
    add("--runs", help="folder of the runs; None: runs/benchmark or runs/tiny")
    add("--finished", metavar="RUNS", help="take finished runs with the same flags from here too")
    add("--results", help="folder of the results; None: benchmark/results or runs/tiny/results")
    args = parser.parse_args(argv)
    for name in args.tables:
        if not any(selected(row, [name]) for row in tables.ROWS):
            parser.error(f"TABLE: no row is called {name}; --list shows the names")
    runs = "runs/tiny" if args.scale == "tiny" else "runs/benchmark"
    results = "runs/tiny/results" if args.scale == "tiny" else "benchmark/results"
    args.runs, args.results = args.runs or str(ROOT / runs), args.results or str(ROOT / results)
    return args


def selected(row, names):
    """Whether one of the names means the row: its paper, its table, that without paper, its id."""
    paper, table = row.table.split("-", 1)
    return not names or bool({row.id, row.table, paper, table} & set(names))


# ------------------------------------------------------------------------------------------------
# Commands


def script_of(run):
    """(name of the script, its flags as a list) of a row's run."""
    script, *flags = shlex.split(run)
    return script.removesuffix(".py"), flags


def flags_of(run, args):
    """The flags with which a run is started, without its name and seed."""
    script, flags = script_of(run)
    prefixes = {"data/": f"{args.data}/", "runs/": f"{args.runs}/"}
    for old, new in prefixes.items():
        flags = [re.sub(f"^{old}", lambda _, new=new: new, flag) for flag in flags]
    if args.scale == "full":
        return [*flags, "--data-root", args.data, "--device", args.device]
    return [*tiny(script, flags, args), "--data-root", args.data]


def tiny(script, flags, args):
    """The same command with a tiny net, few images and one epoch."""
    given = " ".join(flags)
    flags = [re.sub(r"teacher-ep\d+", "teacher-ep1", flag) for flag in flags]  # --teacher-ckpt
    more = f"{TINY} {TINY_SCRIPT.get(script, TINY_NOISY)}"
    if "vanilla" in flags:  # real digits: Table 2 leaves one out
        more = more.replace("shapes", "mnist") + " --teacher-model mlp-16"
    if re.search("--width|--model resnet", given):
        more += " --width 1/16"
    elif "self-distillation" in flags or "--model wrn" in given:
        more += " --model wrn-10-1" + "-silu" * ("silu" in given)
    else:
        more += " --model mlp-16"
    if "--teacher-model" in flags:
        more += " --teacher-model wrn-10-1-silu --teacher-width 1"
    for flag, value in TINY_REPLACED.items():
        if flag in flags:
            more += f" {flag} {value.format(data=args.runs)}"
    return [*flags, *more.split()]


@functools.cache
def parsed(run, scale, data, runs):
    """(flags of the script as a namespace, "") or (None, what the run waits for)."""
    args = argparse.Namespace(scale=scale, data=data, runs=runs, device="auto")
    script, flags = script_of(run)[0], flags_of(run, args)
    try:
        module = importlib.import_module(script)
    except ModuleNotFoundError:
        return None, f"{script}.py"
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return module.parse_args(flags), ""
    except SystemExit:
        line = error.getvalue().removeprefix("error: ").strip()
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", line)
        return None, unknown[1] if unknown else line


def teacher_file(run, args):
    """The path of the teacher that a run takes from the run of another row; None without one."""
    file = getattr(parsed(run, args.scale, args.data, args.runs)[0], "teacher_ckpt", None)
    return file and Path(file)


def waits_for(run, args):
    """What a run waits for: a script, a flag, a file or a teacher; "" if it can be started."""
    if run.startswith("count "):
        return ""
    if missing := parsed(run, args.scale, args.data, args.runs)[1]:
        return missing
    if (teacher := teacher_file(run, args)) and not teacher.exists():
        return f"{teacher}, which the row {teacher.parent.name.rpartition('-s')[0]} trains"
    if args.scale == "tiny":
        mnist = Path(args.data) / "mnist.npz"
        return "" if mnist.exists() or "vanilla" not in run else str(mnist)
    root = Path(args.data)
    for name in re.findall(r"data/(\S+\.npz)", run):
        made = name == "planes-cars.npz" and (root / "cifar10.npz").exists()
        if not made and not (root / name).exists():
            return f"{root / name} ({FILES[name]})"
    known = [root / "tiny-imagenet.npz", root / "tiny-imagenet-200"]
    if "tiny-imagenet" in run and not any(path.exists() for path in known):
        return f"{known[1]} (cs231n.stanford.edu)"
    return ""


# ------------------------------------------------------------------------------------------------
# Cost


@functools.cache
def size_of(net, classes, size, channels, width=1.0):
    """(multiply-adds of one image, weights without biases and norms, parameters) of a net."""
    with torch.device("meta"):
        model = common.build_model(net, classes, width, channels=channels, size=size).eval()
        x = torch.empty(1, channels, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return counter.get_total_flops() // 2, weights, sum(p.numel() for p in model.parameters())


def counted(run):
    """{macs, weights, millions} of `count NET CLASSES SIZE CHANNELS`."""
    net, *numbers = run.split()[1:]
    macs, weights, parameters = size_of(net, *map(int, numbers))
    return {"macs": macs, "weights": weights, "millions": parameters / 1e6}


def cost(run, seed, seen, args):
    """(multiply-adds of the run, multiply-adds of the student an image).

    Teachers in `seen` are there already; those of this run are added. A forward pass counts 1, a
    gradient of the image 1, one of the weights 2.
    """
    flags, _ = parsed(run, args.scale, args.data, args.runs)
    script = importlib.import_module(script_of(run)[0])
    kind = getattr(flags, "loss", None) or flags.method
    data, width = Path(flags.data).stem, getattr(flags, "width", 1.0)
    shape = ({"cifar100": 100, "tiny-imagenet": 200}.get(data, 10),)
    shape += {"mnist": (28, 1), "tiny-imagenet": (64, 3)}.get(data, (32, 3))
    macs = size_of(flags.model, *shape, width)[0]
    images = flags.train_subset or IMAGES.get(data, 50_000)
    steps = getattr(flags, "steps", 0)
    attacked = kind.startswith("at-") or kind not in ("st", "ckd") and hasattr(flags, "loss")
    each = macs * (3 + 2 * steps * (attacked or kind == "at"))
    epochs = flags.epochs or script.student_schedule(flags)[0]
    total, students = 0.0, kind != "teacher"
    alone = kind in ("st", "at", "student", "plain", "label-smoothing", "tf-kd-reg", "at-tf-kd-reg")
    if not alone and kind != "self-distillation":
        teacher = getattr(flags, "teacher_model", None) or flags.model
        teacher = size_of(teacher, *shape, getattr(flags, "teacher_width", None) or width)[0]
        settings = vars(flags) | {"seed": seed}
        if hasattr(script, "teacher_recipe"):
            recipes = [
                script.teacher_recipe(settings, i)
                for i in range(len(script.teacher_trainings(settings)))
            ]
        else:  # a net of these settings is shared by the scripts
            teacher_seeds = range(getattr(flags, "teacher_seeds", 1))
            if kind == "teacher":  # that of the run's own seed is what is measured
                teacher_seeds = [seed]
            recipes = [script.teacher_settings(settings) | {"of_seed": i} for i in teacher_seeds]
        length = getattr(flags, "teacher_es", None) or flags.teacher_epochs or epochs
        for recipe in recipes:
            key, training = json.dumps(recipe, sort_keys=True), recipe.get("training")
            training = training or ("at" if kind[:3] == "at-" else "st")
            passes = {"st": 3, "ffgsm": 5}.get(training, 3 + 2 * steps)
            if not flags.teacher_ckpt:
                total += (key not in seen) * length * images * passes * teacher
            seen.add(key)
        each += teacher * len(recipes)
    total += students * epochs * images * each
    per_image = {"aa_acc": 5000, "mca_acc": 95, "cinic_acc": 2}  # passes; half survive AutoAttack
    metrics = {m for row in tables.ROWS if row.run == run for m in row.printed}
    if args.scale == "full":
        total += 10_000 * macs * (200 + sum(per_image.get(m, 0) for m in metrics))
    return total, each


def speed(model, done, device):
    """(multiply-adds a second, whether measured here): that of the same net, or else a guess."""
    known = [r for r in done.values() if r.get("macs_per_second") and r["model"] == model]
    known = [r for r in known if r["device"] == device or device == "cuda" and r["gpu"]]
    guess = GUESS["cpu" if device == "cpu" else "cuda"]
    return max((r["macs_per_second"] for r in known), default=guess), bool(known)


# ------------------------------------------------------------------------------------------------
# Results


def read_results(folder):
    """{(run, seed): record} of the results in a folder; damaged files are named and left out."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            found[record["run"], record["seed"]] = record
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path} is no result of run.py", file=sys.stderr)
    return found


def value(record, take, metric, best=False):
    """A metric or histogram of a result's row that is named `take`, or `take (...)`; or None."""
    name = re.compile(rf"{re.escape(take)}(_best)?(?![\w-])")
    for row in record["rows"]:
        right = name.match(row["model"]) and ("best" in row["model"]) == best
        if right and isinstance(row.get(metric), int | float | list):
            return row[metric]
        digits = {"others_acc": "without_", "digit_acc": "only_"}.get(metric)
        if right and digits and "bias" not in row["model"]:
            return next((v for k, v in row.items() if k.startswith(digits)), None)
    return None


def missing(rows, record):
    """The (take, metric) pairs of the rows that the record does not have yet."""
    pairs = {(row.take, metric) for row in rows for metric in row.printed}
    if record is None:
        return pairs
    return {pair for pair in pairs if value(record, *pair) is None}


def log_rows(folder):
    """(rows of the epochs, summary) of a run's log.jsonl."""
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row for row in rows if "stage" in row], (rows or [{}])[-1].get("summary")


def summarise(folder, rows, run, seed, each, args):
    """The record of a finished run: what its folder says, in a few KB."""
    config = json.loads((folder / "config.json").read_text())
    epochs, summary = log_rows(folder)
    given = {re.sub("-", "_", flag[2:]) for flag in script_of(run)[1] if flag.startswith("--")}
    record = {"row": rows[0].id, "run": run, "seed": seed, "scale": args.scale}
    record["command"] = f"python {run} --seed {seed}"  # without the paths of this machine
    record |= {key: config[key] for key in ("commit", "python", "torch", "gpu")}
    flags = {k: v for k, v in config["flags"].items() if k in given or v is not None}
    record |= {"device": config["gpu"] or "cpu", "model": flags["model"], "flags": flags}
    record["stages"] = {}
    for stage in dict.fromkeys(row["stage"] for row in epochs):
        mine = [row for row in epochs if row["stage"] == stage]
        score = [sum(v for k, v in row.items() if k[:4] == "val_") for row in mine]
        entry = {"epochs": len(mine), "seconds_per_epoch": mine[-1]["seconds"] / len(mine)}
        entry["images_per_second"] = float(np.median([row["images_per_second"] for row in mine]))
        entry |= {"last": mine[-1], "best": mine[int(np.argmax(score))]}
        record["stages"][stage] = entry
    if "student" in record["stages"]:
        record["macs_per_second"] = each * record["stages"]["student"]["images_per_second"]
    files = [folder / f"{take}.pt" for take in ("teacher", "student", "student-alone")]
    record["weights"] = {path.stem: digest(path) for path in files if path.exists()}
    plain = str | int | float | None
    record["rows"] = [{k: v for k, v in r.items() if isinstance(v, plain)} for r in summary]
    return record


def digest(path):
    """16 hex digits of the weights in a saved model: by them two seeds with one net are told."""
    weights, found = common.load(path)["weights"], hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def write(record, args):
    """Write a record to the folder of the results."""
    path = Path(args.results) / f"{record['row']}-s{record['seed']}.json"
    text = json.dumps(record, indent=1) + "\n"
    common.write_atomically(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------------------
# Running


def call(script, flags, limit, args):
    """Run a script with a limit in seconds; -> "" or the line with which it failed."""
    with open(Path(args.runs) / "benchmark.log", "a") as log:
        print(f"\n$ python {script}.py {shlex.join(flags)}", file=log, flush=True)
        if args.scale == "tiny":  # hundreds of seconds-long runs: one process
            error = io.StringIO()
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(error):
                    importlib.import_module(script).main(flags)
            except SystemExit as end:
                if end.code in (130, 143):  # the script was stopped, and so is this program
                    raise KeyboardInterrupt from end
                return f"status {end.code}: {error.getvalue().strip()[-300:]}" if end.code else ""
            except Exception as end:  # a crash of one row must not hide the next
                return f"{type(end).__name__}: {end}"
            return ""
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True)
        try:
            error = process.communicate(timeout=limit)[1]
        except BaseException as stop:  # its checkpoint is of the last epoch: nothing is lost
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            if isinstance(stop, subprocess.TimeoutExpired):
                return "the minutes are over; the same command goes on from its last epoch"
            raise
    return f"status {process.returncode}: {error.strip()[-300:]}" if process.returncode else ""


def attacks_for(pairs, args):
    """{take: attacks} that give the (take, metric) pairs; CINIC-10 only where its folder is."""
    found = {}
    here = args.scale == "tiny" or (Path(args.data) / CINIC).is_dir()
    for take, metric in sorted(pairs):
        name = ATTACKS.get(metric, metric.split("_")[0])
        if name in ATTACKS.values() and (name != "cinic" or here) or name[:3] == "pgd":
            found.setdefault(take, set()).add(name)
    return {take: sorted(names) for take, names in found.items()}


TRIED = set()  # what --scale tiny has evaluated


def evaluate(folder, pairs, record, limit, args):
    """Evaluate the checkpoints of a run for the pairs, into the record; -> "" or what failed."""
    flags, files = record["flags"], {"student": ["student.pt", "student_best.pt"]}
    number = len(flags["teacher_training"]) if "teacher_training" in flags else 1
    number = max(number, flags.get("teachers") or 1)
    files["ensemble"] = ["teacher.pt", *(f"teacher{i}.pt" for i in range(2, number + 1))]
    for take, attacks in attacks_for(pairs, args).items():
        job = record["run"].split()[0], take, *attacks
        if args.scale == "tiny" and job in TRIED:  # seconds each: once for a script
            continue
        TRIED.add(job)
        found = [folder / name for name in files.get(take, [f"{take}.pt"])]
        found = [path for path in found if path.exists() or path.name != "student_best.pt"]
        out = folder / f"{take}-{'-'.join(attacks)}.json"
        argv = [*map(str, found), *["--ensemble"] * (take == "ensemble"), "--attack", *attacks]
        argv += ["--json", str(out), "--data", flags["data"], "--data-root", args.data]
        argv += ["--device", args.device if args.scale == "full" else "cpu"]
        for name in ("eps", "step_size", "restarts"):
            if flags.get(name) is not None:
                argv += [f"--{name.replace('_', '-')}", str(flags[name])]
        if "cinic" in attacks:
            folder_of = args.data if args.scale == "full" else args.runs
            argv += ["--cinic", f"{folder_of}/{CINIC}", "--cinic-per-class", "2100"]
        if args.scale == "tiny":
            argv += TINY_EVALUATION.split()
        if failure := call("eval_robustness", argv, limit, args):
            return failure
        for row in json.loads(out.read_text())["rows"]:
            name = "ensemble" if take == "ensemble" else Path(row["model"]).stem
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            if clean := row.get("calibration", {}).get("clean"):
                numbers |= {key: clean[key] for key in ("entropy", "probabilities")}
            record["rows"].append({"model": name} | numbers | {"attacks": " ".join(attacks)})
    return ""


def finished(run, seed, args):
    """The folder of a finished run with the same flags below --finished; None if there is none."""
    wanted = vars(parsed(run, args.scale, args.data, args.runs)[0]) | {"seed": seed}
    wanted = {k: v for k, v in wanted.items() if k not in plumbing.FREE_FLAGS}
    for path in Path(args.finished or "-").glob(f"{script_of(run)[0]}/*/config.json"):
        flags = json.loads(path.read_text())["flags"]
        if flags == json.loads(json.dumps(wanted)) and log_rows(path.parent)[1]:
            return path.parent
    return None


def execute(run, seed, rows, limit, args):
    """Train and evaluate a run of a seed and write its result; -> "" or what failed."""
    script, flags = script_of(run)[0], flags_of(run, args)
    name, folder = FIRST[run], finished(run, seed, args)
    ends, each = time.monotonic() + limit, cost(run, 0, set(), args)[1]
    if folder is None:
        folder = Path(args.runs) / script / f"{name}-s{seed}"
        flags += ["--name", name, "--seed", str(seed), "--runs", args.runs]
        if failure := call(script, flags, limit, args):
            return failure
    record = summarise(folder, rows, run, seed, each, args)
    if old := read_results(args.results).get((run, seed)):
        record["rows"] += [row for row in old["rows"] if "attacks" in row]
    record["row"] = name
    failure = evaluate(folder, missing(rows, record), record, ends - time.monotonic(), args)
    write(record, args)
    return failure


FIRST = {}  # run -> id of the first row that has it: the name of its folder and of its result
for _row in tables.ROWS:
    FIRST.setdefault(_row.run, _row.id)


def form(run):
    """The run without its numbers: --scale tiny runs one of each form, and parses all."""
    return re.sub(r"(?<= )[\d./]+(?= |$)|(?<=teacher-ep)\d+", "#", run)


def jobs(args):
    """[(turn, run, seed, rows)] of the selected rows in the order in which they are run."""
    found, forms = {}, {}
    for place, row in enumerate(tables.ROWS):
        if args.scale == "tiny" and row.run != forms.setdefault(form(row.run), row.run):
            continue
        if row.run and not row.run.startswith("count ") and selected(row, args.tables):
            for seed in range(1 if args.scale == "tiny" else min(row.seeds, args.seeds or 99)):
                turn = "b" if row.turn == "a" and seed else row.turn
                key = (turn, seed, place)
                old, rows = found.get((row.run, seed), (key, []))
                found[row.run, seed] = min(old, key), [*rows, row]
    ordered = sorted(found.items(), key=lambda item: item[1][0])
    return [(key[0], run, seed, rows) for (run, seed), (key, rows) in ordered]


def plan(args, device):
    """[dict] of the jobs that are not done: what they wait for, or their minutes."""
    done, seen, left = read_results(args.results), set(), []
    coming = set()  # folders of the runs that will have been made by then
    for turn, run, seed, rows in jobs(args):
        waits, teacher = waits_for(run, args), teacher_file(run, args)
        if teacher and teacher.parent in coming:
            waits = ""
        pairs = missing(rows, done.get((run, seed)))
        if (run, seed) in done and (args.scale == "tiny" or not attacks_for(pairs, args)):
            continue
        job = {"turn": turn, "run": run, "seed": seed, "rows": rows, "waits": waits}
        cinic = args.scale == "full" and any(metric == "cinic_acc" for _, metric in pairs)
        if cinic and not (Path(args.data) / CINIC).is_dir():
            job["partly"] = f"cinic_acc: {args.data}/{CINIC} (doi 10.7488/ds/2448)"
        if not waits:
            coming.add(Path(args.runs) / script_of(run)[0] / f"{FIRST[run]}-s{seed}")
            flags = parsed(run, args.scale, args.data, args.runs)[0]
            rate, job["measured"] = speed(flags.model, done, device)
            job["minutes"] = cost(run, seed, seen, args)[0] / rate / 60
        left.append(job)
    return left


def show(left, total):
    """Print what is left: a line a run, its cost, and what waits."""
    rows = []
    for job in left:
        minutes = f"{job['minutes']:.1f}" if "minutes" in job else None
        first = {"turn": job["turn"], "row": FIRST[job["run"]], "seed": job["seed"]}
        waits = job["waits"] or job.get("partly")
        rows.append(first | {"minutes": minutes, "waits for": waits})
    if rows:
        print(common.table([{"row": row.pop("row")} | row for row in rows]))
    ready = [job for job in left if not job["waits"]]
    minutes = sum(job["minutes"] for job in ready)
    measured = all(job["measured"] for job in ready)
    note = "measured speed" if ready and measured else "estimate, not measured"
    print(f"\n{total - len(left)} of {total} runs are done; {len(ready)} are left,", end=" ")
    print(f"{minutes / 60:,.1f} hours ({note}); {len(left) - len(ready)} wait")


def compare(args):
    """Print the selected tables, paper against here, with the verdicts of report.py."""
    from benchmark import report  # which imports this file

    done, keys = read_results(args.results), ("line", "number", "paper", "here", "best epoch")
    keys += ("seeds", "difference", "in stds", "verdict")
    for table in dict.fromkeys(row.table for row in tables.ROWS if selected(row, args.tables)):
        rows = [row for row in tables.ROWS if row.table == table and selected(row, args.tables)]
        cells = [report.cells(row, metric, done) for row in rows for metric in row.printed]
        if cells:
            title = f"{table[:5]} {table[5]}, {report.title(table)}"
            print(f"\n{title}\n{common.table([dict(zip(keys, line)) for line in cells])}")


def prepare(args):
    """Make the small files that runs of this scale need."""
    folder, root = Path(args.runs), Path(args.data)
    two, ten = root / "planes-cars.npz", root / "cifar10.npz"
    if ten.exists() and not two.exists() and any("planes-cars" in job[1] for job in jobs(args)):
        make_planes_cars(ten, two)
    if args.scale == "tiny":
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "extra.npz", image=image, label=np.arange(200) % 10)
        from PIL import Image

        for part in ("train", "valid", "test"):
            for i, name in enumerate(images.CLASSES["shapes"]):
                path = folder / CINIC / part / name / f"n0000000{i}_1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[i]).save(path)


def make_planes_cars(ten, two):
    """Write the planes and cars of the CIFAR-10 in `ten` to `two`, in their order."""
    arrays = images.read_npz(ten)
    found = {"classes": images.CLASSES["cifar10"][:2]}
    for part in ("train", "test"):
        keep = arrays[f"y_{part}"] < 2
        found |= {f"{c}_{part}": arrays[f"{c}_{part}"][keep] for c in "xy"}
    common.write_atomically(two, lambda file: np.savez(file, **found))


def run_all(left, args):
    """Run what fits of the jobs, one after the other; -> the lines of those that failed."""
    ends = time.monotonic() + 60 * (args.minutes or 20_000)
    failures, begun = [], False
    for job in left:
        seconds = ends - time.monotonic()
        if job["waits"] or seconds <= 0 or begun and job["minutes"] * 60 > seconds:
            continue
        text = f"{FIRST[job['run']]} seed {job['seed']}"
        if waits := waits_for(job["run"], args):
            print(f"{text}: waits for {waits}", flush=True)
            continue
        begun, started = True, time.monotonic()
        if args.scale == "full":
            about = f"about {job['minutes']:.1f} min" + ", not measured" * (not job["measured"])
            print(f"{text}: {about}, progress in {args.runs}/benchmark.log", flush=True)
        failure = execute(job["run"], job["seed"], job["rows"], seconds, args)
        spent = f"{(time.monotonic() - started) / 60:.1f} min"
        print(f"{text}: {spent}{'  FAILED: ' + failure if failure else ''}", flush=True)
        failures += [f"{text}: {failure}"] if failure and "minutes are over" not in failure else []
    return failures


def main(argv=None):
    """Show what is left; unless --list, run what fits, write results, show what is left then."""
    args = parse_args(argv)
    if args.prepare:
        ten, two = (Path(args.data) / name for name in ("cifar10.npz", "planes-cars.npz"))
        if not ten.exists():
            common.fail(f"--prepare: there is no {ten}, which a run of a script on cifar10 makes")
        if not two.exists():
            make_planes_cars(ten, two)
        return print(f"{two} is there")
    device = "cuda" if args.device == "cuda" else "cpu"
    if args.device != "cpu" and args.scale == "full" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    total, left = len(jobs(args)), plan(args, device)
    if args.list:
        return show(left, total)
    prepare(args)
    try:
        with common.stoppable():
            failures = run_all(left, args)
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        print("\nstopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(common.status(stop)) from None
    if args.tables and args.scale == "full":
        compare(args)
        print()
    show(plan(args, device), total)
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    common.start(main)
