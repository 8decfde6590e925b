"""What the scripts share: data, models, attacks, the plumbing of a run. No loss, no training loop.

Images   uint8 (N, H, W, C) on the device; a batch is float32 (B, C, H, W) in [0, 1], channels_last.
Models   take images in [0, 1], normalise inside, return float32 logits (B, K), as attacks expect.
Attacks  differentiate with respect to the input alone; the caller sets the model's mode.
Runs     runs/<script>/<name>-s<seed>/: config.json, log.jsonl, last.pt (to resume), the models.
Random   every draw depends on (seed, stage, epoch), so resuming needs no generator state.

Importing this file does nothing: no CUDA, seed or download; torchvision is imported by the loaders.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# Errors and flags


def fail(message: str):
    """Print `error: message` as one line on stderr and leave with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def _number(expected: str, low: float, high: float = sys.float_info.max, kind=float):
    """A `type=` for argparse: text -> a number in [low, high]; floats may be fractions."""

    def parse(text: str):
        try:
            value = float(Fraction(text)) if "/" in text and kind is float else kind(text)
        except (ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


fraction = _number("a number or a fraction like 8/255", 0.0)
probability = _number("a number or a fraction like 8/255, between 0 and 1", 0.0, 1.0)
positive = _number("a number above 0", sys.float_info.min)
rate = _number("a number or a fraction of at least 0 and below 1", 0.0, math.nextafter(1, 0))
count = _number("a whole number of at least 1", 1, 10**12, int)
count0 = _number("a whole number of at least 0", 0, 10**12, int)


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser that shows `doc` and every default; its errors are one line, with exit status 2."""
    bases = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    layout = type("Help", bases, {})  # the docstring as it is written, each flag with its default
    options = {"usage": "python %(prog)s [flags]", "formatter_class": layout}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, **options)
    parser.error = lambda message: fail(re.sub(r"^argument (\S+?)(/\S+)?:", r"\1:", message))
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every training script shares: data, device, seed, folders."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--data",
        default="cifar10",
        help="cifar10, cifar100, mnist, tiny-imagenet, shapes, FILE.npz, FOLDER",
    )
    add("--data-root", default="data", help="where data sets are, and missing ones are downloaded")
    add("--train-subset", type=count, help="train on so many images (a fixed choice); None: all")
    add("--test-subset", type=count, help="test on so many images (a fixed choice); None: all")
    add("--val-size", type=count0, default=1024, help="training images held out for the best epoch")
    add("--seed", type=count0, default=0, help="seed of weights, batches and attacks")
    add("--seeds", type=count0, nargs="+", help="several runs, their mean and std; None: --seed")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="of training on CUDA")
    add("--deterministic", action="store_true", help="deterministic CUDA kernels (slower)")
    add("--runs", default="runs", help="folder of the run folders")
    add("--name", help="name of the run folder; None: made of the flags that are not the default")
    add("--tensorboard", action="store_true", help="log to TensorBoard too, if it is installed")
    add("--demo", action="store_true", help="the whole job on the embedded shapes, on a CPU")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate_files`, with the attack of the papers that train without one."""

    def path(text):
        if text != "generate" and not Path(text).exists():
            raise argparse.ArgumentTypeError(f"expected a file or a folder, there is no {text}")
        return text

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--eval", choices=["fast", "full"], default="fast", help="fast: clean, PGD; full: all below"
    )
    add("--eps", type=probability, default=0.031, help="radius of PGD")
    add("--step-size", type=fraction, default=0.003, help="of PGD")
    add("--eval-steps", type=count, default=20, help="of PGD; full: 10 and 15 too")
    add("--restarts", type=count, default=5, help="random starts of PGD, the worst counts")
    add("--corruptions", type=path, default="generate", help="CIFAR-10-C; generate: made here")
    add("--cinic", type=path, help="CINIC-10, of which the images from ImageNet count")
    add("--cinic-per-class", type=count, help="a fixed choice (paper: 2100); None: all")
    add("--ood", type=path, help="other images: an .npz or a folder of class folders")


# Flags that do not change what is computed: a run may be resumed with others.
FREE_FLAGS = {"data_root", "device", "runs", "name", "tensorboard", "argv", "seeds"}


def parse(parser: argparse.ArgumentParser, argv: list | None, demo: dict) -> argparse.Namespace:
    """Parse `argv` (None: sys.argv), `demo` being the defaults under --demo, and name the run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--demo" in argv and not {"-h", "--help"} & set(argv):
        parser.set_defaults(**{key.replace("-", "_"): str(value) for key, value in demo.items()})
        print("--demo sets " + " ".join(f"--{key} {value}" for key, value in demo.items()))
    args = parser.parse_args(argv)
    if args.name is None:
        default = vars(parser.parse_args(["--demo"] if args.demo else []))
        method = getattr(args, "loss", None) or args.method
        name = "demo-" * args.demo + f"{Path(args.data).stem}-{args.model}-{method}"
        shown = FREE_FLAGS | {"seed", "demo", "data", "model", "loss", "method"}
        for key, value in vars(args).items():
            if key not in shown and value != default[key]:
                short = f"{value:.4g}" if isinstance(value, float) else value
                name += f",{key.replace('_', '-')}={short}"
        name = re.sub(r"[^\w.,=+-]", "-", name)
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        args.name = name if len(name) <= 64 else f"{name[:55]}-{digest}"
    elif not re.fullmatch(r"\w[\w.,=+-]{0,159}", args.name):
        parser.error(f"--name: expected letters, digits and . , = + - _, got {args.name!r}")
    if len(set(args.seeds or [])) < len(args.seeds or []):
        parser.error(f"--seeds: a seed stands there twice, in {args.seeds}")
    args.argv = argv
    return args


def per_seed(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each run that --seeds asks for; of one run without it."""
    return [argparse.Namespace(**vars(args) | {"seed": seed}) for seed in args.seeds or [args.seed]]


# ------------------------------------------------------------------------------------------------
# Random numbers, device, optimizer


def derive_seed(*parts) -> int:
    """A 63-bit seed that depends on all `parts` (numbers and strings) and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def setup_device(args: argparse.Namespace) -> torch.device:
    """The device of --device, with the CUDA settings of training; an error if there is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device: there is no CUDA device here; --device cpu works everywhere")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    return device


def autocast(run: "Run"):
    """bf16 autocast for training on CUDA with --precision bf16; all else stays float32."""
    bf16 = run.device.type == "cuda" and run.args.precision == "bf16"
    # no cache: with it, weights first cast under no_grad (a TRADES attack) would get no gradient
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False)


def sgd(model: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov: bool = False):
    """torch.optim.SGD over all parameters, in one fused kernel. Schedulers set lr and momentum."""
    options = dict(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


# ------------------------------------------------------------------------------------------------
# Data


@dataclasses.dataclass
class Data:
    """Images uint8 (N, H, W, C) and labels int64 (N,) on the device; `val` was cut from `train`."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    mean: list[float]  # per channel, of the training images in [0, 1]: the models normalise with it
    std: list[float]
    fingerprint: int  # of the training images
    pad: int  # augmentation: random crop after padding with so many zeros, ...
    flip: bool  # ... and random horizontal flip

    def __post_init__(self):
        self.x_padded = F.pad(self.x_train, (0, 0) + (self.pad,) * 4)


def load_data(name, root="data", device="cpu", val_size=0, train_subset=None, test_subset=None):
    """-> Data, by name (see --data), from an .npz file or from a folder.

    A name is looked for in <root>/<name>.npz, then in torchvision's files below root, then
    downloaded by torchvision (checksummed) and kept as that .npz; tiny-imagenet is taken from
    <root>/tiny-imagenet-200, the unpacked official zip. An .npz holds x_train, y_train,
    x_test, y_test (images uint8 (N, S, S, 3) or (N, S, S), labels 0..K-1), perhaps `classes`. A
    folder holds train/<class>/* and test/<class>/* (or val/), images of one size. Subsets are the
    same for every seed. Errors: one line, exit status 2.
    """
    import images  # what reads and draws them

    (x, y), (x_test, y_test), classes = images.read_data(name, Path(root))
    if val_size + (train_subset or 1) > len(x) or (test_subset or 1) > len(x_test):
        has = f"{name} has {len(x)} training and {len(x_test)} test images"
        fail(f"--train-subset, --val-size, --test-subset: more than there are; {has}")
    levels = np.arange(256) / 255  # from integer counts: the same on every machine
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(x, 3, 0)])
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    order = np.random.default_rng(0).permutation(len(x))
    val, train = order[:val_size], np.sort(order[val_size:][:train_subset])
    test = np.sort(np.random.default_rng(0).permutation(len(x_test))[:test_subset])
    parts = (x[train], y[train], x[val], y[val], x_test[test], y_test[test])
    tensors = [torch.from_numpy(part).to(device) for part in parts]
    statistics = (mean.tolist(), np.where(std > 0, std, 1).tolist(), zlib.crc32(parts[0]))
    augmented = name != "mnist"  # digits are neither shifted nor mirrored
    return Data(name, *tensors, classes, *statistics, pad=4 * augmented, flip=augmented)


def to_float(x: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [0, 1], with channels_last strides."""
    return x.permute(0, 3, 1, 2).float() / 255


def batches(data: Data, batch_size: int, seed: int, epoch: int, run=None, views=False):
    """Yield (x, labels) over the shuffled, cropped, flipped training set; the last may be smaller.

    x float32 (B, C, H, W) in [0, 1], labels int64 (B,). Order, crops and flips depend on (seed,
    epoch) alone: not on device, batch size or a global generator. One gather a batch on the device,
    one host copy an epoch. With `run`, the live line on a terminal moves. With `views`, a third
    tensor int64 (B,) says which rows of `teacher_table` belong to x.
    """
    n, ways = len(data.x_train), (2 * data.pad + 1, 2 * data.pad + 1, 1 + data.flip)
    g = torch.Generator().manual_seed(derive_seed("batches", seed, epoch))
    plan = [torch.randperm(n, generator=g), *(torch.randint(k, (n,), generator=g) for k in ways)]
    plan = torch.stack(plan).to(data.x_train.device)  # (4, N): image, top, left, flip
    for start in range(0, n, batch_size):
        view, *draws = part = plan[:, start : start + batch_size]  # (4, B)
        for k, draw in zip(ways, draws):
            view = view * k + draw
        yield (_cut(data, part), data.y_train[part[0]], view)[: 2 + views]
        if run is not None:
            _show(run, epoch + 1, f"{min(start + batch_size, n) / n:.0%}")


def _cut(data: Data, plan: Tensor) -> Tensor:
    """The views `plan` (4, B), rows image, top, left, flip: -> float32 (B, C, H, W)."""
    height, width = data.x_train.shape[1:3]
    rows, columns = (torch.arange(k, device=plan.device) for k in (height, width))
    image, top, left, flip = plan[:, :, None]  # each (B, 1)
    row = (top + rows)[:, :, None]  # (B, H, 1)
    column = (left + torch.where(flip == 1, width - 1 - columns, columns))[:, None]  # (B, 1, W)
    return to_float(data.x_padded[image[:, None], row, column])


@torch.no_grad()
def teacher_table(teacher: nn.Module, data: Data, run: "Run", epochs: int, cache: dict):
    """float32 (N x views, K): logits of an unchanging teacher for every crop and flip; or None.

    By --teacher-table; auto: if students of that many epochs, of all --seeds, look at an image more
    often than it has views, and a quarter of the memory is enough. `batches` says which rows
    belong to a batch. cache: what the seeds share, at first {}.
    """
    if "table" in cache:
        return cache["table"]
    ways = (len(data.x_train), 2 * data.pad + 1, 2 * data.pad + 1, 1 + data.flip)
    views, size, device = math.prod(ways[1:]), 4 * math.prod(ways) * len(data.classes), run.device
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else memory
    epochs *= len(run.args.seeds or [0])
    use = {"yes": True, "no": False, "auto": epochs > views and 4 * size < memory}
    use, cache["table"] = use[run.args.teacher_table], None
    sizes = f"{views} views of an image in {epochs} epochs; {size / 1e6:,.0f} MB"
    print(f"teacher's logits: {'from a table' if use else 'live'} ({sizes})", flush=True)
    if use:
        table = cache["table"] = torch.empty(math.prod(ways), len(data.classes), device=device)
        for rows in torch.arange(len(table), device=device).split(1024):
            with autocast(run):
                table[rows] = teacher(_cut(data, torch.stack(torch.unravel_index(rows, ways))))
    return cache["table"]


# ------------------------------------------------------------------------------------------------
# Models


class Normalize(nn.Module):
    """(x - mean) / std per channel, x (B, C, H, W) in [0, 1]; the statistics are buffers."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def _conv(in_channels, channels, kernel, stride=1):
    if kernel == 1 and stride > 1 and in_channels < 8:
        # the same numbers; on AVX2 oneDNN's strided kernel hangs here (uxlfoundation/oneDNN#6035)
        return nn.Sequential(nn.AvgPool2d(1, stride), _conv(in_channels, channels, 1))
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


def _norm_act(channels, act="relu"):
    activation = nn.SiLU() if act == "silu" else nn.ReLU(inplace=True)
    return nn.Sequential(nn.BatchNorm2d(channels), activation)


class PostActBlock(nn.Module):
    """Residual block with the last ReLU after the sum (He et al. 2015).

    Two 3x3 convolutions; with expansion 4 the bottleneck of ResNet-50: 1x1, 3x3, 1x1.
    """

    def __init__(self, in_channels, channels, stride, expansion=1):
        super().__init__()
        out, layers = channels * expansion, []
        if expansion > 1:
            layers = [_conv(in_channels, channels, 1), *_norm_act(channels)]
        layers += [_conv(channels if layers else in_channels, channels, 3, stride)]
        layers += [*_norm_act(channels), _conv(channels, out, 1 if expansion > 1 else 3)]
        self.residual = nn.Sequential(*layers, nn.BatchNorm2d(out))
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(_conv(in_channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class PreActBlock(nn.Module):
    """BN-act-conv twice (He et al. 2016); a resizing shortcut starts after the first activation."""

    def __init__(self, in_channels, channels, stride, act="relu", dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = _norm_act(in_channels, act), _norm_act(channels, act)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.conv2 = _conv(channels, channels, 3)
        self.dropout = nn.Dropout(dropout)
        resize = stride != 1 or in_channels != channels
        self.shortcut = _conv(in_channels, channels, 1, stride) if resize else None

    def forward(self, x):
        h = self.norm1(x)
        residual = self.conv2(self.dropout(self.norm2(self.conv1(h))))
        return residual + (x if self.shortcut is None else self.shortcut(h))


class ConvNet(nn.Module):
    """Normalise, 3x3 stem, stages of residual blocks, global average, linear: the ResNets."""

    def __init__(self, mean, std, stem, stages, stem_norm, head_norm, width, classes):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = nn.Sequential(_conv(len(mean), stem, 3), *stem_norm)
        self.stages = nn.ModuleList(stages)
        self.head_norm = nn.Sequential(*head_norm)
        self.fc = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        h = self.stem(self.normalize(x))
        for stage in self.stages:
            h = stage(h)
        return self.fc(self.head_norm(h).mean((2, 3))).float()  # (B, K), float32 under autocast too


class MLP(nn.Module):
    """Normalised and flattened image, hidden ReLU layers of the given sizes, linear."""

    def __init__(self, mean, std, inputs, hidden, classes, dropout):
        super().__init__()
        layers = [Normalize(mean, std), nn.Flatten()]
        for a, b in zip([inputs, *hidden], hidden):
            layers += [nn.Linear(a, b), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], classes))

    def forward(self, x):
        return self.layers(x).float()


class Ensemble(nn.Module):
    """log sum_i w_i p_i(x) of some models: logits (B, K) whose softmax is their mean probability.

    weights: of the models, summing to 1 (None: all equal).
    """

    def __init__(self, models, weights=None):
        super().__init__()
        self.models, self.weights = (
            nn.ModuleList(models),
            weights or [1 / len(models)] * len(models),
        )

    def forward(self, x):
        parts = zip(self.weights, self.models)
        logs = [math.log(w) + model(x).log_softmax(1) for w, model in parts if w > 0]
        return torch.stack(logs).logsumexp(0)


def check_model(flag: str, name: str, width: float = 1.0, dropout: float = 0.0) -> None:
    """An error that names `flag` if build_model(name, width=width, dropout=dropout) cannot be."""
    wrn = re.fullmatch(r"wrn-([1-9]\d{1,3})-([1-9]\d?)(-silu)?", name)
    resnet = re.fullmatch(r"resnet18|resnet50|preact-resnet18(-silu)?", name)
    if not (wrn or resnet or re.fullmatch(r"mlp(-[1-9]\d{0,4}){1,8}", name)):
        known = "resnet18, resnet50, preact-resnet18, wrn-D-W or mlp-H-...-H"
        fail(f"{flag}: expected {known} (wrn-28-10-silu, mlp-1200-1200), got {name!r}")
    if wrn and int(wrn[1]) % 6 != 4:
        fail(f"{flag}: the depth of a WideResNet is 6n + 4 (10, 16, 22, 28, 34, 40), got {name!r}")
    if width != 1 and not (resnet and 1 / 64 <= width <= 16):
        fail(f"{flag} {name}: a width of 1/64 to 16 goes with the ResNets, got {width:g}")
    if dropout and resnet:
        fail(f"{flag} {name}: dropout goes with the WideResNets and MLPs")


def build_model(name, classes=10, width=1.0, dropout=0.0, channels=3, size=32, mean=None, std=None):
    """A net for images (B, channels, size, size) in [0, 1] that returns logits (B, classes).

    resnet18, resnet50, preact-resnet18 (He et al., CIFAR stem: 3x3, no pooling; `width` scales the
    channels), wrn-D-W (Zagoruyko and Komodakis 2016; `dropout` between the convolutions of a
    block), mlp-H-...-H (`dropout` after each layer); suffix -silu for the pre-activation nets.
    mean, std per channel (None: 0 and 1). `model.arch` keeps what load_model builds it from.
    """
    check_model("--model", name, width, dropout)
    statistics = mean or [0.0] * channels, std or [1.0] * channels
    numbers = [int(n) for n in re.findall(r"-(\d+)", name)]
    act = "silu" if name.endswith("-silu") else "relu"
    if name.startswith("mlp"):
        model = MLP(*statistics, channels * size * size, numbers, classes, dropout)
    else:
        depths = [3, 4, 6, 3] if name == "resnet50" else [2, 2, 2, 2]
        widths = [round(64 * width * m) for m in (1, 2, 4, 8)]
        stem = widths[0]
        if name.startswith("wrn"):
            depths = [(numbers[0] - 4) // 6] * 3
            stem, widths = 16, [16 * numbers[1] * m for m in (1, 2, 4)]
        preact, expansion = name[:3] in ("wrn", "pre"), 4 if name == "resnet50" else 1
        block, options = (PreActBlock, (act, dropout)) if preact else (PostActBlock, (expansion,))
        last, stages = stem, []
        for i, (out, depth) in enumerate(zip(widths, depths)):
            blocks = []
            for stride in [1 + (i > 0)] + [1] * (depth - 1):
                blocks.append(block(last, out, stride, *options))
                last = out * expansion
            stages.append(nn.Sequential(*blocks))
        norms = ([], _norm_act(last, act)) if preact else (_norm_act(stem), [])
        model = ConvNet(*statistics, stem, stages, *norms, last, classes)
    model.arch = {"name": name, "classes": classes, "width": width, "dropout": dropout}
    model.arch |= {"channels": channels, "size": size}
    return model.to(memory_format=torch.channels_last)


def model_for(data: Data, name: str, seed: int, stage: str, width=1.0, dropout=0.0) -> nn.Module:
    """build_model for the images and classes of `data`, on its device, drawn from (seed, stage)."""
    torch.manual_seed(derive_seed("init", seed, stage))
    like_data = (*data.x_train.shape[:1:-1], data.mean, data.std)  # channels, size, ...
    model = build_model(name, len(data.classes), width, dropout, *like_data)
    device = data.x_train.device
    print(f"{stage}: {name}, {parameters(model):,} parameters, on {device}", flush=True)
    return model.to(device)


def parameters(model: nn.Module) -> int:
    """How many trained numbers the model has."""
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Attacks (L-infinity) and what training needs of evaluation; eval_robustness.py has the rest


def pgd(model, x, targets, eps, step_size, steps, start="uniform") -> Tensor:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018): x -> x_adv (B, C, H, W).

    targets: labels (B,) or fixed probabilities (B, K). With probabilities the gradient is that of
    KL(targets || model(x_adv)): the teacher's give the inner problem of RSLAD, the model's own
    that of TRADES. start: `uniform` in the ball, `gaussian` (x + 0.001 N(0, 1), as in TRADES and
    RSLAD), `none`, or the first perturbation itself (B, C, H, W). x and x_adv in [0, 1]; eps and
    step_size in the same units. The model is used in the mode it is in: call model.eval() first for
    BatchNorm in eval mode. Only the gradient of x_adv is computed, none of the weights.
    """
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    if isinstance(start, str):
        start = {
            "uniform": lambda: torch.empty_like(x).uniform_(-eps, eps),
            "gaussian": lambda: torch.randn_like(x) * 0.001,
            "none": lambda: torch.zeros_like(x),
        }[start]()
    x_adv = torch.clamp((x + start).detach(), low, high)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(x_adv), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode, weights frozen, no TF32; everything is put back afterwards."""
    training, tf32 = model.training, torch.backends.cudnn.allow_tf32
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield model
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        model.train(training)
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Which of x, float (N, C, H, W) or uint8 (N, H, W, C), the model gets right: bool (N,)."""
    right = []
    for part, y in zip(x.split(batch_size), labels.split(batch_size)):
        right.append(model(to_float(part) if part.dtype == torch.uint8 else part).argmax(1) == y)
    return torch.cat(right)


def _validate(model: nn.Module, data: Data, *attack) -> dict:
    """{val_clean_acc, val_pgd<steps>_acc} on the held-out training images; {} if there are none."""
    if not len(data.x_val):
        return {}
    with evaluating(model):
        row = {"val_clean_acc": correct(model, data.x_val, data.y_val).double().mean().item()}
        if attack:
            batch = zip(data.x_val.split(500), data.y_val.split(500))
            right = [correct(model, pgd(model, to_float(x), y, *attack), y) for x, y in batch]
            row[f"val_pgd{attack[2]}_acc"] = torch.cat(right).double().mean().item()
    return row


# ------------------------------------------------------------------------------------------------
# Files, written whole or not at all, read without running what they hold; the folder of a run


def write_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file, move it to `path`; on an error `path` stays as is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, record: dict) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts atomically, for `load`."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk in a RuntimeError
    torch.save({"format": 1} | record, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> dict:
    """Read a file of `save` to the CPU, weights only: other pickles are refused, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on foreign pickles
            record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        fail(f"{path}: truncated, or not a checkpoint of these scripts ({reason})")
    if not isinstance(record, dict) or record.get("format") != 1:
        fail(f"{path}: not a checkpoint of these scripts")
    return record


def save_model(path: Path, model: nn.Module, meta: dict) -> None:
    """Write a model: its weights, its `arch` to build it again, numbers and names about it."""
    save(path, {"arch": model.arch, "weights": model.state_dict(), "meta": meta})


def load_model(path, device="cpu", data: Data | None = None, name: str | None = None):
    """-> (model in eval mode, its meta); an error if it does not fit `data` or is no `name`."""
    record = load(path)
    try:
        arch, meta = record["arch"], record["meta"]
        model = build_model(**arch)
        model.load_state_dict(record["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"{path}: holds no model of these scripts ({str(error).splitlines()[0][:100]})")
    if name is not None and name != arch["name"]:
        fail(f"{path}: is a {arch['name']}, expected a {name}")
    if data is not None:
        wanted = [len(data.classes), *data.x_test.shape[2:]]
        if wanted != [arch["classes"], arch["size"], arch["channels"]]:
            is_for = f"{arch['classes']} classes of {arch['size']} x {arch['channels']} images"
            fail(f"{path}: for {is_for}; {data.name} has {wanted[0]}, {wanted[1]} x {wanted[2]}")
    return model.to(device).eval(), meta


@dataclasses.dataclass
class Run:
    """A run folder and the state of what is written to it and shown."""

    script: str
    args: argparse.Namespace
    device: torch.device
    stage: str = ""
    total: int = 0  # epochs of the stage
    parts: dict = dataclasses.field(default_factory=dict)  # of the stage: model, optimizer, ...
    started: float = 0.0  # of the current epoch
    seconds: float = 0.0  # of the current stage, over all sessions
    row: dict = dataclasses.field(default_factory=dict)  # of the last epoch
    best: dict = dataclasses.field(default_factory=dict)  # of the best epoch
    left: int | None = None  # seconds to the end of the stage, once an epoch is measured
    ticked: float = 0.0
    writer: object = None  # TensorBoard's
    command: str = ""  # that starts and resumes the run
    fingerprint: int = 0  # of the data
    finished: bool = False
    lock: object = None  # an open file: no other process may use the folder

    def __post_init__(self):
        self.dir = Path(self.args.runs) / self.script / f"{self.args.name}-s{self.args.seed}"
        self.log = self.dir / "log.jsonl"
        self.flags = {k: v for k, v in vars(self.args).items() if k not in FREE_FLAGS}


@contextlib.contextmanager
def open_run(script: str, args: argparse.Namespace, check=lambda data: None):
    """Yield (run, data) of these flags; with run.finished nothing is left to do.

    Wrong data or --teacher-ckpt, and what check(data) refuses, end it before a folder is made. In
    the `with`, Ctrl-C and SIGTERM end with the command that resumes, errors of the file system and
    of GPU memory with one line. What is on the disk then is the last finished epoch.
    """
    run = Run(script, args, setup_device(args))
    here, python = Path(__file__).resolve().parent / f"{script}.py", Path(sys.executable)
    paths = [python if Path.cwd() not in python.parents else os.path.relpath(python)]
    run.command = shlex.join(map(str, [*paths, os.path.relpath(here), *args.argv]))

    def on_sigterm(number, frame):
        raise KeyboardInterrupt("SIGTERM")

    handler = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        sizes = (args.val_size, args.train_subset, args.test_subset)
        data = load_data(args.data, args.data_root, run.device, *sizes)
        if args.teacher_ckpt and not (run.dir / "teacher.pt").exists():
            named = any(flag.startswith("--teacher-model") for flag in args.argv)
            load_model(args.teacher_ckpt, "cpu", data, args.teacher_model if named else None)
        check(data)
        _begin(run, data)
        yield run, data
    except KeyboardInterrupt as stop:
        print(f"\nstopped; finished epochs are in {run.dir}; go on with:", file=sys.stderr)
        print(run.command, file=sys.stderr)
        raise SystemExit(143 if stop.args else 130) from None
    except torch.OutOfMemoryError as error:
        fail(f"{run.stage}: the GPU has too little memory; try a smaller --batch-size ({error})")
    except OSError as error:
        fail(f"{error.filename or run.dir}: {error.strerror or error}; finished epochs are kept")
    finally:
        signal.signal(signal.SIGTERM, handler)
        for opened in filter(None, (run.writer, run.lock)):
            opened.close()


def _begin(run: Run, data: Data) -> None:
    """Make the run's folder, or find it with the same flags and images, perhaps finished."""
    if run.args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    path, flags = run.dir / "config.json", json.loads(json.dumps(run.flags))
    run.fingerprint = data.fingerprint
    if path.exists():
        try:
            old = json.loads(path.read_text())
            old, fingerprint = dict(old["flags"]), old["fingerprint"]
        except (ValueError, KeyError, TypeError):
            fail(f"{path}: damaged; take another --name, or delete the folder")
        for key in sorted(flags.keys() | old.keys()):
            if flags.get(key) != old.get(key):
                flag, other = "--" + key.replace("_", "-"), f"{old.get(key)}, not {flags.get(key)}"
                fail(f"{flag}: {run.dir} was made with {other}; take another --name")
        if fingerprint != data.fingerprint:
            fail(f"--data: {run.dir} was made with other images; take another --name")
    else:
        config = {"command": run.command, "commit": None, "fingerprint": data.fingerprint}
        config |= {"python": sys.version.split()[0], "torch": torch.__version__}
        config["gpu"] = torch.cuda.get_device_name() if run.device.type == "cuda" else None
        with contextlib.suppress(OSError):  # no git here
            git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
            config["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        config["flags"] = flags
        write_atomically(path, lambda file: file.write(json.dumps(config, indent=1).encode()))
    if run.args.tensorboard:
        run.writer = SummaryWriter(run.dir)
    run.finished = _finished(run)
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        if not run.finished:
            run.lock = open(run.dir / "lock", "a+")  # noqa: SIM115
            try:
                fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            except BlockingIOError:
                run.lock.seek(0)
                fail(
                    f"{run.dir}: in use by process {run.lock.read()}; wait, or take another --name"
                )
            run.lock.truncate(0)
            print(os.getpid(), end="", file=run.lock, flush=True)


def _rows(run: Run) -> list[dict]:
    """The rows of log.jsonl, but for one that a kill has torn."""
    rows = []
    for line in run.log.read_text().splitlines() if run.log.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _write_rows(run: Run, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(run.log, lambda file: file.write(text.encode()))


def epochs(run: Run, stage: str, total: int, **parts):
    """Yield the epochs of a stage that are still to do, after loading what last.pt has of them.

    parts: the model, optimizer, schedule, ...: all that has a state_dict and is needed to resume.
    Seeds each epoch with (seed, stage, epoch): it is the same epoch after any interruption.
    """
    run.stage, run.total, run.parts, run.left = stage, total, parts, None
    run.seconds, run.row, run.best, done = 0.0, {}, {}, 0
    last = run.dir / "last.pt"
    record = load(last) if last.exists() else {}
    if record.get("stage") == stage:
        for name, part in parts.items():
            part.load_state_dict(record["parts"][name])
        done, run.row, run.best = record["epochs"], record["row"], record["best"]
        run.seconds = run.row["seconds"]
        print(f"{stage}: goes on after epoch {done} of {total} ({last})", flush=True)
    # a kill between checkpoint and log loses a row of the log: the checkpoint has it too
    rows = [row for row in _rows(run) if row.get("stage") != stage or row["epoch"] < done]
    _write_rows(run, rows + ([record["row"]] if done else []))
    for epoch in range(done, total):
        torch.manual_seed(derive_seed("epoch", run.args.seed, stage, epoch))
        run.started = time.monotonic()
        yield epoch


def metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) on the device: loss summed over images, correct predictions, images. No sync."""
    right = (logits.detach().argmax(1) == labels).sum()
    loss = loss.detach().float()
    return torch.stack([loss * len(labels), right.float(), torch.full_like(loss, len(labels))])


def end_epoch(run: Run, epoch: int, history: list, data: Data, *attack) -> None:
    """Read the steps' `metrics` (no host sync before), validate, log, print, checkpoint.

    attack: eps, step_size and steps of the PGD on the held-out images; without it only clean. The
    epoch with the highest sum of their accuracies is kept as <stage>_best.pt. A loss or weight that
    is not finite ends the run.
    """
    steps, model = torch.stack(history).double().cpu(), run.parts["model"]
    spent = time.monotonic() - run.started
    finite = torch.isfinite(steps[:, 0]).tolist()
    finite.append(torch.stack([p.isfinite().all() for p in model.state_dict().values()]).all())
    if not all(finite):
        where = f"{run.stage}, epoch {epoch + 1}, step {min(finite.index(False) + 1, len(steps))}"
        own = not run.stage.startswith("student") and hasattr(run.args, "teacher_lr")
        flag = "--teacher-lr" if own else "--lr"
        fail(f"{where}: not finite; try a lower {flag} ({run.dir} has the epochs before)")
    loss, right, images = steps.sum(0).tolist()
    row = {"stage": run.stage, "epoch": epoch + 1, "loss": loss / images}
    row |= {"train_acc": right / images, "images_per_second": images / spent}
    row |= _validate(model, data, *attack)
    run.seconds += time.monotonic() - run.started
    row["seconds"], run.row = run.seconds, row
    score, best = (sum(v for k, v in r.items() if k[:4] == "val_") for r in (row, run.best))
    if len(data.x_val) and (score > best or not run.best):
        run.best = row
        save_model(run.dir / f"{run.stage}_best.pt", model, row)
    state = {"stage": run.stage, "epochs": epoch + 1, "row": row, "best": run.best}
    state["parts"] = {name: part.state_dict() for name, part in run.parts.items()}
    save(run.dir / "last.pt", state)
    _log(run, row)


def _log(run: Run, row: dict) -> None:
    with open(run.log, "a") as file:
        file.write(json.dumps(row) + "\n")
    for key, value in row.items():
        if run.writer is not None and isinstance(value, float):
            run.writer.add_scalar(f"{row['stage']}/{key}", value, row["epoch"])
    run.left = round((run.total - row["epoch"]) * run.seconds / row["epoch"])
    text = f"loss {row['loss']:.4f}"
    for key in row:
        if key.endswith("_acc"):
            text += f"  {key.removesuffix('_acc').replace('_', ' ')} {row[key]:.4f}"
    _show(run, row["epoch"], f"{text}  {row['images_per_second']:,.0f} images/s", end="\n")


def _show(run: Run, epoch: int, text: str, end: str = "") -> None:
    """A line of an epoch; with end "" the live one, on terminals, four times a second at most."""
    if not end and not (sys.stdout.isatty() and time.monotonic() > run.ticked + 0.25):
        return
    run.ticked = time.monotonic()
    text = f"{run.stage} {epoch:{len(str(run.total))}d}/{run.total}  {text}"
    left = f"  left {datetime.timedelta(seconds=run.left)}" if run.left is not None else ""
    print("\r\x1b[2K" * sys.stdout.isatty() + text + left, end=end, flush=True)


def find_model(run: Run, file: str, settings) -> Path | None:
    """`file` in this or another run folder of the script whose flags give the same settings.

    settings: dict of flags -> what of them the file depends on.
    """
    mine = settings(run.flags)
    for path in [run.dir / file, *sorted(run.dir.parent.glob(f"*/{file}"))]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            theirs = json.loads((path.parent / "config.json").read_text())
            same = settings(theirs["flags"]) == mine and theirs["fingerprint"] == run.fingerprint
            if same and path.exists():
                return path
    return None


def get_teacher(run: Run, data: Data, settings, train, file="teacher.pt"):
    """-> (teacher in eval mode and frozen, its meta): `file` of the run's folder.

    If it is not there, it is a copy of --teacher-ckpt or of one in another run with the same
    `settings` (see find_model), perhaps kept there after as many epochs, or train() writes it.
    """
    own = run.dir / file
    if not own.exists():
        path = run.args.teacher_ckpt or find_model(run, file, settings)
        kept = f"{own.stem}-ep{settings(run.flags).get('epochs')}.pt"
        path = path or find_model(run, kept, lambda flags: settings(flags) | {"epochs": None})
        if path:
            load_model(path, "cpu", data)  # an error before anything is copied
            print(f"{own.stem}: taken from {path}", flush=True)
            write_atomically(own, lambda out: out.write(Path(path).read_bytes()))
        else:
            train()
    teacher, meta = load_model(own, run.device, data)
    return teacher.requires_grad_(False), meta


def choose_teacher(run: Run, data: Data, settings, train):
    """get_teacher of the most accurate of the teachers of seeds 0 to --teacher-seeds - 1.

    By --pick-teacher: on held-out training images, or on the test images as some papers do.
    settings: as for get_teacher, without a seed; train(seed) writes teacher<seed>.pt.
    """
    n, on = run.args.teacher_seeds, run.args.pick_teacher

    def choose():
        x, labels = (data.x_test, data.y_test) if on == "test" else (data.x_val, data.y_val)
        files, scores = [run.dir / f"teacher{seed}.pt" for seed in range(n)], [0.0]
        for seed, file in enumerate(files):
            teacher, _ = get_teacher(run, data, settings, lambda: train(seed), file.name)  # noqa: B023
            if n > 1:
                with evaluating(teacher):
                    scores[seed:] = [correct(teacher, x, labels).double().mean().item()]
                print(f"teacher of seed {seed}: {on} accuracy {scores[seed]:.4f}", flush=True)
        best = files[scores.index(max(scores))]
        write_atomically(run.dir / "teacher.pt", lambda out: out.write(best.read_bytes()))

    names = ("teacher_seeds", "pick_teacher", "test_subset")
    return get_teacher(run, data, lambda f: settings(f) | {k: f[k] for k in names}, choose)


def check_evaluation(args: argparse.Namespace, data: Data) -> None:
    """An error before the training if --pick-teacher or --eval could not be done after it."""
    if args.teacher_seeds > 1 and args.pick_teacher == "val" and not len(data.x_val):
        fail("--pick-teacher val: needs held-out images, --val-size above 0")
    if args.eval == "full" and data.x_test.shape[1:] != (32, 32, 3):
        fail(f"--eval full: needs colour images of 32 x 32, {data.name} has others")


def evaluate_files(run: Run, files: dict, main) -> list[dict]:
    """{name: saved model} -> rows of the summary, by `main` of eval_robustness.py.

    All its numbers are in evaluation.json, its tables in evaluation.txt; it goes on if stopped.
    """
    args, names = run.args, "eps step_size restarts seed data data_root device"
    flags = [*files.values(), "--json", run.dir / "evaluation.json"]
    flags += ["--attack", "clean", f"pgd{args.eval_steps}"]
    if args.eval == "full":
        flags += ["pgd10", "pgd15", "corruptions", "calibration"]
        flags += [name for name in ("cinic", "ood") if getattr(args, name)]
        names += " corruptions cinic cinic_per_class ood"
    for name in names.split():
        value = getattr(args, name)
        flags += [f"--{name.replace('_', '-')}", value] * (value is not None)
    flags += ["--n", args.test_subset] * bool(args.test_subset)
    print(f"evaluating {', '.join(files)}: {run.dir / 'evaluation.txt'}", flush=True)
    try:
        with open(run.dir / "evaluation.txt", "w") as out, contextlib.redirect_stdout(out):
            main([str(flag) for flag in flags])
    except SystemExit as stop:
        if stop.code == 2:
            raise
        raise KeyboardInterrupt(*[stop.code] * (stop.code == 143)) from None  # as in training
    found = json.loads((run.dir / "evaluation.json").read_text())["rows"]
    rows = []
    for name, row in zip(files, found):
        meta = load(files[name])["meta"]
        rows.append({"model": name} | {k: v for k, v in row.items() if k.endswith("_acc")})
        rows[-1] |= {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}
    return rows


def finish(run: Run, rows: list[dict]) -> None:
    """Write the summary as the last row of log.jsonl, drop last.pt, and show the summary."""
    files = ["log.jsonl", *(p.name for p in sorted(run.dir.glob("*.pt")) if p.name != "last.pt")]
    _write_rows(run, [*_rows(run), {"summary": rows, "files": files}])
    (run.dir / "last.pt").unlink(missing_ok=True)
    _finished(run)


def _finished(run: Run) -> bool:
    """Whether the run has its summary; if so, say that it is finished, and show it."""
    last = (_rows(run) or [{}])[-1]
    if "summary" in last:
        files = " ".join(last["files"])
        print(f"\n{table(last['summary'])}\n\n{run.dir} is finished: {files}", flush=True)
    return "summary" in last


def across_seeds(runs: list[Run]) -> None:
    """Show mean +- standard deviation (n - 1) of the summaries of runs that differ by seed."""
    summaries, rows = [_rows(run)[-1]["summary"] for run in runs], []
    for first in summaries[0] if len(runs) > 1 else ():
        same = [row for rows_ in summaries for row in rows_ if row["model"] == first["model"]]
        if len(same) < len(runs):  # a best epoch that is not the last has a row of its own
            continue
        rows.append(dict(first))
        for key in (key for key, value in first.items() if isinstance(value, float)):
            values, digits = [row[key] for row in same], 4 if "_acc" in key else 1
            mean, std = np.mean(values), np.std(values, ddof=1)
            rows[-1][key] = f"{mean:.{digits}f} +- {std:.{digits}f}"
    if rows:
        print(f"\nmean +- std of seeds {' '.join(str(run.args.seed) for run in runs)}")
        print(table(rows), flush=True)


def table(rows: list[dict]) -> str:
    """Rows as an aligned text table; accuracies with four digits, a missing value as '-'."""

    def cell(key, value):
        if isinstance(value, float):
            return f"{value:.4f}" if "_acc" in key else f"{value:,.1f}"
        return "-" if value is None else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[cell(key, row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) for c in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
