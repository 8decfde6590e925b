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
from benchmark import claim_list, claims, league, plots

TINY = (
    "--data shapes --model mlp-8 --train-subset 60 --test-subset 20 --val-size 20 --epochs 2 "
    "--batch-size 20 --steps 1"
)
TAUGHT = "--teacher-epochs 1 --teacher-batch-size 20"


def run_with(clean, robust, **more):
    student = {"clean_acc": clean, "apgd_acc": robust, "pgd20_acc": robust} | more
    return {"nets": {"student": student}, "minutes": 2.0}


def results_of(arms, numbers):
    """{arm: its runs}: the same [(clean, robust), ...] for the seeds from the first on."""
    results = {arm: {} for arm in claim_list.ARMS}
    for arm in arms:
        for seed, (clean, robust) in enumerate(numbers, claim_list.FIRST_SEED):
            results[arm][seed] = run_with(clean, robust)
    return results


def whole_league():
    """The same numbers for all arms of all tables."""
    return results_of(ALL, [(0.4, 0.1)] * 10)


MLP, CELLS = (league.arms_by_table()[table] for table in ("MLP", "teachers"))
ALL = dict.fromkeys(arm for arms in league.arms_by_table().values() for arm in arms)


# ------------------------------------------------------------------------------------------------
# Rules


def test_two_methods_differ_by_half_a_point_and_a_test_that_holm_corrects():
    results = results_of(MLP, [(0.4, 0.1)] * 10)
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.01, 10)
    noise -= noise.mean()
    error = noise.std(ddof=1) / 10**0.5
    gains = {  # t of the differences to AKD+, with 9 degrees of freedom: 2.5 is p = 0.034
        "mart": 0.02 + noise / 100,
        "trades": -0.02 + noise / 100,
        "adr": 0.004 + noise / 100,  # surely above 0, and too small to count
        "at-awp": 2.5 * error + noise,  # p = 0.034 of one test, not of one among sixteen
    }
    for arm, values in gains.items():
        for seed, gain in enumerate(values, claim_list.FIRST_SEED):
            results[arm][seed]["nets"]["student"]["apgd_acc"] += gain
    called = league.verdicts(results, "MLP", "akd+0.8", "robust_acc")
    effect = league.difference(results, "at-awp", "akd+0.8", "robust_acc", "MLP")
    assert effect.p == pytest.approx(0.034, abs=1e-3) and effect.mean > 0.005
    assert {arm: called[arm] for arm in gains} == {"mart": 1, "trades": -1, "adr": 0, "at-awp": 0}
    assert "akd+0.8" not in called and not any(called[arm] for arm in called if arm not in gains)


def test_a_method_that_one_seed_has_put_on_the_frontier_leaves_it_without_that_seed():
    results = results_of(MLP, [(0.4, 0.1)] * 10)
    for run in results["at-awp"].values():
        run["nets"]["student"] |= {"apgd_acc": 0.2, "clean_acc": 0.5}
    results["mart"][13]["nets"]["student"]["clean_acc"] = 1.5  # in the mean 0.51
    assert league.frontier_counts(results, "MLP") == {"at-awp": 10, "mart": 9}
    without = league.points_of(results, "MLP", without=13)
    assert league.frontier(without) == ["at-awp"] and without["mart"] == (0.4, 0.1)


def test_a_method_that_is_on_the_frontier_without_a_seed_is_named_too():
    results = whole_league()
    for run in results["at-awp"].values():
        run["nets"]["student"] |= {"apgd_acc": 0.2, "clean_acc": 0.5}
    for seed, run in results["mart"].items():  # more robust but for one seed
        run["nets"]["student"]["apgd_acc"] = 0.0 if seed == 13 else 0.21
    assert league.frontier(league.points_of(results, "MLP")) == ["at-awp"]
    assert league.frontier_counts(results, "MLP") == {"at-awp": 10, "mart": 1}
    found = "\n".join(league.findings(results))
    assert "AT with AWP (10)." in found and "Only then among them: MART (1)." in found
    assert "(if one seed is left out, perhaps MART too)" in league.readme_text(results)


def test_nets_that_have_learned_nothing_are_counted():
    results = whole_league()
    assert "learned next to" not in "\n".join(league.findings(results))
    results["at-awp"][12]["nets"]["student"]["clean_acc"] = 0.101
    assert "AT with AWP: 1 of 10 nets learned next to nothing" in "\n".join(
        league.findings(results)
    )


def test_a_net_of_a_run_that_was_not_attacked_yet_is_missing():
    results = results_of(MLP, [(0.4, 0.1)] * 10)
    assert not [job for job in league.missing_runs(results) if job[0] in MLP]
    results["at-ema-0.98"][12]["nets"]["best"] = {"clean_acc": 0.5, "pgd20_acc": 0.2}
    assert [job for job in league.missing_runs(results) if job[0] in MLP] == [("at-ema-0.98", 12)]


def test_differences_are_paired_by_seed(monkeypatch):
    monkeypatch.setattr(league, "LEAGUE_SEEDS", {"MLP": 2})
    results = results_of(MLP, [(0.4, 0.1), (0.5, 0.2)])
    results["mart"] = {10: run_with(0.3, 0.12), 11: run_with(0.4, 0.24)}
    effect = league.difference(results, "mart", "at", "robust_acc", "MLP")
    assert effect.differences == pytest.approx([0.02, 0.04])


def test_images_that_the_rest_of_autoattack_broke_are_counted_once_for_each_net():
    results = results_of(["at", "akd+0.8"], [(0.4, 0.1), (0.5, 0.2)])  # akd+0.8 is in two tables
    results["at"][10]["nets"]["student"]["aa_acc"] = 0.09
    results["akd+0.8"][11]["nets"]["student"]["aa_acc"] = 0.198
    text = league.autoattack_text(results)
    assert text.startswith("2 nets") and "broke 12 of the 300 images" in text


def test_a_method_is_called_more_robust_everywhere_on_the_page():
    results = whole_league()
    for seed, run in results["mart"].items():
        run["nets"]["student"]["apgd_acc"] += 0.05 + 0.001 * (seed % 2)
    for seed, run in results["adr"].items():  # surely above, and too small to count
        run["nets"]["student"]["apgd_acc"] += 0.002 + 0.0001 * (seed % 2)
    rows = {row["method"]: row for row in league.difference_rows(results, "MLP")}
    assert rows["MART"]["robust, against AKD+"].startswith("**+5.")
    assert rows["ADR"]["robust, against AKD+"].startswith("+0.2")
    assert rows["AKD+"]["robust, against AKD+"] == "-"
    assert "More robust than AKD+: MART;" in "\n".join(league.findings(results))
    assert "points more robust" in league.sentence(results, "mart")
    assert "less than half a point of robustness apart" in league.sentence(results, "adr")


def test_there_is_no_page_before_all_seeds_have_run(tmp_path, refused):
    results = whole_league()
    del results["trades"][19]
    (tmp_path / "results").mkdir()
    for arm, runs in results.items():
        for seed, run in runs.items():
            claims.keep(tmp_path / "results", arm, seed, run)
    flags = ["--page", "--docs", str(tmp_path), "--results", str(tmp_path / "results")]
    assert "1 runs are missing" in refused(league.main, flags)
    assert not (tmp_path / "LEAGUE.md").exists()


def test_the_frontier_are_those_that_no_other_beats_in_both():
    points = {"a": (0.4, 0.1), "b": (0.3, 0.2), "c": (0.29, 0.19), "d": (0.3, 0.15)}
    assert league.frontier(points) == ["a", "b", "d"]  # d is as accurate as b


def test_the_spreads_are_deviations_of_means_of_the_table():
    # two seeds, two methods, three teachers; mean over the seeds [[1, 2, 6], [3, 4, 8]]
    table = np.array([[[0, 1, 5], [2, 3, 7]], [[2, 3, 7], [4, 5, 9]]], float)
    teachers, methods = league.spreads(table)
    assert teachers == pytest.approx(np.std([2, 3, 7], ddof=1))
    assert methods == pytest.approx(np.std([3, 5], ddof=1))
    over_teachers, over_methods, effect = league.teacher_or_method(table)
    assert (over_teachers, over_methods) == (teachers, methods)
    assert effect.mean == pytest.approx(teachers - methods)  # both seeds have the same spreads


def test_the_jackknife_is_right_nineteen_times_in_twenty():
    """Tables with equal true spreads, whose students of one teacher share noise."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        effects = generator.normal(size=5)
        table = np.add.outer(effects, generator.permutation(effects))
        shared = 0.5 * generator.normal(size=(5, 1, 5))
        table = table + shared + 0.6 * generator.normal(size=(5, 5, 5))
        effect = league.teacher_or_method(table)[2]
        wrong += not effect.low <= 0 <= effect.high
    assert 4 <= wrong <= 40  # 20 are expected


@pytest.mark.parametrize(
    "teachers, methods, answer",
    [
        ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0], "the teacher"),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4], "the method"),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], "not shown"),
    ],
)
def test_teacher_or_method_is_answered_by_the_interval(teachers, methods, answer):
    results = whole_league()
    generator = np.random.default_rng(0)
    for (arm, teacher), cell in claim_list.BY_TEACHER.items():
        effect = methods[list(claim_list.LOSS_OF).index(arm)]
        effect += teachers[list(claim_list.TEACHERS).index(teacher)]
        for seed in league.seeds("teachers"):
            noise = 0.1 * generator.normal()
            results[cell][seed]["nets"]["student"]["apgd_acc"] += 0.01 * (effect + noise)
    of_all, _, of_two = league.decision_rows(results)
    assert of_all["more"] == answer and of_two["more"] == "too few for an answer"
    assert f"all five teachers: {answer};" in "\n".join(league.findings(results))
    shapes = [cells.shape for cells in league.teacher_parts(results).values()]
    assert shapes == [(5, 5, 5), (5, 5, 4), (5, 5, 2)]
    two = list(league.teacher_parts(results).values())[2].mean((0, 1))  # the first, the last one
    assert two[1] - two[0] == pytest.approx(0.01 * (teachers[4] - teachers[0]), abs=0.002)


def test_all_arms_are_commands_of_a_script_that_differ_in_method_and_teacher_alone():
    free = {"loss", "alpha", "attack_loss", "label_smoothing", "ema", "awp", "teacher_es"}
    free |= {"teacher_training", "teacher_eps", "teacher_model", "teacher_epochs", "save_every"}
    free |= {"teacher_lr", "teacher_gamma", "teacher_batch_size"}
    for table, arms in league.arms_by_table().items():
        settings, teachers = set(), set()
        for arm in arms:
            script, *flags = shlex.split(claim_list.ARMS[arm])
            assert script == "robust_kd.py"
            args = robust_kd.parse_args(flags)
            shared = {k: v for k, v in common.run_flags(args).items() if k not in free}
            settings.add(str(shared))
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
@pytest.mark.parametrize("arm", MLP)
def test_the_cost_of_a_step_is_what_a_step_runs(arm, regime, tmp_path, monkeypatch):
    arm = arm if regime == "MLP" else f"conv-{arm}"
    flags = shlex.split(claim_list.ARMS[arm])[1:]
    flags += ["--data", "shapes", "--train-subset", "8", "--val-size", "0", "--batch-size", "8"]
    args = robust_kd.parse_args([*flags, "--epochs", "1"])
    args = common.replace(args, seed=0, schedule="cosine")  # OneCycle needs more than one step
    data = common.load_data("shapes", train_subset=8)
    student, teacher = Counted(), Counted().eval().requires_grad_(False)
    monkeypatch.setattr(common, "new_model", lambda *_: student)
    monkeypatch.setattr(common, "load_model", lambda *_: student)
    monkeypatch.setattr(robust_kd, "keep_epoch", lambda *_: None)
    averages = []
    weight_average = robust_kd.weight_average

    def spied_average(model):
        averages.append(weight_average(model))
        return averages[-1]

    monkeypatch.setattr(robust_kd, "weight_average", spied_average)
    robust_kd.train(args, data, tmp_path, "student", teacher)
    steps = league.STEPS[regime]
    assert args.steps == steps
    forwards = student.forwards + teacher.forwards
    forwards += sum(average.forwards for average in averages)
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
    methods, teachers = ("akd+0.8", "mart"), ("early", "wide")
    short = functools.partial(eval_robustness.Settings, steps=2, queries=4, targets=1)
    monkeypatch.setattr(eval_robustness, "Settings", short)
    changes = {
        "LEAGUE": {"MLP": ("at", "at@best", "akd+0.8", "mart")},
        "LEAGUE_SEEDS": {"MLP": 2, "teachers": 2},
        "BY_TEACHER": {(arm, teacher): arm for arm in methods for teacher in teachers},
        "LOSS_OF": dict.fromkeys(methods),
        "TEACHERS": {"early": "", "wide": ""},
        "TEACHER_NAMES": {"early": "stopped early", "wide": "twice as wide"},
        "METHODS": {arm: league.METHODS[arm] for arm in ("at", "at@best", "akd+0.8", "mart")},
    }
    for name, value in changes.items():
        monkeypatch.setattr(league, name, value)
    monkeypatch.setattr(claims, "ARMS", SMALL)
    for name in ("CLAIMS", "REGIMES"):
        monkeypatch.setattr(claims, name, {})
    monkeypatch.setattr(claims, "LEAGUE_NAMES", {*SMALL, "at@best"})
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
    assert "| MART |" in page and "**MART**" in page and "| AKD+ |" in page
    if importlib.util.find_spec("matplotlib"):
        for name in ("league.png", "league_teachers.png"):
            assert (tmp_path / "docs" / name).stat().st_size > 5000
    assert "nan" not in page
    assert "Verdicts on 0 claims" in (tmp_path / "docs/CLAIMS.md").read_text()
    before = len(called)
    league.main(["run", *flags])
    assert len(called) == before


def test_a_run_that_fails_is_named(small, tmp_path, monkeypatch, refused):
    flags, _ = small
    run_arm = claims.run_arm

    def failing(arm, seed, args):
        if (arm, seed) == ("mart", 11):
            raise common.UserError("robust_kd.py: no disk")
        return run_arm(arm, seed, args)

    monkeypatch.setattr(claims, "run_arm", failing)
    assert "1 runs failed, the first: mart, seed 11" in refused(league.main, ["run", *flags])
    assert not (tmp_path / "docs/LEAGUE.md").exists()


def test_without_matplotlib_the_figures_of_before_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "new_figure", lambda *_, **__: None)
    (tmp_path / "league.png").write_bytes(b"of before")
    league.main(["--page", "--docs", str(tmp_path)])
    assert "(league.png)" in (tmp_path / "LEAGUE.md").read_text()
    assert "(league_teachers.png)" not in (tmp_path / "LEAGUE.md").read_text()
    out = capsys.readouterr().out
    assert f"{tmp_path}/league.png: no figure: matplotlib is not installed" in out


def test_the_page_in_docs_says_what_the_results_say(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/robust_kd.md"):
        (tmp_path / name).write_text((claims.ROOT / name).read_text())
    league.main(["--page", "--docs", str(tmp_path / "docs")])
    for name in ("README.md", "docs/robust_kd.md", "docs/LEAGUE.md"):
        text = (claims.ROOT / name).read_text()
        assert (tmp_path / name).read_text() == text, "run benchmark/league.py --page"
        assert "AT with AWP" in text


def test_the_figures_have_the_numbers_that_they_are_given(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: drawn.append(figure))
    effects = [claims.Effect([], 0.4, 0.38, 0.42, 0), claims.Effect([], 0.1, 0.07, 0.13, 0)]
    lines = [("a", (0.4, 0.1), effects, False)]
    plots.draw_frontiers(tmp_path / "l.png", {"MLP": (lines, [(0.4, 0.1)])})
    bound = claims.Effect([], 0.02, 0.01, 0.03, 0)
    plots.draw_forest(tmp_path / "f.png", {"t": {"c": ("holds", True, [("x", bound, 0.005)])}})
    league_axis, forest = (figure.axes[0] for figure in drawn)

    def has(axis, xs, ys):
        return any(
            np.allclose(line.get_xdata(), xs) and np.allclose(line.get_ydata(), ys)
            for line in axis.lines
            if len(line.get_xdata()) == len(xs)
        )

    assert has(league_axis, [40], [10]) and league_axis.get_xlabel() == "clean accuracy, %"
    assert has(league_axis, [38, 42], [10, 10]) and has(league_axis, [40, 40], [7, 13])
    assert has(forest, [1, 3], [0, 0]) and has(forest, [2], [0]) and has(forest, [0.5], [0])


def test_no_action_is_refused(refused):
    assert "expected run, --list or --page" in refused(league.main, [])
