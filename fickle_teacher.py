"""Fickle teacher: knowledge distillation from a teacher whose answers vary from trial to trial.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): sections 4.1,
         A.2.1, A.2.2, A.3.
Loss     (1-alpha) CE(S(x), y) + alpha tau^2 KL(T(x) || S(x))                 <- hinton_loss Eq. 2
Methods  fickle   dropout stays active in the teacher while it teaches          <- make_fickle
         signal   z (1 + sigma N(0, 1)) instead of the teacher's logits z      <- signal_noise Eq. 5
         swap     close neighbours among the teacher's logits change places     <- swap_logits
         teacher, student: the net of --seed alone, from labels; hinton: nothing varies
Usage    python fickle_teacher.py --dropout 0.4                      # 350 epochs, by A.3
         python fickle_teacher.py --method signal --sigma 0.1
         python fickle_teacher.py --method swap --swap top2 --swap-probability 0.3
         python fickle_teacher.py --method hinton --dropout 0.4      # dropout off to teach
         python fickle_teacher.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python fickle_teacher.py --demo                             # a minute or two on a CPU
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4, PGD steps of 0.003: from later code of the authors. The
            paper has 0.99, which would be a typing error, no weight decay, and 0.03.
         2. 1,024 training images are held out (--val-size 0: none); they choose the best of
            --teacher-seeds. The paper takes the test images (--pick-teacher test).
         3. KL(T || S), as everywhere; Eq. 2 is written the other way round. bf16 on CUDA
            (--precision fp32). PGD: no start may break an image; paper: the worst of five runs.
         4. Dropout alone is active in a teaching teacher, BatchNorm stays in eval mode; the paper
            does not say (--teacher-mode train: batch statistics, the running ones untouched).
         5. Noise is drawn for each logit; Eq. 5 may mean one draw an image (--noise-per image).
         6. The paper gives no probability and no threshold for swaps; gaps are relative to the
            larger softened probability, as in the caption of Figure 13 (--swap-gap absolute).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import plumbing

METHODS = ["teacher", "student", "hinton", "fickle", "signal", "swap"]
# Epochs, and after how many the learning rate drops; A.3: by the largest rate of dropout
STANDARD = (200, [60, 120, 150])
SCHEDULES = {0.0: STANDARD, 0.2: (250, [75, 150, 200]), 0.3: (300, [90, 180, 240])}
SCHEDULES[1.0] = (350, [105, 210, 280])
# Flags that only some methods have
ONLY = {"--dropout": ["teacher", "hinton", "fickle"], "--teacher-mode": ["fickle"]}
ONLY |= {"--sigma": ["signal"], "--noise-per": ["signal"], "--swap": ["swap"]}
ONLY |= {"--swap-probability": ["swap"], "--swap-threshold": ["swap"], "--swap-gap": ["swap"]}
# What --demo sets
DEMO = {"data": "shapes", "model": "wrn-10-1", "teacher-model": "wrn-16-1", "epochs": 5}
DEMO |= {"teacher-epochs": 5, "batch-size": 32, "train-subset": 1000, "test-subset": 200}
DEMO |= {"val-size": 100, "restarts": 1}


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="fickle", help="how the teacher varies, or a baseline")
    add("--dropout", type=common.rate, help="of the teacher, in training too; None: 0.4 for fickle")
    add("--teacher-mode", choices=["dropout", "train"], default="dropout", help="train: BatchNorm")
    add("--sigma", type=common.fraction, default=0.1, help="of signal: relative noise of logits")
    add("--noise-per", choices=["logit", "image"], default="logit", help="draws of signal")
    add("--swap", choices=["top2", "all"], default="top2", help="the first pair, or all neighbours")
    add("--swap-probability", type=common.probability, default=0.3, help="that a close pair swaps")
    add("--swap-threshold", type=common.fraction, default=0.2, help="gap of a close pair, at most")
    add("--swap-gap", choices=["relative", "absolute"], default="relative", help="of probabilities")
    add("--alpha", type=common.probability, default=0.9, help="weight of the distillation term")
    add("--temperature", type=common.positive, default=4.0, help="of both softmaxes in the KL")
    add("--model", default="wrn-16-2", help="student: wrn-16-2, resnet18, mlp-1200-1200, ...")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-model", default="wrn-40-2", help="likewise; fickle: one with dropout layers")
    add("--teacher-seeds", type=common.count, default=1, help="train those of seeds 0 to N-1, ...")
    add("--pick-teacher", choices=["val", "test"], default="val", help="... take the best on these")
    add("--teacher-epochs", type=common.count, default=200, help="length of its training")
    drops = "epochs after which the teacher's learning rate drops; "
    drops += "None: 60 120 150 of 200, stretched to --teacher-epochs"
    add("--teacher-milestones", type=common.count, nargs="+", help=drops)
    add("--teacher-ckpt", help="take this finished teacher and train none")
    add("--teacher-table", choices=["auto", "yes", "no"], default="auto", help="of all its logits")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=common.count, help="of the student; None: 200, or by the rate of dropout")
    add("--milestones", type=common.count, nargs="+", help="None: 60 120 150 of 200, or by A.3")
    add("--gamma", type=common.positive, default=0.2, help="factor on the learning rate at these")
    add("--lr", type=common.positive, default=0.1, help="first learning rate")
    add("--batch-size", type=common.count, default=128, help="of teacher and student")
    add("--momentum", type=common.probability, default=0.9, help="of SGD")
    add("--weight-decay", type=common.fraction, default=5e-4, help="on all parameters")
    plumbing.add_evaluation_flags(parser)
    plumbing.add_run_flags(parser)
    args = plumbing.parse(parser, argv, {"--demo": DEMO})
    given = {flag.split("=")[0] for flag in args.argv}
    for flag in given & ONLY.keys():
        if args.method not in ONLY[flag] and not args.demo:
            parser.error(f"{flag}: --method {args.method} has none")
    if args.teacher_table == "yes" and varies(args):
        parser.error("--teacher-table yes: a fickle teacher answers anew each time")
    if args.method == "teacher" and args.teacher_seeds > 1:
        parser.error("--teacher-seeds: --method teacher trains one, that of --seed; leave it out")
    common.check_model("--model", args.model)
    common.check_model("--teacher-model", args.teacher_model, dropout=teacher_dropout(vars(args)))
    return args


# ------------------------------------------------------------------------------------------------
# The loss


def hinton_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """Eq. (2): (1-alpha) CE(S, y) + alpha tau^2 KL(T || S), T and S softened by tau in the KL.

    With the student's logits of noisy images it is Eq. (1). (B, K) x2, (B,) -> ().
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    student_log_probs = (student_logits / temperature).log_softmax(1)
    kl = F.kl_div(student_log_probs, targets, reduction="batchmean")  # the default: K times less
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * temperature**2 * kl


# ------------------------------------------------------------------------------------------------
# How the teacher varies


def teacher_dropout(flags):
    """The teacher's rate of dropout, of the flags (a dict)."""
    default = 0.4 if flags["method"] == "fickle" else 0.0
    return default if flags["dropout"] is None else flags["dropout"]


def varies(args):
    """Whether the teacher's net itself answers anew each time that it sees the same image."""
    noisy = args.teacher_mode == "train" or teacher_dropout(vars(args)) > 0
    return args.method == "fickle" and noisy


def make_fickle(teacher, mode):
    """Activate the teacher's dropout; in mode `train` BatchNorm too takes what the batch gives."""
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.train()
        elif mode == "train" and isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 0.0  # its running statistics stay those of the training


def signal_noise(teacher_logits, sigma, noise_per="logit"):
    """Eq. (5): (1 + delta) z, delta ~ N(0, sigma^2) for each logit or image: (B, K) -> (B, K)."""
    like = teacher_logits if noise_per == "logit" else teacher_logits[:, :1]
    return (1 + sigma * torch.randn_like(like)) * teacher_logits


def swap_logits(teacher_logits, temperature, swap, probability, threshold, gap="relative"):
    """Swap neighbours in the order of a row whose gap is below `threshold`: (B, K) -> (B, K).

    The gap of softened probabilities p >= q is (p - q) / p, or p - q. With `probability`, the first
    pair swaps (`top2`), or each, one after the other from the top: logits may travel (`all`).
    """
    z, order = teacher_logits.sort(1, descending=True)  # (B, K)
    probs = (z / temperature).softmax(1)
    gaps = probs[:, :-1] - probs[:, 1:]  # (B, K-1)
    gaps = gaps / probs[:, :-1] if gap == "relative" else gaps
    swaps = (gaps < threshold) & (torch.rand_like(gaps) < probability)
    swaps[:, 1:] &= swap == "all"
    # a logit that swaps goes to the next one's class; in its own comes what the unbroken row of
    # swaps before it has carried down: the logit with which that row began
    rank = torch.arange(z.shape[1], device=z.device)
    begin = torch.where(F.pad(swaps, (1, 0)), 0, rank).cummax(1).values
    to = torch.where(F.pad(swaps, (0, 1)), rank + 1, begin)  # (B, K): the rank whose class it gets
    return torch.empty_like(z).scatter(1, order.gather(1, to), z)


# ------------------------------------------------------------------------------------------------
# Training


def teacher_settings(flags):
    """What a teacher depends on, of the flags (a dict), but for its seed."""
    names = "data train_subset val_size deterministic precision lr gamma batch_size momentum"
    names += " weight_decay teacher_model teacher_milestones teacher_ckpt"
    settings = {name: flags[name] for name in names.split()} | {"epochs": flags["teacher_epochs"]}
    dropout = teacher_dropout(flags)
    return settings | ({"dropout": dropout} if dropout else {})


def stretch(schedule, epochs):
    """The milestones of a schedule, (epochs, milestones), made `epochs` long."""
    return [-(-milestone * epochs // schedule[0]) for milestone in schedule[1]]


def student_schedule(args):
    """(epochs, milestones) of the student: a longer one for fickle, by the rate of dropout."""
    rate = teacher_dropout(vars(args)) if args.method == "fickle" else 0.0
    schedule = next(longer for most, longer in SCHEDULES.items() if rate <= most)
    epochs = args.epochs or schedule[0]
    return epochs, args.milestones or stretch(schedule, epochs)


def train_net(net, teach, data, args, run, stage, seed, total, milestones):
    """Train into <stage>.pt: on labels and, if it is not None, on teach(x, view) -> (B, K)."""
    optimizer = common.sgd(net, args.lr, args.momentum, args.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)

    @plumbing.captured(run, net)
    def compute(x, labels, view):
        with plumbing.autocast(run):
            logits = net(x)
            if teach is None:
                loss = F.cross_entropy(logits, labels)
            else:
                with torch.no_grad():
                    teacher_logits = teach(x, view)
                loss = hinton_loss(logits, teacher_logits, labels, args.alpha, args.temperature)
        loss.backward()
        return plumbing.metrics(loss, logits, labels)

    parts = {"model": net, "optimizer": optimizer, "schedule": schedule}
    for epoch in plumbing.epochs(run, stage, total, **parts):
        plumbing.seed_epoch("noise", seed, epoch)  # a teacher's: of its own seed
        history = []
        for x, labels, view in common.batches(data, args.batch_size, seed, epoch, run, views=True):
            optimizer.zero_grad()
            history.append(compute(x, labels, view))
            optimizer.step()
        schedule.step()  # per epoch
        plumbing.end_epoch(run, epoch, history, data)
    meta = {"epoch": total, "seconds": run.seconds, "best": run.best}
    plumbing.save_model(run, stage, net, meta)


def train_teacher(data, args, run, seed):
    """Train the teacher of a seed, into the run's teacher<seed>.pt."""
    rate, total = teacher_dropout(vars(args)), args.teacher_epochs
    net = common.model_for(data, args.teacher_model, seed, "teacher", dropout=rate)
    milestones, stage = args.teacher_milestones or stretch(STANDARD, total), f"teacher{seed}"
    seed = common.derive_seed(seed, "teacher")  # other batches than the student's
    train_net(net, None, data, args, run, stage, seed, total, milestones)


def train_student(teacher, data, args, run, tables):
    """Train the student into student.pt; teacher: or None; tables: what all seeds share."""
    total, milestones = student_schedule(args)
    swap = args.swap, args.swap_probability, args.swap_threshold, args.swap_gap
    noise = {
        "signal": lambda z: signal_noise(z, args.sigma, args.noise_per),
        "swap": lambda z: swap_logits(z, args.temperature, *swap),
    }.get(args.method, lambda z: z)
    table = None
    if varies(args):
        make_fickle(teacher, args.teacher_mode)
    elif teacher is not None:
        table = plumbing.teacher_table(teacher, data, run, total, tables)

    def teach(x, view):
        return noise(teacher(x) if table is None else table[view])  # (B, K)

    net = common.model_for(data, args.model, args.seed, "student")
    train_net(net, teacher and teach, data, args, run, "student", args.seed, total, milestones)


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    args, tables = parse_args(argv), {}
    if args.demo and args.method in METHODS[3:]:
        main([*args.argv, "--method", "hinton"])  # to compare
    plumbing.across_seeds([train_and_evaluate(one, tables) for one in plumbing.per_seed(args)])


def check(args, data):
    """An error for what cannot be done with these data and the teacher that is given."""
    plumbing.check_evaluation(args, data)
    if args.method == "fickle" and args.teacher_ckpt and Path(args.teacher_ckpt).exists():
        given = common.load_model(args.teacher_ckpt, "cpu", data)[0].arch["dropout"]
        if given != (rate := teacher_dropout(vars(args))):
            common.fail(f"--teacher-ckpt: learned with dropout {given:g}, not --dropout {rate:g}")


def train_and_evaluate(args, tables):
    """The run of one seed; everything is in its folder, but for the tables of all. -> Run"""
    with plumbing.open_run("fickle_teacher", args, lambda data: check(args, data)) as (run, data):
        if run.finished:
            return run
        files, teacher = {}, None
        if args.method != "student":
            teacher, _ = plumbing.choose_teacher(
                run, data, teacher_settings, lambda seed: train_teacher(data, args, run, seed)
            )
            files["teacher"] = run.dir / "teacher.pt"
        if args.method != "teacher":
            file = files[f"student ({args.method})"] = run.dir / "student.pt"
            if not file.exists():
                train_student(teacher, data, args, run, tables)
            files |= plumbing.best_epoch(run)
        import eval_robustness

        plumbing.finish(run, plumbing.evaluate_files(run, files, eval_robustness))
    return run


if __name__ == "__main__":
    common.start(main)
