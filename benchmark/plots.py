"""Figures: learning curves of runs, gradients, trajectories; those of the claims and the league.

Usage    python benchmark/plots.py curves AT=runs/robust_kd/at-s0 AKD=runs/robust_kd/akd-s0
         python teacher_free_kd.py --method tf-kd-self --grad-heatmap
         python benchmark/plots.py gradients RUN/gradients.npz RUN/gradients.npz --out both.png
         python robust_kd.py --loss akd --save-every 1 --data data/planes-cars.npz --name a
         python benchmark/plots.py trajectories runs/robust_kd/a-s0
         python benchmark/plots.py trajectories RUN RUN --labels A B --out FOLDER
Curves   held-out clean and PGD accuracy after each epoch of the student. Runs with the same label
         are one line, their mean, with a band of one standard deviation; a star marks the best
         epoch (the largest sum of both accuracies, on the mean).
Gradients  a cell is |dL/dW| of a convolution or linear layer: the mean over its elements and over
         the minibatches of an epoch (Figure 1 of the adversarial-context paper). Layer "2.1" is
         layer 1 of stage 2, "2.shortcut" that of its shortcut. The numbers are printed too.
Trajectories  Figures 5 to 17 of paper 2; numbers in trajectories.json, the figures run-LABEL.png
         (6, 7, 10, 13 to 15), comparison.png (5, 11, 12, 16, 17) and images.png (8, 9: a run of
         --loss st). The two classes of the paper: python benchmark/prepare.py planes-cars.
         The paper does not say which p_T a student of an early-stopped teacher is compared with.
         Here: that of its own teacher, as it was stopped, and the cosine is over the epochs that
         both have, the first ones of the student. With --teacher FILE it is that net's for all:
         what the text says of Figure 11 fits a teacher that was not stopped.
Style    Okabe-Ito colours, which the colour-blind can tell apart. Needs matplotlib; without it the
         numbers of gradients and trajectories are printed and written all the same.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import trajectories

NO_MATPLOTLIB = "no figure: matplotlib is not installed; pip install matplotlib"
# Of images.png: images of each class at each end, images beside each other, classes at most
EXTREME_IMAGES, IMAGE_COLUMNS, IMAGE_CLASSES = 32, 8, 10
RANK = "test images, easiest to hardest"  # of the horizontal axes


def parse_args(argv=None):
    """The figure and its flags as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    jobs = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE", prog=parser.prog)
    text = "learning curves of several runs"
    add = jobs.add_parser("curves", doc=text, help=text).add_argument
    add("runs", nargs="+", metavar="[LABEL=]RUN", help="folder of a run, perhaps with its label")
    add("--out", default="curves.png", metavar="FILE.png", help="file of the figure")
    text = "heat map of the mean gradient of each layer"
    add = jobs.add_parser("gradients", doc=text, help=text).add_argument
    add("files", nargs="+", metavar="FILE.npz", help="file written by --grad-heatmap")
    add("--out", metavar="FILE.png", help="file of the figure (default: beside the first FILE)")
    text = "what each epoch made of each image"
    add = jobs.add_parser("trajectories", doc=text, help=text).add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run of robust_kd.py --save-every 1")
    add("--labels", nargs="+", metavar="LABEL", help="one for each RUN (default: folder names)")
    add("--teacher", metavar="FILE", help="net to compare with (default: the run's own teacher)")
    add("--data-root", default="data", help="folder with the data set of the runs")
    add("--out", metavar="FOLDER", help="output folder (default: trajectories in the first RUN)")
    args = parser.parse_args(argv)
    is_file = args.figure in ("curves", "gradients")
    if is_file and args.out and Path(args.out).suffix != ".png":
        parser.error(f"--out: expected FILE.png, got {args.out}")
    if args.figure == "curves":
        set_labels(args)
    if args.figure == "trajectories":
        args.labels = args.labels or [Path(run).resolve().name for run in args.runs]
        if len(args.labels) != len(args.runs) or len(set(args.labels)) < len(args.labels):
            parser.error("--labels: expected one for each RUN, all different")
    return args


def set_labels(args):
    """args.runs and args.labels of `curves`, from [LABEL=]RUN; raises UserError.

    The name of a run may hold "=" too: the text after the label must be a folder. Runs of one name
    in two folders, such as those of two scripts, are not averaged without a label.
    """
    args.labels, runs, folder_of, seen = [], [], {}, set()
    for text in args.runs:
        label, run = re.sub(r"-s\d+$", "", Path(text).resolve().name), text
        for place in [match.start() for match in re.finditer("=", text)]:
            if not Path(text).is_dir() and Path(text[place + 1 :]).is_dir():
                label, run = text[:place], text[place + 1 :]
                break
        else:
            folder = Path(run).resolve().parent
            if folder_of.setdefault(label, folder) != folder:
                other = f"{folder_of[label]} has runs of the name {label} too"
                raise common.UserError(f"{run}: {other}; tell them apart by LABEL=RUN")
        if (label, Path(run).resolve()) in seen:
            raise common.UserError(f"{run}: expected each run once")
        seen.add((label, Path(run).resolve()))
        args.labels.append(label)
        runs.append(run)
    args.runs = runs


# ------------------------------------------------------------------------------------------------
# Learning curves


def read_curves(folder):
    """{val_...: accuracies after each epoch of the student} from log.jsonl; raises UserError."""
    log = Path(folder) / "log.jsonl"
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "student"]
        names = [name for name in rows[0] if name.startswith("val_")] if rows else []
        accuracies = {name: [float(row[name]) for row in rows] for name in names}
    except FileNotFoundError:
        raise common.UserError(f"{log}: no such file; give the folder of a run") from None
    except (ValueError, KeyError, TypeError):
        raise common.UserError(f"{log}: not the log of a run") from None
    if not accuracies:
        missing = "no held-out accuracies of a student; train one with --val-size above 0"
        raise common.UserError(f"{log}: {missing}")
    return accuracies


def group_curves(folders, labels):
    """{label: {val_...: accuracies (runs, epochs)}}, over the epochs that all its runs have."""
    runs_of = {}
    for label, folder in zip(labels, folders):
        runs_of.setdefault(label, []).append(read_curves(folder))
    groups = {}
    for label, runs in runs_of.items():
        groups[label] = {}
        for name in runs[0]:
            if all(name in run for run in runs):
                epochs = min(len(run[name]) for run in runs)
                groups[label][name] = np.array([run[name][:epochs] for run in runs])
    return groups


def best_epoch(curves):
    """The first epoch (from 0) with the largest sum of the mean held-out accuracies."""
    return int(np.argmax(np.round(sum(values.mean(0) for values in curves.values()), 9)))


def draw_curves(path, groups):
    """Write the learning curves of `group_curves`; False without matplotlib."""
    panels, stars = {"clean": {}, "under PGD": {}}, {}
    for label, curves in groups.items():
        stars[label] = best_epoch(curves)
        for name, values in curves.items():
            panels["clean" if name == "val_clean_acc" else "under PGD"][label] = values
    panels = {title: lines for title, lines in panels.items() if lines}
    return draw_panels(path, panels, common.new_figure(4 * len(panels), 3.4), 1, stars)


def draw_regimes(path, panels):
    """Write {title: {label: accuracies (runs, epochs)}} of benchmark/claims.py, a panel each.

    False without matplotlib.
    """
    return draw_panels(path, panels, common.new_figure(10, 6), 2)


def draw_panels(path, panels, figure, rows, stars=()):
    """Write {title: {label: accuracies (runs, epochs)}}, a panel each; False without a figure.

    stars: {label: the epoch, from 0, that is marked}.
    """
    if figure is None:
        return False
    axes = figure.subplots(rows, math.ceil(len(panels) / rows), squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items()):
        for label, values in lines.items():
            colour = common.COLOURS[labels.index(label) % len(common.COLOURS)]
            draw_band(axis, values, label, colour)
            if label in stars:
                best = stars[label]
                best_acc = 100 * values.mean(0)[best]
                axis.plot(best + 1, best_acc, "*", color=colour, markersize=12)
        axis.set(xlabel="epoch", ylabel="held-out accuracy, %", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(title="star: best epoch" if stars else None, title_fontsize=8)
    common.save_figure(figure, path)
    return True


def draw_band(axis, values, label, colour):
    """Draw accuracies (runs, epochs): their mean and, of several runs, a band of +- deviation."""
    text = label if len(values) == 1 else f"{label} ({len(values)} runs)"
    middle, epochs = 100 * values.mean(0), np.arange(1, values.shape[1] + 1)
    axis.plot(epochs, middle, color=colour, label=text)
    if len(values) > 1:
        spread = 100 * values.std(0, ddof=1)
        low, high = middle - spread, middle + spread
        axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def plot_curves(args):
    """The sub-command `curves`."""
    groups = group_curves(args.runs, args.labels)
    rows = []
    for label, curves in groups.items():
        best = best_epoch(curves)
        row = {"label": label, "runs": len(next(iter(curves.values()))), "best epoch": best + 1}
        for name, values in curves.items():
            row[f"{name}, best"] = values.mean(0)[best]
            row[f"{name}, last"] = values.mean(0)[-1]
        rows.append(row)
    print(common.table(rows))
    drawn = draw_curves(Path(args.out), groups)
    print(f"written: {args.out}" if drawn else NO_MATPLOTLIB)


# ------------------------------------------------------------------------------------------------
# Gradients: Figure 1 of the adversarial-context paper


def read_gradients(path):
    """{net: {epochs: (E,), layers: (L,), means: (E, L)}} of a file of --grad-heatmap."""
    gradients = {}
    try:
        common.check_zip(path)
        with np.load(path) as file:
            for key in file:
                net, _, part = key.rpartition("/")
                gradients.setdefault(net, {})[part] = file[key].tolist()
        for parts in gradients.values():
            shape = len(parts["epochs"]), len(parts["layers"])
            if np.array(parts["means"], float).shape != shape:
                raise ValueError(f"means that are not of {shape[0]} epochs, {shape[1]} layers")
            parts["layers"] = [str(layer) for layer in parts["layers"]]
    except Exception as error:  # numpy and zipfile raise half a dozen types for a damaged file
        raise common.UserError(f"{path}: no file of --grad-heatmap ({error!r:.200})") from None
    return gradients


def gradient_lines(gradients):
    """{net: {"epoch e, stage s": {layer of the stage: mean |gradient|}}}: lines of heat maps."""
    lines = {}
    for net, parts in gradients.items():
        lines[net] = {}
        for epoch, means in zip(parts["epochs"], parts["means"]):
            for layer, mean in zip(parts["layers"], means):
                stage, name = layer[0], layer[2:]
                lines[net].setdefault(f"epoch {epoch}, stage {stage}", {})[name] = mean
    return lines


def draw_gradients(path, lines):
    """Write the heat maps of `gradient_lines`, a panel for each net; False without matplotlib."""
    names = {name for of_net in lines.values() for line in of_net.values() for name in line}
    columns = sorted(names, key=lambda name: (len(name), name))  # 1, ..., 10, ..., shortcut
    most = max(len(of_net) for of_net in lines.values())
    figure = common.new_figure(2 + (1.5 + 0.5 * len(columns)) * len(lines), 1.2 + 0.25 * most)
    if figure is None:
        return False
    cells = {
        net: np.array([[line.get(name, math.nan) for name in columns] for line in of_net.values()])
        for net, of_net in lines.items()
    }
    low = min(np.nanmin(values) for values in cells.values())
    high = max(np.nanmax(values) for values in cells.values())
    axes = figure.subplots(1, len(lines), squeeze=False)[0]
    for axis, (net, values) in zip(axes, cells.items()):
        image = axis.imshow(values, norm="log", aspect="auto", clim=(low, high))
        axis.grid(False)
        axis.set(xlabel="layer of the stage", xticks=range(len(columns)), xticklabels=columns)
        axis.set(title=net, yticks=range(len(values)), yticklabels=lines[net])
    figure.colorbar(image, ax=axes, label="mean |dL/dW|")
    common.save_figure(figure, path)
    return True


def plot_gradients(args):
    """The sub-command `gradients`: several files make one table and one figure."""
    gradients = {}
    for path in args.files:
        for net, parts in read_gradients(path).items():
            file = Path(path).resolve()
            label = file.parent.name if file.stem == "gradients" else file.stem
            name = f"{label}: {net}" if len(args.files) > 1 else net
            if name in gradients:
                raise common.UserError(f"{path}: there are two runs named {label}; rename one")
            gradients[name] = parts
    lines = gradient_lines(gradients)
    rows = []
    for net, of_net in lines.items():
        for name, line in of_net.items():
            means = {layer: f"{mean:.1e}" for layer, mean in line.items()}
            rows.append({"row": f"{net}, {name}"} | means)
    print(f"\nmean |gradient|\n{common.table(rows)}", flush=True)
    path = Path(args.out or args.files[0]).with_suffix(".png")
    drawn = draw_gradients(path, lines)
    print(f"written: {path}" if drawn else NO_MATPLOTLIB)


# ------------------------------------------------------------------------------------------------
# Trajectories: Figures 5 to 17 of paper 2


def draw_trajectories_of_run(figure, label, numbers, window):
    """Figures 6, 7, 10 (13 to 15): cosine, p_T and p_S - p_T of each image, by difficulty."""
    titles = {
        "cosine": "agreement of student and teacher (cosine over epochs)",
        "teacher": "teacher: probability of the right class",
        "change": "student's probability minus teacher's",
    }
    axes = figure.subplots(len(numbers), len(titles), sharex=True, sharey="col")
    for line, (kind, values) in zip(axes, numbers.items()):
        order = trajectories.easiest_first(values["difficulty"])
        rank = np.arange(1, len(order) + 1)
        for axis, key in zip(line, titles):
            y = values[key][order]
            axis.plot(rank, y, ".", color=common.COLOURS[5], markersize=2, alpha=0.5)
            axis.plot(rank, trajectories.smooth(y, window), color=common.COLOURS[1], linewidth=2)
        line[0].set_ylabel(f"{kind} images")
        line[-1].axhline(0, color="black", linewidth=0.6)
    for column, title in enumerate(titles.values()):
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel(RANK)
    note = f"dots: test images; line: running mean of {window} of them"
    figure.suptitle(f"{label} ({note})", fontsize=11)


def draw_entropies(axis, runs):
    """Figure 5: the mean entropy after each epoch, of a teacher that several runs share once."""
    drawn = []
    for i, run in enumerate(runs):
        for role, style in (("student", "o-"), ("teacher", "s--")):
            entropy = run[role]["entropy"].tolist() if run[role] else None
            if entropy is None or (role, entropy) in drawn:
                continue
            drawn.append((role, entropy))
            colour = common.COLOURS[i % len(common.COLOURS)]
            label = f"{run['label']}, {role}"
            axis.plot(range(1, len(entropy) + 1), entropy, style, color=colour, label=label)
    axis.set(xlabel="epoch", ylabel="nats", title="mean entropy on the training images")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()


def draw_changes(axis, runs, kind, window):
    """Figures 11, 12, 16, 17: the smoothed p_S - p_T of all runs that have a teacher."""
    for i, run in enumerate(runs):
        if run["teacher"]:
            values = run["numbers"][kind]
            order = trajectories.easiest_first(values["difficulty"])
            y = trajectories.smooth(values["change"][order], window)
            colour = common.COLOURS[i % len(common.COLOURS)]
            axis.plot(range(1, len(y) + 1), y, color=colour, label=run["label"])
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(title=f"student minus teacher, {kind} images", xlabel=RANK, ylabel="probability")
    axis.legend()


def draw_extreme_images(figure, data, extreme_images):
    """Figures 8, 9: sheets of the easiest and hardest training images of each class."""
    axes = figure.subplots(len(extreme_images), 2, squeeze=False)
    for line, ends, name in zip(axes, extreme_images, data.classes):
        for axis, (end, indices) in zip(line, ends.items()):
            axis.imshow(sheet(data.x_train.cpu().numpy()[indices]), interpolation="nearest")
            axis.set_title(f"{name}: {end} to learn")
            axis.set_axis_off()


def sheet(x):
    """uint8 (N, H, W, C) -> one image (rows H', columns W', 3), white lines between them."""
    missing = -len(x) % IMAGE_COLUMNS
    x = np.pad(x, ((0, missing), (1, 1), (1, 1), (0, 0)), constant_values=255)
    if len(x) == 0:
        return np.full((1, 1, 3), 255, np.uint8)
    _, height, width, channels = x.shape
    x = x.reshape(-1, IMAGE_COLUMNS, height, width, channels).swapaxes(1, 2)
    x = np.broadcast_to(x, (*x.shape[:4], 3))  # grey images have one channel
    return x.reshape(-1, IMAGE_COLUMNS * width, 3)


def draw_trajectories(folder, runs, window, data, extreme_images):
    """Write the figures of trajectories; -> their paths, [] without matplotlib."""
    if common.new_figure(1, 1) is None:
        print(NO_MATPLOTLIB)
        return []
    figures = {}
    pairs = [run for run in runs if run["teacher"]]
    for run in pairs:
        figure = common.new_figure(12, 6.5)
        draw_trajectories_of_run(figure, run["label"], run["numbers"], window)
        figures["run-" + re.sub(r"[^\w.=+-]+", "-", run["label"]) + ".png"] = figure
    figures["comparison.png"] = figure = common.new_figure(13 if pairs else 5, 4)
    if pairs:
        axes = figure.subplots(1, 1 + len(trajectories.KINDS))
        for axis, kind in zip(axes[1:], trajectories.KINDS):
            draw_changes(axis, runs, kind, window)
        draw_entropies(axes[0], runs)
    else:
        draw_entropies(figure.subplots(), runs)
    shown = extreme_images[:IMAGE_CLASSES]
    most = max(len(indices) for ends in shown for indices in ends.values())
    height = 0.3 + len(shown) * (0.3 + 0.6 * math.ceil(most / IMAGE_COLUMNS))
    figures["images.png"] = figure = common.new_figure(10, height)
    draw_extreme_images(figure, data, shown)
    figure.suptitle(f"training images by difficulty for {runs[0]['ranked_by']}", fontsize=11)
    for name, figure in figures.items():
        common.save_figure(figure, folder / name)
    return [folder / name for name in figures]


def plot_trajectories(args):
    """The sub-command `trajectories`: tables, trajectories.json and the figures."""
    runs = []
    for label, folder in zip(args.labels, args.runs):
        runs.append(trajectories.find_run(folder, label, args.data_root))
    trajectories.check_same_images(runs)
    for run in runs:
        trajectories.compute(run, args.teacher)
    data = runs[0]["data"]
    score = trajectories.difficulty(runs[0]["ranking"]["train"])
    extreme_images = trajectories.extremes(score, data.y_train.cpu().numpy(), EXTREME_IMAGES)
    window = max(runs[0]["student"]["test"].shape[1] // 20, 1)
    trajectories.show(runs)
    folder = Path(args.out or runs[0]["folder"] / "trajectories")
    path = folder / "trajectories.json"
    common.write_json(
        path,
        trajectories.to_record(runs, window, extreme_images, args.teacher),
    )
    print("\nwritten:", path, *draw_trajectories(folder, runs, window, data, extreme_images))


# ------------------------------------------------------------------------------------------------
# Claims


def draw_forest(path, groups):
    """Write a forest plot of {title: {claim: (verdict, finished, lines)}} of benchmark/claims.py.

    lines: (label, effect, bound) of its rules, in points. A panel for each group, a band for each
    claim. False without matplotlib.
    """
    heights = [sum(len(lines) for *_, lines in group.values()) for group in groups.values()]
    figure = common.new_figure(9, 1.4 + 0.5 * len(groups) + 0.22 * sum(heights))
    if figure is None:
        return False
    colours = {"holds": common.COLOURS[2], "contradicted": common.COLOURS[1]}
    rows = figure.subplots(
        len(groups), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, group) in zip(rows[:, 0], groups.items()):
        axis.set_title(title, loc="left", fontsize=9)
        axis.axvline(0, color="black", linewidth=0.8)
        labels = []
        for number, (verdict, finished, lines) in enumerate(group.values()):
            if number % 2 == 0:
                first = len(labels) - 0.5
                axis.axhspan(first, first + len(lines), color="#F0F0F0", zorder=0)
            colour = colours.get(verdict, "gray")
            for label, effect, bound in lines:
                place = len(labels)
                low, middle, high = 100 * effect.low, 100 * effect.mean, 100 * effect.high
                axis.plot([low, high], [place, place], color=colour, linewidth=2)
                inside = colour if finished else "white"
                axis.plot(middle, place, "o", color=colour, markerfacecolor=inside, markersize=5)
                if bound:
                    axis.plot(100 * bound, place, "|", color="black", markersize=9)
                labels.append(label)
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_xscale("symlog", linthresh=5)
    low, high = axis.get_xlim()
    ticks = [t for t in (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50) if low <= t <= high]
    axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(
        "difference in points, 95 % interval\n"
        "linear to 5 points, then logarithmic; black tick: bound"
    )
    for verdict, colour in (*colours.items(), ("undecided or regime absent", "gray")):
        axis.plot([], [], "o-", color=colour, label=f"the claim: {verdict}")
    axis.plot([], [], "o-", color="gray", markerfacecolor="white", label="so far")
    figure.legend(loc="outside lower right", ncols=2)
    common.save_figure(figure, path)
    return True


def draw_frontiers(path, panels):
    """Write clean against robust accuracy of benchmark/league.py, a panel for each regime.

    panels: {title: (lines, points of the frontier)}, a line (name, (clean, robust), (Effect or None
    of both), whether it has a teacher). False without matplotlib.
    """
    figure = common.new_figure(7.5, 4.5 * len(panels))
    if figure is None:
        return False
    axes, names_of = figure.subplots(len(panels), squeeze=False)[:, 0], {}
    for axis, (title, (lines, best)) in zip(axes, panels.items()):
        best, names = sorted((100 * clean, 100 * robust) for clean, robust in best), []
        axis.plot(*zip(*best), color="gray", linewidth=1, linestyle="--", label="frontier")
        axis.axhline(10, color="black", linewidth=1, linestyle=":", label="always one class")
        for name, (clean, robust), (clean_effect, robust_effect), taught in lines:
            colour, marker = common.COLOURS[1 if taught else 0], "s" if taught else "o"
            clean, robust = 100 * clean, 100 * robust
            if clean_effect is not None:
                clean_low, clean_high = 100 * clean_effect.low, 100 * clean_effect.high
                robust_low, robust_high = 100 * robust_effect.low, 100 * robust_effect.high
                bar = {"color": colour, "alpha": 0.25, "linewidth": 1}
                axis.plot([clean_low, clean_high], [robust, robust], **bar)
                axis.plot([clean, clean], [robust_low, robust_high], **bar)
            axis.plot(clean, robust, marker, color=colour)
            names.append((name, (clean, robust), colour))
        axis.plot([], [], "o", color=common.COLOURS[0], label="without a teacher")
        axis.plot([], [], "s", color=common.COLOURS[1], label="with a teacher")
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=title)
        # around the points, with room for their names: a wide interval is cut
        for i, set_limits in enumerate((axis.set_xlim, axis.set_ylim)):
            places = [point[i] for _, point, _ in names]
            room = 0.15 * (max(places) - min(places)) + 0.5
            set_limits(min(places) - room, max(places) + room)
        names_of[axis] = names
    figure.draw_without_rendering()  # from here on the axes have their final size
    for axis, names in names_of.items():
        write_names(axis, names)
        axis.legend(loc="lower left")
    common.save_figure(figure, path)
    return True


def write_names(axis, names):
    """Write [(name, point, colour)] beside the points, each where it hits the fewest before it."""
    from matplotlib.transforms import Bbox  # where there is an axis there is matplotlib

    places = [((5, 4), "left"), ((5, -10), "left"), ((-5, 4), "right"), ((-5, -10), "right")]
    taken = [axis.transData.transform([point, point]) for _, point, _ in names]
    taken = [Bbox(corners).padded(4) for corners in taken]
    for name, point, colour in names:
        found = []
        for offset, side in places:
            text = axis.annotate(
                name, point, offset, textcoords="offset points", ha=side, fontsize=9, color=colour
            )
            box = text.get_window_extent()
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            found.append((box.count_overlaps(taken) + (0 if inside else 2), text, box))
        found.sort(key=lambda place: place[0])
        for _, text, _ in found[1:]:
            text.remove()
        taken.append(found[0][2])


def draw_grids(path, grids, rows, columns):
    """Write {title: values (methods, teachers)} as heat maps with their numbers, side by side.

    A step of colour is the same difference in all of them.
    """
    figure = common.new_figure(4.5 * len(grids), 3.8)
    if figure is None:
        return False
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    span = max(values.max() - values.min() for values in grids.values())
    for axis, (title, values) in zip(axes, grids.items()):
        middle = (values.min() + values.max()) / 2
        low, high = middle - span / 2, middle + span / 2
        axis.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axis.grid(False)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                colour = "black" if value > middle else "white"
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set(title=title, xlabel="teacher", ylabel="method")
    common.save_figure(figure, path)
    return True


def main(argv=None):
    """Draw the figure that is asked for."""
    args = parse_args(argv)
    figures = {
        "curves": plot_curves,
        "gradients": plot_gradients,
        "trajectories": plot_trajectories,
    }
    figures[args.figure](args)


if __name__ == "__main__":
    common.start(main, stopped="nothing is half written; the same command begins again:")
