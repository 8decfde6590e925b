"""Soft randomization: the student sees noisy images, its teacher the same images without noise.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.2.
Loss     (1-alpha) CE(S(x'), y) + alpha tau^2 KL(T(x) || S(x'))               <- hinton_loss Eq. 1
         S, T: softmax of student and teacher; in the KL their logits are divided by tau
Methods  soft-randomization   x' = x + sigma N(0, 1): noise for the student   <- add_noise
         gaussian             CE(S(x'), y): no teacher, the same noise
         hinton               x' = x: distillation without noise (Eq. 2)
         student              CE(S(x), y): no teacher, no noise
         teacher              the teacher of --seed is trained and evaluated, no student
Usage    python soft_randomization.py --sigma 0.05
         python soft_randomization.py --method gaussian --sigma 0.05
         python soft_randomization.py --method hinton                # the baseline without noise
         python soft_randomization.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python soft_randomization.py --demo    # no teacher, gaussian noise, this; 2 CPU minutes
Expect   CIFAR-10, WRN-40-2 and WRN-16-2: not measured. Small nets: docs/noisy_collaboration.md.
Shapes   B images, K classes; x (B, C, H, W) in [0, 1]; labels (B,); logits (B, K)
Differs  1. Momentum 0.9, weight decay 5e-4 and PGD steps of 0.003 come from later code of the
            authors. The paper prints momentum 0.99 (we take it for a typing error), PGD steps of
            0.03, and no weight decay.
         2. 1,024 training images are held out (--val-size 0: none). They choose the teacher among
            --teacher-seeds and the student's best epoch. The paper chooses the teacher on the test
            images (--pick-teacher test).
         3. The KL is KL(T || S), as in Hinton's loss; Eq. 1 prints S first. Training on CUDA is in
            bf16 (--precision fp32: float32). An image is robust if no start of PGD breaks it; the
            paper reports the lowest accuracy of five runs of PGD.
         4. Noise is drawn for each pixel and channel, after crop and flip. x' may leave [0, 1], as
            in Eq. 1 (--clip: it is clipped). The teacher sees the same crop and flip without noise.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import eval_robustness

METHODS = ["soft-randomization", "gaussian", "hinton", "teacher", "student"]
NOISY = ["soft-randomization", "gaussian"]  # the student sees noisy images
TAUGHT = ["soft-randomization", "hinton"]  # the student has a teacher
# The methods that a flag has an effect on
FLAG_METHODS = {
    "--sigma": NOISY,
    "--clip": NOISY,
    "--alpha": TAUGHT,
    "--temperature": TAUGHT,
    "--teacher-seeds": [*TAUGHT, "teacher"],
    "--pick-teacher": TAUGHT,
}

# Epochs, and the epochs after which the learning rate drops: section A.1
STANDARD_EPOCHS = 200
STANDARD_MILESTONES = [60, 120, 150]

DEMO = {
    "data": "shapes",
    "model": "wrn-10-1",
    "teacher-model": "wrn-16-1",
    "epochs": 60,
    "teacher-epochs": 60,
    "batch-size": 15,
    "temperature": 1,  # with 4 so few steps are not enough: the gradients are small
    "sigma": 0.1,
    "train-subset": 60,
    "test-subset": 500,
    "val-size": 50,
    "restarts": 1,
    "eps": "4/255",
    "step-size": "1/255",
}
DEMO_BASELINES = ["student", "gaussian"]  # what the demo compares its method with
DEMO_SHOWS = (
    "60 training images, PGD with a radius of 4/255. Look at pgd20_acc: who has learned from noisy "
    "images, with the answers of a teacher that saw them without noise (soft-randomization), "
    "resists attacks better than who has not (student): over seeds 0 to 3 by 8, 7, 10 and 27 "
    "points, at -3, -3, -13 and +4 points of clean_acc (1 thread). gaussian has the noise without "
    "the teacher: three times about as good, once far behind (seed 3)."
)


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
    add(
        "--sigma",
        type="nonnegative",
        default=0.05,
        help="standard deviation of the noise, pixels in [0, 1]",
    )
    add("--clip", action="store_true", help="clip the noisy images to [0, 1]")
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
        default=STANDARD_EPOCHS,
        help="epochs of the student's training",
    )
    add(
        "--milestones",
        type="positive int",
        nargs="+",
        help="numbers of finished epochs after which the student's learning rate is multiplied by "
        "--gamma (default: 60 120 150 for 200 epochs, in proportion for other --epochs)",
    )
    add("--gamma", type="decay", default=0.2, help="factor on the learning rate at milestones")
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
    """Eq. (1): x + delta, delta ~ N(0, sigma^2) for each pixel and channel: (B, C, H, W) -> same.

    x in [0, 1]; the result may leave [0, 1] unless `clip` is set.
    """
    noisy = x + sigma * torch.randn_like(x)
    return noisy.clamp(0, 1) if clip else noisy


# ------------------------------------------------------------------------------------------------
# Training


# Copied from fickle_teacher.stretch
def stretch(milestones, standard_epochs, epochs):
    """Milestones of a schedule of `standard_epochs`, in proportion for `epochs`, rounded up."""
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
        """The loss of a batch and the gradients of the weights -> common.metrics."""
        # args.autocast is True for bf16 on CUDA (--precision). The cache of cast weights is off: a
        # CUDA graph (--graph) must cast the weights of each step.
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            student_x = x
            if noisy:
                student_x = add_noise(x, args.sigma, args.clip)
            student_logits = model(student_x)
            if teacher is None:
                loss = F.cross_entropy(student_logits, labels)
            else:
                teacher_logits = teacher(x)  # the images without noise
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
        row = common.epoch_row(stage, epoch, model, history, began, args)
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


# Copied from fickle_teacher.choose_teacher
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
    return common.run_seeds("soft_randomization", args, train_and_evaluate, prepare)


# Copied from fickle_teacher.demo
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
    eval_robustness.check_evaluation(args, data)


def train_and_evaluate(args, data, folder):
    """Train the nets of one seed unless they are finished, and evaluate them -> summary rows."""
    files = {}  # row of the summary -> file of the model
    teacher = None
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
