"""The losses against loops over the equations, and the limits that tie them together."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import robust_kd as rk

B, K = 5, 4


def logits(seed, classes=K):
    return torch.randn(B, classes, generator=torch.Generator().manual_seed(seed)) * 2


LABELS = torch.tensor([0, 3, 1, 1, 2])
S, S_ADV, T, T_ADV = logits(1), logits(2), logits(3), logits(4)


# The equations with nothing but floats ----------------------------------------------------------


def softmax(row, temperature):
    e = [math.exp(value / temperature) for value in row]
    return [value / sum(e) for value in e]


def mixed(row, label, alpha, temperature):
    probs = softmax(row, temperature)
    return [alpha * p + (1 - alpha) * (k == label) for k, p in enumerate(probs)]


def ce(targets, row, temperature):
    return -sum(q * math.log(p) for q, p in zip(targets, softmax(row, temperature)))


def kl(targets, row, temperature):
    probs = softmax(row, temperature)
    return sum(q * math.log(q / p) for q, p in zip(targets, probs) if q > 0)


def by_hand(name, lam, alpha, tau):
    """The mean over the batch of the equation of the paper, image by image."""
    total = 0.0
    for s, s_adv, t, t_adv, y in zip(
        S.tolist(), S_ADV.tolist(), T.tolist(), T_ADV.tolist(), LABELS
    ):
        y = int(y)
        hard = [float(k == y) for k in range(K)]
        alpha = alpha if name.endswith("+") else 1.0
        clean, adv = mixed(t, y, alpha, tau), mixed(t_adv, y, alpha, tau)
        total += {
            "st": lambda: ce(hard, s, 1),
            "at": lambda: ce(hard, s_adv, 1),
            "ckd": lambda: (1 - lam) * ce(hard, s, 1) + lam * tau**2 * kl(clean, s, tau),
            "ard": lambda: (1 - lam) * ce(hard, s, 1) + lam * tau**2 * kl(clean, s_adv, tau),
            "rslad": lambda: tau**2 * ((1 - lam) * kl(clean, s, tau) + lam * kl(clean, s_adv, tau)),
            "akd": lambda: tau**2 * ce(adv, s_adv, tau),
            "trades": lambda: ce(hard, s, 1) + 6 * kl(softmax(s, 1), s_adv, 1),
        }[name.removesuffix("+")]()
    return total / B


def value(name, lam=0.3, alpha=0.6, tau=1.0, **changes):
    tensors = {
        "student_logits": S, "student_adv_logits": S_ADV, "teacher_logits": T,
        "teacher_adv_logits": T_ADV, "labels": LABELS, "lam": lam, "alpha": alpha,
        "temperature": tau, "trades_beta": 6.0,
    } | changes  # fmt: skip
    return rk.LOSSES[name](
        **{k: v for k, v in tensors.items() if k in rk.needs(name) or k in changes}
    )


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("name", rk.LOSSES)
def test_each_loss_is_its_equation(name, tau):
    assert value(name, tau=tau).item() == pytest.approx(by_hand(name, 0.3, 0.6, tau), rel=1e-5)


def gradient(name, **settings):
    s, s_adv = S.clone().requires_grad_(), S_ADV.clone().requires_grad_()
    tensors = {"student_logits": s, "student_adv_logits": s_adv}
    tensors = {k: v for k, v in tensors.items() if k in rk.needs(name)}
    return torch.autograd.grad(value(name, **settings, **tensors), list(tensors.values()))


def assert_equal_gradients(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_akd_plus_at_alpha_zero_is_adversarial_training():
    assert value("akd+", alpha=0.0).item() == pytest.approx(value("at").item())
    assert_equal_gradients(gradient("akd+", alpha=0.0), gradient("at"))


@pytest.mark.parametrize("name", ["akd", "ard", "rslad"])
def test_the_plus_form_at_alpha_one_is_the_plain_form(name):
    assert_equal_gradients(gradient(name + "+", alpha=1.0), gradient(name))


def test_ard_plus_and_rslad_plus_coincide_at_lambda_one():
    assert value("ard+", lam=1.0).item() == pytest.approx(value("rslad+", lam=1.0).item())
    assert_equal_gradients(gradient("ard+", lam=1.0), gradient("rslad+", lam=1.0))


def test_a_student_equal_to_its_teacher_has_no_kl():
    assert rk.kl(T.softmax(1), T).item() == pytest.approx(0, abs=1e-6)
    assert value("rslad", student_logits=T, student_adv_logits=T).item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    "name", [name for name in rk.LOSSES if any("teacher" in n for n in rk.needs(name))]
)
def test_no_gradient_reaches_the_teacher(name):
    t, t_adv = T.clone().requires_grad_(), T_ADV.clone().requires_grad_()
    teachers = {"teacher_logits": t, "teacher_adv_logits": t_adv}
    teachers = {k: v for k, v in teachers.items() if k in rk.needs(name)}
    s = {
        k: v.clone().requires_grad_()
        for k, v in (("student_logits", S), ("student_adv_logits", S_ADV))
    }
    value(name, **teachers, **{k: v for k, v in s.items() if k in rk.needs(name)}).backward()
    assert all(v.grad is None for v in teachers.values())


def test_the_kl_does_not_depend_on_classes_that_nobody_believes_in():
    targets, student = T.softmax(1), S
    wide_targets = F.pad(targets, (0, 96))
    wide_student = F.pad(student, (0, 96), value=-1e4)
    assert rk.kl(wide_targets, wide_student).item() == pytest.approx(rk.kl(targets, student).item())
    means = [
        rk.kl(t, s, kl_reduction="mean")
        for t, s in ((wide_targets, wide_student), (targets, student))
    ]
    assert means[1].item() == pytest.approx(means[0].item() * 100 / K)  # what batchmean avoids


def test_mixed_targets_are_probabilities():
    q = rk.mix_labels(T, LABELS, 0.3, 2.0)
    torch.testing.assert_close(q.sum(1), torch.ones(B))
    assert (q[torch.arange(B), LABELS] >= 0.7).all()


def test_trades_is_cross_entropy_at_beta_zero_and_moves_both_sides():
    assert rk.trades_loss(S, S_ADV, LABELS, 0.0).item() == pytest.approx(
        F.cross_entropy(S, LABELS).item()
    )
    by_hand = sum(kl(softmax(s, 1), a, 1) for s, a in zip(S.tolist(), S_ADV.tolist())) / B
    robust = rk.trades_loss(S, S_ADV, LABELS, 6.0) - F.cross_entropy(S, LABELS)
    assert robust.item() == pytest.approx(6 * by_hand, rel=1e-5)
    s, s_adv = S.clone().requires_grad_(), S_ADV.clone().requires_grad_()
    (rk.trades_loss(s, s_adv, LABELS, 6.0) - F.cross_entropy(s, LABELS)).backward()
    assert s.grad.abs().max() > 0 and s_adv.grad.abs().max() > 0


@pytest.mark.parametrize("attack_loss", ["ce", "kl-self", "kl-teacher"])
def test_the_attack_raises_the_loss_that_it_names(attack_loss):
    torch.manual_seed(0)
    model, x = common.build_model("mlp-16", 10, size=8).eval(), torch.rand(6, 3, 8, 8)
    teacher_logits, labels = torch.randn(6, 10), torch.arange(6)
    how = SimpleNamespace(attack_loss=attack_loss, eps=0.1, step_size=0.025, steps=5)
    x_adv = rk.perturb(model, x, {"labels": labels, "teacher_logits": teacher_logits}, how)
    targets = {"ce": F.one_hot(labels, 10).float(), "kl-self": model(x).softmax(1).detach()}
    targets["kl-teacher"] = teacher_logits.softmax(1)
    with torch.no_grad():
        gains = {
            k: (rk.kl(t, model(x_adv)) - rk.kl(t, model(x))).item() for k, t in targets.items()
        }
    assert gains[attack_loss] > 0 and gains[attack_loss] == max(gains.values())


def test_the_step_is_a_quarter_of_the_radius_and_scales_with_it():
    plain, given = (vars(rk.parse_args(a)) for a in ([], ["--step-size", "4/255"]))
    assert rk.step_size(8 / 255, plain) == pytest.approx(2 / 255)
    assert rk.step_size(2 / 255, plain) == pytest.approx(0.5 / 255)
    assert rk.step_size(8 / 255, given) == pytest.approx(4 / 255)
    assert rk.step_size(2 / 255, given) == pytest.approx(1 / 255)


# Ensembles and the teachers' recipes ------------------------------------------------------------


def test_an_ensemble_averages_probabilities_by_its_weights():
    models = [common.build_model("mlp-8", 5, size=4).eval() for _ in range(3)]
    x, weights = torch.rand(7, 3, 4, 4), [0.2, 0.0, 0.8]
    mean = sum(w * model(x).softmax(1) for w, model in zip(weights, models))
    torch.testing.assert_close(common.Ensemble(models, weights)(x).softmax(1), mean)
    torch.testing.assert_close(common.Ensemble(models, weights)(x).exp(), mean)
    equal = common.Ensemble(models)(x).exp()
    torch.testing.assert_close(equal, sum(model(x).softmax(1) for model in models) / 3)
    one = common.Ensemble(models[:1])(x)
    torch.testing.assert_close(one, models[0](x).log_softmax(1))


def test_the_weights_of_an_ensemble(refused):
    mixed = ["st", "st", "at", "at"]
    assert rk.ensemble_weights(None, mixed) == [0.25] * 4
    assert rk.ensemble_weights([0.3], mixed) == pytest.approx([0.35, 0.35, 0.15, 0.15])
    assert rk.ensemble_weights([0.0], ["at", "st"]) == [0.0, 1.0]
    assert rk.ensemble_weights([0.5, 0.25, 0.25, 0.0], mixed) == [0.5, 0.25, 0.25, 0.0]
    assert rk.ensemble_weights([1.0], ["at"]) == [1.0]
    for betas, trainings in [
        ([0.5], ["at", "at"]),
        ([0.5, 0.6], ["st", "at"]),
        ([1.0, 0.0], mixed),
    ]:
        assert "--beta" in refused(rk.ensemble_weights, betas, trainings)


def test_teachers_differ_by_seed_and_kind_alone():
    def recipes(flags):
        flags = vars(rk.parse_args(flags.split()))
        return [rk.teacher_recipe(flags, i) for i in range(len(rk.teacher_trainings(flags)))]

    first, second, third = recipes("--teachers 3 --seed 2")
    assert [first["seed"], second["seed"], third["seed"]] == [2, 102, 202]
    assert first | {"seed": 0} == second | {"seed": 0} == third | {"seed": 0}
    assert [r["training"] for r in recipes("--teacher-training st ffgsm")] == ["st", "ffgsm"]
    ffgsm, trades = recipes("--teacher-training ffgsm trades --teacher-eps 4/255")
    assert (ffgsm["steps"], ffgsm["step_size"]) == (1, pytest.approx(5 / 255))
    assert (trades["steps"], trades["step_size"]) == (7, pytest.approx(1 / 255))
    assert trades["attack_loss"] == "kl-self" and trades["trades_beta"] == 6
