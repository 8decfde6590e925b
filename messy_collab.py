"""Messy collaboration: teacher, student or both learn from labels that are wrong at random.

Paper    "Improving generalization and robustness with noisy collaboration in knowledge
         distillation", Arani, Sarfraz, Zonooz, arXiv 1910.05057v1 (2019): section 4.3,
         Figures 6 to 10, 17.
Loss     (1-alpha) CE(S(x), y') + alpha tau^2 KL(T(x) || S(x))                <- hinton_loss Eq. 2
         y' is y, or another class for a share of the images
Methods  mc-t, mc-s, mc-ts      drawn anew for each batch, at --noise-rate    <- vary_labels
         flc-t, flc-s, flc-ts   drawn once, at --corruption-rate, kept        <- corrupt_labels
                                in the labels of teacher, student or both
         hinton                 y' = y: distillation with the labels as they are
         student                no teacher, labels alone
         teacher                the teacher of --seed is trained and evaluated, no student
Usage    python messy_collab.py --noise-rate 0.5                     # mc-ts
         python messy_collab.py --method flc-ts --corruption-rate 0.25
         python messy_collab.py --method mc-s --noise-rate 0.1 --corruption-rate 0.25   # Figure 10
         python messy_collab.py --method student --corruption-rate 0.25      # without a teacher
         python messy_collab.py --seeds 0 1 2 3 4 --teacher-seeds 5 --eval full
         python messy_collab.py --demo          # wrong labels: alone, hinton, mc-s; 1 CPU minute
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
         4. A wrong label is uniform over the wrong classes, as in the paper's words; in later code
            of the authors the true class may be drawn too (--label-draw inclusive).
         5. Only the cross-entropy sees wrong labels. In Figure 10 both nets have the corrupted ones
            and the student's vary at --noise-rate on top: the paper does not say who sees what.
         6. Held-out and test images keep their labels. Exactly round(rate N) are replaced.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import dataclasses
import math
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import eval_robustness

METHODS = ["mc-ts", "mc-t", "mc-s", "flc-ts", "flc-t", "flc-s", "hinton", "teacher", "student"]
TAUGHT = ["mc-ts", "mc-t", "mc-s", "flc-ts", "flc-t", "flc-s", "hinton"]  # there is a teacher

# The methods in which the labels of a net are drawn anew for each batch, at --noise-rate
VARIED = {
    "teacher": ["mc-t", "mc-ts", "teacher"],
    "student": ["mc-s", "mc-ts", "student"],
}
# The methods in which the labels of a net may be corrupted once, at --corruption-rate
CORRUPTED = {
    "teacher": [method for method in METHODS if method != "flc-s"],
    "student": [method for method in METHODS if method != "flc-t"],
}
# The methods that a flag has an effect on
FLAG_METHODS = {
    "--noise-rate": VARIED["teacher"] + VARIED["student"],
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
    "method": "mc-s",
    "corruption-rate": 0.5,
    "model": "mlp-100-100",
    "teacher-model": "mlp-400-400",
    "epochs": 30,
    "teacher-epochs": 30,
    "batch-size": 64,
    "lr": 0.05,
    "train-subset": 2000,
    "test-subset": 1000,
    "val-size": 200,
    "restarts": 1,
}
DEMO_BASELINES = ["student", "hinton"]  # what the demo compares its method with
DEMO_SHOWS = (
    "Half of the training labels are wrong, those of the test images are right. Look at clean_acc: "
    "alone, the student learns the wrong labels too; a teacher that learned from the same labels "
    "helps it (hinton). Labels that change in each batch (mc-s) add little here, as in the paper."
)


def parse_args(argv=None):
    """The flags of this script as a namespace; a flag that makes no sense is a UserError."""
    parser = common.RunParser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default="mc-ts",
        help="training method, see Methods above",
    )
    add(
        "--noise-rate",
        type="probability below 1",
        help="probability that a label is replaced in a batch (default: 0.25 for mc-*, else 0)",
    )
    add(
        "--corruption-rate",
        type="probability below 1",
        help="share of labels that are replaced once (default: 0.25 for flc-*, else 0)",
    )
    add(
        "--corruption-seed",
        type="nonnegative int",
        default=0,
        help="seed of the corrupted labels, which are the same for every --seed",
    )
    add("--labels-file", help="corrupted labels of another run: the labels.pt in its folder")
    add(
        "--label-draw",
        choices=["exclusive", "inclusive"],
        default="exclusive",
        help="classes that a wrong label is drawn from: all but the true one, or all",
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
    if args.labels_file and args.corruption_rate is not None:
        remedy = "--labels-file holds corrupted labels already; leave one of the two out"
        parser.error(f"--corruption-rate {args.corruption_rate:g}: {remedy}")
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


def noise_rate(args, role):
    """The share of the labels of role ("teacher", "student") that is drawn anew in each batch."""
    if args.method not in VARIED[role]:
        return 0.0
    if args.noise_rate is None:
        return 0.25 if args.method.startswith("mc-") else 0.0
    return args.noise_rate


def corruption_rate(args, role):
    """The share of the labels of role ("teacher", "student") that is wrong for good."""
    if args.method not in CORRUPTED[role]:
        return 0.0
    if args.corruption_rate is None:
        return 0.25 if args.method.startswith("flc-") else 0.0
    return args.corruption_rate


def labels_of(args, data, role):
    """The training labels (N,) that teacher or student learns from, as they are or corrupted."""
    if args.labels_file and args.method in CORRUPTED[role]:
        return read_labels(args.labels_file, data)
    rate = corruption_rate(args, role)
    if rate == 0:
        return data.y_train
    seed = args.corruption_seed
    return corrupt_labels(data.y_train, rate, len(data.classes), seed, args.label_draw)


def read_labels(path, data):
    """The labels (N,) of a labels.pt; a UserError if they do not belong to the training images."""
    record = common.load(path)
    labels = record.get("labels")
    fits = (
        record.get("fingerprint") == data.fingerprint
        and isinstance(labels, torch.Tensor)
        and labels.dtype == torch.int64
        and labels.shape == data.y_train.shape
        and 0 <= labels.min() <= labels.max() < len(data.classes)
    )
    if not fits:
        raise common.UserError(f"{path}: holds no labels of these training images of {data.name}")
    return labels.to(data.y_train.device)


def keep_labels(args, data, folder):
    """Write the corrupted labels, if there are any, to folder/labels.pt, for --labels-file.

    A UserError if the file is there and holds other labels than this command has.
    """
    role = "teacher" if args.method in CORRUPTED["teacher"] else "student"
    labels = labels_of(args, data, role)
    if labels is data.y_train:
        return
    file = folder / "labels.pt"
    if file.exists() and not torch.equal(read_labels(file, data), labels):
        raise common.UserError(f"{file}: this command has other labels; take another --name")
    common.save(file, {"labels": labels.cpu(), "fingerprint": data.fingerprint})
    wrong = int((labels != data.y_train).sum())
    print(f"{wrong:,} of {len(labels):,} labels are wrong: {file}", flush=True)


# ------------------------------------------------------------------------------------------------
# Training


# Copied from fickle_teacher.stretch
def stretch(milestones, standard_epochs, epochs):
    """Milestones of a schedule of `standard_epochs`, in proportion for `epochs`, rounded up."""
    return [math.ceil(milestone * epochs / standard_epochs) for milestone in milestones]


def train(model, data, folder, stage, args, seed, epochs, milestones, teacher=None):
    """Train `model` and write it to folder/<stage>.pt.

    teacher: in eval mode with frozen weights, or None: from labels alone. stage: "teacher" or
    "student", whose labels may vary or be corrupted. After an interruption the same call goes on.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)
    data = dataclasses.replace(data, y_train=labels_of(args, data, stage))
    rate = noise_rate(args, stage)

    def step(x, labels):
        """The loss of a batch and the gradients of the weights -> common.metrics."""
        if rate > 0:
            labels = vary_labels(labels, rate, len(data.classes), args.label_draw)
        # args.autocast is True for bf16 on CUDA (--precision). The cache of cast weights is off: a
        # CUDA graph (--graph) must cast the weights of each step.
        with torch.autocast("cuda", torch.bfloat16, args.autocast, cache_enabled=False):
            student_logits = model(x)
            if teacher is None:
                loss = F.cross_entropy(student_logits, labels)
            else:
                teacher_logits = teacher(x)
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


def teacher_recipe(args, data, seed):
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
    if noise_rate(args, "teacher") > 0:
        recipe["noise_rate"] = noise_rate(args, "teacher")
        recipe["label_draw"] = args.label_draw
    labels = labels_of(args, data, "teacher")
    if labels is not data.y_train:
        recipe["labels"] = zlib.crc32(labels.cpu().numpy())
    return recipe


def get_teacher(args, data, seed):
    """-> (the teacher of a seed, in eval mode with frozen weights; its file)."""
    recipe = teacher_recipe(args, data, seed)

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
    return common.run_seeds("messy_collab", args, train_and_evaluate, prepare)


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
    if args.labels_file:
        read_labels(args.labels_file, data)


def train_and_evaluate(args, data, folder):
    """Train the nets of one seed unless they are finished, and evaluate them -> summary rows."""
    files = {}  # row of the summary -> file of the model
    teacher = None
    keep_labels(args, data, folder)
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
