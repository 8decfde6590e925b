"""The evaluation around the attacks: its state on the disk, warnings, models, the command."""

import functools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, Made, linear_problem

import common
import eval_robustness as ev
import fickle_teacher
import robust_kd
import teacher_free_kd as tf
from benchmark import corruptions

# ------------------------------------------------------------------------------------------------
# What is kept on the disk


def without_seconds(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        kept = {key: without_seconds(v) for key, v in value.items()}
        return {key: v for key, v in kept.items() if key not in ("seconds", "command")}
    if isinstance(value, list):
        return [without_seconds(v) for v in value]
    return value


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(small, tmp_path, monkeypatch):
    model, x, labels = small
    settings = ev.Settings(steps=4, queries=20, batch_size=16)

    def run(state):
        return ev.measure(model, x, labels, ["pgd2", "aa"], settings, state=state)

    expected = without_seconds(run(ev.State()))
    save, saved, kills = ev.State.save, [], 0

    def die_at_every_seventh(state):
        save(state)
        saved.append(1)
        if len(saved) % 7 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ev.State, "save", die_at_every_seventh)
    while True:
        try:
            found = run(ev.State(tmp_path, {}))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2 and without_seconds(found) == expected
    (file,) = tmp_path.iterdir()
    assert file.name == "state.pt" and file.stat().st_size < 20_000


def test_a_pass_that_was_killed_is_done_again(small, tmp_path, monkeypatch):
    model, x, labels = small
    settings = ev.Settings(eps=6 / 255, steps=3, queries=20, batch_size=40)
    expected = without_seconds(ev.measure(model, x, labels, ["pgd2", "aa"], settings))
    search, calls, kills = ev.search, [], 0

    def die_in_every_third_batch(*args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return search(*args)

    monkeypatch.setattr(ev, "search", die_in_every_third_batch)
    while True:
        try:
            state = ev.State(tmp_path, {})
            found = ev.measure(model, x, labels, ["pgd2", "aa"], settings, state=state)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 5 and without_seconds(found) == expected


def test_corruptions_go_on_where_they_were_killed(shapes, tmp_path):
    x, labels = shapes[0][:4], shapes[1][:4]
    torch.manual_seed(0)
    model = common.build_model("mlp-4").eval()
    images = tmp_path / "images"
    corruptions.write_folder(images, x, labels)
    state = ev.State(tmp_path, {})
    state.corruptions["net"] = counts = {}

    def die_after_the_ninth():
        state.save()
        if len(counts) == 9:
            raise KeyboardInterrupt

    files = ev.read_corruptions(images, x, labels)
    with pytest.raises(KeyboardInterrupt):
        ev.corruption_accuracy(model, x, labels, files, counts=counts, save=die_after_the_ninth)
    goes_on = ev.State(tmp_path, {}).corruptions["net"]
    assert list(goes_on) == list(ev.CORRUPTIONS)[:9]
    whole = ev.corruption_accuracy(model, x, labels, files)
    assert ev.corruption_accuracy(model, x, labels, files, counts=goes_on) == whole


def test_a_state_of_other_flags_or_a_foreign_one_is_refused(tmp_path, refused):
    ev.State(tmp_path, {"--eps": 0.1}).save()
    assert ev.State(tmp_path, {"--eps": 0.1}).attacks == {}
    assert "--eps: " in refused(ev.State, tmp_path, {"--eps": 0.2})
    good = {"broken_by": torch.zeros(3).int()}
    for fields in (
        {"broken_by": [1]},
        {"broken_by": torch.zeros(3)},
        {"broken_by": torch.zeros(3).short()},
        {"broken_by": torch.zeros(1).int().expand(10**12)},
        good | {"passes_done": -1},
        good | {"seconds": {"pgd1": "a"}},
        good | {"another": 1},
    ):
        record = {"flags": {"--eps": 0.1}}
        record |= {"attacks": {"net pgd1": fields}, "corruptions": {}}
        common.save(tmp_path / "state.pt", record)
        assert "not the state" in refused(ev.State, tmp_path, {"--eps": 0.1})
    for counts in (
        {"net": {"rain": [[0, 0]] * 5}},
        {"net": {"fog": [[0, 0]] * 4}},
        {"net": 1},
    ):
        record = {"flags": {"--eps": 0.1}}
        record |= {"attacks": {}, "corruptions": counts}
        common.save(tmp_path / "state.pt", record)
        assert "not the state" in refused(ev.State, tmp_path, {"--eps": 0.1})
    common.save(tmp_path / "state.pt", {"another": 1})
    assert "not the state" in refused(ev.State, tmp_path, {"--eps": 0.1})
    flags = {"flags": {"--eps": torch.zeros(3)}, "attacks": {}, "corruptions": {}}
    common.save(tmp_path / "state.pt", flags)
    assert "not the state" in refused(ev.State, tmp_path, {"--eps": 0.1})


@pytest.mark.parametrize("change", [lambda file: file[:-100], lambda file: b"", lambda file: b"0"])
def test_a_damaged_state_is_told_and_the_evaluation_begins_again(
    small, tmp_path, monkeypatch, capsys, change
):
    run = (*small, ["pgd2", "aa"], ev.Settings(steps=3, queries=20))
    expected = ev.measure(*run)
    save, saves = ev.State.save, []

    def die_after_the_fourth(state):
        save(state)
        saves.append(1)
        if len(saves) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ev.State, "save", die_after_the_fourth)
        ev.measure(*run, state=ev.State(tmp_path, {}))
    file = tmp_path / "state.pt"
    file.write_bytes(change(file.read_bytes()))
    capsys.readouterr()
    state = ev.State(tmp_path, {})
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: ") and out.count("\n") == 1
    assert out.endswith("; the evaluation begins again\n") and state.attacks == {}
    assert without_seconds(ev.measure(*run, state=state)) == without_seconds(expected)


def test_a_state_of_another_number_of_images_is_refused(small, refused):
    model, x, labels = small
    images = ev.Images(x, labels, model(common.to_float(x)))
    state = ev.State()
    state.attacks["net pgd1"] = ev.Progress(torch.zeros(3).int())
    run = (model, images, "pgd1", ev.Settings(), state, "net")
    assert "these images" in refused(ev.run_attack, *run)


def test_the_40000th_restart_can_break_an_image(small):
    model, x, labels = small
    images = ev.Images(x, labels, model(common.to_float(x)))
    state = ev.State()
    progress = ev.run_attack(model, images, "pgd2", ev.Settings(eps=0.0), state)
    progress.passes_done = 39_999
    found = ev.run_attack(model, images, "pgd2", ev.Settings(restarts=40_000), state)
    assert set(found.broken_by.tolist()) == {-1, 0, 40_000}


def test_only_what_the_model_itself_gets_wrong_counts_as_broken(small, monkeypatch):
    model, x, labels = small
    images = ev.Images(x, labels, model(common.to_float(x)))
    correct = (images.logits.argmax(1) == labels).nonzero()[:, 0]
    (_, batch) = next(ev.batches(images, correct, ev.Settings(steps=20), "apgd-ce"))
    x_adv, broken = ev.search(model, batch)
    assert broken.any() and torch.equal(broken, model(x_adv).argmax(1) != batch.labels)
    for result, broken_by_it in (
        (x_adv, broken),
        (batch.x, torch.zeros_like(broken)),  # the clean image
        (batch.x + 0.1 * (x_adv - batch.x).sign(), torch.zeros_like(broken)),  # too far away
        (torch.full_like(batch.x, 2.0), torch.zeros_like(broken)),  # not an image
    ):
        monkeypatch.setitem(ev.ATTACKS, "apgd-ce", lambda model, b, result=result: result.clone())
        assert torch.equal(ev.search(model, batch)[1], broken_by_it)


def hold(path, ready, go_on):
    """Keep the state folder of a result until told to end."""
    with ev.state_folder(path):
        ready.set()
        go_on.wait(60)


def test_a_second_evaluation_of_the_same_file_is_refused(tmp_path, refused):
    path, context = tmp_path / "out.json", multiprocessing.get_context("fork")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, ready, go_on))
    process.start()
    assert ready.wait(60)
    with_json = ["net0.pt", "--attack", "pgd1", "--json", path]
    message = refused(main, *with_json)
    assert message.startswith(f"{path}.state: in use by process {process.pid}; wait for it")
    go_on.set()
    process.join()
    main(*with_json)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


# ------------------------------------------------------------------------------------------------
# Warnings


def warnings_with(model, x, labels, attacks=("apgd-ce",), **options):
    settings = ev.Settings(**{"steps": 5, "queries": 200} | options)
    return " ".join(ev.measure(model, x, labels, list(attacks), settings)["warnings"])


def test_a_sound_model_gets_no_warning(small):
    assert warnings_with(*small, attacks=["aa"], steps=20) == ""


def test_a_randomised_model_is_warned_of(small):
    model, x, labels = small
    noisy = Made(model, lambda z: z + 0.1 * torch.randn_like(z))
    assert "randomised" in warnings_with(noisy, x, labels)


def test_probabilities_are_warned_of(small):
    model, x, labels = small
    softmax = Made(model, lambda z: z.softmax(1))
    assert "probabilities" in warnings_with(softmax, x, labels)


def test_vanishing_gradients_and_a_stronger_square_are_warned_of(small):
    model, x, labels = small
    flat = Made(model, lambda z: (8 * z).round())  # no gradient, but Square sees the logits
    found = warnings_with(flat, x, labels, ["aa"], eps=0.1)
    assert "zero gradient at " in found and "Square goes from" in found
    assert "masked, apgd-ce, apgd-t, fab-t may overestimate" in found  # square has no gradient


def test_masked_gradients_are_warned_of_when_pgd_is_far_above_autoattack(small):
    model, x, labels = small
    steep = Made(model, lambda z: 1e4 * z)  # the cross-entropy saturates, DLR does not
    assert "gradients may be masked" in warnings_with(steep, x, labels, ["pgd20", "aa"], eps=0.06)


def test_dlr_of_few_classes_is_told():
    for classes, told in ((2, True), (3, True), (4, False)):
        model, x, labels = linear_problem(classes)
        assert ("apgd-t: DLR needs" in warnings_with(model, x, labels, ["apgd-t"])) == told
        assert "DLR" not in warnings_with(model, x, labels, ["apgd-ce"])


class Killed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Masked(Made):
    """A net whose gradient is multiplied by a number, for some of the images."""

    def __init__(self, model, factor, share=1.0):
        super().__init__(model, None)
        self.factor, self.share = factor, share

    def forward(self, x):
        masked = int(self.share * len(x))
        return self.model(torch.cat([Killed.apply(x[:masked], self.factor), x[masked:]]))


@pytest.mark.parametrize("attack", ["pgd20", "pgd2", "apgd-ce", "apgd-t", "fab-t"])
def test_zero_gradients_are_told_with_every_gradient_attack(small, attack):
    model, x, labels = small
    right = int((model(common.to_float(x)).argmax(1) == labels).sum())
    options = {"attacks": [attack], "steps": 2, "targets": 1, "batch_size": 500}
    found = warnings_with(Masked(model, 0.0), x, labels, **options)
    assert f"zero gradient at {right} starting points: " in found and f"masked, {attack}" in found
    found = warnings_with(Masked(model, 0.0, share=0.5), x, labels, **options)
    assert f"zero gradient at {right // 2} starting points" in found
    assert warnings_with(model, x, labels, **options) == ""


def test_gradients_cut_off_are_told_by_the_default_attack(small):
    model, x, labels = small
    detached = Made(model, lambda z: z.detach())
    assert "zero gradient at " in warnings_with(detached, x, labels, ["clean", "pgd20"])
    assert "pgd20 of the calibration" in warnings_with(detached, x, labels, ["calibration"])


def test_a_saturated_softmax_is_told_by_pgd(small):
    model, x, labels = small
    steep = Made(model, lambda z: 1e4 * z)  # beyond what float32 resolves next to 1
    assert "zero gradient at " in warnings_with(steep, x, labels, ["pgd20"])


@pytest.mark.parametrize("attack", ["pgd20", "apgd-ce", "apgd-t", "fab-t"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_told(small, attack, factor):
    model, x, labels = small
    options = {"attacks": [attack], "steps": 2, "targets": 1}
    found = warnings_with(Masked(model, factor), x, labels, **options)
    assert "logits or gradients that are not finite at " in found and attack in found


class OwnStatistics(Made):
    """Its forward pass takes the statistics of the batch, whatever the mode."""

    def forward(self, x):
        return self.model(nn.functional.batch_norm(x, None, None, training=True))


def test_logits_that_depend_on_the_batch_are_told_also_in_the_clean_evaluation(small):
    model, x, labels = small
    in_order = Made(model, lambda z: z + torch.arange(len(z))[:, None] * torch.eye(10)[0])
    for other in (OwnStatistics(model, None), in_order):
        for batch_size in (1, 7, 80):
            found = warnings_with(other, x, labels, ["clean"], batch_size=batch_size)
            assert "depend on the other images of its batch" in found
    dropout = Made(model, lambda z: nn.functional.dropout(z, 0.5, training=True))
    assert "randomised" in warnings_with(dropout, x, labels, ["clean"])
    for number in (1, 2, 3, 80):
        assert warnings_with(model, x[:number], labels[:number], ["clean"]) == ""


def test_the_warnings_of_the_command_reach_the_caller_of_evaluate(small):
    model, x, labels = small
    with pytest.warns(UserWarning, match="zero gradient at"):
        ev.evaluate(Masked(model, 0.0), x, labels, ["pgd2"])
    with pytest.warns(UserWarning, match="other images of its batch"):
        ev.evaluate(OwnStatistics(model, None), x, labels, ["clean"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ev.evaluate(model, x, labels, ["clean", "pgd2", "aa"], steps=3, queries=5)


def test_logits_that_are_not_finite_are_no_success_and_are_told(small):
    class Hole(Made):
        def forward(self, x):
            bright = (x.amax((1, 2, 3)) > edge)[:, None]
            return self.model(x) + torch.where(bright, math.nan, 0.0)

    model, x, labels = small
    edge = common.to_float(x).amax() + 0.1
    settings = ev.Settings(eps=0.9, steps=3)
    row = ev.measure(Hole(model, None), x, labels, ["clean", "apgd-ce"], settings)
    assert "not finite" in " ".join(row["warnings"])
    assert row["apgd_ce_acc"] == row["clean_acc"]


# ------------------------------------------------------------------------------------------------
# Models and calibration


def test_the_ensemble_returns_the_logarithm_of_the_averaged_probabilities(small):
    model, x, _ = small
    other = Made(model, lambda z: -0.5 * z)
    x = common.to_float(x)
    expected = (model(x).softmax(1) + other(x).softmax(1)) / 2
    np.testing.assert_allclose(ev.Ensemble([model, other])(x).exp(), expected, atol=1e-6)


@pytest.mark.parametrize("ensemble", [ev.Ensemble, robust_kd.Ensemble])
def test_the_ensemble_averages_nets_of_half_precision_in_float32(small, ensemble):
    model, x, _ = small
    half = Made(model, lambda z: z.half())
    logits = ensemble([half, half])(common.to_float(x))
    expected = half(common.to_float(x)).double().log_softmax(1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_calibration_equals_a_loop_over_images():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(200, 5), torch.randint(0, 5, (200,))
    found = ev.calibration(logits, labels)
    bins, nll, entropy = [[] for _ in range(15)], 0.0, 0.0
    for z, y in zip(logits.double(), labels.tolist()):
        p = z.softmax(0)
        nll -= math.log(p[y])
        entropy -= sum(q * math.log(q) for q in p.tolist())
        number = next(i for i in range(15) if p.max() <= (i + 1) / 15)
        bins[number].append((p.max().item(), float(p.argmax() == y)))
    gaps = [abs(sum(c for c, _ in part) - sum(r for _, r in part)) for part in bins]
    assert found["ece"] == pytest.approx(sum(gaps) / 200)
    assert found["nll"] == pytest.approx(nll / 200)
    assert found["entropy"] == pytest.approx(entropy / 200)
    assert found["confidence"] == pytest.approx([len(part) / 200 for part in bins])
    counts = np.zeros(15)
    for p in logits.double().softmax(1).flatten().tolist():
        counts[max(math.ceil(p * 15), 1) - 1] += 1
    assert found["probabilities"] == pytest.approx(counts / counts.sum())


def test_calibration_of_certain_and_uniform_models():
    labels = torch.tensor([0, 1])
    sure = ev.calibration(1e4 * torch.eye(2), labels)
    assert sure["nll"] == sure["ece"] == sure["entropy"] == 0 and sure["confidence"][-1] == 1
    flat = ev.calibration(torch.zeros(2, 2), labels)
    assert flat["nll"] == pytest.approx(math.log(2)) == flat["entropy"] and flat["ece"] == 0


def test_float_images_outside_of_the_box_are_refused(small, refused):
    model, x, labels = small
    assert "[0, 1]" in refused(ev.evaluate, model, 2 * common.to_float(x), labels, ["clean"])
    inside = ev.evaluate(model, common.to_float(x), labels, ["clean", "apgd-ce"], steps=3)
    assert inside == ev.evaluate(model, x, labels, ["clean", "apgd-ce"], steps=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(80,), (80, 1)])
def test_labels_of_any_integer_type_and_of_one_column_are_taken(small, dtype, shape):
    model, x, labels = small
    attacks = ["clean", "pgd2", "apgd-ce"]
    expected = ev.evaluate(model, x, labels, attacks, steps=2)
    assert ev.evaluate(model, x, labels.to(dtype).view(shape), attacks, steps=2) == expected
    assert 0 < expected["pgd2_acc"] < expected["clean_acc"]
    assert ev.evaluate(model, x, labels.tolist(), attacks, steps=2) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda y: y.float(), "whole numbers, got torch.float32"),
        (lambda y: y == 0, "whole numbers, got torch.bool"),
        (lambda y: nn.functional.one_hot(y), "got torch.int64 (80, 10)"),
        (lambda y: y[None], "one for each of the 80 images, got torch.int64 (1, 80)"),
        (lambda y: y[:1], "got torch.int64 (1,)"),
        (lambda y: y[0], "got torch.int64 ()"),
        (lambda y: y[:79], "got torch.int64 (79,)"),
        (lambda y: torch.cat([y, y]), "got torch.int64 (160,)"),
        (lambda y: y - 1, "expected 0 to K-1, got -1 for image "),
        (lambda y: y + 1, "10 logits, the data has 11 classes"),
    ],
)
def test_other_labels_are_refused(small, change, words, refused):
    model, x, labels = small
    assert words in refused(ev.evaluate, model, x, change(labels), ["clean", "pgd2"])


@pytest.mark.parametrize(
    "attacks, words",
    [
        (["pgd"], "got 'pgd'"),
        (["clean", "PGD20"], "got 'PGD20'"),
        (["autoattack"], "got 'autoattack'"),
        ([20], "got 20"),
        ("clean", "got 'clean'"),
        ([], "got []"),
        (None, "got None"),
        (["clean", "pgd20", "clean"], "'clean' twice"),
        (["corruptions"], "corruptions is measured by the command alone"),
        (["calibration"], "calibration is measured by the command alone"),
    ],
)
def test_words_that_are_no_list_of_attacks_are_refused_with_those_that_are(
    small, attacks, words, refused
):
    message = refused(ev.evaluate, *small, attacks)
    assert words in message and "a list of clean, pgdN such as pgd20, aa, " in message


@pytest.mark.parametrize(
    "options, words",
    [
        ({"eps": 8}, "eps: expected a number in pixel units between 0 and 1, like 8/255, got 8"),
        ({"step_size": 2}, "step_size: expected a number in pixel units"),
        ({"eps": -0.1}, "eps: "),
        ({"eps": math.nan}, "eps: "),
        ({"restarts": 0}, "restarts: expected a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: "),
        ({"steps": 2.5}, "steps: "),
    ],
)
def test_radii_in_levels_and_numbers_below_one_are_refused(small, options, words, refused):
    assert words in refused(ev.evaluate, *small, ["clean", "pgd2"], **options)


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """A folder with data.npz of 8x8 images, two checkpoints, and a module of a foreign net."""
    folder = tmp_path_factory.mktemp("files")
    model, x, labels = small
    np.savez(folder / "data.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    for seed in (0, 1):
        torch.manual_seed(seed)
        common.save_model(folder / f"net{seed}.pt", common.build_model("mlp-16", size=8))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "weights")
    (folder / "foreign.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    first = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]\n"
        "    return nn.Sequential(*first, nn.Linear(192, 10))\n"
        "def coarse():\n"
        "    import torch\n"
        "    torch.backends.fp32_precision = 'tf32'\n"
        "    return net()\n"
        "def soft():\n"
        "    return nn.Sequential(net(), nn.Softmax(1))\n"
        "def broken():\n"
        "    return nn.Sequential(net(), nn.Threshold(1e9, float('nan')))\n"
        "class Hole(nn.Module):\n"
        "    def forward(self, x):\n"
        "        import torch\n"
        "        bright = x.mean((1, 2, 3)) > 0.99\n"
        "        return torch.where(bright, float('nan'), 1.0)[:, None] * self.weight\n"
        "def hole():\n"
        "    hole = Hole()\n"
        "    import torch\n"
        "    hole.weight = nn.Parameter(torch.arange(10.0))\n"
        "    return hole\n"
        "def steep():\n"
        "    steep = net()\n"
        "    steep.register_forward_hook(lambda module, inputs, logits: 1e6 * logits)\n"
        "    return steep\n"
        "def cut():\n"
        "    cut = net()\n"
        "    cut.register_forward_hook(lambda module, inputs, logits: logits.detach())\n"
        "    return cut\n"
        "def seven():\n"
        "    return nn.Sequential(net(), nn.Linear(10, 7))\n"
        "def large():\n"
        "    return nn.Linear(5, 10)\n"
    )
    return folder


@pytest.fixture(autouse=True)
def in_folder(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))


QUICK = ["--data", "data.npz", "--device", "cpu"]
FOREIGN = ["--model", "foreign:net", "--weights", "weights"]


def main(*argv):
    """The command, with few iterations of AutoAttack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "Settings", functools.partial(ev.Settings, steps=3, queries=10))
        ev.main([*map(str, argv), *QUICK])


def test_every_checkpoint_gets_a_row_and_the_json_holds_all(tmp_path, capsys, refused):
    out = tmp_path / "out.json"
    argv = ["net0.pt", "net1.pt", "--attack", "clean", "pgd2", "aa", "calibration", "--json", out]
    main(*argv)
    text, record = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["model"] for row in record["rows"]] == ["net0.pt", "net1.pt"]
    assert record["eps"] == 8 / 255 and record["step_size"] == 2 / 255 and record["n"] == 80
    for row in record["rows"]:
        assert f"{row['aa_acc']:.4f}" in text and set(row["calibration"]) == {"clean", "pgd20"}
        # once, and not beside each of the four attacks in turn
        (broken,) = re.findall(rf"^{row['model']} +aa +(\d+) +0\.\d+$", text, re.M)
        assert int(broken) == round(80 * (row["clean_acc"] - row["aa_acc"])) > 0
    assert "8/255" in text and [*tmp_path.iterdir()] == [out]
    before = out.read_bytes()
    main(*argv)
    assert "is finished" in capsys.readouterr().out
    others = ["net0.pt", "--attack", "clean", "--eps", "4/255", "--json", out]
    assert out.name in refused(main, *others)
    assert "--plot: " in refused(main, *argv, "--plot", tmp_path / "p.png")  # not left out
    for text in ("[]", '{"flags": {}}', "{", "[" * 100_000):
        (tmp_path / "other.json").write_text(text)
        assert "other.json" in refused(main, "net0.pt", "--json", tmp_path / "other.json")
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "out.json"]


MORE = ["--seed 1", "--eps 4/255", "--step-size 1/255", "--restarts 2", "--n 40"]


@pytest.mark.parametrize("more", MORE)
def test_a_finished_evaluation_is_not_shown_for_other_settings(more, tmp_path, refused):
    argv = ["net0.pt", "--attack", "pgd1", "--json", tmp_path / "o.json"]
    main(*argv)
    line = refused(main, *argv, *more.split())
    assert "was made with" in line and "take another --json" in line
    assert more.split()[0] in line or "the images and labels of --data" in line
    main(*argv, "--batch-size", "7")  # changes no number, but by rounding


def test_the_ensemble_of_the_command_is_the_mean_of_all_its_nets(tmp_path, small):
    _, x, labels = small
    out = tmp_path / "e.json"
    main("net0.pt", "net1.pt", "--ensemble", "--attack", "clean", "calibration", "--json", out)
    (row,) = json.loads(out.read_text())["rows"]
    nets = [common.load_model(f"net{k}.pt") for k in (0, 1)]
    probs = sum(common.predict(net, x).softmax(1) for net in nets) / 2
    expected = torch.nn.functional.nll_loss(probs.log(), labels).item()
    assert row["calibration"]["clean"]["nll"] == pytest.approx(expected, rel=1e-4)


def test_another_file_of_data_or_weights_is_refused_and_the_labels_count(tmp_path, refused, small):
    _, x, labels = small
    arrays = {"x_train": x, "y_train": labels, "x_test": x, "y_test": labels}
    np.savez("own.npz", **arrays)
    common.save_model(Path("own.pt"), common.build_model("mlp-4", size=8))
    argv = ["own.pt", "--attack", "clean", "--json", str(tmp_path / "out.json")]
    ev.main([*argv, "--data", "own.npz"])
    relabelled = labels.clone()
    relabelled[0] = (labels[0] + 1) % 10
    np.savez("own.npz", **arrays | {"y_test": relabelled})
    assert "--data" in refused(ev.main, [*argv, "--data", "own.npz"])
    np.savez("own.npz", **arrays)
    common.save_model(Path("own.pt"), common.build_model("mlp-4", size=8))
    assert "own.pt" in refused(ev.main, [*argv, "--data", "own.npz"])


def test_a_finished_json_is_refused_for_weights_that_a_function_loads(tmp_path, refused, capsys):
    (tmp_path / "own_weights.py").write_text(
        "import torch, foreign\n"
        "def net():\n"
        "    net = foreign.net()\n"
        f"    net.load_state_dict(torch.load({str(tmp_path / 'own')!r}))\n"
        "    return net\n"
        "def buffer():\n"
        f"    net, numbers = foreign.net(), torch.load({str(tmp_path / 'own')!r})\n"
        "    net.register_buffer('scale', numbers['4.bias'], persistent=False)\n"
        "    for p in net.parameters():\n"
        "        torch.nn.init.zeros_(p)\n"
        "    return net\n"
    )
    sys.path.insert(0, str(tmp_path))
    import foreign

    for name in ("net", "buffer"):
        argv = ["--model", f"own_weights:{name}", "--attack", "clean", "--json"]
        argv += [tmp_path / f"{name}.json"]
        weights = foreign.net().state_dict()
        torch.save(weights, tmp_path / "own")
        main(*argv)
        main(*argv)
        assert "is finished" in capsys.readouterr().out
        torch.save(weights | {"4.bias": weights["4.bias"] + 1}, tmp_path / "own")
        message = refused(main, *argv)
        assert f"the weights of own_weights:{name}: " in message and f"{name}.json" in message


def test_a_finished_json_is_refused_for_other_images_in_the_same_file(tmp_path, refused, small):
    _, x, labels = small
    argv = ["net0.pt", "--attack", "clean", "ood", "--ood", tmp_path / "ood.npz"]
    argv += ["--json", tmp_path / "out.json"]
    np.savez(tmp_path / "ood.npz", x_test=x[:9], y_test=labels[:9])
    main(*argv)
    main(*argv)
    for changed_x, changed_labels in ((255 - x[:9], labels[:9]), (x[:9], labels[1:10])):
        np.savez(tmp_path / "ood.npz", x_test=changed_x, y_test=changed_labels)
        assert "the images of --ood: " in refused(main, *argv)
    np.savez(tmp_path / "ood.npz", x_test=x[:9], y_test=labels[:9])
    main(*argv)


def test_a_finished_json_is_refused_for_other_files_of_corruptions(tmp_path, refused):
    common.save_model(tmp_path / "net.pt", common.build_model("mlp-4"))
    arrays = common.make_shapes(10, 10)
    np.savez(tmp_path / "data.npz", **arrays)
    five_times = np.tile(arrays["x_test"], (5, 1, 1, 1))
    for name in ev.CORRUPTIONS:
        np.save(tmp_path / f"{name}.npy", five_times)
    np.save(tmp_path / "labels.npy", np.tile(arrays["y_test"], 5))
    argv = [tmp_path / "net.pt", "--data", tmp_path / "data.npz", "--attack", "corruptions"]
    argv += ["--corruptions", tmp_path, "--json", tmp_path / "out.json"]
    argv = [str(word) for word in argv]
    ev.main(argv)
    ev.main(argv)
    np.save(tmp_path / "fog.npy", 255 - five_times)
    assert "the files of --corruptions: " in refused(ev.main, argv)


@pytest.fixture
def grey(tmp_path):
    """Arguments of the command for a net and a data set of grey images of 8 x 8."""
    g = np.random.default_rng(0)
    x, labels = g.integers(0, 256, (30, 8, 8), np.uint8), np.arange(30) % 10
    np.savez(tmp_path / "grey.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    net = common.build_model("mlp-4", channels=1, size=8)
    common.save_model(tmp_path / "grey.pt", net)
    argv = [tmp_path / "grey.pt", "--data", tmp_path / "grey.npz", "--attack", "clean", "ood"]
    return [*map(str, argv), "--ood"], x, labels


def other_images_acc(argv, path, tmp_path):
    ev.main([*argv, str(path), "--json", str(tmp_path / f"{path.stem}.json")])
    (row,) = json.loads((tmp_path / f"{path.stem}.json").read_text())["rows"]
    return row["ood_acc"], row["clean_acc"]


def test_grey_images_are_other_images_of_grey_data(grey, tmp_path, refused):
    from PIL import Image

    argv, x, labels = grey
    np.savez(tmp_path / "flat.npz", x_test=x, y_test=labels)
    np.savez(tmp_path / "deep.npz", x_test=x[..., None], y_test=labels)
    np.savez(tmp_path / "rgb.npz", x_test=np.repeat(x[..., None], 3, 3), y_test=labels)
    for number, (image, label) in enumerate(zip(x, labels)):
        folder = tmp_path / "folder" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    for name in ("flat.npz", "deep.npz", "rgb.npz", "folder"):
        found, clean = other_images_acc(argv, tmp_path / name, tmp_path)
        assert found == clean
    coloured = np.repeat(x[..., None], 3, 3)
    coloured[3, 0, 0, 1] ^= 128
    np.savez(tmp_path / "colour.npz", x_test=coloured, y_test=labels)
    message = refused(ev.main, [*argv, str(tmp_path / "colour.npz")])
    assert "images in colour, but the images of --data are grey" in message
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    for name in ev.CORRUPTIONS:
        np.save(tmp_path / f"{name}.npy", np.zeros((150, 32, 32, 3), np.uint8))
    corrupted = [*argv[:3], "--attack", "corruptions", "--corruptions", str(tmp_path)]
    assert "expected uint8 (150, 8, 8, 1), got uint8 (150, 32, 32, 3)" in refused(
        ev.main, corrupted
    )


def test_a_class_name_that_is_there_twice_keeps_its_labels(tmp_path):
    """ImageNet has two kinds of crane."""
    names = ["crane", "cat", "crane"]
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "other.npz", x_test=x, y_test=np.arange(30) % 3)
    np.savez(tmp_path / "named.npz", x_test=x, y_test=np.arange(30) % 3, classes=names)
    for file in ("other.npz", "named.npz"):
        images = ev.load_other_images(tmp_path / file, names, (8, 8, 3))
        assert images.labels.tolist() == [0, 1, 2] * 10


ATTACKS_OF_ALL_KINDS = ["clean", "pgd2", "apgd-ce", "apgd-t", "fab-t", "square"]


def test_what_the_caller_has_switched_off_or_set_changes_no_number(small):
    model, x, labels = small
    x, labels = x[:20], labels[:20]

    def numbers():
        return ev.evaluate(model, x, labels, ATTACKS_OF_ALL_KINDS, steps=3, queries=5, targets=2)

    expected = numbers()
    assert expected["pgd2_acc"] < expected["clean_acc"] and len(expected) == 6
    with torch.no_grad():
        assert numbers() == expected
    with torch.inference_mode():
        assert numbers() == expected
        x, labels = x.clone(), labels.clone()  # tensors of inference mode
        assert numbers() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert numbers() == expected
    with torch.device("meta"):
        assert numbers() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert numbers() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_calibration_and_corruptions_do_not_depend_on_the_default_device(small):
    model, x, labels = small
    expected = ev.measure(model, x, labels, ["calibration"], ev.Settings())
    rows = ev.pair_images(x, labels, x.flip(0).numpy(), labels.flip(0))
    with torch.device("meta"):
        assert ev.measure(model, x, labels, ["calibration"], ev.Settings()) == expected
        assert torch.equal(ev.pair_images(x, labels, x.flip(0).numpy(), labels.flip(0)), rows)
    assert torch.equal(rows, torch.arange(79, -1, -1))


class Viewed(nn.Module):
    """A net that needs contiguous images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.view(len(x), -1).view(x.shape))


def test_nets_that_view_their_images_are_evaluated_and_stay_as_they_are(small):
    model, x, labels = small
    net = Viewed(model)
    for images in (x[:20], common.to_float(x[:20])):
        options = {"steps": 3, "queries": 5, "targets": 2}
        found, expected = (
            ev.evaluate(each, images, labels[:20], ATTACKS_OF_ALL_KINDS, **options)
            for each in (net, model)
        )
        assert found == expected
    assert not net._forward_pre_hooks and not model._forward_pre_hooks


def test_an_evaluation_under_torchrun_is_refused(monkeypatch, refused):
    monkeypatch.setattr(common, "world", lambda: 2)
    assert "without torchrun" in refused(ev.main, ["net.pt"])


def test_a_curve_of_radius_0_has_one_point(small):
    model, x, labels = small
    curve, _ = ev.accuracy_curve(model, x[:10], labels[:10], ev.Settings(eps=0.0, step_size=0.0))
    assert len(curve) == 1


def test_grey_images_are_other_images_of_colour_data(tmp_path, small):
    _, x, labels = small
    grey = x[..., 0].numpy()
    argv = ["net0.pt", "--data", "data.npz", "--attack", "clean", "ood", "--ood"]
    found = []
    for name, images in (("flat", grey), ("rgb", np.repeat(grey[..., None], 3, 3))):
        np.savez(tmp_path / f"{name}.npz", x_test=images, y_test=labels)
        found.append(other_images_acc(argv, tmp_path / f"{name}.npz", tmp_path))
    assert found[0] == found[1]


def test_logits_of_other_images_and_corruptions_that_are_not_finite_are_an_error(
    tmp_path, refused, small
):
    class Hole(nn.Module):
        def forward(self, x):
            return torch.where(x.amax((1, 2, 3)) > 0.99, math.nan, 1.0)[:, None].expand(-1, 10)

    levels = torch.tensor([40, 80, 120, 160], dtype=torch.uint8)
    x, labels = levels[:, None, None, None].repeat(1, 32, 32, 3), torch.zeros(4).long()
    for name in ev.CORRUPTIONS:
        np.save(tmp_path / f"{name}.npy", torch.cat([x] * 5))
    np.save(tmp_path / "labels.npy", np.zeros(20, int))
    bright = torch.cat([x] * 5)
    bright[13] = 255
    np.save(tmp_path / "fog.npy", bright)
    files = ev.read_corruptions(tmp_path, x, labels)
    message = refused(ev.corruption_accuracy, Hole(), x, labels, files)
    assert "1 of 4 images under fog, severity 4, are not finite" in message
    _, x, labels = small
    bright = x[:9].clone()
    bright[4] = 255
    np.savez(tmp_path / "ood.npz", x_test=bright, y_test=labels[:9])
    argv = ["--model", "foreign:hole", "--attack", "clean", "ood", "--ood", tmp_path / "ood.npz"]
    message = refused(main, *argv)
    assert "1 of 9 images of --ood are not finite, the first is number 4" in message


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_how_to_go_on_and_the_same_command_does(
    number, code, tmp_path, capsys, monkeypatch, ended
):
    argv = ["net0.pt", "--attack", "aa", "--batch-size", "20", "--json", tmp_path / "out.json"]
    save, calls = ev.State.save, []

    def stopped_at_the_fifth(state):
        save(state)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ev.State, "save", stopped_at_the_fifth)
    status, message = ended(lambda: main(*argv))
    assert status == code and "stopped; " in message
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "lock",
        "out.json.state",
        "state.pt",
    ]
    capsys.readouterr()
    main(*argv)
    assert "goes on from" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_the_program_ends_with_one_line_or_with_its_table(files):
    program = [sys.executable, str(ROOT / "eval_robustness.py"), *QUICK]
    options = {"capture_output": True, "text": True, "timeout": 100, "cwd": files}
    done = subprocess.run([*program, "net0.pt", "--attack", "clean", "pgd1"], **options)
    assert done.returncode == 0 and "pgd1_acc" in done.stdout and done.stderr == ""
    done = subprocess.run([*program, "nowhere.pt"], **options)
    assert (done.returncode, done.stderr) == (2, "error: nowhere.pt: no such checkpoint\n")


def test_an_ensemble_is_one_row_and_says_what_the_attacks_get(tmp_path, capsys):
    main("net0.pt", "net1.pt", "--ensemble", "--json", tmp_path / "e.json")
    assert "logarithm of the averaged probabilities" in capsys.readouterr().out
    record = json.loads((tmp_path / "e.json").read_text())
    assert [row["model"] for row in record["rows"]] == ["ensemble of 2"]


def test_a_foreign_model_is_evaluated_with_its_weights(small, tmp_path):
    main(*FOREIGN, "--json", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    model, x, labels = small
    assert row["clean_acc"] == pytest.approx(ev.evaluate(model, x, labels, ["clean"])["clean_acc"])


def test_a_foreign_model_that_asks_for_tf32_is_judged_without(small, monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")  # put back afterwards
    logits, found = ev.clean_logits, []

    def watched(*args, **options):
        found.append(torch.backends.cudnn.conv.fp32_precision)
        return logits(*args, **options)

    monkeypatch.setattr(ev, "clean_logits", watched)
    main("--model", "foreign:coarse", "--weights", "weights", "--attack", "clean", "pgd1")
    assert set(found) == {"ieee"}


def test_a_plot_is_drawn_and_the_curve_falls_to_zero(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "p.json"
    png = tmp_path / "p.png"
    main("net0.pt", "--attack", "clean", "calibration", "--plot", png, "--json", out)
    curve = json.loads(out.read_text())["rows"][0]["curve"]
    assert png.stat().st_size > 1000 and curve[0][0] == 0 and curve[-1][1] == 0
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve))
    png.unlink()  # the record has all that is drawn
    monkeypatch.setattr(ev, "measure", None)
    main("net0.pt", "--attack", "clean", "calibration", "--plot", "q.pdf", "--json", out)
    assert Path("q.pdf").read_bytes().startswith(b"%PDF") and not png.exists()


def test_zero_gradients_of_the_curve_are_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main("--model", "foreign:steep", "--attack", "clean", "--plot", tmp_path / "p.png")
    warning = (
        r"zero gradient at \d+ starting points: gradients are masked, apgd-ce of the curve may"
    )
    assert re.search(warning, capsys.readouterr().out)


def test_a_plot_shows_both_histograms_and_the_corruptions(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **options: drawn.append(self))
    row = {
        "model": "net.pt",
        "curve": [(0, 1), (0.1, 0)],
        "calibration": {"clean": {"confidence": [0.2, 0.8], "probabilities": [0.9, 0.1]}},
        "corruptions": {"corruptions_acc": {name: [0.5] * 5 for name in ev.CORRUPTIONS}},
    }
    ev.plot(tmp_path / "p.png", {"rows": [row]})
    panels = {axis.get_xlabel(): axis for axis in drawn[0].axes}
    # the second histogram is Figure 8 of the paper
    for label, values in (
        ("largest probability of an image", [0.2, 0.8]),
        ("probability of any class", [0.9, 0.1]),
    ):
        assert list(panels[label].patches[0].get_data().values) == values
    names = [text.get_text() for text in panels["severity"].get_yticklabels()]
    assert names == list(ev.CORRUPTIONS)


def test_every_checkpoint_gets_its_own_curve_and_name(tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, paths = [], []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **options: drawn.append(self))
    for number, folder in enumerate(("at/run-s0", "akd/run-s0", f"{'long' * 12}/a", "b")):
        path = tmp_path / folder / "student.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(Path(f"net{number % 2}.pt").read_bytes())
        paths.append(path)
    main(*paths, "--attack", "clean", "--plot", tmp_path / "p.png")
    lines = drawn[0].axes[0].get_lines()
    names = ["at/run-s0/student.pt", "akd/run-s0/student.pt"]
    names += [f"{'long' * 12}/a/student.pt", f"{tmp_path.name}/b/student.pt"]
    assert [line.get_label() for line in lines] == names
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    curves = [line.get_ydata().tolist() for line in lines]
    assert curves[0] == curves[2] and curves[1] == curves[3]
    assert ev.short_names(["./a.pt", "a.pt"]) == {"./a.pt": "./a.pt", "a.pt": "a.pt"}
    assert ev.short_names(["x/y/z/a.pt", "b.pt"]) == {"x/y/z/a.pt": "z/a.pt", "b.pt": "b.pt"}


def test_a_plot_without_matplotlib_names_the_package(monkeypatch, tmp_path, refused):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(main, "net0.pt", "--plot", tmp_path / "p.png")


def test_a_net_without_gradient_is_refused_for_what_follows_it(tmp_path, refused):
    pytest.importorskip("matplotlib")
    argv = ["--model", "foreign:cut", "--attack", "clean", "square"]
    main(*argv)
    for flags in (["--plot", tmp_path / "p.png"], ["--attack", "calibration"]):
        line = refused(main, *argv, *flags)
        assert "the images, which --plot, calibration and all attacks but square follow" in line


BAD = {
    "probabilities": (["--model", "foreign:soft"], "returns probabilities"),
    "nan logits": (["--model", "foreign:broken"], "not finite"),
    "wrong classes": (["--model", "foreign:seven"], "returns 7 logits, the data has 10"),
    "wrong shape": (["--model", "foreign:large"], "does not take images"),
    "no such function": (["--model", "foreign:nothing"], "--model foreign:nothing"),
    "no such module": (["--model", "nowhere:net"], "--model nowhere:net"),
    "no such weights": (["--model", "foreign:net", "--weights", "nowhere"], "--weights nowhere"),
    "damaged weights": (["--model", "foreign:net", "--weights", "short"], "--weights short"),
    "damaged checkpoint": (["short"], "short: damaged"),
    "no checkpoint": ([], "expected CKPT"),
    "too many images": (["net0.pt", "--n", "81"], "--n 81: too large; data.npz has 80 "),
    "unknown attack": (["net0.pt", "--attack", "aa-fast"], "'aa-fast'"),
    "eps above 1": (["net0.pt", "--eps", "8"], "--eps: expected a number in pixel units"),
    "step above 1": (["net0.pt", "--step-size", "2"], "--step-size: expected a number in pixel"),
    "attack twice": (["net0.pt", "--attack", "clean", "clean"], "--attack: expected each name"),
    "no folder": (["net0.pt", "--json", "nowhere/out.json"], "expected a file, in a folder"),
    "a folder": (["net0.pt", "--json", "."], ".: expected a file"),
    "a device": (["net0.pt", "--json", "/dev/null"], "/dev/null: expected a file"),
    "no such format": (["net0.pt", "--plot", "p.xyz"], "--plot p.xyz: expected a name with .png"),
    "twice": (["net0.pt", "net1.pt", "net0.pt", "--ensemble"], "net0.pt: expected each net once"),
    "twice, by two paths": (["net0.pt", "./net0.pt"], "net0.pt: expected each net once"),
    "twice, in two spellings": (
        ["--model", "foreign:net", "--model", "foreign:net()"],
        "--model foreign:net: expected each net once",
    ),
    "unused images": (["net0.pt", "--cinic", "c.npz"], "--cinic: has no effect without --attack"),
    "unused starts": (["net0.pt", "--attack", "aa", "--restarts", "5"], "--restarts: has no"),
    "unused step": (["net0.pt", "--attack", "aa", "--step-size", "0.1"], "--step-size: has no"),
    "no cinic": (["net0.pt", "--attack", "cinic"], "--attack cinic"),
    "no corruptions": (["net0.pt", "--attack", "corruptions"], "with --corruptions"),
    "no folder of corruptions": (
        ["net0.pt", "--attack", "corruptions", "--corruptions", "nowhere"],
        "there is no folder nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(case, files, refused):
    (files / "short").write_bytes((files / "net0.pt").read_bytes()[:500])
    before = {p.name for p in files.iterdir()} - {"__pycache__"}
    argv, message = BAD[case]
    assert message in refused(main, *argv)
    assert {p.name for p in files.iterdir()} - {"__pycache__"} == before


# ------------------------------------------------------------------------------------------------
# What the training scripts call


FLAGS = {
    robust_kd: ("--eps", "--step-size"),
    tf: ("--eps", "--step-size"),
    fickle_teacher: ("--eval-eps", "--eval-step-size"),
}


@pytest.mark.parametrize(
    "script, flag", [(script, flag) for script in FLAGS for flag in FLAGS[script]]
)
def test_radii_and_steps_of_training_scripts_are_in_pixel_units(script, flag, refused):
    assert f"{flag}: expected a number in pixel units" in refused(script.parse_args, [flag, "2"])
    args = script.parse_args([flag, "2/255"])
    assert vars(args)[flag[2:].replace("-", "_")] == 2 / 255


def test_an_attack_that_is_named_twice_is_refused_before_the_training(refused):
    argv = ["--eval-attack", "clean", "pgd2", "pgd2"]
    line = refused(tf.parse_args, argv)
    assert line.startswith("--eval-attack: ") and line.endswith("each once; got 'pgd2' twice")


def test_a_row_of_the_summary_is_the_evaluation_of_its_net(files, tmp_path, capsys):
    data = common.load_data("data.npz", test_subset=30)
    nets = {}
    for role, file in (("teacher", "net0.pt"), ("student", "net1.pt")):
        nets[role] = f"a {role}", common.load_model(files / file, data)
    settings = {"eps": 0.02, "restarts": 2, "seed": 3}
    rows = ev.summary_rows(nets, data, tmp_path, ["clean", "pgd2"], **settings)
    assert [(row["net"], row["model"]) for row in rows] == [
        ("teacher", "a teacher"),
        ("student", "a student"),
    ]
    for row, (_, net) in zip(rows, nets.values()):
        expected = ev.evaluate(net, data.x_test, data.y_test, ["clean", "pgd2"], **settings)
        assert {key: row[key] for key in expected} == expected
        conditional = expected["pgd2_acc"] / expected["clean_acc"] if expected["clean_acc"] else 0
        assert row["pgd2_conditional_acc"] == pytest.approx(conditional)
        kept = {*expected, "pgd2_conditional_acc", "net", "model", "epochs", "seconds", "file"}
        assert set(row) == kept and (tmp_path / row["file"]).samefile(net.meta["file"])
    assert "evaluating a student on 30 test images" in capsys.readouterr().out
    # conditional accuracies are for programs, as the role and the file are
    table = common.summary_table(rows)
    assert "pgd2_acc" in table and "a student" in table
    assert not any(word in table for word in ("conditional", "net1.pt", "file"))
    assert "conditional" not in common.summary_table(common.mean_and_std([rows, rows]))


def test_a_training_script_prints_the_warnings_of_the_evaluation(tmp_path, capsys):
    data = common.load_data("data.npz", test_subset=20)
    net = common.build_model("mlp-16", size=8)
    net.layers[5].weight.data.zero_()  # the same logits for every image: no gradient
    ev.summary_rows({"student": ("flat", net)}, data, tmp_path, ["pgd2"])
    assert "warning: flat: zero gradient at " in capsys.readouterr().out
