"""A run: its folder, its checkpoints, teachers that runs share, and how programs end."""

import errno
import importlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, same_weights

import common
import eval_robustness
import robust_kd

# with convolutions, BatchNorm and two passes of the student: all that a resumed run must restore
TINY = (
    "--data shapes --model wrn-10-1 --device cpu --train-subset 32 --test-subset 10 --val-size 10 "
    "--batch-size 16 --teacher-batch-size 16 --teacher-epochs 3 --epochs 3 --steps 1 "
    "--loss rslad+ --name x"
)
SMALL = (
    "--data shapes --model mlp-8 --device cpu --train-subset 32 --test-subset 20 --val-size 20 "
    "--batch-size 16 --teacher-batch-size 16 --teacher-epochs 1 --epochs 1 --steps 1 "
    "--name x"
)


def run_in(runs, flags=TINY):
    robust_kd.main([*flags.split(), "--runs", str(runs)])
    return runs / "robust_kd" / "x-s0"


def without_times(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(runs, other):
    """All weights and numbers below two --runs folders are equal."""
    files = [path.relative_to(runs) for path in sorted(runs.rglob("*.pt"))]
    assert files == [path.relative_to(other) for path in sorted(other.rglob("*.pt"))] and files
    for file in files:
        assert same_weights(runs / file, other / file), file
    for log in runs.rglob("log.jsonl"):
        folder = log.parent
        rows = without_times(log_of(other / folder.relative_to(runs)))
        assert without_times(log_of(folder)) == rows, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The --runs folder of a run that nothing interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    run_in(runs)
    return runs


# ------------------------------------------------------------------------------------------------
# The folder


def test_the_run_folder_holds_what_the_design_says(whole):
    folder = whole / "robust_kd" / "x-s0"
    names = {"config.json", "lock", "log.jsonl", "student.pt", "student_best.pt", "summary.json"}
    assert {path.name for path in folder.iterdir()} - {"curves.png"} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["alpha"] == 0.8 and config["torch"] == torch.__version__
    assert [(row["stage"], row["epoch"]) for row in log_of(folder)] == [
        ("student", epoch) for epoch in (1, 2, 3)
    ]
    wanted = {"loss", "train_acc", "images_per_second", "seconds", "val_clean_acc", "val_pgd7_acc"}
    assert wanted | {"stage", "epoch"} == log_of(folder)[0].keys()
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["model"] for row in rows[:2]] == ["teacher (at)", "student (rslad+)"]
    assert [row["net"] for row in rows] == ["teacher", "student", "best"]
    accuracies = {"clean_acc", "pgd20_acc", "pgd20_conditional_acc"}
    assert rows[0].keys() == {"model", "net", "epochs", "seconds", "file"} | accuracies
    (teacher,) = (whole / "teachers").iterdir()
    files = [folder / row["file"] for row in rows]
    own = [folder / "student.pt", folder / "student_best.pt"]
    assert [file.resolve() for file in files] == [teacher / "teacher.pt", *own]
    names = {"recipe.json", "lock", "log.jsonl", "teacher.pt", "teacher_best.pt"}
    assert {path.name for path in teacher.iterdir()} == names
    assert json.loads((teacher / "recipe.json").read_text())["loss"] == "at"


def test_the_meta_of_a_model_says_how_long_it_was_trained(whole):
    meta = common.load_model(whole / "robust_kd" / "x-s0" / "student.pt").meta
    rows = log_of(whole / "robust_kd" / "x-s0")
    assert meta["epoch"] == 3 and meta["training"] == "rslad+"
    assert meta["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert meta["best"] == common.best_row(rows)


def test_a_finished_run_shows_its_summary_and_does_nothing(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "lock"}
    run_in(whole)
    out = capsys.readouterr().out
    assert "student (rslad+)" in out and "is finished" in out and "student 1/3" not in out
    assert before == {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "lock"
    }


def test_the_evaluation_of_a_file_gives_the_numbers_of_the_run(whole, tmp_path):
    folder = whole / "robust_kd" / "x-s0"
    files = [str(*whole.glob("teachers/*/teacher.pt")), str(folder / "student.pt")]
    flags = "--data shapes --n 10 --attack clean pgd20 --device cpu --json"
    eval_robustness.main([*files, *flags.split(), str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    summary = json.loads((folder / "summary.json").read_text())
    for row, expected in zip(found, summary[:2], strict=True):
        for key in ("clean_acc", "pgd20_acc"):
            assert row[key] == expected[key], (expected["model"], key)


def test_a_folder_of_other_flags_is_refused_by_the_name_of_the_flag(tmp_path, refused):
    run_in(tmp_path, f"{SMALL} --loss st")
    before = contents(tmp_path)
    message = refused(run_in, tmp_path, f"{SMALL} --loss st --eps 4/255")
    assert message.startswith("--eps: ") and "--name" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("part", ["x_train", "y_train", "x_test", "y_test"])
def test_other_images_or_labels_under_the_same_name_are_refused(part, tmp_path, refused):
    arrays = common.make_shapes(80, 40)
    np.savez(tmp_path / "own.npz", **arrays)
    flags = f"{SMALL} --runs {tmp_path}/runs --loss st --data {tmp_path}/own.npz".split()
    robust_kd.main(flags)
    changed = arrays[part].copy()
    changed[0] = (changed[0] + 1) % 10
    np.savez(tmp_path / "own.npz", **(arrays | {part: changed}))
    message = refused(robust_kd.main, flags)
    assert message.startswith("--data: ") and "--name" in message


def test_a_damaged_config_or_summary_is_one_line(tmp_path, refused):
    folder = run_in(tmp_path, f"{SMALL} --loss st")
    for name in ("summary.json", "config.json"):
        (folder / name).write_text('{"flags": ')
        assert name in refused(run_in, tmp_path, f"{SMALL} --loss st")
    good = {"flags": {}, "fingerprint": 1}
    for change in (
        {"flags": 3},
        {"flags": [["eps", 0.1]]},
        {"flags": [[None, None]]},
        {"fingerprint": None},
        {"fingerprint": [1]},
        {"processes": "2"},
    ):
        (folder / "config.json").write_text(json.dumps(good | change))
        assert "config.json: damaged" in refused(run_in, tmp_path, f"{SMALL} --loss st")


@pytest.mark.parametrize(
    "row",
    [
        {"clean_acc": 0.5},
        {"net": "student", "model": None},
        {"net": 1, "model": "student"},
        {"model": "student"},
        {"net": "student", "model": "student", "file": 3},
        {"net": "student", "model": "student", "clean_acc": "0.5"},
        {"net": "student", "model": "student", "epochs": [1]},
    ],
)
def test_a_summary_of_another_shape_is_damaged(row, tmp_path, refused):
    path = tmp_path / "summary.json"
    good = {"net": "teacher", "model": "teacher (at)", "clean_acc": 0.5, "pgd20_acc": None}
    good |= {"epochs": 3, "file": "t.pt"}
    assert common.read_summary(tmp_path) is None
    path.write_text(json.dumps([good, row]))
    assert refused(common.read_summary, tmp_path).startswith(f"{path}: damaged")
    path.write_text(json.dumps([good, good]))
    assert common.read_summary(tmp_path) == [good, good]


def test_a_finished_run_drops_the_checkpoints_that_a_kill_left(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "delete_checkpoints", killed)
        run_in(tmp_path, f"{SMALL} --loss st")
    folder = tmp_path / "robust_kd" / "x-s0"
    assert list(folder.glob("*.checkpoint?.pt")) and (folder / "summary.json").exists()
    run_in(tmp_path, f"{SMALL} --loss st")
    assert not list(folder.glob("*.checkpoint?.pt"))


def test_a_folder_in_use_is_refused_and_taken_over_after_the_end(tmp_path, refused):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "robust_kd" / "x-s0"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use by process 4711" in refused(run_in, tmp_path, f"{SMALL} --loss st")
        assert [path.name for path in folder.iterdir()] == ["lock"]
    run_in(tmp_path, f"{SMALL} --loss st")  # the other has ended
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("runs", ["/proc/runs", "a file/runs"])
def test_a_folder_that_cannot_be_written_is_one_line(runs, tmp_path, ended):
    if not os.path.isdir("/proc/1"):
        pytest.skip("needs a folder that not even root can fill")
    (tmp_path / "a file").write_text("")
    argv = [
        *SMALL.split(),
        "--loss",
        "st",
        "--runs",
        str(tmp_path / runs),
    ]  # /proc/runs is absolute
    status, error = ended(lambda: robust_kd.main(argv))
    assert status == 2 and error.startswith("error: /") and error.count("\n") == 1


def test_several_seeds_end_in_mean_and_standard_deviation(tmp_path, capsys):
    flags = f"{SMALL} --loss st --seed 3 1 --runs {tmp_path}"
    summaries = robust_kd.main(flags.split())
    values = [rows[0]["clean_acc"] for rows in summaries]
    expected = f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"
    assert expected in capsys.readouterr().out.split("mean +- std of seeds 3 1")[1]
    folders = sorted(path.name for path in tmp_path.glob("robust_kd/*"))
    assert folders == ["x-s1", "x-s3"]


def test_a_value_or_a_row_that_a_seed_lacks_has_no_mean():
    first = [{"model": "student", "clean_acc": 0.5, "ood_auroc": 0.7}]
    second = [{"model": "student", "clean_acc": 0.6, "ood_auroc": None}]
    best = {"model": "student, best on held-out images", "clean_acc": 0.6}
    for summaries in ([first, [*second, best]], [[*second, best], first]):
        (row,) = common.mean_and_std(summaries)
        assert row == {"model": "student", "clean_acc": "0.5500 +- 0.0707", "ood_auroc": None}


def test_epochs_are_seeded_by_seed_stage_and_number():
    draws = set()
    for seed, stage, epoch in ((0, "student", 0), (1, "student", 0), (0, "teacher", 0)):
        for number in (epoch, epoch + 1):
            common.seed_epoch(seed, stage, number)
            draws.add(torch.rand(1).item())
    assert len(draws) == 6


def test_a_file_is_synced_then_moved_then_its_folder_is_synced(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def spied_fsync(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def spied_replace(*paths):
        done.append("move")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    common.write_json(tmp_path / "a.json", 1)
    assert done == ["file", "move", "folder"]


def test_whole_numbers_that_differ_between_seeds_have_a_mean_too():
    summaries = [[{"model": "best", "epochs": epochs, "n": 500}] for epochs in (40, 35, 31)]
    (row,) = common.mean_and_std(summaries)
    assert row == {"model": "best", "epochs": "35.3 +- 4.5", "n": 500}


def test_a_summary_without_the_file_of_a_shared_net_has_a_mean_too():
    shared = {"model": "teacher", "file": "../../teachers/a/teacher.pt", "clean_acc": 0.5}
    (row,) = common.mean_and_std([[shared], [{"model": "teacher", "clean_acc": 0.7}]])
    assert row["clean_acc"] == "0.6000 +- 0.1414"


# ------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("stage, epoch", [("teacher", 1), ("teacher", 3), ("student", 2)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    stage, epoch, whole, tmp_path, stop_at, capsys
):
    stop_at(robust_kd, f"{TINY} --runs {tmp_path}", stage, epoch)
    stopped = tmp_path.rglob(f"{stage}.checkpoint{epoch % 2}.pt")
    assert len(list(stopped)) == 1 and not list(tmp_path.rglob("student.pt"))
    capsys.readouterr()
    run_in(tmp_path)
    out = capsys.readouterr().out
    assert f"{stage}: goes on after epoch {epoch}" in out and f"{stage} {epoch}/3" not in out
    assert_same_run(whole, tmp_path)


def test_several_seeds_that_are_stopped_at_many_places_end_with_the_same_bits(
    tmp_path, monkeypatch
):
    flags = f"{SMALL} --loss akd --epochs 2 --teacher-epochs 2 --seed 0 1 --runs"
    robust_kd.main([*flags.split(), str(tmp_path / "whole")])
    replace, places = os.replace, random.Random(0)
    stops, left = 0, None

    def stop_or_replace(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_or_replace)
    while True:
        left = places.randint(2, 7)  # the files that it still moves to their places
        try:
            summaries = robust_kd.main([*flags.split(), str(tmp_path / "stopped")])
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 5 and len(summaries) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    for seed in (0, 1):
        first, second = (
            common.read_summary(tmp_path / name / "robust_kd" / f"x-s{seed}")
            for name in ("whole", "stopped")
        )
        assert without_times(first) == without_times(second)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """The --runs folder of a run that was stopped after the second epoch of its student."""
    runs, save_epoch = tmp_path_factory.mktemp("stopped"), common.save_epoch

    def save_and_stop(folder, stage, model, state, rows, *more):
        save_epoch(folder, stage, model, state, rows, *more)
        if (stage, len(rows)) == ("student", 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_epoch", save_and_stop)
        run_in(runs)
    return runs


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """(runs folder, newest checkpoint, the one before) of such a run."""
    runs = tmp_path / "runs"
    shutil.copytree(stopped_once, runs)
    folder = runs / "robust_kd" / "x-s0"
    return runs, folder / "student.checkpoint0.pt", folder / "student.checkpoint1.pt"


def test_the_log_is_made_again_from_the_checkpoint(stopped, whole):
    runs, newest, _ = stopped
    log = newest.parent / "log.jsonl"
    log.write_text(log.read_text()[:-40] + "\n[]\nno json\n" + "[" * 10**5)
    run_in(runs)
    assert_same_run(whole, runs)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(stopped, whole, capsys):
    runs, newest, _ = stopped
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run_in(runs)
    out = capsys.readouterr().out
    assert f"{newest}: damaged" in out and "checksum" in out
    assert "student: goes on after epoch 1" in out
    assert_same_run(whole, runs)


def test_without_a_readable_checkpoint_the_stage_begins_again(stopped, whole, capsys):
    runs, newest, before = stopped
    newest.write_bytes(newest.read_bytes()[:5000])
    before.write_bytes(b"")
    run_in(runs)
    out = capsys.readouterr().out
    assert f"{newest}: damaged" in out and f"{before}: damaged" in out
    assert "goes on after" not in out and "student 1/3" in out
    assert_same_run(whole, runs)


def test_a_file_that_is_no_checkpoint_of_a_run_is_ignored_and_the_other_one_taken(
    stopped, whole, capsys
):
    runs, newest, before = stopped
    assert newest.name < before.name  # it is the one that is read first
    common.save(newest, {"a": 1})
    run_in(runs)
    out = capsys.readouterr().out
    assert f"{newest}: not a checkpoint of a run; ignored" in out and f"{before}: " not in out
    assert "student: goes on after epoch 1" in out
    assert_same_run(whole, runs)


def test_a_checkpoint_that_does_not_fit_is_one_line(stopped, refused):
    runs, newest, before = stopped
    record = common.load(newest)
    before.unlink()
    rows, state = record["rows"], record["state"]
    for changed in (
        {"rows": [], "state": state},
        {"rows": rows[:1] * 2, "state": state},
        {"rows": [row | {"stage": "teacher"} for row in rows], "state": state},
        {"rows": [row | {"val_clean_acc": "0.5"} for row in rows], "state": state},
        {"rows": [row | {None: 0.5} for row in rows], "state": state},
        {"rows": [row | {"seconds": None} for row in rows], "state": state},
        {"rows": rows, "state": {}},
        {"rows": rows, "state": state | {"model": {}}},
        {"rows": rows, "state": state | {"optimizer": {}}},
        {"rows": rows, "state": state | {"schedule": state["schedule"] | {"step": 1}}},
        {"rows": [row | {"seconds": 1e300} for row in rows], "state": state},
    ):
        common.save(newest, changed)
        message = refused(run_in, runs)
        assert "x-s0: not of a run with these flags" in message and "delete" in message


def test_a_run_that_is_stopped_in_its_evaluation_makes_a_damaged_model_again(
    stopped, whole, monkeypatch, capsys
):
    runs, newest, _ = stopped

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(robust_kd.eval_robustness, "summary_rows", stop)
        run_in(runs)
    student = newest.parent / "student.pt"
    student.write_bytes(student.read_bytes()[:500])
    capsys.readouterr()
    run_in(runs)
    assert "student: goes on after epoch 3" in capsys.readouterr().out
    assert_same_run(whole, runs)


def test_a_stage_of_more_than_a_thousand_epochs_goes_on(tmp_path):
    net = nn.Linear(1, 1)
    rows = [
        {"stage": "student", "epoch": epoch, "loss": 0.0, "images_per_second": 1.0, "seconds": 1.0}
        for epoch in range(1, 1200)
    ]
    common.save_epoch(
        tmp_path,
        "student",
        net,
        {"model": net},
        rows,
        SimpleNamespace(epochs=1200, tensorboard=False),
    )
    assert common.resume(tmp_path, "student", {"model": nn.Linear(1, 1)}) == rows


def test_the_best_epoch_is_the_first_with_the_highest_sum():
    rows = []
    for clean, pgd in ((0.5, 0.25), (0.75, 0.125), (0.625, 0.25), (0.25, 0.5)):
        rows.append({"val_clean_acc": clean, "val_pgd7_acc": pgd})
    assert common.best_row(rows) is rows[1]
    # both 0.42; as floats the second sum is larger
    rows = [{"val_clean_acc": a, "val_pgd7_acc": b} for a, b in ((0.2, 0.22), (0.234, 0.186))]
    assert common.best_row(rows) is rows[0]
    assert common.best_row([]) == common.best_row([{"loss": 1.0}]) == {}


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path, refused):
    flags = f"{SMALL} --loss st --lr 1e15 --epochs 3"
    message = refused(run_in, tmp_path / "held out", flags)  # the weights are still finite
    assert message.startswith("student: ") and "held-out images are not finite" in message
    assert message.endswith("try a lower --lr")
    message = refused(run_in, tmp_path, f"{flags} --val-size 0")
    assert "student, epoch 2, step 1" in message and message.endswith("try a lower --lr")
    run_in(tmp_path / "advice", f"{SMALL} --loss st --lr 0.01")


@pytest.mark.parametrize(
    "flags, advice",
    [
        ("--loss st --weight-decay 1e14", "a lower --lr, or another value of --weight-decay"),
        ("--loss akd --temperature 1e15", "a lower --lr, or another value of --temperature"),
        ("--loss akd --teacher-lr 1e15 --teacher-epochs 3", "a lower --teacher-lr"),
    ],
)
def test_the_advice_names_the_flags_that_were_given(flags, advice, tmp_path, refused):
    message = refused(run_in, tmp_path, f"{SMALL} --epochs 9 {flags}")
    assert "not finite" in message and message.endswith(f"try {advice}")


def test_weights_that_are_not_finite_stop_the_run_before_the_checkpoint(
    tmp_path, refused, monkeypatch
):
    make_optimizer = robust_kd.make_optimizer

    def breaking(model, *rest):
        optimizer, schedule = make_optimizer(model, *rest)
        steps = []

        def after(*_):
            steps.append(1)
            if len(steps) == 4:  # the last step of the second epoch: no loss sees it
                next(model.parameters()).data.fill_(float("nan"))

        optimizer.register_step_post_hook(after)
        return optimizer, schedule

    monkeypatch.setattr(robust_kd, "make_optimizer", breaking)
    assert "student, epoch 2" in refused(run_in, tmp_path, f"{SMALL} --loss st --epochs 3")
    (path,) = tmp_path.rglob("*.checkpoint?.pt")
    record = common.load(path)
    assert len(record["rows"]) == 1
    assert all(value.isfinite().all() for value in record["state"]["model"].values())


def test_the_sums_of_a_step_are_sums_over_the_batch():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 0, 0])
    for given in (labels, nn.functional.one_hot(labels, 2).float()):
        assert common.step_sums(torch.tensor(0.5), logits, given).tolist() == [1.5, 2.0, 3.0]


def test_tensorboard_gets_every_number_of_an_epoch(tmp_path, monkeypatch, refused):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        flags = f"{SMALL} --loss st --tensorboard"
        assert "pip install tensorboard" in refused(run_in, tmp_path, flags)
        assert list(tmp_path.iterdir()) == []
    scalars = []

    class SummaryWriter:
        def __init__(self, folder, filename_suffix):
            self.add_scalar = lambda name, value, epoch: scalars.append((name, epoch))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            scalars.append("closed")

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run_in(tmp_path, f"{SMALL} --loss st --tensorboard")
    names = {name.removeprefix("student/") for name, epoch in scalars[:-1]}
    assert {"loss", "train_acc", "val_clean_acc", "val_pgd7_acc", "images_per_second"} <= names
    assert scalars[-1] == "closed"


# ------------------------------------------------------------------------------------------------
# Teachers


def test_runs_of_one_recipe_share_the_teacher_and_the_path_is_printed(whole, tmp_path, capsys):
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    before = contents(tmp_path)
    run_in(tmp_path, f"{TINY} --alpha 0.4 --lr 0.1 --name other")
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("teachers/*/teacher.pt")
    assert f"teacher: {path}" in out and "teacher 1/3" not in out
    assert contents(tmp_path / "teachers") == before


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_teacher_of_other_labels_is_not_taken_for_this_one(part, tmp_path):
    arrays = common.make_shapes(80, 40)
    for change in (0, 1):
        arrays[f"y_{part}"] = arrays[f"y_{part}"].copy()
        arrays[f"y_{part}"][0] += change
        np.savez(tmp_path / "own.npz", **arrays)
        run_in(tmp_path, f"{SMALL} --loss akd --data {tmp_path}/own.npz --name run{change}")
    assert len(list(tmp_path.glob("teachers/*/teacher.pt"))) == 2


def test_a_damaged_teacher_is_one_line_and_made_again_once_deleted(tmp_path, refused):
    run_in(tmp_path, f"{SMALL} --loss akd")
    (path,) = tmp_path.glob("teachers/*/teacher.pt")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    other = f"{SMALL} --loss akd+ --name other"
    message = refused(run_in, tmp_path, other)
    assert str(path) in message and "delete it" in message
    path.unlink()
    run_in(tmp_path, other)
    assert same_weights(path, path.with_name("teacher_best.pt"))  # of its only epoch


def test_while_another_run_trains_a_teacher_this_one_waits_for_it(tmp_path, capsys, monkeypatch):
    run_in(tmp_path, f"{SMALL} --loss akd")
    (path,) = tmp_path.glob("teachers/*/teacher.pt")
    path.rename(tmp_path / "later.pt")

    def train_elsewhere():
        with common.locked(path.parent):
            started.set()
            waits.wait(100)
            (tmp_path / "later.pt").rename(path)

    def print_line(*words, **options):
        print(*words, **options)
        if "waiting for process" in str(words):
            waits.set()

    started, waits = threading.Event(), threading.Event()
    other = threading.Thread(target=train_elsewhere)
    other.start()
    started.wait()
    capsys.readouterr()
    monkeypatch.setattr(common, "print", print_line, raising=False)
    run_in(tmp_path, f"{SMALL} --loss akd+ --name other")
    other.join()
    out = capsys.readouterr().out
    assert f"{path.parent}: waiting for process" in out and "teacher 1/1" not in out


def test_a_recipe_that_is_being_written_is_not_taken_for_a_torn_file(tmp_path, monkeypatch):
    """Two runs that need the same teacher begin at once: the second cleans the folder."""
    pytest.importorskip("fcntl")
    data = common.load_data("shapes", train_subset=32, val_size=20)
    args = robust_kd.parse_args([*SMALL.split(), "--runs", str(tmp_path)])
    fsync, others, entered = os.fsync, [], threading.Event()

    def enter(folder):
        with common.locked(folder, wait=True):
            entered.set()

    def sync_while_another_run_begins(number):
        fsync(number)
        if not others:
            (torn,) = tmp_path.rglob(".recipe.json.*.tmp")
            others.append(threading.Thread(target=enter, args=(torn.parent,)))
            others[0].start()
            assert not entered.wait(0.2)
            with pytest.raises(common.UserError, match="in use"), common.locked(torn.parent):
                pass

    monkeypatch.setattr(os, "fsync", sync_while_another_run_begins)
    folder = common.teacher_folder(args, data)
    others[0].join()
    assert entered.is_set()
    assert json.loads((folder / "recipe.json").read_text())["steps"] == 1


def test_an_early_stopped_teacher_is_kept_in_a_locked_folder(tmp_path, monkeypatch):
    """Else a run that looks for it there would delete the half-written file."""
    fcntl = pytest.importorskip("fcntl")
    save_model, saved = common.save_model, []

    def save_if_locked(path, *given, **meta):
        with open(path.parent / "lock", "a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        saved.append(path)
        save_model(path, *given, **meta)

    monkeypatch.setattr(common, "save_model", save_if_locked)
    run_in(tmp_path, f"{SMALL} --loss akd --teacher-epochs 3 --save-every 1")
    assert len({path.parent for path in saved if path.name == "teacher.pt"}) == 3


def test_a_teacher_that_is_stopped_in_its_last_epoch_is_not_taken_for_a_finished_one(
    whole, tmp_path, monkeypatch
):
    save_epoch = common.save_epoch

    def stop_before(folder, stage, model, state, rows, *more):
        if (stage, len(rows)) == ("teacher", 3):
            raise KeyboardInterrupt
        save_epoch(folder, stage, model, state, rows, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_epoch", stop_before)
        run_in(tmp_path, f"{TINY} --save-every 3")
    run_in(tmp_path, f"{TINY} --save-every 3")
    (folder,) = (tmp_path / "teachers").iterdir()
    expected = whole / "teachers" / folder.name
    assert without_times(log_of(folder)) == without_times(log_of(expected))
    assert same_weights(folder / "teacher.pt", expected / "teacher.pt")


# ------------------------------------------------------------------------------------------------
# How programs end


def prints_into(stdout, text="a line"):
    """(exit status, stderr) of a program that prints a line; stdout: a file."""
    code = f"import common; common.start(lambda: print({text!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100
    )
    return done.returncode, done.stderr


def test_a_killed_run_goes_on_by_the_command_that_it_prints(whole, tmp_path):
    command = [sys.executable, "robust_kd.py", *TINY.split(), "--runs", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("teacher.checkpoint?.pt")):
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 143 and "Traceback" not in error
    *_, stopped, printed = error.splitlines()
    assert stopped == "stopped; finished epochs are kept; the same command goes on:"
    done = subprocess.run(printed, shell=True, cwd=ROOT, capture_output=True, text=True)
    # on a busy machine the teacher may be finished when the signal comes
    goes_on = "goes on after epoch" in done.stdout or "teacher: " in done.stdout
    assert done.returncode == 0 and goes_on and "teacher 1/" not in done.stdout
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(
    "stop, status, message",
    [
        (KeyboardInterrupt(), 130, "stopped; finished epochs are kept; the same command goes on:"),
        (KeyboardInterrupt("SIGTERM"), 143, "stopped; finished epochs are kept"),
        (common.UserError("--eps: two\nlines \x1b[2J"), 2, "error: --eps: two lines ?[2J\n"),
        (OSError(28, "No space left on device", "a.pt"), 2, "error: a.pt: No space left on"),
        (torch.OutOfMemoryError("CUDA"), 2, "take a smaller --batch-size"),
        (MemoryError("Unable to allocate 6 TiB"), 2, "too little memory; take a smaller net"),
    ],
)
def test_what_a_user_can_cause_is_one_line(stop, status, message, ended):
    def main():
        raise stop

    found, error = ended(main)
    assert found == status and message in error
    if status == 2:
        assert error.startswith("error: ") and error.count("\n") == 1
    else:
        assert error.splitlines()[-1] == common.command_line()


def test_an_end_of_another_process_is_told_only_where_there_are_others():
    code = """
import common

def main():
    print("last words")
    raise RuntimeError("[gloo] Connection closed by peer")

common.start(main)
"""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    ends = []
    for environment in ({}, torchrun):
        command = [sys.executable, "-c", code]
        options = {"cwd": ROOT, "env": os.environ | environment, "timeout": 100}
        ends.append(subprocess.run(command, capture_output=True, text=True, **options))
    alone, one_of_two = ends
    # perhaps of a module called igloo
    assert alone.returncode == 1 and "RuntimeError: [gloo]" in alone.stderr
    assert one_of_two.returncode == 2 and one_of_two.stdout == "last words\n"
    assert one_of_two.stderr.startswith("error: process 0: another process has ended")


def test_an_error_keeps_its_traceback_where_torch_cannot_start_processes(ended, monkeypatch):
    monkeypatch.delattr(common.dist, "DistError")  # as in builds without torch.distributed

    def main():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        ended(main)


def test_a_net_that_the_memory_cannot_hold_is_one_line(ended):
    found, error = ended(lambda: torch.empty(10**15))
    assert found == 2 and "error: too little memory" in error and error.count("\n") == 1


def test_an_error_of_the_program_itself_keeps_its_traceback(ended):
    def main():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        ended(main)


def test_ctrl_c_while_the_data_are_loaded_writes_nothing(tmp_path, monkeypatch, ended):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_data", interrupted)
    argv = [*SMALL.split(), "--runs", str(tmp_path / "runs")]
    status, error = ended(lambda: robust_kd.main(argv))
    assert status == 130 and "the same command goes on" in error and list(tmp_path.iterdir()) == []


def test_a_full_disk_says_that_finished_epochs_are_kept(tmp_path, monkeypatch, ended):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common, "save_epoch", full)
    argv = [*SMALL.split(), "--loss", "st", "--runs", str(tmp_path)]
    status, error = ended(lambda: robust_kd.main(argv))
    assert status == 2 and "; finished epochs are kept; the same command goes on:" in error


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, ended):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "student.pt"
    status, error = ended(lambda: common.write_atomically(path, full))
    assert status == 2 and error.startswith(f"error: {path}: No space left on device;")
    assert list(tmp_path.iterdir()) == []
    write = os.write

    def write_no_pid(number, content):
        if content == str(os.getpid()).encode():
            full()
        return write(number, content)

    monkeypatch.setattr(os, "write", write_no_pid)
    argv = [*SMALL.split(), "--loss", "st", "--runs", str(tmp_path)]
    status, error = ended(lambda: robust_kd.main(argv))
    lock = tmp_path / "robust_kd" / "x-s0" / "lock"
    assert status == 2 and error.startswith(f"error: {lock}: No space left on device;")


def test_a_terminal_that_cannot_print_a_name_gets_it_escaped(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))

    def main():
        print("runs/\u30c6\u30b9\u30c8, \udcff")
        raise common.UserError("--name \u30c6: no")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        common.start(main)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    assert end.value.code == 2
    assert sys.stdout.buffer.getvalue() == b"runs/\\u30c6\\u30b9\\u30c8, \\udcff\n"
    assert sys.stderr.buffer.getvalue() == b"error: --name \\u30c6: no\n"


def test_a_program_without_a_reader_of_its_output_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)  # as after `| head`
    assert prints_into(write) == (141, "")
    os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as on Linux")
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        status, error = prints_into(full)
    assert status == 2 and error.startswith("error: standard output: No space left on device")
    assert error.count("\n") == 1


def test_bad_flags_write_nothing(tmp_path, ended):
    argv = [*SMALL.split(), "--eps", "8//255", "--runs", str(tmp_path / "runs")]
    status, error = ended(lambda: robust_kd.main(argv))
    assert (status, error.count("\n")) == (2, 1) and error.startswith("error: --eps: expected")
    assert list(tmp_path.iterdir()) == []


def test_a_live_line_fits_the_terminal_and_is_printed_over(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    common.print_line("student, epoch 1: 50% of them", live=True)
    common.print_line("student, epoch 1: all of it is done")
    lines = screen.getvalue().split("\r\x1b[2K")
    assert lines == ["", "student, epoch 1: 5", "student, epoch 1: all of it is done\n"]


# ------------------------------------------------------------------------------------------------
# Signals while torch is imported

PROGRAMS = (
    "fickle_teacher",
    "soft_randomization",
    "messy_collab",
    "robust_kd",
    "teacher_free_kd",
    "eval_robustness",
)
SLOW_TORCH = """
import time
print("importing torch", flush=True)
time.sleep({seconds})
print("imported", flush=True)
raise SystemExit(0)
"""


def importing(program, folder, seconds, **options):
    """The program while it imports torch, which takes so long."""
    (folder / "torch.py").write_text(SLOW_TORCH.format(seconds=seconds))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{program}.py")],
        env=os.environ | {"PYTHONPATH": str(folder)},
        **pipes,
        **options,
    )
    assert process.stdout.readline() == "importing torch\n"
    return process


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_terminated_while_it_imports_torch_ends_without_a_word(program, tmp_path):
    process = importing(program, tmp_path, 60)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == ("", "")
    assert process.returncode == -signal.SIGTERM  # a shell says 143


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_in_the_background_of_a_script_goes_on_ignoring_ctrl_c(program, tmp_path):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = importing(program, tmp_path, 0.2, preexec_fn=ignore)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) == ("imported\n", "") and process.returncode == 0


# ------------------------------------------------------------------------------------------------
# curves.png


@pytest.mark.curves
def test_a_finished_run_has_a_figure_of_its_learning_curves(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, save_figure = [], common.save_figure

    def save_and_keep(figure, path):
        figures.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr(common, "save_figure", save_and_keep)
    folder = run_in(tmp_path, f"{TINY} --teacher-es 2")
    assert (folder / "curves.png").stat().st_size > 10_000
    (figure,) = figures
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels) == [
        "training images",
        "clean, held-out images",
        "under PGD, held-out images",
    ]
    stars = [line for line in panels["clean, held-out images"].lines if line.get_marker() == "*"]
    names = [text.get_text() for text in panels["training images"].get_legend().get_texts()]
    assert names == ["teacher (at)", "student (rslad+)"]
    lines = [line for line in panels["clean, held-out images"].lines if len(line.get_xdata()) > 1]
    (teacher,) = (tmp_path / "teachers").iterdir()
    for line, log in zip(lines, (log_of(teacher), log_of(folder)), strict=True):
        assert line.get_ydata() == pytest.approx([100 * row["val_clean_acc"] for row in log])
    assert [star.get_xdata()[0] for star in stars] == [
        common.best_row(log_of(file.parent))["epoch"] for file in (teacher / "x", folder / "x")
    ]
    summary = json.loads((folder / "summary.json").read_text())
    crosses = [
        line for line in panels["under PGD, held-out images"].lines if line.get_marker() == "x"
    ]
    for cross, row in zip(crosses, summary[:2], strict=True):
        assert cross.get_ydata() == pytest.approx([100 * row["pgd20_acc"]])
        assert cross.get_xdata() == [row["epochs"]]


@pytest.mark.curves
def test_a_run_without_matplotlib_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_in(tmp_path)
    assert not list(tmp_path.rglob("*.png")) and list(tmp_path.rglob("summary.json"))


@pytest.mark.curves
def test_a_figure_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    with monkeypatch.context() as patch:
        patch.setenv("MPLBACKEND", "nonsense")  # as a notebook's, whose package is missing
        patch.delitem(sys.modules, "matplotlib")
        run_in(tmp_path, f"{SMALL} --loss st --seed 0 1")
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all("MPLBACKEND" in line for line in warnings)
    assert "mean +- std of seeds 0 1" in out and out.count("is finished") == 2
    run_in(tmp_path, f"{SMALL} --loss st")  # the same command draws what is missing
    assert (tmp_path / "robust_kd" / "x-s0" / "curves.png").exists()


@pytest.mark.curves
def test_a_full_disk_or_a_damaged_log_costs_a_run_its_figure_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    replace = os.replace

    def full(source, target):
        if target.name == "curves.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        folder = run_in(tmp_path, f"{SMALL} --loss st")
    out = capsys.readouterr().out
    assert f"warning: {folder / 'curves.png'} is not drawn: OSError" in out
    assert "is finished" in out and contents(folder).keys() == {
        folder / name
        for name in ("config.json", "lock", "log.jsonl", "student.pt", "student_best.pt")
    } | {folder / "summary.json"}
    (folder / "log.jsonl").write_text('{"stage": "student"')
    run_in(tmp_path, f"{SMALL} --loss st")
    out = capsys.readouterr().out
    assert "log.jsonl: damaged: line 1 is not the row of an epoch" in out and "is finished" in out


# ------------------------------------------------------------------------------------------------
# Batches of one image

NORM_NET = """
from torch.nn import BatchNorm1d, Flatten, Linear, Sequential

def net():
    return Sequential(Flatten(), Linear(3072, 8), BatchNorm1d(8), Linear(8, 10))
"""
SCRIPTS = {
    "robust_kd": "--loss akd --steps 1 --teacher-batch-size 16",
    "fickle_teacher": "--method hinton --eval-restarts 1",
    "soft_randomization": "--eval-restarts 1",
    "messy_collab": "--eval-restarts 1",
    "teacher_free_kd": "--method tf-kd-self --eval-attack clean",
}


@pytest.fixture
def norm_net(tmp_path, monkeypatch):
    """Flags with a net that cannot train on one image."""
    (tmp_path / "norm_net.py").write_text(NORM_NET)
    monkeypatch.syspath_prepend(tmp_path)
    return (
        "--data shapes --model norm_net:net --teacher-model norm_net:net --device cpu --val-size 0 "
        f"--test-subset 4 --epochs 2 --teacher-epochs 1 --name x --runs {tmp_path}/runs"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_last_batch_of_one_image_is_joined_to_the_one_before(script, norm_net, monkeypatch):
    sizes, step_sums = [], common.step_sums

    def counted(loss, logits, labels):
        sizes.append(len(labels))
        return step_sums(loss, logits, labels)

    monkeypatch.setattr(common, "step_sums", counted)
    flags = f"{norm_net} {SCRIPTS[script]} --batch-size 16 --train-subset 33"
    importlib.import_module(script).main(flags.split())
    assert sizes == [16, 17] * 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_of_a_single_image_are_refused(script, norm_net, tmp_path, refused):
    flags = ["--batch-size", "--train-subset"]
    if script in ("robust_kd", "teacher_free_kd"):
        flags.append("--teacher-batch-size")
    for flag in flags:
        argv = f"{norm_net} {SCRIPTS[script]} {flag} 1".split()
        message = refused(importlib.import_module(script).main, argv)
        assert message == f"{flag}: expected a whole number of at least 2, got '1'"
    argv = f"{norm_net} {SCRIPTS[script]} --val-size 3999".split()
    assert "--val-size 3999: too large" in refused(importlib.import_module(script).main, argv)
    assert not (tmp_path / "runs").exists()


def test_all_other_batches_are_cut_as_always():
    for n in range(1, 40):
        for size in range(1, 20):
            bounds = common.batch_bounds(n, size)
            usual = [(first, min(first + size, n)) for first in range(0, n, size)]
            if n % size == 1 and n > size > 1:
                usual[-2:] = [(usual[-2][0], n)]
            assert bounds == usual
