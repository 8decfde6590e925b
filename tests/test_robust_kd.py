"""robust_kd.py: its losses against the equations, its teachers, its loop, and AT+."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import same_weights

import common
import robust_kd

TINY = (
    "--data shapes --model mlp-8 --device cpu --train-subset 40 --test-subset 20 --val-size 20 "
    "--batch-size 16 --teacher-batch-size 16 --teacher-epochs 2 --epochs 2 --steps 2"
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
TAUGHT = sorted(robust_kd.TAUGHT_ON_X | robust_kd.TAUGHT_ON_X_ADV)


def random_logits(seed):
    return 2 * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed))


LOGITS = {
    "student_logits": random_logits(1),
    "student_adv_logits": random_logits(2),
    "teacher_logits": random_logits(3),
    "teacher_adv_logits": random_logits(4),
    "student_mirrored_logits": random_logits(5),
    "teacher_mirrored_logits": random_logits(6),
    "average_logits": random_logits(7),
}
IGDM_WEIGHT, IAD_BETA, ADR_LAM, ADR_TEMPERATURE = 0.7, 0.5, 0.8, 2.2


def value(name, labels=LABELS, lam=0.3, alpha=0.6, temperature=1.0, trades_beta=6.0, **logits):
    """The loss `name` as a user puts it together, with LOGITS, some of them changed."""
    s, s_adv, t, t_adv, s_far, t_far, average = (LOGITS | logits).values()
    if not name.endswith("+"):
        alpha = 1.0
    targets = robust_kd.mix_labels(t, labels, alpha, temperature)
    match name.removesuffix("+"):
        case "st":
            return F.cross_entropy(s, labels)
        case "at":
            return F.cross_entropy(s_adv, labels)
        case "trades":
            return robust_kd.trades_loss(s, s_adv, labels, trades_beta)
        case "ckd":
            return robust_kd.ckd_loss(s, targets, labels, lam, temperature)
        case "ard":
            return robust_kd.ard_loss(s, s_adv, targets, labels, lam, temperature)
        case "rslad":
            return robust_kd.rslad_loss(s, s_adv, targets, lam, temperature)
        case "akd" | "adaad":
            targets = robust_kd.mix_labels(t_adv, labels, alpha, temperature)
            return robust_kd.akd_loss(s_adv, targets, temperature)
        case "igdm":
            targets = robust_kd.mix_labels(t_adv, labels, alpha, temperature)
            akd = robust_kd.akd_loss(s_adv, targets, temperature)
            return akd + IGDM_WEIGHT * robust_kd.igdm_loss(s_adv, s_far, t_adv, t_far)
        case "iad":
            trust = robust_kd.teacher_trust(t_adv, labels, IAD_BETA)
            return robust_kd.iad_loss(s, s_adv, targets, trust, temperature)
        case "adr":
            targets = robust_kd.rectify_labels(average, labels, ADR_LAM, ADR_TEMPERATURE)
            return F.cross_entropy(s_adv, targets)
        case "mart":
            return robust_kd.mart_loss(s, s_adv, labels, 5.0)


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


def by_hand(
    name,
    lam,
    alpha,
    tau,
    labels=LABELS,
    logits=LOGITS,
    igdm=IGDM_WEIGHT,
    beta=IAD_BETA,
    adr_lam=ADR_LAM,
    adr_temperature=ADR_TEMPERATURE,
):
    """The mean over the batch of the equation in the paper, image by image."""
    if not name.endswith("+"):
        alpha = 1.0
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        s, s_adv, t, t_adv, s_far, t_far, average = (v[i].tolist() for v in logits.values())
        y = [float(k == label) for k in range(len(s))]
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
            case "akd" | "adaad":
                total += tau**2 * cross_entropy(teacher_adv, s_adv, tau)
            case "igdm":
                teacher_differences = softmax([a - b for a, b in zip(t_adv, t_far)])
                student_differences = [a - b for a, b in zip(s_adv, s_far)]
                total += tau**2 * cross_entropy(teacher_adv, s_adv, tau)
                total += igdm * divergence(teacher_differences, student_differences)
            case "iad":
                trust = softmax(t_adv)[label] ** beta
                total += trust * robust + (1 - trust) * divergence(softmax(s), s_adv)
            case "adr":
                p = softmax(average, adr_temperature)
                own = min(max(adr_lam - (max(p) - p[label]), 0), 1)
                total += cross_entropy([own * a + (1 - own) * b for a, b in zip(p, y)], s_adv)
            case "mart":
                rival = max(p for k, p in enumerate(softmax(s_adv)) if k != label)
                total += cross_entropy(y, s_adv) - math.log(1.0001 - rival)
                total += 5 * divergence(softmax(s), s_adv) * (1 - softmax(s)[label])
    return total / len(labels)


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
    equations = {
        robust_kd.ckd_loss: "Eq. (1):",
        robust_kd.ard_loss: "Eqs. (2), (5):",
        robust_kd.rslad_loss: "Eqs. (3), (6):",
        robust_kd.akd_loss: "Eqs. (4), (7):",
        robust_kd.igdm_loss: "KL(softmax(t(x+d) - t(x-d)) || softmax(s(x+d) - s(x-d)))",
        robust_kd.iad_loss: "w tau^2 KL(T(x) || S(x')) + (1-w) KL(S(x) || S(x'))",
        robust_kd.rectify_labels: "lam_i P + (1-lam_i) y",
        robust_kd.mart_loss: "CE(S(x'), y) - log(1.0001 - max",
        robust_kd.perturb_weights: "w + gamma ||w|| g / ||g||",
    }
    for loss, equation in equations.items():
        assert loss.__doc__.startswith(equation)


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
        ("adaad+", {"alpha": 0.0}, "at", {}),
    ],
)
def test_limits_in_which_two_losses_are_one(name, settings, other, other_settings):
    for a, b in zip(gradients(name, **settings), gradients(other, **other_settings)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TAUGHT)
def test_no_gradient_reaches_the_teacher(name):
    logits = {key: tensor.clone().requires_grad_() for key, tensor in LOGITS.items()}
    value(name, **logits).backward()
    assert all(tensor.grad is None for name, tensor in logits.items() if "student" not in name)


@pytest.mark.parametrize("name", robust_kd.LOSSES)
def test_the_gradient_is_that_of_the_equation(name):
    """Central differences of the equation; what is a constant there has no gradient here."""
    logits = {key: tensor.double().requires_grad_() for key, tensor in LOGITS.items()}
    value(name, **logits).backward()
    for key in ("student_logits", "student_adv_logits", "student_mirrored_logits"):
        found = logits[key].grad
        for i, k in ((0, 1), (2, 0), (4, 3)):
            sides = []
            for step in (1e-4, -1e-4):
                moved = {key: tensor.detach().double().clone() for key, tensor in LOGITS.items()}
                moved[key][i, k] += step
                sides.append(by_hand(name, 0.3, 0.6, 1.0, logits=moved))
            expected = (sides[0] - sides[1]) / 2e-4
            assert (0.0 if found is None else found[i, k].item()) == pytest.approx(
                expected, rel=1e-3, abs=1e-6
            )


def test_igdm_is_zero_for_equal_nets_and_does_not_see_a_constant_on_all_logits():
    near, far = LOGITS["student_adv_logits"], LOGITS["student_mirrored_logits"]
    assert robust_kd.igdm_loss(near, far, near, far).item() == pytest.approx(0, abs=1e-6)
    teacher = LOGITS["teacher_adv_logits"], LOGITS["teacher_mirrored_logits"]
    moved = robust_kd.igdm_loss(near + 3, far - 1, *teacher)
    torch.testing.assert_close(moved, robust_kd.igdm_loss(near, far, *teacher))


def test_iad_trusts_a_teacher_that_is_sure_of_the_label_and_else_the_student():
    s, s_adv, t, *_ = LOGITS.values()
    targets = robust_kd.mix_labels(t, LABELS)
    sure = 60.0 * F.one_hot(LABELS, CLASSES)
    for teacher_adv_logits, beta, expected in (
        (sure, 0.1, targets),
        (-2 * sure, 1.0, s.softmax(1)),
        (-sure, 0.0, targets),  # before its start
    ):
        trust = robust_kd.teacher_trust(teacher_adv_logits, LABELS, beta)
        found = robust_kd.iad_loss(s, s_adv, targets, trust)
        torch.testing.assert_close(found, robust_kd.kl(expected, s_adv))


def test_rectified_labels_are_labels_without_weight_and_where_the_average_is_right_and_sure():
    average = LOGITS["average_logits"]
    labels = F.one_hot(LABELS, CLASSES).float()
    assert torch.equal(robust_kd.rectify_labels(average, LABELS, 0.0, 2.0), labels)
    sure = 200.0 * labels
    torch.testing.assert_close(robust_kd.rectify_labels(sure, LABELS, 1.0, 2.0), labels)
    # sure of another class: lam_i is clipped at 0, and the label stays
    wrong = sure.roll(1, dims=1)
    torch.testing.assert_close(robust_kd.rectify_labels(wrong, LABELS, 0.9, 2.0), labels)
    mended = robust_kd.rectify_labels(average, LABELS, 0.95, 2.0)
    torch.testing.assert_close(mended.sum(1), torch.ones(BATCH))


def test_mart_weighs_what_is_wrong_and_stays_finite_for_a_certain_wrong_class():
    labels = torch.tensor([0])
    right, wrong = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 50.0, 0.0]])
    # clean and right: only the boosted term is left, CE 50 and -log(1.0001 - 1)
    found = robust_kd.mart_loss(right, wrong, labels, 5.0).item()
    assert found == pytest.approx(50 - math.log(0.0001), rel=1e-3)
    assert robust_kd.mart_loss(right, right, labels, 5.0).item() == pytest.approx(-1e-4, abs=1e-5)


def test_the_ramp_of_adr_is_half_a_cosine():
    values = [robust_kd.half_cosine((2.5, 2.0), done) for done in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([2.5, 2.0 + 0.5 * (0.5 + 0.5 * 0.5**0.5), 2.25, 2.0])
    assert robust_kd.half_cosine((0.7, 0.95), 0.5) == pytest.approx(0.825)


def test_adaad_attacks_the_kl_through_both_nets_and_not_the_cross_entropy():
    """The gradient of sum p log(p / q) by x', written out, against one step of the attack."""
    torch.manual_seed(0)
    student, teacher = common.build_model("mlp-8").eval(), common.build_model("mlp-8").eval()
    x = 0.3 + 0.4 * torch.rand(6, 3, 32, 32)
    step = 0.5 / 255

    def direction(loss):
        x_adv = x.clone().requires_grad_()
        q, p = student(x_adv).softmax(1), teacher(x_adv).softmax(1)
        (gradient,) = torch.autograd.grad(loss(p, q), x_adv)
        return gradient.sign()

    x_adv = common.pgd(student, x, teacher, 8 / 255, step, 1, "none")
    moved = ((x_adv - x) / step).round()
    kl = direction(lambda p, q: (p * (p / q).log()).sum())
    assert (moved == kl).float().mean() > 0.999
    for other in (
        lambda p, q: -(p * q.log()).sum(),  # cross-entropy, through both
        lambda p, q: (p.detach() * (p.detach() / q).log()).sum(),  # through the student alone
    ):
        assert (moved == direction(other)).float().mean() < 0.99
    # and the attack of ten steps reaches more of it than one on fixed targets
    reached = [
        robust_kd.kl(teacher(adv).softmax(1), student(adv)).item()
        for adv in (
            common.pgd(student, x, teacher, 8 / 255, 2 / 255, 10, "none"),
            common.pgd(student, x, teacher(x).softmax(1).detach(), 8 / 255, 2 / 255, 10, "none"),
        )
    ]
    assert reached[0] > reached[1] > 0
    assert all(weight.grad is None for net in (student, teacher) for weight in net.parameters())


def test_awp_climbs_by_its_radius_and_leaves_biases():
    model = common.build_model("wrn-10-1")
    F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    moved = robust_kd.perturb_weights(model, 0.01)
    for name, weights in model.named_parameters():
        step, gradient = weights - before[name], weights.grad
        if weights.dim() < 2:
            assert torch.equal(weights, before[name])
            continue
        expected = 0.01 * before[name].norm() * gradient / gradient.norm()
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)
        assert step.norm().item() == pytest.approx(0.01 * before[name].norm().item(), rel=1e-3)
    kept = {id(weights): old for weights, old in moved}
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            assert torch.equal(kept[id(weights)], before[name])


def test_a_student_equal_to_its_teacher_has_no_kl():
    teacher = LOGITS["teacher_logits"]
    found = value("rslad", student_logits=teacher, student_adv_logits=teacher)
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_the_kl_does_not_depend_on_classes_that_nobody_believes_in():
    targets, student = LOGITS["teacher_logits"].softmax(1), LOGITS["student_logits"]
    wide_targets, wide_student = F.pad(targets, (0, 96)), F.pad(student, (0, 96), value=-1e4)
    narrow, wide = robust_kd.kl(targets, student), robust_kd.kl(wide_targets, wide_student)
    assert wide.item() == pytest.approx(narrow.item())


def test_mixed_targets_are_probabilities():
    targets = robust_kd.mix_labels(LOGITS["teacher_logits"], LABELS, 0.3, 2.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))
    assert (targets[torch.arange(BATCH), LABELS] >= 0.7).all()
    teacher_probs = LOGITS["teacher_logits"].softmax(1)
    torch.testing.assert_close(
        robust_kd.mix_labels(LOGITS["teacher_logits"], LABELS), teacher_probs
    )


# ------------------------------------------------------------------------------------------------
# Ensembles and the flags of a teacher


def test_an_ensemble_averages_probabilities_by_its_weights():
    models = [common.build_model("mlp-8", 5, size=4).eval() for _ in range(3)]
    x, weights = torch.rand(7, 3, 4, 4), [0.2, 0.0, 0.8]
    probs = [model(x).softmax(1) for model in models]
    weighted = robust_kd.Ensemble(models, weights)(x)
    torch.testing.assert_close(weighted.exp(), 0.2 * probs[0] + 0.8 * probs[2])
    torch.testing.assert_close(robust_kd.Ensemble(models)(x).exp(), sum(probs) / 3)


def flags_of_teacher(flags, training=None, number=0):
    """teacher_args of a command; training: default the first word of --teacher-training."""
    args = parse(flags)
    args = common.replace(args, seed=args.seed[0])
    return robust_kd.teacher_args(args, training or args.teacher_training[0], number)


def test_teachers_of_an_ensemble_differ_by_seed_and_training_alone():
    teachers = [vars(flags_of_teacher("--seed 2", "at", number)) for number in range(3)]
    assert [teacher["seed"] for teacher in teachers] == [2, 102, 202]
    assert teachers[0] | {"seed": 0} == teachers[1] | {"seed": 0} == teachers[2] | {"seed": 0}
    ffgsm, trades, at = (
        flags_of_teacher("--teacher-eps 4/255", training) for training in ("ffgsm", "trades", "at")
    )
    assert (ffgsm.steps, ffgsm.step_size) == (1, pytest.approx(5 / 255))
    assert (trades.steps, trades.step_size) == (2, pytest.approx(1 / 255))
    assert [t.loss for t in (ffgsm, trades, at)] == ["ffgsm", "trades", "at"]
    assert [t.attack_loss for t in (ffgsm, trades, at)] == ["ce", "kl-self", "ce"]


def test_a_flag_without_effect_on_a_teacher_is_none():
    def without_effect(flags):
        return {flag for flag, value in vars(flags_of_teacher(flags)).items() if value is None}

    # no default, or the student's alone
    never = {flag for flag in vars(parse()) if flag.startswith("teacher_")}
    never |= {"alpha", "lam", "temperature", "beta", "recipe", "awp", "igdm_weight", "iad_beta"}
    never |= {"adr_lam", "adr_temperature", "mart_beta"}
    never |= {"extra_data", "save_every", "compile", "augment"}
    of_schedule, of_mix = {"schedule_epochs"}, {"extra_fraction"}
    paper, cosine = never - {"teacher_gamma"} | of_schedule, never
    of_attack = {"eps", "steps", "step_size", "attack_loss", "attack_bn"}
    assert without_effect("--teacher-training trades") == paper | of_mix
    assert without_effect("--teacher-training at") == paper | of_mix | {"trades_beta"}
    assert without_effect("--teacher-training ffgsm") == paper | of_mix | {"trades_beta"}
    assert without_effect("--teacher-training st") == paper | of_mix | {"trades_beta"} | of_attack
    assert without_effect("--teacher-training trades --schedule cosine") == cosine | of_mix
    found = without_effect("--teacher-training trades --extra-data e.npz")
    assert found == paper - {"extra_data"}


@pytest.mark.parametrize(
    "flags, other, equal",
    [
        ("--teacher-training st", "--teacher-training st --eps 4/255 --steps 3", True),
        ("--teacher-training st", "--teacher-training st --attack-bn train", True),
        ("", "--step-size 2/255 --trades-beta 1 --loss trades", True),
        ("", "--loss rslad+ --lam 0.5 --alpha 0.3 --temperature 2 --attack-loss ce", True),
        ("", "--loss igdm+ --igdm-weight 2 --awp 0.01", True),
        ("", "--loss iad --iad-beta 0.5 --attack-loss kl-teacher-adv", True),
        ("", "--epochs 3 --lr 0.5 --batch-size 8", True),
        ("--teacher-eps 2/255", "--teacher-eps 2/255 --eps 4/255", True),
        ("--eps 8/255 --step-size 2/255", "--teacher-eps 8/255", True),
        *(  # eps * step / eps is not always the step
            (f"--eps {k}/255", f"--eps {k}/255 --teacher-eps {k}/255", True) for k in (3, 6, 12)
        ),
        ("--teacher-training ffgsm", "--teacher-training ffgsm --loss rslad", True),
        ("--teacher-training ffgsm", "--teacher-training ffgsm --steps 9", True),
        ("", "--teacher-es 2", True),
        ("--teacher-es 1", "--teacher-es 1 --teacher-epochs 9", True),
        ("--model mlp-4 --teacher-model mlp-8", "", True),
        ("", "--test-subset 10 --name other --save-every 1 --compile", True),
        ("--augment none", "--augment none --extra-fraction 0.2 --extra-data e.npz", False),
        ("", "--teacher-eps 2/255", False),
        ("", "--attack-bn train", False),
        ("", "--seed 1", False),
        ("", "--steps 1", False),
        ("", "--step-size 4/255", False),
        ("", "--teacher-es 1", False),
        ("", "--teacher-lr 0.2", False),
        ("", "--teacher-gamma 0.8", False),
        ("", "--teacher-batch-size 8", False),
        ("", "--teacher-model mlp-9", False),
        ("", "--teacher-training ffgsm", False),
        ("--teacher-training trades", "--teacher-training trades --trades-beta 1", False),
        ("", "--precision fp32", False),
        ("", "--deterministic", False),
        ("", "--weight-decay 0", False),
        ("", "--nesterov", False),
        ("", "--no-decay-norms", False),
        ("", "--ema 0.9", False),
        ("", "--label-smoothing 0.1", False),
        ("", "--augment none", False),
        ("", "--augment cutout", False),
        ("--augment cutmix", "--augment cutout", False),
        ("", "--val-size 10", False),
        ("", "--train-subset 30", False),
        ("--recipe at+ --teacher-es 1", "--recipe at+ --teacher-es 2", False),
        ("--schedule cosine --teacher-es 1", "--schedule cosine --teacher-epochs 1", False),
    ],
)
def test_two_runs_share_a_teacher_if_nothing_differs_that_it_depends_on(
    flags, other, equal, tmp_path
):
    folders = set()
    for command in (flags, other):
        args = parse(f"{command} --runs {tmp_path}")
        data = common.load_training_data(args, "cpu")
        folders.add(common.teacher_folder(flags_of_teacher(f"{command} --runs {tmp_path}"), data))
    assert (len(folders) == 1) == equal


def test_the_step_is_a_quarter_of_the_radius_and_scales_with_it():
    assert parse().step_size == pytest.approx(2 / 255)
    assert parse("--eps 2/255").step_size == pytest.approx(0.5 / 255)
    assert parse("--step-size 4/255 --eps 0").step_size == pytest.approx(4 / 255)
    assert flags_of_teacher("--teacher-eps 2/255").step_size == pytest.approx(0.5 / 255)
    flags = "--step-size 4/255 --teacher-eps"
    assert flags_of_teacher(f"{flags} 8/255").step_size == pytest.approx(4 / 255)
    assert flags_of_teacher(f"{flags} 2/255").step_size == pytest.approx(1 / 255)
    assert flags_of_teacher("--teacher-eps 2/255 --eps 0").step_size == pytest.approx(0.5 / 255)


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
    assert "--recipe at+ sets --model wrn-28-10-silu, --teacher-epochs 400, " in out
    assert ", --nesterov, --no-decay-norms, " in out
    assert (args.model, args.epochs, args.teacher_epochs) == ("wrn-28-10-silu", 7, 400)
    assert (args.schedule, args.ema, args.steps, args.step_size) == ("cosine", 0.995, 10, 2 / 255)
    assert args.nesterov and not args.decay_norms
    assert "recipe=at" in args.name and robust_kd.parse_args([]).schedule == "paper"


@pytest.mark.parametrize(
    "flags, message",
    {
        "--loss akd++": "--loss",
        "--teacher-model wrn-9-1": "--teacher-model",
        "--teacher-es 0": "--teacher-es",
        "--teacher-es 101": "--teacher-es 101: --teacher-epochs is only 100",
        "--teacher-training none": "--teacher-training: invalid choice: 'none'",
        "--teacher-training ffgsm --teacher-ckpt a.pt": "--teacher-training: the teacher of",
        "--loss at --teacher-ckpt a.pt": "--teacher-ckpt: --loss at has no teacher",
        "--schedule cosine --teacher-gamma 0.9": "--teacher-gamma: has no effect with --schedule",
        "--teacher-training st at --beta 0.5 0.6": "--beta: expected a weight for each word",
        "--teacher-training st at --beta 1": "with sum 1, got 1.0",
        "--teacher-training st at --beta 0.5 0.25 0.25": "--beta",
        "--beta 0.5": "--beta: has no effect without several teachers",
        "--beta 1": "--beta: has no effect without several teachers",
        "--loss at --beta 1": "--beta: has no effect without several teachers",
        "--loss at --teacher-training st at --beta 0.5 0.5": "--beta: has no effect without",
        "--teacher-ckpt t.pt --beta 1": "--beta: has no effect without several teachers",
        "--loss ckd --attack-loss ce": "--attack-loss: has no effect with --loss ckd",
        "--loss rslad --alpha 0.3": "--alpha: has no effect with --loss rslad",
        "--loss akd+ --lam=0.3": "--lam: has no effect with --loss akd+",
        "--loss trades --temperature 2": "--temperature: has no effect with --loss trades",
        "--trades-beta 1": "--trades-beta: has no effect without",
        "--extra-fraction 0.5": "--extra-fraction: has no effect without --extra-data",
        "--save-every 0": "--save-every: ",
        "--loss adr --ema 0": "--ema 0: --loss adr rectifies its labels by the weight average",
        "--loss adaad --alpha 0.5": "--alpha: has no effect with --loss adaad",
        "--loss iad --lam 0.5": "--lam: has no effect with --loss iad",
        "--loss akd --igdm-weight 2": "--igdm-weight: has no effect with --loss akd",
        "--loss at --iad-beta 0.2": "--iad-beta: has no effect with --loss at",
        "--loss at --adr-lam 0.5 0.6": "--adr-lam: has no effect with --loss at",
        "--loss at --adr-temperature 2 2": "--adr-temperature: has no effect with --loss at",
        "--loss trades --mart-beta 5": "--mart-beta: has no effect with --loss trades",
        "--loss ckd --attack-loss kl-teacher-adv": "--attack-loss: has no effect with --loss ckd",
        "--loss adr --adr-lam 0.5": "--adr-lam: expected 2 arguments",
        "--loss adr --adr-lam 0.5 1.5": "--adr-lam: ",
        "--awp -1": "--awp: ",
    }.items(),
)
def test_flags_that_make_no_sense_are_refused_by_name(flags, message, refused):
    assert message in refused(robust_kd.parse_args, flags.split())


def test_settings_of_a_teacher_that_is_not_trained_are_said(capsys):
    said = "no teacher is trained here, so without effect: --teacher-es, --teacher-lr\n"
    settings = ["--teacher-es", "4", "--teacher-lr", "0.1"]
    robust_kd.parse_args(["--loss", "at", *settings])
    assert capsys.readouterr().out == said
    robust_kd.parse_args(["--loss", "at", "--teacher-model", "mlp-8"])
    out = capsys.readouterr().out
    assert out == "no teacher is trained here, so without effect: --teacher-model\n"
    settings += ["--teacher-model", "mlp-8"]
    for flags in (["--loss", "at", "--attack-loss", "kl-teacher"], ["--loss", "akd"]):
        robust_kd.parse_args([*flags, *settings])
        assert capsys.readouterr().out == ""
    robust_kd.parse_args(["--teacher-ckpt", "t.pt", "--teacher-eps", "2/255", *settings])
    assert capsys.readouterr().out == said.replace("--teacher-es", "--teacher-eps, --teacher-es")


@pytest.mark.parametrize(
    "flags, said",
    {
        "--loss st": "(st): --steps, --step-size, --attack-bn",
        "--loss st --demo": "(st): --steps, --step-size, --attack-bn",
        "--loss ckd --teacher-training st": "(ckd, st): --steps, --step-size, --attack-bn",
        "--loss ckd --teacher-ckpt t.pt": "(ckd): --steps, --step-size, --attack-bn",
        "--loss ckd --teacher-training ffgsm": "(ckd, ffgsm): --steps, --step-size",
        "--loss ckd": None,
        "--loss ckd --teacher-training st trades": None,
        "--loss at": None,
    }.items(),
)
def test_settings_of_an_attack_that_nobody_learns_under_are_said(flags, said, capsys):
    attack = ["--steps", "9", "--step-size", "1/255", "--attack-bn", "train"]
    robust_kd.parse_args([*flags.split(), *attack])
    lines = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert lines == ([f"without effect on all that is trained here {said}"] if said else [])


def test_weights_of_an_ensemble_are_taken_as_they_are_given():
    mixed = "--teacher-training st at ffgsm --beta"
    assert parse(f"{mixed} 1/2 1/2 0").beta == [0.5, 0.5, 0.0]
    assert parse("--teacher-training at at").beta is None


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
    """A net that notes the mode it is in and the images it is shown."""

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
        ("adaad", ["x_adv"], ["x_adv"], "kl-teacher-adv"),
        ("adaad+", ["x_adv"], ["x_adv"], "kl-teacher-adv"),
        ("igdm", ["x_adv", "x_mirrored"], ["x_adv", "x_mirrored"], "kl-teacher-adv"),
        ("igdm+", ["x_adv", "x_mirrored"], ["x_adv", "x_mirrored"], "kl-teacher-adv"),
        ("iad", ["x_adv", "x"], ["x", "x_adv"], "ce"),
        ("iad --attack-loss kl-teacher-adv", ["x_adv", "x"], ["x_adv"], "kl-teacher-adv"),
        ("adr", ["x_adv"], [], "ce"),
        ("mart", ["x_adv", "x"], [], "ce"),
    ],
)
def test_student_and_teacher_see_what_the_equation_says_in_the_right_mode(
    loss, student_sees, teacher_sees, attack_loss, tmp_path, monkeypatch
):
    flags = f"--loss {loss} --epochs 1"
    loss = loss.split()[0]
    if loss in TAUGHT:
        flags += " --temperature 3"
    args = common.replace(parse(flags), seed=0)
    data = common.load_data("shapes", train_subset=16)
    ((x, labels),) = common.batches(data, 16, 0, "student", 0)
    student, teacher, attacks, losses = Spied(), Spied().eval().requires_grad_(False), [], []
    untrained = copy.deepcopy(student.net).eval()
    teacher_before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    pgd, step_sums = common.pgd, common.step_sums

    def spied_pgd(model, x, targets, *settings):
        seen = len(model.seen)
        x_adv = pgd(model, x, targets, *settings)
        if targets is teacher:
            assert [mode for mode, _ in teacher.seen] == [False] * args.steps
            teacher.seen.clear()
        assert [mode for mode, _ in model.seen[seen:]] == [False] * args.steps
        del model.seen[seen:]
        attacks.append((x, targets, settings, x_adv))
        return x_adv

    def spied_sums(loss, *more):
        losses.append(loss.item())
        return step_sums(loss, *more)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    monkeypatch.setattr(common, "step_sums", spied_sums)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    monkeypatch.setattr(common, "load_model", lambda *_: student)
    robust_kd.train(args, data, tmp_path, "student", teacher)

    shown = {"x": x, "x_adv": x}
    assert len(attacks) == (attack_loss is not None)
    if attack_loss is not None:
        attacked, targets, settings, shown["x_adv"] = attacks[0]
        shown["x_mirrored"] = 2 * x - shown["x_adv"]
        assert torch.equal(attacked, x)
        if loss == "adr":
            mended = robust_kd.rectify_labels(untrained(x), labels, 0.7, 2.5)
            torch.testing.assert_close(targets, mended)
        elif attack_loss == "ce":
            assert torch.equal(targets, labels)
        elif attack_loss == "kl-teacher-adv":
            assert targets is teacher
        elif attack_loss == "kl-teacher":
            torch.testing.assert_close(targets, teacher.net(x).softmax(1))
        else:
            torch.testing.assert_close(targets, untrained(x).softmax(1))
            assert student.seen.pop(0)[0] is False  # its own answer for x, before the attack
        start = "uniform" if attack_loss == "ce" else "gaussian"
        assert settings == (args.eps, args.eps / 4, 2, start)
    if attack_loss == "kl-teacher":
        assert teacher_sees == ["x"]
    for net, names, training in ((student, student_sees, True), (teacher, teacher_sees, False)):
        assert [mode for mode, _ in net.seen] == [training] * len(names)
        for (_, image), name in zip(net.seen, names):
            assert torch.equal(image, shown[name])
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())

    expected = by_hand_of_nets(loss, args, x, shown["x_adv"], labels, untrained, teacher.net)
    assert losses == [pytest.approx(expected, rel=1e-5)]


def by_hand_of_nets(
    loss, args, x, x_adv, labels, student, teacher, igdm=0.0, beta=0.0, adr=(0.7, 2.5)
):
    """The loss of a batch for a student that has not learned yet, whose average is itself."""
    logits = {"s": student(x), "s_adv": student(x_adv), "t": teacher(x), "t_adv": teacher(x_adv)}
    if args.attack_loss == "kl-teacher-adv" and loss == "iad":  # AdaIAD
        logits["t"] = logits["t_adv"]
    logits |= {"s_far": student(2 * x - x_adv), "t_far": teacher(2 * x - x_adv)}
    logits["average"] = student(x)
    return by_hand(loss, 5 / 6, 0.8, args.temperature, labels, logits, igdm, beta, *adr)


def losses_by_step(flags, epochs, tmp_path, monkeypatch, train_subset=16):
    """-> (losses of a student that does not learn, those by hand for each step(step) of them).

    16 images are one step.
    """
    args = common.replace(parse(f"{flags} --epochs {epochs} --lr 1e-30 --weight-decay 0"), seed=0)
    data = common.load_data("shapes", train_subset=train_subset)
    student, teacher = Spied(), Spied().eval().requires_grad_(False)
    untrained, losses, batches = copy.deepcopy(student.net).eval(), [], []
    pgd, step_sums = common.pgd, common.step_sums

    def spied_pgd(model, x, *more):
        batches.append((x, pgd(model, x, *more)))
        return batches[-1][1]

    def spied_sums(loss, logits, labels):
        losses.append(loss.item())
        batches[-1] += (labels,)
        return step_sums(loss, logits, labels)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    monkeypatch.setattr(common, "step_sums", spied_sums)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    monkeypatch.setattr(common, "load_model", lambda *_: student)
    robust_kd.train(args, data, tmp_path, "student", teacher)

    def expected(epoch, **weights):
        nets = untrained, teacher.net
        return by_hand_of_nets(args.loss, args, *batches[epoch], *nets, **weights)

    return losses, expected


def test_the_weight_of_igdm_rises_with_the_epochs(tmp_path, monkeypatch):
    flags = "--loss igdm --igdm-weight 3"
    losses, expected = losses_by_step(flags, 4, tmp_path, monkeypatch)
    by_epoch = [expected(epoch, igdm=3 * epoch / 4) for epoch in range(4)]
    assert losses == pytest.approx(by_epoch, rel=1e-5)


def test_weight_and_temperature_of_adr_go_along_half_a_cosine(tmp_path, monkeypatch):
    flags = "--loss adr --adr-lam 0.2 0.8 --adr-temperature 3 1"
    losses, expected = losses_by_step(flags, 3, tmp_path, monkeypatch, train_subset=32)
    by_step = []
    for step in range(6):  # two in each epoch
        rise = 0.5 - 0.5 * math.cos(math.pi * step / 6)
        by_step.append(expected(step, adr=(0.2 + 0.6 * rise, 3 - 2 * rise)))
    assert losses == pytest.approx(by_step, rel=1e-5)


@pytest.mark.parametrize("attack_loss", ["ce", "kl-teacher-adv"])
def test_iad_trusts_its_teacher_alone_for_the_first_three_tenths(
    attack_loss, tmp_path, monkeypatch
):
    flags = f"--loss iad --iad-beta 0.5 --attack-loss {attack_loss}"
    losses, expected = losses_by_step(flags, 10, tmp_path, monkeypatch)
    by_epoch = [expected(epoch, beta=0.0 if epoch < 3 else 0.5) for epoch in range(10)]
    assert losses == pytest.approx(by_epoch, rel=1e-5)


def test_with_awp_the_gradient_is_taken_above_and_the_step_made_from_below(tmp_path, monkeypatch):
    """Two steps with momentum, from w with the gradient at w + v, by another loop."""
    flags = "--loss at --awp 0.02 --epochs 2 --val-size 0 --steps 1"
    args = common.replace(parse(flags), seed=0)
    data = common.load_data("shapes", train_subset=16, val_size=0)
    student, seen = common.build_model("mlp-8"), []
    other = copy.deepcopy(student)
    pgd = common.pgd

    def spied_pgd(*settings):
        seen.append(pgd(*settings))
        return seen[-1]

    monkeypatch.setattr(common, "pgd", spied_pgd)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    robust_kd.train(args, data, tmp_path, "student")
    optimizer, schedule = robust_kd.make_optimizer(other, args, 1)
    for epoch, x_adv in enumerate(seen):
        ((_, labels),) = common.batches(data, 16, 0, "student", epoch)
        above = copy.deepcopy(other)
        F.cross_entropy(above(x_adv), labels).backward()
        for weights in above.parameters():
            if weights.dim() > 1:
                weights.data += 0.02 * weights.norm() / weights.grad.norm() * weights.grad
        loss = F.cross_entropy(above(x_adv), labels)
        gradients = torch.autograd.grad(loss, list(above.parameters()))
        for weights, gradient in zip(other.parameters(), gradients):
            weights.grad = gradient
        optimizer.step()
        schedule.step()
    for weights, expected in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-7)


def test_both_passes_of_awp_feed_batchnorm(tmp_path):
    counts = []
    for awp in (0, 0.01):
        flags = f"--loss at --awp {awp} --epochs 1 --val-size 0 --steps 1 --model wrn-10-1"
        args = common.replace(parse(flags), seed=0)
        data = common.load_data("shapes", train_subset=32, val_size=0)
        (tmp_path / str(awp)).mkdir()
        net = robust_kd.train(args, data, tmp_path / str(awp), "student")
        counts.append({int(v) for k, v in net.state_dict().items() if "num_batches" in k})
    assert counts == [{2}, {4}]


LATER = [
    "--loss igdm+ --attack-loss ce",
    "--loss iad --attack-loss kl-teacher-adv",
    "--loss adr --adr-lam 0.2 0.9",
    "--loss mart --awp 0.01 --model wrn-10-1 --train-subset 16",
    "--loss adaad+ --awp 0.01 --teacher-training at at",
]


@pytest.mark.parametrize("flags", LATER)
def test_later_methods_go_on_with_the_same_bits(flags, tmp_path, stop_at):
    flags = f"{TINY} {flags} --epochs 4 --teacher-epochs 1 --val-size 4 --name x --runs"
    robust_kd.main(f"{flags} {tmp_path}/whole".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/stopped", "student", 2)
    robust_kd.main(f"{flags} {tmp_path}/stopped".split())
    nets = [tmp_path / name / "robust_kd/x-s0/student.pt" for name in ("whole", "stopped")]
    assert same_weights(*nets)


def test_adr_takes_a_weight_average_of_its_own(tmp_path):
    assert parse("--loss adr").ema == 0.995 and parse("--loss adr --ema 0.9").ema == 0.9
    assert parse("--loss at").ema == 0
    assert parse("--loss adr --recipe at+ --extra-data e.npz").ema == 0.995


@pytest.mark.parametrize(
    "flags, warned",
    [
        ("--loss akd --teacher-training st", True),
        ("--loss adaad --teacher-training st st", True),
        ("--loss igdm+ --alpha 1 --teacher-training st", True),
        ("--loss adaad+ --alpha 0.3 --teacher-training st", False),
        ("--loss adaad --teacher-training st at", False),
        ("--loss rslad --teacher-training st", False),
    ],
)
def test_a_standard_teacher_that_is_all_that_is_learned_at_x_adv_is_warned_of(
    flags, warned, tmp_path, capsys
):
    run(tmp_path, f"{flags} --epochs 1 --teacher-epochs 1 --test-subset 4 --val-size 0")
    assert ("warning: the student will not be robust" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("loss", ["st", "akd+"])
def test_awp_of_radius_0_is_none(loss, tmp_path):
    nets = []
    for name, flags in (("without", ""), ("zero", "--awp 0"), ("some", "--awp 0.01")):
        run(tmp_path, f"--loss {loss} {flags} --model wrn-10-1 --train-subset 16 --name {name}")
        nets.append(tmp_path / f"robust_kd/{name}-s0/student.pt")
    assert same_weights(nets[0], nets[1]) and not same_weights(nets[0], nets[2])


@pytest.mark.parametrize("training", ["at", "ffgsm", "trades"])
def test_a_teacher_is_attacked_in_eval_mode_at_its_own_radius(training, tmp_path, monkeypatch):
    attacks, pgd = [], common.pgd

    def spied_pgd(model, x, targets, *settings):
        attacks.append((model.training, targets.is_floating_point(), *settings[:3]))
        return pgd(model, x, targets, *settings)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    data = common.load_data("shapes", train_subset=40)
    args = flags_of_teacher("--teacher-eps 2/255", training)
    robust_kd.train(args, data, tmp_path, "teacher")
    eps = pytest.approx(2 / 255)
    step_size, steps = pytest.approx(0.5 / 255), 2
    if training == "ffgsm":
        step_size, steps = pytest.approx(2.5 / 255), 1
    # two epochs of three batches
    assert attacks == [(False, training == "trades", eps, step_size, steps)] * 6


def test_batchnorm_is_in_training_mode_in_the_attack_if_asked(tmp_path, monkeypatch):
    modes, pgd = [], common.pgd

    def spied_pgd(model, *settings):
        modes.append(model.training)
        return pgd(model, *settings)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    data = common.load_data("shapes", train_subset=16)
    args = common.replace(parse("--loss at --attack-bn train --epochs 1"), seed=0)
    robust_kd.train(args, data, tmp_path, "student")
    assert modes == [True]


def test_nets_are_validated_with_seven_steps_in_the_radius_of_their_own_training(
    tmp_path, monkeypatch
):
    attacks, pgd = [], common.pgd

    def spied_pgd(model, x, targets, *settings):
        if len(x) == 14 and len(settings) == 3:  # the held-out images
            attacks.append(settings)
        return pgd(model, x, targets, *settings)

    monkeypatch.setattr(common, "pgd", spied_pgd)
    flags = "--teacher-training st ffgsm --teacher-eps 2/255 --step-size 3/255 --loss ckd"
    run(
        tmp_path, f"{flags} --eps 4/255 --epochs 1 --teacher-epochs 1 --test-subset 8 --val-size 14"
    )
    of_teacher, of_student = ((eps / 255, eps / 255 / 4, 7) for eps in (2, 4))
    assert attacks == [pytest.approx(of_teacher), pytest.approx(of_student)]
    columns = set()
    for log in sorted(tmp_path.rglob("log.jsonl")):
        for line in log.read_text().splitlines():
            row = json.loads(line)
            columns.add((row["stage"], *sorted(key for key in row if key.startswith("val_"))))
    both = ("val_clean_acc", "val_pgd7_acc")
    assert columns == {("teacher", "val_clean_acc"), ("teacher", *both), ("student", *both)}


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


def test_the_cosine_of_an_early_stopped_teacher_is_that_of_a_whole_one():
    args = robust_kd.parse_args("--recipe at+ --teacher-es 100".split())
    args = robust_kd.teacher_args(common.replace(args, seed=0), "at")
    assert (args.epochs, args.schedule_epochs) == (100, 400)
    optimizer, schedule = robust_kd.make_optimizer(nn.Linear(1, 1), args, 1)
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
    args = parse("--no-decay-norms --weight-decay 0.5 --loss st")
    optimizer, _ = robust_kd.make_optimizer(net, args, 10)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    still = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    norms = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and norms <= still and not any("conv" in name for name in still)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    own = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4))
    decayed, norms = robust_kd.make_optimizer(own, args, 10)[0].param_groups
    assert len(decayed["params"]) == 2 and len(norms["params"]) == 6


def test_nesterov_is_for_both_nets_if_asked():
    for flags, expected in (("", False), ("--nesterov", True), ("--no-nesterov", False)):
        for args in (parse(flags), flags_of_teacher(flags)):
            optimizer, _ = robust_kd.make_optimizer(nn.Linear(1, 1), args, 10)
            assert optimizer.param_groups[0]["nesterov"] is expected


@pytest.mark.parametrize(
    "flags, modes",
    [
        ("", []),
        ("--compile", ["default"] * 3),  # teacher in its training, as it teaches, and student
        ("--compile max-autotune --teacher-ckpt given.pt", ["max-autotune"] * 2),
    ],
)
def test_teacher_and_student_are_compiled_in_the_mode_that_is_given(
    flags, modes, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net, **options: compiled.append(options))
    monkeypatch.chdir(tmp_path)
    common.save_model("given.pt", common.build_model("mlp-8"))
    flags += " --loss akd --epochs 1 --teacher-epochs 1 --val-size 0 --test-subset 4"
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        run(tmp_path, flags)
    assert compiled == [{"mode": mode, "dynamic": False} for mode in modes]


# ------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize(
    "variant",
    [
        "--loss rslad+ --attack-loss ce",
        "--loss akd+ --attack-loss kl-teacher --temperature 2 --precision fp32",
        "--model wrn-10-1 --loss ard+ --attack-bn train --batch-size 32",
        "--model resnet18-w4 --loss at --nesterov --no-decay-norms --ema 0.9 --train-subset 16",
        "--teacher-eps 2/255 --teacher-model mlp-12 --val-size 0",
        "--loss at --deterministic",
        "--teacher-training st at --beta 0.75 0.25 --save-every 1",
    ],
)
def test_variants_run_and_end_in_finite_numbers(variant, tmp_path):
    flags = f"{variant} --epochs 1 --teacher-epochs 1 --test-subset 8"
    rows = run(tmp_path, flags if "--val-size" in variant else f"--val-size 8 {flags}")
    torch.use_deterministic_algorithms(False)
    for row in rows:
        accuracies = [number for key, number in row.items() if key.endswith("_acc")]
        assert len(accuracies) == 3 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    for log in tmp_path.rglob("log.jsonl"):
        for line in log.read_text().splitlines():
            assert 0 < json.loads(line)["loss"] < 1e4


def test_a_short_standard_training_beats_chance_and_pgd_hurts_it(tmp_path):
    flags = "--model wrn-10-1 --loss st --epochs 4 --batch-size 16 --lr 0.1"
    data = common.load_data("shapes", train_subset=600, test_subset=100)
    net = robust_kd.train(common.replace(parse(flags), seed=0), data, tmp_path, "student")
    x, y = data.x_test, data.y_test
    clean = common.accuracy(common.predict(net, x), y)
    attacked = common.accuracy(common.predict(net, x, y, (8 / 255, 2 / 255, 5)), y)
    assert clean > 0.5 and attacked < clean - 0.25


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
    rows = run(tmp_path, f"--loss ard --teacher-ckpt {path}")
    assert rows[0]["model"] == "teacher (st)" and path.read_bytes() == before
    assert str(path) in capsys.readouterr().out and not (tmp_path / "teachers").exists()
    assert {stage for stage, _ in log_of(tmp_path)} == {"student"}


def test_a_given_teacher_that_has_changed_is_another_run(tmp_path, refused):
    path, flags = tmp_path / "given.pt", "--loss akd --epochs 1 --teacher-ckpt"
    common.save_model(path, common.build_model("mlp-12"), training="st")
    first = run(tmp_path, f"{flags} {path}")
    assert run(tmp_path, f"{flags} {path}") == first
    common.save_model(path, common.build_model("mlp-12"), training="st")  # other weights
    line = refused(run, tmp_path, f"{flags} {path}")
    assert f"was made with another {path}; take another --name, or delete it" in line


def test_what_a_foreign_file_says_of_its_training_is_checked(tmp_path, refused):
    wrong = {"epoch": "3", "seconds": torch.ones(2), "training": 1, "best": [], "gradients": 0.5}
    for key, value in wrong.items():
        common.save_model(tmp_path / "given.pt", common.build_model("mlp-12"), **{key: value})
        line = refused(run, tmp_path, f"--loss akd --teacher-ckpt {tmp_path}/given.pt")
        assert f"given.pt: holds no model of these scripts ({key} is" in line


def test_the_average_has_the_statistics_of_the_epoch(tmp_path, monkeypatch):
    """As under torchrun, where they become those of the first process after each epoch."""
    epoch_row = common.epoch_row

    def changed(args, stage, epoch, model, *more):
        for buffer in model.buffers():
            buffer.fill_(epoch + 2)
        return epoch_row(args, stage, epoch, model, *more)

    monkeypatch.setattr(common, "epoch_row", changed)
    run(tmp_path, "--loss st --ema 0.9 --epochs 2 --model wrn-10-1 --name x")
    weights = common.load(tmp_path / "robust_kd/x-s0/student.pt")["weights"]
    statistics = [value for name, value in weights.items() if "running" in name]
    assert statistics and all(value.eq(3).all() for value in statistics)


def test_early_stops_of_a_longer_training_are_found_and_are_what_a_shorter_one_gives(tmp_path):
    long = "--loss akd --teacher-epochs 3 --epochs 1"
    run(tmp_path / "a", f"{long} --save-every 1")
    before = log_of(tmp_path / "a", "teachers/*")
    assert before == [("teacher", epoch) for epoch in (1, 2, 3)]
    run(tmp_path / "a", f"{long} --teacher-es 2 --name es")
    assert log_of(tmp_path / "a", "teachers/*") == before  # nothing was trained
    run(tmp_path / "b", f"{long} --teacher-es 2 --name es")
    stopped = "robust_kd/es-s0/student.pt"
    assert same_weights(tmp_path / "a" / stopped, tmp_path / "b" / stopped)
    (path,) = (tmp_path / "b").glob("teachers/*/teacher.pt")
    kept = tmp_path / "a" / path.relative_to(tmp_path / "b")
    a, b = common.load(kept)["meta"], common.load(path)["meta"]
    assert a.keys() == b.keys() and same_weights(kept, path)
    assert (a["epoch"], a["training"]) == (b["epoch"], b["training"]) == (2, "at")
    assert a["best"]["epoch"] == b["best"]["epoch"]


def test_a_student_is_kept_after_every_n_epochs_too(tmp_path):
    run(tmp_path, "--loss at --epochs 4 --save-every 2 --name run")
    folder = tmp_path / "robust_kd" / "run-s0"
    kept = [folder / f"student-epoch{epoch}.pt" for epoch in (2, 4)]
    assert sorted(folder.glob("student-epoch*.pt")) == kept
    assert [common.load(path)["meta"]["epoch"] for path in kept] == [2, 4]
    assert same_weights(kept[1], folder / "student.pt")
    assert not same_weights(kept[0], kept[1])


def test_a_teacher_whose_last_epoch_is_not_in_its_log_is_not_finished(tmp_path, monkeypatch):
    flags = "--loss akd --teacher-epochs 2 --epochs 1 --save-every 1 --name run"
    save_epoch = common.save_epoch

    def killed(folder, stage, model, state, rows, *more):
        if len(rows) == 2:
            raise KeyboardInterrupt
        save_epoch(folder, stage, model, state, rows, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_epoch", killed)
        run(tmp_path, flags)
    run(tmp_path, flags)
    assert log_of(tmp_path, "teachers/*") == [("teacher", 1), ("teacher", 2)]


def test_the_flags_of_a_teacher_are_written_under_the_lock_of_its_folder(tmp_path, monkeypatch):
    args = flags_of_teacher(f"--runs {tmp_path}")
    data = common.load_training_data(args, "cpu")
    write_json, written = common.write_json, []

    def spied(path, value):
        with pytest.raises(common.UserError, match="in use"), common.locked(path.parent):
            pass  # it would delete what is being written
        write_json(path, value)
        written.append(path.name)

    monkeypatch.setattr(common, "write_json", spied)
    folders = [common.teacher_folder(args, data) for _ in range(2)]
    assert folders[0] == folders[1] and written == ["recipe.json"]
    flags = common.read_json(folders[0] / "recipe.json")
    assert flags["loss"] == "at" and None not in flags.values()


def test_what_a_killed_run_was_writing_is_deleted_where_a_teacher_is_looked_for(tmp_path):
    flags = "--teacher-epochs 2 --loss akd --epochs 1"
    args = common.replace(parse(f"{flags} --teacher-es 1 --runs {tmp_path}"), seed=0)
    data = common.load_training_data(args, "cpu")
    folder = common.teacher_folder(robust_kd.teacher_args(args, "at"), data)
    (folder / ".teacher.pt.1.tmp").write_text("torn")
    run(tmp_path, f"{flags} --save-every 1 --name first")
    run(tmp_path, f"{flags} --teacher-es 1 --name second")
    assert {file.name for file in folder.iterdir()} == {"lock", "recipe.json", "teacher.pt"}


def test_several_seeds_are_one_run_each_with_a_teacher_each_and_their_mean(tmp_path, capsys):
    argv = f"--seed 0 1 2 --loss akd --epochs 1 --teacher-epochs 1 --name run --runs {tmp_path}"
    summaries = robust_kd.main([*TINY.split(), *argv.split()])
    assert len(summaries) == 3 and "mean +- std of seeds 0 1 2" in capsys.readouterr().out
    folders = sorted((tmp_path / "robust_kd").iterdir())
    assert [folder.name for folder in folders] == ["run-s0", "run-s1", "run-s2"]
    assert [common.read_summary(folder) for folder in folders] == summaries
    assert len(list(tmp_path.glob("teachers/*/teacher.pt"))) == 3
    single = tmp_path / "single"
    run(single, "--seed 1 --loss akd --epochs 1 --teacher-epochs 1 --name run")
    assert same_weights(folders[1] / "student.pt", single / "robust_kd" / "run-s1" / "student.pt")


def test_an_ensemble_is_trained_from_other_seeds_and_evaluated(tmp_path):
    rows = run(tmp_path, "--loss akd+ --teacher-training at at --epochs 1")
    assert [(row["net"], row["model"]) for row in rows] == [
        ("teacher", "teacher (at)"),
        ("teacher2", "teacher2 (at)"),
        ("ensemble", "ensemble of 2 teachers"),
        ("student", "student (akd+)"),
    ]
    one, two = tmp_path.glob("teachers/*/teacher.pt")
    assert not same_weights(one, two)
    before = sorted(log_of(tmp_path, "teachers/*"))
    run(tmp_path, "--loss rslad+ --teacher-training at at --epochs 1")
    assert sorted(log_of(tmp_path, "teachers/*")) == before


def test_rows_of_the_summary_say_which_net_they_are(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1])  # of the teacher, then of the student

    def validate(args, stage, model, data, eps):
        return {"val_clean_acc": next(accuracies), "val_pgd7_acc": 0.0}

    monkeypatch.setattr(common, "validate", validate)
    rows = run(tmp_path, "--loss akd --teacher-epochs 1")
    (folder,) = (tmp_path / "robust_kd").iterdir()
    labels = ["teacher (at)", "student (akd)", "student, best on held-out images"]
    assert [row["model"] for row in rows] == labels
    assert [row["net"] for row in rows] == ["teacher", "student", "best"]
    assert [row["epochs"] for row in rows] == [1, 2, 1]
    for row in rows:
        assert (folder / row["file"]).is_file()


@pytest.mark.parametrize("clean", [0.5, 0.9])
def test_single_step_training_that_collapses_is_stopped_and_the_best_epoch_before_is_kept(
    clean, tmp_path, capsys, monkeypatch
):
    """Clean accuracy may leap where robustness breaks down: the sum is then the largest there."""
    accuracies = iter([(0.5, 0.5), (0.5, 0.6), (clean, 0.3), (0.5, 0.9)])

    def validate(args, stage, model, data, eps):
        return dict(zip(("val_clean_acc", "val_pgd7_acc"), next(accuracies)))

    monkeypatch.setattr(common, "validate", validate)
    run(
        tmp_path,
        "--loss akd+ --teacher-training ffgsm --teacher-epochs 4 --epochs 1 --save-every 1",
    )
    assert "fell by over 20 points; epoch 2 is kept" in capsys.readouterr().out
    assert log_of(tmp_path, "teachers/*") == [("teacher", epoch) for epoch in (1, 2, 3)]
    data = common.load_data("shapes", val_size=20, train_subset=40, test_subset=20)
    flags = f"--teacher-training ffgsm --teacher-epochs 4 --runs {tmp_path} --teacher-es"
    files = {}
    for epochs in (2, 3, 4):
        args = flags_of_teacher(f"{flags} {epochs}")
        files[epochs] = common.teacher_folder(args, data) / "teacher.pt"
    assert same_weights(files[4], files[2])
    assert not files[3].exists()  # a run that stops after epoch 3 would keep epoch 2 as well
    meta = common.load(files[4])["meta"]
    assert (meta["epoch"], meta["best"]["epoch"], meta["training"]) == (2, 2, "ffgsm")


def test_a_best_epoch_says_how_it_was_trained(tmp_path, capsys):
    """A student of teacher_best.pt is warned of as one of teacher.pt."""
    run(tmp_path, "--loss akd --teacher-training st --teacher-epochs 2 --epochs 1")
    assert "will not be robust" in capsys.readouterr().out
    (best,) = tmp_path.glob("teachers/*/teacher_best.pt")
    assert common.load_model(best).meta["training"] == "st"
    run(tmp_path, f"--loss akd --teacher-ckpt {best} --epochs 1 --name other")
    out = capsys.readouterr().out
    assert "will not be robust" in out and "teacher (st)" in out


def test_a_teacher_of_the_same_generated_images_is_shared_whatever_their_path(tmp_path):
    save_extra(tmp_path / "e.npz")
    loaded = common.load_data("shapes", val_size=20, train_subset=50, test_subset=20)
    folders = set()
    for path in (f"{tmp_path}/e.npz", f"{tmp_path}/./e.npz"):
        args = flags_of_teacher(f"--extra-data {path} --runs {tmp_path}")
        folders.add(common.teacher_folder(args, robust_kd.add_extra_data(loaded, path)))
    assert len(folders) == 1


def test_the_first_process_says_whether_an_early_stop_is_there(tmp_path, monkeypatch, data):
    """A slow one would find what the first has just saved, and not wait for it as the others do."""
    args = flags_of_teacher(f"--runs {tmp_path}")
    other = common.teacher_folder(common.replace(args, epochs=1), data)
    saved, save_model = [], common.save_model
    model = common.build_model("mlp-8")
    save_model(other / "teacher.pt", model)
    monkeypatch.setattr(common, "save_model", lambda path, *_, **__: saved.append(path))
    for is_there in (False, True):
        monkeypatch.setattr(common, "from_first_process", lambda value, first=is_there: first)
        robust_kd.keep_epoch(args, data, tmp_path, "teacher", model, [{}])
    assert saved == [other / "teacher.pt"]


# ------------------------------------------------------------------------------------------------
# AT+


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
    average, expected = robust_kd.weight_average(net), None
    for t in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net[1].running_mean += 1
        robust_kd.update_average(average, net, 0.6, t)
        weight = net[0].weight.detach().clone()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = weight if t == 0 else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average[0].weight, expected)
    assert torch.equal(average[1].running_mean, net[1].running_mean)


def test_after_one_step_the_average_is_the_net(tmp_path):
    for name, ema in (("without", ""), ("with", "--ema 0.9")):
        run(tmp_path, f"--loss st --train-subset 16 --epochs 1 {ema} --name {name}")
    folder = tmp_path / "robust_kd"
    assert same_weights(folder / "without-s0/student.pt", folder / "with-s0/student.pt")


def test_the_net_that_is_validated_is_the_net_that_is_kept(tmp_path, monkeypatch):
    validated = []

    def validate(args, stage, model, data, eps=None):
        validated.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"val_clean_acc": 1 / len(validated), "val_pgd7_acc": 0.0}  # the first is the best

    monkeypatch.setattr(common, "validate", validate)
    run(tmp_path, "--loss st --ema 0.9 --epochs 2 --save-every 1 --name x")
    files = {"student_best": 0, "student-epoch1": 0, "student-epoch2": 1, "student": 1}
    for name, epoch in files.items():
        weights = common.load(tmp_path / f"robust_kd/x-s0/{name}.pt")["weights"]
        assert all(torch.equal(weights[k], value) for k, value in validated[epoch].items()), name


def test_beta_weighs_the_teachers_in_their_order(tmp_path):
    teachers = {"one": "st", "first": "st at --beta 1 0", "second": "st at --beta 0 1"}
    weights = {}
    for name, flags in teachers.items():
        run(tmp_path, f"--loss ckd --epochs 1 --teacher-training {flags} --name {name}")
        weights[name] = common.load(tmp_path / f"robust_kd/{name}-s0/student.pt")["weights"]
    layer = "layers.2.weight"
    torch.testing.assert_close(weights["first"][layer], weights["one"][layer], atol=1e-5, rtol=0)
    assert (weights["second"][layer] - weights["one"][layer]).abs().max() > 1e-4


def test_the_average_answers_adr_in_eval_mode(tmp_path, monkeypatch):
    modes, weight_average = [], robust_kd.weight_average

    def spied(model):
        average = weight_average(model)
        average.register_forward_pre_hook(
            lambda net, _: modes.append({module.training for module in net.modules()})
        )
        return average

    monkeypatch.setattr(robust_kd, "weight_average", spied)
    args = parse("--loss adr --model wrn-10-1 --epochs 1 --val-size 0")
    data = common.load_data("shapes", train_subset=16, val_size=0)
    robust_kd.train(common.replace(args, seed=0), data, tmp_path, "student")
    assert modes == [{False}]


def test_the_demo_shows_a_standard_net_a_teacher_and_a_student(tmp_path):
    rows = run(tmp_path, "--demo --teacher-es 1 --epochs 1 --name x")
    assert [row["net"] for row in rows if row["net"] != "best"] == [
        "standard",
        "teacher",
        "student",
    ]
    standard = common.load(tmp_path / "robust_kd/x-s0/standard.pt")["meta"]
    assert standard["training"] == "st" and standard["epoch"] == 1


def test_the_radius_of_the_evaluation_and_its_seed_are_those_of_the_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        robust_kd.eval_robustness,
        "summary_rows",
        lambda *_, **settings: asked.append(settings) or [{"net": "student", "model": "s"}],
    )
    run(tmp_path, "--loss st --epochs 1 --eps 3/255 --seed 5")
    assert asked == [{"eps": 3 / 255, "seed": 5, "batch_size": 16}]


def test_cutout_fills_a_square_of_18_pixels(monkeypatch):
    x, fill = torch.rand(3, 3, 32, 32), torch.tensor([2.0, 3.0, 4.0])
    centres = torch.tensor([[16, 0, 31], [16, 0, 10]])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: centres[..., None])
    out = robust_kd.cutout(x, fill)
    changed = (out != x).all(1)  # (B, H, W)
    assert changed.flatten(1).sum(1).tolist() == [18 * 18, 9 * 9, 10 * 18]
    assert changed[0, 7:25, 7:25].all() and changed[1, :9, :9].all() and changed[2, 22:, 1:19].all()
    assert torch.equal(out[0, :, 10, 10], fill)


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
    data = robust_kd.add_extra_data(data, tmp_path / "e.npz")
    assert data.x_extra.dtype == torch.uint8 and data.y_extra.dtype == torch.int64
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
    for (_, _), (_, targets) in augmented(data, augment="cutmix", label_smoothing=0.1):
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
        assert targets.min().item() == pytest.approx(0.01)
    for (x, _), (same, targets) in augmented(data, label_smoothing=0.1):
        assert same is x and targets.max(1).values.allclose(torch.tensor(0.91))


def test_cutmix_mixes_targets_by_the_pixels_that_it_took(data):
    args = SimpleNamespace(extra_data=None, augment="cutmix", label_smoothing=0.0)
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    shares = []
    for _ in range(20):
        mixed, targets = robust_kd.augment(x, torch.arange(4), data, args)
        assert targets.shape == (4, 10)
        for i in range(4):
            share = (mixed[i] == (i - 1) % 4).double().mean().item()
            assert targets[i, (i - 1) % 4].item() == pytest.approx(share, abs=1e-6)
            assert targets[i, i].item() == pytest.approx(1 - share, abs=1e-6)
        shares.append(share)
    assert max(shares) - min(shares) > 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "expected an .npz file with image, label (it has no array image)"),
        ({"classes": np.array([*"abcdefghij"])}, "class 0 is 'a', in shapes it is"),
        ({"size": 28}, "expected images (32, 32, 3), labels below 10, got (28, 28, 3)"),
        ({"image": np.zeros((4, 32, 32, 3))}, "must be uint8 (N, S, S, 3) or (N, S, S), got float"),
        ({"image": np.array([{}, 1], dtype=object)}, "expected an .npz file with image, label"),
        ({"label": np.zeros(7, int)}, "must be 30 labels 0..K-1, got int64 (7,)"),
        ({"label": np.full(30, 10)}, "labels below 10, got (32, 32, 3) and labels up to 10"),
        ({"label": np.full(30, -1)}, "must be 30 labels 0..K-1"),
        ({"label": np.zeros(30)}, "must be 30 labels 0..K-1, got float64"),
        ({"label": np.array([{}] * 30, dtype=object)}, "expected an .npz file with image, label"),
        (None, "expected an .npz file with image, label"),
    ],
)
def test_wrong_extra_data_is_one_line(data, tmp_path, refused, change, message):
    path = tmp_path / "e.npz"
    if change is None:
        path.write_bytes(b"PK no zip")
    else:
        save_extra(path, **change)
    error = refused(robust_kd.add_extra_data, data, path)
    assert str(path) in error and message in error
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]  # nothing is unpacked


def test_a_run_with_everything_goes_on_with_the_same_bits_and_keeps_the_average(
    tmp_path, stop_at, monkeypatch
):
    save_extra(tmp_path / "e.npz")
    flags = (
        f"--recipe at+ {TINY} --model wrn-10-1 --val-size 4 --test-subset 4 --steps 1 "
        f"--extra-data {tmp_path}/e.npz --augment cutmix --name run --runs"
    )
    averages, weight_average = [], robust_kd.weight_average

    def spied(model):
        averages.append((weight_average(model), model))
        return averages[-1][0]

    with monkeypatch.context() as patch:
        patch.setattr(robust_kd, "weight_average", spied)
        robust_kd.main(f"{flags} {tmp_path}/whole".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/stopped", "teacher", 1)
    stop_at(robust_kd, f"{flags} {tmp_path}/stopped", "student", 1)
    robust_kd.main(f"{flags} {tmp_path}/stopped".split())
    files = sorted((tmp_path / "whole").rglob("*.pt"))
    assert {path.name for path in files} >= {"teacher.pt", "student.pt"}
    for path in files:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert same_weights(path, other), path
    # what is saved is the average, in which BatchNorm's statistics are those of the net
    average, model = averages[-1]
    saved = common.load(tmp_path / "whole" / "robust_kd" / "run-s0" / "student.pt")["weights"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], average.state_dict()[name]), name
        is_parameter = name in dict(model.named_parameters())
        assert torch.equal(saved[name], tensor) != is_parameter, name


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
