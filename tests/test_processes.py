"""Several processes under torchrun (gloo): what one computes, their noise, going on, a kill."""

import argparse
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
import pytest
import torch
from conftest import ROOT

import common
import robust_kd

SMALL = (
    "--model mlp-16 --train-subset 66 --val-size 20 --test-subset 20 --device cpu "
    "--batch-size 32 --teacher-batch-size 32 --teacher-epochs 2 --steps 1 "
    # no BatchNorm and no random start of an attack: the numbers may not depend on the processes
    "--loss ckd --teacher-training st --name run"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SMALL on a file of 200 shapes: each process would take seconds to draw all 5,000."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, **common.make_shapes(200, 20))
    return f"--data {path} {SMALL}"


def torchrun(processes, program, *argv, **options):
    """Start a program in so many processes; their output is text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_port", str(10000 + os.getpid() % 20000), str(program), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(launcher, env=environment, text=True, **options)


def student_folder(runs):
    return runs / "robust_kd" / "run-s0"


def losses_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("loss", "train_acc")] for line in lines]


def test_three_processes_go_on_where_one_stopped_and_train_as_one(tmp_path, stop_at, small):
    # 130 images in batches of 32: the last batch has fewer images than there are processes
    flags = f"{small} --train-subset 130 --epochs 3 --runs"
    robust_kd.main(f"{flags} {tmp_path}/one".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/three", "student", 1)
    argv = f"{flags} {tmp_path}/three".split()
    run = torchrun(3, ROOT / "robust_kd.py", *argv, stdout=subprocess.PIPE)
    out = run.communicate(timeout=200)[0]
    assert run.returncode == 0 and out.count("student: goes on after epoch 1") == 1
    assert out.count("run-s0: number of processes: 1 before, 3 now; the weights") == 1
    one, three = student_folder(tmp_path / "one"), student_folder(tmp_path / "three")
    # the row of an epoch counts the two images of the last batch three times
    np.testing.assert_allclose(losses_of(one), losses_of(three), rtol=0.05)
    weights = common.load(one / "student.pt")["weights"]
    for name, tensor in common.load(three / "student.pt")["weights"].items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=0)


def test_gradients_are_weighted_by_the_images_of_each_process(monkeypatch):
    net, other = torch.nn.Linear(2, 1, bias=False), torch.tensor([5.0, 6.0, 1.0])  # of one image
    net.weight.grad = torch.tensor([[1.0, 2.0]])
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda sums: sums.add_(other))
    common.average_gradients(net, 3)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[2.0, 3.0]]))  # (3 g + other) / 4


def test_two_processes_wait_for_a_teacher_find_it_and_train_the_next_one_together(tmp_path, small):
    # AWP climbs on the gradient of the whole batch too
    flags = f"{small} --epochs 2 --awp 0.05 --runs"
    for seed in (0, 1):
        robust_kd.main(f"{flags} {tmp_path}/one --seed {seed}".split())
    robust_kd.main(f"{flags} {tmp_path}/two --name first".split())
    (folder,) = tmp_path.glob("two/teachers/*")
    with common.locked(folder):  # as if this process were training the teacher of seed 0
        argv = f"{flags} {tmp_path}/two --seed 0 1".split()
        run = torchrun(2, ROOT / "robust_kd.py", *argv, stdout=subprocess.PIPE)
        for line in run.stdout:
            if "waiting for process" in line:
                break
        else:
            pytest.fail("nobody waited")
        time.sleep(0.5)
        assert run.poll() is None
    out = run.communicate(timeout=200)[0]
    assert run.returncode == 0
    # that of seed 0 was found, that of seed 1 was not
    assert out.count("teacher 1/2") == out.count("teacher 2/2") == 1
    assert out.count("student 2/2") == out.count("is finished") == 2
    for file in ("robust_kd/run-s0/student.pt", "robust_kd/run-s1/student.pt"):
        weights = common.load(tmp_path / "one" / file)["weights"]
        for name, tensor in common.load(tmp_path / "two" / file)["weights"].items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=0)
    teachers = [{f.name for f in tmp_path.glob(f"{runs}/teachers/*")} for runs in ("one", "two")]
    assert teachers[0] == teachers[1] and len(teachers[0]) == 2


# As the group of NCCL is destroyed while other processes wait for this one: not before they do
NCCL = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import common, robust_kd

common.dist.destroy_process_group = lambda: time.sleep(1000)
common.start(robust_kd.main)
"""


def test_two_processes_are_refused_a_folder_in_use_and_end(tmp_path, small):
    folder = student_folder(tmp_path)
    (tmp_path / "nccl.py").write_text(NCCL)
    with common.locked(folder):
        argv = [ROOT, *f"{small} --epochs 1 --runs {tmp_path}".split()]
        run = torchrun(2, tmp_path / "nccl.py", *argv, stderr=subprocess.PIPE)
        errors = run.communicate(timeout=100)[1]
    assert run.returncode != 0
    assert f"error: {folder}: in use by process {os.getpid()}; wait for it" in errors
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, {"RANK": "1"}, {"WORLD_SIZE": "two"}],
)
def test_what_another_job_left_in_the_environment_is_ignored(
    environment, tmp_path, monkeypatch, capsys, small
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert (common.world(), common.rank()) == (1, 0)
    argv = f"{small} --loss st --epochs 1 --runs {tmp_path}".split()
    common.start(lambda: robust_kd.main(argv))
    assert (student_folder(tmp_path) / "student.pt").exists()
    assert "student 1/1" in capsys.readouterr().out
    assert "torch.distributed.run" not in common.command_line()


def test_what_torchrun_sets_is_taken(monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "RANK": "2"}.items():
        monkeypatch.setenv(key, value)
    assert (common.world(), common.rank()) == (3, 2)
    assert "-m torch.distributed.run --nproc_per_node 3 " in common.command_line()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("n", [32, 33, 34, 35, 36, 37, 38, 39, 40])
def test_no_process_gets_a_single_image(n, world, monkeypatch):
    data = common.load_data("shapes", train_subset=n, test_subset=4, augment="none")
    sizes, labels = [], []
    for rank in range(world):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(common, "world", lambda: world)
        parts = [part for _, part in common.batches(data, 16, 0, "student", 0)]
        assert len(parts) == common.steps_per_epoch(data, 16)
        sizes.append([len(part) for part in parts])
        labels += parts[:2]
    assert min(map(min, sizes)) >= 2 and len({len(row) for row in sizes}) == 1
    assert sum(map(len, labels)) >= 32


CHILDREN = "/proc/{0}/task/{0}/children"


@pytest.mark.skipif(
    not Path(CHILDREN.format(os.getpid())).exists(), reason="Linux lists child processes there"
)
def test_when_one_process_is_killed_the_others_end_and_the_command_goes_on(
    tmp_path, monkeypatch, capsys, small
):
    argv = f"{small} --epochs 100000 --runs {tmp_path}".split()
    program = ROOT / "robust_kd.py"
    run = torchrun(2, program, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("student") and " 3/" in line:
            break
    children = Path(CHILDREN.format(run.pid)).read_text().split()
    second = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    start = time.monotonic()
    os.kill(int(second[0]), signal.SIGKILL)
    config = json.loads((student_folder(tmp_path) / "config.json").read_text())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert shlex.split(config["command"])[-len(argv) :] == argv
    assert shlex.split(config["command"])[1:5] == launcher[1:] and config["processes"] == 2
    errors = run.communicate(timeout=100)[1]
    assert config["command"] in errors or "another process has ended" in errors
    assert run.returncode != 0 and time.monotonic() - start < 100
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    line = r"^(?:error: process \d: another process has ended|stopped; finished epochs are kept)"
    assert re.search(line, errors, re.M), errors

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        robust_kd.main(argv)  # this process alone
    out = capsys.readouterr().out
    assert "student: goes on after epoch" in out
    assert "run-s0: number of processes: 2 before, 1 now" in out


# ------------------------------------------------------------------------------------------------
# Noise: two processes that see the same images and labels differ by what they draw alone

NOISY = (
    "--data mnist --train-subset 16 --val-size 0 --test-subset 2 --batch-size 8 --model mlp-8 "
    "--epochs 2 --teacher-epochs 2 --device cpu --eval-restarts 1 --name run"
)
JOBS = {  # what is drawn -> script, flags
    "nothing": ("fickle_teacher", "--method hinton --teacher-model mlp-8"),
    "dropout": ("fickle_teacher", "--dropout 0.5 --teacher-model wrn-10-1"),
    "signal": ("fickle_teacher", "--method signal --sigma 0.5 --teacher-model mlp-8"),
    "swaps": (
        "fickle_teacher",
        "--method swap --swap all --swap-probability 0.5 --swap-threshold 1 --teacher-model mlp-8",
    ),
    "pixels": ("soft_randomization", "--sigma 0.5 --teacher-model mlp-8"),
    "labels": ("messy_collab", "--method mc-ts --noise-rate 0.5 --teacher-model mlp-8"),
    "fixed labels": (
        "messy_collab",
        "--method flc-ts --corruption-rate 0.99 --teacher-model mlp-8",
    ),
}
DIFFERENT = {  # what is drawn -> the losses that depend on it
    "nothing": set(),
    "dropout": {"teacher's cross-entropy", "kl"},
    "signal": {"kl"},
    "swaps": {"kl"},
    "pixels": {"student's cross-entropy", "kl"},
    "labels": {"teacher's cross-entropy", "student's cross-entropy"},
    # drawn once for all, but each process has images of its own
    "fixed labels": {"teacher's cross-entropy", "student's cross-entropy"},
}
DRIVER = """
import atexit, importlib, json, os, sys
import torch.nn.functional as F

folder, root, jobs, flags = sys.argv[1:]

def write_threads():  # registered before the scripts register anything: it runs after that
    tasks = os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else []
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
    with open(f"{folder}/threads{os.environ['RANK']}.json", "w") as file:
        json.dump(names, file)

atexit.register(write_threads)
sys.path.insert(0, root)
losses = {}

def recorded(name, function):
    def call(*args, **kwargs):
        loss = function(*args, **kwargs)
        if loss.dim() == 0:  # of a step of the training, not of an attack in the evaluation
            losses[job][name].append(loss.item())
        return loss
    return call

F.cross_entropy = recorded("cross-entropy", F.cross_entropy)
F.kl_div = recorded("kl", F.kl_div)
for job, (script, more) in json.loads(jobs).items():
    losses[job] = {"cross-entropy": [], "kl": []}
    argv = [*flags.split(), "--runs", f"{folder}/{job}", *more.split()]  # each has its own teacher
    importlib.import_module(script).main(argv)
with open(f"{folder}/losses{os.environ['RANK']}.json", "w") as file:
    json.dump(losses, file)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have run all JOBS on sixteen equal images of a 3."""
    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28), np.uint8)
    arrays = {"classes": np.array([str(k) for k in range(10)])}
    for part in ("train", "test"):
        arrays |= {f"x_{part}": np.repeat(pixels, 17, 0), f"y_{part}": np.full(17, 3)}
    left_out = np.random.default_rng(0).permutation(17)[16]  # by --train-subset 16
    arrays["y_train"][left_out] = 4  # data of one class are refused
    np.savez(folder / "mnist.npz", **arrays)
    (folder / "driver.py").write_text(DRIVER)
    argv = [folder, ROOT, json.dumps(JOBS), f"{NOISY} --data-root {folder}"]
    run = torchrun(2, folder / "driver.py", *argv, stderr=subprocess.PIPE)
    errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors
    return folder


def losses_by_net(folder, rank, job):
    """{whose: losses} of a process; a net trains for two epochs of two steps."""
    losses = json.loads((folder / f"losses{rank}.json").read_text())[job]
    assert len(losses["kl"]) == 4
    return {
        "teacher's cross-entropy": losses["cross-entropy"][:4],
        "student's cross-entropy": losses["cross-entropy"][4:8],  # evaluations come after them
        "kl": losses["kl"],
    }


@pytest.mark.parametrize("job", DIFFERENT)
def test_processes_draw_different_noise_and_nothing_else_differs(job, two_processes):
    first, second = (losses_by_net(two_processes, rank, job) for rank in (0, 1))
    assert {name for name in first if first[name] != second[name]} == DIFFERENT[job]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists threads there")
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends(two_processes):
    """One that frees a tensor just then aborts the process, and torchrun ends the others."""
    for rank in (0, 1):
        names = json.loads((two_processes / f"threads{rank}.json").read_text())
        assert names and not [name for name in names if "gloo" in name]


def test_the_processes_train_on_the_labels_that_the_first_one_has_written(two_processes):
    path = two_processes / "fixed labels" / "messy_collab" / "run-s0" / "labels.pt"
    assert (common.load(path)["labels"] != 3).all()


def test_a_teacher_that_each_process_draws_otherwise_has_one_folder(tmp_path, monkeypatch):
    """Its function may draw weights in ways that no seed reaches."""
    data = common.load_data("shapes", val_size=0, train_subset=8, test_subset=4)
    args = argparse.Namespace(model="own:net", seed=0, runs=tmp_path, augment="crop")
    monkeypatch.setattr(common, "from_first_process", lambda value: "the digest of the first")
    folders = set()
    for digest in ("a", "b"):
        monkeypatch.setattr(common, "initial_digest", lambda *_, found=digest: found)
        folders.add(common.teacher_folder(args, data))
    assert len(folders) == 1


def test_processes_seed_their_epochs_by_rank_and_the_first_one_as_one_alone(monkeypatch):
    drawn = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for epoch in (0, 1):
            common.seed_epoch(0, "student", epoch)
            drawn[rank, world, epoch] = torch.rand(1).item()
    assert drawn[0, 1, 0] == drawn[0, 2, 0] and drawn[0, 1, 1] == drawn[0, 2, 1]
    assert len(set(drawn.values())) == 6


@pytest.mark.parametrize("rank, order", [(0, ["data", "sync"]), (1, ["sync", "data"])])
def test_the_first_process_downloads_and_unpacks_for_the_others(monkeypatch, rank, order):
    seen = []
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "load_data", lambda *_: seen.append("data"))
    monkeypatch.setattr(common, "sync", lambda: seen.append("sync"))
    args = robust_kd.parse_args(f"--data shapes {SMALL}".split())
    common.load_training_data(args, torch.device("cpu"))
    assert seen == order
