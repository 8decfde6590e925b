"""benchmark/: the printed numbers, the runner, the report, figures and speed."""

import csv
import importlib
import json
import re
import shlex
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import robust_kd
from benchmark import plots, report, run, speed, trajectories

SMALL = "--data shapes --model mlp-8 --train-subset 40 --test-subset 10 --val-size 20 --epochs 2"
SMALL += " --batch-size 16 --device cpu"
SMALL_ROBUST = f"{SMALL} --steps 1 --teacher-epochs 2 --teacher-batch-size 16"
NUMBERS = run.read_printed(run.PRINTED)
COMMANDS = list(dict.fromkeys(row["command"] for row in NUMBERS if row["command"]))

# ------------------------------------------------------------------------------------------------
# printed.csv

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
    found = Counter(f"{row['paper']}-{row['table']}" for row in NUMBERS)
    counted = {table: n for table, n in found.items() if not table.endswith("-choices")}
    assert counted == PRINTED


@pytest.mark.parametrize(
    "table, line, metric, value, deviation",
    [
        ("text", "soft randomization, sigma 0.05", "pgd20_conditional_acc", 16.75, ""),
        ("figure10", "WRN-16-2, corruption 0.25", "clean_acc", 76.07, ""),
        ("figure10", "r 0.5, corruption 0.5", "cinic_acc", 44.68, ""),
        ("table1", "CIFAR-100, EDM, AT+", "aa_acc", 32.60, "0.30"),
        ("table2", "x1/16, RKD-Rob.", "aa_acc", 32.14, "0.27"),
        ("table5", "CIFAR-100, FFGSM, 4 models", "aa_acc", 25.36, "0.11"),
        ("table6", "CIFAR-10, DDPM, ARD+, alpha 0.8", "clean_acc", 88.03, "0.00"),
        ("table7", "CIFAR-100, EDM, AKD+, alpha 0.8", "pgd20_acc", 37.05, "0.40"),
        ("table11", "TRADES+ teacher, RSLAD+, alpha 0.8", "pgd20_acc", 62.94, ""),
        ("table2", "two omitted, distilled", "only_2_acc", 92.73, ""),
        ("table5", "AT Tf-KD self", "aa_acc", 48.83, ""),
    ],
)
def test_printed_values(table, line, metric, value, deviation):
    wanted = {"table": table, "line": line, "metric": metric}
    (row,) = [row for row in NUMBERS if wanted.items() <= row.items()]
    assert (float(row["printed"]), row["deviation"]) == (value, deviation)


def test_a_line_and_metric_are_printed_once_and_every_line_is_whole():
    keys = [(r["paper"], r["table"], r["line"], r["metric"]) for r in NUMBERS]
    assert len(set(keys)) == len(keys)
    assert {row["paper"] for row in NUMBERS} == set(report.PAPERS)
    for row in NUMBERS:
        assert row["command"] or row["remark"], row
        assert re.fullmatch(r"[\d.]+", row["printed"]) and None not in row, row
        assert re.fullmatch(r"(\d+\.\d\d)?", row["deviation"]), row


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_gives_the_metrics_of_its_lines(command):
    python, script, *flags = shlex.split(command)
    assert python == "python"
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.parse_args([*flags, "--name", run.name_of(command), "--seed", "3"])
    columns = {"clean_acc", "macs", "weights", *run.EVALUATED}
    if "--omit-digit" in args.given:
        columns |= {f"without_{args.omit_digit}_acc", f"only_{args.omit_digit}_acc"}
    if "pgd20" in getattr(args, "eval_attack", ["clean", "pgd20"]):
        columns |= {"pgd20_acc", "pgd20_conditional_acc"}
    assert {row["metric"] for row in NUMBERS if row["command"] == command} <= columns


def test_every_command_has_a_name_of_its_own():
    assert len({run.name_of(command) for command in COMMANDS}) == len(COMMANDS)


def test_the_papers_sizes_are_ours():
    large = [row for row in NUMBERS if row["line"] == "large model, size"]
    assert {float(row["printed"]) for row in large} == {784 * 1200 + 1200 * 1200 + 1200 * 10}
    (wrn,) = [row for row in NUMBERS if row["line"] == "WRN-40-2 parameters"]
    assert report.measured(wrn, {}) == [2.243546]


# ------------------------------------------------------------------------------------------------
# run.py

AT = f"python robust_kd.py --loss at {SMALL_ROBUST}"
LINES = (  # line, net, metric, printed, command; the third metric is not in the summary
    ("at", "student", "clean_acc", "99.00", AT),
    ("at", "student", "pgd20_acc", "50.00", AT),
    ("at", "student", "pgd3_acc", "40.00", AT),
    ("an assumption", "", "trainings", "8", ""),
)


@pytest.fixture
def only_lines(monkeypatch, tmp_path):
    """only_lines(*lines): these are all there are -> call(*words): run.py in folders of a test.

    The scripts run in this process, and evaluate PGD-3 where the papers have AutoAttack.
    """

    def call_here(words):
        print(f"$ python {words[0]}")
        importlib.import_module(words[0].removesuffix(".py")).main(words[1:])

    def set_lines(*lines):
        with open(tmp_path / "printed.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, NUMBERS[0])
            writer.writeheader()
            for line, net, metric, printed, command in lines:
                row = {"line": line, "net": net, "metric": metric, "printed": printed}
                writer.writerow({"paper": "paper2", "table": "table9", "command": command} | row)
        monkeypatch.setattr(run, "call", call_here)
        monkeypatch.setitem(run.EVALUATED, "pgd3_acc", "pgd3")
        folders = ["--runs", f"{tmp_path}/runs", "--results", f"{tmp_path}/results"]
        return lambda *words: run.main([*words, *folders, "--printed", f"{tmp_path}/printed.csv"])

    return set_lines


def read_results(tmp_path):
    """The records in the folder of a test."""
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "results").iterdir())]


def test_papers_and_tables_are_chosen_by_their_names(refused):
    def chosen(*words):
        return {(row["paper"], row["table"]) for row in run.parse_args([*words]).rows}

    assert chosen("paper2", "table2") == {("paper2", "table2")}
    assert chosen("table2") == {("paper2", "table2"), ("paper3", "table2")}
    assert {paper for paper, _ in chosen("paper1", "paper3")} == {"paper1", "paper3"}
    assert len(run.parse_args(["--list"]).rows) == len(NUMBERS)
    assert "no lines of paper2 table99" in refused(run.parse_args, ["paper2", "table99"])
    assert "no lines of paper1 table2" in refused(run.parse_args, ["paper1", "table2"])
    assert "--list" in refused(run.parse_args, [])


def test_a_command_writes_one_small_result_and_is_not_run_again(only_lines, tmp_path, capsys):
    call = only_lines(*LINES)
    call("paper2")
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert (record["command"], record["seed"]) == (AT, 0) and path.stat().st_size < 8000
    assert record["commit"] and record["torch"] and record["flags"]["epochs"] == 2
    student = {row["net"]: row for row in record["rows"]}["student"]
    assert {"clean_acc", "pgd20_acc", "pgd3_acc", "digest"} <= student.keys()
    assert str(tmp_path) not in json.dumps(record["rows"])
    before = path.stat().st_mtime_ns
    assert capsys.readouterr().out.count("$ python") >= 2  # training and evaluation
    call("table9")
    assert path.stat().st_mtime_ns == before and "$ python" not in capsys.readouterr().out
    call("--list")
    assert re.search(r"paper2 table9 +0 +python robust_kd", capsys.readouterr().out)


def test_a_command_on_all_test_images_is_evaluated(only_lines, tmp_path):
    command = AT.replace("--test-subset 10 ", "")
    only_lines(("at", "student", "pgd3_acc", "40.00", command))("paper2")
    (record,) = read_results(tmp_path)
    assert "test_subset" not in record["flags"]
    assert all("pgd3_acc" in row for row in record["rows"] if row["net"] in ("student", "best"))


def test_a_command_of_the_noisy_scripts_is_evaluated_and_reported_as_it_was_attacked(
    only_lines, tmp_path
):
    command = f"python fickle_teacher.py --method hinton {SMALL} --teacher-epochs 1"
    command += " --teacher-model mlp-8 --eval-restarts 2 --eval-eps 0.05 --eval-step-size 0.01"
    only_lines(("kd", "student", "pgd3_acc", "40.00", command))("paper2")
    records = run.read_results(tmp_path / "results")
    rows = run.read_printed(tmp_path / "printed.csv")
    assert "eps 12.8/255, PGD step 2.55/255, 2 start(s)" in report.origin(rows, records)
    (path,) = tmp_path.glob("runs/fickle_teacher/*/student-pgd3_acc.json")
    assert json.loads(path.read_text())["eps"] == 0.05


def test_a_script_runs_in_a_process_of_its_own_and_its_failure_is_named(tmp_path, refused, capfd):
    words = ["benchmark/prepare.py", "cifar10-16", "--data-root", str(tmp_path)]
    assert refused(run.call, words) == f"python {' '.join(words)}: status 2"
    assert "there is no" in capfd.readouterr().err


def test_a_command_that_fails_does_not_stop_the_next_one(only_lines, tmp_path, capsys):
    bad = ("bad", "student", "clean_acc", "50.00", f"{AT} --lr 1e15")
    missing = ("data", "student", "clean_acc", "50.00", f"{AT} --data data/nowhere.npz")
    call = only_lines(bad, missing, *LINES[:2])
    with pytest.raises(SystemExit) as end:
        call("paper2", "--seed", "0", "1")
    out = capsys.readouterr().out
    assert end.value.code == 1 and "4 failed" in out
    assert "seed 1: " in out and "not finite" in out and "nowhere.npz: no such file" in out
    assert [(r["command"], r["seed"]) for r in read_results(tmp_path)] == [(AT, 0), (AT, 1)]


def test_an_ensemble_is_evaluated_as_its_teachers_together(only_lines, tmp_path):
    command = f"python robust_kd.py --loss akd+ --teacher-training at at {SMALL_ROBUST}"
    only_lines(("two", "ensemble", "pgd3_acc", "50.00", command))("paper2")
    (record,) = read_results(tmp_path)
    nets = {row["net"]: row for row in record["rows"]}
    assert {"teacher", "teacher2", "ensemble", "student"} <= nets.keys()
    assert "pgd3_acc" in nets["ensemble"] and "pgd3_acc" not in nets["student"]
    (path,) = tmp_path.glob("runs/robust_kd/*/ensemble-pgd3_acc.json")
    evaluation = json.loads(path.read_text())
    assert evaluation["rows"][0]["model"] == "ensemble of 2"
    assert len(re.findall(r"teachers/(\w+)/teacher\.pt", evaluation["command"])) == 2


def test_a_second_table_with_the_same_command_keeps_what_the_first_has_measured(
    only_lines, tmp_path, monkeypatch
):
    monkeypatch.setitem(run.EVALUATED, "pgd2_acc", "pgd2")
    for metric in ("pgd2_acc", "pgd3_acc"):
        only_lines(("at", "student", metric, "40.00", AT))("paper2")
    (record,) = read_results(tmp_path)
    student = {row["net"]: row for row in record["rows"]}["student"]
    assert {"pgd2_acc", "pgd3_acc"} <= student.keys()


def test_the_best_epoch_of_a_seed_may_be_its_last_one():
    row = {"command": "c", "net": "student", "metric": "clean_acc"}
    nets = [{"net": "student", "clean_acc": 0.5}, {"net": "best", "clean_acc": 0.6}]
    records = {("c", 0): {"rows": nets}, ("c", 1): {"rows": [{"net": "student", "clean_acc": 0.4}]}}
    assert report.measured(row, records) == [50.0, 40.0]
    assert report.measured(row, records, "best") == [60.0, 40.0]


def test_seeds_with_the_same_net_count_as_one_seed(only_lines, tmp_path):
    command = f"python fickle_teacher.py --method hinton {SMALL} --teacher-epochs 1"
    command += " --teacher-model mlp-8 --eval-restarts 1"
    only_lines(("teacher", "teacher", "clean_acc", "50.00", command))("paper2", "--seed", "0", "1")
    records = run.read_results(tmp_path / "results")
    row = run.read_printed(tmp_path / "printed.csv")[0]
    assert len(records) == 2
    assert len(report.measured(row, records)) == 1
    assert len(report.measured(row | {"net": "student"}, records)) == 2


def test_a_file_that_is_no_result_is_named(tmp_path, refused):
    (tmp_path / "a.json").write_text("[1]")
    assert "a.json: not a result" in refused(run.read_results, tmp_path)


def test_early_stops_are_found_where_the_teacher_was_trained(tmp_path, capsys):
    flags = f"{SMALL_ROBUST} --loss akd --teacher-epochs 3 --save-every 1 --epochs 1"
    for stop in ("3", "2", "1"):  # as docs/robust_kd.md says: the longest one first
        argv = [*flags.split(), "--teacher-es", stop, "--runs", str(tmp_path), "--name", stop]
        robust_kd.main(argv)
    assert len(re.findall(r"^teacher +\d+/\d+ ", capsys.readouterr().out, re.M)) == 3
    teachers = {}  # --name -> the file of its teacher
    for name in ("1", "2", "3"):
        folder = tmp_path / f"robust_kd/{name}-s0"
        teachers[name] = folder / common.read_summary(folder)[0]["file"]
    files = trajectories.epoch_files(teachers["3"])
    assert [file.resolve() for file in files] == [file.resolve() for file in teachers.values()]
    assert [common.load_model(file).meta["epoch"] for file in files] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------
# What the pages say of tables

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
    "runs",
    "data_root",
    "device",
    "grad_heatmap",
    "save_every",
    "teacher_ckpt",
}


def labelled_commands():
    """(script, flags, table as in printed.csv) of each command with such a comment."""
    found = set()
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.py")]:
        lines = re.findall(r"^ *(?:\w+ +)?python (\w+)\.py([^#`\n]*)# (.*)", path.read_text(), re.M)
        for script, flags, comment in lines:
            numbers = r"\d+(?:(?:,| and| to) \d+)*"
            for kind, listed in re.findall(rf"\b(Table|Figure)s? ({numbers})", comment):
                for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
                    for number in range(int(first), int(last or first) + 1):
                        table = f"{PAPER_OF_SCRIPT[script]}-{kind.lower()}{number}"
                        if table in PRINTED:
                            found.add((script, flags.strip(), table))
    return sorted(found)


def computed(script, flags):
    """What the flags of a script mean, without NOT_COMPUTED."""
    args = vars(importlib.import_module(script).parse_args(shlex.split(flags)))
    return {name: value for name, value in args.items() if name not in NOT_COMPUTED}


@pytest.mark.parametrize("script, flags, table", labelled_commands())
def test_a_command_that_is_said_to_be_of_a_table_is_one_of_its_commands(script, flags, table):
    rows = [row for row in NUMBERS if f"{row['paper']}-{row['table']}" == table and row["command"]]
    commands = {row["command"].removeprefix("python ") for row in rows}
    of_script = [text.split(".py", 1)[1] for text in commands if text.startswith(f"{script}.py")]
    assert computed(script, flags) in [computed(script, text) for text in of_script]


def test_pages_label_commands_with_tables():
    assert len(labelled_commands()) > 12


# ------------------------------------------------------------------------------------------------
# report.py


def test_the_page_shows_what_ran_printed_beside_measured(only_lines, tmp_path):
    only_lines(*LINES, ("late", "student", "clean_acc", "1.00", f"{AT} --lr 0.3"))
    (tmp_path / "results").mkdir()
    flags = {"eps": 8 / 255, "step_size": None, "restarts": 1, "test_subset": None}
    for seed, clean in ((0, 0.985), (1, 0.995)):
        rows = [
            {"net": "student", "clean_acc": clean, "pgd3_acc": 0.413, "digest": f"{seed}"},
            {"net": "best", "clean_acc": 0.9, "digest": f"best {seed}"},
        ]
        record = {"command": AT, "seed": seed, "rows": rows, "flags": flags}
        record |= {"gpu": "a GPU", "torch": "2", "commit": "c0"}
        (tmp_path / f"results/{seed}.json").write_text(json.dumps(record))
    folders = ["--printed", f"{tmp_path}/printed.csv", "--results", f"{tmp_path}/results"]
    report.main([*folders, "--page", f"{tmp_path}/page.md"])
    text = (tmp_path / "page.md").read_text()
    assert "| at | clean | 99.00 | 99.00 ± 0.71 | 2 | +0.00 | 90.00 ± 0.00 |" in text
    assert "| at | PGD-3 | 40.00 | 41.30 ± 0.00 | 2 | +1.30 | - |" in text
    assert "a GPU, torch 2, commit c0; all test images; eps 8/255" in text
    assert "seeds 0, 1" in text and AT in text
    assert "late" not in text and "| 5 | 2 |" in text  # of five printed numbers two are measured


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    report.main(["--page", f"{tmp_path}/page.md"])
    page = (ROOT / "docs/RESULTS.md").read_text()
    assert (tmp_path / "page.md").read_text() == page
    for path in run.RESULTS.iterdir():
        record = json.loads(path.read_text())
        assert path.name == f"{run.name_of(record['command'])}-s{record['seed']}.json"
        assert record["command"] in COMMANDS and path.stat().st_size < 10_000
    readme = (ROOT / "README.md").read_text()
    assert f"the {sum(PRINTED.values())} numbers" in readme


# ------------------------------------------------------------------------------------------------
# plots.py


def new_figures_are_possible():
    return common.new_figure(1, 1) is not None


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
    tie = {"val_clean_acc": np.array([[0.2, 0.234]]), "val_pgd7_acc": np.array([[0.22, 0.186]])}
    assert plots.best_epoch(tie) == 0
    args = plots.parse_args(["curves", a0, a1, f"mine={b}", f"lr=1={a0}", b])
    assert args.labels == ["a", "a", "mine", "lr=1", "lr=0.1"]
    assert args.runs == [a0, a1, b, a0, b]


def test_curves_of_other_runs_are_not_averaged_and_no_run_counts_twice(make_log, tmp_path, refused):
    a = make_log("a-s0", [0.1, 0.5], [0.1, 0.4])
    (tmp_path / "elsewhere").mkdir()
    other = make_log("elsewhere/a-s1", [0.1, 0.5], [0.1, 0.4])
    message = refused(plots.parse_args, ["curves", a, other])
    assert f"{tmp_path} has runs of the name a too; tell them apart by LABEL=RUN" in message
    assert plots.parse_args(["curves", a, f"a={other}"]).labels == ["a", "a"]
    message = refused(plots.parse_args, ["curves", a, f"{tmp_path}/elsewhere/../a-s0"])
    assert "a-s0: expected each run once" in message


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
    (tmp_path / "x-s0").mkdir()
    (tmp_path / "y-s0").mkdir()
    files = [write_gradients(tmp_path / f"{run}-s0/gradients.npz") for run in "xy"]
    plots.main(["gradients", *files, "--out", str(out)])  # as --grad-heatmap names the files
    table = capsys.readouterr().out
    assert "x-s0: student, epoch 1, stage 1" in table and "y-s0: student, epoch 1" in table
    if new_figures_are_possible():
        assert out.read_bytes()[:4] == b"\x89PNG"


def test_two_runs_of_one_name_are_not_one_line_of_the_heat_map(tmp_path, refused):
    files = []
    for runs in "ab":
        (tmp_path / runs / "x-s0").mkdir(parents=True)
        files.append(write_gradients(tmp_path / f"{runs}/x-s0/gradients.npz"))
    assert "there are two runs named x-s0" in refused(plots.main, ["gradients", *files])


def test_what_are_no_gradients_is_refused(tmp_path, refused):
    bad = write_gradients(tmp_path / "bad.npz", epochs=[1, 2, 3])
    assert "bad.npz: no file of --grad-heatmap" in refused(plots.main, ["gradients", bad])
    np.savez(tmp_path / "pickled.npz", means=np.array([{}], dtype=object))
    assert "pickled.npz" in refused(plots.main, ["gradients", str(tmp_path / "pickled.npz")])
    assert "--out" in refused(plots.main, ["gradients", bad, "--out", "x.pdf"])


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
        made[name] = np.log(probs + shift)
    return made | {"entropy": np.linspace(2, 1, epochs)}


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """The file of an .npz with two classes of shapes."""
    path = tmp_path_factory.mktemp("images") / "two.npz"
    arrays = common.make_shapes(N_TRAIN, N_TEST)
    arrays = arrays | {key: arrays[key] % 2 for key in ("y_train", "y_test")}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def make_run(tmp_path, two_classes, monkeypatch):
    """make_run(name, student, teacher) -> the folder of a run whose nets have these trajectories.

    What read_trajectories would compute is given here; the test from end to end computes it.
    """
    kept = {}  # file -> trajectories
    monkeypatch.setattr(trajectories, "read_trajectories", lambda path, *_: kept[str(path)])

    def make(name, student, teacher=None, flags=(), **changed):
        folder = tmp_path / name
        argv = ["--data", two_classes, "--val-size", "0", "--model", "mlp-2", *flags]
        args = robust_kd.parse_args(argv)
        fingerprint = common.load_data(two_classes, train_subset=args.train_subset).fingerprint
        config = {"flags": common.run_flags(args), "fingerprint": fingerprint}
        common.write_json(folder / "config.json", config | changed)
        rows = []
        for net, numbers in (("student", student), ("teacher", teacher)):
            if numbers is not None:
                kept[str(folder / f"{net}.pt")] = numbers
                rows.append({"net": net, "model": net, "file": f"{net}.pt"})
        common.write_json(folder / "summary.json", rows)
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
    draw_trajectories(a, b, "--labels", "all", "stopped", "--out", out)
    text = capsys.readouterr().out
    assert "stopped: student of 4 epochs, teacher of 2; cosine over the first 2" in text
    found = json.loads((out / "trajectories.json").read_text())
    ours = found["runs"]["all"]["natural"]
    assert list(np.argsort(ours["difficulty"])) == list(DESCENDING)
    np.testing.assert_allclose(ours["change"], 0.1, atol=1e-5)  # written with five digits
    np.testing.assert_allclose(ours["teacher"], np.linspace(0.3, 0.8, N_TEST), atol=1e-5)
    np.testing.assert_allclose(found["runs"]["stopped"]["adversarial"]["change"], 0, atol=1e-5)
    assert found["runs"]["all"]["entropy"]["student"] == pytest.approx([2, 5 / 3, 4 / 3, 1], 1e-4)
    labels = common.make_shapes(N_TRAIN, N_TEST)["y_train"] % 2
    assert found["images"][1]["easiest"] == [i for i in range(N_TRAIN)[::-1] if labels[i] == 1]
    names = ["comparison.png", "images.png", "run-all.png", "run-stopped.png", "trajectories.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names[:-1])


def test_each_panel_of_a_trajectory_says_what_it_shows():
    pytest.importorskip("matplotlib")
    values = dict.fromkeys(("difficulty", "cosine", "teacher", "change"), np.arange(6) / 6)
    figure = common.new_figure(12, 6)
    plots.draw_trajectories_of_run(figure, "a", dict.fromkeys(trajectories.KINDS, values), 2)
    upper, lower = figure.axes[:3], figure.axes[3:]
    starts = ["agreement of student", "teacher: probability", "student's probabilit"]
    assert [axis.get_title()[:20] for axis in upper] == starts
    assert {axis.get_xlabel() for axis in lower} == {plots.RANK}
    assert [axis.get_ylabel() for axis in (upper[0], lower[0])] == [
        "natural images",
        "adversarial images",
    ]


def test_another_model_ranks_and_is_compared_with(make_run, tmp_path, no_matplotlib, capsys):
    turned = {name: values[..., ::-1] for name, values in make_trajectories(3).items()}
    a = make_run("a", make_trajectories(4), make_trajectories(4))
    other = make_run("other", turned)
    draw_trajectories(a, "--teacher", f"{other}/student.pt")
    text = (tmp_path / "a" / "trajectories" / "trajectories.json").read_text()
    found = json.loads(text)["runs"]["a"]["natural"]
    assert list(np.argsort(found["difficulty"])) == list(DESCENDING[::-1])
    np.testing.assert_allclose(found["change"], np.linspace(-0.5, 0.5, N_TEST), atol=1e-5)
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
    fewer = make_run("fewer", two, two, ["--test-subset", "9"])
    assert "nowhere: not the folder of a run" in refusal(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    assert "its run is not finished" in refusal(tmp_path / "half")
    assert "fewer: was trained or tested on other images" in refusal(a, fewer)
    less = make_run("less", two, two, ["--train-subset", "20"])
    assert "less: was trained or tested on other images" in refusal(a, less)
    assert "--data-root" in refusal(make_run("c", two, fingerprint=1))
    assert "--labels" in refusal(a, a)
    assert "fewer than 5" in refusal(make_run("few", two, two, ["--test-subset", "4"]))
    assert not list(tmp_path.rglob("trajectories*"))


def test_trajectories_are_those_of_the_nets_of_all_epochs(two_classes, tmp_path, capsys, refused):
    flags = f"{SMALL_ROBUST} --data {two_classes} --train-subset 30 --val-size 0 --epochs 3"
    flags += f" --loss akd --ema 0.5 --save-every 1 --name t --runs {tmp_path}"
    robust_kd.main(flags.split())
    folder = tmp_path / "robust_kd/t-s0"
    teacher_path = re.findall(r"^teacher: (.+\.pt)$", capsys.readouterr().out, re.M)[0]
    draw_trajectories(folder, "--out", tmp_path)
    assert "student of 3 epochs, teacher of 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "trajectories.json").read_text())["runs"]["t-s0"]
    data, flags = common.load_data(two_classes), common.read_json(folder / "config.json")["flags"]
    images, p, of_epochs = common.to_float(data.x_test), {}, {}
    for name, path in (("student", folder / "student.pt"), ("teacher", teacher_path)):
        model = common.load_model(path)
        p[name] = model(images).softmax(1).numpy()[np.arange(N_TEST), data.y_test]
        of_epochs[name] = trajectories.read_trajectories(path, data, flags)
        last = np.exp(of_epochs[name]["test"][-1])
        np.testing.assert_allclose(last, p[name], atol=1e-5)
    np.testing.assert_allclose(found["natural"]["teacher"], p["teacher"], atol=2e-5)
    np.testing.assert_allclose(found["natural"]["change"], p["student"] - p["teacher"], atol=2e-5)
    assert np.mean(found["adversarial"]["teacher"]) < np.mean(p["teacher"])
    assert [len(found["entropy"][name]) for name in ("student", "teacher")] == [3, 2]
    first = common.load_model(folder / "student-epoch1.pt")
    probs = common.predict(first, data.x_train).softmax(1)
    entropy = -(probs * probs.log()).sum(1).mean().item()
    assert found["entropy"]["student"][0] == pytest.approx(entropy, abs=2e-5)
    right = probs[torch.arange(N_TRAIN), data.y_train].log()
    np.testing.assert_allclose(of_epochs["student"]["train"][0], right, atol=1e-5)
    assert (np.diff(of_epochs["student"]["adv"], axis=0) != 0).any(1).all()  # each epoch is its own
    again = trajectories.read_trajectories(folder / "student.pt", data, flags)
    assert np.array_equal(again["adv"], of_epochs["student"]["adv"])

    argv = [folder, "--out", tmp_path / "more", "--teacher"]
    assert "no such checkpoint" in refused(draw_trajectories, *argv, "nowhere.pt")
    common.save_model(tmp_path / "given.pt", common.build_model("mlp-2", 2))
    assert "after how many epochs" in refused(draw_trajectories, *argv, tmp_path / "given.pt")
    (folder / "student-epoch2.pt").unlink()
    line = refused(draw_trajectories, folder, "--out", tmp_path / "more")
    assert "its net after epoch 2 is not there" in line and "--save-every 1" in line
    assert not (tmp_path / "more").exists()


# ------------------------------------------------------------------------------------------------
# speed.py

LADDER = "ladder --data shapes --model wrn-10-1 --teacher-model mlp-8 --batch-size 8"
LADDER += " --rounds 2 --steps 1 --workers 0 --device cpu"


@pytest.mark.parametrize("loss", ["st", "ckd", "akd+"])
def test_the_rungs_of_the_ladder_on_a_cpu_agree(loss, capsys):
    speed.main(f"{LADDER} --loss {loss}".split())
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    names = [line.split(" | ")[0][2:] for line in lines]
    rungs = list(speed.RUNGS)[: speed.RUNGS_ON_CPU]
    if loss in ("st", "ckd"):
        rungs.remove("in the attack the gradient of x alone")
    assert names == rungs
    assert all(re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \|", line) for line in lines)
    assert re.search(r"^ratio \d\.\d{3} \(channels_last / DataLoader", out, re.M)


def test_the_numbers_of_the_ladder_are_those_of_its_times(monkeypatch, capsys):
    kept, times = [], {"a": [0.1, 0.2, 0.3], "b": [0.05, 0.1, 0.15]}
    monkeypatch.setattr(speed, "keep", kept.append)
    monkeypatch.setattr(speed, "start_rungs", lambda *_: ({}, {"a": 1.0, "b": 2.0}))
    monkeypatch.setattr(speed, "count_flops", lambda *_: 8e12)
    monkeypatch.setattr(speed, "time_in_turn", lambda *_: times)
    speed.main("ladder --data shapes --batch-size 8 --device cpu --keep".split())
    a, b = kept[0]["rungs"]
    assert (a["ms"], a["images_per_second"], a["tflops"]) == pytest.approx((200, 40, 40))
    assert (b["ms"], b["images_per_second"], b["tflops"]) == pytest.approx((100, 80, 80))
    assert "ratio 0.500 (b / a" in capsys.readouterr().out


def test_the_first_round_of_the_ladder_warms_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def loop():
        for cost in (9.0, 9.0, 1.0, 1.0, 2.0, 2.0):  # two steps in each round
            clock[0] += cost
            yield torch.tensor(1.0)

    args = SimpleNamespace(rounds=2, steps=2)
    assert speed.time_in_turn({"a": loop()}, args, torch.device("cpu")) == {"a": [1.0, 2.0]}


def test_grey_images_climb_the_ladder_too(tmp_path, capsys):
    grey = {key: x[..., :1] if x.ndim == 4 else x for key, x in common.make_shapes(40, 10).items()}
    np.savez(tmp_path / "grey.npz", **grey)
    speed.main(f"{LADDER} --loss st --data {tmp_path}/grey.npz".split())
    assert "ratio" in capsys.readouterr().out


def test_a_third_step_that_trains_another_way_is_found(monkeypatch):
    """As a CUDA graph that is replayed with old numbers would."""

    def losses(third):
        yield from (torch.tensor(loss) for loss in (2.3, 2.2, third))
        while True:
            yield torch.tensor(2.0)

    args = speed.parse_args(["gpu", "--device", "cpu", "--small"])
    data, expected = common.load_data("shapes", train_subset=40), {}
    found = []
    for third in (2.1, 2.15, 1.0):
        monkeypatch.setattr(speed, "train_with", lambda *_, third=third: losses(third))
        found.append(speed.time_steps(data, "at", set(), args, expected)["ok"])
    assert found == [True, True, False]


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


GPU = "gpu --device cpu --small"  # on the CPU: what can be tried without a GPU


def test_the_job_of_a_new_gpu_does_all_its_parts_and_writes_each_at_once(tmp_path, capsys):
    speed.main(f"{GPU} --out {tmp_path}/new/gpu.jsonl".split())
    lines = (tmp_path / "new/gpu.jsonl").read_text().splitlines()
    about, *rows = map(json.loads, lines)
    assert {"device", "torch", "commit"} == about.keys()
    assert Counter(row["part"] for row in rows) == {
        "gradients": 5, "step": 3, "resume": 1, "autoattack": 1,
    }  # fmt: skip
    assert all(row["ok"] for row in rows), rows
    by_part = {row["part"]: row for row in rows}
    assert by_part["gradients"]["gradient_error"] == 0 and by_part["step"]["ms"] > 0
    assert 1 <= by_part["resume"]["killed_after_epoch"] < 6 and by_part["resume"]["same_weights"]
    assert by_part["autoattack"]["images"] == 20 and 0 <= by_part["autoattack"]["aa_acc"] <= 1


def test_what_the_minutes_do_not_suffice_for_is_named_and_not_begun(tmp_path):
    speed.main(f"{GPU} --minutes 0.001 --out {tmp_path}/gpu.jsonl".split())
    _, *rows = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert len(rows) == 10
    assert all(row["left_out"] == "less than 1 s are left" for row in rows)


def test_a_loss_that_differs_on_the_device_and_a_part_that_crashes_are_named(
    monkeypatch, tmp_path, refused
):
    trades_loss, calls = robust_kd.trades_loss, []

    def wrong_on_the_first_device(*args):
        calls.append(1)
        return trades_loss(*args) * (1.02 if len(calls) == 1 else 1)

    def crash(*args):
        raise RuntimeError("output overwritten")

    monkeypatch.setattr(robust_kd, "trades_loss", wrong_on_the_first_device)
    monkeypatch.setattr(speed, "STUDENTS", {"robust_kd": ["--loss trades"]})
    for part in ("time_steps", "stop_and_resume"):
        monkeypatch.setattr(speed, part, crash)
    error = refused(speed.main, f"{GPU} --out {tmp_path}/gpu.jsonl".split())
    assert "robust_kd.py --loss trades; akd+, no compile" in error and len(calls) == 2
    _, *rows = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    first, second, *_, attacked, _ = rows
    assert "no student" in attacked["left_out"] and attacked["part"] == "autoattack"
    assert first["gradient_error"] == pytest.approx(0.02) and not first["ok"]
    assert second["error"] == "RuntimeError: output overwritten"


@pytest.mark.parametrize("small", [False, True])
def test_a_step_of_every_loss_and_method_is_compared(small):
    assert sum(map(len, speed.STUDENTS.values())) >= 40
    for script, students in speed.STUDENTS.items():
        parse_args = importlib.import_module(script).parse_args
        chosen = set()
        for student in students:
            args = parse_args(speed.one_step_flags(script, student, small))
            assert args.train_subset == args.batch_size and args.epochs == 1
            chosen.add(getattr(args, "loss", None) or args.method)
        module = importlib.import_module(script)
        assert chosen == set(module.LOSSES if script == "robust_kd" else module.METHODS)
