"""What the three papers claim, tested with small nets on a CPU: runs, intervals, verdicts, a page.

Usage    python benchmark/claims.py --list                # claims, minutes left, verdicts
         python benchmark/claims.py early-stopping        # runs one claim and shows it
         python benchmark/claims.py all --workers 2       # make claims
         python benchmark/claims.py --page                # docs/CLAIMS.md of the results, no run
Runs     Each arm of a claim (benchmark/claim_list.py) is one command of our scripts, run for each
         seed from 10 on, in a process with one thread, --workers at a time. What is finished is
         kept in benchmark/claims/ARM.json, and the same command goes on with the rest.
Figures  docs/claims.png of all claims, docs/regimes.png of the curves of each regime.
Rules    PAGE below, the same text as docs/CLAIMS.md#rules.
"""

import concurrent.futures
import contextlib
import functools
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import fickle_teacher
from benchmark import ROOT, evaluation_attack, plots
from benchmark.claim_list import (
    ARMS,
    CLAIMS,
    FIRST_GATES,
    FIRST_SEED,
    LEAGUE_NAMES,
    REGIMES,
    WORDS,
    Rule,
)

PAPERS = {
    1: "noisy collaboration",
    2: "robust distillation",
    3: "distillation in an adversarial context",
}
SOURCES = {
    1: "Arani, Sarfraz and Zonooz 2019, [arXiv 1910.05057v1](https://arxiv.org/abs/1910.05057v1).",
    2: "Maroto, Ortiz-Jimenez and Frossard, in the text of 2023 of "
    "[On the benefits of knowledge distillation for adversarial robustness]"
    "(https://arxiv.org/abs/2203.07159).",
    3: "Zhang, Zhuo and Kuo, manuscript, Duke University.",
}
# Said of all claims of a paper
NOTES = {
    1: "Each seed has its own teacher, so that the intervals cover teachers too. The paper has one "
    "for all students, the best of five; with one, a second teacher of the same command moved its "
    "students by more than the effects of the paper.",
}
# After the @ of an arm; `net` in a summary
NETS = ("student", "best", "teacher", "ensemble", "alone")
VERDICTS = (
    "holds",
    "contradicted",
    "undecided",
    "too small to tell here",
    "regime absent",
    "not run",
)
MAX_SEEDS, SEEDS_PER_LOOK = 20, 5
RIVAL_SEEDS = 10
AUTOATTACK_IMAGES = 1000
# The first two of each design: all of AutoAttack; others: APGD-CE and targeted APGD alone
AUTOATTACK_SEEDS = (10, 11, 20, 21, 30, 31)


def parse_args(argv=None):
    """The flags as a namespace, with `claims`: the ids of those that are asked for."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help="claims to run by their names, or the word all")
    add("--list", action="store_true", help="show all claims with their state and run nothing")
    add("--page", action="store_true", help="write the page of the results and run nothing")
    add("--workers", type=common.whole, default=2, help="number of runs at the same time")
    add("--runs", default=str(ROOT / "runs/claims"), help="folder in which the runs are kept")
    add("--results", default=str(ROOT / "benchmark/claims"), help="folder of the results")
    add("--docs", default=str(ROOT / "docs"), help="folder of CLAIMS.md and claims.png")
    args = parser.parse_args(argv)
    if "all" in args.claims:
        args.claims = list(CLAIMS)
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        parser.error(f"CLAIM: expected all or one of {', '.join(CLAIMS)}, got {unknown[0]}")
    if not (args.claims or args.list or args.page):
        parser.error("CLAIM: name one, or all, or take --list")
    return args


# ------------------------------------------------------------------------------------------------
# Statistics


@functools.cache
def t_distribution(freedom):
    """(t, P(T <= t)) on a fine grid, for Student's distribution with so many degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density of the angle is proportional to
    cos(angle)^(freedom - 1).
    """
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)[1:-1]
    density = np.cos(angle) ** (freedom - 1)
    probability = np.cumsum(density) - density / 2
    return math.sqrt(freedom) * np.tan(angle), probability / density.sum()


class Effect(NamedTuple):
    """The paired differences of a rule: their mean, 95 % interval, and p-value against `above`."""

    differences: list
    mean: float
    low: float
    high: float
    p: float


def effect_of(differences, above=0.0):
    """The Effect of two or more paired differences."""
    middle = mean(differences)
    error = stdev(differences) / math.sqrt(len(differences))
    t, probability = t_distribution(len(differences) - 1)
    half_width = error * float(np.interp(0.975, probability, t))
    if error == 0:
        p = 1.0 if middle == above else 0.0
    else:
        p = 2 * (1 - float(np.interp(abs(middle - above) / error, t, probability)))
    return Effect(list(differences), middle, middle - half_width, middle + half_width, p)


def rule_verdict(rule, effect):
    """holds, contradicted or undecided."""
    if effect.low > rule.above and effect.mean >= rule.smallest:
        return "holds"
    if effect.high < rule.above and effect.mean <= rule.above - max(rule.smallest, 0):
        return "contradicted"
    return "undecided"


def holm(p_values):
    """{name: p} -> the names that are significant at 5 % after Holm's correction."""
    accepted = set()
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] > 0.05 / (len(p_values) - rank):
            break
        accepted.add(name)
    return accepted


# ------------------------------------------------------------------------------------------------
# Results


def split(name):
    """ "arm@net" -> (arm, net); the net is the student if none is named."""
    arm, _, net = name.partition("@")
    return arm, net or "student"


def rules_of(claim):
    """All rules of a claim: those that decide, its gates and its rivals."""
    return [*claim.rules, *claim.gates, *claim.rivals]


def names_in(rule):
    """All "arm@net" of a rule, also those of the difference `arm - rival` of a gain."""
    return [name for side in (rule.arm, rule.rival) if side for name in side.split(" - ")]


def nets_compared_by(arm, *metrics):
    """The nets of an arm that the league, or a rule, compares by one of the metrics."""
    nets = []
    if "robust_acc" in metrics:
        nets += [net for other, net in map(split, sorted(LEAGUE_NAMES)) if other == arm]
    for claim in CLAIMS.values():
        for rule in rules_of(claim):
            if metric_of(rule) in metrics:
                nets += [net for other, net in map(split, names_in(rule)) if other == arm]
    return list(dict.fromkeys(nets))


def read_results(folder):
    """{arm: {seed: result of a run}}; a result of another command than today's is left out."""
    results = {}
    for arm, command in ARMS.items():
        path = Path(folder) / f"{arm}.json"
        record = common.read_json(path)
        if record is not None and not (
            isinstance(record, dict) and {"command", "runs"} <= {*record}
        ):
            raise common.UserError(f"{path}: no results of an arm; delete it")
        same = record is not None and record["command"] == command
        results[arm] = {int(s): run for s, run in record["runs"].items()} if same else {}
    return results


def value(results, name, metric, seed):
    """A number of "arm@net" for a seed; None if the run or the number is not there."""
    arm, net = split(name)
    run = results[arm].get(seed)
    if run is None:
        return None
    if net == "best" and "best" not in run["nets"]:
        net = "student"  # its last epoch was the best one
    numbers = run["nets"].get(net, {})
    if metric == "robust_acc":  # runs of before have the number of the whole AutoAttack alone
        return numbers.get("apgd_acc", numbers.get("aa_acc"))
    return numbers.get(metric)


def metric_of(rule):
    """The metric that a rule compares, or of which it compares gains."""
    return rule.metric.removeprefix("gain of ")


def difference(results, rule, seed):
    """arm - rival for a seed; None without both. A gain is a difference of two arms itself."""
    sides = []
    for side in (rule.arm, rule.rival):
        if not side:
            sides.append(0.0)
            continue
        numbers = [value(results, name, metric_of(rule), seed) for name in side.split(" - ")]
        if None in numbers:
            return None
        sides.append(numbers[0] - sum(numbers[1:]))
    return sides[0] - sides[1]


def seeds_of(results, claim):
    """The seeds of the latest look at a claim, or of the first with which it is finished.

    All have what its rules and gates compare.
    """
    rules = (*claim.rules, *claim.gates)
    looked_at = range(claim.first_seed, claim.first_seed)
    for count in range(SEEDS_PER_LOOK, MAX_SEEDS + 1, SEEDS_PER_LOOK):
        seeds = range(claim.first_seed, claim.first_seed + count)
        numbers = [difference(results, rule, seed) for rule in rules for seed in seeds]
        if None in numbers:
            break
        looked_at = seeds
        if is_narrow(results, claim, seeds):
            break
    return looked_at


def is_narrow(results, claim, seeds):
    """Whether with these seeds the intervals of all rules that decide are narrow enough."""
    if len(seeds) < 2:
        return False
    for rule in claim.rules:
        effect = effect_of([difference(results, rule, seed) for seed in seeds])
        if effect.high - effect.low > WIDEST.get(rule.metric, 0.01):
            return False
    return True


def measure(results, rule, claim):
    """The Effect of a rule at the latest look at its claim, of a rival with those that have run.

    None with fewer than two seeds.
    """
    differences = [difference(results, rule, seed) for seed in seeds_of(results, claim)]
    differences = [number for number in differences if number is not None]
    return effect_of(differences, rule.above) if len(differences) > 1 else None


def is_finished(results, claim):
    """Whether no more seeds are run for a claim: see Seeds in the docstring."""
    seeds = seeds_of(results, claim)
    return len(seeds) == MAX_SEEDS or is_narrow(results, claim, seeds)


def judge(results, claim):
    """-> (verdict of a claim, its p-value)."""
    effects = [measure(results, rule, claim) for rule in (*claim.rules, *claim.gates)]
    if None in effects:
        return "not run", 1.0
    effects = effects[: len(claim.rules)]
    for gate in claim.gates:
        if measure(results, gate, claim).mean <= gate.above:
            return "regime absent", 1.0
    verdicts = [rule_verdict(rule, effect) for rule, effect in zip(claim.rules, effects)]
    p = max(effect.p for effect in effects)
    for verdict, effect in zip(verdicts, effects):
        # one rule of several is enough, so each has its share of the 5 % (Bonferroni)
        if verdict == "contradicted" and len(effects) * effect.p < 0.05:
            return "contradicted", p
    if set(verdicts) == {"holds"}:
        return "holds", p
    if claim.paper_effect is not None and is_finished(results, claim):
        unclear = [e for verdict, e in zip(verdicts, effects) if verdict != "holds"]
        if all(effect.low <= claim.paper_effect <= effect.high for effect in unclear):
            return "too small to tell here", p
    return "undecided", p


def judge_all(results):
    """{claim: (verdict, whether it is finished and holds after Holm's correction)}."""
    judged = {name: judge(results, claim) for name, claim in CLAIMS.items()}
    significant = set()
    for paper in PAPERS:
        family = {name: p for name, (_, p) in judged.items() if CLAIMS[name].paper == paper}
        significant |= holm(family)
    corrected = {}
    for name, (verdict, _) in judged.items():
        finished = verdict == "holds" and is_finished(results, CLAIMS[name])
        corrected[name] = verdict, finished and name in significant
    return corrected


# ------------------------------------------------------------------------------------------------
# Runs


def missing_runs(results, claims, looks=1):
    """The (arm, seed) that the claims need for the next looks: all that decide, then the rivals."""
    deciding, rivals = [], []
    for claim in claims:
        last = len(seeds_of(results, claim))
        if not is_finished(results, claim):
            last = min(last + looks * SEEDS_PER_LOOK, MAX_SEEDS)
        seeds = range(claim.first_seed, claim.first_seed + last)
        deciding += jobs_of(results, (*claim.rules, *claim.gates), seeds)
        rivals += jobs_of(results, claim.rivals, seeds[:RIVAL_SEEDS])
    return list(dict.fromkeys(deciding + rivals))


def jobs_of(results, rules, seeds):
    """The (arm, seed) without which one of the rules cannot be measured with these seeds.

    Arm by arm: arms of one seed may share a teacher, and would wait for who trains it.
    """
    jobs = []
    for rule in rules:
        for name in names_in(rule):
            for seed in seeds:
                if value(results, name, metric_of(rule), seed) is None:
                    jobs.append((split(name)[0], seed))
    return jobs


RUNNING = set()  # the processes of `call`, to be stopped with this program
STOPPED = threading.Event()  # after which `call` starts no other


def call(script, flags, log_file):
    """Run a script in a process of one thread; a UserError with its last line if it fails."""
    if STOPPED.is_set():
        raise common.UserError(f"{script}: stopped before it began")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log_file, "a") as log:
        print(f"\n$ python {script} {shlex.join(flags)}", file=log, flush=True)
        command = [sys.executable, str(ROOT / script), *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
    if status:
        lines = log_file.read_text().strip().splitlines()
        raise common.UserError(f"{script}: {lines[-1]} (status {status}; {log_file})")


def words_of(arm, seed):
    """The command of an arm as a list of words, its SEED replaced."""
    return shlex.split(ARMS[arm].replace("SEED", str(seed)))


def in_project(data):
    """--data of an arm, whose commands run in the project's folder: a path there, or a name."""
    return str(ROOT / data) if (ROOT / data).exists() else data


def run_arm(arm, seed, args):
    """Train and evaluate an arm with a seed -> what its results keep of the run."""
    began = time.monotonic()
    script, *flags = words_of(arm, seed)
    runs = Path(args.runs).resolve()
    log_file = runs / "logs" / f"{arm}-s{seed}.log"
    name = re.sub(r"[^\w.,=+-]", "-", arm)
    options = ["--seed", str(seed), "--name", name, "--runs", str(runs), "--device", "cpu"]
    call(script, [*flags, *options], log_file)
    folder = runs / script.removesuffix(".py") / f"{name}-s{seed}"
    rows = common.read_json(folder / "summary.json")
    config = common.read_json(folder / "config.json")
    nets, files = {}, {}
    row_of = {row["net"]: row for row in rows if row["net"] in NETS}
    for net, row in row_of.items():
        nets[net] = {key: number for key, number in row.items() if isinstance(number, int | float)}
        if row["file"]:  # an ensemble has none
            files[net] = folder / row["file"]
            nets[net] |= numbers_of_training(files[net])
    if script == "fickle_teacher.py" and "teacher" in files:
        data = common.load_data(in_project(config["flags"]["data"]), test_subset=AUTOATTACK_IMAGES)
        nets["teacher"]["varies"] = share_that_varies(files["teacher"], data)
    attacks = ["clean", "calibration"]
    if nets_compared_by(arm, "robust_acc"):
        attacks.append("aa" if seed in AUTOATTACK_SEEDS else "apgd")
    wanted = ["student", *nets_compared_by(arm, "robust_acc", "entropy", "ece")]
    evaluated = [net for net in files if net in wanted]
    # named after what is in it: an arm that later needs more nets or attacks has another file
    result_file = folder / f"{attacks[-1]}-{'-'.join(evaluated)}.json"
    flags = config["flags"]
    evaluation = [str(files[net]) for net in evaluated]
    evaluation += ["--attack", *attacks, "--json", str(result_file), "--n", str(AUTOATTACK_IMAGES)]
    evaluation += ["--data", flags["data"], "--eps", str(evaluation_attack(flags)[0])]
    evaluation += ["--device", "cpu"]
    call("eval_robustness.py", evaluation, log_file)
    for net, row in zip(evaluated, common.read_json(result_file)["rows"], strict=True):
        nets[net]["entropy"] = row["calibration"]["clean"]["entropy"]
        nets[net]["ece"] = row["calibration"]["clean"]["ece"]
        if "aa_acc" in row:
            nets[net]["aa_acc"] = row["aa_acc"]
            stages = {stage["attack"]: stage for stage in row["reports"]["aa"]["stages"]}
            nets[net]["apgd_acc"] = stages["apgd-t"]["robust_acc"]
        elif "apgd_acc" in row:
            nets[net]["apgd_acc"] = row["apgd_acc"]
    return {
        "nets": {net: rounded(numbers) for net, numbers in nets.items()},
        "curve": held_out_curve(folder),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "commit": config["commit"],
        "python": config["python"],
        "torch": config["torch"],
    }


def numbers_of_training(file):
    """What a net's training tells: accuracy on its own labels, mean |gradient| in thousandths."""
    numbers = {}
    stages = common.read_log(file.parent)
    if file.stem in stages:
        numbers["train_acc"] = stages[file.stem][-1]["train_acc"]
    gradients = common.load(file)["meta"].get("gradients")
    if gradients:  # of each recorded epoch, the mean over the layers
        epochs = [1000 * mean(layers) for layers in gradients["means"]]
        numbers["gradient"] = mean(epochs)
        numbers["gradient_first"], numbers["gradient_last"] = epochs[0], epochs[-1]
        numbers["gradient_lost"] = 1 - epochs[-1] / epochs[0]
    return numbers


DROPOUT_LOCK = threading.Lock()


@torch.no_grad()
def share_that_varies(file, data):
    """The share of test images that a net puts into another class when asked a second time.

    Its dropout is active, as that of a fickle teacher.
    """
    teacher = common.load_model(file, data)
    fickle_teacher.make_fickle(teacher, "dropout")
    x = common.to_float(data.x_test)
    with DROPOUT_LOCK:  # all threads draw from one generator
        torch.manual_seed(0)
        first, second = teacher(x).argmax(1), teacher(x).argmax(1)
    return (first != second).float().mean().item()


def rounded(numbers):
    """The numbers with six digits, which are enough for counts of 10,000 images."""
    return {key: round(number, 6) for key, number in numbers.items()}


def held_out_curve(folder):
    """{val_...: accuracies after each epoch of the student}; {} without held-out images."""
    with contextlib.suppress(common.UserError):
        curves = plots.read_curves(folder)
        return {name: [round(number, 4) for number in values] for name, values in curves.items()}
    return {}


def keep(folder, arm, seed, run):
    """Put the result of a run into ARM.json beside those of other seeds."""
    path = Path(folder) / f"{arm}.json"
    with common.lock_file(Path(folder), wait=True):  # another program may have run the arm too
        record = common.read_json(path)
        if record is None or record["command"] != ARMS[arm]:
            if record is not None:
                print(f"{path}: the results of another command are replaced", flush=True)
            record = {"arm": arm, "command": ARMS[arm], "runs": {}}
        record["runs"][str(seed)] = run
        record["runs"] = dict(sorted(record["runs"].items(), key=lambda item: int(item[0])))
        common.write_json(path, record)


def run_jobs(jobs, args):
    """Run some (arm, seed), --workers at a time; each finished run is kept at once.

    -> [what failed]
    """
    needs_small_images = any("cifar10-16" in ARMS[arm] for arm, _ in jobs)
    if needs_small_images and not (ROOT / "data/cifar10-16.npz").exists():
        raise common.UserError("data/cifar10-16.npz: no such file; prepare.py makes it")
    began, done, failures = time.monotonic(), 0, []
    STOPPED.clear()
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        futures = {pool.submit(run_arm, arm, seed, args): (arm, seed) for arm, seed in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                arm, seed = futures[future]
                done += 1
                try:
                    run = future.result()
                except common.UserError as error:
                    failures.append(f"{arm}, seed {seed}: {error}")
                    print(f"FAILED {failures[-1]}", flush=True)
                    continue
                keep(args.results, arm, seed, run)
                minutes = (time.monotonic() - began) / 60
                left = minutes / done * (len(jobs) - done)
                text = f"{done}/{len(jobs)} {arm}, seed {seed}:"
                for key in ("clean_acc", "pgd20_acc", "apgd_acc", "aa_acc"):
                    if key in run["nets"]["student"]:
                        text += f" {key.removesuffix('_acc')} {run['nets']['student'][key]:.4f},"
                print(f"{text} {run['minutes']:.1f} min, about {left:.0f} left", flush=True)
        except BaseException:
            STOPPED.set()
            for future in futures:
                future.cancel()  # those that have not begun
            for process in list(RUNNING):
                process.terminate()  # they go on where they are the next time
            raise
    return failures


def name_failures(failures):
    """A UserError with the first of the runs that failed, if any did."""
    if failures:
        raise common.UserError(f"{len(failures)} runs failed, the first: {failures[0]}")


# ------------------------------------------------------------------------------------------------
# Tables and the page


def percent(number, digits=1):
    """0.1234 -> "12.3"."""
    return f"{100 * number:.{digits}f}"


# Metrics that are no shares of images: their unit
UNITS = {
    "entropy": "nats",
    "gradient": "thousandths",
    "gradient_first": "thousandths",
    "gradient_last": "thousandths",
}

# The widest interval with which a claim is finished; of all other metrics a point, 0.01
WIDEST = {"entropy": 0.1, "gradient_last": 0.2}

METRIC_TITLES = {
    "clean_acc": "clean",
    "pgd20_acc": "PGD-20",
    "robust_acc": "robust",
    "entropy": "entropy",
    "ece": "calibration error",
    "only_1_acc": "accuracy on ones",
    "train_acc": "training accuracy on its labels",
    "varies": "answers that change",
    "gradient": "mean gradient",
    "gradient_first": "mean gradient, first epoch",
    "gradient_last": "mean gradient, last epoch",
    "gradient_lost": "share of the gradient lost from first to last epoch",
}


def in_words(arm):
    """What the figures call an arm of a rule: "akd+0.8" -> "AKD+"."""
    name, _, net = arm.partition("@")
    nets = {"teacher": "its teacher", "alone": "the same net alone"}
    return nets.get(net, WORDS.get(name, name))


def rule_text(rule, name=str):
    """A rule as a line: "clean: akd+0.8 above at"; name: arm -> what to call it."""
    metric = metric_of(rule)
    title = METRIC_TITLES[metric]
    if metric != rule.metric:
        title = f"gain in {title}"
    arm, rival = name(rule.arm), name(rule.rival)
    above = rule.above if metric in UNITS else 100 * rule.above
    if not rule.rival:
        return f"{title}: {arm} more than {above:g}"
    if above < 0:
        return f"{title}: {arm} at most {-above:g} below {rival}"
    bound = f" by more than {above:g}" if above else ""
    if name is str and rule.smallest not in (0, 0.005) and not above:
        smallest = rule.smallest if metric in UNITS else 100 * rule.smallest
        bound = f", counts from {smallest:g}"
    return f"{title}: {arm} above {rival}{bound}"


def effect_text(rule, effect):
    """The mean of a rule's differences and its interval, in points, or with its unit."""
    if effect is None:
        return "not run"
    if rule.metric in UNITS:
        unit = UNITS[rule.metric]
        return f"{effect.mean:+.3f} [{effect.low:.3f}, {effect.high:.3f}] {unit}"
    low, high = percent(effect.low), percent(effect.high)
    return f"{100 * effect.mean:+.1f} [{low}, {high}]"


def arm_rows(results, claim):
    """Rows of a table: each arm of a claim, mean and deviation of its numbers over the seeds."""
    names = [name for rule in rules_of(claim) for name in names_in(rule)]
    metrics = {metric_of(rule) for rule in rules_of(claim)}
    metrics |= {"clean_acc", "pgd20_acc"}
    rows = []
    for name in dict.fromkeys(names):
        row = {"arm": name}
        for metric, title in METRIC_TITLES.items():
            if metric not in metrics:
                continue
            numbers = [value(results, name, metric, seed) for seed in seeds_of(results, claim)]
            numbers = [number for number in numbers if number is not None]
            row[title] = "-"
            if numbers:
                scale, digits = (1, 3) if metric in UNITS else (100, 1)
                row[title] = f"{scale * mean(numbers):.{digits}f}"
                if len(numbers) > 1:
                    row[title] += f" ± {scale * stdev(numbers):.{digits}f}"
        row["seeds"] = sum(seed in results[split(name)[0]] for seed in seeds_of(results, claim))
        rows.append(row)
    empty = {title for title in rows[0] if all(row[title] == "-" for row in rows)}
    return [{title: row[title] for title in row if title not in empty} for row in rows]


def rule_rows(results, claim):
    """Rows of a table: each rule with its effect and verdict; gates and rivals have their own."""
    rows = []
    kinds = {"decides": claim.rules, "gate": claim.gates, "beside": claim.rivals}
    for kind, rules in kinds.items():
        for rule in rules:
            effect = measure(results, rule, claim)
            verdict, role = "-", kind
            if effect is not None:
                verdict = rule_verdict(rule, effect)
                if kind == "gate":
                    verdict = "open" if effect.mean > rule.above else "closed"
                    if effect.low <= rule.above <= effect.high:
                        verdict += ", but the interval contains the bound"
                elif kind == "beside":
                    words = {"holds": "above", "contradicted": "below"}
                    verdict = words.get(verdict, "no difference shown")
                    if verdict == "no difference shown" and not effect.low <= 0 <= effect.high:
                        verdict = "a difference too small to count"
            if kind == "gate" and claim.first_seed == FIRST_SEED and rule not in FIRST_GATES:
                role = "gate, added later"
            rows.append(
                {
                    "what": rule_text(rule),
                    "role": role,
                    "points [95 %]": effect_text(rule, effect),
                    "seeds": len(effect.differences) if effect else 0,
                    "comes out": verdict,
                }
            )
    return rows


def markdown(rows):
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "| " + " | ".join("---" for _ in keys) + " |"]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def list_rows(results):
    """Rows of --list: all claims, their state, and what is left, in minutes of one worker."""
    rows = []
    for name, (verdict, corrected) in judge_all(results).items():
        claim = CLAIMS[name]
        rows.append(
            {
                "claim": name,
                "paper": claim.paper,
                "seeds": len(seeds_of(results, claim)),
                "to the next look": left_text(results, missing_runs(results, [claim])),
                "at most": left_text(results, missing_runs(results, [claim], MAX_SEEDS)),
                "verdict": verdict_text(results, claim, verdict, corrected),
            }
        )
    everything = list(CLAIMS.values())
    total = {"claim": "all", "paper": "", "seeds": "", "verdict": ""}
    total["to the next look"] = left_text(results, missing_runs(results, everything))
    total["at most"] = left_text(results, missing_runs(results, everything, MAX_SEEDS))
    return [*rows, total]


def left_text(results, jobs):
    """How many runs are left, and their minutes; how many are of arms that have not run before."""
    if not jobs:
        return "-"
    minutes, unknown = 0, 0
    for arm, _ in jobs:
        measured = [run["minutes"] for run in results[arm].values()]
        if measured:
            minutes += mean(measured)
        else:
            unknown += 1
    text = f"{len(jobs)} runs, {minutes:.0f} min"
    return f"{text} + {unknown} runs not timed" if unknown else text


def verdict_text(results, claim, verdict, corrected):
    """A verdict with what limits it: so far; also after Holm's correction."""
    if verdict != "not run" and not is_finished(results, claim):
        verdict += " so far"
    verdict = f"{verdict} (Holm)" if corrected else verdict
    if claim.earlier_verdict:
        verdict += f" (design before: {claim.earlier_verdict})"
    return verdict


def show(name, results):
    """Print one claim: the paper's words, arms, rules, verdict."""
    claim = CLAIMS[name]
    judged = judge_all(results)[name]
    print(f'\n{name}: {claim.title}\n"{claim.quote}" (paper {claim.paper}, {claim.source})')
    print(common.table(arm_rows(results, claim)))
    print()
    print(common.table(rule_rows(results, claim)))
    print(f"\n{name}: {verdict_text(results, claim, *judged)}", flush=True)


def command_rows():
    """Rows of the table of arms: what the figures call each, and its command."""
    rules = [rule for claim in CLAIMS.values() for rule in rules_of(claim)]
    used = {split(name)[0] for rule in rules for name in names_in(rule)}
    return [
        {
            "arm": f"`{arm}`",
            "in the figure": WORDS.get(arm, "-"),
            "command": f"`python {shlex.join(words_of(arm, FIRST_SEED))} --seed {FIRST_SEED}`",
        }
        for arm in ARMS
        if arm in used
    ]


def regime_curves(results):
    """{title: {arm: accuracies (runs, epochs)}} of the regimes that have run."""
    panels = {}
    for title, (metric, arms) in REGIMES.items():
        for arm in arms:
            runs = results[arm].values()
            curves = [run["curve"][metric] for run in runs if metric in run["curve"]]
            if curves:
                panels.setdefault(title, {})[in_words(arm)] = np.array(curves)
    return panels


def counts_text(results, judged):
    """How many claims have which verdict, and what to think of those that hold."""
    counts = Counter()
    for name, (verdict, _) in judged.items():
        so_far = verdict != "not run" and not is_finished(results, CLAIMS[name])
        counts[verdict, so_far] += 1
    parts = []
    for verdict in VERDICTS:
        for so_far in (False, True):
            if counts[verdict, so_far]:
                words = "hold" if verdict == "holds" else verdict
                parts.append(f"{counts[verdict, so_far]} {words}{' so far' if so_far else ''}")
    text = (
        f"Verdicts on {len(judged)} claims: {', '.join(parts)}. So far: more seeds may change it."
    )
    holding = [CLAIMS[name] for name in judged if judged[name][0] == "holds"]
    smoothing = sum(claim.smoothing_suffices for claim in holding)
    if smoothing:
        text += f" Label smoothing without a teacher might pass the rules of {smoothing} that hold."
    return text


def designs_text(judged):
    """How many claims hold after Holm's correction, and what came out in designs before."""
    text = ""
    corrected = sum(also for _, also in judged.values())
    if corrected:
        text += f"{corrected} claims are finished and hold also after Holm's correction within "
        text += "their paper. "
    earlier = Counter(claim.earlier_verdict for claim in CLAIMS.values() if claim.earlier_verdict)
    if earlier:
        came_out = ", ".join(f"{count} {verdict}" for verdict, count in sorted(earlier.items()))
        text += f"{earlier.total()} claims are not in their first design; the one before came out "
        text += f"as {came_out}."
    return text.rstrip()


def readme_text(results, judged):
    """The part of the README: how many claims hold, and a table of the main one."""
    gains = {
        "student of a robust teacher (AKD+)": "akd+0.8",
        "AT, stopped at its best epoch": "at@best",
        "AT with label smoothing": "at-smooth-0.5",
    }
    rows = [{"": title} for title in gains]
    seeds = {}  # of each net, how many its rows have
    nets = {"robust-distillation": ("MLP", ""), "convolutional": ("narrow ResNet-18", "conv-")}
    for name, (net, prefix) in nets.items():
        claim = CLAIMS.get(name)
        if claim is None or not seeds_of(results, claim):
            continue
        for row, arm in zip(rows, gains.values()):
            for metric in ("robust_acc", "clean_acc"):
                rule = Rule(metric, f"{prefix}{arm}", f"{prefix}at")
                effect = measure(results, rule, claim)
                row[f"{net}, {METRIC_TITLES[metric]}"] = effect_text(rule, effect)
                seeds.setdefault(net, []).append(len(effect.differences) if effect else 0)
    counts = []
    for net, numbers in seeds.items():
        first, last = min(numbers), max(numbers)
        counts.append(f"{last if first == last else f'{first} to {last}'} seeds of the {net}")
    text = (
        "**Do the papers' claims hold?** Tested with small nets, paired seeds and strong attacks. "
        f"{counts_text(results, judged)} [All claims](docs/CLAIMS.md). The main one, beside two "
        f"rivals without a teacher, as points above AT with 95 % intervals, {' and '.join(counts)}:"
    )
    text = textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
    return f"{text}\n\n{markdown(rows)}"


def claim_section(name, results, judged):
    """The part of the page that is about one claim."""
    claim = CLAIMS[name]
    lines = [f"### {claim.title}", ""]
    lines.append(f"**{verdict_text(results, claim, *judged[name])}**.")
    remark = claim.remark if seeds_of(results, claim) else ""
    lines += [text for text in (remark, claim.earlier) if text]
    lines += ["", "<details><summary>Quotation, rules and numbers</summary>", ""]
    lines += [f"> {claim.quote}", f"> (paper {claim.paper}, {claim.source})", ""]
    lines.append(f"Printed there: {claim.printed}. Mechanism: {claim.mechanism}")
    if claim.smoothing_suffices:
        lines.append("Label smoothing without a teacher might pass these rules too.")
    seeds = len(seeds_of(results, claim))
    lines += ["", f"`python benchmark/claims.py {name}`, {seeds} seeds:", ""]
    arms = arm_rows(results, claim)
    if any(row["seeds"] for row in arms):
        lines += [markdown(rule_rows(results, claim)), "", markdown(arms), ""]
    else:
        lines += [f"- {rule_text(rule)}" for rule in claim.rules] + [""]
    return "\n".join([*lines, "</details>", ""])


def anchor(heading):
    """The part of an address behind # that leads to a heading of a Markdown page on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def overview_rows(results, judged, paper):
    """Rows of the table on the first screen: claim, what the paper prints, what came out here."""
    rows = []
    for name, claim in CLAIMS.items():
        if claim.paper != paper:
            continue
        effects = []
        for rule in claim.rules:
            effect = effect_text(rule, measure(results, rule, claim))
            effects.append(f"{rule_text(rule, in_words)}: **{effect}**")
        rows.append(
            {
                "claim": f"[{claim.title}](#{anchor(claim.title)})",
                "in the paper": claim.printed,
                "here": "<br>".join(effects),
                "seeds": len(seeds_of(results, claim)),
                "verdict": verdict_text(results, claim, *judged[name]),
            }
        )
    return rows


PAGE = """# What the papers claim, tested with small nets

{counts}

A verdict says whether the direction of a claim appears, by at least what its rule asks for, where
its mechanism is present. It reproduces no number of a paper: the nets and data of the papers are
larger, except for the two claims about MNIST of paper 3.

{figure}*So far*: more seeds may change it. *(Holm)*: holds also after a correction for testing many
claims. *Regime absent*: the mechanism of the claim does not act in this small net, so nothing was
tested.

{tables}Here: the mean difference between two arms (commands) for each rule that decides, in points,
and its 95 % interval. Not tested: signal noise, swapped logits, self-distillation's exits (no
number in the paper), and a large net that learns from a small one (Re-KD: 95.29 -> 95.46, too small
for twenty runs of these nets to tell from zero).

One command tests one claim on a laptop, and `make claims` all of them ({hours:.0f} hours of one
core for what is here; `--list` says what is left). To cite this page, name the commit.

```
python benchmark/prepare.py cifar10-16     # makes data/cifar10-16.npz from CIFAR-10
python benchmark/claims.py --list
python benchmark/claims.py early-stopping
```

Written by `benchmark/claims.py` from `benchmark/claims/*.json`. The rules that decide and the
settings (`benchmark/claim_list.py`) were fixed before the runs of the seeds that decide. The looks,
and the gates that are marked so, were added when five or ten seeds were known. A design was changed
where its mechanism was missing, where it asked something else than the sentence, or where all
students had one teacher (all of paper 1). Nearly all designs that were changed for the first two
reasons had not held. Each claim says what came out before; the runs are in `first_designs/` and
`one_teacher/` of `benchmark/claims/`. {designs}

## Rules

- A **regime** is a net with its data and its training; an **arm** is one command in it; a
  **gate** is a rule that shows that the mechanism of a claim acts in the regime at all; at a
  **look** the verdict is taken from the seeds so far; **Holm**'s correction is for many claims: of
  many that are all false, some would seem to hold by chance.
- All arms have the seeds 10, 11, ... (smaller seeds were used to find the
  settings), or later ones where a first design was changed. A claim is looked at after 5, 10, 15
  and 20 seeds. It is finished at the first look at which the intervals of all its rules are at most
  a point wide (0.1 nats for entropies, 0.2 thousandths for gradients), at the latest with 20 seeds;
  until then its verdict stands with *so far*.
- Numbers come from the last epoch, those of `@best` from the best epoch on held-out images, those
  of `@teacher` and `@alone` from the other nets of the same run.
- A rule compares two arms: differences with the same seed, their mean and 95 % t interval, in
  points. It **holds** if the interval lies above its bound (0 if nothing else is said) and the mean
  reaches the smallest effect that counts (half a point; none where "at most x below" is asked; if
  nothing else is said). It is **contradicted** if the interval lies below the bound, and the mean
  by at least the smallest effect that counts. Otherwise it is **undecided**.
- A claim holds if all its rules hold. It is contradicted if one rule is, also when the 5 % are
  shared among its rules (Bonferroni). If it is still undecided in the end, the paper's effect is
  under half a point, and the interval contains that effect, it is **too small to tell here**.
- **Regime absent**: a gate is closed, so the mechanism of the claim does not act here. Gates look
  at the mean alone.
- Comparisons *beside* are what a reader would ask for. They do not decide, and are run with the
  first ten seeds; where other claims have run more of these arms, they count too.
- Holm's correction covers all claims of a paper; a claim that has not run counts with p = 1, and
  only finished claims are marked. It does not cover the four looks: where there is no effect,
  5 to 7 of 100 finished claims have an interval without 0, instead of 5, and up to 14 at some look
  before (simulated).
- Robust: what APGD-CE and then targeted APGD leave of 1,000 test images, or, in runs of before
  30 November 2026, all of AutoAttack ([the league](LEAGUE.md) says how many images the rest of it
  breaks); the same images for all arms, in float32, at 8/255 (0.031 in the first paper). Clean
  and PGD-20 with one start: the test images of the run (4,000 of the 10,000; 2,000 for arms
  `conv-`; all of MNIST). In the tables of arms ± is the standard deviation over the
  seeds.
- The training images are one fixed choice: the intervals cover what the seed draws, not other data.

## Regimes

- An MLP (512, 512) on 2,000 images of CIFAR-10 at 16x16 without augmentation, PGD-7 at 8/255: it
  overfits robustly within 30 epochs.
- ResNet-18 at 1/8 of its width on 1,000 of these images, PGD-3, 24 epochs (arms `conv-`). With
  2,000 images it hardly overfits in so few epochs, and the gate would be closed.
- MLPs on 5,000 digits of MNIST, half of them with wrong labels (arms `wrong-`).
- WRN-10-2 teaches WRN-10-1 on 4,000 images of 16x16 (other claims of paper 1), with crops and
  flips, or without (arms `-plain`): then labels are learned by heart.
- MNIST with the nets of the third paper.
- ResNet-18 at 1/8 of its width on 4,000 images of 16x16, clean, without augmentation (Tf-KD).

{curves}<details><summary>All arms and their commands, for one seed</summary>

{arms}

</details>

Does it take a teacher at all? [The league](LEAGUE.md) has the rivals without one.

{sections}"""


def write_page(args, results):
    """Write docs/CLAIMS.md, its figure, and the count of verdicts in the README."""
    judged = judge_all(results)
    docs = Path(args.docs)
    papers = {}  # title -> {claim: (its verdict, whether it is finished, its rules)}
    for name, claim in sorted(CLAIMS.items(), key=lambda item: item[1].paper):
        lines = []
        for rule in claim.rules:
            effect = measure(results, rule, claim)
            if effect is not None and rule.metric not in UNITS:
                lines.append((rule_text(rule, in_words), effect, rule.above))
        if lines:
            drawn = judged[name][0], is_finished(results, claim), lines
            papers.setdefault(PAPERS[claim.paper], {})[name] = drawn
    figure = ""
    if papers:
        drawn = plots.draw_forest(docs / "claims.png", papers)
        text = "Differences with their intervals, rule by rule, of all claims about accuracies"
        figure = figure_link(drawn, docs / "claims.png", text)
        figure += "Each grey or white band is one claim. Claims about entropies and gradients are "
        figure += "in the tables alone.\n\n"
    sections, tables = [], ""
    for paper, title in PAPERS.items():
        sections.append(f"## Paper {paper}: {title}\n")
        rows = overview_rows(results, judged, paper)
        if rows:
            tables += (
                f"**Paper {paper}: {title}.** {SOURCES[paper]} {NOTES.get(paper, '')}".rstrip()
            )
            tables += f"\n\n{markdown(rows)}\n\n"
        for name, claim in CLAIMS.items():
            if claim.paper == paper:
                sections.append(claim_section(name, results, judged))
    panels, curves = regime_curves(results), ""
    if panels:
        drawn = plots.draw_regimes(docs / "regimes.png", panels)
        text = "Held-out accuracy after each epoch in four of the regimes, mean and deviation over "
        text += "the seeds"
        curves = figure_link(drawn, docs / "regimes.png", text)
        curves += f"{text}: what a regime is chosen for.\n\n"
    text = PAGE.format(
        counts=counts_text(results, judged),
        designs=designs_text(judged),
        arms=markdown(command_rows()) if CLAIMS else "",
        curves=curves,
        figure=figure,
        hours=sum(run["minutes"] for runs in results.values() for run in runs.values()) / 60,
        tables=tables,
        sections="\n".join(sections),
    )
    write_text(docs / "CLAIMS.md", text.rstrip() + "\n")
    replace_between("claims", docs.resolve().parent / "README.md", readme_text(results, judged))
    print(f"written: {docs / 'CLAIMS.md'}", flush=True)


def figure_link(drawn, path, text):
    """The Markdown of a figure; without matplotlib that of before, if it is there, and a line."""
    if not drawn:
        print(f"{path}: {plots.NO_MATPLOTLIB}", flush=True)
    return f"![{text}]({path.name})\n\n" if path.exists() else ""


def replace_between(mark, path, text):
    """Write `text` between <!-- MARK: begin --> and <!-- MARK: end --> of a file that has them."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    page = path.read_text() if path.exists() else ""
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if found:  # both marks are there
        write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def write_text(path, text):
    """Write a text file, whole or not at all."""
    common.write_atomically(path, lambda file: file.write(text.encode()))


def main(argv=None):
    """Run the claims that are asked for, show them, write the page."""
    args = parse_args(argv)
    if args.list:
        print(common.table(list_rows(read_results(args.results))))
        return
    chosen = [CLAIMS[name] for name in args.claims]
    results = read_results(args.results)
    failures, jobs = [], missing_runs(results, chosen)
    while jobs and not failures:  # one look after the other
        failures = run_jobs(jobs, args)
        results = read_results(args.results)
        before, jobs = jobs, missing_runs(results, chosen)
        if jobs == before and not failures:
            raise common.UserError(f"{jobs[0][0]}: its runs lack a number that a rule asks for")
    for name in args.claims:
        show(name, results)
    write_page(args, results)
    name_failures(failures)


if __name__ == "__main__":
    common.start(main, stopped="finished runs are kept; the same command goes on:")
