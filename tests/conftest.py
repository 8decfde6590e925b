"""The scripts lie one folder up; they are imported and run from there."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that the tests start
torch.set_num_threads(1)  # the test files run side by side
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def shapes_once():
    """The shapes are drawn once per process: it takes longer than most of the small runs."""
    import common

    common.make_shapes = functools.cache(common.make_shapes)


@pytest.fixture
def refused(capsys):
    """refused(function, *args, **kwargs) -> the one line with which it ends, at exit status 2."""

    def call(function, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            function(*args, **kwargs)
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        assert "Traceback" not in message
        return message

    return call


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)
