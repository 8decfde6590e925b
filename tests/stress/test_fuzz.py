"""No traceback, whatever the parsers and loaders are given (few examples; `make soak` has many)."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", fuzz.FUZZES, ids=lambda kind: kind.__name__)
def test_whatever_is_given_there_is_no_traceback(kind, tmp_path):
    assert kind(tmp_path, 40) >= 30


def test_the_fuzz_sees_tracebacks_and_errors_of_two_lines():
    def fails(value):
        fuzz.ends_well(lambda: [1, 2][value])

    with pytest.raises(IndexError):
        fuzz.tried(fuzz.st.integers(), 50, fails)
    with pytest.raises(AssertionError):
        fuzz.ends_well(lambda: exit(2))
