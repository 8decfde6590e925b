"""Make an .npz of a data set that comes as a folder of image files.

Usage    python benchmark/prepare.py cinic10 CINIC-10 data/cinic10.npz
         python benchmark/prepare.py tiny-imagenet tiny-imagenet-200 data/tiny-imagenet.npz
cinic10  CINIC-10 (Darlow et al., 2018, 1810.03505; doi 10.7488/ds/2448), for eval_robustness.py
         --attack cinic --cinic data/cinic10.npz: x_test, y_test and classes. Only its images from
         ImageNet are taken, of all three parts, 2,100 of each class as in the noisy collaboration
         paper, always the same ones; --per-class 21000 takes all.
tiny-imagenet  The unpacked tiny-imagenet-200.zip, for --data tiny-imagenet; its validation images
         are the test images.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark.commands import add_command, add_commands


def parse_args(argv=None):
    """The data set and its flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    data_sets = add_commands(parser, "data_set")
    for name, doc in {
        "cinic10": "CINIC-10's images from ImageNet",
        "tiny-imagenet": "the images of Tiny-ImageNet",
    }.items():
        add = add_command(data_sets, name, doc)
        add("folder", metavar="FOLDER", help="folder of the unpacked data set")
        add("out", metavar="FILE.npz", help="file to write, which must not be there yet")
        if name == "cinic10":
            add("--per-class", type="positive int", default=2100, help="number of images per class")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".npz":
        parser.error(f"FILE.npz: expected a name that ends in .npz, got {args.out}")
    return args


def main(argv=None):
    """Read the folder and write the .npz."""
    args = parse_args(argv)
    folder, out = Path(args.folder), Path(args.out)
    if out.exists():
        raise common.UserError(f"{out}: is there already; delete it, or take another name")
    if args.data_set == "cinic10":
        arrays = read_cinic10(folder, args.per_class)
    else:
        arrays = read_tiny_imagenet(folder)
    common.write_atomically(out, lambda file: np.savez(file, **arrays))
    print(f"{out}: {len(arrays['x_test'])} test images of {len(arrays['classes'])} classes")


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
    common.start(main, stopped="nothing is written; the same command begins again:")
