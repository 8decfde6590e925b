"""Evaluate checkpoints: clean, PGD, AutoAttack, corruptions, other images, calibration; fp32.

Paper    PGD: Madry et al. 2018. APGD, DLR, AutoAttack: Croce and Hein, ICML 2020 (2003.01690).
         FAB: Croce and Hein, ICML 2020 (1907.02044). Square: Andriushchenko et al., ECCV 2020
         (1912.00049). ECE: Guo et al. 2017. Corruptions: Hendrycks and Dietterich, ICLR 2019.
Attacks  pgdN              N steps of size --step-size from --restarts uniform starts
         aa                AutoAttack, standard: apgd-ce+apgd-t+fab-t+square
         aa-plus, aa-rand  its longer version; that for models that draw random numbers
         A+B:5+...         your own list of pgdN and ATTACKS, here with five restarts of B
Usage    python eval_robustness.py CKPT CKPT --attack clean pgd20 aa --json a.json
         python eval_robustness.py CKPT CKPT --ensemble --attack clean aa --n 1000
         python eval_robustness.py --model package.module:function --weights FILE --attack aa
         python eval_robustness.py CKPT --attack corruptions calibration cinic --cinic DIR
         With --json the same command goes on where a killed one stopped.
Shapes   x uint8 (N, H, W, C); batches float32 (B, C, H, W) in [0, 1]; labels (N,); logits (B, K)
Numbers  X_acc: share of all N images that are right when clean and that no attack of X breaks;
         X_conditional_acc: the same of those right when clean. An image is broken if the stored
         float32 example, in the ball and in [0, 1], is classified wrong by the model itself.
Differs  1. Draws depend on (seed, attack, pass, image) alone; all images share Square's squares.
         2. Broken images leave a run at the next compaction; FAB stops at a norm of eps.
         3. With fewer than 3 (targeted: 4) classes the numerator of DLR is used.
         4. Logits that are not finite are no success; the authors' code counts them as one.
"""

import argparse
import contextlib
import dataclasses
import functools
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
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
import images

VERSIONS = {
    "aa": "apgd-ce+apgd-t+fab-t+square",
    "aa-plus": "apgd-ce:5+apgd-dlr:5+fab:5+square+apgd-t+fab-t",
    "aa-rand": "apgd-ce+apgd-dlr",  # with 20 gradients a step
}
POINTS = ["clean", "calibration", "corruptions", "cinic", "ood"]  # these perturb no images


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="files written by the training scripts")
    add("--model", metavar="MODULE:FUNCTION", help="makes a net from [0, 1] images to logits")
    add("--weights", metavar="FILE", help="state_dict for --model, loaded as weights only")
    add("--ensemble", action="store_true", help="one row: the average of their probabilities")
    add = parser.add_argument_group("attack").add_argument
    add("--attack", nargs="+", type=attack_name, default=["clean", "pgd20"], help="see Attacks")
    add("--norm", default="linf", choices=["linf", "l2"], help="of the perturbations")
    add("--eps", type=common.fraction, help="radius; None: 8/255, or 0.5 with --norm l2")
    add("--step-size", type=common.fraction, help="of PGD; None: a quarter of the radius")
    add("--restarts", type=common.count, default=1, help="random starts of PGD, the worst counts")
    add("--steps", type=common.count, default=100, help="iterations of APGD and FAB")
    add("--queries", type=common.count, default=5000, help="queries of Square")
    add("--targets", type=common.count, default=9, help="classes of targeted APGD and FAB")
    add("--search", choices=["tf32", "fp32"], default="tf32", help="of aa on CUDA, not the verdict")
    add = parser.add_argument_group("other images").add_argument
    add("--corruptions", default="generate", metavar="DIR", help="CIFAR-10-C; generate: made here")
    add("--frost-dir", metavar="DIR", help="frost1.png ... of its generator; None: drawn by code")
    add("--cinic", metavar="DIR", help="CINIC-10, of which the images from ImageNet count")
    add("--cinic-per-class", type=common.count, help="a fixed choice (paper: 2100); None: all")
    add("--ood", metavar="PATH", help="an .npz or a folder of class folders, for --attack ood")
    add = parser.add_argument_group("run").add_argument
    add("--data", default="cifar10", help="cifar10, cifar100, mnist, shapes, FILE.npz or a FOLDER")
    add("--data-root", default="data", help="where data sets are, and missing ones are downloaded")
    add("--n", type=common.count, help="use so many test images (a fixed choice); None: all")
    add("--batch-size", type=common.count, default=500, help="images at once; changes no result")
    add("--seed", type=common.count0, default=0, help="seed of the attacks")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    add("--json", metavar="FILE", help="write all numbers here as well")
    add("--save-examples", metavar="FILE", help=".npz of x_adv, labels, broken (one model, attack)")
    add("--plot", metavar="FILE", help="figure: accuracy against eps, confidence histograms")
    args = parser.parse_args(argv)
    adversarial = [a for a in args.attack if a not in POINTS]
    rows = 1 if args.ensemble else len(args.checkpoints) + bool(args.model)
    if not args.checkpoints and not args.model or args.weights and not args.model:
        parser.error("expected CKPT..., or --model MODULE:FUNCTION, perhaps with --weights FILE")
    for name in {"cinic", "ood"} & set(args.attack):
        if getattr(args, name) is None:
            parser.error(f"--attack {name}: say where the images are, with --{name}")
    if args.norm == "l2" and any(re.match(r"pgd|.*\+pgd", a) for a in adversarial):
        parser.error("--norm l2: pgdN is an L-infinity attack; take apgd-ce")
    if args.norm == "linf" and (args.eps or 0) > 1:
        parser.error(f"--eps: expected at most 1 in L-infinity, got {args.eps:g}")
    if args.save_examples and (rows, len(adversarial)) != (1, 1):
        parser.error("--save-examples: goes with one model (or --ensemble) and one attack")
    if args.plot and not all(map(importlib.util.find_spec, ("matplotlib", "benchmark"))):
        parser.error("--plot: needs matplotlib (pip install matplotlib) and the folder benchmark/")
    for path in filter(None, (args.json, args.save_examples, args.plot)):
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            parser.error(f"{path}: expected a file, in a folder that is there")
    args.eps = args.eps if args.eps is not None else {"linf": 8 / 255, "l2": 0.5}[args.norm]
    args.step_size = args.eps / 4 if args.step_size is None else args.step_size
    args.deterministic, argv = False, sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", os.path.relpath(__file__), *argv])
    return args


def attack_name(text):
    """The `type=` of --attack: a name of POINTS or VERSIONS, or a list joined by +."""
    known = rf"({'|'.join(ATTACKS)}|pgd[1-9]\d{{0,4}})(:[1-9]\d?)?"
    parts = VERSIONS.get(text, text).split("+")
    if text not in POINTS and not all(re.fullmatch(known, part) for part in parts):
        names = ", ".join([*POINTS, "pgdN", *VERSIONS, *ATTACKS])
        raise argparse.ArgumentTypeError(f"expected {names} or a list a+b:5, got {text!r}")
    return text


@dataclasses.dataclass
class Settings:
    """What the attacks need to know; eps and step_size (None: eps / 4) in units of [0, 1]."""

    eps: float = 8 / 255
    step_size: float | None = None  # of PGD, as restarts
    restarts: int = 1
    seed: int = 0
    batch_size: int = 500
    norm: str = "linf"
    steps: int = 100
    queries: int = 5000
    targets: int = 9
    search: str = "tf32"  # of AutoAttack's attacks on CUDA; verdicts are in float32
    eot: int = 1  # gradients averaged in a step of APGD


@dataclasses.dataclass
class Batch:
    """Images that an attack works on. x (B, C, H, W), labels (B,), clean logits (B, K)."""

    x: Tensor
    labels: Tensor
    logits: Tensor
    index: Tensor  # (B,) of the images in the data set
    s: Settings
    attack: str
    which: int = 0  # the number of the restart or target
    zero: Tensor | int = 0  # out: starts without gradient
    bad: Tensor | int = 0  # out: evaluations with logits that are not finite

    def draw(self, *shape, use="start"):
        """Uniform (B, *shape) in [0, 1], by seed, attack, pass, use and image alone."""
        draw = images.uniform(self.index, self.attack, use, self.s.seed, self.which)
        return draw(*shape).float()

    def target(self):
        """The class (B,) with the (which + 2)-nd largest clean logit, the label counted as 1st."""
        first = torch.full_like(self.logits[:, :1], math.inf)
        ranked = self.logits.scatter(1, self.labels[:, None], first).argsort(1, descending=True)
        return ranked[:, 1 + self.which % (self.logits.shape[1] - 1)]


def batches(points, index, s, attack="", which=0):
    """Yield (part, Batch) over the images `index` of points = (x, labels, logits)."""
    x, labels, logits = points
    for part in index.split(s.batch_size) if len(index) else ():
        given = common.to_float(x[part]), labels[part], logits[part], part.to(x.device)
        yield part, Batch(*given, s, attack, which)


def misclassified(logits, labels):
    """bool (B,): another class is on top. Logits (B, K) that are not finite are no success."""
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


def length(d, norm):
    """The norm of each d (B, C, H, W): (B, 1, 1, 1)."""
    if norm == "linf":
        return d.abs().amax((1, 2, 3), keepdim=True)
    return d.square().sum((1, 2, 3), keepdim=True).sqrt()


def project(v, x, eps, norm):
    """v into the ball around x, and then into [0, 1]; in L2 scaled first, as AutoAttack does."""
    if norm == "linf":
        return torch.clamp(v, x - eps, x + eps).clamp_(0, 1)
    d = v - x
    size = length(d, norm)
    return (x + d / (size + 1e-12) * size.clamp(max=eps)).clamp_(0, 1)


def random_start(b, radius):
    """x plus noise whose largest coordinate (or L2 norm) is `radius`, clipped to [0, 1]."""
    noise = 2 * b.draw(*b.x.shape[1:]) - 1
    if b.s.norm == "l2":  # normal: every direction is as likely
        noise = torch.erfinv(noise.clamp(-1 + 1e-6, 1 - 1e-6))
    start = b.x + radius * noise / (length(noise, b.s.norm) + 1e-12)
    return start.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def gradient(model, x, loss, eot=1):
    """-> logits (B, K), loss (B,), its gradient in x alone, averaged over `eot` passes (or 0)."""
    total = torch.zeros_like(x)
    for _ in range(eot):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(x).float()
            value = loss(logits)
        if value.requires_grad:
            (part,) = torch.autograd.grad(value, x, torch.ones_like(value), materialize_grads=True)
            total = total + part / eot
    return logits.detach(), value.detach(), total


def survivors(a, x_adv, last):
    """Yield i = 1, ..., last; after 1, 2, 4, ..., all 50 and the last move what is done to x_adv.

    a: namespace of tensors with a row per image: row (of x_adv), done, found, ... No other sync.
    """
    for i in range(1, last + 1):
        yield i
        if i & (i - 1) and i % 50 and i != last:
            continue
        x_adv[a.row] = torch.where(a.done[:, None, None, None], a.found, x_adv[a.row])
        keep = (~a.done).nonzero()[:, 0]
        if not len(keep):
            return
        if len(keep) < len(a.row):
            vars(a).update({k: v[keep] for k, v in vars(a).items() if v is not None})


# ------------------------------------------------------------------------------------------------
# APGD: Croce and Hein 2020a, algorithm 1


def margin(logits, labels):
    """z_y - max_{k != y} z_k (B,), what Square lowers and DLR scales."""
    labels = labels[:, None]
    return logits.gather(1, labels)[:, 0] - logits.scatter(1, labels, -math.inf).amax(1)


def ce_loss(logits, labels, target=None):
    """Cross-entropy (B,) of logits (B, K)."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr_loss(logits, labels, target=None):
    """Eq. (6): -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), (B,); the numerator if K < 3."""
    top = logits.topk(min(3, logits.shape[1])).values.T
    return -margin(logits, labels) / (top[0] - top[2] + 1e-12 if len(top) > 2 else 1)


def targeted_dlr_loss(logits, labels, target):
    """Eq. (7): -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), (B,); the numerator if K < 4."""
    numerator = (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
    top = logits.topk(min(4, logits.shape[1])).values.T
    return numerator / (top[0] - (top[2] + top[3]) / 2 + 1e-12 if len(top) > 3 else 1)


def apgd_checkpoints(steps):
    """{number of iterations done: iterations since the checkpoint before}, section 3.1."""
    period, least, shrink = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    checkpoints, at = {}, period
    while at <= steps:
        checkpoints[at] = period
        period = max(period - shrink, least)
        at += period
    return checkpoints


def apgd(model, b, loss):
    """APGD from a random start on loss(logits, labels, target) -> x_adv (B, C, H, W), or x.

    An image is done at the first evaluation, the start included, that is wrong, as any class.
    """
    s, x_adv = b.s, b.x.clone()
    a = SimpleNamespace(row=torch.arange(len(b.x), device=b.x.device), x=b.x, labels=b.labels)
    a.target = b.target() if loss is targeted_dlr_loss else None

    def move_to(x):
        a.now = x
        logits, f, a.g = gradient(model, x, lambda z: loss(z, a.labels, a.target), s.eot)
        b.bad = b.bad + (~logits.isfinite().all(1)).sum()
        return f, misclassified(logits, a.labels)

    f, a.done = move_to(random_start(b, s.eps))
    b.zero = (a.g.abs().amax((1, 2, 3)) == 0).sum()
    a.found = a.best = a.previous = a.now
    a.best_g, a.best_f, a.last_f, a.check_f = a.g, f, f, f  # check_f: best_f at the checkpoint
    a.rises, a.halved = torch.zeros_like(f), torch.ones_like(a.done)
    a.step = torch.full_like(f, 2 * s.eps)[:, None, None, None]
    checkpoints = apgd_checkpoints(s.steps)
    for i in survivors(a, x_adv, s.steps):
        g = a.g.sign() if s.norm == "linf" else a.g / (length(a.g, "l2") + 1e-12)
        z = project(a.now + a.step * g, a.x, s.eps, s.norm)
        if i > 1:  # momentum
            z = a.now + 0.75 * (z - a.now) + 0.25 * (a.now - a.previous)
            z = project(z, a.x, s.eps, s.norm)
        a.previous = a.now
        f, wrong = move_to(z)
        a.found, a.done = torch.where(wrong[:, None, None, None], z, a.found), a.done | wrong
        better = f > a.best_f
        image = better[:, None, None, None]
        a.best, a.best_g = torch.where(image, z, a.best), torch.where(image, a.g, a.best_g)
        a.best_f = torch.where(better, f, a.best_f)
        a.rises, a.last_f = a.rises + (f > a.last_f), f
        if period := checkpoints.get(i):
            # differs: condition 1 with <= as in the authors' code, the paper has <
            a.halved = (a.rises <= 0.75 * period) | (~a.halved & (a.check_f >= a.best_f))
            a.rises, a.check_f = torch.zeros_like(f), a.best_f
            image = a.halved[:, None, None, None]
            a.step = torch.where(image, a.step / 2, a.step)
            a.now, a.g = torch.where(image, a.best, z), torch.where(image, a.best_g, a.g)
    return x_adv


# ------------------------------------------------------------------------------------------------
# FAB: Croce and Hein 2020b


def to_hyperplane(x, w, c, norm, iterations=8):
    """The smallest d (B, C, H, W) with <w, d> = -c and x + d in [0, 1]; if none, to the corner.

    x, w (B, C, H, W), c (B,). Eq. (5): d_i = -sign(w_i) min(r, m_i), m_i the room in the box; in L2
    min(r |w_i|, m_i). r: Newton's method, without sorting or sync (3 iterations are usual).
    """
    w = w * torch.where(c < 0, -1.0, 1.0)[:, None, None, None]
    scale = length(w, "linf") + 1e-38
    w, c = w / scale, c.abs()[:, None, None, None] / scale
    room, size = torch.where(w > 0, x, 1 - x), w.abs()
    linf = norm == "linf"
    slope, limit = (size, room) if linf else (size * size, room / size.clamp(min=1e-12))
    gain = size * room
    r = torch.where(gain.sum((1, 2, 3), keepdim=True) > c, 0.0, 1e30)
    for _ in range(iterations):
        free = limit > r
        rest = c - torch.where(free, 0, gain).sum((1, 2, 3), keepdim=True)
        total = torch.where(free, slope, 0).sum((1, 2, 3), keepdim=True)
        r = torch.where(total > 0, rest / total.clamp(min=1e-30), 1e30)
    return -w.sign() * torch.minimum(r if linf else r * size, room)


def boundary(model, x, labels, target, norm):
    """-> z_t - z_y (B,) and its gradient w in x, for the target t (B,).

    None: the class with the least |z_k - z_y| / |w_k| in the dual norm, one gradient a class.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        gaps = logits - logits.gather(1, labels[:, None])
        each = gaps.unbind(1)
        if target is not None:
            df = gaps.gather(1, target[:, None])[:, 0]
            return df.detach(), torch.autograd.grad(df, x, torch.ones_like(df))[0]
    best = torch.full_like(labels, math.inf, dtype=torch.float32)
    df, w = torch.zeros_like(best), torch.zeros_like(x)
    for k, gap in enumerate(each):
        (g,) = torch.autograd.grad(gap, x, torch.ones_like(gap), retain_graph=True)
        dual = g.abs().sum((1, 2, 3)) if norm == "linf" else length(g, "l2")[:, 0, 0, 0]
        ratio = torch.where(labels == k, math.inf, gap.detach().abs() / (dual + 1e-12))
        nearer, best = ratio < best, torch.minimum(ratio, best)
        df = torch.where(nearer, gap.detach(), df)
        w = torch.where(nearer[:, None, None, None], g, w)
    return df, w


def fab(model, b, targeted=False):
    """FAB, algorithm 1 -> x_adv (B, C, H, W): the nearest misclassified point found, else x.

    An image is done when its norm is at most eps; 0 looks for the minimum to the end. The first
    restart begins at x, the others at random points of half the radius.
    """
    s, x_adv = b.s, b.x.clone()
    a = SimpleNamespace(row=torch.arange(len(b.x), device=b.x.device), x=b.x, labels=b.labels)
    a.now = b.x if targeted or b.which == 0 else random_start(b, s.eps / 2)
    a.target, a.found = b.target() if targeted else None, b.x
    a.size = torch.full((len(b.x), 1, 1, 1), math.inf, device=b.x.device)
    for i in survivors(a, x_adv, s.steps):
        df, w = boundary(model, a.now, a.labels, a.target, s.norm)
        at_x = df + (w * (a.x - a.now)).sum((1, 2, 3))
        both = torch.cat([a.now, a.x]), torch.cat([w, w]), torch.cat([df, at_x])
        d1, d2 = to_hyperplane(*both, s.norm).chunk(2)
        r1, r2 = (length(d, s.norm).clamp(min=1e-8) for d in (d1, d2))
        alpha = (r1 / (r1 + r2)).clamp(max=0.1)
        a.now = ((1 - alpha) * (a.now + 1.05 * d1) + alpha * (a.x + 1.05 * d2)).clamp_(0, 1)
        wrong = misclassified(model(a.now).float(), a.labels)[:, None, None, None]
        d = a.now - a.x
        size = length(d, s.norm)
        better = wrong & (size < a.size)
        a.found, a.size = torch.where(better, a.now, a.found), torch.where(better, size, a.size)
        a.now = torch.where(wrong, a.x + 0.9 * d, a.now)  # the backward step
        a.done = a.size[:, 0, 0, 0] <= (s.eps if i < s.steps else 1e30)
    return x_adv


# ------------------------------------------------------------------------------------------------
# Square: Andriushchenko et al. 2020, algorithms 1 to 3


def square_side(i, height, width):
    """The side of the square of query i = 0, 1, ...: a share of 0.8 of the pixels, then halved."""
    halvings = sum(i > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(0.8 / 2**halvings * height * width)), 1), height, width)


def square(model, b):
    """Square -> x_adv (B, C, H, W), x where nothing was found. No gradient is used.

    The windows, and in L-infinity their signs, are the same for all images. A corner is drawn below
    height - side, so that the last position is never used. Both as in the authors' code.
    """
    s, x_adv, (n, channels, height, width) = b.s, b.x.clone(), b.x.shape
    generator = torch.Generator().manual_seed(common.derive_seed("queries", s.seed, b.which))
    draws = torch.rand(s.queries, 5, generator=generator).tolist()
    a = SimpleNamespace(row=torch.arange(n, device=b.x.device), x=b.x, labels=b.labels)
    signs = torch.rand(s.queries, channels, generator=generator).expand(n, -1, -1)
    signs = signs.to(b.x.device) if s.norm == "linf" else b.draw(*signs.shape[1:], use="signs")
    a.found, a.signs = square_start(b), (signs - 0.5).sign()  # (B, Q, C)
    a.margin = margin(model(a.found).float(), a.labels)
    for i, (*corners, turn) in zip(survivors(a, x_adv, s.queries), draws):
        i, sign = i - 1, a.signs[:, i - 1, :, None, None]  # (B, C, 1, 1)
        side = square_side(i, height, width)
        if s.norm == "l2":
            side = min(max(side, 3) // 2 * 2 + 1, height, width)
        spans = [height - side, width - side] * 2
        r, c, r2, c2 = (int(u * span) for u, span in zip(corners, spans))
        window = slice(None), slice(None), slice(r, r + side), slice(c, c + side)
        if s.norm == "linf":  # in place: only the window changes
            old = a.found[window].clone()
            new = a.found[window] = (a.x[window] + s.eps * sign).clamp_(0, 1)
        else:
            other = slice(None), slice(None), slice(r2, r2 + side), slice(c2, c2 + side)
            shape = bump(side, b.x.device)
            old, content = a.found, sign * (shape.T if turn < 0.5 else shape)
            new = a.found = l2_proposal(a.x, old, window, other, content, s.eps)
            window = ...
        value = margin(model(a.found).float(), a.labels)
        take = (value < a.margin) | (value <= 0)
        a.found[window] = torch.where(take[:, None, None, None], new, old)
        a.margin = torch.where(take, value, a.margin)
        a.done = a.margin <= 0
    return x_adv


def square_start(b):
    """x with vertical stripes of +-eps; in L2 with a grid of 5 x 5 bumps of norm eps together."""
    _, channels, height, width = b.x.shape
    if b.s.norm == "linf":
        start = b.x + b.s.eps * (b.draw(channels, 1, width) - 0.5).sign()
        return start.clamp_(0, 1).contiguous(memory_format=torch.channels_last)
    side = max(min(height, width) // 5, 1)
    tiles, shape = min(height // side, width // side, 5), bump(side, b.x.device)
    signs = (b.draw(25, channels + 1, 1, 1) - 0.5).sign()[:, : tiles * tiles]
    grid = torch.where(signs[:, :, -1:] > 0, shape, shape.T) * signs[:, :, :-1]  # (B, T, C, ...)
    grid = grid.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    top, left = (height - tiles * side) // 2, (width - tiles * side) // 2
    d = torch.zeros_like(b.x)
    d[:, :, top : top + tiles * side, left : left + tiles * side] = grid
    return (b.x + b.s.eps * d / (length(d, "l2") + 1e-12)).clamp_(0, 1)


@functools.cache
def bump(side, device="cpu"):
    """Eq. (2): two halves of opposite sign, each of nested rectangles, of norm 1: (side, side)."""
    halves = []
    for rows in side // 2, side - side // 2:
        weights = 1 / torch.arange(1, max(rows, side) // 2 + 2, dtype=torch.float64) ** 2
        tail = weights.flip(0).cumsum(0).flip(0)  # by the distance from the middle
        y, x = (torch.arange(rows) - rows // 2).abs(), (torch.arange(side) - side // 2).abs()
        half = tail[torch.maximum(y[:, None], x)]
        halves.append(half / half.norm().clamp(min=1e-12))
    both = torch.cat([halves[0], -halves[1]])
    return (both / both.norm()).float().to(device)


def l2_proposal(x, found, first, second, content, eps):
    """Algorithm 3: the norm of both windows, and what eps leaves, goes to the first: new x_adv."""
    d, either = found - x, torch.zeros_like(x[:1, :1])
    either[first], either[second] = 1, 1
    spare = (eps**2 - length(d, "l2") ** 2).clamp(min=0) / d.shape[1]
    budget = (spare + (d * either).square().sum((2, 3), keepdim=True)).sqrt()  # (B, C, 1, 1)
    new = content + d[first] / (d[first].square().sum((2, 3), keepdim=True).sqrt() + 1e-10)
    new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + 1e-12) * budget
    d[second] = 0
    d[first] = new
    return (x + eps * d / (length(d, "l2") + 1e-12)).clamp_(0, 1)


def pgd(model, b):
    """`common.pgd` of the number of steps in the attack's name, from a uniform start."""
    eps = b.s.eps
    noise = b.draw(*b.x.shape[1:]).mul_(2 * eps).sub_(eps)
    step_size = eps / 4 if b.s.step_size is None else b.s.step_size
    return common.pgd(model, b.x, b.labels, eps, step_size, int(b.attack[3:]), noise)


# By name: f(model, batch) -> x_adv (B, C, H, W)
ATTACKS = {
    "apgd-ce": lambda model, b: apgd(model, b, ce_loss),
    "apgd-dlr": lambda model, b: apgd(model, b, dlr_loss),
    "apgd-t": lambda model, b: apgd(model, b, targeted_dlr_loss),
    "fab": fab,
    "fab-t": lambda model, b: fab(model, b, targeted=True),
    "square": square,
}


def passes(name, classes, s):
    """The passes [(attack, number)] that a name of --attack stands for."""
    plan = []
    for part in VERSIONS.get(name, name).split("+"):
        attack, _, times = part.partition(":")
        times = int(times or (s.restarts if attack.startswith("pgd") else 1))
        times *= min(s.targets, classes - 1) if attack.endswith("-t") else 1
        plan += [(attack, which) for which in range(times)]
    return plan


# ------------------------------------------------------------------------------------------------
# Models, and where an evaluation stands on the disk


@torch.no_grad()
def clean_logits(model, x, labels, batch_size=500, classes=None, name="the model"):
    """Logits (N, K) of x; an error if they are none: shape, classes, values that are not finite."""
    if x.dtype != torch.uint8 and not (x.min() >= 0 and x.max() <= 1):
        common.fail(f"images must be in [0, 1], got {x.min():.4g} to {x.max():.4g}")
    parts = []
    for part in map(common.to_float, x.split(batch_size)):
        try:
            logits = model(part)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            common.fail(f"{name} does not take images {tuple(part.shape)}: {error}")
        shape = tuple(getattr(logits, "shape", [type(logits).__name__]))
        if len(shape) != 2 or shape[0] != len(part):
            common.fail(f"{name} must return logits ({len(part)}, K), got {shape}")
        parts.append(logits.float())
    logits, wanted = torch.cat(parts), classes or max(int(labels.max()) + 1, shape[1])
    if shape[1] != wanted:
        common.fail(f"{name} returns {shape[1]} logits, the data has {wanted} classes")
    if len(bad := (~logits.isfinite().all(1)).nonzero()):
        common.fail(f"{name}: the logits of {len(bad)} images are not finite, as of {int(bad[0])}")
    return logits


def is_probabilities(logits):
    """Whether rows (N, K) are nowhere negative and sum to 1."""
    return bool(logits.min() > -1e-5 and (logits.sum(1) - 1).abs().max() < 1e-5)


# Where a new attack stands
NEW = {"broken": torch.zeros(0).short(), "serial": 1, "position": 0}
NEW |= {"seconds": {}, "zero": 0, "bad": 0, "sums": {}}  # sums: CRC-32 of the examples


def open_store(path=None, flags=None):
    """A new store, or the one that a killed evaluation with the same flags left; else an error.

    path: the small state file, or None; record: flags, and entries {key: how far an attack came};
    file: the float32 examples (C, H, W), entry k and image i at place k * N + i.
    """
    record = {"flags": flags, "entries": {}, "bytes": 0}
    if path is None:
        return SimpleNamespace(path=None, record=record, file=tempfile.TemporaryFile())
    examples, (old, found) = path.with_suffix(".examples"), common.load_latest(path)
    common.settle(path, found)
    if old:
        record = old
        if not common.is_like(record, {"flags": {}, "entries": {}, "bytes": 0}) or not all(
            key.endswith(" corruptions") or common.is_like(entry, NEW | {"place": 0})
            for key, entry in record["entries"].items()
        ):
            common.fail(f"{path}: not the state of an evaluation; delete it to begin again")
        compare_flags(path, record["flags"], flags)
        if not examples.exists() or examples.stat().st_size < record["bytes"]:
            common.fail(f"{examples}: missing or truncated; delete {path} to begin again")
        print(f"goes on from {path}", flush=True)
    for torn in path.parent.glob(f".{path.name}.*.tmp"):  # a kill leaves what it was writing
        torn.unlink(missing_ok=True)
    file = open(examples, "r+b" if old else "w+b")  # noqa: SIM115
    return SimpleNamespace(path=path, record=record, file=file)


def compare_flags(path, old, new):
    """An error that names the first flag in which two dicts differ."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            was = f"{key}: {path} was made with {old.get(key)}, not {new.get(key)}"
            common.fail(f"{was}; take another --json, or delete it")


def drop_state(base):
    """Remove what only going on needs, and what a kill has torn, beside the result `base`."""
    base = Path(base)
    kept = [base.with_name(f"{base.name}.{kind}") for kind in ("state", "prev.state", "examples")]
    for path in [*kept, *base.parent.glob(f".{base.name}.*.tmp")]:
        path.unlink(missing_ok=True)


def write_examples(store, entry, index, x_adv):
    """Keep the examples (B, C, H, W) of the images `index` (B,), and save the state."""
    for i, image in zip(index.tolist(), x_adv.contiguous().cpu().numpy()):
        store.file.seek((entry["place"] + i) * image.nbytes)
        store.file.write(image.tobytes())
        entry["sums"][i] = zlib.crc32(image.tobytes())
    save_store(store)


def save_store(store):
    """Put the state on the disk; the examples that it speaks of are there before it is."""
    store.file.flush()
    if store.path is not None:
        os.fsync(store.file.fileno())
        store.record["bytes"] = os.fstat(store.file.fileno()).st_size
        common.save_next(store.path, store.record)


def read_examples(store, entry, index, like):
    """The examples (B, C, H, W) of the images `index` (B,), as float32 on the device of `like`."""
    out = np.empty(like.shape, np.float32)
    for i, image in zip(index.tolist(), out):
        store.file.seek((entry["place"] + i) * image.nbytes)
        content = store.file.read(image.nbytes)
        if zlib.crc32(content) != entry["sums"].get(i):
            common.fail(f"{store.path}: its examples were changed; delete it to begin again")
        image[...] = np.frombuffer(content, np.float32).reshape(image.shape)
    return torch.from_numpy(out).to(like.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# The evaluation


def run_attack(model, points, name, s, store, key):
    """Run the passes of `name` on the images that are still right; saves after each batch.

    points: (x, labels, logits). A pass cuts one list of all survivors into batches. -> dict: broken
    int16 (N,), 0 for survivors, -1 for wrong when clean, else the number of the pass; seconds
    {attack: ...}; zero and bad counts; where it stands: serial, position.
    """
    x, labels, logits = points
    right, entries = (logits.argmax(1) == labels).cpu(), store.record["entries"]
    place = {"place": len(entries) * len(x), "seconds": {}, "sums": {}}
    entry = entries.setdefault(key, NEW | place | {"broken": right.short() - 1})
    if len(entry["broken"]) != len(x):
        common.fail(f"{store.path}: not the state of these images; delete it to begin again")
    s = dataclasses.replace(s, eot=20 if name == "aa-rand" else 1)
    plan, broken, seconds = passes(name, logits.shape[1], s), entry["broken"], entry["seconds"]
    fast = common.Folded(model)
    for serial, (attack, which) in list(enumerate(plan, 1))[entry["serial"] - 1 :]:
        alive = ((broken == 0) | (broken == serial)).nonzero()[:, 0]  # when the pass began
        begin = time.monotonic()
        for index, b in batches(points, alive[entry["position"] :], s, attack, which):
            x_adv, hit = search(model, fast, b)
            where = index[hit.cpu()]
            broken[where] = serial
            for what, more in {"zero": b.zero, "bad": b.bad, "position": len(index)}.items():
                entry[what] += int(more)
            now = time.monotonic()
            seconds[attack], begin = seconds.get(attack, 0.0) + now - begin, now
            write_examples(store, entry, where, x_adv[hit])
            done = entry["position"] == len(alive) and [*plan, ("", 0)][serial][0] != attack
            if key[:1].strip() and (sys.stdout.isatty() or done):  # of a named model
                at = f"{attack} {serial} of {len(plan)}, image {entry['position']} of {len(alive)}"
                at += f", {(broken == 0).double().mean():.4f} left, {seconds[attack]:,.0f} s"
                common.print_line(f"{key}: {at}", "\n" * done)
        entry["serial"], entry["position"] = serial + 1, 0
    return entry


@torch.no_grad()
def search(model, fast, b):
    """-> x_adv (B, C, H, W) of the attack b.attack, and bool (B,): the model itself is wrong there.

    In TF32 a search may stop at an example that float32 does not confirm: it is done again.
    """
    tf32 = b.attack in ATTACKS and b.s.search == "tf32"
    with common.convolutions(tf32):
        x_adv = ATTACKS.get(b.attack, pgd)(fast, b)
    near, wrong = allowed(x_adv, b.x, b.s), misclassified(model(x_adv).float(), b.labels)
    moved = (x_adv != b.x).flatten(1).any(1)
    if tf32 and len(few := (moved & near & ~wrong).nonzero()[:, 0]):
        rows = (v[few] for v in (b.x, b.labels, b.logits, b.index))
        strict = Batch(*rows, dataclasses.replace(b.s, search="fp32"), b.attack, b.which)
        x_adv[few], wrong[few] = search(model, fast, strict)
    return x_adv, near & wrong


def allowed(x_adv, x, s):
    """bool (B,): in the ball, up to the rounding of float32, and in [0, 1]."""
    near = length(x_adv - x, s.norm)[:, 0, 0, 0] <= s.eps * (1 + 1e-5) + 1e-7
    return near & ((x_adv >= 0) & (x_adv <= 1)).all((1, 2, 3))


@torch.no_grad()
def verdict(model, points, entry, name, s, store):
    """Classify the stored examples once more, clean: what is right or not allowed is robust."""
    broken, classes, worst, stages = entry["broken"].clone(), points[2].shape[1], 0.0, []
    plan, unverified = passes(name, classes, s), 0
    for index, b in batches(points, (broken > 0).nonzero()[:, 0], s):
        x_adv = read_examples(store, entry, index, b.x)
        hit = misclassified(model(x_adv).float(), b.labels) & allowed(x_adv, b.x, s)
        worst = max(worst, float(length(x_adv - b.x, s.norm).max()))
        broken[index[~hit.cpu()]] = 0
        unverified += int((~hit).sum())
    for attack, last in {attack: i for i, (attack, _) in enumerate(plan, 1)}.items():
        robust = int(((broken == 0) | (broken > last)).sum())
        stage = {"attack": attack, "robust_acc": robust / len(broken)}
        stage["conditional_acc"] = robust / max(int((broken >= 0).sum()), 1)
        stages.append(stage | {"seconds": entry["seconds"].get(attack, 0.0)})
    lines = []
    for before, stage in itertools.pairwise(stages):
        if stage["attack"] == "square" and before["robust_acc"] - stage["robust_acc"] > 0.002:
            lower = f"{before['robust_acc']:.4f} to {stage['robust_acc']:.4f} without gradients"
            lines.append(f"Square goes from {lower}: they may be masked; try an adaptive attack")
    for attack, k in (("apgd-dlr", 3), ("apgd-t", 4)):
        if classes < k and attack in dict(plan):
            lines.append(f"{attack}: DLR needs {k} classes; with {classes} its numerator is used")
    told = {"starts of APGD have no gradient: it is weaker than it looks": entry["zero"]}
    told["evaluations of APGD gave logits that are not finite"] = entry["bad"]
    told["examples failed the last check: their images count as robust"] = unverified
    lines += [f"{number} {what}" for what, number in told.items() if number]
    report = {"stages": stages, "verified": int((broken > 0).sum()), "unverified": unverified}
    return report | {"max_perturbation": worst, "warnings": lines}


def evaluate(model, x, labels, attacks, eps=8 / 255, step_size=None, restarts=1, seed=0, **more):
    """{'clean_acc': ..., 'pgd20_acc': ...} of a model on x uint8 (N, H, W, C), labels (N,).

    x: or float (N, C, H, W) in [0, 1]; attacks: as --attack; step_size: or eps / 4; more: Settings.
    """
    row = evaluate_all(model, x, labels, attacks, eps, step_size, restarts, seed, **more)
    return {k: v for k, v in row.items() if k.endswith("_acc") and "conditional" not in k}


def evaluate_all(model, x, labels, attacks, *settings, classes=None, store=None, key="", **more):
    """As `evaluate`, but a row of the JSON. classes: how many there must be; store, key: state."""
    s, store = Settings(*settings, **more), store or open_store()
    row, reports = {}, {}
    with common.evaluating(model):
        logits = clean_logits(model, x, labels, s.batch_size, classes)
        points = x, labels, logits
        lines, few = [], common.to_float(x[: s.batch_size])
        if is_probabilities(logits):
            lines.append("the model seems to return probabilities: the attacks need logits")
        five = torch.stack([F.normalize(model(few).detach().float()) for _ in range(5)])
        if "aa-rand" not in attacks and (five - five[:1]).norm(dim=2).max() > 1e-4:
            lines.append("the model is randomised: only aa-rand does not overstate its robustness")
        for name in dict.fromkeys(attacks):
            if name == "clean":
                row["clean_acc"] = (logits.argmax(1) == labels).double().mean().item()
            elif name == "calibration":
                row["calibration"] = {"clean": calibration(logits, labels)}
                if s.norm == "linf":
                    every = batches(points, torch.arange(len(x)), s, "pgd20")
                    parts = [model(pgd(model, b)).detach().float() for _, b in every]
                    row["calibration"]["pgd20"] = calibration(torch.cat(parts), labels)
            elif name not in POINTS:
                entry = run_attack(model, points, name, s, store, f"{key} {name}")
                reports[name] = report = verdict(model, points, entry, name, s, store)
                field = re.sub(r"\W+", "_", name)
                row[f"{field}_acc"] = report["stages"][-1]["robust_acc"]
                row[f"{field}_conditional_acc"] = report["stages"][-1]["conditional_acc"]
                lines += report.pop("warnings")
    gap = row.get("pgd20_acc", 0) - row.get("aa_acc", row.get("aa_plus_acc", 1))
    if gap > 0.06:
        lines.append(f"PGD-20 is {100 * gap:.1f} points above AutoAttack: gradients may be masked")
    seconds = sum(stage["seconds"] for report in reports.values() for stage in report["stages"])
    return row | {"n": len(x), "seconds": seconds, "reports": reports, "warnings": lines}


def calibration(logits, labels, bins=15):
    """nll, ece, entropy (nats) and two histograms (bins,) of logits (N, K) and labels (N,).

    confidence: of the largest probability, in bins ](i - 1) / bins, i / bins] (Guo et al. 2017, Eq.
    3); probabilities: of those of all classes (Figure 8 of the noisy collaboration paper).
    """
    logs = logits.double().log_softmax(1)
    confidence, predicted = logs.exp().max(1)

    def bins_of(probs):
        return F.one_hot((probs * bins).ceil().long().clamp(1, bins) - 1, bins).double()

    bin_of = bins_of(confidence)
    gap = (predicted == labels).double() - confidence
    entropy = -(logs.exp() * logs).nan_to_num(0).sum(1).mean().item()
    ece = (gap @ bin_of).abs().sum().item() / len(labels)
    numbers = {"nll": F.nll_loss(logs, labels).item(), "entropy": entropy, "ece": ece}
    probabilities = sum(bins_of(probs).mean(0) for probs in logs.exp().T) / logs.shape[1]
    numbers |= {"confidence": bin_of.mean(0).tolist(), "probabilities": probabilities.tolist()}
    return numbers


def accuracy_curve(model, x, labels, s):
    """[(eps, accuracy)] under APGD-CE of 20 iterations, from eps 0 to where all are broken."""
    with common.evaluating(model), torch.no_grad():
        points = x, labels, clean_logits(model, x, labels, s.batch_size)
        right = (points[2].argmax(1) == labels).cpu()
        curve, fast = [(0.0, right.double().mean().item())], common.Folded(model)
        for factor in (0.25, 0.5, 0.75, 1, *(k * 2**j for j in range(11) for k in (1.5, 2))):
            if not right.any() or s.norm == "linf" and curve[-1][0] >= 1:
                break
            eps = factor * s.eps if s.norm == "l2" else min(factor * s.eps, 1.0)
            now = dataclasses.replace(s, eps=eps, steps=20)
            for index, b in batches(points, right.nonzero()[:, 0], now, "curve"):
                x_adv = apgd(fast, b, ce_loss)
                right[index] = ~misclassified(model(x_adv).float(), b.labels).cpu()
            curve.append((eps, right.double().mean().item()))
    return curve


def show(record):
    """Print the record of main: a table of the models, of their attacks, of their calibration."""
    step, eps = (f"{255 * record[key]:.4g}/255" for key in ("step_size", "eps"))
    balls = {"linf": f"linf eps {eps}, PGD step {step}", "l2": f"l2 eps {record['eps']:g}"}
    print(f"{record['data']}, {record['n']} test images, {balls[record['norm']]}, float32\n")
    rows, stages, points = record["rows"], [], []
    for row in rows:
        model = {"model": "/".join(Path(row["model"]).parts[-2:])}
        for name, r in row["reports"].items():
            checked = {"verified": r["verified"], "largest": f"{r['max_perturbation']:.7f}"}
            stages += [model | {"in": name} | stage | checked for stage in r["stages"]]
        for kind, numbers in row.get("calibration", {}).items():
            cells = {k: f"{v:.4f}" for k, v in numbers.items() if not isinstance(v, list)}
            points.append(model | {"points": kind} | cells)
    main_rows = [{k: v for k, v in r.items() if not isinstance(v, list | dict)} for r in rows]
    print("\n\n".join(common.table(part) for part in (main_rows, stages, points) if part))
    for row in rows:
        if result := row.get("corruptions"):
            table = common.table(images.corruption_rows(result))
            print(f"\n{row['model']}: {result['note']}\n{table}")
        notes = row.get("cinic_note", []) + row.get("ood_note", [])
        for line in notes + [f"warning: {line}" for line in row["warnings"]]:
            print(f"{row['model']}: {line}")


def save_examples(path, x, labels, store):
    """Write an .npz: x_adv float32 (N, H, W, C), clean where not broken; labels; broken (N,)."""
    (entry,) = (entry for entry in store.record["entries"].values() if "broken" in entry)
    x_adv, broken = common.to_float(x).cpu(), entry["broken"] > 0
    x_adv[broken] = read_examples(store, entry, broken.nonzero()[:, 0], x_adv[broken])
    arrays = {"x_adv": x_adv.permute(0, 2, 3, 1), "labels": labels.cpu(), "broken": broken}
    common.write_atomically(Path(path), lambda file: np.savez_compressed(file, **arrays))


def warn_of_other_data(paths, name) -> None:
    """A line on stderr for each checkpoint whose run, by its config.json, had not --data `name`."""
    for path in paths:
        config = Path(path).parent / "config.json"
        with contextlib.suppress(Exception):  # whatever a foreign file makes Python raise
            trained = json.loads(config.read_text())["flags"]["data"] if config.is_file() else name
            if Path(trained).stem != Path(name).stem:
                print(f"warning: {path}: trained on {trained!r}, not {name!r}", file=sys.stderr)


def foreign_model(spec, weights, device):
    """The net of `package.module:function`; weights: None or the file of its state_dict.

    That may be below `state_dict`, `model` or `weights`, its names may begin with `module.`.
    """
    module, _, function = spec.partition(":")
    sys.path.insert(0, "")  # the current folder
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the module raises
        common.fail(f"--model {spec}: expected package.module:function ({error!r})")
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        common.fail(f"--model {spec}: returned a {type(model).__name__}, not a torch.nn.Module")
    try:
        if weights:
            if not Path(weights).is_file():  # a pipe would block
                raise FileNotFoundError("no such file")
            state = torch.load(weights, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model", "weights"):
                state = state[key] if isinstance(state.get(key), dict) else state
            model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except Exception as error:  # torch raises half a dozen types for a damaged file
        common.fail(f"--weights {weights}: {str(error)[:200] or repr(error)}")
    return model.to(device).eval()


def load_models(args, data, device):
    """-> {name of the row: model}, {file: digest of its content}, from the flags."""
    models = {path: common.load_model(path, device, data)[0] for path in args.checkpoints}
    warn_of_other_data(args.checkpoints, args.data)
    if args.model:
        models[args.model] = foreign_model(args.model, args.weights, device)
    torch.set_float32_matmul_precision("highest")  # whatever the module of a foreign model has set
    few = data.x_test[:100], data.y_test[:100], 100, len(data.classes)
    for name, model in models.items():
        with common.evaluating(model):
            if is_probabilities(clean_logits(model, *few, name)):
                common.fail(f"{name}: returns probabilities; hand it over without its softmax")
    if args.ensemble:
        models = {f"ensemble of {len(models)}": common.Ensemble([*models.values()]).eval()}
        print("ensemble: the attacks get the logarithm of the averaged probabilities as logits")
    files = [*args.checkpoints, *filter(None, [args.weights])]
    return models, {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files}


# Flags that change no number: an evaluation may go on with others
FREE_FLAGS = {"json", "data_root", "device", "batch_size", "command", "deterministic"}


def run(args):
    """Evaluate every model, print the tables, write the JSON; go on where a killed run stopped."""
    if missing := [path for path in args.checkpoints if not os.path.isfile(path)]:
        common.fail(f"{missing[0]}: no such checkpoint")  # before any data are fetched
    device = common.setup_device(args)
    data = common.load_data(args.data, args.data_root, device, test_subset=args.n)
    x, labels = data.x_test, data.y_test
    others = images.load_others(args, data, x)
    models, digests = load_models(args, data, device)
    settings = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    flags = {f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if k not in FREE_FLAGS}
    flags |= digests | {"the images and labels of --data": data.fingerprint}
    out, base, rows = args.json and Path(args.json), args.json or args.save_examples, []
    if out and out.is_file():
        try:
            record = json.loads(out.read_text())
            compare_flags(out, record["flags"], flags)
            print(f"{out} is finished")
            drop_state(base)
            return show(record)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError):  # another record
            common.fail(f"--json: {out} is there and holds something else; take another")
    store = open_store(Path(f"{base}.state") if base else None, flags)
    for name, model in models.items():
        known = {"classes": len(data.classes), "store": store, "key": name}
        row = evaluate_all(model, x, labels, args.attack, **settings, **known)
        done = store.record["entries"].setdefault(f"{name} corruptions", {})
        rest = others, args, done, lambda done: save_store(store)
        row = {"model": name} | row | images.natural(model, x, labels, *rest)
        if args.plot:
            row["curve"] = accuracy_curve(model, x, labels, Settings(**settings))
        rows.append(row)
    if args.save_examples:
        save_examples(args.save_examples, x, labels, store)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    record = {"command": args.command, "flags": flags, "torch": torch.__version__, "gpu": gpu}
    record |= {"data": data.name, "n": len(x), "norm": args.norm, "precision": "float32"}
    record |= {"eps": args.eps, "step_size": args.step_size, "rows": rows}
    record["logits"] = "log of the averaged probabilities" if args.ensemble else "of the model"
    if args.plot:
        from benchmark import robustness

        robustness.plot(args.plot, record)
    if out:
        text = json.dumps(record, indent=1).encode() + b"\n"
        common.write_atomically(out, lambda file: file.write(text))
    store.file.close()
    if base:
        drop_state(base)
    show(record)  # last: perhaps nobody reads it


def main(argv=None):
    """`run` with these flags; when it is stopped, the last lines say how to go on."""
    args = parse_args(argv)
    try:
        with common.stoppable():
            run(args)
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        kept = args.json or args.save_examples
        kept = "finished batches are kept; go on" if kept else "nothing is kept; begin again"
        print(f"\nstopped; {kept} with:\n{args.command}", file=sys.stderr)
        raise SystemExit(common.status(stop)) from None
    except torch.OutOfMemoryError:
        common.fail("--batch-size: out of GPU memory; take a smaller one, the same command goes on")
    except OSError as error:
        common.fail(f"{error.filename or args.json}: {error.strerror or error}")


if __name__ == "__main__":
    common.start(main)
