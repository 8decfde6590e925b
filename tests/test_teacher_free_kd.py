"""teacher_free_kd.py: its losses, exits, omitted digit, gradients, defaults and its loop."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import same_weights

import common
import eval_robustness
import teacher_free_kd as tf

TINY = (
    "--data shapes --train-subset 40 --test-subset 20 --val-size 20 --batch-size 16 --epochs 2 "
    "--steps 2 --eval-attack clean pgd2 --device cpu"
)


def parse(flags):
    return tf.parse_args([*TINY.split(), *flags.split()])


def run(runs, flags):
    """Train in the folder `runs`; -> the rows of the summary by their name."""
    (rows,) = tf.main([*TINY.split(), *flags.split(), "--runs", str(runs)])
    return {row["model"]: row for row in rows}


def file_of(runs, name="student.pt"):
    (path,) = runs.glob(f"teacher_free_kd/*/{name}")
    return path


# ------------------------------------------------------------------------------------------------
# Losses: against the equations written with nothing but floats

BATCH, CLASSES = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])


def random_logits(seed, width=CLASSES):
    return 2 * torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = random_logits(1), random_logits(3)


def softmax(row, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy(targets, row, temperature=1.0):
    probs = softmax(row, temperature)
    return -sum(q * math.log(p) for q, p in zip(targets, probs) if q)


def divergence(targets, row, temperature=1.0):
    entropy = -sum(q * math.log(q) for q in targets if q)
    return cross_entropy(targets, row, temperature) - entropy


def one_hot(label):
    return [float(k == label) for k in range(CLASSES)]


def virtual(label, delta):
    other = (1 - delta) / (CLASSES - 1)
    return [delta if k == label else other for k in range(CLASSES)]


def mean_over_batch(of_image):
    """The mean of of_image(student logits, teacher logits, label), lists of floats."""
    images = zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist())
    return sum(of_image(s, t, label) for s, t, label in images) / BATCH


def smoothed_cross_entropy(s, labels, smoothing):
    """CE((1-s) y + s/K, S) by its equation: (B, K), (B,) -> ()."""
    classes = s.shape[1]
    targets = (1 - smoothing) * F.one_hot(labels, classes) + smoothing / classes
    return -(targets * s.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("tau2, temperature", [(True, 1.0), (True, 5.0), (False, 5.0)])
def test_kd_is_equations_2_3_and_6(tau2, temperature):
    factor = temperature**2 if tau2 else 1

    def of_image(s, t, label):
        distilled = factor * divergence(softmax(t, temperature), s, temperature)
        return 0.7 * cross_entropy(one_hot(label), s) + 0.3 * distilled

    loss = tf.kd_loss(STUDENT, TEACHER, LABELS, 0.3, temperature, tau2).item()
    assert loss == pytest.approx(mean_over_batch(of_image), rel=1e-5)


@pytest.mark.parametrize("tau2", [True, False])
@pytest.mark.parametrize("form", ["repo", "paper"])
def test_reg_is_equation_4_in_each_form(form, tau2):
    temperature, delta = 3.0, 0.9

    def of_image(s, t, label):
        probs = virtual(label, delta)
        if form == "repo":  # the student is not softened
            distilled = divergence(softmax(probs, temperature), s)
        else:
            targets = softmax([math.log(p) for p in probs], temperature)
            distilled = divergence(targets, s, temperature)
            distilled *= temperature**2 if tau2 else 1
        return 0.6 * cross_entropy(one_hot(label), s) + 0.4 * distilled

    loss = tf.reg_loss(STUDENT, LABELS, 0.4, temperature, delta, form, tau2).item()
    assert loss == pytest.approx(mean_over_batch(of_image), rel=1e-5)


def test_at_kd_is_the_cross_entropy_with_mixed_targets():
    def of_image(s, t, label):
        mixed = [0.6 * p + 0.4 * q for p, q in zip(softmax(t, 2.0), one_hot(label))]
        return 4 * cross_entropy(mixed, s, 2.0)

    loss = tf.at_kd_loss(STUDENT, TEACHER, LABELS, 0.6, 2.0).item()
    assert loss == pytest.approx(mean_over_batch(of_image), rel=1e-5)


@pytest.mark.parametrize("tau2", [True, False])
def test_self_distillation_is_the_sum_over_its_exits(tau2):
    exits = [random_logits(7), STUDENT, TEACHER]
    features = [random_logits(8, 6), random_logits(9, 6), random_logits(10, 6)]
    total = 0.0
    for image, label in enumerate(LABELS.tolist()):
        last = exits[2][image].tolist()
        total += cross_entropy(one_hot(label), last)
        for early in (0, 1):
            s = exits[early][image].tolist()
            soft = divergence(softmax(last, 3.0), s, 3.0) * (9 if tau2 else 1)
            distance = math.dist(features[early][image].tolist(), features[2][image].tolist())
            total += 0.7 * cross_entropy(one_hot(label), s) + 0.3 * soft + 0.05 * distance
    loss = tf.self_distillation_loss(exits, features, LABELS, 0.3, 3.0, 0.05, tau2)
    assert loss.item() == pytest.approx(total / BATCH, rel=1e-5)


def test_a_virtual_teacher_is_a_distribution_with_delta_on_the_label():
    probs = tf.virtual_teacher(LABELS, CLASSES, 0.9)
    torch.testing.assert_close(probs.sum(1), torch.ones(BATCH))
    torch.testing.assert_close(probs[torch.arange(BATCH), LABELS], torch.full((BATCH,), 0.9))


# The limits that tie the losses together


def gradient(loss):
    """The gradient of loss(student logits)."""
    student_logits = STUDENT.clone().requires_grad_()
    return torch.autograd.grad(loss(student_logits), student_logits)[0]


def assert_same_gradient(first, second):
    torch.testing.assert_close(gradient(first), gradient(second))


def plain(s):
    return F.cross_entropy(s, LABELS)


def test_alpha_zero_is_cross_entropy():
    for loss in (
        lambda s: tf.kd_loss(s, TEACHER, LABELS, 0.0, 6.0, True),
        lambda s: tf.reg_loss(s, LABELS, 0.0, 20.0, 0.99, "repo", True),
        lambda s: tf.at_kd_loss(s, TEACHER, LABELS, 0.0, 1.0),
    ):
        assert loss(STUDENT).item() == pytest.approx(plain(STUDENT).item())
        assert_same_gradient(loss, plain)


@pytest.mark.parametrize("form, temperature", [("repo", 2.0), ("paper", 2.0), ("paper", 1.0)])
def test_tf_kd_reg_with_delta_one_is_cross_entropy_plus_a_known_term(form, temperature):
    alpha = 0.4
    label_prob = 1.0
    if form == "repo":
        label_prob = math.exp(1 / temperature) / (math.exp(1 / temperature) + CLASSES - 1)
    targets = torch.full((BATCH, CLASSES), (1 - label_prob) / (CLASSES - 1))
    targets[torch.arange(BATCH), LABELS] = label_prob
    softened = temperature if form == "paper" else 1.0

    def expected(s):
        entropy = -(targets * targets.clamp_min(1e-30).log()).sum(1).mean()
        known_term = softened**2 * (F.cross_entropy(s / softened, targets) - entropy)
        return (1 - alpha) * plain(s) + alpha * known_term

    def loss(s):
        return tf.reg_loss(s, LABELS, alpha, temperature, 1.0, form, True)

    assert loss(STUDENT).item() == pytest.approx(expected(STUDENT).item(), rel=1e-5)
    assert_same_gradient(loss, expected)
    if temperature == 1:  # the known term is the cross-entropy itself
        assert loss(STUDENT).item() == pytest.approx(plain(STUDENT).item())


def test_tf_kd_reg_in_its_plain_form_is_label_smoothing():
    alpha, delta = 0.3, 0.8
    smoothing = alpha * (1 - delta) * CLASSES / (CLASSES - 1)
    assert_same_gradient(
        lambda s: tf.reg_loss(s, LABELS, alpha, 1.0, delta, "paper", True),
        lambda s: smoothed_cross_entropy(s, LABELS, smoothing),
    )


def test_the_repo_form_forgets_delta_and_is_nearly_label_smoothing():
    def targets_of(delta):
        """The targets of 10 classes: (S - targets) / B is the gradient of the KL by the logits."""
        s = random_logits(1, 10).requires_grad_()
        tf.reg_loss(s, LABELS % 3, 1.0, 20.0, delta, "repo", True).backward()
        return s.softmax(1) - BATCH * s.grad

    targets = targets_of(0.99)
    assert targets.max().item() == pytest.approx(0.1045, abs=1e-4)
    assert targets.min().item() == pytest.approx(0.0995, abs=1e-4)
    assert (targets - targets_of(0.5)).abs().max() < 3e-3
    repo = gradient(lambda s: tf.reg_loss(s, LABELS, 0.1, 20.0, 0.99, "repo", True))
    smoothed = gradient(lambda s: smoothed_cross_entropy(s, LABELS, 0.1))
    assert (repo - smoothed).abs().max() < 0.02 * smoothed.abs().max()


def test_the_kl_goes_from_the_teacher_to_the_student_and_is_zero_when_they_agree():
    def distilled(s, t):
        return tf.kd_loss(s, t, LABELS, 1.0, 2.0, True).item()

    assert distilled(TEACHER, TEACHER) == pytest.approx(0, abs=1e-6)
    assert distilled(STUDENT, TEACHER) != pytest.approx(distilled(TEACHER, STUDENT), rel=1e-2)


def test_tau2_keeps_the_scale_of_the_gradient():
    def norm(temperature):
        s = (STUDENT / 10).requires_grad_()
        loss = tf.kd_loss(s, TEACHER / 10, LABELS, 1.0, temperature, True)
        return torch.autograd.grad(loss, s)[0].norm().item()

    assert 0.5 < norm(20.0) / norm(1.0) < 2


def test_no_gradient_reaches_a_teacher_nor_the_last_exit_by_the_others():
    t, s = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    tf.kd_loss(s, t, LABELS, 0.5, 2.0, True).backward()
    tf.at_kd_loss(s, t, LABELS, 0.5, 2.0).backward()
    assert t.grad is None
    exits = [random_logits(7).requires_grad_(), TEACHER.clone().requires_grad_()]
    features = [random_logits(8).requires_grad_(), random_logits(9).requires_grad_()]
    tf.self_distillation_loss(exits, features, LABELS, 0.5, 3.0, 1.0, True).backward()
    by_labels_alone = torch.autograd.grad(F.cross_entropy(exits[1], LABELS), exits[1])[0]
    torch.testing.assert_close(exits[1].grad, by_labels_alone)
    assert features[1].grad is None and features[0].grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------
# Exits and costs


@pytest.mark.parametrize("name", ["resnet18-w2", "resnet50-w2", "wrn-10-1"])
def test_exits_have_the_right_shapes_and_growing_costs(name):
    net = common.build_model(name, 10)
    exits = tf.Exits(net).eval()
    x = torch.rand(3, 3, 32, 32)
    logits, features = exits(x)
    number = 3 if name.startswith("wrn") else 4
    assert [tuple(each.shape) for each in logits] == [(3, 10)] * number
    assert {tuple(each.shape) for each in features} == {(3, net.fc.in_features)}
    torch.testing.assert_close(logits[-1], net(x))  # the last exit is the net itself
    data = common.load_data("shapes", test_subset=1)
    costs = []
    for i in range(number):
        one = tf.OneExit(exits, i)
        torch.testing.assert_close(one(x), logits[i])
        costs.append(tf.macs(one, data))
    assert costs == sorted(costs) and costs[-1] == tf.macs(net, data) < tf.macs(exits, data)


def macs_by_hand(net, size=32):
    """Multiply-adds of a net from the shapes of its weights and of its feature maps."""
    costs = []

    def count(layer, x, out):
        positions = out[0, 0].numel() if out.dim() == 4 else 1
        costs.append(layer.weight.numel() * positions)

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    net(torch.zeros(1, 3, size, size))
    return sum(costs)


def test_costs_are_multiply_adds_counted_by_hand_and_table_1s():
    data = common.load_data("shapes", test_subset=1)
    net = common.build_model("resnet18-w8", 10).eval()
    assert tf.macs(net, data) == macs_by_hand(net)
    digits = dataclasses.replace(data, x_test=torch.zeros(1, 28, 28, 1, dtype=torch.uint8))
    for name, weights, parameters in (
        ("mlp-1200-1200", 2_392_800, 2_395_210),  # paper: 940800 + 1440000 + 12000
        ("mlp-400", 317_600, 318_010),  # paper: 313600 + 4000
    ):
        mlp = common.build_model(name, 10, channels=1, size=28).eval()
        row = tf.size_columns(mlp, digits)
        assert (row["weights"], row["parameters"], row["macs"]) == (weights, parameters, weights)


def test_ensembles_are_of_all_exits_and_every_exit_is_evaluated_in_strict_float32(monkeypatch):
    net = common.build_model("wrn-10-1").eval()
    exits = tf.Exits(net).eval()
    precisions, head = set(), tf.Exits.head

    def spied(self, i, h):
        if len(h) > 1:  # macs counts on one image, whatever the precision
            precisions.add((torch.backends.cudnn.conv.fp32_precision, self.training))
        return head(self, i, h)

    monkeypatch.setattr(tf.Exits, "head", spied)
    data = common.load_data("shapes", test_subset=40)
    with common.strict_float32(tf32_convolutions=True):
        rows = tf.exit_rows(net, exits.early_heads.state_dict(), data, 40)
    assert precisions == {("ieee", False)}
    accuracies = {row["model"]: row["clean_acc"] for row in rows}
    with torch.no_grad():
        logits = torch.stack(exits(common.to_float(data.x_test))[0])  # (exits, N, K)
    for name, expected in (
        ("ensemble: mean of probabilities", logits.softmax(2).mean(0)),
        ("ensemble: mean of logits", logits.mean(0)),
        ("exit 1", logits[0]),
    ):
        assert accuracies[name] == pytest.approx(common.accuracy(expected, data.y_test))


def test_self_distillation_saves_a_plain_net_and_shows_every_exit(tmp_path):
    rows = run(tmp_path, "--method self-distillation --model wrn-10-1")
    names = [name for name in rows if name.startswith(("exit", "ensemble"))]
    ensembles = ["ensemble: mean of probabilities", "ensemble: mean of logits"]
    assert names == ["exit 1", "exit 2", "exit 3", *ensembles]
    student = rows["student (self-distillation)"]
    for key in ("clean_acc", "macs"):
        assert rows["exit 3"][key] == student[key]
    net = common.load_model(file_of(tmp_path))
    assert net.state_dict().keys() == common.build_model("wrn-10-1").state_dict().keys()
    data = common.load_data("shapes", test_subset=20)
    again = eval_robustness.evaluate(net, data.x_test, data.y_test, ["clean"])
    assert again["clean_acc"] == student["clean_acc"]


def test_the_last_exit_answers_as_the_student_does_on_every_image(tmp_path):
    run(tmp_path, "--method self-distillation --model wrn-10-1 --epochs 1 --eval-attack clean")
    net = common.load_model(file_of(tmp_path))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = common.load_data("shapes", test_subset=100)
    student = common.predict(net, data.x_test).argmax(1)
    data = dataclasses.replace(data, y_test=student)
    rows = tf.exit_rows(net, net.meta["exits"], data, 32)
    assert {row["model"]: row["clean_acc"] for row in rows}["exit 3"] == 1.0
    assert rows[-1]["macs"] > rows[2]["macs"] == tf.macs(net.train(), data)
    assert net.training  # as it was handed over
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_self_distillation_trains_the_exits_and_the_trunk_through_them(tmp_path):
    flags = (
        "--method self-distillation --model wrn-10-1 --epochs 1 --val-size 0 --train-subset 16 "
        "--eval-attack clean --name run "
    )
    run(tmp_path / "a", flags)
    run(tmp_path / "b", flags + "--alpha 0.9")
    run(tmp_path / "c", flags + "--byot-lambda 1")
    records = [common.load(file_of(tmp_path / folder)) for folder in "abc"]
    first = [record["weights"]["stages.0.0.conv1.weight"] for record in records]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    trained = records[0]["meta"]["exits"]
    torch.manual_seed(common.derive_seed("init", 0, "student"))
    start = tf.Exits(common.build_model("wrn-10-1")).early_heads.state_dict()
    assert trained.keys() == start.keys()
    changed = [not torch.equal(value, start[key]) for key, value in trained.items()]
    assert all(changed)


# ------------------------------------------------------------------------------------------------
# An omitted digit

DIGITS = (
    "--method vanilla --teacher-model mlp-64 --model mlp-16 --val-size 40 --epochs 3 "
    "--teacher-epochs 3 --batch-size 16 --teacher-batch-size 16 --device cpu"
)


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
        arrays[f"x_{part}"] = x.astype(np.uint8)
        arrays[f"y_{part}"] = y
    np.savez(root / "mnist.npz", **arrays)
    return root


def test_omitted_digits_never_reach_the_students_batches(mnist, tmp_path, monkeypatch):
    images, batches = {}, common.batches

    def spied(data, batch_size, seed, stage, epoch):
        for x, labels in batches(data, batch_size, seed, stage, epoch):
            images.setdefault(stage, []).append(x.view(-1, 28, 28))
            yield x, labels

    corrected_on, correct_bias = [], tf.correct_bias

    def spied_correction(net, data, digit, batch_size):
        corrected_on.append(data)
        return correct_bias(net, data, digit, batch_size)

    monkeypatch.setattr(tf, "correct_bias", spied_correction)
    monkeypatch.setattr(common, "batches", spied)
    flags = f"{DIGITS} --omit-digit 7 --bias-correction --grad-heatmap --data-root {mnist}"
    (summary,) = tf.main([*flags.split(), "--runs", str(tmp_path)])
    data = common.load_data("mnist", mnist, val_size=40)

    def digits(stage):
        """What every image shows: the row of its bar is the digit."""
        brightness = torch.cat(images[stage])[:, :, 8:20].mean(2)
        return (brightness.argmax(1) - 4) // 2

    kept = int((data.y_train != 7).sum())
    for stage in ("student", "student-alone"):
        assert (digits(stage) != 7).all() and len(digits(stage)) == 3 * kept
    assert torch.equal(torch.cat(images["student"]), torch.cat(images["student-alone"]))
    assert len(digits("teacher")) == 3 * len(data.y_train) and (digits("teacher") == 7).any()
    rows = {row["model"]: row for row in summary}
    nets = [row["net"] for row in summary if row["net"] != "best"]
    assert nets == ["teacher", "alone", "student", "alone, corrected", "student, corrected"]
    with np.load(file_of(tmp_path, "gradients.npz")) as file:
        recorded = {name.split("/")[0] for name in file}
    assert recorded == {"student-alone (plain)", "student (vanilla)"}
    for name in ("student-alone (plain)", "student (vanilla)"):
        row, raised = rows[name], rows[f"{name}, bias corrected"]
        assert raised["only_7_acc"] >= row["only_7_acc"]
        whole = (9 * row["without_7_acc"] + row["only_7_acc"]) / 10
        assert row["clean_acc"] == pytest.approx(whole)
    assert len(corrected_on) == 2 and all((seen.y_train == 7).any() for seen in corrected_on)
    alone = rows["student-alone (plain)"]
    assert alone["only_7_acc"] <= 0.2 and alone["without_7_acc"] > 0.9
    assert rows["student (vanilla)"]["weights"] == 784 * 16 + 160


def test_the_held_out_images_of_the_student_lack_the_digit_too():
    data = common.load_data("shapes", val_size=200)
    less = tf.without_digit(data, 3)
    assert (less.y_train != 3).all() and (less.y_val != 3).all()
    assert len(less.x_val) == len(less.y_val) == int((data.y_val != 3).sum())
    assert len(less.x_train) == len(less.y_train) == int((data.y_train != 3).sum())
    assert torch.equal(less.y_test, data.y_test)


def test_the_corrected_bias_gives_the_digit_its_share_and_changes_nothing_else(mnist):
    data = common.load_data("mnist", mnist)
    model = common.new_model(data, "mlp-16", 0, "student").eval()
    before = common.predict(model, data.x_train)
    after = common.predict(tf.correct_bias(model, data, 2, 500), data.x_train)
    share = (after.argmax(1) == 2).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)  # a tenth of the images show it
    difference = after - before
    others = [k for k in range(10) if k != 2]
    assert difference[:, others].abs().max() < 1e-5
    torch.testing.assert_close(difference[:, 2], difference[0, 2].expand(len(after)))
    torch.testing.assert_close(common.predict(model, data.x_train), before)


def test_accuracies_with_and_without_a_digit_are_in_strict_float32(mnist, monkeypatch):
    precisions, forward = set(), common.MLP.forward

    def spied(net, x):
        precisions.add(torch.backends.cuda.matmul.fp32_precision)
        return forward(net, x)

    monkeypatch.setattr(common.MLP, "forward", spied)
    monkeypatch.setattr(tf, "macs", lambda *args: 0)
    data = common.load_data("mnist", mnist)
    model = common.new_model(data, "mlp-16", 0, "student").eval()
    with common.float32_restored():
        torch.set_float32_matmul_precision("high")  # TF32
        tf.digit_columns(tf.correct_bias(model, data, 3, 500), data, 3, 500)
    assert precisions == {"ieee"}


# ------------------------------------------------------------------------------------------------
# The gradients of Figure 1


def test_the_heat_map_is_a_gradient_computed_by_hand_on_a_two_layer_net():
    torch.manual_seed(3)
    net = common.build_model("mlp-3", 4, channels=1, size=2, mean=[0.0], std=[1.0])
    first, second = [m for m in net.modules() if isinstance(m, nn.Linear)]
    gradients = tf.Gradients(net, [2], steps_per_epoch=2)
    total = {"1.1": 0.0, "1.2": 0.0}
    for _ in range(2):  # two minibatches: means of absolute values, not of their sum
        x = torch.rand(BATCH, 1, 2, 2)
        loss = F.cross_entropy(net(x), LABELS)
        for epoch in (1, 2):  # the first is not recorded
            gradients.add(epoch, loss)
        flat = x.flatten(1).double()
        hidden = flat @ first.weight.double().T + first.bias.double()
        probs = (hidden.relu() @ second.weight.double().T + second.bias.double()).softmax(1)
        by_logits = (probs - F.one_hot(LABELS, 4)) / BATCH  # (B, 4)
        by_hidden = (by_logits @ second.weight.double()) * (hidden > 0)
        total["1.2"] += (by_logits.T @ hidden.relu()).abs().mean().item() / 2
        total["1.1"] += (by_hidden.T @ flat).abs().mean().item() / 2
    numbers = gradients.numbers()
    assert numbers["layers"] == ["1.1", "1.2"] and numbers["epochs"] == [2]
    assert numbers["means"][0] == pytest.approx([total["1.1"], total["1.2"]], rel=1e-5)


def test_what_a_backward_pass_left_is_what_the_loss_gives():
    net = common.build_model("mlp-3", 4, channels=1, size=2)
    kept, given = (tf.Gradients(net, [1], steps_per_epoch=1) for _ in range(2))
    loss = F.cross_entropy(net(torch.rand(BATCH, 1, 2, 2)), LABELS)
    given.add(1, loss)
    loss.backward()
    kept.add(1)
    assert kept.numbers() == given.numbers() and min(kept.numbers()["means"][0]) > 0


def test_layers_of_a_net_of_your_own_are_its_trained_weights():
    class Own(nn.Module):
        stages = [2, 2]  # no list of modules

        def __init__(self):
            super().__init__()
            self.a, self.shortcut, self.unused = (nn.Linear(4, 4) for _ in range(3))
            self.b, self.frozen = nn.ModuleDict({"shortcut": nn.Linear(4, 4)}), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.b["shortcut"](self.frozen(self.a(x) + self.shortcut(x)))

    net = Own()
    for loss in (None, net(torch.rand(2, 4)).square().sum()):
        gradients = tf.Gradients(net, [1], 1)
        net(torch.rand(2, 4)).square().sum().backward()
        gradients.add(1, loss)
        means = gradients.numbers()["means"][0]
        assert gradients.numbers()["layers"] == ["1.1", "1.2", "1.3", "1.4"]
        assert [mean > 0 for mean in means] == [True, True, False, True]


def test_the_milestones_of_an_equal_teacher_are_the_students():
    for epochs in (12, 50, 60, 150, 200):
        for milestone in range(1, epochs):
            args = parse(f"--method tf-kd-self --epochs {epochs} --milestones {milestone}")
            assert tf.teacher_args(args).milestones == [milestone]
    args = parse("--method tf-kd-self --epochs 12 --teacher-epochs 20")
    assert tf.teacher_args(args).milestones == [6, 12, 16]


def test_gamma_has_no_effect_on_a_teacher_whose_rate_is_a_cosine():
    args = parse("--method vanilla")  # refuses --gamma; --demo sets it for all methods
    one, other = (tf.teacher_args(common.replace(args, gamma=gamma)) for gamma in (0.2, 0.5))
    assert common.run_flags(one) == common.run_flags(other)


def test_a_digit_that_no_test_image_shows_is_named_before_the_training(mnist, tmp_path, refused):
    flags = f"{DIGITS} --omit-digit 7 --test-subset 1 --data-root {mnist} --runs {tmp_path}"
    assert "no test image shows the digit 7" in refused(tf.main, flags.split())


def test_a_digit_that_nearly_all_training_images_show_is_named_before_the_training(
    mnist, tmp_path, refused
):
    data = common.load_data("mnist", mnist, val_size=40, train_subset=2)
    flags = f"{DIGITS} --val-size 40 --train-subset 2 --omit-digit {data.y_train[0]}"
    line = refused(tf.main, f"{flags} --data-root {mnist} --runs {tmp_path}".split())
    assert line.startswith("--train-subset 2: ") and line.endswith("take more")
    assert not list(tmp_path.glob("teacher_free_kd"))


def test_the_layers_of_a_resnet_are_its_convolutions_by_stage():
    layers = list(tf.Gradients(common.build_model("resnet18-w4", 10), [1], 1).weights)
    convolutions = [f"{stage}.{number}" for stage in (1, 2, 3, 4) for number in (1, 2, 3, 4)]
    assert sorted(layers) == sorted([*convolutions, "2.shortcut", "3.shortcut", "4.shortcut"])
    layers = list(tf.Gradients(common.build_model("wrn-10-1"), [1], 1).weights)
    assert layers[:5] == ["1.1", "1.2", "2.1", "2.2", "2.shortcut"]


def test_the_heat_map_of_the_students_is_written_with_the_command_that_draws_it(tmp_path, capsys):
    run(tmp_path, "--method tf-kd-self --model wrn-10-1 --teacher-epochs 1 --grad-heatmap")
    path = file_of(tmp_path, "gradients.npz")
    assert f"python benchmark/plots.py gradients {path}" in capsys.readouterr().out
    with np.load(path) as file:
        means = file["student (tf-kd-self)/means"]
        assert means.shape == (2, 8) and (means > 0).all()
        assert file["student (tf-kd-self)/epochs"].tolist() == [1, 2]
        assert file["student (tf-kd-self)/layers"].tolist()[-1] == "3.shortcut"
    # the teacher is the same with and without it
    teachers = [*tmp_path.glob("teachers/*/teacher.pt")]
    run(tmp_path, "--method tf-kd-self --model wrn-10-1 --teacher-epochs 1")
    assert [*tmp_path.glob("teachers/*/teacher.pt")] == teachers
    assert len(teachers) == 1 and len([*tmp_path.glob("*/*/gradients.npz")]) == 1


def test_own_and_cross_entropy_gradients_differ_and_train_the_same_net(tmp_path):
    flags = "--method tf-kd-reg --reg-form repo --alpha 0.9 --model mlp-8"
    means = {}
    for kind in ("own", "ce"):
        run(tmp_path / kind, f"{flags} --grad-loss {kind} --grad-heatmap")
        gradients = np.load(file_of(tmp_path / kind, "gradients.npz"))
        means[kind] = gradients["student (tf-kd-reg)/means"]
    run(tmp_path / "none", flags)
    # own weighs the labels with 0.1
    assert means["own"].shape == (2, 2) and (means["own"][1] < 0.7 * means["ce"][1]).all()
    assert same_weights(file_of(tmp_path / "own"), file_of(tmp_path / "ce"))
    assert same_weights(file_of(tmp_path / "own"), file_of(tmp_path / "none"))
    assert [*(tmp_path / "none").rglob("gradients.npz")] == []


# ------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("method", [name for name in tf.METHODS if name != "self-distillation"])
def test_each_method_runs_and_ends_in_a_table(method, tmp_path):
    flags = f"--method {method} --model mlp-8"
    if method in tf.ALSO_TRAINED_ALONE:
        flags += " --teacher-model mlp-12"
    rows = run(tmp_path, flags)
    student = rows[f"student ({method})"]
    assert 0 <= student["clean_acc"] <= 1 and "pgd2_acc" in student
    attacked = method.startswith("at")
    if method in tf.TAUGHT_ON_X | tf.TAUGHT_ON_X_ADV:
        assert rows[f"teacher ({'at' if attacked else 'plain'})"]["net"] == "teacher"
    assert ("student-alone (plain)" in rows) == (method in ("vanilla", "re-kd"))
    assert student["net"] == "student"
    log = file_of(tmp_path, "log.jsonl").read_text()
    assert ("val_pgd7_acc" in log) == attacked


SHOWN = {  # method -> what the student, what the teacher is shown
    "tf-kd-self": ("x", "x"),
    "at": ("x_adv", None),
    "at-kd": ("x_adv", "x_adv"),
    "at-tf-kd-self": ("x_adv", "x"),
    "at-tf-kd-reg": ("x_adv", None),
}


@pytest.mark.parametrize("method", SHOWN)
def test_student_and_teacher_are_shown_what_the_paper_says(method, tmp_path, monkeypatch):
    forwards, attacks, pgd = [], [], common.pgd

    class Spied(nn.Module):
        def __init__(self, role):
            super().__init__()
            self.net, self.role = common.build_model("mlp-8"), role
            self.build_arguments = self.net.build_arguments

        def forward(self, x):
            forwards.append((self.role, self.training, x.detach().clone()))
            return self.net(x)

    def attack(model, x, labels, *settings):
        x_adv = pgd(model, x, labels, *settings)
        attacks.append((model.training, settings, {"x": x, "x_adv": x_adv}))
        forwards.clear()  # the passes of the attack itself
        return x_adv

    args = parse(f"--method {method} --model mlp-8 --epochs 1 --eps 8/255")
    data = common.load_data("shapes", train_subset=16, val_size=0)
    student, teacher = Spied("student"), Spied("teacher").eval().requires_grad_(False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    monkeypatch.setattr(common, "pgd", attack)
    monkeypatch.setattr(common, "new_model", lambda *settings: student)
    monkeypatch.setattr(common, "load_model", lambda *settings: None)
    tf.train(common.replace(args, seed=0), data, tmp_path, "student", teacher)
    student_sees, teacher_sees = SHOWN[method]
    images = {"x": forwards[0][2]}
    assert len(attacks) == (student_sees == "x_adv")
    if attacks:
        attack_mode, settings, images = attacks[0]
        assert not attack_mode and settings == (args.eps, args.step_size, 2)
        x_adv = images["x_adv"]
        assert 0 < (x_adv - images["x"]).abs().max() <= args.eps + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
    seen = {role: (mode, x) for role, mode, x in forwards}
    assert len(forwards) == len(seen)  # one pass each
    mode, x = seen["student"]
    assert mode and torch.equal(x, images[student_sees])
    assert ("teacher" in seen) == (teacher_sees is not None)
    if teacher_sees:
        mode, x = seen["teacher"]
        assert not mode and torch.equal(x, images[teacher_sees])
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


KD = "--alpha 0.3 --temperature 2"
FIRST_LOSS = {  # method -> its flags, the loss of logits of student and teacher, and labels
    "plain": ("", lambda s, t, y: F.cross_entropy(s, y)),
    "label-smoothing": ("--smoothing 0.2", lambda s, t, y: smoothed_cross_entropy(s, y, 0.2)),
    "vanilla": (KD, lambda s, t, y: tf.kd_loss(s, t, y, 0.3, 2.0)),
    "re-kd": (f"{KD} --no-tau2", lambda s, t, y: tf.kd_loss(s, t, y, 0.3, 2.0, False)),
    "tf-kd-self": (KD, lambda s, t, y: tf.kd_loss(s, t, y, 0.3, 2.0)),
    "tf-kd-reg": (
        f"{KD} --delta 0.9 --no-tau2",
        lambda s, t, y: tf.reg_loss(s, y, 0.3, 2.0, 0.9, "paper", False),
    ),
    "at": ("", lambda s, t, y: F.cross_entropy(s, y)),
    "at-kd": (KD, lambda s, t, y: tf.at_kd_loss(s, t, y, 0.3, 2.0)),
    "at-tf-kd-self": (KD, lambda s, t, y: tf.kd_loss(s, t, y, 0.3, 2.0)),
    "at-tf-kd-reg": (
        f"{KD} --delta 0.9 --reg-form repo",
        lambda s, t, y: tf.reg_loss(s, y, 0.3, 2.0, 0.9, "repo"),
    ),
}


@pytest.mark.parametrize("method", FIRST_LOSS)
def test_the_first_step_has_the_loss_of_the_method(method, tmp_path):
    flags, loss = FIRST_LOSS[method]
    args = parse(f"--method {method} {flags} --model mlp-8 --epochs 1")
    args.seed = 0
    data = common.load_data("shapes", train_subset=16)
    teacher = common.new_model(data, "mlp-8", 7, "teacher").eval().requires_grad_(False)
    tf.train(args, data, tmp_path, "student", teacher)
    (row,) = common.read_log(tmp_path)["student"]  # of one step
    model = common.new_model(data, "mlp-8", 0, "student")
    ((x, labels),) = common.batches(data, 16, 0, "student", 0)
    common.seed_epoch(0, "student", 0)
    student_x, teacher_x = x, x
    if method in tf.ATTACKED:
        student_x = common.pgd(model.eval(), x, labels, 8 / 255, 2 / 255, 2)
    if method == "at-kd":
        teacher_x = student_x
    expected = loss(model(student_x), teacher(teacher_x), labels)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_first_step_of_self_distillation_has_its_loss(tmp_path):
    flags = "--alpha 0.4 --byot-lambda 0.05 --temperature 2 --tau2 --epochs 1"
    args = parse(f"--method self-distillation --model wrn-10-1 {flags}")
    args.seed = 0
    data = common.load_data("shapes", train_subset=16)
    tf.train(args, data, tmp_path, "student")
    ((x, labels),) = common.batches(data, 16, 0, "student", 0)
    exits = tf.Exits(common.new_model(data, "wrn-10-1", 0, "student")).train()
    expected = tf.self_distillation_loss(*exits(x), labels, 0.4, 2.0, 0.05, True)
    (row,) = common.read_log(tmp_path)["student"]
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_training_is_sgd_with_momentum_written_out(tmp_path):
    flags = "--milestones 1 2 --gamma 0.5 --warmup 0 --weight-decay 0.01 --epochs 3 --lr 0.1"
    args = parse(f"--method plain --model mlp-8 {flags}")
    args.seed = 0
    data = common.load_data("shapes", train_subset=40)
    trained = tf.train(args, data, tmp_path, "student")
    net = common.new_model(data, "mlp-8", 0, "student")
    momenta = [torch.zeros_like(weights) for weights in net.parameters()]
    for epoch in range(3):
        for x, labels in common.batches(data, args.batch_size, 0, "student", epoch):
            loss = F.cross_entropy(net(x), labels)
            gradients = torch.autograd.grad(loss, [*net.parameters()])
            for weights, momentum, gradient in zip(net.parameters(), momenta, gradients):
                momentum.mul_(0.9).add_(gradient + 0.01 * weights.detach())
                weights.data -= 0.1 * 0.5**epoch * momentum
    for found, expected in zip(trained.parameters(), net.parameters()):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def test_the_cosine_of_an_early_stopped_teacher_is_that_of_a_whole_one():
    flags = "--method vanilla --data shapes --teacher-epochs 20 --teacher-es"
    early, whole = (tf.teacher_args(parse(f"{flags} {epochs}")) for epochs in (5, 20))
    factors = [[tf.lr_factor(args, step, 3) for step in range(15)] for args in (early, whole)]
    assert factors[0] == factors[1] and factors[0][14] > 0.8


def test_the_radius_of_the_evaluation_and_its_seed_are_those_of_the_run(tmp_path, monkeypatch):
    asked = []

    def summary_rows(nets, data, folder, attacks, **settings):
        asked.append((attacks, settings))
        return [{"net": "student", "model": "s"}]

    monkeypatch.setattr(tf.eval_robustness, "summary_rows", summary_rows)
    flags = "--method plain --model mlp-8 --epochs 1 --eps 3/255 --seed 5 --eval-attack pgd3"
    run(tmp_path, flags)
    assert asked == [(["pgd3"], {"eps": 3 / 255, "seed": 5, "batch_size": 16})]


def test_the_student_alone_starts_from_the_weights_of_the_student(tmp_path, monkeypatch):
    starts, new_model = [], common.new_model

    def spied(*settings):
        model = new_model(*settings)
        starts.append({key: value.clone() for key, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(common, "new_model", spied)
    run(tmp_path, "--method vanilla --model mlp-8 --teacher-model mlp-8 --eval-attack clean")
    teacher, alone, student = starts
    assert all(torch.equal(value, student[key]) for key, value in alone.items())
    assert not torch.equal(teacher["layers.2.weight"], student["layers.2.weight"])


def test_attack_bn_train_attacks_in_train_mode(tmp_path, monkeypatch):
    modes, pgd = [], common.pgd

    def attack(model, *settings):
        modes.append(model.training)
        return pgd(model, *settings)

    monkeypatch.setattr(common, "pgd", attack)
    run(tmp_path, "--method at --model mlp-8 --attack-bn train --epochs 1 --eval-attack clean")
    assert modes == [True, True, True, False, False]  # three batches, then two of held-out images


def factors(flags, steps_per_epoch=10):
    """The factor on the student's learning rate as a function of the epoch."""
    args = tf.parse_args(flags.split())
    return lambda epoch: tf.lr_factor(args, round(epoch * steps_per_epoch), steps_per_epoch)


def test_learning_rates_follow_the_recipes():
    clean = factors("--method tf-kd-self")  # x 0.2 at 60, 120, 160 of 200, a warm-up of an epoch
    at_epochs = [clean(epoch) for epoch in (0, 0.5, 1, 59.9, 60, 120, 160)]
    assert at_epochs == pytest.approx([0.1, 0.6, 1, 1, 0.2, 0.04, 0.008])
    at = factors("--method at")
    assert 0.1 * at(49.9) == pytest.approx(5.7e-4, rel=0.01) and at(0) == 1 and at(1) == 0.9
    digits = factors("--method vanilla")
    assert [digits(epoch) for epoch in (0, 10, 20)] == pytest.approx([1, 0.5, 0])
    short = factors("--method plain --epochs 10 --milestones 2 4 --gamma 0.1 --warmup 0")
    assert [short(epoch) for epoch in (1.9, 2, 4)] == pytest.approx([1, 0.1, 0.01])


def test_a_teachers_milestones_are_in_proportion_and_its_stop_does_not_shorten_the_schedule():
    args = parse("--method re-kd --epochs 10 --milestones 2 5 --teacher-epochs 20 --teacher-es 7")
    teacher = tf.teacher_args(args)
    assert teacher.epochs == 7
    whole = "--method re-kd --epochs 10 --milestones 2 5 --teacher-epochs 7"
    whole = common.replace(tf.teacher_args(parse(whole)), milestones=teacher.milestones)
    assert common.run_flags(whole) == common.run_flags(teacher)  # the same net is trained once
    assert [tf.lr_factor(teacher, epoch, 1) for epoch in (3, 4, 9, 10)] == pytest.approx(
        [1, 0.2, 0.2, 0.04]
    )


TEACHER_KEPT = (
    "--alpha 0.5 --temperature 2 --no-tau2",
    "--eval-attack pgd3 --test-subset 10",
    "--grad-heatmap --grad-loss ce",
    "--eps 4/255 --steps 3 --step-size 1/255 --attack-bn train",  # the teacher learns from x
    "--method re-kd --model mlp-9 --teacher-model mlp-8",
    "--teacher-lr 0.1 --teacher-batch-size 16 --teacher-epochs 2",  # those of the student
)
TEACHER_CHANGED = (
    "--teacher-epochs 3",
    "--teacher-es 1",
    "--teacher-lr 0.05",
    "--lr 0.06",
    "--teacher-batch-size 8",
    "--weight-decay 0",
    "--warmup 0",
    "--gamma 0.5",
    "--milestones 1",
    "--schedule cosine",
    "--teacher-shift 1",
    "--augment none",
    "--val-size 10",
    "--model mlp-9",
    "--seed 1",
    "--method at-tf-kd-self",
    "--method at-tf-kd-self --eps 4/255",
    "--method at-tf-kd-self --step-size 1/255",
    "--method at-tf-kd-self --steps 3",
    "--method at-tf-kd-self --attack-bn train",
)


def test_a_teacher_is_shared_by_all_runs_with_its_flags_and_by_no_other(tmp_path, monkeypatch):
    class Trained(Exception):
        """A teacher would be trained in the folder that its argument names."""

    def train(args, data, folder, stage, teacher=None):
        raise Trained(folder.name)

    monkeypatch.setattr(tf, "train", train)
    data_of = functools.cache(common.load_data)

    def folder(flags):
        args = parse(f"--method tf-kd-self --model mlp-8 {flags} --runs {tmp_path}")
        args.seed = args.seed[0]
        data = data_of("shapes", val_size=args.val_size, train_subset=40, augment=args.augment)
        with pytest.raises(Trained) as end:
            tf.get_teacher(args, data)
        return str(end.value)

    plain = folder("")
    assert all(folder(flags) == plain for flags in TEACHER_KEPT)
    found = [plain]
    for flags in TEACHER_CHANGED:
        found.append(folder(flags))
        assert found[-1] not in found[:-1], flags
    assert folder("--method at-kd --alpha 0.5") == folder("--method at-tf-kd-self --no-tau2")


def test_a_teacher_that_is_there_is_not_trained_again(tmp_path):
    flags = "--method tf-kd-self --model mlp-8 --eval-attack clean --epochs 1 --teacher-epochs 2"
    run(tmp_path, flags)
    (path,) = tmp_path.glob("teachers/*/teacher.pt")
    written = path.stat().st_mtime_ns
    rows = run(tmp_path, f"{flags} --alpha 0.5")
    assert [*tmp_path.glob("teachers/*/teacher.pt")] == [path]
    assert path.stat().st_mtime_ns == written
    assert rows["teacher (plain)"]["file"].endswith(f"{path.parent.name}/teacher.pt")


def test_seeds_share_no_numbers_and_end_in_their_mean(tmp_path, capsys):
    flags = "--method tf-kd-self --teacher-epochs 1 --model mlp-8 --seed 0 1 --eval-attack clean"
    tf.main(f"{TINY} {flags} --grad-heatmap --runs {tmp_path}".split())
    assert "mean +- std of seeds 0 1" in capsys.readouterr().out
    for pattern in ("*/*/student.pt", "teachers/*/teacher.pt"):
        first, second = (common.load(path)["weights"] for path in tmp_path.glob(pattern))
        assert not torch.equal(first["layers.2.weight"], second["layers.2.weight"])
    gradients = [np.load(path)["student (tf-kd-self)/means"] for path in tmp_path.rglob("*.npz")]
    assert len(gradients) == 2 and not np.array_equal(*gradients)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop_at):
    flags = (
        f"{TINY} --method self-distillation --model wrn-10-1 --epochs 3 "
        f"--grad-heatmap --runs {tmp_path}"
    )
    tf.main(f"{flags}/whole".split())
    stop_at(tf, f"{flags}/resumed", "student", 2)
    tf.main(f"{flags}/resumed".split())
    paths = [file_of(tmp_path / folder) for folder in ("whole", "resumed")]
    assert same_weights(*paths)
    first, second = (common.load(path)["meta"] for path in paths)
    assert all(torch.equal(value, second["exits"][key]) for key, value in first["exits"].items())
    assert first["gradients"] == second["gradients"]
    rows = [json.loads((path.parent / "summary.json").read_text()) for path in paths]
    for row in rows[0] + rows[1]:
        row.pop("seconds", None)
    assert rows[0] == rows[1]


# ------------------------------------------------------------------------------------------------
# Flags

BAD_FLAGS = {
    "--method kd": "--method",
    "--omit-digit 10": "--omit-digit",
    "--omit-digit -1": "--omit-digit",
    "--omit-digit 3": "--omit-digit: goes with --data mnist, not shapes",
    "--bias-correction": "--bias-correction",
    "--method tf-kd-reg --delta 0.1": "--delta",
    "--method tf-kd-reg --delta 1.01": "--delta",
    "--method tf-kd-reg --reg-form yuan": "--reg-form",
    "--method tf-kd-reg --reg-form plain": "--reg-form: invalid choice: 'plain'",
    "--method plain --alpha 0.3": "--alpha: has no effect with --method plain",
    "--method at --no-tau2": "--tau2: has no effect with --method at",
    "--method tf-kd-self --byot-lambda 1": "--byot-lambda: has no effect with --method tf-kd-self",
    "--method plain --teacher-ckpt x.pt": "--teacher-ckpt",
    "--method tf-kd-self --teacher-model mlp-4": "--teacher-model",
    "--method tf-kd-self --teacher-ckpt none.pt": "none.pt",
    "--method self-distillation": "--model: self-distillation needs",
    "--method self-distillation --model resnet18-w1": "--model: self-distillation needs an even",
    "--method self-distillation --model preact-resnet18-w13-silu": "--model: self-distillation",
    "--model wrn-9-1": "--model",
    "--method re-kd --teacher-model resnet19": "--teacher-model",
    "--teacher-es 9": "--teacher-es 9: --teacher-epochs is only 2",
    "--method at --milestones 1": "--milestones: has no effect with --schedule exponential",
    "--method vanilla --gamma 0.5": "--gamma: has no effect with --schedule cosine",
    "--grad-loss ce": "--grad-loss: has no effect without --grad-heatmap",
    "--grad-heatmap --grad-loss ce --compile": "--grad-loss ce: its second backward pass",
    "--grad-heatmap out.npz": "out.npz",
    "--eval-attack fgsm": "--eval-attack: expected a list of clean, pgdN",
    "--eval-attack clean calibration": "--eval-attack: expected a list of clean, pgdN",
    "--eval-attack clean pgd5 clean": "each once; got 'clean' twice",
    "--eps 8//255": "--eps",
    "--method tf-kd-reg --reg-form repo --no-tau2": "--tau2: has no effect with --reg-form repo",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = [*TINY.split(), "--model", "mlp-8", *flags.split(), "--runs", str(tmp_path / "runs")]
    assert BAD_FLAGS[flags] in refused(tf.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_the_step_of_the_attack_is_a_quarter_of_its_radius():
    for flags, step in (("", 2 / 255), ("--eps 2/255", 0.5 / 255), ("--step-size 1/255", 1 / 255)):
        assert tf.parse_args(f"--method at {flags}".split()).step_size == step


@pytest.mark.parametrize("epochs, recorded", [(1, [1]), (2, [1, 2]), (5, [1, 3, 5])])
def test_gradients_are_of_the_first_the_middle_and_the_last_epoch(epochs, recorded, tmp_path):
    flags = f"--method plain --model mlp-8 --grad-heatmap --epochs {epochs} --eval-attack clean"
    run(tmp_path, f"{flags} --train-subset 16")
    gradients = np.load(file_of(tmp_path, "gradients.npz"))
    assert gradients["student (plain)/epochs"].tolist() == recorded


def test_settings_of_a_finished_teacher_are_said(capsys):
    tf.parse_args("--teacher-ckpt t.pt --teacher-es 2 --teacher-shift 1".split())
    said = "no teacher is trained here, so without effect: --teacher-es, --teacher-shift\n"
    assert capsys.readouterr().out == said


def test_settings_of_an_attack_where_no_net_is_attacked_are_said(capsys):
    said = "no net is attacked in training, so without effect: --steps, --step-size, --attack-bn\n"
    attack = ["--steps", "9", "--step-size", "1/255", "--attack-bn", "train"]
    for method in tf.METHODS:
        tf.parse_args(["--method", method, *attack, "--model", "wrn-10-1"])
        assert capsys.readouterr().out == ("" if method in tf.ATTACKED else said), method


def test_a_net_for_a_teacher_where_there_is_none_is_said(capsys):
    said = "no teacher is trained here, so without effect: --teacher-model\n"
    for method, line in (("plain", said), ("tf-kd-reg", said), ("re-kd", "")):
        tf.parse_args(["--method", method, "--teacher-model", "mlp-4"])
        assert capsys.readouterr().out == line


def test_the_teacher_of_a_demo_is_as_small_as_its_student():
    for method in ("re-kd", "tf-kd-self", "vanilla"):
        args = tf.parse_args(["--demo", "--method", method])
        assert tf.teacher_args(common.replace(args, seed=0)).model == "wrn-10-1"


def test_every_flag_of_a_loss_names_methods_that_there_are():
    for methods in tf.HAS_EFFECT.values():
        assert methods and methods <= tf.METHODS.keys()
    for name, method in tf.METHODS.items():
        for flag, default in (("--alpha", method.alpha), ("--temperature", method.temperature)):
            assert (name in tf.HAS_EFFECT[flag]) == (default is not None)


def test_a_teacher_of_another_architecture_is_refused_where_it_must_be_the_same(tmp_path, refused):
    path = tmp_path / "teacher.pt"
    for name in ("preact-resnet18-w4", "resnet18-w2"):
        common.save_model(path, common.build_model(name), training="at")
        for method in ("tf-kd-self", "at-tf-kd-self"):
            flags = f"--method {method} --model resnet18-w4 --teacher-ckpt {path}"
            assert str(path) in refused(run, tmp_path / "runs", flags)
    assert not (tmp_path / "runs").exists()
    # vanilla takes any
    rows = run(tmp_path, f"--method vanilla --model mlp-8 --teacher-ckpt {path}")
    assert "teacher (at)" in rows


def test_defaults_follow_the_method_alone():
    def given(flags):
        return tf.parse_args(flags.split())

    table_1 = given("--method vanilla")
    assert (table_1.data, table_1.model) == ("mnist", "mlp-400")
    assert table_1.teacher_model == "mlp-1200-1200"
    assert (table_1.alpha, table_1.temperature, table_1.lr) == (1.0, 10.0, 0.02)
    alone = given("--method plain --data mnist --model mlp-400")
    plain = given("--method plain")
    assert (alone.epochs, alone.lr, alone.schedule) == (plain.epochs, plain.lr, "steps")
    assert given("--method vanilla --data cifar10").model == "mlp-400"
    assert (table_1.epochs, table_1.schedule, table_1.teacher_shift) == (20, "cosine", 2)
    re_kd = given("--method re-kd")
    assert (re_kd.data, re_kd.model, re_kd.teacher_model) == ("cifar10", "resnet50", "resnet18")
    at = given("--method at-tf-kd-self")
    assert (at.epochs, at.lr, at.gamma, at.steps, at.eps) == (50, 0.1, 0.9, 7, 8 / 255)
    assert at.eval_attack == ["clean", "pgd20", "aa"] and re_kd.eval_attack == ["clean"]
    assert given("--method tf-kd-self --no-tau2").tau2 is False
    demo = given("--demo")
    assert (demo.data, demo.model, demo.eval_attack) == ("shapes", "wrn-10-1", ["clean", "pgd20"])


def test_a_run_prints_its_settings_zeros_too(tmp_path, capsys):
    flags = "--method re-kd --alpha 0 --no-tau2 --weight-decay 0 --warmup 0 --model mlp-8"
    run(tmp_path, f"{flags} --teacher-model mlp-8 --epochs 1")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "re-kd with" in line]
    for words in ("alpha 0.0", "temperature 20.0", "tau2 False", "weight-decay 0.0", "warmup 0.0"):
        assert f", {words}" in line
    assert "None" not in line


@pytest.mark.parametrize(
    "flags, pads",
    [
        ("", [2, 0]),  # of the digits' row, of grey images
        ("--augment none", [0, 0]),
        ("--augment none --teacher-shift 1", [1, 0]),
        ("--augment crop", [4, 4]),
    ],
)
def test_an_augmentation_that_is_given_is_the_teachers_too(
    flags, pads, mnist, tmp_path, monkeypatch
):
    seen, batches = {}, common.batches

    def spied(data, batch_size, seed, stage, epoch):
        seen[stage] = data.pad
        return batches(data, batch_size, seed, stage, epoch)

    monkeypatch.setattr(common, "batches", spied)
    flags = f"{DIGITS} --data-root {mnist} --epochs 1 --teacher-epochs 1 {flags}"
    tf.main([*flags.split(), "--runs", str(tmp_path)])
    assert [seen["teacher"], seen["student"]] == pads


def test_the_help_shows_the_defaults_of_the_method_that_is_given(capsys):
    with pytest.raises(SystemExit):
        tf.parse_args(["--method", "vanilla", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("net of the teacher", "epochs of the student's training"):
        assert words in text
    assert "(default: mlp-1200-1200)" in text and "(default: 20)" in text
