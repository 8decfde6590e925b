"""The losses against loops over their equations, the exits, the omitted digit, the heat map."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import eval_robustness
import teacher_free_kd as tf

B, K = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
MINIMAL = "--data shapes --train-subset 40 --test-subset 20 --val-size 20 --batch-size 16"
MINIMAL += " --epochs 2 --steps 2 --eval-attack clean pgd2 --device cpu"


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
    "name, width", [("resnet18", 1 / 16), ("resnet50", 1 / 32), ("wrn-10-1", 1)]
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
    costs = [tf.macs(lambda x, i=i: exits(net, x, i), data) for i in range(number)]
    assert costs == sorted(costs) and costs[-1] == tf.macs(net, data)
    assert tf.macs(lambda x: exits(net, x), data) > costs[-1]


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
    assert tf.macs(net, data) == by_hand_cost(net)
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
    found = {row["model"]: row["clean_acc"] for row in tf.exit_rows(net, exits, data)}
    with torch.no_grad():
        every = torch.stack(exits(net, common.to_float(data.x_test))[0])
    for name, averaged in (
        ("ensemble: mean of probabilities", every.softmax(2).mean(0)),
        ("ensemble: mean of logits", every.mean(0)),
        ("exit 1", every[0]),
    ):
        right = (averaged.argmax(1) == data.y_test).double().mean().item()
        assert found[name] == pytest.approx(right)


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

    def spied(data, batch_size, seed, epoch, run):
        for x, index in make(data, batch_size, seed, epoch, run):
            images = seen.setdefault(run.stage, [])
            images.append(x.flatten(1))
            yield x, index

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


def test_the_held_out_images_of_the_student_lack_the_digit_too():
    data = common.load_data("shapes", val_size=200)
    less = tf.without(data, 3)
    assert (
        (less.y_train != 3).all() and (less.y_val != 3).all() and len(less.x_val) == len(less.y_val)
    )
    assert len(less.x_train) == int((data.y_train != 3).sum()) == len(less.x_padded)
    assert torch.equal(less.y_test, data.y_test)


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


def test_the_heat_map_is_a_gradient_computed_by_hand_on_a_two_layer_net():
    torch.manual_seed(3)
    net = common.build_model("mlp-3", 4, channels=1, size=2, mean=[0.0], std=[1.0])
    first, second = (m for m in net.modules() if isinstance(m, nn.Linear))
    gradients, total = tf.Gradients(net, [2]), {"1.1": 0.0, "1.2": 0.0}
    for _ in range(2):  # two minibatches: means of absolute values, not of their sum
        x = torch.rand(B, 1, 2, 2)
        loss = tf.plain_loss(net(x), LABELS)
        gradients.add(1, loss, 2)  # not an epoch of the heat map
        gradients.add(2, loss, 2)
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
    names = list(tf.Gradients(common.build_model("resnet18", 10, 1 / 16), [1]).weights)
    grid = [f"{i}.{k}" for i in (1, 2, 3, 4) for k in (1, 2, 3, 4)]
    assert sorted(names) == sorted([*grid, "2.shortcut", "3.shortcut", "4.shortcut"])
    assert list(tf.Gradients(common.build_model("wrn-10-1"), [1]).weights)[:3] == [
        "1.1",
        "1.2",
        "2.1",
    ]


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
    flags = "--method self-distillation --model wrn-10-1 --epochs 1 "
    run(tmp_path / "a", flags)
    run(tmp_path / "b", flags + "--byot-alpha 0.9")
    run(tmp_path / "c", flags + "--byot-lambda 1")
    first = [weights(tmp_path / k)["stages.0.0.conv1.weight"] for k in "abc"]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    meta = common.load(next((tmp_path / "a").glob("*/*/student.pt")))["meta"]
    start = tf.Exits(common.build_model("wrn-10-1")).state_dict()
    assert meta["exits"].keys() == start.keys()


SHOWN = {name: (sees, teaches) for name, (_, sees, teaches) in tf.METHODS.items()}


@pytest.mark.parametrize("method", ["tf-kd-self", "at", "at-kd", "at-tf-kd-self", "at-tf-kd-reg"])
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
    found = common.Run("teacher_free_kd", args, torch.device("cpu"), tf.work(args))
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
        flags = f"--method tf-kd-reg --alpha 0.9 --model mlp-8 --grad-loss {kind} --grad-epochs 2"
        run(tmp_path / kind, f"{flags} --grad-heatmap {tmp_path}/{kind}.npz")
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
    end_epoch = common.end_epoch

    def stopped(found, epoch, *rest):
        end_epoch(found, epoch, *rest)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "end_epoch", stopped)
    with pytest.raises(SystemExit):
        run(tmp_path / "resumed", flags)
    monkeypatch.setattr(common, "end_epoch", end_epoch)
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
    for name, width in (("mlp-4", 1.0), ("resnet18", 1 / 32)):
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
