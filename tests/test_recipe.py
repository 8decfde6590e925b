"""AT+ (--recipe at+) and --trajectories: the parts against brute force, and whole runs."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import images
import plumbing
import robust_kd as rk

TINY = "--data shapes --model wrn-10-1 --train-subset 40 --test-subset 12 --val-size 12"
TINY += " --batch-size 16 --teacher-batch-size 16 --epochs 2 --teacher-epochs 2 --eval-steps 2"


@pytest.fixture(scope="module")
def data():
    return common.load_data("shapes", val_size=20, train_subset=50, test_subset=20)


def extra_file(path, n=30, size=32, **other):
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)}
    arrays["label"] = rng.integers(0, 10, n)
    arrays |= other
    np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})
    return arrays


# Parts ------------------------------------------------------------------------------------------


def test_the_recipe_prints_what_it_sets_and_flags_go_before_it(capsys):
    args = rk.parse_args(["--recipe=at+", "--epochs", "7", "--loss", "at"])
    said = capsys.readouterr().out
    assert "--recipe at+ sets --model wrn-28-10-silu --teacher-epochs 400" in said
    assert " --epochs" not in said
    assert (args.model, args.epochs, args.teacher_epochs) == ("wrn-28-10-silu", 7, 400)
    assert (args.schedule, args.ema, args.steps, args.step_size) == ("cosine", 0.995, 10, 2 / 255)
    assert "recipe=at" in args.name and rk.parse_args([]).schedule == "paper"


def test_the_average_follows_the_ramp_and_takes_batchnorm_as_it_is():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, expected = plumbing.Average(net, 0.6), None
    for t in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net[1].running_mean += 1
        average.update_parameters(net)
        weight = net[0].weight.detach().clone()
        d = min(0.6, (1 + t) / (10 + t))
        expected = weight if expected is None else d * expected + (1 - d) * weight
    assert torch.allclose(average.module[0].weight, expected, atol=1e-6)
    assert torch.equal(average.module[1].running_mean, net[1].running_mean)


def test_batchnorm_is_not_decayed_if_asked():
    net = common.build_model("wrn-10-1")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = common.sgd(net, 0.1, 0.9, 0.5, decay_norms=False)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    still = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    norms = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and norms <= still and not any("conv" in name for name in still)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_cosine_rates_of_an_early_stopped_teacher_are_those_of_a_whole_one():
    def rates(steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
        schedule = plumbing.cosine(optimizer, 40, 10)
        for _ in range(steps):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()

    lr = list(rates(41))
    assert lr[:10] == pytest.approx([0.02 * k for k in range(1, 11)]) and lr[10] == 0.2
    assert lr[25] == pytest.approx(0.1) and lr[40] == pytest.approx(0) and sorted(lr[10:])[::-1]
    flags = vars(rk.parse_args(["--recipe", "at+", "--teacher-es", "100"]))
    assert rk.teacher_recipe(flags)["epochs"] == 100 and rk.teacher_recipe(flags)["total"] == 400


def test_cutout_fills_a_square_of_18_pixels():
    x, fill = torch.rand(3, 3, 32, 32), torch.tensor([2.0, 3.0, 4.0])
    out = common.cutout(x, torch.tensor([16, 0, 31]), torch.tensor([16, 0, 10]), fill)
    changed = (out != x).all(1)  # (B, H, W)
    assert changed.flatten(1).sum(1).tolist() == [18 * 18, 9 * 9, 10 * 18]
    assert changed[0, 7:25, 7:25].all() and changed[1, :9, :9].all() and changed[2, 22:, 1:19].all()
    assert torch.equal(out[0, :, 10, 10], fill)


@pytest.mark.parametrize("area, row, column", [(0.25, 0.5, 0.5), (0.7, 0.1, 0.9), (0.0, 0.3, 0.3)])
def test_cutmix_mixes_targets_by_the_pixels_that_it_took(area, row, column):
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    mixed, targets = common.cutmix(x, torch.eye(4), area, row, column)
    for i in range(4):
        share = (mixed[i] == (i - 1) % 4).double().mean().item()
        assert targets[i, (i - 1) % 4].item() == pytest.approx(share, abs=1e-6)
        assert targets[i, i].item() == pytest.approx(1 - share, abs=1e-6)
    assert area != 0.25 or share == pytest.approx(0.25)


def test_one_hot_targets_are_labels_to_every_loss():
    g = torch.Generator().manual_seed(0)
    logits = {f"{who}_logits": torch.randn(6, 10, generator=g) for who in
              ("student", "student_adv", "teacher", "teacher_adv")}  # fmt: skip
    labels = torch.arange(6)
    settings = {"alpha": 0.6, "lam": 0.3, "trades_beta": 6.0}
    for name, loss in rk.LOSSES.items():
        known = {k: v for k, v in (logits | settings).items() if k in rk.needs(name)}
        soft = loss(**known, labels=F.one_hot(labels, 10).float())
        assert torch.allclose(soft, loss(**known, labels=labels), atol=1e-6), name


# Batches ----------------------------------------------------------------------------------------


def test_a_batch_has_its_fraction_of_extra_images_with_smoothed_labels(data, tmp_path):
    arrays = extra_file(tmp_path / "e.npz")
    plain = list(common.batches(data, 20, 0, 0))
    x, y = common.load_extra(tmp_path / "e.npz", data)
    assert isinstance(x, np.memmap) and np.array_equal(x, arrays["image"])
    changed = dict(vars(data), extra=(x, y), extra_fraction=0.7, smoothing=0.1)
    mixed = common.Data(**{k: v for k, v in changed.items() if k != "x_padded"})
    mixed.pad, mixed.flip = 0, False
    mixed.x_padded = mixed.x_train
    known = {bytes(image.numpy()): k for k, image in enumerate(data.x_train)}
    theirs = {image.tobytes(): k for k, image in enumerate(arrays["image"])}
    batches = list(common.batches(mixed, 20, 0, 0))
    assert [len(x) for x, _ in batches] == [len(x) for x, _ in plain] == [20, 20, 10]
    for (x, labels), own in zip(batches, (6, 6, 3)):
        pixels = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous()
        for k, (image, target) in enumerate(zip(pixels, labels)):
            source = known if k < own else theirs
            label = (data.y_train if k < own else y)[source[bytes(image.numpy())]]
            assert target.argmax() == label and target.sum().item() == pytest.approx(1)
            assert target.max().item() == pytest.approx(1 if k < own else 0.91)


def test_augmentations_leave_order_crops_and_flips_as_they_are(data):
    plain = list(common.batches(data, 20, 3, 1))
    try:
        data.augment = "cutmix"
        (x, targets), (_, labels) = next(iter(common.batches(data, 20, 3, 1))), plain[0]
        assert targets.shape == (20, 10) and torch.allclose(targets.sum(1), torch.ones(20))
        own = targets.gather(1, labels[:, None])[:, 0]
        assert (own[labels != labels.roll(1)].max() - own.min()).abs() < 1  # one box for all
        data.augment = "cutout"
        for (x, y), (before, labels) in zip(common.batches(data, 20, 3, 1), plain):
            same = (x == before).all(1).flatten(1).double().mean(1)
            assert torch.equal(y, labels) and (same < 1).all() and (same > 0.6).all()
    finally:
        data.augment = "crop"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "expected the arrays image and label"),
        ({"size": 28}, r"image must be uint8 \(M, 32, 32, 3\), got uint8 \[28, 28, 3\]"),
        ({"image": np.zeros((4, 32, 32, 3))}, r"image must be uint8 .* got float64"),
        ({"image": np.array([{}, 1], dtype=object)}, "image must be uint8"),
        ({"label": np.zeros(7, int)}, r"label must be 30 labels 0\.\.9, got int64 \(7,\)"),
        ({"label": np.full(30, 10)}, r"label must be 30 labels 0\.\.9"),
        ({"label": np.full(30, -1)}, r"label must be 30 labels 0\.\.9"),
        ({"label": np.array([{}] * 30, dtype=object)}, "truncated, or not an .npz file"),
        (None, "truncated, or not an .npz file"),
    ],
)
def test_wrong_extra_data_is_one_line(data, tmp_path, refused, change, message):
    path = tmp_path / "e.npz"
    if change is None:
        path.write_bytes(b"PK no zip")
    else:
        extra_file(path, **change)
    error = refused(images.read_extra, path, data)
    assert re.match(rf"error: --extra-data: {path}: {message}", error), error


# Runs -------------------------------------------------------------------------------------------


def test_a_run_with_everything_goes_on_with_the_same_bits_and_keeps_trajectories(tmp_path, stop_at):
    extra_file(tmp_path / "e.npz")
    flags = f"--recipe at+ {TINY} --steps 1 --extra-data {tmp_path}/e.npz --augment cutmix"
    flags += " --trajectories --teacher-save-every 1 --name run --runs"
    rk.main(f"{flags} {tmp_path}/one".split())
    stop_at(rk, f"{flags} {tmp_path}/two", "student", 1)
    rk.main(f"{flags} {tmp_path}/two".split())
    one, two = (tmp_path / which / "robust_kd" / "run-s0" for which in ("one", "two"))
    for name in ("teacher", "teacher-ep1", "student"):
        a, b = common.load(one / f"{name}.pt"), common.load(two / f"{name}.pt")
        assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]), name
        kept = a["meta"]["trajectories"]
        assert {k: (v.dtype, tuple(v.shape)) for k, v in kept.items()} == {
            "train": (torch.float16, (1 + (name[-1] != "1"), 40)),
            "test": (torch.float16, (1 + (name[-1] != "1"), 12)),
            "adv": (torch.float16, (1 + (name[-1] != "1"), 12)),
            "entropy": (torch.float32, (1 + (name[-1] != "1"),)),
        }
        for k, values in kept.items():
            assert torch.equal(values, b["meta"]["trajectories"][k]), (name, k)
    # what is saved is the average, and the last row of its trajectories is what it says
    net, meta = common.load_model(one / "student.pt")
    data = common.load_data("shapes", val_size=12, train_subset=40, test_subset=12)
    with torch.no_grad():
        log_probs = net(common.to_float(data.x_test)).log_softmax(1)
        train = net(common.to_float(data.x_train)).log_softmax(1)
    right = log_probs.gather(1, data.y_test[:, None])[:, 0]
    kept = meta["trajectories"]
    assert torch.allclose(kept["test"][-1].float(), right, atol=2e-3)
    assert (kept["adv"][-1] <= kept["test"][-1] + 1e-2).all()
    entropy = -(train.exp() * train).sum(1).mean()
    assert torch.allclose(kept["entropy"][-1], entropy, atol=1e-4)


def test_a_teacher_without_trajectories_is_not_taken_for_one_that_has_them(tmp_path, capsys):
    flags = f"{TINY} --model mlp-8 --loss akd --steps 1 --runs {tmp_path}"
    rk.main(flags.split())
    rk.main([*flags.split(), "--trajectories"])
    assert "taken from" not in capsys.readouterr().out
    rk.main([*flags.split(), "--trajectories", "--loss", "akd+"])
    assert "teacher: taken from" in capsys.readouterr().out
    (folder,) = tmp_path.glob("robust_kd/*akd+*")
    assert "trajectories" in common.load(folder / "teacher.pt")["meta"]
    assert json.loads((folder / "config.json").read_text())["flags"]["trajectories"] is True


def test_a_standard_teacher_is_shared_unless_its_trajectories_are_under_another_attack():
    def recipe(flags):
        return rk.teacher_recipe(vars(rk.parse_args(f"--teacher-training st {flags}".split())))

    for attack in ("--eps 4/255", "--steps 3", "--step-size 1/255"):
        assert recipe(attack) == recipe("")
        assert recipe(f"--trajectories {attack}") != recipe("--trajectories")
