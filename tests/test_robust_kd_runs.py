"""Runs of robust_kd.py: schedules, teachers, what each model sees, and in which mode."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import plumbing
import robust_kd as rk

MINIMAL = (
    "--data shapes --model mlp-8 --train-subset 40 --test-subset 20 --val-size 20 --batch-size 16"
)
MINIMAL += " --teacher-batch-size 16 --teacher-epochs 2 --epochs 2 --steps 2 --eval-steps 2"


# Training ---------------------------------------------------------------------------------------


def run(tmp_path, flags, monkeypatch=None):
    argv = [*MINIMAL.split(), *flags.split(), "--runs", str(tmp_path), "--device", "cpu"]
    rk.main(argv)
    return argv


def trace(tmp_path, monkeypatch, flags):
    """(lr, momentum) of every optimizer step, by stage."""
    seen, make = [], common.sgd

    def spied(*args, **kwargs):
        optimizer, steps = make(*args, **kwargs), []
        group = optimizer.param_groups[0]
        optimizer.register_step_pre_hook(lambda *_: steps.append((group["lr"], group["momentum"])))
        seen.append(steps)
        return optimizer

    monkeypatch.setattr(common, "sgd", spied)
    run(tmp_path, flags)
    return seen


def test_learning_rates_follow_the_closed_forms(tmp_path, monkeypatch):
    flags = "--loss akd+ --epochs 4 --teacher-epochs 5 --teacher-es 3 --lr 0.21"
    teacher, student = trace(tmp_path, monkeypatch, flags)
    steps = 3  # 40 images in batches of 16: the last, smaller batch counts
    assert teacher == [(pytest.approx(0.1 * 0.9 ** (i // steps)), 0.9) for i in range(3 * steps)]
    total = 4 * steps
    top = 0.3 * total - 1
    for i, (lr, momentum) in enumerate(student):
        if i <= top:
            part, floor = i / top, 0.21 / 25
        else:
            part, floor = 1 + (i - top) / (total - 1 - top), 0.21 / 25 / 1e4
        bump = (1 - math.cos(math.pi * part)) / 2
        assert lr == pytest.approx(floor + (0.21 - floor) * bump, rel=1e-6)
        assert momentum == pytest.approx(0.95 - 0.1 * bump, rel=1e-6)
    assert len(student) == total


def test_momentum_stays_when_it_is_not_cycled(tmp_path, monkeypatch):
    (student,) = trace(tmp_path, monkeypatch, "--loss at --cycle-momentum no --momentum 0.8")
    assert {momentum for _, momentum in student} == {0.8}


def weights(tmp_path, name="student.pt"):
    (path,) = tmp_path.glob(f"*/*/{name}")
    return common.load(path)["weights"]


def test_akd_plus_at_alpha_zero_trains_the_same_net_as_at(tmp_path):
    run(tmp_path / "a", "--loss akd+ --alpha 0 --teacher-training st")
    run(tmp_path / "b", "--loss at")
    for (name, a), b in zip(weights(tmp_path / "a").items(), weights(tmp_path / "b").values()):
        torch.testing.assert_close(a, b, msg=name)


def test_a_teacher_with_the_same_settings_is_found_and_said(tmp_path, capsys):
    run(tmp_path, "--loss akd+ --alpha 0.8")
    capsys.readouterr()
    run(tmp_path, "--loss rslad+ --alpha 0.4 --trades-beta 1 --ffgsm-step 1 --step-size 2/255")
    out = capsys.readouterr().out
    assert "teacher: taken from" in out and "teacher 1/2" not in out
    for other in ("--teacher-es 1", "--seed 1", "--teacher-eps 2/255", "--steps 1"):
        run(tmp_path, "--loss akd+ " + other)
        assert "teacher 1/" in capsys.readouterr().out, other


def test_a_given_teacher_is_not_taken_for_one_of_the_flags(tmp_path, capsys):
    run(tmp_path / "a", "--loss akd+ --teacher-training st")
    (path,) = (tmp_path / "a").glob("*/*/teacher_best.pt")
    run(tmp_path / "b", f"--loss akd+ --teacher-ckpt {path}")
    assert "teacher (given)" in capsys.readouterr().out
    run(tmp_path / "b", "--loss akd+ --alpha 0.5")
    assert "teacher 1/2" in capsys.readouterr().out


def test_settings_that_a_teacher_does_not_have_do_not_count():
    def settings(flags):
        return rk.teacher_recipe(vars(rk.parse_args(flags.split())))

    st, at = "--teacher-training st", "--teacher-training at"
    assert settings(st) == settings(st + " --eps 4/255 --steps 3")
    assert settings(at) == settings(at + " --step-size 2/255 --ffgsm-step 2")
    fixed = at + " --teacher-eps 2/255"
    assert settings(fixed) == settings(fixed + " --eps 4/255")
    assert settings(at) != settings(fixed) and settings(at) != settings(at + " --attack-bn train")


def test_a_given_teacher_is_used_as_it_is(tmp_path, capsys):
    run(tmp_path / "a", "--loss akd+ --teacher-training st")
    (path,) = (tmp_path / "a").glob("*/*/teacher.pt")
    run(tmp_path / "b", f"--loss ard --teacher-ckpt {path} --teacher-training none")
    assert "teacher (st)" in capsys.readouterr().out
    assert path.read_bytes() == next((tmp_path / "b").glob("*/*/teacher.pt")).read_bytes()


def trained_stages(tmp_path):
    rows = [row for log in tmp_path.rglob("log.jsonl") for row in map(json.loads, log.open())]
    return [(row["stage"], row["epoch"]) for row in rows if "stage" in row]


def test_early_stopping_picks_from_a_longer_training(tmp_path, capsys):
    long = "--loss akd+ --teacher-epochs 3 --teacher-save-every 2"
    run(tmp_path / "a", long)
    run(tmp_path / "a", "--loss akd+ --teacher-epochs 3 --teacher-es 2 --alpha 0.5")
    out = capsys.readouterr().out
    assert "teacher: taken from" in out and "teacher (at)" in out
    run(tmp_path / "b", "--loss akd+ --teacher-epochs 3 --teacher-es 2 --alpha 0.5")
    a, b = (next((tmp_path / x).glob("*/*alpha*/student.pt")) for x in "ab")
    a, b = common.load(a)["weights"], common.load(b)["weights"]
    assert all(torch.equal(a[key], b[key]) for key in a)
    run(tmp_path / "a", "--loss akd+ --teacher-epochs 3 --teacher-es 1")  # was not kept
    assert trained_stages(tmp_path / "a").count(("teacher", 1)) == 2


def test_an_ensemble_is_trained_from_other_seeds_and_evaluated(tmp_path, capsys):
    run(tmp_path, "--loss akd+ --teachers 2 --epochs 1")
    out = capsys.readouterr().out
    assert "teacher 1 (at)" in out and "teacher 2 (at)" in out and "ensemble of 2" in out
    (folder,) = tmp_path.glob("*/*")
    one, two = (common.load(folder / name)["weights"] for name in ("teacher.pt", "teacher2.pt"))
    assert not torch.equal(one["layers.2.weight"], two["layers.2.weight"])
    run(tmp_path, "--loss rslad+ --teachers 2 --epochs 1")
    assert capsys.readouterr().out.count("taken from") == 2


def test_single_step_training_that_collapses_is_stopped_and_the_epoch_before_kept(
    tmp_path, capsys, monkeypatch
):
    rows = iter([0.5, 0.6, 0.3, 0.9])
    accuracies = lambda *_: {"val_clean_acc": 0.5, "val_pgd2_acc": next(rows)}  # noqa: E731
    monkeypatch.setattr(plumbing, "_validate", accuracies)
    flags = (
        "--loss akd+ --teacher-training ffgsm --teacher-epochs 4 --epochs 1 --teacher-save-every 1"
    )
    run(tmp_path, flags)
    assert "fell by over 20 points; epoch 2 is kept" in capsys.readouterr().out
    stages = [stage for stage in trained_stages(tmp_path) if stage[0] == "teacher"]
    assert stages == [("teacher", 1), ("teacher", 2), ("teacher", 3)]
    (folder,) = tmp_path.glob("*/*")
    kept, second = (common.load(folder / n)["weights"] for n in ("teacher.pt", "teacher-ep2.pt"))
    assert all(torch.equal(kept[key], second[key]) for key in kept)


def test_several_seeds_end_in_mean_and_standard_deviation(tmp_path, capsys):
    run(tmp_path, "--loss at --seeds 3 1")
    out = capsys.readouterr().out
    logs = [json.loads(log.open().readlines()[-1]) for log in sorted(tmp_path.rglob("log.jsonl"))]
    values = [log["summary"][0]["clean_acc"] for log in logs]
    expected = f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"
    assert expected in out.split("mean +- std of seeds 3 1")[1]
    assert [p.name[-2:] for p in sorted(tmp_path.glob("*/*"))] == ["s1", "s3"]


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    argv = run(tmp_path, "--loss at")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    table = capsys.readouterr().out.split("student (at)")[-1]
    rk.main(argv)
    out = capsys.readouterr().out
    assert out.split("student (at)")[-1] == table and "finished" in out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path, refused):
    argv = [*MINIMAL.split(), "--loss", "st", "--lr", "1e30", "--runs", str(tmp_path)]
    message = refused(rk.main, argv)
    assert "student, epoch" in message and "step" in message and "--lr" in message


def test_weights_that_are_not_finite_stop_the_run_before_the_checkpoint(
    tmp_path, refused, monkeypatch
):
    make = common.sgd

    def breaking(model, *args, **kwargs):
        optimizer, steps = make(model, *args, **kwargs), []

        def after(*_):
            steps.append(1)
            if len(steps) == 6:  # the last step of the second epoch: no loss sees it
                next(model.parameters()).data.fill_(math.nan)

        optimizer.register_step_post_hook(after)
        return optimizer

    monkeypatch.setattr(common, "sgd", breaking)
    argv = [*MINIMAL.split(), "--loss", "at", "--runs", str(tmp_path)]
    assert "student, epoch 2" in refused(rk.main, argv)
    (last,) = tmp_path.glob("*/*/last.pt")
    record = common.load(last)
    assert record["epochs"] == 1
    assert all(value.isfinite().all() for value in record["parts"]["model"].values())


class Spied(nn.Module):
    """A net that notes the mode it is in and the images it is shown."""

    def __init__(self, seen, role):
        super().__init__()
        self.net, self.seen, self.role = common.build_model("mlp-8"), seen, role
        self.arch = self.net.arch

    def forward(self, x):
        self.seen.append((self.role, self.training, x.detach().clone()))
        return self.net(x)


SEES = {  # loss -> what the student is trained on, what the teacher is shown: clean or adversarial
    "st": ("c", ""), "at": ("a", ""), "ckd": ("c", "c"), "ard": ("ac", "c"), "rslad": ("ac", "c"),
    "akd": ("a", "a"), "ard+": ("ac", "c"), "rslad+": ("ac", "c"), "akd+": ("a", "a"),
    "trades": ("ac", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SEES)
def test_student_and_teacher_see_what_the_equation_says_in_the_right_mode(
    name, tmp_path, monkeypatch
):
    seen, attacks, clean, pgd = [], [], [], common.pgd

    def attack(model, x, targets, *settings):
        x_adv = pgd(model, x, targets, *settings)
        attacks.append((model.training, targets, settings, x_adv))
        clean.append(x)
        seen.clear() if not any(role == "teacher" for role, *_ in seen) else None
        del seen[sum(role == "teacher" for role, *_ in seen) :]  # the passes of the attack itself
        return x_adv

    args = rk.parse_args(["--loss", name, *MINIMAL.split(), "--epochs", "1", "--device", "cpu"])
    data = common.load_data("shapes", train_subset=16, val_size=0)
    run = plumbing.Run("robust_kd", args, torch.device("cpu"))
    run.dir, run.log = tmp_path, tmp_path / "log.jsonl"
    teacher, student = Spied(seen, "teacher").eval(), Spied(seen, "student")
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    monkeypatch.setattr(common, "pgd", attack)
    monkeypatch.setattr(common, "model_for", lambda *_: student)
    rk.train_model(run, data, "student", rk.student_recipe(vars(args)), teacher)
    student_sees, teacher_sees = SEES[name]
    assert len(attacks) == ("a" in student_sees)
    x_adv = attacks[0][3] if attacks else None
    x = (
        next(x for _, _, x in seen if x_adv is None or not torch.equal(x, x_adv))
        if not clean
        else clean[0]
    )
    images = {"c": x, "a": x_adv}
    shown = {
        role: [(mode, x) for r, mode, x in seen if r == role] for role in ("student", "teacher")
    }
    for role, letters, training in (
        ("student", student_sees, True),
        ("teacher", teacher_sees, False),
    ):
        assert len(shown[role]) == len(letters)
        for (mode, image), letter in zip(shown[role], letters):
            assert mode == training and torch.equal(image, images[letter])
    if attacks:
        training, targets, settings, _ = attacks[0]
        soft = name.startswith("rslad") or name == "trades"
        assert not training and targets.is_floating_point() == soft
        assert settings == (args.eps, args.eps / 4, 2, "gaussian" if soft else "uniform")
    assert not teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("training", ["at", "ffgsm", "trades"])
def test_a_teacher_is_attacked_in_eval_mode_at_its_own_radius(training, tmp_path, monkeypatch):
    attacks, pgd = [], common.pgd

    def attack(model, x, targets, *settings, **more):
        attacks.append((model.training, targets.is_floating_point(), settings))
        return pgd(model, x, targets, *settings, **more)

    monkeypatch.setattr(common, "pgd", attack)
    flags = (
        f"--teacher-training {training} --teacher-eps 2/255 --val-size 0 --eval-steps 1 --loss ckd"
    )
    run(tmp_path, flags)
    in_training = [a for a in attacks if not isinstance(a[2][-1], torch.Tensor)]
    assert len(in_training) == 6  # two epochs of three batches
    for mode, soft, settings in in_training:
        assert not mode and soft == (training == "trades")
        step = 2.5 / 255 if training == "ffgsm" else 0.5 / 255
        assert settings[:2] == (pytest.approx(2 / 255), pytest.approx(step))
