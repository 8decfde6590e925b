"""Long runs hold no more than short ones; the same command gives the same bits (short form)."""

import endurance
import pytest

import common


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    few = common.make_shapes(80, 20)
    monkeypatch.setattr(common, "make_shapes", lambda *sizes: few)


@pytest.mark.parametrize("script, flags", endurance.commands())
def test_the_same_command_gives_the_same_bits(script, flags, tmp_path):
    assert endurance.twice(script, flags, tmp_path) == []


def test_another_seed_gives_other_bits(tmp_path, monkeypatch):
    """A comparison that cannot fail would be none."""
    make, seeds = common.derive_seed, iter(range(10**6))
    monkeypatch.setattr(common, "derive_seed", lambda *parts: make(*parts, next(seeds)))
    different = endurance.twice("robust_kd", endurance.LOSS + "--loss st", tmp_path)
    assert {f"robust_kd/x-s0/{name}" for name in ("log.jsonl", "student.pt")} <= {*different}


def test_a_long_run_holds_no_more_than_a_short_one(tmp_path):
    seen = endurance.long_run(tmp_path, 30)
    assert len(seen) == 30 and endurance.is_flat(seen)
    leaking = [dict(row, handles=row["handles"] + i) for i, row in enumerate(seen)]
    growing = [dict(row, megabytes=row["megabytes"] * (1 + i / 100)) for i, row in enumerate(seen)]
    squared = [dict(row, log=row["log"] * (i + 1)) for i, row in enumerate(seen)]
    assert not any(endurance.is_flat(wrong) for wrong in (leaking, growing, squared))
