"""The programs that measure: a package, so that no other `benchmark` is imported instead."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def evaluation_attack(flags: dict) -> tuple[float, float]:
    """Radius and step of PGD in the evaluation of a run, in pixel units, by the run's flags."""
    if "eval_eps" in flags:  # scripts that train without an attack
        return flags["eval_eps"], flags["eval_step_size"]
    return flags["eps"], flags["eps"] / 4
