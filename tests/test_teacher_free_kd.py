"""The losses against loops over their equations, the exits, the omitted digit, the heat map."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import images
import teacher_free_kd as tf
from benchmark import gradients

SHAPES = functools.cache(images.make_shapes)  # drawn once, not for each run
B, K = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    monkeypatch.setattr(images, "make_shapes", SHAPES)


def logits(seed, classes=K):
    return torch.randn(B, classes, generator=torch.Generator().manual_seed(seed)) * 2


S, T = logits(1), logits(3)


# The equations with nothing but floats ----------------------------------------------------------


def softmax(row, temperature=1.0):
    e = [math.exp(value / temperature) for value in row]
    return [value / sum(e) for value in e]


def ce(targets, row, temperature=1.0):
    return -sum(q * math.log(p) for q, p in zip(targets, softmax(row, temperature)) if q)


def kl(targets, row, temperature=1.0):
    return ce(targets, row, temperature) + sum(q * math.log(q) for q in targets if q)


def mean(by_image):
    """The mean of by_image(s, t, y, one_hot) over the batch."""
    rows = zip(S.tolist(), T.tolist(), LABELS.tolist())
    return sum(by_image(s, t, y, [float(k == y) for k in range(K)]) for s, t, y in rows) / B


def virtual(y, delta):
    return [delta if k == y else (1 - delta) / (K - 1) for k in range(K)]


def test_plain_and_smoothed_losses_are_their_equations():
    plain = mean(lambda s, t, y, q: ce(q, s))
    assert tf.plain_loss(S, LABELS).item() == pytest.approx(plain, rel=1e-5)
    smooth = mean(lambda s, t, y, q: ce([0.8 * k + 0.2 / K for k in q], s))
    assert tf.smoothing_loss(S, LABELS, 0.2).item() == pytest.approx(smooth, rel=1e-5)


@pytest.mark.parametrize("tau2, tau", [(True, 1.0), (True, 5.0), (False, 5.0)])
def test_kd_is_equations_2_3_and_6(tau2, tau):
    def by_image(s, t, y, q):
        return 0.7 * ce(q, s) + 0.3 * (tau**2 if tau2 else 1) * kl(softmax(t, tau), s, tau)

    found = tf.kd_loss(S, T, LABELS, 0.3, tau, tau2, "batchmean").item()
    assert found == pytest.approx(mean(by_image), rel=1e-5)
    over_classes = tf.kd_loss(S, T, LABELS, 1.0, tau, tau2, "mean").item()
    assert over_classes * K == pytest.approx(
        tf.kd_loss(S, T, LABELS, 1.0, tau, tau2, "batchmean").item()
    )


@pytest.mark.parametrize("tau2", [True, False])
@pytest.mark.parametrize("form", tf.REG_FORMS)
def test_reg_is_equation_4_in_each_form(form, tau2):
    tau, delta = 3.0, 0.9

    def by_image(s, t, y, q):
        probs = virtual(y, delta)
        if form == "repo":  # the student is not softened
            distilled = kl(softmax(probs, tau), s)
        elif form == "paper":
            distilled = kl(softmax([math.log(p) for p in probs], tau), s, tau)
            distilled *= tau**2 if tau2 else 1
        else:
            distilled = kl(probs, s)
        return 0.6 * ce(q, s) + 0.4 * distilled

    found = tf.reg_loss(S, LABELS, 0.4, tau, delta, form, tau2, "batchmean").item()
    assert found == pytest.approx(mean(by_image), rel=1e-5)


def test_at_kd_is_the_cross_entropy_with_mixed_targets():
    def by_image(s, t, y, q):
        mixed = [0.6 * p + 0.4 * hard for p, hard in zip(softmax(t, 2.0), q)]
        return 4 * ce(mixed, s, 2.0)

    assert tf.at_kd_loss(S, T, LABELS, 0.6, 2.0).item() == pytest.approx(mean(by_image), rel=1e-5)


@pytest.mark.parametrize("tau2", [True, False])
def test_self_distillation_is_the_sum_over_its_exits(tau2):
    exits, features = [logits(7), S, T], [logits(8, 6), logits(9, 6), logits(10, 6)]
    total = 0.0
    for i, y in enumerate(LABELS.tolist()):
        q, last = [float(k == y) for k in range(K)], T[i].tolist()
        total += ce(q, last)
        for logit, feature in list(zip(exits, features))[:-1]:
            soft = kl(softmax(last, 3.0), logit[i].tolist(), 3.0) * (9 if tau2 else 1)
            distance = math.dist(feature[i].tolist(), features[-1][i].tolist())
            total += 0.7 * ce(q, logit[i].tolist()) + 0.3 * soft + 0.05 * distance
    found = tf.self_distillation_loss(exits, features, LABELS, 0.3, 0.05, 3.0, tau2, "batchmean")
    assert found.item() == pytest.approx(total / B, rel=1e-5)


# The limits that tie them together --------------------------------------------------------------


def gradient(loss):
    s = S.clone().requires_grad_()
    return torch.autograd.grad(loss(s), s)[0]


def assert_same_gradient(a, b):
    torch.testing.assert_close(gradient(a), gradient(b))


def plain(s):
    return tf.plain_loss(s, LABELS)


def test_alpha_zero_is_cross_entropy():
    for loss in (
        lambda s: tf.kd_loss(s, T, LABELS, 0.0, 6.0, True, "batchmean"),  # tf-kd-self
        lambda s: tf.reg_loss(s, LABELS, 0.0, 20.0, 0.99, "repo", True, "batchmean"),
        lambda s: tf.at_kd_loss(s, T, LABELS, 0.0, 1.0),
    ):
        assert loss(S).item() == pytest.approx(plain(S).item())
        assert_same_gradient(loss, plain)


@pytest.mark.parametrize("form", tf.REG_FORMS)
def test_tf_kd_reg_with_delta_one_is_cross_entropy_plus_a_known_term(form):
    tau, alpha = 2.0, 0.4
    label = math.exp(1 / tau) / (math.exp(1 / tau) + K - 1) if form == "repo" else 1.0
    target = torch.full((B, K), (1 - label) / (K - 1))
    target[torch.arange(B), LABELS] = label
    t = tau if form == "paper" else 1.0

    def expected(s):
        entropy = -(target * target.clamp_min(1e-30).log()).sum(1).mean()
        known = t**2 * (F.cross_entropy(s / t, target) - entropy)
        return (1 - alpha) * plain(s) + alpha * known

    def loss(s):
        return tf.reg_loss(s, LABELS, alpha, tau, 1.0, form, True, "batchmean")

    assert loss(S).item() == pytest.approx(expected(S).item(), rel=1e-5)
    assert_same_gradient(loss, expected)
    if form == "plain":  # there the term is the cross-entropy itself
        assert loss(S).item() == pytest.approx(plain(S).item())


def test_tf_kd_reg_in_its_plain_form_is_label_smoothing():
    alpha, delta = 0.3, 0.8
    smoothing = alpha * (1 - delta) * K / (K - 1)
    assert_same_gradient(
        lambda s: tf.reg_loss(s, LABELS, alpha, 9.0, delta, "plain", True, "batchmean"),
        lambda s: tf.smoothing_loss(s, LABELS, smoothing),
    )


def test_the_repo_form_forgets_delta_and_is_nearly_label_smoothing():
    targets, temperature = tf.REG_FORMS["repo"](tf.virtual_teacher(LABELS % 3, 10, 0.99), 20.0)
    assert temperature == 1.0
    assert targets.max().item() == pytest.approx(0.1045, abs=1e-4)
    assert targets.min().item() == pytest.approx(0.0995, abs=1e-4)
    other, _ = tf.REG_FORMS["repo"](tf.virtual_teacher(LABELS % 3, 10, 0.5), 20.0)
    assert (targets - other).abs().max() < 3e-3
    found = gradient(lambda s: tf.reg_loss(s, LABELS, 0.1, 20.0, 0.99, "repo", True, "batchmean"))
    smooth = gradient(lambda s: tf.smoothing_loss(s, LABELS, 0.1))
    assert (found - smooth).abs().max() < 0.02 * smooth.abs().max()


def test_a_virtual_teacher_is_a_distribution_with_delta_on_the_label():
    probs = tf.virtual_teacher(LABELS, K, 0.9)
    torch.testing.assert_close(probs.sum(1), torch.ones(B))
    torch.testing.assert_close(probs[torch.arange(B), LABELS], torch.full((B,), 0.9))


def test_the_kl_goes_from_the_teacher_to_the_student_and_is_zero_when_they_agree():
    def distilled(s, t):
        return tf.kd_loss(s, t, LABELS, 1.0, 2.0, True, "batchmean").item()

    assert distilled(T, T) == pytest.approx(0, abs=1e-6)
    assert distilled(S, T) != pytest.approx(distilled(T, S), rel=1e-2)


def test_tau2_keeps_the_scale_of_the_gradient():
    small_s, small_t = S / 10, T / 10

    def norm(tau):
        s = small_s.clone().requires_grad_()
        loss = tf.kd_loss(s, small_t, LABELS, 1.0, tau, True, "batchmean")
        return torch.autograd.grad(loss, s)[0].norm().item()

    assert 0.5 < norm(20.0) / norm(1.0) < 2


def test_no_gradient_reaches_a_teacher_nor_the_last_exit_by_the_others():
    t, s = T.clone().requires_grad_(), S.clone().requires_grad_()
    tf.kd_loss(s, t, LABELS, 0.5, 2.0, True, "batchmean").backward()
    tf.at_kd_loss(s, t, LABELS, 0.5, 2.0).backward()
    assert t.grad is None
    exits = [logits(7).requires_grad_(), T.clone().requires_grad_()]
    features = [logits(8).requires_grad_(), logits(9).requires_grad_()]
    tf.self_distillation_loss(exits, features, LABELS, 0.5, 1.0, 3.0, True, "batchmean").backward()
    assert_last = torch.autograd.grad(tf.plain_loss(exits[-1], LABELS), exits[-1])[0]
    torch.testing.assert_close(exits[-1].grad, assert_last)  # that of the labels alone
    assert features[-1].grad is None and features[0].grad.abs().max() > 0


# Exits, digits, gradients -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, width", [("resnet18", 1 / 32), ("resnet50", 1 / 32), ("wrn-10-1", 1)]
)
def test_exits_have_the_right_shapes_and_growing_costs(name, width):
    net = common.build_model(name, 10, width).eval()
    exits = tf.Exits(net).eval()
    x = torch.rand(3, 3, 32, 32)
    found, features = exits(net, x)
    number = 3 if name.startswith("wrn") else 4
    assert [tuple(each.shape) for each in found] == [(3, 10)] * number
    assert {tuple(each.shape) for each in features} == {(3, net.fc.in_features)}
    torch.testing.assert_close(found[-1], net(x))  # the last exit is the net itself
    for i, each in enumerate(found):
        (alone,), (feature,) = exits(net, x, only=i)
        torch.testing.assert_close(alone, each)
        torch.testing.assert_close(feature, features[i])
    data = common.load_data("shapes", test_subset=1)
    costs = [common.macs(lambda x, i=i: exits(net, x, i), data) for i in range(number)]
    assert costs == sorted(costs) and costs[-1] == common.macs(net, data)
    assert common.macs(lambda x: exits(net, x), data) > costs[-1]


def by_hand_cost(net, size=32):
    """Multiply-adds of a 3x3-stem ResNet from the shapes of its weights and of its feature maps."""
    found, hooks = [], []
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            hook = m.register_forward_hook(
                lambda m, x, y: found.append(
                    m.weight.numel() * (y[0, 0].numel() if y.dim() == 4 else 1)
                )
            )
            hooks.append(hook)
    net(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_costs_are_multiply_adds_counted_by_hand_and_table_1s():
    data = common.load_data("shapes", test_subset=1)
    net = common.build_model("resnet18", 10, 1 / 8)
    assert common.macs(net, data) == by_hand_cost(net)
    digits = dataclasses.replace(data, x_test=torch.zeros(1, 28, 28, 1, dtype=torch.uint8))
    for name, weights, parameters in (
        ("mlp-1200-1200", 2_392_800, 2_395_210),  # paper: 940800 + 1440000 + 12000
        ("mlp-400", 317_600, 318_010),  # paper: 313600 + 4000
    ):
        mlp = common.build_model(name, 10, channels=1, size=28).eval()
        args = tf.parse_args(["--method", "vanilla"])
        row = tf.evaluated(name, mlp, {}, digits, args)
        assert (row["weights"], row["parameters"], row["macs"]) == (weights, parameters, weights)


def test_ensembles_are_of_all_exits():
    torch.manual_seed(1)
    net = common.build_model("wrn-10-1").eval()
    exits = tf.Exits(net).eval()
    data = common.load_data("shapes", test_subset=40)
    found = {row["model"]: row["clean_acc"] for row in tf.exit_rows(net, exits.state_dict(), data)}
    with torch.no_grad():
        every = torch.stack(exits(net, common.to_float(data.x_test))[0])
    for name, averaged in (
        ("ensemble: mean of probabilities", every.softmax(2).mean(0)),
        ("ensemble: mean of logits", every.mean(0)),
        ("exit 1", every[0]),
    ):
        right = (averaged.argmax(1) == data.y_test).double().mean().item()
        assert found[name] == pytest.approx(right)


def test_the_held_out_images_of_the_student_lack_the_digit_too():
    data = common.load_data("shapes", val_size=200)
    less = tf.without(data, 3)
    assert (
        (less.y_train != 3).all() and (less.y_val != 3).all() and len(less.x_val) == len(less.y_val)
    )
    assert len(less.x_train) == int((data.y_train != 3).sum()) == len(less.x_padded)
    assert torch.equal(less.y_test, data.y_test)


def test_the_heat_map_is_a_gradient_computed_by_hand_on_a_two_layer_net():
    torch.manual_seed(3)
    net = common.build_model("mlp-3", 4, channels=1, size=2, mean=[0.0], std=[1.0])
    first, second = (m for m in net.modules() if isinstance(m, nn.Linear))
    gradients, total = common.Gradients(net, [2]), {"1.1": 0.0, "1.2": 0.0}
    for _ in range(2):  # two minibatches: means of absolute values, not of their sum
        x = torch.rand(B, 1, 2, 2)
        loss = tf.plain_loss(net(x), LABELS)
        for gradients.epoch in (1, 2):  # the first is none of the heat map
            gradients.add(loss, 2)
        v = x.flatten(1).double()
        h = v @ first.weight.double().T + first.bias.double()
        p = (h.relu() @ second.weight.double().T + second.bias.double()).softmax(1)
        delta = (p - F.one_hot(LABELS, 4)) / B  # (B, 4)
        back = (delta @ second.weight.double()) * (h > 0)
        total["1.2"] += (delta.T @ h.relu()).abs().mean().item() / 2
        total["1.1"] += (back.T @ v).abs().mean().item() / 2
    numbers = gradients.numbers()
    assert numbers["layers"] == ["1.1", "1.2"] and numbers["epochs"] == [2]
    assert numbers["means"][0] == pytest.approx([total["1.1"], total["1.2"]], rel=1e-5)


def test_the_layers_of_a_resnet_are_its_convolutions_by_stage():
    names = list(common.Gradients(common.build_model("resnet18", 10, 1 / 16), [1]).weights)
    grid = [f"{i}.{k}" for i in (1, 2, 3, 4) for k in (1, 2, 3, 4)]
    assert sorted(names) == sorted([*grid, "2.shortcut", "3.shortcut", "4.shortcut"])
    assert list(common.Gradients(common.build_model("wrn-10-1"), [1]).weights)[:3] == [
        "1.1",
        "1.2",
        "2.1",
    ]


def test_heat_maps_of_several_runs_become_one(tmp_path, capsys, refused):
    kept = {"epochs": [1, 3], "layers": ["1.1", "2.shortcut"], "means": [[0.5, 0.25], [2e-3, 1e-3]]}
    for stem in "ab":
        gradients.write(tmp_path / f"{stem}.npz", {"student": (None, {"gradients": kept})})
    assert gradients.read(tmp_path / "a.npz") == {"student": kept}
    capsys.readouterr()
    files = [str(tmp_path / f"{stem}.npz") for stem in "ab"]
    gradients.main([*files, "--out", str(tmp_path / "both.png")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["row", "1", "shortcut"] and len(lines) == 4 + 8
    assert "b: student, epoch 3, stage 2 - 1.0e-03".split() in lines
    assert "a: student, epoch 1, stage 1 5.0e-01 -".split() in lines
    (tmp_path / "a.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-30])  # torn
    np.savez(tmp_path / "b.npz", **{"student/epochs": [1], "student/layers": ["1.1"]})
    for path in (*files, str(tmp_path / "none.npz")):
        assert "no file of --grad-heatmap" in refused(gradients.main, [path])
