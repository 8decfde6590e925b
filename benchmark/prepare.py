"""Make an .npz of a data set: parts of CIFAR-10, or what comes as a folder of image files.

Usage    python benchmark/prepare.py cifar10-16      # images of 16 x 16: the claims, the lesson
         python benchmark/prepare.py planes-cars     # two classes: the paper's trajectories
         python benchmark/prepare.py tiny-imagenet tiny-imagenet-200
         python benchmark/prepare.py cinic10 CINIC-10
Result   NAME.npz in the folder of --data-root; one that is there is left as it is.
cifar10-16, planes-cars  are made of cifar10.npz in that folder.
tiny-imagenet  The unpacked tiny-imagenet-200.zip; its validation images are the test images.
cinic10  CINIC-10 (Darlow et al., 2018, 1810.03505; doi 10.7488/ds/2448), for eval_robustness.py
         --attack cinic: x_test, y_test and classes. Only its images from ImageNet are taken, of all
         three parts, 2,100 of each class as in the noisy collaboration paper, always the same ones;
         --per-class 21000 takes all.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

PARTS_OF_CIFAR10 = ("cifar10-16", "planes-cars")
FOLDERS = ("tiny-imagenet", "cinic10")


def parse_args(argv=None):
    """The data set and its flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", choices=PARTS_OF_CIFAR10 + FOLDERS, help="data set to make")
    add("folder", metavar="FOLDER", nargs="?", help="folder of the unpacked data set")
    add("--data-root", default="data", help="folder of the data sets, into which it is written")
    add("--per-class", type=common.whole, default=2100, help="images of each class of CINIC-10")
    args = parser.parse_args(argv)
    if (args.folder is not None) != (args.name in FOLDERS):
        parser.error(f"FOLDER: goes with {' and '.join(FOLDERS)} alone, which need it")
    return args


def main(argv=None):
    """Make the .npz unless it is there."""
    args = parse_args(argv)
    path = Path(args.data_root) / f"{args.name}.npz"
    if path.exists():
        print(f"{path} is there")
        return
    if args.name == "cinic10":
        arrays = read_cinic10(Path(args.folder), args.per_class)
    elif args.name == "tiny-imagenet":
        arrays = read_tiny_imagenet(Path(args.folder))
    else:
        cifar10 = Path(args.data_root) / "cifar10.npz"
        if not cifar10.exists():
            program = f'import common; common.load_data("cifar10", "{args.data_root}")'
            advice = f"python -c '{program}' makes it"
            raise common.UserError(f"--data-root: there is no {cifar10}; {advice}")
        arrays = common.read_npz(cifar10)
        arrays = small_images(arrays) if args.name == "cifar10-16" else planes_and_cars(arrays)
    common.write_atomically(path, lambda file: np.savez(file, **arrays))
    print(f"{path}: {len(arrays['x_test'])} test images of {len(arrays['classes'])} classes")


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


def read_cinic10(folder, per_class):
    """{x_test, y_test, classes}: `per_class` images of each class from ImageNet, from all parts."""

    def is_from_imagenet(path):  # the images of CIFAR-10 have cifar in their names
        name = Path(path).name
        return not name.startswith(".") and "cifar" not in name

    files, labels, classes = [], [], None
    for part in ("train", "valid", "test"):
        listed = common.list_class_folders(folder / part, is_from_imagenet)
        files += listed[0]
        labels.append(listed[1])
        classes = classes or listed[2]
        if listed[2] != classes:
            raise common.UserError(f"{folder}: train and {part} have different class folders")
    for file in files:
        if not re.fullmatch(r"n\d{8}_\d+\.png", file.name):
            raise common.UserError(f"{file}: neither an ImageNet name nor a CIFAR one")
    labels = np.concatenate(labels)
    chosen, generator = [], np.random.RandomState(0)
    for k in range(len(classes)):
        numbers = np.flatnonzero(labels == k)
        if len(numbers) < per_class:
            few = f"class {classes[k]} has {len(numbers)} images"
            raise common.UserError(f"--per-class {per_class}: {folder}: {few}")
        chosen.append(np.sort(generator.choice(numbers, per_class, replace=False)))
    chosen = np.concatenate(chosen)
    x = common.read_images([files[i] for i in chosen])
    return {"x_test": x, "y_test": labels[chosen], "classes": classes}


def read_tiny_imagenet(folder):
    """The arrays of the unpacked official zip: 64x64; its validation images are the test images."""
    train = common.read_class_folders(folder / "train")
    try:
        lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        pairs = [line.split()[:2] for line in lines]
        files = [folder / "val" / "images" / file for file, _ in pairs]
        labels = np.array([train["classes"].index(name) for _, name in pairs])
    except (OSError, ValueError) as error:
        raise common.UserError(
            f"{folder}: expected the unpacked tiny-imagenet-200.zip ({error})"
        ) from None
    return {
        "x_train": train["x"],
        "y_train": train["y"],
        "x_test": common.read_images(files),
        "y_test": labels,
        "classes": train["classes"],
    }


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
