"""WideResNets of RobustBench and TRADES as teachers: their state_dicts under the names of ours."""

import importlib.metadata
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import common
import eval_robustness
import fickle_teacher
import robust_kd

FIRST_CONV = "block1.layer.0.conv1.weight"
SMALL = (
    "--data shapes --train-subset 32 --test-subset 100 --val-size 0 --batch-size 16 --epochs 1 "
    "--steps 1 --device cpu --name x --model mlp-4"
).split()


def architectures(module):
    """A module of RobustBench's architectures, by its path: the package itself imports too much."""
    try:
        importlib.metadata.version("robustbench")  # torchattacks brings an old copy of it
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("robustbench is not installed; make test does so")
    package = importlib.util.find_spec("robustbench")
    (folder,) = package.submodule_search_locations
    path = Path(folder) / "model_zoo/architectures" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def trained(net):
    """The net in eval mode, with statistics and factors of BatchNorm as a training leaves them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def wide_resnet(depth=10, width=1, **options):
    net = architectures("wide_resnet").WideResNet(depth=depth, widen_factor=width, **options)
    nn.init.normal_(net.fc.weight, 0, 1)  # no class wins whatever the image
    return trained(net)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "FUNCTIONS", {})
    common.print_once.cache_clear()
    return tmp_path


def load(state, name="wrn-10-1", flag="--teacher-ckpt", **options):
    """Our net `name` with the weights of a state_dict from a file."""
    torch.save(state, "w.pth")
    model = common.build_model(name, **options)
    common.load_weights(flag, "w.pth", model)
    return model.eval()


def images(n=8):
    """Float images (n, 3, 32, 32) in [0, 1] with large parts, which a net tells apart."""
    return nn.functional.interpolate(torch.rand(n, 3, 4, 4), 32)


def assert_equal_logits(ours, theirs):
    """In float64 equal to the float32 that our net returns, in float32 to 1e-5 of the largest.

    In float32 they are not equal bit for bit: the last mean is taken in another order.
    """
    x = images()
    with torch.no_grad():
        logits, expected = ours(x), theirs(x)
        exact, exact_expected = ours.double()(x.double()), theirs.double()(x.double())
    apart, largest = expected.std(0).max().item(), expected.abs().max().item()
    assert apart > 0.1  # the images are told apart
    torch.testing.assert_close(exact.double(), exact_expected, rtol=1e-7, atol=1e-7 * apart)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * largest)


# ------------------------------------------------------------------------------------------------
# Equal logits


@pytest.mark.parametrize("sub_block1", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(10, 1), (10, 2), (16, 1), (16, 2)])
def test_logits_are_those_of_robustbench(depth, width, sub_block1, capsys):
    theirs = wide_resnet(depth, width, sub_block1=sub_block1)
    assert_equal_logits(load(theirs.state_dict(), f"wrn-{depth}-{width}"), theirs)
    line = capsys.readouterr().out
    assert line.startswith("--teacher-ckpt w.pth: no statistics of a normalisation in the file: ")
    assert line.endswith("the net takes images in [0, 1] as they are\n")


LAYOUTS = {
    "DataParallel": lambda state: {f"module.{name}": v for name, v in state.items()},
    "compiled and parallel": lambda state: {
        "state_dict": {f"_orig_mod.module.{name}": v for name, v in state.items()}
    },
    "AveragedModel": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{name}": v for name, v in state.items()},
    },
    "an old torch": lambda state: {
        name: v for name, v in state.items() if "num_batches_tracked" not in name
    },
    "raw and averaged": lambda state: {
        "model": {name: 0 * v for name, v in state.items()},
        "ema": state,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_in_the_layouts_of_programs(layout):
    theirs = wide_resnet(sub_block1=True)
    assert_equal_logits(load(LAYOUTS[layout](theirs.state_dict())), theirs)


class Normalised(nn.Module):
    """RobustBench's own way: statistics as buffers of two names before the net."""

    def __init__(self, net, mean, std, names):
        super().__init__()
        self.net = net
        for name, values in zip(names, (mean, std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.names = names

    def forward(self, x):
        mean, std = (getattr(self, name) for name in self.names)
        return self.net((x - mean) / std)


MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), "Sequential", "normalize"])
def test_a_normalisation_in_the_file_is_taken(names, capsys):
    theirs = wide_resnet()
    if names == "Sequential":
        whole = nn.Sequential(common.Normalize(MEAN, STD), theirs)
    elif names == "normalize":
        whole = nn.Sequential()
        whole.add_module("normalize", common.Normalize(MEAN, STD))
        whole.add_module("model", theirs)
    else:
        whole = Normalised(theirs, MEAN, STD, names)
    # the statistics of our own net are another normalisation, which must not stay
    ours = load(whole.state_dict(), mean=[0.1] * 3, std=[0.9] * 3)
    assert_equal_logits(ours, whole.eval())
    says = "normalises as the file says, mean 0.49, 0.48, 0.45, deviation 0.25, 0.24, 0.26\n"
    assert capsys.readouterr().out.endswith(says)


def test_statistics_given_to_our_net_stay_where_the_file_has_none(capsys):
    theirs = wide_resnet()
    ours = load(theirs.state_dict(), mean=MEAN, std=STD)
    assert_equal_logits(ours, nn.Sequential(common.Normalize(MEAN, STD), theirs))
    assert "the net keeps its own, mean 0.49, 0.48, 0.45, deviation" in capsys.readouterr().out


def test_statistics_beside_raw_weights_are_not_those_of_the_averaged_ones():
    theirs = wide_resnet()
    state = theirs.state_dict()
    raw = state | {"mu": torch.rand(3), "sigma": torch.rand(3)}
    ours = load({"model": raw, "ema": state}, mean=MEAN, std=STD)
    assert_equal_logits(ours, nn.Sequential(common.Normalize(MEAN, STD), theirs))


def test_of_several_nets_in_a_file_the_one_that_fits_is_taken(capsys):
    student, teacher = wide_resnet(16, 1), wide_resnet(10, 2)
    file = {"model": teacher.state_dict(), "student": student.state_dict()}
    assert_equal_logits(load(file, "wrn-16-1"), student)
    assert_equal_logits(load(file, "wrn-10-2"), teacher)


def test_weights_in_half_precision_become_float32():
    theirs = wide_resnet().half()
    ours = load(theirs.state_dict())
    assert ours.fc.weight.dtype == torch.float32
    assert_equal_logits(ours, theirs.float())


def test_robustbench_s_own_net_as_a_function_keeps_its_names(monkeypatch):
    """Where the net is MODULE:FUNCTION and not one of ours, nothing is renamed."""
    theirs, other = wide_resnet(sub_block1=True), wide_resnet(sub_block1=True)
    torch.save(theirs.state_dict(), "w.pth")
    common.load_weights("--weights", "w.pth", other)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(other(x), theirs(x))


# ------------------------------------------------------------------------------------------------
# By the commands


def accuracy(net):
    """The share of the 100 test images of SMALL that a net names rightly."""
    data = common.load_data("shapes", val_size=0, train_subset=32, test_subset=100)
    share = common.accuracy(common.predict(net, data.x_test), data.y_test)
    assert 0 < share < 1
    return share


def test_a_wide_resnet_of_robustbench_teaches_and_the_same_command_goes_on(capsys):
    theirs = wide_resnet(sub_block1=True)
    torch.save({f"module.{name}": v for name, v in theirs.state_dict().items()}, "ltd.pth")
    flags = [*SMALL, "--loss", "rslad", "--teacher-ckpt", "ltd.pth", "--teacher-model", "wrn-10-1"]
    (rows,) = robust_kd.main(flags)
    out = capsys.readouterr().out
    assert out.count("no statistics of a normalisation in the file") == 1
    assert rows[0]["model"] == "teacher (given)" and rows[0]["file"].endswith("ltd.pth")
    assert rows[0]["clean_acc"] == pytest.approx(accuracy(theirs))
    assert rows[1]["model"] == "student (rslad)"
    assert robust_kd.main(flags) == [rows]
    Path("ltd.pth").rename("other.pth")
    with pytest.raises(common.UserError, match=r"--teacher-ckpt: .* was made with ltd.pth, not"):
        robust_kd.main([word.replace("ltd.pth", "other.pth") for word in flags])


@pytest.mark.parametrize("name", ["resnet18-w4", "wrn-10-1", "mlp-8", "preact-resnet18-w4-silu"])
def test_a_plain_state_dict_of_one_of_our_nets_teaches_by_its_name(name):
    net = trained(common.build_model(name, mean=MEAN, std=STD))
    torch.save({"model": net.state_dict()}, "w.pth")
    flags = [*SMALL, "--loss", "akd", "--teacher-ckpt", "w.pth", "--teacher-model", name]
    (rows,) = robust_kd.main(flags)
    assert rows[0]["clean_acc"] == pytest.approx(accuracy(net))


def test_a_script_with_another_default_teacher_takes_such_weights_too():
    theirs = wide_resnet()
    torch.save(theirs.state_dict(), "w.pth")
    flags = "--teacher-ckpt w.pth --teacher-model wrn-10-1 --method hinton --eval-restarts 1"
    at = SMALL.index("--steps")
    (rows,) = fickle_teacher.main([*SMALL[:at], *SMALL[at + 2 :], *flags.split()])
    assert rows[0]["clean_acc"] == pytest.approx(accuracy(theirs))


PAGE = (ROOT / "docs/own_nets.md").read_text()


def test_the_commands_of_the_page_save_check_and_teach(tmp_path, monkeypatch):
    """As printed, but for a download, a net and data that are smaller."""
    (section,) = re.findall(r"### A robust WideResNet of RobustBench.*?\n### ", PAGE, re.S)
    theirs = wide_resnet(sub_block1=False)
    asked_for = []
    utils = type(sys)("robustbench.utils")
    utils.load_model = lambda name, **where: asked_for.append((name, where)) or theirs
    monkeypatch.setitem(sys.modules, "robustbench", type(sys)("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    commands = re.findall(r"^python .*", section.replace("wrn-34-10", "wrn-10-1"), re.M)
    save, check, teach, _ = (shlex.split(command)[1:] for command in commands)
    exec(save[1])
    assert asked_for == [("Chen2021LTD_WRN34_10", {"threat_model": "Linf"})]

    assert check[0] == "eval_robustness.py" and check[-2:] == ["--n", "1000"]
    eval_robustness.main([*check[1:-5], *"--data shapes --n 100 --device cpu --json r".split()])
    (row,) = common.read_json(tmp_path / "r")["rows"]
    assert 0 <= row["pgd20_acc"] <= row["clean_acc"] == pytest.approx(accuracy(theirs))

    assert teach[0] == "robust_kd.py"
    (rows,) = robust_kd.main([*teach[1:], *SMALL])
    assert [row["model"] for row in rows] == ["teacher (given)", "student (rslad)"]


# ------------------------------------------------------------------------------------------------
# Refusals


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


WRONG = {  # what is done to a state_dict of a wrn-10-1: what the line says
    "missing": (
        without("block3.layer.0.bn2.running_var"),
        "the net wants stages.2.0.norm2.0.running_var; the file has no others",
    ),
    "without a bias": (without("fc.bias"), "the net wants fc.bias; the file has no others"),
    "extra": (
        lambda s: s | {"head.weight": torch.ones(2)},
        "the net wants no others; the file has head.weight",
    ),
    "many": (
        lambda s: s | {f"extra{i}": torch.ones(2) for i in range(9)},
        "the file has extra0, extra1, extra2, ...",
    ),
    "a number": (lambda s: s | {"epoch": 3}, "the file has epoch"),
    "sparse": (
        lambda s: s | {"mu": torch.ones(3).to_sparse(), "sigma": torch.ones(3)},
        "normalize.mean is (1, 3, 1, 1) in the net, (3,) in the file",
    ),
    "no tensor": (
        lambda s: s | {FIRST_CONV: 3},
        "stages.0.0.conv1.weight is (16, 16, 3, 3) in the net, () in the file",
    ),
    "a sparse weight": (
        lambda s: s | {FIRST_CONV: s[FIRST_CONV].to_sparse()},
        "the names fit the net, the values are no tensors for it",
    ),
    "mean alone": (
        lambda s: s | {"mu": torch.ones(3)},
        "the net wants normalize.std; the file has no others",
    ),
    "our name too": (
        lambda s: s | {"stem.0.weight": torch.ones(16, 3, 3, 3)},
        "the file has conv1.weight",
    ),
    "numbers that are repeated": (
        lambda s: s | {name: torch.ones(3, 1).expand(3, 10**12) for name in ("mu", "sigma")},
        "normalize.mean is (1, 3, 1, 1) in the net, (3, 1000000000000) in the file",
    ),
    "two means": (
        lambda s: s | {"mu": torch.ones(3), "mean": torch.ones(3), "std": torch.ones(3)},
        "the net wants no others; the file has mean",
    ),
    "one channel": (
        lambda s: s | {"mu": torch.ones(1), "sigma": torch.ones(1)},
        "normalize.mean is (1, 3, 1, 1) in the net, (1,) in the file",
    ),
    "kernel": (
        lambda s: s | {"conv1.weight": torch.ones(16, 3, 5, 5)},
        "stem.0.weight is (16, 3, 3, 3) in the net, (16, 3, 5, 5) in the file",
    ),
    "NaN": (lambda s: s | {"fc.bias": torch.full((10,), float("nan"))}, "not finite"),
    "infinite variance": (
        lambda s: s | {"bn1.running_var": torch.full((64,), float("inf"))},
        "weights that are not finite",
    ),
    "integers": (
        lambda s: {name: value.to(torch.int8) for name, value in s.items()},
        "torch.int8 in the file; convert the weights first",
    ),
    "two nets": (
        lambda s: {f"{part}.{name}": v for name, v in s.items() for part in "ab"},
        "the weights are not of this net",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_gets_one_line_and_nothing_is_written(wrong, folder, refused):
    change, expected = WRONG[wrong]
    torch.save(change(dict(wide_resnet().state_dict())), "w.pth")
    flags = [*SMALL, "--loss", "akd", "--teacher-ckpt", "w.pth", "--teacher-model", "wrn-10-1"]
    line = refused(robust_kd.main, flags)
    assert line.startswith("--teacher-ckpt w.pth: ") and expected in line
    assert [path.name for path in folder.iterdir()] == ["w.pth"]


OTHER_NETS = {  # net -> what the line says when it is given the weights of a wrn-16-1 with ReLU
    "wrn-10-1": "the net wants no others; the file has block1.layer.1.bn1.weight",
    "wrn-22-1": "the net wants stages.0.2.norm1.0.weight",
    "wrn-16-2": "the net wants stages.0.0.shortcut.weight; the file has no others",
    # it would load, and answer something else
    "wrn-16-1-silu": "the file has conv1.weight, block1.layer.0.bn1.weight",
    "resnet18-w4": "the weights are not of this net: the net wants stem.1.weight",
    "mlp-4": "the weights are not of this net: the net wants layers.0.mean",
}


@pytest.mark.parametrize("name", OTHER_NETS)
@pytest.mark.parametrize("flag", ["--teacher-ckpt", "--weights"])
def test_weights_of_another_wide_resnet_are_refused(name, flag, refused):
    line = refused(load, wide_resnet(16, 1).state_dict(), name, flag)
    assert line.startswith(f"{flag} w.pth: ") and OTHER_NETS[name] in line


def test_another_number_of_classes_is_refused(refused):
    line = refused(load, wide_resnet(num_classes=100).state_dict())
    assert "fc.weight is (10, 64) in the net, (100, 64) in the file" in line
    assert load(wide_resnet(num_classes=100).state_dict(), classes=100).fc.out_features == 100


@pytest.mark.parametrize("net", ["DMWideResNet", "DMPreActResNet"])
def test_nets_of_deepmind_s_kind_are_refused(net, refused):
    options = {"depth": 10, "width": 1} if net == "DMWideResNet" else {}
    theirs = getattr(architectures("dm_wide_resnet"), net)(**options)
    for name in ("wrn-10-1", "wrn-10-1-silu"):
        line = refused(load, {"model": theirs.state_dict()}, name)
        assert "the weights are not of this net: the net wants normalize.mean" in line


DEEPMIND_PARTS = {
    "init_conv": "conv1",
    "layer.0.block": "block1.layer",
    "layer.1.block": "block2.layer",
    "layer.2.block": "block3.layer",
    "batchnorm_0": "bn1",
    "batchnorm_1": "bn2",
    "batchnorm": "bn1",
    "conv_0": "conv1",
    "conv_1": "conv2",
    "shortcut": "convShortcut",
    "logits": "fc",
}


def test_nets_of_deepmind_s_kind_do_compute_something_else():
    """Why they are refused: under the names of TRADES their weights give other logits."""
    theirs = architectures("dm_wide_resnet").DMWideResNet(10, 10, 1, mean=[0.0] * 3, std=[1.0] * 3)
    state = {}
    for name, value in trained(theirs).state_dict().items():
        for their_part, part in DEEPMIND_PARTS.items():
            name = re.sub(rf"\b{their_part}\b", part, name)
        state[name] = value
    ours, x = load(state), images()
    with torch.no_grad():
        logits, expected = ours(x), theirs(x)
    assert (logits - expected).abs().max() > 0.1 * expected.std(0).max()
