"""Long runs, and the same command twice: memory, log and handles; weights bit for bit."""

import contextlib
import importlib
import io
import json
import os
import shlex
import sys
from pathlib import Path

import faults

import common
import images
import plumbing
import robust_kd

SMALL = "--data shapes --model mlp-4 --device cpu --train-subset 32 --test-subset 8 --val-size 8"
SMALL += " --batch-size 16 --epochs 2 --eps 4/255"
LOSS = SMALL + " --teacher-epochs 2 --teacher-batch-size 16 --steps 1 --eval-steps 1"
METHOD = SMALL + " --teacher-model mlp-4 --teacher-epochs 2 --eval-steps 1 --restarts 1"
FREE = SMALL + " --teacher-model mlp-4 --teacher-epochs 2 --steps 1 --eval-attack clean"


def commands():
    """[(script, flags)]: every script with every loss, method and training of a teacher."""
    scripts = {name: importlib.import_module(name) for name in faults.JOBS}
    found = [("robust_kd", f"{LOSS} --loss {loss}") for loss in robust_kd.LOSSES]
    trainings = [*robust_kd.TEACHERS, "st at"]
    found += [("robust_kd", f"{LOSS} --teacher-training {name}") for name in trainings]
    found += [("robust_kd", f"{LOSS} --recipe at+ --loss at")]
    for name in ("fickle_teacher", "soft_randomization", "messy_collab"):
        dropout = " --dropout 0.2" if name == "fickle_teacher" else ""
        for method in scripts[name].METHODS:
            found.append((name, f"{METHOD} --method {method}" + dropout * (method == "fickle")))
    for method in scripts["teacher_free_kd"].METHODS:
        convolutions = " --model wrn-10-1 --train-subset 16" * (method == "self-distillation")
        found.append(("teacher_free_kd", f"{FREE} --method {method}{convolutions}"))
    return found


def twice(script, flags, folder):
    """Run the command in two folders -> the differing files; [] if all is equal, bit for bit."""
    found = []
    for name in "ab":
        with contextlib.redirect_stdout(io.StringIO()):
            argv = [*shlex.split(flags), "--name", "x", "--runs", str(folder / name)]
            importlib.import_module(script).main(argv)
        run = folder / name / script / "x-s0"
        rows = [faults.without_times(json.loads(row)) for row in (run / "log.jsonl").open()]
        found.append({"log.jsonl": rows})
        for path in run.glob("*.pt"):
            record = common.load(path)
            tensors = record["weights"] if "weights" in record else {"": record["labels"]}
            found[-1][path.name] = {k: v.numpy().tobytes() for k, v in tensors.items()}
    a, b = found
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def long_run(folder, epochs):
    """Train for so many epochs in another process -> what it held after each, as a list of dicts.

    megabytes: resident memory; handles: open files; log: bytes of log.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays, report = faults.prepared()[0], folder / "report.json"
    if not (pid := os.fork()):
        end_epoch, seen = plumbing.end_epoch, []
        images.make_shapes = lambda: arrays

        def watched(run, *args):
            end_epoch(run, *args)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append({"megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 2**20})
            seen[-1] |= {"handles": len(os.listdir("/proc/self/fd"))}
            seen[-1] |= {"log": run.log.stat().st_size}

        plumbing.end_epoch, sys.stdout = watched, io.StringIO()
        flags = LOSS + f" --loss at --epochs {epochs} --name x"
        with contextlib.suppress(BaseException):
            robust_kd.main([*shlex.split(flags), "--runs", str(folder)])
            report.write_text(json.dumps(seen))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(report.read_text())


def is_flat(seen, early=9):
    """Whether the last epoch holds what epoch 10 held: memory within 5 %, handles, log in line."""
    a, b = seen[early], seen[-1]
    per_epoch = (b["log"] - a["log"]) / (len(seen) - 1 - early) / (a["log"] / (early + 1))
    grown = b["megabytes"] / a["megabytes"]
    return grown < 1.05 and a["handles"] == b["handles"] and 0.9 < per_epoch < 1.1
