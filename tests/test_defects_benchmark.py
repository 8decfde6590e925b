"""Defects of benchmark/, the pages and the citations, each as it was found."""

import dataclasses
import importlib
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT

import common
import eval_robustness
import robust_kd
from benchmark import report, run, sweep, tables

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


# What the pages say -----------------------------------------------------------------------------

PAPER = {"robust_kd": "paper2", "teacher_free_kd": "paper3"}
PAPER |= dict.fromkeys(("fickle_teacher", "soft_randomization", "messy_collab"), "paper1")
# Flags that say where something is, or how often a run is repeated, and not what is computed
PLACES = {"argv", "name", "seed", "seeds", "runs", "data_root", "device", "grad_heatmap"}
PLACES |= {"teacher_save_every", "teacher_ckpt"}


def labelled_commands():
    """(script, flags, table or figure as in tables.py) of each command with such a comment."""
    found = []
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.py")]:
        lines = re.findall(r"^ *(?:\w+ +)?python (\w+)\.py([^#`\n]*)# (.*)", path.read_text(), re.M)
        for script, flags, comment in lines:
            numbers = r"\d+(?:(?:,| and| to) \d+)*"
            for kind, listed in re.findall(rf"\b(Table|Figure)s? ({numbers})", comment):
                for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
                    for number in range(int(first), int(last or first) + 1):
                        table = f"{PAPER[script]}-{kind.lower()}{number}"
                        found.append((script, flags.strip(), table))
    return sorted(set(found))


def settings(script, flags):
    """What the flags of a script mean, without PLACES."""
    flags = flags.replace("--grad-heatmap runs/", "--grad-heatmap ")  # parsed where the tests run
    found = vars(importlib.import_module(script).parse_args(shlex.split(flags)))
    return {name: value for name, value in found.items() if name not in PLACES}


@pytest.mark.parametrize("script, flags, table", labelled_commands())
def test_a_command_that_is_said_to_be_of_a_table_is_one_of_its_runs(script, flags, table):
    runs = {row.run for row in tables.ROWS if row.table == table and row.run}
    runs = [text.split(".py", 1)[1] for text in runs if text.startswith(f"{script}.py")]
    assert settings(script, flags) in [settings(script, text) for text in runs]


def test_pages_label_commands_with_tables():
    assert len(labelled_commands()) > 20


def documented_sweeps():
    """The flags of every documented sweep over the early stops of a teacher."""
    found = []
    for path in [*ROOT.glob("docs/*.md"), ROOT / "benchmark/sweep.py"]:
        found += re.findall(r"python benchmark/sweep\.py (.*teacher-es=.*)", path.read_text())
    return found


@pytest.mark.parametrize("flags", documented_sweeps())
def test_a_documented_sweep_trains_the_longest_teacher_alone(flags, tmp_path):
    argv = shlex.split(flags)
    stops = [int(stop) for stop in sweep.parse_args(argv).grid["teacher-es"]]
    every = int(argv[argv.index("--teacher-save-every") + 1])
    unit = min(stops)
    grid = "teacher-es=" + ",".join(str(stop // unit) for stop in stops)
    small = shlex.split(ROBUST)[1:]
    small += ["--teacher-epochs", str(max(stops) // unit), "--runs", str(tmp_path)]
    small += ["--teacher-save-every", str(every // unit)]
    sweep.main(["robust_kd.py", "--grid", grid, "--", *small])
    logs = [path.read_text() for path in tmp_path.glob("robust_kd/*/log.jsonl")]
    assert len(logs) == len(stops)
    assert sum(text.count('"stage": "teacher"') for text in logs) == max(stops) // unit


def test_the_documented_sweep_compares_with_the_baseline_of_table_2():
    (flags,) = re.findall(r"sweep\.py (.*)", (ROOT / "docs/robust_kd.md").read_text())
    args = sweep.parse_args(shlex.split(flags))
    runs = [row.run for row in tables.ROWS if row.id == "paper2-table2-x1-only-teacher"]
    expected = settings("robust_kd", runs[0].split(".py")[1])
    assert settings("robust_kd", shlex.join(sweep.baseline(args))) == expected


NOISY = ["fickle_teacher", "soft_randomization", "messy_collab"]


@pytest.mark.parametrize("script", NOISY)
def test_the_milestones_of_a_teacher_are_what_their_help_says(
    script, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("COLUMNS", "200")  # no word is broken at its hyphen
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    text = re.search(r"--teacher-milestones \w+ (\[[^]]*\] )?(.*?) --teacher-ckpt", text)[2]
    assert "as --milestones" not in text
    assert "60 120 150 of 200, stretched to --teacher-epochs" in text
    files = []
    for name, flags in {
        "default": "",
        "stretched": "--teacher-milestones 2 3 3",
        "student": "--milestones 1",
        "other": "--teacher-milestones 1",
    }.items():
        argv = f"{SMALL} --teacher-epochs 4 --method teacher --teacher-model mlp-8 --eval-steps 1"
        module.main([*argv.split(), *flags.split(), "--runs", str(tmp_path / name), "--name", "a"])
        files.append(tmp_path / name / script / "a-s0" / "teacher.pt")
    assert same_weights(files[0], files[1]) and same_weights(files[0], files[2])
    assert not same_weights(files[0], files[3])


def test_the_noisy_scripts_share_their_teachers_as_the_page_says(tmp_path, capsys):
    for script in NOISY:
        argv = f"{SMALL} --method hinton --teacher-model mlp-8 --eval-steps 1 --restarts 1"
        importlib.import_module(script).main([*argv.split(), "--runs", str(tmp_path)])
        out = capsys.readouterr().out
        assert ("taken from" in out) == (script != NOISY[0])
    page = (ROOT / "docs/noisy_collaboration.md").read_text()
    assert "another script takes it with" not in " ".join(page.split())


# Figure 8 of paper 1: the distribution of the softmax probabilities -----------------------------


def test_figure_8_is_drawn_from_the_results_of_its_rows(benchmark, tmp_path):
    rows = [row for row in tables.ROWS if row.table == "paper1-figure8"]
    known = {f"fickle_teacher.py --method {m}" for m in ("teacher", "student", "hinton")}
    assert known <= {row.run for row in rows}
    assert sum("mc-ts --noise-rate" in row.run for row in rows) >= 3
    flags = f" {SMALL} --teacher-model mlp-8 --eval-steps 1 --restarts 1"
    rows = [dataclasses.replace(row, run=row.run + flags) for row in (rows[0], rows[-1])]
    benchmark(*rows)("--seeds", "1", "--device", "cpu")
    done = run.read_results(tmp_path / "results")
    for row in rows:
        (shares,) = report.measured(row, "probabilities", done)
        assert len(shares) == 15 and sum(shares) == pytest.approx(1)
    (tmp_path / "README.md").write_text("\n".join(report.MARKS))
    pages = ["--page", str(tmp_path / "page.md"), "--readme", str(tmp_path / "README.md")]
    report.main(["--results", str(tmp_path / "results"), *pages])
    page = (tmp_path / "page.md").read_text()
    assert f"| {rows[0].name} | entropy" in page
    pytest.importorskip("matplotlib")
    assert (tmp_path / "results-paper1-figure8.png").read_bytes()[:4] == b"\x89PNG"
    assert "![results-paper1-figure8](results-paper1-figure8.png)" in page


def test_plot_draws_the_softmax_probabilities_in_a_panel_of_their_own(monkeypatch, tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **o: drawn.append(self) or save(self, *a, **o)
    )
    torch.manual_seed(0)
    argv = f"{ROBUST} --loss st --runs {tmp_path} --name a"
    robust_kd.main(shlex.split(argv)[1:])
    flags = "--attack calibration --data shapes --n 20 --device cpu --batch-size 20"
    file, png = tmp_path / "robust_kd/a-s0/student.pt", tmp_path / "figure8.png"
    eval_robustness.main([str(file), *flags.split(), "--plot", str(png), "--json", f"{png}.json"])
    panels = {axis.get_xlabel(): axis for axis in drawn[0].axes}
    (axis,) = [axis for label, axis in panels.items() if "softmax probabilit" in label]
    record = json.loads((tmp_path / "figure8.png.json").read_text())
    shares = record["rows"][0]["calibration"]["clean"]["probabilities"]
    assert axis.patches[0].get_data().values.tolist() == shares


# Citations --------------------------------------------------------------------------------------

ARXIV = "On the benefits of knowledge distillation for adversarial robustness"
TMLR = "When does knowledge distillation improve robustness?"


def squeezed(path):
    return " ".join(path.read_text().replace("=\n", " ").split())


def pages_that_name(number):
    """The pages and sources, but for tests, with an arXiv number in their text."""
    patterns = ("*.md", "docs/*.md", "*.py", "benchmark/*.py")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return [path for path in paths if number in path.read_text()]


def test_both_texts_of_the_robust_distillation_paper_are_named_as_what_they_are():
    named = pages_that_name("2203.07159")
    assert {"README.md", "robust_kd.py", "robust_kd.md", "RESULTS.md"} <= {p.name for p in named}
    for path in named:
        text = squeezed(path)
        assert ARXIV in text, path.name
        for title in ("When does knowledge", "When does distillation", "When does KD"):
            assert not re.search(rf"\[{title}[^\]]*\]\([^)]*2203\.07159", text), path.name
            assert not re.search(rf"{title}[^.]*\(\[2203\.07159", text), path.name
    for name in ("README.md", "robust_kd.py", "docs/robust_kd.md"):
        text = squeezed(ROOT / name)
        assert TMLR in text and "TMLR" in text and "anonymous" in text.lower(), name


def entries():
    """{key: {field: value}} of the citations in the README."""
    found = {}
    for kind, body in re.findall(
        r"@(\w+){(.*?)}\n(?=@|```)", (ROOT / "README.md").read_text(), re.S
    ):
        key, rest = body.split(",", 1)
        fields = re.findall(r"(\w+)\s*=\s*{((?:[^{}]|{[^{}]*})*)}", rest)
        found[key] = {"kind": kind} | {name: " ".join(text.split()) for name, text in fields}
    return found


CITED = {  # title -> (first and last author, year, where)
    ARXIV: ("Maroto", "Frossard", "2022", "2203.07159"),
    TMLR: ("Anonymous", "Anonymous", "2023", "TMLR"),
    "Adversarially robust distillation": ("Goldblum", "Goldstein", "2020", "AAAI"),
    "Revisiting adversarial robustness distillation: Robust soft labels make student better": (
        "Zi", "Jiang", "2021", "ICCV"),
    "Improving generalization and robustness with noisy collaboration in knowledge distillation": (
        "Arani", "Zonooz", "2019", "1910.05057"),
    "Revisiting knowledge distillation via label smoothing regularization": (
        "Yuan", "Feng", "2020", "CVPR"),
    "Be your own teacher: Improve the performance of convolutional neural networks via self "
    "distillation": ("Zhang", "Ma", "2019", "ICCV"),
    "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free "
    "attacks": ("Croce", "Hein", "2020", "ICML"),
    "Fixing data augmentation to improve adversarial robustness": (
        "Rebuffi", "Mann", "2021", "2103.01946"),
}  # fmt: skip


@pytest.mark.parametrize("title", CITED)
def test_citations_are_complete(title):
    first, last, year, where = CITED[title]
    by_title = {entry["title"].lower(): entry for entry in entries().values()}
    entry = by_title[title.lower()]
    authors = entry["author"].split(" and ")
    assert (authors[0].split(",")[0], authors[-1].split(",")[0]) == (first, last)
    assert entry["year"] == year and where in str(entry)


def test_no_entry_is_shortened():
    assert len(entries()) >= len(CITED)
    for key, entry in entries().items():
        assert {"title", "author", "year"} <= entry.keys(), key
        assert {"journal", "booktitle", "howpublished"} & entry.keys(), key
        assert "et al" not in str(entry) and "others" not in entry["author"], key
