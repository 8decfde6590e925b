"""Attacks and evaluation: against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import eval_robustness as ev


class Linear(nn.Module):
    """Two classes, logits (0, w.x): every attack has a closed form on it."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def test_pgd_stays_in_the_ball_and_in_the_image_range():
    model = common.build_model("mlp-16", 10, size=8).eval()
    x = torch.rand(20, 3, 8, 8).round(decimals=1)  # many pixels at 0 and 1
    with pytest.raises(ValueError, match="unifrom"):
        common.pgd(model, x, torch.arange(20) % 10, 0.1, 0.07, 5, "unifrom")
    for start in ("uniform", "gaussian", "none"):
        x_adv = common.pgd(model, x, torch.arange(20) % 10, 0.1, 0.07, 5, start)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_pgd_solves_the_linear_model_exactly():
    model, eps = Linear(torch.randn(3, 4, 4)), 0.1
    x, labels = torch.full((6, 3, 4, 4), 0.5), torch.arange(6) % 2
    x_adv = common.pgd(model, x, labels, eps, 0.05, 5)  # 5 steps of eps / 2 cross the ball
    gain = (model(x_adv) - model(x))[:, 1]
    bound = eps * model.w.abs().sum()
    torch.testing.assert_close(gain, torch.where(labels == 0, bound, -bound))


def test_pgd_computes_no_weight_gradient_and_keeps_the_mode():
    model = common.build_model("wrn-10-1", 10).train()
    x = torch.rand(2, 3, 32, 32)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():  # works inside no_grad as well
        common.pgd(model, x, torch.tensor([1, 2]), 8 / 255, 2 / 255, 2)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_pgd_in_eval_mode_leaves_the_batchnorm_statistics():
    model = common.build_model("wrn-10-1", 10).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    common.pgd(model, torch.rand(4, 3, 32, 32), torch.arange(4), 8 / 255, 2 / 255, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pgd_with_probabilities_follows_the_gradient_of_the_kl():
    model = common.build_model("mlp-16", 5, size=4).eval()
    x = torch.rand(3, 3, 4, 4)
    targets = torch.randn(3, 5).softmax(1)
    x_adv = common.pgd(model, x, targets, 0.1, 0.02, 1, "none")
    leaf = x.clone().requires_grad_()
    F.kl_div(model(leaf).log_softmax(1), targets, reduction="batchmean").backward()
    torch.testing.assert_close(x_adv, (x + 0.02 * leaf.grad.sign()).clamp(0, 1))


def test_ffgsm_is_one_projected_step_of_its_own_size():
    model = Linear(torch.randn(3, 4, 4))
    x, labels = torch.full((50, 3, 4, 4), 0.5), torch.zeros(50, dtype=torch.long)
    delta = common.pgd(model, x, labels, 0.08, 0.1, steps=1) - x
    assert delta.abs().max() <= 0.08 + 1e-6
    # start u ~ U(-eps, eps), step 1.25 eps along the sign, projected: > 0.02 in the right direction
    assert ((delta * model.w.sign()).amin() > 0.02 - 1e-6) and (delta.abs() < 0.08 - 1e-4).any()


def test_a_zero_radius_changes_nothing():
    x = torch.rand(2, 3, 4, 4)
    model = Linear(torch.randn(3, 4, 4))
    assert torch.equal(common.pgd(model, x, torch.zeros(2).long(), 0.0, 0.1, 3), x)


def test_the_starts_of_pgd_have_their_distributions():
    model, labels = Linear(torch.ones(3, 8, 8)), torch.zeros(300).long()
    x = torch.full((300, 3, 8, 8), 0.5)
    starts = [common.pgd(model, x, labels, 0.1, 0.0, 0, s) - x for s in ("uniform", "gaussian")]
    uniform, gaussian = starts
    assert uniform.min() < -0.0999 and uniform.max() > 0.0999 and abs(uniform.mean()) < 1e-3
    assert uniform.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert gaussian.std().item() == pytest.approx(1e-3, rel=0.02) and abs(gaussian.mean()) < 2e-5


def test_a_given_start_is_taken():
    model, x = Linear(torch.randn(3, 4, 4)), torch.full((2, 3, 4, 4), 0.5)
    start = torch.full_like(x, 0.05)
    start[1] = 7.0  # outside of the ball
    x_adv = common.pgd(model, x, torch.zeros(2).long(), 0.1, 0.0, 1, start)
    torch.testing.assert_close(x_adv[0], x[0] + 0.05)
    torch.testing.assert_close(x_adv[1], x[1] + 0.1)


# ------------------------------------------------------------------------------------------------
# Evaluation


def test_predictions_are_those_of_the_net_in_eval_mode_in_any_batches():
    model, x = common.build_model("wrn-10-1", dropout=0.5).train(), torch.rand(7, 3, 32, 32)
    model(x)  # moves the running statistics
    found = common.predict(model, x, batch_size=3)
    assert model.training and not found.requires_grad and found.shape == (7, 10)
    torch.testing.assert_close(found, model.eval()(x))
    pixels = (x * 255).byte().permute(0, 2, 3, 1)
    torch.testing.assert_close(common.predict(model, pixels), model(common.to_float(pixels)))


def test_attacked_predictions_are_those_on_attacked_images():
    model, x = Linear(torch.randn(3, 4, 4)), torch.full((6, 3, 4, 4), 0.5)
    labels = torch.tensor([0, 0, 1, 0, 1, 1])  # each batch has others
    found = common.predict(model, x, labels, (0.1, 0.05, 5), batch_size=4)
    gain = (found - model(x))[:, 1]
    bound = 0.1 * model.w.abs().sum()
    torch.testing.assert_close(gain, torch.where(labels == 0, bound, -bound))


def test_accuracy_is_the_share_of_rows_with_the_largest_logit_at_the_label():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert common.accuracy(logits, torch.tensor([0, 0, 0, 1])) == 0.75


def test_evaluating_puts_everything_back():
    model = common.build_model("mlp-4", size=4).train()
    next(model.parameters()).requires_grad_(False)
    with common.evaluating(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


class Wrapped(nn.Module):
    """A net in a wrapper that nobody has put into eval mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def modes_and_buffers(model):
    return [m.training for m in model.modules()], [b.clone() for b in model.buffers()]


LOOKS = {
    "predict": lambda model, x, labels: common.predict(model, x),
    "attacked": lambda model, x, labels: common.predict(model, x, labels, (0.1, 0.05, 2)),
    "evaluate": lambda model, x, labels: ev.evaluate(model, x, labels, ["clean", "pgd2"]),
    "aa": lambda model, x, labels: ev.evaluate(model, x, labels, ["aa"], steps=2, queries=3),
    "curve": lambda model, x, labels: ev.accuracy_curve(model, x, labels, ev.Settings(eps=1.0)),
    "validate": lambda model, x, labels: common.validate(
        SimpleNamespace(given=[], batch_size=3),
        "student",
        model,
        SimpleNamespace(x_val=x, y_val=labels),
        0.1,
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_no_look_at_a_net_changes_its_modes_its_statistics_or_its_answers(look):
    torch.manual_seed(0)
    net = common.build_model("wrn-10-1", dropout=0.5).eval()
    net.stages[1].train()  # modes of all kinds, as in fine-tuning
    net.stages[1][0].eval()
    net.fc.requires_grad_(False)
    model, x, labels = Wrapped(net), torch.rand(4, 3, 32, 32), torch.arange(4)
    before, trained = modes_and_buffers(model), [p.requires_grad for p in model.parameters()]
    LOOKS[look](model, x, labels)
    after = modes_and_buffers(model)
    assert model.training and after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1]))
    assert [p.requires_grad for p in model.parameters()] == trained


def test_after_a_net_that_refuses_its_eval_mode_torch_compile_works_again():
    import torch._dynamo

    class StaysInTraining(nn.Linear):
        def train(self, mode=True):
            if not mode:
                raise ValueError("it stays in training mode")
            return super().train(mode)

    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    with pytest.raises(ValueError, match="it stays"):
        common.predict(StaysInTraining(3, 2), torch.rand(2, 3))
    torch.compile(nn.Linear(3, 2), backend=backend)(torch.rand(2, 3))
    assert compiled


class TrainingInside(nn.Module):
    """Puts its BatchNorm into training mode in its own forward pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(48, 10)

    def forward(self, x):
        return self.fc(self.norm.train()(x).flatten(1))


@pytest.mark.filterwarnings("ignore:the logits of an image depend")
@pytest.mark.parametrize("look", LOOKS)
def test_a_net_that_moves_its_own_statistics_gets_them_back(look):
    model, x, labels = TrainingInside().eval(), torch.rand(4, 3, 4, 4), torch.arange(4)
    before = modes_and_buffers(model)
    LOOKS[look](model, x, labels)
    after = modes_and_buffers(model)
    assert after[0] == before[0] == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1]))


@pytest.mark.parametrize("look", LOOKS)
def test_a_net_that_does_more_in_its_change_of_mode_is_told_of_it(look):
    class Merging(nn.Linear):  # as adapters do, which are merged into the weights in eval mode
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    for training in (True, False):
        model = nn.Sequential(nn.Flatten(), Merging(48, 10)).train(training)
        LOOKS[look](model, torch.rand(4, 3, 4, 4), torch.arange(4))
        assert model.training == model[1].training == training
        assert model[1].merged == (not training)


class Replacing(nn.Module):
    """Puts another tensor in the place of its buffer in each forward pass; another is expanded."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 10)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("ones", torch.ones(1, 1).expand(1, 48))

    def forward(self, x):
        self.passes = self.passes + 1
        return self.fc(x.flatten(1) * self.ones)


@pytest.mark.parametrize("look", LOOKS)
def test_buffers_that_are_replaced_or_cannot_be_written_stay(look):
    model = Replacing()
    passes = model.passes
    LOOKS[look](model, torch.rand(4, 3, 4, 4), torch.arange(4))
    assert model.passes is passes and model.passes == 0 and model.ones.sum() == 48


class InPlace(nn.Module):
    """Normalises its images in place, as many nets from elsewhere do, or out of place."""

    def __init__(self, net, in_place):
        super().__init__()
        self.net, self.in_place = net, in_place

    def forward(self, x):
        return self.net(x.sub_(0.4).div_(0.2) if self.in_place else x.sub(0.4).div(0.2))


def test_a_net_that_normalises_in_place_is_attacked_as_out_of_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    x = torch.rand(12, 3, 4, 4)
    labels = common.predict(InPlace(net, False), x).argmax(1)
    attacks = ["clean", "pgd3", "apgd-ce", "apgd-t", "fab-t", "square", "aa"]
    found, kept = [], x.clone()
    for in_place in (False, True):
        torch.manual_seed(1)
        model = InPlace(net, in_place)
        rows = [ev.evaluate(model, x, labels, [a], 0.02, steps=4, queries=30) for a in attacks]
        rows.append(common.predict(model, x, labels, (0.02, 0.01, 2)).tolist())
        rows.append(ev.evaluate(ev.Ensemble([model, model]), x, labels, ["clean", "pgd3"], 0.02))
        rows.append(common.pgd(model, x, labels, 0.02, 0.01, 3, "none").tolist())
        found.append(rows)
    assert found[0] == found[1] and torch.equal(x, kept)
    assert found[0][5]["square_acc"] > 0 and found[0][6]["aa_acc"] < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_never_a_class(value, refused):
    class Hole(nn.Module):
        def forward(self, x):
            logits = torch.ones(len(x), 3) * x.mean((1, 2, 3))[:, None]
            return torch.where(logits > 0.9, value, logits)

    x, labels = torch.zeros(5, 3, 4, 4), torch.zeros(5).long()
    assert common.predict(Hole(), x).shape == (5, 3)
    x[3] = 1
    message = refused(common.predict, Hole(), x, batch_size=2)
    assert "1 of 5 images are not finite, the first is number 3" in message
    data = SimpleNamespace(x_val=x, y_val=labels)
    args = SimpleNamespace(given=["--weight-decay"], batch_size=128)
    message = refused(common.validate, args, "student", Hole(), data)
    assert "student: the net's logits of 1 of 5 held-out images" in message
    assert message.endswith("try a lower --lr, or another value of --weight-decay")


def test_digests_follow_every_weight_of_any_type():
    weights = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(()), "c": torch.ones(0)}
    digests = {common.state_digest(weights)}
    digests.add(common.state_digest(weights | {"a": torch.ones(3, dtype=torch.bfloat16)}))
    digests.add(common.state_digest(weights | {"b": torch.ones(())}))
    assert len(digests) == 3


def precision_switches():
    """The precision of float32 by PyTorch's new switches and, unless it refuses, its old ones."""
    found = [operation.fp32_precision for operation in common.float32_operations()]
    try:
        found.append(torch.backends.cudnn.allow_tf32)
        found.append(torch.get_float32_matmul_precision())
    except RuntimeError:
        found.append("contradiction")
    return found


def by_new_switches():
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # not that of recurrent nets
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


CALLERS = {  # what the program that calls us may have set before
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "new switches": by_new_switches,
}


@pytest.mark.parametrize("caller", CALLERS)
def test_evaluating_is_in_strict_float32_and_puts_the_precision_back(caller):
    cudnn = torch.backends.cudnn
    with common.float32_restored():
        cudnn.allow_tf32 = True  # PyTorch's defaults
        torch.set_float32_matmul_precision("highest")
        CALLERS[caller]()
        cudnn.benchmark = True
        before = precision_switches()
        with common.evaluating(common.build_model("mlp-4", size=4)):
            assert precision_switches() == ["ieee"] * 6 + [False, "highest"]
            assert not cudnn.benchmark
            with common.strict_float32(tf32_convolutions=True):
                found = ["tf32", "tf32", "ieee", "ieee", "ieee", "ieee", True, "highest"]
                assert precision_switches() == found
            assert precision_switches() == ["ieee"] * 6 + [False, "highest"]
            with cudnn.flags(enabled=False):  # nets that do without cuDNN read the old switch
                pass
        assert precision_switches() == before and cudnn.benchmark


WRONG_ARGUMENTS = {  # what is given instead -> the error
    "model": ("a path", "model: expected a torch.nn.Module, got str"),
    "array": (np.zeros((4, 8, 8, 3), np.uint8), "x: expected a tensor, uint8 (N, H, W, C)"),
    "nchw": (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "x: expected a tensor, uint8"),
    "flat": (torch.rand(4, 192), "got torch.float32 (4, 192)"),
    "whole": (torch.ones(4, 3, 8, 8, dtype=torch.int64), "got torch.int64 (4, 3, 8, 8)"),
    "bool": (torch.ones(4, 3, 8, 8, dtype=torch.bool), "got torch.bool (4, 3, 8, 8)"),
    "complex": (torch.ones(4, 3, 8, 8) + 0j, "got torch.complex64 (4, 3, 8, 8)"),
    "nhwc": (torch.rand(4, 8, 8, 3), "got floats (4, 8, 8, 3); try x.permute(0, 3, 1, 2)"),
    "labels": (["a", "b", "c", "d"], "labels: expected whole numbers"),
    "eps": ("8/255", "eps: expected a number in pixel units"),
    "no eps": (None, "eps: expected a number in pixel units"),
    "true eps": (True, "eps: expected a number in pixel units"),
    "restarts": (True, "restarts: expected a whole number of at least 1, got True"),
    "step_size": (0, "step_size: 0 attacks nothing"),
}


NOT_X = ("array", "nchw", "flat", "whole", "bool", "complex", "nhwc")  # what x is not


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_of_evaluate_are_one_line(name, refused):
    value, message = WRONG_ARGUMENTS[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    right = {"model": model, "x": torch.rand(4, 3, 8, 8), "labels": torch.arange(4)}
    field = "x" if name in NOT_X else name.split()[-1]
    assert message in refused(ev.evaluate, attacks=["pgd2"], **right | {field: value})


@pytest.mark.parametrize("attack", ["clean", "square", "apgd-t", "fab-t"])
def test_a_net_of_one_logit_is_refused(attack, refused):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), torch.rand(4, 3, 4, 4)
    assert "the model returns one logit" in refused(ev.evaluate, model, x, [0] * 4, [attack])


def test_radii_are_numbers_of_any_type():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), torch.rand(40, 3, 4, 4)
    labels, options = common.predict(model, x).argmax(1), {"steps": 3, "queries": 5}
    radius = np.float32(0.02)
    expected = ev.evaluate(model, x, labels, ["pgd2", "aa"], float(radius), **options)
    assert 0 < expected["aa_acc"] < 1
    assert ev.evaluate(model, x, labels, ["pgd2", "aa"], radius, **options) == expected


@pytest.mark.parametrize("first", [nn.BatchNorm2d, nn.InstanceNorm2d])  # with buffers or without
def test_a_net_of_inference_mode_is_one_line(first, refused):
    x, labels = torch.rand(4, 3, 4, 4), torch.arange(4)
    with torch.inference_mode():
        model = nn.Sequential(first(3), nn.Flatten(), nn.Linear(48, 4))
        assert common.predict(model, x).shape == (4, 4)
    for look in (common.predict, lambda *args: ev.evaluate(*args, labels, ["clean"])):
        line = refused(look, model, x)
        assert line.startswith("the net was built or loaded under torch.inference_mode; ")


@pytest.mark.parametrize("squash", [torch.sigmoid, lambda z: z.softmax(1).half()])
def test_outputs_of_a_sigmoid_and_probabilities_in_half_precision_are_told(squash):
    class Squashed(nn.Linear):
        def forward(self, x):
            return squash(super().forward(x.flatten(1)))

    with pytest.warns(UserWarning, match="without its sigmoid|return probabilities"):
        ev.evaluate(Squashed(192, 4), torch.rand(4, 3, 8, 8), torch.arange(4), ["clean"])
