"""Messy collaboration: which labels are wrong, how often, and who learns from them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import same_weights

import common
import messy_collab

SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05 "
    "--test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 2 --epochs 2 "
    "--eval-restarts 1 --name x"
)
N = 40_000


def run(runs, flags):
    """Run the script with SMALL and the flags; -> the folder of the run of seed 0."""
    messy_collab.main([*SMALL.split(), *flags.split(), "--runs", str(runs)])
    return runs / "messy_collab" / "x-s0"


def teacher_file(runs):
    """The file of the only teacher below runs."""
    (path,) = runs.glob("teachers/*/teacher.pt")
    return path


# ------------------------------------------------------------------------------------------------
# The draws


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("draw, wrong_share", [("exclusive", 1.0), ("inclusive", 0.9)])
def test_varying_labels_are_wrong_at_their_rate_and_uniform_over_the_wrong_classes(
    rate, draw, wrong_share
):
    labels = torch.arange(N) % 10
    varied = messy_collab.vary_labels(labels, rate, 10, draw)
    moves = (varied - labels) % 10
    wrong = int((moves != 0).sum())
    p = rate * wrong_share
    assert wrong == pytest.approx(N * p, abs=5 * math.sqrt(N * p * (1 - p)))
    counts = torch.bincount(moves[moves != 0], minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - wrong / 9).abs().max() < 5 * math.sqrt(wrong / 9)
    assert not torch.equal(messy_collab.vary_labels(labels, rate, 10, draw), varied)  # drawn anew


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_corrupted_labels_are_exactly_the_rate_and_uniform_over_the_wrong_classes(rate):
    labels = torch.arange(N) % 10
    corrupted = messy_collab.corrupt_labels(labels, rate, 10, seed=3)
    moves = (corrupted - labels) % 10
    counts = torch.bincount(moves[moves != 0], minlength=10)
    assert counts.sum() == round(rate * N) and corrupted.min() == 0 and corrupted.max() == 9
    assert (counts[1:] - rate * N / 9).abs().max() < 5 * math.sqrt(rate * N / 9)
    per_class = torch.bincount(labels[moves != 0])
    assert (per_class - rate * N / 10).abs().max() < 5 * math.sqrt(rate * N / 10)


def test_corrupted_labels_depend_on_seed_and_rate_alone():
    labels = torch.arange(1000) % 10
    first = messy_collab.corrupt_labels(labels, 0.3, 10, 0)
    torch.manual_seed(99)
    assert torch.equal(first, messy_collab.corrupt_labels(labels, 0.3, 10, 0))
    assert not torch.equal(first, messy_collab.corrupt_labels(labels, 0.3, 10, 1))
    assert torch.equal(labels, torch.arange(1000) % 10)  # the true ones are not changed in place
    inclusive = messy_collab.corrupt_labels(labels, 0.3, 10, 0, "inclusive")
    assert 0.2 < (inclusive != labels).double().mean() < 0.3
    assert torch.equal(messy_collab.corrupt_labels(labels, 0.0, 10, 0), labels)
    assert torch.equal(messy_collab.vary_labels(labels, 0.0, 10), labels)


# ------------------------------------------------------------------------------------------------
# Who learns from which labels

BOTH = {"teacher", "student"}
# method: (nets whose labels vary, nets whose labels are corrupted) by --noise-rate and
# --corruption-rate
WRONG = {
    "teacher": ({"teacher"}, BOTH),
    "student": ({"student"}, BOTH),
    "hinton": (set(), BOTH),
    "mc-t": ({"teacher"}, BOTH),
    "mc-s": ({"student"}, BOTH),
    "mc-ts": (BOTH, BOTH),
    "flc-t": (set(), {"teacher"}),
    "flc-s": (set(), {"student"}),
    "flc-ts": (set(), BOTH),
}


@pytest.mark.parametrize("method", messy_collab.METHODS)
def test_each_method_disturbs_the_labels_of_whom_it_says(method, tmp_path, monkeypatch):
    varied, corrupted = WRONG[method]
    labels_of_epoch = {}  # (stage, epoch): labels (N,) from which the net has learned
    accuracies = {}  # (stage, epoch): train_acc, and what it should be
    batches = []  # of the current epoch: labels, how many predictions agree with them
    epoch_row, step_sums = common.epoch_row, common.step_sums

    def record_batch(loss, logits, labels):
        batches.append((labels, int((logits.argmax(1) == labels).sum())))
        return step_sums(loss, logits, labels)

    def record_epoch(args, stage, epoch, *more):
        row = epoch_row(args, stage, epoch, *more)
        labels_of_epoch[stage, epoch] = torch.cat([labels for labels, _ in batches])
        accuracies[stage, epoch] = row["train_acc"], sum(correct for _, correct in batches) / 48
        batches.clear()
        return row

    monkeypatch.setattr(common, "step_sums", record_batch)
    monkeypatch.setattr(common, "epoch_row", record_epoch)
    noise = "--noise-rate 0.3" if varied else ""
    folder = run(tmp_path, f"--method {method} --corruption-rate 0.25 {noise}")
    data = common.load_data("shapes", val_size=20, train_subset=48, test_subset=20)
    wrong_labels = common.load(folder / "labels.pt")["labels"]
    assert (wrong_labels != data.y_train).sum() == 12
    trained = {stage for stage, _ in labels_of_epoch}
    assert trained == ({method} if method in BOTH else BOTH)
    for (stage, epoch), labels in labels_of_epoch.items():
        given = dataclasses.replace(data)
        if stage in corrupted:
            given.y_train = wrong_labels
        expected = torch.cat([y for _, y in common.batches(given, 16, 0, stage, epoch)])
        share = (labels != expected).double().mean().item()
        if stage in varied:
            assert 0.05 < share < 0.6
        else:
            assert share == 0
    for stage in trained & varied:  # each epoch draws its own
        first, second = labels_of_epoch[stage, 0], labels_of_epoch[stage, 1]
        assert not torch.equal(first.sort().values, second.sort().values)
    for train_acc, expected in accuracies.values():  # on the labels that were learned
        assert train_acc == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags, noise_rates, corruption_rates",
    [  # of teacher and student
        ("", (0.25, 0.25), (0, 0)),
        ("--method mc-t --noise-rate 0.5", (0.5, 0), (0, 0)),
        ("--method hinton", (0, 0), (0, 0)),
        ("--method teacher", (0, 0), (0, 0)),
        ("--method flc-s", (0, 0), (0, 0.25)),
        ("--method flc-ts --corruption-rate 0.5", (0, 0), (0.5, 0.5)),
        ("--method hinton --corruption-rate 0.1", (0, 0), (0.1, 0.1)),
        ("--method mc-s --corruption-rate 0.1", (0, 0.25), (0.1, 0.1)),
    ],
)
def test_the_defaults_disturb_by_the_method(
    flags, noise_rates, corruption_rates, tmp_path, monkeypatch
):
    given, train = {}, messy_collab.train  # stage: noise rate, share of wrong labels
    clean = common.load_data("shapes", val_size=20, train_subset=48)

    def record(args, data, folder, stage, teacher=None):
        wrong = (data.y_train != clean.y_train).double().mean().item()
        given[stage] = args.noise_rate or 0, wrong
        return train(args, data, folder, stage, teacher)

    monkeypatch.setattr(messy_collab, "train", record)
    run(tmp_path, f"{flags} --epochs 1 --teacher-epochs 1")
    roles = ["teacher"] if "--method teacher" in flags else ["teacher", "student"]
    assert list(given) == roles
    for role, noise_rate, corruption_rate in zip(roles, noise_rates, corruption_rates):
        assert given[role] == (noise_rate, round(corruption_rate * 48) / 48), role


def test_the_net_alone_of_the_demo_has_the_fixed_wrong_labels_and_no_noise(tmp_path, monkeypatch):
    given, train = {}, messy_collab.train

    def record(args, data, folder, stage, teacher=None):
        given[stage] = args.noise_rate or 0, data.y_train
        return train(args, data, folder, stage, teacher)

    monkeypatch.setattr(messy_collab, "train", record)
    folder = run(tmp_path, "--demo --noise-rate 0.4 --epochs 1 --teacher-epochs 1")
    assert {stage: rate for stage, (rate, _) in given.items()} == {
        "student-alone": 0,
        "teacher": 0,
        "student": 0.4,
    }
    wrong_labels = common.load(folder / "labels.pt")["labels"]
    assert all(torch.equal(labels, wrong_labels) for _, labels in given.values())


def test_the_net_alone_of_the_demo_has_the_labels_of_the_student(tmp_path, monkeypatch):
    given, train = {}, messy_collab.train

    def record(args, data, folder, stage, teacher=None):
        given[stage] = data.y_train
        return train(args, data, folder, stage, teacher)

    monkeypatch.setattr(messy_collab, "train", record)
    run(tmp_path, "--demo --method flc-t --epochs 1 --teacher-epochs 1")
    assert torch.equal(given["student-alone"], given["student"])
    assert not torch.equal(given["student"], given["teacher"])


def test_the_noise_rate_of_a_given_teacher_is_checked(tmp_path, refused):
    """The best of several teachers, as the script's Usage has it."""
    short = f"{SMALL} --epochs 1 --teacher-epochs 1 --runs {tmp_path}"
    for rate, name in (("", "clean"), ("--noise-rate 0.25", "noisy")):
        messy_collab.main(f"{short} --method teacher {rate} --name {name}".split())
    files = {}
    for path in tmp_path.glob("teachers/*/teacher.pt"):
        files[common.load(path)["meta"]["noise_rate"]] = path
    assert sorted(files) == [0.0, 0.25]
    messy_collab.main(f"{short} --teacher-ckpt {files[0.25]} --name good".split())
    messy_collab.main(f"{short} --method mc-s --teacher-ckpt {files[0.0]} --name fine".split())
    message = refused(messy_collab.main, f"{short} --teacher-ckpt {files[0.0]} --name bad".split())
    assert "learned at noise rate 0; --method mc-ts wants 0.25" in message
    argv = f"{short} --method mc-s --teacher-ckpt {files[0.25]} --name worse".split()
    message = refused(messy_collab.main, argv)
    assert "learned at noise rate 0.25; --method mc-s wants 0" in message


def test_the_corruption_rate_of_a_given_teacher_is_checked(tmp_path, refused):
    """Otherwise a student of --method flc-t could have a teacher of true labels."""
    short = f"{SMALL} --epochs 1 --teacher-epochs 1 --runs {tmp_path}"
    for rate in (0.0, 0.5):
        flags = f"--method teacher --corruption-rate {rate} --name {rate}"
        messy_collab.main(f"{short} {flags}".split())
    files = {}
    for path in tmp_path.glob("teachers/*/teacher.pt"):
        files[common.load(path)["meta"]["corruption_rate"]] = path
    assert sorted(files) == [0.0, 0.5]
    for method, rate, learned, wanted in (
        ("flc-t", 0.5, 0.0, 0.5),
        ("flc-s", 0.5, 0.5, 0.0),
        ("hinton", 0.0, 0.5, 0.0),
        ("hinton", 0.5, 0.0, 0.5),
        ("flc-ts", 0.25, 0.5, 0.25),
    ):
        flags = f"--method {method} --corruption-rate {rate} --name {method}{rate}"
        argv = f"{short} {flags} --teacher-ckpt {files[learned]}".split()
        wrong = f"learned at corruption rate {learned:g}; --method {method} wants {wanted:g}"
        assert wrong in refused(messy_collab.main, argv)
        if wanted in files:
            messy_collab.main([*argv[:-1], str(files[wanted])])
    # a student says at which rate it has learned too
    student = common.load(tmp_path / "messy_collab" / "flc-t0.5-s0" / "student.pt")["meta"]
    assert student["corruption_rate"] == 0.0


def test_a_teacher_is_shared_if_its_labels_are_the_same(tmp_path):
    def teacher(flags):
        """The file of the teacher of a run with these flags."""
        name = f"run{len([*tmp_path.glob('messy_collab/*')])}"
        flags = f"{SMALL} --epochs 1 --teacher-epochs 1 {flags} --name {name} --runs {tmp_path}"
        (rows,) = messy_collab.main(flags.split())
        (file,) = [row["file"] for row in rows if row["net"] == "teacher"]
        return (tmp_path / "messy_collab" / f"{name}-s0" / file).resolve()

    plain = teacher("--method hinton")
    assert teacher("--method mc-s --noise-rate 0.4") == plain
    assert teacher("--method mc-s --noise-rate 0.4 --label-draw inclusive") == plain
    assert teacher("--method flc-s") == plain
    varied = teacher("--method mc-t")
    assert teacher("--method mc-ts --noise-rate 0.25") == varied
    assert teacher("--method teacher --noise-rate 0.25") == varied
    corrupted = teacher("--method flc-t")
    assert teacher("--method hinton --corruption-rate 0.25") == corrupted
    assert teacher("--method teacher --corruption-rate 0.25") == corrupted
    assert teacher("--method mc-s --corruption-rate 0.25") == corrupted
    assert teacher("--method flc-ts") == corrupted
    others = [plain, varied, corrupted]
    for flags in (
        "--method mc-t --noise-rate 0.5",
        "--method mc-t --label-draw inclusive",
        "--method mc-t --corruption-rate 0.25",
        "--method flc-t --label-draw inclusive",
        "--method flc-t --corruption-rate 0.5",
        "--method flc-t --corruption-seed 1",
    ):
        others.append(teacher(flags))
        assert others[-1] not in others[:-1], flags


# ------------------------------------------------------------------------------------------------
# labels.pt


def test_the_true_labels_of_corrupted_images_are_never_used(tmp_path, monkeypatch):
    arrays = common.make_shapes()
    relabelled = arrays | {"y_train": np.roll(arrays["y_train"], 1)}  # other truths
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **relabelled)
    flags = "--method mc-ts --noise-rate 0.2 --val-size 0 --data"
    first = run(tmp_path / "1", f"{flags} {tmp_path / 'a.npz'} --corruption-rate 0.5")
    labels = common.load(first / "labels.pt")["labels"]
    monkeypatch.setattr(messy_collab, "corrupt_labels", lambda *_: labels)
    second = run(tmp_path / "2", f"{flags} {tmp_path / 'b.npz'} --corruption-rate 0.5")
    assert same_weights(first / "student.pt", second / "student.pt")
    assert same_weights(teacher_file(tmp_path / "1"), teacher_file(tmp_path / "2"))


def test_all_seeds_and_runs_have_the_same_corrupted_labels_and_held_out_ones_are_true(tmp_path):
    run(tmp_path, "--method flc-s --corruption-rate 0.5 --seed 0 4 --epochs 1")
    run(tmp_path, "--method student --corruption-rate 0.5 --epochs 1 --name y")
    labels = [common.load(path)["labels"] for path in tmp_path.glob("messy_collab/*/labels.pt")]
    assert len(labels) == 3
    data = common.load_data("shapes", val_size=20, train_subset=48)
    args = messy_collab.parse_args(["--method", "student", "--corruption-rate", "0.5"])
    wrong = messy_collab.with_wrong_labels(args, data)
    assert all(torch.equal(other, wrong.y_train) for other in labels)
    assert torch.equal(wrong.y_val, data.y_val) and torch.equal(wrong.y_test, data.y_test)
    assert (labels[0] != data.y_train).sum() == 24
    fresh = common.load_data("shapes", val_size=20, train_subset=48)
    assert torch.equal(data.y_train, fresh.y_train) and torch.equal(data.y_val, fresh.y_val)


def test_a_stopped_run_draws_its_labels_again(tmp_path, stop_at):
    flags = f"{SMALL} --method student --corruption-rate 0.3 --runs {tmp_path}"
    stop_at(messy_collab, flags, "student", 1)
    file = tmp_path / "messy_collab" / "x-s0" / "labels.pt"
    record = common.load(file)
    common.save(file, record | {"labels": record["labels"].flip(0)})  # it is not read
    messy_collab.main(flags.split())
    assert torch.equal(common.load(file)["labels"], record["labels"])
    whole = run(tmp_path / "whole", "--method student --corruption-rate 0.3")
    assert same_weights(file.parent / "student.pt", whole / "student.pt")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--noise-rate 1", "--noise-rate: expected a number of at least 0 and below 1"),
        ("--noise-rate nan", "--noise-rate: expected"),
        ("--corruption-rate -1/10", "--corruption-rate: expected"),
        ("--corruption-seed -1", "--corruption-seed: expected"),
        ("--method hinton --noise-rate 0.1", "--noise-rate: has no effect with --method hinton"),
        ("--method flc-ts --noise-rate 0.1", "--noise-rate: has no effect with --method flc-ts"),
        ("--label-draw both", "--label-draw: invalid choice"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(flags, message, tmp_path, refused):
    argv = [*SMALL.split(), *flags.split(), "--runs", str(tmp_path / "runs")]
    assert message in refused(messy_collab.main, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, message",
    {
        "--corruption-seed 3": "--corruption-seed: has no effect without --corruption-rate",
        "--method hinton --label-draw inclusive": "--label-draw: has no effect where no label",
    }.items(),
)
def test_flags_of_labels_that_nothing_replaces_are_refused(flags, message, refused):
    assert message in refused(messy_collab.parse_args, flags.split())
    messy_collab.parse_args("--corruption-seed 3 --corruption-rate 0.1".split())
    messy_collab.parse_args("--method flc-s --corruption-seed 3 --label-draw inclusive".split())
