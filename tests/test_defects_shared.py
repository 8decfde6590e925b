"""What was wrong once in data, processes, precision, compiling and evaluation, and must stay right.

Each test failed on the code as it was when the defect was found.
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from torch._dynamo.backends.common import aot_autograd

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
