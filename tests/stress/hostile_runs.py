"""Run folders and JSON made to do harm; and all hostile files with what reads them.

`cases(folder)` writes them; `attempt` calls the readers in a process of their own, with limits;
`wrong` says which did not end in one line and exit status 2, in bounded time and memory.
"""

import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import hostile
import torch

import common
import eval_robustness
import robust_kd
from benchmark import prepare

MEGABYTES, SECONDS = 300, 10  # more memory than before, and time of a CPU, that a call may take
HANGS = 120  # seconds after which a call that only waits is killed

TEXTS = {  # of JSON files
    "no json": "hello",
    "empty": "",
    "nested": "[" * 100_000,
    "a list": "[1, 2]",
    "a number": "1",
    "a huge number": "9" * 10_000,
    "null": "null",
    "wrong types": '{"flags": 1, "fingerprint": [], "rows": 5, "stage": 1, "epoch": "a"}',
    "nested flags": '{"flags": ' + "[" * 50_000,
    "no text": "\udcff\udcfe{",
    "pairs of null": '{"flags": [[null, null]], "fingerprint": null}',
    "rows of null": '[{"model": null}, {"stage": null, "epoch": null}]',
}
TINY = (
    "--data shapes --model mlp-4 --loss akd --steps 1 --epochs 2 --name x "
    "--train-subset 16 --test-subset 4 --val-size 4 --batch-size 16 --device cpu "
    "--teacher-epochs 1 --teacher-batch-size 16 --runs"
)


def runs(folder):
    """{name: (argv of robust_kd.py, exit status)} for run folders with files made by others."""
    found, good = {}, folder / "good"
    robust_kd.main([*TINY.split(), str(good)])
    record = common.load(good / "robust_kd" / "x-s0" / "student.pt")
    (teacher,) = good.glob("teachers/*/teacher.pt")
    row = {"stage": "student", "epoch": 1, "loss": 1.0, "seconds": 1.0}
    checkpoint = {"rows": [row], "state": {}}

    def changed(name, status, file, content):
        run = folder / name / "robust_kd" / "x-s0"
        run.mkdir(parents=True)
        (run / "config.json").write_text((good / "robust_kd/x-s0/config.json").read_text())
        shutil.copytree(good / "teachers", folder / name / "teachers")
        if isinstance(content, dict):
            hostile.saved(run / file, content)
        else:
            (run / file).write_text(content, errors="surrogateescape")
        found[name] = [*TINY.split(), str(folder / name)], (status,)

    for name, text in TEXTS.items():
        changed(f"config: {name}", 2, "config.json", text)
        changed(f"log: {name}", 0, "log.jsonl", text)  # such rows are left out
        changed(f"summary: {name}", 2, "summary.json", text)
    for name, change in {
        "no state": {},
        "epoch": {"rows": [row | {"epoch": "a"}]},
        "rows": {"rows": [1]},
        "no rows": {"rows": []},
        "other rows": {"rows": [row, row]},
        "row of bombs": {"rows": [row | {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}]},
        "row that swells": {"rows": [row | {"a": torch.ones(1).expand(10**12)}]},
        "model": {"state": {"model": record["weights"] | {"x": torch.ones(1)}}},
        "state": {"state": {key: {} for key in ("model", "optimizer", "schedule")}},
    }.items():
        changed(f"checkpoint: {name}", 2, "student.checkpoint1.pt", checkpoint | change)
    bomb = hostile.Runs(folder)
    changed("checkpoint: exec", 0, "student.checkpoint1.pt", {"rows": bomb})  # begins again
    changed("student: exec", 0, "student.pt", {"meta": bomb})  # is not read, but made again
    changed("student: labels", 0, "student.pt", {"labels": torch.zeros(3)})
    in_teacher = Path("../..") / teacher.relative_to(good)
    changed("teacher: exec", 2, in_teacher, {"meta": bomb})
    changed("teacher: labels", 2, in_teacher, {"labels": torch.zeros(3)})
    changed("recipe: exec", 0, in_teacher.with_name("recipe.json"), "[" * 100_000)
    return found


def evaluations(folder):
    """{name: (argv of eval_robustness.py, exit status)} with a JSON, state or weights of others."""
    common.save_model(folder / "net.pt", common.build_model("mlp-4"))
    argv = [str(folder / "net.pt"), *"--data shapes --n 4 --attack clean pgd1 --device cpu".split()]
    found = {}
    for i, (name, text) in enumerate(TEXTS.items()):
        (folder / f"{i}.json").write_text(text, errors="surrogateescape")
        found[f"json: {name}"] = [*argv, "--json", str(folder / f"{i}.json")], (2,)
    progress = dataclasses.asdict(eval_robustness.Progress(torch.zeros(4, dtype=torch.int16)))
    swollen = torch.zeros(1, dtype=torch.int16).expand(10**12)
    empty = {"flags": {}, "attacks": {}, "corruptions": {}}
    for name, change in {
        "other flags": {},
        "no flags": {"flags": 1},
        "flags without names": {"flags": {None: 1, "--eps": 2}},
        "a list": {"attacks": [1]},
        "a number": {"attacks": {"x": 1}},
        "no tensor": {"attacks": {"x": progress | {"broken_by": [1]}}},
        "a tensor that swells": {"attacks": {"x": progress | {"broken_by": swollen}}},
        "a place of text": {"attacks": {"x": progress | {"passes_done": "a"}}},
        "corruptions of text": {"corruptions": {"x": {"fog": "a"}}},
        "exec": {"attacks": {"x": hostile.Runs(folder)}},
    }.items():
        state = folder / f"{name}.json.state"
        state.mkdir()
        hostile.saved(state / "state.pt", empty | change)
        statuses = (0,) if name == "exec" else (2,)  # 0: damaged, the evaluation begins again
        found[f"state: {name}"] = [*argv, "--json", str(folder / f"{name}.json")], statuses
    (folder / "a file.json.state").write_text("")
    found["state: a file"] = [*argv, "--json", str(folder / "a file.json")], (2,)
    (folder / "foreign.pt").write_bytes(pickle.dumps(hostile.Runs(folder)))
    hostile.saved(folder / "weights.pt", {"state_dict": [1]})
    for name in ("foreign", "weights"):
        weights = ["--model", "torch.nn:Identity", "--weights", str(folder / f"{name}.pt")]
        found[f"weights: {name}"] = [*weights, *argv[1:]], (2,)
    return found


def torchvision_files(folder):
    """{name: (data set, root)} with pickles where torchvision's own files should be."""
    for path in ("cifar-10-batches-py/data_batch_1", "cifar-100-python/train"):
        (folder / path).parent.mkdir()
        for name in ("data_batch_1", "batches.meta", "test_batch", "train", "test", "meta"):
            (folder / path).with_name(name).write_bytes(pickle.dumps(hostile.Runs(folder)))
    for name in ("raw", "processed"):
        (folder / "MNIST" / name).mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        header = struct.pack(">IIII", 0x0803, 10**9, 28, 28)
        (folder / "MNIST" / "raw" / f"{name}-ubyte").write_bytes(header)
    for name in ("training", "test"):
        torch.save(hostile.Runs(folder), folder / "MNIST" / "processed" / f"{name}.pt")
    return {name: (name, folder) for name in ("cifar10", "cifar100", "mnist")}


def cases(folder):
    """{name: (function, exit statuses that are right)}; their files are below the folder."""
    found = {}

    def add(kind, make, read, statuses=(2,)):
        where = folder / kind
        where.mkdir()
        for name, given in make(where).items():
            given, right = given if kind in ("runs", "evaluations") else (given, statuses)
            found[f"{kind}: {name}"] = (lambda given=given: read(given)), right

    add("checkpoints", hostile.checkpoints, common.load_model)
    add("npz", hostile.data_files, lambda path: common.load_data(str(path)))
    names = {"classes": ["a", "b", "c"], "shape": (8, 8, 3)}  # of what x_test is fine in some
    add(
        "ood",
        hostile.data_files,
        lambda path: eval_robustness.load_other_images(path, **names),
        (0, 2),
    )
    add("folders", hostile.folders, lambda path: common.load_data(str(path)))
    part = {"classes": ["a", "b"], "shape": (8, 8, 3)}
    add(
        "class folders",
        hostile.folders,
        lambda path: eval_robustness.load_other_images(path / "train", **part),
    )
    add(
        "cinic",
        hostile.folders,
        lambda path: prepare.read_cinic10(path, 1),
    )
    x, y = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(2)
    add(
        "corruptions",
        hostile.corruptions,
        lambda path: eval_robustness.read_corruptions(path, x, y),
    )
    add("runs", runs, robust_kd.main)
    add("evaluations", evaluations, eval_robustness.main)
    data = common.load_data("shapes", train_subset=16)
    add("extra", hostile.extra_files, lambda path: robust_kd.add_extra_data(data, path))
    add("torchvision", torchvision_files, lambda pair: common.load_data(*pair))
    return found


def attempt(calls, folder):
    """Call {name: function} in another process -> {name: (exit status, errors, seconds, more MB)}.

    Its memory is limited to 8 GB more than it has, its time to HANGS a call. seconds: of a CPU;
    more MB: by how much a call raised the most memory that was in use. A name that is missing was
    the last: it died.
    """
    report = folder / "report.jsonl"
    if not (pid := os.fork()):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 30),) * 2)
        with open(report, "w") as out:
            for name, function in calls.items():
                errors, begin, before = io.StringIO(), time.process_time(), peak()
                sys.stdout, sys.stderr, status = io.StringIO(), errors, 0
                signal.alarm(HANGS)
                try:
                    common.start(function)
                except SystemExit as stop:
                    status = stop.code
                except BaseException:
                    traceback.print_exc()
                    status = 1
                seconds = time.process_time() - begin
                row = [name, status, errors.getvalue(), seconds, peak() - before]
                print(json.dumps(row), file=out, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    return {row[0]: row[1:] for row in map(json.loads, report.open())}


def peak():
    """The most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def wrong(found, calls, statuses):
    """What is not as it should be in what `attempt` found: lines; [] if all is well."""
    lines = [f"{name}: the process died in it, or before" for name in calls.keys() - found.keys()]
    for name, (status, errors, seconds, more) in found.items():
        one = errors.startswith("error: ") and errors.count("\n") == 1
        if status not in statuses[name] or "Traceback" in errors or (status == 2 and not one):
            lines.append(f"{name}: status {status}, {errors[-800:]}")
        if seconds > SECONDS or more > MEGABYTES:
            lines.append(f"{name}: {seconds:.1f} s, {more} MB more")
    return lines
