"""benchmark/train_step.py: the rungs of the ladder train alike, the page is made of the JSON."""

import json
import re

import pytest
from conftest import ROOT

import common
from benchmark import train_step

SMALL = "--ladder --data shapes --model wrn-10-1 --teacher-model mlp-8 --batch-size 32"
SMALL = f"{SMALL} --rounds 2 --steps 2 --workers 0 --device cpu"


@pytest.mark.parametrize("loss", ["st", "ckd", "akd+"])
def test_the_ladder_of_a_cpu_has_four_rungs_that_agree(loss, capsys):
    train_step.main(f"{SMALL} --loss {loss}".split())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0][2:] for line in lines] == list(train_step.RUNGS)[:4]
    assert all(re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \|", line) for line in lines)


def test_a_rung_that_trains_another_way_is_an_error(monkeypatch, refused):
    wrong = lambda model, x, labels: 20 * x  # noqa: E731
    monkeypatch.setattr(train_step, "our_pgd", wrong)
    error = refused(train_step.main, f"{SMALL} --loss at".split())
    assert "in the attack the gradient of x alone: first loss" in error


def test_operations_are_those_of_the_passes():
    data = common.load_data("shapes", train_subset=4)
    flags = "--model mlp-8 --teacher-model mlp-8 --batch-size 4 --loss"
    forward = 4 * 2 * (3072 * 8 + 8 * 10)
    for loss, passes in (("st", 3), ("at", 17), ("ckd", 4), ("akd+", 18)):
        args = train_step.parse_args(f"{flags} {loss}".split())
        assert train_step.flops(data, args) == passes * forward


def test_the_page_is_made_of_the_numbers_that_were_kept():
    records = json.loads((ROOT / "benchmark" / "speed.json").read_text())
    assert records and (ROOT / "docs" / "SPEED.md").read_text() == train_step.page(records)
