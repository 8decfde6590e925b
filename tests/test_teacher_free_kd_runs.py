"""teacher_free_kd.py end to end: every method, what is shown to whom, refusals. CPU, tiny nets."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import eval_robustness
import images
import plumbing
import teacher_free_kd as tf

SHAPES = functools.cache(images.make_shapes)  # drawn once, not for each run
MINIMAL = "--data shapes --train-subset 40 --test-subset 20 --val-size 20 --batch-size 16"
MINIMAL += " --epochs 2 --steps 2 --eval-attack clean pgd2 --device cpu"


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    monkeypatch.setattr(images, "make_shapes", SHAPES)


# An omitted digit ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with an mnist.npz of digits that a small net can learn: a bar in the digit's row."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("mnist")
    arrays = {}
    for part, n in (("train", 400), ("test", 100)):
        y = np.arange(n) % 10
        x = rng.integers(0, 60, (n, 28, 28))
        for i, digit in enumerate(y):
            x[i, 4 + 2 * digit : 6 + 2 * digit, 6:22] = 200 + rng.integers(0, 50)
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    np.savez(root / "mnist.npz", **arrays)
    return root


DIGITS = "--method vanilla --teacher-model mlp-64 --model mlp-16 --val-size 40 --epochs 3"
DIGITS += " --teacher-epochs 3 --batch-size 16 --teacher-batch-size 16 --device cpu"


def summary(runs):
    (log,) = runs.glob("*/*/log.jsonl")
    return {row["model"]: row for row in json.loads(log.read_text().splitlines()[-1])["summary"]}


def test_omitted_digits_never_reach_the_students_batches(mnist, tmp_path, monkeypatch):
    seen, make = {}, common.batches

    def spied(data, batch_size, seed, epoch, run, views):
        for x, *rest in make(data, batch_size, seed, epoch, run, views):
            images = seen.setdefault(run.stage, [])
            images.append(x.flatten(1))
            yield x, *rest

    monkeypatch.setattr(common, "batches", spied)
    flags = f"{DIGITS} --omit-digit 7 --bias-correction --data-root {mnist} --runs {tmp_path}"
    tf.main(flags.split())
    data = common.load_data("mnist", mnist, val_size=40)

    def rows(stage):  # what every image shows: the row of its bar is the digit
        bright = torch.cat(seen[stage]).view(-1, 28, 28)[:, :, 8:20].mean(2)
        return (bright.argmax(1) - 4) // 2

    assert (rows("student") != 7).all() and (rows("student-alone") != 7).all()
    kept = int((data.y_train != 7).sum())
    assert len(rows("student")) == 3 * kept and len(rows("teacher")) == 3 * len(data.y_train)
    found = summary(tmp_path)
    for name in ("student-alone (plain)", "student (vanilla)"):
        row, raised = found[name], found[name + ", bias corrected"]
        assert raised["only_7_acc"] >= row["only_7_acc"]
        whole = (9 * row["without_7_acc"] + row["only_7_acc"]) / 10
        assert row["clean_acc"] == pytest.approx(whole)
    alone = found["student-alone (plain)"]
    assert alone["only_7_acc"] <= 0.2 and alone["without_7_acc"] > 0.9
    assert found["student (vanilla)"]["weights"] == 784 * 16 + 160


def test_the_corrected_bias_gives_the_digit_its_share_and_changes_nothing_else(mnist):
    data = common.load_data("mnist", mnist)
    model = common.model_for(data, "mlp-16", 0, "student").eval()
    x = common.to_float(data.x_train)
    with torch.no_grad():
        raised = tf.corrected(model, data, 2)
        difference = raised(x) - model(x)
        share = (raised(x).argmax(1) == 2).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)  # a tenth of the images show it
    others = [k for k in range(10) if k != 2]
    assert difference[:, others].abs().max() < 1e-5
    torch.testing.assert_close(difference[:, 2], difference[0, 2].expand(len(x)))


# Training ---------------------------------------------------------------------------------------


def run(tmp_path, flags):
    argv = [*MINIMAL.split(), *flags.split(), "--runs", str(tmp_path)]
    tf.main(argv)
    return argv


def weights(tmp_path, name="student.pt"):
    (path,) = tmp_path.glob(f"*/*/{name}")
    return common.load(path)["weights"]


@pytest.mark.parametrize("method", [m for m in tf.METHODS if m != "self-distillation"])
def test_each_method_runs_and_ends_in_a_table(method, tmp_path):
    run(
        tmp_path,
        f"--method {method} --model mlp-8" + " --teacher-model mlp-12" * (method in tf.COMPARED),
    )
    found = summary(tmp_path)
    student = found[f"student ({method})"]
    assert 0 <= student["clean_acc"] <= 1 and "pgd2_acc" in student
    attacked = method.startswith("at")
    if tf.METHODS[method][2]:
        assert f"teacher ({'at' if attacked else 'plain'})" in found
    assert ("student-alone (plain)" in found) == (method in tf.COMPARED)
    log = next(tmp_path.glob("*/*/log.jsonl")).read_text()
    assert ("val_pgd2_acc" in log) == attacked


def test_self_distillation_saves_a_plain_net_and_shows_every_exit(tmp_path):
    run(tmp_path, "--method self-distillation --model wrn-10-1")
    found = summary(tmp_path)
    assert [name for name in found if name[:4] in ("exit", "ense")] == [
        "exit 1", "exit 2", "exit 3", "ensemble: mean of probabilities", "ensemble: mean of logits",
    ]  # fmt: skip
    student = found["student (self-distillation)"]
    assert found["exit 3"]["clean_acc"] == student["clean_acc"]
    assert found["exit 3"]["macs"] == student["macs"]
    (path,) = tmp_path.glob("*/*/student.pt")
    net, _ = common.load_model(path)
    assert not any("adaptor" in name for name in net.state_dict())
    data = common.load_data("shapes", test_subset=20)
    again = eval_robustness.evaluate(net, data.x_test, data.y_test, ["clean"])
    assert again["clean_acc"] == student["clean_acc"]


def test_self_distillation_trains_the_exits_and_the_trunk_through_them(tmp_path):
    flags = "--method self-distillation --model wrn-10-1 --epochs 1 --eval-attack clean "
    flags += "--val-size 0 --train-subset 16 "
    run(tmp_path / "a", flags)
    run(tmp_path / "b", flags + "--byot-alpha 0.9")
    run(tmp_path / "c", flags + "--byot-lambda 1")
    first = [weights(tmp_path / k)["stages.0.0.conv1.weight"] for k in "abc"]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    meta = common.load(next((tmp_path / "a").glob("*/*/student.pt")))["meta"]
    start = tf.Exits(common.build_model("wrn-10-1")).state_dict()
    assert meta["exits"].keys() == start.keys()


SHOWN = {  # method -> what the student, what the teacher is shown
    "tf-kd-self": ("x", "x"), "at": ("x'", None), "at-kd": ("x'", "x'"),
    "at-tf-kd-self": ("x'", "x"), "at-tf-kd-reg": ("x'", None),
}  # fmt: skip


@pytest.mark.parametrize("method", SHOWN)
def test_student_and_teacher_are_shown_what_the_paper_says(method, tmp_path, monkeypatch):
    seen, attacks, pgd = [], [], common.pgd

    class Spied(nn.Module):
        def __init__(self, role):
            super().__init__()
            self.net, self.role = common.build_model("mlp-8"), role
            self.arch = self.net.arch

        def forward(self, x):
            seen.append((self.role, self.training, x.detach().clone(), torch.is_grad_enabled()))
            return self.net(x)

    def attack(model, x, labels, *settings):
        seen.clear()
        x_adv = pgd(model, x, labels, *settings)
        attacks.append((model.training, settings, {"x": x, "x'": x_adv}))
        seen.clear()  # the passes of the attack itself
        return x_adv

    flags = f"--method {method} --model mlp-8 --epochs 1 --eps 8/255"
    args = tf.parse_args([*MINIMAL.split(), *flags.split()])
    data = common.load_data("shapes", train_subset=16, val_size=0)
    found = plumbing.Run("teacher_free_kd", args, torch.device("cpu"))
    found.dir, found.log = tmp_path, tmp_path / "log.jsonl"
    student, teacher = Spied("student"), Spied("teacher").eval().requires_grad_(False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    monkeypatch.setattr(common, "pgd", attack)
    tf.train_model(student, teacher, data, "student", args, found)
    sees, teaches = SHOWN[method]
    images = attacks[0][2] if attacks else {"x": seen[0][2]}
    assert len(attacks) == (sees == "x'")
    if attacks:
        training, settings, _ = attacks[0]
        assert not training and settings == (args.eps, args.step_size, 2)
        distance = (images["x'"] - images["x"]).abs().max().item()
        assert (
            0 < distance <= args.eps + 1e-6 and 0 <= images["x'"].min() <= images["x'"].max() <= 1
        )
    by_role = {r: (mode, x, grad) for r, mode, x, grad in seen}
    assert len(seen) == 1 + (teaches is not None)
    mode, x, _ = by_role["student"]
    assert mode and torch.equal(x, images[sees])
    if teaches:
        mode, x, grad = by_role["teacher"]
        assert not mode and not grad and torch.equal(x, images[teaches])
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_attack_bn_train_attacks_in_train_mode(tmp_path, monkeypatch):
    modes, pgd = [], common.pgd

    def attack(model, *rest):
        modes.append(model.training)
        return pgd(model, *rest)

    monkeypatch.setattr(common, "pgd", attack)
    run(tmp_path, "--method at --model mlp-8 --attack-bn train --epochs 1 --eval-attack clean")
    assert modes == [True, True, True, False]  # three batches, then the held-out images


def test_an_asked_once_teacher_trains_the_same_student(mnist, tmp_path, monkeypatch):
    flags = f"{DIGITS} --data-root {mnist} --runs {tmp_path} --name "
    tf.main([*flags.split(), "once"])
    monkeypatch.setattr(tf, "fixed_logits", lambda *rest: None)
    tf.main([*flags.split(), "live"])
    once, live = (
        common.load(tmp_path / "teacher_free_kd" / f"{name}-s0" / "student.pt")["weights"]
        for name in ("once", "live")
    )
    for key, value in once.items():
        torch.testing.assert_close(value, live[key], rtol=1e-3, atol=1e-4)


def factors(flags, steps=10):
    args = tf.parse_args(flags.split())
    return lambda epoch: tf.lr_factor(round(epoch * steps), steps, args.epochs, args)


def test_learning_rates_follow_the_recipes():
    clean = factors("--method tf-kd-self")  # x 0.2 at 60, 120, 160 of 200, a warm-up of an epoch
    assert [clean(e) for e in (0, 0.5, 1, 59.9, 60, 120, 160)] == pytest.approx(
        [0.1, 0.6, 1, 1, 0.2, 0.04, 0.008]
    )
    at = factors("--method at")
    assert 0.1 * at(49.9) == pytest.approx(5.7e-4, rel=0.01) and at(0) == 1 and at(1) == 0.9
    digits = factors("--method vanilla")
    assert [digits(e) for e in (0, 10, 20)] == pytest.approx([1, 0.5, 0])
    short = factors("--method plain --epochs 10 --milestones 2 4 --gamma 0.1 --warmup 0")
    assert [short(e) for e in (1.9, 2, 4)] == pytest.approx([1, 0.1, 0.01])


def test_the_heat_map_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.npz"
    flags = f"--method tf-kd-self --model wrn-10-1 --grad-heatmap {path} --teacher-epochs 1"
    run(tmp_path / "runs", flags)
    out = capsys.readouterr().out
    assert "student (tf-kd-self), epoch 2, stage 3" in out and "shortcut" in out
    with np.load(path) as file:
        means, epochs = file["student (tf-kd-self)/means"], file["student (tf-kd-self)/epochs"]
        assert means.shape == (2, 8) and epochs.tolist() == [1, 2] and (means > 0).all()
        assert file["teacher (plain)/epochs"].tolist() == [1]
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


def test_own_and_cross_entropy_gradients_differ_and_train_the_same_net(tmp_path):
    for kind in ("own", "ce"):
        flags = "--method tf-kd-reg --reg-form repo --alpha 0.9 --model mlp-8 --grad-epochs 2"
        run(tmp_path / kind, f"{flags} --grad-loss {kind} --grad-heatmap {tmp_path}/{kind}.npz")
    own, ce_alone = (
        np.load(tmp_path / f"{k}.npz")["student (tf-kd-reg)/means"] for k in ("own", "ce")
    )
    assert own.shape == (1, 2) and (own < 0.7 * ce_alone).all()  # weighs the labels with 0.1
    a, b = weights(tmp_path / "own"), weights(tmp_path / "ce")
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_seeds_share_no_numbers_and_end_in_their_mean(tmp_path, capsys):
    run(tmp_path, "--method plain --model mlp-8 --seeds 0 1 --eval-attack clean")
    assert "mean +- std of seeds 0 1" in capsys.readouterr().out
    a, b = (common.load(path)["weights"] for path in sorted(tmp_path.glob("*/*/student.pt")))
    assert not torch.equal(a["layers.2.weight"], b["layers.2.weight"])


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    flags = (
        f"--method self-distillation --model wrn-10-1 --grad-heatmap {tmp_path}/a.npz --epochs 3"
    )
    run(tmp_path / "whole", flags)
    end_epoch = plumbing.end_epoch

    def stopped(found, epoch, *rest):
        end_epoch(found, epoch, *rest)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(plumbing, "end_epoch", stopped)
    with pytest.raises(SystemExit):
        run(tmp_path / "resumed", flags)
    monkeypatch.setattr(plumbing, "end_epoch", end_epoch)
    run(tmp_path / "resumed", flags)
    a, b = (common.load(next((tmp_path / k).glob("*/*/student.pt"))) for k in ("whole", "resumed"))
    for part in (lambda r: r["weights"], lambda r: r["meta"]["exits"]):
        assert all(torch.equal(value, part(b)[key]) for key, value in part(a).items())
    assert a["meta"]["gradients"] == b["meta"]["gradients"]


# Refusals ---------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--method kd": "--method",
    "--omit-digit 10": "--omit-digit",
    "--omit-digit -1": "--omit-digit",
    "--omit-digit 3": "--omit-digit: goes with --data mnist, not shapes",
    "--bias-correction": "--bias-correction",
    "--method tf-kd-reg --delta 0.1": "--delta",
    "--method tf-kd-reg --delta 1.01": "--delta",
    "--method tf-kd-reg --reg-form yuan": "--reg-form",
    "--method plain --alpha 0.3": "--alpha: --method plain has none",
    "--method at --no-tau2": "--tau2",
    "--method tf-kd-self --byot-alpha 1": "--byot-alpha",
    "--method plain --teacher-ckpt x.pt": "--teacher-ckpt",
    "--method tf-kd-self --teacher-model mlp-4": "--teacher-model",
    "--method tf-kd-self --teacher-ckpt none.pt": "none.pt",
    "--method self-distillation": "--model: self-distillation needs",
    "--method self-distillation --model resnet18 --width 1/3": "--width",
    "--model wrn-9-1": "--model",
    "--method re-kd --teacher-model resnet19": "--teacher-model",
    "--teacher-es 9": "--teacher-es",
    "--grad-epochs 3": "--grad-epochs",
    "--grad-heatmap out.txt": "--grad-heatmap",
    "--grad-heatmap /no/such/out.npz": "--grad-heatmap",
    "--eval-attack fgsm": "--eval-attack",
    "--eval-attack clean calibration": "--eval-attack",
    "--eps 8//255": "--eps",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = [*MINIMAL.split(), "--model", "mlp-8", *flags.split(), "--runs", str(tmp_path / "runs")]
    assert BAD_FLAGS[flags] in refused(tf.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_architecture_is_refused_where_it_must_be_the_same(tmp_path, refused):
    for name, width in (("preact-resnet18", 1 / 16), ("resnet18", 1 / 32)):
        path = tmp_path / "teacher.pt"
        common.save_model(path, common.build_model(name, 10, width), {"training": "at"})
        for method in tf.SAME_NET:
            flags = f"--method {method} --model resnet18 --width 1/16 --teacher-ckpt {path}"
            message = refused(
                tf.main, [*MINIMAL.split(), *flags.split(), "--runs", str(tmp_path / "runs")]
            )
            assert str(path) in message
    assert not (tmp_path / "runs").exists()
    # vanilla takes any
    run(tmp_path, f"--method vanilla --model mlp-8 --teacher-ckpt {path}")
    assert "teacher (at)" in summary(tmp_path)


def test_defaults_follow_the_method_and_the_data():
    def of(flags):
        return tf.parse_args(flags.split())

    table_1 = of("--method vanilla")
    assert (table_1.data, table_1.model, table_1.teacher_model) == (
        "mnist", "mlp-400", "mlp-1200-1200",
    )  # fmt: skip
    assert (table_1.alpha, table_1.temperature, table_1.lr) == (1.0, 10.0, 0.02)
    alone = of("--method plain --data mnist --model mlp-400")
    assert (alone.epochs, alone.lr, alone.schedule) == (table_1.epochs, table_1.lr, "cosine")
    re_kd = of("--method re-kd")
    assert (re_kd.data, re_kd.model, re_kd.teacher_model) == ("cifar10", "resnet50", "resnet18")
    at = of("--method at-tf-kd-self")
    assert (at.epochs, at.lr, at.gamma, at.steps, at.eps) == (50, 0.1, 0.9, 7, 8 / 255)
    assert at.eval_attack == ["clean", "pgd20", "aa"] and re_kd.eval_attack == ["clean"]
    assert of("--method tf-kd-self --no-tau2").tau2 is False
    demo = of("--demo")
    assert (demo.data, demo.model, demo.eval_attack) == ("shapes", "wrn-10-1", ["clean", "pgd20"])
