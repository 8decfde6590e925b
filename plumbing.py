"""The plumbing of a run, which every script uses and no method needs: leave it out when you paste.

Runs     runs/<script>/<name>-s<seed>/: config.json, log.jsonl, last.pt (to resume), the models.
Order    parse -> open_run -> get_teacher -> epochs, batches, end_epoch -> finish -> across_seeds
Random   every draw depends on (seed, stage, epoch), so resuming needs no generator state.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

import common
from common import count, count0, fail, fraction, probability

# What a record of another shape, or one that is nested too deep, makes Python raise
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)

# ------------------------------------------------------------------------------------------------
# Flags


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every training script shares: data, device, seed, folders."""
    add = parser.add_argument_group("run").add_argument
    names = "cifar10, cifar100, mnist, tiny-imagenet, shapes, FILE.npz, FOLDER"
    add("--data", default="cifar10", help=names)
    add("--data-root", default="data", help="where data sets are, and missing ones are downloaded")
    add("--train-subset", type=count, help="train on so many images (a fixed choice); None: all")
    add("--test-subset", type=count, help="test on so many images (a fixed choice); None: all")
    add("--val-size", type=count0, default=1024, help="training images held out for the best epoch")
    add("--seed", type=count0, default=0, help="seed of weights, batches and attacks")
    add("--seeds", type=count0, nargs="+", help="several runs, their mean and std; None: --seed")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="of training on CUDA")
    add("--deterministic", action="store_true", help="deterministic CUDA kernels (slower)")
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--graph", **switch, help="on CUDA: replay steps as a graph (not measured)")
    add("--compile", **switch, help="the nets by torch.compile (on CUDA not measured)")
    add("--runs", default="runs", help="folder of the run folders")
    add("--name", help="name of the run folder; None: made of the flags that are not the default")
    add("--tensorboard", action="store_true", help="log to TensorBoard too, if it is installed")
    add("--demo", action="store_true", help="the whole job on the embedded shapes, on a CPU")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate_files`, with the attack of the papers that train without one."""

    def path(text):
        if text != "generate" and not Path(text).exists():
            raise argparse.ArgumentTypeError(f"expected a file or a folder, there is no {text}")
        return text

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", choices=["fast", "full"], default="fast", help="fast: clean, PGD; full: all")
    add("--eps", type=probability, default=0.031, help="radius of PGD")
    add("--step-size", type=fraction, default=0.003, help="of PGD")
    add("--eval-steps", type=count, default=20, help="of PGD; full: 10 and 15 too")
    add("--restarts", type=count, default=5, help="random starts of PGD, the worst counts")
    add("--corruptions", type=path, default="generate", help="CIFAR-10-C; generate: made here")
    add("--cinic", type=path, help="CINIC-10, of which the images from ImageNet count")
    add("--cinic-per-class", type=count, help="a fixed choice (paper: 2100); None: all")
    add("--ood", type=path, help="other images: an .npz or a folder of class folders")


# Flags that do not change what is computed: a run may be resumed with others.
FREE_FLAGS = {*"data_root device runs name tensorboard argv seeds graph compile".split()}


def parse(parser: argparse.ArgumentParser, argv: list | None, presets: dict):
    """Parse `argv` (None: sys.argv), name the run: -> argparse.Namespace.

    presets: {"--demo" or "--flag value": {flag: its default then}}; what one sets, it prints.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if common.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the first process says it all)
    for preset, flags in presets.items():
        given = f" {preset} " in f" {' '.join(argv)} ".replace("=", " ")
        if given and not {"-h", "--help"} & set(argv):
            parser.set_defaults(**{k.replace("-", "_"): str(value) for k, value in flags.items()})
            own = {flag.split("=")[0] for flag in argv}
            sets = [f"--{k} {value}" for k, value in flags.items() if f"--{k}" not in own]
            print(f"{preset} sets {' '.join(sets) or 'nothing'}")
    args = parser.parse_args(argv)
    if args.name is None:
        default = vars(parser.parse_args(["--demo"] if args.demo else []))
        method = getattr(args, "loss", None) or args.method
        name = "demo-" * args.demo + f"{Path(args.data).stem}-{args.model}-{method}"
        shown = FREE_FLAGS | {"seed", "demo", "data", "model", "loss", "method"}
        for key, value in vars(args).items():
            if key not in shown and value != default[key]:
                short = f"{value:.4g}" if isinstance(value, float) else value
                short = "+".join(map(str, value)) if isinstance(value, list) else short
                name += f",{key.replace('_', '-')}={short}"
        name = re.sub(r"[^\w.,=+-]", "-", name)
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        args.name = name if len(name) <= 64 else f"{name[:55]}-{digest}"
    elif not re.fullmatch(r"\w[\w.,=+-]{0,159}", args.name):
        parser.error(f"--name: expected letters, digits and . , = + - _, got {args.name!r}")
    if len(set(args.seeds or [])) < len(args.seeds or []):
        parser.error(f"--seeds: a seed stands there twice, in {args.seeds}")
    args.argv = argv
    return args


def per_seed(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each run that --seeds asks for; of one run without it."""
    return [argparse.Namespace(**vars(args) | {"seed": seed}) for seed in args.seeds or [args.seed]]


# ------------------------------------------------------------------------------------------------
# The folder of a run


@dataclasses.dataclass
class Run:
    """A run folder and the state of what is written to it and shown."""

    script: str
    args: argparse.Namespace
    device: torch.device
    stage: str = ""
    total: int = 0  # epochs of the stage
    parts: dict = dataclasses.field(default_factory=dict)  # of the stage: model, optimizer, ...
    started: float = 0.0  # of the current epoch
    seconds: float = 0.0  # of the current stage, over all sessions
    row: dict = dataclasses.field(default_factory=dict)  # of the last epoch
    best: dict = dataclasses.field(default_factory=dict)  # of the best epoch
    left: int | None = None  # seconds to the end of the stage, once an epoch is measured
    ticked: float = 0.0
    writer: object = None  # TensorBoard's
    command: str = ""  # that starts and resumes the run
    fingerprint: int = 0  # of the data
    finished: bool = False
    lock: object = None  # an open file: no other process may use the folder
    settings: str = ""  # of the teacher that is trained now
    share: float = 1.0  # of the images of this step that this process has, of several

    def __post_init__(self):
        self.dir = Path(self.args.runs) / self.script / f"{self.args.name}-s{self.args.seed}"
        self.log = self.dir / "log.jsonl"
        self.flags = {k: v for k, v in vars(self.args).items() if k not in FREE_FLAGS}

    def show(self, epoch: int, text: str, end: str = "") -> None:
        """A line of an epoch; with end "" the live one, on terminals, at most every 0.25 s."""
        if not end and not (sys.stdout.isatty() and time.monotonic() > self.ticked + 0.25):
            return
        self.ticked = time.monotonic()
        text = f"{self.stage} {epoch:{len(str(self.total))}d}/{self.total}  {text}"
        left = f"  left {datetime.timedelta(seconds=self.left)}" if self.left is not None else ""
        common.print_line(text + left, end)


@contextlib.contextmanager
def open_run(script: str, args: argparse.Namespace, check=lambda data: None):
    """Yield (run, data) of these flags; with run.finished nothing is left to do.

    Wrong data or --teacher-ckpt, and what check(data) refuses, end it before a folder is made. In
    the `with`, Ctrl-C and SIGTERM end with the command that resumes, errors of the file system and
    of GPU memory with one line. What is on the disk then is the last finished epoch.
    """
    run = Run(script, args, common.setup_device(args))
    here, python = Path(__file__).resolve().parent / f"{script}.py", Path(sys.executable)
    paths = [python if Path.cwd() not in python.parents else os.path.relpath(python)]
    run.command = shlex.join(map(str, [*paths, os.path.relpath(here), *args.argv]))
    try:
        with common.stoppable():
            _join(run.device)
            sizes = (args.val_size, args.train_subset, args.test_subset)
            if common.rank():
                sync()  # until the first process has read or unpacked the data and made the folder
            data = common.load_data(args.data, args.data_root, run.device, *sizes)
            if args.teacher_ckpt and not (run.dir / "teacher.pt").exists():
                named = any(flag.startswith("--teacher-model") for flag in args.argv)
                name = args.teacher_model if named else None
                common.load_model(args.teacher_ckpt, "cpu", data, name)
            check(data)
            _begin(run, data)
            yield run, data
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        print(f"\nstopped; finished epochs are in {run.dir}; go on with:", file=sys.stderr)
        print(run.command, file=sys.stderr)
        raise SystemExit(common.status(stop)) from None
    except torch.OutOfMemoryError as error:
        fail(f"{run.stage}: the GPU has too little memory; try a smaller --batch-size ({error})")
    except RuntimeError as error:
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            fail(f"--compile: {str(error).split('Set TORCH')[0]}; the command goes on without it")
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        fail(f"process {common.rank()}: another process has ended; the same command goes on")
    except OSError as error:
        fail(f"{error.filename or run.dir}: {error.strerror or error}; finished epochs are kept")
    finally:
        for opened in filter(None, (run.writer, run.lock)):
            opened.close()


def _begin(run: Run, data: common.Data) -> None:
    """Make the run's folder, or find it with the same flags and images, perhaps finished."""
    if run.args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    path, flags = run.dir / "config.json", json.loads(json.dumps(run.flags))
    run.fingerprint = data.fingerprint
    if path.is_file():
        try:
            old = json.loads(path.read_text())
            old, fingerprint = dict(old["flags"]), old["fingerprint"]
        except MALFORMED:
            fail(f"{path}: damaged; delete it if the folder is this command's, or change --name")
        for key in sorted(flags.keys() | old.keys()):
            if flags.get(key) != old.get(key):
                flag, other = "--" + key.replace("_", "-"), f"{old.get(key)}, not {flags.get(key)}"
                fail(f"{flag}: {run.dir} was made with {other}; take another --name")
        if fingerprint != data.fingerprint:
            fail(f"--data: {run.dir} was made with other images or labels; take another --name")
    else:
        config = {"command": run.command, "commit": None, "fingerprint": data.fingerprint}
        config |= {"python": sys.version.split()[0], "torch": torch.__version__}
        config["gpu"] = torch.cuda.get_device_name() if run.device.type == "cuda" else None
        with contextlib.suppress(OSError):  # no git here
            git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
            config["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        text = json.dumps(config | {"flags": flags}, indent=1).encode()
        common.write_atomically(path, lambda file: file.write(text))
    if run.args.tensorboard:
        run.writer = SummaryWriter(run.dir)
    run.finished = _finished(run)
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        if not (run.finished or common.rank()):
            run.lock = open(run.dir / "lock", "a+")  # noqa: SIM115
            try:
                fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            except BlockingIOError:
                run.lock.seek(0)
                who = run.lock.read()
                fail(f"{run.dir}: in use by process {who}; wait, or take another --name")
            run.lock.truncate(0)
            print(os.getpid(), end="", file=run.lock, flush=True)
            for torn in run.dir.glob(".*.tmp"):  # a kill leaves what it was writing
                torn.unlink(missing_ok=True)
    if not common.rank():
        sync()


def _rows(run: Run) -> list[dict]:
    """The rows of log.jsonl, but for one that a kill has torn, or that is none of ours."""
    rows = []
    for line in run.log.read_text(errors="replace").splitlines() if run.log.is_file() else []:
        with contextlib.suppress(*MALFORMED):
            row = json.loads(line)
            if "summary" in row:
                row["summary"][0]["model"], common.table(row["summary"]), " ".join(row["files"])
            else:
                row["stage"] + "", row["epoch"] + 0
            rows.append(row)
    return rows


def _write_rows(run: Run, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    common.write_atomically(run.log, lambda file: file.write(text.encode()))


def finish(run: Run, rows: list[dict]) -> None:
    """Write the summary as the last row of log.jsonl, drop last.pt, and show the summary."""
    files = [path.name for path in sorted(run.dir.glob("*.pt")) if path.stem[:4] != "last"]
    sync()
    _write_rows(run, [*_rows(run), {"summary": rows, "files": ["log.jsonl", *files]}])
    sync()
    _finished(run)


def _finished(run: Run) -> bool:
    """Whether the run has its summary; if so, drop what only resuming needs, and show it."""
    last = (_rows(run) or [{}])[-1]
    if "summary" in last:
        for path in [*run.dir.glob("last*.pt"), *run.dir.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        files = " ".join(last["files"])
        print(f"\n{common.table(last['summary'])}\n\n{run.dir} is finished: {files}", flush=True)
    return "summary" in last


# ------------------------------------------------------------------------------------------------
# Epochs


def seed_epoch(*parts) -> None:
    """Seed the draws of an epoch (noise, starts of attacks) by `parts`.

    Each process under torchrun draws its own, since it has other images; the first one draws what
    a process alone would. What must be equal in all (weights, batches) has seeds without the rank.
    """
    if common.rank():
        parts = (*parts, common.rank())
    torch.manual_seed(common.derive_seed(*parts))


def epochs(run: Run, stage: str, total: int, **parts):
    """Yield the epochs of a stage that are still to do, after loading what last.pt has of them.

    parts: the model, optimizer, schedule, ...: all that has a state_dict and is needed to resume.
    Seeds each epoch with (seed, stage, epoch): it is the same epoch after any interruption.
    """
    run.stage, run.total, run.parts, run.left = stage, total, parts, None
    for part in parts.values():
        if run.args.compile and isinstance(part, nn.Module):
            part.compile(dynamic=False)  # the last batch of an epoch has its own code
    run.seconds, run.row, run.best, done = 0.0, {}, {}, 0
    sync()  # no process may find files of this stage that another one did not find
    last = run.dir / "last.pt"
    record, found = common.load_latest(last)
    sync()
    if not common.rank():
        common.settle(last, found)
    if record.get("stage") == stage:
        try:
            for name, part in parts.items():
                part.load_state_dict(record["parts"][name])
            done, run.row, run.best = record["epochs"] + 0, record["row"], record["best"]
            run.seconds = run.row["seconds"] + 0.0
        except MALFORMED:
            fail(f"{last}: not of a run with these flags; delete it, and the stage begins again")
        print(f"{stage}: goes on after epoch {done} of {total} ({last})", flush=True)
    # a kill between checkpoint and log loses a row of the log: the checkpoint has it too
    rows, row = _rows(run), record.get("row")
    rows = [r for r in rows if r.get("stage") != stage or r["epoch"] <= done]
    if isinstance(row, dict) and common.is_plain(row) and row not in rows:
        rows.append(row)
    _write_rows(run, rows)
    if common.world() > 1:
        parts["optimizer"].register_step_pre_hook(lambda *_: _sum_gradients(run))
    for epoch in range(done, total):
        seed_epoch("epoch", run.args.seed, stage, epoch)
        run.started = time.monotonic()
        yield epoch


def autocast(run: "Run"):
    """bf16 autocast for training on CUDA with --precision bf16; all else stays float32."""
    bf16 = run.device.type == "cuda" and run.args.precision == "bf16"
    # no cache: with it, weights first cast under no_grad (a TRADES attack) would get no gradient
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False)


def captured(run: Run, model: nn.Module):
    """Decorates compute(*tensors): under --graph on CUDA its calls replay it as one CUDA graph.

    compute: attack, forward passes, loss.backward() into gradients that are None before -> Tensor;
    no host sync. The optimizer stays outside: its learning rate and momentum are numbers that a
    graph would freeze, and its fused step is few launches anyway. Each shape of the tensors (the
    last batch of an epoch) has a graph of its own; see _capture. The gradients are those of the
    last call, the tensor that comes back is a copy.
    """
    graphs, parameters = {}, list(model.parameters())

    def decorate(compute):
        def replayed(*tensors):
            key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
            if key not in graphs:
                graphs[key] = _capture(compute, model, [tensor.clone() for tensor in tensors])
            replay, inputs, out, gradients = graphs[key]
            for mine, given in zip(inputs, tensors):
                mine.copy_(given)
            replay()
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            return out.clone()

        return replayed if run.device.type == "cuda" and run.args.graph else compute

    return decorate


def _capture(compute, model: nn.Module, inputs: list):
    """-> (replay, inputs, output, gradients) of a CUDA graph of compute(*inputs).

    Three calls on a side stream come before, as PyTorch asks for; they and the capture leave the
    BatchNorm statistics and the state of the random numbers as they were.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    state, side = torch.cuda.get_rng_state(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            compute(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        out = compute(*inputs)
    gradients = [parameter.grad for parameter in model.parameters()]
    for buffer, before in zip(model.buffers(), buffers):
        buffer.copy_(before)
    torch.cuda.set_rng_state(state)
    return graph.replay, inputs, out, gradients


def metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) on the device: loss summed over images, correct predictions, images. No sync.

    labels (B,), or (B, K) of which the largest counts.
    """
    labels = labels.argmax(1) if labels.dim() == 2 else labels
    right = (logits.detach().argmax(1) == labels).sum()
    loss = loss.detach().float()
    return torch.stack([loss * len(labels), right.float(), torch.full_like(loss, len(labels))])


def end_epoch(run: Run, epoch: int, history: list, data: common.Data, *attack) -> None:
    """Read the steps' `metrics` (no host sync before), validate, log, print, checkpoint.

    attack: eps, step_size and steps of the PGD on the held-out images; without it only clean. The
    epoch with the highest sum of their accuracies is kept as <stage>_best.pt; if there is an
    `average` (Average), it is what is validated and kept. A loss or weight that is not
    finite ends the run.
    """
    model, trained = run.parts["model"], final_model(run)
    steps = torch.stack(history).double()
    if common.world() > 1:
        dist.all_reduce(steps)
        for buffer in model.buffers():  # BatchNorm statistics: those of the first process
            dist.broadcast(buffer, 0)
    steps = steps.cpu()
    spent = time.monotonic() - run.started
    finite = torch.isfinite(steps[:, 0]).tolist()
    finite.append(torch.stack([p.isfinite().all() for p in model.state_dict().values()]).all())
    if not all(finite):
        where = f"{run.stage}, epoch {epoch + 1}, step {min(finite.index(False) + 1, len(steps))}"
        own = not run.stage.startswith("student") and hasattr(run.args, "teacher_lr")
        flag = "--teacher-lr" if own else "--lr"
        fail(f"{where}: not finite; try a lower {flag} ({run.dir} has the epochs before)")
    loss, right, images = steps.sum(0).tolist()
    row = {"stage": run.stage, "epoch": epoch + 1, "loss": loss / images}
    row |= {"train_acc": right / images, "images_per_second": images / spent}
    if not common.rank():
        row |= _validate(trained, data, *attack)
        if "trajectories" in run.parts:
            run.parts["trajectories"].record(epoch, trained, data, attack)
    if common.world() > 1:
        found = [row]
        dist.broadcast_object_list(found)
        (row,) = found
    run.seconds += time.monotonic() - run.started
    row["seconds"], run.row = run.seconds, row
    score, best = (sum(v for k, v in r.items() if k[:4] == "val_") for r in (row, run.best))
    if len(data.x_val) and (score > best or not run.best):
        run.best = row
        common.save_model(run.dir / f"{run.stage}_best.pt", trained, row)
    state = {"stage": run.stage, "epochs": epoch + 1, "row": row, "best": run.best}
    state["parts"] = {name: part.state_dict() for name, part in run.parts.items()}
    common.save_next(run.dir / "last.pt", state)
    _log(run, row)


def _validate(model: nn.Module, data: common.Data, *attack) -> dict:
    """{val_clean_acc, val_pgd<steps>_acc} on the held-out training images; {} if there are none."""
    if not len(data.x_val):
        return {}
    with common.evaluating(model):
        right = common.correct(model, data.x_val, data.y_val)
        row = {"val_clean_acc": right.double().mean().item()}
        if attack:
            parts = []
            for x, y in zip(data.x_val.split(500), data.y_val.split(500)):
                x_adv = common.pgd(model, common.to_float(x), y, *attack)
                parts.append(common.correct(model, x_adv, y))
            row[f"val_pgd{attack[2]}_acc"] = torch.cat(parts).double().mean().item()
    return row


def cosine(optimizer, steps: int, warm_up: int):
    """A schedule by steps: linear over `warm_up` steps to the optimizer's rate, a cosine to 0."""

    def factor(step):
        done = (step - warm_up) / max(steps - warm_up, 1)
        return (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * done)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Average(nn.Module):
    """The exponential moving average of a net's weights: update_parameters(model) after a step.

    The first step copies; step t = 1, 2, ... makes it d average + (1 - d) weights, with the ramp
    d = min(decay, (1 + t) / (10 + t)) of Rebuffi et al. (2021). BatchNorm statistics: the model's.
    torch.optim.swa_utils.AveragedModel would make the host wait for CUDA in every step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model), decay
        self.register_buffer("n_averaged", torch.tensor(0))  # stays on the host

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        t = int(self.n_averaged)
        d = min(self.decay, (1 + t) / (10 + t)) if t else 0.0
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()], 1 - d)
        torch._foreach_copy_([*self.module.buffers()], [*model.buffers()])
        self.n_averaged += 1


def final_model(run: Run) -> nn.Module:
    """What the stage trains for: its model, or the average of the model's weights."""
    return run.parts["average"].module if "average" in run.parts else run.parts["model"]


def _log(run: Run, row: dict) -> None:
    if not common.rank():
        with open(run.log, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # when the stage is over, nothing else has the row
    for key, value in row.items():
        if run.writer is not None and isinstance(value, float):
            run.writer.add_scalar(f"{row['stage']}/{key}", value, row["epoch"])
    run.left = round((run.total - row["epoch"]) * run.seconds / row["epoch"])
    text = f"loss {row['loss']:.4f}"
    for key in row:
        if key.endswith("_acc"):
            text += f"  {key.removesuffix('_acc').replace('_', ' ')} {row[key]:.4f}"
    run.show(row["epoch"], f"{text}  {row['images_per_second']:,.0f} images/s", end="\n")


# ------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each has a share of every batch, the first one writes


def _join(device: torch.device) -> None:
    """Join the other processes: gloo on CPUs, NCCL on GPUs; alone nothing happens."""
    if common.world() > 1 and not dist.is_initialized():
        wait = datetime.timedelta(days=7)  # while the first one validates and evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
        atexit.register(dist.destroy_process_group)


def sync() -> None:
    """Wait for the other processes; alone nothing happens."""
    if common.world() > 1:
        dist.barrier()


def _sum_gradients(run: Run) -> None:
    """Before optimizer.step(): the gradient of the whole batch in every process.

    The sum of the gradients by the share of images, in one transfer: equal to one process with the
    whole batch, whatever the number of processes, but for BatchNorm, which sees the share alone.
    DistributedDataParallel would wrap the net: the attack and the two forwards of a step on x and
    x' do not go through it, and it takes shares for equal.
    """
    grads = [p.grad for group in run.parts["optimizer"].param_groups for p in group["params"]]
    grads = [grad for grad in grads if grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) * run.share
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))


def save_model(run: Run, stage: str, model: nn.Module, meta: dict) -> None:
    """common.save_model to <stage>.pt of the run's folder; all processes find it there after."""
    kept = {"settings": run.settings} if stage.startswith("teacher") else {}
    common.save_model(run.dir / f"{stage}.pt", model, meta | kept)
    sync()


# ------------------------------------------------------------------------------------------------
# Teachers


def find_model(run: Run, file: str, settings) -> Path | None:
    """`file` in this or another run folder of the script whose flags give the same settings.

    settings: dict of flags -> what of them the file depends on. A file of another script counts if
    it was trained with equal settings, which save_model has kept: a plain teacher is trained once.
    """
    mine = settings(run.flags)
    for path in [run.dir / file, *sorted(run.dir.parent.glob(f"*/{file}"))]:
        with contextlib.suppress(OSError, *MALFORMED):
            theirs = json.loads((path.parent / "config.json").read_text())
            same = settings(theirs["flags"]) == mine and theirs["fingerprint"] == run.fingerprint
            if same and path.exists():
                return path
    for path in sorted(run.dir.parent.parent.glob(f"*/*/{file}")):
        with contextlib.suppress(SystemExit, OSError), contextlib.redirect_stderr(io.StringIO()):
            if common.load(path)["meta"].get("settings") == _kept(run, mine):
                return path
    return None


def _kept(run: Run, settings: dict) -> str:
    text = json.dumps([run.fingerprint, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def get_teacher(run: Run, data: common.Data, settings, train, file="teacher.pt"):
    """-> (teacher in eval mode and frozen, its meta): `file` of the run's folder.

    If it is not there, it is a copy of --teacher-ckpt or of one in another run with the same
    `settings` (see find_model), perhaps kept there after as many epochs, or train() writes it.
    """
    own = run.dir / file
    if not own.exists():
        path = run.args.teacher_ckpt or find_model(run, file, settings)
        kept = f"{own.stem}-ep{settings(run.flags).get('epochs')}.pt"
        path = path or find_model(run, kept, lambda flags: settings(flags) | {"epochs": None})
        if path:
            common.load_model(path, "cpu", data)  # an error before anything is copied
            print(f"{own.stem}: taken from {path}", flush=True)
            sync()  # all have seen that it was not there
            common.write_atomically(own, lambda out: out.write(Path(path).read_bytes()))
            sync()
        else:
            run.settings = _kept(run, settings(run.flags))
            train()
    teacher, meta = common.load_model(own, run.device, data)
    if run.args.compile:
        teacher.compile(dynamic=False)
    return teacher.requires_grad_(False), meta


def choose_teacher(run: Run, data: common.Data, settings, train):
    """get_teacher of the most accurate of the teachers of seeds 0 to --teacher-seeds - 1.

    By --pick-teacher: on held-out training images, or on the test images as some papers do.
    These teachers are the same for all students; --method teacher is about that of --seed.
    settings: as for get_teacher, without a seed; train(seed) writes teacher<seed>.pt.
    """
    seeds, on = range(run.args.teacher_seeds), run.args.pick_teacher
    if run.args.method == "teacher":
        seeds = [run.args.seed]

    def choose():
        x, labels = (data.x_test, data.y_test) if on == "test" else (data.x_val, data.y_val)
        files, scores = [run.dir / f"teacher{seed}.pt" for seed in seeds], []
        for seed, file in zip(seeds, files):
            teacher, _ = get_teacher(run, data, settings, lambda: train(seed), file.name)  # noqa: B023
            if len(seeds) > 1:
                with common.evaluating(teacher):
                    scores.append(common.correct(teacher, x, labels).double().mean().item())
                print(f"teacher of seed {seed}: {on} accuracy {scores[-1]:.4f}", flush=True)
        best = files[scores.index(max(scores))] if scores else files[0]
        save_copy = lambda out: out.write(best.read_bytes())  # noqa: E731
        sync()
        common.write_atomically(run.dir / "teacher.pt", save_copy)
        sync()

    def chosen(flags):  # what teacher.pt depends on
        names = ["teacher_seeds", "pick_teacher", "test_subset"]
        if flags["method"] == "teacher":
            names.append("seed")
        return settings(flags) | {name: flags[name] for name in names}

    return get_teacher(run, data, chosen, choose)


@torch.no_grad()
def teacher_table(teacher: nn.Module, data: common.Data, run: "Run", epochs: int, cache: dict):
    """float32 (N x views, K): logits of an unchanging teacher for every crop and flip; or None.

    By --teacher-table; auto: if students of that many epochs, of all --seeds, look at an image more
    often than it has views, and a quarter of the memory is enough. `batches` says which rows
    belong to a batch. cache: what the seeds share, at first {}.
    """
    if "table" in cache:
        return cache["table"]
    ways = (len(data.x_train), 2 * data.pad + 1, 2 * data.pad + 1, 1 + data.flip)
    views, size, device = math.prod(ways[1:]), 4 * math.prod(ways) * len(data.classes), run.device
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else memory
    epochs *= len(run.args.seeds or [0])
    use = {"yes": True, "no": False, "auto": epochs > views and 4 * size < memory}
    use, cache["table"] = use[run.args.teacher_table], None
    sizes = f"{views} views of an image in {epochs} epochs; {size / 1e6:,.0f} MB"
    print(f"teacher's logits: {'from a table' if use else 'live'} ({sizes})", flush=True)
    if use:
        table = cache["table"] = torch.empty(math.prod(ways), len(data.classes), device=device)
        for rows in torch.arange(len(table), device=device).split(1024):
            # torch.unravel_index makes the host wait for CUDA
            plan = torch.stack([rows // math.prod(ways[i + 1 :]) % k for i, k in enumerate(ways)])
            with autocast(run):
                table[rows] = teacher(common.cut(data, data.x_padded, plan))
    return cache["table"]


# ------------------------------------------------------------------------------------------------
# Evaluation and summary


def check_evaluation(args: argparse.Namespace, data: common.Data) -> None:
    """An error before the training if --pick-teacher or --eval could not be done after it."""
    if args.teacher_seeds > 1 and args.pick_teacher == "val" and not len(data.x_val):
        fail("--pick-teacher val: needs held-out images, --val-size above 0")
    if args.eval == "full" and data.x_test.shape[1:] != (32, 32, 3):
        fail(f"--eval full: needs colour images of 32 x 32, {data.name} has others")


def best_epoch(run: Run) -> dict:
    """{row of the summary: student_best.pt}, if another epoch than the last is best; else {}."""
    meta, row = common.load(run.dir / "student.pt")["meta"], "student, best on held-out images"
    last = meta["best"].get("epoch", meta["epoch"]) == meta["epoch"]
    return {} if last else {row: run.dir / "student_best.pt"}


def evaluate_files(run: Run, files: dict, evaluation) -> list[dict]:
    """{name: saved model} -> rows of the summary; evaluation: the module eval_robustness.

    All its numbers are in evaluation.json, its tables in evaluation.txt; it goes on if stopped.
    """
    args, names = run.args, "eps step_size restarts seed data data_root device"
    flags = [*files.values(), "--json", run.dir / "evaluation.json"]
    flags += ["--attack", "clean", f"pgd{args.eval_steps}"]
    if args.eval == "full":
        flags += ["pgd10", "pgd15", "corruptions", "calibration"]
        flags += [name for name in ("cinic", "ood") if getattr(args, name)]
        names += " corruptions cinic cinic_per_class ood"
    for name in names.split():
        value = getattr(args, name)
        flags += [f"--{name.replace('_', '-')}", value] * (value is not None)
    flags += ["--n", args.test_subset] * bool(args.test_subset)
    print(f"evaluating {', '.join(files)}: {run.dir / 'evaluation.txt'}", flush=True)
    if not common.rank():
        with open(run.dir / "evaluation.txt", "w") as out, contextlib.redirect_stdout(out):
            evaluation.run(evaluation.parse_args([str(flag) for flag in flags]))
    sync()
    found = json.loads((run.dir / "evaluation.json").read_text())["rows"]
    rows = []
    for name, row in zip(files, found):
        meta = common.load(files[name])["meta"]
        rows.append({"model": name} | {k: v for k, v in row.items() if k.endswith("_acc")})
        rows[-1] |= {"epochs": meta.get("epoch"), "seconds": meta.get("seconds")}
    return rows


def across_seeds(runs: list[Run]) -> None:
    """Show mean +- standard deviation (n - 1) of the summaries of runs that differ by seed."""
    summaries, rows = [_rows(run)[-1]["summary"] for run in runs], []
    for first in summaries[0] if len(runs) > 1 else ():
        same = [row for rows_ in summaries for row in rows_ if row["model"] == first["model"]]
        if len(same) < len(runs):  # a best epoch that is not the last has a row of its own
            continue
        rows.append(dict(first))
        for key in first:
            values, digits = [row.get(key) for row in same], 4 if "_acc" in key else 1
            if None in values:  # of a seed whose net is never wrong, or never right
                rows[-1][key] = None
            elif isinstance(first[key], float):
                mean, std = np.mean(values), np.std(values, ddof=1)
                rows[-1][key] = f"{mean:.{digits}f} +- {std:.{digits}f}"
    if rows:
        print(f"\nmean +- std of seeds {' '.join(str(run.args.seed) for run in runs)}")
        print(common.table(rows), flush=True)
