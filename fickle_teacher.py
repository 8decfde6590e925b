"""Fickle teacher: knowledge distillation from a teacher whose answers vary from trial to trial.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): sections 4.1,
         A.2.1, A.2.2, A.3.
Loss     (1-alpha) CE(S(x), y) + alpha tau^2 KL(T(x) || S(x))                 <- hinton_loss Eq. 2
         S, T: softmax of student and teacher; in the KL their logits are divided by tau
Methods  fickle   dropout stays active in the teacher while it teaches          <- make_fickle
         signal   z (1 + sigma N(0, 1)) instead of the teacher's logits z      <- signal_noise Eq. 5
         swap     close neighbours among the teacher's logits change places     <- swap_logits
         hinton   the teacher's answers do not vary
         student  no teacher, labels alone
         teacher  the teacher of --seed is trained and evaluated, no student
Usage    python fickle_teacher.py --dropout 0.4                      # 350 epochs, by A.3
         python fickle_teacher.py --method signal --sigma 0.1
         python fickle_teacher.py --method swap --swap top2 --swap-probability 0.3
         python fickle_teacher.py --method hinton --dropout 0.4      # dropout off to teach
         python fickle_teacher.py --seed 0 1 2 3 4   # one teacher, five students
         python fickle_teacher.py --method teacher --dropout 0.4 --seed 0 1 2 3 4   # teachers ...
         python fickle_teacher.py --teacher-seed 3   # ... the best of which teaches
         python fickle_teacher.py --demo             # 1 minute on a CPU
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4 and PGD steps of 0.003 come from later code of the
            authors. The paper prints momentum 0.99 (we take it for a typing error), PGD steps of
            0.03, and no weight decay. The nets normalise with mean and deviation of the training
            images; the paper only scales them to [0, 1].
         2. 1,024 training images are held out to choose the student's best epoch (--val-size 0:
            none). All students have the teacher of --teacher-seed (default: 0); the paper takes the
            best of five on the test images (see Usage).
         3. The KL is KL(T || S), as in Hinton's loss; Eq. 2 prints S first. Training on CUDA is in
            bf16 (--precision fp32: float32). An image is robust if no start of PGD breaks it; the
            paper reports the lowest accuracy of five runs of PGD, over the images that are right
            without attack: pgd20_conditional_acc in summary.json. The table is over all images.
         4. Dropout alone is active in a teaching teacher, BatchNorm stays in eval mode; the paper
            does not say (--teacher-mode train: batch statistics, the running ones untouched).
         5. Noise is drawn for each logit; Eq. 5 may mean one draw an image (--noise-per image).
         6. The paper gives no probability and no threshold for swaps; gaps are relative to the
            larger softened probability, as in the caption of Figure 13 (--swap-gap absolute).
"""

import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import MultiStepLR

import common
import eval_robustness

METHODS = ["fickle", "signal", "swap", "hinton", "teacher", "student"]
TAUGHT = {"fickle", "signal", "swap", "hinton"}  # the student has a teacher
HAS_EFFECT = {  # flag -> the methods on which it has an effect; with others it is refused
    "--dropout": {"fickle", "hinton", "teacher"},
    "--teacher-mode": {"fickle"},
    "--sigma": {"signal"},
    "--noise-per": {"signal"},
    "--swap": {"swap"},
    "--swap-probability": {"swap"},
    "--swap-threshold": {"swap"},
    "--swap-gap": {"swap"},
    "--alpha": TAUGHT,
    "--temperature": TAUGHT,
    "--teacher-seed": TAUGHT,
    "--teacher-ckpt": TAUGHT | {"teacher"},
}

# Epochs, and the epochs after which the learning rate drops: section 3
STANDARD_SCHEDULE = (200, [60, 120, 150])
# The student of a fickle teacher learns for longer, by the teacher's dropout: section A.3
STUDENT_SCHEDULES = {  # largest dropout -> epochs, milestones
    0.0: STANDARD_SCHEDULE,
    0.2: (250, [75, 150, 200]),
    0.3: (300, [90, 180, 240]),
    1.0: (350, [105, 210, 280]),
}

DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "teacher_model": "wrn-16-1",
    "epochs": 60,
    "teacher_epochs": 60,
    "batch_size": 15,
    "temperature": 1.0,  # with 4 so few steps are not enough: the gradients are small
    "dropout": 0.1,
    "train_subset": 60,
    "test_subset": 500,
    "val_size": 50,
    "eval_eps": 4 / 255,
    "eval_step_size": 1 / 255,
    "eval_restarts": 1,
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.Parser(__doc__)
    probability, positive = common.probability, common.positive
    whole, nonnegative = common.whole, common.nonnegative
    pixel_units, pixel_step = common.pixel_units, common.pixel_step
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="fickle", help="method, see Methods above")
    add("--alpha", type=probability, default=0.9, help="weight of the distillation term")
    add("--temperature", type=positive, default=4.0, help="temperature of both softmaxes")
    add("--dropout", type=common.below_1, help="the teacher's dropout rate (fickle: 0.4, else 0)")
    modes = {"choices": ["dropout", "train"], "default": "dropout"}
    add("--teacher-mode", **modes, help="train: a fickle teacher's BatchNorm takes part too")
    add("--sigma", type=nonnegative, default=0.1, help="relative deviation of the logits' noise")
    per = {"choices": ["logit", "image"], "default": "logit"}
    add("--noise-per", **per, help="draw the noise for each logit, or once for each image")
    pairs = {"choices": ["top2", "all"], "default": "top2"}
    add("--swap", **pairs, help="which neighbours among the sorted logits may change places")
    add("--swap-probability", type=probability, default=0.3, help="chance that a pair swaps")
    add("--swap-threshold", type=nonnegative, default=0.2, help="pairs with a smaller gap may swap")
    gaps = {"choices": ["relative", "absolute"], "default": "relative"}
    add("--swap-gap", **gaps, help="gap of softened probabilities p >= q: (p - q) / p, or p - q")
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
    add("--epochs", type=whole, help="epochs of the student (default: 200, fickle up to 350)")
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
    check_flags(args, parser.error)

    if args.method not in HAS_EFFECT["--dropout"]:
        args.dropout = 0.0  # whatever --demo sets
    if args.dropout is None:
        args.dropout = 0.4 if args.method == "fickle" else 0.0
    common.check_model("--teacher-model", args.teacher_model, args.dropout)
    schedule = STANDARD_SCHEDULE
    if args.method == "fickle":
        largest = min(largest for largest in STUDENT_SCHEDULES if args.dropout <= largest)
        schedule = STUDENT_SCHEDULES[largest]
    args.epochs = args.epochs or schedule[0]
    if args.milestones is None:
        args.milestones = stretch(schedule, args.epochs)
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


# ------------------------------------------------------------------------------------------------
# The loss


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
# How the teacher varies


def make_fickle(teacher, mode):
    """Put the teacher's dropout into training mode; with mode "train" BatchNorm too.

    BatchNorm then normalises with the statistics of the batch and keeps its running ones. Layers of
    all dimensions count: nn.Dropout and nn.Dropout2d, nn.BatchNorm1d and nn.BatchNorm2d, ...
    """
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
        elif mode == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train().momentum = 0.0  # its running statistics stay those of the training
        elif isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            module.training = True  # in eval mode they leave out their dropout


def signal_noise(teacher_logits, sigma, noise_per="logit"):
    """Eq. (5): (1 + delta) z, delta ~ N(0, sigma^2) for each logit or image: (B, K) -> (B, K)."""
    if noise_per == "logit":
        delta = torch.randn_like(teacher_logits)
    else:
        delta = torch.randn_like(teacher_logits[:, :1])
    return (1 + sigma * delta) * teacher_logits


def swap_logits(teacher_logits, temperature, swap, probability, threshold, gap="relative"):
    """Swap neighbours in the order of a row whose gap is below `threshold`: (B, K) -> (B, K).

    The gap of softened probabilities p >= q is (p - q) / p, or p - q, before any swap. With
    `probability` the first pair swaps (`top2`), or each pair, one after the other from the top
    (`all`): a class may fall several ranks.
    """
    z, order = teacher_logits.sort(1, descending=True)  # (B, K)
    probs = (z / temperature).softmax(1)
    gaps = probs[:, :-1] - probs[:, 1:]  # (B, K-1)
    if gap == "relative":
        gaps = gaps / probs[:, :-1]
    swaps = (gaps < threshold) & (torch.rand_like(gaps) < probability)
    # (B, K): the class that gets the largest, the second largest, ... logit
    classes = order.clone()
    pairs = 1 if swap == "top2" else z.shape[1] - 1
    for i in range(pairs):
        pair = classes[:, i : i + 2]
        classes[:, i : i + 2] = torch.where(swaps[:, i : i + 1], pair.flip(1), pair)
    return torch.empty_like(z).scatter(1, classes, z)


# ------------------------------------------------------------------------------------------------
# Training


def train(args, data, folder, stage, teacher=None):
    """Train a net by the flags in args and write it to folder/<stage>.pt -> the net in eval mode.

    teacher: in eval mode with frozen weights, or None: from labels alone. By --method it answers
    with active dropout, or its logits are changed. After an interruption the same call goes on
    after the last finished epoch. stage: teacher, student-alone or student; the two students start
    from the same weights and see the same batches.
    """
    init, dropout = stage.removesuffix("-alone"), args.dropout or 0.0
    model = common.new_model(data, args.model, args.seed, init, dropout)
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
            with common.autocast(args, x.device):
                student_logits = model(x)
                if teacher is None:
                    loss = F.cross_entropy(student_logits, labels)
                else:
                    teacher_logits = teacher(x)
                    if args.method == "signal":
                        teacher_logits = signal_noise(teacher_logits, args.sigma, args.noise_per)
                    elif args.method == "swap":
                        teacher_logits = swap_logits(
                            teacher_logits,
                            args.temperature,
                            args.swap,
                            args.swap_probability,
                            args.swap_threshold,
                            args.swap_gap,
                        )
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
    common.save_model(folder / f"{stage}.pt", model, rows, training=args.method)
    return common.load_model(folder / f"{stage}.pt", data)


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
        dropout=args.dropout or None,  # without dropout it is the teacher of the other scripts too
    )
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
        teacher = common.given_teacher(args, data, args.dropout)
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
    check_teacher(args, eval_robustness.check_nets(args, data, args.dropout))
    summaries = []
    for seed in args.seed:
        seed_args = common.replace(args, seed=seed)
        with common.open_run("fickle_teacher", seed_args, data) as folder:
            rows = common.read_summary(folder)
            if rows is None:  # not finished yet
                rows = train_and_evaluate(seed_args, data, folder)
                common.finish_run(folder, rows)
            common.show_run(folder, rows)
        summaries.append(rows)
    common.show_mean(args.seed, summaries)
    return summaries


def check_teacher(args, teacher):
    """A UserError if the teacher of --teacher-ckpt (or None) has not learned with --dropout."""
    if teacher is not None and (args.method == "fickle" or "--dropout" in args.given):
        learned = teacher.build_arguments["dropout"]
        if learned != args.dropout:
            wrong = f"learned with dropout {learned:g}, not --dropout {args.dropout:g}"
            raise common.UserError(f"--teacher-ckpt: {wrong}")


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate all nets -> the rows of the summary."""
    nets = {}  # role of the net -> (its label in the table, the net)
    teacher = None
    if args.demo and args.method not in ("student", "teacher"):
        alone_args = common.replace(args, method="student", dropout=0.0)
        alone = train(alone_args, data, folder, "student-alone")
        nets["alone"] = "student alone", alone
    if args.method in TAUGHT or args.method == "teacher":
        teacher = get_teacher(args, data)
        nets["teacher"] = "teacher", teacher
    if args.method == "fickle":
        make_fickle(teacher, args.teacher_mode)
    if args.method != "teacher":
        student_args = common.replace(args, dropout=0.0)
        student = train(student_args, data, folder, "student", teacher)
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
