"""Whatever stops a run, the same command goes on and ends with the same bits (short form)."""

import shutil
import subprocess
from types import SimpleNamespace

import faults
import pytest
import torch

import common

JOBS, FAULTS = list(faults.JOBS), list(faults.FAULTS)
STOPPED = ("teacher_free_kd", "student", 2)  # a stage of four epochs


def stopped(job, stage, epoch, folder):
    """Start the job, which is killed as soon as it has saved this epoch of the stage."""

    def prepare():
        save_epoch = common.save_epoch

        def save_and_die(run, of_stage, model, state, rows, *args):
            save_epoch(run, of_stage, model, state, rows, *args)
            if (of_stage, len(rows)) == (stage, epoch):
                faults.die()

        common.save_epoch = save_and_die  # in the process of the job alone

    status, *_ = faults.wait(faults.start(job, folder, prepare), folder)
    assert status == -faults.KILL and faults.finished_epochs(folder) == (stage, epoch)


def goes_on(job, folder, copy, change, reference):
    """Change a copy of a stopped job -> (status, output, errors, whether it ended as it should)."""
    shutil.copytree(folder, copy)
    change(copy / job / "x-s0")
    status, out, err = faults.wait(faults.start(job, copy), copy)
    equal = status == 0 and faults.result(job, copy) == faults.undisturbed(job, reference)[0]
    return status, out, err, equal


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def half_done(reference):
    """The folder of a run that was killed in its student's training, with both checkpoints."""
    folder = reference / "half done"
    faults.undisturbed(STOPPED[0], reference / STOPPED[0])
    stopped(*STOPPED, folder)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_a_disturbed_job_goes_on_and_ends_with_the_same_bits(job, reference, tmp_path):
    mine = FAULTS[JOBS.index(job) :: len(JOBS)][::-1]  # each fault once; `make soak` crosses them
    for seed in range(5):  # a signal may come after the end
        counts = faults.trial(job, mine, seed, tmp_path / str(seed), reference / job)
        assert counts["equal"] == 1 and counts["lost"] == 0, mine
        if counts["faults"]:
            return
    pytest.fail(f"no fault struck: {mine}")


def test_the_harness_sees_other_bits_and_lost_epochs(reference, tmp_path, monkeypatch):
    """A comparison that cannot fail would be none: with no checkpoints kept, epochs are lost."""
    job = "teacher_free_kd"
    expected, _ = faults.undisturbed(job, reference / job)
    stopped(*STOPPED, tmp_path)
    monkeypatch.setattr(faults.common, "resume", lambda *given: [])
    stage, epoch = faults.finished_epochs(tmp_path)
    status, out, _ = faults.wait(faults.start(job, tmp_path), tmp_path)
    assert status == 0 and f"{stage}: goes on" not in out and f"{stage} {epoch}/" in out
    assert faults.result(job, tmp_path) == expected  # later, but the same
    log = tmp_path / job / "x-s0" / "log.jsonl"
    log.write_text(log.read_text().replace('"epoch": 2', '"epoch": 3'))
    assert faults.result(job, tmp_path) != expected


def ending(half_done, tmp_path, change, reference):
    return goes_on(STOPPED[0], half_done, tmp_path / "x", change, reference / STOPPED[0])


@pytest.mark.parametrize("tenth", range(10))
def test_a_checkpoint_cut_anywhere_is_found_and_the_one_before_is_taken(
    tenth, half_done, reference, tmp_path
):
    def cut(run):
        path = faults.last_file(run)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * tenth // 10])

    status, out, err, equal = ending(half_done, tmp_path, cut, reference)
    assert status == 0 and equal, err
    assert "damaged" in out and "the checkpoint before it is taken" in out
    assert "student: goes on after epoch" in out


def test_a_damaged_checkpoint_is_never_kept_for_the_good_one(tmp_path):
    net, args = torch.nn.Linear(1, 1), SimpleNamespace(epochs=9, tensorboard=False)
    row = {"stage": "student", "loss": 0.0, "images_per_second": 1.0, "seconds": 1.0}

    def save(epochs):
        rows = [row | {"epoch": epoch} for epoch in range(1, epochs + 1)]
        common.save_epoch(tmp_path, "student", net, {"model": net}, rows, args)
        return common.checkpoint_file(tmp_path, "student", epochs)

    def finished():
        return len(common.resume(tmp_path, "student", {"model": net}))

    first = save(1)
    first.write_bytes(b"damaged")  # with none before it
    assert finished() == 0 and save(1) == first and finished() == 1
    good, second = first.read_bytes(), save(2)
    second.write_bytes(b"damaged")
    assert finished() == 1 and save(2) == second
    assert finished() == 2 and first.read_bytes() == good


def test_a_disk_that_is_really_full_is_one_line_and_the_run_goes_on_when_there_is_room(
    reference, tmp_path
):
    job, disk = STOPPED[0], tmp_path / STOPPED[0]
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        status, _, err = faults.wait(faults.start(job, tmp_path), tmp_path)
        assert status == 2 and "No space left" in err and err.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,size=20M", str(disk)], check=True)
        status, out, err = faults.wait(faults.start(job, tmp_path), tmp_path)
        assert status == 0 and "goes on after epoch" in out, err
        assert faults.result(job, tmp_path) == faults.undisturbed(job, reference / job)[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("job", ["teacher_free_kd", "eval_robustness"])
def test_a_first_process_that_has_just_ended_is_not_taken_for_a_living_one(
    job, tmp_path, monkeypatch
):
    """Its lock has its number until the next one takes it."""
    start = faults.start

    def start_and_wait(*given):
        pid = start(*given)
        faults.os.waitid(faults.os.P_PID, pid, faults.os.WEXITED | faults.os.WNOWAIT)
        return pid

    monkeypatch.setattr(faults, "start", start_and_wait)
    assert faults.twice(job, tmp_path, None, 0)[0] == 0


def test_a_finished_evaluation_drops_what_a_kill_left(reference, tmp_path):
    job = "eval_robustness"
    at = faults.functools.partial(faults.at_call, "unlink", 2, faults.die)
    status, _, _ = faults.wait(faults.start(job, tmp_path, at), tmp_path)
    assert status == -faults.KILL and len(faults.leftovers(tmp_path)) > 0
    (tmp_path / ".out.json.1.tmp").write_text("torn")
    assert faults.wait(faults.start(job, tmp_path), tmp_path)[0] == 0
    assert faults.leftovers(tmp_path) == []
    assert faults.result(job, tmp_path) == faults.undisturbed(job, reference / job)[0]
