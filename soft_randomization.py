"""Soft randomization: the student sees noisy images, its teacher the same images without noise.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.2.
Loss     (1-alpha) CE(S(x'), y) + alpha tau^2 KL(T(x) || S(x'))               <- hinton_loss Eq. 1
Methods  soft-randomization   x' = x + sigma N(0, 1) for the student          <- add_noise
         gaussian             CE(S(x'), y): the student alone, with the same noise
         teacher, student: the net of --seed alone, from labels; hinton: x' = x (Eq. 2)
Usage    python soft_randomization.py --sigma 0.05
         python soft_randomization.py --method gaussian --sigma 0.05
         python soft_randomization.py --method hinton                # sigma 0
         python soft_randomization.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python soft_randomization.py --demo                         # a minute or two on a CPU
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4, PGD steps of 0.003: from later code of the authors. The
            paper has 0.99, which would be a typing error, no weight decay, and 0.03.
         2. 1,024 training images are held out (--val-size 0: none); they choose the best of
            --teacher-seeds. The paper takes the test images (--pick-teacher test).
         3. KL(T || S), as everywhere; Eq. 1 is written the other way round. bf16 on CUDA
            (--precision fp32). PGD: no start may break an image; paper: the worst of five runs.
         4. Noise is drawn for each pixel and channel of a batch, after crop and flip; x' may leave
            [0, 1], as in Eq. 1 (--clip: it may not). The teacher sees the same crop and flip.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch
import torch.nn.functional as F

import common
import plumbing

METHODS = ["teacher", "student", "hinton", "soft-randomization", "gaussian"]
# Epochs, and after how many the learning rate drops
STANDARD = (200, [60, 120, 150])
# Flags that only some methods have
ONLY = {"--sigma": METHODS[3:], "--clip": METHODS[3:]}
# What --demo sets
DEMO = {"data": "shapes", "model": "wrn-10-1", "teacher-model": "wrn-16-1", "epochs": 5}
DEMO |= {"teacher-epochs": 5, "batch-size": 32, "train-subset": 1000, "test-subset": 200}
DEMO |= {"val-size": 100, "restarts": 1}


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default=METHODS[3], help="what the student sees, whom it has")
    add("--sigma", type=common.fraction, default=0.05, help="of the noise on images in [0, 1]")
    add("--clip", action="store_true", help="keep noisy images in [0, 1]")
    add("--alpha", type=common.probability, default=0.9, help="weight of the distillation term")
    add("--temperature", type=common.positive, default=4.0, help="of both softmaxes in the KL")
    add("--model", default="wrn-16-2", help="student: wrn-16-2, resnet18, mlp-1200-1200, ...")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-model", default="wrn-40-2", help="likewise")
    add("--teacher-seeds", type=common.count, default=1, help="train those of seeds 0 to N-1, ...")
    add("--pick-teacher", choices=["val", "test"], default="val", help="... take the best on these")
    add("--teacher-epochs", type=common.count, default=200, help="length of its training")
    drops = "epochs after which the teacher's learning rate drops; "
    drops += "None: 60 120 150 of 200, stretched to --teacher-epochs"
    add("--teacher-milestones", type=common.count, nargs="+", help=drops)
    add("--teacher-ckpt", help="take this finished teacher and train none")
    add("--teacher-table", choices=["auto", "yes", "no"], default="auto", help="of all its logits")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=common.count, default=200, help="of the student")
    add("--milestones", type=common.count, nargs="+", help="None: 60 120 150 of 200, stretched")
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
    if args.method == "teacher" and args.teacher_seeds > 1:
        parser.error("--teacher-seeds: --method teacher trains one, that of --seed; leave it out")
    common.check_model("--model", args.model)
    common.check_model("--teacher-model", args.teacher_model)
    return args


# ------------------------------------------------------------------------------------------------
# The loss


# Copied from fickle_teacher.hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """Eq. (2): (1-alpha) CE(S, y) + alpha tau^2 KL(T || S), T and S softened by tau in the KL.

    With the student's logits of noisy images it is Eq. (1). (B, K) x2, (B,) -> ().
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    student_log_probs = (student_logits / temperature).log_softmax(1)
    kl = F.kl_div(student_log_probs, targets, reduction="batchmean")  # the default: K times less
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * temperature**2 * kl


# ------------------------------------------------------------------------------------------------
# The noise


def add_noise(x, sigma, clip=False):
    """Eq. (1): x + delta, delta ~ N(0, sigma^2): images (B, C, H, W) in [0, 1] -> the same."""
    noisy = x + sigma * torch.randn_like(x)
    return noisy.clamp(0, 1) if clip else noisy


# ------------------------------------------------------------------------------------------------
# Training


def teacher_settings(flags):
    """What a teacher depends on, of the flags (a dict), but for its seed."""
    names = "data train_subset val_size deterministic precision lr gamma batch_size momentum"
    names += " weight_decay teacher_model teacher_milestones teacher_ckpt"
    settings = {name: flags[name] for name in names.split()} | {"epochs": flags["teacher_epochs"]}
    return settings


# Copied from fickle_teacher.stretch
def stretch(schedule, epochs):
    """The milestones of a schedule, (epochs, milestones), made `epochs` long."""
    return [-(-milestone * epochs // schedule[0]) for milestone in schedule[1]]


def train_net(net, noise, teach, data, args, run, stage, seed, total, milestones):
    """Train into <stage>.pt: on labels and, if it is not None, on teach(x, view) -> (B, K).

    noise: what is done to the images that the net sees, but not to those of its teacher.
    """
    optimizer = common.sgd(net, args.lr, args.momentum, args.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)

    @plumbing.captured(run, net)
    def compute(x, labels, view):
        with plumbing.autocast(run):
            logits = net(noise(x))
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
    total, stage = args.teacher_epochs, f"teacher{seed}"
    net = common.model_for(data, args.teacher_model, seed, "teacher")
    milestones = args.teacher_milestones or stretch(STANDARD, total)
    seed = common.derive_seed(seed, "teacher")  # other batches than the student's
    train_net(net, lambda x: x, None, data, args, run, stage, seed, total, milestones)


def train_student(teacher, data, args, run, tables):
    """Train the student into student.pt; teacher: or None; tables: what all seeds share."""
    total, milestones = args.epochs, args.milestones or stretch(STANDARD, args.epochs)
    table = None
    if teacher is not None:
        table = plumbing.teacher_table(teacher, data, run, total, tables)

    def noise(x):
        return add_noise(x, args.sigma, args.clip) if args.method in METHODS[3:] else x

    def teach(x, view):
        return teacher(x) if table is None else table[view]  # (B, K)

    net = common.model_for(data, args.model, args.seed, "student")
    teach, stage = teacher and teach, "student"
    train_net(net, noise, teach, data, args, run, stage, args.seed, total, milestones)


# ------------------------------------------------------------------------------------------------
# The whole job


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    args, tables = parse_args(argv), {}
    if args.demo and args.method in METHODS[3:]:
        main([*args.argv, "--method", "hinton"])  # to compare
    plumbing.across_seeds([train_and_evaluate(one, tables) for one in plumbing.per_seed(args)])


def check(args, data):
    """An error for what cannot be done with these data."""
    plumbing.check_evaluation(args, data)


def train_and_evaluate(args, tables):
    """The run of one seed; everything is in its folder, but for the tables of all. -> Run"""
    with plumbing.open_run("soft_randomization", args, lambda d: check(args, d)) as (run, data):
        if run.finished:
            return run
        files, teacher = {}, None
        if args.method not in ("student", "gaussian"):
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
