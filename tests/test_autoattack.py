"""The attacks against closed forms, loops over single numbers and the published schedules."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import Linear, Made, linear_problem

import common
import eval_robustness as ev


def distances(model, x, labels):
    """The closed-form distances (N,) of interior points to the boundary of a linear model."""
    z = model(common.to_float(x)).detach()
    nearest = torch.full((len(x),), math.inf)
    for k in range(z.shape[1]):
        w = model.weight.detach()[k] - model.weight.detach()[labels]  # (N, D)
        gap = z.gather(1, labels[:, None])[:, 0] - z[:, k]
        nearest = torch.where(labels == k, nearest, torch.minimum(nearest, gap / w.abs().sum(1)))
    return nearest


def middle(d):
    """A radius in the widest gap of the middle half of the distances: no point is borderline."""
    d = d.sort().values[len(d) // 4 : 3 * len(d) // 4]
    at = d.diff().argmax()
    return float((d[at] + d[at + 1]) / 2)


def batch(model, x, labels, attack="apgd-ce", repeat=0, **settings):
    """A Batch of all images."""
    x = common.to_float(x)
    logits, index = model(x).detach(), torch.arange(len(x))
    return ev.Batch(x, labels, logits, index, ev.Settings(**settings), attack, repeat)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_gradient_attacks_meet_the_closed_form_on_linear_models(classes):
    model, x, labels = linear_problem(classes)
    d = distances(model, x, labels)
    eps = middle(d)
    expected = (d > eps).double().mean().item()
    assert 0.2 < expected < 0.8
    attacks = ["apgd-t", "fab-t", "aa"]
    if classes == 2:  # one boundary: the cross-entropy knows it too
        attacks.append("apgd-ce")
    for attack in attacks:
        settings = ev.Settings(eps, steps=30, queries=5)
        row = ev.measure(model, x, labels, [attack], settings)
        assert row[f"{attack.replace('-', '_')}_acc"] == expected, attack


@pytest.mark.filterwarnings("ignore:apgd-t. DLR needs 4 classes")
def test_the_box_counts_in_the_closed_form():
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (40, 6, 6, 3), generator=g, dtype=torch.uint8) * 255  # on the box
    model = Linear(torch.randn(2, 108, generator=g))
    labels = model(common.to_float(x)).argmax(1)
    eps = 0.08
    w = (model.weight[1 - labels] - model.weight[labels]).detach()  # (N, D)
    flat = common.to_float(x).flatten(1)
    room = torch.where(w > 0, 1 - flat, flat).clamp(max=eps)
    z = model(common.to_float(x)).detach()
    gap = z.gather(1, labels[:, None])[:, 0] - z.gather(1, 1 - labels[:, None])[:, 0]
    robust = gap > (room * w.abs()).sum(1)
    assert 0.1 < robust.double().mean() < 0.9
    for attack in ("apgd-ce", "apgd-t", "fab-t"):
        found = ev.evaluate(model, x, labels, [attack], eps, steps=40)
        assert list(found.values()) == [robust.double().mean().item()], attack


def test_fab_finds_the_minimal_perturbation_of_a_linear_model():
    model, x, labels = linear_problem(5)
    sizes = []
    for repeat in range(4):  # the four wrong classes
        b = batch(model, x, labels, "fab-t", repeat, steps=60, eps=0.0)
        x_adv = ev.fab_targeted(model, b)
        assert ev.misclassified(model(x_adv), labels).all()
        sizes.append(ev.norm_of(x_adv - b.x)[:, 0, 0, 0])
    np.testing.assert_allclose(torch.stack(sizes).amin(0), distances(model, x, labels), rtol=1e-2)


def test_the_projection_onto_a_hyperplane_in_the_box_is_optimal():
    g = torch.Generator().manual_seed(0)
    x, w = torch.rand(50, 3, 4, 4, generator=g), torch.randn(50, 3, 4, 4, generator=g)
    w[:, :, 0] = 0
    c = torch.linspace(-12, 12, 50)
    d = ev.to_hyperplane(x, w, c)
    assert ((x + d >= -1e-6) & (x + d <= 1 + 1e-6)).all()
    reach = torch.where((w > 0) == (c > 0)[:, None, None, None], x, 1 - x) * w.abs()
    feasible = reach.sum((1, 2, 3)) > c.abs()
    assert 5 < feasible.sum() < 50
    got = (w * d).sum((1, 2, 3))
    np.testing.assert_allclose(got[feasible], -c[feasible], atol=1e-4)
    corner = -c.sign() * reach.sum((1, 2, 3))
    np.testing.assert_allclose(got[~feasible], corner[~feasible], atol=1e-4)
    for i in feasible.nonzero()[:, 0].tolist():  # the radius by bisection on single numbers
        sign = 1 if c[i] > 0 else -1
        pairs = list(zip(x[i].flatten().tolist(), (sign * w[i]).flatten().tolist()))
        low, high = 0.0, 1e4
        for _ in range(100):
            r = (low + high) / 2
            total = 0.0
            for xi, wi in pairs:
                room = xi if wi > 0 else 1 - xi
                total += abs(wi) * min(r, room)
            low, high = (r, high) if total < abs(c[i]) else (low, r)
        size = max(min(r, xi if wi > 0 else 1 - xi) for xi, wi in pairs if wi)
        assert ev.norm_of(d[i : i + 1]).item() == pytest.approx(size, rel=1e-3)


def test_dlr_equals_a_loop_over_sorted_logits():
    logits, labels = torch.randn(40, 6), torch.randint(0, 6, (40,))
    target = (labels + 2) % 6
    found = ev.targeted_dlr_loss(logits, labels, target)
    for z, y, t, value in zip(logits.tolist(), labels.tolist(), target.tolist(), found):
        order = sorted(z, reverse=True)
        scale = order[0] - (order[2] + order[3]) / 2
        assert value.item() == pytest.approx(-(z[y] - z[t]) / scale, rel=1e-4)


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    target = (labels + 1) % 5
    scaled = ev.targeted_dlr_loss(7 * logits + 3, labels, target)
    np.testing.assert_allclose(scaled, ev.targeted_dlr_loss(logits, labels, target), rtol=1e-9)


def test_checkpoints_of_apgd_are_those_of_the_paper():
    assert list(ev.apgd_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(ev.apgd_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(ev.apgd_checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert sum(ev.apgd_checkpoints(1000).values()) <= 1000


def test_the_step_of_apgd_is_halved_where_it_oscillates():
    # f(x) = -|mean(x) - 0.5| is maximal at 0.5: with the first step of 2 eps it jumps over it
    class Peak(nn.Module):
        def forward(self, x):
            far = (x.mean((1, 2, 3)) - 0.5).abs()
            return torch.stack([far + 0.01, torch.zeros_like(far)], 1)

    x = torch.full((3, 1, 4, 4), 0.48)
    seen = []
    model = Made(Peak(), lambda z: seen.append(z[0, 0].item() - 0.01) or z)
    b = batch(model, x, torch.zeros(3, dtype=torch.long), eps=0.1, steps=100)
    seen.clear()
    x_adv = ev.apgd(model, b, ev.targeted_dlr_loss)  # of two classes: -f
    assert len(seen) == 101  # the start, and one evaluation an iteration
    assert min(seen[90:]) < 0.003 < max(seen[2:22])
    assert torch.equal(x_adv, b.x)  # no success: the clean image


def test_targets_are_ranked_without_the_label():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    labels, x = torch.tensor([0, 2]), torch.zeros(2, 1, 1, 1)
    for repeat, expected in enumerate([[2, 1], [1, 3], [3, 0]]):
        b = ev.Batch(x, labels, logits, torch.arange(2), ev.Settings(), "apgd-t", repeat)
        assert b.target().tolist() == expected


def test_sides_of_square_are_those_of_the_published_schedule():
    sides = {i: ev.square_side(i, 32, 32) for i in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001)}
    assert list(sides.values()) == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3]
    assert ev.square_side(0, 8, 32) == 8 and ev.square_side(4999, 4, 4) == 1


def test_square_changes_pixels_to_the_faces_of_the_ball_and_uses_no_gradient(small):
    model, x, labels = small

    def no_gradient(z):
        assert not z.requires_grad and not torch.is_grad_enabled()
        return z

    b = batch(model, x, labels, "square", eps=0.1, queries=300)
    with torch.no_grad():
        x_adv = ev.square(Made(model, no_gradient), b)
    hit = ev.misclassified(model(x_adv), labels)
    assert hit.sum() > 5
    faces = [(b.x + side).clamp(0, 1) for side in (-0.1, 0.1)]
    on_face = torch.isclose(x_adv, faces[0]) | torch.isclose(x_adv, faces[1])
    assert on_face[hit].all()
    assert torch.equal(x_adv[~hit], b.x[~hit])


@pytest.mark.parametrize("attack", list(ev.ATTACKS))
def test_perturbations_stay_in_the_ball_and_in_the_box(small, attack):
    model, x, labels = small
    x = torch.where(torch.arange(80)[:, None, None, None] % 2 == 0, x, x // 128 * 255)
    b = batch(model, x, labels, attack, steps=10, queries=60)
    with torch.no_grad():
        x_adv = ev.ATTACKS[attack](model, b)
    moved = (x_adv != b.x).flatten(1).any(1)
    assert moved.any()
    assert (x_adv >= 0).all() and (x_adv <= 1).all()
    assert ev.misclassified(model(x_adv), labels)[moved].all()
    if attack != "fab-t":  # it minimises the norm; the driver refuses what is too far
        assert ev.is_allowed(x_adv, b.x, 8 / 255).all()


def first_images(model, b):
    """What the net sees first under APGD: the random start (B, C, H, W)."""
    seen = []
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())):
        ev.apgd_ce(model, b)
    return seen[0]


def test_random_starts_of_apgd_touch_the_ball(small):
    model, x, labels = small
    b = batch(model, x // 4 + 96, labels, eps=0.1, steps=1)
    np.testing.assert_allclose(ev.norm_of(first_images(model, b) - b.x), 0.1, rtol=1e-4)


def test_accuracy_never_rises_from_attack_to_attack_and_is_the_pointwise_worst(small):
    model, x, labels = small
    settings = ev.Settings(eps=6 / 255, steps=10, queries=100)
    row = ev.measure(model, x, labels, ["clean", "pgd5", "aa", "apgd-ce"], settings)
    report = row["reports"]["aa"]
    stages = [stage["robust_acc"] for stage in report["stages"]]
    assert [stage["attack"] for stage in report["stages"]] == list(ev.AUTOATTACK)
    assert report["broken"] == round((row["clean_acc"] - row["aa_acc"]) * len(x))
    assert 0.5 * 6 / 255 < report["max_perturbation"] <= 6 / 255 + 1e-6
    assert row["clean_acc"] > stages[0] and all(a >= b for a, b in pairwise(stages))
    assert row["aa_acc"] == stages[-1] and row["apgd_ce_acc"] == stages[0]
    assert row["aa_conditional_acc"] == pytest.approx(row["aa_acc"] / row["clean_acc"])
    assert 0.1 < row["aa_acc"] < 0.9 * row["clean_acc"]


def test_restarts_of_pgd_take_the_worst_case_and_spare_broken_points(small):
    model, x, labels = small
    rows = []
    counted = Made(model, lambda z: rows.append(len(z)) or z)
    one = ev.evaluate(counted, x, labels, ["pgd1"], 8 / 255, 2 / 255)
    first = sum(rows)
    rows.clear()
    five = ev.evaluate(counted, x, labels, ["pgd1"], 8 / 255, 2 / 255, restarts=5)
    assert five["pgd1_acc"] <= one["pgd1_acc"] < 1
    assert sum(rows) - first < 4 * 2 * round(one["pgd1_acc"] * len(x)) + 5 * 80
    row = ev.measure(model, x, labels, ["clean", "pgd1"], ev.Settings())
    assert row["pgd1_conditional_acc"] == pytest.approx(row["pgd1_acc"] / row["clean_acc"])


def test_results_do_not_depend_on_the_batch_size_or_on_other_images(small):
    model, x, labels = small
    options = {"eps": 6 / 255, "steps": 8, "queries": 60, "targets": 3}
    few = ev.evaluate(model, x, labels, ["aa", "pgd3"], batch_size=7, **options)
    assert few == ev.evaluate(model, x, labels, ["aa", "pgd3"], batch_size=80, **options)
    whole, part = (batch(model, x, labels, eps=0.05, steps=1) for _ in range(2))
    for field in ("x", "labels", "logits", "index"):
        setattr(part, field, getattr(part, field)[10:20])
    assert torch.equal(first_images(model, whole)[10:20], first_images(model, part))


def test_weights_get_no_gradient_and_the_model_is_put_back(small):
    model, x, labels = small
    model.train().requires_grad_(True)
    ev.evaluate(model, x, labels, ["aa"], steps=3, queries=5)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval().requires_grad_(False)


def test_what_a_search_in_tf32_takes_for_broken_and_is_not_is_searched_again(small):
    model, x, labels = small
    options = {"steps": 5, "queries": 30, "targets": 2}
    strict = ev.evaluate(model, x, labels, ["aa"], 4 / 255, **options)
    is_coarse = []

    class Coarse(Made):
        """Wrong on every image as long as TF32 is allowed."""

        def forward(self, x):
            is_coarse.append(torch.backends.cudnn.conv.fp32_precision == "tf32")
            logits = self.model(x)
            return logits.roll(1, 1) if is_coarse[-1] else logits

    coarse = Coarse(model, None)
    assert ev.evaluate(coarse, x, labels, ["aa"], 4 / 255, **options) == strict
    assert 0 < strict["aa_acc"] < 1 and set(is_coarse) == {True, False}
    is_coarse.clear()
    ev.evaluate(coarse, x, labels, ["pgd2"], 4 / 255)
    assert set(is_coarse) == {False}  # a report of PGD is in float32 throughout


def test_draws_differ_by_seed_attack_pass_use_and_image(small):
    first = batch(*small, attack="pgd3").draw(2, 3)
    assert first.shape == (80, 2, 3) and first.min() >= 0 and first.max() <= 1
    others = [batch(*small, attack="pgd3", seed=1).draw(2, 3), first.roll(1, 0)]
    others += [batch(*small, attack="pgd4").draw(2, 3), batch(*small, "pgd3", 1).draw(2, 3)]
    others.append(batch(*small, attack="pgd3").draw(2, 3, use="signs"))
    assert all((first != other).all() for other in others)
