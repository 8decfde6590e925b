"""How fast it is, and whether what is fast is right: a training step, AutoAttack, precision.

Usage    python benchmark/speed.py ladder                     # WRN-10-1, batch 128, PGD-7 training
         python benchmark/speed.py ladder --loss akd+ --model resnet18 --device cuda --keep
         python benchmark/speed.py autoattack --n 60 --batch-size 20 --threads 2
         python benchmark/speed.py autoattack --device cuda --checkpoint CKPT --n 1000
         python benchmark/speed.py correct --device cuda --model resnet18 --precision fp32 tf32 bf16
Ladder   what each trick is worth, one after the other on top of those before, for --loss st, at,
         ckd or akd+ of robust_kd.py. The first rung is what most published code does (plain.py), in
         float32, on CUDA with TF32 convolutions, which are the default of PyTorch.
         All live in one process and are timed in turn, a few steps each; medians and quartiles.
         The losses of the first two steps of all rungs must agree, but for that of the DataLoader,
         which draws other images. TFLOP/s count the multiply-adds (times two) that the job needs,
         without the gradients that the first rung throws away. The first step, with torch.compile
         and the capture, is apart. --keep: into benchmark/speed.json, and docs/SPEED.md of that.
AutoAttack  eval_robustness.py against a plain rendering (plain.py), in turn. A WRN-10-1 is trained
         for seconds on the embedded shapes; eps is chosen such that about half of the images
         survive PGD. On CUDA ours searches in float32 and in TF32, where only what float32 confirms
         counts. The standard attack: --steps 100 --queries 5000.
Correct  Convolutions: output and both gradients of each shape in the net, with the layout and the
         cuDNN settings of training, as |a - b| / |b| against float64 on the CPU. Losses: the first
         --steps of adversarial training by each rung of the ladder, against float32 without its
         tricks; the mean difference must be at most twice that of two such runs with other starts
         of the attack. Attacks: the loss in float32 on what PGD-7 and PGD-20 find in each
         precision must be within 1 % of that of the attack in float32.
"""

import argparse
import collections
import contextlib
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_robustness
import robust_kd
from benchmark import plain
from benchmark.commands import add_command, add_commands

ROOT = Path(__file__).resolve().parent.parent
EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 7  # of the attack in training

# What is switched on from a rung of the ladder on; the last three are for CUDA
RUNGS = {
    "DataLoader, float32, NCHW, all gradients": set(),
    "images on the device, one gather a batch": {"gather"},
    "in the attack the gradient of x alone": {"input gradient"},
    "channels_last": {"channels_last"},
    "in the attack BatchNorm in the convolution": {"fold"},
    "bfloat16": {"bf16"},
    "torch.compile": {"compile"},
    "CUDA graph of attack, forward, backward": {"graph"},
}
RUNGS_ON_CPU = 5
# By how much (relative) the losses of the first and second step may differ
AGREEMENT = {"float32": (1e-3, 1e-2), "bf16": (3e-2, 1e-1)}
# Largest relative error of a convolution: float32, TF32 and bf16 have 24, 11 and 8 bits
LIMITS = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 1e-2}

PAGE = """# Speed

What each trick is worth for one training step, one on top of the other: made by
`python benchmark/speed.py ladder --keep` (flags: `--loss`, `--model`, `--teacher-model`,
`--batch-size`, `--device`) from `benchmark/speed.json`. All rungs live in one process and are timed
in turn; medians and quartiles. The scripts do what the last line of a CPU table does; on CUDA bf16
too. torch.compile and the CUDA graph are off without `--compile` and `--graph` until they have been
measured on a GPU. So far there are no GPU numbers here. `python benchmark/speed.py correct` says
whether what is fast is right; `python benchmark/speed.py autoattack` times AutoAttack."""
PAGE_COLUMNS = (
    "| | ms a step (quartiles) | images/s | TFLOP/s | of the line above | first step, s |"
)


def parse_args(argv=None):
    """The job and its flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    jobs = add_commands(parser, "job")
    devices = ["auto", "cpu", "cuda"]

    add = add_command(jobs, "ladder", "what each trick is worth for a training step")
    add("--loss", default="at", choices=["st", "at", "ckd", "akd+"], help="loss of the student")
    add("--model", default="wrn-10-1", help="net that is trained")
    add("--teacher-model", default="wrn-16-1", help="net of the teacher, for ckd and akd+")
    add("--batch-size", type=common.whole, default=128, help="images per training step")
    add("--data", default="shapes", help=f"data set: {common.DATA_NAMES}")
    add("--data-root", default="data", help="folder of the data sets")
    add("--device", default="auto", choices=devices, help="auto: CUDA if present")
    add("--rounds", type=common.whole, default=9, help="timed rounds of all rungs, at least 2")
    add("--steps", type=common.whole, default=3, help="training steps of a rung in each round")
    add(
        "--workers",
        type=common.whole_or_0,
        default=2,
        help="processes of the DataLoader of the first rung",
    )
    add("--keep", action="store_true", help="put the numbers into speed.json and docs/SPEED.md")

    add = add_command(jobs, "autoattack", "AutoAttack against a plain rendering of it")
    add("--n", type=common.whole, default=60, help="number of test images")
    add("--batch-size", type=common.whole, default=20, help="images that are attacked together")
    add("--steps", type=common.whole, default=20, help="iterations of APGD and FAB")
    add("--queries", type=common.whole, default=1000, help="queries that Square makes")
    add("--threads", type=common.whole, default=2, help="threads on the CPU")
    add(
        "--repeats",
        type=common.whole,
        default=2,
        help="times that all run in turn; the fastest counts",
    )
    add("--device", default="cpu", choices=devices, help="where all run; auto: CUDA if present")
    add("--checkpoint", help="model of a script to attack at 8/255, instead of the small net")
    add("--data", default="cifar10", help="data set that the checkpoint was trained on")
    add("--data-root", default="data", help="folder of the data sets")

    add = add_command(jobs, "correct", "convolutions, losses and attacks against exact ones")
    add("--model", default="wrn-10-1", help="net whose convolutions and losses are compared")
    add("--batch-size", type=common.whole, default=128, help="images per training step")
    add("--steps", type=common.whole, default=20, help="training steps whose losses are compared")
    add(
        "--precision",
        nargs="+",
        choices=LIMITS,
        default=["fp32"],
        help="arithmetic precisions to compare with strict float32",
    )
    add("--data", default="shapes", help=f"data set: {common.DATA_NAMES}")
    add("--data-root", default="data", help="folder of the data sets")
    add("--device", default="auto", choices=devices, help="auto: CUDA if present")
    args = parser.parse_args(argv)
    if args.job == "correct":
        args.loss, args.teacher_model, args.workers = "at", "mlp-8", 0  # as of the ladder
        if "tf32" in args.precision and not torch.cuda.is_available():
            parser.error("--precision tf32: there is no CUDA device here")
    return args


def set_up(args):
    """The device of --device, with the settings of training."""
    settings = {"precision": "bf16", "deterministic": False, "graph": False, "given": set()}
    return common.setup_training(argparse.Namespace(device=args.device, **settings))


# ------------------------------------------------------------------------------------------------
# A training step


def draw_start(x):
    """The uniform start of the attack, the same numbers for every layout of x."""
    return torch.empty(x.shape, device=x.device).uniform_(-EPS, EPS)


def attack(model, x, labels, tricks):
    """PGD-7 with a set of tricks, BatchNorm in eval mode: -> x_adv."""
    start = draw_start(x)
    if "input gradient" not in tricks:
        return plain.pgd(model.eval(), x, labels, EPS, STEP_SIZE, STEPS, start)
    target = common.attacked(model, "eval") if "fold" in tricks else model.eval()
    return common.pgd(target, x, labels, EPS, STEP_SIZE, STEPS, start)


def train_with(data, args, tricks):
    """Yield the loss of one step of --loss after another with a set of tricks, for ever."""
    device = data.x_train.device
    layout = torch.channels_last if "channels_last" in tricks else torch.contiguous_format
    model = common.new_model(data, args.model, 0, "student").to(memory_format=layout)
    teacher = common.new_model(data, args.teacher_model, 0, "teacher").to(memory_format=layout)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=True)
    if "compile" in tricks:
        common.compile_model(model)
        common.compile_model(teacher)

    def step(x, labels):
        bf16 = {"enabled": "bf16" in tricks, "cache_enabled": False}
        with torch.autocast(device.type, torch.bfloat16, **bf16):
            if args.loss in ("at", "akd+"):
                x_adv = attack(model, x, labels, tricks)
                model.zero_grad()  # plain.pgd leaves gradients of the weights
            model.train()
            match args.loss:
                case "st":
                    loss = robust_kd.st_loss(model(x), labels)
                case "at":
                    loss = robust_kd.at_loss(model(x_adv), labels)
                case "ckd":
                    loss = robust_kd.ckd_loss(model(x), teacher(x), labels, lam=5 / 6)
                case "akd+":
                    loss = robust_kd.akd_plus_loss(model(x_adv), teacher(x_adv), labels, alpha=0.8)
        loss.backward()
        return loss.detach()

    if "graph" in tricks:
        step = common.Graphs(step, model)
    images = None if "gather" in tricks else plain.Images(data)
    epoch = 0
    while True:
        if images is None:
            batches = common.batches(data, args.batch_size, 0, "student", epoch)
        else:
            batches = torch.utils.data.DataLoader(
                images,
                args.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=args.workers,
                pin_memory=device.type == "cuda",
            )
        for x, labels in batches:
            if len(x) != args.batch_size:  # the last one of an epoch
                continue
            optimizer.zero_grad()
            loss = step(x.to(device).to(memory_format=layout), labels.to(device))
            optimizer.step()
            yield loss if "gather" in tricks else loss.item()  # .item(): usual in published code
        epoch += 1


def rungs_on(device):
    """{name: all tricks of the rung} of the rungs of the ladder that a device has."""
    names = list(RUNGS)[: None if device.type == "cuda" else RUNGS_ON_CPU]
    tricks_of, tricks = {}, set()
    for name in names:
        tricks = tricks | RUNGS[name]
        tricks_of[name] = tricks
    return tricks_of


def start_rungs(data, args):
    """-> ({rung: generator of its losses, two steps on}, {rung: seconds of the first step}).

    A UserError if the losses of a rung are not those of the second rung.
    """
    loops, first_seconds, expected = {}, {}, None
    for name, tricks in rungs_on(data.x_train.device).items():
        torch.manual_seed(0)
        loops[name] = train_with(data, args, tricks)
        began = time.perf_counter()
        losses = [float(next(loops[name]))]
        first_seconds[name] = time.perf_counter() - began
        losses.append(float(next(loops[name])))
        if not tricks:  # the DataLoader draws other images
            continue
        expected = expected or losses
        allowed = AGREEMENT["bf16" if "bf16" in tricks else "float32"]
        for i in range(2):
            if not abs(losses[i] - expected[i]) <= allowed[i] * expected[i]:
                wrong = f"loss {losses[i]:.4f}, expected {expected[i]:.4f}"
                raise common.UserError(f"{name}: step {i + 1}: {wrong}: it trains another way")
    return loops, first_seconds


def time_in_turn(loops, args, device):
    """{name: generator} -> {name: seconds a step, of each round}, the generators in turn."""
    seconds = {name: [] for name in loops}
    for round_number in range(max(args.rounds, 2) + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            losses = [next(loop) for _ in range(args.steps)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number > 0:  # the first one warms up
                seconds[name].append((time.perf_counter() - began) / args.steps)
            if not all(math.isfinite(loss) for loss in losses):
                raise common.UserError(f"{name}: a loss is not finite; take other data")
    return seconds


def count_flops(data, args):
    """Floating-point operations of one step of --loss, two for each multiply-add.

    Of a forward pass F, as counted: 3 F to train, 2 F for each step of the attack, the teacher's F.
    """
    forward = {}
    for name in (args.model, args.teacher_model):
        model = common.new_model(data, name, 0, "count")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(common.to_float(data.x_train[: args.batch_size]))
        forward[name] = counter.get_total_flops()
    flops = 3 * forward[args.model]
    if args.loss in ("at", "akd+"):
        flops += 2 * STEPS * forward[args.model]
    if args.loss in ("ckd", "akd+"):
        flops += forward[args.teacher_model]
    return flops


def describe(device):
    """The name of a device in the records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def speed_page(records):
    """The text of docs/SPEED.md, of the records in benchmark/speed.json."""
    lines = [PAGE]
    for record in sorted(records, key=lambda r: (r["device"], r["model"], r["loss"])):
        title = f"{record['model']}, `{record['loss']}`"
        if record["loss"] in ("ckd", "akd+"):
            title += f" from {record['teacher']}"
        lines += [
            f"\n## {title}, batch {record['batch_size']}\n",
            f"{record['device']}, torch {record['torch']}, commit {record['commit']}; "
            f"{record['gflop_per_image']:.2f} GFLOP an image.\n",
            PAGE_COLUMNS,
            "|---|---|---|---|---|---|",
        ]
        ms_above = None
        for rung in record["rungs"]:
            cells = [
                rung["name"],
                f"{rung['ms']:.1f} ({rung['low']:.1f} to {rung['high']:.1f})",
                f"{rung['images_per_second']:,.0f}",
                f"{rung['tflops']:.3g}",
                f"{rung['ms'] / ms_above:.2f}" if ms_above else "-",
                f"{rung['first_step_seconds']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            ms_above = rung["ms"]
    return "\n".join(lines) + "\n"


def keep(record):
    """Put a record into benchmark/speed.json, in place of the same job's, and write the page."""
    path = ROOT / "benchmark" / "speed.json"
    job = ("device", "model", "loss", "teacher", "batch_size")
    records = []
    for old in common.read_json(path) or []:
        if any(old[key] != record[key] for key in job):
            records.append(old)
    records.append(record)
    common.write_json(path, records)
    text = speed_page(records).encode()
    common.write_atomically(ROOT / "docs" / "SPEED.md", lambda file: file.write(text))


def time_ladder(args):
    """The job `ladder`: print the rungs and the ratio of the last to the first."""
    device = set_up(args)
    data = common.load_data(args.data, args.data_root, device)
    loops, first_seconds = start_rungs(data, args)
    flops = count_flops(data, args)
    seconds = time_in_turn(loops, args, device)
    rungs = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rungs.append(
            {
                "name": name,
                "ms": middle * 1e3,
                "low": low * 1e3,
                "high": high * 1e3,
                "images_per_second": args.batch_size / middle,
                "tflops": flops / middle / 1e12,
                "first_step_seconds": first_seconds[name],
            }
        )
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    record = {
        "device": describe(device),
        "torch": torch.__version__,
        "model": args.model,
        "loss": args.loss,
        "teacher": args.teacher_model,
        "batch_size": args.batch_size,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "gflop_per_image": flops / args.batch_size / 1e9,
        "rungs": rungs,
    }
    print(speed_page([record]).removeprefix(PAGE))
    first, *_, last = seconds
    ratio = statistics.median(y / x for x, y in zip(seconds[first], seconds[last]))
    print(f"ratio {ratio:.3f} ({last} / {first}, median of {len(seconds[first])} rounds)")
    if args.keep:
        keep(record)


# ------------------------------------------------------------------------------------------------
# AutoAttack


def train_small_net(data):
    """A WRN-10-1 after three epochs of single-step adversarial training, in eval mode."""
    model = common.new_model(data, "wrn-10-1", 0, "student")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    for epoch in range(3):
        for x, labels in common.batches(data, 50, 0, "student", epoch):
            x_adv = common.pgd(model.eval(), x, labels, 8 / 255, 10 / 255, steps=1)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x_adv), labels).backward()
            optimizer.step()
    return model.eval()


def choose_eps(model, data):
    """The radius of 1/255 to 32/255 at which PGD-20 breaks about half of the test images."""

    def gap(eps):
        attack_of_eps = (eps, eps / 4, 20)
        logits = common.predict(model, data.x_test, data.y_test, attack_of_eps)
        return abs(common.accuracy(logits, data.y_test) - 0.5)

    return min((k / 255 for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)), key=gap)


def time_autoattack(args):
    """The job `autoattack`: print accuracies, seconds and ratios of all ways."""
    torch.set_num_threads(args.threads)
    device = common.find_device(args.device)
    if args.checkpoint:
        data = common.load_data(args.data, args.data_root, device, test_subset=args.n)
        model = common.load_model(args.checkpoint, data)
        eps = 8 / 255
    else:
        data = common.load_data("shapes", device=device, train_subset=2000, test_subset=args.n)
        model = train_small_net(data)
        eps = choose_eps(model, data)
    options = {"batch_size": args.batch_size, "steps": args.steps, "queries": args.queries}

    def run_plain():
        with common.evaluating(model):
            model.requires_grad_(True)  # in a plain rendering weight gradients are made too
            x = common.to_float(data.x_test)
            return plain.autoattack(model, x, data.y_test, eps, **options).double().mean().item()

    def run_ours(search):
        settings = options | {"eps": eps, "search": search}
        found = eval_robustness.evaluate(model, data.x_test, data.y_test, ["aa"], **settings)
        return found["aa_acc"]

    ways = {"plain": run_plain, "ours": lambda: run_ours("fp32")}
    if device.type == "cuda":
        ways["ours, search in TF32"] = lambda: run_ours("tf32")
    seconds, accuracies = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            accuracies[name] = run()
            seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    clean = common.accuracy(common.predict(model, data.x_test), data.y_test)
    print(f"eps {255 * eps:.3g}/255, {args.n} images, clean accuracy {clean:.4f}, ", end="")
    print(f"{describe(device)}, torch {torch.__version__}")
    rows = []
    for name, times in seconds.items():
        ratio = min(times) / min(seconds["plain"])
        row = {"way": name, "aa_acc": accuracies[name], "seconds": min(times)}
        rows.append(row | {"ratio": f"{ratio:.3f}"})
    print(common.table(rows))


# ------------------------------------------------------------------------------------------------
# Precision


@contextlib.contextmanager
def computing_in(precision, device):
    """float32 nets compute as named inside; cuDNN times its kernels, as in training."""
    bf16 = {"enabled": precision == "bf16", "cache_enabled": False}
    with common.convolutions(precision == "tf32"):
        # common.convolutions puts both back
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with torch.autocast(device.type, torch.bfloat16, **bf16):
            yield


def convolution_shapes(model, x):
    """{(input shape, weight shape, stride, padding): how often} of the convolutions in model(x)."""
    shapes = collections.Counter()

    def count(conv, inputs, output):
        shapes[tuple(inputs[0].shape), tuple(conv.weight.shape), conv.stride, conv.padding] += 1

    hooks = []
    for module in model.modules():
        if type(module) is torch.nn.Conv2d:
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return shapes


def convolve(x, w, stride, padding):
    """-> (output of a convolution, gradients of its sum of squares in x and in w)."""
    x, w = x.requires_grad_(), w.requires_grad_()
    y = F.conv2d(x, w, None, stride, padding)
    x_gradient, w_gradient = torch.autograd.grad(y.double().square().sum(), (x, w))
    return y.detach(), x_gradient, w_gradient


def compare_convolutions(model, x, precisions):
    """-> (rows of a table, what is wrong): each shape of convolution in each precision."""
    rows, wrong, generator = [], [], torch.Generator().manual_seed(0)
    for (x_shape, w_shape, stride, padding), times in convolution_shapes(model, x).items():
        name = f"{times} x {x_shape[1]} -> {w_shape[0]}, kernel {w_shape[2]}, stride {stride[0]}, "
        name += f"side {x_shape[2]}"
        images, weights = (
            torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
            for shape in (x_shape, w_shape)
        )
        exact = convolve(images.double(), weights.double(), stride, padding)
        for precision in precisions:
            with computing_in(precision, x.device):
                found = convolve(images.to(x.device), weights.to(x.device), stride, padding)
            row = {"convolution": name, "in": precision}
            for part, a, b in zip(("output", "gradient of x", "of w"), found, exact):
                error = float((a.cpu().double() - b).norm() / b.norm())
                row[part] = f"{error:.1e}"
                if not error <= LIMITS[precision]:
                    wrong.append(f"{name} in {precision}: {part} is off by {error:.1e}")
            rows.append(row)
    return rows, wrong


def first_losses(data, args, tricks, strict=False, other_starts=False):
    """The first --steps losses of training with some tricks; other_starts: of the attack."""
    loop = train_with(data, args, tricks)
    # a rung sets its own precision, but for TF32
    with computing_in("fp32", data.x_train.device) if strict else contextlib.nullcontext():
        losses = [float(next(loop))]
        if other_starts:
            torch.manual_seed(1)  # from the second step on
        for _ in range(args.steps - 1):
            losses.append(float(next(loop)))
    return torch.tensor(losses)


def compare_losses(data, args):
    """-> (rows of a table, what is wrong): the rungs of the ladder against the reference."""
    reference_tricks = {"gather"}  # without it: the DataLoader draws other images
    reference = first_losses(data, args, reference_tricks, strict=True)
    other = first_losses(data, args, reference_tricks, strict=True, other_starts=True)
    limit = 2 * (other - reference).abs().mean().item()
    losses = {"reference": reference, "reference, other starts": other}
    for name, tricks in rungs_on(data.x_train.device).items():
        if len(tricks) > 1:
            losses[name] = first_losses(data, args, tricks)
    rows, wrong = [], []
    for name, losses_of_way in losses.items():
        gap = (losses_of_way - reference).abs().mean().item()
        if losses_of_way is not other and not gap <= limit:
            wrong.append(f"{name}: losses differ by {gap:.4f}")
        rows.append(
            {
                "losses": name,
                "last": f"{losses_of_way[-1].item():.4f}",
                "mean difference": f"{gap:.5f}",
            }
        )
    return rows, wrong


def compare_attacks(data, args):
    """-> (rows of a table, what is wrong): the loss in float32 of what PGD finds."""
    tricks = {"gather", "input gradient", "channels_last", "fold"}
    model = common.new_model(data, args.model, 0, "attacked")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    batches = common.batches(data, args.batch_size, 0, "attacked", 0)
    for _, (x, labels) in zip(range(args.steps), batches):
        x_adv = attack(model, x, labels, tricks)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), labels).backward()
        optimizer.step()
    x = common.to_float(data.x_test[: 4 * args.batch_size])
    labels = data.y_test[: 4 * args.batch_size]
    rows, wrong = [], []
    with common.evaluating(model):
        for steps in (7, 20):
            exact = None  # the loss of the attack in float32
            for precision in dict.fromkeys(["fp32", *args.precision]):
                torch.manual_seed(0)
                with computing_in(precision, x.device):
                    x_adv = common.pgd(model, x, labels, EPS, STEP_SIZE, steps)
                loss = F.cross_entropy(model(x_adv), labels).item()
                exact = exact or loss
                if not abs(loss / exact - 1) <= 0.01:
                    wrong.append(f"pgd{steps} in {precision}: loss {loss:.4f}, not {exact:.4f}")
                rows.append({"attack": f"pgd{steps}", "in": precision, "loss": f"{loss:.4f}"})
    return rows, wrong


def check_correct(args):
    """The job `correct`: print the three tables; a UserError names what is out of its limit."""
    device = set_up(args)
    data = common.load_data(args.data, args.data_root, device)
    model = common.new_model(data, args.model, 0, "convolutions").eval()
    x = common.to_float(data.x_train[: args.batch_size])
    convolutions = compare_convolutions(model, x, args.precision)
    wrong = []
    for rows, errors in (convolutions, compare_losses(data, args), compare_attacks(data, args)):
        print(f"\n{common.table(rows)}")
        wrong += errors
    if wrong:
        raise common.UserError("; ".join(wrong))


def main(argv=None):
    """Do the job that is asked for."""
    args = parse_args(argv)
    jobs = {"ladder": time_ladder, "autoattack": time_autoattack, "correct": check_correct}
    jobs[args.job](args)


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
