"""Distillation from a larger, a smaller, an equal and no teacher, clean and adversarially trained.

Paper    "Knowledge Distillation: Current Understanding and Future Directions in an Adversarial
         Context", Zhang, Zhuo, Kuo (Duke University), Eqs. (1) to (7). Re-KD and Tf-KD: Yuan et
         al., CVPR 2020. Self-distillation: Zhang et al., ICCV 2019. AKD: Maroto et al. 2022, see
         robust_kd.py. S, T: probabilities of student and teacher, S_t, T_t: of logits / t; x' the
         student's adversarial example on x.
Loss     plain, at          CE(S, y)                                                   on x, x'
         label-smoothing    CE((1-s) y + s/K, S), Szegedy et al. 2016
         vanilla, re-kd     (1-alpha) CE(S, y) + alpha t^2 KL(T_t || S_t)  <- kd_loss  Eqs. 1, 2
         tf-kd-self         the same, T an equal net                <- kd_loss         Eq. 3
         tf-kd-reg          the same, T the virtual teacher p^d     <- reg_loss        Eq. 4
         self-distillation  an exit after each stage, taught by the last  <- self_distillation_loss
         at-kd              CE(alpha T(x') + (1-alpha) y, S(x'))    <- at_kd_loss      Table 5
         at-tf-kd-self, at-tf-kd-reg  Eqs. 3, 4 with S(x') and T(x)  <- the same       Eqs. 6, 7
Usage    python teacher_free_kd.py --method vanilla                 # Table 1, MNIST, on a CPU
         python teacher_free_kd.py --method vanilla --omit-digit 1 --bias-correction    # Table 2
         python teacher_free_kd.py --method re-kd --seed 0 1 2      # Table 3
         python teacher_free_kd.py --method tf-kd-reg               # Table 4; and tf-kd-self, plain
         python teacher_free_kd.py --method self-distillation       # exits and their ensemble
         python teacher_free_kd.py --method at-tf-kd-self           # Table 5; and at, at-kd, ...
         python teacher_free_kd.py --method tf-kd-self --grad-heatmap    # Figure 1
         python teacher_free_kd.py --demo                           # 1 minute on a CPU
         python teacher_free_kd.py --method re-kd --help            # the defaults of a method
Defaults Nets, epochs, learning rate, alpha, temperature and more depend on --method: the tables
         METHODS and TRAINING. A run prints them.
Expect   MNIST, seed 0: teacher 99.00, student alone 98.23, distilled 98.73 %. Demo, 1 seed, clean
         and PGD-20: teacher 0.994, 0.802, student 0.998, 0.892. ResNets: not measured yet.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); targets and logits (B, K)
Differs  1. 1,024 training images are held out to report the best epoch too (--val-size 0: none).
         2. Printed are T = 10 (Table 2); SGD, lr 0.1 with exponential decay, 50 epochs, PGD-7
            (Table 5). The rest is as in Yuan et al. (clean), Maroto et al. (at: x 0.9 an epoch), or
            what reaches Table 1 (MNIST).
         3. t^2 is in none of its equations (--no-tau2). KL: averaged over the batch; the code of
            Yuan et al. averages over the classes too, K times less.
         4. tf-kd-reg is Eq. 4 as written. The code of Yuan et al. softens p^d, not its logarithm,
            and not the student, without t^2: whatever delta, the targets are nearly uniform, as in
            label smoothing (--reg-form repo; their numbers come from it). Eq. 4 asks for p(y) =
            delta, whatever t: it smooths only nets that are surer than delta, such as have learned
            their images by heart, and makes others surer.
         5. The MNIST teacher learns from digits shifted by up to 2 pixels (Hinton et al. 2015);
            without (--teacher-shift 0) Table 1 gains less, and Table 2 is nearer to the paper.
         6. at-kd is AKD of Maroto et al.; the paper does not say what its row was trained with.
         7. self-distillation: the paper gives no number of it. Heads: bottlenecks of ResNet-50; the
            hint is the L2 distance of the pooled features, in the mean over the batch; no t^2.
"""

import copy
import dataclasses
import itertools
import math
import re
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import common
import eval_robustness


class Method(NamedTuple):
    """What is trained with a method by default. None: the method has no such thing."""

    data: str
    training: str  # row of TRAINING
    model: str
    teacher_model: str | None = None  # None: the student's
    alpha: float | None = None
    temperature: float | None = None


METHODS = {
    "plain": Method("cifar10", "clean", "resnet18"),
    "label-smoothing": Method("cifar10", "clean", "resnet18"),
    "vanilla": Method("mnist", "digits", "mlp-400", "mlp-1200-1200", alpha=1.0, temperature=10.0),
    "re-kd": Method("cifar10", "clean", "resnet50", "resnet18", alpha=0.6, temperature=20.0),
    "tf-kd-self": Method("cifar10", "clean", "resnet18", alpha=0.95, temperature=6.0),
    "tf-kd-reg": Method("cifar10", "clean", "resnet18", alpha=0.1, temperature=20.0),
    "self-distillation": Method("cifar10", "clean", "resnet18", alpha=0.3, temperature=3.0),
    "at": Method("cifar10", "at", "resnet18"),
    "at-kd": Method("cifar10", "at", "resnet18", alpha=1.0, temperature=1.0),
    "at-tf-kd-self": Method("cifar10", "at", "resnet18", alpha=0.9, temperature=1.0),
    "at-tf-kd-reg": Method("cifar10", "at", "resnet18", alpha=0.3, temperature=20.0),
}
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
        "warmup": 0.0,
        "teacher_shift": 2,  # differs: 5
        "eval_attack": ["clean"],
    },
    "clean": {  # Yuan et al.: x 0.2 at 30, 60 and 80 % of the epochs
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "steps",
        "gamma": 0.2,
        "weight_decay": 5e-4,
        "warmup": 1.0,
        "eval_attack": ["clean"],
    },
    "at": {
        "epochs": 50,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "exponential",
        "gamma": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.0,
        "eval_attack": ["clean", "pgd20", "aa"],
    },
}
DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "teacher_model": None,  # the student's
    "epochs": 5,
    "teacher_epochs": 4,
    "batch_size": 32,
    "lr": 0.1,
    "gamma": 0.7,
    "steps": 3,
    "step_size": 4 / 255,
    "train_subset": 2000,
    "test_subset": 500,
    "val_size": 200,
    "eval_attack": ["clean", "pgd20"],
}

# What the methods compute
ATTACKED = {"at", "at-kd", "at-tf-kd-self", "at-tf-kd-reg"}  # the student sees x'
TAUGHT_ON_X = {"vanilla", "re-kd", "tf-kd-self", "at-tf-kd-self"}  # Eq. 6: T never sees x'
TAUGHT_ON_X_ADV = {"at-kd"}
TEACHER_LIKE_STUDENT = {"tf-kd-self", "at-tf-kd-self"}  # the two nets must be equal
ALSO_TRAINED_ALONE = {"vanilla", "re-kd"}  # the student is trained without a teacher too
VIRTUAL_TEACHER = {"tf-kd-reg", "at-tf-kd-reg"}
HAS_KL = TAUGHT_ON_X | VIRTUAL_TEACHER | {"self-distillation"}
HAS_EFFECT = {  # flag -> the methods on which it has an effect; with others it is refused
    "--alpha": HAS_KL | TAUGHT_ON_X_ADV,
    "--temperature": HAS_KL | TAUGHT_ON_X_ADV,
    "--tau2": HAS_KL,
    "--delta": VIRTUAL_TEACHER,
    "--reg-form": VIRTUAL_TEACHER,
    "--smoothing": {"label-smoothing"},
    "--byot-lambda": {"self-distillation"},
    "--teacher-ckpt": TAUGHT_ON_X | TAUGHT_ON_X_ADV,
}
# Flags that have an effect with all methods, but on no teacher
OF_STUDENTS = {"omit_digit", "bias_correction", "eval_attack", "grad_heatmap", "grad_loss"}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.Parser(__doc__)
    probability, positive = common.probability, common.positive
    whole, nonnegative = common.whole, common.nonnegative
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="at-tf-kd-self", help="training method, see Loss")
    add("--model", help="net of the student, such as resnet18, wrn-16-2 or mlp-400")
    add("--alpha", type=probability, help="weight of the KL; in at-kd of the teacher")
    add("--temperature", type=positive, help="temperature of both softmaxes in the KL")
    add("--tau2", **common.SWITCH, help="multiply the KL by the square of the temperature")
    add("--delta", type=probability, default=0.99, help="what a virtual teacher gives the label")
    forms = {"choices": ["paper", "repo"], "default": "paper"}
    add("--reg-form", **forms, help="what is softened with a virtual teacher, see Differs 4")
    add("--smoothing", type=probability, default=0.1, help="mass that label-smoothing spreads")
    digits = {"type": int, "choices": range(10)}
    add("--omit-digit", **digits, help="MNIST digit that the students' training images lack")
    correction = "also evaluate the students with the bias of the omitted digit raised"
    add("--bias-correction", action="store_true", help=correction)
    distance = "self-distillation: weight of the distance between features"
    add("--byot-lambda", type=nonnegative, default=0.03, help=distance)

    group = parser.add_argument_group("teacher (where no default is shown: same as the student)")
    add = group.add_argument
    add("--teacher-model", help="net of the teacher, named as for --model")
    add("--teacher-ckpt", metavar="FILE", help="file of a finished teacher; none is trained then")
    add("--teacher-epochs", type=whole, help="epochs of the teacher's schedule")
    add("--teacher-es", type=whole, help="stop the teacher after this epoch (default: no stop)")
    add("--teacher-lr", type=positive, help="highest learning rate of the teacher")
    add("--teacher-batch-size", type=common.at_least_2, help="images per step of the teacher")
    shift = "random shift of the teacher's images in pixels (default: as --augment says)"
    add("--teacher-shift", type=common.whole_or_0, help=shift)

    add = parser.add_argument_group("attack").add_argument
    pixels = {"type": common.pixel_units, "default": 8 / 255}
    add("--eps", **pixels, help="radius of the attacks in pixel units")
    add("--steps", type=whole, default=7, help="number of PGD steps in training")
    add("--step-size", type=common.pixel_step, help="PGD step (default: a quarter of --eps)")
    add("--attack-bn", choices=["eval", "train"], default="eval", help="BatchNorm in the attack")
    names = {"nargs": "+", "metavar": "ATTACK"}
    add("--eval-attack", **names, help="what is evaluated, such as clean pgd20 aa")

    add = parser.add_argument_group("gradients (Figure 1)").add_argument
    heatmap = "write each layer's mean |gradient| in first, middle and last epoch: gradients.npz"
    add("--grad-heatmap", action="store_true", help=heatmap)
    losses = {"choices": ["own", "ce"], "default": "own"}
    add("--grad-loss", **losses, help="gradients of the method's own loss, or of cross-entropy")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole, help="epochs of the student's training")
    add("--batch-size", type=common.at_least_2, help="images per step of the student")
    add("--lr", type=positive, help="highest learning rate of the student")
    add("--weight-decay", type=nonnegative, help="weight decay of SGD for both nets")
    schedules = {"choices": ["steps", "exponential", "cosine"]}
    add("--schedule", **schedules, help="times --gamma at milestones or each epoch, or a cosine")
    drops = "epochs after which --schedule steps lowers the rate, for a teacher in proportion"
    epochs = {"type": whole, "nargs": "+", "metavar": "EPOCH"}
    add("--milestones", **epochs, help=f"{drops} (default: 30, 60 and 80 %% of the training)")
    add("--gamma", type=common.decay, help="factor on the rate at a milestone or after an epoch")
    add("--warmup", type=nonnegative, help="epochs in which the learning rate rises to --lr")
    common.add_run_flags(parser)
    argv = sys.argv[1:] if argv is None else list(argv)
    words = [word for word in argv if word not in ("-h", "--help")]
    method = parser.parse_known_args(words)[0].method
    parser.set_defaults(**method_defaults(method))
    args = common.parse(parser, argv, {"--demo": DEMO})
    check_flags(args, parser.error)

    if "--augment" in args.given and "--teacher-shift" not in args.given:
        args.teacher_shift = None  # the images of --augment, not the digits' default
    if args.step_size is None:
        args.step_size = args.eps / 4
    if args.milestones is None:
        args.milestones = [share * args.epochs for share in (0.3, 0.6, 0.8)]
    args.schedule_epochs = args.epochs  # a teacher may stop before the end of its schedule
    return args


def method_defaults(method):
    """{flag: default} of what depends on --method."""
    row = METHODS[method]
    defaults = {
        "data": row.data,
        "model": row.model,
        "teacher_model": row.teacher_model,
        "alpha": row.alpha,
        "temperature": row.temperature,
        "tau2": method != "self-distillation",  # differs: 7
    }
    return defaults | TRAINING[row.training]


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    has_teacher = args.method in TAUGHT_ON_X | TAUGHT_ON_X_ADV
    common.check_effects(args, error, HAS_EFFECT, has_teacher and not args.teacher_ckpt)
    idle = [flag for flag in ("--steps", "--step-size", "--attack-bn") if flag in args.given]
    if idle and args.method not in ATTACKED:
        print(f"no net is attacked in training, so without effect: {', '.join(idle)}", flush=True)
    if args.reg_form == "repo" and "--tau2" in args.given:
        error("--tau2: has no effect with --reg-form repo; leave it out")
    if "--milestones" in args.given and args.schedule != "steps":
        error(f"--milestones: has no effect with --schedule {args.schedule}; leave it out")
    if "--gamma" in args.given and args.schedule == "cosine":
        error("--gamma: has no effect with --schedule cosine; leave it out")
    if args.omit_digit is not None and args.data != "mnist":
        error(f"--omit-digit: goes with --data mnist, not {args.data}")
    if args.bias_correction and args.omit_digit is None:
        error("--bias-correction: raises the bias of an omitted digit; give --omit-digit")
    teacher_epochs = args.teacher_epochs or args.epochs
    if args.teacher_es is not None and args.teacher_es > teacher_epochs:
        error(f"--teacher-es {args.teacher_es}: --teacher-epochs is only {teacher_epochs}")
    if "--grad-loss" in args.given and not args.grad_heatmap:
        error("--grad-loss: has no effect without --grad-heatmap; leave it out")
    if args.grad_loss == "ce" and (args.compile or common.world() > 1):
        error("--grad-loss ce: its second backward pass goes with neither --compile nor torchrun")
    if args.method == "self-distillation" and (args.model.startswith("mlp") or ":" in args.model):
        needs = "self-distillation needs the stages of our ResNets and WideResNets"
        error(f"--model: {needs}, got {args.model}")
    eval_robustness.check_attacks(args.eval_attack, "--eval-attack")
    if args.method == "self-distillation" and re.search(r"-w\d*[13579]\b", args.model):
        error(f"--model: self-distillation needs an even number after -w, got {args.model}")
    other_net = args.teacher_model not in (None, args.model)
    if args.method in TEACHER_LIKE_STUDENT and other_net:
        error(f"--teacher-model: --method {args.method} needs the student's net, {args.model}")


# ------------------------------------------------------------------------------------------------
# Losses: functions of logits and labels. Copy the ones you need with mix_labels and kl.


# Copied from robust_kd.mix_labels
def mix_labels(teacher_logits, labels, alpha=1.0, temperature=1.0):
    """alpha T + (1 - alpha) y, the targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    With alpha 1 they are the teacher's probabilities, as in Eqs. (1) to (4). labels are (B, K)
    after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, teacher_probs.shape[1])
    return (alpha * teacher_probs + (1 - alpha) * labels).detach()


# Copied from robust_kd.kl
def kl(targets, student_logits, temperature=1.0):
    """tau^2 KL(targets || S), S softened by tau, averaged over the batch: (B, K) x2 -> ()."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student_log_probs, targets, reduction="batchmean")


def kd_loss(student_logits, teacher_logits, labels, alpha, temperature, tau2=True):
    """Eqs. (2), (3), (6): (1-alpha) CE(S, y) + alpha t^2 KL(T_t || S_t); (B, K) x2, (B,) -> ().

    tau2: False leaves out the t^2.
    """
    targets = mix_labels(teacher_logits, labels, 1.0, temperature)
    distilled = kl(targets, student_logits, temperature)
    if not tau2:
        distilled = distilled / temperature**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def virtual_teacher(labels, classes, delta):
    """p^d of Eq. (4): delta for the label, (1 - delta) / (K - 1) for the others; (B,) -> (B, K)."""
    other = (1 - delta) / (classes - 1)
    return other + (delta - other) * F.one_hot(labels, classes)


def reg_loss(student_logits, labels, alpha, temperature, delta, reg_form="paper", tau2=True):
    """Eqs. (4), (7): (1-alpha) CE(S, y) + alpha t^2 KL(p^d_t || S_t); (B, K), (B,) -> ().

    The t^2 is there if S is softened, and tau2.
    """
    probs = virtual_teacher(labels, student_logits.shape[1], delta)
    if reg_form == "paper":
        targets, student_temperature = (probs.log() / temperature).softmax(1), temperature
    else:  # repo: differs 4
        targets, student_temperature = (probs / temperature).softmax(1), 1.0
    distilled = kl(targets, student_logits, student_temperature)
    if not tau2:
        distilled = distilled / student_temperature**2
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * distilled


def at_kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """CE(alpha T(x') + (1-alpha) y, S(x')), AKD (Maroto et al. 2022); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature)
    return temperature**2 * F.cross_entropy(student_logits / temperature, targets)


def self_distillation_loss(
    exit_logits, exit_features, labels, alpha, temperature, byot_lambda, tau2=False
):
    """CE(S_n, y) + sum over i < n of (1-a) CE(S_i, y) + a KL(S_n || S_i) + lambda |f_i - f_n|.

    Zhang et al. 2019. Lists of n logits (B, K) and n features (B, C), the last exit at the end;
    labels (B,) -> (). The last exit learns from the labels alone.
    """
    last_logits, last_features = exit_logits[-1].detach(), exit_features[-1].detach()
    loss = F.cross_entropy(exit_logits[-1], labels)
    for logits, features in zip(exit_logits[:-1], exit_features[:-1]):
        loss = loss + kd_loss(logits, last_logits, labels, alpha, temperature, tau2)
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


def exit_rows(net, exit_weights, data, batch_size):
    """Rows of the table: accuracy and cost of each exit and of two ensembles of all exits.

    exit_weights: the state_dict of early_heads. Evaluated in strict float32, like all nets.
    """
    exits = Exits(net)
    exits.early_heads.load_state_dict(exit_weights)
    logits, cost = {}, {}  # by the name of the row
    for i in range(len(net.stages)):
        one = OneExit(exits, i)
        logits[f"exit {i + 1}"] = common.predict(one, data.x_test, batch_size=batch_size)
        cost[f"exit {i + 1}"] = macs(one, data)
    of_all_exits = torch.stack(list(logits.values()))  # (exits, N, K)
    logits["ensemble: mean of probabilities"] = of_all_exits.softmax(2).mean(0)
    logits["ensemble: mean of logits"] = of_all_exits.mean(0)
    cost_of_all_exits = macs(exits, data)
    rows = []
    for name, exit_logits in logits.items():
        row = {
            "net": "exit",
            "model": name,
            "macs": cost.get(name, cost_of_all_exits),
            "clean_acc": common.accuracy(exit_logits, data.y_test),
        }
        rows.append(row)
    return rows


def macs(model, data):
    """Multiply-adds of the layers of a net for one image: what some papers call FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode  # a slow import

    size, channels = data.x_test.shape[2:]
    image = torch.zeros(1, channels, size, size, device=data.x_test.device)
    with common.evaluating(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
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
def correct_bias(model, data, digit, batch_size):
    """A copy of the model that predicts the digit on as many training images as show it.

    The bias of the digit is raised for that (Hinton et al. 2015); of these images no label is used
    but how many of them show the digit.
    """
    logits = common.predict(model, data.x_train, batch_size=batch_size)  # (N, K)
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
    ("2.shortcut"); an MLP or a net of your own is one stage. A module, so that checkpoints keep its
    sums.
    """

    def __init__(self, model, epochs, steps_per_epoch):
        super().__init__()
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.weights = {}  # name of the layer -> its weight
        has_stages = isinstance(model, common.ConvNet)
        for i, stage in enumerate(model.stages if has_stages else [model], 1):
            number = 0
            for name, weight in stage.named_parameters():
                if weight.dim() <= 1 or not weight.requires_grad:  # a bias, or frozen
                    continue
                if has_stages and "shortcut" in name:
                    self.weights[f"{i}.shortcut"] = weight
                else:
                    number += 1
                    self.weights[f"{i}.{number}"] = weight
        device = next(model.parameters()).device
        self.register_buffer("means", torch.zeros(len(epochs), len(self.weights), device=device))

    def add(self, epoch, loss=None):
        """Add what a step's backward pass has left in .grad, if the epoch is recorded.

        loss: add the gradients of this one instead, and keep its graph.
        """
        if epoch not in self.epochs:
            return
        weights = list(self.weights.values())
        gradients = [weight.grad for weight in weights]
        if loss is not None:
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        for layer, gradient in enumerate(gradients):
            if gradient is not None:  # None: the net does not use this weight
                mean = gradient.abs().mean() / self.steps_per_epoch
                self.means[self.epochs.index(epoch), layer] += mean

    def numbers(self):
        """{epochs: (E,), layers: (L,), means: (E, L)}, as lists, for the meta of a model."""
        return {
            "epochs": self.epochs,
            "layers": list(self.weights),
            "means": self.means.tolist(),
        }


def write_gradients(path, nets):
    """Write the gradients of nets, {role: (label, net)}, as <label>/means, /epochs and /layers.

    means (epochs, layers), epochs (epochs,), layers (layers,): names.
    """
    arrays = {}
    for role, (label, net) in nets.items():
        if role.endswith(", corrected"):  # a copy of a net that is there already
            continue
        for key, values in net.meta.get("gradients", {}).items():
            arrays[f"{label}/{key}"] = np.array(values)
    common.write_atomically(path, lambda file: np.savez(file, **arrays))
    print(f"gradients: {path}; to draw it: python benchmark/plots.py gradients {path}", flush=True)


# ------------------------------------------------------------------------------------------------
# Teacher


def teacher_args(args):
    """The flags by which the teacher is trained, made of the student's.

    A flag that has no effect on the teacher becomes None. Runs that agree in all the others and in
    the data share the teacher (see get_teacher): a flag of the student that is forgotten here costs
    a second training. --teacher-epochs counts as epochs, and so on.
    """
    epochs = args.teacher_epochs or args.epochs
    teacher = common.replace(
        args,
        method="at" if args.method in ATTACKED else "plain",
        model=args.teacher_model or args.model,
        epochs=args.teacher_es or epochs,
        schedule_epochs=epochs,
        # rounded: 55 / 200 * 200 is not 55, and the rate would fall an epoch late
        milestones=[round(epoch / args.epochs * epochs, 6) for epoch in args.milestones],
        lr=args.teacher_lr or args.lr,
        batch_size=args.teacher_batch_size or args.batch_size,
    )
    for flag in vars(args):
        methods = HAS_EFFECT.get(f"--{flag.replace('_', '-')}", METHODS)
        if teacher.method not in methods or flag.startswith("teacher_") or flag in OF_STUDENTS:
            setattr(teacher, flag, None)
    if args.schedule != "steps":
        teacher.milestones = None
    if args.schedule == "cosine":
        teacher.gamma = None
    else:
        teacher.schedule_epochs = None
    if args.method not in ATTACKED:
        teacher.eps = teacher.steps = teacher.step_size = teacher.attack_bn = None
    return teacher


def get_teacher(args, data):
    """-> the teacher in eval mode with frozen weights: given, found, or trained now.

    runs/teachers/<digest of its flags and the data> keeps it for all runs with the same ones.
    """
    if args.teacher_ckpt:
        teacher = common.given_teacher(args, data)
    else:
        flags = teacher_args(args)
        if args.teacher_shift is not None:
            data = dataclasses.replace(data, pad=args.teacher_shift)
        folder = common.teacher_folder(flags, data)
        with common.locked(folder, wait=True):  # another run may be training it
            if not (folder / "teacher.pt").exists():
                train(flags, data, folder, "teacher")
            common.delete_checkpoints(folder)
        teacher = common.load_model(folder / "teacher.pt", data)
    print(f"teacher: {teacher.meta['file']}", flush=True)
    common.compile_model(teacher, args.compile)
    return teacher


# ------------------------------------------------------------------------------------------------
# Training


def train(args, data, folder, stage, teacher=None):
    """Train a net by the flags in args and write it to folder/<stage>.pt -> the net in eval mode.

    stage: teacher, student-alone or student; the two students start from the same weights and see
    the same batches. teacher: in eval mode with frozen weights, or None. After an interruption the
    same call goes on after the last finished epoch.
    """
    model = common.new_model(data, args.model, args.seed, stage.removesuffix("-alone"))
    learner = Exits(model) if args.method == "self-distillation" else model
    fused = ":" not in args.model  # fails for a weight that gets no gradient in the first step
    optimizer = torch.optim.SGD(
        learner.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=fused
    )
    steps_per_epoch = common.steps_per_epoch(data, args.batch_size)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(args, step, steps_per_epoch))
    grad_epochs = []
    if args.grad_heatmap:  # first, middle and last
        grad_epochs = sorted({1, (args.epochs + 1) // 2, args.epochs})
    gradients = Gradients(model, grad_epochs, steps_per_epoch)
    state = {
        "model": learner,
        "optimizer": optimizer,
        "schedule": schedule,
        "gradients": gradients,
    }
    common.compile_model(learner, args.compile)
    alpha, temperature = args.alpha, args.temperature

    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), args.epochs):
        common.seed_epoch(args.seed, stage, epoch)
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, args.batch_size, args.seed, stage, epoch):
            with common.autocast(args, x.device):
                # The attack moves x to x', away from the labels.
                if args.method in ATTACKED:
                    model.train(args.attack_bn == "train")
                    x_adv = common.pgd(model, x, labels, args.eps, args.step_size, args.steps)

                # What the teacher says. It is frozen: no gradient reaches it. Its answer is copied:
                # with CUDA graphs (--compile reduce-overhead) the student's may take its memory.
                if args.method in TAUGHT_ON_X:
                    teacher_logits = teacher(x).clone()
                elif args.method in TAUGHT_ON_X_ADV:
                    teacher_logits = teacher(x_adv).clone()

                # What the student says; self-distillation listens to all of its exits.
                learner.train()
                if args.method == "self-distillation":
                    exit_logits, exit_features = learner(x)
                    logits = exit_logits[-1]
                else:
                    logits = model(x_adv if args.method in ATTACKED else x)

                match args.method:
                    case "plain" | "at":
                        loss = F.cross_entropy(logits, labels)
                    case "label-smoothing":
                        loss = F.cross_entropy(logits, labels, label_smoothing=args.smoothing)
                    case "vanilla" | "re-kd" | "tf-kd-self" | "at-tf-kd-self":
                        loss = kd_loss(
                            logits, teacher_logits, labels, alpha, temperature, args.tau2
                        )
                    case "tf-kd-reg" | "at-tf-kd-reg":
                        loss = reg_loss(
                            logits,
                            labels,
                            alpha,
                            temperature,
                            args.delta,
                            args.reg_form,
                            args.tau2,
                        )
                    case "at-kd":
                        loss = at_kd_loss(logits, teacher_logits, labels, alpha, temperature)
                    case "self-distillation":
                        loss = self_distillation_loss(
                            exit_logits,
                            exit_features,
                            labels,
                            alpha,
                            temperature,
                            args.byot_lambda,
                            args.tau2,
                        )

            optimizer.zero_grad()
            if args.grad_loss == "ce":
                gradients.add(epoch + 1, F.cross_entropy(logits, labels))
            loss.backward()
            common.average_gradients(learner, len(labels))  # under torchrun, otherwise nothing
            if args.grad_loss == "own":
                gradients.add(epoch + 1)
            optimizer.step()
            schedule.step()  # per batch
            history.append(common.step_sums(loss, logits, labels))  # the GPU is not waited for

        row = common.epoch_row(args, stage, epoch, learner, history, began)
        eps = args.eps if args.method in ATTACKED else None
        rows.append(row | common.validate(args, stage, model, data, eps))
        common.save_epoch(folder, stage, model, state, rows, args)

    meta = {"training": args.method}
    if grad_epochs:
        meta["gradients"] = gradients.numbers()
    if args.method == "self-distillation":
        meta["exits"] = learner.early_heads.state_dict()
    common.save_model(folder / f"{stage}.pt", model, rows, **meta)
    return common.load_model(folder / f"{stage}.pt", data)


def lr_factor(args, step, steps_per_epoch):
    """The factor on the learning rate at a step (0, 1, ...) of the whole training."""
    epoch = step // steps_per_epoch
    if args.schedule == "steps":
        passed = [milestone for milestone in args.milestones if epoch >= milestone]
        factor = args.gamma ** len(passed)
    elif args.schedule == "exponential":
        factor = args.gamma**epoch
    else:
        all_steps = steps_per_epoch * args.schedule_epochs
        factor = (1 + math.cos(math.pi * step / all_steps)) / 2
    warmup_steps = args.warmup * steps_per_epoch
    if step + 1 < warmup_steps:
        factor *= (step + 1) / warmup_steps
    return factor


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """Data, teacher, student, evaluation, one table; for each seed."""
    args = parse_args(argv)
    data = common.load_training_data(args, common.setup_device(args))
    check_teacher(args, data, eval_robustness.check_nets(args, data))
    if args.omit_digit is not None and not (data.y_test == args.omit_digit).any():
        none = f"no test image shows the digit {args.omit_digit}; take more"
        raise common.UserError(f"--test-subset {args.test_subset}: {none}")
    if args.omit_digit is not None and (data.y_train != args.omit_digit).sum() < 2:
        none = f"all training images but one at most show the digit {args.omit_digit}; take more"
        raise common.UserError(f"--train-subset {args.train_subset}: {none}")
    summaries = []
    for seed in args.seed:
        seed_args = common.replace(args, seed=seed)
        with common.open_run("teacher_free_kd", seed_args, data) as folder:
            rows = common.read_summary(folder)
            if rows is None:  # not finished yet
                rows = train_and_evaluate(seed_args, data, folder)
                common.finish_run(folder, rows)
            common.show_run(folder, rows)
        summaries.append(rows)
    common.show_mean(args.seed, summaries)
    return summaries


def check_teacher(args, data, teacher):
    """A UserError if --delta or the teacher of --teacher-ckpt (or None) does not fit.

    --delta must be more than a guess. Where teacher and student must be equal nets, they are.
    """
    guess = 1 / len(data.classes)
    if args.method in VIRTUAL_TEACHER and args.delta <= guess:
        wanted = f"expected more than {guess:g}, the probability of a guess"
        raise common.UserError(f"--delta: {wanted}, got {args.delta:g}")
    if teacher is not None and args.method in TEACHER_LIKE_STUDENT:
        name = teacher.build_arguments["name"]
        if name != args.model:
            raise common.UserError(f"{args.teacher_ckpt}: is a {name}, the student a {args.model}")


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    settings = {flag: getattr(args, flag) for flag in method_defaults(args.method)}
    texts = []
    for flag, value in settings.items():
        if value is not None:  # 0 is a value too
            texts.append(f"{flag.replace('_', '-')} {value}")
    print(f"{args.method} with {', '.join(texts)}", flush=True)
    nets = {}  # role of the net -> (its label in the table, the net)
    teacher = None
    if args.method in TAUGHT_ON_X | TAUGHT_ON_X_ADV:
        teacher = get_teacher(args, data)
        nets["teacher"] = f"teacher ({teacher.meta.get('training', 'given')})", teacher
    seen = data
    if args.omit_digit is not None:
        seen = without_digit(data, args.omit_digit)
    if args.method in ALSO_TRAINED_ALONE:
        alone = train(common.replace(args, method="plain"), seen, folder, "student-alone")
        nets["alone"] = "student-alone (plain)", alone
    student = train(args, seen, folder, "student", teacher)
    nets["student"] = f"student ({args.method})", student
    batch_size = common.evaluation_batch_size(args)
    if args.bias_correction:
        for role in [role for role in nets if role != "teacher"]:
            label, net = nets[role]
            raised = correct_bias(net, data, args.omit_digit, batch_size)
            nets[f"{role}, corrected"] = f"{label}, bias corrected", raised
    if student.meta["best"].get("epoch", args.epochs) != args.epochs:
        best = common.load_model(folder / "student_best.pt", data)
        nets["best"] = "student, best on held-out images", best

    rows = eval_robustness.summary_rows(
        nets,
        data,
        folder,
        args.eval_attack,
        eps=args.eps,
        seed=args.seed,
        batch_size=batch_size,
    )
    for row, (_, net) in zip(rows, nets.values()):
        row |= size_columns(net, data)
        if args.omit_digit is not None:
            row |= digit_columns(net, data, args.omit_digit, batch_size)
    if args.method == "self-distillation":
        rows += exit_rows(student, student.meta["exits"], data, batch_size)
    if args.grad_heatmap:
        write_gradients(folder / "gradients.npz", nets)
    return rows


def size_columns(net, data):
    """The size of a net: weights as in Table 1, parameters (biases too), and multiply-adds."""
    return {
        "weights": sum(p.numel() for p in net.parameters() if p.dim() > 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "macs": macs(net, data),
    }


def digit_columns(net, data, digit, batch_size):
    """The accuracy on the test images that do not show the digit, and on those that do."""
    logits = common.predict(net, data.x_test, batch_size=batch_size)
    right = logits.argmax(1) == data.y_test
    shows_digit = data.y_test == digit
    return {
        f"without_{digit}_acc": right[~shows_digit].double().mean().item(),
        f"only_{digit}_acc": right[shows_digit].double().mean().item(),
    }


if __name__ == "__main__":
    common.start(main)
