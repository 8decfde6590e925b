"""Robust knowledge distillation: train a robust teacher, stop it early, distil a robust student.

Paper    "When does knowledge distillation improve robustness?", anonymous submission 1330 to TMLR
         (2023, not accepted): equations (1) to (7), sections and tables are those of this text.
         It is a later text of "On the benefits of knowledge distillation for adversarial
         robustness", Maroto, Ortiz-Jimenez, Frossard, arXiv 2203.07159 (2022).
         ARD: Goldblum et al., AAAI 2020. RSLAD: Zi et al., ICCV 2021. AT+: Rebuffi et al. 2021.
Loss     x' is the adversarial example of the student on x, S and T are the probabilities of student
         and teacher, y is the label.
         CKD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x))          <- ckd_loss          Eq. 1
         ARD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x'))         <- ard_loss          Eq. 2
         RSLAD   (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x'))    <- rslad_loss        Eq. 3
         AKD     CE(S(x'), T(x')): T(x') in the place of y           <- akd_loss          Eq. 4
         ARD+, RSLAD+, AKD+: T replaced by alpha T + (1-alpha) y     <- mix_labels        Eq. 5-7
         Ensembles: T is the average of their probabilities          <- Ensemble          3.6, B.3
         st, at, trades: no teacher; CE on x, CE on x', trades_loss
         Other methods (d = x' - x, P: probabilities of the student's weight average on x):
         AdaAD   AKD on the x' where KL(T(x') || S(x')) is largest   <- common.pgd, akd_loss
         IGDM    AKD + A e KL(softmax(t(x+d) - t(x-d)) || softmax(s(x+d) - s(x-d)))  <- igdm_loss
                 s and t are logits, e is the share of the epochs that are over, x' is AdaAD's
         IAD     w KL(T(x) || S(x')) + (1-w) KL(S(x) || S(x'))       <- iad_loss, teacher_trust
         ADR     AT with lam_i P + (1-lam_i) y in the place of y     <- rectify_labels
                 lam_i = lam - (max P - P[y]), within [0, 1]
         MART    CE(S(x'), y) - log(1 - max S(x')[k != y]) + beta KL(S(x) || S(x')) (1 - S(x)[y])
                                                                     <- mart_loss
         AWP     any loss, with its gradient at weights where it is larger   <- perturb_weights
Usage    python robust_kd.py --loss akd+ --alpha 0.8 --teacher-es 40
         python robust_kd.py --loss at --epochs 200                  # the baseline without teacher
         python robust_kd.py --teacher-training st --alpha 0.3       # an accurate teacher
         python robust_kd.py --teacher-eps 2/255 --teacher-es 40 --alpha 0.3    # LAT: a weak one
         python robust_kd.py --teacher-training ffgsm ffgsm ffgsm ffgsm  # an ensemble of cheap ones
         python robust_kd.py --teacher-training st at --beta 0.75 0.25   # a mixed ensemble
         python robust_kd.py --recipe at+ --extra-data data/cifar10_ddpm.npz --alpha 0.8    # AT+
         python robust_kd.py --demo                                  # 2 minutes on a CPU
Expect   CIFAR-10, ResNet-18: not measured yet. Small nets: docs/robust_kd_measured.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); targets and logits (B, K)
Differs  1. 1,024 training images are held out to report the best epoch too (--val-size 0: none).
         2. x' of RSLAD maximises KL(T(x) || S(x')) from a Gaussian start, as in the code of RSLAD
            and of the first author, not the CE of the text (--attack-loss ce: the text). Also for
            RSLAD+ this T is the teacher alone, at temperature 1.
         3. KL is KL(T || S), averaged over the batch. Eqs. 1 to 3, 5 and 6 print S first; the
            author's code has T first, and also averages over the classes, K times less.
         4. The paper gives no lam; we take 5/6, as RSLAD does. It has no temperature: the default
            is 1; another one softens teacher and student, and multiplies the term by its square.
         5. Step eps/4, uniform start, BatchNorm in eval mode during the attack, weight decay 5e-4
            and the teacher's momentum 0.9 are not in the paper; they come from the first author's
            code. OneCycle moves the student's momentum from 0.95 to 0.85 and back, and starts at
            0.0084 (torch's default), where the paper has an initial rate of 0.1.
         6. Training on CUDA, the attack included, is in bf16 (--precision fp32: strict float32).
         7. AT+: docs/robust_kd.md says which settings of Rebuffi et al. and Wang et al. it takes.
         8. The other methods train with our schedule, radius and the true KL, and report the last
            epoch and the best on held-out images. AdaAD's code divides the KL by K on CIFAR-10;
            that of AdaAD and IAD chooses the best epoch on test images.
         9. IGDM's weight rises with epoch / epochs; in the authors' code with epoch / 200.
         10. IAD is that of its text: its code leaves the teacher's term at full weight, and attacks
            with BatchNorm in train mode. As there, w = 1 for the first three tenths of the epochs,
            and a term CE(S(x), y) has the weight 0.
         11. ADR here keeps, evaluates and saves the average (--ema, with a ramp; the statistics of
            BatchNorm are the student's). Its authors average these too, and report both nets.
         12. AWP takes the ascent from the gradient of the whole batch, and goes back before the
            optimiser's step, so that weight decay acts on the weights themselves. Both passes feed
            BatchNorm's statistics; in the authors' code the second does.
"""

import copy
import dataclasses
import math
import time
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import common
import eval_robustness

LOSSES = ["st", "at", "trades", "ckd", "ard", "rslad", "akd", "ard+", "rslad+", "akd+"]
LOSSES += ["adaad", "adaad+", "igdm", "igdm+", "iad", "adr", "mart"]  # other methods
ATTACKED = (set(LOSSES) | {"ffgsm"}) - {"st", "ckd"}  # the net that learns sees x'
TAUGHT_ON_X = {"ckd", "ard", "rslad", "ard+", "rslad+", "iad"}  # the teacher sees x; iad: x' too
# The teacher sees x' alone, as the student does
TAUGHT_ON_X_ADV = {"akd", "akd+", "adaad", "adaad+", "igdm", "igdm+"}
HAS_EFFECT = {  # for these flags: the losses on which they have an effect; others are refused
    "--alpha": {"ard+", "rslad+", "akd+", "adaad+", "igdm+"},
    "--lam": {"ckd", "ard", "rslad", "ard+", "rslad+"},
    "--temperature": TAUGHT_ON_X | TAUGHT_ON_X_ADV,
    "--attack-loss": ATTACKED,
    "--igdm-weight": {"igdm", "igdm+"},
    "--iad-beta": {"iad"},
    "--adr-lam": {"adr"},
    "--adr-temperature": {"adr"},
    "--mart-beta": {"mart"},
}
HAS_EFFECT_ON_ALL_NETS = {  # the same for flags of student and teachers
    "--steps": ATTACKED - {"ffgsm"},
    "--step-size": ATTACKED - {"ffgsm"},
    "--attack-bn": ATTACKED,
    "--trades-beta": {"trades"},
}
ATTACK_LOSSES = {  # what x' maximises if --attack-loss is not given; ce with all other losses
    "trades": "kl-self",
    "rslad": "kl-teacher",  # differs: 2
    "rslad+": "kl-teacher",
    "adaad": "kl-teacher-adv",
    "adaad+": "kl-teacher-adv",
    "igdm": "kl-teacher-adv",
    "igdm+": "kl-teacher-adv",
}

DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "epochs": 5,
    "teacher_epochs": 5,
    "batch_size": 32,
    "teacher_batch_size": 32,
    "lr": 0.1,
    "steps": 3,
    "step_size": 4 / 255,
    "train_subset": 2000,
    "test_subset": 500,
    "val_size": 200,
}
AT_PLUS = {  # --recipe at+: section 4, with numbers of Rebuffi et al. and Wang et al., both nets
    "model": "wrn-28-10-silu",
    "epochs": 400,
    "teacher_epochs": 400,
    "batch_size": 512,
    "teacher_batch_size": 512,
    "lr": 0.2,
    "teacher_lr": 0.2,
    "schedule": "cosine",
    "nesterov": True,
    "decay_norms": False,
    "ema": 0.995,
    "steps": 10,
    "step_size": 2 / 255,
    "augment": "cutout",
    "label_smoothing": 0.1,
    "extra_fraction": 0.7,
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a UserError for those that check_flags refuses."""
    parser = common.Parser(__doc__)
    probability, positive = common.probability, common.positive
    whole, nonnegative, below_1 = common.whole, common.nonnegative, common.below_1
    at_least_2 = common.at_least_2
    pixel_units, pixel_step = common.pixel_units, common.pixel_step
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="akd+", help="loss of the student, see Loss above")
    add("--alpha", type=probability, default=0.8, help="weight of the teacher in mixed targets")
    add("--lam", type=probability, default=5 / 6, help="weight of the distillation term")
    add("--temperature", type=positive, default=1.0, help="temperature of both softmaxes")
    add("--trades-beta", type=nonnegative, default=6.0, help="weight of the robust term of TRADES")
    add("--mart-beta", type=nonnegative, default=5.0, help="weight of the robust term of MART")
    add("--igdm-weight", type=nonnegative, default=1.0, help="weight A of IGDM's term")
    add("--iad-beta", type=nonnegative, default=0.1, help="power of IAD's trust in the teacher")
    ends = {"nargs": 2, "metavar": ("FIRST", "LAST")}  # a half cosine between them
    lam_help = "weight of the average's answer in ADR, first and last step"
    add("--adr-lam", **ends, type=probability, default=[0.7, 0.95], help=lam_help)
    temperature_help = "temperature of the average's answer in ADR, first and last step"
    add("--adr-temperature", **ends, type=positive, default=[2.5, 2.0], help=temperature_help)
    add("--model", default="resnet18", help="net of the student, such as resnet18 or wrn-16-2")
    add("--recipe", choices=["at+"], help="at+: all settings of section 4, which are then printed")

    add = parser.add_argument_group("teacher").add_argument
    trainings = {"nargs": "+", "choices": ["st", "at", "ffgsm", "trades"], "metavar": "TRAINING"}
    add("--teacher-training", **trainings, default=["at"], help="st, at, ffgsm, trades or several")
    add("--beta", type=probability, nargs="+", help="weight of each teacher (default: all equal)")
    add("--teacher-es", type=whole, help="stop the teacher after this epoch (default: no stop)")
    add("--teacher-epochs", type=whole, default=100, help="epochs of a teacher that is not stopped")
    add("--teacher-eps", type=pixel_units, help="radius of the teacher's attack (default: --eps)")
    add("--teacher-model", help="net of the teacher (default: the student's, --model)")
    add("--teacher-lr", type=positive, default=0.1, help="learning rate the teacher starts with")
    add("--teacher-gamma", type=common.decay, default=0.9, help="factor on the rate per epoch")
    add("--teacher-batch-size", type=at_least_2, default=128, help="images per step of the teacher")
    add("--teacher-ckpt", metavar="FILE", help="file of a finished teacher; none is trained then")

    add = parser.add_argument_group("attack").add_argument
    add("--eps", type=pixel_units, default=8 / 255, help="radius of the attacks in pixel units")
    add("--steps", type=whole, default=7, help="number of PGD steps in training, for all nets")
    add("--step-size", type=pixel_step, help="PGD step in training (default: a quarter of --eps)")
    losses = {"choices": ["ce", "kl-teacher", "kl-teacher-adv"]}
    add("--attack-loss", **losses, help="what x' maximises, see Differs 2 (default: by --loss)")
    bn = "mode of BatchNorm in the attacks of the training, for all nets"
    add("--attack-bn", choices=["eval", "train"], default="eval", help=bn)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole, default=100, help="epochs of the student's training")
    add("--lr", type=positive, default=0.21, help="peak learning rate of the student")
    add("--batch-size", type=at_least_2, default=256, help="images per step of the student")
    schedules = {"choices": ["paper", "cosine"], "default": "paper"}
    add("--schedule", **schedules, help="paper: OneCycle, for the teacher exponential decay")
    add("--weight-decay", type=nonnegative, default=5e-4, help="weight decay of SGD for both nets")
    add("--nesterov", **common.SWITCH, help="Nesterov's momentum for both nets")
    decays = common.SWITCH | {"default": True}
    add("--decay-norms", **decays, help="apply the weight decay to BatchNorm's parameters too")
    average = "decay of the weight average of both nets (0: no average; 0.995 with --loss adr)"
    add("--ema", type=below_1, default=0.0, help=average)
    awp = "AWP: radius of the student's weight perturbation, relative to each tensor (0: none)"
    add("--awp", type=nonnegative, default=0.0, help=awp)
    smoothed = "label mass spread over all classes, for both nets; with --extra-data that of "
    smoothed += "generated images alone"
    add("--label-smoothing", type=below_1, default=0.0, help=smoothed)
    add("--extra-data", metavar="FILE", help=".npz of generated images: arrays image and label")
    add("--extra-fraction", type=below_1, default=0.7, help="share of generated images in a batch")
    keep = "keep each net that is trained after every N epochs; a later --teacher-es finds it"
    add("--save-every", type=whole, metavar="N", help=keep)
    common.add_run_flags(parser, augment=["crop", "none", "cutout", "cutmix"])
    args = common.parse(parser, argv, {"--recipe at+": AT_PLUS, "--demo": DEMO})
    check_flags(args, parser.error)

    if args.step_size is None:
        args.step_size = args.eps / 4
    if args.attack_loss is None:
        args.attack_loss = ATTACK_LOSSES.get(args.loss, "ce")
    if args.teacher_ckpt and not needs_teacher(args):
        parser.error(f"--teacher-ckpt: --loss {args.loss} has no teacher; leave it out")
    if args.loss == "adr" and "--ema" not in args.given and not args.ema:
        args.ema = 0.995
    args.schedule_epochs = args.epochs  # a teacher may stop before the end of its schedule
    return args


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    trains_teacher = needs_teacher(args) and not args.teacher_ckpt
    common.check_effects(args, error, HAS_EFFECT, trains_teacher or args.demo)
    trainings = args.teacher_training
    if "--trades-beta" in args.given and "trades" not in [args.loss, *trainings]:
        error("--trades-beta: has no effect without --loss or --teacher-training trades")
    losses = {args.loss, *trainings} if trains_teacher else {args.loss}
    idle = []
    for flag, with_effect in HAS_EFFECT_ON_ALL_NETS.items():
        if flag in args.given and not losses & with_effect:
            idle.append(flag)
    if idle:
        trained = ", ".join(sorted(losses))
        print(f"without effect on all that is trained here ({trained}): {', '.join(idle)}")
    if "--extra-fraction" in args.given and not args.extra_data:
        error("--extra-fraction: has no effect without --extra-data; leave it out")
    if args.loss == "adr" and "--ema" in args.given and not args.ema:
        error("--ema 0: --loss adr rectifies its labels by the weight average; leave out --ema")
    if args.teacher_es is not None and args.teacher_es > args.teacher_epochs:
        error(f"--teacher-es {args.teacher_es}: --teacher-epochs is only {args.teacher_epochs}")
    if "--teacher-gamma" in args.given and args.schedule == "cosine":
        error("--teacher-gamma: has no effect with --schedule cosine; leave it out")
    if args.teacher_ckpt and "--teacher-training" in args.given:
        error("--teacher-training: the teacher of --teacher-ckpt is finished; leave it out")
    if "--beta" in args.given and (len(trainings) == 1 or not needs_teacher(args)):
        error("--beta: has no effect without several teachers; leave it out")
    beta = args.beta or [1 / len(trainings)] * len(trainings)
    if len(beta) != len(trainings) or abs(sum(beta) - 1) > 1e-6:
        wanted = "expected a weight for each word of --teacher-training, with sum 1"
        error(f"--beta: {wanted}, got {' '.join(map(str, beta))}")


# ------------------------------------------------------------------------------------------------
# Losses: functions of logits, targets and labels. Copy the ones you need with mix_labels and kl
# (AKD does without kl); x' comes from common.pgd, which needs common.frozen. A whole loop to paste:
# docs/use_elsewhere.md.


def mix_labels(teacher_logits, labels, alpha=1.0, temperature=1.0):
    """alpha T + (1 - alpha) y, the targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    With alpha 1 they are the teacher's probabilities, as in Eqs. (1) to (4). labels are (B, K)
    after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, teacher_probs.shape[1])
    return (alpha * teacher_probs + (1 - alpha) * labels).detach()


def kl(targets, student_logits, temperature=1.0):
    """tau^2 KL(targets || S), S softened by tau, averaged over the batch: (B, K) x2 -> ()."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student_log_probs, targets, reduction="batchmean")


def trades_loss(student_logits, student_adv_logits, labels, trades_beta):
    """CE(S(x), y) + beta KL(S(x) || S(x')), TRADES (Zhang et al. 2019); (B, K) x2, (B,) -> ()."""
    # S(x) is no constant here, unlike a teacher: the gradient goes through both sides
    robust = F.kl_div(
        student_adv_logits.log_softmax(1), student_logits.softmax(1), reduction="batchmean"
    )
    return F.cross_entropy(student_logits, labels) + trades_beta * robust


def ckd_loss(student_logits, targets, labels, lam, temperature=1.0):
    """Eq. (1): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x)); (B, K) x2, (B,) -> ()."""
    label_term = F.cross_entropy(student_logits, labels)
    return (1 - lam) * label_term + lam * kl(targets, student_logits, temperature)


def ard_loss(student_logits, student_adv_logits, targets, labels, lam, temperature=1.0):
    """Eqs. (2), (5): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x')); (B, K) x3, (B,) -> ()."""
    label_term = F.cross_entropy(student_logits, labels)
    return (1 - lam) * label_term + lam * kl(targets, student_adv_logits, temperature)


def rslad_loss(student_logits, student_adv_logits, targets, lam, temperature=1.0):
    """Eqs. (3), (6): (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x')); (B, K) x3 -> ()."""
    clean_term = kl(targets, student_logits, temperature)
    robust_term = kl(targets, student_adv_logits, temperature)
    return (1 - lam) * clean_term + lam * robust_term


def akd_loss(student_adv_logits, targets, temperature=1.0):
    """Eqs. (4), (7): CE(S(x'), T(x')), T(x') in the place of the label; (B, K) x2 -> ()."""
    return temperature**2 * F.cross_entropy(student_adv_logits / temperature, targets)


# ------------------------------------------------------------------------------------------------
# Other methods: losses, labels, weights


def igdm_loss(
    student_adv_logits, student_mirrored_logits, teacher_adv_logits, teacher_mirrored_logits
):
    """KL(softmax(t(x+d) - t(x-d)) || softmax(s(x+d) - s(x-d))), d = x' - x; (B, K) x4 -> ().

    IGDM (Lee et al., ICLR 2025) adds it to AKD: the difference of logits between x' and its mirror
    image x - d stands for the gradient by the image, which the student should share.
    """
    # float32 before the difference of two close numbers
    teacher_difference = teacher_adv_logits.float() - teacher_mirrored_logits.float()
    student_difference = student_adv_logits.float() - student_mirrored_logits.float()
    return kl(teacher_difference.softmax(1).detach(), student_difference)


def teacher_trust(teacher_adv_logits, labels, beta):
    """w = T(x')[y]^beta, the teacher's probability for the label at x': (B, K), (B,) -> (B,)."""
    teacher_probs = teacher_adv_logits.detach().float().softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, teacher_probs.shape[1])
    return (labels * teacher_probs).sum(1) ** beta


def iad_loss(student_logits, student_adv_logits, targets, trust, temperature=1.0):
    """w tau^2 KL(T(x) || S(x')) + (1-w) KL(S(x) || S(x')), w = trust (B,); (B, K) x3 -> ().

    IAD (Zhu et al., ICLR 2022): where the teacher is not trusted, the student learns from itself.
    With T(x') as targets it is AdaIAD.
    """
    softened = (student_adv_logits.float() / temperature).log_softmax(1)
    teacher_kl = temperature**2 * F.kl_div(softened, targets, reduction="none").sum(1)
    student_probs, adv_log_probs = student_logits.softmax(1), student_adv_logits.log_softmax(1)
    own_kl = F.kl_div(adv_log_probs, student_probs, reduction="none").sum(1)
    return (trust * teacher_kl + (1 - trust) * own_kl).mean()


def rectify_labels(average_logits, labels, lam, temperature):
    """lam_i P + (1-lam_i) y, lam_i = lam - (max P - P[y]) in [0, 1]; (B, K), (B,) -> (B, K).

    ADR (Wu et al., ICLR 2024): P are the softened probabilities of the student's own weight
    average on the clean image. They count less where the average prefers another class.
    """
    probs = (average_logits.float() / temperature).softmax(1)
    if labels.dim() == 1:
        labels = F.one_hot(labels, probs.shape[1])
    lam = lam - (probs.amax(1) - (labels * probs).sum(1))
    lam = lam.clamp(0, 1)[:, None]
    return (lam * probs + (1 - lam) * labels).detach()


def mart_loss(student_logits, student_adv_logits, labels, mart_beta):
    """CE(S(x'), y) - log(1.0001 - max_{k != y} S(x')[k]) + beta KL(S(x) || S(x')) (1 - S(x)[y]).

    MART (Wang et al., ICLR 2020), averaged over the batch: (B, K) x2, (B,) -> ().
    """
    if labels.dim() == 1:
        labels = F.one_hot(labels, student_logits.shape[1])
    is_label = F.one_hot(labels.argmax(1), labels.shape[1])
    probs, adv_probs = student_logits.float().softmax(1), student_adv_logits.float().softmax(1)
    rival = (adv_probs * (1 - is_label)).amax(1)  # the largest probability of a wrong class
    boosted = F.cross_entropy(student_adv_logits, labels.float()) - (1.0001 - rival).log().mean()
    drift = F.kl_div(student_adv_logits.log_softmax(1), probs, reduction="none").sum(1)
    return boosted + mart_beta * (drift * (1 - (labels * probs).sum(1))).mean()


@torch.no_grad()
def perturb_weights(model, gamma):
    """w + gamma ||w|| g / ||g|| for each weight tensor, g in .grad -> [(w, w as it was), ...].

    AWP (Wu et al., NeurIPS 2020). Biases and the parameters of BatchNorm stay. Call it after a
    backward() of the loss; then a second forward and backward, restore_weights, and the step.
    """
    moved = []
    for weights in model.parameters():
        if weights.dim() > 1 and weights.grad is not None:
            moved.append((weights, weights.clone()))
            gradient = weights.grad / (weights.grad.norm() + 1e-20)
            weights += gamma * weights.norm() * gradient
    return moved


@torch.no_grad()
def restore_weights(moved):
    """Give weights that perturb_weights has moved the values that they had."""
    for weights, before in moved:
        weights.copy_(before)


def half_cosine(ends, done):
    """From ends[0] to ends[1] on half a cosine, while `done` goes from 0 to 1."""
    first, last = ends
    return last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * done))


# ------------------------------------------------------------------------------------------------
# Teachers


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


def needs_teacher(args):
    """Whether the student's loss or its attack looks at a teacher."""
    attacked_by = args.attack_loss in ("kl-teacher", "kl-teacher-adv")
    return args.loss in TAUGHT_ON_X | TAUGHT_ON_X_ADV or attacked_by


def teacher_args(args, training, number=0):
    """The flags by which teacher `number` (0, 1, ...) is trained, made of the student's.

    A flag that has no effect on this teacher becomes None. Runs that agree in all the others and in
    the data share the teacher (see get_teacher): a flag of the student that is forgotten here costs
    a second training. --teacher-es and --teacher-epochs count as epochs, --teacher-lr as lr, and
    so on.
    """
    teacher = common.replace(
        args,
        loss=training,
        model=args.teacher_model or args.model,
        seed=args.seed + 100 * number,
        epochs=args.teacher_es or args.teacher_epochs,
        lr=args.teacher_lr,
        batch_size=args.teacher_batch_size,
        schedule_epochs=args.teacher_epochs,
        attack_loss="kl-self" if training == "trades" else "ce",
    )
    for flag in vars(args):
        if flag.startswith("teacher_") or flag in ("beta", "recipe", "awp"):
            setattr(teacher, flag, None)
    if args.schedule == "paper":
        teacher.schedule, teacher.schedule_epochs = "exponential", None
        teacher.teacher_gamma = args.teacher_gamma
    if not args.extra_data:
        teacher.extra_fraction = None

    if args.teacher_eps not in (None, args.eps):
        teacher.eps = args.teacher_eps
        teacher.step_size = teacher.eps / 4
        if args.eps > 0:
            teacher.step_size = teacher.eps * args.step_size / args.eps
    for flag, with_effect in (HAS_EFFECT | HAS_EFFECT_ON_ALL_NETS).items():
        if training not in with_effect:
            setattr(teacher, flag.removeprefix("--").replace("-", "_"), None)
    if training == "st":
        teacher.eps = None
    if training == "ffgsm":  # one long step from a uniform start (Wong et al. 2020)
        teacher.steps, teacher.step_size = 1, 1.25 * teacher.eps
    return teacher


def get_teacher(args, data, training, number):
    """-> teacher `number`, in eval mode with frozen weights: given, found, or trained now.

    runs/teachers/<digest of its flags and the data> keeps it for all runs with the same ones.
    """
    if args.teacher_ckpt:
        teacher = common.given_teacher(args, data)
    else:
        flags = teacher_args(args, training, number)
        folder = common.teacher_folder(flags, data)
        with common.locked(folder, wait=True):  # another run may be training it
            if not (folder / "teacher.pt").exists():
                train(flags, data, folder, "teacher")
            common.delete_checkpoints(folder)
        teacher = common.load_model(folder / "teacher.pt", data)
    print(f"teacher: {teacher.meta['file']}", flush=True)
    common.compile_model(teacher, args.compile)
    return teacher


def warn_of_standard_teachers(args, teachers):
    """Say that a student of standard teachers alone will not be robust, if they look at x'."""
    mixed = args.loss.endswith("+") and args.alpha < 1
    standard = all(net.meta.get("training") == "st" for net in teachers)
    if standard and not mixed and args.loss in TAUGHT_ON_X_ADV:
        reason = "a standard teacher is wrong at x', and nothing but its answers is learned"
        remedy = f"mix with the labels: --loss {args.loss.removesuffix('+')}+ --alpha 0.3"
        print(f"warning: the student will not be robust: {reason}; {remedy}", flush=True)


# ------------------------------------------------------------------------------------------------
# Training


def train(args, data, folder, stage, teacher=None):
    """Train a net by the flags in args and write it to folder/<stage>.pt -> the net in eval mode.

    stage: "teacher", "student" or "standard", the name of the files. teacher: in eval mode with
    frozen weights, or None. After an interruption the same call goes on after the last finished
    epoch.
    """
    model = common.new_model(data, args.model, args.seed, stage)
    steps_per_epoch = common.steps_per_epoch(data, args.batch_size)
    optimizer, schedule = make_optimizer(model, args, steps_per_epoch)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    average, kept_model = None, model  # kept_model is validated and saved
    if args.ema:
        kept_model = average = weight_average(model)
        state["average"] = average
    common.compile_model(model, args.compile)
    alpha = args.alpha if args.loss.endswith("+") else 1.0
    lam, temperature = args.lam, args.temperature
    directions = ["up", "down"] if args.awp else ["down"]
    is_adaiad = args.loss == "iad" and args.attack_loss == "kl-teacher-adv"  # needs no T(x)

    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), args.epochs):
        if collapsed(args, rows):  # here, not below: a resumed run may have collapsed before
            break
        common.seed_epoch(args.seed, stage, epoch)
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, args.batch_size, args.seed, stage, epoch):
            step = schedule.last_epoch  # 0, 1, ... over all epochs: the schedule counts batches
            # what comes on top of crop and flip; the labels are perhaps (B, K) afterwards
            x, labels = augment(x, labels, data, args)

            with common.autocast(args, x.device):
                # The teacher looks at the clean images. It is frozen: no gradient reaches it. Its
                # answers are copied: with CUDA graphs (--compile reduce-overhead) the next call of
                # a net may take their memory.
                is_taught_on_x = args.loss in TAUGHT_ON_X and not is_adaiad
                if is_taught_on_x or args.attack_loss == "kl-teacher":
                    teacher_logits = teacher(x).clone()
                attack_targets = labels
                if args.loss == "adr":  # the labels are rectified by the student's own average
                    done = step / (args.epochs * steps_per_epoch)
                    adr_lam = half_cosine(args.adr_lam, done)
                    adr_temperature = half_cosine(args.adr_temperature, done)
                    targets = rectify_labels(average(x), labels, adr_lam, adr_temperature)
                    attack_targets = targets

                # The attack moves x to x', away from the labels, or from what the teacher answers
                # for x or for x' itself, or (TRADES) from what the student itself answers for x.
                if args.loss in ATTACKED:
                    model.train(args.attack_bn == "train")  # differs: 5
                    start = "uniform" if args.attack_loss == "ce" else "gaussian"
                    if args.attack_loss == "kl-teacher":  # differs: 2
                        attack_targets = teacher_logits.softmax(1)
                    elif args.attack_loss == "kl-teacher-adv":
                        attack_targets = teacher
                    elif args.attack_loss == "kl-self":
                        with torch.no_grad():
                            attack_targets = model(x).softmax(1)
                    x_adv = common.pgd(
                        model, x, attack_targets, args.eps, args.step_size, args.steps, start
                    )

                if args.loss in TAUGHT_ON_X_ADV:
                    teacher_logits = teacher(x_adv).clone()
                if args.loss.startswith("igdm"):
                    x_mirrored = 2 * x - x_adv  # x - d, perhaps outside of [0, 1]
                    teacher_mirrored_logits = teacher(x_mirrored).clone()
                if args.loss == "iad":
                    teacher_adv_logits = teacher(x_adv)  # no copy: used before the next call
                    # the authors trust the teacher alone (w = 1) for 60 of 200 epochs
                    beta = args.iad_beta if epoch >= 0.3 * args.epochs else 0.0
                    trust = teacher_trust(teacher_adv_logits, labels, beta)
                    if is_adaiad:
                        teacher_logits = teacher_adv_logits
                if args.loss in TAUGHT_ON_X | TAUGHT_ON_X_ADV:
                    targets = mix_labels(teacher_logits, labels, alpha, temperature)

            # The student learns. With --awp the loss is computed twice: the first gradient moves
            # the weights to where the loss is larger; the optimiser takes the gradient found
            # there, and makes its step from where the weights were.
            for direction in directions:
                with common.autocast(args, x.device):
                    # `logits` belong to x' if the loss has an attack, otherwise to x; loss and
                    # training accuracy in the log are theirs (with --awp: at the moved weights).
                    # Some losses need the logits of x too.
                    model.train()
                    logits = model(x_adv if args.loss in ATTACKED else x)
                    match args.loss.removesuffix("+"):
                        case "st" | "at" | "ffgsm":  # ffgsm: teachers alone
                            loss = F.cross_entropy(logits, labels)
                        case "trades":
                            loss = trades_loss(model(x), logits, labels, args.trades_beta)
                        case "ckd":
                            loss = ckd_loss(logits, targets, labels, lam, temperature)
                        case "ard":
                            loss = ard_loss(model(x), logits, targets, labels, lam, temperature)
                        case "rslad":
                            loss = rslad_loss(model(x), logits, targets, lam, temperature)
                        case "akd" | "adaad":
                            loss = akd_loss(logits, targets, temperature)
                        case "igdm":
                            akd = akd_loss(logits, targets, temperature)
                            igdm = igdm_loss(
                                logits, model(x_mirrored), teacher_logits, teacher_mirrored_logits
                            )
                            loss = akd + args.igdm_weight * epoch / args.epochs * igdm
                        case "iad":
                            loss = iad_loss(model(x), logits, targets, trust, temperature)
                        case "adr":
                            loss = F.cross_entropy(logits, targets)
                        case "mart":
                            loss = mart_loss(model(x), logits, labels, args.mart_beta)

                optimizer.zero_grad()
                loss.backward()
                common.average_gradients(model, len(labels))  # under torchrun, otherwise nothing
                if direction == "up":
                    moved = perturb_weights(model, args.awp)
            if args.awp:
                restore_weights(moved)
            optimizer.step()
            schedule.step()  # per batch
            if average is not None:
                update_average(average, model, args.ema, step)
            history.append(common.step_sums(loss, logits, labels))  # the GPU is not waited for

        row = common.epoch_row(args, stage, epoch, model, history, began)
        if average is not None:  # epoch_row may have changed the statistics under torchrun
            copy_buffers(model, average)
        rows.append(row | common.validate(args, stage, kept_model, data, args.eps))
        if args.save_every and len(rows) % args.save_every == 0 and not collapsed(args, rows):
            # before the checkpoint: a run that is killed here repeats the epoch and saves again
            keep_epoch(args, data, folder, stage, kept_model, rows)
        may_be_best = not collapsed(args, rows)
        common.save_epoch(folder, stage, kept_model, state, rows, args, may_be_best)

    meta = {"training": args.loss}
    if collapsed(args, rows):
        best = common.load_model(folder / f"{stage}_best.pt", data)
        kept_model.load_state_dict(best.state_dict())
        meta["epoch"], meta["best"] = best.meta["epoch"], best.meta["best"]
        print(f"{stage}: PGD accuracy fell by over 20 points; epoch {meta['epoch']} is kept")
    common.save_model(folder / f"{stage}.pt", kept_model, rows, **meta)
    return common.load_model(folder / f"{stage}.pt", data)


def make_optimizer(model, args, steps_per_epoch):
    """-> (SGD, its learning rate schedule, which steps once a batch)."""
    norms = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # of any dimension
            norms += module.parameters()
    groups = [{"params": list(model.parameters())}]
    if not args.decay_norms:
        ids = {id(p) for p in norms}
        decayed = [p for p in model.parameters() if id(p) not in ids]
        groups = [{"params": decayed}, {"params": norms, "weight_decay": 0.0}]
    fused = ":" not in args.model  # fails for a weight that gets no gradient in the first step
    optimizer = torch.optim.SGD(
        groups,
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov,
        fused=fused,
    )
    if args.schedule == "paper":  # the student's; OneCycle moves the momentum too
        return optimizer, OneCycleLR(optimizer, args.lr, args.epochs * steps_per_epoch)
    if args.schedule == "exponential":  # the teacher's
        gamma = args.teacher_gamma
        return optimizer, LambdaLR(optimizer, lambda step: gamma ** (step // steps_per_epoch))
    total = args.schedule_epochs * steps_per_epoch
    warm_up = total // 40  # 10 of 400 epochs

    def cosine(step):
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(total - warm_up, 1)
        return 0.5 + 0.5 * math.cos(math.pi * done)

    return optimizer, LambdaLR(optimizer, cosine)


def collapsed(args, rows):
    """Whether single-step training lost 20 points of held-out PGD accuracy (Wong et al. 2020)."""
    accuracies = [row["val_pgd7_acc"] for row in rows if "val_pgd7_acc" in row]
    return args.loss == "ffgsm" and bool(accuracies) and max(accuracies) - accuracies[-1] > 0.2


def keep_epoch(args, data, folder, stage, model, rows):
    """Save the net for --save-every; an early stop of a teacher where --teacher-es finds it."""
    # The last epoch is no early stop: train saves it as teacher.pt, once its checkpoint is there
    if stage != "teacher" or len(rows) == args.epochs:
        path = folder / f"{stage}-epoch{len(rows)}.pt"
        common.save_model(path, model, rows, training=args.loss)
    else:
        early_stopped = common.replace(args, epochs=len(rows))
        other = common.teacher_folder(early_stopped, data)
        with common.locked(other, wait=True):  # another run may be training it
            # a student may have learned from a teacher that is there; under torchrun the first
            # process says whether it is: a slow one would see what the first has just saved
            if not common.from_first_process((other / "teacher.pt").exists()):
                common.save_model(other / "teacher.pt", model, rows, training=args.loss)


# ------------------------------------------------------------------------------------------------
# AT+ (section 4): generated images, CutOut or CutMix, label smoothing, weight average


def weight_average(model):
    """A frozen copy of a net in eval mode, which update_average makes its weight average."""
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except RuntimeError as error:  # TorchScript, or torch.nn.utils.weight_norm
        advice = "leave out --ema, or take torch.nn.utils.parametrizations"
        problem = f"the net cannot be copied ({common.one_line(error)})"
        raise common.UserError(f"--ema: {problem}; {advice}") from None


@torch.no_grad()
def update_average(average, model, decay, t):
    """After step t = 1, 2, ...: d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)).

    The ramp is that of Rebuffi et al. (2021). The first step, t = 0, copies the weights. The
    statistics of BatchNorm are always the model's.
    """
    t = torch.tensor(t, device="cpu")  # d in float32, and no wait for the GPU
    d = ((1 + t) / (10 + t)).clamp(max=decay)
    for averaged, weights in zip(average.parameters(), model.parameters()):
        if t == 0:
            averaged.copy_(weights)
        else:
            averaged.lerp_(weights, float(1 - d))
    copy_buffers(model, average)


@torch.no_grad()
def copy_buffers(model, other):
    """Give another net the buffers of `model`, such as the statistics of BatchNorm."""
    for theirs, ours in zip(other.buffers(), model.buffers()):
        theirs.copy_(ours)


def augment(x, labels, data, args):
    """x (B, C, H, W), labels (B,) of a batch -> the same after what AT+ does; or as they are.

    With --extra-data generated images replace the last part of the batch, and only their labels
    are smoothed. Label smoothing and CutMix make the labels probabilities (B, K).
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
    if args.label_smoothing:
        labels = F.one_hot(labels, len(data.classes)).float()  # (B, K)
        first_smoothed = originals if args.extra_data else 0
        uniform = 1 / len(data.classes)
        labels[first_smoothed:] += args.label_smoothing * (uniform - labels[first_smoothed:])
    if args.augment == "cutmix":
        from torchvision.transforms import v2

        x, labels = v2.CutMix(num_classes=len(data.classes))(x, labels)
    return x, labels


def draw_extra(data, number):
    """`number` generated images, cropped and flipped, float32 (B, C, H, W), and labels (B,)."""
    device, (height, width) = data.x_train.device, data.x_train.shape[1:3]
    picks = torch.randint(len(data.y_extra), (number,))
    corners = torch.randint(2 * data.pad + 1, (2, number))
    flip = torch.randint(1 + data.flip, (number,))
    draws = torch.stack([picks, torch.arange(number), *corners, flip])
    if device.type == "cuda":
        draws = draws.pin_memory()  # otherwise the copy would wait for the GPU
    picks, *windows = draws.to(device, non_blocking=True)
    padded = common.pad(data.x_extra[picks], data.pad)
    return common.crop(padded, *windows, height, width), data.y_extra[picks]


def cutout(x, fill):
    """A square of 9/16 of the image's side becomes `fill` (C,) (DeVries and Taylor 2017).

    Its centre is drawn for each image of x (B, C, H, W); what lies outside of the image is lost.
    18 pixels of 32, as in the code of Wang et al., who fill with black; here `fill` is the mean
    colour. The code of Rebuffi et al. has no cutout.
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


def add_extra_data(data, path):
    """`data` with the generated images of an .npz file, as x_extra and y_extra on the device.

    The file holds `image` uint8 (M, H, W, C) and `label` (M,), like the sets of Rebuffi et al. and
    Wang et al.: 3 GB for a million images of 32 x 32. The fingerprint of the data then depends on
    them: with other images it is another run and another teacher. Raises UserError.
    """
    found = common.read_npz(Path(path), ("image", "label"))
    arrays = {"x_extra": found["image"], "y_extra": found["label"]}
    if "classes" in found:
        common.check_class_names(f"--extra-data {path}", found["classes"], data)
    x, y = common.check_images(f"--extra-data {path}", "extra", arrays)
    if x.shape[1:] != data.x_train.shape[1:] or y.max() >= len(data.classes):
        wanted = f"images {tuple(data.x_train.shape[1:])}, labels below {len(data.classes)}"
        got = f"{x.shape[1:]} and labels up to {y.max()}"
        raise common.UserError(f"--extra-data {path}: expected {wanted}, got {got}")
    fingerprint = zlib.crc32(y, zlib.crc32(x, data.fingerprint))
    device = data.x_train.device
    x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    return dataclasses.replace(data, x_extra=x, y_extra=y, fingerprint=fingerprint)


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """Data, teacher, student, evaluation, one table; for each seed."""
    args = parse_args(argv)
    data = common.load_training_data(args, common.setup_device(args))
    eval_robustness.check_nets(args, data)
    if args.extra_data:
        data = add_extra_data(data, args.extra_data)
    summaries = []
    for seed in args.seed:
        seed_args = common.replace(args, seed=seed)
        with common.open_run("robust_kd", seed_args, data) as folder:
            rows = common.read_summary(folder)
            if rows is None:  # not finished yet
                rows = train_and_evaluate(seed_args, data, folder)
                common.finish_run(folder, rows)
            common.show_run(folder, rows)
        summaries.append(rows)
    common.show_mean(args.seed, summaries)
    return summaries


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    nets = {}  # role of the net -> (its label in the table, the net)
    teacher = None
    if args.demo:
        flags = teacher_args(args, "st")  # for as many epochs as the teacher
        nets["standard"] = "standard training", train(flags, data, folder, "standard")
    if needs_teacher(args):
        teachers = []
        for number, training in enumerate(args.teacher_training):
            net = get_teacher(args, data, training, number)
            teachers.append(net)
            role = "teacher" if number == 0 else f"teacher{number + 1}"
            nets[role] = f"{role} ({net.meta.get('training', 'given')})", net
        warn_of_standard_teachers(args, teachers)
        teacher = teachers[0]
        if len(teachers) > 1:
            teacher = Ensemble(teachers, args.beta).eval()
            nets["ensemble"] = f"ensemble of {len(teachers)} teachers", teacher
    student = train(args, data, folder, "student", teacher)
    nets["student"] = f"student ({args.loss})", student
    if student.meta["best"].get("epoch", args.epochs) != args.epochs:
        best = common.load_model(folder / "student_best.pt", data)
        nets["best"] = "student, best on held-out images", best

    return eval_robustness.summary_rows(
        nets,
        data,
        folder,
        ["clean", "pgd20"],
        eps=args.eps,
        seed=args.seed,
        batch_size=common.evaluation_batch_size(args),
    )


if __name__ == "__main__":
    common.start(main)
