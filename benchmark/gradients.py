"""Heat map of the mean |gradient| of each layer: Figure 1 of the adversarial-context paper.

Usage    python teacher_free_kd.py --method tf-kd-self --grad-heatmap a.npz     # writes, shows it
         python benchmark/gradients.py a.npz b.npz --out both.png               # of several runs
Cell     |dL/dW| of a convolution or linear layer: the mean over its elements and over the
         minibatches of an epoch, before weight decay                  <- common.Gradients
File     for each model trained in the run <row>/means (epochs, layers), <row>/epochs (epochs,),
         <row>/layers (layers,): "2.1" is layer 1 of stage 2, "2.shortcut" that of its shortcut
Written  with matplotlib a picture; the numbers are printed with and without it
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def parse_args(argv=None):
    """The flags of this program; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="written by --grad-heatmap")
    parser.add_argument(
        "--out", metavar="FILE.png", help="the picture; None: beside the first FILE"
    )
    args = parser.parse_args(argv)
    if args.out and Path(args.out).suffix != ".png":
        parser.error(f"--out: expected FILE.png, got {args.out}")
    return args


def write(path, models):
    """Write the gradients kept in models, {row: (model, meta)}, to `path`; print and draw them."""
    found = {name: meta["gradients"] for name, (_, meta) in models.items() if "gradients" in meta}
    arrays = {f"{n}/{k}": np.array(v) for n, kept in found.items() for k, v in kept.items()}
    common.write_atomically(path, lambda file: np.savez(file, **arrays))
    show(found, path.with_suffix(".png"))


def read(path):
    """What `write` wrote: {row: {epochs: (E,), layers: (L,), means: (E, L)}}; else an error."""
    found = {}
    try:
        common.check_zip(path)
        with np.load(path) as file:
            for key in file:
                name, _, kind = key.rpartition("/")
                found.setdefault(name, {})[kind] = file[key].tolist()
        for kept in found.values():
            shape = len(kept["epochs"]), len(kept["layers"])
            if np.array(kept["means"], float).shape != shape:
                raise ValueError(f"means that are not of {shape[0]} epochs, {shape[1]} layers")
            kept["layers"] = [f"{layer}" for layer in kept["layers"]]
    except Exception as error:  # numpy and zipfile raise half a dozen types for a damaged file
        common.fail(f"{path}: no file of --grad-heatmap ({error!r:.200})")
    return found


def show(found, path):
    """Print {row: {epochs, layers, means}}, a line for each stage; draw it to `path`."""
    names = {layer[2:] for kept in found.values() for layer in kept["layers"]}
    columns = sorted(names, key=lambda name: (len(name), name))  # 1, ..., 10, ..., shortcut
    grid = {}  # line -> column -> mean
    for name, kept in found.items():
        for epoch, means in zip(kept["epochs"], kept["means"]):
            for layer, mean in zip(kept["layers"], means):
                line = grid.setdefault(f"{name}, epoch {epoch}, stage {layer[0]}", {})
                line[layer[2:]] = mean
    rows = [{"row": k} | {c: f"{v:.1e}" for c, v in line.items()} for k, line in grid.items()]
    print(f"\nmean |gradient|\n{common.table(rows)}", flush=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    size = 4 + 0.6 * len(columns), 1 + 0.2 * len(grid)
    figure = Figure(size, dpi=75, layout="constrained")
    axes = figure.subplots()
    cells = [[line.get(column, math.nan) for column in columns] for line in grid.values()]
    figure.colorbar(axes.imshow(cells, norm="log", aspect="auto"), label="mean |dL/dW|")
    axes.set(xlabel="layer", xticks=range(len(columns)), xticklabels=columns)
    axes.set(yticks=range(len(grid)), yticklabels=grid)
    common.write_atomically(path, figure.savefig)


def main(argv=None):
    """Read the files, print their numbers as one table, draw them as one picture."""
    args, found = parse_args(argv), {}
    for path in args.files:
        prefix = f"{Path(path).stem}: " if len(args.files) > 1 else ""
        found |= {prefix + name: kept for name, kept in read(path).items()}
    try:
        show(found, Path(args.out or args.files[0]).with_suffix(".png"))
    except OSError as error:
        common.fail(f"--out: {error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
