"""What was wrong once in data, processes, precision, compiling and evaluation, and must stay right.

Each test failed on the code as it was when the defect was found.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import eval_robustness
import fickle_teacher
import robust_kd
import teacher_free_kd

SMALL = "--data shapes --train-subset 40 --val-size 8 --test-subset 8 --batch-size 16 --epochs 1"
ONE_EVALUATION = "--eval-steps 1 --restarts 1"


def saved_shapes(path, n=40, change=None):
    """An .npz of n training and n test images of the shapes, after change(its arrays)."""
    data = common.load_data("shapes", train_subset=n, test_subset=n)
    arrays = {"x_train": data.x_train, "y_train": data.y_train}
    arrays |= {"x_test": data.x_test, "y_test": data.y_test}
    arrays = {key: value.numpy().copy() for key, value in arrays.items()}
    if change:
        change(arrays)
    np.savez(path, **arrays)


# ------------------------------------------------------------------------------------------------
# Labels that change


def relabel(part):
    def change(arrays):
        arrays[f"y_{part}"][0] = (arrays[f"y_{part}"][0] + 1) % 10

    return change


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_run_on_a_file_with_other_labels_is_refused(part, tmp_path, refused):
    flags = f"--data {tmp_path}/own.npz --val-size 8 --model mlp-8 --teacher-model mlp-8 --epochs 1"
    flags += f" --teacher-epochs 1 --runs {tmp_path} --name run {ONE_EVALUATION}"
    saved_shapes(tmp_path / "own.npz")
    fickle_teacher.main(flags.split())
    saved_shapes(tmp_path / "own.npz", change=relabel(part))
    message = refused(fickle_teacher.main, flags.split())
    assert "--data" in message and "--name" in message


def test_a_teacher_of_other_labels_is_not_taken_for_this_one(tmp_path, capsys):
    flags = f"--data {tmp_path}/own.npz --val-size 8 --model mlp-8 --teacher-model mlp-8 --epochs 1"
    flags += f" --teacher-epochs 1 --runs {tmp_path} {ONE_EVALUATION}"
    saved_shapes(tmp_path / "own.npz")
    fickle_teacher.main([*flags.split(), "--name", "first"])
    saved_shapes(tmp_path / "own.npz", change=relabel("train"))
    capsys.readouterr()
    fickle_teacher.main([*flags.split(), "--name", "second"])
    assert "taken from" not in capsys.readouterr().out


def test_an_evaluation_of_a_file_with_other_labels_is_refused(tmp_path, refused):
    saved_shapes(tmp_path / "own.npz")
    model = common.build_model("mlp-8")
    common.save_model(tmp_path / "net.pt", model, {})
    flags = [f"{tmp_path}/net.pt", "--data", f"{tmp_path}/own.npz", "--attack", "clean"]
    flags += ["--json", f"{tmp_path}/out.json"]
    eval_robustness.main(flags)
    eval_robustness.main(flags)  # the same images: shown again
    saved_shapes(tmp_path / "own.npz", change=relabel("test"))
    assert "--data" in refused(eval_robustness.main, flags)


# ------------------------------------------------------------------------------------------------
# The subset of CINIC-10


def save_cinic(folder, names, images=3):
    """The three parts of a CINIC-10 folder with so many images from ImageNet for each class."""
    from PIL import Image

    for part in ("train", "valid", "test"):
        for k, name in enumerate(names):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(images):
                pixels = np.full((32, 32, 3), 20 * k + i, np.uint8)
                Image.fromarray(pixels).save(place / f"n0123456{k}_{i}.png")


def test_the_cinic_images_are_the_same_for_every_seed(tmp_path):
    data = common.load_data("shapes", test_subset=8)
    save_cinic(tmp_path / "cinic", data.classes)
    common.save_model(tmp_path / "net.pt", common.build_model("mlp-8"), {})
    notes = []
    for seed in (0, 1, 2):
        flags = f"{tmp_path}/net.pt --data shapes --n 8 --attack clean cinic --seed {seed}"
        flags += f" --cinic {tmp_path}/cinic --cinic-per-class 4 --json {tmp_path}/{seed}.json"
        eval_robustness.main(flags.split())
        notes += re.findall(r"sha256 of their list: (\w+)", (tmp_path / f"{seed}.json").read_text())
    assert len(notes) == 3 and len(set(notes)) == 1, notes


# ------------------------------------------------------------------------------------------------
# Batches of several processes


def batches_of_process(data, rank, batch_size, monkeypatch):
    """[(x, labels, share of the images of its batch)] of one of four processes."""
    run = SimpleNamespace(show=lambda *args, **options: None)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        patch.setenv("RANK", str(rank))
        return [(x, y, run.share) for x, y in common.batches(data, batch_size, 0, 0, run)]


@pytest.mark.parametrize("augment", ["crop", "cutout", "cutmix", "extra"])
@pytest.mark.parametrize("batch_size", [32, 3])
def test_any_split_of_a_batch_has_the_gradient_of_the_whole(batch_size, augment, monkeypatch):
    data = common.load_data("shapes", train_subset=33)
    if augment == "extra":
        data.extra, data.extra_fraction = (data.x_test.numpy(), data.y_test), 0.6
        data.smoothing = 0.1
    else:
        data.augment = augment
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    def gradient(x, labels):
        loss = F.cross_entropy(model(x), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    processes = [batches_of_process(data, rank, batch_size, monkeypatch) for rank in range(4)]
    for step, (x, labels) in enumerate(common.batches(data, batch_size, 0, 0)):
        parts = [process[step] for process in processes]
        shares = [share for *_, share in parts]
        assert sum(shares) == pytest.approx(1)
        for rank, (x_part, labels_part, share) in enumerate(parts):
            assert len(x_part) == len(labels_part) > 0
            assert share == len(x[rank::4]) / len(x)
            if share:  # else it computes on some image, for nothing
                assert torch.equal(x_part, x[rank::4])
                assert torch.equal(labels_part, labels[rank::4])
        together = sum(share * gradient(a, b) for a, b, share in parts)
        assert torch.allclose(together, gradient(x, labels), atol=1e-6)


def test_four_processes_with_too_few_images_train_as_one(tmp_path):
    flags = "--data shapes --model mlp-16 --train-subset 33 --val-size 20 --test-subset 20"
    flags += " --loss st --batch-size 32 --epochs 3 --augment cutmix --eval-steps 1 --lr 0.01"
    flags += " --name run --device cpu --runs"
    robust_kd.main([*flags.split(), f"{tmp_path}/one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"]
    command += ["--master_port", str(40000 + os.getpid() % 20000), f"{ROOT}/robust_kd.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [*flags.split(), f"{tmp_path}/four"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    rows, weights = [], []
    for kind in ("one", "four"):
        folder = tmp_path / kind / "robust_kd" / "run-s0"
        lines = (folder / "log.jsonl").read_text().splitlines()[:-1]
        rows.append([[json.loads(line)[key] for key in ("loss", "train_acc")] for line in lines])
        weights.append(common.load(folder / "student.pt")["weights"])
    assert len(rows[0]) == 3 and np.allclose(*rows, atol=1e-5), rows
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-5), name


# ------------------------------------------------------------------------------------------------
# Precision


def tf32():
    """(convolutions in TF32, matrix products in TF32), by PyTorch's new and old switches."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"


@pytest.fixture
def precisions(monkeypatch):
    """{whether the net was in training mode: the tf32() of its forward passes}, as sets."""
    found, forward = {True: set(), False: set()}, common.ConvNet.forward

    def watched(net, x):
        found[net.training].add(tf32())
        return forward(net, x)

    monkeypatch.setattr(common.ConvNet, "forward", watched)
    monkeypatch.setattr(common, "macs", lambda *args: 0)  # it counts, whatever the precision
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's defaults
    torch.backends.cuda.matmul.allow_tf32 = False
    yield found
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_a_precision_of_training_is_what_its_name_says(precision, precisions, tmp_path):
    flags = f"{SMALL} --loss st --model wrn-10-1 --eval-steps 1 --runs {tmp_path}"
    robust_kd.main([*flags.split(), "--precision", precision])
    allowed = precision == "tf32"
    assert precisions == {True: {(allowed, allowed)}, False: {(False, False)}}
    # torch.compile reads the old switches and refuses those that contradict the new ones
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_every_accuracy_of_the_exits_is_in_strict_float32(precisions, tmp_path, monkeypatch):
    seen, forward = set(), teacher_free_kd.Exits.forward

    def watched(exits, net, x, only=None):
        if not exits.training:
            seen.add((*tf32(), net.training))
        return forward(exits, net, x, only)

    monkeypatch.setattr(teacher_free_kd.Exits, "forward", watched)
    flags = f"{SMALL} --method self-distillation --model wrn-10-1 --runs {tmp_path}"
    teacher_free_kd.main([*flags.split(), "--precision", "tf32"])
    assert seen == {(False, False, False)}


def test_accuracies_with_and_without_a_digit_are_in_strict_float32(precisions, tmp_path):
    saved_shapes(tmp_path / "mnist.npz")
    flags = f"--method plain --data mnist --data-root {tmp_path} --val-size 8 --model wrn-10-1"
    flags += f" --omit-digit 3 --bias-correction --epochs 1 --runs {tmp_path} --precision tf32"
    teacher_free_kd.main(flags.split())
    assert precisions == {True: {(True, True)}, False: {(False, False)}}


# ------------------------------------------------------------------------------------------------
# The attack on a net with BatchNorm folded


@pytest.mark.parametrize("name", ["wrn-10-1", "preact-resnet18", "resnet18"])
def test_the_attack_on_a_folded_net_stays_in_bfloat16_under_autocast(name):
    # float32 scales make float32 of bfloat16 activations, on a CPU by type promotion, on CUDA by
    # autocast's list of operations that promote
    model, types = common.build_model(name, width=1 / 16 if "resnet" in name else 1), []
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        attacked = common.attacked(model, "eval")
        for module in attacked.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.Identity):
                module.register_forward_hook(lambda m, given, out: types.append(out.dtype))
        attacked(torch.rand(2, 3, 32, 32))
    assert len(types) > 10 and set(types) == {torch.bfloat16}


def test_a_folded_norm_stays_in_bfloat16_under_the_autocast_of_cuda():
    model = nn.Sequential(nn.BatchNorm2d(4))
    folded = common.Folded(model.eval())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        norm = folded.net[0]
        norm.scale, norm.shift = (torch.ones(4, 1, 1, device="cuda") for _ in range(2))
        x = torch.ones(2, 4, 8, 8, device="cuda", dtype=torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert norm(x.float()).dtype == torch.float32
            assert norm(x).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)  # PyTorch's default


# ------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, by a backend that needs no compiler."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph

    backend, real = aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, _: graph), nn.Module
    given = functools.partialmethod(real.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", given)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # put back afterwards
        yield made
    torch._dynamo.reset()
    counters.clear()


# two nets with two sizes of batches, in several modes: 12 pieces of code for one `forward`
COMPILED = f"{SMALL} --loss akd+ --teacher-training trades --model wrn-10-1 --compile --steps 1"
COMPILED += " --teacher-model wrn-16-1 --eval-steps 1 --teacher-epochs 1 --teacher-batch-size 16"


def test_all_nets_of_a_run_are_compiled(graphs, tmp_path, capfd):
    robust_kd.main([*COMPILED.split(), "--runs", str(tmp_path)])
    assert len(graphs) > 8 and not counters["unimplemented"]
    assert "recompile" not in capfd.readouterr().err


def test_one_line_says_that_the_limit_of_compiling_is_hit(graphs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(common, "RECOMPILE_LIMIT", 2)
    robust_kd.main([*COMPILED.split(), "--runs", str(tmp_path)])
    lines = [line for line in capfd.readouterr().err.splitlines() if "compile" in line]
    assert counters["unimplemented"] and len(graphs) == 2
    assert len(lines) == 1 and lines[0].startswith("warning: --compile: "), lines


# ------------------------------------------------------------------------------------------------
# Two evaluations at once; flags without effect


def evaluation(folder):
    """The flags of an evaluation of some seconds, with its state in the folder."""
    common.save_model(folder / "net.pt", common.build_model("wrn-10-1"), {})
    flags = f"{folder}/net.pt --data shapes --n 200 --attack clean pgd100 --batch-size 20"
    return [*flags.split(), "--device", "cpu", "--json", f"{folder}/out.json"]


def test_a_second_evaluation_of_the_same_json_is_refused(tmp_path, refused):
    flags = evaluation(tmp_path)
    command = [sys.executable, f"{ROOT}/eval_robustness.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.json.state").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        message = refused(eval_robustness.main, flags)
        assert f"{tmp_path}/out.json" in message and f"process {first.pid}" in message
        assert "--json" in message
    finally:
        first.terminate()
        first.communicate(timeout=60)
    eval_robustness.main(flags)  # the first has ended: this one goes on from there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "out.json"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--graph", ["--graph"]),
        ("--precision=tf32 --graph", ["--graph", "--precision"]),
        ("--no-graph", []),
        ("", []),
    ],
)
def test_flags_without_effect_on_a_cpu_are_named(flags, said, tmp_path, capsys):
    flags = f"{SMALL} --model mlp-8 --loss st --eval-steps 1 --device cpu {flags}"
    robust_kd.main([*flags.split(), "--seeds", "0", "1", "--runs", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert [line.split()[0] for line in lines] == [f"{flag}:" for flag in said]


def test_a_precision_of_the_search_without_effect_on_a_cpu_is_named(tmp_path, capsys):
    common.save_model(tmp_path / "net.pt", common.build_model("mlp-8"), {})
    flags = f"{tmp_path}/net.pt --data shapes --n 8 --attack clean --device cpu"
    eval_robustness.main(flags.split())
    assert "no effect" not in capsys.readouterr().out
    eval_robustness.main([*flags.split(), "--search", "fp32"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert len(lines) == 1 and lines[0].startswith("--search")
