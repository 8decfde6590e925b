"""benchmark/: the papers' tables as data, the runner, the report, sweeps, figures and speed."""

import dataclasses
import importlib
import json
import re
import shlex
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import robust_kd
from benchmark import plain, plots, records, report, run, speed, sweep, tables, trajectories

SMALL = "--data shapes --model mlp-8 --train-subset 40 --test-subset 10 --val-size 20 --epochs 2"
SMALL += " --batch-size 16 --device cpu"
SMALL_ROBUST = f"{SMALL} --steps 1 --eval-steps 2 --teacher-epochs 2 --teacher-batch-size 16"
ROWS = {row.id: row for row in tables.ROWS}

# ------------------------------------------------------------------------------------------------
# tables.py

# Counted by hand in the papers: lines times columns; sizes and accuracies of paper 3's Table 1
PRINTED = {
    "paper1-text": 9 + 2,  # accuracies of the contributions; parameters of the two nets
    "paper1-figure10": 8 * 10,
    "paper2-table1": 14 * 2,
    "paper2-table2": 9 * 2,
    "paper2-table3": 3 * 4 + 2,  # and the baseline in the caption
    "paper2-table4": 3 * 4,
    "paper2-table5": 6 * 4,
    "paper2-table6": 10 * 3,
    "paper2-table7": 10 * 3,
    "paper2-table8": 4 * 3,
    "paper2-table9": 3 * 2,
    "paper2-table10": 3 * 2,
    "paper2-table11": 5 * 4,
    "paper2-table12": 2 * 2,
    "paper2-text": 2 + 2,  # AutoAttack in C.1; the assumed costs
    "paper3-table1": 3 + 4,
    "paper3-table2": 2 * 4,
    "paper3-table3": 3,
    "paper3-table4": 3,
    "paper3-table5": 4 * 2,
}


def test_each_table_has_as_many_numbers_as_the_paper():
    found = Counter()
    for row in tables.ROWS:
        found[row.table] += sum(value is not None for value, _ in row.printed.values())
    counted = {table: n for table, n in found.items() if n and not table.endswith("-choices")}
    assert counted == PRINTED


def test_every_figure_and_table_is_there():
    found = {row.table for row in tables.ROWS}
    figures = {f"paper1-figure{i}" for i in range(1, 19)}
    figures |= {f"paper2-figure{i}" for i in range(1, 18)} | {"paper3-figure1"}
    assert figures | PRINTED.keys() <= found


@pytest.mark.parametrize(
    "row, metric, value, std",
    [
        ("paper1-text-soft-randomization-sigma-0.05", "pgd20_conditional_acc", 16.75, None),
        ("paper1-figure10-wrn-16-2-corruption-0.25", "clean_acc", 76.07, None),
        ("paper1-figure10-r-0.5-corruption-0.5", "cinic_acc", 44.68, None),
        ("paper2-table1-cifar-100-edm-at+", "aa_acc", 32.60, 0.30),
        ("paper2-table2-x1-16-rkd-rob.", "aa_acc", 32.14, 0.27),
        ("paper2-table5-cifar-100-ffgsm-4-models", "aa_acc", 25.36, 0.11),
        ("paper2-table6-cifar-10-ddpm-ard+-alpha-0.8", "clean_acc", 88.03, 0.0),
        ("paper2-table7-cifar-100-edm-akd+-alpha-0.8", "pgd20_acc", 37.05, 0.40),
        ("paper2-table11-trades+-teacher-rslad+-alpha-0.8", "pgd20_acc", 62.94, None),
        ("paper3-table2-two-omitted-distilled", "digit_acc", 92.73, None),
        ("paper3-table5-at-tf-kd-self", "aa_acc", 48.83, None),
    ],
)
def test_printed_values(row, metric, value, std):
    assert ROWS[row].printed[metric] == (value, std)


def test_rows_are_whole():
    assert len(ROWS) == len(tables.ROWS)
    lines = {(row.table, row.name) for row in tables.ROWS}
    for row in tables.ROWS:
        assert bool(row.run) != bool(row.reason), row.id
        assert row.turn in tables.TURNS and row.seeds >= 1
        assert not row.baseline or (row.table, row.baseline) in lines, row.id
        assert re.fullmatch(r"\w[\w.,=+-]{0,159}", row.id), row.id


def test_a_choice_says_its_flag_once_and_is_another_run():
    assert tables.CHOICES.keys() <= ROWS.keys()
    for row in tables.ROWS:
        if row.table.endswith("-choices"):
            flags = re.findall(r"--[\w-]+", row.run)
            assert len(flags) == len(set(flags)), row.run
    command = ROWS["paper2-choices-akd+-pgd-7-alpha-0.7"].run
    assert command == "robust_kd.py --loss akd+ --teacher-es 40 --alpha 0.7"


def test_the_papers_sizes_are_ours():
    large = records.counted(ROWS["paper3-table1-large-model-size"].run)
    assert large["macs"] == large["weights"] == 784 * 1200 + 1200 * 1200 + 1200 * 10 == 2392800
    assert records.counted("count mlp-400 10 28 1")["macs"] == 317600
    assert records.counted("count wrn-40-2 10 32 3")["millions"] == 2.243546


# ------------------------------------------------------------------------------------------------
# run.py: commands and order

# What rows may wait for: data that have to be fetched by hand, the teacher of another row
MAY_WAIT_FOR = (
    r".*/(cifar\d+_\w+|planes-cars|mnist)\.npz.*",
    r".*tiny-imagenet.*",
    r"the teacher of \d+ epochs, which the row paper2-figure4-teacher trains",
)


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_command_parses_or_waits_for_something_known(scale, tmp_path):
    args = run.parse_args(["--scale", scale, "--runs", str(tmp_path)])
    for command in dict.fromkeys(row.run for row in tables.ROWS if row.run):
        waits = run.waits_for(command, args)
        known = waits is None or re.fullmatch("|".join(MAY_WAIT_FOR), waits)
        assert known, (command, waits)


@pytest.fixture
def only_rows(monkeypatch, tmp_path):
    """only_rows(*rows): these are all there are -> call(*flags): run.py with folders of a test.

    The scripts run in this process; with processes=True each in its own, as outside of tests.
    """

    def call_here(script, flags, log_file, seconds, args):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "a") as log:
            return run.call_here(script, flags, log)

    def set_rows(*rows, processes=False):
        monkeypatch.setattr(tables, "ROWS", list(rows))
        if not processes:
            monkeypatch.setattr(run, "call", call_here)
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        return lambda *flags: run.main([*flags, *folders, "--device", "cpu"])

    return set_rows


def small_row(name, flags="", turn="c", metrics="clean_acc pgd2_acc", loss="at", **more):
    command = f"robust_kd.py --loss {loss} {SMALL_ROBUST}{flags}"
    return tables.Row("paper9-table1", name, tables.drawn(metrics), command, turn, **more)


def read_result(tmp_path, name):
    return json.loads((tmp_path / "results" / f"{name}.json").read_text())


def test_headline_rows_first_then_their_other_seeds(only_rows):
    only_rows(
        small_row("c"),
        small_row("a", " --lr 0.2", "a"),
        small_row("d", " --lr 0.3", "d", seeds=1),
    )
    jobs = run.list_jobs(run.parse_args([]))
    order = [(job["turn"], job["seed"]) for job in jobs]
    assert order == [("a", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2), ("d", 0)]


def test_tables_are_found_by_every_name(refused):
    row = ROWS["paper2-table3-akd+-pgd-7"]
    for name in ("paper2", "table3", "paper2-table3", "paper2-table3-akd+-pgd-7"):
        assert run.is_selected(row, [name])
    assert not run.is_selected(row, ["paper1", "table31"])
    assert "table99" in refused(run.parse_args, ["table99"])


# ------------------------------------------------------------------------------------------------
# run.py: running


def test_a_run_writes_one_small_result_and_is_not_run_again(only_rows, tmp_path, capsys):
    metrics = "clean_acc pgd2_acc pgd3_acc"  # the last one is not in the summary
    call = only_rows(
        small_row("at", metrics=metrics, seeds=2), small_row("the same run"), processes=True
    )
    call("--list")
    assert "3 not measured" in capsys.readouterr().out
    call("--seeds", "1")
    path = tmp_path / "results" / "paper9-table1-at-s0.json"
    record = json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path] and path.stat().st_size < 8000
    assert (record["scale"], record["seed"], record["flags"]["epochs"]) == ("full", 0, 2)
    assert record["commit"] and record["torch"]
    student = record["stages"]["student"]
    assert student["epochs"] == 2 and {"last", "best", "seconds_per_epoch"} <= student.keys()
    for metric in metrics.split():
        assert 0 <= records.value(record, "student", metric) <= 1
    before = path.stat().st_mtime_ns
    assert "1 of 1 runs are done; 0 are left" in capsys.readouterr().out
    call("--seeds", "1")
    assert path.stat().st_mtime_ns == before
    call("--list")
    out = capsys.readouterr().out
    assert "1 of 3 runs are done; 2 are left" in out
    assert "of 2 by what was measured, 0 not measured" in out


def test_a_finished_run_is_taken_from_another_folder(only_rows, tmp_path):
    row = small_row("at", seeds=1)
    flags = shlex.split(row.run)[1:]
    robust_kd.main([*flags, "--runs", str(tmp_path / "own"), "--name", "mine"])
    only_rows(row)("--finished", str(tmp_path / "own"))
    assert not (tmp_path / "runs" / "robust_kd").exists()
    assert records.value(read_result(tmp_path, "paper9-table1-at-s0"), "student", "clean_acc")


def test_a_row_that_fails_or_waits_does_not_stop_the_next_one(only_rows, tmp_path, capsys):
    missing = tables.Row("paper9-table1", "gone", {}, "gone.py --method x", "a", seeds=1)
    call = only_rows(
        small_row("bad", " --lr 1e30", "a", seeds=1),
        small_row("waits", " --not-yet 3", "a", seeds=1),
        missing,
        small_row("good", seeds=1),
    )
    with pytest.raises(SystemExit) as end:
        call()
    out = capsys.readouterr().out
    assert end.value.code == 1 and "1 failed" in out and "not finite" in out
    assert re.search("waits.*--not-yet", out) and re.search("gone.*gone.py", out)
    results = [path.name for path in (tmp_path / "results").iterdir()]
    assert results == ["paper9-table1-good-s0.json"]


def test_when_the_minutes_are_over_the_run_stops_and_goes_on_later(only_rows, tmp_path, capsys):
    call = only_rows(small_row("long", " --epochs 2000", seeds=1), processes=True)
    logs = []
    for minutes in ("0.15", "0.4", "1.2"):  # to the first epoch, on a busy machine too
        if not logs:
            call("--minutes", minutes)
            assert "goes on from its last epoch" in capsys.readouterr().out
        logs = list((tmp_path / "runs").glob("*/*/log.jsonl"))
    assert not (tmp_path / "results").exists()
    epochs = len(logs[0].read_text().splitlines())
    call("--minutes", "0.05")
    assert epochs <= len(logs[0].read_text().splitlines()) < 2000


def test_tiny_results_are_marked_kept_apart_and_never_reported(only_rows, tmp_path):
    values = {"clean_acc": (10.0, 99.0)}  # any result would reproduce it
    row = tables.Row("paper2-table1", "at", values, "robust_kd.py --loss at", "a")
    only_rows(row)("--scale", "tiny")
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert record["scale"] == "tiny" and record["flags"]["train_subset"] == 60
    readme = make_readme(tmp_path)
    report.main(report_flags(tmp_path))
    assert "0 reproduced" in readme.read_text() and "1 not run" in readme.read_text()
    path.write_text(json.dumps(record | {"scale": "full"}))
    report.main(report_flags(tmp_path))
    assert "1 reproduced" in readme.read_text() and "0 not run" in readme.read_text()
    assert run.parse_args(["--scale", "tiny"]).results.endswith("runs/tiny/results")


def test_an_ensemble_is_of_its_teachers_alone_and_in_their_order(only_rows, tmp_path):
    metrics = "pgd3_acc"
    flags = " --teachers 3 --teacher-save-every 1"
    row = small_row("ensemble", flags, "a", metrics, "akd+", take="ensemble")
    only_rows(row)("--seeds", "1")
    assert len(list((tmp_path / "runs/teachers").iterdir())) == 3 + 3  # and early stops
    folder = tmp_path / "runs/robust_kd/paper9-table1-ensemble-s0"
    evaluation = json.loads((folder / "ensemble-pgd3.json").read_text())
    files = re.findall(r"teachers/(\w+)/teacher\.pt", evaluation["command"])
    args = robust_kd.parse_args(shlex.split(row.run)[1:])
    seeds = []
    for name in files:
        recipe = json.loads((tmp_path / "runs/teachers" / name / "recipe.json").read_text())
        assert recipe["epochs"] == args.teacher_epochs
        seeds.append(recipe["seed"])
    assert seeds == [0, 100, 200]
    assert evaluation["rows"][0]["model"] == "ensemble of 3"
    result = read_result(tmp_path, "paper9-table1-ensemble-s0")
    assert records.value(result, "ensemble", "pgd3_acc") is not None
    assert {"teacher", "teacher2", "teacher3", "student"} == result["stages"].keys()


def commands_of_teachers():
    """A run for each form of command whose teacher stands in a row of several seeds."""
    found = {}
    for row in tables.ROWS:
        if row.take == "teacher" and row.seeds > 1:
            found.setdefault((row.run.split()[0], run.form(row.run)), row.run)
    by_script = {}
    for (script, _), command in found.items():
        by_script.setdefault(script, []).append(command)
    return [command for commands in by_script.values() for command in commands[-1:]]


@pytest.mark.parametrize("command", commands_of_teachers())
def test_rows_of_several_seeds_of_a_teacher_are_of_several_teachers(command, tmp_path, capsys):
    args = run.parse_args(["--scale", "tiny", "--runs", str(tmp_path)])
    if run.waits_for(command, args):
        pytest.skip("needs MNIST")
    run.prepare(args)
    digests = set()
    for seed in ("0", "1"):
        flags = [*run.flags_of(command, args), "--seed", seed, "--runs", str(tmp_path)]
        importlib.import_module(run.script_of(command)).main(flags)
        path = re.findall(r"^teacher: (.+\.pt)$", capsys.readouterr().out, re.M)[0]
        digests.add(common.weights_digest(path))
    assert len(digests) == 2


def test_seeds_with_the_same_net_count_as_one_seed(only_rows, tmp_path):
    row = small_row("teacher", loss="akd", take="teacher", metrics="clean_acc")
    only_rows(row)("--seeds", "2")
    assert report.cells(row, "clean_acc", records.read_records(tmp_path / "results"))[5] == "2"
    shared = read_result(tmp_path, "paper9-table1-teacher-s0") | {"seed": 1}
    (tmp_path / "results/paper9-table1-teacher-s1.json").write_text(json.dumps(shared))
    cells = report.cells(row, "clean_acc", records.read_records(tmp_path / "results"))
    assert cells[5] == "1" and "±" not in cells[3]  # two evaluations of one net


def test_all_seeds_are_evaluated_on_the_same_other_images(only_rows, tmp_path):
    command, metrics = "fickle_teacher.py --method student", tables.drawn("cinic_acc mca_acc")
    row = tables.Row("paper9-table1", "student", metrics, command, seeds=3)
    only_rows(row)
    folders = ["--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    args = run.parse_args(["--scale", "tiny", *folders])
    run.prepare(args)
    notes = set()
    for seed in range(2):
        args.evaluated.clear()
        assert run.execute(row.run, seed, [row], 600, {}, args) is None
        folder = tmp_path / f"fickle_teacher/paper9-table1-student-s{seed}"
        found = common.read_json(folder / "student-cinic-corruptions.json")["rows"][0]
        notes.add((found["cinic_note"], found["corruptions"]["note"]))
        assert 0 <= found["mean19_acc"] <= 1
    ((cinic, corrupted),) = notes
    assert (
        "10 images; sha256 of images" in cinic and corrupted == f"images of {tmp_path}/CIFAR-10-C"
    )


def test_other_images_that_are_not_there_leave_their_metrics_out(tmp_path):
    args = run.parse_args(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    pairs = {("student", "clean_acc"), ("student", "cinic_acc"), ("student", "mca_acc")}
    assert run.attacks_for(pairs, args) == {"student": ["clean"]}
    (tmp_path / "CIFAR-10-C").mkdir()
    (tmp_path / "cinic10.npz").touch()
    attacks = ["cinic", "clean", "corruptions"]
    assert run.attacks_for(pairs, args) == {"student": attacks}
    flags = " ".join(run.evaluation_flags("student", ["net.pt"], attacks, {"data": "x"}, args))
    assert f"--cinic {tmp_path}/cinic10.npz --corruptions {tmp_path}/CIFAR-10-C" in flags


# ------------------------------------------------------------------------------------------------
# run.py: Figure 4 of paper 2, a large teacher and small students


def rows_of_figure4():
    """-> (the row of the teacher, those of the students)."""
    rows = [row for row in tables.ROWS if row.table == "paper2-figure4"]
    (teacher,) = (row for row in rows if row.take == "teacher")
    return teacher, [row for row in rows if row.take == "student"]


def test_figure_4_trains_the_teacher_once_and_the_students_by_appendix_a():
    teacher, students = rows_of_figure4()
    given = robust_kd.parse_args(shlex.split(teacher.run)[1:])
    assert (given.model, given.teacher_epochs, given.recipe) == ("wrn-28-10-silu", 400, "at+")
    points = []
    for row in students:
        flags = vars(robust_kd.parse_args(shlex.split(row.run)[1:]))
        default = vars(robust_kd.parse_args(["--loss", flags["loss"]]))
        differ = {name for name in flags if flags[name] != default[name]}
        # 100 epochs, OneCycle, no weight average, ...
        assert differ <= {"teacher_ckpt", "teacher_model", "alpha", "name", "given"}
        assert flags["teacher_model"] == "wrn-28-10-silu"
        row_id, epochs = run.teacher_of_row(row.run)
        assert row_id == teacher.id
        assert epochs <= 400 and epochs % given.teacher_save_every == 0
        points.append((epochs, flags["alpha"] if flags["loss"] == "akd+" else 1.0))
    assert {(50, 1.0), (400, 1.0), (100, 0.2), (100, 1.0)} <= set(points)


def test_the_students_of_figure_4_come_after_their_teacher(tmp_path, capsys):
    teacher, students = rows_of_figure4()
    flags = ["--scale", "tiny", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    run.main([*flags, students[0].id])
    assert f"which the row {teacher.id} trains" in capsys.readouterr().out
    assert not list((tmp_path / "results").glob("*"))
    run.main([*flags, "paper2-figure4"])
    out = capsys.readouterr().out
    assert "FAILED" not in out and " 0 are left" in out and "0 wait" in out
    name = run.name_of(teacher.run)
    names = {path.stem for path in (tmp_path / "results").iterdir()}
    assert {f"{name}-s0", f"{students[0].id}-s0"} <= names
    record = read_result(tmp_path, f"{students[0].id}-s0")
    of_teacher = read_result(tmp_path, f"{name}-s0")
    given = common.weights_digest(record["flags"]["teacher_ckpt"])
    assert record["weights"]["teacher"] == of_teacher["weights"]["teacher"] == given


def test_early_stops_are_found_where_the_teacher_was_trained(tmp_path):
    flags = shlex.split(f"--loss akd {SMALL_ROBUST} --teacher-epochs 3 --teacher-save-every 1")
    robust_kd.main([*flags, "--runs", str(tmp_path), "--name", "a"])
    folder = tmp_path / "robust_kd/a-s0"
    config = json.loads((folder / "config.json").read_text())
    for epochs in (1, 2, 3):
        _, meta = common.load_model(trajectories.teacher_of(folder, config, epochs))
        assert meta["epoch"] == epochs
    last = trajectories.teacher_of(folder, config)
    assert last == trajectories.teacher_of(folder, config, 3)


# ------------------------------------------------------------------------------------------------
# What the pages say of tables and sweeps

PAPER_OF_SCRIPT = {
    "robust_kd": "paper2",
    "teacher_free_kd": "paper3",
    "fickle_teacher": "paper1",
    "soft_randomization": "paper1",
    "messy_collab": "paper1",
}
# Flags that say where something is, or how often a run is repeated, and not what is computed
NOT_COMPUTED = {
    "given",
    "name",
    "seed",
    "seeds",
    "runs",
    "data_root",
    "device",
    "grad_heatmap",
    "teacher_save_every",
    "teacher_ckpt",
}


def labelled_commands():
    """(script, flags, table or figure as in tables.py) of each command with such a comment."""
    found = set()
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.py")]:
        lines = re.findall(r"^ *(?:\w+ +)?python (\w+)\.py([^#`\n]*)# (.*)", path.read_text(), re.M)
        for script, flags, comment in lines:
            numbers = r"\d+(?:(?:,| and| to) \d+)*"
            for kind, listed in re.findall(rf"\b(Table|Figure)s? ({numbers})", comment):
                for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
                    for number in range(int(first), int(last or first) + 1):
                        table = f"{PAPER_OF_SCRIPT[script]}-{kind.lower()}{number}"
                        found.add((script, flags.strip(), table))
    return sorted(found)


def computed(script, flags):
    """What the flags of a script mean, without NOT_COMPUTED."""
    flags = flags.replace("--grad-heatmap runs/", "--grad-heatmap ")  # parsed where the tests run
    args = vars(importlib.import_module(script).parse_args(shlex.split(flags)))
    return {name: value for name, value in args.items() if name not in NOT_COMPUTED}


@pytest.mark.parametrize("script, flags, table", labelled_commands())
def test_a_command_that_is_said_to_be_of_a_table_is_one_of_its_runs(script, flags, table):
    runs = {row.run for row in tables.ROWS if row.table == table and row.run}
    of_script = [text.split(".py", 1)[1] for text in runs if text.startswith(f"{script}.py")]
    assert computed(script, flags) in [computed(script, text) for text in of_script]


def test_pages_label_commands_with_tables():
    assert len(labelled_commands()) > 20


def documented_sweeps():
    """The flags of every documented sweep over the early stops of a teacher."""
    found = []
    for path in [*ROOT.glob("docs/*.md"), ROOT / "benchmark/sweep.py"]:
        found += re.findall(r"python benchmark/sweep\.py (.*teacher-es=.*)", path.read_text())
    return found


@pytest.mark.parametrize("flags", documented_sweeps())
def test_a_documented_sweep_trains_the_longest_teacher_alone(flags, tmp_path, capsys):
    argv = shlex.split(flags)
    stops = [int(stop) for stop in sweep.parse_args(argv).grid["teacher-es"]]
    every = int(argv[argv.index("--teacher-save-every") + 1])
    unit = min(stops)
    grid = "teacher-es=" + ",".join(str(stop // unit) for stop in stops)
    small = shlex.split(SMALL_ROBUST)
    small += ["--epochs", "1", "--teacher-epochs", str(max(stops) // unit)]
    small += ["--teacher-save-every", str(every // unit), "--runs", str(tmp_path)]
    sweep.main(["robust_kd.py", "--grid", grid, "--", *small])
    out = capsys.readouterr().out
    assert len(list(tmp_path.glob("robust_kd/*/summary.json"))) == len(stops)
    assert len(re.findall(r"^teacher +\d+/\d+ ", out, re.M)) == max(stops) // unit


def test_the_documented_sweep_compares_with_the_baseline_of_table_2():
    (flags,) = re.findall(r"sweep\.py (.*)", (ROOT / "docs/robust_kd.md").read_text())
    args = sweep.parse_args(shlex.split(flags))
    command = ROWS["paper2-table2-x1-only-teacher"].run
    expected = computed("robust_kd", command.split(".py")[1])
    assert computed("robust_kd", shlex.join(sweep.baseline_flags(args))) == expected


# ------------------------------------------------------------------------------------------------
# report.py


def make_readme(tmp_path, text="before\n{}\nold\n{}\nafter\n"):
    readme = tmp_path / "README.md"
    readme.write_text(text.format(*report.MARKS))
    return readme


def report_flags(tmp_path, results="results"):
    flags = {
        "--results": tmp_path / results,
        "--page": tmp_path / "page.md",
        "--readme": tmp_path / "README.md",
    }
    return [str(word) for pair in flags.items() for word in pair]


@pytest.mark.parametrize(
    "printed, values, baseline, expected",
    [
        ((52.0, 0.5), [52.9, 53.0], [50.0, 50.1], "reproduced"),  # within 2 stds
        ((52.0, 0.1), [51.4], [50.0], "reproduced"),  # within the band
        ((52.0, 0.5), [54.0, 54.2], [50.0, 50.1], "direction only"),
        ((52.0, 0.5), [48.0, 48.1], [50.0, 50.1], "not reproduced"),
        ((52.0, 0.5), [50.4, 49.8], [49.0, 51.0], "not reproduced"),  # within the error
        ((52.0, 0.5), [54.0], [], "not reproduced"),  # no baseline here
        ((52.0, 0.5), [], [50.0], "not run"),
        ((None, None), [54.0], [50.0], "-"),
    ],
)
def test_the_rule_of_the_verdicts(monkeypatch, printed, values, baseline, expected):
    """The paper prints 50 +- 0.2 for the baseline."""
    rows = [
        tables.Row("paper9-table1", "at", {"aa_acc": (50.0, 0.2)}, "at"),
        tables.Row("paper9-table1", "akd", {"aa_acc": printed}, "akd", baseline="at"),
    ]
    monkeypatch.setattr(tables, "ROWS", rows)
    done = {}
    for name, ours in (("at", baseline), ("akd", values)):
        for seed, value in enumerate(ours):
            row = {"model": "student (at)", "aa_acc": value / 100}
            done[name, seed] = {"rows": [row], "scale": "full"}
    assert report.verdict(rows[1], "aa_acc", done) == expected


def test_the_page_shows_paper_and_ours_and_what_may_explain_a_failure(tmp_path):
    (tmp_path / "results").mkdir()
    values = {"paper2-table3-at": [0.855, 0.464], "paper2-table3-rslad+-pgd-7": [0.79, 0.45]}
    flags = {"eps": 8 / 255, "step_size": None, "restarts": 1, "test_subset": None}
    for name, (clean, robust) in values.items():
        for seed in (0, 1):
            row = {"model": "student (x)", "clean_acc": clean + seed / 1000, "aa_acc": robust}
            record = {
                "row": name,
                "run": ROWS[name].run,
                "seed": seed,
                "scale": "full",
                "rows": [row],
                "flags": flags,
                "gpu": "a GPU",
                "torch": "2",
                "commit": "c0",
            }
            (tmp_path / f"results/{name}-s{seed}.json").write_text(json.dumps(record))
    (tmp_path / "results/broken.json").write_text("{")
    readme = make_readme(tmp_path)
    report.main(report_flags(tmp_path))
    text = (tmp_path / "page.md").read_text()
    at = "85.54 ± 0.18 | 85.55 ± 0.07 | - | 2 | +0.01 | +0.1 | reproduced |"
    assert f"| AT | clean | {at}" in text
    rslad = "83.13 ± 0.61 | 79.05 ± 0.07 | - | 2 | -4.08 | -6.7 | direction only |"
    assert f"| RSLAD+, PGD-7 | clean | {rslad}" in text
    rslad = "48.64 ± 0.34 | 45.00 ± 0.00 | - | 2 | -3.64 | -10.7 | not reproduced |"
    assert f"| RSLAD+, PGD-7 | AutoAttack | {rslad}" in text
    part = text.split("### Table 3")[1].split("### ")[0]
    assert "- RSLAD+, PGD-7: Table 3 prints 83.13" in part and "a GPU, torch 2, commit c0" in part
    assert "AKD+, ST | clean | 87.21 ± 0.03 | - | - | - | - | - | not run |" in part
    new = readme.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert "direction only / not reproduced" in new and new.count(report.MARKS[0]) == 1


def test_student_rows_are_told_from_the_best_epoch_and_from_other_rows():
    names = [
        "student-alone (plain)",
        "student (vanilla), best on held-out images",
        "student (vanilla)",
    ]
    record = {"rows": [{"model": name, "clean_acc": i / 10} for i, name in enumerate(names)]}
    assert records.value(record, "student", "clean_acc") == 0.2
    assert records.value(record, "student", "clean_acc", best=True) == 0.1
    assert records.value(record, "student-alone", "clean_acc") == 0.0
    assert records.value(record, "teacher", "clean_acc") is None


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    report.main(report_flags(tmp_path, ROOT / "benchmark/results"))

    def without_figures(text):
        return re.sub(r"!\[.*\n\n", "", text)

    page = without_figures((ROOT / "docs/RESULTS.md").read_text())
    assert without_figures((tmp_path / "page.md").read_text()) == page
    assert readme.read_text() == (ROOT / "README.md").read_text()
    for path in ROOT.glob("benchmark/results/*.json"):
        assert json.loads(path.read_text())["scale"] == "full" and path.stat().st_size < 10_000


def test_a_readme_without_marks_is_refused_and_nothing_is_written(tmp_path, refused):
    make_readme(tmp_path, "hello")
    assert "results: begin" in refused(report.main, report_flags(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_figure_8_is_drawn_from_the_results_of_its_rows(only_rows, tmp_path):
    rows = [row for row in tables.ROWS if row.table == "paper1-figure8"]
    known = {f"fickle_teacher.py --method {m}" for m in ("teacher", "student", "hinton")}
    assert known <= {row.run for row in rows}
    assert sum("mc-ts --noise-rate" in row.run for row in rows) >= 3
    flags = f" {SMALL} --teacher-epochs 1 --teacher-model mlp-8 --eval-steps 1 --restarts 1"
    rows = [dataclasses.replace(row, run=row.run + flags) for row in (rows[0], rows[-1])]
    only_rows(*rows)("--seeds", "1")
    done = records.read_records(tmp_path / "results")
    shares = records.probability_shares(done)
    assert list(shares) == [row.name for row in rows]
    for share in shares.values():
        assert len(share) == 15 and sum(share) == pytest.approx(1)
    make_readme(tmp_path)
    report.main(report_flags(tmp_path))
    assert f"| {rows[0].name} | entropy" in (tmp_path / "page.md").read_text()
    if new_figures_are_possible():
        assert (tmp_path / "results-paper1-figure8.png").exists()


# ------------------------------------------------------------------------------------------------
# sweep.py


def test_a_sweep_runs_the_grid_once_and_ends_in_a_table(tmp_path, capsys, monkeypatch):
    reads, read = [], common.load_data

    def counted(*args, **options):
        reads.append(args)
        return read(*args, **options)

    monkeypatch.setattr(common, "load_data", counted)
    argv = ["robust_kd.py", "--grid", "alpha=0.2,0.8", "teacher-es=1,2", "--baseline", "--loss at"]
    argv += ["--", *shlex.split(SMALL_ROBUST), "--runs", str(tmp_path)]
    sweep.main(argv)
    assert len(reads) == 1
    (file,) = tmp_path.glob("robust_kd/sweep-*.json")
    first = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert out.count("teacher 1/1") == out.count("teacher 2/2") == 1  # shared by the two alphas
    assert first["lines"][1]["values"] == {"alpha": "0.2", "teacher-es": "2"}
    assert {"clean_acc", "pgd2_acc", "val_clean_acc", "val_pgd1_acc"} <= first["lines"][1].keys()
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("robust_kd/*/log.jsonl")}
    assert len(logs) == 5
    sweep.main(argv)
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    assert json.loads(file.read_text()) == first
    out = capsys.readouterr().out
    assert "RKD-Acc." in out and "RKD-Rob." in out
    if new_figures_are_possible():
        file.with_suffix(".png").unlink()
        plots.main(["sweep", str(file)])
        assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_line_of_a_sweep_is_named_and_the_others_go_on(tmp_path, capsys):
    argv = ["robust_kd.py", "--grid", "lr=1e30,0.1", "--", "--loss", "at"]
    with pytest.raises(SystemExit) as end:
        sweep.main([*argv, *shlex.split(SMALL_ROBUST), "--runs", str(tmp_path)])
    assert end.value.code == 1
    (file,) = tmp_path.glob("robust_kd/sweep-*.json")
    bad, good = json.loads(file.read_text())["lines"]
    assert "not finite" in bad["failed"] and good["failed"] is None and "clean_acc" in good


def test_the_choice_is_made_on_held_out_images_and_keeps_the_condition():
    def line(name, clean, robust, test):
        values = {
            "clean_acc": test,
            "pgd20_acc": test,
            "val_clean_acc": clean,
            "val_pgd7_acc": robust,
        }
        return {"values": {"alpha": name}} | {key: (v, 0.0) for key, v in values.items()}

    lines = [line("a", 0.80, 0.40, 0.1), line("b", 0.90, 0.30, 0.9), line("c", 0.75, 0.45, 0.2)]
    base = line("", 0.78, 0.41, 0.5)
    accurate, robust = sweep.describe_choices(lines, base, "pgd20_acc")
    assert "alpha a" in accurate and "test 0.1000" in accurate  # b loses too much robustness
    assert "alpha a" in robust  # c loses too much accuracy: 0.75 < 0.78 - 0.02
    assert "alpha b" in sweep.describe_choices(lines, {}, "pgd20_acc")[0]
    assert "no line" in sweep.describe_choices(lines[1:2], base, "pgd20_acc")[0]


@pytest.mark.parametrize(
    "argv, named",
    [
        ("robust_kd.py --grid alfa=1,2", "--alfa"),
        ("robust_kd.py --grid alpha=0.5,2", "--alpha"),
        ("robust_kd.py --grid alpha", "--grid"),
        ("robust_kd.py --grid alpha=1 alpha=2", "--grid"),
        ("nothing.py --grid alpha=1", "nothing.py"),
        ("robust_kd.py --grid alpha=1 -- --name x", "--name"),
        ("robust_kd.py --grid alpha=1 -- --epoch 3", "--epoch"),
        ("robust_kd.py --grid alpha=1 --baseline=--losses", "--losses"),
    ],
)
def test_a_sweep_refuses_before_any_work(argv, named, refused):
    assert named in refused(sweep.main, argv.split())


# ------------------------------------------------------------------------------------------------
# plots.py


def new_figures_are_possible():
    return common.new_figure(1, 1) is not None


def test_the_pareto_front():
    assert plots.pareto_front([(1, 3), (2, 2), (1, 2), (3, 1), (0, 3)]) == [0, 1, 3]


@pytest.fixture
def make_log(tmp_path):
    """make_log(name, clean, pgd) -> the folder of a run with these held-out accuracies."""

    def make(name, clean, pgd):
        rows = [{"stage": "teacher", "epoch": 1, "val_clean_acc": 0.9, "val_pgd7_acc": 0.9}]
        for epoch, (clean_acc, pgd_acc) in enumerate(zip(clean, pgd)):
            row = {"stage": "student", "epoch": epoch + 1}
            rows.append(row | {"val_clean_acc": clean_acc, "val_pgd7_acc": pgd_acc})
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "log.jsonl").write_text(lines)
        return str(tmp_path / name)

    return make


def test_curves_of_one_label_are_averaged_and_the_best_epoch_is_that_of_the_mean(make_log, capsys):
    a0 = make_log("a-s0", [0.1, 0.5, 0.6], [0.1, 0.4, 0.2])
    a1 = make_log("a-s1", [0.1, 0.7], [0.1, 0.2])  # stopped after two epochs
    b = make_log("lr=0.1-s0", [0.3], [0.2])
    curves = plots.group_curves([a0, a1, b], ["A", "A", "B"])
    np.testing.assert_allclose(curves["A"]["val_clean_acc"], [[0.1, 0.5], [0.1, 0.7]])
    assert plots.best_epoch(curves["A"]) == 1 and plots.best_epoch(curves["B"]) == 0
    args = plots.parse_args(["curves", a0, a1, f"mine={b}", f"lr=1={a0}", b])
    assert args.labels == ["a", "a", "mine", "lr=1", "lr=0.1"]
    assert args.runs == [a0, a1, b, a0, b]
    args = plots.parse_args(["curves", a0, b, "--labels", "x", "x"])
    assert args.labels == ["x", "x"]


def test_curves_are_drawn_and_printed(make_log, tmp_path, capsys):
    runs = [make_log("a-s0", [0.1, 0.5], [0.1, 0.4]), make_log("a-s1", [0.2, 0.5], [0.1, 0.3])]
    runs.append("C=" + make_log("b", [0.2, 0.4, 0.3], [0.1, 0.1, 0.3]))
    out = tmp_path / "curves.png"
    plots.main(["curves", *runs, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"a +2 +2 +0.5000 +0.5000 +0.3500 +0.3500", lines[2])
    assert re.match(r"C +1 +3 ", lines[3])
    if new_figures_are_possible():
        assert out.read_bytes()[:4] == b"\x89PNG"


def test_curves_refuse_what_is_no_run(make_log, tmp_path, refused):
    assert "nowhere" in refused(plots.main, ["curves", str(tmp_path / "nowhere")])
    assert "--val-size" in refused(plots.main, ["curves", make_log("teacher-only", [], [])])
    a = make_log("a", [0.1], [0.1])
    assert "--labels" in refused(plots.main, ["curves", a, "--labels", "x", "y"])
    assert "--out" in refused(plots.main, ["curves", a, "--out", "x.jpg"])
    (tmp_path / "a/log.jsonl").write_text("[1]\n{")
    assert "not the log" in refused(plots.main, ["curves", a])


def write_gradients(path, **changed):
    arrays = {"epochs": [1, 3], "layers": ["1.1", "1.2", "2.1"], "means": np.ones((2, 3)) * 1e-3}
    np.savez(path, **{f"student/{k}": np.array(v) for k, v in (arrays | changed).items()})
    return str(path)


def test_gradients_of_several_runs_are_one_table(tmp_path, capsys):
    files = [write_gradients(tmp_path / f"{name}.npz") for name in "ab"]
    out = tmp_path / "both.png"
    plots.main(["gradients", *files, "--out", str(out)])
    table = capsys.readouterr().out
    assert re.search(r"a: student, epoch 1, stage 1 +1.0e-03 +1.0e-03", table)
    assert re.search(r"b: student, epoch 3, stage 2 +1.0e-03 +-", table)
    if new_figures_are_possible():
        assert out.read_bytes()[:4] == b"\x89PNG"


def test_what_are_no_gradients_is_refused(tmp_path, refused):
    bad = write_gradients(tmp_path / "bad.npz", epochs=[1, 2, 3])
    assert "bad.npz: no file of --grad-heatmap" in refused(plots.main, ["gradients", bad])
    np.savez(tmp_path / "pickled.npz", means=np.array([{}], dtype=object))
    assert "pickled.npz" in refused(plots.main, ["gradients", str(tmp_path / "pickled.npz")])
    assert "--out" in refused(plots.main, ["gradients", bad, "--out", "x.pdf"])


def test_a_file_that_is_no_sweep_is_refused(tmp_path, refused):
    (tmp_path / "a.json").write_text("[1]")
    assert "no file of benchmark/sweep.py" in refused(plots.main, ["sweep", f"{tmp_path}/a.json"])
    assert "b.json" in refused(plots.main, ["sweep", f"{tmp_path}/b.json"])


# ------------------------------------------------------------------------------------------------
# trajectories.py: numbers

N_TRAIN, N_TEST = 30, 10
DESCENDING = np.arange(N_TEST)[::-1]  # the images by difficulty in the runs made here


def make_trajectories(epochs, shift=0.0, test=N_TEST, train=N_TRAIN):
    """Trajectories in which a later image is easier, and all of them get easier by the epoch."""
    rise = np.linspace(0.5, 1, epochs)[:, None]
    of_train, of_test = (rise * np.linspace(0.3, 0.8, n) for n in (train, test))
    made = {}
    for name, probs in {"train": of_train, "test": of_test, "adv": of_test / 2}.items():
        made[name] = torch.tensor(probs + shift).log().to(torch.float16)
    return made | {"entropy": torch.linspace(2, 1, epochs)}


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """The file of an .npz with two classes of shapes."""
    path = tmp_path_factory.mktemp("images") / "two.npz"
    arrays = common.make_shapes(N_TRAIN, N_TEST)
    arrays = arrays | {key: arrays[key] % 2 for key in ("y_train", "y_test")}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def make_run(tmp_path, two_classes):
    """make_run(name, student, teacher) -> a run's folder; {}: without trajectories, None: no net.

    The flags in config.json are those of robust_kd.py; the teacher is given by --teacher-ckpt.
    """

    def make(name, student, teacher=None, **changed):
        folder, model = tmp_path / name, common.build_model("mlp-2", 2)
        for file, kept in (("student.pt", student), ("given.pt", teacher)):
            if kept is not None:
                meta = {"trajectories": kept} if kept else {}
                common.save_model(folder / file, model, **meta)
        argv = ["--data", two_classes, "--val-size", "0", "--model", "mlp-2", "--loss", "at"]
        if teacher is not None:
            argv[-1:] = ["akd", "--teacher-ckpt", str(folder / "given.pt")]
        flags = common.run_flags(robust_kd.parse_args(argv))
        fingerprint = common.load_data(two_classes).fingerprint
        config = {"flags": flags, "fingerprint": fingerprint} | changed
        common.write_json(folder / "config.json", config)
        return str(folder)

    return make


def test_difficulty_is_the_mean_cross_entropy_and_ranks_the_images():
    logits = torch.randn(4, 7, 3)  # epochs, images, classes
    labels = torch.randint(3, (7,))
    each = [torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in logits]
    right = logits.log_softmax(2)[:, torch.arange(7), labels].numpy()
    score = trajectories.difficulty(right)
    np.testing.assert_allclose(score, torch.stack(each).mean(0), rtol=1e-5)
    assert list(trajectories.easiest_first(score)) == sorted(range(7), key=lambda i: score[i])


def test_cosine_of_equal_proportional_orthogonal_and_other_trajectories():
    student = np.log([[0.1, 0.2, 1.0, 0.3, 0.4], [0.4, 0.4, 1e-300, 0.4, 0.2]])
    teacher = np.log([[0.1, 0.4, 1e-300, 0.4, 0.9], [0.4, 0.8, 1.0, 0.3, 0.3]])
    expected = [1, 1, 0, 24 / 25, 0.42 / (0.2 * 0.9) ** 0.5]
    np.testing.assert_allclose(trajectories.cosine(student, teacher), expected, atol=1e-9)
    np.testing.assert_allclose(trajectories.cosine(teacher, student), expected, atol=1e-9)
    vanishing = np.array([[-2000.0], [-2000.0]])  # exp() is 0
    np.testing.assert_allclose(trajectories.cosine(vanishing, np.log([[0.5], [0.5]])), [1])


def test_cosine_with_an_early_stopped_teacher_is_over_its_epochs():
    full = np.log(np.random.default_rng(0).uniform(0.1, 1, (9, 5)))
    other = np.log(np.random.default_rng(1).uniform(0.1, 1, (9, 5)))
    short = trajectories.cosine(full, other[:4])
    np.testing.assert_array_equal(short, trajectories.cosine(full[:4], other[:4]))
    assert not np.allclose(short, trajectories.cosine(full, other))


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_smooth_is_the_mean_of_the_neighbours_that_there_are(window):
    values = np.random.default_rng(0).normal(size=12)
    expected = []
    for i in range(12):
        places = range(i - window // 2, i - window // 2 + window)
        expected.append(np.mean([values[j] for j in places if 0 <= j < 12]))
    np.testing.assert_allclose(trajectories.smooth(values, window), expected)


def test_quintiles_are_by_difficulty_and_each_kind_has_its_own():
    values = {
        "difficulty": -DESCENDING,
        "cosine": DESCENDING / 10,
        "teacher": DESCENDING / 10,
        "change": 0 * DESCENDING,
    }
    turned = values | {"difficulty": DESCENDING}
    rows = trajectories.quintiles({"natural": values, "adversarial": turned})
    assert [row["nat. p_T"] for row in rows] == "0.850 0.650 0.450 0.250 0.050 0.450".split()
    assert [row["adv. p_T"] for row in rows] == "0.050 0.250 0.450 0.650 0.850 0.450".split()
    assert rows[0]["images"] == "easiest fifth" and rows[4]["images"] == "hardest fifth"


def test_extremes_are_of_each_class_the_extreme_one_first():
    found = trajectories.extremes(np.array([5, 1, 4, 2, 3, 0]), np.array([0, 0, 0, 1, 1, 1]), 2)
    lists = [{end: list(indices) for end, indices in ends.items()} for ends in found]
    assert lists == [
        {"easiest": [1, 2], "hardest": [0, 2]},
        {"easiest": [5, 3], "hardest": [4, 3]},
    ]


def test_a_sheet_has_the_images_in_rows_of_eight():
    x = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    found = plots.sheet(x)
    assert found.shape == (8, 32, 3) and (found[1:3, 29:31] == 7).all()
    assert (found[5:7, 1:3] == 8).all() and (found[4:, 4:] == 255).all()


# ------------------------------------------------------------------------------------------------
# plots.py trajectories


def draw_trajectories(*argv):
    plots.main(["trajectories", *map(str, argv)])


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As if matplotlib were not installed; without figures a test is faster, too."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_tables_numbers_and_pictures_of_two_runs(make_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a = make_run("a", make_trajectories(4, shift=0.1), make_trajectories(4))
    b = make_run("b", make_trajectories(4), make_trajectories(2))  # stopped early
    out = tmp_path / "out"
    draw_trajectories(a, b, "--labels", "all", "stopped", "--window", 3, "--out", out)
    text = capsys.readouterr().out
    assert "stopped: student of 4 epochs, teacher of 2; cosine over the first 2" in text
    found = json.loads((out / "trajectories.json").read_text())
    ours = found["runs"]["all"]["natural"]
    assert list(np.argsort(ours["difficulty"])) == list(DESCENDING)
    np.testing.assert_allclose(ours["change"], 0.1, atol=2e-3)  # float16
    np.testing.assert_allclose(ours["teacher"], np.linspace(0.3, 0.8, N_TEST), atol=2e-3)
    np.testing.assert_allclose(found["runs"]["stopped"]["adversarial"]["change"], 0, atol=2e-3)
    assert found["runs"]["all"]["entropy"]["student"] == pytest.approx([2, 5 / 3, 4 / 3, 1], 1e-4)
    labels = common.make_shapes(N_TRAIN, N_TEST)["y_train"] % 2
    assert found["images"][1]["easiest"] == [i for i in range(N_TRAIN)[::-1] if labels[i] == 1]
    names = ["comparison.png", "images.png", "run-all.png", "run-stopped.png", "trajectories.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names[:-1])


def test_another_model_ranks_or_is_compared_with(make_run, tmp_path, no_matplotlib, capsys):
    turned = {name: values.flip(-1) for name, values in make_trajectories(3).items()}
    a = make_run("a", make_trajectories(4), make_trajectories(4))
    other = make_run("other", turned)
    found = []
    for flag in ("--difficulty-of", "--teacher"):
        draw_trajectories(a, "--images", 0, flag, f"{other}/student.pt")
        text = (tmp_path / "a" / "trajectories" / "trajectories.json").read_text()
        found.append(json.loads(text)["runs"]["a"]["natural"])
    assert list(np.argsort(found[0]["difficulty"])) == list(DESCENDING[::-1])
    np.testing.assert_allclose(found[0]["change"], 0, atol=1e-6)
    np.testing.assert_allclose(found[1]["change"], np.linspace(-0.5, 0.5, N_TEST), atol=2e-3)
    assert "pip install matplotlib" in capsys.readouterr().out
    names = [path.name for path in (tmp_path / "a/trajectories").iterdir()]
    assert names == ["trajectories.json"]


def test_a_run_without_teacher_has_entropies_and_images(make_run, tmp_path, no_matplotlib, capsys):
    draw_trajectories(make_run("a", make_trajectories(2)))
    assert "a: no teacher to compare with" in capsys.readouterr().out
    found = json.loads((tmp_path / "a/trajectories/trajectories.json").read_text())
    assert len(found["images"]) == 2 and found["runs"]["a"]["table"] is None


def test_what_does_not_fit_is_refused_and_nothing_is_written(make_run, refused, tmp_path):
    def refusal(*argv):
        return refused(draw_trajectories, *argv)

    two = make_trajectories(2)
    a = make_run("a", two, two)
    fewer = make_run("fewer", make_trajectories(2, test=9), make_trajectories(2, test=9))
    assert "nowhere: not the folder of a run" in refusal(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    assert "its run is not finished" in refusal(tmp_path / "half")
    without = refusal(make_run("b", two, {}))
    assert "given.pt: has no trajectories; train with --trajectories" in without
    assert "fewer: was trained on other images" in refusal(a, fewer)
    other = make_run("c", two, fingerprint=1)
    assert "c: was trained on other images" in refusal(a, other)
    assert "--data-root" in refusal(other)
    message = refusal(a, "--difficulty-of", f"{fewer}/student.pt")
    assert "--difficulty-of" in message and "30 training and 9 test images" in message
    assert "no such checkpoint" in refusal(a, "--teacher", "nowhere.pt")
    assert "--window: expected" in refusal(a, "--window", 0)
    assert "--labels" in refusal(a, a)
    assert "fewer than 5" in refusal(make_run("few", make_trajectories(2, test=4)))
    assert not list(tmp_path.rglob("trajectories*"))


def test_a_run_with_trajectories_from_end_to_end(two_classes, tmp_path, capsys, no_matplotlib):
    flags = f"{SMALL_ROBUST} --data {two_classes} --train-subset 30 --val-size 0 --epochs 3"
    flags += f" --loss akd --trajectories --name t --runs {tmp_path}"
    robust_kd.main(flags.split())
    folder = tmp_path / "robust_kd" / "t-s0"
    teacher_path = re.findall(r"^teacher: (.+\.pt)$", capsys.readouterr().out, re.M)[0]
    draw_trajectories(folder, "--out", tmp_path)
    assert "student of 3 epochs, teacher of 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "trajectories.json").read_text())["runs"]["t-s0"]
    assert [len(found["entropy"][key]) for key in ("student", "teacher")] == [3, 2]
    data, p = common.load_data(two_classes), {}
    for name, path in (("student", folder / "student.pt"), ("teacher", teacher_path)):
        model, _ = common.load_model(path)
        probs = model(common.to_float(data.x_test)).softmax(1).detach().numpy()
        p[name] = probs[np.arange(N_TEST), data.y_test]
    np.testing.assert_allclose(found["natural"]["teacher"], p["teacher"], atol=2e-3)  # float16
    np.testing.assert_allclose(found["natural"]["change"], p["student"] - p["teacher"], atol=4e-3)
    assert np.mean(found["adversarial"]["teacher"]) < np.mean(p["teacher"])


# ------------------------------------------------------------------------------------------------
# run.py --prepare


def test_data_sets_are_made_of_cifar10(tmp_path, refused):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 20), ("test", 11)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(tmp_path / "cifar10.npz", **arrays)
    run.main(["--prepare", "--data", str(tmp_path)])
    data = common.load_data(str(tmp_path / "planes-cars.npz"))
    assert data.classes == ["airplane", "automobile"]
    assert data.y_train.tolist() == [0, 1, 0, 1] and data.y_test.tolist() == [0, 1, 0]
    assert (data.x_test[2].numpy() == arrays["x_test"][10]).all()
    small = common.load_data(str(tmp_path / "cifar10-16.npz"))
    means = arrays["x_train"].reshape(20, 2, 2, 2, 2, 3).mean((2, 4)).round()
    assert (small.x_train.numpy() == means).all() and small.y_test.tolist() == [*range(10), 0]
    assert "cifar10.npz" in refused(run.main, ["--prepare", "--data", f"{tmp_path}/no"])


# ------------------------------------------------------------------------------------------------
# speed.py

LADDER = "ladder --data shapes --model wrn-10-1 --teacher-model mlp-8 --batch-size 8"
LADDER += " --rounds 2 --steps 1 --workers 0 --device cpu"


@pytest.mark.parametrize("loss", ["st", "ckd", "akd+"])
def test_the_ladder_of_a_cpu_has_five_rungs_that_agree(loss, capsys):
    speed.main(f"{LADDER} --loss {loss}".split())
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    names = [line.split(" | ")[0][2:] for line in lines]
    assert names == list(speed.RUNGS)[: speed.RUNGS_ON_CPU]
    assert all(re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \|", line) for line in lines)
    assert re.search(r"^ratio \d\.\d{3} \(in the attack BatchNorm", out, re.M)


def test_a_rung_that_trains_another_way_is_an_error(monkeypatch, refused):
    monkeypatch.setattr(common, "pgd", lambda model, x, *rest: 20 * x)
    error = refused(speed.main, f"{LADDER} --loss at".split())
    assert "in the attack the gradient of x alone: step 1: loss" in error


def test_operations_are_those_of_the_passes():
    data = common.load_data("shapes", train_subset=4)
    flags = "ladder --model mlp-8 --teacher-model mlp-8 --batch-size 4 --loss"
    forward = 4 * 2 * (3072 * 8 + 8 * 10)
    for loss, passes in (("st", 3), ("at", 17), ("ckd", 4), ("akd+", 18)):
        args = speed.parse_args(f"{flags} {loss}".split())
        assert speed.count_flops(data, args) == passes * forward


def test_the_page_of_speed_is_made_of_the_numbers_that_were_kept(monkeypatch, tmp_path):
    kept = json.loads((ROOT / "benchmark" / "speed.json").read_text())
    assert kept and (ROOT / "docs" / "SPEED.md").read_text() == speed.speed_page(kept)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    for record in (kept[0], kept[1], kept[0] | {"commit": "new"}):
        speed.keep(record)
    new = json.loads((tmp_path / "benchmark" / "speed.json").read_text())
    assert new == [kept[1], kept[0] | {"commit": "new"}]  # the same job once
    assert (tmp_path / "docs" / "SPEED.md").read_text() == speed.speed_page(new)


def test_what_is_fast_is_compared_with_what_is_exact(capsys, refused, monkeypatch):
    flags = "correct --model wrn-10-1 --batch-size 4 --steps 2 --precision fp32 bf16 --device cpu"
    monkeypatch.setattr(speed, "STEPS", 1)
    speed.main(flags.split())
    out = capsys.readouterr().out
    assert len(re.findall(r"^\d x \d+ -> \d+, kernel .* (?:fp32|bf16) ", out, re.M)) == 16
    assert "reference, other starts" in out and "channels_last" in out
    assert len(re.findall(r"^pgd(?:7|20) +(?:fp32|bf16) +\d\.\d+$", out, re.M)) == 4
    real_convolve, real_pgd, real_train_with = speed.convolve, common.pgd, speed.train_with

    def wrong_convolve(x, w, *options):
        y, x_gradient, w_gradient = real_convolve(x, w, *options)
        return y, x_gradient, w_gradient * (1.02 if x.dtype == torch.float32 else 1)

    def weak_pgd(model, x, *rest):
        return x if torch.is_autocast_enabled("cpu") else real_pgd(model, x, *rest)

    def wrong_train_with(data, args, tricks):
        for loss in real_train_with(data, args, tricks):
            yield loss * (1.5 if "channels_last" in tricks else 1)

    monkeypatch.setattr(speed, "convolve", wrong_convolve)
    monkeypatch.setattr(common, "pgd", weak_pgd)
    monkeypatch.setattr(speed, "train_with", wrong_train_with)
    error = refused(speed.main, flags.split())
    assert "side 8 in fp32: of w is off by 2.0e-02; " in error and "pgd20 in bf16: loss" in error
    assert "channels_last: losses differ" in error
    assert "reference: losses" not in error and "other starts: losses" not in error


def test_the_plain_autoattack_breaks_what_pgd_breaks_and_keeps_to_the_ball(small):
    model, images, labels = small
    x, labels, eps = common.to_float(images[:40]), labels[:40], 4 / 255
    model.requires_grad_(True)  # in a plain rendering weight gradients are made too
    robust = plain.autoattack(model, x, labels, eps, 8, 40, targets=2, batch_size=20)
    pgd = common.predict(model, images[:40], labels, (eps, eps / 4, 8)).argmax(1) == labels
    clean = common.predict(model, images[:40]).argmax(1) == labels
    assert not (robust & ~clean).any() and robust.sum() <= pgd.sum() + 1 < clean.sum()
    target = (labels + 1) % 10
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        x_adv = plain.attack(name, model, x, labels, target, eps, 8, 40)
        assert (x_adv - x).abs().max() <= eps + 1e-6 and 0 <= x_adv.min() <= x_adv.max() <= 1
        with torch.no_grad():
            broken = clean & (model(x_adv).argmax(1) != labels)
        assert broken.any(), name


def test_autoattack_is_timed_against_the_plain_one(capsys, monkeypatch):
    def untrained(data):
        return common.new_model(data, "mlp-4", 0, "student").eval()

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(speed, "train_small_net", untrained)
    speed.main("autoattack --n 20 --steps 2 --queries 5 --repeats 1 --device cpu".split())
    out = capsys.readouterr().out
    ways = re.findall(r"^(plain|ours) +(\d\.\d{4}) +[\d.]+ +\d+\.\d{3}$", out, re.M)
    assert [name for name, _ in ways] == ["plain", "ours"]
    assert abs(float(ways[0][1]) - float(ways[1][1])) <= 0.1
