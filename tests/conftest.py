"""The programs lie one folder up and are imported from there; nets and images to test with."""

import contextlib
import functools
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that the tests start
# a shell that starts the tests in the background has Ctrl-C ignored, also in what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the test files run side by side
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def no_network(*args, **kwargs):
    """Stands in for what opens connections: the tests need neither the network nor data."""
    raise OSError("the tests are not connected")


socket.socket.connect = socket.getaddrinfo = no_network


@pytest.fixture(scope="session", autouse=True)
def shapes_once():
    """The shapes are drawn once per process: it takes longer than most of the small runs."""
    drawn = functools.cache(common.make_shapes)

    @functools.wraps(common.make_shapes)
    def copies(*sizes):
        return {key: values.copy() for key, values in drawn(*sizes).items()}

    common.make_shapes = copies


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Runs draw no curves.png, which would take longer than many a run, without this mark."""
    if "curves" not in request.keywords:
        monkeypatch.setattr(common, "draw_run", lambda *_: None)


@pytest.fixture(autouse=True)
def imports_end_with_the_test(tmp_path_factory):
    """No other test finds what this one imports from a folder of its own, or the folder."""
    path, folder = [*sys.path], str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def refused():
    """refused(function, *args, **kwargs) -> the one line of the UserError with which it ends."""

    def call(function, *args, **kwargs):
        with pytest.raises(common.UserError) as end:
            function(*args, **kwargs)
        message = str(end.value)
        assert message and "\n" not in message.strip()
        return message

    return call


@pytest.fixture
def ended(capsys, monkeypatch):
    """ended(main) -> (exit status, stderr) of main() as the outermost function of a program."""

    # after an OSError standard output is closed, which here is that of the tests
    monkeypatch.setattr(os, "dup2", lambda *_: None)

    def call(main):
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            common.start(main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(script, flags, stage, epoch): run its main, stopped after that epoch as by Ctrl-C."""

    def call(script, flags, stage, epoch):
        save_epoch = common.save_epoch

        def save_and_stop(folder, saved_stage, model, state, rows, *more):
            save_epoch(folder, saved_stage, model, state, rows, *more)
            if (saved_stage, len(rows)) == (stage, epoch):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common, "save_epoch", save_and_stop)
            script.main(flags.split())

    return call


@pytest.fixture
def public_folder():
    """An empty folder that every user of the machine can read and write, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextlib.contextmanager
def read_only(folder):
    """Nothing can be written into a folder inside the block, by the superuser neither."""
    folder.chmod(0o555)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)  # a user without rights
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        folder.chmod(0o755)


def same_weights(a, b):
    """Whether two files of save_model hold the same weights, bit for bit."""
    first, second = common.load(a)["weights"], common.load(b)["weights"]
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class Linear(nn.Module):
    """Logits of one linear layer on the flattened image."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Made(nn.Module):
    """Another model with a function applied to its logits."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function
        self.eval()

    def forward(self, x):
        return self.function(self.model(x))


def linear_problem(classes=4, n=30, size=6, low=60, high=196, seed=0):
    """A linear model, images uint8 (n, size, size, 3) and labels on which it is right."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high, (n, size, size, 3), generator=g, dtype=torch.uint8)
    model = Linear(torch.randn(classes, 3 * size * size, generator=g) / 10)
    return model, x, model(common.to_float(x)).argmax(1)


@pytest.fixture(scope="module")
def small():
    """A net of a few hundred parameters, trained on 8x8 shapes to be partly robust; 80 images."""
    torch.manual_seed(0)
    arrays = common.make_shapes(1500, 80, 1)
    x = torch.from_numpy(arrays["x_train"][:, ::4, ::4].copy())
    x_test = torch.from_numpy(arrays["x_test"][:, ::4, ::4].copy())
    y, y_test = torch.from_numpy(arrays["y_train"]), torch.from_numpy(arrays["y_test"])
    layers = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(192, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(6):
        for part in torch.randperm(1500).split(100):
            clean = common.to_float(x[part])
            x_adv = common.pgd(model.eval(), clean, y[part], 4 / 255, 4 / 255, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x_adv), y[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False), x_test, y_test


@pytest.fixture(scope="module")
def shapes():
    """60 drawn images, uint8 (60, 32, 32, 3), and labels."""
    arrays = common.make_shapes(10, 60)
    return torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])


def textured(n=64, seed=3):
    """Coloured fractal images with the range of photographs: uint8 (n, 32, 32, 3)."""
    import eval_robustness
    from benchmark import corruptions

    draw = eval_robustness.uniform(torch.arange(3 * n), "test images", seed)
    x = corruptions.plasma(draw, 1.5).view(n, 3, 32, 32)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def statistics(out, x):
    """Per image, float64 (N,): mean |change|, mean, mean square, mean |neighbour difference|."""
    out, x = out.double(), x.double()
    axes = (1, 2, 3)
    down, right = out.diff(dim=1).abs().mean(axes), out.diff(dim=2).abs().mean(axes)
    return (out - x).abs().mean(axes), out.mean(axes), (out**2).mean(axes), (down + right) / 2


def save_image(path, level, size=32):
    """Write an image of one grey level, and its folders."""
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(path)
