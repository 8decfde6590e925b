"""The fickle teacher's noise against its definitions; what all three noisy scripts share."""

import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import fickle_teacher as ft
import images
import messy_collab
import plumbing
import soft_randomization

TRIO = {"fickle_teacher": ft, "soft_randomization": soft_randomization}
TRIO["messy_collab"] = messy_collab
SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05"
)
SMALL += " --test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 2 --epochs 3"
SMALL += " --restarts 2 --eval-steps 2"


def run(script, runs, flags):
    """Run a script with the small flags; -> the folder of its (last) run."""
    TRIO[script].main([*SMALL.split(), *flags.split(), "--runs", str(runs)])
    torch.use_deterministic_algorithms(False)
    return max(runs.glob(f"{script}/*/"), key=lambda folder: (folder / "log.jsonl").stat().st_mtime)


def same_weights(a, b):
    a, b = (common.load(path)["weights"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# The loss ---------------------------------------------------------------------------------------


def softmax(row, tau=1.0):
    e = [math.exp(value / tau) for value in row]
    return [value / sum(e) for value in e]


@pytest.mark.parametrize("tau, alpha", [(4.0, 0.9), (1.0, 0.3)])
def test_hinton_loss_is_its_equation(tau, alpha):
    s, t, labels = torch.randn(5, 4) * 2, torch.randn(5, 4) * 3, torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for s_row, t_row, y in zip(s.tolist(), t.tolist(), labels.tolist()):
        q, p = softmax(t_row, tau), softmax(s_row, tau)
        kl = sum(a * math.log(a / b) for a, b in zip(q, p))
        total += -(1 - alpha) * math.log(softmax(s_row)[y]) + alpha * tau**2 * kl
    assert ft.hinton_loss(s, t, labels, alpha, tau).item() == pytest.approx(total / 5, rel=1e-5)


def test_hinton_loss_gives_the_teacher_no_gradient_and_alpha_zero_is_cross_entropy():
    s, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 3, 1, 1, 2])
    loss = ft.hinton_loss(s, t, labels, 0.9, 4.0)
    loss.backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    assert torch.equal(ft.hinton_loss(s, t, labels, 0.0, 4.0), F.cross_entropy(s, labels))
    assert ft.hinton_loss(s, s, labels, 1.0, 4.0).item() == pytest.approx(0, abs=1e-5)


# The teacher's noise ----------------------------------------------------------------------------


def test_signal_noise_has_the_moments_of_its_equation_logit_by_logit():
    z = torch.tensor([[-3.0, 0.0, 0.5, 8.0]])
    noisy = ft.signal_noise(z.expand(40_000, 4), 0.3)
    assert torch.allclose(noisy.mean(0), z[0], atol=0.05)
    assert torch.allclose(noisy.std(0), 0.3 * z[0].abs(), rtol=0.03)
    assert torch.corrcoef(noisy[:, [0, 2, 3]].T).triu(1).abs().max() < 0.03  # each by itself
    together = ft.signal_noise(z.expand(1000, 4), 0.3, "image")
    assert torch.allclose(together / together[:, 3:], z / 8.0) and together.std(0)[3] > 1
    assert torch.equal(ft.signal_noise(z, 0.0), z)


def walk(z, tau, which, threshold, gap, draws):
    """swap_logits for one row, pair after pair; draws: which pairs the coin swaps."""
    order = sorted(range(len(z)), key=lambda k: -z[k])
    probs = softmax(z, tau)
    values, classes = [z[k] for k in order], list(order)
    for i in range(1 if which == "top2" else len(z) - 1):
        p, q = probs[order[i]], probs[order[i + 1]]
        if (p - q) / (p if gap == "relative" else 1) < threshold and draws[i]:
            classes[i], classes[i + 1] = classes[i + 1], classes[i]
    return [value for _, value in sorted(zip(classes, values))]


@pytest.mark.parametrize("gap", ["relative", "absolute"])
@pytest.mark.parametrize("which", ["top2", "all"])
def test_swaps_are_those_of_a_walk_from_the_top(which, gap):
    z, threshold = torch.randn(200, 7) * 3, {"relative": 0.2, "absolute": 0.02}[gap]
    torch.manual_seed(5)
    draws = torch.rand(200, 6) < 0.5
    torch.manual_seed(5)
    swapped = ft.swap_logits(z, 4.0, which, 0.5, threshold, gap)
    expected = [walk(a, 4.0, which, threshold, gap, b) for a, b in zip(z.tolist(), draws.tolist())]
    assert torch.equal(swapped, torch.tensor(expected))
    assert torch.equal(swapped.sort(1).values, z.sort(1).values)  # the multiset of each row
    moved = (swapped != z).any(1)
    assert 10 < moved.sum() < 190  # and enough of both kinds


def test_swaps_happen_only_below_the_threshold_and_as_often_as_asked():
    z = torch.tensor([2.0, 1.9, -1.0, -5.0]).repeat(20_000, 1)  # relative gaps .02, .52, .63
    assert torch.equal(ft.swap_logits(z, 4.0, "all", 1.0, 0.0), z)
    assert torch.equal(ft.swap_logits(z, 4.0, "all", 0.0, 2.0), z)
    swapped = ft.swap_logits(z, 4.0, "all", 0.3, 0.1)
    assert torch.equal(swapped[:, 2:], z[:, 2:])
    share = (swapped[:, 0] != z[:, 0]).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20_000))
    carried = ft.swap_logits(z[:1], 4.0, "all", 1.0, 2.0)  # the first class falls to the end
    assert torch.equal(carried, torch.tensor([[-5.0, 2.0, 1.9, -1.0]]))
    assert torch.equal(
        ft.swap_logits(z[:1], 4.0, "top2", 1.0, 2.0)[0], z[0][torch.tensor([1, 0, 2, 3])]
    )


@pytest.mark.parametrize("mode", ["dropout", "train"])
def test_a_fickle_teacher_varies_by_dropout_and_keeps_its_running_statistics(mode):
    teacher, x = common.build_model("wrn-10-1", dropout=0.3).eval(), torch.rand(8, 3, 32, 32)
    calm = teacher(x)
    assert torch.equal(calm, teacher(x))
    statistics = {k: v.clone() for k, v in teacher.state_dict().items() if "running" in k}
    ft.make_fickle(teacher, mode)
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    drops = [m for m in teacher.modules() if isinstance(m, nn.Dropout)]
    assert all(m.training for m in drops) and len(drops) == 3
    assert all(m.training == (mode == "train") for m in norms) and norms
    with torch.no_grad():
        assert not torch.equal(teacher(x), teacher(x))
    for key, value in statistics.items():
        assert torch.equal(teacher.state_dict()[key], value), key


def test_the_student_of_a_fickle_teacher_has_no_dropout(tmp_path):
    folder = run("fickle_teacher", tmp_path, "--dropout 0.3")
    assert common.load(folder / "teacher.pt")["arch"]["dropout"] == 0.3
    assert common.load(folder / "student.pt")["arch"]["dropout"] == 0.0


@pytest.mark.parametrize(
    "flags, schedule",
    {
        "--method hinton": (200, [60, 120, 150]),
        "--method hinton --dropout 0.4": (200, [60, 120, 150]),
        "--dropout 0.1": (250, [75, 150, 200]),
        "--dropout 0.2": (250, [75, 150, 200]),
        "--dropout 0.3": (300, [90, 180, 240]),
        "--dropout 0.4": (350, [105, 210, 280]),
        "--dropout 0.5": (350, [105, 210, 280]),
        "": (350, [105, 210, 280]),
        "--dropout 0.3 --epochs 20": (20, [6, 12, 16]),
        "--dropout 0.3 --epochs 1": (1, [1, 1, 1]),
        "--dropout 0.3 --epochs 9 --milestones 5": (9, [5]),
    }.items(),
)
def test_the_schedule_follows_the_rate_of_dropout(flags, schedule):
    assert ft.student_schedule(ft.parse_args(flags.split())) == schedule


# What the three scripts share -------------------------------------------------------------------

METHODS = [(name, method) for name, script in TRIO.items() for method in script.METHODS]


@pytest.mark.parametrize("script, method", METHODS)
def test_every_method_runs_and_ends_in_finite_numbers(script, method, tmp_path):
    folder = run(script, tmp_path, f"--method {method} --model wrn-10-1 --epochs 1")
    summary, trained = rows(folder)[-1]["summary"], [r for r in rows(folder) if "stage" in r]
    assert trained and all(0 < row["loss"] < 1e3 for row in trained)
    names = {row["model"] for row in summary}
    assert ("teacher" in names) == (method not in ("student", "gaussian"))
    assert (f"student ({method})" in names) == (method != "teacher")
    for row in summary:
        found = {row[key] for key in ("clean_acc", "pgd2_acc", "pgd2_conditional_acc")}
        assert all(0 <= value <= 1 for value in found)
        assert row["pgd2_acc"] == pytest.approx(row["pgd2_conditional_acc"] * row["clean_acc"])


@pytest.mark.parametrize("script", TRIO)
def test_the_demo_shows_hinton_and_then_its_method(script, tmp_path, capsys):
    run(script, tmp_path, "--demo --epochs 1 --teacher-epochs 1")
    said, method = capsys.readouterr().out, TRIO[script].parse_args([]).method
    assert "--demo sets nothing" in said  # this test gives all of it
    assert said.index("\nstudent (hinton)") < said.index(f"\nstudent ({method})")
    assert {path.name[:6] for path in tmp_path.glob("*/*")} == {"demo-s"}


@pytest.mark.parametrize("method", ["teacher", "student", "hinton"])
def test_a_baseline_is_the_same_in_each_script_bit_for_bit(method, tmp_path):
    folders = [run(script, tmp_path, f"--method {method}") for script in TRIO]
    file = "teacher.pt" if method == "teacher" else "student.pt"
    assert all(same_weights(folders[0] / file, folder / file) for folder in folders[1:])
    summaries = [rows(folder)[-1]["summary"] for folder in folders]
    for summary in summaries:
        assert [row.pop("seconds") for row in summary]
    assert summaries[0] == summaries[1] == summaries[2]


LIMITS = [
    ("fickle_teacher", "--method fickle --dropout 0", "hinton"),
    ("fickle_teacher", "--method signal --sigma 0", "hinton"),
    ("fickle_teacher", "--method swap --swap-probability 0", "hinton"),
    ("fickle_teacher", "--method swap --swap all --swap-threshold 0", "hinton"),
    ("fickle_teacher", "--method hinton --alpha 0", "student"),
    ("soft_randomization", "--method soft-randomization --sigma 0", "hinton"),
    ("soft_randomization", "--method gaussian --sigma 0", "student"),
    ("soft_randomization", "--alpha 0 --sigma 0.1", "gaussian --sigma 0.1"),
    ("messy_collab", "--method mc-ts --noise-rate 0", "hinton"),
    ("messy_collab", "--method mc-s --noise-rate 0 --corruption-rate 0", "hinton"),
    ("messy_collab", "--method flc-ts --corruption-rate 0", "hinton"),
    ("messy_collab", "--method mc-s --alpha 0 --noise-rate 0", "student"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, other", LIMITS)
def test_at_its_limit_a_method_is_its_baseline_bit_for_bit(script, flags, other, tmp_path):
    a, b = (
        run(script, tmp_path / f, flags) for f, flags in (("a", flags), ("b", f"--method {other}"))
    )
    assert same_weights(a / "student.pt", b / "student.pt")


NOISY = [
    ("fickle_teacher", "--method fickle --dropout 0.3"),
    ("fickle_teacher", "--method hinton --dropout 0.3"),
    ("fickle_teacher", "--method signal --sigma 0.1"),
    ("fickle_teacher", "--method swap --swap all --swap-threshold 0.9"),
    ("soft_randomization", "--method soft-randomization --sigma 0.1"),
    ("soft_randomization", "--method soft-randomization --sigma 0.1 --clip"),
    ("messy_collab", "--method mc-t --noise-rate 0.2"),
    ("messy_collab", "--method mc-s --noise-rate 0.2"),
    ("messy_collab", "--method flc-t --corruption-rate 0.2"),
    ("messy_collab", "--method flc-s --corruption-rate 0.2"),
]


def test_away_from_its_limit_every_method_gives_another_student(tmp_path):
    flags = " --milestones 1"
    hinton = run("fickle_teacher", tmp_path / "h", "--method hinton" + flags) / "student.pt"
    found = [hinton]
    for i, (script, more) in enumerate(NOISY):
        found.append(run(script, tmp_path / str(i), more + flags) / "student.pt")
    same = [(a, b) for a in found for b in found if a < b and same_weights(a, b)]
    assert same == []


def test_seeds_share_the_teacher_and_draw_other_students(tmp_path):
    last = run("fickle_teacher", tmp_path, "--dropout 0.2 --seeds 3 5")
    (first,) = tmp_path.glob("fickle_teacher/*-s3")
    assert same_weights(first / "teacher.pt", last / "teacher.pt")
    assert (first / "teacher0.pt").exists() and not (last / "teacher0.pt").exists()
    assert not same_weights(first / "student.pt", last / "student.pt")
    alone = run("fickle_teacher", tmp_path / "alone", "--dropout 0.2 --seed 5")
    assert same_weights(alone / "teacher.pt", last / "teacher.pt")
    assert same_weights(alone / "student.pt", last / "student.pt")


@pytest.mark.parametrize("on", ["val", "test"])
def test_the_most_accurate_teacher_is_chosen(on, tmp_path):
    folder = run("messy_collab", tmp_path, f"--method hinton --teacher-seeds 3 --pick-teacher {on}")
    data = common.load_data("shapes", val_size=20, train_subset=48, test_subset=20)
    x, labels = (data.x_val, data.y_val) if on == "val" else (data.x_test, data.y_test)
    scores = []
    for seed in range(3):
        teacher, _ = common.load_model(folder / f"teacher{seed}.pt")
        scores.append(common.correct(teacher, x, labels).sum().item())
    assert len(set(scores)) > 1
    assert same_weights(folder / "teacher.pt", folder / f"teacher{scores.index(max(scores))}.pt")


# The table of the teacher's logits --------------------------------------------------------------


def table_of(data, teacher, want="yes", seeds=None, epochs=1):
    args = ft.parse_args(["--teacher-table", want, "--method", "hinton"])
    args.seeds = seeds
    return plumbing.teacher_table(
        teacher, data, plumbing.Run("x", args, torch.device("cpu")), epochs, {}
    )


def test_the_table_has_what_the_live_teacher_says_of_every_view_of_a_batch():
    data = common.load_data("shapes", train_subset=16, val_size=0)
    teacher = common.model_for(data, "wrn-10-1", 0, "teacher").eval()
    table = table_of(data, teacher)
    assert table.shape == (16 * 162, 10) and table.dtype == torch.float32
    seen = set()
    for epoch in range(5):
        for x, labels, view in common.batches(data, 16, 0, epoch, views=True):
            with torch.no_grad():
                live = teacher(x)
            assert torch.allclose(table[view], live, atol=1e-5, rtol=1e-5)
            student = torch.randn(len(x), 10)
            losses = [ft.hinton_loss(student, t, labels, 0.9, 4.0) for t in (table[view], live)]
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
            seen |= set(view.tolist())
    assert len(seen) > 60 and (table[:162].std(0) > 1e-3).all()  # views do differ


def test_the_table_is_made_when_it_pays_and_fits(monkeypatch):
    data = common.load_data("shapes", train_subset=10, val_size=0)
    teacher = common.model_for(data, "mlp-4", 0, "teacher").eval()
    assert table_of(data, teacher, "auto", None, 162) is None
    assert table_of(data, teacher, "auto", None, 163) is not None
    assert table_of(data, teacher, "auto", [0, 1, 2], 55) is not None
    assert table_of(data, teacher, "no", None, 500) is None
    data.pad, data.flip = 0, False  # as of digits: one view an image
    assert table_of(data, teacher, "auto", None, 2).shape == (10, 10)
    monkeypatch.setattr(os, "sysconf", lambda name: 39)  # 39^2 bytes; the table has 400
    assert table_of(data, teacher, "auto", None, 500) is None


@pytest.mark.parametrize("flags", ["--method hinton", "--method signal --sigma 0.2"])
def test_a_run_from_the_table_has_the_losses_of_a_run_with_the_live_teacher(
    flags, tmp_path, capsys
):
    losses = {}
    for want in ("yes", "no"):
        folder = run("fickle_teacher", tmp_path, f"{flags} --teacher-table {want} --name {want}")
        said = capsys.readouterr().out
        assert ("logits: from a table" in said) == (want == "yes")
        losses[want] = [row["loss"] for row in rows(folder) if row.get("stage") == "student"]
    assert losses["yes"] == pytest.approx(losses["no"], rel=1e-4) and len(losses["no"]) == 3


# Evaluation and refusals ------------------------------------------------------------------------


def test_the_full_evaluation_has_every_measure_of_the_paper(tmp_path):
    arrays = images.make_shapes(10, 20)
    np.savez(tmp_path / "other.npz", **arrays)
    flags = f"--method student --eval full --ood {tmp_path / 'other.npz'} --test-subset 10"
    folder = run("fickle_teacher", tmp_path, flags)
    row = rows(folder)[-1]["summary"][0]
    accuracies = {key for key in row if key.endswith("_acc")}
    assert {"clean_acc", "pgd10_acc", "pgd15_acc", "mca_acc", "mean19_acc", "ood_acc"} <= accuracies
    found = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    assert sum(found["calibration"]["clean"]["confidence"]) == pytest.approx(1)
    assert "gaussian_noise" in (folder / "evaluation.txt").read_text()


BAD = {
    "--dropout 1": "--dropout",
    "--dropout -0.1": "--dropout",
    "--method swap --swap-threshold -0.1": "--swap-threshold",
    "--method swap --swap-probability 1.1": "--swap-probability",
    "--teacher-model resnet18": "dropout goes with",
    "--method signal --sigma -1": "--sigma",
    "--method signal --dropout 0.2": "--dropout: --method signal has none",
    "--method hinton --sigma 0.2": "--sigma: --method hinton has none",
    "--teacher-table yes": "fickle",
    "--alpha 1.1": "--alpha",
    "--temperature 0": "--temperature",
    "--teacher-ckpt none.pt": "none.pt",
    "--cinic none": "--cinic",
    "--corruptions none": "--corruptions",
    "--teacher-seeds 2 --val-size 0": "--pick-teacher",
    "--milestones 0": "--milestones",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = ["--data", "shapes", *flags.split(), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert BAD[flags] in refused(ft.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, refused):
    common.save_model(tmp_path / "calm.pt", common.build_model("mlp-12"), {})
    common.save_model(tmp_path / "other.pt", common.build_model("mlp-12", 7, dropout=0.3), {})
    common.save_model(tmp_path / "good.pt", common.build_model("mlp-12", dropout=0.3), {})
    flags = [*SMALL.split(), "--runs", str(tmp_path / "runs"), "--dropout", "0.3", "--teacher-ckpt"]
    assert "dropout 0" in refused(ft.main, [*flags, str(tmp_path / "calm.pt")])
    assert "7 classes" in refused(ft.main, [*flags, str(tmp_path / "other.pt")])
    for name in ("soft_randomization", "messy_collab"):
        argv = [*SMALL.split(), "--runs", str(tmp_path / "runs"), "--teacher-ckpt"]
        assert "7 classes" in refused(TRIO[name].main, [*argv, str(tmp_path / "other.pt")])
    assert not (tmp_path / "runs").exists()
    ft.main([*flags, str(tmp_path / "good.pt")])
    (folder,) = tmp_path.glob("runs/fickle_teacher/*")
    assert same_weights(folder / "teacher.pt", tmp_path / "good.pt")
