"""Messy collaboration: teacher, student or both learn from labels that are wrong at random.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.3,
         Figures 6 to 10, 16 to 18.
Loss     (1-alpha) CE(S(x), y') + alpha tau^2 KL(T(x) || S(x))                <- hinton_loss Eq. 2
         S, T: softmax of student and teacher; in the KL their logits are divided by tau
         y' is y, or another class for a share of the images
Methods  mc-t, mc-s, mc-ts      drawn anew for each batch, at --noise-rate    <- vary_labels
         flc-t, flc-s, flc-ts   drawn once, at --corruption-rate, kept        <- corrupt_labels
                                in the labels of teacher, student or both
         hinton                 labels that do not vary
         student                no teacher; with --noise-rate its labels vary
         teacher                the teacher of --seed is trained and evaluated, no student
         With all of them but flc-* a --corruption-rate corrupts the labels of both nets once.
Usage    python messy_collab.py --noise-rate 0.5                     # mc-ts
         python messy_collab.py --method flc-ts --corruption-rate 0.25
         python messy_collab.py --method mc-s --noise-rate 0.1 --corruption-rate 0.25   # Figure 10
         python messy_collab.py --method student --corruption-rate 0.25      # without a teacher
         python messy_collab.py --seed 0 1 2 3 4   # one teacher, five students
         python messy_collab.py --method teacher --noise-rate 0.25 --seed 0 1 2 3 4  # teachers ...
         python messy_collab.py --noise-rate 0.25 --teacher-seed 3   # ... the best of which teaches
         python messy_collab.py --demo             # 1 minute on a CPU
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4 and PGD steps of 0.003 come from later code of the
            authors. The paper prints momentum 0.99 (we take it for a typing error), PGD steps of
            0.03, and no weight decay. The nets normalise with mean and deviation of the training
            images; the paper only scales them to [0, 1].
         2. 1,024 training images are held out to choose the student's best epoch (--val-size 0:
            none). All students have the teacher of --teacher-seed (default: 0); the paper takes the
            best of five on the test images (see Usage; that of mc-t and mc-ts has --noise-rate).
         3. The KL is KL(T || S), as in Hinton's loss; Eq. 2 prints S first. Training on CUDA is in
            bf16 (--precision fp32: float32). An image is robust if no start of PGD breaks it; the
            paper reports the lowest accuracy of five runs of PGD, over the images that are right
            without attack: pgd20_conditional_acc in summary.json. The table is over all images.
         4. A wrong label is uniform over the wrong classes, as in the paper's words; in later code
            of the authors the true class may be drawn too (--label-draw inclusive).
         5. Only the cross-entropy sees wrong labels. In Figure 10 both nets have the corrupted ones
            and the student's vary at --noise-rate on top: the paper does not say who sees what.
            They vary to any class but the corrupted label, so perhaps to the true one.
         6. Held-out and test images keep their labels. Exactly round(rate N) are replaced.
"""

import dataclasses
import math
import time
import zlib

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import MultiStepLR

import common
import eval_robustness

METHODS = ["mc-ts", "mc-t", "mc-s", "flc-ts", "flc-t", "flc-s", "hinton", "teacher", "student"]
TAUGHT = {"mc-ts", "mc-t", "mc-s", "flc-ts", "flc-t", "flc-s", "hinton"}  # there is a teacher
# The methods in which the labels of the teacher, of the student vary from batch to batch
VARIED_TEACHER = {"mc-ts", "mc-t", "teacher"}
VARIED_STUDENT = {"mc-ts", "mc-s", "student"}
# The methods in which --corruption-rate corrupts the labels of the teacher, of the student once
CORRUPTED_TEACHER = {"mc-ts", "mc-t", "mc-s", "flc-ts", "flc-t", "hinton", "teacher"}
CORRUPTED_STUDENT = {"mc-ts", "mc-t", "mc-s", "flc-ts", "flc-s", "hinton", "student"}
HAS_EFFECT = {  # flag -> the methods on which it has an effect; with others it is refused
    "--noise-rate": VARIED_TEACHER | VARIED_STUDENT,
    "--alpha": TAUGHT,
    "--temperature": TAUGHT,
    "--teacher-seed": TAUGHT,
    "--teacher-ckpt": TAUGHT | {"teacher"},
}

# Epochs, and the epochs after which the learning rate drops: section 3
STANDARD_SCHEDULE = (200, [60, 120, 150])

DEMO = {
    "data": "shapes",
    "model": "mlp-100-100",
    "teacher_model": "mlp-400-400",
    "epochs": 30,
    "teacher_epochs": 30,
    "batch_size": 64,
    "lr": 0.05,
    "method": "mc-s",
    "corruption_rate": 0.5,
    "train_subset": 2000,
    "test_subset": 1000,
    "val_size": 200,
    "eval_restarts": 1,
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.Parser(__doc__)
    probability, positive = common.probability, common.positive
    whole, nonnegative = common.whole, common.nonnegative
    pixel_units, pixel_step = common.pixel_units, common.pixel_step
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mc-ts", help="method, see Methods above")
    add("--alpha", type=probability, default=0.9, help="weight of the distillation term")
    add("--temperature", type=positive, default=4.0, help="temperature of both softmaxes")
    rate = {"type": common.below_1}
    add("--noise-rate", **rate, help="chance that a label is replaced in a batch (mc-*: 0.25)")
    add("--corruption-rate", **rate, help="share of labels that are replaced once (flc-*: 0.25)")
    add("--corruption-seed", type=common.whole_or_0, default=0, help="seed of corrupted labels")
    draws = {"choices": ["exclusive", "inclusive"], "default": "exclusive"}
    add("--label-draw", **draws, help="exclusive: draw from the wrong classes; inclusive: from all")
    add("--model", default="wrn-16-2", help="net of the student, such as wrn-16-2 or resnet18")

    add = parser.add_argument_group("teacher").add_argument
    seed_help = "seed of the teacher, the same for all students"
    add("--teacher-seed", type=common.whole_or_0, default=0, help=seed_help)
    add("--teacher-model", default="wrn-40-2", help="net of the teacher, named as for --model")
    add("--teacher-epochs", type=whole, default=200, help="epochs of the teacher's training")
    drops = {"type": whole, "nargs": "+", "metavar": "EPOCH"}
    add("--teacher-milestones", **drops, help="as --milestones (default: by --teacher-epochs)")
    add("--teacher-ckpt", metavar="FILE", help="file of a finished teacher; none is trained then")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole, default=200, help="epochs of the student's training")
    add("--milestones", **drops, help="epochs after which --gamma applies (default: by --epochs)")
    add("--gamma", type=common.decay, default=0.2, help="factor on the learning rate at milestones")
    add("--lr", type=positive, default=0.1, help="learning rate that both nets start with")
    add("--batch-size", type=common.at_least_2, default=128, help="images per step of both nets")
    add("--weight-decay", type=nonnegative, default=5e-4, help="weight decay of SGD for both nets")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-eps", type=pixel_units, default=0.031, help="radius of PGD-20 in pixel units")
    add("--eval-step-size", type=pixel_step, default=0.003, help="step of PGD-20 in pixel units")
    starts = "random starts of PGD-20; the worst counts (0: no PGD)"
    add("--eval-restarts", type=common.whole_or_0, default=5, help=starts)
    common.add_run_flags(parser)
    args = common.parse(parser, argv, {"--demo": DEMO})
    if args.noise_rate is None:
        args.noise_rate = 0.25 if args.method.startswith("mc-") else 0.0
    if args.corruption_rate is None:
        args.corruption_rate = 0.25 if args.method.startswith("flc-") else 0.0
    check_flags(args, parser.error)
    if args.milestones is None:
        args.milestones = stretch(STANDARD_SCHEDULE, args.epochs)
    if args.teacher_milestones is None:
        args.teacher_milestones = stretch(STANDARD_SCHEDULE, args.teacher_epochs)
    return args


def check_flags(args, error):
    """Call error(line) for flags that do not go together."""
    has_teacher = args.method in TAUGHT or args.method == "teacher"
    trains_teacher = has_teacher and not args.teacher_ckpt
    trains_student = args.method != "teacher"
    common.check_effects(args, error, HAS_EFFECT, trains_teacher, trains_student)
    for flag in ("--eval-eps", "--eval-step-size"):
        if flag in args.given and not args.eval_restarts:
            error(f"{flag}: has no effect with --eval-restarts 0; leave it out")
    if "--corruption-seed" in args.given and not args.corruption_rate:
        error("--corruption-seed: has no effect without --corruption-rate; leave it out")
    if "--label-draw" in args.given and not (args.noise_rate or args.corruption_rate):
        error("--label-draw: has no effect where no label is replaced; leave it out")


# ------------------------------------------------------------------------------------------------
# The loss


# Copied from fickle_teacher.hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """Eqs. (1), (2): (1-alpha) CE(S, y) + alpha tau^2 KL(T || S); (B, K) x2, (B,) -> ().

    In the KL both logits are divided by tau. Eq. (1) is the same loss on noisy images.
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    student_log_probs = (student_logits / temperature).log_softmax(1)
    # batchmean is the KL; PyTorch's default would divide it by the number of classes too
    kl = F.kl_div(student_log_probs, targets, reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * temperature**2 * kl


# ------------------------------------------------------------------------------------------------
# The wrong labels


def draw_labels(labels, classes, draw="exclusive", generator=None):
    """A class for each label, uniform over the wrong classes or (inclusive) over all: (B,)."""
    first = 1 if draw == "exclusive" else 0
    shifts = torch.randint(first, classes, labels.shape, generator=generator, device=labels.device)
    return (labels + shifts) % classes


def vary_labels(labels, rate, classes, draw="exclusive"):
    """Target variability: with probability `rate` draw_labels replaces a label: (B,) -> (B,)."""
    drawn = draw_labels(labels, classes, draw)
    return torch.where(torch.rand(labels.shape, device=labels.device) < rate, drawn, labels)


def corrupt_labels(labels, rate, classes, seed, draw="exclusive"):
    """Fixed corruption: round(rate N) labels are replaced, by (seed, rate) alone: (N,) -> (N,)."""
    generator = torch.Generator().manual_seed(common.derive_seed("corruption", seed, rate))
    corrupted = labels.cpu().clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    corrupted[chosen] = draw_labels(corrupted[chosen], classes, draw, generator)
    return corrupted.to(labels.device)


def with_wrong_labels(args, data):
    """`data` with labels corrupted at --corruption-rate to train on; itself if that is 0.

    Such labels count in the fingerprint of the data: a net that learns from them is another one.
    """
    if args.corruption_rate == 0:
        return data
    classes, seed, draw = len(data.classes), args.corruption_seed, args.label_draw
    labels = corrupt_labels(data.y_train, args.corruption_rate, classes, seed, draw)
    fingerprint = zlib.crc32(labels.cpu().numpy(), data.fingerprint)
    return dataclasses.replace(data, y_train=labels, fingerprint=fingerprint)


def keep_labels(labels, data, folder):
    """Write wrong labels (N,) to folder/labels.pt; the same command draws the same ones again."""
    file = folder / "labels.pt"
    common.save(file, {"labels": labels.cpu(), "fingerprint": data.fingerprint})
    wrong = int((labels != data.y_train).sum())
    print(f"{wrong:,} of {len(labels):,} labels are wrong: {file}", flush=True)


# ------------------------------------------------------------------------------------------------
# Training


def train(args, data, folder, stage, teacher=None):
    """Train a net by the flags in args and write it to folder/<stage>.pt -> the net in eval mode.

    teacher: in eval mode with frozen weights, or None: from labels alone. At args.noise_rate the
    labels are drawn anew in each batch. After an interruption the same call goes on after the last
    finished epoch. stage: teacher, student-alone or student; the two students start from the same
    weights and see the same batches.
    """
    model = common.new_model(data, args.model, args.seed, stage.removesuffix("-alone"))
    fused = ":" not in args.model  # fails for a weight that gets no gradient in the first step
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=fused
    )
    schedule = MultiStepLR(optimizer, args.milestones, args.gamma)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    common.compile_model(model, args.compile)

    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), args.epochs):
        common.seed_epoch(args.seed, stage, epoch)
        model.train()
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, args.batch_size, args.seed, stage, epoch):
            if args.noise_rate:
                labels = vary_labels(labels, args.noise_rate, len(data.classes), args.label_draw)
            with common.autocast(args, x.device):
                student_logits = model(x)
                if teacher is None:
                    loss = F.cross_entropy(student_logits, labels)
                else:
                    teacher_logits = teacher(x)
                    loss = hinton_loss(
                        student_logits, teacher_logits, labels, args.alpha, args.temperature
                    )

            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(model, len(labels))  # under torchrun, otherwise nothing
            optimizer.step()
            history.append(common.step_sums(loss, student_logits, labels))  # no wait for the GPU

        schedule.step()  # per epoch
        row = common.epoch_row(args, stage, epoch, model, history, began)
        rows.append(row | common.validate(args, stage, model, data))
        common.save_epoch(folder, stage, model, state, rows, args)
    rates = {key: getattr(args, key) or 0.0 for key in ("noise_rate", "corruption_rate")}
    common.save_model(folder / f"{stage}.pt", model, rows, training=args.method, **rates)
    return common.load_model(folder / f"{stage}.pt", data)


# Copied from fickle_teacher.stretch
def stretch(schedule, epochs):
    """The milestones of (epochs, milestones), in proportion for other `epochs`, rounded up."""
    standard_epochs, milestones = schedule
    return [math.ceil(milestone * epochs / standard_epochs) for milestone in milestones]


# ------------------------------------------------------------------------------------------------
# The whole job


def teacher_args(args):
    """The flags by which the teacher is trained, made of the student's.

    A flag that has no effect on the teacher becomes None. Runs that agree in all the others and in
    the data share the teacher (see get_teacher): a flag of the student that is forgotten here costs
    a second training. --teacher-epochs counts as epochs, and so on.
    """
    teacher = common.replace(
        args,
        method="teacher",
        model=args.teacher_model,
        seed=args.seed if args.method == "teacher" else args.teacher_seed,
        epochs=args.teacher_epochs,
        milestones=args.teacher_milestones,
    )
    if args.method not in VARIED_TEACHER or args.noise_rate == 0:
        # it is the teacher of the other scripts too
        teacher.noise_rate = teacher.label_draw = None
    # corrupted labels are a part of the data, see with_wrong_labels; train keeps their rate
    teacher.corruption_seed = None
    if args.method not in CORRUPTED_TEACHER or args.corruption_rate == 0:
        teacher.corruption_rate = None
    for flag in vars(args):
        methods = HAS_EFFECT.get(f"--{flag.replace('_', '-')}", METHODS)
        if "teacher" not in methods or flag.startswith(("teacher_", "eval_")):
            setattr(teacher, flag, None)
    return teacher


def get_teacher(args, data):
    """-> the teacher in eval mode with frozen weights: given, found, or trained now.

    runs/teachers/<digest of its flags and the data> keeps it for all runs with the same ones.
    """
    if args.teacher_ckpt:
        teacher = common.given_teacher(args, data)
    else:
        flags = teacher_args(args)
        folder = common.teacher_folder(flags, data)
        with common.locked(folder, wait=True):  # another run may be training it
            if not (folder / "teacher.pt").exists():
                train(flags, data, folder, "teacher")
            common.delete_checkpoints(folder)
        teacher = common.load_model(folder / "teacher.pt", data)
    print(f"teacher: {teacher.meta['file']}", flush=True)
    common.compile_model(teacher, args.compile)
    return teacher


def main(argv=None):
    """Data, teacher, student, evaluation, one table; for each seed."""
    args = parse_args(argv)
    data = common.load_training_data(args, common.setup_device(args))
    check_teacher(args, eval_robustness.check_nets(args, data))
    summaries = []
    for seed in args.seed:
        seed_args = common.replace(args, seed=seed)
        with common.open_run("messy_collab", seed_args, data) as folder:
            rows = common.read_summary(folder)
            if rows is None:  # not finished yet
                rows = train_and_evaluate(seed_args, data, folder)
                common.finish_run(folder, rows)
            common.show_run(folder, rows)
        summaries.append(rows)
    common.show_mean(args.seed, summaries)
    return summaries


def check_teacher(args, teacher):
    """A UserError if the teacher of --teacher-ckpt (or None) has learned at other rates.

    Files from elsewhere, and best epochs, do not say at which.
    """
    if teacher is None:
        return
    for rate, methods in (("noise_rate", VARIED_TEACHER), ("corruption_rate", CORRUPTED_TEACHER)):
        wanted = getattr(args, rate) if args.method in methods else 0.0
        learned = teacher.meta.get(rate, wanted)
        if learned != wanted:
            words = rate.replace("_", " ")
            wrong = f"learned at {words} {learned:g}; --method {args.method} wants {wanted:g}"
            raise common.UserError(f"--teacher-ckpt: {wrong}")


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    nets = {}  # role of the net -> (its label in the table, the net)
    teacher = None
    wrong = with_wrong_labels(args, data)
    if wrong is not data:
        keep_labels(wrong.y_train, data, folder)
    student_data, corruption_rate = data, 0.0
    if args.method in CORRUPTED_STUDENT:
        student_data, corruption_rate = wrong, args.corruption_rate
    student_args = common.replace(args, corruption_rate=corruption_rate)
    if args.demo and args.method not in ("student", "teacher"):
        alone_args = common.replace(student_args, method="student", noise_rate=0.0)
        alone = train(alone_args, student_data, folder, "student-alone")
        nets["alone"] = "student alone", alone
    if args.method in TAUGHT or args.method == "teacher":
        teacher = get_teacher(args, wrong if args.method in CORRUPTED_TEACHER else data)
        nets["teacher"] = "teacher", teacher
    if args.method != "teacher":
        if args.method not in VARIED_STUDENT:
            student_args = common.replace(student_args, noise_rate=0.0)
        student = train(student_args, student_data, folder, "student", teacher)
        nets["student"] = f"student ({args.method})", student
        if student.meta["best"].get("epoch", args.epochs) != args.epochs:
            best = common.load_model(folder / "student_best.pt", data)
            nets["best"] = "student, best on held-out images", best

    attack = {
        "eps": args.eval_eps,
        "step_size": args.eval_step_size,
        "restarts": args.eval_restarts,
        "seed": args.seed,
        "batch_size": common.evaluation_batch_size(args),
    }
    attacks = ["clean", "pgd20"] if args.eval_restarts else ["clean"]
    return eval_robustness.summary_rows(nets, data, folder, attacks, **attack)


if __name__ == "__main__":
    common.start(main)
