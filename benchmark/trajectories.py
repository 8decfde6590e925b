"""What each epoch made of each image: the training trajectories of paper 2, App. C.2, D and E.

Usage    python robust_kd.py --loss akd --trajectories --data data/planes-cars.npz --name a
         python benchmark/trajectories.py runs/robust_kd/a-s0
         python benchmark/trajectories.py runs/robust_kd/a-s0 runs/robust_kd/b-s0 --labels A B
         python benchmark/trajectories.py RUN --difficulty-of runs/robust_kd/standard-s0/student.pt
Data     data/planes-cars.npz, the two classes of the paper: python benchmark/run.py --prepare
Shapes   E epochs, N images; p_S, p_T: what student and teacher give the right class, in [0, 1]
Ranks    S(x) = 1/E sum_k CE(f_k(x), y) of the run's teacher             <- difficulty     Eq. 8
         on images as in the plot (natural, or attacked); --difficulty-of: of another model.
Cosine   of the vectors p_S(x) and p_T(x) over the epochs                <- cosine         Fig. 6
Change   p_S - p_T after the last epoch of each, with a running mean     <- smooth         Fig. 7
Written  trajectories.json; with matplotlib run-LABEL.png (Figures 6, 7, 10, 13 to 15) and
         comparison.png (5, 11, 12, 16, 17), images.png (8, 9: a run of --loss st)
Silent   The paper does not say which p_T a student of an early-stopped teacher is compared with.
         Here: its own teacher's, as it was stopped, and the cosine is over the epochs that both
         have, the first ones of the student. With --teacher FILE it is that model's for all: what
         the text says of Figure 11 fits a teacher that was not stopped.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

KINDS = {"natural": "test", "adversarial": "adv"}  # kind of images -> its name in a model's file
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito
PARTS = 5  # of the table: quintiles
RANK = "test images, easiest to hardest"  # of the horizontal axes
SHOWN, COLUMNS = 10, 8  # of images.png: classes, the first ones; images beside each other


class Trajectories:
    """What a net gives the right class after each epoch (paper 2, App. C.2), for --trajectories.

    train, test (clean) and adv (PGD on test) float16 (E, N): log-probabilities; entropy float32
    (E,): the mean of S(x) over the training images, nats. benchmark/trajectories.py reads them.
    """

    def __init__(self, data: common.Data, epochs: int):
        sizes = {"train": len(data.y_train), "test": len(data.y_test), "adv": len(data.y_test)}
        self.values = {k: torch.zeros(epochs, n, dtype=torch.float16) for k, n in sizes.items()}
        self.values["entropy"] = torch.zeros(epochs)

    def record(self, epoch: int, model: torch.nn.Module, data: common.Data, attack: tuple) -> None:
        """The rows of `epoch`; attack: eps, step_size, steps of the PGD on the test images."""
        with common.evaluating(model), torch.no_grad():
            for name, images, labels in (
                ("train", data.x_train, data.y_train),
                ("test", data.x_test, data.y_test),
                ("adv", data.x_test, data.y_test),
            ):
                right, entropy = [], torch.zeros((), device=images.device)
                for x, y in zip(images.split(500), labels.split(500)):
                    x = common.to_float(x)
                    x = common.pgd(model, x, y, *attack) if name == "adv" else x
                    log_probs = model(x).log_softmax(1)  # (B, K)
                    right.append(log_probs.gather(1, y[:, None])[:, 0])
                    entropy -= (log_probs.exp() * log_probs).sum() / len(images)
                self.values[name][epoch] = torch.cat(right)
                if name == "train":
                    self.values["entropy"][epoch] = entropy

    def until(self, epochs: int) -> dict:
        """{name: tensor} of the first epochs, for the meta of a model's file."""
        return {name: values[:epochs].clone() for name, values in self.values.items()}

    def state_dict(self) -> dict:
        """For the checkpoint, like those of the model and the optimizer."""
        return self.values

    def load_state_dict(self, values: dict) -> None:
        """Go on from a state_dict."""
        self.values = values


def parse_args(argv=None):
    """The flags of this program; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run with --trajectories")
    add("--labels", nargs="+", metavar="LABEL", help="one for each RUN; None: names of the folders")
    add("--teacher", metavar="FILE", help="compare with this model; None: with RUN/teacher.pt")
    add("--difficulty-of", metavar="FILE", help="model that ranks the images; None: the teacher")
    add("--window", type=common.count, help="images in the running mean; None: N/20")
    add("--images", type=common.count0, default=32, help="to show of a class, per end; 0: none")
    add("--data-root", default="data", help="where the data set of the runs is, for --images")
    add("--out", metavar="FOLDER", help="of what is written; None: trajectories, in the first RUN")
    args = parser.parse_args(argv)
    args.labels = args.labels or [Path(run).resolve().name for run in args.runs]
    if len(args.labels) != len(args.runs) or len(set(args.labels)) < len(args.labels):
        parser.error("--labels: expected one for each RUN, all different")
    return args


# ------------------------------------------------------------------------------------------------
# Numbers


def difficulty(log_probs):
    """Eq. (8): S(x) = 1/E sum_k CE(f_k(x), y), in nats: (E, N) -> (N,).

    log_probs: of the right class after each epoch, so that the CE is its negative.
    """
    return -log_probs.mean(0)


def cosine(student, teacher):
    """Cosine similarity of p_S(x) and p_T(x): log-probabilities (E, N), (E', N) -> (N,).

    Over the first min(E, E') epochs: an early-stopped teacher has no others.
    """
    epochs = min(len(student), len(teacher))
    # the largest of each is made 1: the angle stays, and none of the vectors can underflow to 0
    p_s, p_t = (np.exp(p[:epochs] - p[:epochs].max(0)) for p in (student, teacher))
    return (p_s * p_t).sum(0) / np.sqrt((p_s**2).sum(0) * (p_t**2).sum(0))


def smooth(values, window):
    """Running mean over `window` neighbours, those that there are at both ends: (N,) -> (N,)."""
    total, place = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    first = np.maximum(place - window // 2, 0)
    end = np.minimum(place - window // 2 + window, len(values))
    return (total[end] - total[first]) / (end - first)


def ranked(score):
    """Indices of the images, easiest first; equal ones in their order: (N,) -> (N,)."""
    return np.argsort(score, kind="stable")


def analyse(student, teacher, ranking):
    """{kind: {difficulty, cosine, teacher, change: (N,)}} of three trajectories (see `read`)."""
    found = {}
    for kind, name in KINDS.items():
        p_s, p_t = (np.exp(model[name][-1]) for model in (student, teacher))
        found[kind] = {"difficulty": difficulty(ranking[name])}
        found[kind] |= {"cosine": cosine(student[name], teacher[name])}
        found[kind] |= {"teacher": p_t, "change": p_s - p_t}
    return found


def quintiles(found):
    """Rows of the table: means of each fifth of the images by difficulty, and of all."""
    rows = [{"images": f"fifth {i + 1}"} for i in range(PARTS)] + [{"images": "all"}]
    rows[0]["images"], rows[PARTS - 1]["images"] = "easiest fifth", "hardest fifth"
    titles = {"cosine": "cosine", "teacher": "p_T", "change": "p_S - p_T"}
    for kind, values in found.items():
        order = ranked(values["difficulty"])
        for row, part in zip(rows, [*np.array_split(order, PARTS), order]):
            for key, title in titles.items():
                row[f"{kind[:3]}. {title}"] = f"{values[key][part].mean():.3f}"
    return rows


def extremes(score, labels, count):
    """[(easiest, hardest)] of each class: indices of `count` images each, the extreme one first."""
    order = ranked(score)
    by_class = [order[labels[order] == k] for k in range(labels.max() + 1)]
    return [(mine[:count], mine[::-1][:count]) for mine in by_class]


# ------------------------------------------------------------------------------------------------
# Files


def read(path):
    """{train, test, adv: log-probabilities (E, N), entropy: nats (E,)} of a model's file."""
    meta = common.load(path).get("meta", {})
    if "trajectories" not in meta:
        common.fail(f"{path}: has no trajectories; train with --trajectories")
    return {name: values.double().numpy() for name, values in meta["trajectories"].items()}


def read_runs(args):
    """[{label, folder, flags, fingerprint, student, teacher or None}], all on the same images."""
    runs, ranking = [], read(args.difficulty_of) if args.difficulty_of else None
    for label, folder in zip(args.labels, map(Path, args.runs)):
        try:
            config = json.loads((folder / "config.json").read_text())
            run = {"label": label, "folder": folder, "flags": config["flags"]}
            run["fingerprint"] = config["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            common.fail(f"{folder}: not the folder of a run: there is no config.json of one")
        if not (folder / "student.pt").exists():
            common.fail(f"{folder}: has no student.pt; its run is not finished")
        teacher = Path(args.teacher or folder / "teacher.pt")
        run["student"] = read(folder / "student.pt")
        run["teacher"] = read(teacher) if args.teacher or teacher.exists() else None
        run["ranking"] = ranking or run["teacher"] or run["student"]
        own = f"the {'teacher' if run['teacher'] else 'student'} of {label}"
        run["ranked_by"] = args.difficulty_of or args.teacher or own
        for name, path in [
            ("teacher", teacher),
            ("ranking", f"--difficulty-of {args.difficulty_of}"),
        ]:
            if run[name] and images_of(run[name]) != images_of(run["student"]):
                others = f"the student of {folder} has {images_of(run['student'])}"
                common.fail(f"{path}: has {images_of(run[name])}, {others}")
        runs.append(run)
        counts = [images_of(one["student"]) for one in (run, runs[0])]
        if counts[0] != counts[1] or run["fingerprint"] != runs[0]["fingerprint"]:
            both = f"{counts[0]}, {runs[0]['folder']} {counts[1]}"
            common.fail(f"{folder}: was trained on other images than the first run: {both}")
    if runs[0]["student"]["test"].shape[1] < PARTS:
        common.fail(f"{runs[0]['folder']}: has fewer than {PARTS} test images")
    return runs


def images_of(model):
    """How many images a model has trajectories of, in words."""
    return "{} training and {} test images".format(*(model[k].shape[1] for k in ("train", "test")))


def read_images(run, root):
    """The data of a run, of which the order is that of its trajectories."""
    counts = (run["flags"][name] for name in ("val_size", "train_subset", "test_subset"))
    data = common.load_data(run["flags"]["data"], root, "cpu", *counts)
    if data.fingerprint != run["fingerprint"]:
        common.fail(f"--data-root: {data.name} is not what {run['folder']} was trained on")
    return data


# ------------------------------------------------------------------------------------------------
# Figures


def draw_run(figure, label, found, window):
    """Figures 6, 7, 10 (13 to 15): cosine, p_T and p_S - p_T of each image, by difficulty."""
    titles = {"cosine": "cosine of $p_S(x)$ and $p_T(x)$", "teacher": "$p_{T,K}(x)$ of the teacher"}
    titles |= {"change": "$p_{S,K}(x) - p_{T,K}(x)$"}
    axes = figure.subplots(len(found), len(titles), sharex=True, sharey="col")
    for row, (kind, values) in zip(axes, found.items()):
        order = ranked(values["difficulty"])
        for axis, key in zip(row, titles):
            y, rank = values[key][order], np.arange(1, len(order) + 1)
            axis.plot(rank, y, ".", color="#56B4E9", markersize=2, alpha=0.5)
            axis.plot(rank, smooth(y, window), color="#D55E00", linewidth=2)
        row[0].set_ylabel(f"{kind} images")
        row[-1].axhline(0, color="black", linewidth=0.6)
    for axis, below, title in zip(axes[0], axes[-1], titles.values()):
        axis.set_title(title)
        below.set_xlabel(RANK)
    note = f"dots: test images; line: running mean of {window} of them"
    figure.suptitle(f"{label} ({note})", fontsize=11)


def draw_comparison(figure, runs, window):
    """Figures 5, 11, 12, 16, 17: mean entropy by epoch; the smoothed changes of all runs."""
    pairs = [run for run in runs if run["teacher"]]
    axes = figure.subplots(1, 1 + len(KINDS) * bool(pairs), squeeze=False)[0]
    drawn = []
    for i, run in enumerate(runs):
        for name, style in (("student", "o-"), ("teacher", "s--")):
            entropy = run[name] and run[name]["entropy"].tolist()
            if not entropy or (name, entropy) in drawn:  # a teacher of several runs
                continue
            drawn.append((name, entropy))
            options = {"color": COLOURS[i % len(COLOURS)], "markersize": 3}
            epochs, text = range(1, len(entropy) + 1), f"{run['label']}, {name}"
            axes[0].plot(epochs, entropy, style, label=text, **options)
    axes[0].set(xlabel="epoch", ylabel="nats", title="mean entropy on the training images")
    axes[0].set_ylim(bottom=0)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    for axis, kind in zip(axes[1:], KINDS):
        for i, run in enumerate(runs):
            if run["teacher"]:
                values = run["found"][kind]
                y = smooth(values["change"][ranked(values["difficulty"])], window)
                options = {"color": COLOURS[i % len(COLOURS)], "label": run["label"]}
                axis.plot(range(1, len(y) + 1), y, **options)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title=f"$p_{{S,K}} - p_{{T,K}}$, {kind} images", xlabel=RANK)
    for axis in axes:
        axis.legend(fontsize=7)


def draw_images(figure, data, found, names):
    """Figures 8, 9: sheets of the easiest and hardest training images of each class."""
    axes = figure.subplots(len(found), 2, squeeze=False)
    for row, ends, name in zip(axes, found, names):
        for axis, indices, end in zip(row, ends, ("easiest", "hardest")):
            axis.imshow(sheet(data.x_train.numpy()[indices]), interpolation="nearest")
            axis.set_title(f"{name}: {end} to learn", fontsize=10)
            axis.set_axis_off()


def sheet(x, columns=COLUMNS):
    """uint8 (N, H, W, C) -> one image (rows H', columns W', 3), white lines between them."""
    x = np.pad(x, ((0, -len(x) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    if len(x) == 0:
        return np.full((1, 1, 3), 255, np.uint8)
    _, height, width, channels = x.shape
    x = x.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return np.broadcast_to(x, (*x.shape[:4], 3)).reshape(-1, columns * width, 3)


def draw(folder, runs, window, data, ends):
    """Write the pictures; -> their paths, [] without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: matplotlib is not installed; pip install matplotlib")
        return []
    figures, pairs = {}, [run for run in runs if run["teacher"]]
    for run in pairs:
        name = "run-" + re.sub(r"[^\w.=+-]+", "-", run["label"]) + ".png"
        figures[name] = figure = Figure((12, 6.5), layout="constrained")
        draw_run(figure, run["label"], run["found"], window)
    figures["comparison.png"] = figure = Figure((13 if pairs else 5, 4), layout="constrained")
    draw_comparison(figure, runs, window)
    if ends:
        rows = -(-max(len(part) for pair in ends for part in pair) // COLUMNS)
        height = 0.3 + len(ends[:SHOWN]) * (0.3 + 0.6 * rows)
        figures["images.png"] = figure = Figure((10, height), layout="constrained")
        draw_images(figure, data, ends[:SHOWN], data.classes)
        figure.suptitle(f"training images by difficulty for {runs[0]['ranked_by']}", fontsize=11)
    for name, figure in figures.items():
        options = {"format": "png", "dpi": 100}
        common.write_atomically(folder / name, lambda file: figure.savefig(file, **options))  # noqa: B023
    return [folder / name for name in figures]


# ------------------------------------------------------------------------------------------------
# Output


def show(runs):
    """Print the table of each run and the mean entropies; -> the rows by label, for the JSON."""
    tables, entropies = {}, []
    for run in runs:
        for name in ("student", "teacher"):
            if run[name]:
                entropy = run[name]["entropy"]
                row = {"nats": f"{run['label']}, {name}", "epochs": len(entropy)}
                halfway = entropy[(len(entropy) - 1) // 2]
                ends = {"first": entropy[0], "halfway": halfway, "last": entropy[-1]}
                entropies.append(row | {key: f"{value:.3f}" for key, value in ends.items()})
        if not run["teacher"]:
            print(f"\n{run['label']}: no teacher to compare with (--teacher FILE)")
            continue
        epochs = [len(run[name]["entropy"]) for name in ("student", "teacher")]
        tables[run["label"]] = quintiles(run["found"])
        print(f"\n{run['label']}: student of {epochs[0]} epochs, teacher of {epochs[1]}; ", end="")
        print(f"cosine over the first {min(epochs)}")
        print(f"test images by difficulty for {run['ranked_by']}")
        print(common.table(tables[run["label"]]))
    print(f"\nmean entropy on the training images\n{common.table(entropies)}", flush=True)
    return tables


def numbers(runs, tables, window, ends, args):
    """All numbers for trajectories.json; lists are in the order of the test images, or epochs."""
    record = {"window": window, "difficulty_of": args.difficulty_of, "teacher": args.teacher}
    record["runs"] = {run["label"]: {"folder": str(run["folder"])} for run in runs}
    for run in runs:
        kept, models = record["runs"][run["label"]], ("student", "teacher")
        kept["entropy"] = {k: run[k]["entropy"].round(5).tolist() for k in models if run[k]}
        for kind, values in run.get("found", {}).items():
            kept[kind] = {key: value.round(5).tolist() for key, value in values.items()}
        kept["table"] = tables.get(run["label"])
    keys = ("easiest", "hardest")  # training images of each class
    record["images"] = [dict(zip(keys, (part.tolist() for part in pair))) for pair in ends]
    return record


def main(argv=None):
    """Read the runs, print the tables, write the numbers and the pictures."""
    args = parse_args(argv)
    runs, data, ends = read_runs(args), None, []
    for run in runs:
        if run["teacher"]:
            run["found"] = analyse(run["student"], run["teacher"], run["ranking"])
    if args.images:
        data = read_images(runs[0], args.data_root)
        score = difficulty(runs[0]["ranking"]["train"])
        ends = extremes(score, data.y_train.numpy(), args.images)
    window = args.window or max(runs[0]["student"]["test"].shape[1] // 20, 1)
    folder = Path(args.out or runs[0]["folder"] / "trajectories")
    text = json.dumps(numbers(runs, show(runs), window, ends, args)) + "\n"
    path = folder / "trajectories.json"
    try:
        common.write_atomically(path, lambda file: file.write(text.encode()))
        pictures = draw(folder, runs, window, data, ends)
    except OSError as error:
        common.fail(f"--out: {error.filename or folder}: {error.strerror or error}")
    print("\nwritten:", path, *pictures)


if __name__ == "__main__":
    common.start(main)
