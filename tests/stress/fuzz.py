"""Property-based fuzz of the parsers and the loaders: whatever they get, no traceback.

Each function of FUZZES tries so many inputs, in a folder, and returns how many it tried.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import sys
import types
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import eval_robustness

SCRIPTS = ["robust_kd", "fickle_teacher", "soft_randomization", "messy_collab", "teacher_free_kd"]
SCRIPTS += ["eval_robustness"]
ODD = ["0", "-1", "1e999", "nan", "inf", "1/0", "8//255", "9" * 5000, "0x1", "1_0", "\u0663", "--"]
ODD += ["", " ", "a" * 5000, "../..", "/dev/null", "%s", "{0}", "\x1b[2J", "=", "-", "None", "[]"]


def ends_well(function):
    """Whether it returns, or ends with status 0, or 2 and one line; else an AssertionError."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            return function()
        except common.UserError as error:
            with contextlib.suppress(SystemExit):
                common.exit_with_error(str(error))
            status = 2
        except SystemExit as stop:  # after --help
            status = stop.code
    text = errors.getvalue()
    assert status == 0 or (status == 2 and text.startswith("error: ")), (status, text)
    assert text.count("\n") == (status == 2), text


def tried(strategy, examples, check, seed=None):
    """Let `check` see so many values -> how many it saw; seed None: the same ones every time."""
    seen = [0]

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def test(value):
        seen[0] += 1
        check(value)

    (test if seed is None else hypothesis.seed(seed)(test))()
    return seen[0]


@functools.cache
def known_flags(script):
    """The flags of a script, and words that some of them take."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    flags = sorted(set(re.findall(r"--[a-z][a-z0-9-]+", out.getvalue())) - {"--help"})
    return flags, sorted(set(re.findall(r"[a-z0-9+-]{2,}", out.getvalue())))


def parsers(folder, examples, seed=None):
    """Flags of all scripts with values that fit, nearly fit, or are any text."""

    def arguments(script):
        flags, words = known_flags(script)
        text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
        value = st.sampled_from(ODD) | st.sampled_from(words) | text | st.integers().map(str)
        pair = st.tuples(st.sampled_from(flags) | value, value)
        return st.tuples(st.just(script), st.lists(pair, max_size=5))

    def check(given):
        script, pairs = given
        argv = [text for pair in pairs for text in pair]
        ends_well(lambda: importlib.import_module(script).parse_args(argv))

    return tried(st.sampled_from(SCRIPTS).flatmap(arguments), examples, check, seed)


def changed(content):
    """Strategy: the bytes with some of them replaced, cut out, put in, or cut off."""
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 40), st.binary(max_size=8))

    def apply(edits):
        found = bytearray(content)
        for at, length, new in edits:
            found[at : at + length] = new
        return bytes(found)

    return st.lists(edit, max_size=4).map(apply) | st.binary(max_size=200)


def checkpoints(folder, examples, seed=None):
    """A good checkpoint with changed bytes: it is refused, or the weights are what they were."""
    path, model = folder / "fuzz.pt", common.build_model("mlp-2", 3, size=4)
    common.save_model(path, model, epoch=1)
    good = {key: value.clone() for key, value in model.state_dict().items()}

    def check(content):
        path.write_bytes(content)
        if found := ends_well(lambda: common.load_model(path)):
            assert all(value.equal(good[key]) for key, value in found.state_dict().items())

    return tried(changed(path.read_bytes()), examples, check, seed)


def data_bytes(folder, examples, seed=None):
    """A good .npz with changed bytes."""
    path, x = folder / "fuzz.npz", np.zeros((4, 4, 4, 3), np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4))

    def check(content):
        path.write_bytes(content)
        ends_well(lambda: common.load_data(str(path)))
        ends_well(
            lambda: eval_robustness.load_other_images(path, ["a", "b", "c", "d"], shape=(4, 4, 3))
        )

    return tried(changed(path.read_bytes()), examples, check, seed)


def filled(shape, kind, byte):
    """An array all bytes of which are `byte`."""
    kind, n = np.dtype(kind), int(np.prod(shape))
    return np.frombuffer(bytes([byte]) * (n * kind.itemsize), kind, n).reshape(shape)


def data_arrays(folder, examples, seed=None):
    """An .npz of arrays of all types, byte orders and shapes."""
    path = folder / "fuzz.npz"
    types = "|u1 |i1 <u2 >u2 <i8 >i8 <f4 >f8 <c8 |b1 <U3 |S2 <M8[s] <m8[s] |V4".split()
    shape = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    shape |= st.sampled_from([(4, 4, 4, 3), (4, 4, 4), (4,)])
    array = st.builds(filled, shape, st.sampled_from(types), st.integers(0, 255))
    plain = st.builds(lambda shape, v: np.full(shape, v, np.uint8), shape, st.integers(0, 255))
    names = ("x_train", "y_train", "x_test", "y_test", "classes")
    given = st.fixed_dictionaries({}, optional=dict.fromkeys(names, array | plain))
    x = np.zeros((4, 4, 4, 3), np.uint8)
    good = dict(x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4))

    def check(arrays):
        np.savez(path, **(good | arrays))
        ends_well(lambda: common.load_data(str(path)))

    return tried(given, examples, check, seed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["flags", "fingerprint", "files", "teacher_ckpt", "stage", "epoch", "rows", "state"]
            ),
            inner,
        )
    ),
    max_leaves=8,
)


def records(folder, examples, seed=None):
    """Logs, configurations and checkpoints whose content is not ours."""
    data, model = types.SimpleNamespace(fingerprint=1), common.build_model("mlp-2", 3, size=4)
    given = folder / "given.pt"
    given.write_bytes(b"a teacher")
    args = types.SimpleNamespace(model="x", teacher_ckpt=str(given))

    def check(value):
        text = json.dumps(value)
        (folder / "log.jsonl").write_text(text)
        ends_well(lambda: common.write_log(folder, "student", []))
        ends_well(lambda: common.check_same_run(folder, json.loads(text), args, data))
        config = {"flags": {"model": "x", "teacher_ckpt": str(given)}, "fingerprint": 1}
        ends_well(lambda: common.check_same_run(folder, config | {"files": value}, args, data))
        for record in (value, {"rows": value}, {"rows": [value], "state": value}):
            if isinstance(record, dict):
                common.save(common.checkpoint_file(folder, "student", 1), record)
                ends_well(lambda: common.resume(folder, "student", {"model": model}))

    return tried(JSON, examples, check, seed)


FUZZES = [parsers, checkpoints, data_bytes, data_arrays, records]
