"""Distillation from a larger, a smaller, an equal and no teacher, clean and adversarially trained.

Paper    "Knowledge Distillation: Current Understanding and Future Directions in an Adversarial
         Context", Zhang, Zhuo, Kuo (Duke University), Eqs. (1) to (7). Re-KD and Tf-KD: Yuan et
         al., CVPR 2020. Self-distillation: Zhang et al., ICCV 2019. AKD: Maroto et al. 2022, see
         robust_kd.py. S, T: probabilities of student and teacher, S_t, T_t: of logits / t; x' the
         student's adversarial example on x.
Loss     plain, at          CE(S, y)                                <- plain_loss      on x, x'
         label-smoothing    CE((1-s) y + s/K, S)                    <- smoothing_loss
         vanilla, re-kd     (1-alpha) CE(S, y) + alpha t^2 KL(T_t || S_t)  <- kd_loss  Eqs. 1, 2
         tf-kd-self         the same, T an equal net                <- kd_loss         Eq. 3
         tf-kd-reg          the same, T the virtual teacher p^d     <- reg_loss        Eq. 4
         self-distillation  an exit after each stage, taught by the last  <- self_distillation_loss
         at-kd              CE(alpha T(x') + (1-alpha) y, S(x'))    <- at_kd_loss      Table 5
         at-tf-kd-self, at-tf-kd-reg  Eqs. 3, 4 with S(x') and T(x)  <- the same       Eqs. 6, 7
Usage    python teacher_free_kd.py --method vanilla                 # Table 1, MNIST, on a CPU
         python teacher_free_kd.py --method vanilla --omit-digit 1 --bias-correction    # Table 2
         python teacher_free_kd.py --method re-kd --seeds 0 1 2     # Table 3
         python teacher_free_kd.py --method tf-kd-reg               # Table 4; and tf-kd-self, plain
         python teacher_free_kd.py --method self-distillation       # exits and their ensemble
         python teacher_free_kd.py --method at-tf-kd-self           # Table 5; and at, at-kd, ...
         python teacher_free_kd.py --method tf-kd-self --grad-heatmap figure1.npz       # Figure 1
         python teacher_free_kd.py --demo                           # 1 minute on a CPU
         Data: MNIST for vanilla, else CIFAR-10. What a flag that is None becomes: RECIPES.
Expect   MNIST, seed 0: teacher 99.00, student alone 98.23, distilled 98.73 %. Demo, 1 seed, clean
         and PGD-20: teacher 0.994, 0.802, student 0.998, 0.892. ResNets: not measured yet.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); targets and logits (B, K)
Differs  1. 1,024 training images are held out to report the best epoch too (--val-size 0: none).
         2. Printed are T = 10 (Table 2); SGD, lr 0.1, 50 epochs, PGD-7 (Table 5). The rest is as in
            Yuan et al. (clean), Maroto et al. (at), or what reaches Table 1 (MNIST).
         3. t^2 is in none of its equations (--no-tau2). KL: averaged over the batch; the code of
            Yuan et al. averages over the classes too (--kl-reduction mean).
         4. tf-kd-reg is Eq. 4 as written. The code of Yuan et al. softens p^d, not its logarithm,
            and not the student, without t^2: whatever delta, the targets are nearly uniform, as in
            label smoothing (--reg-form repo; their numbers come from it; plain: t = 1).
         5. The MNIST teacher learns from digits shifted by up to 2 pixels (Hinton et al. 2015);
            without (--teacher-shift 0) Table 1 gains less, and Table 2 is nearer to the paper.
         6. at-kd is AKD of Maroto et al.; the paper does not say what its row was trained with.
         7. self-distillation: the paper gives no number of it. Heads: bottlenecks of ResNet-50; the
            hint is the L2 distance of the pooled features, in the mean over the batch; no t^2.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import copy
import dataclasses
import functools
import inspect
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import common
import plumbing

# What --demo sets
DEMO = {"data": "shapes", "epochs": 5, "teacher-epochs": 4, "batch-size": 32, "lr": 0.1}
DEMO |= {"gamma": 0.7, "steps": 3, "step-size": "4/255"}
DEMO |= {"train-subset": 2000, "test-subset": 500, "val-size": 200}

# (small, large) net of the data; other data: as CIFAR
NETS = {"mnist": ("mlp-400", "mlp-1200-1200"), "shapes": ("wrn-10-1", "wrn-16-2")}
NETS["cifar10"] = ("resnet18", "resnet50")
# Defaults by the kind of training; a teacher_* that is not here is that of the student
RECIPES = {
    "digits": {"epochs": 20, "teacher_epochs": 10, "batch_size": 128, "teacher_batch_size": 256}
    | {"lr": 0.02, "teacher_lr": 0.1, "schedule": "cosine", "gamma": 0.2}
    | {"weight_decay": 0.0, "warmup": 0, "teacher_shift": 2},  # differs: 5
    "clean": {"epochs": 200, "batch_size": 128, "lr": 0.1, "schedule": "steps", "gamma": 0.2}
    | {"weight_decay": 5e-4, "warmup": 1},  # Yuan et al.: x 0.2 at 30, 60 and 80 % of the epochs
    "at": {"epochs": 50, "batch_size": 128, "lr": 0.1, "schedule": "exponential", "gamma": 0.9}
    | {"weight_decay": 5e-4, "warmup": 0},
}


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method (None: by --method and --data)").add_argument
    add("--method", choices=METHODS, default="at-tf-kd-self", help="what the student minimises")
    add("--model", help="student: resnet18, wrn-16-2, mlp-400, ...")
    add("--width", type=common.positive, default=1.0, help="factor on the channels of ResNets")
    add("--alpha", type=common.probability, help="weight of the KL; at-kd: of T in the targets")
    add("--temperature", type=common.positive, help="of both softmaxes in the KL")
    add("--tau2", action=argparse.BooleanOptionalAction, help="the KL times temperature^2")
    add("--kl-reduction", choices=["batchmean", "mean"], default="batchmean", help="mean: / K too")
    add("--delta", type=common.probability, default=0.99, help="virtual teacher's p of the label")
    add("--reg-form", choices=REG_FORMS, default="paper", help="how that teacher is softened")
    add("--smoothing", type=common.probability, default=0.1, help="of label-smoothing")
    add("--omit-digit", type=int, choices=range(10), help="left out of the student's MNIST images")
    add("--bias-correction", action="store_true", help="also with the bias of that digit raised")
    add("--byot-alpha", type=common.probability, default=0.3, help="weight of the KL at an exit")
    add("--byot-lambda", type=common.fraction, default=0.03, help="weight of the feature distance")
    add("--byot-temperature", type=common.positive, default=3.0, help="of the softmaxes at an exit")
    add = parser.add_argument_group("teacher (None: as the student, or by RECIPES)").add_argument
    add("--teacher-model", help="None: as the student; vanilla: a larger, re-kd: a smaller net")
    add("--teacher-ckpt", help="take this finished teacher and train none")
    add("--teacher-epochs", type=common.count, help="length of its training")
    add("--teacher-es", type=common.count, help="stop it after so many epochs; None: at the end")
    add("--teacher-lr", type=common.positive, help="its learning rate")
    add("--teacher-batch-size", type=common.count, help="images of a step")
    add("--teacher-shift", type=common.count0, help="random shift of its images, in pixels")
    add = parser.add_argument_group("attack").add_argument
    add("--eps", type=common.probability, default="8/255", help="radius, training and evaluation")
    add("--steps", type=common.count, default=7, help="PGD steps in training")
    add("--step-size", type=common.fraction, default="2/255", help="PGD step in training")
    add("--attack-bn", choices=["eval", "train"], default="eval", help="BatchNorm in the attack")
    add("--eval-attack", nargs="+", type=attack, help="None: clean, at*: and pgd20 aa")
    add = parser.add_argument_group("gradients (Figure 1)").add_argument
    add("--grad-heatmap", metavar="FILE.npz", help="write the mean |gradient| of each layer")
    add("--grad-epochs", type=common.count, nargs="+", help="None: first, middle and last")
    add("--grad-loss", choices=["own", "ce"], default="own", help="ce: of the cross-entropy alone")
    add = parser.add_argument_group("optimisation (None: by --method and --data)").add_argument
    add("--epochs", type=common.count, help="epochs of the student")
    add("--batch-size", type=common.count, help="images of a step")
    add("--lr", type=common.positive, help="learning rate of SGD")
    add("--momentum", type=common.probability, default=0.9, help="of SGD")
    add("--weight-decay", type=common.fraction, help="on all parameters")
    add("--schedule", choices=["steps", "exponential", "cosine"], help="of the learning rate")
    add("--milestones", type=common.count, nargs="+", help="epochs; None: at 30, 60 and 80 %%")
    add("--gamma", type=common.positive, help="decay at each milestone, or of each epoch")
    add("--warmup", type=common.fraction, help="epochs in which the learning rate rises to --lr")
    plumbing.add_run_flags(parser)
    parser.set_defaults(data=None)
    parser.set_defaults(**recipe(parser.parse_known_args(argv)[0]))
    args = plumbing.parse(parser, argv, {"--demo": DEMO})
    check_flags(args, parser.error)
    return args


def recipe(known):
    """What --method and --data make of the flags that are None, given those known: a dict."""
    vanilla, attacked = known.method == "vanilla", known.method.startswith("at")
    data = known.data or ("shapes" if known.demo else "mnist" if vanilla else "cifar10")
    small, large = NETS.get(data, NETS["cifar10"])
    pairs, chosen = {"vanilla": (small, large), "re-kd": (large, small)}, {"data": data}
    chosen["model"], chosen["teacher_model"] = pairs.get(known.method, (small, None))
    chosen["alpha"], chosen["temperature"] = METHODS[known.method][3:]
    chosen["tau2"] = known.method != "self-distillation"  # differs: 7
    slow = [] if known.demo else ["aa"]
    chosen["eval_attack"] = ["clean", "pgd20", *slow] if attacked else ["clean"]
    return chosen | RECIPES["at" if attacked else "digits" if data == "mnist" else "clean"]


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    loss, _, teaches, *_ = METHODS[args.method]
    given = {word.split("=")[0].replace("--no-tau2", "--tau2") for word in args.argv}
    others = {name for other, *_ in METHODS.values() for name in needs(other)} - {*needs(loss)}
    others |= set() if teaches else {"teacher_ckpt"}
    for flag in sorted(given & {f"--{name.replace('_', '-')}" for name in others}):
        error(f"{flag}: --method {args.method} has none")
    if args.omit_digit is not None and args.data != "mnist":
        error(f"--omit-digit: goes with --data mnist, not {args.data}")
    if args.bias_correction and args.omit_digit is None:
        error("--bias-correction: goes with --omit-digit")
    if (args.teacher_es or 1) > (most := args.teacher_epochs or args.epochs):
        error(f"--teacher-es: at most --teacher-epochs {most}")
    if args.grad_heatmap and args.graph:
        error("--grad-heatmap: goes without --graph")
    if max(args.grad_epochs or [1]) > args.epochs:
        error(f"--grad-epochs: at most --epochs {args.epochs}")
    path = Path(args.grad_heatmap or "x.npz")
    if path.suffix != ".npz" or not path.absolute().parent.is_dir():
        error(f"--grad-heatmap: expected FILE.npz in a folder that exists, got {path}")
    if args.method == "self-distillation" and args.model.startswith("mlp"):
        error(f"--model: self-distillation needs a ResNet or WideResNet, got {args.model}")
    if args.method == "self-distillation" and args.width * 32 % 1:
        error(f"--width: self-distillation needs a multiple of 1/32, got {args.width:g}")
    if args.method in SAME_NET and args.teacher_model not in (None, args.model):
        error(f"--teacher-model: --method {args.method} needs {args.model} there too")
    common.check_model("--model", args.model, args.width)
    if teaches:
        common.check_model("--teacher-model", args.teacher_model or args.model, args.width)


def attack(text):
    """The `type=` of --eval-attack: `clean` or the name of an attack of eval_robustness.py."""
    import eval_robustness

    if text in {*eval_robustness.POINTS} - {"clean"}:
        raise argparse.ArgumentTypeError(f"expected clean, pgdN, aa, ..., got {text!r}")
    return eval_robustness.attack_name(text)


# ------------------------------------------------------------------------------------------------
# Losses. The names of the arguments are the contract: the student's step hands in what a loss names


# Copied from robust_kd.mix_labels
def mix_labels(teacher_logits, labels, alpha, temperature=1.0):
    """alpha T + (1 - alpha) y, the mixed targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    labels are (B, K) after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    y = labels if labels.dim() == 2 else F.one_hot(labels, teacher_probs.shape[1])
    return alpha * teacher_probs + (1 - alpha) * y


# Copied from robust_kd.kl
def kl(targets, student_logits, temperature=1.0, kl_reduction="batchmean"):
    """tau^2 KL(targets || S), S softened by tau: (B, K) x2 -> (); `mean` divides by K too."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    terms = F.kl_div(student_log_probs, targets.detach(), reduction="none")  # (B, K)
    return temperature**2 * (terms.mean() if kl_reduction == "mean" else terms.sum(1).mean())


def plain_loss(student_logits, labels):
    """CE(S, y), standard training on x, adversarial training on x'; (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels)


def smoothing_loss(student_logits, labels, smoothing):
    """CE of (1 - s) y + s / K, label smoothing (Szegedy et al. 2016); (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels, label_smoothing=smoothing)


def kd_loss(student_logits, teacher_logits, labels, alpha, temperature, tau2, kl_reduction):
    """Eqs. (2), (3), (6): (1-alpha) CE(S, y) + alpha t^2 KL(T_t || S_t); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, 1.0, temperature)  # no label in them
    distilled = kl(targets, student_logits, temperature, kl_reduction)
    distilled = distilled if tau2 else distilled / temperature**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def virtual_teacher(labels, classes, delta):
    """p^d of Eq. (4): delta for the label, (1 - delta) / (K - 1) for the others; (B,) -> (B, K)."""
    other = (1 - delta) / (classes - 1)
    return other + (delta - other) * F.one_hot(labels, classes)


REG_FORMS = {  # p^d (B, K), t -> targets, the student's temperature
    "repo": lambda probs, t: ((probs / t).softmax(1), 1.0),  # differs: 4
    "paper": lambda probs, t: ((probs.log() / t).softmax(1), t),
    "plain": lambda probs, t: (probs, 1.0),
}


# fmt: off
def reg_loss(student_logits, labels, alpha, temperature, delta, reg_form, tau2, kl_reduction):
    """Eqs. (4), (7): (1-alpha) CE(S, y) + alpha KL(p^d_t || S_t), times t^2 if S is softened too;
    (B, K), (B,) -> ()."""
    probs = virtual_teacher(labels, student_logits.shape[1], delta)
    targets, softened = REG_FORMS[reg_form](probs, temperature)
    distilled = kl(targets, student_logits, softened, kl_reduction)
    distilled = distilled if tau2 else distilled / softened**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def at_kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """CE(alpha T(x') + (1-alpha) y, S(x')), AKD (Maroto et al. 2022); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature).detach()
    return temperature**2 * F.cross_entropy(student_logits / temperature, targets)


def self_distillation_loss(exit_logits, exit_features, labels,
                           byot_alpha, byot_lambda, byot_temperature, tau2, kl_reduction):
    """CE(S_n, y) + sum over exits i < n of (1-a) CE(S_i, y) + a KL(S_n || S_i) + lambda |f_i - f_n|
    (Zhang et al. 2019), KL softened by t; lists of n (B, K), n (B, C); labels (B,) -> ()."""
    *early, last = exit_logits
    target = exit_features[-1].detach()  # the last exit learns from the labels alone
    loss = F.cross_entropy(last, labels)
    for logits, features in zip(early, exit_features):
        settings = byot_alpha, byot_temperature, tau2, kl_reduction
        loss = loss + kd_loss(logits, last, labels, *settings)  # whose targets are detached
        loss = loss + byot_lambda * (features - target).float().norm(dim=1).mean()
    return loss
# fmt: on


METHODS = {  # loss; what the student, what the teacher is shown; default alpha and temperature
    "plain": (plain_loss, "x", None, None, None),
    "label-smoothing": (smoothing_loss, "x", None, None, None),
    "vanilla": (kd_loss, "x", "x", 1.0, 10.0),  # paper: this 10 in Table 2, no other of the numbers
    "re-kd": (kd_loss, "x", "x", 0.6, 20.0),
    "tf-kd-self": (kd_loss, "x", "x", 0.95, 6.0),
    "tf-kd-reg": (reg_loss, "x", None, 0.1, 20.0),
    "self-distillation": (self_distillation_loss, "x", None, None, None),
    "at": (plain_loss, "x'", None, None, None),
    "at-kd": (at_kd_loss, "x'", "x'", 1.0, 1.0),
    "at-tf-kd-self": (kd_loss, "x'", "x", 0.9, 1.0),  # paper: Eq. 6, the teacher never sees x'
    "at-tf-kd-reg": (reg_loss, "x'", None, 0.3, 20.0),
}
SAME_NET = ("tf-kd-self", "at-tf-kd-self")  # of teacher and student
COMPARED = ("vanilla", "re-kd")  # also train the student without the teacher


def needs(loss):
    """The names of the arguments of a loss: only what it names is computed in a step."""
    return inspect.signature(loss).parameters


# ------------------------------------------------------------------------------------------------
# Mechanics: an exit after each stage (self-distillation); a digit never seen (Table 2)


class Exits(nn.Module):
    """Heads for all stages of a ConvNet but the last: bottlenecks to its shape, mean, linear.

    forward(net, x, only=None): x (B, C, H, W) -> logits, features: a (B, K) and a (B, C') for each
    exit, the last being the net's own; with `only`, for that exit, computing no more than it needs.
    """

    def __init__(self, net):
        super().__init__()
        widths = [max(p.shape[0] for p in stage.parameters()) for stage in net.stages]
        self.adaptors, self.heads = nn.ModuleList(), nn.ModuleList()
        for i in range(len(widths) - 1):
            pairs = zip(widths[i:], widths[i + 1 :])
            blocks = [common.PostActBlock(a, b // 4, stride=2, expansion=4) for a, b in pairs]
            self.adaptors.append(nn.Sequential(*blocks))
            self.heads.append(nn.Linear(widths[-1], net.fc.out_features))
        self.to(net.fc.weight.device, memory_format=torch.channels_last)

    def forward(self, net, x, only=None):
        logits, features, h = [], [], net.stem(net.normalize(x))
        for i, stage in enumerate(net.stages[: None if only is None else only + 1]):
            h, last = stage(h), i == len(self.heads)
            if only in (i, None):
                features.append((net.head_norm(h) if last else self.adaptors[i](h)).mean((2, 3)))
                logits.append((net.fc if last else self.heads[i])(features[-1]).float())
        return logits, features


@torch.no_grad()
def exit_rows(net, state, data):
    """Rows of the table: accuracy and cost of each exit and of the two ensembles of all exits.

    state: the state_dict of the net's Exits.
    """
    exits = Exits(net).eval()
    exits.load_state_dict(state)
    with common.evaluating(net):  # strict float32, of the exits too
        parts = [torch.stack(exits(net, common.to_float(x))[0]) for x in data.x_test.split(500)]
    logits, rows = torch.cat(parts, 1), []  # (exits, N, K)
    found = [(f"exit {i + 1}", each, i) for i, each in enumerate(logits)]
    found.append(("ensemble: mean of probabilities", logits.softmax(2).mean(0), None))
    found.append(("ensemble: mean of logits", logits.mean(0), None))
    for name, each, only in found:
        right = (each.argmax(1) == data.y_test).double().mean().item()
        cost = common.macs(functools.partial(exits, net, only=only), data)
        rows.append({"model": name, "macs": cost, "clean_acc": right})
    return rows


def without(data, digit):
    """`data` without the training and held-out images of a digit."""
    train, val = data.y_train != digit, data.y_val != digit
    images = {"x_train": data.x_train[train], "x_val": data.x_val[val]}
    labels = {"y_train": data.y_train[train], "y_val": data.y_val[val]}
    return dataclasses.replace(data, **images, **labels)


@torch.no_grad()
def corrected(model, data, digit):
    """A copy of the model that predicts the digit on as many training images as show it.

    The bias of the digit is raised for that; of these images, no label is used but their number.
    """
    model = copy.deepcopy(model)
    with common.evaluating(model):
        logits = torch.cat([model(common.to_float(x)) for x in data.x_train.split(500)])
    lead = torch.cat([logits[:, :digit], logits[:, digit + 1 :]], 1).amax(1) - logits[:, digit]
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    last.bias[digit] += lead.quantile((data.y_train == digit).double().mean().item())
    return model


# ------------------------------------------------------------------------------------------------
# Training


def plan(stage, args):
    """(method, epochs of the schedule, epochs, learning rate, batch size) of a stage."""
    if stage == "teacher":
        method, total = METHODS[args.method][1], args.teacher_epochs or args.epochs
        numbers = args.teacher_lr or args.lr, args.teacher_batch_size or args.batch_size
        return "at" if method == "x'" else "plain", total, args.teacher_es or total, *numbers
    method = args.method if stage == "student" else "plain"
    return method, args.epochs, args.epochs, args.lr, args.batch_size


def lr_factor(step, steps, total, args):
    """The factor on the learning rate at a step, of `steps` an epoch and `total` epochs."""
    done, drops = step // steps / total, step // steps
    if args.schedule == "steps":
        milestones = [m / args.epochs for m in args.milestones or []] or [0.3, 0.6, 0.8]
        drops = sum(done >= milestone for milestone in milestones)
    cosine = (1 + math.cos(math.pi * step / (steps * total))) / 2
    factor = cosine if args.schedule == "cosine" else args.gamma**drops
    return factor * min(1.0, (step + 1) / max(1.0, steps * args.warmup))


def teacher_settings(flags):
    """What a teacher depends on, of the flags (a dict): equal settings, equal teacher."""
    settings = {"plan": plan("teacher", argparse.Namespace(**flags))}
    names = "data train_subset val_size seed deterministic precision width momentum weight_decay"
    names += " schedule gamma warmup teacher_shift teacher_ckpt"
    names += " eps steps step_size attack_bn" * (settings["plan"][0] == "at")
    settings["milestones"] = [m / flags["epochs"] for m in flags["milestones"] or []]
    settings["model"] = flags["teacher_model"] or flags["model"]
    return settings | {name: flags[name] for name in names.split()}


@torch.no_grad()
def fixed_logits(teacher, data, teaches):
    """The teacher's logits (N, K) on the training images, if an image is its one view; or None."""
    if teaches == "x" and not data.pad and not data.flip:
        return torch.cat([teacher(common.to_float(x)) for x in data.x_train.split(500)])
    return None


def train_model(model, teacher, data, stage, args, run):
    """Train the model of a stage into the run's <stage>.pt; teacher: in eval mode, or None."""
    method, total, stop, lr, batch_size = plan(stage, args)
    loss_fn, sees, teaches, *_ = METHODS[method]
    settings = {name: value for name, value in vars(args).items() if name in needs(loss_fn)}
    pgd, steps = (args.eps, args.step_size, args.steps), -(-len(data.x_train) // batch_size)
    parts = {"model": model} | ({"exits": Exits(model)} if method == "self-distillation" else {})
    nets = nn.ModuleList(parts.values())
    optimizer = common.sgd(nets, lr, args.momentum, args.weight_decay)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, steps, total, args))
    chosen = {*(args.grad_epochs or [1, (stop + 1) // 2, stop])} if args.grad_heatmap else {}
    gradients = common.Gradients(model, sorted(epoch for epoch in chosen if epoch <= stop))
    table = fixed_logits(teacher, data, teaches)

    @plumbing.captured(run, nets)
    def compute(x, labels, index):
        shown, known = {"x": x}, {"labels": labels}  # known: by the names that the losses use
        with plumbing.autocast(run):
            if sees == "x'":
                attacked = common.attacked(model, args.attack_bn)
                shown["x'"] = common.pgd(attacked, x, labels, *pgd)
            if teaches:
                with torch.no_grad():
                    logits = teacher(shown[teaches]) if table is None else table[index]
                known["teacher_logits"] = logits
            model.train()
            if "exits" in parts:
                known["exit_logits"], known["exit_features"] = parts["exits"](model, x)
            logits = known["exit_logits"][-1] if "exits" in parts else model(shown[sees])
            known["student_logits"] = logits
            loss = loss_fn(**{k: known[k] for k in needs(loss_fn) if k in known}, **settings)
        traced = loss if args.grad_loss == "own" else plain_loss(logits, labels)
        gradients.add(traced, steps)
        loss.backward()
        return plumbing.metrics(loss, logits, labels)

    seed = common.derive_seed(args.seed, stage) if stage == "teacher" else args.seed
    state = parts | {"optimizer": optimizer, "schedule": schedule, "gradients": gradients}
    for epoch in plumbing.epochs(run, stage, stop, **state):
        history, gradients.epoch = [], epoch + 1
        for batch in common.batches(data, batch_size, seed, epoch, run, views=True):
            optimizer.zero_grad()
            history.append(compute(*batch))
            optimizer.step()
            schedule.step()  # per batch
        plumbing.end_epoch(run, epoch, history, data, *(pgd if sees == "x'" else ()))
    meta = {"training": method, "epoch": stop, "seconds": run.seconds, "best": run.best}
    meta |= {"gradients": gradients.numbers()} if chosen else {}
    meta |= {"exits": parts["exits"].state_dict()} if "exits" in parts else {}
    plumbing.save_model(run, stage, model, meta)


def trained(stage, teacher, data, args, run):
    """-> (model in eval mode, its meta) of <stage>.pt, trained now if it is not there."""
    path, name = run.dir / f"{stage}.pt", args.model
    if not path.exists():
        if stage == "teacher":
            shift = data.pad if args.teacher_shift is None else args.teacher_shift
            name, data = args.teacher_model or name, dataclasses.replace(data, pad=shift)
        elif args.omit_digit is not None:
            data = without(data, args.omit_digit)
        # student and student-alone start from the same weights and see the same batches
        model = common.model_for(data, name, args.seed, stage.split("-")[0], args.width)
        train_model(model, teacher, data, stage, args, run)
    return common.load_model(path, run.device)


# ------------------------------------------------------------------------------------------------
# The whole job


def check(args, data):
    """An error if --delta or --teacher-ckpt does not go with the data and the method."""
    guess = 1 / len(data.classes)
    if "delta" in needs(METHODS[args.method][0]) and args.delta <= guess:
        common.fail(f"--delta: expected more than {guess:g}, that of a guess, got {args.delta:g}")
    if args.teacher_ckpt and args.method in SAME_NET and Path(args.teacher_ckpt).exists():
        arch = common.load_model(args.teacher_ckpt, "cpu", data, args.model)[0].arch
        if arch["width"] != args.width:
            common.fail(f"{args.teacher_ckpt}: of width {arch['width']:g}, not {args.width:g}")


def evaluated(name, model, meta, data, args):
    """A row of the table: size, accuracies (with --omit-digit, of that digit and of the others)."""
    import eval_robustness

    print(f"evaluating {name} on {len(data.x_test)} test images", flush=True)
    weights, every = (sum(p.numel() for p in model.parameters() if p.dim() > d) for d in (1, 0))
    row = {"model": name, "weights": weights, "parameters": every}  # Table 1: without biases
    test, options = (data.x_test, data.y_test), {"eps": args.eps, "seed": args.seed}
    row["macs"] = common.macs(model, data)
    row |= eval_robustness.evaluate(model, *test, args.eval_attack, **options)
    if args.omit_digit is not None:
        with common.evaluating(model):
            right = common.correct(model, *test)
        digit = data.y_test == args.omit_digit
        row[f"without_{args.omit_digit}_acc"] = right[~digit].double().mean().item()
        row[f"only_{args.omit_digit}_acc"] = right[digit].double().mean().item()
    return row | {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}


def main(argv=None):
    """For each seed: data, teacher, student alone, student, evaluation, one table."""
    runs = [train_and_evaluate(args) for args in plumbing.per_seed(parse_args(argv))]
    plumbing.across_seeds(runs)


def train_and_evaluate(args):
    """The run of one seed; everything is in its folder. -> Run"""
    with plumbing.open_run("teacher_free_kd", args, lambda data: check(args, data)) as (run, data):
        if run.finished:
            return run
        used = {name: getattr(args, name) for name in recipe(args) if name != "eval_attack"}
        used = [f"{k.replace('_', '-')} {v}" for k, v in used.items() if v is not None]
        print(f"{args.method} with", ", ".join(used), flush=True)
        models, rows, teacher = {}, [], None  # models: row of the table -> (model, its training)
        if METHODS[args.method][2]:
            options = teacher_settings, lambda: trained("teacher", None, data, args, run)
            teacher, meta = plumbing.get_teacher(run, data, *options)
            models[f"teacher ({meta.get('training', 'given')})"] = teacher, meta
        for stage in [*["student-alone"] * (args.method in COMPARED), "student"]:
            model, meta = trained(stage, teacher, data, args, run)
            models[f"{stage} ({meta['training']})"] = model, meta
        for name, (model, meta) in models.items():
            rows.append(evaluated(name, model, meta, data, args))
            if args.bias_correction and "student" in name:
                raised = corrected(model, data, args.omit_digit)
                rows.append(evaluated(f"{name}, bias corrected", raised, meta, data, args))
        if "exits" in meta:
            rows += exit_rows(model, meta["exits"], data)
        if meta["best"].get("epoch", args.epochs) != args.epochs:
            best = common.load_model(run.dir / "student_best.pt", run.device)
            rows.append(evaluated("student, best on held-out images", *best, data, args))
        if args.grad_heatmap:
            from benchmark import gradients

            path = Path(args.grad_heatmap)
            own = path.with_stem(f"{path.stem}-s{args.seed}")
            gradients.write(own if args.seeds else path, models)
        plumbing.finish(run, rows)
    return run


if __name__ == "__main__":
    common.start(main)
