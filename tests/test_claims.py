"""Claims: the statistics against tables and by hand, the runs, the verdicts, the page."""

import argparse
import functools
import importlib
import json
import re
import threading
import time

import numpy as np
import pytest
import torch

import common
import eval_robustness
from benchmark import claim_list, claims
from benchmark.claim_list import Claim, Rule

TINY = (
    "--data shapes --model mlp-8 --train-subset 60 --test-subset 20 --val-size 20 --epochs 2 "
    "--batch-size 20 --steps 1"
)
SMALL_ARMS = {
    "at": f"robust_kd.py --loss at {TINY}",
    "akd": f"robust_kd.py --loss akd {TINY} --teacher-epochs 1 --teacher-batch-size 20",
}


def make_claim(*rules, **fields):
    texts = {key: key for key in ("title", "quote", "source", "printed", "mechanism")}
    return Claim(**texts, paper=2, rules=rules, **fields)


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """looks(n): claims are looked at after every n seeds, and have at most n; else after each."""
    monkeypatch.setattr(claims, "SEEDS_PER_LOOK", 1)

    def replace(seeds):
        monkeypatch.setattr(claims, "SEEDS_PER_LOOK", seeds)
        monkeypatch.setattr(claims, "MAX_SEEDS", seeds)

    return replace


@pytest.fixture
def only(monkeypatch):
    """A function that puts other claims, and the small arms, in the place of the real ones."""

    def replace(found, arms=SMALL_ARMS):
        for module in (claims, claim_list):
            monkeypatch.setattr(module, "CLAIMS", found)
            monkeypatch.setattr(module, "ARMS", arms)
            monkeypatch.setattr(module, "REGIMES", {"small": ("val_pgd7_acc", tuple(arms))})
        return found

    return replace


def results_of(**accuracies):
    """Results as if the arms had these clean accuracies for the seeds from the first one on."""
    results = {}
    for arm, numbers in accuracies.items():
        runs = {}
        for seed, number in enumerate(numbers, claim_list.FIRST_SEED):
            runs[seed] = {"nets": {"student": {"clean_acc": number}}, "minutes": 2.0}
        results[arm] = runs
    return results


# ------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize(
    "freedom, quantile", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093)]
)
def test_the_t_distribution_has_the_quantiles_of_the_tables(freedom, quantile):
    effect = claims.effect_of([0.0, 2.0] if freedom == 1 else [*range(freedom + 1)])
    half_width = effect.high - effect.mean
    n = freedom + 1
    squares = sum((x - effect.mean) ** 2 for x in effect.differences)
    assert half_width == pytest.approx(quantile * (squares / freedom / n) ** 0.5, rel=1e-3)


def test_an_interval_and_a_p_value_agree():
    effect = claims.effect_of([0.01, 0.02, 0.03])  # mean 0.02, error 0.00577, t 3.464
    assert (effect.mean, effect.low) == pytest.approx((0.02, 0.02 - 4.303 * 0.0057735), abs=1e-5)
    assert effect.p == pytest.approx(0.0742, abs=1e-3)
    assert claims.effect_of([0.01, 0.02, 0.03], above=effect.low).p == pytest.approx(0.05, abs=1e-4)
    assert claims.effect_of([0.01, 0.01]).p == 0.0
    assert claims.effect_of([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("deviation", [0.005, 0.010, 0.015])
def test_looks_make_an_effect_where_there_is_none_as_often_as_the_page_says(deviation, monkeypatch):
    """5 to 7 of 100 finished claims, up to 14 at some look."""
    generator = np.random.default_rng(0)
    quantiles = {5: 2.776, 10: 2.262, 15: 2.145, 20: 2.093}
    differences = generator.normal(0, deviation, (20_000, 20))
    finished, at_the_end, at_some_look = (np.zeros(20_000, bool) for _ in range(3))
    for seeds, t in quantiles.items():
        so_far = differences[:, :seeds]
        half_width = t * so_far.std(1, ddof=1) / seeds**0.5
        without_0 = ~finished & (abs(so_far.mean(1)) > half_width)
        ends = ~finished & ((2 * half_width <= 0.01) | (seeds == claims.MAX_SEEDS))
        at_some_look |= without_0
        at_the_end |= without_0 & ends
        finished |= ends
    assert 0.045 < at_the_end.mean() < 0.075 and at_some_look.mean() < 0.145
    assert "5 to 7 of 100 finished claims" in claims.PAGE
    # the same by the code that makes the page
    monkeypatch.setattr(claims, "SEEDS_PER_LOOK", 5)
    claim, ours = make_claim(Rule("clean_acc", "a", "b")), []
    for numbers in differences[:300]:
        results = results_of(a=list(numbers), b=[0.0] * 20)
        effect = claims.measure(results, claim.rules[0], claim)
        ours.append(not effect.low <= 0 <= effect.high)
    assert ours == at_the_end[:300].tolist()


def test_holm_stops_at_the_first_that_is_not_significant():
    assert claims.holm({"a": 0.01, "b": 0.02, "c": 0.04}) == {"a", "b", "c"}
    assert claims.holm({"a": 0.01, "b": 0.03, "c": 0.04}) == {"a"}
    assert claims.holm({"a": 0.02, "b": 0.021, "c": 0.022}) == set()


def test_a_rule_needs_its_interval_and_the_smallest_effect():
    rule = Rule("clean_acc", "a", "b", smallest=0.01)
    verdicts = {
        (0.02, 0.021, 0.022): "holds",
        (0.001, 0.0011, 0.0012): "undecided",  # larger than 0, too small to count
        (-0.02, 0.02, 0.04): "undecided",
        (-0.02, -0.021, -0.022): "contradicted",
    }
    for differences, expected in verdicts.items():
        assert claims.rule_verdict(rule, claims.effect_of(differences)) == expected
    no_loss = Rule("clean_acc", "a", "b", above=-0.01, smallest=-0.01)
    assert claims.rule_verdict(no_loss, claims.effect_of([-0.001, 0.0, 0.001], -0.01)) == "holds"


# ------------------------------------------------------------------------------------------------
# Verdicts


def test_a_claim_holds_with_all_its_rules_and_is_contradicted_by_one():
    good, bad = Rule("clean_acc", "a", "b"), Rule("clean_acc", "c", "b")
    results = results_of(a=[0.5, 0.51, 0.52], b=[0.4, 0.41, 0.43], c=[0.3, 0.31, 0.32])
    assert claims.judge(results, make_claim(good))[0] == "holds"
    assert claims.judge(results, make_claim(good, bad))[0] == "contradicted"
    del results["b"][10]
    assert claims.judge(results, make_claim(good)) == ("not run", 1.0)
    results["b"][10] = {"nets": {"student": {"clean_acc": 0.4}}}
    level = Rule("clean_acc", "a", "a")
    assert claims.judge(results, make_claim(good, level))[0] == "undecided"


def test_a_claim_is_looked_at_every_five_seeds_until_its_interval_is_a_point_wide(monkeypatch):
    monkeypatch.setattr(claims, "SEEDS_PER_LOOK", 5)
    claim = make_claim(Rule("clean_acc", "a", "b"), rivals=(Rule("clean_acc", "a", "c"),))

    def results_after(seeds, deviation):
        noise = [deviation * (-1) ** seed for seed in range(seeds)]
        return results_of(a=[0.5 + d for d in noise], b=[0.4] * seeds, c=[])

    def state(seeds, deviation):
        results = results_after(seeds, deviation)
        left = {arm: [] for arm in "abc"}
        for arm, seed in claims.missing_runs(results, [claim]):
            left[arm].append(seed)
        looked_at = len(claims.seeds_of(results, claim))
        return looked_at, claims.is_finished(results, claim), left["a"], left["c"]

    assert state(0, 0.02) == (0, False, [*range(10, 15)], [*range(10, 15)])
    assert state(4, 0.02) == (0, False, [14], [*range(10, 15)])
    assert state(7, 0.02) == (5, False, [17, 18, 19], [*range(10, 20)])
    assert state(7, 0.002) == (5, True, [], [*range(10, 15)])  # the rival has not run yet
    assert state(20, 0.02) == (20, True, [], [*range(10, 20)])  # a rival: ten seeds
    # more seeds, of another claim with the same arms, do not change a claim that is finished
    assert state(20, 0.002)[:2] == (5, True)
    results = results_after(20, 0.002)
    for seed in range(15, 30):
        results["a"][seed]["nets"]["student"]["clean_acc"] = 0.1
    assert claims.judge(results, claim)[0] == "holds"
    wide = results_after(10, 0.02)
    assert claims.verdict_text(wide, claim, *("holds", True)) == "holds so far (Holm)"
    assert claims.verdict_text(results_after(20, 0.02), claim, "holds", False) == "holds"


def test_a_run_without_a_number_that_a_gate_compares_is_run_again():
    claim = make_claim(Rule("clean_acc", "a", "b"), gates=(Rule("train_acc", "a", "b", above=0.1),))
    results = results_of(a=[0.5, 0.51], b=[0.4, 0.4])
    results["a"][10]["nets"]["student"]["train_acc"] = 0.9
    results["b"][10]["nets"]["student"]["train_acc"] = 0.7
    assert [*claims.seeds_of(results, claim)] == [10]
    assert ("a", 11) in claims.missing_runs(results, [claim])
    assert not {("a", 10), ("b", 10)} & {*claims.missing_runs(results, [claim])}


def test_runs_side_by_side_have_different_seeds(monkeypatch):
    """Arms of one seed may share a teacher, which one run trains while the others wait."""
    monkeypatch.setattr(claims, "SEEDS_PER_LOOK", 5)
    claim = make_claim(Rule("clean_acc", "a", "b"))
    seeds = [seed for _, seed in claims.missing_runs(results_of(a=[], b=[]), [claim])]
    assert seeds == [*range(10, 15), *range(10, 15)]


def test_a_rival_is_compared_on_the_seeds_that_it_has():
    rival = Rule("clean_acc", "a", "c")
    claim = make_claim(Rule("clean_acc", "a", "b"), rivals=(rival,))
    results = results_of(a=[0.5, 0.52, 0.54], b=[0.4, 0.41, 0.43], c=[0.45, 0.45])
    assert len(claims.measure(results, claim.rules[0], claim).differences) == 3
    assert claims.measure(results, rival, claim).differences == pytest.approx([0.05, 0.07])
    del results["c"][11]
    assert claims.measure(results, rival, claim) is None
    rows = {row["role"]: row["seeds"] for row in claims.rule_rows(results, claim)}
    assert rows == {"decides": 3, "beside": 0}


def test_what_twenty_seeds_cannot_tell_is_too_small_where_the_paper_prints_little():
    level = [(-1) ** seed * 0.02 for seed in range(20)]
    rule = Rule("clean_acc", "a", "b")
    results = results_of(a=[0.4 + d for d in level], b=[0.4] * 20)
    assert claims.judge(results, make_claim(rule))[0] == "undecided"
    assert claims.judge(results, make_claim(rule, paper_effect=0.004))[0] == (
        "too small to tell here"
    )
    exact = results_of(a=[0.402, 0.4021, 0.4019], b=[0.4] * 3)  # finished: 0.2 points, surely
    assert claims.judge(exact, make_claim(rule, paper_effect=0.004))[0] == "undecided"
    assert claims.judge(exact, make_claim(rule, paper_effect=0.0021))[0] == (
        "too small to tell here"
    )
    fewer = results_of(a=[0.4 + d for d in level[:19]], b=[0.4] * 19)
    assert claims.judge(fewer, make_claim(rule, paper_effect=0.004))[0] == "undecided"
    # of two rules one holds, the other is below 0, though not after Bonferroni's correction
    noise = [0.012 * (-1) ** seed for seed in range(20)]
    results = results_of(a=[0.43] * 20, b=[0.4] * 20, c=[0.436 + d for d in noise])
    against = Rule("clean_acc", "a", "c")
    effect = claims.effect_of([-0.006 - d for d in noise])
    assert 0.025 < effect.p < 0.05 and claims.rule_verdict(against, effect) == "contradicted"
    assert claims.judge(results, make_claim(rule, against, paper_effect=0.004))[0] == "undecided"


def test_a_closed_gate_is_no_verdict_and_a_rival_does_not_decide():
    rule = Rule("clean_acc", "a", "b")
    results = results_of(a=[0.5, 0.51, 0.52], b=[0.4, 0.41, 0.43], c=[0.9, 0.9, 0.91])
    closed = make_claim(rule, gates=(Rule("clean_acc", "a", "b", above=0.2),))
    assert claims.judge(results, closed)[0] == "regime absent"
    lost = make_claim(rule, rivals=(Rule("clean_acc", "a", "c"),))
    assert claims.judge(results, lost)[0] == "holds"


def test_a_gain_is_a_difference_of_differences():
    results = results_of(a=[0.5], b=[0.4], c=[0.35], d=[0.31])
    rule = Rule("gain of clean_acc", "a - b", "c - d")
    assert claims.difference(results, rule, claim_list.FIRST_SEED) == pytest.approx(0.06)


def test_a_rule_without_a_rival_is_about_the_number_itself():
    results = results_of(a=[0.5, 0.6])
    rule = Rule("clean_acc", "a", "", above=0.3)
    assert claims.difference(results, rule, claim_list.FIRST_SEED) == 0.5
    assert claims.rule_text(rule) == "clean: a more than 30"
    smaller = Rule("clean_acc", "a", "b", smallest=0.001)
    assert claims.rule_text(smaller) == "clean: a above b, counts from 0.1"
    assert claims.judge(results, make_claim(Rule("clean_acc", "a", "a"), gates=(rule,)))[0] == (
        "undecided"
    )
    closed = Rule("clean_acc", "a", "", above=0.55)
    assert claims.judge(results, make_claim(rule, gates=(closed,)))[0] == "regime absent"


def test_the_best_epoch_is_the_last_one_where_no_other_was_better():
    results = results_of(a=[0.5, 0.6])
    results["a"][11]["nets"]["best"] = {"clean_acc": 0.7}
    assert claims.value(results, "a@best", "clean_acc", 10) == 0.5
    assert claims.value(results, "a@best", "clean_acc", 11) == 0.7
    assert claims.value(results, "a@teacher", "clean_acc", 11) is None


def test_claims_that_have_not_run_count_in_the_correction(only, looks):
    looks(3)
    rule = Rule("clean_acc", "a", "b")
    found = {"run": make_claim(rule)}
    arms = {"a": "", "b": "", "c": ""}
    results = results_of(a=[0.5, 0.51, 0.53], b=[0.44, 0.44, 0.45], c=[])
    only(found, arms)
    assert claims.judge_all(results) == {"run": ("holds", True)}
    other = {f"other {i}": make_claim(Rule("clean_acc", "c", "b")) for i in range(9)}
    only(found | other, arms)
    assert claims.judge_all(results)["run"] == ("holds", False)


def test_a_claim_that_holds_so_far_is_not_marked_as_corrected(only, monkeypatch):
    only({"run": make_claim(Rule("clean_acc", "a", "b"))}, {"a": "", "b": ""})
    results = results_of(a=[0.5, 0.51, 0.53], b=[0.44, 0.44, 0.45])
    monkeypatch.setattr(claims, "MAX_SEEDS", 3)
    assert claims.judge_all(results) == {"run": ("holds", True)}
    monkeypatch.setattr(claims, "MAX_SEEDS", 4)
    assert claims.judge_all(results) == {"run": ("holds", False)}


def test_one_of_several_rules_contradicts_with_its_share_of_the_five_percent():
    # the mean of bad is -0.02, its p 0.03: contradicted alone, not beside two others
    bad, level = Rule("clean_acc", "c", "b"), Rule("clean_acc", "a", "a")
    results = results_of(a=[0.5] * 4, b=[0.4] * 4, c=[0.37, 0.38, 0.376, 0.394])
    effect = claims.measure(results, bad, make_claim(bad))
    assert 0.05 / 3 < effect.p < 0.05
    assert claims.judge(results, make_claim(bad))[0] == "contradicted"
    assert claims.judge(results, make_claim(bad, level, level))[0] == "undecided"


def test_a_small_effect_contradicts_no_more_than_it_holds():
    rule = Rule("clean_acc", "a", "b")
    for sign, verdict in ((1, "undecided"), (-1, "undecided")):
        differences = [sign * number for number in (0.003, 0.0031, 0.0032)]
        assert claims.rule_verdict(rule, claims.effect_of(differences)) == verdict
    no_loss = Rule("clean_acc", "a", "b", above=-0.01, smallest=-0.01)
    assert claims.rule_verdict(no_loss, claims.effect_of([-0.013, -0.0131])) == "contradicted"


def test_the_regimes_are_drawn_from_arms_that_there_are():
    drawn = [arm for _, arms in claim_list.REGIMES.values() for arm in arms]
    assert {*drawn} <= claim_list.ARMS.keys()


# ------------------------------------------------------------------------------------------------
# The list


def test_every_arm_is_a_command_of_a_script_and_belongs_to_a_claim_or_to_the_league():
    for arm in claim_list.ARMS:
        script, *flags = claims.words_of(arm, 7)
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert not {"--seed", "--name", "--runs"} & set(args.given), arm
        # a teacher of each seed, wherever one is trained
        assert getattr(args, "teacher_seed", 7) == 7 or args.method in ("student", "gaussian"), arm
    rules = [rule for claim in claim_list.CLAIMS.values() for rule in claims.rules_of(claim)]
    used = {claims.split(name)[0] for rule in rules for name in claims.names_in(rule)}
    used |= {claims.split(name)[0] for name in claim_list.LEAGUE_NAMES}
    assert used == claim_list.ARMS.keys()


def test_claims_name_nets_metrics_and_papers_that_there_are():
    assert 18 <= len(claim_list.CLAIMS) <= 30
    assert {claim.paper for claim in claim_list.CLAIMS.values()} == set(claims.PAPERS)
    for claim in claim_list.CLAIMS.values():
        assert claim.rules and claim.first_seed >= claim_list.FIRST_SEED
        assert claim.paper_effect is None or claim.paper_effect < 0.005
        assert not re.search(r"[^\x00-\x7f]", claim.quote)
        for rule in claims.rules_of(claim):
            metric = rule.metric.removeprefix("gain of ")
            assert metric in claims.METRIC_TITLES
            for name in claims.names_in(rule):
                arm, net = claims.split(name)
                assert arm in claim_list.ARMS and net in claims.NETS


# ------------------------------------------------------------------------------------------------
# From runs to the page


@pytest.fixture
def in_process(monkeypatch):
    """Scripts are called in the process of the tests, with a short AutoAttack on few images."""
    called = []

    def call(script, flags, log_file):
        called.append((script, flags))
        importlib.import_module(script.removesuffix(".py")).main(flags)

    monkeypatch.setattr(claims, "call", call)
    monkeypatch.setattr(claims, "AUTOATTACK_IMAGES", 20)
    short = functools.partial(eval_robustness.Settings, steps=2, queries=4, targets=1)
    monkeypatch.setattr(eval_robustness, "Settings", short)
    return called


def test_gradients_of_the_epochs_are_read_from_the_net(only, in_process, tmp_path):
    flags = TINY.replace("mlp-8", "resnet18-w2").replace("--steps 1", "")
    flags += " --eval-attack clean --grad-heatmap"
    only({}, {"plain": f"teacher_free_kd.py --method plain {flags}"})
    (tmp_path / "runs").mkdir()
    args = argparse.Namespace(runs=tmp_path / "runs", results=tmp_path / "results")
    numbers = claims.run_arm("plain", 10, args)["nets"]["student"]
    with np.load(tmp_path / "runs/teacher_free_kd/plain-s10/gradients.npz") as file:
        means = 1000 * file["student (plain)/means"].mean(1)  # (epochs,)
    assert len(means) == 2 and means[0] != means[1]
    found = [numbers[key] for key in ("gradient", "gradient_first", "gradient_last")]
    assert found == pytest.approx([means.mean(), means[0], means[-1]], abs=1e-5)
    assert numbers["gradient_lost"] == pytest.approx(1 - means[-1] / means[0], abs=1e-5)


def test_answers_vary_with_dropout_alone(tmp_path):
    data = common.load_data("shapes", val_size=0, train_subset=8, test_subset=200)
    shares = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        net = common.build_model("wrn-10-1", dropout=dropout)
        torch.nn.init.normal_(net.fc.weight)  # as first drawn it has one class for all images
        common.save_model(tmp_path / "net.pt", net)
        shares.append(claims.share_that_varies(tmp_path / "net.pt", data))
    assert shares[0] == 0.0 and 0.1 < shares[1] < 1.0


@pytest.mark.parametrize("script", ["fickle_teacher", "soft_randomization", "messy_collab"])
def test_an_arm_of_the_noisy_scripts_is_evaluated_at_its_own_radius(
    script, only, in_process, tmp_path
):
    flags = TINY.replace("--steps 1", "--teacher-model mlp-8 --teacher-epochs 1")
    only({}, {"x": f"{script}.py --method hinton {flags} --eval-restarts 1 --eval-eps 0.05"})
    (tmp_path / "runs").mkdir()
    args = argparse.Namespace(runs=tmp_path / "runs", results=tmp_path / "results")
    nets = claims.run_arm("x", 10, args)["nets"]
    (words,) = [words for name, words in in_process if name == "eval_robustness.py"]
    assert words[words.index("--eps") + 1] == "0.05" and "entropy" in nets["student"]


def test_the_robust_accuracy_is_what_targeted_apgd_leaves(only, in_process, monkeypatch, tmp_path):
    only({})
    monkeypatch.setattr(claims, "nets_compared_by", lambda *_: ["student"])
    call = claims.call

    def call_and_rewrite(script, flags, log_file):
        call(script, flags, log_file)
        if script == "eval_robustness.py":
            path = claims.Path(flags[flags.index("--json") + 1])
            record = common.read_json(path)
            (row,) = record["rows"]
            for stage, left in zip(row["reports"]["aa"]["stages"], (0.5, 0.4, 0.35, 0.3)):
                stage["robust_acc"] = left
            common.write_json(path, record | {"rows": [row | {"aa_acc": 0.3}]})

    monkeypatch.setattr(claims, "call", call_and_rewrite)
    (tmp_path / "runs").mkdir()
    args = argparse.Namespace(runs=tmp_path / "runs", results=tmp_path / "results")
    student = claims.run_arm("at", 10, args)["nets"]["student"]
    assert (student["apgd_acc"], student["aa_acc"]) == (0.4, 0.3)


def test_the_p_value_is_against_the_bound_of_the_rule():
    rule = Rule("clean_acc", "a", "b", above=-0.01, smallest=-0.01)
    results = results_of(a=[0.4, 0.401, 0.399], b=[0.4] * 3)
    verdict, p = claims.judge(results, make_claim(rule))
    assert verdict == "holds" and p < 0.01


def test_data_of_an_arm_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claims.in_project("README.md") == str(claims.ROOT / "README.md")
    assert claims.in_project("mnist") == "mnist"


def test_the_numbers_of_an_ensemble_are_kept(only, in_process, tmp_path):
    flags = f"{TINY} --teacher-epochs 1 --teacher-batch-size 20 --teacher-training st st"
    only({}, {"two": f"robust_kd.py --loss akd {flags}"})
    (tmp_path / "runs").mkdir()
    args = argparse.Namespace(runs=tmp_path / "runs", results=tmp_path / "results")
    nets = claims.run_arm("two", 10, args)["nets"]
    assert 0 <= nets["ensemble"]["pgd20_acc"] <= nets["ensemble"]["clean_acc"]
    assert "teacher2" not in nets


def test_the_seeds_of_a_second_design_are_its_own():
    rule = Rule("clean_acc", "a", "b")
    late = make_claim(rule, first_seed=claim_list.FIRST_SEED + 1)
    results = results_of(a=[0.1, 0.5, 0.51], b=[0.9, 0.4, 0.41])
    assert claims.measure(results, rule, late).mean == pytest.approx(0.1)


def test_a_claim_is_run_kept_shown_and_not_run_again(only, looks, in_process, tmp_path, capsys):
    looks(2)
    gate = Rule("pgd20_acc", "at@best", "at", above=-1.0)
    rules = (Rule("robust_acc", "akd", "at"), Rule("entropy", "akd", "akd@teacher"))
    only({"small": make_claim(*rules, gates=(gate,))})
    flags = ["small", "--workers", "1"]
    markers = "<!-- claims: begin -->\nold\n<!-- claims: end -->"
    (tmp_path / "README.md").write_text(f"A\n{markers}\nB\n")
    for name in ("runs", "results", "docs"):
        (tmp_path / name).mkdir()
        flags += [f"--{name}", str(tmp_path / name)]
    claims.main(flags)
    out = capsys.readouterr().out
    assert "4/4" in out and "aa 0." in out and re.search(r"small: (holds|contra|undec)", out)
    record = json.loads((tmp_path / "results" / "akd.json").read_text())
    assert record["command"] == SMALL_ARMS["akd"] and list(record["runs"]) == ["10", "11"]
    run = record["runs"]["10"]
    assert {"student", "teacher"} <= run["nets"].keys() and run["torch"]
    assert {"clean_acc", "pgd20_acc", "aa_acc", "entropy"} <= run["nets"]["student"].keys()
    lines = (tmp_path / "runs/robust_kd/akd-s10/log.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["stage"], last["epoch"]) == ("student", 2)
    assert run["nets"]["student"]["train_acc"] == pytest.approx(last["train_acc"], abs=1e-6)
    assert "train_acc" in run["nets"]["teacher"] and "train_acc" not in run["nets"].get("best", {})
    summary = common.read_json(tmp_path / "runs/robust_kd/akd-s10/summary.json")
    assert run["nets"]["teacher"]["clean_acc"] == pytest.approx(summary[0]["clean_acc"], abs=1e-6)
    assert len(run["curve"]["val_clean_acc"]) == 2
    page = (tmp_path / "docs/CLAIMS.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("A\n<!-- claims: begin -->\n**Do the papers' claims hold?**")
    assert "Verdicts on 1 claims: 1 " in " ".join(readme.split())
    assert "(docs/CLAIMS.md)" in readme and readme.endswith("|\n<!-- claims: end -->\nB\n")
    assert (
        "Verdicts on 1 claims: 1 " in page and "robust: akd above at" in page and "> quote" in page
    )
    assert f"| `at` | adversarial training | `python {SMALL_ARMS['at']} --seed 10` |" in page
    assert "(regimes.png)" in page
    for path in ("docs/claims.png", "docs/regimes.png"):
        assert (tmp_path / path).stat().st_size > 5000
    before = len(in_process)
    claims.main(flags)
    assert len(in_process) == before
    only({"small": make_claim(*rules, gates=(gate,))}, SMALL_ARMS | {"akd": "robust_kd.py"})
    results = claims.read_results(tmp_path / "results")
    assert results["akd"] == {} and len(results["at"]) == 2  # another command is another arm


def test_a_rule_on_a_number_that_no_run_gives_ends_in_one_line(
    only, looks, monkeypatch, tmp_path, refused
):
    looks(2)
    only({"small": make_claim(Rule("varies", "at", ""))})
    monkeypatch.setattr(claims, "run_arm", lambda *_: {"nets": {"student": {}}, "minutes": 0.0})
    flags = ["small", "--docs", str(tmp_path), "--results", str(tmp_path / "results")]
    assert "at: its runs lack a number that a rule asks for" in refused(claims.main, flags)


def test_a_page_with_one_of_the_two_marks_stays_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    for text in ("A\n<!-- x: begin -->\nB\n", "A\n<!-- x: end -->\nB\n"):
        page.write_text(text)
        claims.replace_between("x", page, "new")
        assert page.read_text() == text
    page.write_text("A\n<!-- x: begin -->\nB\n<!-- x: end -->\nC\n")
    claims.replace_between("x", page, "new")
    assert page.read_text() == "A\n<!-- x: begin -->\nnew\n<!-- x: end -->\nC\n"


def test_the_page_in_docs_and_the_readme_say_what_the_results_say(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "SEEDS_PER_LOOK", 5)
    (tmp_path / "docs").mkdir()
    readme = (claims.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    claims.main(["--page", "--docs", str(tmp_path / "docs")])
    page = (claims.ROOT / "docs/CLAIMS.md").read_text()
    assert (tmp_path / "docs/CLAIMS.md").read_text() == page, "run benchmark/claims.py --page"
    assert (tmp_path / "README.md").read_text() == readme


def test_a_run_that_fails_is_named_and_the_others_go_on(
    only, looks, monkeypatch, tmp_path, refused
):
    looks(2)
    only({"small": make_claim(Rule("clean_acc", "akd", "at"))})
    ran = []

    def run_arm(arm, seed, args):
        ran.append((arm, seed))
        if (arm, seed) == ("akd", 10):
            raise common.UserError("robust_kd.py: error: no disk")
        return {"nets": {"student": {"clean_acc": 0.5}}, "curve": {}, "minutes": 1.0}

    monkeypatch.setattr(claims, "run_arm", run_arm)
    flags = ["small", "--results", str(tmp_path), "--docs", str(tmp_path)]
    message = refused(claims.main, flags)
    assert "1 runs failed" in message and "akd, seed 10" in message and "no disk" in message
    assert len(ran) == 4 and sorted(claims.read_results(tmp_path)["at"]) == [10, 11]
    assert "1 not run" in (tmp_path / "CLAIMS.md").read_text()


def test_a_script_that_ends_with_an_error_is_one_line(tmp_path, refused):
    log = tmp_path / "logs" / "a.log"
    message = refused(claims.call, "robust_kd.py", ["--alpha", "2"], log)
    assert "robust_kd.py: error: argument --alpha" in message or "--alpha" in message
    assert "status 2" in message and str(log) in message


def test_the_list_says_what_is_left(only, looks, tmp_path, capsys):
    looks(2)
    only({"small": make_claim(Rule("clean_acc", "akd", "at"))})
    claims.main(["--list", "--results", str(tmp_path)])
    assert "4 runs" in capsys.readouterr().out
    run = {"nets": {"student": {"clean_acc": 0.5}}, "minutes": 2.0}
    for arm in ("akd", "at"):
        claims.keep(tmp_path, arm, 10, run)
    claims.main(["--list", "--results", str(tmp_path)])
    assert "2 runs, 4 min" in capsys.readouterr().out
    (tmp_path / "at.json").unlink()
    claims.main(["--list", "--results", str(tmp_path)])
    assert "3 runs, 2 min + 2 runs not timed" in capsys.readouterr().out


def test_a_rival_whose_interval_excludes_0_differs_if_too_little_to_count():
    rival = Rule("clean_acc", "a", "c")
    claim = make_claim(Rule("clean_acc", "a", "b"), rivals=(rival,))
    results = results_of(a=[0.5, 0.501, 0.502], b=[0.4] * 3, c=[0.503, 0.5041, 0.5049])
    assert claims.rule_rows(results, claim)[1]["comes out"] == "a difference too small to count"
    results = results_of(a=[0.5, 0.501, 0.502], b=[0.4] * 3, c=[0.51, 0.5, 0.505])
    assert claims.rule_rows(results, claim)[1]["comes out"] == "no difference shown"


def test_a_page_with_a_rival_that_has_not_run(only, looks, tmp_path):
    looks(2)
    rivals = (Rule("robust_acc", "akd+0.8", "at@best"),)
    claim = make_claim(Rule("clean_acc", "akd+0.8", "at"), rivals=rivals)
    arms = {"akd+0.8": "", "at": "", "akd": "", "at-smooth-0.5": ""}
    only({"robust-distillation": claim}, arms)
    (tmp_path / "README.md").write_text("<!-- claims: begin -->\n<!-- claims: end -->\n")
    for arm, number in {"akd+0.8": 0.5, "at": 0.4}.items():
        for seed in (10, 11):
            run = {"nets": {"student": {"clean_acc": number + seed / 1e4}}, "curve": {}}
            claims.keep(tmp_path / "results", arm, seed, run | {"minutes": 1.0})
    flags = ["--page", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    claims.main(flags)
    assert "not run" in (tmp_path / "README.md").read_text()
    assert (
        "robust: akd+0.8 above at@best | beside | not run"
        in (tmp_path / "docs/CLAIMS.md").read_text()
    )


@pytest.mark.parametrize("text", ["{}", "[1]", '{"a": 1', '{"command": "x"}'])
def test_results_that_are_none_are_one_line(only, tmp_path, refused, text):
    only({"small": make_claim(Rule("clean_acc", "akd", "at"))})
    (tmp_path / "at.json").write_text(text)
    assert f"{tmp_path / 'at.json'}: " in refused(claims.read_results, tmp_path)


def test_results_of_another_command_are_replaced_with_a_word(only, tmp_path, capsys):
    only({}, {"at": "robust_kd.py --loss at"})
    claims.keep(tmp_path, "at", 10, {"minutes": 1.0})
    only({}, {"at": "robust_kd.py --loss at --eps 4/255"})
    claims.keep(tmp_path, "at", 11, {"minutes": 1.0})
    assert "at.json: the results of another command are replaced" in capsys.readouterr().out
    assert list(common.read_json(tmp_path / "at.json")["runs"]) == ["11"]


def test_nothing_starts_after_the_program_was_stopped(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(claims, "STOPPED", threading.Event())
    claims.STOPPED.set()
    message = refused(claims.call, "robust_kd.py", ["--help"], tmp_path / "log")
    assert "stopped before it began" in message and not (tmp_path / "log").exists()


def test_unknown_claims_and_none_are_refused(refused):
    assert "got nothing-such" in refused(claims.main, ["nothing-such"])
    assert "CLAIM: name one" in refused(claims.main, [])


def test_missing_images_are_named_before_anything_runs(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    message = refused(claims.main, ["early-stopping", "--results", str(tmp_path)])
    assert "cifar10-16.npz" in message and "prepare.py" in message


def test_a_stopped_program_stops_its_runs_and_keeps_what_is_finished(
    only, looks, monkeypatch, tmp_path
):
    looks(2)
    only({"small": make_claim(Rule("clean_acc", "akd", "at"))})
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    (tmp_path / "robust_kd.py").write_text("import time\ntime.sleep(100)\n")
    began = time.monotonic()

    def stop_when_two_run(*_):
        while len(claims.RUNNING) < 2:
            assert time.monotonic() - began < 40, "two runs never began"
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(claims.concurrent.futures, "as_completed", stop_when_two_run)
    with pytest.raises(KeyboardInterrupt):
        claims.main(["small", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert time.monotonic() - began < 50 and not claims.RUNNING
