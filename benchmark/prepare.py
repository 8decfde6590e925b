"""Make data sets of CIFAR-10: 16 x 16 pixels, or two of its classes.

Usage    python benchmark/prepare.py                        # both, as data/NAME.npz
         python benchmark/prepare.py cifar10-16             # images of 16 x 16: claims, lesson
         python benchmark/prepare.py planes-cars            # two classes: the paper's trajectories
Source   data/cifar10.npz, which common.load_data("cifar10") makes.
"""

import functools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def parse_args(argv=None):
    """The flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"data sets to make: {', '.join(SETS)}")
    add("--data-root", default="data", help="folder with cifar10.npz, to which they are written")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in SETS]
    if unknown:
        parser.error(f"NAME: expected some of {', '.join(SETS)}, got {unknown[0]}")
    return args


def planes_and_cars(arrays):
    """The first two classes of CIFAR-10, in their order."""
    chosen = {"classes": common.CLASS_NAMES["cifar10"][:2]}
    for part in ("train", "test"):
        keep = arrays[f"y_{part}"] < 2
        for key in (f"x_{part}", f"y_{part}"):
            chosen[key] = arrays[key][keep]
    return chosen


def small_images(arrays):
    """CIFAR-10 with half as many pixels in each direction: means of 2 x 2, rounded."""
    small = arrays | {"classes": common.CLASS_NAMES["cifar10"]}
    for key in ("x_train", "x_test"):
        x = arrays[key]  # uint8 (N, 32, 32, 3)
        sums = x[:, ::2, ::2].astype(np.float32)
        for row, column in ((0, 1), (1, 0), (1, 1)):
            sums += x[:, row::2, column::2]
        small[key] = (sums / 4).round().astype(np.uint8)
    return small


SETS = {"cifar10-16": small_images, "planes-cars": planes_and_cars}


def main(argv=None):
    """Make what is asked for and not there yet."""
    args = parse_args(argv)
    root = Path(args.data_root)
    cifar10 = root / "cifar10.npz"
    if not cifar10.exists():
        advice = "python -c 'import common; common.load_data(\"cifar10\")' makes it"
        raise common.UserError(f"--data-root: there is no {cifar10}; {advice}")
    for name in args.names or SETS:
        path = root / f"{name}.npz"
        if not path.exists():
            arrays = SETS[name](common.read_npz(cifar10))
            common.write_atomically(path, functools.partial(np.savez, **arrays))
        print(f"{path} is there")


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
