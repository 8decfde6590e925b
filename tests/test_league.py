"""The league: its rules by hand, the cost of a step counted, its page made of what there is."""

import functools
import importlib
import json
import shlex

import numpy as np
import pytest
import torch.nn as nn

import common
import eval_robustness
import robust_kd
from benchmark import claim_list, claims, league

TINY = (
    "--data shapes --model mlp-8 --train-subset 60 --test-subset 20 --val-size 20 --epochs 2 "
    "--batch-size 20 --steps 1"
)
TAUGHT = "--teacher-epochs 1 --teacher-batch-size 20"


def run_with(clean, robust, **more):
    student = {"clean_acc": clean, "apgd_acc": robust, "pgd20_acc": robust} | more
    return {"nets": {"student": student}, "minutes": 2.0}


def results_of(**arms):
    """{arm: its runs} of {arm: [(clean, robust), ...]} for the seeds from the first on."""
    results = {arm: {} for arm in claim_list.ARMS}
    for arm, numbers in arms.items():
        for seed, (clean, robust) in enumerate(numbers, claim_list.FIRST_SEED):
            results[arm.replace("_", "-")][seed] = run_with(clean, robust)
    return results


# ------------------------------------------------------------------------------------------------
# Rules


def test_two_methods_differ_by_an_interval_without_0_and_half_a_point():
    def verdict(*differences):
        return league.verdict(claims.effect_of(differences))

    assert verdict(0.02, 0.021, 0.022) == 1 and verdict(-0.02, -0.021, -0.022) == -1
    assert verdict(0.001, 0.0011, 0.0012) == 0  # surely above 0, and too small to count
    assert verdict(-0.02, 0.02, 0.06) == 0
    assert league.verdict(None) == 0


def test_differences_are_paired_by_the_seeds_that_both_have():
    results = results_of(at=[(0.4, 0.1), (0.5, 0.2), (0.9, 0.9)], mart=[(0.3, 0.12), (0.4, 0.24)])
    effect = league.difference(results, "mart", "at", "robust_acc", "MLP")
    assert effect.differences == pytest.approx([0.02, 0.04])
    assert league.difference(results, "mart", "mart", "robust_acc", "MLP") is None
    assert league.difference(results, "trades", "at", "robust_acc", "MLP") is None
    one = results_of(at=[(0.4, 0.1)], mart=[(0.3, 0.12)])
    assert league.difference(one, "mart", "at", "robust_acc", "MLP") is None


def test_robust_is_what_both_attacks_leave_or_else_what_autoattack_leaves():
    results = results_of(at=[(0.4, 0.1), (0.5, 0.2)])
    results["at"][10]["nets"]["student"]["aa_acc"] = 0.09
    results["at"][11]["nets"]["student"] = {"clean_acc": 0.5, "aa_acc": 0.15}
    assert league.numbers(results, "at", "robust_acc", "MLP") == {10: 0.1, 11: 0.15}
    text = league.autoattack_text(results)
    assert "In 1 nets" in text and "broke 10 of the 1,000" in text


def test_the_frontier_are_those_that_no_other_beats_in_both():
    points = {"a": (0.4, 0.1), "b": (0.3, 0.2), "c": (0.29, 0.19), "d": (0.3, 0.15)}
    assert league.frontier(points) == ["a", "b", "d"]  # d is as accurate as b


def test_the_spreads_are_deviations_of_means_of_the_table():
    # two seeds, two methods, three teachers; mean over the seeds [[1, 2, 6], [3, 4, 8]]
    table = np.array([[[0, 1, 5], [2, 3, 7]], [[2, 3, 7], [4, 5, 9]]], float)
    teachers, methods = league.spreads(table)
    assert teachers == pytest.approx(np.std([2, 3, 7], ddof=1))
    assert methods == pytest.approx(np.std([3, 5], ddof=1))
    found = league.teacher_or_method(table, samples=50)
    assert found[:2] == (teachers, methods)
    # both seeds have the same differences, so that every sample has the same spreads
    assert found[2:] == pytest.approx([teachers - methods] * 2)
    assert "the teacher decides more" in league.teacher_sentence(
        np.repeat(table, 2, axis=2)[:, :, :5] / 100
    )


def test_only_seeds_that_all_cells_have_are_in_the_table_of_teachers():
    results = results_of(**{arm: [(0.4, 0.1)] * 3 for arm in claim_list.BY_TEACHER.values()})
    del results["igdm-wide"][11]
    assert league.teacher_table(results, "robust_acc").shape == (2, 5, 5)
    assert league.teacher_table(results_of(), "robust_acc").shape == (0, 5, 5)


def test_all_arms_are_commands_of_a_script_that_differ_in_method_and_teacher_alone():
    optimiser = ("model", "epochs", "batch_size", "lr", "steps", "step_size", "data", "val_size")
    for table, arms in league.arms_by_table().items():
        settings, teachers = set(), set()
        for arm in arms:
            script, *flags = shlex.split(claim_list.ARMS[arm])
            assert script == "robust_kd.py"
            args = robust_kd.parse_args(flags)
            settings.add(tuple(getattr(args, flag) for flag in optimiser))
            if robust_kd.needs_teacher(args):
                seeded = common.replace(args, seed=0)
                teacher = robust_kd.teacher_args(seeded, args.teacher_training[0])
                teachers.add(str(common.run_flags(teacher)))
        assert len(settings) == 1, table
        assert len(teachers) == (5 if table == "teachers" else 1), table


# ------------------------------------------------------------------------------------------------
# Cost


class Counted(nn.Module):
    """A net that counts its forward passes, and the backward passes from its logits."""

    def __init__(self):
        super().__init__()
        self.net, self.forwards, self.backwards = common.build_model("mlp-8"), 0, 0
        self.build_arguments = self.net.build_arguments

    def forward(self, x):
        logits = self.net(x)
        self.forwards += 1
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient):
        self.backwards += 1

    def __deepcopy__(self, memo):
        return Counted()  # the average: it has its own counts


@pytest.mark.parametrize("regime", league.LEAGUE)
@pytest.mark.parametrize("arm", claim_list.LEAGUE["MLP"])
def test_the_cost_of_a_step_is_what_a_step_runs(arm, regime, tmp_path, monkeypatch):
    arm = arm if regime == "MLP" else f"conv-{arm}"
    flags = shlex.split(claim_list.ARMS[arm])[1:]
    flags += ["--data", "shapes", "--train-subset", "8", "--val-size", "0", "--batch-size", "8"]
    args = robust_kd.parse_args([*flags, "--epochs", "1", "--schedule", "cosine"])
    args = common.replace(args, seed=0)
    data = common.load_data("shapes", train_subset=8)
    student, teacher = Counted(), Counted().eval().requires_grad_(False)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    monkeypatch.setattr(common, "load_model", lambda *_: student)
    monkeypatch.setattr(robust_kd, "keep_epoch", lambda *_: None)
    averages = []
    weight_average = robust_kd.weight_average

    def spied_average(model, decay):
        averages.append(weight_average(model, decay))
        return averages[-1]

    monkeypatch.setattr(robust_kd, "weight_average", spied_average)
    robust_kd.train(args, data, tmp_path, "student", teacher)
    steps = league.STEPS[regime]
    assert args.steps == steps
    forwards = student.forwards + teacher.forwards
    forwards += sum(average.module.forwards for average in averages)
    # the attack's backward passes end at the images, the student's others at the weights too
    to_weights = student.backwards - steps
    cost = forwards + steps + teacher.backwards + 2 * to_weights
    assert cost == league.passes(arm, steps)


# ------------------------------------------------------------------------------------------------
# From runs to the page


SMALL = {
    "at": f"robust_kd.py --loss at {TINY}",
    "akd+0.8": f"robust_kd.py --loss akd+ {TINY} {TAUGHT}",
    "mart": f"robust_kd.py --loss mart {TINY}",
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Three small arms in the place of the real ones, called in this process; -> the flags."""
    methods, teachers = ("akd+0.8", "mart"), ("early", "late")
    short = functools.partial(eval_robustness.Settings, steps=2, queries=4, targets=1)
    monkeypatch.setattr(eval_robustness, "Settings", short)
    changes = {
        "LEAGUE": {"MLP": ("at", "akd+0.8", "mart")},
        "LEAGUE_SEEDS": {"MLP": 2, "teachers": 2},
        "BY_TEACHER": {(arm, teacher): arm for arm in methods for teacher in teachers},
        "TAUGHT_BY": dict.fromkeys(methods),
        "TEACHERS": {"early": "", "late": ""},
        "TEACHER_NAMES": {"early": "stopped early", "late": "trained to the end"},
        "LATER": ("mart",),
        "NAMES": {name: league.NAMES[name] for name in ("at", "at@best", "akd+0.8", "mart")},
    }
    for name, value in changes.items():
        monkeypatch.setattr(league, name, value)
    monkeypatch.setattr(claims, "ARMS", SMALL)
    monkeypatch.setattr(claims, "CLAIMS", {})
    monkeypatch.setattr(claims, "LEAGUE_ARMS", set(SMALL))
    called = []

    def call(script, flags, log_file):
        called.append((script, flags))
        importlib.import_module(script.removesuffix(".py")).main(flags)

    monkeypatch.setattr(claims, "call", call)
    monkeypatch.setattr(claims, "AUTOATTACK_SEEDS", (11,))
    monkeypatch.setattr(claims, "AUTOATTACK_IMAGES", 20)
    flags = ["--workers", "1"]
    for name in ("runs", "results", "docs"):
        (tmp_path / name).mkdir()
        flags += [f"--{name}", str(tmp_path / name)]
    return flags, called


def test_the_league_runs_keeps_what_it_has_and_writes_its_page(small, tmp_path, capsys):
    flags, called = small
    later = tmp_path / "docs/robust_kd.md"
    later.write_text("A\n<!-- league: begin -->\n<!-- league: end -->\nB\n")
    league.main(["--list", *flags])
    assert "6" in capsys.readouterr().out
    league.main(["run", *flags])
    out = capsys.readouterr().out
    assert "6/6" in out and "apgd 0." in out and f"written: {tmp_path}/docs/LEAGUE.md" in out
    record = json.loads((tmp_path / "results/mart.json").read_text())
    assert sorted(record["runs"]) == ["10", "11"]
    short, whole = (record["runs"][seed]["nets"]["student"] for seed in ("10", "11"))
    assert "apgd_acc" in short and "aa_acc" not in short
    assert whole["aa_acc"] <= whole["apgd_acc"]
    page = (tmp_path / "docs/LEAGUE.md").read_text()
    assert "| MART |" in page and "**MART**" in page and "Not run yet" not in page
    assert "Teacher or method?" in page and "| AKD+ |" in page
    if importlib.util.find_spec("matplotlib"):
        for name in ("league.png", "league_teachers.png"):
            assert (tmp_path / "docs" / name).stat().st_size > 5000
    assert "nan" not in page
    assert "In the [league](LEAGUE.md)" in later.read_text()
    before = len(called)
    league.main(["run", *flags])
    assert len(called) == before


def test_the_page_in_docs_says_what_the_results_say(tmp_path):
    pytest.importorskip("matplotlib")
    docs = claims.ROOT / "docs"
    later = (docs / "robust_kd.md").read_text()
    (tmp_path / "robust_kd.md").write_text(later)
    league.main(["--page", "--docs", str(tmp_path)])
    page = (docs / "LEAGUE.md").read_text()
    assert (tmp_path / "LEAGUE.md").read_text() == page, "run benchmark/league.py --page"
    assert (tmp_path / "robust_kd.md").read_text() == later and "**AdaAD**" in later


def test_a_league_without_results_is_a_page_too(tmp_path):
    (tmp_path / "results").mkdir()
    league.main(["--page", "--docs", str(tmp_path), "--results", str(tmp_path / "results")])
    assert "Not run yet" in (tmp_path / "LEAGUE.md").read_text()


def test_no_action_is_refused(refused):
    assert "expected run, --list or --page" in refused(league.main, [])
