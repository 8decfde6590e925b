"""Soft randomization: the student sees noisy images, its teacher the same images without noise.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.2.
Loss     (1-alpha) CE(S(x'), y) + alpha tau^2 KL(T(x) || S(x'))               <- hinton_loss Eq. 1
Methods  soft-randomization   x' = x + sigma N(0, 1) for the student          <- add_noise
         gaussian             CE(S(x'), y): the student alone, with the same noise
         teacher, student     the net of --seed alone, from labels
         hinton               x' = x (Eq. 2)
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

import math
import sys
import time

import torch
import torch.nn.functional as F

import common
import eval_robustness

METHODS = ["soft-randomization", "gaussian", "hinton", "teacher", "student"]
NOISY = ["soft-randomization", "gaussian"]  # the student sees noisy images
TAUGHT = ["soft-randomization", "hinton"]  # the student has a teacher

# Epochs, and the epochs after which the learning rate drops: section A.1
STANDARD_EPOCHS = 200
STANDARD_MILESTONES = [60, 120, 150]

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
        default="soft-randomization",
        help="training method, see Methods above",
    )
    add("--sigma", type="fraction", default=0.05, help="deviation of the noise, in pixel units")
    add("--clip", action="store_true", help="clip the noisy images to [0, 1]")
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
    add("--epochs", type="count", default=200, help="epochs of the student's training")
    add(
        "--milestones",
        type="count",
        nargs="+",
        help="epochs at which the student's learning rate drops (default: 60 120 150 of 200, "
        "stretched to --epochs)",
    )
    add("--gamma", type="positive", default=0.2, help="factor on the learning rate at milestones")
    add("--lr", type="positive", default=0.1, help="learning rate that both nets start with")
    add("--batch-size", type="count", default=128, help="images per step of both nets")
    add("--momentum", type="probability", default=0.9, help="momentum of SGD for both nets")
    add("--weight-decay", type="fraction", default=5e-4, help="weight decay of SGD for both nets")
    eval_robustness.add_evaluation_flags(parser)
    parser.add_run_flags()
    args = parser.parse_run(argv, {"--demo": DEMO})
    for flag in ("--sigma", "--clip"):
        if flag in args.given and args.method not in NOISY and not args.demo:
            parser.error(f"{flag}: has no effect with --method {args.method}; leave it out")
    if args.teacher_seeds > 1 and args.method == "teacher":
        parser.error("--teacher-seeds: --method teacher trains one, that of --seed; leave it out")
    if args.teacher_seeds > 1 and args.teacher_ckpt:
        parser.error("--teacher-seeds: has no effect with --teacher-ckpt; leave it out")
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
    # batchmean is the KL; PyTorch's default would divide it by the number of classes too
    kl = F.kl_div(student_log_probs, targets, reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * temperature**2 * kl


# ------------------------------------------------------------------------------------------------
# The noise


def add_noise(x, sigma, clip=False):
    """Eq. (1): x + delta, delta ~ N(0, sigma^2): images (B, C, H, W) in [0, 1] -> the same."""
    noisy = x + sigma * torch.randn_like(x)
    return noisy.clamp(0, 1) if clip else noisy


# ------------------------------------------------------------------------------------------------
# Training


# Copied from fickle_teacher.stretch
def stretch(milestones, standard_epochs, epochs):
    """The milestones of a schedule of `standard_epochs`, moved to one of `epochs`."""
    return [math.ceil(milestone * epochs / standard_epochs) for milestone in milestones]


def train(model, data, folder, stage, args, seed, epochs, milestones, teacher=None):
    """Train `model` and write it to folder/<stage>.pt.

    teacher: in eval mode with frozen weights, or None: from labels alone. The student of a noisy
    method sees x + noise, its teacher x. After an interruption the same call goes on.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)
    noisy = stage == "student" and args.method in NOISY

    def step(x, labels):
        """One batch up to the gradients of the weights -> metrics."""
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            student_logits = model(add_noise(x, args.sigma, args.clip) if noisy else x)
            if teacher is None:
                loss = F.cross_entropy(student_logits, labels)
            else:
                teacher_logits = teacher(x)
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
    return {
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


def get_teacher(args, data, seed):
    """-> (the teacher of a seed, in eval mode with frozen weights; its file)."""
    recipe = teacher_recipe(args, seed)

    def train_teacher(folder):
        model = common.new_model(data, args.teacher_model, seed, "teacher")
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
    return common.run_seeds("soft_randomization", args, train_and_evaluate, prepare)


def prepare(args, data):
    """A UserError, before anything is written, for what cannot be done with these data."""
    eval_robustness.check_evaluation(args, data)


def train_and_evaluate(args, data, folder):
    """One seed: train what is missing, evaluate both nets -> the rows of the summary."""
    files, teacher = {}, None
    if args.method in TAUGHT or args.method == "teacher":
        teacher, files["teacher"] = choose_teacher(args, data)
    if args.method != "teacher":
        model = common.new_model(data, args.model, args.seed, "student")
        milestones = args.milestones
        if milestones is None:
            milestones = stretch(STANDARD_MILESTONES, STANDARD_EPOCHS, args.epochs)
        train(model, data, folder, "student", args, args.seed, args.epochs, milestones, teacher)
        files[f"student ({args.method})"] = folder / "student.pt"
        files |= eval_robustness.best_epoch(folder)
    return eval_robustness.evaluate_files(args, files, folder)


if __name__ == "__main__":
    common.start(main)
