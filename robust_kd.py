"""Robust knowledge distillation: train a robust teacher, stop it early, distil a robust student.

Paper    "When does knowledge distillation improve robustness?", Maroto, Ortiz-Jimenez, Frossard,
         arXiv 2203.07159, equations (1) to (7). x' is the adversarial example of the student on x,
         S and T the probabilities of student and teacher.
Loss     CKD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x))          <- ckd_loss          Eq. 1
         ARD     (1-lam) CE(S(x), y) + lam KL(T(x) || S(x'))         <- ard_loss          Eq. 2
         RSLAD   (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x'))    <- rslad_loss        Eq. 3
         AKD     CE(T(x'), S(x'))                                    <- akd_loss          Eq. 4
         ARD+, RSLAD+, AKD+: T replaced by alpha T + (1-alpha) y     <- *_plus_loss       Eq. 5-7
         at, st: no teacher, CE(S(x'), y) and CE(S(x), y)            <- at_loss, st_loss
Usage    python robust_kd.py --loss akd+ --alpha 0.8 --teacher-es 40
         python robust_kd.py --loss at                               # the baseline without teacher
         python robust_kd.py --teacher-training st --alpha 0.3       # an accurate teacher
         python robust_kd.py --teacher-eps 2/255 --teacher-es 40     # a weakly robust one (LAT)
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
"""

import inspect
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import common

# What --demo sets
DEMO = {"data": "shapes", "model": "wrn-10-1", "epochs": 5, "teacher-epochs": 6, "teacher-es": 4}
DEMO |= {"batch-size": 32, "teacher-batch-size": 32, "lr": 0.1, "steps": 3, "step-size": "4/255"}
DEMO |= {"train-subset": 2000, "test-subset": 500, "val-size": 200}


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="akd+", help="what the student minimises")
    add("--alpha", type=common.probability, default="0.8", help="teacher's weight in mixed targets")
    add("--lam", type=common.probability, default="5/6", help="weight of the distillation term")
    add("--temperature", type=common.positive, default=1.0, help="of both softmaxes in the KL")
    add("--kl-reduction", choices=["batchmean", "mean"], default="batchmean", help="mean: / K too")
    add("--model", default="resnet18", help="student: resnet18, preact-resnet18, wrn-16-2, ...")
    add("--width", type=common.positive, default=1.0, help="factor on the channels of a ResNet")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-training", choices=[*TEACHERS, "none"], default="at", help="at: PGD")
    add("--teacher-eps", type=common.probability, help="its radius; None: --eps; 2/255 is LAT")
    add("--teacher-epochs", type=common.count, default=100, help="length of its training")
    add("--teacher-es", type=common.count, help="stop it after so many epochs; None: at the end")
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
    common.add_run_flags(parser)
    args = common.parse(parser, argv, DEMO)
    if args.teacher_es is not None and args.teacher_es > args.teacher_epochs:
        parser.error(f"--teacher-es: at most --teacher-epochs {args.teacher_epochs}")
    if args.teacher_training == "none" and needs_teacher(args) and not args.teacher_ckpt:
        parser.error("--teacher-training none: goes with --loss at, st or with --teacher-ckpt")
    given = {flag.split("=")[0] for flag in args.argv}
    for flag in ["--alpha", "--lam", "--temperature", "--kl-reduction"]:
        if flag in given and flag[2:].replace("-", "_") not in needs(args.loss):
            parser.error(f"{flag}: --loss {args.loss} has none")
    if args.attack_loss and "student_adv_logits" not in needs(args.loss):
        parser.error(f"--attack-loss: {args.loss} trains on clean images, without an attack")
    common.check_model("--model", args.model, args.width)
    common.check_model("--teacher-model", *teacher_model(vars(args)))
    return args


# ------------------------------------------------------------------------------------------------
# Losses. The names of the arguments are the contract: the student's step hands in what a loss names


def mix_labels(teacher_logits, labels, alpha, temperature=1.0):
    """alpha T + (1 - alpha) y, the mixed targets of Eqs. (5) to (7): (B, K), (B,) -> (B, K)."""
    teacher_probs = (teacher_logits.float() / temperature).softmax(1)
    return alpha * teacher_probs + (1 - alpha) * F.one_hot(labels, teacher_probs.shape[1])


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


def trades_loss(logits, adv_logits, labels, beta):
    """CE(f(x), y) + beta KL(f(x) || f(x')), TRADES (Zhang et al. 2019); (B, K) x2, (B,) -> ()."""
    # f(x) is no constant here, unlike the teacher: the gradient goes through both sides
    robust = F.kl_div(adv_logits.log_softmax(1), logits.softmax(1), reduction="batchmean")
    return F.cross_entropy(logits, labels) + beta * robust


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
    targets = mix_labels(teacher_logits, labels, 1.0, temperature)
    distilled = kl(targets, student_adv_logits, temperature, kl_reduction)
    return (1 - lam) * F.cross_entropy(student_logits, labels) + lam * distilled


def rslad_loss(student_logits, student_adv_logits, teacher_logits, labels, lam,
               temperature=1.0, kl_reduction="batchmean"):
    """Eq. (3): (1-lam) KL(T(x) || S(x)) + lam KL(T(x) || S(x')); (B, K) x3, (B,) -> ()."""
    targets = mix_labels(teacher_logits, labels, 1.0, temperature)  # alpha 1: no label counts
    clean = kl(targets, student_logits, temperature, kl_reduction)
    return (1 - lam) * clean + lam * kl(targets, student_adv_logits, temperature, kl_reduction)


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
}
# fmt: on


def needs(loss):
    """The names of the arguments of a loss: only what it names is computed in a step."""
    return inspect.signature(LOSSES[loss]).parameters


def needs_teacher(args):
    """Whether the loss or the attack looks at a teacher."""
    return args.attack_loss == "kl-teacher" or any("teacher" in name for name in needs(args.loss))


# ------------------------------------------------------------------------------------------------
# What a teacher is trained on: (model, x, labels, eps, args) -> x or x' (B, C, H, W)


def step_size(eps, args):
    """PGD step for a radius: a quarter of it; --step-size is that of --eps, scaled to it."""
    return eps / 4 if args.step_size is None else args.step_size * eps / (args.eps or 1)


def pgd_attack(model, x, labels, eps, args):
    """Adversarial training (Madry et al. 2018)."""
    return common.pgd(model, x, labels, eps, step_size(eps, args), args.steps)


def ffgsm_attack(model, x, labels, eps, args):
    """Fast adversarial training (Wong et al. 2020)."""
    return common.ffgsm(model, x, labels, eps, args.ffgsm_step * eps)


def trades_attack(model, x, labels, eps, args):
    """x' that maximises KL(f(x) || f(x')) (Zhang et al. 2019)."""
    with torch.no_grad():
        targets = model(x).softmax(1)
    return common.pgd(model, x, targets, eps, step_size(eps, args), args.steps, "gaussian")


TEACHERS = {"st": lambda model, x, *rest: x, "at": pgd_attack, "ffgsm": ffgsm_attack}
TEACHERS |= {"trades": trades_attack}


def teacher_model(flags):
    """(name, width) of the teacher's net: the student's unless given."""
    return flags["teacher_model"] or flags["model"], flags["teacher_width"] or flags["width"]


def teacher_settings(flags):
    """What a teacher depends on, of the flags (a dict): equal settings, equal teacher."""
    training, eps = flags["teacher_training"], flags["teacher_eps"]
    names = "data train_subset val_size seed deterministic precision momentum weight_decay"
    names += " teacher_ckpt teacher_training teacher_lr teacher_gamma teacher_batch_size"
    own = {"at": " steps", "trades": " steps trades_beta", "ffgsm": " ffgsm_step"}.get(training, "")
    settings = {name: flags[name] for name in (names + own).split()}
    settings["model"] = list(teacher_model(flags))
    settings["epochs"] = flags["teacher_es"] or flags["teacher_epochs"]
    if own:
        settings["eps"] = eps = flags["eps"] if eps is None else eps
        settings["attack_bn"] = flags["attack_bn"]
        settings["step_size"] = "steps" in own and step_size(eps, SimpleNamespace(**flags))
    return settings


# ------------------------------------------------------------------------------------------------
# Training


def train_teacher(model, data, args, run, stage, training, total):
    """Train a teacher for `total` epochs; the learning rate decays with every epoch."""
    eps, perturb = teacher_settings(run.flags).get("eps", 0.0), TEACHERS[training]
    seed = common.derive_seed(args.seed, stage)  # other batches than the student's
    optimizer = common.sgd(model, args.teacher_lr, args.momentum, args.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.teacher_gamma)

    def train_step(x, labels):
        with common.autocast(run):
            model.train(args.attack_bn == "train")  # differs: 5
            x_adv = perturb(model, x, labels, eps, args)
            model.train()
            if training == "trades":
                clean_logits, logits = model(x), model(x_adv)
                loss = trades_loss(clean_logits, logits, labels, args.trades_beta)
            else:
                logits = model(x_adv)
                loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return common.metrics(loss, logits, labels)

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for epoch in common.epochs(run, stage, total, **parts):
        history = []
        for x, labels in common.batches(data, args.teacher_batch_size, seed, epoch, run):
            history.append(train_step(x, labels))
        schedule.step()  # per epoch
        common.end_epoch(run, epoch, history, data, args.eps, step_size(args.eps, args), args.steps)
    meta = {"training": training, "epoch": total, "seconds": run.seconds}
    common.save_model(run.dir / f"{stage}.pt", model, meta)


def train_student(student, teacher, data, args, run):
    """Train the student for --epochs epochs with --loss; teacher: in eval mode, or None."""
    loss_fn, wanted = LOSSES[args.loss], needs(args.loss)
    names = ("alpha", "lam", "temperature", "kl_reduction")
    settings = {name: getattr(args, name) for name in names if name in wanted}
    default = "kl-teacher" if args.loss.startswith("rslad") else "ce"  # differs: 2
    kl_attack = (args.attack_loss or default) == "kl-teacher"
    optimizer = common.sgd(student, args.lr, args.momentum, args.weight_decay)
    total, step = args.epochs * -(-len(data.x_train) // args.batch_size), step_size(args.eps, args)
    cycle = {"cycle_momentum": args.cycle_momentum == "yes"}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total, **cycle)

    def train_step(x, labels):
        known = {"labels": labels}  # every tensor of the step, by the name that the losses use
        with common.autocast(run):
            if "teacher_logits" in wanted or kl_attack:
                with torch.no_grad():
                    known["teacher_logits"] = teacher(x)
            if "student_adv_logits" in wanted:
                student.train(args.attack_bn == "train")  # differs: 5
                targets = known["teacher_logits"].softmax(1) if kl_attack else labels
                start = "gaussian" if kl_attack else "uniform"
                x_adv = common.pgd(student, x, targets, args.eps, step, args.steps, start)
                student.train()
                known["student_adv_logits"] = student(x_adv)
            if "teacher_adv_logits" in wanted:
                with torch.no_grad():
                    known["teacher_adv_logits"] = teacher(x_adv)
            if "student_logits" in wanted:
                known["student_logits"] = student.train()(x)
            loss = loss_fn(**{name: known[name] for name in wanted if name in known}, **settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits = known.get("student_adv_logits", known.get("student_logits"))
        return common.metrics(loss, logits, labels)

    parts = {"model": student, "optimizer": optimizer, "schedule": schedule}
    for epoch in common.epochs(run, "student", args.epochs, **parts):
        history = []
        for x, labels in common.batches(data, args.batch_size, args.seed, epoch, run):
            history.append(train_step(x, labels))
            schedule.step()  # per batch
        common.end_epoch(run, epoch, history, data, args.eps, step, args.steps)
    meta = {"training": args.loss, "epoch": args.epochs, "seconds": run.seconds}
    common.save_model(run.dir / "student.pt", student, meta | {"best": run.best})


def first_teacher(data, args, run):
    """Train the teacher of --teacher-training into the run's teacher.pt."""
    name, width = teacher_model(run.flags)
    teacher = common.model_for(data, name, args.seed, "teacher", width)
    total = args.teacher_es or args.teacher_epochs
    train_teacher(teacher, data, args, run, "teacher", args.teacher_training, total)


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    common.across_seeds([train_and_evaluate(args) for args in common.per_seed(parse_args(argv))])


def train_and_evaluate(args):
    """The run of one seed; everything is in its folder. -> Run"""
    device = common.setup_device(args)
    with common.open_run("robust_kd", args, device) as run:
        sizes = (args.val_size, args.train_subset, args.test_subset)
        data = common.load_data(args.data, args.data_root, device, *sizes)
        if args.teacher_ckpt and not (run.dir / "teacher.pt").exists():
            common.load_model(args.teacher_ckpt, "cpu", data, args.teacher_model)
        if not common.begin(run, data):
            return run
        models, teacher = {}, None  # models: row of the table -> (model, numbers on its training)
        if args.demo:
            if not (run.dir / "standard.pt").exists():
                standard = common.model_for(data, args.model, args.seed, "standard", args.width)
                train_teacher(standard, data, args, run, "standard", "st", args.epochs)
            models["standard training"] = common.load_model(run.dir / "standard.pt", device)
        if needs_teacher(args):
            teacher, meta = common.get_teacher(
                run, data, teacher_settings, lambda: first_teacher(data, args, run)
            )
            models[f"teacher ({meta.get('training', 'given')})"] = teacher, meta
        if not (run.dir / "student.pt").exists():
            student = common.model_for(data, args.model, args.seed, "student", args.width)
            train_student(student, teacher, data, args, run)
        student, meta = common.load_model(run.dir / "student.pt", device)
        models[f"student ({args.loss})"] = student, meta
        if meta["best"].get("epoch", args.epochs) != args.epochs:
            best = common.load_model(run.dir / "student_best.pt", device)
            models[f"student ({args.loss}), best on held-out images"] = best
        import eval_robustness

        rows, attacks = [], ["clean", f"pgd{args.eval_steps}"]
        for name, (model, meta) in models.items():
            print(f"evaluating {name} on {len(data.x_test)} test images", flush=True)
            options = dict(eps=args.eps, restarts=args.restarts, seed=args.seed)
            row = eval_robustness.evaluate(model, data.x_test, data.y_test, attacks, **options)
            training = {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}
            rows.append({"model": name} | row | training)
        common.finish(run, rows)
    return run


if __name__ == "__main__":
    main()
