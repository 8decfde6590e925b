"""The figure of eval_robustness.py --plot: accuracy against eps, probabilities, corruptions."""

from pathlib import Path

import numpy as np

import common


def draw_probabilities(axis, shares):
    """Draw {line: share of the softmax probabilities, of all classes, in each of equal bins}.

    Figure 8 of the noisy collaboration paper.
    """
    for name, share in shares.items():
        axis.stairs(share, np.linspace(0, 1, len(share) + 1), label=name)
    axis.set(xlabel="softmax probabilities of all classes", yscale="log", ylabel="share")
    axis.legend(fontsize=7)


def plot(path, record):
    """Write a figure: accuracy against eps of all rows, two histograms, corruptions."""
    from matplotlib.figure import Figure

    rows = {"/".join(Path(r["model"]).parts[-2:])[-36:]: r for r in record["rows"]}
    histograms = [(n, k, v) for n, r in rows.items() for k, v in r.get("calibration", {}).items()]
    maps = [(n, r["corruptions"]["corruptions_acc"]) for n, r in rows.items() if "corruptions" in r]
    columns = 1 + 2 * bool(histograms) + len(maps)
    figure = Figure((5 * columns, 4.5), layout="tight")
    axes = figure.subplots(1, columns, squeeze=False)
    for name, row in rows.items():
        eps, accuracy = np.array(row["curve"]).T
        axes[0, 0].plot(255 * eps, accuracy, marker=".", label=name)
    axes[0, 0].set(xlabel=f"255 eps ({record['norm']})", ylabel="accuracy (APGD-CE, 20 iterations)")
    for name, kind, numbers in histograms:
        edges = np.linspace(0, 1, len(numbers["confidence"]) + 1)
        axes[0, 1].stairs(numbers["confidence"], edges, label=f"{name}, {kind}")
        axes[0, 1].set(xlabel="largest probability", yscale="log", ylabel="share of the images")
    if histograms:
        shares = {f"{name}, {kind}": v["probabilities"] for name, kind, v in histograms}
        draw_probabilities(axes[0, 2], shares)
    for axis, (name, table) in zip(axes[0, ::-1], maps):
        figure.colorbar(axis.imshow(list(table.values()), vmin=0, vmax=1, aspect="auto"))
        axis.set(title=f"{name}: accuracy", xlabel="severity", xticks=range(5))
        axis.set(xticklabels=range(1, 6), yticks=range(len(table)))
        axis.set_yticklabels(table, fontsize=6)
    for axis in axes[0, : columns - len(maps)]:
        axis.legend(fontsize=7)
    kind = Path(path).suffix[1:] or "png"
    common.write_atomically(Path(path), lambda file: figure.savefig(file, format=kind, dpi=150))
