"""Messy collaboration: teacher, student or both learn from labels that are wrong at random.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.3,
         Figures 6 to 10, 17.
Loss     (1-alpha) CE(S(x), y') + alpha tau^2 KL(T(x) || S(x))                <- hinton_loss Eq. 2
         y' is y; another class for a share of the images
Methods  mc-t, mc-s, mc-ts      drawn anew for each batch, at --noise-rate    <- vary_labels
         flc-t, flc-s, flc-ts   drawn once, at --corruption-rate, kept        <- corrupt_labels
                                in the labels of teacher, student or both
         teacher, student: the net of --seed alone, from labels; hinton: y' = y
Usage    python messy_collab.py --noise-rate 0.5                     # mc-ts
         python messy_collab.py --method flc-ts --corruption-rate 0.25
         python messy_collab.py --method mc-s --noise-rate 0.1 --corruption-rate 0.25   # Figure 10
         python messy_collab.py --method student --corruption-rate 0.25                 # its row
         python messy_collab.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python messy_collab.py --demo                               # a minute or two on a CPU
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4, PGD steps of 0.003: from later code of the authors. The
            paper has 0.99, which would be a typing error, no weight decay, and 0.03.
         2. 1,024 training images are held out (--val-size 0: none); they choose the best of
            --teacher-seeds. The paper takes the test images (--pick-teacher test).
         3. KL(T || S), as everywhere; Eq. 2 is written the other way round. bf16 on CUDA
            (--precision fp32). PGD: no start may break an image; paper: the worst of five runs.
         4. A wrong label is uniform over the wrong classes, as in the paper's words; in later code
            of the authors the true class may be drawn too (--label-draw inclusive).
         5. Only the cross-entropy sees wrong labels. In Figure 10 both nets have the corrupted ones
            and the student's vary at --noise-rate on top: the paper does not say who sees what.
         6. Held-out and test images keep their labels. Exactly round(rate N) labels are corrupted.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import copy

import torch
import torch.nn.functional as F

import common
import plumbing

METHODS = ["teacher", "student", "hinton", "mc-t", "mc-s", "mc-ts", "flc-t", "flc-s", "flc-ts"]
# Epochs, and after how many the learning rate drops
STANDARD = (200, [60, 120, 150])
# Whose labels are wrong, t the teacher's and s the student's: anew in each batch, or once for all
VARIED = {"teacher": "t", "student": "s", "mc-t": "t", "mc-s": "s", "mc-ts": "ts"}
CORRUPTED = {"flc-t": "t", "flc-s": "s", "flc-ts": "ts"}  # other methods: both have the same
# Flags that only some methods have
ONLY = {"--noise-rate": VARIED}
# How wrong labels are drawn -> how far at least to move on from the true class
DRAWS = {"exclusive": 1, "inclusive": 0}
# What --demo sets
DEMO = {"data": "shapes", "model": "wrn-10-1", "teacher-model": "wrn-16-1", "epochs": 5}
DEMO |= {"teacher-epochs": 5, "batch-size": 32, "train-subset": 1000, "test-subset": 200}
DEMO |= {"val-size": 100, "restarts": 1}


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mc-ts", help="whose labels are wrong, and how")
    add("--noise-rate", type=common.rate, help="share drawn anew for a batch; None: 0.25 for mc-*")
    add("--corruption-rate", type=common.rate, help="share of fixed ones; None: 0.25 for flc-*")
    add("--corruption-seed", type=common.count0, default=0, help="that draws them; not by --seed")
    add("--labels-file", help="take the corrupted labels of another run: its labels.pt")
    add("--label-draw", choices=DRAWS, default="exclusive", help="inclusive: the true class too")
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
    if args.labels_file and args.corruption_rate is not None:
        parser.error("--corruption-rate: the labels of --labels-file are drawn already")
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
# The wrong labels


def vary_labels(labels, rate, classes, draw="exclusive"):
    """Target variability: each label is wrong with probability `rate`: (B,) -> (B,)."""
    moved = labels + torch.randint_like(labels, DRAWS[draw], classes)  # uniform over what remains
    wrong = torch.rand_like(labels, dtype=torch.float32) < rate
    return torch.where(wrong, moved % classes, labels)


def corrupt_labels(labels, rate, classes, seed, draw="exclusive"):
    """Fixed corruption: round(rate N) labels are wrong, by (seed, rate) alone: (N,) -> (N,)."""
    g = torch.Generator().manual_seed(common.derive_seed("corruption", seed, rate))
    wrong = torch.randperm(len(labels), generator=g)[: round(rate * len(labels))]
    moves = torch.randint(DRAWS[draw], classes, (len(wrong),), generator=g)
    corrupted = labels.cpu().clone()
    corrupted[wrong] = (corrupted[wrong] + moves) % classes
    return corrupted.to(labels.device)


def wrong_labels(flags, net):
    """[noise rate, what draws corrupted labels or None] for net t or s, of the flags (a dict)."""
    method, noise, rate = (flags[name] for name in ("method", "noise_rate", "corruption_rate"))
    noise = 0.25 * (method[:2] == "mc") if noise is None else noise
    rate = 0.25 * (method[:3] == "flc") if rate is None else rate
    drawn = flags["labels_file"] or ([rate, flags["corruption_seed"]] if rate else None)
    varies, corrupted = net in VARIED.get(method, ""), net in CORRUPTED.get(method, "ts")
    return [noise if varies else 0.0, drawn if corrupted else None]


def read_labels(path, data):
    """The labels (N,) of a labels.pt; an error if they are not of the training images."""
    record = common.load(path)
    labels, y = record.get("labels"), data.y_train
    same = common.is_like(labels, y) and labels.shape == y.shape
    same = same and 0 <= labels.min() <= labels.max() < len(data.classes)
    if record.get("fingerprint") != data.fingerprint or not same:
        common.fail(f"{path}: holds no labels of these training images of {data.name}")
    return labels.to(y.device)


def corrupted(data, args, run):
    """`data` with the training labels of the run's labels.pt, which is made if it is not there."""
    file, drawn = run.dir / "labels.pt", [wrong_labels(vars(args), net)[1] for net in "ts"]
    if not any(drawn):
        return data
    if not file.exists():
        if args.labels_file:
            labels = read_labels(args.labels_file, data)
        else:
            rate, seed = drawn[0] or drawn[1]
            labels = corrupt_labels(data.y_train, rate, len(data.classes), seed, args.label_draw)
        common.save(file, {"labels": labels.cpu(), "fingerprint": data.fingerprint})
    plumbing.sync()  # the first process has written them
    noisy = copy.copy(data)  # with the same images
    noisy.y_train = read_labels(file, data)
    wrong = int((noisy.y_train != data.y_train).sum())
    print(f"{wrong:,} of {len(data.y_train):,} labels are wrong: {file}", flush=True)
    return noisy


# ------------------------------------------------------------------------------------------------
# Training


def teacher_settings(flags):
    """What a teacher depends on, of the flags (a dict), but for its seed."""
    names = "data train_subset val_size deterministic precision lr gamma batch_size momentum"
    names += " weight_decay teacher_model teacher_milestones teacher_ckpt"
    settings = {name: flags[name] for name in names.split()} | {"epochs": flags["teacher_epochs"]}
    wrong = wrong_labels(flags, "t")
    return settings | ({"wrong": wrong, "draw": flags["label_draw"]} if any(wrong) else {})


# Copied from fickle_teacher.stretch
def stretch(schedule, epochs):
    """The milestones of a schedule, (epochs, milestones), made `epochs` long."""
    return [-(-milestone * epochs // schedule[0]) for milestone in schedule[1]]


def train_net(net, rate, teach, data, args, run, stage, seed, total, milestones):
    """Train into <stage>.pt: on labels and, if it is not None, on teach(x, view) -> (B, K).

    rate: share of the labels that are drawn anew for each batch.
    """
    optimizer = common.sgd(net, args.lr, args.momentum, args.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)

    @plumbing.captured(run, net)
    def compute(x, labels, view):
        labels = vary_labels(labels, rate, len(data.classes), args.label_draw)
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
    total, stage = args.teacher_epochs, f"teacher{seed}"
    net = common.model_for(data, args.teacher_model, seed, "teacher")
    milestones = args.teacher_milestones or stretch(STANDARD, total)
    seed = common.derive_seed(seed, "teacher")  # other batches than the student's
    rate = wrong_labels(vars(args), "t")[0]
    train_net(net, rate, None, data, args, run, stage, seed, total, milestones)


def train_student(teacher, data, args, run, tables):
    """Train the student into student.pt; teacher: or None; tables: what all seeds share."""
    total, milestones = args.epochs, args.milestones or stretch(STANDARD, args.epochs)
    table = None
    if teacher is not None:
        table = plumbing.teacher_table(teacher, data, run, total, tables)

    def teach(x, view):
        return teacher(x) if table is None else table[view]  # (B, K)

    net = common.model_for(data, args.model, args.seed, "student")
    teach, stage, rate = teacher and teach, "student", wrong_labels(vars(args), "s")[0]
    train_net(net, rate, teach, data, args, run, stage, args.seed, total, milestones)


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
    if args.labels_file:
        read_labels(args.labels_file, data)


def train_and_evaluate(args, tables):
    """The run of one seed; everything is in its folder, but for the tables of all. -> Run"""
    with plumbing.open_run("messy_collab", args, lambda data: check(args, data)) as (run, data):
        if run.finished:
            return run
        files, teacher, noisy = {}, None, corrupted(data, args, run)
        of = {net: noisy if wrong_labels(vars(args), net)[1] else data for net in "ts"}
        if args.method != "student":
            teacher, _ = plumbing.choose_teacher(
                run, data, teacher_settings, lambda seed: train_teacher(of["t"], args, run, seed)
            )
            files["teacher"] = run.dir / "teacher.pt"
        if args.method != "teacher":
            file = files[f"student ({args.method})"] = run.dir / "student.pt"
            if not file.exists():
                train_student(teacher, of["s"], args, run, tables)
            files |= plumbing.best_epoch(run)
        import eval_robustness

        plumbing.finish(run, plumbing.evaluate_files(run, files, eval_robustness))
    return run


if __name__ == "__main__":
    common.start(main)
