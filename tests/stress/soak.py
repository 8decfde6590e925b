"""All trust tests at length, from a printed seed; the figures go to docs/trust.json and TRUST.md.

Usage    python tests/stress/soak.py --minutes 10   # make soak
         python tests/stress/soak.py --page-only    # write the page again from docs/trust.json
"""

import contextlib
import functools
import io
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # cuts the network off
import endurance
import faults
import fuzz
import hostile_runs
import numpy as np
import torch

import common

ROOT = conftest.ROOT
FIGURES = ROOT / "docs" / "trust.json"
PAGE = ROOT / "docs" / "TRUST.md"
TEMPLATE = ROOT / "tests" / "stress" / "trust.md"


def parse_args(argv=None):
    """The flags of this program."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add(
        "--minutes",
        type=common.positive,
        default=10.0,
        help="minutes for all parts together, about",
    )
    seeds = "seed of the faults and the fuzz (default: drawn and printed)"
    add("--seed", type=common.whole_or_0, help=seeds)
    add("--page-only", action="store_true", help="test nothing, only write the page again")
    return parser.parse_args(argv)


def disturb(seed, until, folder):
    """Trials of one to four random faults on random jobs until then -> sums, by fault too."""
    rng, sums, kinds, jobs = random.Random(seed), {}, {}, {}
    for number in itertools.count():
        job = rng.choice(list(faults.JOBS))
        chosen = rng.choices(list(faults.FAULTS), k=rng.randint(1, 4))
        with tempfile.TemporaryDirectory(dir=folder) as where:
            counts = faults.trial(job, chosen, f"{seed} {number}", Path(where), folder / job)
        if counts["equal"] < counts["runs"]:
            print(f"not equal: {job}, {chosen}, {seed} {number}", flush=True)
        for key, value in counts.items():
            sums[key] = sums.get(key, 0) + value
        for name in chosen:
            kinds[name] = kinds.get(name, 0) + 1
        jobs[job] = jobs.get(job, 0) + 1
        if time.monotonic() > until:
            return sums | {"by kind": dict(sorted(kinds.items())), "runs of": jobs}


def be_hostile(folder):
    """Every hostile file once -> counts; `wrong` must be an empty list."""
    with contextlib.redirect_stdout(io.StringIO()):
        cases = hostile_runs.cases(folder)
    calls = {name: function for name, (function, _) in cases.items()}
    found = hostile_runs.attempt(calls, folder)
    wrong = hostile_runs.wrong(found, calls, {name: right for name, (_, right) in cases.items()})
    rows = found.values()
    return {
        "files": len(cases),
        "tracebacks": sum("Traceback" in errors for _, errors, _, _ in rows),
        "wrong": wrong,
        "executed": len(list(folder.rglob("ran"))),
        "most seconds": round(max(row[2] for row in rows), 1),
        "most megabytes more": max(row[3] for row in rows),
    }


def feed(seed, until, folder):
    """Rounds of the fuzz until then -> {kind: inputs}; anything wrong raises."""
    counts = {}
    for number in itertools.count():
        for kind in fuzz.FUZZES:
            counts[kind.__name__] = counts.get(kind.__name__, 0) + kind(folder, 300, seed + number)
            if number and time.monotonic() > until:
                return counts


def last_long(folder):
    """A run of 500 epochs: what it held at 10 and at 500."""
    seen = endurance.long_run(folder, 500)
    at = {f"epoch {n}": {k: round(v, 1) for k, v in seen[n - 1].items()} for n in (10, 500)}
    return at | {"flat": endurance.is_flat(seen)}


def repeat(folder):
    """Every command of endurance twice -> counts."""
    unequal = []
    commands = endurance.commands()
    for number, (script, flags) in enumerate(commands):
        if endurance.twice(script, flags, folder / str(number)):
            unequal.append(f"{script} {flags}")
    return {"commands": len(commands), "unequal": unequal}


def page(figures):
    """The text of docs/TRUST.md: the template, with {a.b} for figures["a"]["b"]."""

    def named(value, name):
        if isinstance(value, dict):
            for key, part in value.items():
                yield from named(part, f"{name}.{key}".strip("."))
        elif isinstance(value, list):
            yield name, f"{len(value)}"
        else:
            number = isinstance(value, int | float) and name != "seed"
            yield name, f"{value:,}" if number else str(value)

    text, shown = TEMPLATE.read_text(), dict(named(figures, ""))
    for name in ("by kind", "runs of"):
        counts = figures["faults"][name].items()
        shown[name] = ", ".join(f"{what} ({number})" for what, number in counts)
    tried = sum(figures["fuzz"].values()) + figures["hostile"]["files"]
    shown["inputs"] = f"{tried:,}"
    for name, value in shown.items():
        text = text.replace("{" + name + "}", value)
    return text


def main(argv=None):
    """Everything, one part after the other; stops at the first thing that is wrong."""
    args = parse_args(argv)
    if args.page_only:
        PAGE.write_text(page(json.loads(FIGURES.read_text())))
        return
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arrays, begin = faults.prepared()[0], time.monotonic()
    common.make_shapes = lambda *sizes: arrays
    figures = {"seed": seed, "versions": {"python": platform.python_version()}}
    figures["versions"] |= {"torch": torch.__version__, "numpy": np.__version__}
    figures["versions"] |= {"system": platform.system(), "machine": platform.machine()}
    share = 60 * args.minutes
    with tempfile.TemporaryDirectory() as root:
        parts = {
            "determinism": repeat,
            "long": last_long,
            "hostile": be_hostile,
            "fuzz": functools.partial(feed, seed, begin + 0.35 * share),
            "faults": functools.partial(disturb, seed, begin + share),
        }
        for name, run in parts.items():
            (folder := Path(root) / name).mkdir()
            with contextlib.redirect_stdout(sys.stdout if name == "faults" else io.StringIO()):
                figures[name] = run(folder)
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
    figures["minutes"] = round((time.monotonic() - begin) / 60, 1)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(page(figures))
    wrong = figures["hostile"]["wrong"] + figures["determinism"]["unequal"]
    same = figures["faults"]["equal"] == figures["faults"]["runs"]
    bad = figures["faults"]["lost"] + figures["hostile"]["executed"] + len(wrong)
    if bad or not same or not figures["long"]["flat"]:
        raise common.UserError("something is wrong: see docs/trust.json")


if __name__ == "__main__":
    common.start(main, stopped="nothing was written; begin again:")
