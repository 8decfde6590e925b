"""How fast it is, and whether what is fast is right: a new GPU, a training step.

Usage    python benchmark/speed.py gpu --minutes 10           # what to run first on a new GPU
         python benchmark/speed.py ladder                     # WRN-10-1, batch 128, PGD-7 training
         python benchmark/speed.py ladder --loss akd+ --model resnet18 --device cuda --keep
GPU      Every loss and method takes one step in float32 on the device and on the CPU, with the same
         random numbers: the gradients must agree. Times of a training step of ResNet-18, at and
         akd+, without torch.compile and in two of its modes. Two epochs of the main command,
         stopped after the first one of the student and gone on with: the weights must be those of
         a run that was not stopped. AutoAttack on 1,000 images with that student. All on drawn
         images of CIFAR-10's size, unless --data names others for all but the gradients. Each
         result is a line of --out, written at once. What the minutes do not suffice for is named.
Ladder   what each trick is worth, one after the other on top of those before, for --loss st, at,
         ckd or akd+ of robust_kd.py. The first rung is what most published code does, in float32
         (strict, also on CUDA, where PyTorch's default would be TF32 convolutions).
         All live in one process and are timed in turn, a few steps each; medians and quartiles.
         The losses of the first two steps of all rungs must agree, but for that of the DataLoader,
         which draws other images. TFLOP/s count the multiply-adds (times two) that the job needs,
         without the gradients that the first rung throws away. The first step, with torch.compile,
         is apart. --keep: into benchmark/speed.json, and docs/SPEED.md of that.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_robustness
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd
from benchmark import ROOT

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 7  # of the attack in training

# What is switched on from a rung of the ladder on; the last three are for CUDA
RUNGS = {
    "DataLoader, float32, NCHW, all gradients": set(),
    "images on the device, one gather a batch": {"gather"},
    "in the attack the gradient of x alone": {"input gradient"},
    "channels_last": {"channels_last"},
    "bfloat16": {"bf16"},
    "torch.compile": {"compile"},
    "torch.compile, reduce-overhead": {"reduce-overhead"},
}
RUNGS_ON_CPU = 4
# By how much (relative) the losses of the first and second step may differ
AGREEMENT = {"float32": (1e-3, 1e-2), "bf16": (3e-2, 1e-1)}

PAGE = """# Speed

What each trick is worth for one training step, one on top of the other: made by
`python benchmark/speed.py ladder --keep` (flags: `--loss`, `--model`, `--teacher-model`,
`--batch-size`, `--device`) from `benchmark/speed.json`. All rungs live in one process and are timed
in turn; medians and quartiles. The scripts do what the last line of a CPU table does; on CUDA bf16
too. torch.compile is off without `--compile` until it has been measured on a GPU:
`python benchmark/speed.py gpu` is what to run first on one. On CUDA the first rungs are in strict
float32, where PyTorch's default would be TF32 convolutions. The losses of the rungs must agree."""
NO_GPU_YET = "So far there are no GPU numbers here."
PAGE_COLUMNS = (
    "| | ms a step (quartiles) | images/s | TFLOP/s | time / line above | first step, s |"
)


def parse_args(argv=None):
    """The job and its flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB", prog=parser.prog)
    devices = ["auto", "cpu", "cuda"]

    text = "what to run first on a new GPU"
    add = jobs.add_parser("gpu", doc=text, help=text).add_argument
    add(
        "--minutes", type=common.positive, default=10.0, help="time after which nothing more begins"
    )
    add("--data", default="shapes", help=f"data set of the longer parts: {common.DATA_NAMES}")
    add("--data-root", default="data", help="folder of the data sets")
    add("--device", default="cuda", choices=devices, help="device that is compared with the CPU")
    add("--small", action="store_true", help="tiny nets and few images, to try the program itself")
    add("--out", default="runs/gpu.jsonl", help="file of the results, one JSON object a line")

    text = "what each trick is worth for a training step"
    add = jobs.add_parser("ladder", doc=text, help=text).add_argument
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

    return parser.parse_args(argv)


def set_up(args):
    """The device of --device, with the settings of training."""
    return common.setup_device(
        argparse.Namespace(device=args.device, deterministic=False, given=[])
    )


# ------------------------------------------------------------------------------------------------
# A training step


class PlainImages(torch.utils.data.Dataset):
    """The training set as torchvision's own CIFAR10 gives it: one image at a time, transformed."""

    def __init__(self, data):
        import torchvision.transforms as transforms
        from PIL import Image

        images = data.x_train.cpu().numpy()
        if images.shape[3] == 1:  # grey
            images = images[..., 0]
        self.images = [Image.fromarray(x) for x in images]
        self.labels = data.y_train.tolist()
        size = data.x_train.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def plain_pgd(model, x, labels, eps, step_size, steps, start):
    """PGD by loss.backward(): the gradients of the weights are computed and thrown away."""
    x_adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(x_adv), labels).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def draw_start(x):
    """The uniform start of the attack, the same numbers for every layout of x."""
    return torch.empty(x.shape, device=x.device).uniform_(-EPS, EPS)


def attack(model, x, labels, tricks):
    """PGD-7 with a set of tricks, BatchNorm in eval mode: -> x_adv."""
    start = draw_start(x)
    if "input gradient" not in tricks:
        return plain_pgd(model.eval(), x, labels, EPS, STEP_SIZE, STEPS, start)
    return common.pgd(model.eval(), x, labels, EPS, STEP_SIZE, STEPS, start)


def train_with(data, args, tricks):
    """Yield the loss of one step of --loss after another with a set of tricks, for ever."""
    device = data.x_train.device
    layout = torch.channels_last if "channels_last" in tricks else torch.contiguous_format
    model = common.new_model(data, args.model, 0, "student").to(memory_format=layout)
    teacher = common.new_model(data, args.teacher_model, 0, "teacher").to(memory_format=layout)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=True)
    for net in (model, teacher):
        if "reduce-overhead" in tricks:
            common.compile_model(net, "reduce-overhead")
        elif "compile" in tricks:
            common.compile_model(net, "default")
        if "no compiler" in tricks:
            net.compile(dynamic=False, backend="eager")

    def step(x, labels):
        bf16 = {"enabled": "bf16" in tricks, "cache_enabled": False}
        with torch.autocast(device.type, torch.bfloat16, **bf16):
            if args.loss in ("at", "akd+"):
                x_adv = attack(model, x, labels, tricks)
                model.zero_grad()  # plain_pgd leaves gradients of the weights
            model.train()
            match args.loss:
                case "st":
                    loss = F.cross_entropy(model(x), labels)
                case "at":
                    loss = F.cross_entropy(model(x_adv), labels)
                case "ckd":
                    targets = robust_kd.mix_labels(teacher(x), labels)
                    loss = robust_kd.ckd_loss(model(x), targets, labels, lam=5 / 6)
                case "akd+":
                    targets = robust_kd.mix_labels(teacher(x_adv), labels, alpha=0.8)
                    loss = robust_kd.akd_loss(model(x_adv), targets)
        loss.backward()
        return loss.detach()

    images = None if "gather" in tricks else PlainImages(data)
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


def rungs_on(device, loss):
    """{name: all tricks of the rung} of the rungs of the ladder that a device and a loss have."""
    names = list(RUNGS)[: None if device.type == "cuda" else RUNGS_ON_CPU]
    tricks_of, tricks = {}, set()
    for name in names:
        tricks = tricks | RUNGS[name]
        if "input gradient" in RUNGS[name] and loss not in ("at", "akd+"):
            continue  # without an attack it is the rung before
        tricks_of[name] = tricks
    return tricks_of


def start_rungs(data, args):
    """-> ({rung: generator of its losses, two steps on}, {rung: seconds of the first step}).

    A UserError if the losses of a rung are not those of the second rung.
    """
    loops, first_seconds, expected = {}, {}, None
    for name, tricks in rungs_on(data.x_train.device, args.loss).items():
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


def commit():
    """The commit of this code; "-dirty" after it if files have changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # git is not installed
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def speed_page(records):
    """The text of docs/SPEED.md, of the records in benchmark/speed.json."""
    lines = [PAGE]
    if all(record["device"].endswith("CPU threads") for record in records):
        lines.append(NO_GPU_YET)
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
    record = {
        "device": describe(device),
        "torch": torch.__version__,
        "model": args.model,
        "loss": args.loss,
        "teacher": args.teacher_model,
        "batch_size": args.batch_size,
        "commit": commit(),
        "gflop_per_image": flops / args.batch_size / 1e9,
        "rungs": rungs,
    }
    print(speed_page([record]).removeprefix(PAGE).replace(NO_GPU_YET, ""))
    first, *_, last = seconds
    ratio = statistics.median(y / x for x, y in zip(seconds[first], seconds[last]))
    print(f"ratio {ratio:.3f} ({last} / {first}, median of {len(seconds[first])} rounds)")
    if args.keep:
        keep(record)


# ------------------------------------------------------------------------------------------------
# First on a new GPU

STUDENTS = {  # every loss and method that is compared, by script
    "robust_kd": [*(f"--loss {loss}" for loss in robust_kd.LOSSES), "--loss akd+ --awp 0.01"],
    "fickle_teacher": [f"--method {method}" for method in fickle_teacher.METHODS],
    "soft_randomization": [f"--method {method}" for method in soft_randomization.METHODS],
    "messy_collab": [f"--method {method}" for method in messy_collab.METHODS],
    "teacher_free_kd": [f"--method {method}" for method in teacher_free_kd.METHODS],
}
# One step of training on 32 images, and an evaluation that takes no time
ONE_STEP = (
    "--data shapes --train-subset 32 --batch-size 32 --val-size 0 --test-subset 8 --epochs 1 "
    "--teacher-epochs 1 --precision fp32"
)
ONE_STEP_OF_SCRIPT = {
    "robust_kd": "--teacher-batch-size 32 --steps 2",
    "fickle_teacher": "--eval-restarts 1",
    "soft_randomization": "--eval-restarts 1",
    "messy_collab": "--eval-restarts 1",
    "teacher_free_kd": "--steps 2 --teacher-batch-size 32 --eval-attack clean",
}
LARGEST_GRADIENT_ERROR = 0.01  # relative; rounding turns a sign in the attack now and then
SECONDS = {"gradients": 10, "step": 90, "resume": 150, "autoattack": 120}  # that a part may take
SECONDS_IF_SMALL = dict.fromkeys(SECONDS, 1)


class DrawnOnHost(TorchDispatchMode):
    """Inside, all random numbers are drawn on the CPU: the same ones for every device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **kwargs)
        device = kwargs.get("device")
        for value in args:
            if isinstance(value, torch.Tensor):
                device = value.device
        if device is None or torch.device(device).type in ("cpu", "meta"):
            return op(*args, **kwargs)
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        drawn = op(*tree_map_only(torch.Tensor, torch.Tensor.cpu, args), **kwargs)
        if op.overloadpacket.__name__.endswith("_"):  # in place
            return args[0].copy_(drawn)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), drawn)


def one_step_flags(script, student, small):
    """The flags of a run of one step with a loss or method."""
    net = "mlp-8" if small and "self-distillation" not in student else "wrn-10-1"
    flags = f"{student} {ONE_STEP} {ONE_STEP_OF_SCRIPT[script]} --model {net} --teacher-model {net}"
    return flags.split()


def gradients(script, flags, device, folder):
    """All gradients of a run in the order of its steps, a teacher's first: float64 (N,)."""
    found = []

    def keep_gradients(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    found.append(parameter.grad.detach().cpu().double().flatten())

    handle = register_optimizer_step_pre_hook(keep_gradients)
    try:
        with DrawnOnHost(), contextlib.redirect_stdout(io.StringIO()):
            options = ["--device", device, "--runs", f"{folder}/{device}", "--name", "run"]
            importlib.import_module(script).main([*flags, *options])
    finally:
        handle.remove()
    return torch.cat(found)


def compare_gradients(script, student, device, small):
    """-> the row of a loss or method: the relative difference of its gradients on two devices."""
    flags = one_step_flags(script, student, small)
    with tempfile.TemporaryDirectory() as folder:
        ours = gradients(script, flags, device.type, f"{folder}/device")
        exact = gradients(script, flags, "cpu", f"{folder}/cpu")
    error = ((ours - exact).norm() / exact.norm()).item()
    return {"gradient_error": error, "ok": error <= LARGEST_GRADIENT_ERROR}


def time_steps(data, loss, tricks, args, first_losses):
    """-> the row of a loss and mode of torch.compile: ms a step, seconds of the first one.

    first_losses: {loss: losses of the first and third step in the first mode}, with which those of
    other modes must agree. With CUDA graphs the third step is the first one that is replayed.
    """
    options = {"loss": loss, "model": "resnet18", "teacher_model": "resnet18", "batch_size": 128}
    options |= {"rounds": 5, "steps": 5, "workers": 0}
    if args.small:
        options |= {"model": "mlp-8", "teacher_model": "mlp-8", "batch_size": 32}
        options |= {"rounds": 2, "steps": 1}
        tricks = {"no compiler" if "compile" in trick else trick for trick in tricks}
    options = argparse.Namespace(**options)
    set_up(args)  # the comparison of gradients has left float32 behind
    torch._dynamo.reset()  # or a net would find the graphs of the one before
    torch.manual_seed(0)
    loop, began = train_with(data, options, tricks), time.perf_counter()
    losses = [float(next(loop))]
    first_seconds = time.perf_counter() - began
    losses += [float(next(loop)) for _ in range(2)]
    found = losses[0], losses[2]
    expected = first_losses.setdefault(loss, found)
    agree = [abs(a - b) <= share * b for a, b, share in zip(found, expected, AGREEMENT["bf16"])]
    seconds = time_in_turn({loss: loop}, options, data.x_train.device)[loss]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {
        "ms": middle * 1e3,
        "ms_quartiles": [low * 1e3, high * 1e3],
        "first_step_seconds": first_seconds,
        "first_loss": found[0],
        "third_loss": found[1],
        "images_per_second": options.batch_size / middle,
        "ok": all(agree),
    }


def stop_and_resume(args, folder):
    """-> the row of two runs of the main command, of which one is killed and gone on with."""
    total = 6 if args.small else 2  # a short epoch may be over before this process sees it
    flags = ["--data", args.data, "--data-root", args.data_root, "--epochs", str(total)]
    flags += ["--teacher-epochs", "2", "--teacher-es", "2", "--deterministic"]
    flags += ["--test-subset", "1000"]  # evaluated four times or more, in strict float32
    flags += ["--device", args.device, "--runs", str(folder)]
    if args.small:
        flags += "--data shapes --train-subset 500 --val-size 0 --test-subset 20 --steps 2".split()
        flags += "--model mlp-32".split()
    stopped = [*flags, "--name", "stopped"]
    log = folder / "robust_kd/stopped-s0/log.jsonl"
    command = [sys.executable, str(ROOT / "robust_kd.py"), *stopped]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ends = time.monotonic() + SECONDS["resume"]
    try:
        while process.poll() is None and time.monotonic() < ends:
            if log.exists() and log.read_text():
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    epochs = len(log.read_text().splitlines()) if log.exists() else 0
    with contextlib.redirect_stdout(io.StringIO()):
        robust_kd.main(stopped)
        robust_kd.main([*flags, "--name", "whole"])
    digests = []
    for name in ("stopped", "whole"):
        digests.append(common.weights_digest(folder / f"robust_kd/{name}-s0/student.pt"))
    same = digests[0] == digests[1]
    return {"killed_after_epoch": epochs, "same_weights": same, "ok": same and 1 <= epochs < total}


def attack_student(data, path, args):
    """-> the row of AutoAttack on 1,000 test images of a saved student.

    At 2/255: after two epochs it has images left there, and their attacks are what takes the time.
    """
    set_up(args)  # the runs before were deterministic, which is slower
    model = common.load_model(path, data)
    n, options = (20, {"steps": 2, "queries": 5}) if args.small else (1000, {})
    x, labels = data.x_test[:n], data.y_test[:n]
    began = time.perf_counter()
    eps = 2 / 255
    found = eval_robustness.evaluate(model, x, labels, ["clean", "aa"], eps=eps, **options)
    numbers = {key: value for key, value in found.items() if key.endswith("_acc")}
    numbers |= {"images": n, "eps": eps, "seconds": time.perf_counter() - began}
    return numbers | {"ok": found["aa_acc"] <= found["clean_acc"]}


def check_gpu(args):
    """The job `gpu`: one part after the other, as far as the minutes go."""
    ends = time.monotonic() + 60 * args.minutes
    common.make_shapes = functools.cache(common.make_shapes)  # a hundred short runs draw them
    device = set_up(args)
    if args.small:
        args.data = "shapes"
    data = common.load_data(args.data, args.data_root, device)
    seconds_of = SECONDS_IF_SMALL if args.small else SECONDS
    best = {"gather", "input gradient", "channels_last"}
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        best.add("bf16")
    modes = {
        "no compile": best,
        "default": best | {"compile"},
        "reduce-overhead": best | {"reduce-overhead", "compile"},
    }
    folder = tempfile.TemporaryDirectory()
    runs = Path(folder.name)
    student = runs / "robust_kd/whole-s0/student.pt"
    first_losses = {}

    def comparisons(script):
        """Jobs, each (part, name, function that makes the row)."""
        for text in STUDENTS[script][:1] if args.small else STUDENTS[script]:
            job = functools.partial(compare_gradients, script, text, device, args.small)
            yield "gradients", f"{script}.py {text}", job

    def steps(mode):
        for loss in ("akd+",) if args.small else ("at", "akd+"):
            job = functools.partial(time_steps, data, loss, modes[mode], args, first_losses)
            yield "step", f"{loss}, {mode}", job

    resume = functools.partial(stop_and_resume, args, runs)
    attack = functools.partial(attack_student, data, student, args)
    jobs = [
        *comparisons("robust_kd"),
        *steps("no compile"),
        *steps("default"),
        ("resume", "two epochs of robust_kd.py", resume),
        ("autoattack", "student of robust_kd.py", attack),
        *steps("reduce-overhead"),  # after an error inside of CUDA nothing more runs here
    ]
    for script in STUDENTS:  # the short ones fill the minutes that are left
        if script != "robust_kd":
            jobs += comparisons(script)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    wrong = []
    with folder, open(args.out, "a") as out:

        def write(row):
            values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
            print(", ".join(f"{key} {value}" for key, value in zip(row, values)), flush=True)
            print(json.dumps(row), file=out, flush=True)

        write({"device": describe(device), "torch": torch.__version__, "commit": commit()})
        for part, name, job in jobs:
            row = {"part": part, "what": name}
            if time.monotonic() + seconds_of[part] > ends:
                write(row | {"left_out": f"less than {seconds_of[part]} s are left"})
                continue
            if part == "autoattack" and not student.exists():
                write(row | {"left_out": "the two epochs have left no student"})
                continue
            try:
                row |= job()
            except Exception as error:  # a crash of one part must not hide the next
                row |= {"error": f"{type(error).__name__}: {error}", "ok": False}
            write(row)
            if not row["ok"]:
                wrong.append(name)
    if wrong:
        raise common.UserError(f"{args.out}: not as it should be: {'; '.join(wrong)}")


def main(argv=None):
    """Do the job that is asked for."""
    args = parse_args(argv)
    jobs = {"gpu": check_gpu, "ladder": time_ladder}
    jobs[args.job](args)


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
