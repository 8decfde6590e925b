"""What the scripts share: data, models, attacks, files and, last, what a run needs.

Images   uint8 (N, H, W, C) on the device; a batch is float32 (B, C, H, W) in [0, 1], channels_last.
Models   take images in [0, 1], normalise inside, return float32 logits (B, K), as attacks expect.
Attacks  differentiate with respect to the input alone; the caller sets the model's mode.
Files    are written whole or not at all, and read without running what they hold.
Runs     runs/<script>/<name>-s<seed>/ holds config.json, log.jsonl, the models and summary.json;
         runs/teachers/<digest>/ holds each teacher once, for all runs with the same flags.

Importing this file does nothing: no CUDA, seed or download; torchvision is imported by the loaders.
When you copy a script into a project of your own, leave out the last section, "A run", and put your
project's own folders, logs and checkpoints in the place of its functions that `train` calls.
"""

import argparse
import ast
import atexit
import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# Errors, and how a program ends


class UserError(Exception):
    """Something that the user can mend: a flag, a file, the data. The message is one line.

    It names the flag or the file, the value that was given, and what to do. Functions raise it;
    `start`, the outermost function of every program, prints it and exits with status 2.
    """


def start(main, stopped="finished epochs are kept; the same command goes on:") -> None:
    """Run main() as a program, without a traceback for anything that a user can cause.

    Exit status: 2 after a UserError, a file system error or a full GPU memory; 130 after Ctrl-C;
    143 after SIGTERM; 141 when the reader of the output has gone (`| head`). `stopped` is printed
    after Ctrl-C, SIGTERM and a file system error, followed by the command.

    Under torchrun a process that fails ends at once. When the interpreter ends, the group is
    destroyed (setup_device), and NCCL's waits for the other processes, which may wait for this one.
    """
    try:
        _run_as_program(main, stopped)
    except BaseException as error:
        if world() == 1:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) else 1)


def _run_as_program(main, stopped):
    """start, but for the end of a process under torchrun."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal cannot print is escaped
            stream.reconfigure(errors="backslashreplace")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the first process prints everything)
    signal.signal(signal.SIGTERM, _raise_on_sigterm)
    try:
        main()
        sys.stdout.flush()  # at the interpreter's exit it would be too late to catch the error
    except KeyboardInterrupt as stop:
        print(f"\nstopped; {stopped}\n{command_line()}", file=sys.stderr)
        raise SystemExit(143 if stop.args else 130) from None
    except UserError as error:
        exit_with_error(str(error))
    except torch.OutOfMemoryError as error:
        exit_with_error(f"the GPU has too little memory; take a smaller --batch-size ({error})")
    except OSError as error:
        # Python flushes standard output once more at exit: into nothing
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if isinstance(error, BrokenPipeError):
            os.dup2(null, 2)  # perhaps the same pipe
            raise SystemExit(141) from None
        name = error.filename or "standard output"
        exit_with_error(f"{name}: {error.strerror or error}; {stopped} {command_line()}")
    except Exception as error:  # those of torch.compile are not all RuntimeErrors
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            reason = str(error).split("Set TORCH")[0]
            exit_with_error(f"--compile: {reason}; the same command goes on without --compile")
        if world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            exit_with_error(f"process {rank()}: another process has ended; start all of them again")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            exit_with_error(f"too little memory; take a smaller net or fewer images ({error})")
        raise


@contextlib.contextmanager
def naming(path):
    """A file system error inside that names no file, such as a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def exit_with_error(message: str):
    """Print `error: message` as one line on stderr and exit with status 2."""
    line = " ".join(message.split())
    # names in foreign files may hold control characters of a terminal
    line = "".join(c if c.isprintable() else "?" for c in line)
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def _raise_on_sigterm(number, frame):
    raise KeyboardInterrupt("SIGTERM")


def command_line() -> str:
    """The command that started this program, to be typed again."""
    python = Path(sys.executable)
    if Path.cwd() in python.parents:
        python = python.relative_to(Path.cwd())
    torchrun = []
    if world() > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(world())]
    return shlex.join([str(python), *torchrun, *sys.argv])


def print_line(text: str, live: bool = False) -> None:
    """Print a line. With `live`, only on a terminal, and the next line is printed over it."""
    terminal = sys.stdout.isatty()
    if live and not terminal:
        return
    if live:
        text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps stays
    if terminal:
        text = f"\r\x1b[2K{text}"  # go to the start of the line and clear it
    print(text, end="" if live else "\n", flush=True)


# ------------------------------------------------------------------------------------------------
# Flags


def number_in(low: float, high: float, expected: str):
    """A `type=` of argparse: a number or a fraction like 8/255, from low to high."""

    def convert(text):
        try:
            value = float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def whole_from(low: int):
    """A `type=` of argparse: a whole number of at least `low`."""

    def convert(text):
        if not re.fullmatch(r"\d{1,12}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low}, got {text!r}"
            )
        return int(text)

    return convert


LARGEST = 1e15  # its square is far from the largest float32, 3.4e38
SMALLEST = sys.float_info.min
nonnegative = number_in(0, LARGEST, f"a number or a fraction between 0 and {LARGEST:g}")
positive = number_in(SMALLEST, LARGEST, f"a number above 0, at most {LARGEST:g}")
decay = number_in(SMALLEST, 1, "a number above 0, at most 1")
probability = number_in(0, 1, "a number or a fraction between 0 and 1")
pixel_step = number_in(SMALLEST, 1, "a number in pixel units above 0, at most 1, like 2/255")
pixel_units = number_in(0, 1, "a number in pixel units between 0 and 1, like 8/255")
below_1 = number_in(0, math.nextafter(1, 0), "a number of at least 0 and below 1")
whole, whole_or_0 = whole_from(1), whole_from(0)
at_least_2 = whole_from(2)  # images: BatchNorm may be unable to train on one
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}  # --flag and --no-flag


class HelpLayout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written; each flag with its default, unless that is None."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UserError."""

    def __init__(self, doc: str, **options):
        super().__init__(
            usage="python %(prog)s [flags]",
            description=doc,
            formatter_class=HelpLayout,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As in argparse, but an empty value, such as that of "$UNSET", is a UserError."""
        args = super().parse_args(args, namespace)
        for key, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{key.replace('_', '-')}: its value is empty")
        return args

    def error(self, message: str):
        """Raise the UserError `message`; argparse calls it too."""
        raise UserError(re.sub(r"^argument (\S+?)(/\S+)?:", r"\1:", message))


# ------------------------------------------------------------------------------------------------
# Random numbers, device, processes


def derive_seed(*parts) -> int:
    """A 63-bit seed that depends on all `parts` (numbers and strings) and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def seed_generators(*parts) -> None:
    """Seed those of torch, numpy and Python by derive_seed; a net of your own may use any."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def find_device(name: str) -> torch.device:
    """The device of --device: "cpu", "cuda", or "auto" for CUDA if it is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here; --device cpu works anywhere")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world() == 1:
        return torch.device("cuda")
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        there = f"there are {torch.cuda.device_count()} CUDA devices here"
        raise UserError(f"LOCAL_RANK {index}: {there}; start as many processes with torchrun")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def set_float32(tf32_convolutions: bool = False) -> None:
    """float32 is IEEE float32 everywhere, or but for convolutions on CUDA, which may be in TF32.

    Set by operation, since a model from elsewhere may have set torch.backends.fp32_precision, and
    by PyTorch's old switches too: it refuses to read those that contradict the new ones, as
    torch.compile and torch.backends.cudnn.flags do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the old switches deprecated
        torch.backends.cudnn.allow_tf32 = tf32_convolutions
        torch.set_float32_matmul_precision("highest")
    for operation in float32_operations():
        operation.fp32_precision = "ieee"
    if tf32_convolutions:
        for operation in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            operation.fp32_precision = "tf32"


def float32_operations() -> list:
    """PyTorch's switches of the precision of float32: of each kind of operation, CUDA and CPU."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    cuda = torch.backends.cuda
    return [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]


@contextlib.contextmanager
def float32_restored():
    """Put the float32 precision settings and cudnn.benchmark back after the block."""
    benchmark = torch.backends.cudnn.benchmark
    before = [operation.fp32_precision for operation in float32_operations()]
    convolutions = products = None
    with contextlib.suppress(RuntimeError):  # the caller's old and new switches contradict
        convolutions = torch.backends.cudnn.allow_tf32
        products = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if convolutions is not None:
                torch.backends.cudnn.allow_tf32 = convolutions
            if products is not None:
                torch.set_float32_matmul_precision(products)
        for operation, precision in zip(float32_operations(), before):
            operation.fp32_precision = precision


def world() -> int:
    """The number of processes that torchrun has started for this run; 1 without torchrun.

    Another job may leave WORLD_SIZE and RANK behind; TORCHELASTIC_RUN_ID torchrun alone sets.
    """
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The number of this process among them; process 0 writes the files and prints."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def sync() -> None:
    """Wait for the other processes; without torchrun nothing happens."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block while the others wait; then the others run it."""
    if rank() > 0:
        sync()
    yield
    if rank() == 0:
        sync()


# ------------------------------------------------------------------------------------------------
# Data


@dataclasses.dataclass
class Data:
    """Images uint8 (N, H, W, C) and labels int64 (N,) on the device; `val` was cut from `train`."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    mean: list[float]  # per channel, of the training images in [0, 1]: the models normalise with it
    std: list[float]
    fingerprint: int  # CRC-32 of these images and labels, whatever --test-subset is
    pad: int = 0  # augmentation: a random crop after padding with this many zeros, ...
    flip: bool = False  # ... and a random horizontal flip
    x_extra: Tensor | None = None  # generated images, for --extra-data of robust_kd.py
    y_extra: Tensor | None = None


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("disc", "ring", "square", "frame", "triangle", "diamond", "plus", "cross", "bar", "pole")
CLASS_NAMES = {"cifar10": list(CIFAR10), "shapes": list(SHAPES)}
DATA_NAMES = "cifar10, cifar100, mnist, tiny-imagenet, shapes, FILE.npz or FOLDER"


def load_data(
    name,
    root="data",
    device="cpu",
    val_size=0,
    train_subset=None,
    test_subset=None,
    augment=None,
    runs="runs",
) -> Data:
    """-> Data, by name, from an .npz file or from a folder; prints a line on what is in them.

    A name is looked for in <root>/<name>.npz, then in torchvision's files below root, then
    downloaded by torchvision (checksummed) and kept as that .npz; benchmark/prepare.py makes
    tiny-imagenet.npz; shapes are drawn by code. An .npz holds x_train, y_train, x_test, y_test
    (images uint8 (N, S, S, 3) or (N, S, S), labels 0..K-1 of any integer type, (N,) or (N, 1)) and
    perhaps `classes`. A folder holds train/<class>/* and test/<class>/* (or val/), images of one
    size. Where root is read-only, converted files go to
    <runs>/data. Held-out images and subsets are the same for every seed. augment: "crop" for random
    crops and flips, "none" for the images as they are, any other word and None for crops and flips
    of colour images alone: grey ones, such as digits, stay as they are. Raises UserError.
    """
    arrays = read_data(name, Path(root), runs)
    x, y = check_images(name, "train", arrays)
    x_test, y_test = check_images(name, "test", arrays)
    classes = arrays.get("classes") or CLASS_NAMES.get(name)
    if not classes:
        classes = [str(k) for k in range(y.max() + 1)]
    if x.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{name}: training images {x.shape[1:]}, test images {x_test.shape[1:]}")
    if max(y.max(), y_test.max()) >= len(classes):
        raise UserError(
            f"{name}: labels reach {max(y.max(), y_test.max())}, classes {len(classes)}"
        )
    present = np.unique(y)
    if len(present) == 1:
        one = f"all training images are of one class, {classes[present[0]]}"
        raise UserError(f"{name}: {one}; there must be two classes or more")
    there = f"{name} has {len(x)} training and {len(x_test)} test images"
    if val_size + (train_subset or 2) > len(x):  # see at_least_2
        flags = f"--val-size {val_size}"
        if train_subset is not None:
            flags += f" and --train-subset {train_subset}"
        advice = "take smaller numbers (--val-size is 1024 by default, 0 holds out none)"
        raise UserError(f"{flags}: too large; {there}; {advice}")
    if (test_subset or 1) > len(x_test):
        raise UserError(f"--test-subset or --n {test_subset}: too large; {there}")
    grey = x.shape[3] == 1 or all((image == image[..., :1]).all() for image in x)
    print(describe_data(name, x, y, x_test, classes, grey, arrays.get("left_out", 0)), flush=True)
    order = np.random.default_rng(0).permutation(len(x))
    val = order[:val_size]
    train = np.sort(order[val_size:][:train_subset])
    test = np.sort(np.random.default_rng(0).permutation(len(x_test))[:test_subset])
    fingerprint = 0
    for part in (x[train], y[train], x[val], y[val], x_test, y_test):
        fingerprint = zlib.crc32(np.ascontiguousarray(part), fingerprint)
    mean, std = channel_statistics(x)
    augmented = augment == "crop" or (augment != "none" and not grey)
    return Data(
        name,
        *(torch.from_numpy(part).to(device) for part in (x[train], y[train], x[val], y[val])),
        *(torch.from_numpy(part).to(device) for part in (x_test[test], y_test[test])),
        classes=classes,
        mean=mean,
        std=std,
        fingerprint=fingerprint,
        pad=4 if augmented else 0,
        flip=augmented,
    )


def describe_data(name, x, y, x_test, classes, grey, left_out) -> str:
    """One line on what was found: images, classes, and what a reader may not expect."""
    counts = np.bincount(y, minlength=len(classes))
    text = f"{name}: {len(x):,} training and {len(x_test):,} test images of {x.shape[1]} x "
    text += f"{x.shape[2]} pixels, {'grey' if grey else 'colour'}; {len(classes)} classes "
    text += f"({first_names(classes)}) of {counts.min():,} to {counts.max():,} training images"
    empty = [classes[k] for k in np.flatnonzero(counts == 0)]
    if empty:
        text += f"; no training image of {first_names(empty)}"
    for part, images in (("training", x), ("test", x_test)):
        if images.max() < 128:
            text += f"; no pixel of the {part} images above {images.max()}, where 255 is white"
    if left_out:
        text += f"; {left_out:,} other files left out"
    if grey:
        text += "; random crops and flips with --augment crop alone"
    return "".join(c if c.isprintable() else "?" for c in text)


def first_names(names: list[str], most: int = 10) -> str:
    """The first names, then "..." if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def channel_statistics(x) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 (N, H, W, C), as of [0, 1].

    From integer counts of the grey levels, so that every machine gets the same numbers. The
    standard deviation of a channel that never varies is given as 1.
    """
    levels = np.arange(256) / 255
    channels = torch.from_numpy(x).flatten(0, 2).T
    counts = np.stack([torch.bincount(channel, minlength=256).numpy() for channel in channels])
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    return mean.tolist(), np.where(std > 0, std, 1).tolist()


def read_data(name: str, root: Path, runs) -> dict:
    """{x_train, y_train, x_test, y_test, perhaps classes, left_out} of load_data, numpy arrays."""
    if name == "shapes":
        return make_shapes()
    if name.endswith(".npz"):
        return read_npz(Path(name))
    if name in ("cifar10", "cifar100", "mnist", "tiny-imagenet"):
        path = root / f"{name}.npz"
        if not path.exists():
            path = writable_folder(root, runs) / path.name
        if not path.exists():
            if name == "tiny-imagenet":
                advice = "benchmark/prepare.py makes it from the unpacked zip"
                raise UserError(f"--data {name}: there is no {path}; {advice}")
            print(f"{path} is not there: taking {name} from torchvision", flush=True)
            arrays = read_torchvision(name, root, path.parent)
            write_atomically(path, lambda file: np.savez(file, **arrays))
        return read_npz(path)
    if Path(name).is_dir():
        return read_folder(Path(name))
    raise UserError(f"--data: expected {DATA_NAMES}, got {name!r}")


def writable_folder(folder: Path, runs) -> Path:
    """The folder itself or, if it is read-only, <runs>/data, and a line that says so."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return folder
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    print(f"{folder} is read-only: converted data are kept in {Path(runs) / 'data'}", flush=True)
    return Path(runs) / "data"


def check_images(name: str, part: str, arrays: dict):
    """The images of a part as uint8 (N, S, S, C) and its labels as int64 (N,); or a UserError."""
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.ndim == 3:
        x = x[..., None]
    if y.ndim == 2 and y.shape[1] == 1:  # as many tools keep labels
        y = y[:, 0]
    square = x.ndim == 4 and x.shape[1] == x.shape[2] and x.shape[3] in (1, 3)
    if x.dtype != np.uint8 or not square or not x.size:
        wanted = "uint8 (N, S, S, 3) or (N, S, S)"
        advice = ""
        if x.dtype != np.uint8:
            advice = "; scale to 0 to 255, round and convert to uint8"
        raise UserError(f"{name}: x_{part} must be {wanted}, got {describe_array(x)}{advice}")
    if x.max() == 1:
        raise UserError(f"{name}: x_{part} holds 0 and 1 alone, but 255 is white; multiply by 255")
    if not are_labels(y, len(x), 100_000):
        got = f"{len(x)} labels 0..K-1, got {describe_array(y)}"
        raise UserError(f"{name}: y_{part} must be {got}; convert them to whole numbers from 0 on")
    return np.ascontiguousarray(x), y.astype(np.int64)


def describe_array(array) -> str:
    """Type, shape and range of an array, as a part of an error."""
    text = f"{array.dtype} {array.shape}"
    if array.dtype.kind in "biuf" and array.size:
        text += f" from {array.min():g} to {array.max():g}"
    return text


def are_labels(y, n: int, classes: int) -> bool:
    """Whether y is an array of n whole numbers 0..classes-1, at least one of them."""
    whole = y.shape == (n,) and n > 0 and y.dtype.kind in "iu"
    return whole and 0 <= y.min() <= y.max() < classes


def read_npz(path: Path, needed=("x_train", "y_train", "x_test", "y_test")) -> dict:
    """The arrays `needed` and the class names of an .npz file; pickles in it are not loaded."""
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: no such file")
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            missing = sorted(set(needed) - set(file.files))
            if missing:
                raise ValueError(f"it has no array {missing[0]}")
            arrays = {key: np.asarray(file[key]) for key in needed}
            if "classes" in file.files:
                names = np.atleast_1d(file["classes"])
                if names.dtype.kind == "U":  # numpy takes any 4 bytes for a letter
                    letter = np.dtype("u4").newbyteorder(names.dtype.byteorder)
                    letters = np.frombuffer(names.tobytes(), letter)
                    if letters.max(initial=0) > sys.maxunicode:
                        raise ValueError("the names in its array classes are no text")
                arrays["classes"] = [
                    name.decode() if isinstance(name, bytes) else str(name) for name in names
                ]
            return arrays
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        reason = str(error)[:200]
        raise UserError(
            f"{path}: expected an .npz file with {', '.join(needed)} ({reason})"
        ) from None


def read_torchvision(name: str, root: Path, writable: Path) -> dict:
    """The arrays of a torchvision data set, downloaded if need be (checked before it is read).

    It is read from root, or else from the folder `writable`, into which it is downloaded.
    """
    from torchvision import datasets

    dataset_class, arrays, reasons = getattr(datasets, name.upper()), {}, []
    for folder in dict.fromkeys((root, writable)):
        try:
            for part in ("train", "test"):
                dataset = dataset_class(folder, train=part == "train", download=True)
                arrays[f"x_{part}"] = np.asarray(dataset.data)
                arrays[f"y_{part}"] = np.asarray(dataset.targets)
                # MNIST has "0 - zero"
                arrays["classes"] = [c.split(" - ")[0] for c in dataset.classes]
            return arrays
        except Exception as error:  # of the network, or what a damaged file makes torchvision raise
            reasons.append(f"{folder}: {error}")
    advice = f"put {name}.npz into {root}, or let torchvision download it"
    raise UserError(f"--data {name}: {advice} ({'; '.join(reasons)})")


def read_folder(folder: Path) -> dict:
    """The arrays of train/ and test/ (or val/) with a folder of images for each class."""
    arrays = {}
    test_name = "test" if (folder / "test").is_dir() else "val"
    for part, subfolder in (("train", folder / "train"), ("test", folder / test_name)):
        arrays_of_part = read_class_folders(subfolder)
        if arrays.setdefault("classes", arrays_of_part["classes"]) != arrays_of_part["classes"]:
            raise UserError(f"{folder}: train and {test_name} have different class folders")
        arrays[f"x_{part}"], arrays[f"y_{part}"] = arrays_of_part["x"], arrays_of_part["y"]
    arrays["left_out"] = len(visible_files(folder)) - len(arrays["y_train"]) - len(arrays["y_test"])
    return arrays


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what programs leave behind: .DS_Store, .ipynb_checkpoints, ..."""
    return name.startswith(".") or name == "__MACOSX"


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones and what is in hidden folders."""
    files = []
    for root, _, names in sorted(os.walk(folder)):
        if not any(is_hidden(part) for part in Path(root).relative_to(folder).parts):
            files += [Path(root, name) for name in sorted(names) if not is_hidden(name)]
    return files


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".webp")


def list_class_folders(folder: Path, is_wanted=None):
    """-> (image files, labels (N,), classes) of a folder of class folders, none of them read.

    is_wanted(path): whether a file counts; None: all images. Hidden files and folders never do.
    """
    files, labels = [], []
    try:
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link")
        entries = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
        classes = sorted(path.name for path in entries)
        if not classes:
            raise ValueError("there are none")
        for k, name in enumerate(classes):
            images = visible_files(folder / name)
            if is_wanted is None:
                images = [path for path in images if path.suffix.lower() in IMAGE_SUFFIXES]
            else:
                images = [path for path in images if is_wanted(path)]
            if not images:
                raise ValueError(f"no image in {name}; formats: {' '.join(IMAGE_SUFFIXES)}")
            files += images
            labels += [k] * len(images)
    except (OSError, ValueError) as error:
        expected = "expected class folders with images in each of them"
        raise UserError(f"{folder}: {expected} ({error})") from None
    return files, np.array(labels), classes


def read_class_folders(folder: Path) -> dict:
    """{x: uint8 (N, H, W, 3), y: labels (N,), classes} of a folder of class folders."""
    files, labels, classes = list_class_folders(folder)
    return {"x": read_images(files), "y": labels, "classes": classes}


def read_images(files: list[Path]):
    """Image files of one size as uint8 (N, H, W, 3)."""
    if not files:
        raise UserError("no images")
    images = [read_image(files[0])]
    for file in files[1:]:
        images.append(read_image(file))
        if images[-1].shape != images[0].shape:
            size = f"an image of {images[-1].shape}; the first one has {images[0].shape}"
            raise UserError(f"{file}: {size}")
    return np.stack(images)


def read_image(file: Path):
    """An image file as uint8 (H, W, 3)."""
    from PIL import Image

    try:
        if not file.is_file() or file.is_symlink():  # reading a pipe would block
            raise ValueError("no file, or a link")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decompression bombs, which are refused below
            # these formats alone: Pillow reads EPS by starting another program
            with Image.open(file, formats=("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")) as image:
                if image.width * image.height > 2**24:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return pixels(image)
    except Exception as error:  # the decoders raise whatever comes
        raise UserError(f"{file}: not a readable image ({str(error)[:200]})") from None


def pixels(image):
    """A Pillow image as uint8 (H, W, 3); a ValueError where its values have no certain meaning.

    16 bits become the upper 8, for grey images as Pillow does for colour ones.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError("it holds several images; save one")
    image.load()  # which turns a TIFF as its orientation asks
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # it is damaged; the pixels need not be
        orientation = None
    if orientation in range(2, 9):
        raise ValueError("EXIF asks to turn or mirror it, and not all programs do; save it upright")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits, 262 what black is, 339 the format
    signed, white_is_zero = 2 in tags.get(339, ()), tags.get(262) == 0
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if deep and not signed and not white_is_zero and "transparency" not in image.info:
        bits = tags.get(258, (16,))[0]
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if deep or signed or image.mode in ("I", "F"):
        raise ValueError("black and white of its depth are not certain; convert it to 8 bits")
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise ValueError("it has transparent pixels; paint it on a background")
    return np.asarray(image.convert("RGB"))


def make_shapes(train: int = 4000, test: int = 1000, seed: int = 0) -> dict:
    """Ten classes of coloured shapes, 32x32, drawn by code: the data of --demo and of the tests.

    Each image has two cues for its class: the shape, and a faint grating of amplitude 8/255, which
    PGD can erase. Standard training takes that; adversarial training must learn the shape.
    """
    rng = np.random.default_rng(seed)
    n = train + test
    labels = np.arange(n) % 10
    y, x = np.mgrid[:32, :32] - 15.5
    size = rng.uniform(7.5, 11, (n, 1, 1))
    u, v = (x - rng.uniform(-4, 4, (n, 1, 1))) / size, (y - rng.uniform(-4, 4, (n, 1, 1))) / size
    a, b, r, box = abs(u), abs(v), np.hypot(u, v), np.maximum(abs(u), abs(v))
    # fmt: off
    masks = [
        r < 0.95, (r < 1.0) & (r > 0.6), box < 0.85, (box < 0.95) & (box > 0.6),  # disc ... frame
        (v > -0.9) & (v < 0.8) & (a < (v + 0.9) * 0.6), a + b < 1.1,  # triangle, diamond
        (np.minimum(a, b) < 0.27) & (box < 1.0), (abs(a - b) < 0.35) & (box < 0.9),  # plus, cross
        (b < 0.3) & (a < 1.0), (a < 0.3) & (b < 1.0),  # bar, pole
    ]
    # fmt: on
    mask = np.choose(labels[:, None, None], masks)[..., None]
    hue = (labels / 10 + rng.normal(0, 0.2, n))[:, None] + np.array([0, 1 / 3, 2 / 3])
    ink = 0.58 + 0.1 * np.cos(2 * np.pi * hue)[:, None, None]  # the hue leans to one per class
    ground = rng.uniform(0.25, 0.42, (n, 1, 1, 3))
    image = rng.normal(0, 0.05, (n, 32, 32, 3))  # changed in place: it is large
    image += np.where(mask, ink, ground)
    angle = labels[:, None, None] * np.pi / 20  # within a quarter turn: unchanged by a flip ...
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    grating = np.sin(1.8 * (np.cos(angle) * abs(x) + np.sin(angle) * y) + phase)  # ... as |x| is
    image += 8 / 255 * grating[..., None]
    image = np.rint(image.clip(0, 1, out=image) * 255).astype(np.uint8)
    train_part = {"x_train": image[:train], "y_train": labels[:train]}
    return train_part | {"x_test": image[train:], "y_test": labels[train:]}


def to_float(x: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [0, 1], channels_last; floats stay as is."""
    return x.permute(0, 3, 1, 2).float() / 255 if x.dtype == torch.uint8 else x.float()


def batch_bounds(n: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, last) of each batch of n images; the last batch may be smaller.

    A last batch of one image is joined to the batch before it: BatchNorm cannot train on it where
    it has one value per channel.
    """
    starts = list(range(0, n, batch_size))
    if n % batch_size == 1 and n > 1:
        starts.pop()
    return list(itertools.pairwise([*starts, n]))


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """The number of batches in an epoch."""
    return len(batch_bounds(len(data.x_train), batch_size))


def batches(data: Data, batch_size: int, seed: int, stage: str, epoch: int):
    """Yield (x, labels) over the shuffled and augmented training set, cut by `batch_bounds`.

    x float32 (B, C, H, W) in [0, 1]; labels int64 (B,). The draws depend on (seed, stage, epoch)
    alone, not on the device, the batch size or a global generator; all students of a seed see the
    same batches. The images are on the device already: a batch is one gather, an epoch one copy
    from the host. Under torchrun each process gets its share of every batch, or all of a batch in
    which a share would be a single image.
    """
    n, height, width = data.x_train.shape[:3]
    if not stage.startswith("student"):
        seed = derive_seed(seed, stage)
    generator = torch.Generator().manual_seed(derive_seed("batches", seed, epoch))
    order = torch.randperm(n, generator=generator)
    top = torch.randint(2 * data.pad + 1, (n,), generator=generator)
    left = torch.randint(2 * data.pad + 1, (n,), generator=generator)
    flip = torch.randint(1 + data.flip, (n,), generator=generator)
    plan = torch.stack([order, top, left, flip]).to(data.x_train.device)  # (4, N)
    padded = pad(data.x_train, data.pad)
    for first, last in batch_bounds(n, batch_size):
        share = slice(first + rank(), last, world())  # all of the batch without torchrun
        if last - first < 2 * world():
            share = slice(first, last)
        index = plan[0, share]
        yield crop(padded, *plan[:, share], height, width), data.y_train[index]
        print_line(f"{stage}, epoch {epoch + 1}: {last / n:.0%}", live=True)


def pad(x: Tensor, by: int) -> Tensor:
    """uint8 (N, H, W, C) with `by` rows and columns of zeros around each image."""
    return F.pad(x, (0, 0, by, by, by, by))


def crop(padded: Tensor, index, top, left, flip, height: int, width: int) -> Tensor:
    """Windows of padded images -> float32 (B, C, height, width) in [0, 1].

    padded uint8 (N, H, W, C); index, top, left, flip int64 (B,): which image, the window's corner,
    and 1 where it is mirrored.
    """
    rows = torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device)
    row = top[:, None] + rows  # (B, height)
    mirrored = torch.where(flip[:, None] == 1, width - 1 - columns, columns)
    column = left[:, None] + mirrored  # (B, width)
    return to_float(padded[index[:, None, None], row[:, :, None], column[:, None, :]])


# ------------------------------------------------------------------------------------------------
# Models


class Normalize(nn.Module):
    """(x - mean) / std per channel, x (B, C, H, W) in [0, 1]; the statistics are buffers."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def conv(in_channels, channels, kernel, stride=1):
    """A convolution without bias that keeps the size, but for its stride."""
    if kernel == 1 and stride > 1 and in_channels < 8:
        # the same numbers; on AVX2 oneDNN's strided kernel hangs here (uxlfoundation/oneDNN#6035)
        return nn.Sequential(nn.AvgPool2d(1, stride), conv(in_channels, channels, 1))
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


def norm_act(channels, act="relu"):
    """BatchNorm, then ReLU or SiLU."""
    activation = nn.SiLU() if act == "silu" else nn.ReLU(inplace=True)
    return nn.Sequential(nn.BatchNorm2d(channels), activation)


class PostActBlock(nn.Module):
    """Residual block with the last ReLU after the sum (He et al. 2015).

    Two 3x3 convolutions; with expansion 4 the bottleneck of ResNet-50: 1x1, 3x3, 1x1.
    """

    def __init__(self, in_channels, channels, stride, expansion=1):
        super().__init__()
        out = channels * expansion
        if expansion == 1:
            layers = [
                conv(in_channels, channels, 3, stride),
                *norm_act(channels),
                conv(channels, out, 3),
            ]
        else:
            layers = [
                conv(in_channels, channels, 1),
                *norm_act(channels),
                conv(channels, channels, 3, stride),
                *norm_act(channels),
                conv(channels, out, 1),
            ]
        self.residual = nn.Sequential(*layers, nn.BatchNorm2d(out))
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(conv(in_channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class PreActBlock(nn.Module):
    """BN-act-conv twice (He et al. 2016); a resizing shortcut starts after the first activation."""

    def __init__(self, in_channels, channels, stride, act="relu", dropout=0.0):
        super().__init__()
        self.norm1 = norm_act(in_channels, act)
        self.norm2 = norm_act(channels, act)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.conv2 = conv(channels, channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = conv(in_channels, channels, 1, stride)

    def forward(self, x):
        h = self.norm1(x)
        residual = self.conv2(self.dropout(self.norm2(self.conv1(h))))
        return residual + (x if self.shortcut is None else self.shortcut(h))


class ConvNet(nn.Module):
    """Normalise, 3x3 stem, stages of residual blocks, global average, linear: the ResNets."""

    def __init__(self, mean, std, stem, stages, stem_norm, head_norm, width, classes):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = nn.Sequential(conv(len(mean), stem, 3), *stem_norm)
        self.stages = nn.ModuleList(stages)
        self.head_norm = nn.Sequential(*head_norm)
        self.fc = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        h = self.stem(self.normalize(x))
        for stage in self.stages:
            h = stage(h)
        return self.fc(self.head_norm(h).mean((2, 3))).float()  # (B, K), float32 under autocast too


class MLP(nn.Module):
    """Normalised and flattened image, hidden ReLU layers of the given sizes, linear."""

    def __init__(self, mean, std, inputs, hidden, classes, dropout):
        super().__init__()
        layers = [Normalize(mean, std), nn.Flatten()]
        for a, b in zip([inputs, *hidden], hidden):
            layers += [nn.Linear(a, b), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], classes))

    def forward(self, x):
        return self.layers(x).float()


def check_model(flag: str, name: str, dropout: float = 0.0) -> None:
    """A UserError that names `flag` if build_model(name, dropout=...) is impossible."""
    if ":" in name:  # a net of your own; find_function has looked for it
        return
    wrn = re.fullmatch(r"wrn-([1-9]\d{1,2})-([1-9]\d?)(-silu)?", name)
    resnet = re.fullmatch(r"(resnet18|resnet50|preact-resnet18)(-w[1-9]\d{0,3})?(-silu)?", name)
    mlp = re.fullmatch(r"mlp(-[1-9]\d{0,4}){1,8}", name)
    if resnet and resnet[3] and resnet[1] != "preact-resnet18":
        resnet = None
    if not (wrn or resnet or mlp):
        names = "resnet18, resnet50, preact-resnet18, wrn-D-W, mlp-H-...-H or MODULE:FUNCTION"
        forms = "resnet18-w16, wrn-28-10-silu, mlp-1200-1200"
        raise UserError(f"{flag}: expected {names} ({forms}), got {name!r}")
    if wrn and int(wrn[1]) % 6 != 4:
        depths = "the depth of a WideResNet is 6n + 4 (10, 16, 22, 28, 34, 40)"
        raise UserError(f"{flag}: {depths}, got {name!r}")
    if dropout and resnet:
        raise UserError(f"{flag} {name}: a ResNet has no dropout; take a WideResNet or an MLP")


def build_model(
    name,
    classes=10,
    dropout=0.0,
    channels=3,
    size=32,
    mean=None,
    std=None,
    class_names=None,
):
    """A net for images (B, channels, size, size) in [0, 1] that returns logits (B, classes).

    MODULE:FUNCTION: see find_function; the net is told neither classes nor size, mean or std.
    resnet18, resnet50, preact-resnet18 (He et al., CIFAR stem: 3x3, no pooling; resnet18-w16 has 16
    channels in its first stage instead of 64), wrn-D-W (Zagoruyko and Komodakis 2016; `dropout`
    between the convolutions of a block), mlp-H-...-H (`dropout` after each layer); suffix -silu for
    the pre-activation nets. mean, std per channel (None: 0 and 1). class_names: of the data, for
    load_model to compare. `model.build_arguments` keeps what load_model builds the net from.
    """
    check_model("--model", name, dropout)
    arch = {
        "name": name,
        "classes": classes,
        "dropout": dropout,
        "channels": channels,
        "size": size,
        "class_names": class_names,
    }
    if ":" in name:
        model = call_function(name, dropout)
        model.build_arguments = arch  # a net of your own may have an `arch` itself
        return model
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    numbers = [int(n) for n in re.findall(r"-w?(\d+)", name)]
    act = "silu" if name.endswith("-silu") else "relu"
    if name.startswith("mlp"):
        model = MLP(mean, std, channels * size * size, numbers, classes, dropout)
    elif name.startswith("wrn"):
        depth, factor = numbers
        depths = [(depth - 4) // 6] * 3
        widths = [16 * factor, 32 * factor, 64 * factor]
        stages, last = build_stages(PreActBlock, 16, widths, depths, 1, act=act, dropout=dropout)
        model = ConvNet(mean, std, 16, stages, [], norm_act(last, act), last, classes)
    else:
        bottleneck = name.startswith("resnet50")
        depths = [3, 4, 6, 3] if bottleneck else [2, 2, 2, 2]
        stem = numbers[0] if numbers else 64
        widths = [stem, 2 * stem, 4 * stem, 8 * stem]
        if name.startswith("preact"):
            stages, last = build_stages(PreActBlock, stem, widths, depths, 1, act=act)
            model = ConvNet(mean, std, stem, stages, [], norm_act(last, act), last, classes)
        else:
            expansion = 4 if bottleneck else 1
            stages, last = build_stages(
                PostActBlock, stem, widths, depths, expansion, expansion=expansion
            )
            model = ConvNet(mean, std, stem, stages, norm_act(stem), [], last, classes)
    model.build_arguments = arch
    return model.to(memory_format=torch.channels_last)


def build_stages(block, stem, widths, depths, out_factor, **options):
    """-> (stages of blocks, channels of the last one). Every stage but the first halves the image.

    A block has out_factor * width output channels; options: further arguments of the block.
    """
    stages, channels = [], stem
    for i, (width, depth) in enumerate(zip(widths, depths)):
        blocks = []
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(block(channels, width, stride, **options))
            channels = width * out_factor
        stages.append(nn.Sequential(*blocks))
    return stages, channels


def new_model(data: Data, name: str, seed: int, stage: str, dropout: float = 0.0) -> nn.Module:
    """build_model for the images and classes of `data`, on its device, drawn from (seed, stage)."""
    seed_generators("init", seed, stage)
    size, channels = data.x_train.shape[2:]
    names = data.classes
    model = build_model(name, len(names), dropout, channels, size, data.mean, data.std, names)
    device = data.x_train.device
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{stage}: {name}, {parameters:,} parameters, on {device}", flush=True)
    model = model.to(device)
    if ":" in name and world() > 1:  # a function may draw weights in ways that no seed reaches
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    return model


# ---- nets of your own -------------------------------------------------------------------------

# What builds the nets of MODULE:FUNCTION, by these names. find_function fills it, and load_model
# builds nothing else: a checkpoint cannot make it import a module.
FUNCTIONS = {}


def find_function(flag: str, text: str) -> str:
    """Import what `flag` names, MODULE:FUNCTION or MODULE:FUNCTION(argument=value, ...).

    The function returns a torch.nn.Module from images (B, C, H, W) in [0, 1] to logits (B, K). The
    values are numbers, strings, lists and the like; they are parsed and never evaluated. Modules
    are looked for in the current folder too. -> the name in one spelling. Raises UserError.
    """
    expected = "expected MODULE:FUNCTION or MODULE:FUNCTION(argument=value, ...)"
    parts = re.fullmatch(r"([\w.]+):(\w+)(\(.*\))?", text)
    if not parts:
        raise UserError(f"{flag}: {expected}, got {text!r}")
    module, function, brackets = parts.groups(default="()")
    try:
        call = ast.parse(f"f{brackets}", mode="eval").body
        if not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("only arguments with a name")
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        if None in arguments:
            raise ValueError("no **")
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        values = "the values must be plain: numbers, strings, lists, True, None"
        raise UserError(f"{flag} {text}: {expected}; {values}") from None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # the module may switch off gradients, or strict float32
        with torch.set_grad_enabled(torch.is_grad_enabled()), float32_restored():
            built_by = getattr(importlib.import_module(module), function)
        built_by = functools.partial(built_by, **arguments)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise UserError(f"{flag} {text}: {one_line(error)}") from None
    name = f"{module}:{function}"
    if arguments:
        values = [f"{key}={value!r}" for key, value in sorted(arguments.items())]
        name += f"({', '.join(values)})"
    FUNCTIONS[name] = built_by
    return name


def one_line(error) -> str:
    """An exception as a part of one line: its type and the beginning of its text.

    One without a text, as of `assert`, is told by the line that raised it.
    """
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        text = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}"
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def call_function(name: str, dropout: float = 0.0) -> nn.Module:
    """The net of a name of find_function, with its images as contiguous float32 (B, C, H, W).

    dropout: the rate that all its dropout layers get; 0 leaves them as they are. Raises UserError.
    """
    if name not in FUNCTIONS:
        advice = "give it as --model, or as --teacher-model if it is the teacher"
        raise UserError(f"is a net of {name[:200]!r}, which no file can import; {advice}")
    try:
        # the function may switch off gradients, or strict float32
        with torch.set_grad_enabled(torch.is_grad_enabled()), float32_restored():
            model = FUNCTIONS[name]()
    except (Exception, SystemExit) as error:  # whatever the function raises
        raise UserError(f"{name}: {one_line(error)}") from None
    if isinstance(model, torch.jit.ScriptModule):  # takes no hook and cannot be frozen itself
        model = nn.Sequential(collections.OrderedDict(module=model))
    if not isinstance(model, nn.Module):
        returned = f"returned a {type(model).__name__}, not a torch.nn.Module"
        raise UserError(f"{name}: {returned}")
    try:
        model.train(model.training)
    except Exception as error:  # a graph of torch.export has no modes
        raise UserError(f"{name}: {one_line(error)}; return the net that it was made of") from None
    tensors = [*model.state_dict().values()]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise UserError(f"{name}: its state_dict must hold tensors alone")
    lazy = nn.parameter.UninitializedTensorMixin
    if any(tensor.is_meta or isinstance(tensor, lazy) for tensor in tensors):
        raise UserError(f"{name}: has weights without numbers (lazy layers, or on device meta)")
    for parameter in model.parameters():
        if hasattr(parameter, "of_a_net_before"):
            advice = "build a new one in each call, also without functools.cache"
            raise UserError(f"{name}: returned weights that it had returned before; {advice}")
        parameter.of_a_net_before = True
    if dropout > 0:
        dropouts = nn.modules.dropout._DropoutNd  # nn.Dropout, nn.Dropout2d, ...
        layers = [module for module in model.modules() if isinstance(module, dropouts)]
        if not layers:
            raise UserError(f"{name}: has no nn.Dropout for the dropout rate {dropout:g}")
        for layer in layers:
            layer.p = dropout
    give_contiguous_images(model)
    return model


def give_contiguous_images(model: nn.Module) -> None:
    """From now on the net gets a copy of its images (B, C, H, W), contiguous in memory.

    It may change the copy in place (x.sub_(mean)). Our batches are channels_last in memory, which
    code with .view(...) does not expect.
    """
    model.register_forward_pre_hook(
        lambda module, inputs: inputs[0].clone(memory_format=torch.contiguous_format)
    )


def load_weights(flag: str, path: str | Path, model: nn.Module) -> None:
    """Load a state_dict from elsewhere, weights only: other pickles are refused, never run.

    Where it may be in the file: see state_dicts_in; how its names may differ: see in_our_names and
    renamings. Of raw and averaged weights side by side the averaged ones are taken, and a line says
    so: papers that average weights report the average, and timm.models.load_checkpoint takes it by
    default too. Raises UserError.
    """
    try:
        states = state_dicts_in(load_tensors(path))
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    renamed_states = {place: in_our_names(state, model) for place, state in states.items()}
    fitting = {}
    for place, state in renamed_states.items():
        for renamed in renamings(state, model):
            with contextlib.suppress(Exception):  # torch raises several types for what does not fit
                model.load_state_dict(renamed)
                fitting.setdefault(place, renamed)
    if not fitting:
        raise UserError(f"{flag} {path}: {misfit(renamed_states, model)}")
    taken = next(iter(fitting))
    model.load_state_dict(fitting[taken])
    for name, tensor in model.state_dict().items():
        in_file = fitting[taken].get(name, tensor)
        if tensor.is_floating_point() and not in_file.is_floating_point():
            types = f"{tensor.dtype} in the net, {in_file.dtype} in the file"
            raise UserError(f"{flag} {path}: {name} is {types}; convert the weights first")
    if not weights_are_finite(model):
        raise UserError(f"{flag} {path}: weights that are not finite")
    if renamed_states[taken] is not states[taken]:
        print_once(f"{flag} {path}: {normalisation(states[taken], model)}")
    for other in states:
        if other != taken and (other in fitting or is_averaged(other) != is_averaged(taken)):
            places = f"takes the weights at {taken or 'the top'}, not at {other or 'the top'}"
            program = f"import torch; torch.save(torch.load({str(path)!r}){other}, 'other.pt')"
            how = f'for these type python -c "{program}" and {flag} other.pt'
            print_once(f"{flag} {path}: {places}; {how}")
            break


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights are finite, and the statistics of our nets.

    The buffers of other nets may hold masks of -inf. It waits for the device once.
    """
    tensors = list(model.parameters())
    if isinstance(model, ConvNet | MLP):
        tensors += model.buffers()
    finite = [tensor.isfinite().all() for tensor in tensors]
    return not finite or bool(torch.stack(finite).all())


@functools.cache
def print_once(line: str) -> None:
    """Print a line the first time only."""
    print(line, flush=True)


def state_dicts_in(record, place: str = "", depth: int = 4) -> dict:
    """{its place, such as "['model']": state_dict} in a file of torch.save, averaged weights first.

    A state_dict is the record itself, or below the keys that training programs use, also nested.
    """
    keys = ("state_dict", "model_state_dict", "model", "net", "module", "student", "weights")
    found = {}
    if not isinstance(record, dict) or depth == 0:
        return found
    if any(isinstance(value, Tensor) for value in record.values()):
        found[place] = record
    for key, value in record.items():
        if isinstance(key, str) and (key in keys or is_averaged(key)):
            found |= state_dicts_in(value, f"{place}[{key!r}]", depth - 1)
    return dict(sorted(found.items(), key=lambda item: not is_averaged(item[0])))


def is_averaged(key: str) -> bool:
    """Whether a key of a file is of averaged weights: ema, model_ema, state_dict_ema, swa."""
    return bool(re.search(r"(?<![a-z])(ema|swa)(?![a-z])", key, re.IGNORECASE))


def plain_name(name: str) -> str:
    """The name of a tensor without what DataParallel, AveragedModel and torch.compile add."""
    return ".".join(part for part in str(name).split(".") if part not in ("module", "_orig_mod"))


def renamings(state: dict, model: nn.Module):
    """Yield a state_dict with the names that its tensors may have in the net.

    As they are; without what all names begin with, such as `module.` or `model.`; without any
    `module.` and `_orig_mod.`. In this order, so that a net with a submodule `module` keeps it.
    """
    yield state
    state = {str(name): value for name, value in state.items() if name != "n_averaged"}
    renamed = state
    while all("." in name for name in renamed) and len({n.split(".")[0] for n in renamed}) == 1:
        renamed = {name.partition(".")[2]: value for name, value in renamed.items()}
        yield renamed
    name_in_net = {plain_name(name): name for name in model.state_dict()}
    renamed = {name_in_net.get(plain_name(name), name): v for name, v in state.items()}
    if len(renamed) == len(state):
        yield renamed


def misfit(states: dict, model: nn.Module) -> str:
    """Why no state_dict of a file fits a net: the first names or shapes that differ."""
    if not states:
        return "no state_dict found; save it alone: torch.save(model.state_dict(), FILE)"
    wanted = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    there = {plain_name(name): tensor for name, tensor in next(iter(states.values())).items()}
    missing = [name for name in wanted if name not in there and "num_batches" not in name]
    others = [name[:60] for name in there if name not in wanted]
    if missing or others:
        wants, has = (first_names(names, 3) or "no others" for names in (missing, others))
        return f"the weights are not of this net: the net wants {wants}; the file has {has}"
    for name, tensor in wanted.items():
        shape = tuple(getattr(there.get(name, tensor), "shape", ()))
        if shape != tuple(tensor.shape):
            return f"{name} is {tuple(tensor.shape)} in the net, {shape} in the file"
    return "the names fit the net, the values are no tensors for it"


def initial_digest(name: str, seed: int, dropout: float) -> str:
    """16 hex digits of the weights that a teacher of MODULE:FUNCTION begins with."""
    with torch.random.fork_rng(devices=[]):  # a training goes on with the random numbers it has
        seed_generators("init", seed, "teacher")
        return state_digest(call_function(name, dropout).state_dict())


# ---- WideResNets of RobustBench and TRADES ----------------------------------------------------

# A part of a name in our wrn-D-W -> the same part in their files
FOREIGN_PARTS = {
    "stem.0.": "conv1.",
    "stages.0.": "block1.layer.",
    "stages.1.": "block2.layer.",
    "stages.2.": "block3.layer.",
    "norm1.0.": "bn1.",
    "norm2.0.": "bn2.",
    "shortcut.": "convShortcut.",
    "head_norm.0.": "bn1.",
}
# How the names of mean and deviation of the images end in their files -> the name in our nets
STATISTICS = {
    "mean": "normalize.mean",
    "mu": "normalize.mean",
    "std": "normalize.std",
    "sigma": "normalize.std",
}


def in_our_names(state: dict, model: nn.Module) -> dict:
    """The state_dict of a WideResNet of RobustBench or TRADES under the names of our wrn-D-W.

    Both nets compute the same, up to the activation: theirs is ReLU. Names that are none of a net's
    stay as they are, but for sub_block1, a second first stage that the forward pass of their nets
    never uses, which is left out. Other state_dicts, and those for other nets than our ResNets and
    WideResNets with ReLU, come back as they are. Whether the weights fit is for load_weights.
    """
    has_silu = any(isinstance(module, nn.SiLU) for module in model.modules())
    first_conv = re.compile(r"(.*\.)?block1\.layer\.0\.conv1\.weight")
    prefixes = [match[1] or "" for match in map(first_conv.fullmatch, map(str, state)) if match]
    if not isinstance(model, ConvNet) or has_silu or len(prefixes) != 1:
        return state
    prefix = prefixes[0]  # such as "module."
    name_in_net = {}  # by the name in the file
    for name in model.state_dict():
        name_in_file = name
        for our_part, their_part in FOREIGN_PARTS.items():
            name_in_file = name_in_file.replace(our_part, their_part)
        name_in_net[prefix + name_in_file] = name
    renamed, names, channels = {}, [], model.normalize.mean.numel()
    for name, tensor in state.items():
        name = str(name)
        if name == "n_averaged" or name.startswith(f"{prefix}sub_block1."):
            continue
        names.append(name)
        in_net = name_in_net.get(name) or STATISTICS.get(name.split(".")[-1])
        is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if in_net in STATISTICS.values() and is_dense and tensor.numel() == channels:
            tensor = tensor.reshape(1, channels, 1, 1)
        if in_net is None or in_net in renamed:  # a second mean keeps its name, and fits nowhere
            in_net = name
        renamed[in_net] = tensor
    if len(renamed) < len(names):  # two tensors for one place
        return state
    complete_statistics(renamed, model)
    return renamed


def complete_statistics(renamed: dict, model: nn.Module) -> None:
    """Add the model's mean and deviation to a state_dict that has none."""
    if not renamed.keys() & set(STATISTICS.values()):
        for name in ("mean", "std"):
            renamed[f"normalize.{name}"] = getattr(model.normalize, name).clone()


def normalisation(state: dict, model: nn.Module) -> str:
    """What a WideResNet does with its images once the weights of `state` are loaded."""
    mean, std = model.normalize.mean.flatten(), model.normalize.std.flatten()
    if any(str(name).split(".")[-1] in STATISTICS for name in state):
        what = "the net normalises as the file says"
    else:
        what = "no statistics of a normalisation in the file: the net "
        if not mean.any() and (std == 1).all():
            return what + "takes images in [0, 1] as they are"
        what += "keeps its own"
    means, stds = (", ".join(f"{number:.4g}" for number in v.tolist()) for v in (mean, std))
    return f"{what}, mean {means}, deviation {stds}"


# ------------------------------------------------------------------------------------------------
# Attacks (L-infinity) and what training needs of evaluation; eval_robustness.py has the rest


def pgd(model, x, targets, eps, step_size, steps, start="uniform") -> Tensor:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018): x -> x_adv (B, C, H, W).

    targets: labels (B,) or fixed probabilities (B, K). With probabilities the gradient is that of
    KL(targets || model(x_adv)): the teacher's give the inner problem of RSLAD, the model's own
    that of TRADES. Or a net, the teacher in eval mode: then KL(teacher(x_adv) || model(x_adv)) is
    maximised, with the gradient through both nets (AdaAD, Huang et al., CVPR 2023). start:
    `uniform` in the ball, `gaussian` (x + 0.001 N(0, 1), as in TRADES and RSLAD), `none`, or the
    first perturbation itself (B, C, H, W). x and x_adv in [0, 1]; eps and step_size in the same
    units. The model is used in the mode it is in: call model.eval() first for BatchNorm in eval
    mode. Only the gradient of x_adv is computed, none of the weights.
    """
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    if isinstance(start, Tensor):
        delta = start
    elif start == "uniform":
        delta = torch.empty_like(x).uniform_(-eps, eps)
    elif start == "gaussian":
        delta = 0.001 * torch.randn_like(x)
    elif start == "none":
        delta = torch.zeros_like(x)
    else:
        raise ValueError(f"start: expected uniform, gaussian, none or a tensor, got {start!r}")
    x_adv = torch.clamp((x + delta).detach(), low, high)
    with frozen(model):
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                logits = model(x_adv.clone())  # a copy: the net may normalise it in place
                if isinstance(targets, nn.Module):
                    # The targets move with x_adv: cross-entropy would also seek images that leave
                    # the teacher unsure. Logarithms, since the gradient goes through both sides.
                    log_targets = targets(x_adv.clone()).float().log_softmax(1)
                    log_probs = logits.float().log_softmax(1)
                    loss = F.kl_div(log_probs, log_targets, reduction="sum", log_target=True)
                else:
                    loss = F.cross_entropy(logits, targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


@contextlib.contextmanager
def frozen(model: nn.Module):
    """No weight requires a gradient inside the block.

    A backward pass made by torch.compile would compute the gradients of the weights too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextlib.contextmanager
def strict_float32(tf32_convolutions: bool = False):
    """set_float32 inside, afterwards as it was.

    cudnn.benchmark is off inside: it times its kernels for each new batch size, and an attack that
    drops broken images has hundreds of sizes.
    """
    with float32_restored():
        set_float32(tf32_convolutions)
        torch.backends.cudnn.benchmark = False
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode, its weights frozen, in strict float32 and without torch.compile.

    Afterwards each submodule is in the mode in which it was, and each buffer as it was: a net may
    move its statistics in its own forward pass, or put other tensors in their place. Raises
    UserError for a net of torch.inference_mode, whose tensors cannot be written or followed.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in tensors):
        made = "the net was built or loaded under torch.inference_mode"
        raise UserError(f"{made}; build and load it outside, or under torch.no_grad")
    modes = {module: getattr(module, "training", False) for module in model.modules()}
    buffers = []
    for module in modes:
        for name, buffer in module.named_buffers(recurse=False):
            buffers.append((module, name, buffer, buffer.clone()))
    without_compile = contextlib.nullcontext
    if "torch._dynamo" in sys.modules:  # something is compiled
        # a function: set_stance acts as soon as it is called
        without_compile = functools.partial(torch.compiler.set_stance, "force_eager")
    try:
        model.eval()
        with frozen(model), strict_float32(), without_compile():
            yield model
    finally:
        model.train(modes[model])  # some nets do more there than set the mode
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if 0 not in buffer.stride():  # nothing can be written into what expand() has made
                    buffer.copy_(before)
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)


@torch.no_grad()
def predict(
    model: nn.Module, x: Tensor, labels=None, attack=None, batch_size: int = 500, what="images"
) -> Tensor:
    """Logits (N, K) of x, uint8 (N, H, W, C) or float (N, C, H, W) in [0, 1]; see `evaluating`.

    attack: (eps, step_size, steps) of a PGD away from labels (N,); without it x stays as it is.
    what: the name of the images in the UserError that says that logits are not finite.
    """
    parts = []
    with evaluating(model):
        for i in range(0, len(x), batch_size):
            part = to_float(x[i : i + batch_size])
            if attack is not None:
                part = pgd(model, part, labels[i : i + batch_size], *attack)
            parts.append(model(part.clone()))  # a copy: the net may change its images in place
    logits = torch.cat(parts)
    check_finite(logits, what)
    return logits


def check_finite(logits: Tensor, what: str) -> None:
    """A UserError if logits (N, K) of the images that `what` names are not finite."""
    finite = logits.isfinite().all(1)
    if not finite.all():
        not_finite = (~finite).nonzero()
        numbers = f"{len(not_finite)} of {len(logits)} {what} are not finite"
        advice = "check the weights, and a division by zero or a logarithm in the net"
        raise UserError(
            f"the net's logits of {numbers}, the first is number {int(not_finite[0])}; {advice}"
        )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows (N, K) whose largest logit is at the label (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()


# ------------------------------------------------------------------------------------------------
# Files, written whole or not at all, read without running what they hold; tables


def write_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file and move it to `path`; on an error `path` stays as is.

    Under torchrun only the first process writes.
    """
    if rank() > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems open no folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # otherwise a power failure may undo the move
        os.close(folder)


def digest_of(value) -> str:
    """16 hex digits that depend on a plain value (numbers, strings, lists, dicts) alone."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value) -> None:
    """Write a value of plain numbers, strings, lists and dicts as JSON, atomically."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path):
    """The value in a JSON file; None if there is no such file; a UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
        if value is None:
            raise ValueError("null")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it or take another --name") from None


def save(path: Path, record: dict) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts atomically, for `load`."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk in a RuntimeError
    torch.save({"format": 1} | record, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def check_zip(path: str | Path) -> None:
    """ValueError if a zip is made to swell, or has parts that fail their CRC-32."""
    if not Path(path).is_file():  # reading a pipe would block
        raise ValueError("not a file")
    with zipfile.ZipFile(path) as file:
        size = sum(part.file_size for part in file.infolist())
        if size > 2**28 and size > 100 * os.path.getsize(path):
            raise ValueError(f"a zip bomb of {size:,} bytes")
        if any(part.compress_type not in (0, 8) for part in file.infolist()):
            raise ValueError("packed in a way that numpy and torch never use")
        damaged = file.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")


# First bytes of files mistaken for checkpoints: what each is, and the remedy
OTHER_FILES = {
    rb"(\xef\xbb\xbf)?\s*<": "a web page; download the file itself",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    rb".{6}\0\0\{": "a safetensors file; type "
    "torch.save(safetensors.torch.load_file(FILE), 'weights.pt') in Python",
}
BEFORE_TORCH_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # files of torch.save began so
NO_TORCH_FILE = "not a zip of torch.save, or half of one"


def check_first_bytes(path: str | Path) -> bytes:
    """The first bytes of a file; a UserError that says what it is if it cannot be a checkpoint."""
    try:
        if Path(path).is_dir():
            raise UserError(f"{path}: a folder; give a file in it")
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block
            raise UserError(f"{path}: not a file")
        with open(path, "rb") as file:
            begin = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    if not begin:
        raise UserError(
            f"{path}: damaged: an empty file; get it again, or delete it if a run wrote it"
        )
    for pattern, what in OTHER_FILES.items():
        if re.match(pattern, begin, re.DOTALL):
            raise UserError(f"{path}: {what}")
    return begin


def check_torch_zip(path: str | Path) -> None:
    """A ValueError unless torch.save has written a zip; a UserError for a TorchScript archive."""
    names = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = [Path(name).name for name in file.namelist()]
    if "constants.pkl" in names:
        advice = "type torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt') in Python"
        raise UserError(f"{path}: a TorchScript archive; {advice}")
    if "data.pkl" not in names:
        raise ValueError(NO_TORCH_FILE)
    check_zip(path)


def load_tensors(path: str | Path):
    """Read a file of torch.save to the CPU, weights only: other pickles are refused, never run.

    In a zip every byte is under a CRC-32. A UserError says what the file is instead.
    """
    begin = check_first_bytes(path)
    try:
        if begin.startswith(b"PK\3\4"):
            check_torch_zip(path)
        elif not begin.startswith(BEFORE_TORCH_1_6):  # nothing else reaches torch
            raise ValueError(NO_TORCH_FILE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles from elsewhere
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged file
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: not readable ({error.strerror})") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # torch would explain how to run it
            reason = "the file contains Python objects; only tensors and plain values are loaded"
        advice = "get it again"
        if isinstance(error, pickle.UnpicklingError):
            advice = "of a whole net save the state_dict alone: torch.save(net.state_dict(), FILE)"
        advice += "; if a run wrote it, delete it, and the same command makes it again"
        raise UserError(f"{path}: damaged, or no checkpoint ({reason}); {advice}") from None


def load(path: str | Path) -> dict:
    """Read a file of `save`. Raises UserError."""
    record = load_tensors(path)
    if has_our_format(record):
        return record
    advice = ""
    if state_dicts_in(record):
        advice = (
            f"; for a state_dict type --model NET --weights {path} (eval_robustness.py), or "
            f"--teacher-model NET --teacher-ckpt {path}; NET is MODULE:FUNCTION, for our nets "
            "\"common:build_model(name='resnet18')\" (as a teacher: resnet18)"
        )
    raise UserError(f"{path}: not a checkpoint of these scripts{advice}")


def has_our_format(record) -> bool:
    """Whether a record was written by `save`."""
    number = record.get("format") if isinstance(record, dict) else None
    return isinstance(number, int) and number == 1


def is_plain(value) -> bool:
    """Whether it is a number, a short string, None, a tensor, or small dicts and lists of such.

    At most five deep, and at most a million values at each depth together: a small file can hold
    lists that hold the same list many times, and whoever walks through them would never end.
    """
    level = [value]  # all values at a depth
    for _ in range(6):
        below = []
        for value in level:
            if isinstance(value, dict) and len(value) < 500:
                value = [*value, *value.values()]
            if isinstance(value, list):
                if len(below) + len(value) > 1_000_000:
                    return False
                below += value
            elif isinstance(value, Tensor):  # one that repeats its numbers outgrows its storage
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    return False
            elif isinstance(value, str):
                if len(value) >= 1000:
                    return False
            elif not (value is None or isinstance(value, float | int)):
                return False
        level = below
    return not level


# What the scripts read of a model's meta, and its types
META_TYPES = {
    "training": str,
    "epoch": int,
    "seconds": int | float,
    "best": dict,
    "noise_rate": int | float,
    "corruption_rate": int | float,
    "gradients": dict,
}


def load_model(path, data: Data | None = None, name: str | None = None) -> nn.Module:
    """The model in a file of save_model, in eval mode with frozen weights, on the device of `data`.

    model.meta: what was kept beside the weights, and the path as `file`. A UserError if the model
    does not fit `data` (the names of its classes too, where both are known), or if it is not a
    `name`. A net of MODULE:FUNCTION is built if find_function was asked for it before: nothing is
    imported here.
    """
    record = load(path)
    try:
        arch, weights, meta = (record[key] for key in ("arch", "weights", "meta"))
        if not all(type(arch[key]) is int for key in ("classes", "size", "channels")):
            raise ValueError("classes, size and channels must be whole numbers")
        if ":" not in arch["name"]:
            with torch.device("meta"):  # takes no memory, whatever arch asks for
                net = build_model(**arch)
            size = sum(v.numel() * v.element_size() for v in weights.values())
            if size > os.path.getsize(path):
                raise ValueError("the weights are larger than the file")
        else:  # it may have weights that share their memory
            net = build_model(**arch)
        wanted = {k: (v.shape, v.dtype) for k, v in net.state_dict().items()}
        if wanted != {k: (v.shape, v.dtype) for k, v in weights.items()}:
            raise ValueError(f"the weights do not belong to {arch}")
        if not (isinstance(meta, dict) and is_plain(meta)):
            raise ValueError("more than numbers, names and tensors beside the weights")
        for key, types in META_TYPES.items():
            if key in meta and not isinstance(meta[key], types):
                raise ValueError(f"{key} is a {type(meta[key]).__name__}")
        names = arch.get("class_names")  # None: unknown, as in files of earlier versions
        if names is not None:
            strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not strings or len(names) != arch["classes"]:
                raise ValueError(f"class_names: expected the names of {arch['classes']} classes")
        model = build_model(**arch)
        model.load_state_dict(weights)
        if not weights_are_finite(model):
            raise ValueError("weights that are not finite")
        model.meta = meta | {"file": str(path)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a foreign record makes torch raise
        reason = str(error)[:200] or "empty"
        raise UserError(f"{path}: holds no model of these scripts ({reason})") from None
    if name is not None and name != arch["name"]:
        raise UserError(f"{path}: is a {arch['name']}, expected a {name}")
    if data is not None:
        size, channels = data.x_test.shape[2:]
        if [arch["classes"], arch["size"], arch["channels"]] != [len(data.classes), size, channels]:
            model_is = f"{arch['classes']} classes, {arch['size']} x {arch['channels']} images"
            data_has = f"{len(data.classes)} classes, {size} x {channels} images"
            raise UserError(f"{path}: is for {model_is}; {data.name} has {data_has}")
        if names is not None:
            check_class_names(path, names, data)
        model = model.to(data.x_test.device)
    return model.eval().requires_grad_(False)


def check_class_names(path, names: list[str], data: Data) -> None:
    """A UserError if the classes of a file are not those of `data` in their order.

    The numbers 0, 1, ... stand for names that are not known, but where both sides have them: the
    folders 0 to 11 are read in the order 0, 1, 10, 11, 2, ...
    """
    numbers = [str(number) for number in range(len(data.classes))]
    if numbers in (names, data.classes) and sorted(names) != sorted(data.classes):
        return
    for number, (other, ours) in enumerate(itertools.zip_longest(names, data.classes)):
        if other != ours:
            there = f"class {number} is {str(other)[:50]!r}, in {data.name} it is {ours!r}"
            advice = "give data with the same names in the same order"
            raise UserError(f"{path}: {there}; {advice}")


def table(rows: list[dict]) -> str:
    """Rows as an aligned text table; accuracies with four digits, a missing value as '-'."""

    def cell(key, value):
        if isinstance(value, float):
            return f"{value:.4f}" if "_acc" in key else f"{value:,.1f}"
        return "-" if value is None else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[cell(key, row.get(key)) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = []
    for line in cells:
        padded = [line[0].ljust(widths[0])]
        padded += [text.rjust(width) for text, width in zip(line[1:], widths[1:])]
        lines.append("  ".join(padded))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------
# Figures, in one style, where matplotlib is installed

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "savefig.dpi": 110,
}


def new_figure(width: float, height: float):
    """An empty figure of so many inches in our style; None without matplotlib.

    A UserError if matplotlib is there and does not start, as with a notebook's MPLBACKEND whose
    package is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            return None
        advice = "unset MPLBACKEND or install matplotlib again"
        raise UserError(f"matplotlib does not start ({one_line(error)}); {advice}") from None
    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)
    return Figure((width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


@contextlib.contextmanager
def drawing(path):
    """A figure that cannot be drawn or written inside is a warning: no result depends on it."""
    try:
        yield
    except Exception as error:  # matplotlib raises whatever comes
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        print(f"warning: {path} is not drawn: {reason}", flush=True)


# ================================================================================================
# A run: flags, folders, checkpoints, teachers. A pasted script has its own in the place of these.
# ================================================================================================

# Flags that do not change what is computed: the same run goes on with other values
FREE_FLAGS = {"data_root", "device", "runs", "name", "tensorboard", "compile", "save_every"}
FREE_FLAGS |= {"given"}  # not a flag: the list of those that are in the command
# What a record of another shape, or one that is nested too deep, makes Python raise
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)


def add_run_flags(parser, augment=("crop", "none")) -> None:
    """Add the flags that all training scripts share; augment: the choices of --augment."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="cifar10", help=f"data set: {DATA_NAMES}")
    where = "downloads go there, or to data/ of --runs if it is read-only"
    add("--data-root", default="data", help=f"folder of the data sets; {where}")
    add("--train-subset", type=at_least_2, help="train on this many images, the same for any seed")
    add("--test-subset", type=whole, help="test on this many images, the same for any seed")
    add("--val-size", type=whole_or_0, default=1024, help="training images held out to validate")
    meaning = "crop: random crops and flips; none: images as they are"
    if len(augment) > 2:
        meaning += f"; {' and '.join(augment[2:])}: the default with that on top"
    meaning += " (default: crop for colour images, none for grey ones, such as digits)"
    add("--augment", choices=augment, help=meaning)
    add = parser.add_argument_group("run").add_argument
    seeds = {"nargs": "+", "type": whole_or_0, "default": [0]}
    add("--seed", **seeds, help="seed of weights, batches and attacks; several: one run for each")
    devices = {"choices": ["auto", "cpu", "cuda"], "default": "auto"}
    add("--device", **devices, help="device to compute on; auto: CUDA if there is any")
    precisions = {"choices": ["bf16", "fp32"], "default": "bf16"}
    add("--precision", **precisions, help="arithmetic of training on CUDA; a CPU trains in float32")
    add("--deterministic", action="store_true", help="use deterministic CUDA kernels (slower)")
    modes = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    modes = {"nargs": "?", "const": "default", "choices": modes, "metavar": "MODE"}
    add("--compile", **modes, help="compile the nets with torch.compile, in MODE")
    add("--runs", default="runs", help="folder in which the run folders are made")
    add("--name", help="name of the run folder (default: made of the flags that were given)")
    add("--tensorboard", action="store_true", help="also log to TensorBoard, if it is installed")
    add("--demo", action="store_true", help="small run on drawn shapes, a few minutes on a CPU")


def parse(parser, argv: list | None, presets: dict) -> argparse.Namespace:
    """Parse `argv` (None: sys.argv), check the names of the nets, and name the run.

    presets: {"--demo" or "--flag value": {name in the namespace: its default then}}. Flags that are
    given win over a preset; what a preset sets is printed. args.given: the flags that are in argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    given = {re.sub("^--no-", "--", flag) for flag in given}  # a switch goes by one name
    asks_for_help = bool({"-h", "--help"} & set(argv))
    for preset, defaults in presets.items():
        words = f" {' '.join(argv)} ".replace("=", " ")
        if f" {preset} " not in words or asks_for_help:
            continue
        parser.set_defaults(**defaults)
        sets = []
        for key, value in defaults.items():
            flag = key.replace("_", "-")
            if f"--{flag}" in given:
                continue
            if value is True:
                sets.append(f"--{flag}")
            elif value is False:
                sets.append(f"--no-{flag}")
            else:
                sets.append(f"--{flag} {value}")
        print(f"{preset} sets {', '.join(sets) or 'nothing'}")
    args = parser.parse_args(argv)
    args.given = sorted(given)
    for flag in ("model", "teacher_model"):
        name = getattr(args, flag)
        if name is not None and ":" in name:
            name = find_function(f"--{flag.replace('_', '-')}", name)
            setattr(args, flag, name)
        if name is not None:
            check_model(f"--{flag.replace('_', '-')}", name)
    if len(set(args.seed)) < len(args.seed):
        parser.error(f"--seed: each seed once, got {' '.join(map(str, args.seed))}")
    if args.name is None:
        args.name = run_name(args)
    elif not re.fullmatch(r"\w[\w.,=+-]{0,159}", args.name):
        parser.error(f"--name: expected letters, digits and . , = + - _, got {args.name!r}")
    return args


def check_effects(args, error, has_effect: dict, trains_teacher: bool, trains_student=True) -> None:
    """Call error(line) for a flag of another method; print those of a net that is not trained.

    has_effect: {flag: losses or methods on which it has an effect}; a flag that is not in it has
    one on all. Commands that are compared often share the settings of teacher and student, so
    those that a command does not need are printed, not refused.
    """
    choice = "loss" if hasattr(args, "loss") else "method"
    value, idle = getattr(args, choice), {"teacher": [], "student": []}
    for flag in args.given:
        if value not in has_effect.get(flag, [value]):
            error(f"{flag}: has no effect with --{choice} {value}; leave it out")
        of_finished_teacher = args.teacher_ckpt and flag in ("--teacher-model", "--teacher-mode")
        if flag == "--teacher-ckpt" or of_finished_teacher:
            continue
        if flag.startswith("--teacher-") and not trains_teacher:
            idle["teacher"].append(flag)
        if flag in ("--model", "--epochs", "--milestones") and not trains_student:
            idle["student"].append(flag)
    for net, flags in idle.items():
        if flags:
            print(f"no {net} is trained here, so without effect: {', '.join(flags)}", flush=True)


def run_name(args: argparse.Namespace) -> str:
    """A folder name of data, net, method and the other flags that were given."""
    method = args.loss if hasattr(args, "loss") else args.method
    net = args.teacher_model if method == "teacher" else args.model
    name = f"{Path(args.data).stem}-{net}-{method}"
    if args.demo:
        name = f"demo-{name}"
    in_name = FREE_FLAGS | {"data", "model", "loss", "method", "seed", "demo"}
    for key, value in vars(args).items():
        flag = f"--{key.replace('_', '-')}"
        if flag in args.given and key not in in_name:
            if isinstance(value, float):
                value = f"{value:.4g}"
            elif isinstance(value, list):
                value = "+".join(map(str, value))
            name += f",{flag.removeprefix('--')}={value}"
    name = re.sub(r"[^\w.,=+-]", "-", name)
    if len(name) > 64:
        name = f"{name[:55]}-{digest_of(name)[:8]}"
    return name


def replace(args: argparse.Namespace, **flags) -> argparse.Namespace:
    """A copy of the namespace in which some flags have other values."""
    return argparse.Namespace(**(vars(args) | flags))


def run_flags(args: argparse.Namespace) -> dict:
    """The flags that decide what a run computes, as JSON would give them back."""
    flags = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS}
    return json.loads(json.dumps(flags))


def setup_device(args: argparse.Namespace) -> torch.device:
    """The device of --device, set up by --deterministic; joins the processes of torchrun."""
    device = find_device(args.device)
    if "--precision" in args.given and device.type == "cpu":
        print("--precision has no effect here: a CPU trains in float32")
    if device.type == "cuda" and args.precision == "bf16" and not trains_in_bf16(args, device):
        print("--precision bf16: this GPU has none, it trains in float32", flush=True)
    if world() > 1 and not dist.is_initialized():
        # the others wait while the first process validates and evaluates
        week = datetime.timedelta(days=7)
        # torch imports this module when the first optimizer is made. Imported after the group, its
        # default arguments would keep the group, and threads of gloo, alive until the interpreter
        # ends; a thread that frees a tensor just then aborts the process.
        from torch.distributed.nn import functional  # noqa: F401

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=week)
        atexit.register(dist.destroy_process_group)
    set_float32()  # of what is not under bf16 autocast
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(args.deterministic)  # its import takes seconds
    return device


def load_training_data(args: argparse.Namespace, device: torch.device) -> Data:
    """load_data by the flags of a training script; under torchrun the first process downloads."""
    if args.teacher_ckpt:
        check_first_bytes(args.teacher_ckpt)  # before any data are fetched
    with first_process_first():
        return load_data(
            args.data,
            args.data_root,
            device,
            args.val_size,
            args.train_subset,
            args.test_subset,
            args.augment,
            args.runs,
        )


def autocast(args: argparse.Namespace, device: torch.device):
    """On CUDA, with --precision bf16: matrix products and convolutions in bfloat16.

    The cache of cast weights is off: a weight that is first cast under no_grad (as in TRADES) would
    get no gradient.
    """
    return torch.autocast("cuda", torch.bfloat16, trains_in_bf16(args, device), cache_enabled=False)


def trains_in_bf16(args: argparse.Namespace, device: torch.device) -> bool:
    """Not on GPUs of before 2020: PyTorch emulates it there, without cuDNN's convolutions."""
    wanted = device.type == "cuda" and args.precision == "bf16"
    return wanted and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_model(model: nn.Module, mode: str | None) -> None:
    """torch.compile a net in a mode of --compile; without one nothing happens.

    All nets of a class share one code object, and PyTorch stops compiling it after 8 variants
    (student and teacher, training and evaluation mode, with and without weight gradients): the
    limit is raised, or the rest would run uncompiled without a word.
    """
    if mode is not None:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model.compile(mode=mode, dynamic=False)


# ---- folders -----------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(script: str, args: argparse.Namespace, data: Data):
    """Yield runs/<script>/<name>-s<seed>, made now or found with the same flags and data.

    A UserError that names the flag if the folder was made with another value or other data, and if
    another process uses it.
    """
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # it is not there, or does not fit what it is built on
            reason = f"cannot be imported ({one_line(error)})"
            raise UserError(f"--tensorboard: {reason}; pip install tensorboard") from None
    folder = Path(args.runs) / script / f"{args.name}-s{args.seed}"
    with locked(folder):
        with first_process_first():
            config = read_json(folder / "config.json")
            if config is None:
                write_json(folder / "config.json", describe_run(args, data))
            else:
                check_same_run(folder, config, args, data)
        yield folder


def describe_run(args: argparse.Namespace, data: Data) -> dict:
    """What config.json says of a run: command, commit, versions, GPU, data, flags."""
    commit = None
    with contextlib.suppress(OSError):  # git is not installed
        here = Path(__file__).resolve().parent
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": command_line(),
        "processes": world(),
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if data.x_train.is_cuda else None,
        "fingerprint": data.fingerprint,
        "data": training_data(data),
        "given": args.given,
        "flags": run_flags(args),
        "files": digests_of_files(args),
    }


def digests_of_files(args: argparse.Namespace) -> dict:
    """{flag: a digest of the content} of a given teacher."""
    if not args.teacher_ckpt:
        return {}
    content = Path(args.teacher_ckpt).read_bytes()
    return {"teacher_ckpt": hashlib.sha256(content).hexdigest()[:16]}


def check_same_run(folder: Path, config, args: argparse.Namespace, data: Data) -> None:
    """A UserError if config.json of a folder is of other flags, files or data than those now.

    Another number of processes is no error, but a line: the noise and the attacks of each process
    are its own, so the weights at the end depend on their number.
    """
    flags, remedy = run_flags(args), "take another --name, or delete it"
    is_whole = isinstance(config, dict) and isinstance(config.get("flags"), dict)
    is_whole = is_whole and isinstance(config.get("fingerprint"), int)
    is_whole = is_whole and isinstance(config.get("processes", 1), int)
    if not is_whole or not isinstance(config.get("files", {}), dict):
        advice = "delete it if the folder belongs to this command, or take another --name"
        raise UserError(f"{folder / 'config.json'}: damaged; {advice}")
    old_flags, old_fingerprint = config["flags"], config["fingerprint"]
    for key in sorted(flags.keys() | old_flags.keys()):
        if flags.get(key) != old_flags.get(key):
            values = f"{old_flags.get(key)}, not {flags.get(key)}"
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag}: {folder} was made with {values}; {remedy}")
    if old_fingerprint != data.fingerprint:
        raise UserError(f"--data: {folder} was made with other images or labels; {remedy}")
    for key, digest in digests_of_files(args).items():
        if config.get("files", {}).get(key, digest) != digest:  # older versions kept none
            flag, file = f"--{key.replace('_', '-')}", getattr(args, key)
            raise UserError(f"{flag}: {folder} was made with another {file}; {remedy}")
    processes = config.get("processes", world())  # older versions did not keep it
    if processes != world() and not (folder / "summary.json").exists():
        numbers = f"number of processes: {processes} before, {world()} now"
        print(f"{folder}: {numbers}; the weights will not be those of one number", flush=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False):
    """No other process can lock `folder` inside the block: wait for it, or raise UserError.

    The lock ends with the process, however it ends. Under torchrun the first process has it, and
    all enter the block together. What a killed process was writing there is deleted.
    """
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(lock_file(folder, wait))
            for torn in folder.glob(".*.tmp"):
                torn.unlink(missing_ok=True)
        sync()
        yield


@contextlib.contextmanager
def lock_file(folder: Path, wait: bool):
    """Hold the lock of a folder, made if need be, in its file `lock`; see `locked`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            import fcntl

            with naming(file.name):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no fcntl: nothing is locked there
            pass
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            if not wait:
                advice = "wait for it, or write elsewhere"
                raise UserError(f"{folder}: in use by process {owner}; {advice}") from None
            print(f"{folder}: waiting for process {owner}, which is at work there", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        with naming(file.name):
            os.write(file.fileno(), str(os.getpid()).encode())  # unbuffered
        yield


def training_data(data: Data) -> dict:
    """The properties of the data on which trained weights depend.

    mean and std are those of all training images, the fingerprint that of the chosen ones.
    """
    names = ("fingerprint", "classes", "mean", "std", "pad", "flip")
    return {name: getattr(data, name) for name in names}


def teacher_folder(args: argparse.Namespace, data: Data) -> Path:
    """runs/teachers/<digest>, where all runs look for the teacher of these flags and data.

    args: the flags of the teacher itself; those that are None have no effect on it and do not
    count. Flags that select the data are left out, because the selected data are in the digest. For
    a net of your own the weights that it begins with count too. The flags are kept in recipe.json
    for people.
    """
    chosen_by = {"train_subset", "test_subset", "val_size", "extra_data", "demo"}
    flags = {k: v for k, v in run_flags(args).items() if v is not None and k not in chosen_by}
    flags["data"] = training_data(data)
    if args.augment in ("crop", "none"):  # they are in data.pad and data.flip
        del flags["augment"]
    if ":" in args.model:
        digest = initial_digest(args.model, args.seed, getattr(args, "dropout", None) or 0.0)
        flags["initial_weights"] = from_first_process(digest)  # each may draw others
    folder = Path(args.runs) / "teachers" / digest_of(flags)
    if rank() == 0 and not (folder / "recipe.json").exists():
        with lock_file(folder, wait=True):  # whoever locks a folder deletes unfinished files there
            write_json(folder / "recipe.json", flags)
    return folder


# ---- the training loop's helpers ---------------------------------------------------------------


def seed_epoch(seed: int, stage: str, epoch: int) -> None:
    """Seed the global generators by (seed, stage, epoch): the same epoch after any interruption.

    Under torchrun each process draws numbers of its own.
    """
    parts = ["epoch", seed, stage, epoch]
    if rank() > 0:
        parts.append(rank())
    seed_generators(*parts)


def step_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) on the device: loss summed over images, correct predictions, images.

    labels (B,), or probabilities (B, K) of which the largest counts. The host does not wait.
    """
    if labels.dim() == 2:
        labels = labels.argmax(1)
    correct = (logits.detach().argmax(1) == labels).sum()
    loss = loss.detach().float()
    return torch.stack([loss * len(labels), correct.float(), torch.full_like(loss, len(labels))])


def average_gradients(model: nn.Module, images: int) -> None:
    """Under torchrun, between backward() and optimizer.step(): the gradient of the whole batch.

    Each process has the mean gradient of its `images`; the mean weighted by these numbers is that
    of the whole batch, however it is shared (BatchNorm alone sees the share). One transfer.
    DistributedDataParallel would wrap the net: the attack and the two forward passes of a step do
    not go through it, and it takes all shares to be equal.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # filled on the device: with a copy from the host each step would wait for the GPU
    weight = torch.full((1,), float(images), device=gradients[0].device)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    everything = torch.cat([flat * weight, weight])
    dist.all_reduce(everything)
    flat = everything[:-1] / everything[-1]
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


# Flags besides the learning rate whose value can make a loss or weights overflow
STEP_FLAGS = (
    "--temperature",
    "--weight-decay",
    "--sigma",
    "--trades-beta",
    "--mart-beta",
    "--igdm-weight",
    "--awp",
    "--byot-lambda",
)


def epoch_row(args, stage: str, epoch: int, model: nn.Module, history: list, began: float) -> dict:
    """The row of a finished epoch: stage, epoch, loss, train_acc, images_per_second, seconds.

    history: the step_sums of its steps, read here for the first time; began: time.monotonic() at
    its start. A UserError if a loss or a weight is not finite, with the flags of `args` to change.
    Under torchrun the sums are over all processes, and BatchNorm statistics become those of the
    first one.
    """
    steps = torch.stack(history).double()
    if world() > 1:
        dist.all_reduce(steps)
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    steps = steps.cpu()
    seconds = time.monotonic() - began
    finite = steps[:, 0].isfinite().tolist()
    if not all(finite) or not weights_are_finite(model):
        step = finite.index(False) + 1 if not all(finite) else len(steps)
        where = f"{stage}, epoch {epoch + 1}, step {step}"
        raise UserError(f"{where}: loss or weights are not finite; {calmer(args, stage)}")
    loss, correct, images = steps.sum(0).tolist()
    return {
        "stage": stage,
        "epoch": epoch + 1,
        "loss": loss / images,
        "train_acc": correct / images,
        "images_per_second": images / seconds,
        "seconds": seconds,
    }


def calmer(args: argparse.Namespace, stage: str) -> str:
    """The flags to change when a training has diverged, as a part of an error."""
    has_own_lr = not stage.startswith("student") and hasattr(args, "teacher_lr")
    advice = f"try a lower {'--teacher-lr' if has_own_lr else '--lr'}"
    given = [flag for flag in STEP_FLAGS if flag in args.given]
    if given:
        advice += f", or another value of {', '.join(given)}"
    return advice


def validate(args, stage: str, model: nn.Module, data: Data, eps: float | None = None) -> dict:
    """{val_clean_acc, val_pgd7_acc} on the held-out training images; {} if there are none.

    eps: radius of the PGD, 7 steps of eps / 4; None: only clean images. A UserError if logits are
    not finite, with the flags of `args` to change.
    """
    row = {}
    batch_size = evaluation_batch_size(args)
    if rank() == 0 and len(data.x_val):
        try:
            logits = predict(model, data.x_val, batch_size=batch_size, what="held-out images")
            row["val_clean_acc"] = accuracy(logits, data.y_val)
            if eps is not None:
                attack, what = (eps, eps / 4, 7), "attacked held-out images"
                logits = predict(model, data.x_val, data.y_val, attack, batch_size, what)
                row["val_pgd7_acc"] = accuracy(logits, data.y_val)
        except UserError as error:
            raise UserError(f"{stage}: {error}; {calmer(args, stage)}") from None
    return from_first_process(row)


def evaluation_batch_size(args) -> int:
    """At most as many images as a training step has, so that --batch-size bounds all the memory."""
    return min(args.batch_size, 500)


def from_first_process(value):
    """The value that the first process has, in every process; value: a plain Python object."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def best_row(rows: list[dict]) -> dict:
    """The first row with the largest sum of held-out accuracies; {} if no image was held out."""

    def score(row):  # rounded: equal counts of images may have sums that differ in the last bit
        return round(sum(value for key, value in row.items() if key.startswith("val_")), 9)

    return max(rows, key=score) if rows and "val_clean_acc" in rows[0] else {}


def checkpoint_file(folder: Path, stage: str, epochs: int) -> Path:
    """Where the checkpoint after so many epochs is kept: two files take turns."""
    return folder / f"{stage}.checkpoint{epochs % 2}.pt"


def delete_checkpoints(folder: Path) -> None:
    """Delete what only resuming needs."""
    if rank() == 0:
        for path in folder.glob("*.checkpoint[01].pt"):
            path.unlink(missing_ok=True)


def resume(folder: Path, stage: str, state: dict) -> list[dict]:
    """Load the newest readable checkpoint of a stage into `state`: -> rows of its finished epochs.

    state: {name: whatever has state_dict() and load_state_dict()}, all that an epoch changes. A
    damaged checkpoint is reported, and the one before is taken; without any the stage begins.
    """
    sync()  # no process may find a file that another one did not find
    newest = None
    for path in (checkpoint_file(folder, stage, 0), checkpoint_file(folder, stage, 1)):
        if not path.exists():
            continue
        try:
            record = load(path)
            epochs = len(record["rows"])
            if newest is None or epochs > len(newest["rows"]):
                newest = record
        except UserError as error:
            print(f"{error}; the checkpoint before it is taken, if there is one", flush=True)
        except MALFORMED:
            print(f"{path}: not a checkpoint of a run; ignored", flush=True)
    sync()
    if newest is None:
        return []
    try:
        for name, part in state.items():
            if newest["state"][name].keys() != part.state_dict().keys():
                raise ValueError  # a schedule would take names that are not its own
            part.load_state_dict(newest["state"][name])
        rows = [dict(row) for row in newest["rows"]]
        last = {"stage": rows[-1]["stage"], "epoch": rows[-1]["epoch"]}
        if last != {"stage": stage, "epoch": len(rows)} or not all(map(is_epoch_row, rows)):
            raise ValueError
    except MALFORMED:
        advice = "delete its checkpoints, and the stage begins again"
        raise UserError(f"{folder}: not of a run with these flags; {advice}") from None
    print(f"{stage}: goes on after epoch {len(rows)} ({folder})", flush=True)
    write_log(folder, stage, rows)
    return rows


def is_epoch_row(row) -> bool:
    """Whether it is the row of a finished epoch: the name of its stage, and numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str):
        return False
    if not {"epoch", "loss", "images_per_second", "seconds"} <= row.keys():
        return False
    numbers = [value for key, value in row.items() if key != "stage"]
    names_are_text = all(isinstance(key, str) for key in row)
    if not names_are_text or not all(isinstance(number, float | int) for number in numbers):
        return False
    return 0 <= row["seconds"] < 1e9  # the time left is a multiple of it


def save_epoch(folder, stage, model, state, rows, args, may_be_best=True) -> None:
    """Keep a finished epoch: checkpoint, best model, log.jsonl, a line on the terminal.

    model: the net that was validated, kept as <stage>_best.pt if the last of `rows` is the best and
    may be it; state: as for `resume`; args: the flags of the training.
    """
    row, epochs = rows[-1], args.epochs
    if best_row(rows) is row and may_be_best:
        training = args.loss if hasattr(args, "loss") else args.method
        save_model(folder / f"{stage}_best.pt", model, rows, training=training)
    states = {name: part.state_dict() for name, part in state.items()}
    save(checkpoint_file(folder, stage, len(rows)), {"rows": rows, "state": states})
    write_log(folder, stage, rows)
    if args.tensorboard and rank() == 0:
        log_to_tensorboard(folder, row)
    text = f"{stage} {row['epoch']:{len(str(epochs))}d}/{epochs}  loss {row['loss']:.4f}"
    for key, value in row.items():
        if key.endswith("_acc"):
            text += f"  {key.removesuffix('_acc').replace('_', ' ')} {value:.4f}"
    left = (epochs - len(rows)) * np.mean([row["seconds"] for row in rows])
    text += f"  {row['images_per_second']:,.0f} images/s"
    print_line(f"{text}  left {datetime.timedelta(seconds=round(left))}")


def write_log(folder: Path, stage: str, rows: list[dict]) -> None:
    """Put the rows of a stage into log.jsonl, beside those of the stages before it."""
    path, lines = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(*MALFORMED):
            row = json.loads(line)
            if is_epoch_row(row) and row["stage"] != stage:
                lines.append(line)
    lines += [json.dumps(row) for row in rows]
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_log(folder: Path) -> dict[str, list[dict]]:
    """{stage: rows of its epochs} in log.jsonl of a folder; {} if there is none.

    A UserError if a line is damaged.
    """
    path, stages = folder / "log.jsonl", {}
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not is_epoch_row(row):
            raise UserError(f"{path}: damaged: line {number} is not the row of an epoch")
        stages.setdefault(row["stage"], []).append(row)
    return stages


# number of an epoch -> (title of its panel in curves.png, number of the summary that belongs to it)
PANELS = {
    "train_acc": ("training images", None),
    "val_clean_acc": ("clean, held-out images", "clean_acc"),
    "val_pgd7_acc": ("under PGD, held-out images", "pgd20_acc"),
}


def draw_run(folder: Path, rows: list[dict]) -> None:
    """Draw the learning curves of the nets in the summary `rows` of a run: curves.png.

    Accuracy after each epoch on the training images (attacked ones in adversarial training), on
    clean and on attacked held-out images. A star marks the best epoch, a cross the test accuracy at
    the end. Without matplotlib there is no figure.
    """
    logs = {}  # file -> (its first row in the summary, the rows of its epochs)
    for row in rows:
        if row.get("file") and row["net"] != "best" and row["file"] not in logs:
            file = folder / row["file"]
            epochs = read_log(file.parent).get(file.stem)
            if epochs:  # a file of --teacher-ckpt may lie alone
                logs[row["file"]] = row, epochs
    numbers = {key for _, epochs in logs.values() for key in epochs[0]}
    panels = [key for key in PANELS if key in numbers]
    figure = new_figure(3.7 * len(panels), 3.4) if panels and rank() == 0 else None
    if figure is None:
        return
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]))
    for (row, epochs), colour in zip(logs.values(), itertools.cycle(COLOURS)):
        best, last = best_row(epochs).get("epoch"), len(epochs)
        for key in set(panels) & set(epochs[0]):
            accuracies = [100 * epoch[key] for epoch in epochs]
            axes[key].plot(range(1, last + 1), accuracies, color=colour, label=row["model"])
            if best and key != "train_acc":
                axes[key].plot(best, accuracies[best - 1], "*", color=colour, markersize=11)
            test_accuracy = row.get(PANELS[key][1])
            if test_accuracy is not None:
                axes[key].plot(last, 100 * test_accuracy, "x", color=colour, markersize=7)
    for key, axis in axes.items():
        axis.set(xlabel="epoch", ylabel="accuracy, %", title=PANELS[key][0])
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[panels[0]].legend(title="star: best epoch, cross: test", title_fontsize=8)
    save_figure(figure, folder / "curves.png")


def log_to_tensorboard(folder: Path, row: dict) -> None:
    """Write the numbers of an epoch for TensorBoard, in a file of its own."""
    from torch.utils.tensorboard import SummaryWriter

    suffix = f".{row['stage']}-{row['epoch']}"
    with naming(folder), SummaryWriter(folder, filename_suffix=suffix) as writer:
        for key, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(f"{row['stage']}/{key}", value, row["epoch"])


def save_model(path: Path, model: nn.Module, rows: list[dict] = (), **meta) -> None:
    """Write a model: its weights, its `build_arguments`, and `meta`: numbers and names.

    meta gets from the rows of its training: epoch, seconds and the row of the best epoch. Under
    torchrun all processes find the file afterwards.
    """
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        meta = {"epoch": len(rows), "seconds": seconds, "best": best_row(rows)} | meta
    save(path, {"arch": model.build_arguments, "weights": model.state_dict(), "meta": meta})
    sync()


def weights_digest(path: Path) -> str:
    """16 hex digits of the weights in a saved model, whatever its meta says."""
    return state_digest(load(path)["weights"])


def state_digest(weights: dict) -> str:
    """16 hex digits of a state_dict."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def given_teacher(args: argparse.Namespace, data: Data, dropout: float = 0.0) -> nn.Module:
    """The teacher of --teacher-ckpt, in eval mode with frozen weights.

    Its file is one of save_model, or a state_dict of the net that --teacher-model (or --model)
    names. Raises UserError.
    """
    path, name = args.teacher_ckpt, args.teacher_model or args.model
    if not has_our_format(load_tensors(path)):
        size, channels = data.x_test.shape[2:]
        model = build_model(name, len(data.classes), dropout, channels, size)
        load_weights("--teacher-ckpt", path, model)
        model.meta = {"file": path}
        return model.to(data.x_test.device).eval().requires_grad_(False)
    return load_model(path, data, name if "--teacher-model" in args.given else None)


# ---- the end of a run --------------------------------------------------------------------------


def training_columns(model: nn.Module, folder: Path) -> dict:
    """The columns of a summary that say how a net was trained: epochs, seconds, file.

    The file is named as seen from the run's `folder`, which may be moved with all other runs.
    """
    meta = getattr(model, "meta", {})
    file = meta.get("file")
    if file is not None:
        file = os.path.relpath(file, folder)
    return {"epochs": meta.get("epoch"), "seconds": meta.get("seconds"), "file": file}


def read_summary(folder: Path) -> list[dict] | None:
    """The rows in summary.json of a run; None if it is not there; a UserError if it is damaged."""
    path = folder / "summary.json"
    rows = read_json(path)
    if rows is None:
        return None
    is_list = isinstance(rows, list) and len(rows) > 0
    if not is_list or not all(map(is_summary_row, rows)):
        raise UserError(f"{path}: damaged; delete it, and the same command makes it again")
    return rows


def is_summary_row(row) -> bool:
    """Whether it is a row of a summary: role and label of a net, perhaps its file, and numbers."""
    if not isinstance(row, dict):
        return False
    if not all(isinstance(row.get(key), str) for key in ("net", "model")):
        return False
    file_is_name = isinstance(row.get("file"), str | None)
    numbers = [v for k, v in row.items() if k.endswith("_acc") or k in ("epochs", "seconds")]
    return file_is_name and all(isinstance(v, float | int | None) for v in numbers)


def finish_run(folder: Path, rows: list[dict]) -> None:
    """Write summary.json: with it the run is finished."""
    sync()  # until every process has read what it needs from the folder
    write_json(folder / "summary.json", rows)


def show_run(folder: Path, rows: list[dict]) -> None:
    """Print the summary of a finished run; draw its curves.png if it is not there yet.

    Its checkpoints are deleted here: a kill may have come after the summary was written.
    """
    delete_checkpoints(folder)
    if not (folder / "curves.png").exists():
        with drawing(folder / "curves.png"):
            draw_run(folder, rows)
    files = " ".join(path.name for path in sorted(folder.glob("*.pt")))
    print(f"\n{summary_table(rows)}\n\n{folder} is finished: log.jsonl {files}", flush=True)


def show_mean(seeds: list[int], summaries: list[list[dict]]) -> None:
    """Print the mean and deviation of the summaries of several seeds; of one seed nothing."""
    if len(seeds) > 1:
        print(f"\nmean +- std of seeds {' '.join(map(str, seeds))}")
        print(summary_table(mean_and_std(summaries)), flush=True)


def summary_table(rows: list[dict]) -> str:
    """The rows of a summary as a table, without the columns that are for programs."""

    def is_for_programs(key):
        return key in ("net", "file") or key.endswith("_conditional_acc")

    return table([{k: v for k, v in row.items() if not is_for_programs(k)} for row in rows])


def mean_and_std(summaries: list[list[dict]]) -> list[dict]:
    """Rows of each seed -> rows of "mean +- std" (n - 1); a row that a seed lacks is left out.

    A net that all seeds share, such as their teacher, is one net: it has no deviation.
    """
    rows = []
    for first in summaries[0]:
        same = [row for rows_ in summaries for row in rows_ if row["model"] == first["model"]]
        if len(same) < len(summaries):  # a best epoch that is not the last has a row of its own
            continue
        merged = dict(first)
        file = first.get("file") or ""
        shared = file.startswith("..") and all(row.get("file") == file for row in same)
        for key, value in first.items():
            values = [row.get(key) for row in same]
            if shared and values.count(value) == len(values):
                continue
            if None in values:
                merged[key] = None
            elif isinstance(value, float) or isinstance(value, int) and len({*values}) > 1:
                digits = 4 if "_acc" in key else 1
                mean, std = np.mean(values), np.std(values, ddof=1)
                merged[key] = f"{mean:.{digits}f} +- {std:.{digits}f}"
        rows.append(merged)
    return rows
