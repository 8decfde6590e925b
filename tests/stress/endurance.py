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
import robust_kd

SMALL = (
    "--data shapes --model mlp-4 --device cpu --train-subset 32 --test-subset 8 --val-size 8 "
    "--batch-size 16 --epochs 2 --teacher-epochs 2 --eps 4/255 "
)
LOSS = SMALL + "--teacher-batch-size 16 --steps 1 "
METHOD = SMALL.replace("--eps", "--eval-eps") + "--teacher-model mlp-4 --eval-restarts 1 "
FREE = SMALL + "--teacher-model mlp-4 --steps 1 --eval-attack clean "


def commands():
    """[(script, flags)]: every script with every loss, method and training of a teacher."""
    found = [("robust_kd", f"{LOSS} --loss {loss}") for loss in robust_kd.LOSSES]
    for training in ("st", "at", "ffgsm", "trades", "st at"):
        found.append(("robust_kd", f"{LOSS} --teacher-training {training}"))
    found.append(("robust_kd", f"{LOSS} --recipe at+ --loss at"))
    for script in ("fickle_teacher", "soft_randomization", "messy_collab", "teacher_free_kd"):
        for method in importlib.import_module(script).METHODS:
            flags = FREE if script == "teacher_free_kd" else METHOD
            flags += f"--method {method}"
            if method == "fickle":
                flags += " --dropout 0.2"
            if method == "self-distillation":  # needs convolutions
                flags += " --model wrn-10-1 --train-subset 16"
            found.append((script, flags))
    return found


def twice(script, flags, folder):
    """Run the command in two folders -> the differing files; [] if all is equal, bit for bit."""
    found = []
    for name in "ab":
        with contextlib.redirect_stdout(io.StringIO()):
            argv = [*shlex.split(flags), "--name", "x", "--runs", str(folder / name)]
            importlib.import_module(script).main(argv)
        found.append(faults.contents(folder / name))
    a, b = found
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def long_run(folder, epochs):
    """Train for so many epochs in another process -> what it held after each, as a list of dicts.

    megabytes: resident memory; handles: open files; log: bytes of log.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays, report = faults.prepared()[0], folder / "report.json"
    if not (pid := os.fork()):
        save_epoch, seen = common.save_epoch, []
        common.make_shapes = lambda: arrays

        def watched(folder, *args):
            save_epoch(folder, *args)
            resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
            pages = resident - shared  # without those of libraries, which the system may drop
            seen.append({"megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 2**20})
            seen[-1] |= {"handles": len(os.listdir("/proc/self/fd"))}
            seen[-1] |= {"log": (folder / "log.jsonl").stat().st_size}

        common.save_epoch, sys.stdout = watched, io.StringIO()
        flags = LOSS + f"--loss at --epochs {epochs} --name x"
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
