"""Defects of the scripts, as they were found: a teacher's seed, noise under torchrun, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import fickle_teacher
import messy_collab
import plumbing
import soft_randomization

TRIO = {
    "fickle_teacher": fickle_teacher,
    "soft_randomization": soft_randomization,
    "messy_collab": messy_collab,
}
PROGRAMS = [*TRIO, "robust_kd", "teacher_free_kd", "eval_robustness"]
SMALL = "--data shapes --model mlp-8 --teacher-model mlp-12 --train-subset 48 --val-size 20"
SMALL += " --test-subset 20 --batch-size 16 --epochs 1 --teacher-epochs 1 --device cpu"
SMALL += " --eval-steps 1 --restarts 1"


def run(script, runs, flags, seed=0, name="run"):
    """The folder of a run of the script with the flags (and SMALL) at the seed."""
    own = ["--runs", str(runs), "--name", name, "--seed", str(seed)]
    TRIO[script].main([*SMALL.split(), *own, *flags.split()])
    return runs / script / f"{name}-s{seed}"


def same_weights(a, b):
    a, b = (common.load(file)["weights"] for file in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


# The teacher of a seed --------------------------------------------------------------------------


@pytest.mark.parametrize("script", TRIO)
def test_three_seeds_of_the_teacher_are_three_teachers(script, tmp_path):
    run(script, tmp_path, "--method teacher --seeds 0 1 2")
    folders = [tmp_path / script / f"run-s{seed}" for seed in range(3)]
    data = common.load_data("shapes", val_size=20, train_subset=48, test_subset=20)
    for seed, folder in enumerate(folders):
        file = folder / "teacher.pt"
        assert not any(same_weights(file, other / "teacher.pt") for other in folders[:seed])
        right = common.correct(common.load_model(file)[0], data.x_test, data.y_test)
        (row,) = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["summary"]
        assert row["model"] == "teacher" and row["clean_acc"] == right.double().mean().item()


@pytest.mark.parametrize("script", TRIO)
def test_students_of_all_seeds_share_the_teachers_of_the_first_seeds(script, tmp_path, capsys):
    run(script, tmp_path, "--method teacher --seeds 0 1 5")
    alone = [tmp_path / script / f"run-s{seed}" / "teacher.pt" for seed in (0, 1)]
    students = tmp_path / "students"
    found = run(script, students, "--method hinton --teacher-seeds 2", seed=5)
    for seed in (0, 1):
        assert same_weights(found / f"teacher{seed}.pt", alone[seed])
    assert any(same_weights(found / "teacher.pt", file) for file in alone)
    capsys.readouterr()
    again = run(script, students, "--method hinton --teacher-seeds 2", seed=6)
    assert same_weights(again / "teacher.pt", found / "teacher.pt")
    assert "teacher: taken from" in capsys.readouterr().out


@pytest.mark.parametrize("script", TRIO)
def test_teacher_and_students_take_each_others_teacher_only_if_it_is_of_the_seed(
    script, tmp_path, capsys
):
    five = run(script, tmp_path, "--method teacher", seed=5)
    hinton = run(script, tmp_path, "--method hinton", name="hinton")
    assert not same_weights(five / "teacher.pt", hinton / "teacher.pt")
    capsys.readouterr()
    zero = run(script, tmp_path, "--method teacher")
    assert "teacher0: taken from" in capsys.readouterr().out
    assert same_weights(zero / "teacher.pt", hinton / "teacher.pt")


@pytest.mark.parametrize("script", TRIO)
def test_a_choice_among_teachers_is_refused_where_the_teacher_is_that_of_the_seed(
    script, tmp_path, refused
):
    flags = [*SMALL.split(), "--method", "teacher", "--teacher-seeds", "3"]
    message = refused(TRIO[script].main, [*flags, "--runs", str(tmp_path)])
    assert message.startswith("error: --teacher-seeds") and "--seed" in message
    assert list(tmp_path.iterdir()) == []


# Several processes ------------------------------------------------------------------------------

# Two processes see the same images and labels: what they compute differs by what they draw alone
SAME = "--data mnist --train-subset 16 --val-size 0 --test-subset 2 --batch-size 8 --model mlp-8"
SAME += " --epochs 2 --teacher-epochs 2 --device cpu --eval-steps 1 --restarts 1"
JOBS = {  # what is drawn -> script, flags, the losses that depend on it
    "nothing": ("fickle_teacher", "--method hinton --teacher-model mlp-8", ""),
    "dropout": ("fickle_teacher", "--dropout 0.5 --teacher-model wrn-10-1", "teacher kl"),
    "signal": ("fickle_teacher", "--method signal --sigma 0.5 --teacher-model mlp-8", "kl"),
    "swaps": (
        "fickle_teacher",
        "--method swap --swap all --swap-probability 0.5 --swap-threshold 1 --teacher-model mlp-8",
        "kl",
    ),
    "pixels": ("soft_randomization", "--sigma 0.5 --teacher-model mlp-8", "student kl"),
    "labels": (
        "messy_collab",
        "--method mc-ts --noise-rate 0.5 --teacher-model mlp-8",
        "teacher student",
    ),
}
DRIVER = """
import importlib, json, os, sys, time
import torch.nn.functional as F
folder, root, delay, jobs, flags = sys.argv[1:]
jobs = json.loads(jobs)
sys.path.insert(0, root)
replace, losses = os.replace, {}

def late(source, target):
    time.sleep(float(delay) * str(target).endswith("labels.pt"))
    replace(source, target)

def recorded(name, function):
    def call(*args, **kwargs):
        loss = function(*args, **kwargs)
        losses[job][name].append(loss.item())
        return loss
    return call

os.replace = late
F.cross_entropy = recorded("ce", F.cross_entropy)
F.kl_div = recorded("kl", F.kl_div)
for job, (script, more, _) in jobs.items():
    losses[job] = {"ce": [], "kl": []}
    argv = [*flags.split(), "--runs", f"{folder}/{job}", *more.split()]  # each has its own teacher
    importlib.import_module(script).main(argv)
with open(f"{folder}/losses{os.environ['RANK']}.json", "w") as file:
    json.dump(losses, file)
"""


def two_processes(folder, jobs, delay=0):
    """{job: losses} of each of two processes that run the jobs under torchrun.

    delay: seconds for which the first process holds back its labels.pt.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28), np.uint8)
    arrays = {f"x_{part}": np.repeat(pixels, 16, 0) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.full(16, 3) for part in ("train", "test")}
    np.savez(folder / "mnist.npz", **arrays, classes=np.array([f"{k}" for k in range(10)]))
    (folder / "driver.py").write_text(DRIVER)
    flags = f"{SAME} --data-root {folder} --name run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(20000 + os.getpid() % 20000), str(folder / "driver.py")]
    command += [str(folder), str(ROOT), str(delay), json.dumps(jobs), flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """{job: {"teacher", "student", "kl": losses}} of each of the two processes."""
    found = two_processes(tmp_path_factory.mktemp("two"), JOBS)
    for process in found:
        for job, of in process.items():
            assert len(found[1][job]["ce"]) == 8 and len(of["kl"]) == 4  # 2 nets, 2 epochs, 2 steps
            parts = {"teacher": of["ce"][:4], "student": of["ce"][4:8], "kl": of["kl"]}
            process[job] = parts  # after them the first process evaluates
    return found


@pytest.mark.parametrize("job", JOBS)
def test_processes_draw_different_noise_and_nothing_else_differs(job, losses):
    for name, values in losses[0][job].items():
        differs = values != losses[1][job][name]
        assert differs == (name in JOBS[job][2].split()), name


def test_processes_seed_their_epochs_by_rank_and_the_first_one_as_one_alone(monkeypatch):
    drawn = {}
    for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for epoch in (0, 1):
            plumbing.seed_epoch("noise", 0, epoch)
            drawn[rank, world, epoch] = torch.rand(1).item()
    assert drawn[0, 1, 0] == drawn[0, 2, 0] and drawn[0, 1, 1] == drawn[0, 2, 1]
    assert len(set(drawn.values())) == 6


def test_corrupted_labels_are_read_when_the_first_process_has_written_them(tmp_path):
    flags = "--method flc-ts --corruption-rate 0.99 --teacher-model mlp-8"
    two_processes(tmp_path, {"fixed": ("messy_collab", flags, "")}, delay=3)
    labels = common.load(tmp_path / "fixed" / "messy_collab" / "run-s0" / "labels.pt")["labels"]
    assert (labels != 3).all()


# Ctrl-C while torch is imported ------------------------------------------------------------------

TORCH = """
import time
print("importing torch", flush=True)
time.sleep({seconds})
print("imported", flush=True)
raise SystemExit(0)
"""


def importing(program, folder, seconds, **options):
    """The program while it imports torch, which takes so long."""
    (folder / "torch.py").write_text(TORCH.format(seconds=seconds))
    env = os.environ | {"PYTHONPATH": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(ROOT / f"{program}.py")]
    process = subprocess.Popen(command, env=env, **pipes, **options)
    assert process.stdout.readline() == "importing torch\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_stopped_while_it_imports_torch_ends_without_a_word(
    program, number, tmp_path
):
    process = importing(program, tmp_path, 60)
    process.send_signal(number)
    assert process.communicate(timeout=50) == ("", "")
    assert process.returncode in (-number, 128 + number)  # a shell says 130 or 143 to both


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_in_the_background_of_a_script_goes_on_ignoring_ctrl_c(program, tmp_path):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = importing(program, tmp_path, 1, preexec_fn=ignore)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) == ("imported\n", "") and process.returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_importing_a_program_leaves_ctrl_c_alone(program):
    code = f"import signal, {program}; assert signal.getsignal(2) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


def test_after_the_import_ctrl_c_is_caught(tmp_path):
    flags = f"{SMALL} --method student --epochs 100000 --runs {tmp_path}"
    command = [sys.executable, str(ROOT / "fickle_teacher.py"), *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    for line in process.stdout:
        if " 2/" in line:
            break
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=50)[1]
    assert process.returncode == 130 and "go on with:" in err and "Traceback" not in err


def test_the_python_that_is_promised_is_one_that_the_tests_ran_on():
    makefile, pyproject, trust = (
        (ROOT / name).read_text() for name in ("Makefile", "pyproject.toml", "tests/trust.md")
    )
    asked = re.search(r"sys.version_info >= \(3, (\d+)\)", makefile)[1]
    assert f"Python 3.{asked} or newer is needed" in makefile
    assert f'target-version = "py3{asked}"' in pyproject
    assert f"on Python 3.{asked})" in trust  # with which versions all tests passed
