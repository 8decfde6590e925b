"""Every script end to end, as a user runs it: results, resuming, refusals. CPU, tiny nets."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval_robustness
import images
import robust_kd

# with convolutions, BatchNorm and two student passes: all that a resumed run must restore
TINY = "--data shapes --model wrn-10-1 --device cpu --train-subset 72 --test-subset 30"
TINY += " --val-size 30 --batch-size 16 --teacher-batch-size 16 --teacher-epochs 4 --epochs 4"
TINY += " --steps 2 --eval-steps 2 --loss rslad+"


def start(flags, runs, **options):
    command = [sys.executable, str(ROOT / "robust_kd.py"), *shlex.split(flags), "--runs", str(runs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **(pipes | options))


def rows(runs):
    """The rows of the one run's log that are whole."""
    found = []
    for log in runs.glob("*/*/log.jsonl"):
        for line in log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def stop_when(process, runs, stage, epoch, number):
    """Send the signal once the log has this epoch of the stage; -> (status, stdout, stderr)."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if any(r.get("stage") == stage and r["epoch"] >= epoch for r in rows(runs)):
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def final_weights(runs, name="student.pt"):
    (path,) = runs.glob(f"*/*/{name}")
    return common.load(path)["weights"]


def assert_same_run(a, b):
    for name in ("teacher.pt", "student.pt"):
        for key, value in final_weights(a, name).items():
            assert torch.equal(value, final_weights(b, name)[key]), (name, key)
    clean = [
        [
            {k: v for k, v in row.items() if "second" not in k}
            for row in rows(runs)
            if "stage" in row
        ]
        for runs in (a, b)
    ]
    assert clean[0] == clean[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs folder of a run that nothing interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    finish(start(TINY, runs))
    return runs


def test_a_run_killed_in_the_teacher_and_in_the_student_ends_with_the_same_bits(whole, tmp_path):
    flags = TINY
    for stage, epoch in (("teacher", 2), ("student", 1), ("student", 3)):
        status, _, _ = stop_when(start(flags, tmp_path), tmp_path, stage, epoch, signal.SIGKILL)
        assert status == -signal.SIGKILL  # it was killed, not finished
        assert not list(tmp_path.glob("*/*/*student.pt"))
    out = finish(start(flags, tmp_path))
    assert "student: goes on after epoch" in out and "teacher 1/4" not in out
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_print_the_command_that_resumes(whole, tmp_path, number, status):
    process = start(TINY, tmp_path)
    code, _, err = stop_when(process, tmp_path, "teacher", 1, number)
    assert code == status and "Traceback" not in err
    command = err.strip().splitlines()[-1]
    assert "--loss rslad+" in command
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
    out = subprocess.run(command, shell=True, check=True, **options)  # as it is printed
    assert "goes on after epoch" in out.stdout
    assert_same_run(whole, tmp_path)


def test_no_room_to_write_is_one_line_and_the_run_goes_on_later(whole, tmp_path):
    def limit():  # a full disk, as the process sees it: no file may pass 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(TINY, tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("*/*/.*tmp"))
    finish(start(TINY, tmp_path))
    assert_same_run(whole, tmp_path)


def test_the_run_folder_holds_what_the_design_says(whole):
    (folder,) = whole.glob("robust_kd/*")
    files = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "log.jsonl",
        "teacher.pt",
        "student.pt",
    } <= files and "last.pt" not in files
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["alpha"] == 0.8 and config["torch"] == torch.__version__
    epochs = [(r["stage"], r["epoch"]) for r in rows(whole) if "stage" in r]
    assert epochs == [(stage, n) for stage in ("teacher", "student") for n in (1, 2, 3, 4)]
    summary = rows(whole)[-1]["summary"]
    assert [row["model"] for row in summary[:2]] == ["teacher (at)", "student (rslad+)"]
    assert {"clean_acc", "pgd2_acc", "epochs", "seconds"} <= summary[0].keys()


def test_the_evaluation_of_a_file_gives_the_numbers_of_the_run(whole, tmp_path, capsys):
    (folder,) = whole.glob("robust_kd/*")
    files = [str(folder / name) for name in ("teacher.pt", "student.pt")]
    flags = "--data shapes --n 30 --attack clean pgd2 --device cpu --json"
    eval_robustness.main([*files, *flags.split(), str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    for row, of_run in zip(found, rows(whole)[-1]["summary"]):
        assert (row["clean_acc"], row["pgd2_acc"]) == (of_run["clean_acc"], of_run["pgd2_acc"])
    assert "pgd2_acc" in capsys.readouterr().out


SMALL = "--data shapes --model mlp-8 --device cpu --train-subset 32 --test-subset 20 --val-size 20"
SMALL += " --batch-size 16 --teacher-batch-size 16 --teacher-epochs 1 --epochs 1 --steps 1"
VARIANTS = [*(f"--loss {name}" for name in robust_kd.LOSSES)]
VARIANTS += [f"--teacher-training {name}" for name in robust_kd.TEACHERS]
VARIANTS += [
    "--loss rslad+ --attack-loss ce --kl-reduction mean",
    "--loss akd+ --attack-loss kl-teacher --temperature 2 --precision fp32",
    "--model wrn-10-1 --loss ard+ --attack-bn train --batch-size 32",
    "--teacher-eps 2/255 --teacher-model mlp-12 --restarts 2 --val-size 0 --eval-steps 1",
    "--loss at --teacher-training none --deterministic",
    "--loss rslad+ --teachers 2",
    "--teacher-training st at --beta 0.25 --teacher-save-every 1",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_ends_in_finite_numbers(variant, tmp_path):
    robust_kd.main([*SMALL.split(), *variant.split(), "--runs", str(tmp_path)])
    torch.use_deterministic_algorithms(False)
    last = rows(tmp_path)[-1]["summary"]
    for row in last:
        accuracies = [value for key, value in row.items() if key.endswith("_acc")]
        assert len(accuracies) == 2 and all(0 <= value <= 1 for value in accuracies)
    trained = [r for r in rows(tmp_path) if "stage" in r]
    assert trained and all(0 < row["loss"] < 1e4 for row in trained)


def test_a_short_standard_training_beats_chance_and_pgd_hurts_it(tmp_path):
    flags = "--data shapes --model wrn-10-1 --device cpu --loss st --train-subset 1000"
    flags += " --test-subset 200 --val-size 0 --epochs 4 --batch-size 32 --lr 0.1 --eval-steps 10"
    robust_kd.main([*flags.split(), "--runs", str(tmp_path)])
    (row,) = rows(tmp_path)[-1]["summary"]
    assert row["clean_acc"] > 0.5 and row["pgd10_acc"] < row["clean_acc"] - 0.25


def test_restarts_only_lower_the_accuracy_and_more_images_do_not_change_the_others(whole):
    (folder,) = whole.glob("robust_kd/*")
    data = common.load_data("shapes", test_subset=200)
    model, _ = common.load_model(folder / "student.pt")
    options = {"eps": 0.02, "seed": 3}
    one = eval_robustness.evaluate(model, data.x_test, data.y_test, ["clean", "pgd5"], **options)
    five = eval_robustness.evaluate(
        model, data.x_test, data.y_test, ["pgd5"], restarts=5, **options
    )
    assert five["pgd5_acc"] <= one["pgd5_acc"] <= one["clean_acc"]
    small = eval_robustness.evaluate(
        model, data.x_test, data.y_test, ["pgd5"], batch_size=7, **options
    )
    assert small["pgd5_acc"] == one["pgd5_acc"]


# Refusals ---------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--loss akd++": "--loss",
    "--model resnet19": "--model",
    "--teacher-model wrn-9-1": "--teacher-model",
    "--model wrn-16-2 --width 1/4": "width",
    "--data cifar11": "--data",
    "--eps 8//255": "--eps: expected a number or a fraction like 8/255",
    "--eps -1": "--eps",
    "--eps nan": "--eps",
    "--alpha 1.5": "--alpha",
    "--alpha x": "--alpha",
    "--teacher-es 0": "--teacher-es",
    "--teacher-es 101": "--teacher-es",
    "--epochs 1.5": "--epochs",
    "--lr 0": "--lr",
    "--seed -1": "--seed",
    "--name ../up": "--name",
    "--teacher-training none": "--teacher-training none",
    "--teacher-training at none": "--teacher-training none",
    "--teachers 2 --teacher-training st at ffgsm": "--teachers",
    "--teachers 2 --teacher-ckpt a.pt": "--teacher-ckpt",
    "--teachers 2 --beta 0.5 0.6": "--beta",
    "--teachers 2 --beta 0.5": "--beta",
    "--seeds 1 1": "--seeds",
    "--loss ckd --attack-loss ce": "--attack-loss",
    "--loss rslad --alpha 0.3": "--alpha: --loss rslad has none",
    "--extra-fraction 0.5": "--extra-fraction: goes with --extra-data",
    "--loss akd+ --kl-reduction=mean": "--kl-reduction",
    "--no-such-flag 1": "--no-such-flag",
    "--teacher 1": "--teacher",  # no abbreviations
    "--train-subset 4000": "--train-subset",
    "--teacher-ckpt none.pt": "none.pt",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = ["--data", "shapes", *flags.split(), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert BAD_FLAGS[flags] in refused(robust_kd.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_taken_over_after_the_end(tmp_path, refused):
    fcntl = pytest.importorskip("fcntl")
    argv = [*SMALL.split(), "--loss", "st", "--name", "x", "--runs", str(tmp_path)]
    folder = tmp_path / "robust_kd" / "x-s0"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use by process 4711" in refused(robust_kd.main, argv)
        assert not (folder / "log.jsonl").exists()
    robust_kd.main(argv)  # the other has ended
    assert "summary" in rows(tmp_path)[-1]


def test_no_cuda_device_is_one_line(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--data", "shapes", "--device", "cuda", "--runs", str(tmp_path / "runs")]
    assert "no CUDA device" in refused(robust_kd.main, argv)


def test_a_teacher_for_other_classes_or_images_is_refused(tmp_path, refused):
    for name, classes, size in (("a", 100, 32), ("b", 10, 28)):
        path = tmp_path / f"{name}.pt"
        common.save_model(path, common.build_model("mlp-4", classes, size=size), {})
        argv = [*SMALL.split(), "--teacher-ckpt", str(path), "--runs", str(tmp_path / "runs")]
        assert str(path) in refused(robust_kd.main, argv)
    path = tmp_path / "c.pt"
    common.save_model(path, common.build_model("mlp-4", 10), {"training": "at"})
    argv = [*SMALL.split(), "--teacher-ckpt", str(path), "--teacher-model", "wrn-10-1"]
    assert "expected a wrn-10-1" in refused(
        robust_kd.main, [*argv, "--runs", str(tmp_path / "runs")]
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_other_flags_is_refused_by_the_name_of_the_flag(tmp_path, refused):
    argv = [*SMALL.split(), "--loss", "at", "--name", "x", "--runs", str(tmp_path)]
    robust_kd.main(argv)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message = refused(robust_kd.main, [*argv, "--eps", "4/255"])
    assert "--eps" in message and "--name" in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_or_config_of_the_run_is_one_line(tmp_path, refused):
    argv = [*SMALL.split(), "--loss", "at", "--name", "x", "--runs", str(tmp_path)]
    robust_kd.main(argv)
    folder = tmp_path / "robust_kd" / "x-s0"
    (folder / "student.pt").write_bytes((folder / "student.pt").read_bytes()[:500])
    (folder / "log.jsonl").unlink()
    assert "student.pt" in refused(robust_kd.main, argv)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(robust_kd.main, argv)


@pytest.mark.skipif(
    not os.path.isdir("/proc/1"), reason="needs a folder that not even root can fill"
)
def test_a_folder_that_cannot_be_written_is_one_line(refused, tmp_path):
    for runs in ("/proc/runs", str(tmp_path / "file" / "runs")):
        (tmp_path / "file").write_text("")
        assert "error: /" in refused(
            robust_kd.main, [*SMALL.split(), "--loss", "at", "--runs", runs]
        )


def test_tensorboard_that_is_not_installed_is_asked_for_by_name(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = [*SMALL.split(), "--loss", "at", "--tensorboard", "--runs", str(tmp_path / "runs")]
    assert "pip install tensorboard" in refused(robust_kd.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_data_are_loaded_prints_the_command_too(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_data", interrupted)
    with pytest.raises(SystemExit) as end:
        robust_kd.main([*SMALL.split(), "--runs", str(tmp_path / "runs")])
    assert end.value.code == 130 and "robust_kd.py" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_summary_torn_by_a_kill_is_written_again(tmp_path, capsys):
    argv = [*SMALL.split(), "--loss", "at", "--name", "x", "--runs", str(tmp_path)]
    robust_kd.main(argv)
    log = tmp_path / "robust_kd" / "x-s0" / "log.jsonl"
    whole_log = log.read_text()
    for cut in (3, 40):  # before and inside the key
        start = whole_log.rindex('{"summary"') + cut
        log.write_text(whole_log[:start])
        robust_kd.main(argv)
        assert log.read_text() == whole_log


def test_other_images_under_the_same_name_are_refused(tmp_path, refused):
    arrays = images.make_shapes(100, 40)
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    argv = [*SMALL.split(), "--data", str(path), "--loss", "at", "--runs", str(tmp_path / "runs")]
    robust_kd.main(argv)
    np.savez(path, **(arrays | {"x_train": arrays["x_train"][::-1]}))
    assert "other images" in refused(robust_kd.main, argv)


def test_tensorboard_gets_every_number_of_an_epoch(tmp_path, monkeypatch):
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            self.close = lambda: scalars.append("closed")
            self.add_scalar = lambda name, value, epoch: scalars.append((name, epoch))

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    flags = [*SMALL.split(), "--loss", "at", "--tensorboard", "--runs", str(tmp_path)]
    robust_kd.main(flags)
    names = {name.removeprefix("student/") for name, epoch in scalars[:-1] if epoch == 1}
    assert {"loss", "train_acc", "val_clean_acc", "val_pgd1_acc", "images_per_second"} <= names
    assert scalars[-1] == "closed"


def test_demo_says_what_it_sets_and_flags_win(capsys):
    args = robust_kd.parse_args(["--demo", "--epochs", "1"])
    assert "--demo sets" in capsys.readouterr().out
    assert (
        args.data == "shapes"
        and args.epochs == 1
        and args.batch_size == robust_kd.DEMO["batch-size"]
    )
    assert args.step_size == pytest.approx(4 / 255) and args.name.startswith("demo-shapes")
