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

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
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

VERSIONS = {
    "aa": "apgd-ce+apgd-t+fab-t+square",
    "aa-plus": "apgd-ce:5+apgd-dlr:5+fab:5+square+apgd-t+fab-t",
    "aa-rand": "apgd-ce+apgd-dlr",  # with 20 gradients a step
}
POINTS = ["clean", "calibration", "corruptions", "cinic", "ood"]  # these perturb no images


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="files written by the training scripts")
    add("--model", metavar="MODULE:FUNCTION", help="makes a net from [0, 1] images to logits")
    add("--weights", metavar="FILE", help="state_dict for --model, loaded as weights only")
    add("--ensemble", action="store_true", help="one row: the average of their probabilities")
    add = parser.add_argument_group("attack").add_argument
    add("--attack", nargs="+", type=attack_name, default=["clean", "pgd20"], help="see Attacks")
    add("--norm", default="linf", choices=["linf", "l2"], help="of the perturbations")
    add("--eps", type="fraction", help="radius; None: 8/255, or 0.5 with --norm l2")
    add("--step-size", type="fraction", help="of PGD; None: a quarter of the radius")
    add("--restarts", type="count", default=1, help="random starts of PGD, the worst counts")
    add("--steps", type="count", default=100, help="iterations of APGD and FAB")
    add("--queries", type="count", default=5000, help="queries of Square")
    add("--targets", type="count", default=9, help="classes of targeted APGD and FAB")
    add("--search", choices=["tf32", "fp32"], default="tf32", help="of aa on CUDA, not the verdict")
    add = parser.add_argument_group("other images").add_argument
    add("--corruptions", default="generate", metavar="DIR", help="CIFAR-10-C; generate: made here")
    add("--frost-dir", metavar="DIR", help="frost1.png ... of its generator; None: drawn by code")
    add("--cinic", metavar="DIR", help="CINIC-10, of which the images from ImageNet count")
    add("--cinic-per-class", type="count", help="a fixed choice (paper: 2100); None: all")
    add("--ood", metavar="PATH", help="an .npz or a folder of class folders, for --attack ood")
    add = parser.add_argument_group("run").add_argument
    add("--data", default="cifar10", help="cifar10, cifar100, mnist, shapes, FILE.npz or a FOLDER")
    add("--data-root", default="data", help="where data sets are, and missing ones are downloaded")
    add("--n", type="count", help="use so many test images (a fixed choice); None: all")
    add("--batch-size", type="count", default=500, help="images at once; changes no result")
    add("--seed", type="count0", default=0, help="seed of the attacks")
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
    argv = sys.argv[1:] if argv is None else argv
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
        draw = uniform(self.index, self.attack, use, self.s.seed, self.which)
        return draw(*shape).float()

    def target(self):
        """The class (B,) with the (which + 2)-nd largest clean logit, the label counted as 1st."""
        first = torch.full_like(self.logits[:, :1], math.inf)
        ranked = self.logits.scatter(1, self.labels[:, None], first).argsort(1, descending=True)
        return ranked[:, 1 + self.which % (self.logits.shape[1] - 1)]


# Copied from robust_kd.Ensemble
class Ensemble(nn.Module):
    """log sum_i w_i p_i(x) of some models: logits (B, K) whose softmax is their mean probability.

    weights: of the models, summing to 1 (None: all equal).
    """

    def __init__(self, models, weights=None):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.weights = weights or [1 / len(models)] * len(models)

    def forward(self, x):
        logs = []
        for weight, model in zip(self.weights, self.models):
            if weight > 0:
                logs.append(math.log(weight) + model(x).log_softmax(1))
        return torch.stack(logs).logsumexp(0)


@torch.no_grad()
def is_correct(model, x, labels, batch_size=500):
    """bool (N,): whether the model classifies x, uint8 (N, H, W, C) or float, as its label."""
    pairs = zip(x.split(batch_size), labels.split(batch_size))
    return torch.cat([model(common.to_float(part)).argmax(1) == y for part, y in pairs])


def is_like(value, like) -> bool:
    """Whether it has the type of `like`: all its keys, likewise; the dtype of a tensor."""
    if isinstance(like, dict) and isinstance(value, dict):
        return all(key in value and is_like(value[key], like[key]) for key in like)
    return type(value) is type(like) and getattr(value, "dtype", 0) == getattr(like, "dtype", 0)


def add_evaluation_flags(parser):
    """The flags of `evaluate_files`, with the attack of the papers that train without one."""

    def path(text):
        if text != "generate" and not Path(text).exists():
            raise argparse.ArgumentTypeError(f"expected a file or a folder, there is no {text}")
        return text

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--eval",
        choices=["fast", "full"],
        default="fast",
        help="fast: clean accuracy and PGD; full: corruptions, calibration and other images too",
    )
    add("--eps", type="probability", default=0.031, help="radius of PGD in pixel units")
    add("--step-size", type="fraction", default=0.003, help="step of PGD in pixel units")
    add("--eval-steps", type="count", default=20, help="number of PGD steps in the evaluation")
    add(
        "--restarts", type="count", default=5, help="random starts of PGD; an image must resist all"
    )
    add(
        "--corruptions",
        type=path,
        default="generate",
        help="folder of CIFAR-10-C; generate: the corruptions are made here",
    )
    add("--cinic", type=path, help="folder of CINIC-10, of which the ImageNet images are used")
    add("--cinic-per-class", type="count", help="CINIC-10 images per class, a fixed choice (2100)")
    add("--ood", type=path, help="other images of the same classes: an .npz or class folders")


def check_evaluation(args, data):
    """A UserError if --eval or --teacher-ckpt does not go with the data, or no image is held out."""
    if args.eval == "full" and data.x_test.shape[1:] != (32, 32, 3):
        raise common.UserError(f"--eval full: needs colour images of 32 x 32, not {data.name}")
    if args.teacher_seeds > 1 and args.pick_teacher == "val" and not len(data.x_val):
        raise common.UserError("--pick-teacher val: needs held-out images, --val-size above 0")
    if args.teacher_ckpt:
        name = args.teacher_model if "--teacher-model" in args.given else None
        common.load_model(args.teacher_ckpt, "cpu", data, name)


def best_epoch(folder):
    """{row of the summary: file} of the student's best epoch, if that is not its last; else {}."""
    meta = common.load(folder / "student.pt")["meta"]
    if meta["best"].get("epoch", meta["epoch"]) == meta["epoch"]:
        return {}
    return {"student, best on held-out images": folder / "student_best.pt"}


def evaluate_files(args, files, folder):
    """{name: file of a saved model} -> rows of a summary: model, accuracies, epochs, seconds.

    All numbers are in folder/evaluation.json; an interrupted evaluation goes on.
    """
    names = ["eps", "step_size", "restarts", "seed", "data", "data_root", "device"]
    flags = [*files.values(), "--json", folder / "evaluation.json"]
    flags += ["--attack", "clean", f"pgd{args.eval_steps}"]
    if args.eval == "full":
        flags += ["pgd10", "pgd15", "corruptions", "calibration"]
        flags += [name for name in ("cinic", "ood") if getattr(args, name)]
        names += ["corruptions", "cinic", "cinic_per_class", "ood"]
    for name in names:
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", getattr(args, name)]
    if args.test_subset:
        flags += ["--n", args.test_subset]
    print(f"evaluating {', '.join(files)}", flush=True)
    if common.rank() == 0:
        run(parse_args([str(flag) for flag in flags]))
    common.sync()
    rows = []
    for name, row in zip(files, common.read_json(folder / "evaluation.json")["rows"]):
        meta = common.load(files[name])["meta"]
        accuracies = {k: v for k, v in row.items() if k.endswith("_acc")}
        training = {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}
        rows.append({"model": name} | accuracies | training)
    return rows


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
# The 19 corruptions of CIFAR-10-C (Hendrycks and Dietterich 2019), with its parameters for 32x32.
# Each takes x float64 (B, 3, 32, 32) in [0, 1], draw and the parameters of a severity, and returns
# the same shape; float results are clipped and truncated to uint8, as in the published set.

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd constants of splitmix64, as signed 64-bit numbers
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def corrupt(x, name, severity, seed=0, start=0, frost_dir=None):
    """x uint8 (B, 32, 32, 3) -> the same under a corruption of CIFAR-10-C at severity 1..5.

    Random draws of an image depend on (seed, name, severity, its index) alone, where x[0] has the
    index `start`: neither on the batch nor on the device. frost_dir: the folder with frost1.png ..
    frost5.jpg of the reference generator; None: textures drawn by code. Errors: one line.
    """
    if x.dtype != torch.uint8 or x.shape[1:] != (32, 32, 3):
        raise common.UserError(
            f"corruptions: need uint8 (N, 32, 32, 3), got {x.dtype} {tuple(x.shape)}"
        )
    function, parameters = CORRUPTIONS[name]
    numbers = torch.arange(start, start + len(x), device=x.device)
    draw = uniform(numbers, "corrupt", seed, name, severity)
    extra = (frost_dir,) if name == "frost" else ()
    # by a tensor: for a number, a GPU multiplies by 1 / 255 instead, and k becomes k - 1
    clean = x.permute(0, 3, 1, 2) / torch.tensor([255.0], device=x.device).double()
    out = function(clean, draw, *np.atleast_1d(parameters[severity - 1]).tolist(), *extra)
    if out.dtype != torch.uint8:
        out = (out.clamp(0, 1) * 255).to(torch.uint8)
    return out.permute(0, 2, 3, 1).contiguous()


def uniform(images, *key):
    """-> draw(*shape): float64 (B, *shape) in (0, 1), others at each call; images int64 (B,).

    splitmix64 of a counter: they depend on the image's number and `key`, not on batch or device.
    """
    calls = itertools.count()

    def mix(z):
        for shift, factor in MIX:
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    def draw(*shape):
        stream = mix(images * GOLDEN + common.derive_seed(*key, next(calls)))[:, None]
        bits = mix(stream + torch.arange(1, math.prod(shape) + 1, device=images.device) * GOLDEN)
        bits = (bits >> 12) & ((1 << 52) - 1)
        return ((bits.double() + 0.5) * 2.0**-52).view(-1, *shape)

    return draw


def _normal(draw, channels):
    return math.sqrt(2) * torch.erfinv(2 * draw(channels, 32, 32) - 1)


def _inside(i, border):
    """What a row or column outside 0..31 means, by border."""
    if border == "edge":  # a a | a b c | c c
        return i.clamp(0, 31)
    period = 64 if border == "mirror" else 62  # b a | a b c | c b, and c b | a b c | b a
    i = i.remainder(period)
    return torch.minimum(i, min(period, 63) - i)


def _at(x, row, column):
    """x (B, C, 32, 32) at whole row, column (B, 32, 32): (B, C, 32, 32)."""
    index = (row * 32 + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view(x.shape)


def _bilinear(x, row, column, border):
    """x (B, C, 32, 32) at fractional row, column (B, 32, 32)."""
    total = 0
    for near, side in itertools.product((0, 1), (0, 1)):
        r, c = row.floor() + near, column.floor() + side
        weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
        corner = _at(x, _inside(r.long(), border), _inside(c.long(), border))
        total = total + weight[:, None] * corner
    return total


def _separable(x, matrix):
    matrix = matrix.to(x.device)
    return matrix @ x.contiguous() @ matrix.T


def _blur(x, sigma, truncate=4.0, border="edge"):
    """Gaussian blur of x (B, C, 32, 32): a 32 x 32 matrix from either side."""
    taps = torch.arange(-int(truncate * sigma + 0.5), int(truncate * sigma + 0.5) + 1)
    weights = torch.exp(-(taps.double() ** 2) / (2 * sigma**2))
    index = _inside(torch.arange(32)[:, None] + taps, border)
    matrix = torch.zeros(32, 32, dtype=torch.float64)
    return _separable(x, matrix.scatter_add_(1, index, (weights / weights.sum()).expand(32, -1)))


def _zoom(x, factor):
    """The centre of x enlarged by `factor`, linear between aligned corners, the middle 32 x 32."""
    side = math.ceil(32 / factor)
    count = round(side * factor)
    position = (torch.arange(32).double() + (count - 32) // 2) * (side - 1) / (count - 1)
    position = position + (32 - side) // 2
    return _separable(x, (1 - (position[:, None] - torch.arange(32)).abs()).clamp(min=0))


def _motion(v, radius, sigma, degrees):
    """One-sided motion blur of whole numbers v (B, C, 32, 32) along degrees (B,); whole again.

    Offsets, border and the 16-bit rounding are those of ImageMagick 6, which made the set.
    """
    count, angle = 2 * math.ceil(radius) + 1, torch.deg2rad(degrees)[:, None]
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    grid, total = torch.arange(32, device=v.device), 0
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        column = (grid + (i * angle.cos() - 0.5).ceil().long()).clamp(0, 31)[:, None]
        row = (grid + (i * angle.sin() - 0.5).ceil().long()).clamp(0, 31)[:, :, None]
        total = total + weight * _at(v, row, column)
    return (257 * total + 0.5).floor().div(257, rounding_mode="floor")


def _shot_noise(x, draw, photons):
    """Poisson counts by inversion: a pixel has 256 levels, so a table holds every distribution."""
    rate, top = photons * torch.arange(256).double()[:, None] / 255, int(photons + 10) * 2
    k = torch.arange(top).double()
    pmf = torch.exp(torch.xlogy(k, rate) - rate - torch.lgamma(k + 1))
    level = (x * 255).round()
    # row v of the table lies in [2 v, 2 v + 1], so that one search finds level and count
    table = (pmf.cumsum(1).clamp(max=1) + 2 * torch.arange(256)[:, None]).flatten().to(x.device)
    found = torch.searchsorted(table, draw(3, 32, 32) + 2 * level)
    return (found - level * top) / photons


def _impulse_noise(x, draw, rate):
    u = draw(3, 32, 32)
    return torch.where(u < rate, (u < rate / 2).double(), x)


def _glass_blur(x, draw, sigma, passes):
    """Each pass moves every pixel from row 2, column 2 on to a copy of itself or up-left of it."""
    x = (_blur(x, sigma) * 255).floor() / 255
    grid = torch.arange(32, device=x.device)
    for _ in range(int(passes)):
        move = (draw(2, 32, 32) < 0.5) & (grid >= 2) & (grid[:, None] >= 2)
        x = _at(x, grid[:, None] - move[:, 0].long(), grid - move[:, 1].long())
    return _blur(x, sigma)


def _defocus_blur(x, draw, radius, alias):
    axis = torch.arange(-2, 3).double()
    disk = (axis**2 + axis[:, None] ** 2 <= radius**2).double()
    taps = torch.exp(-(torch.arange(-1, 2).double() ** 2) / (2 * alias**2))
    taps = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    kernel = F.conv2d((disk / disk.sum())[None, None], taps, padding=1)[0, 0].numpy()
    padded = F.pad(x, (2,) * 4, mode="reflect")
    taps = [(i, j, w) for (i, j), w in np.ndenumerate(kernel) if w > 1e-9]
    return sum(float(w) * padded[..., i : i + 32, j : j + 32] for i, j, w in taps)


def _zoom_blur(x, draw, end):
    factors = np.arange(1, end, 0.01)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x, draw, mean, std, zoom, threshold, radius, sigma, weight):
    flakes = _zoom(mean + std * _normal(draw, 1), zoom)
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor()
    flakes = _motion(flakes, radius, sigma, 90 * draw(1)[:, 0] - 135) / 255
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    x = weight * x + (1 - weight) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.flip(2, 3)


def _frost(x, draw, weight, frost_weight, folder=None):
    textures, sizes = _frost_textures(folder)
    which, *place = draw(3).T
    which, grid = (which * 5).long(), torch.arange(32, device=x.device)
    room = torch.tensor(sizes, device=x.device)[which].T - 32
    row, column = ((u * r).long()[:, None] + grid for u, r in zip(place, room))
    ice = textures.to(x.device)[which[:, None, None], row[:, :, None], column[:, None]]
    out = weight * (x * 255).round() + frost_weight * ice.permute(0, 3, 1, 2)
    return out.clamp(0, 255).to(torch.uint8)


@functools.cache
def _frost_textures(folder):
    """Five textures as float64 (5, H, W, 3), 0..255, padded to one size, and their own sizes."""
    if folder is None:  # ridges and grain, about as bright and as contrasted as the published ones
        draw = uniform(torch.arange(5), "frost textures")
        ice = _plasma(draw, 1.7, 128)[..., None] * torch.tensor([225.0, 235.0, 245.0])
        return (ice + 24 + 60 * draw(128, 128, 1)).clamp(0, 255), [(128, 128)] * 5
    textures, sizes = torch.zeros(5, 400, 400, 3, dtype=torch.float64), []
    for i, name in enumerate("frost1.png frost2.png frost3.png frost4.jpg frost5.jpg".split()):
        image = common.read_image(Path(folder) / name)
        image = image[2::5, 2::5]  # bilinear at a fifth of the size falls on these pixels exactly
        if min(image.shape[:2]) < 33 or max(image.shape[:2]) > 400:
            raise common.UserError(f"--frost-dir: {name}: expected 165 to 2000 pixels a side")
        sizes.append(image.shape[:2])
        textures[i, : len(image), : image.shape[1]] = torch.tensor(image)
    return textures, sizes


def _plasma(draw, decay, side=32):
    """Diamond-square on a torus, each image scaled to 0..1: (B, side, side)."""
    plasma, wobble, n = torch.zeros_like(draw(1, 1)), 100.0, 1
    while n < side:  # a grid of n x n becomes one of 2n x 2n; the square is the reference's
        centre, left, top = (wobble**2 * (2 * draw(n, n) - 1) for _ in range(3))
        below = plasma + plasma.roll(-1, 1)  # with the next corner in the column
        right = plasma + plasma.roll(-1, 2)
        centre += (below + below.roll(-1, 2)) / 4
        left += (below + centre + centre.roll(1, 2)) / 4
        top += (right + centre + centre.roll(1, 1)) / 4
        rows = torch.stack([plasma, top], 3), torch.stack([left, centre], 3)
        plasma = torch.stack(rows, 2).view(-1, 2 * n, 2 * n)
        wobble, n = wobble / decay, 2 * n
    low, high = plasma.amin((1, 2), True), plasma.amax((1, 2), True)
    return (plasma - low) / (high - low)


def _fog(x, draw, strength, decay):
    top = x.amax((1, 2, 3), True)
    return (x + strength * _plasma(draw, decay)[:, None]) * top / (top + strength)


def _brightness(x, draw, shift):
    value = x.amax(1, True)
    saturation = torch.where(value > 0, (value - x) / value, 0)
    return (value + shift).clamp(max=1) * (1 - saturation)


def _saturate(x, draw, scale, shift):
    value, span = x.amax(1, True), x.amax(1, True) - x.amin(1, True)
    grey = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)  # the hue of grey is red
    part = torch.where(span > 0, (value - x) / span, grey)
    saturation = torch.where(span > 0, span / value, 0)
    return value * (1 - part * (scale * saturation + shift).clamp(0, 1))


def _contrast(x, draw, factor):
    mean = x.mean((2, 3), True)
    return (x - mean) * factor + mean


def _elastic_transform(x, draw, alpha, sigma, jitter):
    points = torch.tensor([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]], device=x.device).double()
    moved = F.pad(points + jitter * (2 * draw(3, 2) - 1), (0, 1), value=1.0)
    grid = torch.arange(32, device=x.device).double()
    back = torch.linalg.solve(moved, points.expand(len(x), 3, 2))  # (B, 3, 2): to x, y
    a, b, c = back[..., None, None].unbind(1)
    column, row = (a * grid + b * grid[:, None] + c).unbind(1)
    x = _bilinear(x, (row * 32).round() / 32, (column * 32).round() / 32, "mirror101")
    if alpha:
        shift = alpha * _blur(2 * draw(2, 32, 32) - 1, sigma, 3.0, "mirror")
        x = _bilinear(x, grid[:, None] + shift[:, 1], grid + shift[:, 0], "mirror")
    return x


def _box(v, out):
    """Pillow's box filter from v (B, C, n, n) to (B, C, out, out): columns, then rows, rounded."""
    n = v.shape[2]
    offset = torch.arange(n) + 0.5 - ((torch.arange(out).double() + 0.5) * (n / out))[:, None]
    offset = offset / max(n / out, 1)
    taps = ((offset > -0.5) & (offset <= 0.5)).double()
    taps = (taps / taps.sum(1, keepdim=True)).to(v.device)
    return (taps @ (v @ taps.T + 0.5).floor() + 0.5).floor()


def _jpeg_compression(x, draw, quality):
    from PIL import Image  # libjpeg, as in the published set: no other decoder agrees exactly

    images = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        images.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(x.device)


def _spatter(x, draw, mean, std, sigma, threshold, strength, mud):
    liquid = _blur(mean + std * _normal(draw, 1), sigma)
    liquid = torch.where(liquid < threshold, 0, liquid)
    color = torch.tensor([63, 42, 20] if mud else [175, 238, 238], device=x.device).view(3, 1, 1)
    if mud:
        mask = _blur((liquid > threshold).double(), strength)
        mask = torch.where(mask < 0.8, 0, mask)
        return x * (1 - mask) + mask * color / 255
    liquid = (liquid * 255).floor() % 256
    relief = _equalise(_around(_edge_distance(_canny(liquid))).floor())
    kernel = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=x.device).double()
    relief = F.conv2d(F.pad(relief, (1,) * 4, mode="reflect"), kernel[None, None]).clamp(0, 255)
    mask = liquid * _around(relief).round()
    return x + strength * mask / mask.amax((2, 3), True).clamp(min=1) * color / 255


def _around(v):
    return F.avg_pool2d(F.pad(v, (1,) * 4, mode="reflect"), 3, 1)


def _canny(v, low=50, high=150):
    """Edges (bool) of whole numbers v (B, 1, 32, 32), with the tie rules of OpenCV."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=v.device).double()
    sobel = torch.stack([sobel, sobel.T])[:, None]
    dx, dy = F.conv2d(F.pad(v, (1,) * 4, mode="replicate"), sobel).split(1, 1)
    size, slope = dx.abs() + dy.abs(), 13573 / 32768  # tan 22.5 degrees, as OpenCV rounds it
    q = F.pad(size, (1,) * 4)

    def beats(row, column):  # the neighbour on one side, and the one on the other
        a = q[:, :, 1 - row : 33 - row, 1 - column : 33 - column]
        b = q[:, :, 1 + row : 33 + row, 1 + column : 33 + column]
        return (size > a) & ((size > b) if row and column else (size >= b))

    diagonal = torch.where(dx * dy < 0, beats(1, -1), beats(1, 1))
    steep = dy.abs() > dx.abs() * (2 + slope)
    ridge = torch.where(steep, beats(1, 0), diagonal)
    ridge = torch.where(dy.abs() < dx.abs() * slope, beats(0, 1), ridge) & (size > low)
    edges, grown = torch.zeros_like(ridge), ridge & (size > high)
    while not torch.equal(edges, grown):
        edges = grown
        grown = (F.max_pool2d(edges.double(), 3, 1, 1) > 0) & ridge
    return edges


def _edge_distance(edges, most=20.0):
    """Distance to the nearest edge in the 5 x 5 chamfer metric 1, 1.4, 2.1969, at most `most`."""
    costs = {1: 1.0, 2: 1.4, 5: 2.1969}
    steps = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if i * i + j * j in costs]
    before, distance = None, torch.where(edges, 0.0, most).double()
    while before is None or not torch.equal(before, distance):
        before, p = distance, F.pad(distance, (2,) * 4, value=most)
        for i, j in steps:
            near = p[:, :, 2 + i : 34 + i, 2 + j : 34 + j] + costs[i * i + j * j]
            distance = torch.minimum(distance, near)
    return distance


def _equalise(v, bins=21):
    """Histogram equalisation of whole numbers v (B, 1, 32, 32) below `bins` to 0..255."""
    level = v.long().flatten(1)
    counts = torch.stack([(level == k).sum(1) for k in range(bins)], 1).double()
    lowest = level.amin(1, True)
    first = counts.gather(1, lowest)
    table = ((counts.cumsum(1) - first) * 255 / (1024 - first).clamp(min=1)).round()
    return torch.where(first == 1024, lowest, table.gather(1, level)).view(v.shape)


# name: (function, its parameters at severities 1..5); the last four are not in the benchmark's mean
# fmt: off
CORRUPTIONS = {
    "gaussian_noise": (lambda x, draw, c: x + c * _normal(draw, 3), (0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (lambda x, draw, radius, sigma: _motion(
        (x * 255).round(), radius, sigma, 90 * draw(1)[:, 0] - 45).to(torch.uint8),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (_snow, ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (_elastic_transform, ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92),
                                              (3.2, 1.28, 1.6), (3.2, 0.96, 0.96))),
    "pixelate": (lambda x, draw, n: _box(_box((x * 255).round(), int(n)), 32).to(torch.uint8),
                 (30, 28, 27, 24, 20)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (lambda x, draw, c: x + c * x * _normal(draw, 3),
                      (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (lambda x, draw, sigma: _blur(x, sigma), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (_spatter, ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                          (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                          (0.65, 0.1, 0.5, 0.68, 0.6, 1))),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
# fmt: on

# ------------------------------------------------------------------------------------------------
# Accuracy under corruptions, and on other data


def corruption_accuracy(
    model, x, labels, folder=None, frost_dir=None, seed=0, batch_size=500, done=None, save=None
):
    """Accuracy of a model under the 19 corruptions at 5 severities -> the dict of `summarise`.

    x uint8 (N, 32, 32, 3) clean test images, labels (N,). folder: the unpacked CIFAR-10-C, whose
    images are paired with x, in any order, or a part of it; None: x is corrupted here. done: what
    an earlier call gave to save(done), called after each corruption; those are not run again.
    Errors (a file missing or of a wrong shape): one line, exit status 2.
    """
    note = "published files" if folder else "corruptions generated from the test images"
    done = {} if done is None else done
    with common.evaluating(model):
        clean = is_correct(model, x, labels, batch_size)
        if folder:
            files, y = read_corruptions(folder)
            rows = pair_images(x, labels, files["gaussian_blur"][: len(y)], y)
            if rows is None:
                rows, labels, clean = torch.arange(len(y)), y.to(labels.device), None
                note += ", all of them; no conditional accuracy: the test images are others"
        elif frost_dir is None:
            note += ", frost from textures drawn by code, not the published ones"
        for name in (name for name in CORRUPTIONS if name not in done):
            counts = []
            for severity in range(5):
                right = []
                for start in range(0, len(labels), batch_size):
                    part = slice(start, start + batch_size)
                    if folder:
                        batch = files[name][(rows[part] + severity * len(y)).numpy()]
                        batch = torch.from_numpy(batch).to(labels.device)
                    else:
                        batch = corrupt(x[part], name, severity + 1, seed, start, frost_dir)
                    right.append(is_correct(model, batch, labels[part]))
                right = torch.cat(right)
                both = right if clean is None else right & clean
                counts.append([right.sum().item(), both.sum().item()])
            done[name] = counts
            if save:
                save(done)
    right = None if clean is None else clean.sum().item()
    return summarise(done, len(labels), right) | {"note": note}


def summarise(counts, n, clean=None):
    """counts[name] = five of [right, right here and when clean], of n images -> a summary.

    corruptions_acc: {name: [5]}; mean15_acc: the benchmark's 15, mean19_acc: all, mean18_acc: all
    but frost. clean: how many are right when clean; with it conditional_acc, over those alone, and
    mca_acc, the paper's: its mean over severities, then over the 19; mca18_acc: without frost.
    """
    every, kept = list(CORRUPTIONS), [name for name in CORRUPTIONS if name != "frost"]
    acc = {k: [right / n for right, _ in counts[k]] for k in every}
    of_right = {k: [both / clean for _, both in counts[k]] for k in every} if clean else None
    means = {"mean15_acc": (acc, every[:15]), "mean18_acc": (acc, kept), "mean19_acc": (acc, every)}
    means |= {"mca_acc": (of_right, every), "mca18_acc": (of_right, kept)}
    result = {"n": n, "clean_acc": None if clean is None else clean / n}
    for key, (table, names) in means.items():
        result[key] = np.mean([table[name] for name in names]).item() if table else None
    return result | {"corruptions_acc": acc, "conditional_acc": of_right}


def corruption_rows(result):
    """A row for each corruption, for common.table: accuracy by severity, mean, conditional mean."""
    rows = []
    for name, acc in result["corruptions_acc"].items():
        row = {"corruption": name} | {f"{k}_acc": value for k, value in enumerate(acc, 1)}
        row["mean_acc"], of_right = np.mean(acc).item(), result["conditional_acc"]
        row["conditional_acc"] = np.mean(of_right[name]).item() if of_right else None
        rows.append(row)
    return rows


def read_corruptions(folder, classes=100_000):
    """The 19 files of CIFAR-10-C as memory maps {name: uint8 (5 N, 32, 32, 3)}, labels (N,)."""
    arrays = {}
    for name in ("labels", *CORRUPTIONS):
        path = Path(folder) / f"{name}.npy"
        try:
            _must_be_in(Path(folder), path)
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy's of a header that is none
            wrong = f"missing, truncated, or not an .npy file ({str(error)[:200]})"
            raise common.UserError(
                f"--corruptions: {path}: {wrong}; expected 19 corruptions and labels"
            ) from None
    labels = arrays.pop("labels")
    n, rest = divmod(labels.size, 5)
    if (
        rest
        or not common.are_labels(labels, 5 * n, classes)
        or (labels != np.tile(labels[:n], 5)).any()
    ):
        wanted = f"N labels 0..{classes - 1}, five times over"
        raise common.UserError(f"--corruptions: {folder}/labels.npy: expected {wanted}")
    for name, array in arrays.items():
        if (array.dtype, array.shape) != (np.uint8, (5 * n, 32, 32, 3)):
            wanted, got = f"uint8 {(5 * n, 32, 32, 3)}", f"{array.dtype} {array.shape}"
            raise common.UserError(
                f"--corruptions: {folder}/{name}.npy: expected {wanted}, got {got}"
            )
    return arrays, torch.from_numpy(labels[:n].astype(np.int64))


def pair_images(x, labels, blurred, blurred_labels):
    """The row of each of x in `blurred`, its mildest corruption: int64 (N,); None if x is others.

    The published rows are in the order of CIFAR-10's test batch, which a converted data set may
    not keep; an image under a blur of 0.4 pixels is 1.4 levels away, another image 30 and more.
    """
    rows = torch.zeros(len(x), dtype=torch.long)
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0].cpu()
        theirs = (blurred_labels == label.cpu()).nonzero()[:, 0]
        if not len(theirs):
            return None
        a = x[mine.to(x.device)].cpu().flatten(1).float()
        b = torch.from_numpy(blurred[theirs.numpy()]).flatten(1).float()
        distance, nearest = torch.cdist(a, b).min(1)
        if (distance > 12 * math.sqrt(a.shape[1])).any():
            return None
        rows[mine] = theirs[nearest]
    return rows


def _list_classes(folder, wanted):
    """-> (sorted names of the class folders, [(label, file)] with the files of a class sorted)."""
    pairs = []
    try:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        for k, name in enumerate(classes):
            for where, folders, files in sorted(os.walk(folder / name)):  # follows no links
                if links := [sub for sub in folders if Path(where, sub).is_symlink()]:
                    raise ValueError(f"{where}/{links[0]} is a link to a folder")
                pairs += [(k, Path(where, f)) for f in sorted(files) if wanted(Path(where, f))]
            if not pairs or pairs[-1][0] != k:
                raise ValueError(f"no images in {name}")
        if not classes:
            raise ValueError("no folder in it")
    except (OSError, ValueError) as error:
        raise common.UserError(
            f"{folder}: expected class folders of images, none of them empty ({error})"
        ) from None
    return classes, pairs


def _read_images(part, pairs, root, shape=None):
    """{x_<part>: uint8 (N, H, W, 3), y_<part>: labels (N,)} of [(label, file)], of one shape."""
    found = []
    for _, file in pairs:
        found.append(common.read_image(file))
        shape = shape or found[0].shape
        if found[-1].shape != shape:
            raise common.UserError(f"{file}: an image of {found[-1].shape}, not {shape}")
    if not pairs:
        raise common.UserError(f"{root}: no images")
    return {f"x_{part}": np.stack(found), f"y_{part}": np.array([label for label, _ in pairs])}


def _must_be_in(root, file):
    """ValueError if there is no regular file (a pipe would block) or it lies outside of root."""
    if not (file.is_file() and file.resolve().is_relative_to(root.resolve())):
        raise ValueError(f"no file, or a link out of {root}")


def load_ood(path, classes, per_class=None, seed=0, cinic=False, size=(32, 32)):
    """Other images of the same classes -> x uint8 (N, H, W, 3), labels int64 (N,), a note.

    path: an .npz with x_test, y_test, or a folder of class folders named as in `classes`. cinic:
    the CINIC-10 folder (train, valid, test), of which only the images from ImageNet count.
    per_class: so many of each class, a fixed choice for a seed (the paper: 2100); the note holds
    the hash of the list. Errors (no file, an empty class folder, another image size): one line.
    """
    path, shape = Path(path), (*size, 3)
    if npz := path.suffix == ".npz":
        x, labels = common.check_images(path, "test", common.read_npz(path, ("x_test", "y_test")))
        if x.shape[1:] != shape:
            raise common.UserError(f"{path}: an image of {x.shape[1:]}, not {shape}")
        if labels.max() >= len(classes):
            raise common.UserError(
                f"{path}: label {labels.max()}, but the model has {len(classes)} classes"
            )
    else:
        pairs = _list_others(path, classes, cinic)
        labels = np.array([label for label, _ in pairs])
    keep = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    if per_class is not None:
        if (fewest := min(map(len, keep))) < per_class:
            raise common.UserError(f"{path}: a class has {fewest} images, fewer than {per_class}")
        rng = np.random.RandomState(seed)
        keep = [rng.choice(k, per_class, replace=False) for k in keep]
    keep = np.sort(np.concatenate(keep))
    x = x[keep] if npz else _read_images("test", [pairs[i] for i in keep], path, shape)["x_test"]
    chosen = "\n".join(str(i if npz else pairs[i][1].relative_to(path)) for i in keep)
    digest = hashlib.sha256(chosen.encode()).hexdigest()[:12]
    note = f"{len(keep)} images; sha256 of their list: {digest}"
    return torch.from_numpy(x), torch.from_numpy(labels[keep]), note


def _list_others(path, classes, cinic):
    """[(label, file)] of the images below a folder, class by class and sorted."""

    def wanted(file):  # the images of CIFAR-10 have cifar in their names
        return file.name[0] != "." and not (cinic and "cifar" in file.name)

    found = []
    for part in ("train", "valid", "test") if cinic else ("",):
        names, pairs = _list_classes(path / part, wanted)
        if foreign := set(names) - set(classes):
            raise common.UserError(
                f"{path / part / min(foreign)}: none of the classes {', '.join(classes)}"
            )
        found += [(classes.index(names[k]), file) for k, file in pairs]
    for _, file in found if cinic else ():
        if not re.fullmatch(r"n\d{8}_\d+\.png", file.name):
            raise common.UserError(f"{file}: neither an ImageNet name nor a CIFAR one")
    if cinic and len({label for label, _ in found}) < len(classes):
        raise common.UserError(f"{path}: expected folders named {', '.join(classes)}")
    return sorted(found, key=lambda pair: pair[0])  # stable: the order within a class stays


def load_others(args, data, x):
    """{name: (x uint8 (M, H, W, C), labels (M,), note)} of --cinic, --ood; checks --corruptions."""
    if "corruptions" in args.attack and args.corruptions != "generate":
        read_corruptions(args.corruptions, len(data.classes))
    elif "corruptions" in args.attack:
        corrupt(x[:1], "frost", 1, frost_dir=args.frost_dir)
    found = {}
    for name in [name for name in ("cinic", "ood") if name in args.attack]:
        number = args.cinic_per_class if name == "cinic" else None
        options = {"cinic": name == "cinic", "size": tuple(x.shape[1:3])}  # the same for all seeds
        *tensors, note = load_ood(getattr(args, name), data.classes, number, **options)
        found[name] = *(tensor.to(x.device) for tensor in tensors), note
    return found


def natural(model, x, labels, others, args, done, save):
    """The fields of a row for --attack corruptions, cinic and ood: accuracies, tables and notes.

    others: of load_others; done, save: of corruption_accuracy.
    """
    found = {}
    if "corruptions" in args.attack:
        folder = None if args.corruptions == "generate" else args.corruptions
        rest = folder, args.frost_dir, args.seed, args.batch_size, done, save
        result = corruption_accuracy(model, x, labels, *rest)
        found |= {k: result[k] for k in ("mean15_acc", "mean18_acc", "mean19_acc", "mca_acc")}
        found["corruptions"] = result
    for name, (x_other, y_other, note) in others.items():
        with common.evaluating(model):
            right = is_correct(model, x_other, y_other, args.batch_size)
        found |= {f"{name}_acc": right.double().mean().item(), f"{name}_note": [note]}
    return found


# ------------------------------------------------------------------------------------------------
# Models, and where an evaluation stands on the disk


@torch.no_grad()
def clean_logits(model, x, labels, batch_size=500, classes=None, name="the model"):
    """Logits (N, K) of x; an error if they are none: shape, classes, values that are not finite."""
    if x.dtype != torch.uint8 and not (x.min() >= 0 and x.max() <= 1):
        raise common.UserError(f"images must be in [0, 1], got {x.min():.4g} to {x.max():.4g}")
    parts = []
    for part in map(common.to_float, x.split(batch_size)):
        try:
            logits = model(part)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise common.UserError(
                f"{name} does not take images {tuple(part.shape)}: {error}"
            ) from None
        shape = tuple(getattr(logits, "shape", [type(logits).__name__]))
        if len(shape) != 2 or shape[0] != len(part):
            raise common.UserError(f"{name} must return logits ({len(part)}, K), got {shape}")
        parts.append(logits.float())
    logits, wanted = torch.cat(parts), classes or max(int(labels.max()) + 1, shape[1])
    if shape[1] != wanted:
        raise common.UserError(f"{name} returns {shape[1]} logits, the data has {wanted} classes")
    if len(bad := (~logits.isfinite().all(1)).nonzero()):
        raise common.UserError(
            f"{name}: the logits of {len(bad)} images are not finite, as of {int(bad[0])}"
        )
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
    examples = path.with_suffix(".examples")
    old = common.load(path) if path.exists() else {}
    if old:
        record = old
        if not is_like(record, {"flags": {}, "entries": {}, "bytes": 0}) or not all(
            key.endswith(" corruptions") or is_like(entry, NEW | {"place": 0})
            for key, entry in record["entries"].items()
        ):
            raise common.UserError(
                f"{path}: not the state of an evaluation; delete it to begin again"
            )
        compare_flags(path, record["flags"], flags)
        if not examples.exists() or examples.stat().st_size < record["bytes"]:
            raise common.UserError(
                f"{examples}: missing or truncated; delete {path} to begin again"
            )
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
            raise common.UserError(f"{was}; take another --json, or delete it")


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
        common.save(store.path, store.record)


def read_examples(store, entry, index, like):
    """The examples (B, C, H, W) of the images `index` (B,), as float32 on the device of `like`."""
    out = np.empty(like.shape, np.float32)
    for i, image in zip(index.tolist(), out):
        store.file.seek((entry["place"] + i) * image.nbytes)
        content = store.file.read(image.nbytes)
        if zlib.crc32(content) != entry["sums"].get(i):
            raise common.UserError(
                f"{store.path}: its examples were changed; delete it to begin again"
            )
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
        raise common.UserError(
            f"{store.path}: not the state of these images; delete it to begin again"
        )
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
                common.print_line(f"{key}: {at}", live=not done)
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
            table = common.table(corruption_rows(result))
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
        raise common.UserError(
            f"--model {spec}: expected package.module:function ({error!r})"
        ) from None
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise common.UserError(
            f"--model {spec}: returned a {type(model).__name__}, not a torch.nn.Module"
        )
    try:
        if weights:
            if not Path(weights).is_file():  # a pipe would block
                raise FileNotFoundError("no such file")
            state = torch.load(weights, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model", "weights"):
                state = state[key] if isinstance(state.get(key), dict) else state
            model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise common.UserError(f"--weights {weights}: {str(error)[:200] or repr(error)}") from None
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
                raise common.UserError(
                    f"{name}: returns probabilities; hand it over without its softmax"
                )
    if args.ensemble:
        models = {f"ensemble of {len(models)}": Ensemble([*models.values()]).eval()}
        print("ensemble: the attacks get the logarithm of the averaged probabilities as logits")
    files = [*args.checkpoints, *filter(None, [args.weights])]
    return models, {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files}


# Flags that change no number: an evaluation may go on with others
FREE_FLAGS = {"json", "data_root", "device", "batch_size", "command", "deterministic"}


def run(args):
    """Evaluate every model, print the tables, write the JSON; go on where a killed run stopped."""
    if missing := [path for path in args.checkpoints if not os.path.isfile(path)]:
        raise common.UserError(f"{missing[0]}: no such checkpoint")  # before any data are fetched
    device = common.find_device(args.device)
    data = common.load_data(args.data, args.data_root, device, test_subset=args.n)
    x, labels = data.x_test, data.y_test
    others = load_others(args, data, x)
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
            raise common.UserError(
                f"--json: {out} is there and holds something else; take another"
            ) from None
    store = open_store(Path(f"{base}.state") if base else None, flags)
    for name, model in models.items():
        known = {"classes": len(data.classes), "store": store, "key": name}
        row = evaluate_all(model, x, labels, args.attack, **settings, **known)
        done = store.record["entries"].setdefault(f"{name} corruptions", {})
        rest = others, args, done, lambda done: save_store(store)
        row = {"model": name} | row | natural(model, x, labels, *rest)
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
    """`run` with these flags."""
    run(parse_args(argv))


if __name__ == "__main__":
    common.start(main, "with --json finished batches are kept; go on, or begin again, with:")
