"""Flags: numbers, names of runs, presets, refusals; seeds that are derived from words."""

import argparse

import pytest

import common

DOC = "A program for the tests."


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (
            "nonnegative",
            {"8/255": 8 / 255, "0.03": 0.03, "0": 0.0, "7": 7.0},
            ("8//255", "-1", "nan", "inf", "1/0", "", "eight", "1e999", "1e300", "9" * 5000),
        ),
        ("probability", {"5/6": 5 / 6, "1": 1.0}, ("1.5", "-0.1", "nan", "x")),
        ("below_1", {"0": 0.0, "0.995": 0.995}, ("1", "nan", "-1")),
        ("positive", {"1e-9": 1e-9, "1/4": 0.25}, ("0", "-1", "inf", "1e300")),
        ("decay", {"1e-9": 1e-9, "1": 1.0}, ("0", "1.01", "1e200", "nan")),
        ("pixel_units", {"8/255": 8 / 255, "1": 1.0}, ("2", "1.01", "-1", "nan")),
        ("whole", {"1": 1, "200": 200}, ("0", "2.5", "-3", "1e3", "9" * 5000, "")),
        ("whole_or_0", {"0": 0}, ("-1", "0.5")),
    ],
)
def test_numbers_are_read_and_nonsense_is_refused(kind, good, bad):
    convert = getattr(common, kind)
    for text, value in good.items():
        assert convert(text) == value and type(convert(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a .*, got"):
            convert(text)


def test_the_error_of_a_flag_names_it_and_no_flag_is_abbreviated(refused):
    parser = common.Parser(DOC)
    parser.add_argument("--eps", type=common.probability)
    parser.add_argument("--loss", choices=["at", "st"])
    assert parser.parse_args(["--eps", "8/255"]).eps == 8 / 255
    message = refused(parser.parse_args, ["--eps", "8//255"])
    assert message == "--eps: expected a number or a fraction between 0 and 1, got '8//255'"
    assert refused(parser.parse_args, ["--loss", "ta"]).startswith("--loss: invalid choice: 'ta'")
    assert "--los" in refused(parser.parse_args, ["--los", "at"])
    assert "--no-such-flag" in refused(parser.parse_args, ["--no-such-flag", "1"])


def test_an_empty_value_is_refused(refused):
    """As "$UNSET" in a shell gives it: not the same as no flag."""
    parser = common.Parser(DOC)
    parser.add_argument("--teacher-ckpt")
    parser.add_argument("--attack", nargs="+")
    assert (
        refused(parser.parse_args, ["--teacher-ckpt", ""]) == "--teacher-ckpt: its value is empty"
    )
    assert "--attack: its value" in refused(parser.parse_args, ["--attack", "clean", ""])
    assert parser.parse_args(["--attack", "clean"]).teacher_ckpt is None


def run_args(*argv, presets=None):
    """The namespace of a script with a few flags of its own."""
    parser = common.Parser(DOC)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--teacher-model")
    parser.add_argument("--loss", choices=["at", "st"], default="at")
    parser.add_argument("--eps", type=common.probability, default=8 / 255)
    parser.add_argument("--epochs", type=common.whole, default=100)
    parser.add_argument("--nesterov", **common.SWITCH)
    parser.add_argument("--decay-norms", **common.SWITCH | {"default": True})
    common.add_run_flags(parser)
    return common.parse(parser, list(argv), presets or {})


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--model resnet19", "--model: expected resnet18"),
        ("--teacher-model wrn-12-1", "--teacher-model: the depth"),
        ("--model wrn-16-2-w8", "--model: expected"),
        ("--name ../up", "--name: "),
        ("--name", "--name: expected one argument"),
        ("--seed 1 1", "--seed: each seed once, got 1 1"),
        ("--seed -1", "--seed: "),
        ("--epochs 1.5", "--epochs: "),
        ("--augment cutmix", "--augment: "),
        ("--precision fp16", "--precision: "),
        ("--compile fast", "--compile: invalid choice: 'fast'"),
    ],
)
def test_flags_of_all_scripts_are_checked(argv, message, refused):
    assert refused(run_args, *argv.split()).startswith(message)


def test_a_run_is_named_by_its_flags_that_are_not_at_their_default():
    assert run_args().name == "cifar10-resnet18-at"
    assert run_args("--loss", "st", "--eps", "4/255").name == "cifar10-resnet18-st,eps=0.01569"
    assert run_args("--data", "a/my set.npz").name == "my-set-resnet18-at"
    # what changes no weight is not in the name
    free = "--seed 1 2 --device cpu --runs here --compile reduce-overhead --tensorboard"
    assert run_args(*free.split()).name == "cifar10-resnet18-at"
    long = run_args("--data-root", "x", "--teacher-model", "mlp" + "-1000" * 8, "--epochs", "7")
    assert len(long.name) == 64
    assert long.name != run_args("--teacher-model", "mlp" + "-1000" * 8, "--epochs", "8").name
    assert run_args("--name", "own").name == "own"
    switched = run_args("--nesterov", "--no-decay-norms")
    assert switched.name == "cifar10-resnet18-at,nesterov=True,decay-norms=False"


def test_seed_and_compile_with_and_without_values():
    args = run_args()
    assert args.seed == [0] and args.compile is None
    args = run_args("--compile", "--seed", "3", "1", "2")
    assert args.seed == [3, 1, 2] and args.compile == "default"
    assert run_args("--compile", "max-autotune").compile == "max-autotune"


def test_presets_set_defaults_and_flags_that_are_given_win(capsys):
    presets = {"--demo": {"epochs": 5, "model": "mlp-8"}, "--loss st": {"eps": 0.5}}
    args = run_args("--demo", "--model=mlp-4", presets=presets)
    assert capsys.readouterr().out == "--demo sets --epochs 5\n"
    assert (args.epochs, args.model, args.eps) == (5, "mlp-4", 8 / 255)
    assert args.given == ["--demo", "--model"]
    args = run_args("--loss=st", presets=presets)
    assert capsys.readouterr().out == "--loss st sets --eps 0.5\n" and args.eps == 0.5
    run_args(presets=presets)
    assert capsys.readouterr().out == ""


def test_a_preset_prints_switches_as_they_are_typed_and_a_no_that_is_given_wins(capsys):
    presets = {"--demo": {"nesterov": True, "decay_norms": False}}
    args = run_args("--demo", presets=presets)
    assert capsys.readouterr().out == "--demo sets --nesterov, --no-decay-norms\n"
    assert args.nesterov and not args.decay_norms
    args = run_args("--demo", "--no-nesterov", presets=presets)
    assert capsys.readouterr().out == "--demo sets --no-decay-norms\n"
    assert not args.nesterov and not args.decay_norms


def test_help_shows_the_docstring_and_the_defaults_but_not_none(capsys):
    with pytest.raises(SystemExit) as end:
        run_args("--demo", "--help", presets={"--demo": {"epochs": 5}})
    out = capsys.readouterr().out
    assert (
        end.value.code == 0 and DOC in out and "None" not in out and "(default: False)" not in out
    )
    assert "data set: cifar10" in out and "(default: cifar10)" in " ".join(out.split())


def test_derived_seeds_differ():
    seeds = {common.derive_seed(s, stage, e) for s in range(9) for stage in "ab" for e in range(99)}
    assert len(seeds) == 9 * 2 * 99 and all(0 <= seed < 2**63 for seed in seeds)
