"""The evaluation around the attacks: its state on the disk, warnings, models, the command."""

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
from conftest import ROOT, Made, linear_problem

import common
import eval_robustness as ev

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
    calls, saved = [0], common.save_next

    def dying(*given):
        saved(*given)
        calls[0] += 1
        if calls[0] % 7 == 0:  # after a few chunks, wherever that is
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_next", dying)
    while True:
        try:
            found = run(store := ev.open_store(path, {}))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2 and found == expected
    entry = store.record["entries"]["m aa"]
    index = (entry["broken"] > 0).nonzero()[:, 0]
    x_adv = ev.read_examples(store, entry, index, common.to_float(x[index]))
    assert ev.misclassified(model(x_adv), labels[index]).all() and len(index) > 5
    assert path.stat().st_size < 20_000


def test_a_state_of_other_flags_or_a_damaged_one_is_refused(tmp_path, refused):
    path = tmp_path / "out.json.state"
    store = ev.open_store(path, {"--eps": 0.1})
    for _ in range(2):
        entry, ones = {"place": 0, "sums": {}}, torch.ones(1, 3, 4, 4)
        ev.write_examples(store, entry, torch.tensor([2]), ones)
    for flags, message in (({"--eps": 0.2}, "--eps: "), ({"--eps": 0.1}, None)):
        if message:
            assert message in refused(ev.open_store, path, flags)
        else:
            assert ev.open_store(path, flags).record["bytes"] == 3 * 48 * 4
    assert ev.read_examples(store, entry, torch.tensor([2]), ones).equal(ones)
    examples = path.with_suffix(".examples")
    examples.write_bytes(examples.read_bytes()[:-1] + b"!")
    store = ev.open_store(path, {"--eps": 0.1})
    assert "were changed" in refused(ev.read_examples, store, entry, torch.tensor([2]), ones)
    examples.write_bytes(b"short")
    assert "truncated" in refused(ev.open_store, path, {"--eps": 0.1})
    for file in (path, common.previous(path)):
        file.write_bytes(path.read_bytes()[:200])
    assert "truncated" in refused(ev.open_store, path, {"--eps": 0.1})


def test_an_example_that_fails_the_last_check_counts_as_robust(small):
    model, x, labels = small
    points = x, labels, model(common.to_float(x))
    s, store = ev.Settings(steps=5), ev.open_store()
    entry = ev.run_attack(model, points, "apgd-ce", s, store, "")  # no name: no lines
    before = ev.verdict(model, points, entry, "apgd-ce", s, store)
    first = (entry["broken"] > 0).nonzero()[:1, 0]
    ev.write_examples(
        store, entry, first, common.to_float(x[first])
    )  # the clean image: it is right
    after = ev.verdict(model, points, entry, "apgd-ce", s, store)
    assert (before["unverified"], after["unverified"]) == (0, 1)
    gained = after["stages"][-1]["robust_acc"] - before["stages"][-1]["robust_acc"]
    assert gained == pytest.approx(1 / len(x))
    ev.write_examples(store, entry, first, common.to_float(x[first]) + 0.1)  # outside of the ball
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
    monkeypatch.setattr(common, "Folded", lambda model: model)  # a copy would count elsewhere
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
    edge = common.to_float(x).amax() + 0.1
    row = ev.evaluate_all(Hole(model, None), x, labels, ["clean", "apgd-ce"], eps=0.9, steps=3)
    assert "not finite" in " ".join(row["warnings"])
    assert row["apgd_ce_acc"] == row["clean_acc"]


# --- models


def test_the_ensemble_returns_the_logarithm_of_the_averaged_probabilities(small):
    model, x, _ = small
    other = Made(model, lambda z: -0.5 * z)
    x = common.to_float(x)
    expected = (model(x).softmax(1) + other(x).softmax(1)) / 2
    np.testing.assert_allclose(common.Ensemble([model, other])(x).exp(), expected, atol=1e-6)


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
        "def coarse():\n"
        "    import torch\n"
        "    torch.backends.fp32_precision = 'tf32'\n"
        "    return net()\n"
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


def test_every_checkpoint_gets_a_row_and_the_json_holds_all(tmp_path, capsys, refused):
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
    assert out.name in refused(
        main, "net0.pt", "--attack", "clean", "--eps", "4/255", "--json", out
    )
    again = "net0.pt", "net1.pt", "--attack", "clean", "pgd2", "aa", "calibration", "--json", out
    assert "--plot: " in refused(main, *again, "--plot", tmp_path / "p.png")  # not left out


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


def test_a_foreign_model_that_asks_for_tf32_is_judged_without(small, monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")  # put back afterwards
    logits, found = ev.clean_logits, []

    def watched(*args):
        found.append(torch.backends.cudnn.conv.fp32_precision)
        return logits(*args)

    monkeypatch.setattr(ev, "clean_logits", watched)
    main("--model", "foreign:coarse", "--weights", "w", "--attack", "clean", "pgd1")
    assert set(found) == {"ieee"}


def test_saved_examples_are_those_that_broke_the_images(small, tmp_path):
    model, x, labels = small
    out = tmp_path / "x.npz"
    attack = "apgd-ce", "calibration"  # the second perturbs nothing that is kept
    main("--model", "foreign:net", "--weights", "w", "--attack", *attack, "--save-examples", out)
    with np.load(out) as file:
        x_adv, broken = torch.from_numpy(file["x_adv"]), torch.from_numpy(file["broken"])
    x_adv, clean = x_adv.permute(0, 3, 1, 2), common.to_float(x)
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


def test_a_plot_without_matplotlib_names_the_package(monkeypatch, tmp_path, refused):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(main, "net0.pt", "--plot", tmp_path / "p.png")


def test_float_images_outside_of_the_box_are_refused(small, refused):
    model, x, labels = small
    assert "[0, 1]" in refused(ev.evaluate, model, 2 * common.to_float(x), labels, [])
    inside = ev.evaluate(model, common.to_float(x), labels, ["clean", "apgd-ce"], steps=3)
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
    "too many images": (["net0.pt", "--n", "81"], "--n: more than there are; data.npz has 80 "),
    "unknown attack": (["net0.pt", "--attack", "aa-fast"], "'aa-fast'"),
    "pgd in L2": (["net0.pt", "--norm", "l2"], "--norm l2"),
    "eps above 1": (["net0.pt", "--eps", "8"], "--eps"),
    "examples of two": (["net0.pt", "--attack", "aa", "pgd2", "--save-examples", "e"], "--save-"),
    "no folder": (["net0.pt", "--json", "nowhere/out.json"], "expected a file, in a folder"),
    "a folder": (["net0.pt", "--json", "."], ".: expected a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(case, files, refused):
    (files / "short").write_bytes((files / "net0.pt").read_bytes()[:500])
    before = sorted(files.iterdir())
    argv, message = BAD[case]
    assert message in refused(main, *argv)
    assert [p for p in sorted(files.iterdir()) if p.name != "__pycache__"] == [
        p for p in before if p.name != "__pycache__"
    ]
