import json
import math
import os
import shlex
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import common
import eval_robustness as ev

INF, L2 = "linf", "l2"


class Linear(nn.Module):
    """Logits of one linear layer on the flattened image."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Made(nn.Module):
    """Another model with a function applied to its logits."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function
        self.eval()

    def forward(self, x):
        return self.function(self.model(x))


def linear_problem(classes=4, n=30, size=6, low=60, high=196, seed=0):
    """A linear model, images uint8 (n, size, size, 3) and labels on which it is right."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high, (n, size, size, 3), generator=g, dtype=torch.uint8)
    model = Linear(torch.randn(classes, 3 * size * size, generator=g) / 10)
    return model, x, model(common.to_float(x)).argmax(1)


def distances(model, x, labels, norm):
    """The closed-form distances (N,) of interior points to the boundary of a linear model."""
    z, dual = model(common.to_float(x)).detach(), 1 if norm == INF else 2
    nearest = torch.full((len(x),), math.inf)
    for k in range(z.shape[1]):
        w = model.weight.detach()[k] - model.weight.detach()[labels]  # (N, D)
        gap = z.gather(1, labels[:, None])[:, 0] - z[:, k]
        nearest = torch.where(labels == k, nearest, torch.minimum(nearest, gap / w.norm(dual, 1)))
    return nearest


def middle(d):
    """A radius in the widest gap of the middle half of the distances: no point is borderline."""
    d = d.sort().values[len(d) // 4 : 3 * len(d) // 4]
    at = d.diff().argmax()
    return float((d[at] + d[at + 1]) / 2)


@pytest.fixture(scope="module")
def small():
    """A net of a few hundred parameters, trained on 8x8 shapes to be partly robust; 80 images."""
    torch.manual_seed(0)
    arrays = common.make_shapes(1500, 80, 1)
    x, x_test = (torch.from_numpy(arrays[k][:, ::4, ::4].copy()) for k in ("x_train", "x_test"))
    y, y_test = (torch.from_numpy(arrays[k]) for k in ("y_train", "y_test"))
    layers = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(192, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(6):
        for part in torch.randperm(1500).split(100):
            clean = common.to_float(x[part])
            x_adv = common.pgd(model.eval(), clean, y[part], 4 / 255, 4 / 255, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x_adv), y[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False), x_test, y_test


def batch(model, x, labels, attack="apgd-ce", which=0, **settings):
    """A Batch of all images."""
    logits = model(ev.images(x)).detach()
    given = ev.images(x), labels, logits, torch.arange(len(x))
    return ev.Batch(*given, ev.Settings(**settings), attack, which)


# --- correctness


@pytest.mark.parametrize("norm", [INF, L2])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_gradient_attacks_meet_the_closed_form_on_linear_models(norm, classes):
    model, x, labels = linear_problem(classes)
    d = distances(model, x, labels, norm)
    eps = middle(d)
    options = {"norm": norm, "steps": 30, "queries": 5}
    expected = (d > eps).double().mean().item()
    assert 0.2 < expected < 0.8
    for attack in ("apgd-t", "fab", "fab-t", "aa") + ("aa-plus",) * (classes == 3):
        found = ev.evaluate(model, x, labels, [attack], eps, **options)
        assert list(found.values()) == [expected], attack
    if classes == 2:  # one boundary: the untargeted losses know it too
        for attack in ("apgd-ce", "apgd-dlr"):
            found = ev.evaluate(model, x, labels, [attack], eps, **options)
            assert list(found.values()) == [expected], attack


def test_the_box_counts_in_the_closed_form():
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (40, 6, 6, 3), generator=g, dtype=torch.uint8) * 255  # all at the box
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


@pytest.mark.parametrize("norm", [INF, L2])
def test_fab_finds_the_minimal_perturbation_of_a_linear_model(norm):
    model, x, labels = linear_problem(5)
    b = batch(model, x, labels, "fab", norm=norm, steps=60, eps=1.0)
    x_adv = ev.fab(model, b, stop=0)
    size = ev.length(x_adv - b.x, norm)[:, 0, 0, 0]
    assert ev.misclassified(model(x_adv), labels).all()
    np.testing.assert_allclose(size, distances(model, x, labels, norm), rtol=1e-2)


@pytest.mark.parametrize("norm", [INF, L2])
def test_the_projection_onto_a_hyperplane_in_the_box_is_optimal(norm):
    g = torch.Generator().manual_seed(0)
    x, w = torch.rand(50, 3, 4, 4, generator=g), torch.randn(50, 3, 4, 4, generator=g)
    w[:, :, 0] = 0
    c = torch.linspace(-12, 12, 50)
    d = ev.to_hyperplane(x, w, c, norm)
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
                total += abs(wi) * min(r if norm == INF else r * abs(wi), room)
            low, high = (r, high) if total < abs(c[i]) else (low, r)
        moves = [
            min(r if norm == INF else r * abs(wi), xi if wi > 0 else 1 - xi) for xi, wi in pairs
        ]
        moves = [m for m, (_, wi) in zip(moves, pairs) if wi]
        size = max(moves) if norm == INF else math.sqrt(sum(m * m for m in moves))
        assert ev.length(d[i : i + 1], norm).item() == pytest.approx(size, rel=1e-3)


def test_dlr_equals_a_loop_over_sorted_logits():
    logits, labels = torch.randn(40, 6), torch.randint(0, 6, (40,))
    target = (labels + 2) % 6
    dlr, targeted = ev.dlr_loss(logits, labels), ev.targeted_dlr_loss(logits, labels, target)
    for z, y, t, a, b in zip(logits.tolist(), labels.tolist(), target.tolist(), dlr, targeted):
        order = sorted(z, reverse=True)
        other = max(v for k, v in enumerate(z) if k != y)
        assert a.item() == pytest.approx(-(z[y] - other) / (order[0] - order[2]), rel=1e-4)
        scale = order[0] - (order[2] + order[3]) / 2
        assert b.item() == pytest.approx(-(z[y] - z[t]) / scale, rel=1e-4)


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    scaled = ev.dlr_loss(7 * logits + 3, labels)
    np.testing.assert_allclose(scaled, ev.dlr_loss(logits, labels), rtol=1e-9)


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
    x_adv = ev.apgd(model, b, ev.dlr_loss)
    assert len(seen) == 101  # the start, and one evaluation an iteration
    assert min(seen[90:]) < 0.003 < max(seen[2:22])
    assert torch.equal(x_adv, b.x)  # no success: the clean image


def test_targets_are_ranked_without_the_label():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    b = ev.Batch(
        torch.zeros(2, 1, 1, 1), torch.tensor([0, 2]), logits, torch.arange(2), ev.Settings(), "a"
    )
    targets = []
    for b.which in range(3):
        targets.append(b.target().tolist())
    assert targets == [[2, 1], [1, 3], [3, 0]]


def test_sides_of_square_are_those_of_the_published_schedule():
    sides = {i: ev.square_side(i, 32, 32) for i in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001)}
    assert list(sides.values()) == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3]
    assert ev.square_side(0, 8, 32) == 8 and ev.square_side(4999, 4, 4) == 1


@pytest.mark.parametrize("side", [2, 3, 6, 7])
def test_bumps_of_square_have_norm_one_and_two_signs(side):
    shape = ev.bump(side)
    assert shape.norm().item() == pytest.approx(1, abs=1e-5)
    assert (shape[: side // 2] > 0).all() and (shape[side // 2 :] < 0).all()
    assert shape.max() == shape[side // 4, side // 2]


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


@pytest.mark.parametrize("norm,eps", [(INF, 8 / 255), (L2, 0.5)])
@pytest.mark.parametrize("attack", list(ev.ATTACKS))
def test_perturbations_stay_in_the_ball_and_in_the_box(small, attack, norm, eps):
    model, x, labels = small
    x = torch.where(torch.arange(80)[:, None, None, None] % 2 == 0, x, x // 128 * 255)
    which = 1 if attack == "fab" else 0  # a random start
    b = batch(model, x, labels, attack, which, norm=norm, eps=eps, steps=10, queries=60)
    with torch.no_grad():
        x_adv = ev.ATTACKS[attack](model, b)
    moved = (x_adv != b.x).flatten(1).any(1)
    assert moved.any()
    assert (x_adv >= 0).all() and (x_adv <= 1).all()
    assert ev.misclassified(model(x_adv), labels)[moved].all()
    if attack[:3] != "fab":  # it minimises the norm; the driver refuses what is too far
        assert ev.allowed(x_adv, b.x, b.s).all()


def test_random_starts_of_apgd_touch_the_ball(small):
    model, x, labels = small
    for norm in (INF, L2):
        b = batch(model, x // 4 + 96, labels, norm=norm, eps=0.1)
        np.testing.assert_allclose(ev.length(ev.random_start(b, 0.1) - b.x, norm), 0.1, rtol=1e-4)


def test_accuracy_never_rises_from_attack_to_attack_and_is_the_pointwise_worst(small):
    model, x, labels = small
    options = {"eps": 6 / 255, "steps": 10, "queries": 100}
    row = ev.evaluate_all(model, x, labels, ["clean", "pgd5", "aa", "apgd-ce"], **options)
    stages = [s["robust_acc"] for s in row["reports"]["aa"]["stages"]]
    assert [s["attack"] for s in row["reports"]["aa"]["stages"]] == ev.VERSIONS["aa"].split("+")
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
    row = ev.evaluate_all(model, x, labels, ["clean", "pgd1"])
    assert row["pgd1_conditional_acc"] == pytest.approx(row["pgd1_acc"] / row["clean_acc"])


def test_results_do_not_depend_on_the_batch_size_or_on_other_images(small):
    model, x, labels = small
    options = {"eps": 6 / 255, "steps": 8, "queries": 60}
    found = [
        ev.evaluate(model, x, labels, ["aa", "pgd3"], batch_size=size, **options)
        for size in (7, 80)
    ]
    assert found[0] == found[1]
    a, b = batch(model, x, labels, eps=0.05), batch(model, x, labels, eps=0.05)
    b.x, b.index = b.x[10:20], b.index[10:20]
    assert torch.equal(ev.random_start(a, 0.05)[10:20], ev.random_start(b, 0.05))


def test_weights_get_no_gradient_and_the_model_is_put_back(small):
    model, x, labels = small
    model.train().requires_grad_(True)
    ev.evaluate(model, x, labels, ["aa"], steps=3, queries=5)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval().requires_grad_(False)


def test_the_copy_for_the_search_has_no_batchnorm_and_the_same_logits(small):
    model, x, _ = small
    copy = ev.faster(model)
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(copy[1], ev.Affine)
    np.testing.assert_allclose(copy(ev.images(x)), model(ev.images(x)), atol=1e-5)


# --- what is stored


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(small, tmp_path, monkeypatch):
    model, x, labels = small
    attacks, options = ["pgd2", "aa"], {"steps": 4, "queries": 20, "batch_size": 16}

    def run(store):
        row = ev.evaluate_all(model, x, labels, attacks, store=store, key="m", **options)
        reports = json.dumps(row["reports"], default=str)
        numbers = json.loads(reports, object_hook=lambda d: d | {"seconds": 0})
        return {k: v for k, v in row.items() if k.endswith("acc")}, numbers

    expected = run(ev.open_store())
    path, kills = tmp_path / "out.json.state", 0
    calls, saved = [0], common.save

    def dying(*given):
        saved(*given)
        calls[0] += 1
        if calls[0] % 7 == 0:  # after a few chunks, wherever that is
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", dying)
    while True:
        try:
            found = run(store := ev.open_store(path, {}))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2 and found == expected
    entry = store.record["entries"]["m aa"]
    index = (entry["broken"] > 0).nonzero()[:, 0]
    x_adv = ev.read_examples(store, entry, index, ev.images(x[index]))
    assert ev.misclassified(model(x_adv), labels[index]).all() and len(index) > 5
    assert path.stat().st_size < 20_000


def test_a_state_of_other_flags_or_a_damaged_one_is_refused(tmp_path, capsys):
    path = tmp_path / "out.json.state"
    store = ev.open_store(path, {"--eps": 0.1})
    ev.write_examples(store, {"place": 0}, torch.tensor([2]), torch.ones(1, 3, 4, 4))
    for flags, message in (({"--eps": 0.2}, "--eps: "), ({"--eps": 0.1}, None)):
        if message:
            assert message in error_of(lambda flags=flags: ev.open_store(path, flags), capsys)
        else:
            assert ev.open_store(path, flags).record["bytes"] == 3 * 48 * 4
    path.with_suffix(".examples").write_bytes(b"short")
    assert "truncated" in error_of(lambda: ev.open_store(path, {"--eps": 0.1}), capsys)
    path.write_bytes(path.read_bytes()[:200])
    assert "truncated" in error_of(lambda: ev.open_store(path, {"--eps": 0.1}), capsys)


def test_an_example_that_fails_the_last_check_counts_as_robust(small):
    model, x, labels = small
    points = x, labels, model(ev.images(x))
    s, store = ev.Settings(steps=5), ev.open_store()
    entry = ev.run_attack(model, points, "apgd-ce", s, store, "k")
    before = ev.verdict(model, points, entry, "apgd-ce", s, store)
    first = (entry["broken"] > 0).nonzero()[:1, 0]
    ev.write_examples(store, entry, first, ev.images(x[first]))  # the clean image: it is right
    after = ev.verdict(model, points, entry, "apgd-ce", s, store)
    assert (before["unverified"], after["unverified"]) == (0, 1)
    gained = after["stages"][-1]["robust_acc"] - before["stages"][-1]["robust_acc"]
    assert gained == pytest.approx(1 / len(x))
    ev.write_examples(store, entry, first, ev.images(x[first]) + 0.1)  # outside of the ball
    assert ev.verdict(model, points, entry, "apgd-ce", s, store)["unverified"] == 1


# --- warnings


def warnings_with(model, x, labels, attacks=("apgd-ce",), **options):
    options = {"steps": 5, "queries": 200} | options
    return " ".join(ev.evaluate_all(model, x, labels, list(attacks), **options)["warnings"])


def test_a_sound_model_gets_no_warning(small):
    assert warnings_with(*small, attacks=["aa"], steps=20) == ""


def test_a_randomised_model_is_warned_of(small):
    model, x, labels = small
    noisy = Made(model, lambda z: z + 0.1 * torch.randn_like(z))
    assert "randomised" in warnings_with(noisy, x, labels)
    assert "randomised" not in warnings_with(noisy, x, labels, ["aa-rand"], eps=0.01)


def test_gradients_of_aa_rand_are_averaged_over_twenty_passes(small, monkeypatch):
    model, x, labels = small
    monkeypatch.setattr(ev, "faster", lambda model: model)  # a copy would count elsewhere
    passes = []
    counted = Made(model, lambda z: passes.append(z.requires_grad) or z)
    ev.evaluate(counted, x[:1], labels[:1], ["aa-rand"], eps=1e-6, steps=3)
    assert sum(passes) == 2 * 20 * 4


def test_probabilities_are_warned_of(small):
    model, x, labels = small
    softmax = Made(model, lambda z: z.softmax(1))
    assert "probabilities" in warnings_with(softmax, x, labels)


def test_vanishing_gradients_and_a_stronger_square_are_warned_of(small):
    model, x, labels = small
    flat = Made(model, lambda z: (8 * z).round())  # no gradient, but Square sees the logits
    found = warnings_with(flat, x, labels, ["apgd-t+square"], eps=0.1)
    assert "have no gradient" in found and "Square goes from" in found


def test_masked_gradients_are_warned_of_when_pgd_is_far_above_autoattack(small):
    model, x, labels = small
    steep = Made(model, lambda z: 1e4 * z)  # the cross-entropy saturates, DLR does not
    assert "gradients may be masked" in warnings_with(steep, x, labels, ["pgd20", "aa"], eps=0.06)


def test_dlr_of_few_classes_is_told():
    for classes, told in ((2, ["apgd-dlr", "apgd-t"]), (3, ["apgd-t"]), (4, [])):
        model, x, labels = linear_problem(classes)
        found = warnings_with(model, x, labels, ["apgd-ce+apgd-dlr+apgd-t"])
        assert [name for name in ("apgd-dlr", "apgd-t") if f"{name}: DLR needs" in found] == told
        assert "DLR" not in warnings_with(model, x, labels, ["apgd-ce"])


def test_logits_that_are_not_finite_are_no_success_and_are_told(small):
    class Hole(Made):
        def forward(self, x):
            bright = (x.amax((1, 2, 3)) > edge)[:, None]
            return self.model(x) + torch.where(bright, math.nan, 0.0)

    model, x, labels = small
    edge = ev.images(x).amax() + 0.1
    row = ev.evaluate_all(Hole(model, None), x, labels, ["clean", "apgd-ce"], eps=0.9, steps=3)
    assert "not finite" in " ".join(row["warnings"])
    assert row["apgd_ce_acc"] == row["clean_acc"]


# --- models


def test_the_ensemble_returns_the_logarithm_of_the_averaged_probabilities(small):
    model, x, _ = small
    other = Made(model, lambda z: -0.5 * z)
    x = ev.images(x)
    expected = (model(x).softmax(1) + other(x).softmax(1)) / 2
    np.testing.assert_allclose(ev.Ensemble([model, other])(x).exp(), expected, atol=1e-6)


def test_calibration_equals_a_loop_over_images():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(200, 5), torch.randint(0, 5, (200,))
    found = ev.calibration(logits, labels)
    bins, nll, entropy = [[] for _ in range(15)], 0.0, 0.0
    for z, y in zip(logits.double(), labels.tolist()):
        p = z.softmax(0)
        nll, entropy = nll - math.log(p[y]), entropy - sum(q * math.log(q) for q in p.tolist())
        at = next(i for i in range(15) if p.max() <= (i + 1) / 15)
        bins[at].append((p.max().item(), float(p.argmax() == y)))
    gaps = [abs(sum(c for c, _ in part) - sum(r for _, r in part)) for part in bins]
    assert found["ece"] == pytest.approx(sum(gaps) / 200)
    assert found["nll"] == pytest.approx(nll / 200)
    assert found["entropy"] == pytest.approx(entropy / 200)
    assert found["confidence"] == pytest.approx([len(part) / 200 for part in bins])


def test_calibration_of_certain_and_uniform_models():
    labels = torch.tensor([0, 1])
    sure = ev.calibration(1e4 * torch.eye(2), labels)
    assert sure["nll"] == sure["ece"] == sure["entropy"] == 0 and sure["confidence"][-1] == 1
    flat = ev.calibration(torch.zeros(2, 2), labels)
    assert flat["nll"] == pytest.approx(math.log(2)) == flat["entropy"] and flat["ece"] == 0


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """A folder with data.npz of 8x8 images, two checkpoints, and a module of a foreign net."""
    folder = tmp_path_factory.mktemp("files")
    model, x, labels = small
    np.savez(folder / "data.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = common.build_model("mlp-16", size=8)
        common.save_model(folder / f"net{seed}.pt", net, {})
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "w"
    )
    (folder / "foreign.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    first = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]\n"
        "    return nn.Sequential(*first, nn.Linear(192, 10))\n"
        "def soft():\n"
        "    return nn.Sequential(net(), nn.Softmax(1))\n"
        "def broken():\n"
        "    return nn.Sequential(net(), nn.Threshold(1e9, float('nan')))\n"
        "def seven():\n"
        "    return nn.Sequential(net(), nn.Linear(10, 7))\n"
        "def large():\n"
        "    return nn.Linear(5, 10)\n"
    )
    return folder


@pytest.fixture(autouse=True)
def folder(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))


def main(*argv):
    quick = ["--steps", "3", "--queries", "10", "--data", "data.npz", "--device", "cpu"]
    ev.main([*map(str, argv), *quick])


def error_of(call, capsys):
    """The one line on stderr with which `call` exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_every_checkpoint_gets_a_row_and_the_json_holds_all(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    main("net0.pt", "net1.pt", "--attack", "clean", "pgd2", "aa", "calibration", "--json", out)
    text, record = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["model"] for row in record["rows"]] == ["net0.pt", "net1.pt"]
    assert record["eps"] == 8 / 255 and record["step_size"] == 2 / 255 and record["n"] == 80
    for row in record["rows"]:
        assert f"{row['aa_acc']:.4f}" in text and set(row["calibration"]) == {"clean", "pgd20"}
    assert "8/255" in text and [*tmp_path.iterdir()] == [out]
    main("net0.pt", "net1.pt", "--attack", "clean", "pgd2", "aa", "calibration", "--json", out)
    assert "is finished" in capsys.readouterr().out
    again = lambda: main("net0.pt", "--attack", "clean", "--eps", "4/255", "--json", out)  # noqa: E731
    assert out.name in error_of(again, capsys)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_how_to_go_on_and_the_same_command_does(
    number, code, tmp_path, capsys, monkeypatch
):
    argv = ["net0.pt", "--attack", "aa", "--batch-size", "20", "--json", tmp_path / "out.json"]
    saved, calls = ev.save_store, []

    def dying(store):
        saved(store)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ev, "save_store", dying)
    with pytest.raises(SystemExit) as stop:
        main(*argv)
    *_, kept, command = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and kept == "stopped; finished batches are kept; go on with:"
    script, *flags = shlex.split(command)[1:]
    assert Path(script).resolve() == ROOT / "eval_robustness.py"
    assert flags[: len(argv)] == [str(a) for a in argv]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert {p.suffix for p in tmp_path.iterdir()} == {".state", ".examples"}
    main(*argv)
    assert "goes on from" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_an_ensemble_is_one_row_and_says_what_the_attacks_get(tmp_path, capsys):
    main("net0.pt", "net1.pt", "--ensemble", "--json", tmp_path / "e.json")
    assert "logarithm of the averaged probabilities" in capsys.readouterr().out
    record = json.loads((tmp_path / "e.json").read_text())
    assert [row["model"] for row in record["rows"]] == ["ensemble of 2"]


def test_a_foreign_model_is_evaluated_with_its_weights(small, tmp_path):
    main("--model", "foreign:net", "--weights", "w", "--json", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    model, x, labels = small
    assert row["clean_acc"] == pytest.approx(ev.evaluate(model, x, labels, ["clean"])["clean_acc"])


def test_saved_examples_are_those_that_broke_the_images(small, tmp_path):
    model, x, labels = small
    out = tmp_path / "x.npz"
    main("--model", "foreign:net", "--weights", "w", "--attack", "apgd-ce", "--save-examples", out)
    with np.load(out) as file:
        x_adv, broken = torch.from_numpy(file["x_adv"]), torch.from_numpy(file["broken"])
    x_adv, clean = x_adv.permute(0, 3, 1, 2), ev.images(x)
    assert 0 < broken.sum() < len(x)
    assert (model(x_adv).argmax(1) != labels)[broken].all()
    assert torch.equal(x_adv[~broken], clean[~broken])
    assert 0.9 * 8 / 255 < (x_adv - clean).abs().max() <= 8 / 255 + 1e-6


def test_a_plot_is_drawn_and_the_curve_falls_to_zero(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "p.json"
    png = tmp_path / "p.png"
    main("net0.pt", "--attack", "clean", "calibration", "--plot", png, "--json", out)
    curve = json.loads(out.read_text())["rows"][0]["curve"]
    assert png.stat().st_size > 1000 and curve[0][0] == 0 and curve[-1][1] == 0
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve))


def test_a_plot_without_matplotlib_names_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call = lambda: main("net0.pt", "--plot", tmp_path / "p.png")  # noqa: E731
    assert "pip install matplotlib" in error_of(call, capsys)


def test_float_images_outside_of_the_box_are_refused(small, capsys):
    model, x, labels = small
    assert "[0, 1]" in error_of(lambda: ev.evaluate(model, 2 * ev.images(x), labels, []), capsys)
    inside = ev.evaluate(model, ev.images(x), labels, ["clean", "apgd-ce"], steps=3)
    assert inside == ev.evaluate(model, x, labels, ["clean", "apgd-ce"], steps=3)


BAD = {
    "probabilities": (["--model", "foreign:soft"], "returns probabilities"),
    "nan logits": (["--model", "foreign:broken"], "not finite"),
    "wrong classes": (["--model", "foreign:seven"], "returns 7 logits, the data has 10"),
    "wrong shape": (["--model", "foreign:large"], "does not take images"),
    "no such function": (["--model", "foreign:nothing"], "--model foreign:nothing"),
    "no such module": (["--model", "nowhere:net"], "--model nowhere:net"),
    "no such weights": (["--model", "foreign:net", "--weights", "nowhere"], "--weights nowhere"),
    "damaged weights": (["--model", "foreign:net", "--weights", "short"], "--weights short"),
    "damaged checkpoint": (["short"], "short: truncated"),
    "no checkpoint": ([], "expected CKPT"),
    "too many images": (["net0.pt", "--n", "81"], "--n: data.npz has 80 test images, got 81"),
    "unknown attack": (["net0.pt", "--attack", "aa-fast"], "'aa-fast'"),
    "pgd in L2": (["net0.pt", "--norm", "l2"], "--norm l2"),
    "eps above 1": (["net0.pt", "--eps", "8"], "--eps"),
    "examples of two": (["net0.pt", "--attack", "aa", "pgd2", "--save-examples", "e"], "--save-"),
    "no folder": (["net0.pt", "--json", "nowhere/out.json"], "there is no folder nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(case, files, capsys):
    (files / "short").write_bytes((files / "net0.pt").read_bytes()[:500])
    before = sorted(files.iterdir())
    argv, message = BAD[case]
    assert message in error_of(lambda: main(*argv), capsys)
    assert [p for p in sorted(files.iterdir()) if p.name != "__pycache__"] == [
        p for p in before if p.name != "__pycache__"
    ]
