"""Numbers of the training trajectories of paper 2 (App. C.2, D and E); plots.py draws them.

Shapes   E epochs, N images; p_S, p_T: what student and teacher give the right class, in [0, 1].
Ranks    S(x) = 1/E sum_k CE(f_k(x), y) of the run's teacher             <- difficulty     Eq. 8
Cosine   of the vectors p_S(x) and p_T(x) over the epochs                <- cosine         Fig. 6
Change   p_S - p_T after the last epoch of each, with a running mean     <- smooth         Fig. 7
Files    robust_kd.py --save-every 1 keeps the nets of all epochs        <- read_trajectories
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import robust_kd

KINDS = {"natural": "test", "adversarial": "adv"}  # kind of images -> its name in trajectories
PARTS = 5  # the table gives the means of fifths of the images


# ------------------------------------------------------------------------------------------------
# Numbers of images


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
    p_student = np.exp(student[:epochs] - student[:epochs].max(0))
    p_teacher = np.exp(teacher[:epochs] - teacher[:epochs].max(0))
    lengths = np.sqrt((p_student**2).sum(0) * (p_teacher**2).sum(0))
    return (p_student * p_teacher).sum(0) / lengths


def smooth(values, window):
    """Running mean over `window` neighbours, at both ends over those that there are: (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first = np.maximum(place - window // 2, 0)
    end = np.minimum(place - window // 2 + window, len(values))
    return (sums[end] - sums[first]) / (end - first)


def easiest_first(score):
    """Indices of the images by difficulty, equal ones in their order: (N,) -> (N,)."""
    return np.argsort(score, kind="stable")


def analyse(student, teacher, ranking):
    """{kind: {difficulty, cosine, teacher, change: (N,)}} of the trajectories of three models.

    ranking: of the model whose S(x) is the difficulty; `teacher` in the result is the last p_T.
    """
    numbers = {}
    for kind, name in KINDS.items():
        p_teacher = np.exp(teacher[name][-1])
        numbers[kind] = {
            "difficulty": difficulty(ranking[name]),
            "cosine": cosine(student[name], teacher[name]),
            "teacher": p_teacher,
            "change": np.exp(student[name][-1]) - p_teacher,
        }
    return numbers


def quintiles(numbers):
    """Rows of the table: means over each fifth of the images by difficulty, and over all."""
    titles = {"cosine": "cosine", "teacher": "p_T", "change": "p_S - p_T"}
    names = [f"fifth {i + 1}" for i in range(PARTS)]
    names[0], names[-1] = "easiest fifth", "hardest fifth"
    rows = [{"images": name} for name in [*names, "all"]]
    for kind, values in numbers.items():
        order = easiest_first(values["difficulty"])
        parts = [*np.array_split(order, PARTS), order]
        for row, part in zip(rows, parts):
            for key, title in titles.items():
                row[f"{kind[:3]}. {title}"] = f"{values[key][part].mean():.3f}"
    return rows


def extremes(score, labels, count):
    """[{easiest, hardest: indices of `count` images, the extreme one first}] of each class."""
    order = easiest_first(score)
    found = []
    for label in range(labels.max() + 1):
        of_class = order[labels[order] == label]
        found.append({"easiest": of_class[:count], "hardest": of_class[::-1][:count]})
    return found


# ------------------------------------------------------------------------------------------------
# Files


def epoch_files(path):
    """The files of a net after epochs 1, 2, ..., as --save-every 1 keeps them, up to its own.

    A student has them beside its file, a teacher in the folders of teachers with --teacher-es N.
    """
    path, files = Path(path), []
    epochs = common.load_model(path).meta.get("epoch")
    if epochs is None:
        raise common.UserError(f"{path}: does not say after how many epochs it was kept")
    recipe = common.read_json(path.parent / "recipe.json")  # the flags that name a teacher's folder
    for epoch in range(1, epochs + 1):
        if recipe is None:
            file = path.with_name(f"{path.stem}-epoch{epoch}.pt")
        else:
            digest = common.digest_of(recipe | {"epochs": epoch})
            file = path.parent.parent / digest / path.name
        if not file.exists():
            missing = f"its net after epoch {epoch} is not there ({file})"
            raise common.UserError(
                f"{path}: {missing}; delete it, and train it with --save-every 1"
            )
        files.append(file)
    return files


def read_trajectories(path, data, flags):
    """{train, test, adv: log-probabilities (E, N), entropy: nats (E,)} of a net after each epoch.

    train, test: of the right class of the clean images; adv: of the test images under PGD on the
    cross-entropy with the run's radius and steps; entropy: the mean over the training images.
    """
    attack = flags["eps"], flags["step_size"], flags["steps"]
    values = {"train": [], "test": [], "adv": [], "entropy": []}
    files = epoch_files(path)
    for epoch, file in enumerate(files):
        common.print_line(f"{path}: epoch {epoch + 1}/{len(files)}", live=True)
        model = common.load_model(file, data)
        common.seed_epoch(flags["seed"], "trajectories", epoch)
        train = common.predict(model, data.x_train).log_softmax(1)  # (N, K)
        test = common.predict(model, data.x_test).log_softmax(1)
        adv = common.predict(model, data.x_test, data.y_test, attack).log_softmax(1)
        values["train"].append(train.gather(1, data.y_train[:, None])[:, 0])
        values["test"].append(test.gather(1, data.y_test[:, None])[:, 0])
        values["adv"].append(adv.gather(1, data.y_test[:, None])[:, 0])
        values["entropy"].append(-(train.exp() * train).sum(1).mean())
    common.print_line("", live=True)
    return {name: torch.stack(rows).double().cpu().numpy() for name, rows in values.items()}


def find_run(folder, label, data_root):
    """{label, folder, flags, data, student_file, teacher_file or None} of a run; or a UserError."""
    folder = Path(folder)
    try:
        config = common.read_json(folder / "config.json")
        flags, fingerprint = config["flags"], config["fingerprint"]
        names = ("data", "val_size", "train_subset", "test_subset", "extra_data")
        name, val_size, train_subset, test_subset, extra_data = (flags[key] for key in names)
    except (TypeError, KeyError, common.UserError):
        missing = "there is no config.json of robust_kd.py in it"
        raise common.UserError(f"{folder}: not the folder of a run: {missing}") from None
    summary = common.read_summary(folder)
    if summary is None:
        raise common.UserError(f"{folder}: has no summary.json; its run is not finished")
    device = common.find_device("auto")
    data = common.load_data(name, data_root, device, val_size, train_subset, test_subset)
    if extra_data:
        data = robust_kd.add_extra_data(data, extra_data)
    if data.fingerprint != fingerprint:
        trained_on = f"is not what {folder} was trained on"
        raise common.UserError(f"--data-root: {data.name} in {data_root} {trained_on}")
    files = {row["net"]: folder / row["file"] for row in summary if row.get("file")}
    return {
        "label": label,
        "folder": folder,
        "flags": flags,
        "data": data,
        "student_file": files["student"],
        "teacher_file": files.get("teacher"),
    }


def compute(run, teacher_file=None):
    """Add to a run: student, teacher (or None), ranking, ranked_by and, with a teacher, numbers.

    teacher_file: of a net to compare with instead of the run's own teacher, the first one of an
    ensemble. The images are ranked by the teacher's trajectories, without one by the student's.
    """
    data, flags = run["data"], run["flags"]
    run["student"] = read_trajectories(run["student_file"], data, flags)
    run["teacher"] = None
    run["ranking"], run["ranked_by"] = run["student"], f"the student of {run['label']}"
    if teacher_file or run["teacher_file"]:
        run["teacher"] = read_trajectories(teacher_file or run["teacher_file"], data, flags)
        run["ranking"] = run["teacher"]
        run["ranked_by"] = teacher_file or f"the teacher of {run['label']}"
    if run["teacher"]:
        run["numbers"] = analyse(run["student"], run["teacher"], run["ranking"])


def check_same_images(runs):
    """A UserError if runs were trained on different images, or have too few test images."""
    first = runs[0]
    for run in runs:
        images = [(len(r["data"].y_test), r["data"].fingerprint) for r in (run, first)]
        if images[0] != images[1]:
            other = f"was trained or tested on other images than {first['folder']}"
            raise common.UserError(f"{run['folder']}: {other}")
    if len(first["data"].y_test) < PARTS:
        raise common.UserError(f"{first['folder']}: has fewer than {PARTS} test images")


# ------------------------------------------------------------------------------------------------
# Output


def show(runs):
    """Print the table of each run and the mean entropies."""
    entropies = []
    for run in runs:
        for role in ("student", "teacher"):
            if run[role]:
                entropy = run[role]["entropy"]
                entropies.append(
                    {
                        "nats": f"{run['label']}, {role}",
                        "epochs": len(entropy),
                        "first": f"{entropy[0]:.3f}",
                        "halfway": f"{entropy[(len(entropy) - 1) // 2]:.3f}",
                        "last": f"{entropy[-1]:.3f}",
                    }
                )
        if not run["teacher"]:
            print(f"\n{run['label']}: no teacher to compare with (--teacher FILE)")
            continue
        epochs, teacher_epochs = len(run["student"]["entropy"]), len(run["teacher"]["entropy"])
        print(
            f"\n{run['label']}: student of {epochs} epochs, teacher of {teacher_epochs}; ", end=""
        )
        print(f"cosine over the first {min(epochs, teacher_epochs)}")
        print(f"test images by difficulty for {run['ranked_by']}")
        print(common.table(quintiles(run["numbers"])))
    print(f"\nmean entropy on the training images\n{common.table(entropies)}", flush=True)


def to_record(runs, window, extreme_images, teacher_path):
    """All numbers for trajectories.json; lists are in the order of the test images, or epochs."""
    record = {
        "window": window,
        "teacher": teacher_path,
        "runs": {},
        "images": [],  # training images of each class
    }
    for run in runs:
        kept = {"folder": str(run["folder"]), "entropy": {}, "table": None}
        for role in ("student", "teacher"):
            if run[role]:
                kept["entropy"][role] = run[role]["entropy"].round(5).tolist()
        if run["teacher"]:
            kept["table"] = quintiles(run["numbers"])
            for kind, values in run["numbers"].items():
                kept[kind] = {key: value.round(5).tolist() for key, value in values.items()}
        record["runs"][run["label"]] = kept
    for ends in extreme_images:
        record["images"].append({end: indices.tolist() for end, indices in ends.items()})
    return record
