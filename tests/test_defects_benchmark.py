"""Defects of benchmark/, the pages and the citations, each as it was found."""

import importlib
import json
import re
import shlex

import pytest
import torch

import common
import robust_kd
from benchmark import report, run, tables

SMALL = "--data shapes --model mlp-8 --train-subset 40 --test-subset 10 --val-size 20 --epochs 1"
SMALL += " --batch-size 16 --teacher-epochs 1 --device cpu"
ROBUST = f"robust_kd.py {SMALL} --steps 1 --eval-steps 1 --teacher-batch-size 16"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """benchmark(*rows) makes them all the rows there are; -> call(*flags): run.py in tmp_path."""

    def set_rows(*rows):
        first = {}
        for row in rows:
            first.setdefault(row.run, row.id)
        monkeypatch.setattr(tables, "ROWS", list(rows))
        monkeypatch.setattr(run, "FIRST", first)
        monkeypatch.setattr(run, "TRIED", set())
        run.parsed.cache_clear()
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        return lambda *flags: run.main([*flags, *folders])

    yield set_rows
    run.parsed.cache_clear()


def same_weights(a, b):
    a, b = (common.load(file)["weights"] for file in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


# The ensemble -----------------------------------------------------------------------------------


def test_an_ensemble_is_of_the_last_teachers_alone(benchmark, tmp_path):
    flags = "--loss akd+ --teachers 3 --teacher-save-every 1"
    row = tables.Row(
        "paper9-table1", "ensemble", tables.drawn("pgd2_acc"), f"{ROBUST} {flags}", "a", "ensemble"
    )
    benchmark(row)("--seeds", "1", "--device", "cpu")
    folder = tmp_path / "runs/robust_kd/paper9-table1-ensemble-s0"
    assert (folder / "teacher2_best.pt").exists() and (folder / "teacher3-ep1.pt").exists()
    record = json.loads((folder / "ensemble-pgd2.json").read_text())
    files = re.findall(r"(teacher[^/ ]*)\.pt", record["command"])
    assert files == ["teacher", "teacher2", "teacher3"]
    assert record["rows"][0]["model"] == "ensemble of 3"


# A teacher for each seed ------------------------------------------------------------------------


def teacher_runs():
    """A run for each form of command whose teacher stands in a row of several seeds."""
    found = {}
    for row in tables.ROWS:
        if row.take == "teacher" and row.seeds > 1:
            found.setdefault(run.form(row.run), row.run)
    return list(found.values())


@pytest.mark.parametrize("command", teacher_runs())
def test_rows_of_several_seeds_of_a_teacher_are_of_several_teachers(command, tmp_path):
    args = run.parse_args(["--scale", "tiny", "--runs", str(tmp_path)])
    if run.waits_for(command, args):
        pytest.skip("needs MNIST")
    run.prepare(args)
    script, flags = run.script_of(command)[0], run.flags_of(command, args)
    for seed in (0, 1):
        more = ["--name", "run", "--seed", str(seed), "--runs", str(tmp_path)]
        importlib.import_module(script).main([*flags, *more])
    files = [tmp_path / script / f"run-s{seed}" / "teacher.pt" for seed in (0, 1)]
    assert not same_weights(*files)


def test_seeds_with_the_same_net_count_as_one_seed(benchmark, tmp_path):
    row = tables.Row(
        "paper9-table1",
        "teacher",
        tables.drawn("clean_acc"),
        f"{ROBUST} --loss akd",
        "a",
        "teacher",
    )
    benchmark(row)("--seeds", "2", "--device", "cpu")
    done = run.read_results(tmp_path / "results")
    assert report.cells(row, "clean_acc", done)[5] == "2"
    results = sorted((tmp_path / "results").iterdir())
    shared = json.loads(results[0].read_text()) | {"seed": 1}  # two evaluations of one net
    results[1].write_text(json.dumps(shared))
    cells = report.cells(row, "clean_acc", run.read_results(tmp_path / "results"))
    assert cells[5] == "1" and "±" not in cells[3]


def test_the_cost_of_teachers_of_several_seeds_is_counted_for_each():
    seen, args = set(), run.parse_args(["--device", "cpu"])
    command = "fickle_teacher.py --method teacher"
    costs = [run.cost(command, seed, seen, args)[0] for seed in (0, 1, 0)]
    training = 200 * 50_000 * 3 * run.size_of("wrn-40-2", 10, 32, 3)[0]
    assert [cost - costs[2] for cost in costs] == [training, training, 0]


# The subset of CINIC-10 -------------------------------------------------------------------------


def test_all_seeds_are_evaluated_on_the_same_images_of_cinic(benchmark, tmp_path):
    command, metric = "fickle_teacher.py --method student", tables.drawn("cinic_acc")
    row = tables.Row("paper9-table1", "student", metric, command, seeds=3)
    benchmark(row)
    folders = ["--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    args = run.parse_args(["--scale", "tiny", *folders])
    run.prepare(args)
    notes = set()
    for seed in range(3):
        run.TRIED.clear()
        assert run.execute(row.run, seed, [row], 600, args) == ""
        path = tmp_path / f"fickle_teacher/paper9-table1-student-s{seed}/student-cinic.json"
        notes.update(json.loads(path.read_text())["rows"][0]["cinic_note"])
    assert len(notes) == 1 and "10 images; sha256 of their list" in notes.pop()


# Figure 4 of paper 2: a large teacher, a small student -------------------------------------------


def figure4():
    """-> (the row of the teacher, those of the students)."""
    rows = [row for row in tables.ROWS if row.table == "paper2-figure4"]
    teachers = [row for row in rows if row.take == "teacher"]
    return teachers[0] if teachers else None, [row for row in rows if row.take == "student"]


def test_figure_4_trains_the_teacher_once_and_the_students_by_appendix_a():
    teacher, students = figure4()
    given = robust_kd.parse_args(shlex.split(teacher.run)[1:])
    assert (given.model, given.teacher_epochs, given.recipe) == ("wrn-28-10-silu", 400, "at+")
    folder = f"runs/robust_kd/{run.FIRST[teacher.run]}-s0"
    found = []
    for row in students:
        flags = robust_kd.parse_args(shlex.split(row.run)[1:])
        default = vars(robust_kd.parse_args(["--loss", flags.loss])) | {"alpha": flags.alpha}
        own = {"teacher_ckpt": flags.teacher_ckpt, "teacher_model": "wrn-28-10-silu"}
        ignored = {"argv": None, "name": None}
        assert vars(flags) | ignored == default | own | ignored  # 100 epochs, OneCycle, no EMA, ...
        epoch = int(re.fullmatch(rf"{folder}/teacher-ep(\d+)\.pt", flags.teacher_ckpt)[1])
        assert epoch <= 400 and epoch % given.teacher_save_every == 0
        found.append((epoch, flags.alpha if flags.loss == "akd+" else 1.0))
    assert {(50, 1.0), (400, 1.0), (100, 0.2), (100, 1.0)} <= set(found)
    args = run.parse_args(["--device", "cpu"])
    macs, large = (run.size_of(net, 10, 32, 3)[0] for net in ("resnet18", "wrn-28-10-silu"))
    evaluation = 10_000 * macs * (200 + 5000)
    total = run.cost(students[0].run, 0, set(), args)[0] - evaluation
    assert total == 100 * 50_000 * (macs * (3 + 2 * 7) + large)  # no teacher is trained


def test_the_students_of_figure_4_come_after_their_teacher(tmp_path, capsys):
    teacher, students = figure4()
    flags = ["--scale", "tiny", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    run.main([*flags, students[0].id])
    out = capsys.readouterr().out
    assert re.search(rf"teacher-ep1\.pt.*{re.escape(run.FIRST[teacher.run])}", out)
    assert not list((tmp_path / "results").glob("*"))
    run.main([*flags, "paper2-figure4"])
    out = capsys.readouterr().out
    assert "FAILED" not in out and " 0 are left" in out and "0 wait" in out
    names = {path.stem for path in (tmp_path / "results").iterdir()}
    assert {f"{run.FIRST[teacher.run]}-s0", f"{students[0].id}-s0"} <= names
    record = json.loads((tmp_path / "results" / f"{students[0].id}-s0.json").read_text())
    assert record["flags"]["teacher_ckpt"].endswith("teacher-ep1.pt")
