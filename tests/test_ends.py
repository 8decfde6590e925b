"""How programs end: the reader of the output has gone, Ctrl-C in the evaluation, a full disk."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import common
import eval_robustness as ev
import fickle_teacher
import plumbing

SMALL = "--data shapes --model mlp-8 --train-subset 32 --test-subset 10 --val-size 10 --device cpu"
SMALL += " --batch-size 16 --epochs 1 --eval-steps 1 --restarts 1"


def start(command, out):
    """(status, stderr) of a program of the repository whose standard output is the file `out`."""
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, stdout=out, stderr=-1, text=True, timeout=100
    )
    return done.returncode, done.stderr


@pytest.fixture
def closed():
    """A pipe that nobody reads, as after `| head`."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_a_run_without_a_reader_stops_at_status_141_and_says_how_to_go_on(tmp_path, closed):
    flags = f"robust_kd.py {SMALL} --loss st --runs {tmp_path} --name run"
    status, err = start(flags, closed)
    *_, stopped, command = err.splitlines()
    assert status == 141 and "Traceback" not in err and "Exception ignored" not in err
    assert stopped.startswith("stopped; ") and command.endswith(flags)
    status, err = start(flags, subprocess.DEVNULL)
    assert (status, err) == (0, "") and (tmp_path / "robust_kd" / "run-s0" / "student.pt").exists()


def test_a_program_without_a_reader_ends_without_a_word(closed):
    assert start("benchmark/run.py --list paper3-table1", closed) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as on Linux")
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        status, err = start("benchmark/run.py --list paper3-table1", full)
    assert (status, err) == (2, "error: standard output: No space left on device\n")


def test_an_evaluation_whose_table_nobody_reads_is_written(tmp_path, monkeypatch):
    fickle_teacher.main(f"{SMALL} --method student --runs {tmp_path} --name run".split())
    model = tmp_path / "fickle_teacher" / "run-s0" / "student.pt"

    def unread(record):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(ev, "show", unread)
    flags = "--data shapes --n 10 --attack clean pgd1 --device cpu --json".split()
    with pytest.raises(SystemExit) as end:
        ev.main([str(model), *flags, str(tmp_path / "out.json")])
    assert end.value.code == 141
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["n"] == 10


def test_a_script_that_is_stopped_while_it_evaluates_gives_one_command(
    tmp_path, monkeypatch, capsys
):
    flags = f"{SMALL} --method student --runs {tmp_path} --name run".split()
    for stop, status in ((KeyboardInterrupt(), 130), (KeyboardInterrupt("SIGTERM"), 143)):

        def stopped(*rest, stop=stop, **more):
            raise stop

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(ev, "run_attack", stopped)
            fickle_teacher.main(flags)
        *rest, said, command = capsys.readouterr().err.splitlines()
        assert end.value.code == status and "".join(rest) == ""
        assert said.startswith("stopped; finished epochs are in") and "fickle_teacher.py" in command
    fickle_teacher.main(flags)
    assert "is finished" in capsys.readouterr().out


def test_a_value_that_a_seed_lacks_has_no_mean(tmp_path, capsys):
    runs = []
    for seed, auroc in enumerate((0.7, None)):
        argv = f"{SMALL} --seed {seed} --runs {tmp_path} --name run".split()
        run = plumbing.Run("fickle_teacher", fickle_teacher.parse_args(argv), None)
        row = {"model": "student", "clean_acc": 0.5 + seed / 10, "ood_auroc": auroc}
        run.dir.mkdir(parents=True)
        run.log.write_text(json.dumps({"summary": [row], "files": []}) + "\n")
        runs.append(run)
    for order in (runs, runs[::-1]):
        plumbing.across_seeds(order)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split() == ["student", "0.5500", "+-", "0.0707", "-"]


def test_a_live_line_fits_the_terminal_and_is_printed_over(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    common.print_line("a/long/name/of/a/model.pt: image 5", "")
    common.print_line("a/long/name/of/a/model.pt: done")
    lines = screen.getvalue().split("\r\x1b[2K")
    assert lines == ["", "a/model.pt: image 5", "a/long/name/of/a/model.pt: done\n"]


def test_an_evaluation_on_other_data_than_a_run_had_says_so(tmp_path, capsys):
    fickle_teacher.main(f"{SMALL} --method student --runs {tmp_path} --name run".split())
    folder = tmp_path / "fickle_teacher" / "run-s0"
    x, y = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    arrays = {f"{k}_{part}": v for part in ("train", "test") for k, v in (("x", x), ("y", y))}
    np.savez(tmp_path / "other.npz", **arrays)
    for data, warned in (("shapes", 0), (tmp_path / "other.npz", 1)):
        capsys.readouterr()
        ev.main([str(folder / "student.pt"), "--attack", "clean", "--n", "5", "--data", str(data)])
        err = capsys.readouterr().err
        assert err.count("warning: ") == warned and ("trained on 'shapes'" in err) == warned
    (folder / "config.json").write_text("[" * 10**5)
    ev.main([str(folder / "student.pt"), "--attack", "clean", "--n", "5", "--data", "shapes"])
    assert capsys.readouterr().err == ""
