"""Nothing in a file made by others runs, fills the memory or ends in a traceback (short form)."""

import os
import signal

import hostile_runs

import common


def test_hostile_files_are_one_line_in_bounded_time_and_memory(tmp_path, monkeypatch):
    few = common.make_shapes(80, 20)
    monkeypatch.setattr(common, "make_shapes", lambda *sizes: few)
    cases = hostile_runs.cases(tmp_path)
    calls = {name: function for name, (function, _) in cases.items()}
    found = hostile_runs.attempt(calls, tmp_path)
    statuses = {name: right for name, (_, right) in cases.items()}
    assert hostile_runs.wrong(found, calls, statuses) == []
    assert len(cases) > 200 and not list(tmp_path.rglob("ran"))


def test_the_harness_sees_tracebacks_hunger_and_what_runs(tmp_path):
    def hungry():
        keep.append(bytearray(b"x") * (400 << 20))
        raise SystemExit(0)

    keep, runs = [], hostile_runs.hostile.Runs(tmp_path)
    calls = {"raises": lambda: 1 / 0, "hungry": hungry, "silent": lambda: exit(2)}
    calls["runs"] = lambda: hostile_runs.pickle.loads(hostile_runs.pickle.dumps(runs))
    calls["dies"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    found = hostile_runs.attempt(calls, tmp_path)
    lines = hostile_runs.wrong(found, calls, {name: (0, 2) for name in found})
    assert len(lines) == 4 and "MB more" in " ".join(lines) and (tmp_path / "ran").exists()
