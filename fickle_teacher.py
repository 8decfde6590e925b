"""Fickle teacher: knowledge distillation from a teacher whose answers vary from trial to trial.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): sections 4.1,
         A.2.1, A.2.2, A.3.
Loss     (1-alpha) CE(S(x), y) + alpha tau^2 KL(T(x) || S(x))                 <- hinton_loss Eq. 2
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
         python fickle_teacher.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python fickle_teacher.py --demo        # without teacher, hinton, fickle; 2 CPU minutes
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4 and PGD steps of 0.003 come from later code of the
            authors. The paper prints momentum 0.99 (we take it for a typing error), PGD steps of
            0.03, and no weight decay.
         2. 1,024 training images are held out (--val-size 0: none). They choose the teacher among
            --teacher-seeds and the student's best epoch. The paper chooses the teacher on the test
            images (--pick-teacher test).
         3. The KL is KL(T || S), as in Hinton's loss; Eq. 2 prints S first. Training on CUDA is in
            bf16 (--precision fp32: float32). An image is robust if no start of PGD breaks it; the
            paper reports the lowest accuracy of five runs of PGD.
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
from pathlib import Path

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
    "--alpha": TAUGHT,
    "--temperature": TAUGHT,
    "--teacher-seeds": [*TAUGHT, "teacher"],
    "--pick-teacher": TAUGHT,
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
    "epochs": 60,
    "teacher-epochs": 60,
    "batch-size": 15,
    "temperature": 1,  # with 4 so few steps are not enough: the gradients are small
    "dropout": 0.1,
    "train-subset": 60,
    "test-subset": 500,
    "val-size": 50,
    "restarts": 1,
    "eps": "4/255",
    "step-size": "1/255",
}
DEMO_BASELINES = ["student", "hinton"]  # what the demo compares its method with
DEMO_SHOWS = (
    "60 training images, PGD with a radius of 4/255. The last two students have the same "
    "teacher; its dropout is off while it teaches (hinton), or on (fickle). Look above at the line "
    "before the last student: where the fickle teacher is wrong, its answers vary several times as "
    "much as where it is right. That is what its student sees, and the student of hinton does not. "
    "It does not show in clean_acc on images as easy as these: over seeds 0 to 3 fickle was ahead "
    "of hinton by +1.0, -1.8, -3.6, +6.4 points (1 thread). On photographs: docs/CLAIMS.md."
)


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
    add(
        "--dropout",
        type="probability below 1",
        help="dropout rate of the teacher (fickle: 0.4, otherwise: 0)",
    )
    add(
        "--teacher-mode",
        choices=["dropout", "train"],
        default="dropout",
        help="what is in training mode while a fickle teacher teaches: its dropout alone, or its "
        "BatchNorm too",
    )
    add(
        "--sigma",
        type="nonnegative",
        default=0.1,
        help="standard deviation of the noise of signal, relative to the logit",
    )
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
    add(
        "--swap-threshold", type="nonnegative", default=0.2, help="largest gap of a pair that swaps"
    )
    add(
        "--swap-gap",
        choices=["relative", "absolute"],
        default="relative",
        help="gap of two softened probabilities p >= q: (p - q) / p, or p - q",
    )
    add("--alpha", type="probability", default=0.9, help="weight of the distillation term")
    add("--temperature", type="positive", default=4.0, help="temperature of both softmaxes")
    add(
        "--model",
        default="wrn-16-2",
        help="net of the student: wrn-16-2, resnet18, mlp-512, MODULE:FUNCTION",
    )
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-model", default="wrn-40-2", help="net of the teacher, named as for --model")
    add(
        "--teacher-seeds",
        type="positive int",
        default=1,
        help="number of teachers to train, with seeds 0 to N-1 whatever --seed is; the most "
        "accurate one teaches",
    )
    add(
        "--pick-teacher",
        choices=["val", "test"],
        default="val",
        help="images on which the best teacher is chosen: held-out ones, or test images as in "
        "the paper",
    )
    add(
        "--teacher-epochs",
        type="positive int",
        default=STANDARD_EPOCHS,
        help="epochs of the teacher's training",
    )
    add(
        "--teacher-milestones",
        type="positive int",
        nargs="+",
        help="numbers of finished epochs after which the teacher's learning rate is multiplied by "
        "--gamma (default: 60 120 150 for 200 epochs, in proportion for other --teacher-epochs)",
    )
    add(
        "--teacher-ckpt",
        help="file of a finished teacher, or a state_dict of a MODULE:FUNCTION; none is trained",
    )
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type="positive int",
        help="epochs of the student's training (default: 200; fickle: 250 to 350, by --dropout)",
    )
    add(
        "--milestones",
        type="positive int",
        nargs="+",
        help="numbers of finished epochs after which the student's learning rate is multiplied by "
        "--gamma (default: 60 120 150 for 200 epochs, or those of section A.3; in proportion for "
        "other --epochs)",
    )
    add("--gamma", type="positive", default=0.2, help="factor on the learning rate at milestones")
    add("--lr", type="positive", default=0.1, help="learning rate that both nets start with")
    add("--batch-size", type="positive int", default=128, help="images per step of both nets")
    add("--momentum", type="probability", default=0.9, help="momentum of SGD for both nets")
    add(
        "--weight-decay", type="nonnegative", default=5e-4, help="weight decay of SGD for both nets"
    )
    eval_robustness.add_evaluation_flags(parser)
    parser.add_run_flags()
    args = parser.parse_run(argv, {"--demo": DEMO})
    for flag, methods in FLAG_METHODS.items():
        if flag in args.given and args.method not in methods and not args.demo:
            parser.error(f"{flag}: has no effect with --method {args.method}; leave it out")
    common.check_model("--teacher-model", args.teacher_model, dropout=teacher_dropout(args))
    if args.teacher_seeds > 1 and args.method == "teacher":
        remedy = "--method teacher trains the teacher of --seed alone; --seeds trains several"
        parser.error(f"--teacher-seeds {args.teacher_seeds}: {remedy}")
    if "--pick-teacher" in args.given and args.teacher_seeds == 1:
        parser.error("--pick-teacher: there is one teacher; give --teacher-seeds above 1")
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


def spread_of_answers(teacher, x, labels, passes=10):
    """How far the probability of the teacher's answer varies from pass to pass: two numbers.

    x (B, C, H, W), labels (B,) -> the standard deviation over the passes, averaged over the images
    that the teacher gets right, and over those that it gets wrong (NaN if there are none). Its
    answer is the class with the largest mean.
    """
    with torch.no_grad():
        probs = torch.stack([teacher(x).softmax(1) for _ in range(passes)])  # (passes, B, K)
    answers = probs.mean(0).argmax(1)  # (B,)
    spread = probs.std(0).gather(1, answers[:, None])[:, 0]  # (B,)
    right = answers == labels
    return spread[right].mean().item(), spread[~right].mean().item()


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


def stretch(milestones, standard_epochs, epochs):
    """Milestones of a schedule of `standard_epochs`, in proportion for `epochs`, rounded up."""
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
    if teacher is not None and args.method == "fickle":
        make_fickle(teacher, args.teacher_mode)
        x, labels = common.to_float(data.x_test[:500]), data.y_test[:500]
        right, wrong = spread_of_answers(teacher, x, labels)
        print(
            f"in {len(x)} test images the probability of the teacher's answer varies from pass to "
            f"pass by {right:.3f} where it is right, by {wrong:.3f} where it is wrong (standard "
            "deviation; nan: there are none)"
        )

    def step(x, labels):
        """The loss of a batch and the gradients of the weights -> common.metrics."""
        # args.autocast is True for bf16 on CUDA (--precision). The cache of cast weights is off: a
        # CUDA graph (--graph) must cast the weights of each step.
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
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
        loss.backward()
        return common.metrics(loss, student_logits, labels)

    step = common.speed_up(step, model, args)  # for --compile and --graph
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    rows = common.resume(folder, stage, state)
    for epoch in range(len(rows), epochs):
        common.seed_epoch(seed, stage, epoch)
        model.train()
        began = time.monotonic()
        history = []  # the metrics of each step stay on the device: reading them would make it wait
        for x, labels in common.batches(data, args.batch_size, seed, stage, epoch):
            optimizer.zero_grad()
            history.append(step(x, labels))
            common.average_gradients(model, len(labels))  # under torchrun, otherwise nothing
            optimizer.step()
        schedule.step()  # per epoch
        row = common.epoch_row(stage, epoch, model, history, began)
        rows.append(row | common.validate(model, data))
        common.save_epoch(folder, stage, model, state, rows, epochs, args.tensorboard)
    common.save_model(folder / f"{stage}.pt", model, rows)


# ------------------------------------------------------------------------------------------------
# The whole job


def teacher_recipe(args, seed):
    """All that the teacher's weights depend on.

    Runs with equal recipes share one teacher file, whichever of the scripts has trained it.
    """
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
    """-> (the teacher in eval mode, its file).

    --method teacher: the teacher of --seed. Otherwise all students have the same one, whatever
    --seed is: that of seed 0 or, with --teacher-seeds N, the most accurate of seeds 0 to N-1 on the
    images of --pick-teacher.
    """
    if args.method == "teacher":
        return get_teacher(args, data, args.seed)
    if args.teacher_seeds == 1:
        return get_teacher(args, data, 0)
    x, labels = data.x_val, data.y_val
    if args.pick_teacher == "test":
        x, labels = data.x_test, data.y_test
    best_teacher, best_path, best_accuracy = None, None, -1.0
    for seed in range(args.teacher_seeds):
        teacher, path = get_teacher(args, data, seed)
        accuracy = eval_robustness.evaluate(teacher, x, labels, ["clean"])["clean_acc"]
        accuracy = common.from_first_process(accuracy)  # all must choose the same teacher
        print(f"teacher of seed {seed}: {args.pick_teacher} accuracy {accuracy:.4f}", flush=True)
        if accuracy > best_accuracy:
            best_teacher, best_path, best_accuracy = teacher, path, accuracy
    return best_teacher, best_path


def main(argv=None):
    """For each seed: data, teacher, student, evaluation of both, one table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.demo and args.method not in (*DEMO_BASELINES, "teacher"):
        return demo(argv, args)
    return common.run_seeds("fickle_teacher", args, train_and_evaluate, prepare)


def demo(argv, args):
    """Train without the method, then with it; print one table, and what it shows."""
    rows = []
    for method in [*DEMO_BASELINES, args.method]:
        flags = [*argv, "--method", method]
        if "--name" in args.given:
            flags += ["--name", f"{args.name}-{method}"]  # each run needs a folder of its own
        script = Path(__file__).stem
        summaries = common.run_seeds(script, parse_args(flags), train_and_evaluate, prepare)
        for row in summaries[0]:
            if "best on held-out" not in row["model"] and row not in rows:
                rows.append(row)
    print(f"\nall nets of the demo\n{common.table(common.without_files(rows))}")
    if f"({args.method})" in DEMO_SHOWS:
        print(f"\n{DEMO_SHOWS}")
    return [rows]


def prepare(args, data):
    """Check flags and files against the data before anything is written; raises UserError."""
    teacher = eval_robustness.check_evaluation(args, data, teacher_dropout(args))
    if teacher is not None and args.method == "fickle":
        learned, asked = teacher.build_arguments["dropout"], teacher_dropout(args)
        if learned != asked:
            wrong = f"learned with dropout {learned:g}, not --dropout {asked:g}"
            raise common.UserError(f"--teacher-ckpt: {wrong}")


def train_and_evaluate(args, data, folder):
    """Train the nets of one seed unless they are finished, and evaluate them -> summary rows."""
    files = {}  # row of the summary -> file of the model
    teacher = None
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
