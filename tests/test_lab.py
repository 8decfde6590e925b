"""The lesson docs/LAB.md: its commands run, and what it names is there."""

import functools
import importlib
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT

import common
import eval_robustness
import robust_kd
from benchmark.claim_list import ARMS, CLAIMS, FIRST_SEED

PATH = ROOT / "docs" / "LAB.md"
PAGE = PATH.read_text()
STEPS = re.findall(r"^## Step \d: .*?(?=^## )", PAGE, re.M | re.S)
# appended to a command: a flag that is given twice has the last value
SHORT_TRAINING = {
    "--epochs": "2",
    "--train-subset": "64",
    "--test-subset": "32",
    "--val-size": "32",
    "--model": "mlp-8",
    "--steps": "1",
}
SHORT_TEACHER = {"--teacher-epochs": "2", "--teacher-es": "1", "--save-every": "1"}
SHORT_EVALUATION = {"--n": "16"}
SHORT_AUTOATTACK = {"steps": 2, "queries": 4, "targets": 1}


def blocks(text):
    """[(language, text of the block)] of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """The commands in the blocks of a page that a reader copies, one string each."""
    found = []
    for language, block in blocks(text):
        if language == "sh":
            found += block.replace("\\\n", " ").splitlines()
    return found


def tables(text):
    """The printed tables of a page: [(words of the head, first column)]."""
    found = []
    for language, block in blocks(text):
        if language == "text":
            head, _, *lines = block.splitlines()
            found.append((head.split(), [re.split(r"\s{2,}", line)[0] for line in lines]))
    return found


def shortened(script, flags):
    """The flags of a command of the page, with few images and epochs."""
    short = {}
    if script in ("eval_robustness", "benchmark.report_run"):
        short = SHORT_EVALUATION
    elif script == "robust_kd":
        short = SHORT_TRAINING
        if "--teacher-epochs" in flags:
            short = short | SHORT_TEACHER
    return flags + [word for pair in short.items() for word in pair]


def write_cifar10(path):
    """A stand-in for CIFAR-10: 160 images of noise, 32 x 32."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 120), ("test", 40)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    path.parent.mkdir()
    np.savez(path, **arrays)


# ------------------------------------------------------------------------------------------------
# The commands


def test_every_command_of_the_lesson_runs(tmp_path, monkeypatch, capsys):
    """In the order of the page and in one folder: later steps need the files of earlier ones."""
    pytest.importorskip("matplotlib")
    # two epochs on noise: without this the last one is often the best, and is not saved twice
    monkeypatch.setattr(common, "best_row", lambda rows: rows[0] if rows else {})
    short_settings = functools.partial(eval_robustness.Settings, **SHORT_AUTOATTACK)
    monkeypatch.setattr(eval_robustness, "Settings", short_settings)
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data/cifar10.npz")
    run = []
    for step in [PAGE[: PAGE.index("## Step 1")], *STEPS]:
        capsys.readouterr()
        for command in commands(step):
            if not command.startswith("python "):
                continue
            script, *flags = shlex.split(command)[1:]
            if script == "-c":
                exec(flags[0], {})
                continue
            script = script.removesuffix(".py").replace("/", ".")
            importlib.import_module(script).main(shortened(script, flags))
            run.append(script)
        printed = capsys.readouterr().out
        for head, names in tables(step):
            assert set(head) <= set(printed.split()), head
            assert [name for name in names if name not in printed] == [], head
    assert run.count("robust_kd") >= 5 and run.count("eval_robustness") >= 4
    for figure in re.findall(r"`([\w/.+-]+\.(?:png|html))`", PAGE):
        drawn_by_runs = figure.endswith("curves.png")  # conftest.py switches it off
        assert drawn_by_runs or (tmp_path / figure).exists(), figure


def test_cifar10_is_fetched_as_the_page_says(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "load_data", asked.append)
    (program,) = (shlex.split(line)[2] for line in commands(PAGE) if "-c" in line.split())
    exec(program, {})
    assert asked == ["cifar10"]


def test_all_trainings_have_the_setting_of_the_claims():
    """So that CLAIMS.md answers for what the lesson shows, and its seeds decide no claim."""
    arms = {"at": "at", "akd": "akd+0.8", "smooth": "at-smooth-0.5"}  # --name -> arm
    compared = []
    for line in commands(PAGE):
        words = shlex.split(line)
        if words[:2] != ["python", "robust_kd.py"]:
            continue
        args = vars(robust_kd.parse_args(words[2:]))
        assert max(args["seed"]) < FIRST_SEED
        if args["name"] in arms:
            arm = shlex.split(ARMS[arms[args["name"]]])[1:]
            expected = vars(robust_kd.parse_args(arm))
            differ = {key for key in args if args[key] != expected[key]}
            assert differ <= {"name", "seed", "given"}, line
            compared.append(args["name"])
    assert set(compared) == arms.keys()


# ------------------------------------------------------------------------------------------------
# The page


def test_each_of_the_six_steps_is_complete():
    assert len(STEPS) == 6
    for step in STEPS:
        title = step.splitlines()[0]
        assert commands(step), title
        assert re.search(r"about [\d.]+\s(seconds|minutes?)", step), title
        questions, answers = step.split("<details>")
        assert len(re.findall(r"^\d\. ", questions, re.M)) == 2, title
        assert answers.count("</details>") == 1
        for answer in re.findall(r"^\d\. .*?(?=^\d\. |\n\n)", answers, re.M | re.S):
            assert re.search(r"`test_\w+`|`python benchmark/claims\.py ", answer), answer
        assert len(re.findall(r"^\d\. ", answers, re.M)) == 2, title


def test_claims_and_tests_that_the_lesson_names_are_there():
    claims = set(re.findall(r"`python benchmark/claims\.py ([\w-]+)`", PAGE))
    assert len(claims) >= 4 and claims <= CLAIMS.keys()
    sources = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(tests) >= 6 and tests <= set(re.findall(r"^def (test_\w+)", sources, re.M))


def test_intervals_that_the_lesson_quotes_are_those_of_the_claims_with_their_seeds():
    quoted = re.findall(r"[+-]\d+\.\d \[[^\]]+\]", PAGE)
    seeds = re.findall(r"[Oo]ver (\d+)\s+seeds", PAGE)
    results = (ROOT / "docs/CLAIMS.md").read_text()
    assert len(quoted) >= 4
    for interval, number in zip(quoted, seeds, strict=True):
        row, text = f"| {interval} | {number} |", f"all {number} together give {interval}"
        assert row in results or text in results, row
