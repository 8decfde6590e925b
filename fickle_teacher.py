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

import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import eval_robustness

METHODS = ["fickle", "signal", "swap", "hinton", "teacher", "student"]
TAUGHT = ["fickle", "signal", "swap", "hinton"]  # there is a teacher
# The methods that a flag has an effect on
FLAG_METHODS = {
    "--dropout": ["fickle", "hinton", "teacher"],
    "--teacher-mode": ["fickle"],
    "--sigma": ["signal"],
    "--noise-per": ["signal"],
    "--swap": ["swap"],
    "--swap-probability": ["swap"],
    "--swap-threshold": ["swap"],
    "--swap-gap": ["swap"],
}

# Epochs, and the epochs after which the learning rate drops: section A.1
STANDARD_EPOCHS = 200
STANDARD_MILESTONES = [60, 120, 150]
# The student of a fickle teacher learns for longer, by the teacher's dropout: section A.3
STUDENT_SCHEDULES = [  # largest dropout, epochs, milestones
    (0.0, STANDARD_EPOCHS, STANDARD_MILESTONES),
    (0.2, 250, [75, 150, 200]),
    (0.3, 300, [90, 180, 240]),
    (1.0, 350, [105, 210, 280]),
]

DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "teacher-model": "wrn-16-1",
    "epochs": 5,
    "teacher-epochs": 5,
    "batch-size": 32,
    "train-subset": 1000,
    "test-subset": 200,
    "val-size": 100,
    "restarts": 1,
}


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.RunParser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="fickle",
        help="training method, see Methods above",
    )
    add("--dropout", type="rate", help="dropout rate of the teacher (fickle: 0.4, otherwise: 0)")
    add(
        "--teacher-mode",
        choices=["dropout", "train"],
        default="dropout",
        help="what is in training mode while a fickle teacher teaches: its dropout alone, or its "
        "BatchNorm too",
    )
    add("--sigma", type="fraction", default=0.1, help="deviation of signal's relative noise")
    add(
        "--noise-per",
        choices=["logit", "image"],
        default="logit",
        help="draw the noise of signal for each logit, or once for each image",
    )
    add(
        "--swap",
        choices=["top2", "all"],
        default="top2",
        help="which neighbours among the sorted logits may swap: the first two, or all",
    )
    add("--swap-probability", type="probability", default=0.3, help="chance that a pair swaps")
    add("--swap-threshold", type="fraction", default=0.2, help="largest gap of a pair that swaps")
    add(
        "--swap-gap",
        choices=["relative", "absolute"],
        default="relative",
        help="gap of two softened probabilities p >= q: (p - q) / p, or p - q",
    )
    add("--alpha", type="probability", default=0.9, help="weight of the distillation term")
    add("--temperature", type="positive", default=4.0, help="temperature of both softmaxes")
    add("--model", default="wrn-16-2", help="net of the student: wrn-16-2, resnet18, mlp-512, ...")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-model", default="wrn-40-2", help="net of the teacher, named as for --model")
    add(
        "--teacher-seeds",
        type="count",
        default=1,
        help="number of teachers to train (seeds 0 to N-1); the most accurate one teaches",
    )
    add(
        "--pick-teacher",
        choices=["val", "test"],
        default="val",
        help="images on which the best teacher is chosen: held-out ones, or test images as in "
        "the paper",
    )
    add("--teacher-epochs", type="count", default=200, help="epochs of the teacher's training")
    add(
        "--teacher-milestones",
        type="count",
        nargs="+",
        help="epochs at which the teacher's learning rate drops (default: 60 120 150 of 200, "
        "stretched to --teacher-epochs)",
    )
    add("--teacher-ckpt", help="file of a finished teacher; no teacher is trained")
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type="count",
        help="epochs of the student's training (default: 200; fickle: 250 to 350, by --dropout)",
    )
    add(
        "--milestones",
        type="count",
        nargs="+",
        help="epochs at which the student's learning rate drops (default: 60 120 150 of 200, or "
        "those of section A.3, stretched to --epochs)",
    )
    add("--gamma", type="positive", default=0.2, help="factor on the learning rate at milestones")
    add("--lr", type="positive", default=0.1, help="learning rate that both nets start with")
    add("--batch-size", type="count", default=128, help="images per step of both nets")
    add("--momentum", type="probability", default=0.9, help="momentum of SGD for both nets")
    add("--weight-decay", type="fraction", default=5e-4, help="weight decay of SGD for both nets")
    eval_robustness.add_evaluation_flags(parser)
    parser.add_run_flags()
    args = parser.parse_run(argv, {"--demo": DEMO})
    for flag, methods in FLAG_METHODS.items():
        if flag in args.given and args.method not in methods and not args.demo:
            parser.error(f"{flag}: has no effect with --method {args.method}; leave it out")
    common.check_model("--teacher-model", args.teacher_model, dropout=teacher_dropout(args))
    if args.teacher_seeds > 1 and args.method == "teacher":
        parser.error("--teacher-seeds: --method teacher trains one, that of --seed; leave it out")
    if args.teacher_seeds > 1 and args.teacher_ckpt:
        parser.error("--teacher-seeds: has no effect with --teacher-ckpt; leave it out")
    return args


# ------------------------------------------------------------------------------------------------
# The loss


def hinton_loss(student_logits, teacher_logits, labels, alpha, temperature):
    """Eq. (2): (1-alpha) CE(S, y) + alpha tau^2 KL(T || S), T and S softened by tau in the KL.

    With the student's logits of noisy images it is Eq. (1). (B, K) x2, (B,) -> ().
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    student_log_probs = (student_logits / temperature).log_softmax(1)
    # batchmean is the KL; PyTorch's default would divide it by the number of classes too
    kl = F.kl_div(student_log_probs, targets, reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * temperature**2 * kl


# ------------------------------------------------------------------------------------------------
# How the teacher varies


def teacher_dropout(args):
    """The dropout rate of the teacher, in its training and, for fickle, while it teaches."""
    if args.dropout is None:
        return 0.4 if args.method == "fickle" else 0.0
    return args.dropout


def make_fickle(teacher, mode):
    """Put the teacher's dropout into training mode; with mode "train" BatchNorm too.

    BatchNorm then normalises with the statistics of the batch and keeps its running ones.
    """
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.train()
        elif mode == "train" and isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 0.0  # its running statistics stay those of the training


def signal_noise(teacher_logits, sigma, noise_per="logit"):
    """Eq. (5): (1 + delta) z, delta ~ N(0, sigma^2) for each logit or image: (B, K) -> (B, K)."""
    if noise_per == "logit":
        delta = torch.randn_like(teacher_logits)
    else:
        delta = torch.randn_like(teacher_logits[:, :1])
    return (1 + sigma * delta) * teacher_logits


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
    # A logit that swaps moves down to the class of the next rank. Where it leaves, the logit comes
    # in that an unbroken row of swaps has carried down: the one with which that row began.
    rank = torch.arange(z.shape[1], device=z.device)
    begin = torch.where(F.pad(swaps, (1, 0)), 0, rank).cummax(1).values
    to = torch.where(F.pad(swaps, (0, 1)), rank + 1, begin)  # (B, K): the rank whose class it gets
    return torch.empty_like(z).scatter(1, order.gather(1, to), z)


# ------------------------------------------------------------------------------------------------
# Training


def stretch(milestones, standard_epochs, epochs):
    """The milestones of a schedule of `standard_epochs`, moved to one of `epochs`."""
    return [math.ceil(milestone * epochs / standard_epochs) for milestone in milestones]


def student_schedule(args):
    """-> (epochs, milestones) of the student: longer for fickle, by the teacher's dropout."""
    dropout = teacher_dropout(args) if args.method == "fickle" else 0.0
    for largest_dropout, standard_epochs, standard_milestones in STUDENT_SCHEDULES:
        if dropout <= largest_dropout:
            epochs = args.epochs or standard_epochs
            return epochs, args.milestones or stretch(standard_milestones, standard_epochs, epochs)


def train(model, data, folder, stage, args, seed, epochs, milestones, teacher=None):
    """Train `model` and write it to folder/<stage>.pt.

    teacher: in eval mode with frozen weights, or None: from labels alone. By --method it answers
    with active dropout, or its logits are changed. After an interruption the same call goes on.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)

    def step(x, labels):
        """One batch up to the gradients of the weights -> metrics."""
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            student_logits = model(x)
            if teacher is None:
                loss = F.cross_entropy(student_logits, labels)
            else:
                if args.method == "fickle":
                    make_fickle(teacher, args.teacher_mode)
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
        loss.backward()
        return common.metrics(loss, student_logits, labels)

    step = common.speed_up(step, model, args)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), epochs):
        common.seed_epoch(seed, stage, epoch)
        began, history = time.monotonic(), []
        for x, labels in common.batches(data, args.batch_size, seed, stage, epoch):
            optimizer.zero_grad()
            history.append(step(x, labels))
            common.average_gradients(model, len(labels))
            optimizer.step()
        schedule.step()  # per epoch
        row = common.epoch_row(stage, epoch, model, history, began)
        rows.append(row | common.validate(model, data))
        common.save_epoch(folder, stage, model, state, rows, epochs, args.tensorboard)
    common.save_model(folder / f"{stage}.pt", model, rows)


# ------------------------------------------------------------------------------------------------
# The whole job


def teacher_recipe(args, seed):
    """What the weights of a teacher depend on: equal recipes, also of other scripts, share one."""
    milestones = args.teacher_milestones
    if milestones is None:
        milestones = stretch(STANDARD_MILESTONES, STANDARD_EPOCHS, args.teacher_epochs)
    recipe = {
        "training": "labels alone, SGD with drops of the learning rate",
        "model": args.teacher_model,
        "seed": seed,
        "epochs": args.teacher_epochs,
        "milestones": milestones,
        "gamma": args.gamma,
        "lr": args.lr,
        "batch_size": args.batch_size,
        "momentum": args.momentum,
        "weight_decay": args.weight_decay,
        "augment": args.augment,
        "precision": args.precision,
        "deterministic": args.deterministic,
    }
    if teacher_dropout(args) > 0:
        recipe["dropout"] = teacher_dropout(args)
    return recipe


def get_teacher(args, data, seed):
    """-> (the teacher of a seed, in eval mode with frozen weights; its file)."""
    recipe = teacher_recipe(args, seed)

    def train_teacher(folder):
        dropout = teacher_dropout(args)
        model = common.new_model(data, args.teacher_model, seed, "teacher", dropout=dropout)
        train(model, data, folder, "teacher", args, seed, recipe["epochs"], recipe["milestones"])

    teacher, _, path = common.get_teacher(args, data, recipe, train_teacher)
    return teacher, path


def choose_teacher(args, data):
    """-> (the most accurate of the teachers of seeds 0 to --teacher-seeds - 1; its file).

    By --pick-teacher; the same one for all students. --method teacher is about that of --seed.
    """
    if args.method == "teacher":
        return get_teacher(args, data, args.seed)
    if args.teacher_seeds == 1:
        return get_teacher(args, data, 0)
    x, labels = data.x_val, data.y_val
    if args.pick_teacher == "test":
        x, labels = data.x_test, data.y_test
    best, best_accuracy = None, -1.0
    for seed in range(args.teacher_seeds):
        teacher, path = get_teacher(args, data, seed)
        accuracy = eval_robustness.evaluate(teacher, x, labels, ["clean"])["clean_acc"]
        print(f"teacher of seed {seed}: {args.pick_teacher} accuracy {accuracy:.4f}", flush=True)
        if accuracy > best_accuracy:
            best, best_accuracy = (teacher, path), accuracy
    return best


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.demo and args.method not in ("hinton", "teacher", "student"):
        main([*argv, "--method", "hinton"])  # to compare
    return common.run_seeds("fickle_teacher", args, train_and_evaluate, prepare)


def prepare(args, data):
    """A UserError, before anything is written, for what cannot be done with these data."""
    eval_robustness.check_evaluation(args, data)
    if args.teacher_ckpt and args.method == "fickle":
        teacher, _ = common.load_model(args.teacher_ckpt, "cpu", data)
        learned, asked = teacher.arch["dropout"], teacher_dropout(args)
        if learned != asked:
            wrong = f"learned with dropout {learned:g}, not --dropout {asked:g}"
            raise common.UserError(f"--teacher-ckpt: {wrong}")


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate both nets -> the rows of the summary."""
    files, teacher = {}, None
    if args.method in TAUGHT or args.method == "teacher":
        teacher, files["teacher"] = choose_teacher(args, data)
    if args.method != "teacher":
        model = common.new_model(data, args.model, args.seed, "student")
        epochs, milestones = student_schedule(args)
        train(model, data, folder, "student", args, args.seed, epochs, milestones, teacher)
        files[f"student ({args.method})"] = folder / "student.pt"
        files |= eval_robustness.best_epoch(folder)
    return eval_robustness.evaluate_files(args, files, folder)


if __name__ == "__main__":
    common.start(main)
