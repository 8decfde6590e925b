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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import ROOT, claims
from benchmark.claim_list import BY_TEACHER, FIRST_SEED, LEAGUE, LEAGUE_SEEDS


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


def seeds(table):
    """The seeds of a table of the league."""
    return range(FIRST_SEED, FIRST_SEED + LEAGUE_SEEDS[table])


def arms_by_table():
    """{table: its arms, each once}."""
    return LEAGUE | {"teachers": tuple(dict.fromkeys(BY_TEACHER.values()))}


def missing_runs(results):
    """The (arm, seed) that have not run: five seeds of all tables come first."""
    first, later = [], []
    for table, arms in arms_by_table().items():
        for seed in seeds(table):
            jobs = first if seed < FIRST_SEED + 5 else later
            jobs += [(arm, seed) for arm in arms]
    return [job for job in dict.fromkeys(first + later) if job[1] not in results[job[0]]]


def main(argv=None):
    """Run what is missing, or say what it is; write the page."""
    args = parse_args(argv)
    results = claims.read_results(args.results)
    if args.list:
        for arm, seed in missing_runs(results):
            print(arm, seed)
        return
    if args.action == "run":
        claims.run_jobs(missing_runs(results), args)


if __name__ == "__main__":
    common.start(main, stopped="finished runs are kept; the same command goes on:")
