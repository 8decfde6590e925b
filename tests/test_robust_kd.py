"""robust_kd.py: its losses against the equations, its recipes, its loop, and AT+."""

import dataclasses
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import read_only, same_weights

import common
import robust_kd

TINY = (
    "--data shapes --model mlp-8 --device cpu --train-subset 40 --test-subset 20 --val-size 20 "
    "--batch-size 16 --teacher-batch-size 16 --teacher-epochs 2 --epochs 2 --steps 2 --eval-steps 2"
)


def parse(flags=""):
    return robust_kd.parse_args([*TINY.split(), *flags.split()])


def run(runs, flags):
    """Train in the folder `runs`; -> the rows of the summary."""
    (rows,) = robust_kd.main([*TINY.split(), *flags.split(), "--runs", str(runs)])
    return rows


def log_of(runs, pattern="*/*"):
    """The rows of all logs below runs/, as (stage, epoch)."""
    rows = []
    for log in runs.glob(f"{pattern}/log.jsonl"):
        rows += [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["stage"], row["epoch"]) for row in rows]


# ------------------------------------------------------------------------------------------------
# Losses: against the equations written with nothing but floats

BATCH, CLASSES = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])


def random_logits(seed):
    return 2 * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed))


LOGITS = {
    "student_logits": random_logits(1),
    "student_adv_logits": random_logits(2),
    "teacher_logits": random_logits(3),
    "teacher_adv_logits": random_logits(4),
}
SETTINGS = {"lam": 0.3, "alpha": 0.6, "temperature": 1.0, "trades_beta": 6.0}


def value(name, **changes):
    """The loss `name` of LOGITS, LABELS and SETTINGS, some of them changed."""
    given = LOGITS | {"labels": LABELS} | SETTINGS | changes
    wanted = inspect.signature(robust_kd.LOSSES[name]).parameters
    return robust_kd.LOSSES[name](**{key: v for key, v in given.items() if key in wanted})


def softmax(row, temperature=1.0):
    powers = [math.exp(logit / temperature) for logit in row]
    return [power / sum(powers) for power in powers]


def mix(row, label, alpha, temperature):
    probs = softmax(row, temperature)
    return [alpha * p + (1 - alpha) * (k == label) for k, p in enumerate(probs)]


def cross_entropy(targets, row, temperature=1.0):
    return -sum(q * math.log(p) for q, p in zip(targets, softmax(row, temperature)))


def divergence(targets, row, temperature=1.0):
    probs = softmax(row, temperature)
    return sum(q * math.log(q / p) for q, p in zip(targets, probs) if q > 0)


def by_hand(name, lam, alpha, tau):
    """The mean over the batch of the equation in the paper, image by image."""
    if not name.endswith("+"):
        alpha = 1.0
    total = 0.0
    for i, label in enumerate(LABELS.tolist()):
        s, s_adv, t, t_adv = (logits[i].tolist() for logits in LOGITS.values())
        y = [float(k == label) for k in range(CLASSES)]
        teacher, teacher_adv = mix(t, label, alpha, tau), mix(t_adv, label, alpha, tau)
        clean = tau**2 * divergence(teacher, s, tau)
        robust = tau**2 * divergence(teacher, s_adv, tau)
        match name.removesuffix("+"):
            case "st":
                total += cross_entropy(y, s)
            case "at":
                total += cross_entropy(y, s_adv)
            case "trades":
                total += cross_entropy(y, s) + 6 * divergence(softmax(s), s_adv)
            case "ckd":
                total += (1 - lam) * cross_entropy(y, s) + lam * clean
            case "ard":
                total += (1 - lam) * cross_entropy(y, s) + lam * robust
            case "rslad":
                total += (1 - lam) * clean + lam * robust
            case "akd":
                total += tau**2 * cross_entropy(teacher_adv, s_adv, tau)
    return total / BATCH


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", robust_kd.LOSSES)
def test_each_loss_is_its_equation(name, temperature):
    expected = by_hand(name, 0.3, 0.6, temperature)
    assert value(name, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", robust_kd.LOSSES)
def test_one_hot_labels_are_labels_to_every_loss(name):
    one_hot = F.one_hot(LABELS, CLASSES).float()
    torch.testing.assert_close(value(name, labels=one_hot), value(name))


def test_every_loss_names_its_equation():
    numbers = {"ckd": 1, "ard": 2, "rslad": 3, "akd": 4, "ard+": 5, "rslad+": 6, "akd+": 7}
    for name, number in numbers.items():
        assert robust_kd.LOSSES[name].__doc__.startswith(f"Eq. ({number}):")


def gradients(name, **settings):
    """Gradients of a loss by the student's logits on x and x'; zeros where it has none."""
    x = LOGITS["student_logits"].clone().requires_grad_()
    x_adv = LOGITS["student_adv_logits"].clone().requires_grad_()
    value(name, student_logits=x, student_adv_logits=x_adv, **settings).backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, x_adv)]


@pytest.mark.parametrize(
    "name, settings, other, other_settings",
    [
        ("akd+", {"alpha": 0.0}, "at", {}),
        ("akd+", {"alpha": 1.0}, "akd", {}),
        ("ard+", {"alpha": 1.0}, "ard", {}),
        ("rslad+", {"alpha": 1.0}, "rslad", {}),
        ("ard+", {"lam": 1.0}, "rslad+", {"lam": 1.0}),
        ("trades", {"trades_beta": 0.0}, "st", {}),
    ],
)
def test_limits_in_which_two_losses_are_one(name, settings, other, other_settings):
    for a, b in zip(gradients(name, **settings), gradients(other, **other_settings)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(robust_kd.TAUGHT))
def test_no_gradient_reaches_the_teacher(name):
    logits = {key: tensor.clone().requires_grad_() for key, tensor in LOGITS.items()}
    value(name, **logits).backward()
    assert logits["teacher_logits"].grad is None and logits["teacher_adv_logits"].grad is None


def test_trades_moves_both_of_its_sides():
    clean, adv = gradients("trades")
    plain, _ = gradients("st")
    assert adv.abs().max() > 0 and (clean - plain).abs().max() > 0


def test_a_student_equal_to_its_teacher_has_no_kl():
    teacher = LOGITS["teacher_logits"]
    found = value("rslad", student_logits=teacher, student_adv_logits=teacher)
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_the_kl_does_not_depend_on_classes_that_nobody_believes_in():
    targets, student = LOGITS["teacher_logits"].softmax(1), LOGITS["student_logits"]
    wide_targets, wide_student = F.pad(targets, (0, 96)), F.pad(student, (0, 96), value=-1e4)
    narrow, wide = robust_kd.kl(targets, student), robust_kd.kl(wide_targets, wide_student)
    assert wide.item() == pytest.approx(narrow.item())
    # what the mean over classes would do
    narrow = robust_kd.kl(targets, student, kl_reduction="mean")
    wide = robust_kd.kl(wide_targets, wide_student, kl_reduction="mean")
    assert narrow.item() == pytest.approx(wide.item() * 100 / CLASSES)


def test_mixed_targets_are_probabilities():
    targets = robust_kd.mix_labels(LOGITS["teacher_logits"], LABELS, 0.3, 2.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))
    assert (targets[torch.arange(BATCH), LABELS] >= 0.7).all()


# ------------------------------------------------------------------------------------------------
# Ensembles and recipes


def test_an_ensemble_averages_probabilities_by_its_weights():
    models = [common.build_model("mlp-8", 5, size=4).eval() for _ in range(3)]
    x, weights = torch.rand(7, 3, 4, 4), [0.2, 0.0, 0.8]
    probs = [model(x).softmax(1) for model in models]
    weighted = robust_kd.Ensemble(models, weights)(x)
    torch.testing.assert_close(weighted.exp(), 0.2 * probs[0] + 0.8 * probs[2])
    torch.testing.assert_close(robust_kd.Ensemble(models)(x).exp(), sum(probs) / 3)


def test_the_weights_of_an_ensemble():
    weights = robust_kd.ensemble_weights
    mixed = ["st", "st", "at", "at"]
    assert weights(None, mixed) == [0.25] * 4
    assert weights([0.3], mixed) == pytest.approx([0.35, 0.35, 0.15, 0.15])
    assert weights([0.0], ["at", "st"]) == [0.0, 1.0]
    assert weights([0.5, 0.25, 0.25, 0.0], mixed) == [0.5, 0.25, 0.25, 0.0]
    assert weights([1.0], ["at"]) == [1.0]
    for betas, trainings in (
        ([0.5], ["at", "at"]),
        ([0.5, 0.6], ["st", "at"]),
        ([1.0, 0.0], mixed),
    ):
        with pytest.raises(ValueError, match="sum to 1"):
            weights(betas, trainings)


def teacher_recipe(flags):
    args = parse(flags)
    return robust_kd.teacher_recipe(args, robust_kd.teacher_trainings(args)[0])


def test_teachers_of_an_ensemble_differ_by_seed_and_training_alone():
    args = parse("--teachers 3 --seed 2")
    recipes = [vars(robust_kd.teacher_recipe(args, "at", number)) for number in range(3)]
    assert [recipe["seed"] for recipe in recipes] == [2, 102, 202]
    assert recipes[0] | {"seed": 0} == recipes[1] | {"seed": 0} == recipes[2] | {"seed": 0}
    args = parse("--teacher-training ffgsm trades --teacher-eps 4/255")
    ffgsm, trades = (robust_kd.teacher_recipe(args, training) for training in ("ffgsm", "trades"))
    assert (ffgsm.steps, ffgsm.step_size) == (1, pytest.approx(5 / 255))
    assert (trades.steps, trades.step_size) == (2, pytest.approx(1 / 255))
    assert (trades.attack_loss, trades.trades_beta) == ("kl-self", 6)


@pytest.mark.parametrize(
    "flags, other, equal",
    [
        ("--teacher-training st", "--teacher-training st --eps 4/255 --steps 3", True),
        ("", "--step-size 2/255 --ffgsm-step 2 --trades-beta 1 --loss rslad --lam 0.5", True),
        ("--teacher-eps 2/255", "--teacher-eps 2/255 --eps 4/255", True),
        ("--eps 8/255 --step-size 2/255", "--teacher-eps 8/255", True),
        ("", "--teacher-eps 2/255", False),
        ("", "--attack-bn train", False),
        ("", "--seed 1", False),
        ("", "--steps 1", False),
        ("--teacher-training ffgsm", "--teacher-training ffgsm --steps 9", False),  # of the guard
        ("--teacher-training ffgsm", "--teacher-training ffgsm --loss rslad", True),
        ("", "--teacher-es 1", False),
        ("", "--trajectories", False),
        ("--teacher-training st --steps 3", "--teacher-training st --trajectories", False),
        ("--trajectories", "--trajectories --eps 4/255 --teacher-eps 8/255", False),
        ("", "--precision fp32", False),
        ("--recipe at+ --teacher-es 1", "--recipe at+ --teacher-es 2", False),
    ],
)
def test_two_runs_share_a_teacher_if_nothing_differs_that_it_depends_on(flags, other, equal):
    assert (teacher_recipe(flags) == teacher_recipe(other)) == equal


def test_the_step_is_a_quarter_of_the_radius_and_scales_with_it():
    step_size = robust_kd.step_size
    assert step_size(parse(), 8 / 255) == pytest.approx(2 / 255)
    assert step_size(parse(), 2 / 255) == pytest.approx(0.5 / 255)
    assert step_size(parse("--step-size 4/255"), 8 / 255) == pytest.approx(4 / 255)
    assert step_size(parse("--step-size 4/255"), 2 / 255) == pytest.approx(1 / 255)
    assert step_size(parse("--step-size 4/255 --eps 0"), 0) == pytest.approx(4 / 255)


# ------------------------------------------------------------------------------------------------
# Flags


def test_a_preset_says_what_it_sets_and_flags_that_are_given_win(capsys):
    args = robust_kd.parse_args(["--demo", "--epochs", "1"])
    out = capsys.readouterr().out
    assert "--demo sets" in out and "--epochs" not in out
    assert (args.data, args.epochs, args.batch_size) == ("shapes", 1, 32)
    assert args.step_size == pytest.approx(4 / 255) and args.name.startswith("demo-shapes")
    args = robust_kd.parse_args(["--recipe=at+", "--epochs", "7", "--loss", "at"])
    out = capsys.readouterr().out
    assert "--recipe at+ sets --model wrn-28-10-silu --epochs" not in out
    assert "--recipe at+ sets --model wrn-28-10-silu --teacher-epochs 400" in out
    assert (args.model, args.epochs, args.teacher_epochs) == ("wrn-28-10-silu", 7, 400)
    assert (args.schedule, args.ema, args.steps, args.step_size) == ("cosine", 0.995, 10, 2 / 255)
    assert "recipe=at" in args.name and robust_kd.parse_args([]).schedule == "paper"


@pytest.mark.parametrize(
    "flags, message",
    {
        "--loss akd++": "--loss",
        "--teacher-model wrn-9-1": "--teacher-model",
        "--model wrn-16-2 --width 1/4": "--width",
        "--teacher-es 0": "--teacher-es",
        "--teacher-es 101": "--teacher-es 101: --teacher-epochs is only 100",
        "--teacher-training none": "--teacher-training none",
        "--teacher-training at none": "--teacher-training none",
        "--teachers 2 --teacher-training st at ffgsm": "--teachers 2",
        "--teachers 2 --teacher-ckpt a.pt": "--teacher-ckpt",
        "--teachers 2 --beta 0.5 0.6": "--beta",
        "--teachers 2 --beta 0.5": "--beta",
        "--loss ckd --attack-loss ce": "--attack-loss: --loss ckd has no attack",
        "--loss rslad --alpha 0.3": "--alpha: has no effect with --loss rslad",
        "--loss akd+ --kl-reduction=mean": "--kl-reduction: has no effect with --loss akd+",
        "--extra-fraction 0.5": "--extra-fraction: has no effect without --extra-data",
        "--nesterov yes --momentum 0": "--nesterov yes: needs a momentum above 0",
    }.items(),
)
def test_flags_that_make_no_sense_are_refused_by_name(flags, message, refused):
    assert message in refused(robust_kd.parse_args, flags.split())


def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, refused):
    runs = ["--runs", str(tmp_path / "runs")]
    for name, classes, size in (("classes", 100, 32), ("size", 10, 28)):
        path = tmp_path / f"{name}.pt"
        common.save_model(path, common.build_model("mlp-4", classes, size=size))
        argv = [*TINY.split(), "--teacher-ckpt", str(path), *runs]
        assert str(path) in refused(robust_kd.main, argv)
    path = tmp_path / "mlp.pt"
    common.save_model(path, common.build_model("mlp-4"), training="at")
    argv = [*TINY.split(), "--teacher-ckpt", str(path), "--teacher-model", "wrn-10-1", *runs]
    assert "expected a wrn-10-1" in refused(robust_kd.main, argv)
    argv = [*TINY.split(), "--extra-data", str(tmp_path / "no.npz"), *runs]
    assert "no.npz: no such file" in refused(robust_kd.main, argv)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------
# The loop: what each net sees, in which mode, at which rate


class Spied(nn.Module):
    """A net that notes the mode it is in and the images it is shown; not so its folded copy."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = common.build_model("mlp-8"), []
        self.build_arguments = self.net.build_arguments

    def forward(self, x):
        self.seen.append((self.training, x.detach().clone()))
        return self.net(x)


@pytest.mark.parametrize(
    "loss, student_sees, teacher_sees, attack_loss",
    [
        ("st", ["x"], [], None),
        ("at", ["x_adv"], [], "ce"),
        ("trades", ["x_adv", "x"], [], "kl-self"),
        ("ckd", ["x"], ["x"], None),
        ("ard", ["x_adv", "x"], ["x"], "ce"),
        ("rslad", ["x_adv", "x"], ["x"], "kl-teacher"),
        ("akd", ["x_adv"], ["x_adv"], "ce"),
        ("ard+", ["x_adv", "x"], ["x"], "ce"),
        ("rslad+", ["x_adv", "x"], ["x"], "kl-teacher"),
        ("akd+", ["x_adv"], ["x_adv"], "ce"),
    ],
)
def test_student_and_teacher_see_what_the_equation_says_in_the_right_mode(
    loss, student_sees, teacher_sees, attack_loss, tmp_path, monkeypatch
):
    args = parse(f"--loss {loss} --epochs 1")
    data = common.load_data("shapes", train_subset=16)
    ((x, labels),) = common.batches(data, 16, 0, "student", 0)
    student, teacher, attacks = Spied(), Spied().eval().requires_grad_(False), []
    own_probs = student.net.eval()(x).softmax(1).detach()
    teacher_before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    pgd = common.pgd

    def spied_pgd(model, x, targets, *settings):
        x_adv = pgd(model, x, targets, *settings)
        attacks.append((model.training, x, targets, settings, x_adv))
        return x_adv

    monkeypatch.setattr(common, "pgd", spied_pgd)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    monkeypatch.setattr(common, "load_model", lambda *_: (student, {}))
    robust_kd.train(robust_kd.student_recipe(args), data, tmp_path, "student", args, teacher)

    shown = {"x": x}
    assert len(attacks) == (attack_loss is not None)
    if attack_loss is not None:
        mode, attacked, targets, settings, shown["x_adv"] = attacks[0]
        assert not mode and torch.equal(attacked, x)
        if attack_loss == "ce":
            assert torch.equal(targets, labels)
        elif attack_loss == "kl-teacher":
            torch.testing.assert_close(targets, teacher.net(x).softmax(1))
        else:
            torch.testing.assert_close(targets, own_probs)
        start = () if attack_loss == "ce" else ("gaussian",)
        assert settings == (args.eps, args.eps / 4, 2, *start)
    if attack_loss == "kl-teacher":
        assert teacher_sees == ["x"]
    for net, names, training in ((student, student_sees, True), (teacher, teacher_sees, False)):
        assert [mode for mode, _ in net.seen] == [training] * len(names)
        for (_, image), name in zip(net.seen, names):
            assert torch.equal(image, shown[name])
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("training", ["at", "ffgsm", "trades"])
def test_a_teacher_is_attacked_in_eval_mode_at_its_own_radius(training, tmp_path, monkeypatch):
    args, attacks, pgd = parse("--teacher-eps 2/255"), [], common.pgd

    def spied_pgd(model, x, targets, *settings):
        attacks.append((model.training, targets.is_floating_point(), *settings[:3]))
        return pgd(model, x, targets, *settings)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    data = common.load_data("shapes", train_subset=40)
    robust_kd.train(robust_kd.teacher_recipe(args, training), data, tmp_path, "teacher", args)
    eps = pytest.approx(2 / 255)
    step_size, steps = pytest.approx(0.5 / 255), 2
    if training == "ffgsm":
        step_size, steps = pytest.approx(2.5 / 255), 1
    # two epochs of three batches
    assert attacks == [(False, training == "trades", eps, step_size, steps)] * 6


def rates(tmp_path, monkeypatch, flags):
    """[(stage's) [(learning rate, momentum) of each step]] of a run."""
    stages, make_optimizer = [], robust_kd.make_optimizer

    def spied(*args):
        optimizer, schedule = make_optimizer(*args)
        group, steps = optimizer.param_groups[0], []
        optimizer.register_step_pre_hook(lambda *_: steps.append((group["lr"], group["momentum"])))
        stages.append(steps)
        return optimizer, schedule

    monkeypatch.setattr(robust_kd, "make_optimizer", spied)
    run(tmp_path, flags)
    return stages


def test_learning_rates_follow_the_closed_forms(tmp_path, monkeypatch):
    flags = "--loss akd+ --epochs 4 --teacher-epochs 5 --teacher-es 3 --lr 0.21"
    teacher, student = rates(tmp_path, monkeypatch, flags)
    steps = 3  # 40 images in batches of 16: the last, smaller batch counts
    assert teacher == [(pytest.approx(0.1 * 0.9 ** (i // steps)), 0.9) for i in range(3 * steps)]
    total = 4 * steps
    top = 0.3 * total - 1
    assert len(student) == total
    for i, (lr, momentum) in enumerate(student):
        if i <= top:
            part, floor = i / top, 0.21 / 25
        else:
            part, floor = 1 + (i - top) / (total - 1 - top), 0.21 / 25 / 1e4
        bump = (1 - math.cos(math.pi * part)) / 2
        assert lr == pytest.approx(floor + (0.21 - floor) * bump, rel=1e-6)
        assert momentum == pytest.approx(0.95 - 0.1 * bump, rel=1e-6)


def test_momentum_stays_when_it_is_not_cycled(tmp_path, monkeypatch):
    (student,) = rates(tmp_path, monkeypatch, "--loss at --cycle-momentum no --momentum 0.8")
    assert {momentum for _, momentum in student} == {0.8}


def test_the_cosine_of_an_early_stopped_teacher_is_that_of_a_whole_one():
    args = robust_kd.parse_args("--recipe at+ --teacher-es 100".split())
    recipe = robust_kd.teacher_recipe(args, "at")
    assert (recipe.epochs, recipe.schedule_epochs) == (100, 400)
    optimizer, schedule = robust_kd.make_optimizer(nn.Linear(1, 1), recipe, args, 1)
    lr = []
    for _ in range(401):
        lr.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert lr[:10] == pytest.approx([0.02 * k for k in range(1, 11)]) and lr[10] == 0.2
    assert lr[205] == pytest.approx(0.1) and lr[400] == pytest.approx(0)
    assert lr[10:] == sorted(lr[10:], reverse=True)


def test_batchnorm_is_not_decayed_if_asked():
    net = common.build_model("wrn-10-1")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    args = parse("--decay-norms no --weight-decay 0.5 --loss st")
    optimizer, _ = robust_kd.make_optimizer(net, robust_kd.student_recipe(args), args, 10)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    still = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    norms = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and norms <= still and not any("conv" in name for name in still)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


# ------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize(
    "variant",
    [
        "--loss rslad+ --attack-loss ce --kl-reduction mean",
        "--loss akd+ --attack-loss kl-teacher --temperature 2 --precision fp32",
        "--model wrn-10-1 --loss ard+ --attack-bn train --batch-size 32",
        "--teacher-eps 2/255 --teacher-model mlp-12 --restarts 2 --val-size 0 --eval-steps 1",
        "--loss at --teacher-training none --deterministic",
        "--teacher-training st at --beta 0.25 --teacher-save-every 1",
    ],
)
def test_variants_run_and_end_in_finite_numbers(variant, tmp_path):
    flags = f"{variant} --epochs 1 --teacher-epochs 1"
    rows = run(tmp_path, flags if "--val-size" in variant else f"--val-size 8 {flags}")
    torch.use_deterministic_algorithms(False)
    for row in rows:
        accuracies = [number for key, number in row.items() if key.endswith("_acc")]
        assert len(accuracies) == 2 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    for log in tmp_path.rglob("log.jsonl"):
        for line in log.read_text().splitlines():
            assert 0 < json.loads(line)["loss"] < 1e4


def test_a_short_standard_training_beats_chance_and_pgd_hurts_it(tmp_path):
    flags = "--model wrn-10-1 --loss st --train-subset 600 --test-subset 100 --val-size 0 "
    (row,) = run(tmp_path, flags + "--epochs 4 --batch-size 16 --lr 0.1 --eval-steps 5")
    assert row["clean_acc"] > 0.5 and row["pgd5_acc"] < row["clean_acc"] - 0.25


def test_akd_plus_at_alpha_zero_trains_the_same_net_as_at(tmp_path):
    run(tmp_path, "--loss akd+ --alpha 0 --teacher-training st --name akd")
    run(tmp_path, "--loss at --name at")
    folder = tmp_path / "robust_kd"
    a = common.load(folder / "akd-s0" / "student.pt")["weights"]
    b = common.load(folder / "at-s0" / "student.pt")["weights"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def test_a_given_teacher_is_used_as_it_is(tmp_path, capsys):
    path = tmp_path / "given.pt"
    common.save_model(path, common.build_model("mlp-12"), training="st")
    before = path.read_bytes()
    rows = run(tmp_path, f"--loss ard --teacher-ckpt {path} --teacher-training none")
    assert rows[0]["model"] == "teacher (st)" and path.read_bytes() == before
    assert str(path) in capsys.readouterr().out and not (tmp_path / "teachers").exists()
    assert {stage for stage, _ in log_of(tmp_path)} == {"student"}


def test_early_stops_of_a_longer_training_are_found_and_are_what_a_shorter_one_gives(tmp_path):
    long = "--loss akd --teacher-epochs 3 --epochs 1"
    run(tmp_path / "a", f"{long} --teacher-save-every 1 --trajectories")
    before = log_of(tmp_path / "a", "teachers/*")
    assert before == [("teacher", epoch) for epoch in (1, 2, 3)]
    run(tmp_path / "a", f"{long} --teacher-es 2 --trajectories --name es")
    assert log_of(tmp_path / "a", "teachers/*") == before  # nothing was trained
    run(tmp_path / "b", f"{long} --teacher-es 2 --trajectories --name es")
    stopped = "robust_kd/es-s0/student.pt"
    assert same_weights(tmp_path / "a" / stopped, tmp_path / "b" / stopped)
    (path,) = (tmp_path / "b").glob("teachers/*/teacher.pt")
    kept = tmp_path / "a" / path.relative_to(tmp_path / "b")
    a, b = common.load(kept)["meta"], common.load(path)["meta"]
    assert a.keys() == b.keys()
    for name, tensor in b["trajectories"].items():
        assert torch.equal(tensor, a["trajectories"][name]), name


def test_an_early_stop_that_another_run_trains_now_is_left_to_it(tmp_path):
    args = parse("--teacher-epochs 2 --teacher-save-every 1 --loss akd --name run")
    data = common.load_data("shapes", val_size=20, train_subset=40, test_subset=20)
    args.runs = tmp_path
    path = common.teacher_file(args, data, vars(robust_kd.teacher_recipe(args, "at", epochs=1)))
    flags = "--teacher-epochs 2 --teacher-save-every 1 --loss akd"
    with common.locked(path.parent):
        run(tmp_path, f"{flags} --name first")
    assert not path.exists()
    for whole in tmp_path.glob("teachers/*/teacher.pt"):
        whole.unlink()
    (path.parent / ".teacher.pt.1.tmp").write_text("torn")
    run(tmp_path, f"{flags} --name second")
    assert {file.name for file in path.parent.iterdir()} == {"lock", "recipe.json", "teacher.pt"}


def test_an_ensemble_is_trained_from_other_seeds_and_evaluated(tmp_path):
    rows = run(tmp_path, "--loss akd+ --teachers 2 --epochs 1")
    names = [row["model"] for row in rows]
    assert names[:3] == ["teacher 1 (at)", "teacher 2 (at)", "ensemble of 2 teachers"]
    one, two = tmp_path.glob("teachers/*/teacher.pt")
    assert not same_weights(one, two)
    before = sorted(log_of(tmp_path, "teachers/*"))
    run(tmp_path, "--loss rslad+ --teachers 2 --epochs 1")
    assert sorted(log_of(tmp_path, "teachers/*")) == before


def test_single_step_training_that_collapses_is_stopped_and_the_best_epoch_kept(
    tmp_path, capsys, monkeypatch
):
    accuracies = iter([0.5, 0.6, 0.3, 0.9])

    def validate(model, data, attack):
        return {"val_clean_acc": 0.5, "val_pgd2_acc": next(accuracies)}

    monkeypatch.setattr(common, "validate", validate)
    run(
        tmp_path,
        "--loss akd+ --teacher-training ffgsm --teacher-epochs 4 --epochs 1 --teacher-save-every 1",
    )
    assert "fell by over 20 points; epoch 2 is kept" in capsys.readouterr().out
    assert log_of(tmp_path, "teachers/*") == [("teacher", epoch) for epoch in (1, 2, 3)]
    args = parse("--teacher-training ffgsm --teacher-epochs 4")
    args.runs = tmp_path
    data = common.load_data("shapes", val_size=20, train_subset=40, test_subset=20)
    files = {}
    for epochs in (2, 3, 4):
        recipe = robust_kd.teacher_recipe(args, "ffgsm", epochs=epochs)
        files[epochs] = common.teacher_file(args, data, vars(recipe))
    assert same_weights(files[4], files[2])
    assert not files[3].exists()  # a run that stops after epoch 3 would keep epoch 2 as well


# ------------------------------------------------------------------------------------------------
# AT+ and trajectories


@pytest.fixture(scope="module")
def data():
    return common.load_data("shapes", val_size=20, train_subset=50, test_subset=20)


def save_extra(path, n=30, size=32, **other):
    """Write an .npz of n generated images; other: arrays that replace them (None: left out)."""
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, n),
    }
    arrays |= other
    np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})
    return arrays


def test_the_average_follows_the_ramp_and_takes_batchnorm_as_it_is():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, expected = robust_kd.WeightAverage(copy.deepcopy(net), 0.6), None
    for t in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net[1].running_mean += 1
        average.update(net)
        weight = net[0].weight.detach().clone()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = weight if t == 0 else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.module[0].weight, expected)
    assert torch.equal(average.module[1].running_mean, net[1].running_mean)


def test_cutout_fills_a_square_of_18_pixels(monkeypatch):
    x, fill = torch.rand(3, 3, 32, 32), torch.tensor([2.0, 3.0, 4.0])
    centres = torch.tensor([[16, 0, 31], [16, 0, 10]])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: centres[..., None])
    out = robust_kd.cutout(x, fill)
    changed = (out != x).all(1)  # (B, H, W)
    assert changed.flatten(1).sum(1).tolist() == [18 * 18, 9 * 9, 10 * 18]
    assert changed[0, 7:25, 7:25].all() and changed[1, :9, :9].all() and changed[2, 22:, 1:19].all()
    assert torch.equal(out[0, :, 10, 10], fill)


@pytest.mark.parametrize("area, row, column", [(0.25, 0.5, 0.5), (0.7, 0.1, 0.9), (0.0, 0.3, 0.3)])
def test_cutmix_mixes_targets_by_the_pixels_that_it_took(area, row, column):
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    mixed, targets = robust_kd.cutmix(x, torch.eye(4), area, row, column)
    for i in range(4):
        share = (mixed[i] == (i - 1) % 4).double().mean().item()
        assert targets[i, (i - 1) % 4].item() == pytest.approx(share, abs=1e-6)
        assert targets[i, i].item() == pytest.approx(1 - share, abs=1e-6)
        if area == 0.25:
            assert share == pytest.approx(0.25)


def augmented(data, **flags):
    """[(x, labels) as they are, (x, labels) after augment()] of each batch of 20."""
    default = {
        "extra_data": None,
        "extra_fraction": 0.7,
        "augment": "crop",
        "label_smoothing": 0.0,
    }
    args = SimpleNamespace(**(default | flags))
    for x, labels in common.batches(data, 20, 3, "student", 1):
        yield (x, labels), robust_kd.augment(x, labels, data, args)


def test_a_batch_has_its_fraction_of_extra_images_with_smoothed_labels(data, tmp_path):
    arrays = save_extra(tmp_path / "e.npz")
    data = common.load_data("shapes", train_subset=50, augment="none")
    data.extra = robust_kd.load_extra(tmp_path / "e.npz", data)
    assert isinstance(data.extra[0], np.memmap) and np.array_equal(data.extra[0], arrays["image"])
    label_of = {image.tobytes(): y for image, y in zip(arrays["image"], arrays["label"].tolist())}
    flags = {"extra_data": "e.npz", "label_smoothing": 0.1}
    for ((x, labels), (mixed, targets)), own in zip(augmented(data, **flags), (6, 6, 3)):
        assert mixed.shape == x.shape and torch.equal(mixed[:own], x[:own])
        assert torch.equal(targets[:own], F.one_hot(labels[:own], 10).float())
        pixels = (mixed[own:] * 255).round().byte().permute(0, 2, 3, 1)
        for image, target in zip(pixels, targets[own:]):
            assert target.argmax() == label_of[image.contiguous().numpy().tobytes()]
            assert target.max().item() == pytest.approx(0.91)
            assert target.sum().item() == pytest.approx(1)


def test_augmentations_change_a_part_of_each_image(data):
    for (x, labels), (same, same_labels) in augmented(data):
        assert same is x and same_labels is labels
    for (x, labels), (cut, same_labels) in augmented(data, augment="cutout"):
        kept = (cut == x).all(1).flatten(1).double().mean(1)
        assert torch.equal(labels, same_labels) and (kept < 1).all() and (kept > 0.6).all()
    for (_, labels), (_, targets) in augmented(data, augment="cutmix"):
        assert targets.shape == (len(labels), 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(labels)))
        own = targets.gather(1, labels[:, None])[:, 0]
        assert len(own[labels != labels.roll(1)].unique()) == 1  # one box for all
    for (x, _), (same, targets) in augmented(data, label_smoothing=0.1):
        assert same is x and targets.max(1).values.allclose(torch.tensor(0.91))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "expected an .npz file with image and label"),
        ({"size": 28}, "image must be uint8 (M, 32, 32, 3), got uint8 [28, 28, 3]"),
        ({"image": np.zeros((4, 32, 32, 3))}, "image must be uint8"),
        ({"image": np.ones((4, 32, 32, 3), np.uint8)}, "multiply by 255"),
        ({"image": np.array([{}, 1], dtype=object)}, "image must be uint8"),
        ({"label": np.zeros(7, int)}, "label must be 30 labels 0..9, got int64 (7,)"),
        ({"label": np.full(30, 10)}, "label must be 30 labels 0..9"),
        ({"label": np.full(30, -1)}, "label must be 30 labels 0..9"),
        (
            {"label": np.array([{}] * 30, dtype=object)},
            "expected an .npz file with image and label",
        ),
        (None, "--extra-data"),
    ],
)
def test_wrong_extra_data_is_one_line(data, tmp_path, refused, change, message):
    path = tmp_path / "e.npz"
    if change is None:
        path.write_bytes(b"PK no zip")
    else:
        save_extra(path, **change)
    error = refused(robust_kd.load_extra, path, data)
    assert str(path) in error and message in error
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]  # nothing is unpacked


def test_extra_labels_in_one_column_and_grey_images_without_a_channel_are_taken(data, tmp_path):
    arrays = save_extra(tmp_path / "e.npz")
    save_extra(tmp_path / "column.npz", label=arrays["label"][:, None])
    x, labels = robust_kd.load_extra(tmp_path / "column.npz", data)
    assert np.array_equal(x, arrays["image"]) and labels.tolist() == arrays["label"].tolist()
    grey = dataclasses.replace(data, x_train=data.x_train[..., :1])
    save_extra(tmp_path / "grey.npz", image=arrays["image"][..., 0])
    x, _ = robust_kd.load_extra(tmp_path / "grey.npz", grey)
    assert isinstance(x, np.memmap) and np.array_equal(x, arrays["image"][..., :1])


def test_extra_images_in_a_read_only_folder_are_unpacked_beside_the_runs(data, public_folder):
    folder, runs = public_folder / "data", public_folder / "runs"
    folder.mkdir()
    arrays = save_extra(folder / "e.npz")
    for _ in range(2):
        with read_only(folder):
            x, _ = robust_kd.load_extra(folder / "e.npz", data, runs)
        assert np.array_equal(x, arrays["image"])
    assert [path.name for path in folder.iterdir()] == ["e.npz"]
    assert len(list((runs / "data").iterdir())) == 1


def test_a_run_with_everything_goes_on_with_the_same_bits_and_keeps_trajectories(tmp_path, stop_at):
    save_extra(tmp_path / "e.npz")
    flags = (
        f"--recipe at+ {TINY} --model wrn-10-1 --val-size 12 --test-subset 12 --steps 1 "
        f"--extra-data {tmp_path}/e.npz --augment cutmix --trajectories --name run --runs"
    )
    robust_kd.main(f"{flags} {tmp_path}/whole".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/stopped", "teacher", 1)
    stop_at(robust_kd, f"{flags} {tmp_path}/stopped", "student", 1)
    robust_kd.main(f"{flags} {tmp_path}/stopped".split())
    files = sorted((tmp_path / "whole").rglob("*.pt"))
    assert {path.name for path in files} >= {"teacher.pt", "student.pt"}
    for path in files:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert same_weights(path, other), path
        if path.name.endswith("_best.pt"):
            continue
        kept, again = common.load(path)["meta"], common.load(other)["meta"]
        assert {k: (v.dtype, tuple(v.shape)) for k, v in kept["trajectories"].items()} == {
            "train": (torch.float16, (2, 40)),
            "test": (torch.float16, (2, 12)),
            "adv": (torch.float16, (2, 12)),
            "entropy": (torch.float32, (2,)),
        }
        for name, values in kept["trajectories"].items():
            assert torch.equal(values, again["trajectories"][name]), (path, name)
    # what is saved is the average, and the last row of its trajectories is what it says
    net, meta = common.load_model(tmp_path / "whole" / "robust_kd" / "run-s0" / "student.pt")
    data = common.load_data("shapes", val_size=12, train_subset=40, test_subset=12)
    log_probs = common.predict(net, data.x_test).log_softmax(1)
    own_class = log_probs.gather(1, data.y_test[:, None])[:, 0]
    kept = meta["trajectories"]
    torch.testing.assert_close(kept["test"][-1].float(), own_class, atol=2e-3, rtol=0)
    assert (kept["adv"][-1] <= kept["test"][-1] + 1e-2).all()
    log_probs = common.predict(net, data.x_train).log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    torch.testing.assert_close(kept["entropy"][-1], entropy, atol=1e-4, rtol=0)


def test_other_extra_images_under_the_same_name_are_other_data(tmp_path, refused):
    flags = (
        f"{TINY} --loss akd --steps 1 --extra-data {tmp_path}/e.npz --name run --runs {tmp_path}"
    )
    arrays = save_extra(tmp_path / "e.npz")
    robust_kd.main(flags.split())
    (teacher,) = tmp_path.glob("teachers/*/teacher.pt")
    save_extra(tmp_path / "e.npz", label=(arrays["label"] + 1) % 10)
    assert "--data: " in refused(robust_kd.main, flags.split())
    robust_kd.main([*flags.split(), "--name", "other"])
    assert len(list(tmp_path.glob("teachers/*/teacher.pt"))) == 2 and teacher.exists()
