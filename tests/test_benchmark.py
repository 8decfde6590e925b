"""The papers' tables as data, the runner, the report and the sweeps."""

import json
import re
import shlex
from collections import Counter

import pytest
from conftest import ROOT

import common
from benchmark import report, run, sweep, tables

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
    **{"paper3-table3": 3, "paper3-table4": 3, "paper3-table5": 4 * 2},
}
ROWS = {row.id: row for row in tables.ROWS}


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
    run_of = ROWS["paper2-choices-akd+-pgd-7-alpha-0.7"].run
    assert run_of == "robust_kd.py --loss akd+ --teacher-es 40 --alpha 0.7"


def test_the_papers_sizes_are_ours():
    large = run.counted(ROWS["paper3-table1-large-model-size"].run)
    assert large["macs"] == large["weights"] == 784 * 1200 + 1200 * 1200 + 1200 * 10 == 2392800
    assert run.counted("count mlp-400 10 28 1")["macs"] == 317600
    assert run.counted("count wrn-40-2 10 32 3")["millions"] == 2.243546


# ------------------------------------------------------------------------------------------------
# run.py

# What rows may wait for: data that have to be fetched by hand, the teacher of another row
COMING = r".*/(cifar\d+_\w+|planes-cars|mnist)\.npz.*|.*tiny-imagenet.*|.*/teacher-ep\d+\.pt, .*"


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_command_parses_or_waits_for_something_known(scale, tmp_path):
    args = run.parse_args(["--scale", scale, "--runs", str(tmp_path)])
    for command in run.FIRST:
        if command:
            waits = run.waits_for(command, args)
            assert not waits or re.fullmatch(COMING, waits), (command, waits)


SMALL = "--data shapes --model mlp-8 --train-subset 40 --test-subset 10 --val-size 20 --epochs 2"
SMALL = f"robust_kd.py --loss at {SMALL} --batch-size 16 --steps 1 --eval-steps 20"


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """rows(*rows) makes them all there is; -> call(*flags), run.py with folders of this test."""

    def set_rows(*given):
        monkeypatch.setattr(tables, "ROWS", list(given))
        monkeypatch.setattr(run, "FIRST", {row.run: row.id for row in reversed(given)})
        run.parsed.cache_clear()
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        return lambda *flags: run.main([*flags, *folders, "--device", "cpu"])

    return set_rows


def small(name, flags="", turn="c", metrics="clean_acc pgd20_acc", **more):
    return tables.Row("paper9-table1", name, tables.drawn(metrics), SMALL + flags, turn, **more)


def test_a_run_writes_one_small_result_and_is_not_run_again(rows, tmp_path, capsys):
    metrics = "clean_acc pgd20_acc pgd2_acc"  # the last one is not in the summary
    call = rows(small("at", metrics=metrics, seeds=2), small("the same run"))
    call("--seeds", "1")
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "paper9-table1-at-s0.json" and path.stat().st_size < 8000
    assert (record["scale"], record["seed"], record["flags"]["epochs"]) == ("full", 0, 2)
    assert record["commit"] and record["torch"] and record["stages"]["student"]["epochs"] == 2
    assert {"last", "best", "seconds_per_epoch"} <= record["stages"]["student"].keys()
    for metric in metrics.split():
        assert 0 <= run.value(record, "student", metric) <= 1
    before = path.stat().st_mtime_ns
    assert "1 of 1 runs are done; 0 are left" in capsys.readouterr().out
    call("--seeds", "1")
    assert path.stat().st_mtime_ns == before
    call("--list")
    assert "1 of 3 runs are done; 2 are left" in capsys.readouterr().out


def test_a_row_that_fails_or_waits_does_not_stop_the_next_one(rows, tmp_path, capsys):
    bad = small("bad", " --lr 1e30", "a", seeds=1)
    waits = small("waits", " --not-yet 3", "a", seeds=1)
    missing = tables.Row("paper9-table1", "gone", {}, "gone.py --method x", "a", seeds=1)
    call = rows(bad, waits, missing, small("good", seeds=1))
    with pytest.raises(SystemExit) as end:
        call()
    out = capsys.readouterr().out
    assert end.value.code == 1 and "1 failed" in out and "not finite" in out
    assert re.search("waits.*--not-yet", out) and re.search("gone.*gone.py", out)
    assert [path.name for path in (tmp_path / "results").iterdir()] == [
        "paper9-table1-good-s0.json"
    ]


def test_when_the_minutes_are_over_the_run_stops_and_goes_on_later(rows, tmp_path, capsys):
    call, logs = rows(small("long", " --epochs 2000", seeds=1)), []
    for minutes in ("0.1", "0.3", "0.6", "1.2"):  # to the first epoch, on a busy machine too
        if not logs:
            call("--minutes", minutes)
            assert "goes on from its last epoch" in capsys.readouterr().out
        logs = list((tmp_path / "runs").glob("*/*/log.jsonl"))
    assert not (tmp_path / "results").exists()
    epochs = len(logs[0].read_text().splitlines())
    call("--minutes", "0.1")
    assert epochs <= len(logs[0].read_text().splitlines()) < 2000


def test_tiny_results_are_marked_kept_apart_and_never_reported(rows, tmp_path):
    values = {"clean_acc": (10.0, 99.0)}  # any result would reproduce it
    row = tables.Row("paper2-table1", "at", values, "robust_kd.py --loss at", "a")
    rows(row)("--scale", "tiny")
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert record["scale"] == "tiny" and record["flags"]["train_subset"] == 60
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    readme.write_text("\n".join(report.MARKS))
    where = ["--results", str(tmp_path / "results"), "--page", str(page), "--readme", str(readme)]
    report.main(where)
    assert "0 reproduced" in readme.read_text() and "1 not run" in readme.read_text()
    path.write_text(json.dumps(record | {"scale": "full"}))
    report.main(where)
    assert "1 reproduced" in readme.read_text() and "0 not run" in readme.read_text()
    assert run.parse_args(["--scale", "tiny"]).results.endswith("runs/tiny/results")


def test_headline_rows_first_then_their_other_seeds(rows):
    rows(small("c"), small("a", " --lr 0.2", "a"), small("d", " --lr 0.3", "d", seeds=1))
    order = [(turn, seed) for turn, _, seed, _ in run.jobs(run.parse_args([]))]
    assert order == [("a", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2), ("d", 0)]


def test_tables_are_found_by_every_name(refused):
    row = ROWS["paper2-table3-akd+-pgd-7"]
    for name in ("paper2", "table3", "paper2-table3", "paper2-table3-akd+-pgd-7"):
        assert run.selected(row, [name])
    assert not run.selected(row, ["paper1", "table31"])
    assert "table99" in refused(run.parse_args, ["table99"])


def test_the_cost_counts_passes_and_shared_teachers_once():
    seen, args = set(), run.parse_args(["--device", "cpu"])
    macs, teacher = (run.size_of(net, 10, 32, 3)[0] for net in ("resnet18", "wrn-40-2"))
    assert run.cost("robust_kd.py --loss at", 0, seen, args)[1] == macs * (3 + 2 * 7)  # PGD-7
    akd, mixed = "robust_kd.py --loss akd+ --alpha", "messy_collab.py --method mc-s"
    first, second = (run.cost(f"{akd} {a}", 0, seen, args)[0] for a in (0.2, 0.4))
    other = run.cost(f"{akd} 0.2", 1, seen, args)[0]
    assert first - second == other - second == 100 * 50_000 * 17 * macs  # a teacher for each seed
    run.cost("fickle_teacher.py --method hinton", 0, seen, args)  # has the teacher of mixed
    states = (0, set()), (0, seen), (1, seen)
    first, *later = (run.cost(mixed, *state, args)[0] for state in states)
    assert [first - cost for cost in later] == [200 * 50_000 * 3 * teacher] * 2
    done = {1: {"device": "H", "gpu": "H", "model": "resnet18", "macs_per_second": 5e13}}
    assert run.speed("resnet18", done, "H") == run.speed("resnet18", done, "cuda") == (5e13, True)
    assert run.speed("resnet18", done, "cpu") == (run.GUESS["cpu"], False)


# ------------------------------------------------------------------------------------------------
# report.py


def results(**lines):
    """{name of a row: values} -> rows of a table whose paper prints 50 +- 0.2 and 52 +- 0.5."""
    made, done = [], {}
    for name, (printed, base, values) in lines.items():
        made.append(tables.Row("paper9-table1", name, {"aa_acc": printed}, name, baseline=base))
        for seed, value in enumerate(values):
            record = {"rows": [{"model": "student (at)", "aa_acc": value / 100}], "scale": "full"}
            done[name, seed] = record
    return made, done


@pytest.mark.parametrize(
    "printed, values, base, expected",
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
def test_the_rule_of_the_verdicts(monkeypatch, printed, values, base, expected):
    rows, done = results(at=((50.0, 0.2), "", base), akd=(printed, "at", values))
    monkeypatch.setattr(tables, "ROWS", rows)
    assert report.verdict(rows[1], "aa_acc", done) == expected


def test_the_page_shows_paper_and_ours_and_what_may_explain_a_failure(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    values = {"paper2-table3-at": [0.855, 0.464], "paper2-table3-rslad+-pgd-7": [0.79, 0.45]}
    flags = {"eps": 8 / 255, "step_size": None, "restarts": 1, "test_subset": None}
    for name, (clean, robust) in values.items():
        for seed in (0, 1):
            row = {"model": "student (x)", "clean_acc": clean + seed / 1000, "aa_acc": robust}
            record = {"row": name, "run": ROWS[name].run, "seed": seed, "scale": "full"}
            record |= {"rows": [row], "flags": flags, "gpu": "a GPU", "torch": "2", "commit": "c0"}
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(record))
    (folder / "broken.json").write_text("{")
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.main(["--results", str(folder), "--page", str(page), "--readme", str(readme)])
    text = page.read_text()
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
    assert run.value(record, "student", "clean_acc") == 0.2
    assert run.value(record, "student", "clean_acc", best=True) == 0.1
    assert run.value(record, "student-alone", "clean_acc") == 0.0
    assert run.value(record, "teacher", "clean_acc") is None


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    report.main(["--page", str(tmp_path / "page.md"), "--readme", str(readme)])

    def without_figures(text):
        return re.sub(r"!\[.*\n\n", "", text)

    page = without_figures((ROOT / "docs/RESULTS.md").read_text())
    assert without_figures((tmp_path / "page.md").read_text()) == page
    assert readme.read_text() == (ROOT / "README.md").read_text()
    for path in ROOT.glob("benchmark/results/*.json"):
        assert json.loads(path.read_text())["scale"] == "full" and path.stat().st_size < 10_000


def test_a_readme_without_marks_is_refused(tmp_path, refused):
    (tmp_path / "README.md").write_text("hello")
    flags = ["--results", str(tmp_path), "--page", str(tmp_path / "p.md")]
    assert "results: begin" in refused(
        report.main, [*flags, "--readme", str(tmp_path / "README.md")]
    )


# ------------------------------------------------------------------------------------------------
# sweep.py

SWEEP = shlex.split(SMALL.replace("robust_kd.py --loss at", "--loss akd+ --teacher-epochs 2"))


def test_a_sweep_runs_the_grid_once_and_ends_in_a_table(tmp_path, capsys, monkeypatch):
    reads = []
    read = common.load_data
    monkeypatch.setattr(common, "load_data", lambda *a, **o: reads.append(1) or read(*a, **o))
    flags = [*SWEEP, "--device", "cpu", "--runs", str(tmp_path)]
    argv = ["robust_kd.py", "--grid", "alpha=0.2,0.8", "teacher-es=1,2", "--baseline", "--loss at"]
    argv += ["--", *flags]
    sweep.main(argv)
    assert len(reads) == 1
    (file,) = tmp_path.glob("robust_kd/sweep-*.json")
    first = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert out.count("teacher 1/1") == out.count("teacher 2/2") == 1  # shared by the two alphas
    assert [line["values"] for line in first["lines"]][1] == {"alpha": "0.2", "teacher-es": "2"}
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/log.jsonl")}
    assert len(logs) == 5
    sweep.main(argv)
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    assert json.loads(file.read_text()) == first
    table = capsys.readouterr().out.split("alpha")[-4:]
    assert "RKD-Acc." in "".join(table) and "RKD-Rob." in "".join(table)


def test_the_choice_is_made_on_held_out_images_and_keeps_the_condition():
    def line(name, clean, robust, test):
        values = {"clean_acc": test, "pgd20_acc": test}
        values |= {"val_clean_acc": clean, "val_pgd7_acc": robust}
        return {"values": {"alpha": name}} | {key: (v, 0.0) for key, v in values.items()}

    lines = [line("a", 0.80, 0.40, 0.1), line("b", 0.90, 0.30, 0.9), line("c", 0.75, 0.45, 0.2)]
    base = line("", 0.78, 0.41, 0.5)
    accurate, robust = sweep.selection(lines, base, "pgd20_acc")
    assert "alpha a" in accurate and "test 0.1000" in accurate  # b loses too much robustness
    assert "alpha a" in robust  # c loses too much accuracy: 0.75 < 0.78 - 0.02
    assert "alpha b" in sweep.selection(lines, {}, "pgd20_acc")[0]
    assert "no line" in sweep.selection(lines[1:2], base, "pgd20_acc")[0]


def test_the_pareto_front():
    assert sweep.pareto([(1, 3), (2, 2), (1, 2), (3, 1), (0, 3)]) == [0, 1, 3]


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
