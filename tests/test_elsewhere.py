"""The programs in docs/use_elsewhere.md run as they are printed."""

import re
import sys

import pytest
from conftest import ROOT

import common

PAGE = (ROOT / "docs" / "use_elsewhere.md").read_text()
PROGRAMS = {}  # title of a section -> its program
for section in PAGE.split("\n## ")[1:]:
    PROGRAMS[section.splitlines()[0]] = re.search(r"```python\n(.*?)```", section, re.S)[1]
NEEDS = {
    "A checkpoint under torchattacks": "torchattacks",
    "A checkpoint under the authors' AutoAttack, in L2 too": "pyautoattack",
}
DOWNLOADS = "A checkpoint under RobustBench's AutoAttack"


def test_every_program_of_the_page_is_found():
    assert len(PROGRAMS) == PAGE.count("```python") == 5
    assert {*NEEDS, DOWNLOADS} < PROGRAMS.keys()


@pytest.mark.parametrize("title", [title for title in PROGRAMS if title != DOWNLOADS])
def test_a_program_of_the_page_runs(title, tmp_path, monkeypatch, capsys):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    path = tmp_path / "runs/robust_kd/my-run-s0/student.pt"
    path.parent.mkdir(parents=True)
    model = common.build_model("mlp-8")
    for parameter in model.parameters():
        parameter.data *= 30  # steep enough for attacks to have an effect
    common.save_model(path, model)
    exec(compile(PROGRAMS[title], title, "exec"), {"__name__": "program"})
    assert re.search(r"\d\.\d", capsys.readouterr().out)


def test_robustbench_is_called_as_it_wants_to_be(tmp_path, monkeypatch, capsys):
    """Its download is the user's: a stand-in with the signature of robustbench.eval.benchmark."""

    def benchmark(
        model,
        n_examples=10_000,
        dataset="cifar10",
        threat_model="Linf",
        to_disk=False,
        model_name=None,
        data_dir="./data",
        corruptions_data_dir=None,
        device=None,
        batch_size=32,
        eps=None,
        log_path=None,
        preprocessing=None,
        aa_state_path=None,
    ):
        images = common.to_float(common.load_data("shapes", test_subset=5).x_test)
        assert model(images).shape == (5, 10) and not model.training and eps == 8 / 255
        return 0.5, 0.25

    module = type(sys)("robustbench.eval")
    module.benchmark = benchmark
    monkeypatch.setitem(sys.modules, "robustbench", type(sys)("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.eval", module)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/robust_kd/my-run-s0/student.pt"
    path.parent.mkdir(parents=True)
    common.save_model(path, common.build_model("wrn-10-1"))
    exec(compile(PROGRAMS[DOWNLOADS], DOWNLOADS, "exec"), {"__name__": "program"})
    assert "clean 0.5000, AutoAttack 0.2500" in capsys.readouterr().out
