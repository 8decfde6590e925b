"""The league: methods of adversarial distillation and their rivals, judged side by side.

Usage    python benchmark/league.py --list              # arms, runs and minutes left
         python benchmark/league.py run --workers 2     # what is missing, then the page
         python benchmark/league.py --page              # docs/LEAGUE.md of the results, no run
Arms     Commands of robust_kd.py (benchmark/claim_list.py), run, kept and resumed as those of the
         claims: an arm that both share is run once. Same net, data and epochs for all, and the same
         teacher for all that have one.
Settings Each method has those of its paper: beta 6 (TRADES) and 5 (MART), AWP 0.01, alpha 0.8 for
         the + forms, weight 1 (IGDM), power 0.1 (IAD), temperature 2.5 to 2 and weight 0.7 to 0.95
         (ADR). Two are not from a paper: label smoothing 0.5, found with seeds 0 to 2, and the
         decay 0.98 of the weight average, which then spans 50 steps, a twentieth of the training;
         0.995, the papers' value, would span a fifth of so short a training. No other was tuned.
Numbers  After the last epoch, mean over the seeds and its 95 % t interval. Clean: all test images.
         Robust: 1,000 test images, what APGD-CE and then targeted APGD leave, in float32 at 8/255.
         With seeds 10 and 11 all of AutoAttack runs, and so it does with all seeds of the arms that
         the claims compare; how many more images FAB and Square broke is said on the page.
Rules    Fixed before the runs.
         1. Two methods differ if the 95 % t interval of the paired differences by seed excludes 0
            and their mean is at least half a point; else the page says "no difference shown".
         2. The frontier: methods than which no other has higher means in both numbers.
         3. Best epoch: highest clean plus PGD-7 accuracy on held-out training images; at@best is
            that epoch of adversarial training, and a method of its own.
         4. Teacher or method: five methods by five teachers; the spread over teachers is the
            standard deviation of the five means over methods, that over methods the one of the five
            means over teachers. The interval of their difference is the 2.5 % and 97.5 % quantile
            of 10,000 bootstrap samples of the seeds. The teacher decides more if it lies above 0,
            the method if it lies below. The same without the standard teacher, which leaves a
            student of alpha 1 without robustness.
"""

import sys
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import ROOT, claims, plots
from benchmark.claim_list import (
    BY_TEACHER,
    FIRST_SEED,
    LEAGUE,
    LEAGUE_SEEDS,
    TAUGHT_BY,
    TEACHERS,
    WITH,
)

NAMES = {  # arms of the MLP; those of the ResNet are the same behind `conv-`
    "at": "AT",
    "at@best": "AT, best epoch",
    "trades": "TRADES",
    "mart": "MART",
    "at-smooth-0.5": "AT, label smoothing",
    "at-ema-0.98": "AT, weight average",
    "at-awp": "AT, AWP",
    "adr": "ADR",
    "akd+0.8": "AKD+",
    "ard+0.8": "ARD+",
    "rslad+0.8": "RSLAD+",
    "iad": "IAD",
    "adaad": "AdaAD",
    "adaad+0.8": "AdaAD+",
    "igdm": "IGDM",
    "akd+0.8-awp": "AKD+, AWP",
}
# Methods after the paper, whose verdicts docs/robust_kd.md has too
LATER = ("adaad", "adaad+0.8", "igdm", "iad", "adr", "mart", "at-awp", "akd+0.8-awp")
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


def parse_args(argv=None):
    """The flags as a namespace."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("action", nargs="?", choices=["run"], help="run what is missing, then write the page")
    add("--list", action="store_true", help="show what is left and run nothing")
    add("--page", action="store_true", help="write the page of the results and run nothing")
    add("--workers", type=common.whole, default=2, help="number of runs at the same time")
    add("--runs", default="runs/claims", help="folder in which the runs are kept")
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


def arms_by_table():
    """{table: its arms, each once}."""
    return LEAGUE | {"teachers": tuple(dict.fromkeys(BY_TEACHER.values()))}


def missing_runs(results):
    """The (arm, seed) that have not run.

    First five seeds of all tables, of these the seeds without the whole AutoAttack, which takes as
    long as all else, before the others.
    """
    short, whole, later = [], [], []
    for table, arms in arms_by_table().items():
        for seed in seeds(table):
            jobs = short
            if seed in claims.AUTOATTACK_SEEDS:
                jobs = whole
            elif seed >= FIRST_SEED + 5:
                jobs = later
            jobs += [(arm, seed) for arm in arms]
    jobs = dict.fromkeys(short + whole + later)
    return [(arm, seed) for arm, seed in jobs if seed not in results[arm]]


def competitors(regime):
    """The names of a regime's table: its arms, and adversarial training at its best epoch."""
    arms = list(LEAGUE[regime])
    return [arms[0], f"{arms[0]}@best", *arms[1:]]


def name_of(arm):
    """What the page calls an arm: "conv-akd+0.8" -> "AKD+"."""
    return NAMES[arm.removeprefix("conv-")]


def number(results, arm, metric, seed):
    """clean_acc, robust_acc or pgd20_acc of "arm@net" with a seed, or None.

    robust_acc is what APGD-CE and targeted APGD leave. Arms that were run for the claims before
    have the number of the whole AutoAttack alone.
    """
    if metric != "robust_acc":
        return claims.value(results, arm, metric, seed)
    after_apgd = claims.value(results, arm, "apgd_acc", seed)
    return claims.value(results, arm, "aa_acc", seed) if after_apgd is None else after_apgd


def numbers(results, arm, metric, table):
    """{seed: number} of the table's seeds that have run."""
    found = {seed: number(results, arm, metric, seed) for seed in seeds(table)}
    return {seed: value for seed, value in found.items() if value is not None}


def difference(results, arm, rival, metric, table):
    """The Effect of arm - rival, paired by seed; None without two common seeds."""
    ours, theirs = (numbers(results, name, metric, table) for name in (arm, rival))
    common_seeds = [seed for seed in ours if seed in theirs]
    if arm == rival or len(common_seeds) < 2:
        return None
    return claims.effect_of([ours[seed] - theirs[seed] for seed in common_seeds])


def verdict(effect):
    """+1, -1 or 0: rule 1 of the docstring."""
    if effect is None or abs(effect.mean) < SMALLEST or effect.low <= 0 <= effect.high:
        return 0
    return 1 if effect.mean > 0 else -1


def frontier(points):
    """The names of {name: (clean, robust)} than which no other is higher in both numbers."""
    return [
        name
        for name, (clean, robust) in points.items()
        if not any(c > clean and r > robust for c, r in points.values())
    ]


def passes(arm, steps):
    """Cost of a step in forward passes of the student, with a teacher of the same size.

    A backward pass to the images counts one, to images and weights two.
    """
    arm = arm.removeprefix("conv-").partition("@")[0]
    attack = 2 * steps
    trainings = 1  # forward and backward passes of the student for its loss, at three each
    if arm in ("trades", "mart", "ard+0.8", "rslad+0.8", "iad", "igdm") or arm.endswith("awp"):
        trainings = 2
    looks = 0  # forward passes of the teacher, or of the student for targets
    if arm in ("trades", "adr"):
        looks = 1
    elif arm in WITH:
        looks = 2 if arm in ("iad", "igdm") else 1
    if arm.startswith(("adaad", "igdm")):
        attack *= 2  # through the teacher too
    return attack + 3 * trainings + looks


# ------------------------------------------------------------------------------------------------
# Teacher or method?


def teacher_table(results, metric):
    """(seeds, methods, teachers) of a number; the seeds that all cells have."""
    cells = {cell: numbers(results, arm, metric, "teachers") for cell, arm in BY_TEACHER.items()}
    complete = [seed for seed in seeds("teachers") if all(seed in runs for runs in cells.values())]
    rows = [
        [[cells[arm, teacher][seed] for teacher in TEACHERS] for arm in TAUGHT_BY]
        for seed in complete
    ]
    return np.array(rows).reshape(len(complete), len(TAUGHT_BY), len(TEACHERS))


def spreads(table):
    """(seeds, methods, teachers) -> standard deviation of the teachers' and the methods' means."""
    means = table.mean(0)
    return means.mean(0).std(ddof=1), means.mean(1).std(ddof=1)


def teacher_or_method(table, samples=10_000):
    """-> (spread over teachers, over methods, low, high): 95 % interval of their difference."""
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(samples):
        drawn = generator.integers(len(table), size=len(table))
        over_teachers, over_methods = spreads(table[drawn])
        differences.append(over_teachers - over_methods)
    low, high = np.quantile(differences, [0.025, 0.975])
    return *spreads(table), low, high


# ------------------------------------------------------------------------------------------------
# The page


def with_interval(values):
    """Mean and 95 % t interval of some shares, in points."""
    if len(values) < 2:
        return claims.percent(mean(values)) if values else "-"
    effect = claims.effect_of(list(values))
    half_width = effect.high - effect.mean
    return f"{claims.percent(effect.mean)} ± {claims.percent(half_width)}"


def difference_text(effect):
    """A paired difference in points, bold where rule 1 says that the two differ."""
    if effect is None:
        return "-"
    text = f"{100 * effect.mean:+.1f} [{claims.percent(effect.low)}, {claims.percent(effect.high)}]"
    return f"**{text}**" if verdict(effect) else text


def table_rows(results, regime):
    """Rows of a regime's table."""
    rows = []
    names = competitors(regime)
    at_best = names[1]
    akd = next(name for name in names if name.endswith("akd+0.8"))
    for arm in names:
        row = {"method": name_of(arm)}
        for title, metric in NUMBERS.items():
            row[title] = with_interval(numbers(results, arm, metric, regime).values())
        row["PGD-20"] = with_interval(numbers(results, arm, "pgd20_acc", regime).values())
        for rival, title in ((at_best, "AT, best epoch"), (akd, "AKD+")):
            for metric_title, metric in NUMBERS.items():
                effect = difference(results, arm, rival, metric, regime)
                row[f"{metric_title}, against {title}"] = difference_text(effect)
        best = arm if arm == at_best else f"{arm}@best"
        accuracies = []
        for metric in ("clean_acc", "pgd20_acc"):
            values = numbers(results, best, metric, regime).values()
            accuracies.append(claims.percent(mean(values)) if values else "-")
        row["best epoch: clean, PGD-20"] = ", ".join(accuracies)
        row["passes"] = passes(arm, STEPS[regime])
        row["seeds"] = len(numbers(results, arm, "robust_acc", regime))
        rows.append(row)
    return rows


def points_of(results, regime):
    """{arm: (clean, robust)} means of those that have run with a seed at least."""
    points = {}
    for arm in competitors(regime):
        values = [numbers(results, arm, metric, regime).values() for metric in NUMBERS.values()]
        if all(values):
            points[arm] = tuple(mean(accuracies) for accuracies in values)
    return points


def compared(results, regime, rival, metric):
    """{+1, 0, -1: [names of the methods whose verdict against the rival it is]}."""
    groups = {1: [], 0: [], -1: []}
    for arm in competitors(regime):
        effect = difference(results, arm, rival, metric, regime)
        if effect is not None:
            groups[verdict(effect)].append(name_of(arm))
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
        points = points_of(results, regime)
        at_best = competitors(regime)[1]
        if at_best not in points:
            continue
        akd = "conv-akd+0.8" if regime != "MLP" else "akd+0.8"
        lines.append(
            f"- **{regime}.** On the frontier: {listed(ordered(frontier(points), points))}."
        )
        for rival in (at_best, akd):
            groups = compared(results, regime, rival, "robust_acc")
            text = f"  More robust than {name_of(rival)}: {listed(groups[1])};"
            lines.append(f"{text} less robust: {listed(groups[-1])}.")
    table = teacher_table(results, "robust_acc")
    if len(table) > 1:
        lines.append(f"- **Teacher or method?** {teacher_sentence(table)}")
    return lines


def ordered(arms, points):
    """Names of arms from the most robust to the most accurate one."""
    return [name_of(arm) for arm in sorted(arms, key=lambda arm: -points[arm][1])]


def teacher_sentence(table):
    """What rule 4 says of (seeds, methods, teachers), with and without the standard teacher."""
    sentences = []
    without_standard = table[:, :, [name != "standard" for name in TEACHERS]]
    for part, cells in (
        ("All five teachers", table),
        ("Without the standard one", without_standard),
    ):
        over_teachers, over_methods, low, high = teacher_or_method(cells)
        decides = "neither decides more"
        if low > 0:
            decides = "the teacher decides more"
        elif high < 0:
            decides = "the method decides more"
        spread = (
            f"{100 * over_teachers:.1f} points over teachers, {100 * over_methods:.1f} over methods"
        )
        interval = f"difference {claims.percent(low)} to {claims.percent(high)}"
        sentences.append(f"{part}: robust accuracy spreads by {spread} ({interval}): {decides}.")
    return " ".join(sentences)


def sentence(results, arm):
    """What the league says of a method, in one sentence for both regimes."""
    parts = []
    for regime in LEAGUE:
        prefix = "" if regime == "MLP" else "conv-"
        rival = f"{prefix}akd+0.8" if arm == "at@best" else f"{prefix}at@best"
        words = {1: "more {}", 0: "no difference in {} shown", -1: "less {}"}
        texts = []
        for title, metric in {"robust": "robust_acc", "accurate": "clean_acc"}.items():
            effect = difference(results, prefix + arm, rival, metric, regime)
            if effect is None:
                continue
            noun = {"robust": "robustness", "accurate": "accuracy"}[title]
            word = words[verdict(effect)].format(noun if verdict(effect) == 0 else title)
            texts.append(f"{word} ({100 * effect.mean:+.1f})")
        if texts:
            parts.append(f"{regime}: {', '.join(texts)}")
    against = f" (against {name_of(rival)})" if arm == "at@best" else ""
    return f"**{NAMES[arm]}**{against}. {'; '.join(parts) or 'Not run yet'}."


def teacher_rows(results):
    """Rows of the table method by teacher: robust and clean, in percent."""
    rows = []
    for arm in TAUGHT_BY:
        row = {"method": name_of(arm)}
        for teacher, title in TEACHER_NAMES.items():
            cells = []
            for metric in ("robust_acc", "clean_acc"):
                values = numbers(results, BY_TEACHER[arm, teacher], metric, "teachers").values()
                cells.append(claims.percent(mean(values)) if values else "-")
            row[title] = " / ".join(cells)
        rows.append(row)
    return rows


def autoattack_text(results):
    """How many images FAB and Square broke that APGD-CE and targeted APGD had left."""
    nets = broken = 0
    for arms in arms_by_table().values():
        for arm in dict.fromkeys(arms):
            for run in results[arm].values():
                accuracies = run["nets"]["student"]
                if "aa_acc" in accuracies and "apgd_acc" in accuracies:
                    nets += 1
                    lost = accuracies["apgd_acc"] - accuracies["aa_acc"]
                    broken += round(claims.AUTOATTACK_IMAGES * lost)
    if not nets:
        return "No net has both numbers yet."
    return (
        f"In {nets} nets all of AutoAttack has run: FAB and Square broke {broken} of the "
        f"{nets * claims.AUTOATTACK_IMAGES:,} images beyond what the two attacks had broken."
    )


PAGE = """# The league of adversarial distillation

Methods of adversarial distillation and their rivals without a teacher, with the same net, the
same images, the same epochs and, where there is one, the same teacher. Who wins, and is it the
teacher or the method?

{findings}

{figure}```
python benchmark/prepare.py cifar10-16     # makes data/cifar10-16.npz from CIFAR-10
python benchmark/league.py --list          # what is left, and how long it takes
python benchmark/league.py run             # goes on where it stopped
```

Written by `benchmark/league.py` from `benchmark/claims/*.json`. {autoattack}

These are small nets on 1,000 and 2,000 images. They overfit robustly, as a ResNet-18 does on all of
CIFAR-10 after its first drop of the learning rate, and so they show what a method does against it.
They say nothing about the size of its gain in a large net.

## Rules

{rules}

{regimes}## Method by teacher

{teachers}

{teacher_figure}Robust / clean accuracy of the student of the MLP in percent, {teacher_seeds}:

{teacher_table}

## One sentence for each method

Against adversarial training at its best epoch on held-out images (AT, best epoch), unless another
rival is named; differences in points, paired by seed.

{sentences}
"""

REGIME = """## {regime}

{table}

Accuracies in percent, mean ± half of the 95 % t interval over the seeds. Differences paired by
seed, in points with their interval; bold: they differ by rule 1. Passes: forward passes of the
student that a training step costs, with a teacher of its size
([how they are counted](robust_kd.md#after-the-paper)).

"""


def rules_text():
    """The parts Settings, Numbers and Rules of the docstring as Markdown."""
    text = __doc__[__doc__.index("Settings") :]
    lines = []
    for line in text.splitlines():
        head, body = line[:9].strip(), line[9:].strip()
        if head:
            lines.append(f"\n**{head}.** {body}")
        elif body[:2] in ("1.", "2.", "3.", "4."):
            lines.append(f"\n{body}" if body[:2] == "1." else body)
        else:
            lines.append(body)
    return "\n".join(lines).strip()


def draw(results, docs):
    """Write league.png and league_teachers.png -> the Markdown of both, "" for one without results.

    Without matplotlib both are "".
    """
    panels = {}
    for regime in LEAGUE:
        points = points_of(results, regime)
        lines = []
        for arm in points:
            effects = []
            for metric in NUMBERS.values():
                values = list(numbers(results, arm, metric, regime).values())
                effects.append(claims.effect_of(values) if len(values) > 1 else None)
            taught = arm.removeprefix("conv-") in WITH
            lines.append((name_of(arm), points[arm], effects, taught))
        if lines:
            panels[regime] = lines, [points[arm] for arm in frontier(points)]
    figure = teacher_figure = ""
    if panels and plots.draw_frontiers(docs / "league.png", panels):
        text = "Clean against robust accuracy of all methods, with 95 % intervals"
        figure = f"![{text}](league.png)\n\n"
    grids = {}
    for title, metric in NUMBERS.items():
        table = teacher_table(results, metric)
        if len(table):
            grids[f"{title} accuracy, %"] = 100 * table.mean(0)
    rows, columns = [name_of(arm) for arm in TAUGHT_BY], list(TEACHER_NAMES.values())
    if grids and plots.draw_grids(docs / "league_teachers.png", grids, rows, columns):
        text = "Robust and clean accuracy of five methods with five teachers"
        teacher_figure = f"![{text}](league_teachers.png)\n\n"
    return figure, teacher_figure


def write_page(args, results):
    """Write docs/LEAGUE.md, its figures, and the verdicts in docs/robust_kd.md."""
    docs = Path(args.docs)
    figure, teacher_figure = draw(results, docs)
    regimes = ""
    for regime in LEAGUE:
        regimes += REGIME.format(regime=regime, table=claims.markdown(table_rows(results, regime)))
    table = teacher_table(results, "robust_acc")
    text = PAGE.format(
        figure=figure,
        teacher_figure=teacher_figure,
        findings="\n".join(findings(results)) or "Not run yet.",
        autoattack=autoattack_text(results),
        rules=rules_text(),
        regimes=regimes,
        teachers=teacher_sentence(table) if len(table) > 1 else "Not run yet.",
        teacher_seeds=f"{len(table)} seeds that all cells have",
        teacher_table=claims.markdown(teacher_rows(results)),
        sentences="\n".join(f"- {sentence(results, arm)}" for arm in NAMES),
    )
    claims.write_text(docs / "LEAGUE.md", text.rstrip() + "\n")
    lines = [f"- {sentence(results, arm)}" for arm in LATER]
    introduction = (
        "In the [league](LEAGUE.md), against adversarial training at its best epoch, in points:\n\n"
    )
    claims.replace_between("league", docs / "robust_kd.md", introduction + "\n".join(lines))
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
        claims.run_jobs(missing_runs(results), args)
        results = claims.read_results(args.results)
    write_page(args, results)


if __name__ == "__main__":
    common.start(main, stopped="finished runs are kept; the same command goes on:")
