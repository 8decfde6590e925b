"""--model MODULE:FUNCTION: nets of others in all scripts, their checkpoints, and bad input."""

import functools
import os
import re
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import common
import eval_robustness
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd

PAGE = (ROOT / "docs" / "own_nets.md").read_text()
MYNETS, RB, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.S)

THEIRS = """
import random
import numpy
import torch
import torch.nn as nn

def net(classes=10, width=8, numbers=None):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.Flatten(), nn.Linear(64 * width, classes))

class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm1d(256)
        self.fc = nn.Linear(256, 10)
        self.tied = self.fc

    def forward(self, x):
        assert x.is_contiguous()
        return self.fc(self.norm(self.conv(x).view(len(x), -1)))

def views():
    return Views()

class Projected(nn.Module):
    # by numbers that no checkpoint holds
    def __init__(self):
        super().__init__()
        self.projection = torch.randn(3072, 16) / 50
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(x.flatten(1) @ self.projection)

def projected():
    return Projected()

class Noisy(nn.Module):
    # a defence: it never answers the same
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))

def noisy():
    return Noisy()

class Skips(nn.Module):
    # a layer that joins later, as with stochastic depth
    def __init__(self):
        super().__init__()
        self.first, self.second, self.steps = nn.Linear(3072, 10), nn.Linear(10, 10), 0
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = self.dropout(self.first(x.flatten(1)))
        self.steps += self.training
        return x if self.training and self.steps < 2 else x + self.second(x)

def skips():
    return Skips()

def drawn(by):
    linear = nn.Linear(3072, 10)
    draw = {"numpy": lambda: numpy.random.randn() / 50, "random": lambda: random.gauss(0, 0.02)}
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([draw[by]() for _ in range(10)]))
    return nn.Sequential(nn.Flatten(), linear)

MEAN = [0.5, 0.5, 0.5]

def needs(size):
    return net()

class Masked(nn.Module):
    # a mask of -inf in a buffer, as in attention
    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer("mask", torch.full((10, 10), float("-inf")).triu(1))

    def forward(self, x):
        return self.net(x) + self.mask[-1]

def masked():
    return Masked()

def sets_precision():
    torch.set_float32_matmul_precision("medium")
    return net()

def fails():
    raise OSError("several\\nlines")

def no_module():
    return "resnet"

def soft():
    return nn.Sequential(net(), nn.Softmax(1))

def large():
    return net(classes=1000)

def gray():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(10))

def one_channel():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1800, 10))

def on_meta():
    return net().to("meta")

class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        y = self.net(x).exp()
        y2 = y * y
        if self.training:
            y.add_(1)
        return y2 if self.training else y2 * 30

def untrainable():
    return InPlace()

def without_weights():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

class Odd(nn.Module):
    # a linear net whose forward does what its name says
    def __init__(self, kind):
        super().__init__()
        self.kind, self.net = kind, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        if kind == "arch":
            self.arch = "resnet18"
            self.net.arch = "resnet18"

    def forward(self, x):
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.net(x)
        if self.kind == "inference_mode":
            with torch.inference_mode():
                return self.net(x)
        if self.kind == "detach":
            return self.net(x).detach()
        if self.kind == "detached":
            return self.net(x.detach())
        if self.kind == "numpy":
            return self.net(torch.from_numpy(x.numpy()))
        if self.kind == "array":
            return self.net(x).detach().numpy()
        if self.kind == "integers":
            return self.net((255 * x).long() / 255)
        if self.kind == "assert":
            assert x.shape[2] == 224
        if self.kind == "attribute":
            return self.missing(x)
        if self.kind == "key":
            return {}["logits"]
        if self.kind == "training":
            assert not self.training, "made for evaluation alone"
        if self.kind == "in-place":
            x.sub_(0.5).div_(0.25)
        if self.kind == "arch":
            assert self.arch == "resnet18"
        return self.net(x)

def odd(kind):
    return Odd(kind)

def frozen():
    return net().requires_grad_(False)

def buffers_only():
    n = net(width=4)
    for module in n.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    return n

def scripted(traced=False):
    n = net()
    return torch.jit.trace(n.eval(), torch.rand(2, 3, 32, 32)) if traced else torch.jit.script(n)

def exported():
    return torch.export.export(net().eval(), (torch.rand(2, 3, 32, 32),)).module()

def exits():
    raise SystemExit(0)

def weight_norm(old):
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    conv = wrap(nn.Conv2d(3, 4, 3, 4, 1))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(3072, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.head(self.module(x.flatten(1)))

def parallel():
    return Parallel()
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    """The current folder holds theirs.py, mynets.py and rb.py; no function is known yet."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "mynets.py").write_text(MYNETS)
    (tmp_path / "rb.py").write_text(RB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "FUNCTIONS", {})
    return tmp_path


SMALL = (
    "--data shapes --train-subset 32 --test-subset 10 --val-size 10 --batch-size 16 --epochs 1 "
    "--device cpu --name x --teacher-epochs 1"
)
SMALL_OF = {
    robust_kd: f"{SMALL} --teacher-batch-size 16 --steps 1",
    teacher_free_kd: f"{SMALL} --eval-attack clean --steps 1",
    fickle_teacher: f"{SMALL} --eval-restarts 1",
    soft_randomization: f"{SMALL} --eval-restarts 1",
    messy_collab: f"{SMALL} --eval-restarts 1",
}
NETS = "--model theirs:net --teacher-model theirs:net(width=4)"
RUNS = [(robust_kd, f"--loss {loss}") for loss in robust_kd.LOSSES]
RUNS += [(robust_kd, f"--teacher-training {way}") for way in ("st", "ffgsm", "trades")]
for script in (teacher_free_kd, fickle_teacher, soft_randomization, messy_collab):
    RUNS += [(script, f"--method {method}") for method in script.METHODS]


def run(script, flags):
    (rows,) = script.main(f"{SMALL_OF[script]} {flags}".split())
    return rows


@pytest.mark.parametrize(("script", "flags"), RUNS, ids=lambda v: getattr(v, "__name__", v))
def test_nets_of_others_are_trained_by_every_method(script, flags, refused):
    if flags == "--method self-distillation":
        assert "self-distillation needs the stages" in refused(run, script, f"{flags} {NETS}")
        return
    nets, method = NETS, flags.split()[1]
    if script is teacher_free_kd:
        taught = method in script.TAUGHT_ON_X | script.TAUGHT_ON_X_ADV
        if not taught or method in script.TEACHER_LIKE_STUDENT:
            nets = "--model theirs:net"
    rows = run(script, f"{flags} {nets}")
    taught = any(row["model"].startswith("teacher") for row in rows)
    assert all(0 <= row["clean_acc"] <= 1 for row in rows)
    file = "teacher.pt" if flags == "--method teacher" else "student.pt"
    found = [row for row in rows if row["file"].endswith(file)]
    assert found and (taught or "student" in rows[0]["model"])


@pytest.mark.parametrize("name", ["mobilenet", "shufflenet", "small", "small(width=8)"])
def test_the_nets_of_the_page_are_student_and_teacher(name, tmp_path):
    flags = f"--model mynets:{name} --teacher-model mynets:{name} --loss akd+"
    rows = run(robust_kd, flags)
    assert [row["model"] for row in rows][:2] == ["teacher (at)", "student (akd+)"]
    log = common.read_log(tmp_path / "runs/robust_kd/x-s0")["student"]
    assert log[0]["loss"] > 0


def test_the_program_of_the_page_loads_a_checkpoint(tmp_path, capsys):
    exec(compile(LOADING, "page", "exec"), {"__name__": "program"})
    assert capsys.readouterr().out.endswith("weights\n")


def test_the_shell_commands_of_the_page_are_understood(tmp_path, monkeypatch):
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench/__init__.py").touch()
    for name in ("robustbench", "robustbench.utils"):  # the real one may be imported
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "robustbench/utils.py").write_text("def load_model(*args, **kwargs): pass\n")
    found = 0
    for line in re.findall(r"^python (?:robust_kd|eval_robustness).py .*", PAGE, re.M):
        script, *argv = common.shlex.split(line.removeprefix("python "))
        module = robust_kd if script == "robust_kd.py" else eval_robustness
        module.parse_args(argv)
        found += 1
    assert found == 8


def test_a_net_that_views_its_input_as_contiguous_trains_and_is_attacked_as_it_is():
    run(robust_kd, "--model theirs:views --loss at --epochs 2")
    model = common.load_model("runs/robust_kd/x-s0/student.pt")
    x = torch.rand(4, 3, 32, 32).to(memory_format=torch.channels_last)
    assert model(x).shape == (4, 10)


def test_a_run_goes_on_after_an_interruption(tmp_path, stop_at):
    flags = f"{SMALL_OF[robust_kd]} --model theirs:net --loss at --epochs 3 --runs"
    robust_kd.main(f"{flags} {tmp_path}/whole".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/parts", "student", 2)
    robust_kd.main(f"{flags} {tmp_path}/parts".split())
    digests = {
        common.weights_digest(tmp_path / part / "robust_kd/x-s0/student.pt")
        for part in ("whole", "parts")
    }
    assert len(digests) == 1


def test_a_net_that_answers_otherwise_each_time_is_trained():
    assert run(robust_kd, "--model theirs:noisy --loss st")[0]["net"] == "student"


@pytest.mark.parametrize("script", SMALL_OF)
def test_a_layer_that_joins_after_the_first_step_is_trained(script):
    assert run(script, "--model theirs:skips --teacher-model theirs:skips")


@pytest.mark.parametrize("by", ["numpy", "random"])
def test_a_net_that_draws_without_torch_begins_with_the_same_weights(by, tmp_path):
    net = f"--teacher-model theirs:drawn(by='{by}') --model mlp-4"
    for name in ("first", "second"):
        robust_kd.main([*SMALL_OF[robust_kd].split(), *net.split(), "--name", name])
    assert len([*tmp_path.glob("runs/teachers/*")]) == 1


def test_all_processes_begin_with_the_weights_of_the_first(monkeypatch):
    """A function may draw its weights from generators that no seed of ours reaches."""
    common.find_function("--model", "theirs:net")
    data = common.load_data("shapes", val_size=0, train_subset=8, test_subset=4)
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common.dist, "broadcast", lambda tensor, source: tensor.fill_(3 + source))
    model = common.new_model(data, "theirs:net", 0, "student")
    assert all((tensor == 3).all() for tensor in model.state_dict().values())


def test_a_teacher_is_shared_by_name_arguments_and_first_weights(tmp_path, monkeypatch):
    def teachers():
        return len([*(tmp_path / "runs/teachers").glob("*/teacher.pt")])

    for name, flags, expected in [
        ("a", "theirs:net", 1),
        ("b", "theirs:net()", 1),  # the same name in another spelling
        ("c", "theirs:net(width=4)", 2),
        ("d", "theirs:net(width=4,classes=10)", 3),
    ]:
        run(robust_kd, f"--model mlp-4 --teacher-model {flags} --name {name}")
        assert teachers() == expected
    new = THEIRS.replace("nn.Conv2d(3, width, 3, 4, 1)", "nn.Conv2d(3, width, 5, 4, 2)")
    (tmp_path / "theirs.py").write_text(new)
    del sys.modules["theirs"]
    common.importlib.invalidate_caches()
    run(robust_kd, "--model mlp-4 --teacher-model theirs:net --name e")
    assert teachers() == 4


# ------------------------------------------------------------------------------------------------
# Weights from elsewhere


@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "data parallel"])
@pytest.mark.parametrize("script", [robust_kd, teacher_free_kd, fickle_teacher])
def test_a_teacher_from_a_plain_state_dict_teaches_as_it_is(layout, script, tmp_path):
    common.find_function("--model", "theirs:net")
    net = common.build_model("theirs:net")
    state = net.state_dict()
    if layout == "data parallel":
        state = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    elif layout != "plain":
        state = {layout: state, "epoch": 3}
    torch.save(state, "teacher.pth")
    method = {robust_kd: "--loss akd+", teacher_free_kd: "--method vanilla --data shapes"}
    flags = "--model mlp-4 --teacher-model theirs:net --teacher-ckpt teacher.pth --val-size 0 "
    rows = run(script, flags + method.get(script, "--method hinton"))
    assert rows[0]["model"].startswith("teacher")
    data = common.load_data("shapes", val_size=0, train_subset=32, test_subset=10)
    expected = common.accuracy(common.predict(net.eval(), data.x_test), data.y_test)
    assert rows[0]["clean_acc"] == pytest.approx(expected)


def test_a_fickle_teacher_needs_dropout_and_gets_its_rate(refused):
    run(fickle_teacher, "--dropout 0.3 --teacher-model theirs:net --model mlp-4")
    (path,) = (common.Path("runs") / "teachers").glob("*/teacher.pt")
    teacher = common.load_model(path)
    assert [m.p for m in teacher.modules() if isinstance(m, nn.Dropout)] == [0.3]
    line = refused(run, fickle_teacher, "--teacher-model theirs:views --model mlp-4 --name y")
    assert line == "theirs:views: has no nn.Dropout for the dropout rate 0.4"


PLACES = {
    "net": lambda state: {"net": state, "acc": 94.1, "epoch": 3},
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state},
    "student": lambda state: {"student": state, "teacher": {"fc.weight": torch.ones(2)}},
    "nested": lambda state: {"model": {"student": {"state_dict": state}}},
    "the field of a LightningModule": lambda state: {
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()}
    },
    "ema alone": lambda state: {"ema": {"decay": 0.999, "module": state}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "both, turned round": lambda state: {
        "weights": {f"_orig_mod.module.{name}": value for name, value in state.items()}
    },
    "swa_utils": lambda state: (
        {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in state.items()}
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["theirs:net", "theirs:parallel", "theirs:scripted"])
def test_weights_are_found_where_programs_keep_them(place, name, capsys):
    common.find_function("--model", name)
    net, other = common.build_model(name), common.build_model(name)
    torch.save(PLACES[place](net.state_dict()), "weights.pth")
    common.load_weights("--weights", "weights.pth", other)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(dtype, refused):
    common.find_function("--model", "theirs:net")
    net = common.build_model("theirs:net")
    torch.save({name: value.to(dtype) for name, value in net.state_dict().items()}, "w.pth")
    line = refused(common.load_weights, "--weights", "w.pth", net)
    assert f"is torch.float32 in the net, {dtype} in the file; convert" in line


def test_weights_of_a_part_that_was_compiled_or_parallel_are_found():
    common.find_function("--model", "theirs:net")
    net, other = common.build_model("theirs:net"), common.build_model("theirs:net")
    names = {"0.weight": "0.module.weight", "5.bias": "5._orig_mod.bias"}
    torch.save({names.get(name, name): v for name, v in net.state_dict().items()}, "w.pth")
    common.load_weights("--weights", "w.pth", other)
    assert torch.equal(other[5].bias, net[5].bias) and torch.equal(other[0].weight, net[0].weight)


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema"), ("model", "swa")],
)
def test_of_raw_and_averaged_weights_a_line_says_which_are_taken(raw, averaged, capsys):
    common.find_function("--model", "theirs:net")
    nets = [common.build_model("theirs:net") for _ in range(3)]
    torch.save({raw: nets[0].state_dict(), averaged: nets[1].state_dict()}, "weights.pth")
    common.load_weights("--weights", "weights.pth", nets[2])
    assert torch.equal(nets[2][0].weight, nets[1][0].weight)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--weights weights.pth: takes the weights at ['{averaged}'], not at")
    exec(re.search(r'python -c "(.*)" and', line)[1])  # what the line says gives the others
    common.load_weights("--weights", "other.pt", nets[2])
    assert torch.equal(nets[2][0].weight, nets[0][0].weight)
    assert capsys.readouterr().out == ""


def test_averaged_weights_that_do_not_fit_are_not_taken_and_a_line_says_so(capsys):
    common.find_function("--model", "theirs:net")
    net, other = common.build_model("theirs:net"), common.build_model("theirs:net")
    torch.save({"ema": {"a": torch.ones(1)}, "model": net.state_dict()}, "weights.pth")
    common.load_weights("--weights", "weights.pth", other)
    assert torch.equal(other[0].weight, net[0].weight)
    assert "takes the weights at ['model'], not at ['ema']" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Nets of every kind


EVALUATED = "--data shapes --n 10 --device cpu --attack"


def evaluated(name, attacks="clean pgd1"):
    """The row of one net in an evaluation on ten images."""
    eval_robustness.main(["--model", name, *f"{EVALUATED} {attacks} --json r.json".split()])
    (row,) = common.read_json(common.Path("r.json"))["rows"]
    common.Path("r.json").unlink()
    return row


@pytest.mark.parametrize(
    "name",
    [
        "theirs:frozen",
        "theirs:buffers_only",
        "theirs:scripted",
        "theirs:scripted(traced=True)",
        "theirs:odd(kind='arch')",
        "theirs:odd(kind='in-place')",
        "theirs:odd(kind='training')",
        "theirs:weight_norm(old=True)",
    ],
)
def test_nets_that_need_not_be_trained_are_evaluated_and_teach(name):
    common.find_function("--model", name)
    torch.save(common.build_model(name).state_dict(), "w.pth")
    row = evaluated(name)
    assert 0 <= row["pgd1_acc"] <= row["clean_acc"]
    rows = run(robust_kd, f"--teacher-model {name} --teacher-ckpt w.pth --model mlp-4 --loss akd")
    assert rows[0]["model"].startswith("teacher")


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "detach", "integers", "numpy"])
def test_a_net_without_a_gradient_is_evaluated_where_none_is_needed(kind, refused, monkeypatch):
    name = f"theirs:odd(kind={kind!r})"
    few_queries = functools.partial(eval_robustness.Settings, queries=5)
    monkeypatch.setattr(eval_robustness, "Settings", few_queries)
    assert 0 <= evaluated(name, "clean square")["square_acc"] <= 1
    for attacks in ("pgd1", "clean aa", "apgd-ce", "calibration"):
        line = refused(evaluated, name, attacks)
        assert "no gradient reaches the images" in line or "Can't call numpy()" in line
    flags = f"--method vanilla --model mlp-4 --teacher-model {name} --teacher-ckpt w.pth"
    common.find_function("--model", name)
    torch.save(common.build_model(name).state_dict(), "w.pth")
    assert run(teacher_free_kd, flags)[0]["model"].startswith("teacher")


@pytest.mark.parametrize("name", ["theirs:scripted", "theirs:odd(kind='in-place')"])
def test_scripted_nets_and_nets_that_normalise_in_place_are_trained(name):
    ema = "" if "scripted" in name else "--ema 0.9"
    rows = run(robust_kd, f"--model {name} --loss trades --attack-bn train {ema} --lr 1e-4")
    assert rows[0]["model"] == "student (trades)"


@pytest.mark.parametrize("flags", ["--loss igdm", "--loss iad --awp 0.01", "--loss adr --ema 0.9"])
def test_later_methods_train_nets_of_others(flags):
    net = "theirs:odd(kind='in-place')"
    rows = run(robust_kd, f"--model {net} --teacher-model {net} {flags} --lr 1e-4")
    assert rows[-1]["net"] in ("student", "best")


@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_a_teacher_without_a_gradient_cannot_guide_the_attack(kind, refused):
    name = f"theirs:odd(kind={kind!r})"
    common.find_function("--model", name)
    torch.save(common.build_model(name).state_dict(), "w.pth")
    flags = f"--loss adaad --model mlp-4 --teacher-model {name} --teacher-ckpt w.pth"
    assert "no gradient reaches the images" in refused(run, robust_kd, flags)
    assert not os.path.exists("runs")


def test_a_net_that_normalises_in_place_leaves_the_images_alone():
    common.find_function("--model", "theirs:odd(kind='in-place')")
    model, x = common.build_model("theirs:odd(kind='in-place')").eval(), torch.rand(4, 3, 32, 32)
    before, labels = x.clone(), torch.arange(4)
    common.predict(model, x)
    x_adv = common.pgd(model, x, labels, 0.03, 0.01, 3)
    assert torch.equal(x, before)
    assert (x_adv - x).abs().max() <= 0.03 + 1e-6
    model(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_weight_norm_is_averaged():
    run(robust_kd, "--model theirs:weight_norm(old=False) --loss at --ema 0.5 --epochs 2")
    model = common.load_model("runs/robust_kd/x-s0/student.pt")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["theirs:weight_norm(old=True)", "theirs:scripted"])
def test_nets_that_cannot_be_copied_are_trained_without_an_average(name, refused):
    line = refused(run, robust_kd, f"--model {name} --loss at --ema 0.5 --name y")
    assert "--ema: the net cannot be copied" in line and "leave out --ema" in line
    assert run(robust_kd, f"--model {name} --loss at")[0]["net"] == "student"


def test_the_check_of_a_net_leaves_its_mode_and_statistics_as_they_are(shapes):
    common.find_function("--model", "theirs:net")
    model = common.build_model("theirs:net")
    model[1].forward = model[1].train().forward
    model[1].eval = lambda: model[1]  # BatchNorm in training mode, as code of others has it
    model[1].train = lambda mode: model[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    eval_robustness.check_net(model, *shapes, 10, "net")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------
# Checkpoints name a function and never import it


def test_no_import_happens_when_a_checkpoint_is_loaded(tmp_path, refused):
    (tmp_path / "evil.py").write_text("open('executed', 'w')\ndef net(): return None\n")
    model = common.build_model("mlp-4")
    model.build_arguments["name"] = "evil:net"
    common.save_model(tmp_path / "evil.pt", model)
    for call in (
        lambda: common.load_model("evil.pt"),
        lambda: eval_robustness.main(["evil.pt", "--data", "shapes", "--n", "5"]),
        lambda: run(robust_kd, "--teacher-ckpt evil.pt --model mlp-4"),
        lambda: run(fickle_teacher, "--teacher-ckpt evil.pt --model mlp-4 --dropout 0"),
    ):
        line = refused(call)
        assert line.startswith("evil.pt: is a net of 'evil:net'") and "--model" in line
    assert not (tmp_path / "executed").exists() and "evil" not in sys.modules


def test_an_evaluation_needs_the_function_that_was_trained(capsys, refused):
    run(robust_kd, "--model theirs:net(width=4) --loss at")
    path = "runs/robust_kd/x-s0/student.pt"
    argv = [path, "--data", "shapes", "--n", "10", "--attack", "clean", "--device", "cpu"]
    common.FUNCTIONS.clear()
    assert "is a net of 'theirs:net(width=4)'" in refused(eval_robustness.main, argv)
    wrong = refused(eval_robustness.main, [*argv, "--model", "theirs:net(width=8)"])
    assert "is a net of 'theirs:net(width=4)'" in wrong
    capsys.readouterr()
    eval_robustness.main([*argv, "--model", "theirs:net( width = 4 )"])
    assert capsys.readouterr().out.count("x-s0/student.pt") == 1  # and no row of an untrained net
    line = refused(
        eval_robustness.main, [*argv, "--model", "theirs:net(width=4)", "--weights", path]
    )
    assert line.startswith("--weights: ")


def test_a_checkpoint_of_a_function_that_has_changed_is_refused(tmp_path, refused):
    common.find_function("--model", "theirs:net")
    common.save_model("net.pt", common.build_model("theirs:net"))
    (tmp_path / "theirs.py").write_text(THEIRS.replace("width, 3, 4, 1", "width, 5, 4, 2"))
    del sys.modules["theirs"]
    common.importlib.invalidate_caches()
    common.find_function("--model", "theirs:net")
    assert "do not belong" in refused(common.load_model, "net.pt")


# ------------------------------------------------------------------------------------------------
# Bad input


BAD = {
    "theirs": "--model: expected resnet18",
    "theirs:": "--model: expected MODULE:FUNCTION",
    "nowhere:net": "--model nowhere:net: ModuleNotFoundError: No module named 'nowhere'",
    "theirs:nothing": "--model theirs:nothing: AttributeError",
    "theirs:MEAN": "--model theirs:MEAN: TypeError: the first argument must be callable",
    "theirs:needs": "theirs:needs: TypeError: needs() missing 1 required",
    "theirs:net(depth=3)": "theirs:net(depth=3): TypeError: net() got an unexpected",
    "theirs:net(width=open('x','w'))": "the values must be plain",
    "theirs:net(3)": "the values must be plain",
    "theirs:net(**{})": "the values must be plain",
    "theirs:net()()": "the values must be plain",
    "theirs:net(width=4": "--model: expected MODULE:FUNCTION",
    "theirs:fails": "theirs:fails: OSError: several lines",
    "theirs:no_module": "returned a str, not a torch.nn.Module",
    "theirs:soft": "returns probabilities",
    "theirs:large": "returns 1000 logits, the data has 10 classes",
    "theirs:one_channel": "theirs:one_channel does not take images (8, 3, 32, 32): RuntimeError",
    "theirs:gray": "has weights without numbers",
    "theirs:on_meta": "has weights without numbers",
    "theirs:untrainable": "cannot be trained (RuntimeError",
    "theirs:without_weights": "has no weights to train",
    "theirs:exported": "theirs:exported: NotImplementedError: Calling train() is not supported",
    "theirs:exits": "theirs:exits: SystemExit: 0",
    "theirs:frozen": "has no weights to train",
    "theirs:projected": "theirs:projected: draws numbers that are not in its state_dict",
    "theirs:odd(kind='no_grad')": "no gradient reaches the images",
    "theirs:odd(kind='inference_mode')": "no gradient reaches the images",
    "theirs:odd(kind='detach')": "no gradient reaches the images",
    "theirs:odd(kind='detached')": "no gradient reaches the images",
    "theirs:odd(kind='numpy')": "cannot be attacked (RuntimeError: Can't call numpy() on Tensor",
    "theirs:odd(kind='array')": "must return logits (8, K), got ndarray",
    "theirs:odd(kind='integers')": "no gradient reaches the images",
    "theirs:odd(kind='assert')": "(8, 3, 32, 32): AssertionError: theirs.py, line ",
    "theirs:odd(kind='attribute')": "AttributeError: 'Odd' object has no attribute 'missing'",
    "theirs:odd(kind='key')": "KeyError: 'logits'",
    "theirs:odd(kind='training')": "cannot be trained (AssertionError: made for evaluation alone)",
    "theirs:net-w8": "--model: expected MODULE:FUNCTION",
}


@pytest.mark.parametrize("net", BAD)
def test_bad_nets_get_one_line_and_nothing_is_written(net, tmp_path, refused):
    before = {*tmp_path.iterdir()}
    assert BAD[net] in refused(run, robust_kd, f"--loss at --model {net}")
    after = {path for path in tmp_path.iterdir() if path.name != "__pycache__"}
    assert after == before


def test_a_net_with_a_mask_of_minus_infinity_is_trained_and_read_again(tmp_path):
    rows = run(robust_kd, f"--loss at --model theirs:masked --runs {tmp_path}")
    (file,) = tmp_path.rglob("student.pt")
    state = common.load_model(file).state_dict()
    assert state["mask"].isinf().any() and rows[-1]["clean_acc"] >= 0


def test_a_net_does_not_change_the_precision_of_the_training(tmp_path):
    with common.float32_restored():
        run(robust_kd, f"--loss at --model theirs:sets_precision --runs {tmp_path}")
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


BAD_WEIGHTS = {
    "nowhere.pth": "no such checkpoint",
    "other.pth": "other.pth: the weights are not of this net: the net wants 0.weight, 0.bias, "
    "1.weight, ...; the file has layers.0.mean, layers.0.std, layers.2.weight, ...",
    "wide.pth": "0.weight is (8, 3, 3, 3) in the net, (16, 3, 3, 3) in the file",
    "code.pth": "the file contains Python objects",
    "nan.pth": "not finite",
    "short.pth": "short.pth: damaged, or no checkpoint (not a zip of torch.save, or half of one",
    "list.pth": "--teacher-ckpt list.pth: ",
}


@pytest.mark.parametrize("file", BAD_WEIGHTS)
def test_bad_weights_get_one_line_and_nothing_is_written(file, tmp_path, refused):
    common.find_function("--model", "theirs:net")
    state = common.build_model("theirs:net").state_dict()
    torch.save(common.build_model("mlp-4").state_dict(), "other.pth")
    wide = common.build_model(common.find_function("--model", "theirs:net(width=16)"))
    torch.save(wide.state_dict(), "wide.pth")
    torch.save({"state_dict": run}, "code.pth")
    torch.save({key: value * float("nan") for key, value in state.items()}, "nan.pth")
    common.Path("short.pth").write_bytes(common.Path("other.pth").read_bytes()[:300])
    torch.save([1, 2], "list.pth")
    before = {*tmp_path.iterdir()}
    flags = f"--model mlp-4 --teacher-model theirs:net --teacher-ckpt {file}"
    assert BAD_WEIGHTS[file] in refused(run, robust_kd, flags)
    after = {path for path in tmp_path.iterdir() if path.name != "__pycache__"}
    assert after == before


# ------------------------------------------------------------------------------------------------
# Functions and nets that work once, or for a whole batch alone

ONCE = """
import torch
from theirs import nn, net

CACHED = net()

def cached():
    return CACHED

def on_a_cached_stem():
    return nn.Sequential(CACHED, nn.Linear(10, 10))

def without_gradients():
    torch.set_grad_enabled(False)
    return net()

class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3), keepdim=True).squeeze())

def squeezed():
    return Squeezed()
"""


@pytest.fixture
def once(nets):
    (nets / "once.py").write_text(ONCE)


@pytest.mark.parametrize("name", ["once:cached", "once:on_a_cached_stem"])
def test_a_function_that_returns_the_same_weights_again_is_refused(name, once, refused):
    """Two checkpoints would be one net: that of the weights that were loaded last."""
    refused(run, robust_kd, f"--model {name} --loss at")
    common.find_function("--model", name)
    line = refused(common.build_model, name)
    assert line.startswith(f"{name}: returned weights that it had returned before; build a new one")


def test_a_function_that_switches_gradients_off_is_trained(once):
    assert run(robust_kd, "--model once:without_gradients --loss at")[0]["net"] == "student"
    assert torch.is_grad_enabled()


def test_a_net_that_fails_for_a_single_image_is_refused_before_the_attack(once, refused):
    line = refused(run, robust_kd, "--model once:squeezed --loss at")
    assert line == "once:squeezed must return logits (1, K), got (10,)"
    common.find_function("--model", "once:squeezed")
    model, x = common.build_model("once:squeezed"), torch.rand(8, 3, 32, 32)
    labels = torch.arange(8)
    assert "must return logits (1, K)" in refused(
        eval_robustness.evaluate, model, x, labels, ["pgd2"]
    )
    assert 0 <= eval_robustness.evaluate(model, x, labels, ["clean"])["clean_acc"] <= 1
