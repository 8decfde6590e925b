"""Numbers of the training trajectories of paper 2 (App. C.2, D and E); plots.py draws them.

Shapes   E epochs, N images; p_S, p_T: what student and teacher give the right class, in [0, 1].
Ranks    S(x) = 1/E sum_k CE(f_k(x), y) of the run's teacher             <- difficulty     Eq. 8
Cosine   of the vectors p_S(x) and p_T(x) over the epochs                <- cosine         Fig. 6
Change   p_S - p_T after the last epoch of each, with a running mean     <- smooth         Fig. 7
Files    robust_kd.py --trajectories keeps them in the models it writes  <- read_trajectories
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import robust_kd

KINDS = {"natural": "test", "adversarial": "adv"}  # kind of images -> its name in a model's file
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


def read_trajectories(path):
    """{train, test, adv: log-probabilities (E, N), entropy: nats (E,)} of a model's file."""
    meta = common.load(path).get("meta", {})
    if "trajectories" not in meta:
        raise common.UserError(f"{path}: has no trajectories; train with --trajectories")
    return {name: values.double().numpy() for name, values in meta["trajectories"].items()}


def teacher_of(folder, config, epochs=None):
    """The file of the teacher of a robust_kd.py run, by the recipe that its flags give; or None.

    A run with --teacher-ckpt names the file; of an ensemble it is the first teacher. epochs: of an
    early stop that the run keeps with --teacher-save-every.
    """
    args = argparse.Namespace(**config["flags"], runs=str(folder.resolve().parent.parent))
    if args.teacher_ckpt:
        return Path(args.teacher_ckpt)
    if not robust_kd.needs_teacher(args):
        return None
    training = robust_kd.teacher_trainings(args)[0]
    recipe = dataclasses.asdict(robust_kd.teacher_recipe(args, training, epochs=epochs))
    try:
        return common.teacher_file(args, argparse.Namespace(**config["data"]), recipe)
    except common.MALFORMED:
        missing = "an older version wrote it, without all that names the teacher's file"
        advice = "give --teacher FILE"
        raise common.UserError(f"{folder / 'config.json'}: {missing}; {advice}") from None


def describe_images(model):
    """Of how many images a model has trajectories, in words."""
    return f"{model['train'].shape[1]} training and {model['test'].shape[1]} test images"


def read_run(folder, label, teacher_path=None, ranking_path=None):
    """{label, folder, flags, fingerprint, student, teacher or None, ranking, ranked_by} of a run.

    The last two say by whose trajectories the images are ranked. Raises UserError.
    """
    folder = Path(folder)
    try:
        config = common.read_json(folder / "config.json")
        flags, fingerprint = config["flags"], config["fingerprint"]
    except (TypeError, KeyError, common.UserError):
        missing = "there is no config.json of a run in it"
        raise common.UserError(f"{folder}: not the folder of a run: {missing}") from None
    if not (folder / "student.pt").exists():
        raise common.UserError(f"{folder}: has no student.pt; its run is not finished")
    student, teacher = read_trajectories(folder / "student.pt"), None
    path = teacher_path or teacher_of(folder, config)
    if path:
        teacher = read_trajectories(path)
    if ranking_path:
        ranking, ranked_by = read_trajectories(ranking_path), ranking_path
    elif teacher:
        ranking, ranked_by = teacher, teacher_path or f"the teacher of {label}"
    else:
        ranking, ranked_by = student, f"the student of {label}"
    for name, other in [(path, teacher), (f"--difficulty-of {ranking_path}", ranking)]:
        if other and describe_images(other) != describe_images(student):
            own = f"the student of {folder} has {describe_images(student)}"
            raise common.UserError(f"{name}: has {describe_images(other)}, {own}")
    run = {
        "label": label,
        "folder": folder,
        "flags": flags,
        "fingerprint": fingerprint,
        "student": student,
        "teacher": teacher,
        "ranking": ranking,
        "ranked_by": ranked_by,
    }
    if teacher:
        run["numbers"] = analyse(student, teacher, ranking)
    return run


def check_same_images(runs):
    """A UserError if runs were trained on different images, or have too few test images."""
    first = runs[0]
    for run in runs:
        images, images_of_first = describe_images(run["student"]), describe_images(first["student"])
        if images != images_of_first or run["fingerprint"] != first["fingerprint"]:
            both = f"{images}, {first['folder']} {images_of_first}"
            other = "was trained on other images than the first run"
            raise common.UserError(f"{run['folder']}: {other}: {both}")
    if first["student"]["test"].shape[1] < PARTS:
        raise common.UserError(f"{first['folder']}: has fewer than {PARTS} test images")


def read_images(run, root):
    """The data of a run, whose order is that of its trajectories; raises UserError."""
    counts = (run["flags"][name] for name in ("val_size", "train_subset", "test_subset"))
    data = common.load_data(run["flags"]["data"], root, "cpu", *counts)
    if data.fingerprint != run["fingerprint"]:
        trained_on = f"is not what {run['folder']} was trained on"
        raise common.UserError(f"--data-root: {data.name} in {root} {trained_on}")
    return data


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


def to_record(runs, window, extreme_images, ranking_path, teacher_path):
    """All numbers for trajectories.json; lists are in the order of the test images, or epochs."""
    record = {
        "window": window,
        "difficulty_of": ranking_path,
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
