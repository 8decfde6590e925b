"""What the scripts share: data, models, attacks, files. No loss, no loop, nothing about a run.

Images   uint8 (N, H, W, C) on the device; a batch is float32 (B, C, H, W) in [0, 1], channels_last.
Models   take images in [0, 1], normalise inside, return float32 logits (B, K), as attacks expect.
Attacks  differentiate with respect to the input alone; the caller sets the model's mode.
Files    are written whole or not at all, and read without running what they hold.

Importing this file does nothing: no CUDA, seed or download; torchvision is imported by the loaders.
The plumbing of a run (folder, log, resuming, teachers, summary) is plumbing.py.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import warnings
import zipfile
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
    line = " ".join(str(message).split())  # names in foreign files may hold terminal commands
    print("error: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    raise SystemExit(2)


def print_line(text: str, end: str = "\n") -> None:
    """Print over the live line of a terminal; with end "" `text` is the live line.

    Of that the end that fits: a line that wraps could not be printed over.
    """
    live = sys.stdout.isatty()
    if live and not end:
        text = text[1 - shutil.get_terminal_size().columns :]
    print("\r\x1b[2K" * live + text, end=end, flush=True)


@functools.cache
def warn_once(text: str) -> None:
    """Print `warning: text` as one line on stderr; the same text only once."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable():
    """SIGTERM raises KeyboardInterrupt("SIGTERM") inside, as Ctrl-C raises it without a word."""

    def on_sigterm(number, frame):
        raise KeyboardInterrupt("SIGTERM")

    handler = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def status(stop: KeyboardInterrupt | BrokenPipeError) -> int:
    """The exit status that a shell gives to SIGINT, SIGTERM and SIGPIPE (`| head` has gone)."""
    return 141 if isinstance(stop, BrokenPipeError) else 143 if stop.args else 130


def start(main) -> None:
    """main() of a program, without a traceback for what happens to its process, files and output.

    Ctrl-C and `| head` end it with `status`, a file that cannot be written with one line and 2.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a script sets it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # at exit it would be too late to catch the error
    except KeyboardInterrupt as stop:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(status(stop)) from None
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # for what Python itself flushes at exit
        if not isinstance(error, BrokenPipeError):
            fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
        os.dup2(null, 2)  # perhaps of the same pipe
        raise SystemExit(status(error)) from None


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


# ------------------------------------------------------------------------------------------------
# Random numbers, device, processes, optimizer


def derive_seed(*parts) -> int:
    """A 63-bit seed that depends on all `parts` (numbers and strings) and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def setup_device(args: argparse.Namespace) -> torch.device:
    """The device of --device, with the CUDA settings of training; an error if there is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device: there is no CUDA device here; --device cpu works everywhere")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(args.deterministic)  # imports for seconds
    return device


def world() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process among them; 0 is the one that writes files and lines."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def sgd(model, lr, momentum, weight_decay, nesterov=False, decay_norms=True):
    """torch.optim.SGD over all parameters, in one fused kernel. Schedulers set lr and momentum.

    decay_norms: whether the weight decay is on those of BatchNorm too.
    """
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups = [{"params": list(model.parameters())}]
    if not decay_norms:
        groups = [{"params": [p for p in model.parameters() if p not in norms]}]
        groups += [{"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0}]
    options = dict(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    return torch.optim.SGD(groups, lr=lr, **options)


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
    fingerprint: int  # of all images and labels, whatever --test-subset is
    pad: int  # augmentation: random crop after padding with so many zeros, ...
    flip: bool  # ... and random horizontal flip, ...
    augment: str = "crop"  # ... and `cutout` or `cutmix`
    smoothing: float = 0.0  # of the labels; of the extra images alone, if there are any
    extra: tuple | None = None  # images (M, H, W, C) on the disk, labels (M,): load_extra
    extra_fraction: float = 0.0  # of every batch

    def __post_init__(self):
        self.x_padded = pad(self.x_train, self.pad)


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
        fail(f"--train-subset, --val-size, --test-subset, --n: more than there are; {has}")
    levels = np.arange(256) / 255  # from integer counts: the same on every machine
    pixels = torch.from_numpy(x).flatten(0, 2).T
    counts = np.stack([torch.bincount(c, minlength=256).numpy() for c in pixels])
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    order = np.random.default_rng(0).permutation(len(x))
    val, train = order[:val_size], np.sort(order[val_size:][:train_subset])
    test = np.sort(np.random.default_rng(0).permutation(len(x_test))[:test_subset])
    parts = (x[train], y[train], x[val], y[val], x_test[test], y_test[test])
    tensors = [torch.from_numpy(part).to(device) for part in parts]
    fingerprint = 0
    for part in (*parts[:4], x_test, y_test):
        fingerprint = zlib.crc32(part, fingerprint)
    statistics = (mean.tolist(), np.where(std > 0, std, 1).tolist(), fingerprint)
    augmented = name != "mnist"  # digits are neither shifted nor mirrored
    return Data(name, *tensors, classes, *statistics, pad=4 * augmented, flip=augmented)


def load_extra(path, data: Data) -> tuple:
    """-> images uint8 (M, S, S, C), mapped from the disk, and labels int64 (M,) of an .npz file.

    It holds `image` and `label`, like the generated sets of Rebuffi et al. and Wang et al. What is
    inside a zip cannot be mapped: the images are unpacked once, into <path>.<checksum>.npy.
    Errors: one line, exit status 2.
    """
    import images

    return images.read_extra(path, data)


def to_float(x: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [0, 1], channels_last; floats stay as is."""
    return x.permute(0, 3, 1, 2).float() / 255 if x.dtype == torch.uint8 else x.float()


def batches(data: Data, batch_size: int, seed: int, epoch: int, run=None, views=False):
    """Yield (x, labels) over the shuffled, augmented training set; the last batch may be smaller.

    x float32 (B, C, H, W) in [0, 1]; labels int64 (B,), or probabilities (B, K) after smoothing or
    CutMix. The draws depend on (seed, epoch) alone: not on device, batch size or a global
    generator. One gather a batch on the device, one host copy an epoch. data.extra_fraction of a
    batch are images of data.extra, drawn at random from the disk; an epoch keeps its steps. With
    `views`, a third tensor int64 (B,): the rows of `plumbing.teacher_table` for x. With `run`, the
    live line on a terminal moves, and each of several processes gets every n-th image of the batch:
    run.share is that part of the batch. Without an image it computes on the first one, with a share
    of 0, and run.idle has the number of the step.
    """
    n, size = len(data.x_train), data.x_train.shape[1:3]
    ways = (2 * data.pad + 1, 2 * data.pad + 1, 1 + data.flip)
    g = torch.Generator().manual_seed(derive_seed("batches", seed, epoch))
    plan = [torch.randperm(n, generator=g), *(torch.randint(k, (n,), generator=g) for k in ways)]
    plan += [torch.randint(k, (n,), generator=g) for k in size]
    plan = torch.stack(plan).to(data.x_train.device)  # (6, N): image, top, left, flip, y, x
    picks = torch.randint(len(data.extra[1]) if data.extra else 1, (n,), generator=g)
    mean = torch.tensor(data.mean, device=plan.device)
    boxes = torch.rand(-(-n // batch_size), 3, generator=g).tolist()  # one for each batch
    processes, me = (world(), rank()) if run is not None else (1, 0)
    if run is not None:
        run.idle = []
    for step, start in enumerate(range(0, n, batch_size)):
        stop = min(start + batch_size, n)
        part = plan[:, start:stop]  # (6, B)
        own = stop - start - round(data.extra_fraction * (stop - start))
        x, labels = cut(data, data.x_padded, part[:4, :own]), data.y_train[part[0, :own]]
        if own < stop - start:
            index = picks[start:stop][own:]
            images = torch.from_numpy(data.extra[0][index.numpy()]).to(plan.device)
            more = part[:4, own:].clone()
            more[0] = torch.arange(len(index), device=plan.device)
            x = torch.cat([x, cut(data, pad(images, data.pad), more)])
            labels = torch.cat([labels, data.extra[1][index].to(plan.device)])
        if data.augment == "cutout":
            x = cutout(x, *part[4:], mean)
        if data.augment == "cutmix" or data.smoothing:
            labels = F.one_hot(labels, len(data.classes)).float()  # (B, K)
            smoothed = slice(own if data.extra else 0, None)
            labels[smoothed] += data.smoothing * (1 / len(data.classes) - labels[smoothed])
        if data.augment == "cutmix":
            x, labels = cutmix(x, labels, *boxes[step])
        view, *draws = part[:4]
        for k, draw in zip(ways, draws):
            view = view * k + draw
        if processes > 1:  # of the finished batch: CutMix mixes neighbours
            mine = slice(me, None, processes) if me < len(x) else slice(0, 1)
            run.share = len(x[mine]) / len(x) if me < len(x) else 0.0
            run.idle += [step] if me >= len(x) else []
            x = x[mine].contiguous(memory_format=torch.channels_last)
            labels, view = labels[mine].contiguous(), view[mine].contiguous()
        yield (x, labels, view)[: 2 + views]
        if run is not None:
            run.show(epoch + 1, f"{stop / n:.0%}")


def pad(x: Tensor, by: int) -> Tensor:
    """uint8 (B, H, W, C) with `by` rows and columns of zeros around each image."""
    return F.pad(x, (0, 0) + (by,) * 4)


def cut(data: Data, padded: Tensor, plan: Tensor) -> Tensor:
    """The views `plan` (4, B), rows image, top, left, flip: -> float32 (B, C, H, W)."""
    height, width = data.x_train.shape[1:3]
    rows, columns = (torch.arange(k, device=plan.device) for k in (height, width))
    image, top, left, flip = plan[:, :, None]  # each (B, 1)
    row = (top + rows)[:, :, None]  # (B, H, 1)
    column = (left + torch.where(flip == 1, width - 1 - columns, columns))[:, None]  # (B, 1, W)
    return to_float(padded[image[:, None], row, column])


def cutout(x: Tensor, row: Tensor, column: Tensor, fill: Tensor) -> Tensor:
    """A square of 9/16 of the image's side becomes `fill` (C,) (DeVries and Taylor 2017).

    row, column (B,): its centre; what lies outside of the image is lost. 18 pixels of 32, as in the
    code of Rebuffi et al. and Wang et al.
    """
    side = x.shape[-1] * 9 // 16
    near = []
    for centre in (row, column):
        offset = torch.arange(x.shape[-1], device=x.device) - centre[:, None] + side // 2  # (B, S)
        near.append((offset >= 0) & (offset < side))
    inside = near[0][:, None, :, None] & near[1][:, None, None, :]  # (B, 1, H, W)
    return torch.where(inside, fill.view(1, -1, 1, 1), x)


def cutmix(x: Tensor, targets: Tensor, area: float, row: float, column: float):
    """x and targets with a box of the next image of the batch in each (Yun et al. 2019).

    area: of the box before it is clipped at the border; row, column: its centre; all in [0, 1], as
    parts of the image. x (B, C, H, W), targets (B, K), mixed by the area that the box has.
    """
    size, half = x.shape[-1], x.shape[-1] * math.sqrt(area) / 2
    top, left = (max(round(c * size - half), 0) for c in (row, column))
    bottom, right = (min(round(c * size + half), size) for c in (row, column))
    x, share = x.clone(), (bottom - top) * (right - left) / size**2
    x[:, :, top:bottom, left:right] = x.roll(1, 0)[:, :, top:bottom, left:right]
    return x, (1 - share) * targets + share * targets.roll(1, 0)


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
        self.models = nn.ModuleList(models)
        self.weights = weights or [1 / len(models)] * len(models)

    def forward(self, x):
        parts = zip(self.weights, self.models)
        logs = [math.log(w) + model(x).log_softmax(1) for w, model in parts if w > 0]
        return torch.stack(logs).logsumexp(0)


class Affine(nn.BatchNorm2d):
    """What a BatchNorm2d in eval mode computes, in one pass over x (B, C, H, W) in its own type."""

    def forward(self, x):
        # under autocast the product with a float32 scale would be float32, of twice the memory
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


class Folded(nn.Module):
    """A frozen copy of a net in eval mode that attacks are faster on, the same up to rounding.

    BatchNorm2d is in the convolution before it, or (in other nets than of this file) Affine.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net, self.parts, before = copy.deepcopy(model).requires_grad_(False), [], {}
        self.training, twin = model.training, dict(zip(model.modules(), self.net.modules()))
        for m in [m for net in twin if isinstance(net, ConvNet) for m in net.modules()]:
            if type(m) is nn.Sequential:
                before |= {b: a for a, b in itertools.pairwise(m) if type(a) is nn.Conv2d}
            elif isinstance(m, PreActBlock):
                before[m.norm2[0]] = m.conv1
        for mine, given in zip(self.net.parameters(), model.parameters()):
            mine.data = given.data  # the same memory, but for what refresh writes
        for norm in twin:
            if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and not norm.training:
                conv = before.get(norm)
                twin[norm].__class__ = Affine if conv is None else nn.Identity
                self.parts.append((norm, twin[norm], conv, twin.get(conv)))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Take the weights and statistics that the net has now. -> self"""
        for n, affine, conv, folded in self.parts:
            scale = (n.running_var + n.eps).rsqrt() * (1 if n.weight is None else n.weight)
            shift = (0 if n.bias is None else n.bias) - n.running_mean * scale
            if conv is None:
                affine.scale, affine.shift = scale[:, None, None], shift[:, None, None]
            else:
                folded.weight.data = conv.weight * scale[:, None, None, None]
                folded.bias = nn.Parameter(shift, requires_grad=False)
        return self

    def forward(self, x):
        return self.net(x)


def attacked(model: nn.Module, norms: str) -> nn.Module:
    """What an attack in training differentiates: BatchNorm in mode `train`, or `eval` and Folded.

    Not under torch.compile, which does as well.
    """
    model.train(norms == "train")
    if norms == "train" or model._compiled_call_impl is not None:
        return model
    if "folded" not in vars(model):
        vars(model)["folded"] = Folded(model)  # no submodule: it is neither saved nor trained
    return vars(model)["folded"].refresh()


def check_model(flag: str, name: str, width: float = 1.0, dropout: float = 0.0) -> None:
    """An error that names `flag` if build_model(name, width=width, dropout=dropout) cannot be."""
    wrn = re.fullmatch(r"wrn-([1-9]\d{1,2})-([1-9]\d?)(-silu)?", name)
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
    device, size = data.x_train.device, sum(p.numel() for p in model.parameters())
    print(f"{stage}: {name}, {size:,} parameters, on {device}", flush=True)
    return model.to(device)


RECOMPILE_LIMIT = 64  # PyTorch's 8 are too few: all nets of a kind share the code of one forward


def compile_net(net: nn.Module) -> None:
    """Use torch.compile for a net, for --compile. Each size of a batch has its own code."""
    import torch._dynamo  # a slow import

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_limit_in_one_line)
    net.compile(dynamic=False)


def _limit_in_one_line(record: logging.LogRecord) -> bool:
    """Whether to log what torch.compile says; that its limit is hit is a line of our own."""
    if "recompile_limit" not in record.getMessage():
        return True
    rest = "further kinds of forward passes run without torch.compile: right, but slower"
    warn_once(f"--compile: the limit of {RECOMPILE_LIMIT} compiled versions is reached; {rest}")
    return False


def macs(forward, data: Data) -> int:
    """Multiply-adds of the layers in forward(x), x one test image: what some papers call FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode  # a slow import

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(to_float(data.x_test[:1]))
    return counter.get_total_flops() // 2


class Gradients(nn.Module):
    """The mean |dL/dW| of each layer in some epochs (paper 3, Figure 1), for --grad-heatmap.

    A layer is named by its stage and number, or as the stage's shortcut; an MLP is one stage.
    A module, so that checkpoints have it. benchmark/gradients.py writes and shows it. The loop says
    in `epoch` (1, 2, ...) where it is.
    """

    def __init__(self, model: nn.Module, epochs: list[int]):
        super().__init__()
        self.epochs, self.epoch, self.weights = epochs, 1, {}
        for i, stage in enumerate(getattr(model, "stages", [model]), 1):
            found = [(name, w) for name, w in stage.named_parameters() if w.dim() > 1]
            straight = [w for name, w in found if "shortcut" not in name]
            self.weights |= {f"{i}.{k}": w for k, w in enumerate(straight, 1)}
            self.weights |= {f"{i}.shortcut": w for name, w in found if "shortcut" in name}
        means = torch.zeros(len(epochs), len(self.weights), device=straight[0].device)
        self.register_buffer("means", means)

    def add(self, loss: Tensor, steps: int) -> None:
        """Add the gradients of one of the `steps` of the epoch, before they are used."""
        if self.epoch in self.epochs:
            found = torch.autograd.grad(loss, [*self.weights.values()], retain_graph=True)
            means = torch.stack([gradient.abs().mean() for gradient in found])
            self.means[self.epochs.index(self.epoch)] += means / steps

    def numbers(self) -> dict:
        """{epochs: (E,), layers: (L,), means: (E, L)}, as lists."""
        return {"epochs": self.epochs, "layers": [*self.weights], "means": self.means.tolist()}


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
    with frozen(model):
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(model(x_adv), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


def set_precision(precision: str) -> None:
    """What float32 is on CUDA from now on: with `tf32` convolutions and matrix products have 10
    bits, with `fp32` and `bf16` (what autocast leaves in float32) they are those of IEEE float32.

    By the old switches of PyTorch too: torch.compile of some versions reads those, and refuses a
    contradiction. By operation, or torch.backends.fp32_precision of others would be inherited.
    """
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the old switches deprecated
        torch.backends.cudnn.allow_tf32 = tf32
    cudnn = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    set_matmul_tf32(tf32)


def set_matmul_tf32(allowed: bool) -> None:
    """Whether float32 matrix products on CUDA are in TF32."""
    if (torch.backends.cuda.matmul.fp32_precision == "tf32") != allowed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = allowed  # the old switch sets the new one


@contextlib.contextmanager
def convolutions(tf32: bool):
    """Those of float32 on CUDA in TF32, of 10 bits, or strictly; and no cudnn.benchmark.

    Matrix products are strict. cudnn.benchmark times its kernels for each new number of images; an
    attack that drops what is broken has hundreds of those.
    """
    cudnn, now = torch.backends.cudnn, "tf32" if tf32 else "ieee"
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark
    matmul_before = torch.backends.cuda.matmul.fp32_precision == "tf32"
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark = now, now, False
    set_matmul_tf32(False)
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark = before
        set_matmul_tf32(matmul_before)


@contextlib.contextmanager
def frozen(model: nn.Module):
    """No weight has a gradient inside: what torch.compile makes computes all that there are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model frozen in eval mode, without TF32 or torch.compile; all is put back afterwards."""
    training, compiled = model.training, "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with frozen(model.eval()), convolutions(tf32=False), eager:
            yield model
    finally:
        model.train(training)


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Which of x, float (N, C, H, W) or uint8 (N, H, W, C), the model gets right: bool (N,)."""
    pairs = zip(x.split(batch_size), labels.split(batch_size))
    return torch.cat([model(to_float(part)).argmax(1) == y for part, y in pairs])


# ------------------------------------------------------------------------------------------------
# Files, written whole or not at all, read without running what they hold; tables


def write_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file, move it to `path`; on an error `path` stays as is."""
    if rank():  # of several processes the first one writes
        return
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
    with contextlib.suppress(OSError):  # some systems open no folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # or a power failure may undo the move
        os.close(folder)


def lock(path: Path, what: str | Path, flag: str):
    """Lock the file `path` until it is closed or the process ends. -> the open file

    An error if another process has it: `what` is in use, and `flag` can name something else.
    """
    file = open(path, "a+")  # noqa: SIM115
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read()
            file.close()
            fail(f"{what}: in use by process {process}; wait, or take another {flag}")
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file


def save(path: Path, record: dict) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts atomically, for `load`."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk in a RuntimeError
    torch.save({"format": 1} | record, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def check_zip(path: str | Path, whole: bool = True) -> None:
    """ValueError if a zip is made to swell or, if whole, has parts that fail their CRC-32."""
    if not Path(path).is_file():  # a pipe would block
        raise ValueError("not a file")
    with zipfile.ZipFile(path) as file:
        size = sum(part.file_size for part in file.infolist())
        if size > 2**28 and size > 100 * os.path.getsize(path):
            raise ValueError(f"a zip bomb of {size:,} bytes")
        if any(part.compress_type not in (0, 8) for part in file.infolist()):
            raise ValueError("packed in a way that numpy and torch never use")
        if whole and (damaged := file.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")


def load(path: str | Path) -> dict:
    """Read a file of `save` to the CPU, weights only: other pickles are refused, never run.

    Every byte that matters is under a CRC-32 of torch's; those of older versions are too.
    """
    if not Path(path).is_file():  # a pipe would block
        fail(f"{path}: no such checkpoint")
    try:
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on foreign pickles
            record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # torch's words are on how to run it
            reason = "its pickle asks for more than numbers and names"
        again = "if a run wrote it, delete it, and the same command makes it again"
        fail(f"{path}: truncated, changed, or no checkpoint of these scripts ({reason}); {again}")
    if not isinstance(record, dict) or record.get("format") != 1:
        fail(f"{path}: not a checkpoint of these scripts")
    return record


def previous(path: Path) -> Path:
    """Where `save_next` keeps what it replaces: last.pt -> last.prev.pt."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_next(path: Path, record: dict) -> None:
    """As `save`, but what was in the file is kept beside it, for `load_latest`."""
    if path.exists() and not rank():
        os.replace(path, previous(path))
    save(path, record)


def load_latest(path: Path) -> tuple[dict, Path | None]:
    """-> (the record of the last `save_next`, its file); ({}, None) if there is none.

    If it is missing or damaged it is the one before, and a line says so; if both are, an error.
    Then call settle(path, file), or the next save_next keeps the damaged one for the good one.
    """
    if path.exists():
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                return load(path), path
        except SystemExit:
            print(errors.getvalue().removeprefix("error: "), end="", flush=True)
    if previous(path).exists():
        record = load(previous(path))
        print(f"{path}: the one before it is taken", flush=True)
        return record, previous(path)
    if path.exists():
        print(f"{path}: there is none before it; beginning again", flush=True)
    return {}, None


def settle(path: Path, found: Path | None) -> None:
    """Put a copy of the good file that `load_latest` found at `path`; without one, nothing."""
    if found is None:
        path.unlink(missing_ok=True)
    elif found != path:
        write_atomically(path, lambda file: file.write(found.read_bytes()))


def save_model(path: Path, model: nn.Module, meta: dict) -> None:
    """Write a model: its weights, its `arch` to build it again, numbers and names about it."""
    save(path, {"arch": model.arch, "weights": model.state_dict(), "meta": meta})


def is_plain(value, depth: int = 5) -> bool:
    """Whether it is a number, a short string, None, a tensor, or a small dict or list of such."""
    if isinstance(value, Tensor):  # one that repeats its numbers is larger than its storage
        return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    if isinstance(value, dict | list):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and len(inside) < 1000 and all(is_plain(v, depth - 1) for v in inside)
    short = isinstance(value, str) and len(value) < 1000
    return short or value is None or isinstance(value, float | int)


def is_like(value, like) -> bool:
    """Whether it has the type of `like`: all its keys, likewise; the dtype of a tensor."""
    if isinstance(like, dict) and isinstance(value, dict):
        return all(key in value and is_like(value[key], like[key]) for key in like)
    return type(value) is type(like) and getattr(value, "dtype", 0) == getattr(like, "dtype", 0)


def load_model(path, device="cpu", data: Data | None = None, name: str | None = None):
    """-> (model in eval mode, its meta); an error if it does not fit `data` or is no `name`."""
    record = load(path)
    try:
        arch, weights, meta = (record[key] for key in ("arch", "weights", "meta"))
        check_model(f"{path}", arch["name"], arch["width"], arch["dropout"])
        with torch.device("meta"):  # takes no memory, whatever arch asks for
            wanted = {k: (v.shape, v.dtype) for k, v in build_model(**arch).state_dict().items()}
        size = sum(v.numel() * v.element_size() for v in weights.values())
        if wanted != {k: (v.shape, v.dtype) for k, v in weights.items()}:
            raise ValueError(f"the weights are not those of {arch}")
        if size > os.path.getsize(path) or not (isinstance(meta, dict) and is_plain(meta)):
            raise ValueError("made to swell, or with more than numbers, names and tensors in it")
        if not all(v.isfinite().all() for v in weights.values()):
            raise ValueError("weights that are not finite")
        model = build_model(**arch)
        model.load_state_dict(weights)
    except Exception as error:  # whatever a foreign record makes torch raise
        fail(f"{path}: holds no model of these scripts ({(str(error) or 'empty')[:200]})")
    if name is not None and name != arch["name"]:
        fail(f"{path}: is a {arch['name']}, expected a {name}")
    if data is not None:
        wanted = [len(data.classes), *data.x_test.shape[2:]]
        if wanted != [arch["classes"], arch["size"], arch["channels"]]:
            is_for = f"{arch['classes']} classes of {arch['size']} x {arch['channels']} images"
            fail(f"{path}: for {is_for}; {data.name} has {wanted[0]}, {wanted[1]} x {wanted[2]}")
    return model.to(device).eval(), meta


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
