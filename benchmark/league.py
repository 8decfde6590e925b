"""The league: methods of adversarial distillation and their rivals, judged side by side.

Usage    python benchmark/league.py --list              # runs and minutes left
         python benchmark/league.py run --workers 2     # what is missing, then the page
         python benchmark/league.py --page              # docs/LEAGUE.md of the results, no run
Arms     Commands of robust_kd.py (benchmark/claim_list.py), run, kept and resumed as those of the
         claims: an arm that both share is run once. Same net, data and epochs of the student for
         all, and the same teacher for all that have one; its training comes on top of the epochs.
Page     Is written when all runs are there; it says the settings and the rules, which were fixed
         before the runs. What was added later is marked.
"""

import sys
import textwrap
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import ROOT, claims, plots
from benchmark.claim_list import (
    BY_TEACHER,
    FIRST_SEED,
    LEAGUE,
    LEAGUE_SEEDS,
    LOSS_OF,
    TAUGHT,
    TEACHERS,
)


class Cost(NamedTuple):
    """What a step of a method runs beside its attack."""

    trainings: int = 1  # forward and backward passes of the student for its loss
    looks: int = 0  # forward passes of the teacher, or of the student, for targets
    through_teacher: bool = False  # whether the attack goes through the teacher too


class Method(NamedTuple):
    """A method as the page shows it."""

    name: str
    about: str
    cost: Cost
    later: bool = False  # not in the paper: docs/robust_kd.md has it too


METHODS = {  # arms of the MLP; those of the ResNet are the same behind `conv-`
    "at": Method("AT", "adversarial training, Madry et al. 2018", Cost()),
    "at@best": Method("AT at best epoch", "stopped by held-out images, Rice et al. 2020", Cost()),
    "trades": Method(
        "TRADES",
        "cross-entropy on x, and KL from x to x', Zhang et al. 2019",
        Cost(trainings=2, looks=1),
    ),
    "mart": Method(
        "MART",
        "more weight on images that are misclassified, Wang et al. 2020",
        Cost(trainings=2),
        later=True,
    ),
    "at-smooth-0.5": Method(
        "AT with label smoothing",
        "half of the label's probability spread over all classes",
        Cost(),
    ),
    "at-ema-0.98": Method("AT with EMA", "moving average of the weights", Cost()),
    "at-ema-0.98@best": Method(
        "AT with EMA at best epoch", "the same, stopped by held-out images", Cost()
    ),
    "at-awp": Method(
        "AT with AWP",
        "gradient at weights where the loss is larger, Wu et al. 2020",
        Cost(trainings=2),
        later=True,
    ),
    "adr": Method(
        "ADR",
        "labels corrected by the EMA's answers, no teacher, Wu et al. 2024",
        Cost(looks=1),
        later=True,
    ),
    "akd+0.8": Method(
        "AKD+",
        "teacher's answers to x' mixed with labels, Maroto et al. 2022",
        Cost(looks=1),
    ),
    "ard+0.8": Method(
        "ARD+",
        "student at x' like the teacher at x, mixed with labels, Goldblum et al. 2020",
        Cost(trainings=2, looks=1),
    ),
    "rslad+0.8": Method(
        "RSLAD+",
        "the same with an attack away from the teacher, Zi et al. 2021",
        Cost(trainings=2, looks=1),
    ),
    "iad": Method(
        "IAD",
        "teacher trusted where it is right, else the student itself, Zhu et al. 2022",
        Cost(trainings=2, looks=2),
        later=True,
    ),
    "adaad": Method(
        "AdaAD",
        "attack on the gap between student and teacher, Huang et al. 2023",
        Cost(looks=1, through_teacher=True),
        later=True,
    ),
    "adaad+0.8": Method(
        "AdaAD+",
        "the same, mixed with labels; ours",
        Cost(looks=1, through_teacher=True),
        later=True,
    ),
    "igdm": Method(
        "IGDM",
        "AdaAD, and input gradients matched to the teacher's, Lee et al. 2025",
        Cost(trainings=2, looks=2, through_teacher=True),
        later=True,
    ),
    "akd+0.8-awp": Method(
        "AKD+ with AWP",
        "both; ours",
        Cost(trainings=2, looks=1),
        later=True,
    ),
}
TEACHER_NAMES = {
    "early": "stopped early",
    "late": "trained to the end",
    "weak": "weakly robust (2/255)",
    "standard": "standard",
    "wide": "twice as wide, stopped early",
}
STEPS = {"MLP": 7, "narrow ResNet-18": 3}  # of the PGD in training
NUMBERS = {"clean": "clean_acc", "robust": "robust_acc"}
SMALLEST = 0.005  # half a point, as for the claims
AT_CHANCE = 0.15  # the clean accuracy, with ten classes, below which a net has learned little


def parse_args(argv=None):
    """The flags as a namespace."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("action", nargs="?", choices=["run"], help="run what is missing, then write the page")
    add("--list", action="store_true", help="show what is left and run nothing")
    add("--page", action="store_true", help="write the page of the results and run nothing")
    add("--workers", type=common.whole, default=2, help="number of runs at the same time")
    add("--runs", default=str(ROOT / "runs/claims"), help="folder in which the runs are kept")
    add("--results", default=str(ROOT / "benchmark/claims"), help="folder of the results")
    add("--docs", default=str(ROOT / "docs"), help="folder of LEAGUE.md and its figures")
    args = parser.parse_args(argv)
    if not (args.action or args.list or args.page):
        parser.error("expected run, --list or --page")
    return args


# ------------------------------------------------------------------------------------------------
# What is in the league, and what it has given


def seeds(table):
    """The seeds of a table of the league."""
    return range(FIRST_SEED, FIRST_SEED + LEAGUE_SEEDS[table])


def names_by_table():
    """{table: its "arm@net"}."""
    return LEAGUE | {"teachers": tuple(BY_TEACHER.values())}


def arms_by_table():
    """{table: its arms, each once}."""
    return {
        table: tuple(dict.fromkeys(claims.split(name)[0] for name in names))
        for table, names in names_by_table().items()
    }


def missing_runs(results):
    """The (arm, seed) that have not run, table by table and arm by arm, as claims.jobs_of."""
    jobs = []
    for table, names in names_by_table().items():
        for name in names:
            for seed in seeds(table):
                if claims.value(results, name, "robust_acc", seed) is None:
                    jobs.append((claims.split(name)[0], seed))
    return list(dict.fromkeys(jobs))


def method_of(arm):
    """The Method of "arm" or "arm@best", in either net."""
    return METHODS[arm.removeprefix("conv-")]


def name_of(arm):
    """What the page calls an arm: "conv-akd+0.8" -> "AKD+"."""
    return method_of(arm).name


def numbers(results, arm, metric, table):
    """clean_acc, robust_acc or pgd20_acc of "arm@net" for each of the seeds of a table."""
    return [claims.value(results, arm, metric, seed) for seed in seeds(table)]


def difference(results, arm, rival, metric, table):
    """The Effect of arm - rival, paired by seed."""
    ours, theirs = (numbers(results, name, metric, table) for name in (arm, rival))
    return claims.effect_of([a - b for a, b in zip(ours, theirs)])


def verdicts(results, regime, rival, metric):
    """{arm: +1, 0 or -1} against a rival in a regime: rule 1."""
    others = [arm for arm in LEAGUE[regime] if arm != rival]
    effects = {arm: difference(results, arm, rival, metric, regime) for arm in others}
    significant = claims.holm({arm: effect.p for arm, effect in effects.items()})
    called = {}
    for arm, effect in effects.items():
        called[arm] = 0
        if arm in significant and abs(effect.mean) >= SMALLEST:
            called[arm] = 1 if effect.mean > 0 else -1
    return called


def points_of(results, regime, without=None):
    """{arm: (clean, robust)}: means over the seeds but `without`; rounded: ties stay ties."""
    kept = [number for number, seed in enumerate(seeds(regime)) if seed != without]
    points = {}
    for arm in LEAGUE[regime]:
        columns = [numbers(results, arm, metric, regime) for metric in NUMBERS.values()]
        points[arm] = tuple(round(mean(column[k] for k in kept), 9) for column in columns)
    return points


def frontier(points):
    """The names of {name: (clean, robust)} than which no other is higher in both numbers."""
    return [
        name
        for name, (clean, robust) in points.items()
        if not any(c > clean and r > robust for c, r in points.values())
    ]


def frontier_counts(results, regime):
    """{arm: on how many frontiers it is, with each of the seeds left out in turn}."""
    counts = Counter()
    for seed in seeds(regime):
        counts.update(frontier(points_of(results, regime, without=seed)))
    return counts


def by_robustness(arms, points):
    """The arms by their robust accuracy, the highest first."""
    return sorted(arms, key=lambda arm: -points[arm][1])


def passes(arm, steps):
    """Cost of a step in forward passes of the student, with a teacher of the same size.

    A backward pass to the images counts one, to images and weights two.
    """
    cost = method_of(arm).cost
    nets_attacked = 2 if cost.through_teacher else 1
    return 2 * steps * nets_attacked + 3 * cost.trainings + cost.looks


# ------------------------------------------------------------------------------------------------
# Teacher or method?


def teacher_table(results, metric):
    """(seeds, methods, teachers) of an accuracy."""
    columns = [
        [numbers(results, BY_TEACHER[arm, teacher], metric, "teachers") for teacher in TEACHERS]
        for arm in LOSS_OF
    ]
    return np.array(columns).transpose(2, 0, 1)


def spreads(table):
    """(seeds, methods, teachers) -> standard deviation of the teachers' and the methods' means."""
    means = table.mean(0)
    return means.mean(0).std(ddof=1), means.mean(1).std(ddof=1)


def teacher_or_method(table):
    """-> (spread over teachers, over methods, Effect of their difference): rule 4.

    A bootstrap of five seeds would be too sure: in simulated tables with equal spreads it called
    one of the two the larger in 16 to 24 % of all cases, the jackknife in 5 to 7 %.
    """
    over_teachers, over_methods = spreads(table)
    n = len(table)
    pseudo_values = []
    for left_out in range(n):
        without = spreads(np.delete(table, left_out, axis=0))
        everything = n * (over_teachers - over_methods)
        pseudo_values.append(everything - (n - 1) * (without[0] - without[1]))
    return over_teachers, over_methods, claims.effect_of(pseudo_values)


# ------------------------------------------------------------------------------------------------
# The page


def interval(effect):
    """The 95 % t interval of an Effect, in points."""
    return f"[{claims.percent(effect.low)}, {claims.percent(effect.high)}]"


def with_interval(values):
    """Mean of some shares and its 95 % t interval, in percent."""
    effect = claims.effect_of(values)
    return f"{claims.percent(effect.mean)} {interval(effect)}"


def difference_text(effect, differs=False):
    """A paired difference in points, bold where rule 1 says that the two differ."""
    text = f"{100 * effect.mean:+.1f} {interval(effect)}"
    return f"**{text}**" if differs else text


def rivals(regime):
    """The two methods that all are compared with: AT at its best epoch, and AKD+."""
    prefix = "" if regime == "MLP" else "conv-"
    return f"{prefix}at@best", f"{prefix}akd+0.8"


def accuracy_rows(results, regime):
    """Rows of a regime's first table: what each method reaches, and what it costs."""
    rows = []
    for arm in LEAGUE[regime]:
        row = {"method": name_of(arm)}
        for title, metric in (NUMBERS | {"PGD-20": "pgd20_acc"}).items():
            row[title] = with_interval(numbers(results, arm, metric, regime))
        best = arm if arm.endswith("@best") else f"{arm}@best"
        accuracies = [
            numbers(results, best, metric, regime) for metric in ("clean_acc", "pgd20_acc")
        ]
        row["best epoch: clean, PGD-20"] = ", ".join(claims.percent(mean(a)) for a in accuracies)
        row["passes"] = passes(arm, STEPS[regime])
        if arm.removeprefix("conv-") in TAUGHT:
            row["passes"] = f"{row['passes']} + {passes('at', STEPS[regime]) / 3:.1f}"
        rows.append(row)
    return rows


def difference_rows(results, regime):
    """Rows of a regime's second table: each method against the two rivals, paired by seed."""
    rows = [{"method": name_of(arm)} for arm in LEAGUE[regime]]
    for rival in rivals(regime):
        for title, metric in NUMBERS.items():
            called = verdicts(results, regime, rival, metric)
            for arm, row in zip(LEAGUE[regime], rows):
                effect = difference(results, arm, rival, metric, regime)
                text = "-" if arm == rival else difference_text(effect, called[arm])
                row[f"{title}, against {name_of(rival)}"] = text
    return rows


def compared(results, regime, rival, metric):
    """{+1, 0, -1: [names of the methods whose verdict against the rival it is]}."""
    groups = {1: [], 0: [], -1: []}
    for arm, verdict in verdicts(results, regime, rival, metric).items():
        groups[verdict].append(name_of(arm))
    return groups


def listed(names):
    """A list of names as words."""
    if len(names) < 2:
        return "".join(names) or "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def findings(results):
    """The lines of the page's first screen; they say what the tables say."""
    lines = []
    for regime in LEAGUE:
        lines.append(f"- **{regime}.** {LEAGUE_SEEDS[regime]} seeds.")
        points, counts = points_of(results, regime), frontier_counts(results, regime)
        best = by_robustness(frontier(points), points)
        names = [f"{name_of(arm)} ({counts[arm]})" for arm in best]
        line = "  - No other method is better in both numbers than these, the most robust first:"
        line += f" {listed(names)}. In brackets: how often, if each seed is left out in turn."
        others = by_robustness([arm for arm in counts if arm not in best], points)
        others = [f"{name_of(arm)} ({counts[arm]})" for arm in others]
        lines.append(f"{line} Only then among them: {listed(others)}.")
        for rival in rivals(regime):
            groups = compared(results, regime, rival, "robust_acc")
            text = f"  - More robust than {name_of(rival)}: {listed(groups[1])};"
            lines.append(f"{text} less robust: {listed(groups[-1])}.")
        low = [name_of(arm) for arm, (_, robust) in points.items() if robust < 0.1]
        if low:
            text = "  - A net that answers every image with one class has 10.0 in both numbers;"
            lines.append(f"{text} less robust than that: {listed(low)}.")
        for arm in points:
            clean = numbers(results, arm, "clean_acc", regime)
            failed = sum(accuracy < AT_CHANCE for accuracy in clean)
            if failed:
                text = f"  - {name_of(arm)}: {failed} of {len(clean)} nets learned next to nothing"
                lines.append(f"{text} (clean accuracy below 15 %); the means include them.")
    answers = "; ".join(f"{row['teachers']}: {row['more']}" for row in decision_rows(results))
    text = f"What moves robust accuracy more? {answers}. [The table](#method-by-teacher)."
    lines.append(f"- **Teacher or method?** {text}")
    return lines


def readme_text(results):
    """The part of the README: the picture, and the frontier of each regime."""
    begin = (
        f"**Which method?** The [league](docs/LEAGUE.md) compares {len(METHODS)} methods and "
        "stopping rules, up to 2025, in two small nets. Robust: still right after APGD, a strong "
        "attack; EMA: moving average of the weights; on the frontier: no other is better in both "
        "numbers. The lead of the most robust is overstated: it was picked for being highest."
    )
    items = []
    for regime in LEAGUE:
        points, counts = points_of(results, regime), frontier_counts(results, regime)
        best = by_robustness(frontier(points), points)
        near = by_robustness([arm for arm in counts if arm not in best], points)
        near = listed([name_of(arm) for arm in near]) if near else ""
        text = f"**{regime}**, {LEAGUE_SEEDS[regime]} seeds: on the frontier are "
        text += listed([name_of(arm) for arm in best])
        text += f" (if one seed is left out, perhaps {near} too)." if near else "."
        akd = rivals(regime)[1]
        if best[0] != akd:
            gains = []
            for metric in ("robust_acc", "clean_acc"):
                effect = difference(results, best[0], akd, metric, regime)
                gains.append(difference_text(effect))
            text += f" The most robust of them, {name_of(best[0])}, against AKD+ of the paper: "
            text += f"{gains[0]} points robust, {gains[1]} clean."
        items.append(text)
    figure = "![Clean and robust accuracy of all methods](docs/league.png)"
    return "\n".join([wrapped(begin), "", figure, "", *[wrapped(f"- {i}", "  ") for i in items]])


def wrapped(text, indent=""):
    """A paragraph of the README in lines of at most 110 characters."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 110, subsequent_indent=indent, **options)


def teacher_parts(results):
    """{which teachers: their (seeds, methods, teachers) of the robust accuracy}: rule 4."""
    table, names = teacher_table(results, "robust_acc"), list(TEACHERS)
    parts = {
        "all five teachers": names,
        "all but the standard one": [name for name in names if name != "standard"],
        "the two that were stopped early": [name for name in names if name in ("early", "wide")],
    }
    return {
        part: table[:, :, [names.index(name) for name in chosen]] for part, chosen in parts.items()
    }


def decision_rows(results):
    """Rows of what decides more, the teacher or the method: rule 4, of all teachers and of some."""
    rows = []
    for part, cells in teacher_parts(results).items():
        over_teachers, over_methods, effect = teacher_or_method(cells)
        more = "not shown"
        if effect.low > 0:
            more = "the teacher"
        elif effect.high < 0:
            more = "the method"
        between = interval(effect)
        if cells.shape[2] < 3:  # the deviation of two means comes out too small
            more, between = "too few for an answer", "-"
        rows.append(
            {
                "teachers": part,
                "spread over teachers": claims.percent(over_teachers),
                "spread over methods": claims.percent(over_methods),
                "difference [95 %]": between,
                "more": more,
            }
        )
    return rows


def sentence(results, arm):
    """What the league says of a method, in one sentence for both regimes."""
    parts = []
    for regime in LEAGUE:
        at_best, akd = rivals(regime)
        rival = akd if arm == "at@best" else at_best
        ours = arm if regime == "MLP" else f"conv-{arm}"
        texts = []
        for metric, adjective, noun in (
            ("robust_acc", "robust", "robustness"),
            ("clean_acc", "accurate", "accuracy"),
        ):
            effect = difference(results, ours, rival, metric, regime)
            verdict = verdicts(results, regime, rival, metric)[ours]
            if verdict:
                more = "more" if verdict > 0 else "less"
                texts.append(f"{100 * abs(effect.mean):.1f} points {more} {adjective}")
                continue
            difference_there = f"no difference in {noun} shown"
            if not effect.low <= 0 <= effect.high:
                difference_there = f"no difference in {noun} left by the correction"
                if abs(effect.mean) < SMALLEST:
                    difference_there = f"less than half a point of {noun} apart"
            texts.append(f"{difference_there} ({difference_text(effect)})")
        parts.append(f"{regime}: {', '.join(texts)}")
    method = METHODS[arm]
    against = f" (against {name_of(rivals('MLP')[1])})" if arm == "at@best" else ""
    return f"**{method.name}** ({method.about}){against}. {'; '.join(parts)}."


def teacher_rows(results):
    """Rows of the table method by teacher: robust and clean, in percent, of the common seeds."""
    rows = []
    for arm in LOSS_OF:
        row = {"method": name_of(arm)}
        for teacher, title in TEACHER_NAMES.items():
            cells = []
            for metric in ("robust_acc", "clean_acc"):
                values = numbers(results, BY_TEACHER[arm, teacher], metric, "teachers")
                cells.append(with_interval(values))
            row[title] = " / ".join(cells)
        rows.append(row)
    return rows


def autoattack_text(results):
    """How many images FAB and Square broke that APGD-CE and targeted APGD had left."""
    nets = left = broken = 0
    for arm in dict.fromkeys(arm for arms in arms_by_table().values() for arm in arms):
        for run in results[arm].values():
            for accuracies in run["nets"].values():  # the students, and some of their teachers
                if "aa_acc" in accuracies and "apgd_acc" in accuracies:
                    nets += 1
                    lost = accuracies["apgd_acc"] - accuracies["aa_acc"]
                    broken += round(claims.AUTOATTACK_IMAGES * lost)
                    left += round(claims.AUTOATTACK_IMAGES * accuracies["apgd_acc"])
    return (
        f"{nets} nets have been through all of AutoAttack: FAB and Square broke {broken} of the "
        f"{left:,} images that APGD-CE and targeted APGD had left."
    )


PAGE = """# The league of adversarial distillation

Methods of adversarial distillation and their rivals without a teacher, with the same net, the
same images, the same epochs and, where there is one, the same teacher. Who wins, and is it the
teacher or the method? AT is adversarial training;
[what each method does](#one-sentence-for-each-method).

{figure}{findings}

```
python benchmark/prepare.py cifar10-16     # makes data/cifar10-16.npz from CIFAR-10
python benchmark/league.py --list          # what is left, and how long it takes
python benchmark/league.py run             # goes on where it stopped
```

Written by `benchmark/league.py` from `benchmark/claims/*.json`. {autoattack}

These are small nets on 1,000 and 2,000 images. They overfit robustly, as a ResNet-18 does on all of
CIFAR-10 after its first drop of the learning rate, and so they show what a method does against it.
They say nothing about the size of its gain in a large net.

## Rules

**Settings.** Each method has those of its paper: beta 6 (TRADES) and 5 (MART), AWP 0.01, alpha 0.8
for AKD+ and RSLAD+, weight 1 (IGDM), power 0.1 and the start after three tenths of the epochs
(IAD), temperature 2.5 to 2 and weight 0.7 to 0.95 (ADR). ARD+ has 0.8 too, where its paper has 0.2;
AdaAD+ is ours. Net, images, epochs, learning rates, the epoch at which the teacher is stopped and
label smoothing 0.5 are of no paper. They were found with seeds 0 to 9 in pilots with AT, AKD+ and
smoothing in the MLP, which looked at test images too: these three have an advantage. The weight
average has the decay 0.98, which spans 50 steps, a twentieth of the training of the MLP: with 0.995
the average of ADR came too late in a first run of each method but TRADES (seed 7). No other setting
was tuned.

**Numbers.** After the last epoch, mean over the seeds and its 95 % t interval. Clean and PGD-20:
4,000 test images (MLP) or 2,000 (ResNet). Robust: 1,000 of them, what APGD-CE and then targeted
APGD leave, in float32 at 8/255. With seeds 10 and 11 FAB and Square follow.

**Rules.**

1. Two methods differ if the mean of their differences, paired by seed, is at least half a point,
   and a two-sided t test at 5 % excludes a mean of 0, after Holm's correction over all methods of
   the column. Other images are not covered. The correction was added when the MLP had run.
2. The frontier: the methods that no other beats in both means. We also leave out each seed in turn
   and count how often a method is on the frontier then.
3. Best epoch: highest clean plus PGD-7 accuracy on held-out training images, the first of equal
   ones (in 5 of 690 runs rounding has made it a later one). AT at its best epoch is a method of
   its own. So is AT with a weight average (EMA) at its best epoch, since the MLP has run: under
   PGD-20 it was ahead of AT at its best epoch.
4. Teacher or method: five methods by five teachers in the MLP. The spread over teachers is the
   standard deviation of the five means over methods, that over methods the one of the five means
   over teachers. Their difference has a 95 % interval by the jackknife over seeds (pseudo-values,
   Student's t). The teacher decides more if it lies above 0, the method if below. Also without the
   standard teacher, and, since the runs, with the two alone that are robust and were stopped early:
   the other three are poor on purpose. Two are too few for an answer. It is about these teachers
   and methods.

**Tables.** Accuracies in percent, their means and 95 % t intervals over the seeds. Differences
paired by seed, in points with their interval; bold: they differ by rule 1. Passes: forward passes
of the student that a training step costs, with a teacher of its size
([how they are counted](robust_kd.md#other-methods)); after the plus what the training of the
teacher adds, a third of the student's epochs.

{regimes}## Method by teacher

{teachers}{teacher_figure}Robust / clean accuracy of the student, an MLP, in percent, mean and 95 %
t interval over the seeds:

{teacher_table}

## One sentence for each method

Against AT at its best epoch on held-out images, unless another rival is named; differences in
points, paired by seed.

{sentences}
"""

# Under the heading of the table method by teacher
DECISIONS = """MLP, {seeds} seeds, five methods. A spread is the standard deviation of the mean
robust accuracies, in points; the interval is that of the difference of the two spreads (rule 4).
Three of the five teachers were made poor on purpose, so that the first two answers are no wonder;
the last was asked after the runs.

{table}

"""


def draw(results, docs):
    """Write league.png and league_teachers.png -> the Markdown of both.

    Without matplotlib those of before stay.
    """
    panels, grids = {}, {}
    for regime in LEAGUE:
        points = points_of(results, regime)
        lines = []
        for arm, point in points.items():
            columns = [numbers(results, arm, metric, regime) for metric in NUMBERS.values()]
            taught = arm.removeprefix("conv-") in TAUGHT
            lines.append((name_of(arm), point, [claims.effect_of(c) for c in columns], taught))
        panels[regime] = lines, [points[arm] for arm in frontier(points)]
    drawn = plots.draw_frontiers(docs / "league.png", panels)
    text = "Clean against robust accuracy of all methods, with 95 % intervals (wide ones are cut)"
    figure = claims.figure_link(drawn, docs / "league.png", text)
    for title, metric in (("robust", "robust_acc"), ("clean", "clean_acc")):
        grids[f"{title} accuracy, %"] = 100 * teacher_table(results, metric).mean(0)
    rows, columns = [name_of(arm) for arm in LOSS_OF], list(TEACHER_NAMES.values())
    drawn = plots.draw_grids(docs / "league_teachers.png", grids, rows, columns)
    text = "Robust and clean accuracy of five methods with five teachers"
    teacher_figure = claims.figure_link(drawn, docs / "league_teachers.png", text)
    return figure, teacher_figure


def write_page(args, results):
    """Write docs/LEAGUE.md and its figures; a UserError if runs are missing."""
    missing = missing_runs(results)
    if missing:
        raise common.UserError(f"{len(missing)} runs are missing; `league.py run` runs them")
    docs = Path(args.docs)
    figure, teacher_figure = draw(results, docs)
    regimes = ""
    for regime in LEAGUE:
        regimes += f"## {regime}\n\n{LEAGUE_SEEDS[regime]} seeds.\n\n"
        regimes += f"{claims.markdown(accuracy_rows(results, regime))}\n\nDifferences:\n\n"
        regimes += f"{claims.markdown(difference_rows(results, regime))}\n\n"
    table = claims.markdown(decision_rows(results))
    teachers = DECISIONS.format(seeds=LEAGUE_SEEDS["teachers"], table=table)
    text = PAGE.format(
        figure=figure,
        teacher_figure=teacher_figure,
        findings="\n".join(findings(results)),
        autoattack=autoattack_text(results),
        regimes=regimes,
        teachers=teachers,
        teacher_table=claims.markdown(teacher_rows(results)),
        sentences="\n".join(f"- {sentence(results, arm)}" for arm in METHODS),
    )
    claims.write_text(docs / "LEAGUE.md", text.rstrip() + "\n")
    later = [f"- {sentence(results, arm)}" for arm in METHODS if METHODS[arm].later]
    claims.replace_between("league", docs / "robust_kd.md", "\n".join(later))
    claims.replace_between("league", docs.resolve().parent / "README.md", readme_text(results))
    print(f"written: {docs / 'LEAGUE.md'}", flush=True)


def list_rows(results):
    """Rows of --list: each table, its runs that are left, and their minutes of one worker."""
    rows = []
    missing = set(missing_runs(results))
    for table, arms in arms_by_table().items():
        jobs = {(arm, seed) for arm in arms for seed in seeds(table)} & missing
        measured = [run["minutes"] for arm in arms for run in results[arm].values()]
        minutes = f"{len(jobs) * mean(measured):.0f}" if measured else "-"
        rows.append({"table": table, "arms": len(arms), "runs left": len(jobs), "minutes": minutes})
    return rows


def main(argv=None):
    """Run what is missing, or say what it is; write the page."""
    args = parse_args(argv)
    results = claims.read_results(args.results)
    if args.list:
        print(common.table(list_rows(results)))
        return
    if args.action == "run":
        failures = claims.run_jobs(missing_runs(results), args)
        results = claims.read_results(args.results)
        claims.write_page(args, results)  # some arms belong to claims too
        claims.name_failures(failures)
    write_page(args, results)


if __name__ == "__main__":
    common.start(main, stopped="finished runs are kept; the same command goes on:")
