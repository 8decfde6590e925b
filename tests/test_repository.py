"""The repository holds together: its files and imports, documented commands, words, copies."""

import argparse
import ast
import contextlib
import graphlib
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common

METHODS = (
    "fickle_teacher",
    "soft_randomization",
    "messy_collab",
    "robust_kd",
    "teacher_free_kd",
)
PROGRAMS = (*METHODS, "eval_robustness")
TOP_LEVEL = (*PROGRAMS, "common")
BENCHMARKS = sorted(f"benchmark.{path.stem}" for path in ROOT.glob("benchmark/[a-z]*.py"))
MODULES = (*TOP_LEVEL, *BENCHMARKS)


def source_of(module):
    return (ROOT / f"{module.replace('.', '/')}.py").read_text()


def definitions(module):
    """{name: node} of the functions and classes of a module."""
    wanted = (ast.FunctionDef, ast.ClassDef)
    return {n.name: n for n in ast.parse(source_of(module)).body if isinstance(n, wanted)}


def imports_of(module):
    """The modules of this repository that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


# ------------------------------------------------------------------------------------------------
# The house


def test_the_card_s_seven_files_are_all_that_is_at_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP_LEVEL)


@pytest.mark.parametrize("module", TOP_LEVEL)
def test_imports_go_from_scripts_to_the_evaluation_to_common(module):
    allowed = {"common", "eval_robustness"}
    if module == "common":
        allowed = set()
    elif module == "eval_robustness":
        allowed = {"common"}
    assert imports_of(module) <= allowed


def test_no_imports_go_in_a_circle():
    graph = {module: imports_of(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", METHODS)
def test_train_has_one_signature_and_a_flat_loop(module):
    train = definitions(module)["train"]
    assert ast.unparse(train.args) == "args, data, folder, stage, teacher=None"
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [node for node in ast.walk(train) if isinstance(node, nested) and node is not train]
    assert {"parse_args", "teacher_args", "get_teacher", "main"} <= definitions(module).keys()


# A program's outermost function, and what writes a file that is moved into place when it is whole
TAKE_A_FUNCTION = {"start", "write_atomically"}


def functions_given_to_common(source):
    """{function of common.py: text of the argument} where a script gives it one of its functions.

    These are its own functions by name, in a partial too, and lambdas.
    """
    tree, found = ast.parse(source), {}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if ast.unparse(call.func.value) != "common":
            continue
        called = {id(node.func) for node in ast.walk(call) if isinstance(node, ast.Call)}
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            for node in ast.walk(argument):
                by_name = isinstance(node, ast.Name) and node.id in own and id(node) not in called
                if by_name or isinstance(node, ast.Lambda):
                    found[call.func.attr] = ast.unparse(argument)
    return found


@pytest.mark.parametrize("module", METHODS)
def test_common_calls_no_script_back(module):
    assert functions_given_to_common(source_of(module)).keys() <= TAKE_A_FUNCTION


def test_a_function_that_is_given_to_common_is_found():
    source = "def f(): pass\n"
    for call in ("common.run(f)", "common.run(0, job=partial(f, 1))", "common.run(lambda x: x)"):
        assert list(functions_given_to_common(source + call)) == ["run"]
    assert functions_given_to_common(f"{source}common.run(f(1), other=g)") == {}


def test_importing_does_nothing():
    code = f"""
import importlib, signal, sys, torch
state = torch.random.get_rng_state().clone()
for module in {TOP_LEVEL}:
    importlib.import_module(module)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not torch.cuda.is_initialized() and "torchvision" not in sys.modules
    assert torch.equal(state, torch.random.get_rng_state())
"""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_running_needs_three_packages_and_only_lower_bounds():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.match(r"[a-z]+", line)[0] for line in lines] == ["torch", "torchvision", "numpy"]
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)


# ------------------------------------------------------------------------------------------------
# Commands and words


def commands():
    """(module, flags) of every `python script.py ...` in the documents and docstrings."""
    found = set()
    for pattern in ("*.md", "docs/*.md", "*.py", "benchmark/*.py"):
        for path in ROOT.glob(pattern):
            text = path.read_text().replace("\\\n", " ")
            for script, flags in re.findall(r"\bpython ([\w/]+)\.py((?: [^\n`#]*)?)", text):
                if "{" not in flags:  # code that prints a command
                    found.add((script.replace("/", "."), flags.strip().rstrip(".")))
    return sorted(found)


@pytest.mark.parametrize("module, flags", commands())
def test_documented_commands_parse(module, flags, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()  # some commands come after a run, and write beside it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "find_function", lambda _, text: text)  # nobody's nets are here
    ends = pytest.raises(SystemExit) if "--help" in flags else contextlib.nullcontext()
    with ends:
        importlib.import_module(module).parse_args(shlex.split(flags))


def test_every_program_is_documented_with_a_command():
    programs = {module for module in MODULES if "parse_args" in definitions(module)}
    assert programs <= {module for module, _ in commands()}


def test_tests_that_the_pages_name_are_there():
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    there = re.findall(r"^def (test_\w+)", sources, re.M)
    named = set()
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        named |= set(re.findall(r"`(test_[\w.]+)`", page.read_text()))
    assert len(named) > 3
    for name in named:
        if name.endswith("..."):
            assert any(test.startswith(name[:-3]) for test in there), name
        else:
            assert name in there


def test_pages_have_no_open_places():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        assert not re.search(r"@[A-Z]{2,}@", page.read_text()), page.name


def help_texts(module):
    """{flag: help text} of a program, those of its sub-commands too."""

    class Captured(Exception):
        pass

    def capture(parser, *_):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured) as stop:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        importlib.import_module(module).parse_args([])
    texts, parsers = {}, [stop.value.args[0]]
    for parser in parsers:  # which grows
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                flag = action.option_strings[0] if action.option_strings else action.dest
                texts[f"{parser.prog} {flag}"] = action.help
    return texts


def is_whole_phrase(text):
    """Whether a help text has four words and does not lean on what stands before it."""
    words = re.findall(r"\w+", text or "")
    leaning = {"of", "its", "those", "so", "none", "likewise"}
    return len(words) >= 4 and words[0].lower() not in leaning


@pytest.mark.parametrize("module", [m for m in MODULES if "parse_args" in definitions(m)])
def test_every_help_text_stands_alone(module):
    texts = help_texts(module)
    assert len(texts) > 2
    assert {flag: text for flag, text in texts.items() if not is_whole_phrase(text)} == {}


def test_words_that_lean_on_others_are_found():
    assert is_whole_phrase("radius in pixel units, 0 to 1")
    for text in (
        None,
        "",
        "mean: / K too",
        "its radius in pixel units",
        "of the teacher's own net",
    ):
        assert not is_whole_phrase(text)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    without = []
    for name, node in definitions(module).items():
        parts = {name: node}
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            parts |= {f"{name}.{part.name}": part for part in methods if part.name != "forward"}
        for path, part in parts.items():
            public = not any(word.startswith("_") for word in path.split("."))
            if public and not ast.get_docstring(part):
                without.append(path)
    assert without == []


# ------------------------------------------------------------------------------------------------
# Citations

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
    for name in ("README.md", "CITATION.bib", "robust_kd.py", "docs/robust_kd.md"):
        text = squeezed(ROOT / name)
        assert "TMLR" in text and "anonymous" in text.lower(), name
        assert TMLR in text or name == "README.md", name


def entries():
    """{key: {field: value}} of CITATION.bib."""
    found = {}
    text = (ROOT / "CITATION.bib").read_text()
    for kind, body in re.findall(r"^@(\w+){(.*?)}\s*(?=^@|\Z)", text, re.S | re.M):
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


def test_the_python_that_is_promised_is_one_that_the_tests_ran_on():
    names = ("Makefile", "pyproject.toml", "tests/stress/trust.md", "README.md")
    makefile, pyproject, trust, readme = ((ROOT / name).read_text() for name in names)
    asked = re.search(r"sys.version_info >= \(3, (\d+)\)", makefile)[1]
    assert f"Python 3.{asked} or newer is needed" in makefile
    assert f'target-version = "py3{asked}"' in pyproject
    assert f"on Python 3.{asked})" in trust  # with which versions all tests passed
    assert f"Python 3.{asked}" in readme


# ------------------------------------------------------------------------------------------------
# Copies

COPY = re.compile(r"^# Copied from (\w+)\.(\w+)", re.M)


def drifted(text):
    """The copies in the source `text`, functions and classes, that differ from the original."""
    own = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    found = []
    for module, name in COPY.findall(text):
        if ast.dump(own[name]) != ast.dump(definitions(module)[name]):
            found.append(name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_copies_are_equal_to_what_they_copy(module):
    assert drifted(source_of(module)) == []


@pytest.mark.parametrize("name, word", [("mix_labels", "alpha"), ("Ensemble", "weight")])
def test_a_copy_that_drifts_is_found(name, word):
    copy = f"# Copied from robust_kd.{name}\n" + ast.unparse(definitions("robust_kd")[name])
    assert drifted(copy) == [] and drifted(copy.replace(word, "another")) == [name]


# ------------------------------------------------------------------------------------------------
# Links


def anchors(text):
    """The anchors that a page has for its headings on GitHub."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=str)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
