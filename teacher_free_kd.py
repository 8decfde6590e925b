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
         python teacher_free_kd.py --method re-kd --help            # the defaults of a method
Defaults Nets, epochs, learning rates, alpha, temperature and more depend on --method and --data:
         the tables METHODS and TRAINING, the function method_defaults. A run prints them.
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
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import common
import eval_robustness

DEMO = {
    "data": "shapes",
    "epochs": 5,
    "teacher-epochs": 4,
    "batch-size": 32,
    "lr": 0.1,
    "gamma": 0.7,
    "steps": 3,
    "step-size": "4/255",
    "train-subset": 2000,
    "test-subset": 500,
    "val-size": 200,
}


class Method(NamedTuple):
    """What a training method shows to whom, and its default weights. None: it has no such thing."""

    student_sees: str  # x, or the adversarial example x_adv
    teacher_sees: str | None = None  # None: there is no trained teacher
    alpha: float | None = None
    temperature: float | None = None


METHODS = {
    "plain": Method("x"),
    "label-smoothing": Method("x"),
    "vanilla": Method("x", "x", alpha=1.0, temperature=10.0),  # paper: 10 in Table 2, no other one
    "re-kd": Method("x", "x", alpha=0.6, temperature=20.0),
    "tf-kd-self": Method("x", "x", alpha=0.95, temperature=6.0),
    "tf-kd-reg": Method("x", alpha=0.1, temperature=20.0),
    "self-distillation": Method("x"),
    "at": Method("x_adv"),
    "at-kd": Method("x_adv", "x_adv", alpha=1.0, temperature=1.0),
    "at-tf-kd-self": Method("x_adv", "x", alpha=0.9, temperature=1.0),  # Eq. 6: T never sees x'
    "at-tf-kd-reg": Method("x_adv", alpha=0.3, temperature=20.0),
}
TEACHER_LIKE_STUDENT = {"tf-kd-self", "at-tf-kd-self"}  # methods whose two nets must be equal
ALSO_TRAINED_ALONE = {"vanilla", "re-kd"}  # methods that train the student without teacher too

# Which methods a flag has an effect on
USES_KD_LOSS = {"vanilla", "re-kd", "tf-kd-self", "at-tf-kd-self"}
USES_VIRTUAL_TEACHER = {"tf-kd-reg", "at-tf-kd-reg"}
HAS_KL = USES_KD_LOSS | USES_VIRTUAL_TEACHER
FLAG_METHODS = {
    "--alpha": HAS_KL | {"at-kd"},
    "--temperature": HAS_KL | {"at-kd"},
    "--tau2": HAS_KL | {"self-distillation"},
    "--no-tau2": HAS_KL | {"self-distillation"},
    "--kl-reduction": HAS_KL | {"self-distillation"},
    "--delta": USES_VIRTUAL_TEACHER,
    "--reg-form": USES_VIRTUAL_TEACHER,
    "--smoothing": {"label-smoothing"},
    "--byot-alpha": {"self-distillation"},
    "--byot-lambda": {"self-distillation"},
    "--byot-temperature": {"self-distillation"},
    "--teacher-ckpt": {name for name, method in METHODS.items() if method.teacher_sees},
}

# The small and the large net by --data
SMALL_NETS = {"mnist": "mlp-400", "shapes": "wrn-10-1"}
LARGE_NETS = {"mnist": "mlp-1200-1200", "shapes": "wrn-16-2"}
OTHER_DATA = {"small": "resnet18", "large": "resnet50"}

# Optimisation by the kind of training: digits (MNIST), clean (other images), at (adversarial)
TRAINING = {
    "digits": {
        "epochs": 20,
        "teacher_epochs": 10,
        "batch_size": 128,
        "teacher_batch_size": 256,
        "lr": 0.02,
        "teacher_lr": 0.1,
        "schedule": "cosine",
        "gamma": 0.2,
        "weight_decay": 0.0,
        "warmup": 0,
        "teacher_shift": 2,  # differs: 5
    },
    "clean": {  # Yuan et al.: x 0.2 at 30, 60 and 80 % of the epochs
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "steps",
        "gamma": 0.2,
        "weight_decay": 5e-4,
        "warmup": 1,
    },
    "at": {
        "epochs": 50,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "exponential",
        "gamma": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0,
    },
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.RunParser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="at-tf-kd-self", help="training method, see Loss")
    add("--model", help="net of the student: resnet18, wrn-16-2, mlp-400, MODULE:FUNCTION")
    add("--width", type="positive", default=1.0, help="factor on the channels of both ResNets")
    add("--alpha", type="probability", help="weight of the KL; in at-kd of the teacher")
    add("--temperature", type="positive", help="temperature of both softmaxes in the KL")
    add("--tau2", action=argparse.BooleanOptionalAction, help="multiply the KL by temperature^2")
    add(
        "--kl-reduction",
        choices=["batchmean", "mean"],
        default="batchmean",
        help="batchmean: KL averaged over images; mean: divided by the number of classes too, "
        "as in the code of Yuan et al.",
    )
    add(
        "--delta",
        type="probability",
        default=0.99,
        help="probability that the virtual teacher gives to the label",
    )
    add(
        "--reg-form",
        choices=["repo", "paper", "plain"],
        default="paper",
        help="what is softened with the virtual teacher: paper: its log and the student; repo: its "
        "probabilities, as in the code of Yuan et al.; plain: nothing",
    )
    add(
        "--smoothing",
        type="probability",
        default=0.1,
        help="mass that label-smoothing spreads over all classes",
    )
    add(
        "--omit-digit",
        type=int,
        choices=range(10),
        help="MNIST digit that is left out of the student's training images",
    )
    add(
        "--bias-correction",
        action="store_true",
        help="also evaluate the students with the bias of the omitted digit raised",
    )
    add(
        "--byot-alpha",
        type="probability",
        default=0.3,
        help="self-distillation: weight of the KL at each exit",
    )
    add(
        "--byot-lambda",
        type="nonnegative",
        default=0.03,
        help="self-distillation: weight of the distance between features",
    )
    add(
        "--byot-temperature",
        type="positive",
        default=3.0,
        help="self-distillation: temperature of both softmaxes at each exit",
    )
    group = parser.add_argument_group("teacher (where no default is shown: same as the student)")
    add = group.add_argument
    add("--teacher-model", help="net of the teacher: resnet50, wrn-16-2, ...")
    add(
        "--teacher-ckpt",
        help="file of a finished teacher, or a state_dict of a MODULE:FUNCTION; none is trained",
    )
    add("--teacher-epochs", type="positive int", help="epochs of the teacher's training")
    add(
        "--teacher-es",
        type="positive int",
        help="stop the teacher after this epoch (default: no stop)",
    )
    add("--teacher-lr", type="positive", help="highest learning rate of the teacher")
    add("--teacher-batch-size", type="positive int", help="images per step of the teacher")
    add(
        "--teacher-shift",
        type="nonnegative int",
        help="random shift of the teacher's images, in pixels",
    )
    add = parser.add_argument_group("attack").add_argument
    add("--eps", type="pixel units", default="8/255", help="radius, in training and evaluation")
    add("--steps", type="positive int", default=7, help="number of PGD steps in training")
    add("--step-size", type="pixel units", default="2/255", help="PGD step size in training")
    add(
        "--attack-bn",
        choices=["eval", "train"],
        default="eval",
        help="mode of BatchNorm during the attack in training",
    )
    add("--eval-attack", nargs="+", type=attack_name, help="what is evaluated: clean pgd20 aa ...")
    add = parser.add_argument_group("gradients (Figure 1)").add_argument
    add(
        "--grad-heatmap",
        metavar="FILE.npz",
        help="write the mean |gradient| of each layer there; under torchrun that of the first "
        "process's images",
    )
    add(
        "--grad-epochs",
        type="positive int",
        nargs="+",
        help="epochs whose gradients are recorded (default: first, middle and last)",
    )
    add(
        "--grad-loss",
        choices=["own", "ce"],
        default="own",
        help="loss whose gradients are recorded: that of the method, or cross-entropy alone",
    )
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type="positive int", help="epochs of the student's training")
    add("--batch-size", type="positive int", help="images per step of the student")
    add("--lr", type="positive", help="highest learning rate of the student")
    add("--momentum", type="probability", default=0.9, help="momentum of SGD for both nets")
    add("--weight-decay", type="nonnegative", help="weight decay of SGD for both nets")
    add(
        "--schedule",
        choices=["steps", "exponential", "cosine"],
        help="learning rate: times --gamma at milestones, or after each epoch, or a half cosine",
    )
    add(
        "--milestones",
        type="positive int",
        nargs="+",
        help="epochs of the student at which --schedule steps lowers the rate, the teacher in "
        "proportion (default: 30, 60 and 80 %% of the training)",
    )
    add("--gamma", type="positive", help="factor on the rate at a milestone or after an epoch")
    add("--warmup", type="nonnegative", help="epochs in which the learning rate rises to --lr")
    parser.add_run_flags()
    parser.set_defaults(data=None)
    argv = sys.argv[1:] if argv is None else list(argv)
    flags, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**method_defaults(flags.method, flags.data, flags.demo))
    args = parser.parse_run(argv, {"--demo": DEMO})
    check_flags(args, parser.error)
    return args


def method_defaults(method, data, demo):
    """{flag: default} of what depends on --method, --data (None: not given) and --demo."""
    if data is None and demo:
        data = "shapes"
    elif data is None:
        data = "mnist" if method == "vanilla" else "cifar10"

    small = SMALL_NETS.get(data, OTHER_DATA["small"])
    large = LARGE_NETS.get(data, OTHER_DATA["large"])
    model, teacher_model = small, None  # None: as the student's
    if method == "vanilla":
        teacher_model = large
    elif method == "re-kd":
        model, teacher_model = large, small

    attacked = METHODS[method].student_sees == "x_adv"
    eval_attack = ["clean"]
    if attacked:
        eval_attack = ["clean", "pgd20"] if demo else ["clean", "pgd20", "aa"]

    if attacked:
        training = TRAINING["at"]
    elif data == "mnist":
        training = TRAINING["digits"]
    else:
        training = TRAINING["clean"]
    return {
        "data": data,
        "model": model,
        "teacher_model": teacher_model,
        "alpha": METHODS[method].alpha,
        "temperature": METHODS[method].temperature,
        "tau2": method != "self-distillation",  # differs: 7
        "eval_attack": eval_attack,
        **training,
    }


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    for flag, methods in FLAG_METHODS.items():
        if flag in args.given and args.method not in methods:
            error(f"{flag}: has no effect with --method {args.method}; leave it out")
    if args.omit_digit is not None and args.data != "mnist":
        error(f"--omit-digit: goes with --data mnist, not {args.data}")
    if args.bias_correction and args.omit_digit is None:
        error("--bias-correction: raises the bias of an omitted digit; give --omit-digit")
    teacher_epochs = args.teacher_epochs or args.epochs
    if args.teacher_es is not None and args.teacher_es > teacher_epochs:
        error(f"--teacher-es {args.teacher_es}: --teacher-epochs is only {teacher_epochs}")
    if args.grad_heatmap and args.graph:
        error("--grad-heatmap: its gradients cannot be replayed by --graph; leave one of them out")
    if max(args.grad_epochs or [1]) > args.epochs:
        error(f"--grad-epochs {max(args.grad_epochs)}: --epochs is only {args.epochs}")
    path = Path(args.grad_heatmap or "x.npz")
    if path.suffix != ".npz" or not path.absolute().parent.is_dir():
        error(f"--grad-heatmap: expected FILE.npz in a folder that exists, got {path}")
    if args.method == "self-distillation" and (args.model.startswith("mlp") or ":" in args.model):
        needs = "self-distillation needs the stages of our ResNets and WideResNets"
        error(f"--model: {needs}, got {args.model}")
    if args.method == "self-distillation" and args.width * 32 % 1:
        error(f"--width: self-distillation needs a multiple of 1/32, got {args.width:g}")
    for name in args.eval_attack or ():
        if args.eval_attack.count(name) > 1:
            error(f"--eval-attack: expected each name once, got {name} twice")
    other_net = args.teacher_model not in (None, args.model)
    if args.method in TEACHER_LIKE_STUDENT and other_net:
        error(f"--teacher-model: --method {args.method} needs the student's net, {args.model}")


def attack_name(text):
    """The `type=` of --eval-attack: `clean` or the name of an attack of eval_robustness.py."""
    if text in eval_robustness.NOT_ATTACKS and text != "clean":
        raise argparse.ArgumentTypeError(f"expected clean, pgdN, aa, ..., got {text!r}")
    return eval_robustness.attack_name(text)


# ------------------------------------------------------------------------------------------------
# Losses: functions of logits and labels. Copy the ones you need with mix_labels and kl.


# Copied from robust_kd.mix_labels
def mix_labels(teacher_logits, labels, alpha, temperature=1.0):
    """alpha T + (1 - alpha) y, the mixed targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    labels are (B, K) after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, teacher_probs.shape[1])
    return alpha * teacher_probs + (1 - alpha) * labels


# Copied from robust_kd.kl
def kl(targets, student_logits, temperature=1.0, kl_reduction="batchmean"):
    """tau^2 KL(targets || S), S softened by tau: (B, K) x2 -> (); `mean` divides by K too."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    terms = F.kl_div(student_log_probs, targets.detach(), reduction="none")  # (B, K)
    if kl_reduction == "mean":
        return temperature**2 * terms.mean()
    return temperature**2 * terms.sum(1).mean()


def plain_loss(student_logits, labels):
    """CE(S, y), standard training on x, adversarial training on x'; (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels)


def smoothing_loss(student_logits, labels, smoothing):
    """CE of (1 - s) y + s / K, label smoothing (Szegedy et al. 2016); (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels, label_smoothing=smoothing)


def kd_loss(student_logits, teacher_logits, labels, alpha, temperature, tau2, kl_reduction):
    """Eqs. (2), (3), (6): (1-alpha) CE(S, y) + alpha t^2 KL(T_t || S_t); (B, K) x2, (B,) -> ().

    tau2: False leaves out the t^2.
    """
    targets = (teacher_logits.float() / temperature).softmax(1)
    distilled = kl(targets, student_logits, temperature, kl_reduction)
    if not tau2:
        distilled = distilled / temperature**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def virtual_teacher(labels, classes, delta):
    """p^d of Eq. (4): delta for the label, (1 - delta) / (K - 1) for the others; (B,) -> (B, K)."""
    other = (1 - delta) / (classes - 1)
    return other + (delta - other) * F.one_hot(labels, classes)


def soften(probs, temperature, reg_form):
    """p^d (B, K) -> (the targets (B, K), the temperature of the student's softmax)."""
    if reg_form == "paper":
        return (probs.log() / temperature).softmax(1), temperature
    if reg_form == "repo":  # differs: 4
        return (probs / temperature).softmax(1), 1.0
    return probs, 1.0  # plain


def reg_loss(student_logits, labels, alpha, temperature, delta, reg_form, tau2, kl_reduction):
    """Eqs. (4), (7): (1-alpha) CE(S, y) + alpha t^2 KL(p^d_t || S_t); (B, K), (B,) -> ().

    The t^2 is there if S is softened, and tau2.
    """
    probs = virtual_teacher(labels, student_logits.shape[1], delta)
    targets, student_temperature = soften(probs, temperature, reg_form)
    distilled = kl(targets, student_logits, student_temperature, kl_reduction)
    if not tau2:
        distilled = distilled / student_temperature**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def at_kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """CE(alpha T(x') + (1-alpha) y, S(x')), AKD (Maroto et al. 2022); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature).detach()
    return temperature**2 * F.cross_entropy(student_logits / temperature, targets)


def self_distillation_loss(
    exit_logits,
    exit_features,
    labels,
    byot_alpha,
    byot_lambda,
    byot_temperature,
    tau2,
    kl_reduction,
):
    """CE(S_n, y) + sum over i < n of (1-a) CE(S_i, y) + a KL(S_n || S_i) + lambda |f_i - f_n|.

    Zhang et al. 2019. Lists of n logits (B, K) and n features (B, C), the last exit at the end;
    labels (B,) -> (). The last exit learns from the labels alone.
    """
    last_logits, last_features = exit_logits[-1].detach(), exit_features[-1].detach()
    loss = F.cross_entropy(exit_logits[-1], labels)
    for logits, features in zip(exit_logits[:-1], exit_features[:-1]):
        loss = loss + kd_loss(
            logits, last_logits, labels, byot_alpha, byot_temperature, tau2, kl_reduction
        )
        distance = (features - last_features).float().norm(dim=1).mean()
        loss = loss + byot_lambda * distance
    return loss


# ------------------------------------------------------------------------------------------------
# Self-distillation: a classifier after each stage


class ExitHead(nn.Module):
    """Classifier of an early stage: bottlenecks to the shape of the last stage, mean, linear.

    widths: channels of this stage and of all that follow. h (B, C, H, W) -> logits (B, K), pooled
    features (B, C').
    """

    def __init__(self, widths, classes):
        super().__init__()
        blocks = []
        for channels, following in itertools.pairwise(widths):
            block = common.PostActBlock(channels, following // 4, stride=2, expansion=4)
            blocks.append(block)
        self.adaptor = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, h):
        features = self.adaptor(h).mean((2, 3))
        return self.linear(features).float(), features


class Exits(nn.Module):
    """A ConvNet with a classifier after each stage; the last one is the net's own.

    x (B, C, H, W) -> logits, features: lists with a (B, K) and a (B, C') for each exit.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        # channels that each stage puts out: no layer in it has more
        widths = [max(p.shape[0] for p in stage.parameters()) for stage in net.stages]
        heads = [ExitHead(widths[i:], net.fc.out_features) for i in range(len(widths) - 1)]
        self.early_heads = nn.ModuleList(heads)
        self.early_heads.to(net.fc.weight.device, memory_format=torch.channels_last)

    def forward(self, x):
        logits, features = [], []
        h = self.net.stem(self.net.normalize(x))
        for i, stage in enumerate(self.net.stages):
            h = stage(h)
            exit_logits, exit_features = self.head(i, h)
            logits.append(exit_logits)
            features.append(exit_features)
        return logits, features

    def head(self, i, h):
        """The output h of stage i -> logits (B, K) and pooled features (B, C') of its exit."""
        if i < len(self.early_heads):
            return self.early_heads[i](h)
        features = self.net.head_norm(h).mean((2, 3))
        return self.net.fc(features).float(), features


class OneExit(nn.Module):
    """Exit i (0, 1, ...) of Exits as a net: x -> logits (B, K), computing no more than it needs."""

    def __init__(self, exits, i):
        super().__init__()
        self.exits, self.i = exits, i

    def forward(self, x):
        net = self.exits.net
        h = net.stem(net.normalize(x))
        for stage in net.stages[: self.i + 1]:
            h = stage(h)
        return self.exits.head(self.i, h)[0]


def exit_rows(net, exit_weights, data):
    """Rows of the table: accuracy and cost of each exit and of two ensembles of all exits.

    exit_weights: the state_dict of early_heads. Evaluated in strict float32, like all nets.
    """
    exits = Exits(net)
    exits.early_heads.load_state_dict(exit_weights)
    logits, cost = {}, {}  # by the name of the row
    for i in range(len(net.stages)):
        one = OneExit(exits, i)
        logits[f"exit {i + 1}"] = common.predict(one, data.x_test)
        cost[f"exit {i + 1}"] = macs(one, data)
    of_all_exits = torch.stack(list(logits.values()))  # (exits, N, K)
    logits["ensemble: mean of probabilities"] = of_all_exits.softmax(2).mean(0)
    logits["ensemble: mean of logits"] = of_all_exits.mean(0)
    cost_of_all_exits = macs(exits, data)
    rows = []
    for name, exit_logits in logits.items():
        right = exit_logits.argmax(1) == data.y_test
        row = {
            "model": name,
            "macs": cost.get(name, cost_of_all_exits),
            "clean_acc": right.double().mean().item(),
        }
        rows.append(row)
    return rows


def macs(model, data):
    """Multiply-adds of the layers of a net for one image: what some papers call FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode  # a slow import

    size, channels = data.x_test.shape[2:]
    image = torch.zeros(1, channels, size, size, device=data.x_test.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # in training mode the image would move the statistics of BatchNorm
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    for module, training in modes.items():
        module.training = training
    return counter.get_total_flops() // 2


# ------------------------------------------------------------------------------------------------
# A digit that the student never sees (Table 2)


def without_digit(data, digit):
    """`data` without the training and held-out images of a digit."""
    train = data.y_train != digit
    val = data.y_val != digit
    return dataclasses.replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train],
        x_val=data.x_val[val],
        y_val=data.y_val[val],
    )


@torch.no_grad()
def correct_bias(model, data, digit):
    """A copy of the model that predicts the digit on as many training images as show it.

    The bias of the digit is raised for that (Hinton et al. 2015); of these images no label is used
    but how many of them show the digit.
    """
    logits = common.predict(model, data.x_train)  # (N, K)
    others = torch.cat([logits[:, :digit], logits[:, digit + 1 :]], 1)
    missing = others.amax(1) - logits[:, digit]  # (N,) raised by this, the digit is predicted
    share = (data.y_train == digit).double().mean().item()
    raised = torch.zeros_like(logits[0])  # (K,)
    raised[digit] = missing.quantile(share)
    model = copy.deepcopy(model)
    model.register_forward_hook(lambda module, inputs, output: output + raised)
    return model


# ------------------------------------------------------------------------------------------------
# The gradients of Figure 1


class Gradients(nn.Module):
    """The mean |dL/dW| of each layer in some epochs (1, 2, ...): Figure 1.

    A layer is named by its stage and its number there ("2.1"), or as the stage's shortcut
    ("2.shortcut"); an MLP is one stage. A module, so that checkpoints keep its sums.
    """

    def __init__(self, model, epochs, steps_per_epoch):
        super().__init__()
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.weights = {}  # name of the layer -> its weight
        for i, stage in enumerate(getattr(model, "stages", [model]), 1):
            weights = {n: p for n, p in stage.named_parameters() if p.dim() > 1}  # without biases
            straight = [weight for name, weight in weights.items() if "shortcut" not in name]
            for number, weight in enumerate(straight, 1):
                self.weights[f"{i}.{number}"] = weight
            for name, weight in weights.items():
                if "shortcut" in name:
                    self.weights[f"{i}.shortcut"] = weight
        device = next(model.parameters()).device
        self.register_buffer("means", torch.zeros(len(epochs), len(self.weights), device=device))

    def add(self, loss, epoch):
        """Add the gradients of the loss of one step, if the epoch is recorded."""
        if epoch in self.epochs:
            gradients = torch.autograd.grad(loss, list(self.weights.values()), retain_graph=True)
            means = torch.stack([gradient.abs().mean() for gradient in gradients])
            self.means[self.epochs.index(epoch)] += means / self.steps_per_epoch

    def numbers(self):
        """{epochs: (E,), layers: (L,), means: (E, L)}, as lists, for the meta of a model."""
        return {
            "epochs": self.epochs,
            "layers": list(self.weights),
            "means": self.means.tolist(),
        }


def write_gradients(path, nets):
    """Write the gradients in nets, {row: (net, meta)}, as <row>/means, <row>/epochs, <row>/layers.

    means (epochs, layers), epochs (epochs,), layers (layers,): names.
    """
    arrays = {}
    for row, (_, meta) in nets.items():
        for key, values in meta.get("gradients", {}).items():
            arrays[f"{row}/{key}"] = np.array(values)
    common.write_atomically(path, lambda file: np.savez(file, **arrays))
    print(f"gradients: {path}; to draw it: python benchmark/plots.py gradients {path}", flush=True)


# ------------------------------------------------------------------------------------------------
# Training


@dataclasses.dataclass
class Recipe:
    """Everything that decides how a net is trained. None: has no effect on this net.

    A teacher is kept under the digest of its recipe, so two runs with the same one share it.
    """

    method: str
    model: str
    width: float
    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str  # steps, exponential or cosine
    warmup: float  # epochs
    augment: str
    precision: str
    deterministic: bool
    schedule_epochs: int | None = None  # length of the schedule: a teacher may stop before its end
    milestones: list | None = None  # shares of schedule_epochs
    gamma: float | None = None
    shift: int | None = None  # pixels; None: as --augment says
    eps: float | None = None
    step_size: float | None = None
    steps: int | None = None
    attack_bn: str | None = None
    grad_epochs: list | None = None  # epochs whose gradients are recorded
    grad_loss: str | None = None


def student_recipe(args, method):
    """The Recipe of the student, by --method or, alone, by the method "plain"."""
    recipe = Recipe(
        method=method,
        model=args.model,
        width=args.width,
        seed=args.seed,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        schedule=args.schedule,
        warmup=args.warmup,
        augment=args.augment,
        precision=args.precision,
        deterministic=args.deterministic,
        schedule_epochs=args.epochs,
    )
    return complete(recipe, args)


def teacher_recipe(args):
    """The Recipe of the teacher: plain, or adversarial where the student is."""
    attacked = METHODS[args.method].student_sees == "x_adv"
    epochs = args.teacher_epochs or args.epochs
    recipe = dataclasses.replace(
        student_recipe(args, "at" if attacked else "plain"),
        model=args.teacher_model or args.model,
        epochs=args.teacher_es or epochs,
        schedule_epochs=epochs,
        batch_size=args.teacher_batch_size or args.batch_size,
        lr=args.teacher_lr or args.lr,
        shift=args.teacher_shift,
    )
    return complete(recipe, args)


def complete(recipe, args):
    """The recipe with what only some schedules, methods and flags need."""
    if recipe.schedule == "steps":
        recipe.gamma = args.gamma
        recipe.milestones = [0.3, 0.6, 0.8]
        if args.milestones:
            recipe.milestones = [epoch / args.epochs for epoch in args.milestones]
    elif recipe.schedule == "exponential":
        recipe.gamma = args.gamma
        recipe.schedule_epochs = None
    if METHODS[recipe.method].student_sees == "x_adv":
        recipe.eps = args.eps
        recipe.step_size = args.step_size
        recipe.steps = args.steps
        recipe.attack_bn = args.attack_bn
    if args.grad_heatmap:  # they are kept with the weights
        chosen = args.grad_epochs or [1, (recipe.epochs + 1) // 2, recipe.epochs]
        recipe.grad_epochs = sorted({epoch for epoch in chosen if epoch <= recipe.epochs})
        recipe.grad_loss = args.grad_loss
    return recipe


def lr_factor(recipe, step, steps_per_epoch):
    """The factor on the learning rate at a step (0, 1, ...) of the whole training."""
    epoch = step // steps_per_epoch
    if recipe.schedule == "steps":
        share = epoch / recipe.schedule_epochs
        passed = [milestone for milestone in recipe.milestones if share >= milestone]
        factor = recipe.gamma ** len(passed)
    elif recipe.schedule == "exponential":
        factor = recipe.gamma**epoch
    else:
        all_steps = steps_per_epoch * recipe.schedule_epochs
        factor = (1 + math.cos(math.pi * step / all_steps)) / 2
    warmup_steps = recipe.warmup * steps_per_epoch
    if step + 1 < warmup_steps:
        factor *= (step + 1) / warmup_steps
    return factor


def train(recipe, data, folder, stage, args, teacher=None):
    """Train a net by its recipe and write it to folder/<stage>.pt -> (the net in eval mode, meta).

    stage: teacher, student-alone or student; the two students start from the same weights and see
    the same batches. teacher: in eval mode with frozen weights, or None. After an interruption the
    call goes on.
    """
    method = METHODS[recipe.method]
    role = "teacher" if stage == "teacher" else "student"
    model = common.new_model(data, recipe.model, recipe.seed, role, recipe.width)
    learner = Exits(model) if recipe.method == "self-distillation" else model
    optimizer = torch.optim.SGD(
        learner.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    steps_per_epoch = math.ceil(len(data.x_train) / recipe.batch_size)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(recipe, step, steps_per_epoch))
    attack = None
    if method.student_sees == "x_adv":
        attack = (recipe.eps, recipe.step_size, recipe.steps)
    gradients = Gradients(model, recipe.grad_epochs or [], steps_per_epoch)
    alpha, temperature = args.alpha, args.temperature
    kl_options = (args.tau2, args.kl_reduction)

    def step(x, labels):
        """One batch up to the gradients of the weights -> metrics."""
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            # The attack on the net that is trained.
            if method.student_sees == "x_adv":
                x_adv = common.pgd(common.attacked(model, recipe.attack_bn), x, labels, *attack)

            # What the teacher says. Its weights are frozen: no gradient there.
            if method.teacher_sees == "x":
                teacher_logits = teacher(x)
            elif method.teacher_sees == "x_adv":
                teacher_logits = teacher(x_adv)

            # What the student says; self-distillation listens to all of its exits.
            learner.train()
            if recipe.method == "self-distillation":
                exit_logits, exit_features = learner(x)
                logits = exit_logits[-1]
            else:
                logits = model(x_adv if method.student_sees == "x_adv" else x)

            match recipe.method:
                case "plain" | "at":
                    loss = plain_loss(logits, labels)
                case "label-smoothing":
                    loss = smoothing_loss(logits, labels, args.smoothing)
                case "vanilla" | "re-kd" | "tf-kd-self" | "at-tf-kd-self":
                    loss = kd_loss(logits, teacher_logits, labels, alpha, temperature, *kl_options)
                case "tf-kd-reg" | "at-tf-kd-reg":
                    virtual = (args.delta, args.reg_form)
                    loss = reg_loss(logits, labels, alpha, temperature, *virtual, *kl_options)
                case "at-kd":
                    loss = at_kd_loss(logits, teacher_logits, labels, alpha, temperature)
                case "self-distillation":
                    weights = (args.byot_alpha, args.byot_lambda, args.byot_temperature)
                    given = (exit_logits, exit_features, labels)
                    loss = self_distillation_loss(*given, *weights, *kl_options)

        if recipe.grad_loss == "own":
            gradients.add(loss, epoch + 1)
        elif recipe.grad_loss == "ce":
            gradients.add(plain_loss(logits, labels), epoch + 1)
        loss.backward()
        return common.metrics(loss, logits, labels)

    step = common.speed_up(step, learner, args)
    state = {
        "model": learner,
        "optimizer": optimizer,
        "schedule": schedule,
        "gradients": gradients,
    }
    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), recipe.epochs):
        common.seed_epoch(recipe.seed, stage, epoch)
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, recipe.batch_size, recipe.seed, stage, epoch):
            optimizer.zero_grad()
            history.append(step(x, labels))
            common.average_gradients(learner, len(labels))
            optimizer.step()
            schedule.step()  # per batch
        row = common.epoch_row(stage, epoch, learner, history, began)
        rows.append(row | common.validate(model, data, attack))
        common.save_epoch(folder, stage, model, state, rows, recipe.epochs, args.tensorboard)

    meta = {"training": recipe.method}
    if recipe.grad_epochs:
        meta["gradients"] = gradients.numbers()
    if recipe.method == "self-distillation":
        meta["exits"] = learner.early_heads.state_dict()
    common.save_model(folder / f"{stage}.pt", model, rows, **meta)
    return common.load_model(folder / f"{stage}.pt", data.x_train.device)


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """For each seed: data, teacher, student alone, student, evaluation, one table."""
    args = parse_args(argv)
    return common.run_seeds("teacher_free_kd", args, train_and_evaluate, prepare)


def prepare(args, data):
    """Check the flags and the teacher's file against the data, before anything is written."""
    guess = 1 / len(data.classes)
    if args.method in USES_VIRTUAL_TEACHER and args.delta <= guess:
        wanted = f"expected more than {guess:g}, the probability of a guess"
        raise common.UserError(f"--delta: {wanted}, got {args.delta:g}")
    teacher = eval_robustness.check_nets(args, data)
    if teacher is not None and args.method in TEACHER_LIKE_STUDENT:
        name, width = teacher.arch["name"], teacher.arch["width"]
        if (name, width) != (args.model, args.width):
            student = f"the student is a {args.model} of width {args.width:g}"
            raise common.UserError(
                f"{args.teacher_ckpt}: is a {name} of width {width:g}, {student}"
            )


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    print_defaults(args)
    nets = {}  # row of the table -> (net, numbers on its training)
    teacher = None
    if METHODS[args.method].teacher_sees:
        teacher, meta = get_teacher(args, data)
        nets[f"teacher ({meta.get('training', 'given')})"] = teacher, meta
    seen = data
    if args.omit_digit is not None:
        seen = without_digit(data, args.omit_digit)
    if args.method in ALSO_TRAINED_ALONE:
        recipe = student_recipe(args, "plain")
        alone, meta = train(recipe, seen, folder, "student-alone", args)
        nets["student-alone (plain)"] = alone, meta
    recipe = student_recipe(args, args.method)
    student, meta = train(recipe, seen, folder, "student", args, teacher)
    nets[f"student ({args.method})"] = student, meta

    rows = []
    for name, (net, net_meta) in nets.items():
        rows.append(evaluate(name, net, net_meta, data, args))
        if args.bias_correction and name.startswith("student"):
            raised = correct_bias(net, data, args.omit_digit)
            rows.append(evaluate(f"{name}, bias corrected", raised, net_meta, data, args))
    if args.method == "self-distillation":
        rows += exit_rows(student, meta["exits"], data)
    if meta["best"].get("epoch", meta["epoch"]) != meta["epoch"]:
        best, best_meta = common.load_model(folder / "student_best.pt", data.x_test.device)
        rows.append(evaluate("student, best on held-out images", best, best_meta, data, args))
    if args.grad_heatmap:
        path = Path(args.grad_heatmap)
        if args.seeds:
            path = path.with_stem(f"{path.stem}-s{args.seed}")
        write_gradients(path, nets)
    return rows


def print_defaults(args):
    """Print the flags whose defaults depend on the method and the data, with their values."""
    texts = []
    for name in method_defaults(args.method, args.data, args.demo):
        value = getattr(args, name)
        if value is not None and name != "eval_attack":
            texts.append(f"{name.replace('_', '-')} {value}")
    print(f"{args.method} with {', '.join(texts)}", flush=True)


def get_teacher(args, data):
    """-> (teacher, its meta): given, trained before by the same recipe, or trained now."""
    recipe = teacher_recipe(args)

    def train_teacher(folder):
        shift = data.pad if recipe.shift is None else recipe.shift
        train(recipe, dataclasses.replace(data, pad=shift), folder, "teacher", args)

    teacher, meta, _ = common.get_teacher(args, data, dataclasses.asdict(recipe), train_teacher)
    return teacher, meta


def evaluate(name, net, meta, data, args):
    """A row of the table: size, accuracies (with --omit-digit, of that digit and of the others)."""
    print(f"evaluating {name} on {len(data.x_test)} test images", flush=True)
    row = {
        "model": name,
        "weights": sum(p.numel() for p in net.parameters() if p.dim() > 1),  # as in Table 1
        "parameters": sum(p.numel() for p in net.parameters()),  # with biases
        "macs": macs(net, data),
    }
    row |= eval_robustness.evaluate(
        net, data.x_test, data.y_test, args.eval_attack, eps=args.eps, seed=args.seed
    )
    if args.omit_digit is not None:
        right = common.predict(net, data.x_test).argmax(1) == data.y_test
        shows_digit = data.y_test == args.omit_digit
        row[f"without_{args.omit_digit}_acc"] = right[~shows_digit].double().mean().item()
        row[f"only_{args.omit_digit}_acc"] = right[shows_digit].double().mean().item()
    return row | eval_robustness.training_columns(meta)


if __name__ == "__main__":
    common.start(main)
