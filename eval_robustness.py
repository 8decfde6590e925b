"""Evaluate models: clean, PGD, AutoAttack, corruptions, other images, calibration; in float32.

Paper    PGD: Madry et al., ICLR 2018. APGD, DLR loss, AutoAttack: Croce and Hein, ICML 2020
         (2003.01690). FAB: Croce and Hein, ICML 2020 (1907.02044). Square: Andriushchenko et al.,
         ECCV 2020 (1912.00049). ECE: Guo et al., ICML 2017. Corruptions: Hendrycks and Dietterich,
         ICLR 2019 (1903.12261). CINIC-10: Darlow et al., 2018 (1810.03505).
Attacks  pgdN     N steps of size --step-size from --restarts uniform starts
         aa       AutoAttack, the standard version: apgd-ce, apgd-t, fab-t and square in turn
         apgd     the first two of these in turn
         apgd-ce, apgd-t, fab-t, square   each of them alone
Usage    python eval_robustness.py CKPT1 CKPT2 --attack clean pgd20 aa --json a.json
         python eval_robustness.py CKPT1 CKPT2 --ensemble --attack clean aa --n 1000
         python eval_robustness.py --model package.module:function --weights FILE --attack aa
         python eval_robustness.py CKPT --attack corruptions calibration --corruptions DIR
         With --json the same command goes on where a killed one stopped.
Shapes   x uint8 (N, H, W, C); batches float32 (B, C, H, W) in [0, 1]; labels (N,); logits (B, K)
Numbers  X_acc: share of all N images that are right when clean and that no attack of X breaks;
         X_conditional_acc: the same of those right when clean. An image is broken if an example in
         the ball and in [0, 1] is misclassified by the model itself, in strict float32.
Differs  1. Draws depend on (seed, attack, pass, image) alone; all images share Square's squares.
         2. A running attack drops images that are broken; FAB stops at a norm of eps.
         3. With fewer than 4 classes the numerator of the targeted DLR loss is used.
         4. Logits that are not finite are no success; the authors' code counts them as one.
         5. APGD's first check compares the first loss with that of the start, as in the paper; the
            authors' code with 0.
         6. Square goes on where the label shares the largest logit; the authors' code stops there.
         L-infinity alone is here; docs/use_elsewhere.md runs the authors' package in L2.
"""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import warnings
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
IN_TURN = {"aa": AUTOATTACK, "apgd": AUTOATTACK[:2]}  # attacks on what those before have left
# Words of --attack that measure something else than the accuracy under an attack
NOT_ATTACKS = ("clean", "calibration", "corruptions", "cinic", "ood")


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="files written by the training scripts")
    add(
        "--model",
        metavar="MODULE:FUNCTION",
        action="append",
        default=[],
        help="function that returns a net of your own, from images in [0, 1] to logits: that of a "
        "CKPT, or else a net to evaluate; with arguments 'MODULE:FUNCTION(width=2)'; may be "
        "repeated",
    )
    add("--weights", metavar="FILE", help="state_dict for --model, loaded as weights only")
    add(
        "--ensemble",
        action="store_true",
        help="evaluate all models as one that averages their probabilities",
    )
    add = parser.add_argument_group("attack").add_argument
    add(
        "--attack",
        nargs="+",
        type=attack_name,
        default=["clean", "pgd20"],
        help=f"what is measured: {', '.join(NOT_ATTACKS)}, or attacks, see Attacks above",
    )
    add("--eps", type=common.pixel_units, default=8 / 255, help="radius of the attacks")
    add("--step-size", type=common.pixel_step, help="step of PGD (default: a quarter of --eps)")
    add("--restarts", type=common.whole, default=1, help="random starts of PGD; the worst counts")
    add = parser.add_argument_group("other images").add_argument
    add(
        "--corruptions",
        metavar="DIR",
        help="folder of the unpacked CIFAR-10-C, or one that benchmark/corruptions.py has written",
    )
    add("--cinic", metavar="FILE", help=".npz file of CINIC-10, written by benchmark/prepare.py")
    add("--ood", metavar="PATH", help=".npz file or folder of class folders for --attack ood")
    add = parser.add_argument_group("run").add_argument
    add("--data", default="cifar10", help=f"data set: {common.DATA_NAMES}")
    add("--data-root", default="data", help="folder of the data sets; downloads go there")
    add(
        "--n",
        type=common.whole,
        help="number of test images, always the same ones (default: all)",
    )
    add(
        "--batch-size",
        type=common.whole,
        default=500,
        help="images at once; changes results by rounding alone",
    )
    add("--seed", type=common.whole_or_0, default=0, help="seed of the attacks")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if present")
    add("--json", metavar="FILE", help="file of all numbers; a killed evaluation goes on")
    add(
        "--plot",
        metavar="FILE",
        help="figure of accuracy against eps, of the probabilities and of the corruptions",
    )
    args = parser.parse_args(argv)
    check_flags(args, parser.error)
    if args.step_size is None:
        args.step_size = args.eps / 4
    argv = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", os.path.relpath(__file__), *argv])
    return args


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    for name in args.attack:
        if args.attack.count(name) > 1:
            error(f"--attack: expected each name once, got {name} twice")
    models = [*args.checkpoints, *args.model]
    places = [os.path.realpath(name) for name in models]
    for name, place in zip(models, places):
        if places.count(place) > 1:
            error(f"{name}: expected each net once")
    if not models or args.weights and not args.model:
        error("expected CKPT..., or --model MODULE:FUNCTION, perhaps with --weights FILE")
    for name in ("corruptions", "cinic", "ood"):
        if name in args.attack and getattr(args, name) is None:
            error(f"--attack {name}: say where the images are, with --{name}")
        if name not in args.attack and getattr(args, name) is not None:
            error(f"--{name}: has no effect without --attack {name}")
    has_pgd = any(name.startswith("pgd") for name in args.attack)
    if args.restarts != 1 and not has_pgd:
        error("--restarts: has no effect without --attack pgdN")
    if args.step_size is not None and not has_pgd and "calibration" not in args.attack:
        error("--step-size: has no effect without --attack pgdN or calibration")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        error("--plot: needs matplotlib; pip install matplotlib")
    for path in (args.json, args.plot):
        if path is None:
            continue
        is_other = os.path.exists(path) and not os.path.isfile(path)  # a folder, a device
        if is_other or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            error(f"{path}: expected a file, in a folder that is there")
    if args.plot and file_format(args.plot) not in ("png", "pdf", "svg", "jpg", "eps"):
        error(f"--plot {args.plot}: expected a name with .png, .pdf, .svg, .jpg or .eps")


def file_format(path):
    """The format of a figure by the end of its name, png without one."""
    return Path(path).suffix[1:].lower() or "png"


def attack_name(text):
    """The `type=` of --attack: one of NOT_ATTACKS, aa, pgdN or the name of an attack."""
    names = [*NOT_ATTACKS, *IN_TURN, *ATTACKS]
    if text not in names and not re.fullmatch(r"pgd[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"expected {', '.join(names)} or pgdN, got {text!r}")
    return text


# ------------------------------------------------------------------------------------------------
# What the attacks work on


@dataclasses.dataclass
class Settings:
    """The settings of all attacks; eps and step_size in units of images in [0, 1].

    The fields below batch_size are AutoAttack's. With smaller numbers it is weaker, a test faster.
    """

    eps: float = 8 / 255
    step_size: float | None = None  # step of PGD; None: eps / 4
    restarts: int = 1  # random starts of PGD
    seed: int = 0
    batch_size: int = 500
    steps: int = 100  # iterations of APGD and FAB
    queries: int = 5000  # queries of Square
    targets: int = 9  # target classes of APGD-T and FAB-T


class Images(NamedTuple):
    """All images of an evaluation, on the device."""

    x: Tensor  # uint8 (N, H, W, C), or float (N, C, H, W) in [0, 1]
    labels: Tensor  # int64 (N,)
    logits: Tensor  # (N, K) of the clean images


@dataclasses.dataclass
class Batch:
    """The images that a call of an attack works on, and what the attack counts."""

    x: Tensor  # float32 (B, C, H, W) in [0, 1]
    labels: Tensor  # int64 (B,)
    logits: Tensor  # (B, K) of the clean images
    index: Tensor  # int64 (B,), on the CPU: the number of each image of the evaluation
    settings: Settings
    attack: str
    repeat: int = 0  # number of the random restart or of the target class: 0, 1, ...
    zero_gradients: Tensor | int = 0  # result: starts at which the gradient is zero
    not_finite: Tensor | int = 0  # result: evaluations with logits or gradients not finite

    def draw(self, *shape):
        """Uniform (B, *shape) in [0, 1), by seed, attack, repeat and image alone."""
        draw = uniform(self.index, self.attack, "start", self.settings.seed, self.repeat)
        draws = draw(*shape).float()
        if self.x.device.type == "cuda":
            draws = draws.pin_memory()  # otherwise the copy would wait for the GPU
        return draws.to(self.x.device, non_blocking=True)

    def count(self, logits, gradient=None, is_start=False):
        """Add to the results what logits (B, K) and a gradient (B, C, H, W) of a step show."""
        finite = logits.isfinite().all(1)
        if gradient is not None:
            finite = finite & gradient.isfinite().all((1, 2, 3))
        self.not_finite = self.not_finite + (~finite).sum()
        if is_start:
            self.zero_gradients = (gradient.abs().amax((1, 2, 3)) == 0).sum()

    def target(self):
        """The wrong class (B,) with the largest clean logit; of repeat 1 the second largest ..."""
        infinity = torch.full_like(self.logits[:, :1], math.inf)
        label_first = self.logits.scatter(1, self.labels[:, None], infinity)
        ranked = label_first.argsort(dim=1, descending=True, stable=True)
        return ranked[:, 1 + self.repeat]


def uniform(numbers, *key):
    """-> draw(*shape): float64 (B, *shape) in [0, 1), others at each call; numbers int64 (B,).

    Each image has a generator of its own, on the CPU: its draws depend on its number and `key`
    alone, not on the batch or the device.
    """
    generators = []
    for number in numbers.tolist():
        seed = common.derive_seed(*key, number)
        generators.append(torch.Generator("cpu").manual_seed(seed))

    def draw(*shape):
        options = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is
        draws = [torch.rand(shape, generator=generator, **options) for generator in generators]
        return torch.stack(draws).to(numbers.device)

    return draw


def batches(images, index, settings, attack="", repeat=0):
    """Yield (part of index, Batch) over the images with the numbers `index` (M,)."""
    if len(index) == 0:
        return
    for part in index.split(settings.batch_size):
        x = common.to_float(images.x[part])
        labels, logits = images.labels[part], images.logits[part]
        yield part, Batch(x, labels, logits, part, settings, attack, repeat)


def misclassified(logits, labels):
    """bool (B,): another class is on top. Logits (B, K) that are not finite are no success."""
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


def norm_of(d):
    """The L-infinity norm of each perturbation d (B, C, H, W): (B, 1, 1, 1)."""
    return d.abs().amax((1, 2, 3), keepdim=True)


def project(v, x, eps):
    """v into the ball around x, and into [0, 1]."""
    return torch.clamp(v, x - eps, x + eps).clamp_(0, 1)


def is_allowed(x_adv, x, eps):
    """bool (B,): in the ball, up to the rounding of float32, and in [0, 1]."""
    in_ball = norm_of(x_adv - x)[:, 0, 0, 0] <= eps * (1 + 1e-5) + 1e-7
    return in_ball & ((x_adv >= 0) & (x_adv <= 1)).all((1, 2, 3))


def loss_gradient(model, x, loss):
    """-> logits (B, K), loss (B,), its gradient in x alone (0 where nothing depends on x).

    Here and below the net gets a copy of its images: it may normalise them in place.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x.clone()).float()
        value = loss(logits)
    gradient = torch.zeros_like(x)
    if value.requires_grad:
        ones = torch.ones_like(value)
        (gradient,) = torch.autograd.grad(value, x, ones, materialize_grads=True)
    return logits.detach(), value.detach(), gradient


def drop_done(active, x_adv, i, last):
    """Write the results of images that are done to x_adv, and drop their rows from `active`.

    active: tensors with a row for each image that is still attacked: row (its row in x_adv), done,
    found (its result), and what else the attack keeps. i of `last` steps have been made. -> whether
    any image is left. On CUDA it does so only after steps 1, 2, 4, 8, ..., every 50th and the last:
    here the host waits for the device, and nowhere else in an attack.
    """
    if x_adv.is_cuda:
        power_of_two = i & (i - 1) == 0
        if not power_of_two and i % 50 != 0 and i != last:
            return True
    elif not active.done.any():
        return True
    done = active.done[:, None, None, None]
    x_adv[active.row] = torch.where(done, active.found, x_adv[active.row])
    remaining = (~active.done).nonzero()[:, 0]
    if 0 < len(remaining) < len(active.row):
        for name, values in vars(active).items():
            if values is not None:
                setattr(active, name, values[remaining])
    return len(remaining) > 0


# ------------------------------------------------------------------------------------------------
# PGD: Madry et al. 2018


def pgd(model, batch):
    """The steps of `common.pgd`, as many as the attack's name says, from a uniform start."""
    settings, eps = batch.settings, batch.settings.eps
    noise = batch.draw(*batch.x.shape[1:]).mul_(2 * eps).sub_(eps)
    step_size = eps / 4 if settings.step_size is None else settings.step_size
    low, high = (batch.x - eps).clamp(0, 1), (batch.x + eps).clamp(0, 1)
    x_adv = torch.clamp(batch.x + noise, low, high)
    for i in range(int(batch.attack.removeprefix("pgd"))):
        logits, _, gradient = loss_gradient(model, x_adv, lambda z: ce_loss(z, batch.labels))
        batch.count(logits, gradient, is_start=i == 0)
        x_adv = torch.clamp(x_adv + step_size * gradient.sign(), low, high)
    return x_adv


# ------------------------------------------------------------------------------------------------
# APGD: Croce and Hein 2020a, algorithm 1


def margin(logits, labels):
    """z_y - max_{k != y} z_k (B,), which Square lowers."""
    labels = labels[:, None]
    return logits.gather(1, labels)[:, 0] - logits.scatter(1, labels, -math.inf).amax(1)


def ce_loss(logits, labels, target=None):
    """Cross-entropy (B,) of logits (B, K)."""
    return F.cross_entropy(logits, labels, reduction="none")


def gap_to_target(logits, labels, target):
    """z_t - z_y (B,), which FAB brings to 0."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def targeted_dlr_loss(logits, labels, target):
    """Eq. (7): -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), (B,); the numerator if K < 4."""
    numerator = gap_to_target(logits, labels, target)
    if logits.shape[1] < 4:
        return numerator
    top = logits.topk(4).values.T
    return numerator / (top[0] - (top[2] + top[3]) / 2 + 1e-12)


def apgd_checkpoints(steps):
    """{number of iterations done: iterations since the checkpoint before}, section 3.1."""
    period = max(int(0.22 * steps), 1)
    shortest = max(int(0.06 * steps), 1)
    shrink = max(int(0.03 * steps), 1)
    checkpoints, done = {}, period
    while done <= steps:
        checkpoints[done] = period
        period = max(period - shrink, shortest)
        done += period
    return checkpoints


def apgd(model, batch, loss):
    """APGD from a random start on loss(logits, labels, target) -> x_adv (B, C, H, W), or x.

    An image is done at the first evaluation, the start included, that is wrong, as any class.
    """
    settings, x_adv = batch.settings, batch.x.clone()
    active = SimpleNamespace(
        row=torch.arange(len(batch.x), device=batch.x.device),
        x=batch.x,
        labels=batch.labels,
        target=batch.target() if loss is targeted_dlr_loss else None,
    )

    def move_to(x, is_start=False):
        """active.now and active.gradient at x -> loss (B,), misclassified (B,)"""
        active.now = x
        logits, value, active.gradient = loss_gradient(
            model, x, lambda z: loss(z, active.labels, active.target)
        )
        batch.count(logits, active.gradient, is_start)
        return value, misclassified(logits, active.labels)

    # a start whose largest coordinate is eps
    noise = 2 * batch.draw(*batch.x.shape[1:]) - 1
    start = (batch.x + settings.eps * noise / (norm_of(noise) + 1e-12)).clamp_(0, 1)
    start = start.contiguous(memory_format=torch.channels_last)
    value, active.done = move_to(start, is_start=True)
    active.found = active.best = active.previous = active.now
    active.best_gradient = active.gradient
    active.best_value = active.last_value = active.checkpoint_value = value
    active.rises = torch.zeros_like(value)
    active.halved = torch.ones_like(active.done)
    active.step = torch.full_like(value, 2 * settings.eps)[:, None, None, None]
    checkpoints = apgd_checkpoints(settings.steps)
    for i in range(1, settings.steps + 1):
        z = active.now + active.step * active.gradient.sign()
        z = project(z, active.x, settings.eps)
        if i > 1:  # momentum
            z = active.now + 0.75 * (z - active.now) + 0.25 * (active.now - active.previous)
            z = project(z, active.x, settings.eps)
        active.previous = active.now
        value, wrong = move_to(z)
        active.found = torch.where(wrong[:, None, None, None], z, active.found)
        active.done = active.done | wrong
        better = value > active.best_value
        better_image = better[:, None, None, None]
        active.best = torch.where(better_image, z, active.best)
        active.best_gradient = torch.where(better_image, active.gradient, active.best_gradient)
        active.best_value = torch.where(better, value, active.best_value)
        active.rises = active.rises + (value > active.last_value)
        active.last_value = value
        if i in checkpoints:
            # differs: condition 1 with <= as in the authors' code, the paper has <
            few_rises = active.rises <= 0.75 * checkpoints[i]
            stalled = ~active.halved & (active.checkpoint_value >= active.best_value)
            active.halved = few_rises | stalled
            active.rises = torch.zeros_like(value)
            active.checkpoint_value = active.best_value
            halved_image = active.halved[:, None, None, None]
            active.step = torch.where(halved_image, active.step / 2, active.step)
            active.now = torch.where(halved_image, active.best, z)
            active.gradient = torch.where(halved_image, active.best_gradient, active.gradient)
        if not drop_done(active, x_adv, i, settings.steps):
            break
    return x_adv


def apgd_ce(model, batch):
    """APGD on the cross-entropy."""
    return apgd(model, batch, ce_loss)


def apgd_targeted(model, batch):
    """APGD on the DLR loss towards batch.target()."""
    return apgd(model, batch, targeted_dlr_loss)


# ------------------------------------------------------------------------------------------------
# FAB: Croce and Hein 2020b


def to_hyperplane(x, w, c):
    """The smallest d (B, C, H, W) with <w, d> = -c and x + d in [0, 1]; if none, to the corner.

    x, w (B, C, H, W), c (B,). Eq. (5): d_i = -sign(w_i) min(r, m_i), m_i the room in the box. r:
    Newton's method, without sorting or waiting for the device (3 iterations are usual).
    """
    w = torch.where(c[:, None, None, None] < 0, -w, w)
    scale = norm_of(w) + 1e-38
    w, c = w / scale, c.abs()[:, None, None, None] / scale
    room, size = torch.where(w > 0, x, 1 - x), w.abs()
    gain = size * room
    r = torch.where(gain.sum((1, 2, 3), keepdim=True) > c, 0.0, 1e30)
    for _ in range(8):
        free = room > r
        rest = c - torch.where(free, 0, gain).sum((1, 2, 3), keepdim=True)
        total = torch.where(free, size, 0).sum((1, 2, 3), keepdim=True)
        r = torch.where(total > 0, rest / total.clamp(min=1e-30), 1e30)
    return -w.sign() * torch.minimum(r, room)


def fab_targeted(model, batch):
    """FAB towards batch.target(), algorithm 1 -> x_adv (B, C, H, W): the nearest found, else x.

    Any wrong class counts. An image is done when its norm is at most eps; 0 looks for the minimum
    to the end.
    """
    settings, x_adv = batch.settings, batch.x.clone()
    active = SimpleNamespace(
        row=torch.arange(len(batch.x), device=batch.x.device),
        x=batch.x,
        labels=batch.labels,
        target=batch.target(),
        now=batch.x,
        found=batch.x,
        size=torch.full_like(batch.x[:, :1, :1, :1], math.inf),
    )
    for i in range(1, settings.steps + 1):
        logits, df, w = loss_gradient(
            model, active.now, lambda z: gap_to_target(z, active.labels, active.target)
        )
        batch.count(logits, w, is_start=i == 1)
        w = w.nan_to_num(0, 0, 0)  # the scale of to_hyperplane: one nan would stop the image
        df_at_x = df + (w * (active.x - active.now)).sum((1, 2, 3))
        # the projections of the current point and of x, in one call
        points = torch.cat([active.now, active.x])
        moves = to_hyperplane(points, torch.cat([w, w]), torch.cat([df, df_at_x]))
        d1, d2 = moves.chunk(2)
        r1, r2 = norm_of(d1).clamp(min=1e-8), norm_of(d2).clamp(min=1e-8)
        alpha = (r1 / (r1 + r2)).clamp(max=0.1)
        active.now = (1 - alpha) * (active.now + 1.05 * d1) + alpha * (active.x + 1.05 * d2)
        active.now = active.now.clamp_(0, 1)
        logits = model(active.now.clone()).float()
        batch.count(logits)
        wrong = misclassified(logits, active.labels)[:, None, None, None]
        d = active.now - active.x
        size = norm_of(d)
        better = wrong & (size < active.size)
        active.found = torch.where(better, active.now, active.found)
        active.size = torch.where(better, size, active.size)
        active.now = torch.where(wrong, active.x + 0.9 * d, active.now)  # the backward step
        near_enough = settings.eps if i < settings.steps else 1e30
        active.done = active.size[:, 0, 0, 0] <= near_enough
        if not drop_done(active, x_adv, i, settings.steps):
            break
    return x_adv


# ------------------------------------------------------------------------------------------------
# Square: Andriushchenko et al. 2020, algorithms 1 and 2


def square_side(i, height, width):
    """The side of the square of query i = 0, 1, ...: a share of 0.8 of the pixels, then halved."""
    halvings = sum(i > start for start in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(0.8 / 2**halvings * height * width)), 1), height, width)


def square(model, batch):
    """Square -> x_adv (B, C, H, W), x where nothing was found. No gradient is used.

    The windows and their signs are the same for all images. A corner is drawn below height - side,
    so that the last position is never used. Both as in the authors' code.
    """
    settings, device = batch.settings, batch.x.device
    x_adv, (n, channels, height, width) = batch.x.clone(), batch.x.shape
    generator = torch.Generator("cpu")
    generator.manual_seed(common.derive_seed("queries", settings.seed, batch.repeat))
    # whatever the default device and type are
    on_cpu = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    corners = torch.rand(settings.queries, 2, **on_cpu).tolist()
    signs = torch.rand(settings.queries, channels, 1, 1, **on_cpu).to(device)
    signs = (signs - 0.5).sign()
    # vertical stripes of +-eps
    start = batch.x + settings.eps * (batch.draw(channels, 1, width) - 0.5).sign()
    active = SimpleNamespace(
        row=torch.arange(n, device=device),
        x=batch.x,
        labels=batch.labels,
        found=start.clamp_(0, 1).contiguous(memory_format=torch.channels_last),
    )

    def query():
        """The net at active.found -> margin (B,), inf if not finite; misclassified (B,)."""
        logits = model(active.found.clone()).float()
        batch.count(logits)
        value = margin(logits, active.labels)
        value = torch.where(logits.isfinite().all(1), value, math.inf)
        return value, misclassified(logits, active.labels)

    active.margin, active.done = query()
    for i, (row, column) in enumerate(corners):
        side = square_side(i, height, width)
        top, left = int(row * (height - side)), int(column * (width - side))
        window = slice(None), slice(None), slice(top, top + side), slice(left, left + side)
        before = active.found[window].clone()
        proposal = (active.x[window] + settings.eps * signs[i]).clamp_(0, 1)
        active.found[window] = proposal  # in place: only the window changes
        value, wrong = query()
        take = ~active.done & ((value < active.margin) | (value <= 0))
        active.found[window] = torch.where(take[:, None, None, None], proposal, before)
        active.margin = torch.where(take, value, active.margin)
        active.done = active.done | wrong
        if not drop_done(active, x_adv, i + 1, settings.queries):
            break
    return x_adv


# By name: f(model, batch) -> x_adv (B, C, H, W)
ATTACKS = {"apgd-ce": apgd_ce, "apgd-t": apgd_targeted, "fab-t": fab_targeted, "square": square}


class Pass(NamedTuple):
    """One run of an attack over all images that are not broken yet."""

    attack: str
    repeat: int  # number of the restart or of the target class: 0, 1, ...


def passes(name, classes, settings):
    """The passes that a name of --attack stands for, in order."""
    plan = []
    for attack in IN_TURN.get(name, [name]):
        repeats = 1
        if attack.startswith("pgd"):
            repeats = settings.restarts
        elif attack.endswith("-t"):
            repeats = min(settings.targets, classes - 1)
        plan += [Pass(attack, repeat) for repeat in range(repeats)]
    return plan


# ------------------------------------------------------------------------------------------------
# Accuracy under corruptions

# In the order of the benchmark; the last four are not in its mean
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)


def corruption_accuracy(model, x, labels, corruptions, batch_size=500, counts=None, save=None):
    """Accuracy of a model under the 19 corruptions at 5 severities -> the dict of `summarise`.

    x uint8 (N, H, W, C) clean test images, labels (N,); corruptions: read_corruptions of them.
    counts: a dict that each corruption's result is put into; what it holds already is not run
    again. save(): is called after each corruption.
    """
    counts = {} if counts is None else counts
    correct_clean = common.predict(model, x, batch_size=batch_size).argmax(1) == labels
    files, rows = corruptions
    for name in CORRUPTIONS:
        if name in counts:
            continue
        results = []
        for severity in range(1, 6):
            first = (severity - 1) * len(files[name]) // 5
            predictions = []
            for part in rows.split(batch_size):
                images = torch.from_numpy(files[name][first + part.numpy()]).to(x.device)
                what = f"images under {name}, severity {severity},"
                logits = common.predict(model, images, batch_size=batch_size, what=what)
                predictions.append(logits.argmax(1))
            correct = torch.cat(predictions) == labels
            results.append([correct.sum().item(), (correct & correct_clean).sum().item()])
        counts[name] = results
        if save is not None:
            save()
    return summarise(counts, len(labels), correct_clean.sum().item())


def summarise(counts, n, clean):
    """counts[name] = five of [correct, correct here and when clean], of n images -> a summary.

    corruptions_acc: {name: [5]}; mean15_acc: the benchmark's 15, mean19_acc: all, mean18_acc: all
    but frost. clean: how many are correct when clean; with it conditional_acc, over those alone,
    and mca_acc, the paper's: its mean over severities, then over the 19; mca18_acc: without frost.
    """
    every = list(CORRUPTIONS)
    without_frost = [name for name in every if name != "frost"]
    accuracy = {name: [correct / n for correct, _ in counts[name]] for name in every}
    conditional = None
    if clean:
        conditional = {name: [both / clean for _, both in counts[name]] for name in every}

    def mean(table, names):
        return np.mean([table[name] for name in names]).item() if table else None

    return {
        "n": n,
        "clean_acc": clean / n,
        "mean15_acc": mean(accuracy, every[:15]),
        "mean18_acc": mean(accuracy, without_frost),
        "mean19_acc": mean(accuracy, every),
        "mca_acc": mean(conditional, every),
        "mca18_acc": mean(conditional, without_frost),
        "corruptions_acc": accuracy,
        "conditional_acc": conditional,
    }


def corruption_rows(summary):
    """A row for each corruption, for common.table: accuracy by severity, mean, conditional mean."""
    rows = []
    for name, accuracies in summary["corruptions_acc"].items():
        row = {"corruption": name}
        for severity, accuracy in enumerate(accuracies, 1):
            row[f"{severity}_acc"] = accuracy
        row["mean_acc"] = np.mean(accuracies).item()
        row["conditional_acc"] = None
        if summary["conditional_acc"]:
            row["conditional_acc"] = np.mean(summary["conditional_acc"][name]).item()
        rows.append(row)
    return rows


def read_npy(flag, path):
    """An .npy file as a memory map; a UserError that names the flag if it is damaged."""
    try:
        if not path.is_file() or path.is_symlink():  # reading a pipe would block
            raise ValueError("no file, or a link")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged header makes numpy raise
        expected = f"expected an .npy file of CIFAR-10-C ({str(error)[:200]})"
        remedy = "delete it if it is there, and unpack or write it again"
        raise common.UserError(f"{flag}: {path}: {expected}; {remedy}") from None


def read_corruptions(folder, x, labels):
    """-> memory maps {corruption: uint8 (5 M, H, W, C)}, and the row (N,) of each x in the first M.

    The folder has M images, and their labels five times over in labels.npy. Every test image of x
    must be among them with its label; the order may differ (see pair_images). Raises UserError.
    """
    folder = Path(folder)
    file_labels = read_npy("--corruptions", folder / "labels.npy")
    n = file_labels.size // 5
    valid = common.are_labels(file_labels, 5 * n, 100_000)
    if not valid or (file_labels != np.tile(file_labels[:n], 5)).any():
        wanted = "N labels 0..K-1, five times over"
        raise common.UserError(f"--corruptions: {folder}/labels.npy: expected {wanted}")
    files, shape = {}, (5 * n, *x.shape[1:])
    for name in CORRUPTIONS:
        files[name] = read_npy("--corruptions", folder / f"{name}.npy")
        if files[name].dtype != np.uint8 or files[name].shape != shape:
            wanted, got = f"uint8 {shape}", f"{files[name].dtype} {files[name].shape}"
            raise common.UserError(
                f"--corruptions: {folder}/{name}.npy: expected {wanted}, got {got}"
            )
    mildest = files["gaussian_blur"][:n]
    rows = pair_images(x, labels, mildest, torch.from_numpy(file_labels[:n].astype(np.int64)))
    if rows is None:
        wrong = f"not every test image is among its {n} images with the same label"
        advice = "take the --data and --n that the folder was made for"
        raise common.UserError(f"--corruptions: {folder}: {wrong}; {advice}")
    return files, rows


def pair_images(x, labels, blurred, blurred_labels):
    """For each image of x the row in `blurred` that shows it: int64 (N,); None if one has no row.

    blurred: images under their mildest corruption, with blurred_labels. The published rows are
    in the order of CIFAR-10's test batch, which a converted data set may not keep; an image under a
    blur of 0.4 pixels is 1.4 levels away, another image 30 and more. An image of noise, which the
    blur moves by more than 12 levels, is not found.
    """
    rows = torch.zeros(len(x), dtype=torch.long, device="cpu")
    for label in labels.unique():
        own_rows = (labels == label).nonzero()[:, 0].cpu()
        blurred_rows = (blurred_labels == label.cpu()).nonzero()[:, 0]
        if not len(blurred_rows):
            return None
        own_images = x[own_rows.to(x.device)].cpu().flatten(1).float()
        blurred_images = torch.from_numpy(blurred[blurred_rows.numpy()]).flatten(1).float()
        distance, nearest = torch.cdist(own_images, blurred_images).min(1)
        if (distance > 12 * math.sqrt(own_images.shape[1])).any():
            return None
        rows[own_rows] = blurred_rows[nearest]
    return rows


# ------------------------------------------------------------------------------------------------
# Other images


class OtherImages(NamedTuple):
    """Other images of the classes of a data set."""

    x: Tensor  # uint8 (M, H, W, C)
    labels: Tensor  # int64 (M,)
    note: str  # how many there are, and their checksum


def load_other_images(path, classes, shape=(32, 32, 3)):
    """-> OtherImages from an .npz with x_test, y_test, or a folder of folders named as `classes`.

    An .npz may hold its own `classes`; then they are matched by name too. Raises UserError for a
    missing file, an empty class folder, another image size, an unknown class.
    """
    path = Path(path)
    if path.suffix == ".npz":
        arrays = common.read_npz(path, ("x_test", "y_test"))
        x, labels = common.check_images(str(path), "test", arrays)
        names = arrays.get("classes", classes)
    else:
        files, labels, names = common.list_class_folders(path)
        x = common.read_images(files)
    if x.shape[3] == 1 and shape[2] == 3:
        x = x.repeat(3, axis=3)
    elif x.shape[3] == 3 and shape[2] == 1:  # grey files are read with three equal channels
        if (x != x[..., :1]).any():
            grey = "the images of --data are grey; convert them to grey"
            raise common.UserError(f"{path}: images in colour, but {grey}")
        x = np.ascontiguousarray(x[..., :1])
    if x.shape[1:] != tuple(shape):
        raise common.UserError(f"{path}: images of {x.shape[1:]}, expected {tuple(shape)}")
    if labels.max() >= len(names):
        raise common.UserError(f"{path}: label {labels.max()}, but there are {len(names)} classes")
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise common.UserError(f"{path}: {unknown[0]}: none of the classes {', '.join(classes)}")
    if list(names) != list(classes):  # a name may be there twice, as crane in ImageNet
        labels = np.array([classes.index(name) for name in names])[labels]
    checksum = hashlib.sha256(x.tobytes() + labels.tobytes()).hexdigest()[:12]
    note = f"{len(x)} images; sha256 of images and labels: {checksum}"
    return OtherImages(torch.from_numpy(x), torch.from_numpy(labels), note)


def read_other_images(args, data):
    """-> {"cinic" or "ood": OtherImages}, read_corruptions or None, as --attack asks.

    And {words for an error: digest} of all files that --attack asks for.
    """
    x, corruptions, digests = data.x_test, None, {}
    if "corruptions" in args.attack:
        if not Path(args.corruptions).is_dir():
            remedy = ["python", "benchmark/corruptions.py", "--data", args.data]
            if args.n:
                remedy += ["--n", str(args.n)]
            remedy = shlex.join([*remedy, "--out", args.corruptions])
            missing = f"there is no folder {args.corruptions}"
            advice = f"unpack CIFAR-10-C, or write one with: {remedy}"
            raise common.UserError(f"--corruptions: {missing}; {advice}")
        corruptions = read_corruptions(args.corruptions, x, data.y_test)
        digest = hashlib.sha256()
        for array in corruptions[0].values():
            digest.update(np.ascontiguousarray(array))
        digests["the files of --corruptions"] = digest.hexdigest()[:16]
    others = {}
    for name in ("cinic", "ood"):
        if name in args.attack:
            found = load_other_images(getattr(args, name), data.classes, x.shape[1:])
            digests[f"the images of --{name}"] = found.note
            others[name] = OtherImages(found.x.to(x.device), found.labels.to(x.device), found.note)
    return others, corruptions, digests


# ------------------------------------------------------------------------------------------------
# Models


# Copied from robust_kd.Ensemble
class Ensemble(nn.Module):
    """Several models as one, whose softmax is the weighted mean of their probabilities.

    Its logits (B, K) are log sum_i w_i p_i(x). weights: w_i, summing to 1 (None: all equal).
    """

    def __init__(self, models, weights=None):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.weights = weights or [1 / len(models)] * len(models)

    def forward(self, x):
        logs = []
        for weight, model in zip(self.weights, self.models):
            if weight > 0:
                # a copy for each net, which may normalise its images in place
                logs.append(math.log(weight) + model(x.clone()).float().log_softmax(1))
        return torch.stack(logs).logsumexp(0)


@torch.no_grad()
def clean_logits(model, x, labels, batch_size=500, classes=None, name="the model"):
    """Logits (N, K) of x; a UserError if they are none: shape, classes, values not finite."""
    if x.dtype != torch.uint8 and not (x.min() >= 0 and x.max() <= 1):
        raise common.UserError(f"images must be in [0, 1], got {x.min():.4g} to {x.max():.4g}")
    parts = []
    for part in x.split(batch_size):
        part = common.to_float(part)
        try:
            logits = model(part.clone())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a net of your own raises
            problem = f"{name} does not take images {tuple(part.shape)}"
            raise common.UserError(f"{problem}: {common.one_line(error)}") from None
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if len(shape) != 2 or shape[0] != len(part):
            raise common.UserError(f"{name} must return logits ({len(part)}, K), got {shape}")
        parts.append(logits.float())
    logits = torch.cat(parts)
    if classes is None:
        classes = max(int(labels.max()) + 1, logits.shape[1])
    if logits.shape[1] < 2:
        raise common.UserError(f"{name} returns one logit; expected one for each class, 2 or more")
    if logits.shape[1] != classes:
        wrong = f"{logits.shape[1]} logits, the data has {classes} classes"
        raise common.UserError(f"{name} returns {wrong}")
    common.check_finite(logits, f"images, by {name},")
    return logits


def is_probabilities(logits):
    """Whether rows (N, K) are nowhere negative and sum to 1, also those of half precision."""
    return bool(logits.min() > -1e-5 and (logits.sum(1) - 1).abs().max() < 1e-2)


def check_net(model, x, labels, classes, name, attacked=True):
    """A UserError unless a net returns logits and, if attacked, their gradient reaches the images.

    Its mode and its statistics stay as they are.
    """
    with common.evaluating(model):
        logits = clean_logits(model, x, labels, classes=classes, name=name)
        if is_probabilities(logits):
            raise common.UserError(
                f"{name}: returns probabilities; hand it over without its softmax"
            )
        images, subject = common.to_float(x[:8]).requires_grad_(), f"{name}: cannot be attacked"
        if attacked:  # the last images of an attack may stand alone in their batch
            clean_logits(model, x[:1], labels[:1], classes=classes, name=name)
        if attacked and not reaches_any(model, images, labels[:8], [images], subject):
            need = "which --plot, calibration and all attacks but square follow"
            raise common.UserError(f"{name}: no gradient reaches the images, {need}; {NO_GRADIENT}")


@torch.no_grad()
def check_weights_are_all(model, another, x, name):
    """A UserError if another net of the same function with the same weights answers otherwise.

    A checkpoint could not bring such a net back. One that answers itself otherwise each time, such
    as a defence by noise, is not looked at.
    """
    another.load_state_dict(model.state_dict())
    with common.evaluating(model), common.evaluating(another):
        first, second, others = (net(common.to_float(x)) for net in (model, model, another))
    if torch.equal(first, second) and (first - others).abs().max() > 1e-3 * first.abs().max():
        problem = "draws numbers that are not in its state_dict, so no checkpoint brings it back"
        raise common.UserError(f"{name}: {problem}; register them as buffers")


NO_GRADIENT = "its forward must do without no_grad, inference_mode, detach, numpy and whole numbers"


def reaches_any(model, x, labels, tensors, subject):
    """Whether a gradient of the cross-entropy reaches one of the tensors.

    subject: beginning of the error if it cannot be computed, the net with what needs the gradient.
    """
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), labels)
        if not loss.requires_grad:
            return False
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a net of your own raises
        problem = common.one_line(error)
        raise common.UserError(f"{subject} ({problem})") from None
    return any(gradient is not None for gradient in gradients)


def check_nets(args, data, teacher_dropout=0.0):
    """Try nets of MODULE:FUNCTION on a batch and read --teacher-ckpt, before anything is written.

    In eval mode such a net must return logits; one that is trained must have weights that a
    gradient reaches in training mode. -> the teacher of --teacher-ckpt, or None. Raises UserError.
    """
    size, channels = data.x_train.shape[2:]
    x, labels, classes = data.x_train[:8], data.y_train[:8], len(data.classes)
    trained = [(args.model, 0.0)]
    teacher = None
    if args.teacher_ckpt:
        teacher = common.given_teacher(args, data, teacher_dropout)
        name = teacher.build_arguments["name"]
        if ":" in name:
            attacked = getattr(args, "eval_attack", None) != ["clean"]
            check_net(teacher.to(x.device), x, labels, classes, name, attacked)
    else:
        trained.append((args.teacher_model, teacher_dropout))
    for name, dropout in trained:
        if ":" not in (name or ""):
            continue
        model = common.build_model(name, classes, dropout, channels, size).to(x.device)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if not weights:
            raise common.UserError(
                f"{name}: has no weights to train; a student needs some with requires_grad"
            )
        check_net(model.eval(), x, labels, classes, name)
        another = common.build_model(name, classes, dropout, channels, size).to(x.device)
        check_weights_are_all(model, another, x, name)
        images, subject = common.to_float(x), f"{name}: cannot be trained"
        if not reaches_any(model.train(), images, labels, weights, subject):
            raise common.UserError(f"{name}: no gradient reaches its weights; {NO_GRADIENT}")
    return teacher


def load_models(args, data, device):
    """-> {name of the row: model}, {file or words for it: digest of the weights}, from the flags.

    The digest is that of the net in memory: a function may load weights of its own.
    """
    models, functions = {}, [common.find_function("--model", name) for name in args.model]
    for name in functions:  # in one spelling: m:f and m:f() are one net
        if functions.count(name) > 1:
            raise common.UserError(f"--model {name}: expected each net once")
    for path in args.checkpoints:
        models[path] = common.load_model(path, data)
    of_checkpoints = [model.build_arguments["name"] for model in models.values()]
    functions = [name for name in functions if name not in of_checkpoints]
    if args.weights and len(functions) != 1:
        wanted = "goes with one --model that is not the net of a CKPT"
        raise common.UserError(f"--weights: {wanted}, got {len(functions)}")
    for name in functions:
        models[name] = common.build_model(name)
        if args.weights:
            common.load_weights("--weights", args.weights, models[name])
        models[name].to(device).eval()
    x, labels = data.x_test[:100], data.y_test[:100]
    for name, model in models.items():
        check_net(model, x, labels, len(data.classes), name, needs_gradient(args))
    checksums = {}
    for name, model in models.items():
        weights = model.state_dict() | dict(model.named_buffers())
        key = name if name in args.checkpoints else f"the weights of {name}"
        checksums[key] = common.state_digest(weights)
    if args.weights:
        checksums[args.weights] = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()[:16]
    if args.ensemble:
        models = {f"ensemble of {len(models)}": Ensemble([*models.values()]).eval()}
        print("ensemble: the attacks get the logarithm of the averaged probabilities as logits")
    return models, checksums


def needs_gradient(args):
    """Whether a number that is asked for comes from an attack that follows the gradient."""
    follows = set(args.attack) - set(NOT_ATTACKS) - {"square"}
    return bool(follows) or "calibration" in args.attack or args.plot is not None


def short_name(name, parts=2):
    """The last folder and the file of a path; another name stays as it is."""
    return "/".join(Path(name).parts[-parts:])


def short_names(names):
    """{name: its last parts}: at least two, and as many as tell all names apart."""
    for parts in range(2, 100):
        short = {name: short_name(name, parts) for name in names}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


# ------------------------------------------------------------------------------------------------
# How far an evaluation has come, kept on the disk


@dataclasses.dataclass
class Progress:
    """How far an attack has come on all images of a model."""

    broken_by: Tensor  # int32 (N,): 0 not broken, -1 wrong when clean, else the pass, from 1 on
    passes_done: int = 0
    seconds: dict = dataclasses.field(default_factory=dict)  # {attack: seconds}
    zero_gradients: int = 0
    not_finite: int = 0
    max_perturbation: float = 0.0  # norm of the largest one that broke an image

    def is_valid(self):
        """Whether the fields that come from a file are what they should be."""
        numbers = (self.passes_done, self.zero_gradients, self.not_finite)
        tensor = isinstance(self.broken_by, Tensor) and self.broken_by.dtype == torch.int32
        return (
            tensor
            and self.broken_by.dim() == 1
            and common.is_plain(self.broken_by)
            and all(isinstance(number, int) and number >= 0 for number in numbers)
            and all(isinstance(number, float) for number in self.seconds.values())
            and isinstance(self.max_perturbation, float)
        )


class State:
    """How far an evaluation has come: with a folder it is kept there, and a killed one goes on.

    <folder>/state.pt holds the flags and the progress after each pass, and after each corruption. A
    file that is damaged is reported, and the evaluation begins again.
    """

    def __init__(self, folder=None, flags=None):
        self.folder, self.flags = folder, flags
        self.attacks = {}  # {name of the row and of the attack: Progress}
        self.corruptions = {}  # {name of the row: counts of corruption_accuracy}
        if folder is None or not (folder / "state.pt").exists():
            return
        try:
            record = common.load(folder / "state.pt")
        except common.UserError as error:
            problem = str(error).split(";")[0]  # without its advice
            print(f"{problem}; the evaluation begins again", flush=True)
            return
        self.take(record)
        print(f"goes on from {folder}", flush=True)

    def take(self, record):
        """Go on from what a file says; a UserError if it is malformed or of other flags."""
        try:
            flags, corruptions = dict(record["flags"]), dict(record["corruptions"])
            attacks = {key: Progress(**fields) for key, fields in record["attacks"].items()}
            valid = all(progress.is_valid() for progress in attacks.values())
            valid = valid and all(isinstance(name, str) for name in flags)
            for counts in corruptions.values():
                for name, results in counts.items():
                    shape = torch.tensor(results).shape
                    valid = valid and name in CORRUPTIONS and shape == (5, 2)
            if not valid:
                raise ValueError
            compare_flags(self.folder, flags, self.flags)
        except common.MALFORMED:
            wrong = "not the state of an evaluation; delete it to begin again"
            raise common.UserError(f"{self.folder}: {wrong}") from None
        self.attacks, self.corruptions = attacks, corruptions

    def save(self):
        """Put the state on the disk, atomically."""
        if self.folder is not None:
            attacks = {key: dataclasses.asdict(p) for key, p in self.attacks.items()}
            record = {"flags": self.flags, "attacks": attacks, "corruptions": self.corruptions}
            common.save(self.folder / "state.pt", record)


def compare_flags(path, old, new):
    """A UserError that names the first flag in which two dicts differ."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            difference = f"{key}: {path} was made with {old.get(key)}, not {new.get(key)}"
            raise common.UserError(f"{difference}; take another --json, or delete it")


@contextlib.contextmanager
def state_folder(result):
    """Yield the folder <result>.state, which no other evaluation can use meanwhile.

    It is removed afterwards unless it holds the progress of an evaluation that was stopped.
    """
    folder = Path(f"{result}.state")
    with common.locked(folder):
        for torn in folder.parent.glob(f".{glob.escape(Path(result).name)}.*.tmp"):
            torn.unlink(missing_ok=True)  # the result itself, half written by a killed process
        try:
            yield folder
        finally:
            if not (folder / "state.pt").exists():
                (folder / "lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it holds something of the user's
                    folder.rmdir()


# ------------------------------------------------------------------------------------------------
# The evaluation of one model


def evaluate(
    model, x, labels, attacks, eps=8 / 255, step_size=None, restarts=1, seed=0, **settings
):
    """{"clean_acc": ..., "pgd20_acc": ...} of a model, which is used in eval mode and float32.

    x uint8 (N, H, W, C), or float (N, C, H, W) in [0, 1]; labels: whole numbers (N,) or (N, 1);
    attacks: a list of `clean` and attacks, see Attacks above; step_size: None for eps / 4;
    settings: the other fields of Settings. What the command prints as warnings is given to
    `warnings.warn`. Raises UserError.
    """
    settings = Settings(eps, step_size, restarts, seed, **settings)
    check_settings(settings)
    check_attacks(attacks)
    check_arguments(model, x)
    labels = check_labels(labels, x)
    # the caller may have switched off gradients for good, or float32 off
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
        row = measure(with_contiguous_images(model), x.clone(), labels.clone(), attacks, settings)
    for line in row["warnings"]:
        warnings.warn(line, stacklevel=2)
    accuracies = {}
    for key, value in row.items():
        if key.endswith("_acc") and "conditional" not in key:
            accuracies[key] = value
    return accuracies


def with_contiguous_images(model):
    """The net, given contiguous images: ours are channels_last, which `.view` does not expect."""
    if isinstance(model, common.ConvNet | common.MLP):
        return model
    net = torch.nn.Sequential(model)  # a hook on the caller's own net would stay there
    net.training = model.training
    common.give_contiguous_images(net)
    return net


def check_arguments(model, x):
    """A UserError unless the model is a net and x a batch of images as `evaluate` wants them."""
    if not isinstance(model, torch.nn.Module):
        raise common.UserError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    expected = "x: expected a tensor, uint8 (N, H, W, C) or floats (N, C, H, W)"
    if not isinstance(x, torch.Tensor):
        raise common.UserError(f"{expected}, got {type(x).__name__}")
    is_float = x.is_floating_point()
    if x.dim() != 4 or not is_float and (x.dtype != torch.uint8 or x.shape[3] not in (1, 3)):
        raise common.UserError(f"{expected}, got {x.dtype} {tuple(x.shape)}")
    if is_float and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        raise common.UserError(
            f"{expected}, got floats {tuple(x.shape)}; try x.permute(0, 3, 1, 2)"
        )


def check_settings(settings):
    """A UserError for a radius or a step that is not in pixel units, or a number below 1.

    Afterwards both are floats, whatever numbers they were before.
    """
    for name, example in (("eps", "8/255"), ("step_size", "2/255")):
        value = getattr(settings, name)
        if name == "step_size" and value is None:
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            wanted = f"a number in pixel units between 0 and 1, like {example}"
            raise common.UserError(f"{name}: expected {wanted}, got {value!r}")
        if name == "step_size" and value == 0 and settings.eps > 0:
            raise common.UserError("step_size: 0 attacks nothing; None takes a quarter of eps")
        setattr(settings, name, float(value))
    for name in ("restarts", "batch_size", "steps", "queries", "targets"):
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise common.UserError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_attacks(attacks, name_of_list="attacks"):
    """A UserError if `attacks` is no list of different names that `evaluate` can measure."""
    words = ", ".join(["clean", "pgdN such as pgd20", *IN_TURN, *ATTACKS])
    expected = f"{name_of_list}: expected a list of {words}"
    if not isinstance(attacks, list | tuple) or not attacks:
        raise common.UserError(f"{expected}; got {attacks!r}")
    for name in attacks:
        if name in NOT_ATTACKS and name != "clean":
            raise common.UserError(f"{expected}; {name} is measured by the command alone")
        try:
            attack_name(name)
        except (argparse.ArgumentTypeError, AttributeError, TypeError):
            raise common.UserError(f"{expected}; got {name!r}") from None
        if attacks.count(name) > 1:
            raise common.UserError(f"{expected}, each once; got {name!r} twice")


def check_labels(labels, x):
    """Labels (N,) or (N, 1) of any integer type as int64 (N,), on the device of x (N, ...)."""
    try:
        labels = torch.as_tensor(labels, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise common.UserError(
            f"labels: expected whole numbers; {common.one_line(error)}"
        ) from None
    got = f"got {labels.dtype} {tuple(labels.shape)}"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise common.UserError(f"labels: expected whole numbers, {got}; convert them with .long()")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(x),) or len(x) == 0:
        raise common.UserError(f"labels: expected one for each of the {len(x)} images, {got}")
    labels = labels.long()
    if labels.min() < 0:
        number = int(labels.argmin())
        raise common.UserError(
            f"labels: expected 0 to K-1, got {int(labels[number])} for image {number}"
        )
    return labels


def measure(model, x, labels, attacks, settings, classes=None, state=None, name=""):
    """As `evaluate`, but a whole row of the JSON, with the reports of the attacks and warnings.

    classes: how many there must be (None: as many as the model has); state: where the progress is
    kept; name: of the model, for the lines on the terminal (empty: none are printed).
    """
    state = state or State()
    row, reports, lines = {}, {}, []
    with common.evaluating(model):
        logits = clean_logits(model, x, labels, settings.batch_size, classes)
        if set(attacks) != {"clean"}:  # the last images of an attack may stand alone in their batch
            clean_logits(model, x[:1], labels[:1], classes=logits.shape[1])
        images = Images(x, labels, logits)
        lines += model_warnings(model, images, settings)
        for attack in attacks:
            if attack == "clean":
                row["clean_acc"] = common.accuracy(logits, labels)
            elif attack == "calibration":
                logits_adv, counts = attacked_logits(model, images, "pgd20", settings)
                lines += gradient_warnings(["pgd20 of the calibration"], *counts)
                row["calibration"] = {
                    "clean": calibration(logits, labels),
                    "pgd20": calibration(logits_adv, labels),
                }
            elif attack not in NOT_ATTACKS:
                progress = run_attack(model, images, attack, settings, state, name)
                plan = passes(attack, logits.shape[1], settings)
                reports[attack] = report = attack_report(progress, plan)
                field = attack.replace("-", "_")
                row[f"{field}_acc"] = report["stages"][-1]["robust_acc"]
                row[f"{field}_conditional_acc"] = report["stages"][-1]["conditional_acc"]
                lines += attack_warnings(progress, report, logits.shape[1])
    gap = row.get("pgd20_acc", 0) - row.get("aa_acc", 1)
    if gap > 0.06:
        points = f"PGD-20 is {100 * gap:.1f} points above AutoAttack"
        lines.append(f"{points}: gradients may be masked")
    row["n"] = len(x)
    row["seconds"] = sum(stage["seconds"] for r in reports.values() for stage in r["stages"])
    row["reports"], row["warnings"] = reports, lines
    return row


def run_attack(model, images, name, settings, state=None, model_name=""):
    """Run the passes of `name` on the images that are still right -> Progress, saved after each.

    A pass takes all images that are not broken yet, in batches. An image is broken when the model
    itself, in strict float32, misclassifies an allowed example.
    """
    state = state or State()
    correct = (images.logits.argmax(1) == images.labels).cpu()
    new = Progress(broken_by=correct.int() - 1)
    progress = state.attacks.setdefault(f"{model_name} {name}", new)
    if len(progress.broken_by) != len(images.x):
        wrong = "not the state of these images; delete it to begin again"
        raise common.UserError(f"{state.folder}: {wrong}")
    plan = passes(name, images.logits.shape[1], settings)
    for number in range(progress.passes_done + 1, len(plan) + 1):
        attack, repeat = plan[number - 1]
        began, images_done, text = time.monotonic(), 0, None
        broken_by = progress.broken_by.clone()
        seconds_before = progress.seconds.get(attack, 0.0)
        to_do = (broken_by == 0).nonzero()[:, 0]
        for index, batch in batches(images, to_do, settings, attack, repeat):
            x_adv, broken = search(model, batch)
            newly_broken = index[broken.cpu()]
            broken_by[newly_broken] = number
            if len(newly_broken):
                largest = norm_of(x_adv[broken] - batch.x[broken]).max().item()
                progress.max_perturbation = max(progress.max_perturbation, largest)
            progress.zero_gradients += int(batch.zero_gradients)
            progress.not_finite += int(batch.not_finite)
            images_done += len(index)
            seconds = seconds_before + time.monotonic() - began
            left = (broken_by == 0).double().mean()
            done = f"pass {number} of {len(plan)}, image {images_done} of {len(to_do)}"
            text = f"{short_name(model_name)}: {attack}, {done}, {left:.4f} left, {seconds:,.0f} s"
            if model_name:
                common.print_line(text, live=True)
        progress.broken_by, progress.passes_done = broken_by, number
        progress.seconds[attack] = seconds_before + time.monotonic() - began
        state.save()
        last_of_attack = number == len(plan) or plan[number].attack != attack
        if model_name and text is not None and last_of_attack:
            common.print_line(text)
    return progress


@torch.no_grad()
def search(model, batch, tf32=True):
    """-> x_adv (B, C, H, W) of batch.attack, and bool (B,): the model itself is wrong there.

    On CUDA AutoAttack searches in TF32, and what counts is confirmed in strict float32. Where
    float32 does not confirm what the search has stopped at, it is done again in float32.
    """
    tf32 = tf32 and batch.attack in ATTACKS
    attack = ATTACKS.get(batch.attack, pgd)
    with common.strict_float32(tf32):
        x_adv = attack(model, batch)
    allowed = is_allowed(x_adv, batch.x, batch.settings.eps)
    logits = model(x_adv.clone()).float()
    batch.count(logits)
    wrong = misclassified(logits, batch.labels)
    if tf32:
        moved = (x_adv != batch.x).flatten(1).any(1)
        unconfirmed = (moved & allowed & ~wrong).nonzero()[:, 0]
        if len(unconfirmed):
            again = dataclasses.replace(
                batch,
                x=batch.x[unconfirmed],
                labels=batch.labels[unconfirmed],
                logits=batch.logits[unconfirmed],
                index=batch.index[unconfirmed.cpu()],
            )
            x_adv[unconfirmed], wrong[unconfirmed] = search(model, again, tf32=False)
    return x_adv, allowed & wrong


def attacked_logits(model, images, attack, settings):
    """-> logits (N, K) under a pgdN, of all images: also of those that are wrong when clean.

    And how many starts have a zero gradient, how many evaluations numbers that are not finite.
    """
    parts, zero_gradients, not_finite = [], 0, 0
    every = torch.arange(len(images.x), device="cpu")  # whatever the default device is
    for _, batch in batches(images, every, settings, attack):
        parts.append(model(pgd(model, batch)).detach().float())
        batch.count(parts[-1])
        zero_gradients += int(batch.zero_gradients)
        not_finite += int(batch.not_finite)
    return torch.cat(parts), (zero_gradients, not_finite)


def attack_report(progress, plan):
    """What the JSON says of an attack: its stages, how many images it broke, how far it went."""
    broken_by, stages = progress.broken_by, []
    correct_clean = int((broken_by >= 0).sum())
    last_pass = {attack: number for number, (attack, _) in enumerate(plan, 1)}
    for attack, last in last_pass.items():
        robust = int(((broken_by == 0) | (broken_by > last)).sum())
        stages.append(
            {
                "attack": attack,
                "robust_acc": robust / len(broken_by),
                "conditional_acc": robust / max(correct_clean, 1),
                "seconds": progress.seconds.get(attack, 0.0),
            }
        )
    return {
        "stages": stages,
        "broken": int((broken_by > 0).sum()),
        "max_perturbation": progress.max_perturbation,
    }


def model_warnings(model, images, settings):
    """Lines on a model whose numbers mislead: probabilities, random or batch-dependent logits."""
    lines = []
    if is_probabilities(images.logits):
        lines.append("the model seems to return probabilities: the attacks need logits")
    elif images.logits.min() >= 0 and images.logits.max() <= 1:
        lines.append("all logits lie between 0 and 1: hand a net over without its sigmoid")
    x = common.to_float(images.x[: max(settings.batch_size, 2)])
    calls = torch.stack([F.normalize(model(x.clone()).detach().float()) for _ in range(5)])
    randomised = (calls - calls[:1]).norm(dim=2).max() > 1e-4
    if randomised:
        advice = "AutoAttack's version `rand` (pip install pyautoattack) averages gradients"
        lines.append(f"the model is randomised: its robustness is overstated; {advice}")
    # the first half again, in a batch in reverse order whose other images are inverted
    half = (len(x) + 1) // 2
    batch = torch.cat([x[:half], 1 - x[half:]]).flip(0)
    again = F.normalize(model(batch).detach().float()).flip(0)[:half]
    if not randomised and (again - calls[0, :half]).norm(dim=1).max() > 1e-4:
        lines.append(
            "the logits of an image depend on the other images of its batch (is BatchNorm in "
            "training mode?): all numbers change with the batch size"
        )
    return lines


def attack_warnings(progress, report, classes):
    """Lines on an attack that may be weaker than it looks."""
    lines = []
    attacks = [stage["attack"] for stage in report["stages"]]
    for before, stage in itertools.pairwise(report["stages"]):
        if stage["attack"] == "square" and before["robust_acc"] - stage["robust_acc"] > 0.002:
            lower = f"{before['robust_acc']:.4f} to {stage['robust_acc']:.4f} without gradients"
            lines.append(f"Square goes from {lower}: they may be masked; try an adaptive attack")
    if classes < 4 and "apgd-t" in attacks:
        lines.append(f"apgd-t: DLR needs 4 classes; with {classes} its numerator is used")
    return lines + gradient_warnings(attacks, progress.zero_gradients, progress.not_finite)


def gradient_warnings(attacks, zero_gradients, not_finite):
    """Lines on gradients that are zero, and on gradients and logits that are not finite.

    attacks: a list of their names; zero_gradients, not_finite: the counts of Batch.
    """
    lines = []
    follow_gradients = ", ".join(name for name in attacks if name != "square")
    if zero_gradients:
        plural = "" if zero_gradients == 1 else "s"
        starts = f"zero gradient at {zero_gradients} starting point{plural}"
        masked = f"gradients are masked, {follow_gradients} may overestimate the robustness"
        lines.append(f"{starts}: {masked}")
    if not_finite:
        evaluations = f"logits or gradients that are not finite at {not_finite} evaluations"
        lines.append(f"{evaluations}: {', '.join(attacks)} may overestimate the robustness")
    return lines


def calibration(logits, labels, bins=15):
    """nll, ece, entropy (nats) and two histograms (bins,) of logits (N, K) and labels (N,).

    confidence: of the largest probability, in bins ](i - 1) / bins, i / bins] (Guo et al. 2017, Eq.
    3); probabilities: of those of all classes (Figure 8 of the noisy collaboration paper).
    """
    log_probs = logits.double().log_softmax(1)
    confidence, predicted = log_probs.exp().max(1)

    def in_bin(probs):  # (N,) -> one-hot (N, bins)
        return F.one_hot((probs * bins).ceil().long().clamp(1, bins) - 1, bins).double()

    confidence_bin = in_bin(confidence)
    gap = (predicted == labels).double() - confidence
    of_class = [in_bin(probs).mean(0) for probs in log_probs.exp().T]
    return {
        "nll": F.nll_loss(log_probs, labels).item(),
        "entropy": -(log_probs.exp() * log_probs).nan_to_num(0).sum(1).mean().item(),
        "ece": (gap @ confidence_bin).abs().sum().item() / len(labels),
        "confidence": confidence_bin.mean(0).tolist(),
        "probabilities": (sum(of_class) / len(of_class)).tolist(),
    }


def accuracy_curve(model, x, labels, settings):
    """[(eps, accuracy)] under APGD-CE of 20 iterations, from eps 0 to where all are broken.

    And the counts of attacked_logits, over all radii.
    """
    zero_gradients = not_finite = 0
    factors = [0.25, 0.5, 0.75, 1]
    for doublings in range(11):
        factors += [1.5 * 2**doublings, 2 * 2**doublings]
    with common.evaluating(model), torch.no_grad():
        images = Images(x, labels, clean_logits(model, x, labels, settings.batch_size))
        robust = (images.logits.argmax(1) == labels).cpu()
        curve = [(0.0, robust.double().mean().item())]
        for factor in factors:
            if not robust.any() or curve[-1][0] >= 1 or settings.eps == 0:
                break
            eps = min(factor * settings.eps, 1.0)
            now = dataclasses.replace(settings, eps=eps, steps=20)
            for index, batch in batches(images, robust.nonzero()[:, 0], now, "curve"):
                x_adv = apgd_ce(model, batch)
                logits = model(x_adv).float()
                batch.count(logits)
                robust[index] = ~misclassified(logits, batch.labels).cpu()
                zero_gradients += int(batch.zero_gradients)
                not_finite += int(batch.not_finite)
            curve.append((eps, robust.double().mean().item()))
    return curve, (zero_gradients, not_finite)


# ------------------------------------------------------------------------------------------------
# For the training scripts


def summary_rows(nets, data, folder, attacks, **settings):
    """Evaluate the nets of a run on the test images -> the rows of its summary.

    nets: {role: (label, net)}, a role being student, best, teacher or alone; attacks and settings:
    as for `evaluate`. A row has net (the role), model (the label), the accuracies, X_acc and
    X_conditional_acc for each attack X, epochs, seconds and file.
    """
    rows = []
    for role, (label, net) in nets.items():
        print(f"evaluating {label} on {len(data.x_test)} test images", flush=True)
        accuracies = None
        if common.rank() == 0:
            measured = measure(net, data.x_test, data.y_test, attacks, Settings(**settings))
            for line in measured["warnings"]:
                print(f"warning: {label}: {line}", flush=True)
            accuracies = {key: value for key, value in measured.items() if key.endswith("_acc")}
        accuracies = common.from_first_process(accuracies)
        row = {"net": role, "model": label} | accuracies
        rows.append(row | common.training_columns(net, folder))
    return rows


# ------------------------------------------------------------------------------------------------
# The whole job


# Flags that change no number, but by rounding: an evaluation may go on with others
FREE_FLAGS = {"json", "data_root", "device", "batch_size", "command", "plot"}


def main(argv=None):
    """Evaluate every model, write the files that are asked for, print the tables."""
    args = parse_args(argv)
    if common.world() > 1:
        raise common.UserError("one process evaluates; start it without torchrun")
    record = make_or_find_record(args)
    if args.plot:  # also of a record that is finished, whose figure may be missing
        with common.drawing(args.plot):
            plot(args.plot, record)
    print(format_record(record))  # last: perhaps nobody reads it


def make_or_find_record(args):
    """-> the record of --json, after its file is written; goes on where a killed run stopped."""
    for path in args.checkpoints:
        common.check_first_bytes(path)  # before any data are fetched
    device = common.find_device(args.device)
    data = common.load_data(args.data, args.data_root, device, test_subset=args.n)
    others, corruptions, digests = read_other_images(args, data)
    models, checksums = load_models(args, data, device)
    flags = {"the images and labels of --data": data.fingerprint} | digests | checksums
    for name, value in vars(args).items():
        if name not in FREE_FLAGS:
            flags[f"--{name.replace('_', '-')}"] = value
    flags["--plot"] = args.plot and "a figure"  # any name: the record holds what is drawn
    if args.json is None:
        return make_record(args, data, others, corruptions, models, flags, State())
    with state_folder(args.json) as folder:
        record = finished_record(args.json, flags)
        if record is not None:
            print(f"{args.json} is finished")
        else:
            state = State(folder, flags)
            record = make_record(args, data, others, corruptions, models, flags, state)
            common.write_json(Path(args.json), record)
        (folder / "state.pt").unlink(missing_ok=True)
    return record


def finished_record(path, flags):
    """The record in the file of --json; None if there is none; a UserError if it is another one."""
    if not Path(path).is_file():
        return None
    try:
        record = json.loads(Path(path).read_text())
        compare_flags(path, record["flags"], flags)
        format_record(record)
    except (*common.MALFORMED, RecursionError):
        raise common.UserError(
            f"--json: {path} is there and holds something else; take another"
        ) from None
    return record


def make_record(args, data, others, corruptions, models, flags, state):
    """-> the record of --json: the rows of all models, and how they were made."""
    settings = Settings(args.eps, args.step_size, args.restarts, args.seed, args.batch_size)
    x, labels, rows = data.x_test, data.y_test, []
    for name, model in models.items():
        row = {"model": name}
        row |= measure(model, x, labels, args.attack, settings, len(data.classes), state, name)
        if "corruptions" in args.attack:
            summary = corruption_accuracy(
                model,
                x,
                labels,
                corruptions,
                batch_size=args.batch_size,
                counts=state.corruptions.setdefault(name, {}),
                save=state.save,
            )
            for key in ("mean15_acc", "mean18_acc", "mean19_acc", "mca_acc"):
                row[key] = summary[key]
            row["corruptions"] = summary | {"note": f"images of {args.corruptions}"}
        for other, images in others.items():
            logits = common.predict(
                model, images.x, batch_size=args.batch_size, what=f"images of --{other}"
            )
            row[f"{other}_acc"] = common.accuracy(logits, images.labels)
            row[f"{other}_note"] = images.note
        if args.plot:
            row["curve"], counts = accuracy_curve(model, x, labels, settings)
            row["warnings"] += gradient_warnings(["apgd-ce of the curve"], *counts)
        rows.append(row)
    return {
        "command": args.command,
        "flags": flags,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if x.is_cuda else None,
        "data": data.name,
        "n": len(x),
        "precision": "float32",
        "eps": args.eps,
        "step_size": args.step_size,
        "logits": "log of the averaged probabilities" if args.ensemble else "of the model",
        "rows": rows,
    }


def format_record(record):
    """The record as text: tables of the models, of their attacks, of their calibration, notes."""
    eps, step = f"{255 * record['eps']:.4g}/255", f"{255 * record['step_size']:.4g}/255"
    attack = f"linf eps {eps}, PGD step {step}"
    lines = [f"{record['data']}, {record['n']} test images, {attack}, float32"]
    models, stages, attacks, calibrations = [], [], [], []
    names = short_names([row["model"] for row in record["rows"]])
    for row in record["rows"]:
        name = names[row["model"]]
        models.append({k: v for k, v in row.items() if not isinstance(v, list | dict)})
        for version, report in row["reports"].items():
            stages += [{"model": name, "in": version} | stage for stage in report["stages"]]
            largest = f"{report['max_perturbation']:.7f}"
            numbers = {"broken": report["broken"], "largest": largest}
            attacks.append({"model": name, "attack": version} | numbers)
        for kind, numbers in row.get("calibration", {}).items():
            cells = {k: f"{v:.4f}" for k, v in numbers.items() if not isinstance(v, list)}
            calibrations.append({"model": name, "images": kind} | cells)
    for table in (models, stages, attacks, calibrations):
        if table:
            lines.append("\n" + common.table(table))
    for row in record["rows"]:
        if "corruptions" in row:
            summary = row["corruptions"]
            lines.append(f"\n{row['model']}: {summary['note']}")
            lines.append(common.table(corruption_rows(summary)))
    for row in record["rows"]:
        lines += [f"{row['model']}: warning: {warning}" for warning in row["warnings"]]
    return "\n".join(lines)


def plot(path, record):
    """Write a figure: accuracy against eps, the two histograms of calibration, corruptions.

    The histogram of the probabilities of all classes is Figure 8 of the noisy collaboration paper.
    """
    names = short_names([row["model"] for row in record["rows"]])
    rows = {names[row["model"]]: row for row in record["rows"]}
    calibrated = {name: row["calibration"] for name, row in rows.items() if "calibration" in row}
    corrupted = {name: row["corruptions"] for name, row in rows.items() if "corruptions" in row}
    panels = 1 + (2 if calibrated else 0) + len(corrupted)
    figure = common.new_figure(5 * panels, 4.5)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    axis = axes.pop(0)
    for name, row in rows.items():
        eps, accuracy = np.array(row["curve"]).T
        axis.plot(255 * eps, accuracy, marker=".", label=name)
    axis.set(xlabel="255 eps", ylabel="accuracy (always APGD-CE, 20 steps)")
    axis.legend(fontsize=7)
    if calibrated:
        histograms = {
            "confidence": "largest probability of an image",
            "probabilities": "probability of any class",
        }
        for key, xlabel in histograms.items():
            axis = axes.pop(0)
            for name, kinds in calibrated.items():
                for kind, numbers in kinds.items():
                    edges = np.linspace(0, 1, len(numbers[key]) + 1)
                    axis.stairs(numbers[key], edges, label=f"{name}, {kind}")
            axis.set(xlabel=xlabel, ylabel="share", yscale="log")
            axis.legend(fontsize=7)
    for name, summary in corrupted.items():
        axis, table = axes.pop(0), summary["corruptions_acc"]
        image = axis.imshow(list(table.values()), vmin=0, vmax=1, aspect="auto")
        figure.colorbar(image)
        axis.set(title=f"{name}: accuracy", xlabel="severity", xticks=range(5))
        axis.set(xticklabels=range(1, 6), yticks=range(len(table)))
        axis.set_yticklabels(table, fontsize=6)
    kind = file_format(path)
    common.write_atomically(Path(path), lambda file: figure.savefig(file, format=kind, dpi=150))


if __name__ == "__main__":
    kept = "with --json finished passes are kept, and the same command goes on:"
    common.start(main, stopped=kept)
