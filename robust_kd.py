"""Robust knowledge distillation: train a robust teacher, stop it early, distil a robust student.

Paper    "When does knowledge distillation improve robustness?", anonymous submission 1330 to TMLR
         (2023, not accepted): equations (1) to (7), sections and tables are those of this text.
         It is a later text of "On the benefits of knowledge distillation for adversarial
         robustness", Maroto, Ortiz-Jimenez, Frossard, arXiv 2203.07159 (2022).
         ARD: Goldblum et al., AAAI 2020. RSLAD: Zi et al., ICCV 2021. AT+: Rebuffi et al. 2021.
         x' is the adversarial example of the student on x, S and T the probabilities of student
         and teacher.
Loss     CKD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x))          <- ckd_loss          Eq. 1
         ARD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x'))         <- ard_loss          Eq. 2
         RSLAD   (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x'))    <- rslad_loss        Eq. 3
         AKD     CE(T(x'), S(x'))                                    <- akd_loss          Eq. 4
         ARD+, RSLAD+, AKD+: T replaced by alpha T + (1-alpha) y     <- *_plus_loss       Eq. 5-7
         Ensembles: T is the average of their probabilities          <- Ensemble          3.6, B.3
         st, at, trades: no teacher        <- st_loss, at_loss (CE on x, on x'), trades_loss
Usage    python robust_kd.py --loss akd+ --alpha 0.8 --teacher-es 40
         python robust_kd.py --loss at --epochs 200                  # the baseline without teacher
         python robust_kd.py --teacher-training st --alpha 0.3       # an accurate teacher
         python robust_kd.py --teacher-eps 2/255 --teacher-es 40     # a weakly robust one (LAT)
         python robust_kd.py --teacher-training ffgsm --teachers 4   # an ensemble of cheap ones
         python robust_kd.py --teacher-training st st at at --beta 0.25       # a mixed ensemble
         python robust_kd.py --recipe at+ --extra-data data/cifar10_ddpm.npz --alpha 0.8    # AT+
         python robust_kd.py --demo                                  # 2 minutes on a CPU
Expect   CIFAR-10, ResNet-18: not measured yet. Small nets on a CPU: docs/robust_kd.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); targets and logits (B, K)
Differs  1. 1,024 training images are held out to report the best epoch too (--val-size 0: none).
         2. x' of RSLAD maximises KL(T(x) || S(x')) from a Gaussian start, as in the code of RSLAD
            and of the first author, not the CE of the text (--attack-loss ce: the text).
         3. KL is the true KL averaged over the batch; the author's code also averages over the
            classes, K times less (--kl-reduction mean).
         4. The paper gives no lam; we take 5/6, as RSLAD does. It has no temperature: the default
            is 1; another one softens teacher and student, and multiplies the term by its square.
         5. Step eps/4, uniform start, BatchNorm in eval mode during the attack, weight decay 5e-4
            and the teacher's momentum 0.9 are not in the paper; they come from the first author's
            code. OneCycle cycles the student's momentum (--cycle-momentum no: constant).
         6. Training on CUDA, the attack included, is in bf16 (--precision fp32: strict float32).
         7. AT+: docs/robust_kd.md says which settings of Rebuffi et al. and Wang et al. it takes.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import copy
import dataclasses
import math
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import lr_scheduler

import common
import eval_robustness

DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "epochs": 5,
    "teacher-epochs": 6,
    "teacher-es": 5,
    "batch-size": 32,
    "teacher-batch-size": 32,
    "lr": 0.1,
    "steps": 3,
    "step-size": "4/255",
    "train-subset": 2000,
    "test-subset": 500,
    "val-size": 200,
}

# --recipe at+: section 4 of the paper, for student and teacher
AT_PLUS = {
    "model": "wrn-28-10-silu",
    "epochs": 400,
    "teacher-epochs": 400,
    "batch-size": 512,
    "teacher-batch-size": 512,
    "lr": 0.2,
    "teacher-lr": 0.2,
    "schedule": "cosine",
    "nesterov": "yes",
    "decay-norms": "no",
    "ema": 0.995,
    "steps": 10,
    "step-size": "2/255",
    "augment": "cutout",
    "label-smoothing": 0.1,
    "extra-fraction": 0.7,
}

# Which losses compute what
ATTACKED = {"at", "trades", "ard", "rslad", "akd", "ard+", "rslad+", "akd+"}
TAUGHT = {"ckd", "ard", "rslad", "akd", "ard+", "rslad+", "akd+"}
TAUGHT_ON_CLEAN_IMAGES = TAUGHT - {"akd", "akd+"}
# Which losses a flag has an effect on
FLAG_LOSSES = {
    "--alpha": {"ard+", "rslad+", "akd+"},
    "--lam": TAUGHT_ON_CLEAN_IMAGES,
    "--temperature": TAUGHT,
    "--kl-reduction": TAUGHT_ON_CLEAN_IMAGES,
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.RunParser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="akd+", help="loss of the student, see Loss above")
    add("--alpha", type="probability", default="0.8", help="weight of the teacher in mixed targets")
    add("--lam", type="probability", default="5/6", help="weight of the distillation term")
    add("--temperature", type="positive", default=1.0, help="temperature of both softmaxes")
    add(
        "--kl-reduction",
        choices=["batchmean", "mean"],
        default="batchmean",
        help="batchmean: KL averaged over images; mean: divided by the number of classes too, "
        "as in the author's code",
    )
    add("--recipe", choices=["at+"], help="at+: all settings of section 4, which are then printed")
    add(
        "--model",
        default="resnet18",
        help="net of the student: resnet18, wrn-16-2, mlp-512, MODULE:FUNCTION",
    )
    add("--width", type="positive", default=1.0, help="factor on the channels of a ResNet student")
    add = parser.add_argument_group("teacher").add_argument
    add(
        "--teacher-training",
        choices=["st", "at", "ffgsm", "trades", "none"],
        nargs="+",
        default=["at"],
        help="training of the teacher: standard, PGD, single-step or TRADES; several words make an "
        "ensemble; none goes with --teacher-ckpt and with losses that have no teacher",
    )
    add(
        "--teachers",
        type="positive int",
        default=1,
        help="number of teachers, averaged as an ensemble",
    )
    add(
        "--beta",
        type="probability",
        nargs="+",
        help="ensemble weight of each teacher; a single value is shared by the adversarially "
        "trained ones (default: all equal)",
    )
    add(
        "--teacher-eps",
        type="pixel units",
        help="radius of the teacher's attack in pixel units (default: same as --eps; 2/255 gives "
        "the paper's weakly robust LAT teacher)",
    )
    add(
        "--teacher-epochs",
        type="positive int",
        default=100,
        help="epochs of the teacher's training",
    )
    add(
        "--teacher-es",
        type="positive int",
        help="stop the teacher after this epoch (default: no stop)",
    )
    add(
        "--teacher-save-every",
        type="positive int",
        metavar="N",
        help="also save the teacher every N epochs; a run with --teacher-es at such an epoch then "
        "trains no teacher",
    )
    add(
        "--teacher-ckpt",
        help="file of a finished teacher, or a state_dict of a MODULE:FUNCTION; none is trained",
    )
    add("--teacher-model", help="net of the teacher (default: same as --model)")
    add("--teacher-width", type="positive", help="width of the teacher (default: same as --width)")
    add("--teacher-lr", type="positive", default=0.1, help="learning rate the teacher starts with")
    add(
        "--teacher-gamma",
        type="positive",
        default=0.9,
        help="factor on the teacher's learning rate after each epoch (no effect with --schedule "
        "cosine)",
    )
    add(
        "--teacher-batch-size",
        type="positive int",
        default=128,
        help="images per step of the teacher",
    )
    add(
        "--trades-beta", type="nonnegative", default=6.0, help="weight of the robust term of TRADES"
    )
    add(
        "--ffgsm-step",
        type="nonnegative",
        default=1.25,
        help="step of ffgsm, in units of the radius",
    )
    add = parser.add_argument_group("attack").add_argument
    add(
        "--eps",
        type="pixel units",
        default="8/255",
        help="radius of the attacks in training and evaluation, in pixel units",
    )
    add("--steps", type="positive int", default=7, help="number of PGD steps in training")
    add(
        "--step-size", type="pixel units", help="PGD step in training (default: a quarter of --eps)"
    )
    add(
        "--attack-loss",
        choices=["ce", "kl-teacher"],
        help="what the student's attack maximises: cross-entropy with the labels, or KL from the "
        "teacher's clean output (default: kl-teacher for rslad and rslad+, for trades KL from the "
        "student's own clean output, otherwise ce)",
    )
    add(
        "--attack-bn",
        choices=["eval", "train"],
        default="eval",
        help="mode of BatchNorm during the attack in training",
    )
    add(
        "--eval-steps",
        type="positive int",
        default=20,
        help="number of PGD steps in the evaluation",
    )
    add("--restarts", type="positive int", default=1, help="random starts of PGD in the evaluation")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type="positive int", default=100, help="epochs of the student's training")
    add("--lr", type="positive", default=0.21, help="peak learning rate of the student")
    add(
        "--cycle-momentum",
        choices=["yes", "no"],
        default="yes",
        help="let OneCycle move the momentum from 0.95 to 0.85 and back",
    )
    add("--batch-size", type="positive int", default=256, help="images per step of the student")
    add(
        "--momentum",
        type="probability",
        default=0.9,
        help="momentum of SGD; OneCycle with --cycle-momentum yes replaces it for the student",
    )
    add(
        "--weight-decay", type="nonnegative", default=5e-4, help="weight decay of SGD for both nets"
    )
    add("--nesterov", choices=["yes", "no"], default="no", help="use Nesterov's momentum in SGD")
    add(
        "--decay-norms",
        choices=["yes", "no"],
        default="yes",
        help="put the weight decay on the parameters of BatchNorm too",
    )
    add(
        "--schedule",
        choices=["paper", "cosine"],
        default="paper",
        help="paper: OneCycle for the student, exponential decay for the teacher; cosine: for both",
    )
    add(
        "--ema",
        type="probability below 1",
        default=0.0,
        help="decay of the weight average (0: no average)",
    )
    add(
        "--label-smoothing",
        type="probability below 1",
        default=0.0,
        help="label smoothing: probability spread evenly over all classes; with --extra-data only "
        "the labels of generated images are smoothed",
    )
    add("--extra-data", metavar="FILE", help=".npz file of generated images: image, label")
    add(
        "--extra-fraction",
        type="probability below 1",
        default=0.7,
        help="share of generated images in a batch",
    )
    add(
        "--trajectories",
        action="store_true",
        help="keep the probability of the right class of every image after every epoch",
    )
    parser.add_run_flags(augment=["crop", "none", "cutout", "cutmix"])
    args = parser.parse_run(argv, {"--recipe at+": AT_PLUS, "--demo": DEMO})
    check_flags(args, parser.error)
    return args


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    if args.teacher_es is not None and args.teacher_es > args.teacher_epochs:
        error(f"--teacher-es {args.teacher_es}: --teacher-epochs is only {args.teacher_epochs}")
    trainings = teacher_trainings(args)
    if args.teachers not in (1, len(trainings)):
        words = f"--teacher-training names {len(trainings)} teachers"
        error(f"--teachers {args.teachers}: {words}; leave out --teachers")
    if args.teacher_ckpt and len(trainings) > 1:
        remedy = "leave out --teachers, and all but one word of --teacher-training"
        error(f"--teacher-ckpt: gives one teacher; {remedy}")
    if "none" in trainings and len(trainings) > 1:
        error("--teacher-training none: cannot be part of an ensemble")
    if "none" in trainings and needs_teacher(args) and not args.teacher_ckpt:
        cause = f"--loss {args.loss}" if args.loss in TAUGHT else "--attack-loss kl-teacher"
        error(f"--teacher-training none: {cause} needs a teacher; give --teacher-ckpt")
    try:
        ensemble_weights(args.beta, trainings)
    except ValueError as wrong:
        error(f"--beta: {wrong}")
    for flag, losses in FLAG_LOSSES.items():
        if flag in args.given and args.loss not in losses:
            error(f"{flag}: has no effect with --loss {args.loss}; leave it out")
    if "--extra-fraction" in args.given and not args.extra_data:
        error("--extra-fraction: has no effect without --extra-data")
    if args.nesterov == "yes" and args.momentum == 0:
        error("--nesterov yes: needs a momentum above 0, got --momentum 0")
    if args.attack_loss and args.loss not in ATTACKED:
        error(f"--attack-loss: --loss {args.loss} has no attack; leave it out")


# ------------------------------------------------------------------------------------------------
# Losses: functions of logits and labels. Copy the ones you need with mix_labels and kl.


def mix_labels(teacher_logits, labels, alpha, temperature=1.0):
    """alpha T + (1 - alpha) y, the mixed targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    labels are (B, K) after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, teacher_probs.shape[1])
    return alpha * teacher_probs + (1 - alpha) * labels


def kl(targets, student_logits, temperature=1.0, kl_reduction="batchmean"):
    """tau^2 KL(targets || S), S softened by tau: (B, K) x2 -> (); `mean` divides by K too."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    terms = F.kl_div(student_log_probs, targets.detach(), reduction="none")  # (B, K)
    if kl_reduction == "mean":
        return temperature**2 * terms.mean()
    return temperature**2 * terms.sum(1).mean()


def st_loss(student_logits, labels):
    """CE(S(x), y), standard training; (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels)


def at_loss(student_adv_logits, labels):
    """CE(S(x'), y), adversarial training (Madry et al. 2018); (B, K), (B,) -> ()."""
    return F.cross_entropy(student_adv_logits, labels)


def trades_loss(student_logits, student_adv_logits, labels, trades_beta):
    """CE(S(x), y) + beta KL(S(x) || S(x')), TRADES (Zhang et al. 2019); (B, K) x2, (B,) -> ()."""
    # S(x) is no constant here, unlike a teacher: the gradient goes through both sides
    robust = F.kl_div(
        student_adv_logits.log_softmax(1), student_logits.softmax(1), reduction="batchmean"
    )
    return F.cross_entropy(student_logits, labels) + trades_beta * robust


def ckd_loss(
    student_logits, teacher_logits, labels, lam, temperature=1.0, kl_reduction="batchmean"
):
    """Eq. (1): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x)); (B, K) x2, (B,) -> ()."""
    targets = (teacher_logits.float() / temperature).softmax(1)
    distilled = kl(targets, student_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def ard_loss(
    student_logits,
    student_adv_logits,
    teacher_logits,
    labels,
    lam,
    temperature=1.0,
    kl_reduction="batchmean",
):
    """Eq. (2): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x')); (B, K) x3, (B,) -> ()."""
    targets = (teacher_logits.float() / temperature).softmax(1)
    distilled = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def rslad_loss(
    student_logits,
    student_adv_logits,
    teacher_logits,
    lam,
    temperature=1.0,
    kl_reduction="batchmean",
):
    """Eq. (3): (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x')); (B, K) x3 -> ()."""
    targets = (teacher_logits.float() / temperature).softmax(1)
    clean = kl(targets, student_logits, temperature, kl_reduction)
    robust = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * clean + lam * robust


def akd_loss(student_adv_logits, teacher_adv_logits, temperature=1.0):
    """Eq. (4): CE(T(x'), S(x')); (B, K) x2 -> ()."""
    targets = (teacher_adv_logits.float() / temperature).softmax(1).detach()
    return temperature**2 * F.cross_entropy(student_adv_logits / temperature, targets)


def ard_plus_loss(
    student_logits,
    student_adv_logits,
    teacher_logits,
    labels,
    lam,
    alpha,
    temperature=1.0,
    kl_reduction="batchmean",
):
    """Eq. (5): Eq. (2) with alpha T(x) + (1-alpha) y in the KL; (B, K) x3, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature)
    distilled = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def rslad_plus_loss(
    student_logits,
    student_adv_logits,
    teacher_logits,
    labels,
    lam,
    alpha,
    temperature=1.0,
    kl_reduction="batchmean",
):
    """Eq. (6): Eq. (3) with alpha T(x) + (1-alpha) y in both KLs; (B, K) x3, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature)
    clean = kl(targets, student_logits, temperature, kl_reduction)
    robust = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * clean + lam * robust


def akd_plus_loss(student_adv_logits, teacher_adv_logits, labels, alpha, temperature=1.0):
    """Eq. (7): CE(alpha T(x') + (1-alpha) y, S(x')); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_adv_logits, labels, alpha, temperature).detach()
    return temperature**2 * F.cross_entropy(student_adv_logits / temperature, targets)


LOSSES = {
    "st": st_loss,
    "at": at_loss,
    "trades": trades_loss,
    "ckd": ckd_loss,
    "ard": ard_loss,
    "rslad": rslad_loss,
    "akd": akd_loss,
    "ard+": ard_plus_loss,
    "rslad+": rslad_plus_loss,
    "akd+": akd_plus_loss,
}


# ------------------------------------------------------------------------------------------------
# Teachers: the recipe by which each is trained, and the average of several


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
                # a copy for each net, which may normalise its images in place
                logs.append(math.log(weight) + model(x.clone()).log_softmax(1))
        return torch.stack(logs).logsumexp(0)


@dataclasses.dataclass
class Recipe:
    """How a net is trained. None: a setting without effect on this net.

    Of a teacher it is all that decides its weights: the teacher is kept under the digest of its
    recipe, and two runs with the same recipe share it. A student also depends on --alpha, --lam and
    the other flags of its loss.
    """

    training: str  # st, at, ffgsm, trades, or the student's loss
    loss: str
    model: str
    width: float
    seed: int
    epochs: int
    schedule: str  # onecycle, exponential or cosine
    lr: float
    batch_size: int
    shared: dict  # flags that student and teacher have in common
    schedule_epochs: int | None = None  # length of the cosine: a teacher may stop before its end
    gamma: float | None = None  # of the exponential schedule
    eps: float | None = None
    step_size: float | None = None
    steps: int | None = None
    attack_loss: str | None = None  # ce, kl-teacher or, for TRADES, kl-self
    attack_bn: str | None = None
    trades_beta: float | None = None
    validation_attack: tuple | None = None  # ffgsm: eps, step size, steps of PGD in collapsed()


def shared_flags(args):
    """The flags that are the same for student and teacher, as a dict."""
    names = (
        "momentum",
        "weight_decay",
        "nesterov",
        "decay_norms",
        "ema",
        "augment",
        "label_smoothing",
        "extra_data",
        "extra_fraction",
        "precision",
        "deterministic",
    )
    flags = {name: getattr(args, name) for name in names}
    if args.trajectories:  # they are kept with the weights, and depend on the test images
        flags["trajectories"] = [args.test_subset, args.eps, step_size(args, args.eps), args.steps]
    return flags


def step_size(args, eps):
    """PGD step in training for a radius: a quarter of it, or --step-size in proportion to --eps."""
    if args.step_size is None:
        return eps / 4
    if args.eps == 0:
        return args.step_size
    return args.step_size * eps / args.eps


def student_recipe(args):
    """The Recipe of the student."""
    attack_loss = args.attack_loss
    if attack_loss is None:
        default = {"rslad": "kl-teacher", "rslad+": "kl-teacher", "trades": "kl-self"}  # differs: 2
        attack_loss = default.get(args.loss, "ce")
    return Recipe(
        training=args.loss,
        loss=args.loss,
        model=args.model,
        width=args.width,
        seed=args.seed,
        epochs=args.epochs,
        schedule="cosine" if args.schedule == "cosine" else "onecycle",
        schedule_epochs=args.epochs,
        lr=args.lr,
        batch_size=args.batch_size,
        eps=args.eps,
        step_size=step_size(args, args.eps),
        steps=args.steps,
        attack_loss=attack_loss,
        attack_bn=args.attack_bn,
        trades_beta=args.trades_beta,
        shared=shared_flags(args),
    )


def teacher_trainings(args):
    """The training of each teacher: --teacher-training, or its only word --teachers times."""
    if len(args.teacher_training) == 1:
        return args.teacher_training * args.teachers
    return args.teacher_training


def teacher_recipe(args, training, number=0, epochs=None):
    """The Recipe of teacher `number` (0, 1, ...) by its training; epochs: default --teacher-es."""
    cosine = args.schedule == "cosine"
    recipe = Recipe(
        training=training,
        loss="at" if training == "ffgsm" else training,
        model=args.teacher_model or args.model,
        width=args.teacher_width or args.width,
        seed=args.seed + 100 * number,
        epochs=epochs or args.teacher_es or args.teacher_epochs,
        schedule="cosine" if cosine else "exponential",
        schedule_epochs=args.teacher_epochs if cosine else None,
        lr=args.teacher_lr,
        gamma=None if cosine else args.teacher_gamma,
        batch_size=args.teacher_batch_size,
        shared=shared_flags(args),
    )
    if training == "st":
        return recipe
    eps = args.eps if args.teacher_eps is None else args.teacher_eps
    recipe = dataclasses.replace(
        recipe,
        eps=eps,
        step_size=step_size(args, eps),
        steps=args.steps,
        attack_loss="ce",
        attack_bn=args.attack_bn,
    )
    if training == "ffgsm":  # one long step from a uniform start (Wong et al. 2020)
        recipe = dataclasses.replace(
            recipe,
            steps=1,
            step_size=args.ffgsm_step * eps,
            # held-out accuracy under this attack decides when the training stops
            validation_attack=(args.eps, step_size(args, args.eps), args.steps),
        )
    if training == "trades":
        recipe = dataclasses.replace(recipe, attack_loss="kl-self", trades_beta=args.trades_beta)
    return recipe


def ensemble_weights(betas, trainings):
    """beta_i of each teacher, their sum 1; a single beta is shared by those that are not `st`."""
    robust = [training != "st" for training in trainings]
    if betas is None:
        return [1 / len(trainings)] * len(trainings)
    if len(betas) == 1 and any(robust) and not all(robust):
        robust_weight = betas[0] / sum(robust)
        standard_weight = (1 - betas[0]) / (len(trainings) - sum(robust))
        return [robust_weight if is_robust else standard_weight for is_robust in robust]
    if len(betas) != len(trainings) or abs(sum(betas) - 1) > 1e-6:
        wanted = f"{len(trainings)} values that sum to 1"
        if any(robust) and not all(robust):
            wanted += ", or one value, which the robust teachers share"
        raise ValueError(f"expected {wanted}, got {' '.join(map(str, betas))}")
    return betas


def needs_teacher(args):
    """Whether the student's loss or its attack looks at a teacher."""
    return args.loss in TAUGHT or args.attack_loss == "kl-teacher"


# ------------------------------------------------------------------------------------------------
# Training


def train(recipe, data, folder, stage, args, teacher=None):
    """Train a net by its recipe and write it to folder/<stage>.pt -> (the net in eval mode, meta).

    teacher: in eval mode with frozen weights, or None. After an interruption the same call goes on
    after the last finished epoch.
    """
    model = common.new_model(data, recipe.model, recipe.seed, stage, recipe.width)
    steps_per_epoch = math.ceil(len(data.x_train) / recipe.batch_size)
    optimizer, schedule = make_optimizer(model, recipe, args, steps_per_epoch)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    average, kept_model = None, model  # kept_model is validated and saved
    if args.ema:
        average = WeightAverage(model, args.ema)
        kept_model = average.module
        state["average"] = average
    trajectories = None
    if args.trajectories:
        trajectories = Trajectories(data, recipe.epochs)
        state["trajectories"] = trajectories
    rows = common.resume(folder, stage, state)
    training_attack = (recipe.eps, recipe.step_size, recipe.steps)
    validation_attack = (args.eps, step_size(args, args.eps), args.steps)
    lam, alpha, temperature = args.lam, args.alpha, args.temperature
    kl_options = (temperature, args.kl_reduction)

    def step(x, labels):
        """One batch up to the gradients of the weights -> metrics."""
        # The cache is off: weights first cast under no_grad (in TRADES) would get no gradient.
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            # The teacher's logits of the clean images; the teacher is frozen, x needs no gradient.
            if recipe.loss in TAUGHT_ON_CLEAN_IMAGES or recipe.attack_loss == "kl-teacher":
                teacher_logits = teacher(x)

            # The attack makes x'. It maximises the cross-entropy with the labels, or the KL from
            # the teacher's or (TRADES) the student's own output for the clean images.
            if recipe.loss in ATTACKED:
                attacked_model = common.attacked(model, recipe.attack_bn)  # differs: 5
                if recipe.attack_loss == "ce":
                    x_adv = common.pgd(attacked_model, x, labels, *training_attack)
                elif recipe.attack_loss == "kl-teacher":  # differs: 2
                    teacher_probs = teacher_logits.softmax(1)
                    x_adv = common.pgd(
                        attacked_model, x, teacher_probs, *training_attack, "gaussian"
                    )
                else:  # kl-self
                    with torch.no_grad():
                        clean_probs = attacked_model(x).softmax(1)
                    x_adv = common.pgd(attacked_model, x, clean_probs, *training_attack, "gaussian")

            # st and ckd train on x, all others on x'; some losses compare the output for x too.
            # The training accuracy is that on the images that are trained on.
            model.train()
            logits = model(x_adv if recipe.loss in ATTACKED else x)
            match recipe.loss:
                case "st":
                    loss = st_loss(logits, labels)
                case "at":
                    loss = at_loss(logits, labels)
                case "trades":
                    loss = trades_loss(model(x), logits, labels, recipe.trades_beta)
                case "ckd":
                    loss = ckd_loss(logits, teacher_logits, labels, lam, *kl_options)
                case "ard":
                    loss = ard_loss(model(x), logits, teacher_logits, labels, lam, *kl_options)
                case "rslad":
                    loss = rslad_loss(model(x), logits, teacher_logits, lam, *kl_options)
                case "akd":
                    loss = akd_loss(logits, teacher(x_adv), temperature)
                case "ard+":
                    loss = ard_plus_loss(
                        model(x), logits, teacher_logits, labels, lam, alpha, *kl_options
                    )
                case "rslad+":
                    loss = rslad_plus_loss(
                        model(x), logits, teacher_logits, labels, lam, alpha, *kl_options
                    )
                case "akd+":
                    loss = akd_plus_loss(logits, teacher(x_adv), labels, alpha, temperature)
        loss.backward()
        return common.metrics(loss, logits, labels)

    step = common.speed_up(step, model, args)
    for epoch in range(len(rows), recipe.epochs):
        if collapsed(recipe, rows):  # here, not below: a resumed run may have collapsed before
            break
        common.seed_epoch(recipe.seed, stage, epoch)
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, recipe.batch_size, recipe.seed, stage, epoch):
            x, labels = augment(x, labels, data, args)  # for AT+; otherwise they stay as they are
            optimizer.zero_grad()
            history.append(step(x, labels))
            common.average_gradients(model, len(labels))
            optimizer.step()
            schedule.step()  # per batch
            if average:
                average.update(model)
        row = common.epoch_row(stage, epoch, model, history, began)
        rows.append(row | common.validate(kept_model, data, validation_attack))
        if trajectories:
            trajectories.record(epoch, kept_model, data, validation_attack)
        every = args.teacher_save_every
        if stage == "teacher" and every and len(rows) % every == 0:
            # before the checkpoint: a run that is killed in between repeats the epoch and this
            keep_early_stop(recipe, data, args, kept_model, rows, trajectories)
        common.save_epoch(folder, stage, kept_model, state, rows, recipe.epochs, args.tensorboard)

    meta = {"training": recipe.training}
    if collapsed(recipe, rows):
        best, best_meta = common.load_model(folder / f"{stage}_best.pt", data.x_train.device)
        kept_model.load_state_dict(best.state_dict())
        meta["epoch"] = best_meta["epoch"]
        print(f"{stage}: PGD accuracy fell by over 20 points; epoch {meta['epoch']} is kept")
    if trajectories:
        meta["trajectories"] = trajectories.until(len(rows))
    common.save_model(folder / f"{stage}.pt", kept_model, rows, **meta)
    return common.load_model(folder / f"{stage}.pt", data.x_train.device)


def make_optimizer(model, recipe, args, steps_per_epoch):
    """-> (SGD in one fused kernel, its learning rate schedule, which steps once a batch)."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norm_parameters = {p for norm in norms for p in norm.parameters()}
    groups = [{"params": list(model.parameters())}]
    if args.decay_norms == "no":
        decayed = [p for p in model.parameters() if p not in norm_parameters]
        others = [p for p in model.parameters() if p in norm_parameters]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov == "yes",
        fused=True,
    )
    if recipe.schedule == "onecycle":
        total = recipe.epochs * steps_per_epoch
        cycle_momentum = args.cycle_momentum == "yes"
        schedule = lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, total, cycle_momentum=cycle_momentum
        )
    elif recipe.schedule == "exponential":
        schedule = lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.gamma ** (step // steps_per_epoch)
        )
    else:
        total = recipe.schedule_epochs * steps_per_epoch
        warm_up = total // 40  # 10 of 400 epochs

        def cosine(step):
            if step < warm_up:
                return (step + 1) / warm_up
            done = (step - warm_up) / max(total - warm_up, 1)
            return 0.5 + 0.5 * math.cos(math.pi * done)

        schedule = lr_scheduler.LambdaLR(optimizer, cosine)
    return optimizer, schedule


def collapsed(recipe, rows):
    """Whether single-step training lost 20 points of held-out PGD accuracy (Wong et al. 2020)."""
    if recipe.training != "ffgsm" or not rows:
        return False
    keys = [key for key in rows[-1] if key.startswith("val_pgd")]
    return any(max(row[key] for row in rows) - rows[-1][key] > 0.2 for key in keys)


def keep_early_stop(recipe, data, args, kept_model, rows, trajectories):
    """Save the unfinished teacher where a run with --teacher-es len(rows) looks for it."""
    if len(rows) == recipe.epochs:
        return  # train() saves the last epoch itself
    if collapsed(recipe, rows):
        return  # a run with this --teacher-es would keep its best epoch, not this one
    early_stop = dataclasses.asdict(dataclasses.replace(recipe, epochs=len(rows)))
    meta = {"training": recipe.training}
    if trajectories:
        meta["trajectories"] = trajectories.until(len(rows))
    common.keep_teacher(args, data, early_stop, kept_model, rows, **meta)


class Trajectories:
    """What a net gives the right class after each epoch (paper: App. C.2), for --trajectories.

    train, test (clean) and adv (PGD on test) float16 (E, N): log-probabilities; entropy float32
    (E,): the mean of S(x) over the training images, nats. benchmark/plots.py draws them.
    """

    def __init__(self, data, epochs):
        sizes = {"train": len(data.y_train), "test": len(data.y_test), "adv": len(data.y_test)}
        self.values = {k: torch.zeros(epochs, n, dtype=torch.float16) for k, n in sizes.items()}
        self.values["entropy"] = torch.zeros(epochs)

    def record(self, epoch, model, data, attack):
        """The rows of `epoch`; attack: eps, step_size, steps of the PGD on the test images."""
        train = common.predict(model, data.x_train).log_softmax(1)  # (N, K)
        test = common.predict(model, data.x_test).log_softmax(1)
        adv = common.predict(model, data.x_test, data.y_test, attack).log_softmax(1)
        of_class = {"train": (train, data.y_train), "test": (test, data.y_test)}
        of_class["adv"] = (adv, data.y_test)
        for name, (log_probs, labels) in of_class.items():
            self.values[name][epoch] = log_probs.gather(1, labels[:, None])[:, 0]
        self.values["entropy"][epoch] = -(train.exp() * train).sum(1).mean()

    def until(self, epochs):
        """{name: tensor} of the first epochs, for the meta of a model's file."""
        return {name: values[:epochs].clone() for name, values in self.values.items()}

    def state_dict(self):
        """For the checkpoint, like those of the model and the optimizer."""
        return self.values

    def load_state_dict(self, values):
        """Go on from a state_dict."""
        self.values = values


# ------------------------------------------------------------------------------------------------
# AT+ (section 4): generated images, CutOut or CutMix, label smoothing, weight average


def augment(x, labels, data, args):
    """x (B, C, H, W), labels (B,) of a batch -> the same after what AT+ does; or as they are.

    data.extra: generated images (M, H, W, C) and labels (M,), which replace the last
    --extra-fraction of the batch. Label smoothing and CutMix make labels probabilities (B, K).
    """
    originals = len(x)  # the first images of the batch are of the training set
    if args.extra_data:
        originals = len(x) - round(args.extra_fraction * len(x))
        x_extra, labels_extra = draw_extra(data, len(x) - originals)
        x = torch.cat([x[:originals], x_extra])
        labels = torch.cat([labels[:originals], labels_extra])
    if args.augment == "cutout":
        # filled on the device: with a copy from the host each step would wait for the GPU
        fill = torch.stack([torch.full((), mean, device=x.device) for mean in data.mean])
        x = cutout(x, fill)
    if args.augment == "cutmix" or args.label_smoothing:
        labels = F.one_hot(labels, len(data.classes)).float()  # (B, K)
        first_smoothed = originals if args.extra_data else 0
        uniform = 1 / len(data.classes)
        labels[first_smoothed:] += args.label_smoothing * (uniform - labels[first_smoothed:])
    if args.augment == "cutmix":
        x, labels = cutmix(x, labels, *torch.rand(3).tolist())
    return x, labels


def draw_extra(data, number):
    """`number` generated images, cropped and flipped, float32 (B, C, H, W), and labels (B,)."""
    x_extra, labels_extra = data.extra
    device, (height, width) = data.x_train.device, data.x_train.shape[1:3]
    picks = torch.randint(len(labels_extra), (number,))
    images = torch.from_numpy(x_extra[picks.numpy()])
    corners = torch.randint(2 * data.pad + 1, (2, number))
    flip = torch.randint(1 + data.flip, (number,))
    plan = torch.stack([torch.arange(number), *corners, flip]).to(device)
    padded = F.pad(images.to(device), (0, 0, data.pad, data.pad, data.pad, data.pad))
    return common.crop(padded, *plan, height, width), labels_extra[picks].to(device)


def cutout(x, fill):
    """A square of 9/16 of the image's side becomes `fill` (C,) (DeVries and Taylor 2017).

    Its centre is drawn for each image of x (B, C, H, W); what lies outside of the image is lost.
    18 pixels of 32, as in the code of Rebuffi et al. and Wang et al.
    """
    size = x.shape[-1]
    side = size * 9 // 16
    pixels = torch.arange(size, device=x.device)
    row, column = torch.randint(size, (2, len(x), 1), device=x.device)
    offset = pixels - row + side // 2  # (B, H)
    rows = (offset >= 0) & (offset < side)
    offset = pixels - column + side // 2  # (B, W)
    columns = (offset >= 0) & (offset < side)
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    return torch.where(inside, fill.view(1, -1, 1, 1), x)


def cutmix(x, targets, area, row, column):
    """x and targets with a box of the next image of the batch in each (Yun et al. 2019).

    area: of the box before it is clipped at the border; row, column: its centre; all in [0, 1], as
    parts of the image. x (B, C, H, W), targets (B, K), mixed by the area that the box has.
    """
    size = x.shape[-1]
    half = size * math.sqrt(area) / 2
    top, bottom = max(round(row * size - half), 0), min(round(row * size + half), size)
    left, right = max(round(column * size - half), 0), min(round(column * size + half), size)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x.roll(1, 0)[:, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / size**2
    return mixed, (1 - share) * targets + share * targets.roll(1, 0)


class WeightAverage(nn.Module):
    """The exponential moving average of a net's weights: update(model) after each step.

    The first step copies; step t = 1, 2, ... makes it d average + (1 - d) weights, with the ramp
    d = min(decay, (1 + t) / (10 + t)) of Rebuffi et al. (2021). BatchNorm statistics: the model's.
    torch.optim.swa_utils.AveragedModel would make the host wait for CUDA in every step.
    """

    def __init__(self, model, decay):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.register_buffer("steps", torch.tensor(0))  # stays on the host

    @torch.no_grad()
    def update(self, model):
        """Take the weights of a step."""
        t = int(self.steps)
        decay = min(self.decay, (1 + t) / (10 + t)) if t > 0 else 0.0
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()], 1 - decay)
        torch._foreach_copy_([*self.module.buffers()], [*model.buffers()])
        self.steps += 1


def load_extra(path, data):
    """-> images uint8 (M, S, S, C), mapped from the disk, and labels int64 (M,) of an .npz file.

    It holds `image` and `label`, like the generated sets of Rebuffi et al. and Wang et al. What is
    inside a zip cannot be mapped: the images are unpacked once, into <path>.<checksum>.npy. Nothing
    is unpacked that does not fit `data`. Raises UserError.
    """
    path, shape, classes = Path(path), data.x_train.shape[1:], len(data.classes)
    if not path.is_file():
        raise common.UserError(f"--extra-data: {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            image, label = archive.getinfo("image.npy"), archive.getinfo("label.npy")
            with archive.open(image) as file:
                major, minor = np.lib.format.read_magic(file)
                read_header = getattr(np.lib.format, f"read_array_header_{major}_{minor}")
                (count, *sizes), fortran, dtype = read_header(file)
            if dtype != np.uint8 or fortran or sizes != list(shape):
                wanted = f"uint8 (M, {', '.join(map(str, shape))})"
                raise ValueError(f"image must be {wanted}, got {dtype} {sizes}")
            most = math.prod(shape) * count + 1000
            if image.file_size > most or label.file_size > 8 * count + 1000:
                raise ValueError("more bytes than its headers say")
            if image.file_size > 2**28 and image.file_size > 100 * path.stat().st_size:
                raise ValueError(f"a zip bomb of {image.file_size:,} bytes")
            with archive.open(label) as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
            whole = labels.dtype.kind in "iu" and labels.shape == (count,) and count > 0
            if not whole or labels.min() < 0 or labels.max() >= classes:
                got = f"{labels.dtype} {labels.shape}"
                raise ValueError(f"label must be {count} labels 0..{classes - 1}, got {got}")
            unpacked = path.with_name(f"{path.name}.{image.CRC:08x}.npy")
            if not unpacked.exists():
                print(f"{path}: unpacking {image.file_size / 1e6:,.0f} MB of images", flush=True)
                partial = unpacked.with_suffix(".tmp")
                with archive.open(image) as file, open(partial, "wb") as out:
                    shutil.copyfileobj(file, out)
                partial.replace(unpacked)
        x = np.load(unpacked, mmap_mode="r", allow_pickle=False)
        if (x.dtype, x.shape) != (np.uint8, (count, *shape)):
            raise ValueError(f"{unpacked.name} holds something else; delete it")
    except OSError as error:
        if error.errno is not None:
            raise  # an error of the disk, which common.start reports
        raise common.UserError(f"--extra-data: {path}: {error}") from None
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        expected = "expected an .npz file with image and label"
        raise common.UserError(f"--extra-data: {path}: {expected} ({error})") from None
    return x, torch.from_numpy(labels.astype(np.int64))


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """For each seed: data, teachers, student, evaluation, one table."""
    args = parse_args(argv)
    return common.run_seeds("robust_kd", args, train_and_evaluate, prepare)


def prepare(args, data):
    """Check the nets and files that are given against the data, before anything is written."""
    eval_robustness.check_nets(args, data)
    if args.extra_data:
        data.extra = load_extra(args.extra_data, data)
        data.fingerprint = with_extra_data(data.fingerprint, args.extra_data)


def with_extra_data(fingerprint, path):
    """The fingerprint of data and generated images: with others it is another teacher and run."""
    with zipfile.ZipFile(path) as archive:
        checksums = [archive.getinfo(name).CRC for name in ("image.npy", "label.npy")]
    return zlib.crc32(repr(checksums).encode(), fingerprint)


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    nets = {}  # row of the table -> (net, numbers on its training)
    teacher = None
    if args.demo:
        recipe = teacher_recipe(args, "st", epochs=args.epochs)
        nets["standard training"] = train(recipe, data, folder, "standard", args)
    if needs_teacher(args):
        trainings = teacher_trainings(args)
        teachers = []
        for i, training in enumerate(trainings):
            teacher, meta = get_teacher(args, data, training, i)
            teachers.append(teacher)
            number = f" {i + 1}" if len(trainings) > 1 else ""
            nets[f"teacher{number} ({meta.get('training', 'given')})"] = teacher, meta
        if len(teachers) > 1:
            teacher = Ensemble(teachers, ensemble_weights(args.beta, trainings)).eval()
            nets[f"ensemble of {len(teachers)} teachers"] = teacher, {}
    student, meta = train(student_recipe(args), data, folder, "student", args, teacher)
    nets[f"student ({args.loss})"] = student, meta
    best_epoch = meta["best"].get("epoch")  # None: no images were held out
    if best_epoch is not None and best_epoch != meta["epoch"]:
        best, best_meta = common.load_model(folder / "student_best.pt", data.x_test.device)
        nets["student, best on held-out images"] = best, best_meta

    rows = []
    for name, (net, meta) in nets.items():
        print(f"evaluating {name} on {len(data.x_test)} test images", flush=True)
        accuracies = eval_robustness.evaluate(
            net,
            data.x_test,
            data.y_test,
            ["clean", f"pgd{args.eval_steps}"],
            eps=args.eps,
            restarts=args.restarts,
            seed=args.seed,
        )
        rows.append({"model": name} | accuracies | eval_robustness.training_columns(meta))
    return rows


def get_teacher(args, data, training, number):
    """-> (teacher, its meta): given, trained before by the same recipe, or trained now."""
    recipe = teacher_recipe(args, training, number)

    def train_teacher(folder):
        train(recipe, data, folder, "teacher", args)

    teacher, meta, _ = common.get_teacher(args, data, dataclasses.asdict(recipe), train_teacher)
    return teacher, meta


if __name__ == "__main__":
    common.start(main)
