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
         Ensembles: T is the average of their probabilities          <- common.Ensemble   3.6, B.3
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
         4. The paper gives no lam: 5/6 (RSLAD). It has no temperature: 1; another one softens both
            sides and multiplies the term by its square (Hinton et al. 2015).
         5. Nor does it give momentum 0.9, weight decay 5e-4, step eps/4, uniform start, BatchNorm
            in eval mode in the attack: all from the first author's published code.
         6. Training on CUDA, the attack included, is in bf16 (--precision fp32).
         7. AT+: docs/robust_kd.md says which settings of Rebuffi et al. and Wang et al. it takes.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import functools
import inspect
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import common
import plumbing

# What --demo sets
DEMO = {"data": "shapes", "model": "wrn-10-1", "epochs": 5, "teacher-epochs": 6, "teacher-es": 5}
DEMO |= {"batch-size": 32, "teacher-batch-size": 32, "lr": 0.1, "steps": 3, "step-size": "4/255"}
DEMO |= {"train-subset": 2000, "test-subset": 500, "val-size": 200}
# What --recipe sets: AT+ (section 4), for student and teacher
AT_PLUS = {"model": "wrn-28-10-silu", "epochs": 400, "teacher-epochs": 400, "batch-size": 512}
AT_PLUS |= {"teacher-batch-size": 512, "lr": 0.2, "teacher-lr": 0.2, "schedule": "cosine"}
AT_PLUS |= {"nesterov": "yes", "decay-norms": "no", "ema": 0.995, "steps": 10, "step-size": "2/255"}
AT_PLUS |= {"augment": "cutout", "label-smoothing": 0.1, "extra-fraction": 0.7}
TEACHERS = {"st": "st", "at": "at", "ffgsm": "at", "trades": "trades"}  # training -> its loss


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="akd+", help="what the student minimises")
    add("--alpha", type=common.probability, default="0.8", help="teacher's weight in mixed targets")
    add("--lam", type=common.probability, default="5/6", help="weight of the distillation term")
    add("--temperature", type=common.positive, default=1.0, help="of both softmaxes in the KL")
    add("--kl-reduction", choices=["batchmean", "mean"], default="batchmean", help="mean: / K too")
    add("--recipe", choices=["at+"], help="at+: the settings of section 4, which it prints")
    add("--model", default="resnet18", help="student: resnet18, preact-resnet18, wrn-16-2, ...")
    add("--width", type=common.positive, default=1.0, help="factor on the channels of a ResNet")
    add = parser.add_argument_group("teacher").add_argument
    training = {"choices": [*TEACHERS, "none"], "nargs": "+", "default": ["at"]}
    add("--teacher-training", **training, help="at: by PGD; one for all teachers, or one for each")
    add("--teachers", type=common.count, default=1, help="so many as an ensemble, by seed")
    add("--beta", type=common.probability, nargs="+", help="weight of each, or of all but st")
    add("--teacher-eps", type=common.probability, help="its radius; None: --eps; 2/255 is LAT")
    add("--teacher-epochs", type=common.count, default=100, help="length of its training")
    add("--teacher-es", type=common.count, help="stop it after so many epochs; None: at the end")
    add("--teacher-save-every", type=common.count, help="keep it every so often, for --teacher-es")
    add("--teacher-ckpt", help="take this finished teacher and train none")
    add("--teacher-model", help="None: as the student")
    add("--teacher-width", type=common.positive, help="None: as the student")
    add("--teacher-lr", type=common.positive, default=0.1, help="its first learning rate")
    add("--teacher-gamma", type=common.positive, default=0.9, help="decay of it after every epoch")
    add("--teacher-batch-size", type=common.count, default=128, help="paper: App. A")
    add("--trades-beta", type=common.fraction, default=6.0, help="robustness weight of trades")
    add("--ffgsm-step", type=common.fraction, default=1.25, help="step of ffgsm, in radii")
    add = parser.add_argument_group("attack").add_argument
    add("--eps", type=common.probability, default="8/255", help="radius, training and evaluation")
    add("--steps", type=common.count, default=7, help="PGD steps in training")
    add("--step-size", type=common.fraction, help="PGD step in training; None: a quarter radius")
    add("--attack-loss", choices=["ce", "kl-teacher"], help="None: kl-teacher for rslad, else ce")
    add("--attack-bn", choices=["eval", "train"], default="eval", help="BatchNorm in the attack")
    add("--eval-steps", type=common.count, default=20, help="PGD steps in the evaluation")
    add("--restarts", type=common.count, default=1, help="PGD restarts in the evaluation")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=common.count, default=100, help="epochs of the student")
    add("--lr", type=common.positive, default=0.21, help="peak of the student's OneCycle")
    add("--cycle-momentum", choices=["yes", "no"], default="yes", help="0.95, 0.85, 0.95")
    add("--batch-size", type=common.count, default=256, help="student's batch; paper: App. A")
    add("--momentum", type=common.probability, default=0.9, help="of SGD")
    add("--weight-decay", type=common.fraction, default=5e-4, help="on all parameters")
    add("--nesterov", choices=["yes", "no"], default="no", help="Nesterov's momentum")
    add("--decay-norms", choices=["yes", "no"], default="yes", help="weight decay on BatchNorm too")
    add("--schedule", choices=["paper", "cosine"], default="paper", help="cosine: of both nets")
    add("--ema", type=common.rate, default=0.0, help="decay of the average of the weights; 0: none")
    add("--augment", choices=["crop", "cutout", "cutmix"], default="crop", help="crop: and flip")
    add("--label-smoothing", type=common.rate, default=0.0, help="if there are: of extra data only")
    add("--extra-data", metavar="FILE", help=".npz of generated images: image, label")
    add("--extra-fraction", type=common.rate, default=0.7, help="of each batch, with --extra-data")
    add("--trajectories", action="store_true", help="keep what each epoch makes of each image")
    plumbing.add_run_flags(parser)
    args = plumbing.parse(parser, argv, {"--recipe at+": AT_PLUS, "--demo": DEMO})
    if args.teacher_es is not None and args.teacher_es > args.teacher_epochs:
        parser.error(f"--teacher-es: at most --teacher-epochs {args.teacher_epochs}")
    trainings = teacher_trainings(vars(args))
    if args.teachers not in (1, len(trainings)) or args.teacher_ckpt and len(trainings) > 1:
        parser.error("--teachers: goes with one training or as many, without --teacher-ckpt")
    needy = needs_teacher(args) and not args.teacher_ckpt
    if "none" in trainings and (needy or len(trainings) > 1):
        parser.error("--teacher-training none: goes with --loss at, st or with --teacher-ckpt")
    ensemble_weights(args.beta, trainings)
    given = {flag.split("=")[0] for flag in args.argv}
    for flag in ["--alpha", "--lam", "--temperature", "--kl-reduction"]:
        if flag in given and flag[2:].replace("-", "_") not in needs(args.loss):
            parser.error(f"{flag}: --loss {args.loss} has none")
    if "--extra-fraction" in given and not args.extra_data:
        parser.error("--extra-fraction: goes with --extra-data")
    if args.attack_loss and "student_adv_logits" not in needs(args.loss):
        parser.error(f"--attack-loss: {args.loss} trains on clean images, without an attack")
    common.check_model("--model", args.model, args.width)
    teacher = args.teacher_model or args.model, args.teacher_width or args.width
    common.check_model("--teacher-model", *teacher)
    return args


# ------------------------------------------------------------------------------------------------
# Losses. The names of the arguments are the contract: the student's step hands in what a loss names


def mix_labels(teacher_logits, labels, alpha, temperature=1.0):
    """alpha T + (1 - alpha) y, the mixed targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K).

    labels are (B, K) after CutMix or smoothing, here and in all losses.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    y = labels if labels.dim() == 2 else F.one_hot(labels, teacher_probs.shape[1])
    return alpha * teacher_probs + (1 - alpha) * y


def kl(targets, student_logits, temperature=1.0, kl_reduction="batchmean"):
    """tau^2 KL(targets || S), S softened by tau: (B, K) x2 -> (); `mean` divides by K too."""
    student_log_probs = (student_logits.float() / temperature).log_softmax(1)
    terms = F.kl_div(student_log_probs, targets.detach(), reduction="none")  # (B, K)
    return temperature**2 * (terms.mean() if kl_reduction == "mean" else terms.sum(1).mean())


def st_loss(student_logits, labels):
    """CE(S(x), y), standard training; (B, K), (B,) -> ()."""
    return F.cross_entropy(student_logits, labels)


def at_loss(student_adv_logits, labels):
    """CE(S(x'), y), adversarial training (Madry et al. 2018); (B, K), (B,) -> ()."""
    return F.cross_entropy(student_adv_logits, labels)


def trades_loss(student_logits, student_adv_logits, labels, trades_beta):
    """CE(S(x), y) + beta KL(S(x) || S(x')), TRADES (Zhang et al. 2019); (B, K) x2, (B,) -> ()."""
    # S(x) is no constant here, unlike the teacher: the gradient goes through both sides
    log_probs, targets = student_adv_logits.log_softmax(1), student_logits.softmax(1)
    robust = F.kl_div(log_probs, targets, reduction="batchmean")
    return F.cross_entropy(student_logits, labels) + trades_beta * robust


# fmt: off
def ckd_loss(student_logits, teacher_logits, labels, lam,
             temperature=1.0, kl_reduction="batchmean"):
    """Eq. (1): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x)); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, 1.0, temperature)
    distilled = kl(targets, student_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def ard_loss(student_logits, student_adv_logits, teacher_logits, labels, lam,
             temperature=1.0, kl_reduction="batchmean"):
    """Eq. (2): (1-lam) CE(S(x), y) + lam KL(T(x) || S(x')); (B, K) x3, (B,) -> ()."""
    return ard_plus_loss(student_logits, student_adv_logits, teacher_logits, labels, lam, 1.0,
                         temperature, kl_reduction)


def rslad_loss(student_logits, student_adv_logits, teacher_logits, labels, lam,
               temperature=1.0, kl_reduction="batchmean"):
    """Eq. (3): (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x')); (B, K) x3, (B,) -> ()."""
    return rslad_plus_loss(student_logits, student_adv_logits, teacher_logits, labels, lam, 1.0,
                           temperature, kl_reduction)


def akd_loss(student_adv_logits, teacher_adv_logits, labels, temperature=1.0):
    """Eq. (4): CE(T(x'), S(x')); (B, K) x2, (B,) -> ()."""
    return akd_plus_loss(student_adv_logits, teacher_adv_logits, labels, 1.0, temperature)


def ard_plus_loss(student_logits, student_adv_logits, teacher_logits, labels, lam, alpha,
                  temperature=1.0, kl_reduction="batchmean"):
    """Eq. (5): Eq. (2) with alpha T(x) + (1-alpha) y in the KL; (B, K) x3, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature)
    distilled = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def rslad_plus_loss(student_logits, student_adv_logits, teacher_logits, labels, lam, alpha,
                    temperature=1.0, kl_reduction="batchmean"):
    """Eq. (6): Eq. (3) with alpha T(x) + (1-alpha) y in both KLs; (B, K) x3, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, alpha, temperature)
    clean = kl(targets, student_logits, temperature, kl_reduction)
    return (1 - lam) * clean + lam * kl(targets, student_adv_logits, temperature, kl_reduction)


def akd_plus_loss(student_adv_logits, teacher_adv_logits, labels, alpha, temperature=1.0):
    """Eq. (7): CE(alpha T(x') + (1-alpha) y, S(x')); (B, K) x2, (B,) -> ()."""
    targets = mix_labels(teacher_adv_logits, labels, alpha, temperature).detach()
    return temperature**2 * F.cross_entropy(student_adv_logits / temperature, targets)


LOSSES = {
    "st": st_loss, "at": at_loss, "ckd": ckd_loss, "ard": ard_loss, "rslad": rslad_loss,
    "akd": akd_loss, "ard+": ard_plus_loss, "rslad+": rslad_plus_loss, "akd+": akd_plus_loss,
    "trades": trades_loss,
}
# fmt: on


@functools.cache
def needs(loss):
    """The names of the arguments of a loss: only what it names is computed in a step."""
    return inspect.signature(LOSSES[loss]).parameters


def needs_teacher(args):
    """Whether the loss or the attack looks at a teacher."""
    return args.attack_loss == "kl-teacher" or any("teacher" in name for name in needs(args.loss))


# ------------------------------------------------------------------------------------------------
# How each model is trained, of the flags (a dict, as they are kept with every run)


def step_size(eps, flags):
    """PGD step for a radius: a quarter of it; --step-size is that of --eps, scaled to it."""
    given = flags["step_size"]
    return eps / 4 if given is None else given * eps / (flags["eps"] or 1)


def teacher_trainings(flags):
    """The training of each teacher: --teacher-training, if it is one --teachers times."""
    trainings = flags["teacher_training"]
    return trainings * flags["teachers"] if len(trainings) == 1 else trainings


def teacher_recipe(flags, i=0):
    """How teacher i is trained: with equal recipes, two runs have the same teacher."""
    training, eps = teacher_trainings(flags)[i], flags["teacher_eps"]
    names = "data train_subset val_size deterministic precision momentum weight_decay teacher_ckpt "
    names += "schedule nesterov decay_norms ema augment label_smoothing extra_data extra_fraction"
    recipe = {name: flags[name] for name in names.split()} | {"attack_loss": None}
    recipe["total"] = flags["teacher_epochs"] if flags["schedule"] == "cosine" else None
    attack = [flags["eps"], step_size(flags["eps"], flags), flags["steps"]]  # of the test images
    recipe["trajectories"] = flags["trajectories"] and [flags["test_subset"], *attack]
    recipe |= {"training": training, "loss": TEACHERS.get(training)}
    recipe |= {"seed": flags["seed"] + 100 * i}
    recipe |= {name: flags["teacher_" + name] for name in ("lr", "gamma", "batch_size")}
    recipe |= {name: flags["teacher_" + name] or flags[name] for name in ("model", "width")}
    recipe["epochs"] = flags["teacher_es"] or flags["teacher_epochs"]
    if training in ("at", "ffgsm", "trades"):
        recipe["eps"] = eps = flags["eps"] if eps is None else eps
        recipe |= {name: flags[name] for name in ("attack_bn", "steps")} | {"attack_loss": "ce"}
        recipe["step_size"] = step_size(eps, flags)
    if training == "ffgsm":  # one long step from a uniform start (Wong et al. 2020)
        recipe |= {"steps": 1, "step_size": flags["ffgsm_step"] * eps}
    if training == "trades":
        recipe |= {"attack_loss": "kl-self", "trades_beta": flags["trades_beta"]}
    return recipe


def student_recipe(flags):
    """How the student is trained."""
    names = "loss model width seed eps steps epochs lr batch_size attack_bn"
    recipe = {name: flags[name] for name in names.split()}
    default = {"rslad": "kl-teacher", "rslad+": "kl-teacher", "trades": "kl-self"}  # differs: 2
    recipe["attack_loss"] = flags["attack_loss"] or default.get(flags["loss"], "ce")
    return recipe | {"training": flags["loss"], "step_size": step_size(flags["eps"], flags)}


def make_optimizer(model, stage, how, args, n):
    """-> (SGD, its schedule of n steps an epoch: the paper's for student and teacher, or AT+'s)."""
    yes = {name: getattr(args, name) == "yes" for name in ("nesterov", "decay_norms")}
    optimizer = common.sgd(model, how.lr, args.momentum, args.weight_decay, **yes)
    if args.schedule == "cosine":  # stopped early or not, a teacher has the same rates
        total = n * (args.epochs if stage == "student" else args.teacher_epochs)
        schedule = plumbing.cosine(optimizer, total, total // 40)  # 10 of 400 epochs
    elif stage == "student":
        cycle = {"cycle_momentum": args.cycle_momentum == "yes"}
        schedule = lr_scheduler.OneCycleLR(optimizer, how.lr, how.epochs * n, **cycle)
    else:
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: how.gamma ** (step // n))
    return optimizer, schedule


def ensemble_weights(betas, trainings):
    """beta_i of each teacher, their sum 1; a single beta is shared by those that are not `st`."""
    n, robust = len(trainings), sum(training != "st" for training in trainings)
    if betas is None:
        return [1 / n] * n
    if len(betas) == 1 and 0 < robust < n:
        standard, other = (1 - betas[0]) / (n - robust), betas[0] / robust
        return [standard if training == "st" else other for training in trainings]
    if len(betas) != n or abs(sum(betas) - 1) > 1e-6:
        common.fail(f"--beta: expected {n} that sum to 1, or one if st and others are mixed")
    return betas


# ------------------------------------------------------------------------------------------------
# Training


def perturb(model, x, known, how):
    """x' (B, C, H, W) by PGD: away from the labels, the teacher's T(x) or (TRADES) its own S(x)."""
    if how.attack_loss == "ce":
        targets, start = known["labels"], "uniform"
    else:
        with torch.no_grad():
            logits = model(x) if how.attack_loss == "kl-self" else known["teacher_logits"]
        targets, start = logits.softmax(1), "gaussian"
    return common.pgd(model, x, targets, how.eps, how.step_size, how.steps, start)


def tensors(model, teacher, x, labels, how):
    """The tensors of a step by the names that the losses use; only what the loss names is made."""
    known, wanted = {"labels": labels}, needs(how.loss)
    if "teacher_logits" in wanted or how.attack_loss == "kl-teacher":
        known["teacher_logits"] = teacher(x)
    if "student_adv_logits" in wanted:
        x_adv = perturb(common.attacked(model, how.attack_bn), x, known, how)  # differs: 5
        known["student_adv_logits"] = model.train()(x_adv)
    if "teacher_adv_logits" in wanted:
        known["teacher_adv_logits"] = teacher(x_adv)
    if "student_logits" in wanted:
        known["student_logits"] = model.train()(x)
    return known


def collapsed(run, how):
    """Whether single-step training lost 20 points of held-out PGD accuracy (Wong et al. 2020)."""
    key = f"val_pgd{run.args.steps}_acc"
    return how.training == "ffgsm" and run.best.get(key, 0) - run.row.get(key, 0) > 0.2


def train_model(run, data, stage, recipe, teacher=None):
    """Train a model by its recipe into <stage>.pt; teacher: frozen, in eval mode, or None."""
    args, how, wanted = run.args, SimpleNamespace(**recipe), needs(recipe["loss"])
    model = common.model_for(data, how.model, how.seed, stage, how.width)
    names = ("alpha", "lam", "temperature", "kl_reduction", "trades_beta")
    settings = {name: getattr(args, name) for name in names if name in wanted}
    n = -(-len(data.x_train) // how.batch_size)
    optimizer, schedule = make_optimizer(model, stage, how, args, n)
    average = plumbing.Average(model, args.ema) if args.ema else None
    seed = how.seed if stage == "student" else common.derive_seed(how.seed, stage)  # own batches

    @plumbing.captured(run, model)
    def compute(x, labels):
        with plumbing.autocast(run):
            known = tensors(model, teacher, x, labels, how) | settings
            loss = LOSSES[how.loss](**{name: known[name] for name in wanted if name in known})
        loss.backward()
        logits = known.get("student_adv_logits", known.get("student_logits"))
        return plumbing.metrics(loss, logits, labels)

    def train_step(x, labels):
        optimizer.zero_grad()
        measured = compute(x, labels)
        optimizer.step()
        schedule.step()
        if average:
            average.update_parameters(model)
        return measured

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    parts |= {"average": average} if average else {}
    if args.trajectories:
        from benchmark.trajectories import Trajectories

        parts["trajectories"] = Trajectories(data, how.epochs)
    attack = (args.eps, step_size(args.eps, vars(args)), args.steps)  # of the held-out images
    for epoch in plumbing.epochs(run, stage, how.epochs, **parts):
        if collapsed(run, how):
            break
        batches = common.batches(data, how.batch_size, seed, epoch, run)
        plumbing.end_epoch(run, epoch, [train_step(x, y) for x, y in batches], data, *attack)
        if stage != "student" and (epoch + 1) % (args.teacher_save_every or how.epochs + 1) == 0:
            save(run, f"{stage}-ep{epoch + 1}", how, epoch + 1)
    last = run.row["epoch"]
    if collapsed(run, how):
        last = run.best["epoch"]
        print(f"{stage}: PGD accuracy fell by over 20 points; epoch {last} is kept")
        best = common.load(run.dir / f"{stage}_best.pt")
        plumbing.final_model(run).load_state_dict(best["weights"])
    save(run, stage, how, last)


def save(run, file, how, epoch):
    """The model of this stage after `epoch`, or the average of its weights, into <file>.pt."""
    meta = {"training": how.training, "epoch": epoch, "seconds": run.seconds, "best": run.best}
    if "trajectories" in run.parts:
        meta["trajectories"] = run.parts["trajectories"].until(epoch)
    plumbing.save_model(run, file, plumbing.final_model(run), meta)


def trained(run, data, stage, recipe, teacher=None):
    """-> (model in eval mode, its meta) of <stage>.pt, trained now if it is not there."""
    if not (run.dir / f"{stage}.pt").exists():
        train_model(run, data, stage, recipe, teacher)
    return common.load_model(run.dir / f"{stage}.pt", run.device)


def get_teacher(run, data, i):
    """-> (teacher i, its meta): given, found in a run with the same recipe, or trained."""
    stage, recipe = f"teacher{i + 1}" if i else "teacher", functools.partial(teacher_recipe, i=i)
    train = functools.partial(trained, run, data, stage, recipe(run.flags))
    return plumbing.get_teacher(run, data, recipe, train, f"{stage}.pt")


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    runs = [train_and_evaluate(args) for args in plumbing.per_seed(parse_args(argv))]
    plumbing.across_seeds(runs)


def train_and_evaluate(args):
    """The run of one seed; everything is in its folder. -> Run"""

    def prepare(data):
        data.augment, data.smoothing = args.augment, args.label_smoothing
        if args.extra_data:
            data.extra = common.load_extra(args.extra_data, data)
            data.extra_fraction = args.extra_fraction

    with plumbing.open_run("robust_kd", args, prepare) as (run, data):
        if run.finished:
            return run
        models, teacher = {}, None  # models: row of the table -> (model, numbers on its training)
        if args.demo:
            short = {"teacher_training": ["st"], "teachers": 1, "teacher_es": args.epochs}
            recipe = teacher_recipe(run.flags | short)
            models["standard training"] = trained(run, data, "standard", recipe)
        if needs_teacher(args):
            trainings = teacher_trainings(run.flags)
            found = [get_teacher(run, data, i) for i in range(len(trainings))]
            for i, (teacher, meta) in enumerate(found):
                number = f" {i + 1}" * (len(found) > 1)
                models[f"teacher{number} ({meta.get('training', 'given')})"] = teacher, meta
            if len(found) > 1:
                betas = ensemble_weights(args.beta, trainings)
                teacher = common.Ensemble([model for model, _ in found], betas).eval()
                models[f"ensemble of {len(found)} teachers"] = teacher, {}
        student, meta = trained(run, data, "student", student_recipe(run.flags), teacher)
        models[f"student ({args.loss})"] = student, meta
        for row, file in plumbing.best_epoch(run).items():
            models[row] = common.load_model(file, run.device)
        import eval_robustness

        rows, attacks = [], ["clean", f"pgd{args.eval_steps}"]
        options = {"eps": args.eps, "restarts": args.restarts, "seed": args.seed}
        for name, (model, meta) in models.items():
            print(f"evaluating {name} on {len(data.x_test)} test images", flush=True)
            row = eval_robustness.evaluate(model, data.x_test, data.y_test, attacks, **options)
            rows.append({"model": name} | row)
            rows[-1] |= {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}
        plumbing.finish(run, rows)
    return run


if __name__ == "__main__":
    common.start(main)
