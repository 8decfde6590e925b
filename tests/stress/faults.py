"""Faults for runs: signals, disks that fail, damaged files; a run must end with the same bits.

A job is a command of a script, run in a forked process (torch is imported once). `trial` disturbs
a job some times, then repeats its command until it ends and compares with the undisturbed job.
"""

import builtins
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import eval_robustness
from benchmark import corruptions

common.new_figure(1, 1)  # imports matplotlib, if it is there, once for all processes that fork

TINY = (
    "--data shapes --model mlp-4 --teacher-model mlp-4 --device cpu --train-subset 48 "
    "--test-subset 10 --val-size 10 --batch-size 16 --teacher-epochs 3 --epochs 4 "
)
JOBS = {  # script: its flags
    "robust_kd": TINY + "--teacher-batch-size 16 --loss rslad+ --steps 1 --save-every 1",
    "fickle_teacher": TINY + "--eval-restarts 1 --method fickle --dropout 0.2",
    "soft_randomization": TINY + "--eval-restarts 1 --method soft-randomization",
    "messy_collab": TINY + "--eval-restarts 1 --method flc-ts",
    "teacher_free_kd": TINY + "--method at-tf-kd-self --steps 1 --eval-attack clean",
    "eval_robustness": (
        "--data shapes --device cpu --n 6 --batch-size 3 --attack clean pgd2 aa corruptions "
        "--eps 1/5"
    ),
}
LIMIT = 120  # seconds for a command; one that hangs is a failure


@functools.cache
def prepared():
    """-> (the data of all jobs, a net that is right on some): what takes longer than a job."""
    arrays, model = common.make_shapes(80, 20), common.build_model("mlp-4")
    x, labels = (torch.from_numpy(arrays[k]) for k in ("x_train", "y_train"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)  # its first step imports for a second
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(common.to_float(x)), labels).backward()
        optimizer.step()
    return arrays, model


@functools.cache
def corrupted():
    """A temporary folder of the corrupted test images, which goes when this process ends."""
    folder = tempfile.TemporaryDirectory()
    x, labels = (torch.from_numpy(prepared()[0][k]) for k in ("x_test", "y_test"))
    corruptions.write_folder(Path(folder.name), x, labels)
    return folder


def start(job, folder, prepare=lambda: None):
    """Fork a process that runs the job's command after prepare(); its output is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    module, argv, (drawn, model) = importlib.import_module(job), JOBS[job].split(), prepared()
    if job == "eval_robustness":
        if not (folder / "net.pt").exists():
            common.save_model(folder / "net.pt", model)
        argv = [str(folder / "net.pt"), *argv, "--json", str(folder / "out.json")]
        argv += ["--corruptions", corrupted().name]
        few = {"steps": 3, "queries": 8, "targets": 2}  # AutoAttack's own would take minutes
        settings = functools.partial(eval_robustness.Settings, **few)
    else:
        argv += ["--runs", str(folder), "--name", "x"]
    for name in ("stdout", "stderr"):
        (folder / name).unlink(missing_ok=True)
    # held back until the job has its handlers: Python drops a signal that comes in its own work
    # after a fork
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return pid
    status = 1
    common.make_shapes = lambda: drawn
    if job == "eval_robustness":
        module.Settings = settings
    gc.callbacks.clear()  # of hypothesis: Python drops a signal that comes in one
    try:
        sys.stdout, sys.stderr = open(folder / "stdout", "w"), open(folder / "stderr", "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        sys.argv = [f"{job}.py", *argv]
        prepare()
        common.start(lambda: module.main(argv))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:  # before the script's own handling, or after it
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):  # on a full disk one may fail
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(status)


def wait(pid, folder):
    """-> (exit status, minus the signal that killed it; stdout, stderr)."""
    deadline = time.monotonic() + LIMIT
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"a command ran for {LIMIT} s: {folder}")
        time.sleep(0.002)
    texts = []
    for path in (folder / "stdout", folder / "stderr"):  # a kill may come before they are there
        texts.append(path.read_text() if path.exists() else "")
    return os.waitstatus_to_exitcode(ended[1]), *texts


# ------------------------------------------------------------------------------------------------
# What a job leaves


def without_times(value):
    """A JSON value without what depends on the speed of the machine or on where the folder is."""
    if isinstance(value, dict):
        wanted = {k: v for k, v in value.items() if "second" not in k and k != "model"}
        return {k: without_times(v) for k, v in wanted.items()}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def result(job, folder):
    """All that must be equal: bytes of every weight of every model, rows of the logs, numbers."""
    if job == "eval_robustness":
        return without_times(json.loads((folder / "out.json").read_text())["rows"])
    assert (folder / job / "x-s0" / "summary.json").exists()
    return contents(folder)


def contents(runs):
    """{file below a --runs folder: its weights as bytes, or its rows}, of runs and of teachers."""
    found = {}
    for path in runs.rglob("*.pt"):
        record = common.load(path)
        tensors = record["weights"] if "weights" in record else {"": record["labels"]}
        found[path] = {key: value.numpy().tobytes() for key, value in tensors.items()}
    for path in runs.rglob("log.jsonl"):
        found[path] = without_times([json.loads(row) for row in path.open()])
    for path in runs.rglob("summary.json"):
        found[path] = without_times(json.loads(path.read_text()))
    return {str(path.relative_to(runs)): value for path, value in found.items()}


def leftovers(folder):
    """Temporary files and states that a finished job should have removed."""
    kinds = (".*.tmp", "*.checkpoint*", "*.state")
    return [path for kind in kinds for path in folder.rglob(kind)]


def last_file(folder):
    """The newest file from which the job can go on; None if there is none yet."""
    files = [*folder.rglob("*.checkpoint?.pt"), *folder.glob("out.json.state/state.pt")]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def open_log(folder):
    """-> (the log of the stage that is not over yet, its last row); None if there is no such."""
    for log in folder.rglob("log.jsonl"):
        rows = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # it was torn
                rows.append(json.loads(line))
        if rows and not (log.parent / f"{rows[-1]['stage']}.pt").exists():
            return log, rows[-1]
    return None


def finished_epochs(folder):
    """The (stage, epoch) that the log names last, if that stage is not over yet; else None."""
    found = open_log(folder)
    return found and (found[1]["stage"], found[1]["epoch"])


# ------------------------------------------------------------------------------------------------
# Faults inside the process: what happens at the call number `at` of a function of the system


def at_call(name, at, action):
    """Let os.<name> do action(*arguments) before (or raise instead of) its call number `at`."""
    real, calls = getattr(os, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == at:
            action(*args)
        return real(*args, **kwargs)

    setattr(os, name, call)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(file, *_):
    if os.readlink(f"/proc/self/fd/{file}").endswith(".tmp"):  # folders, the log are synced too
        os.ftruncate(file, os.fstat(file).st_size // 2)
    die()


def refuse(number):
    def action(*_):
        raise OSError(number, os.strerror(number), "a file")

    return action


def slow(ready):
    """Tell the parent, then take longer than it waits."""

    def action(*_):
        os.write(ready, b".")
        for _ in range(10 * LIMIT):  # a signal just before a sleep does not end that sleep
            time.sleep(0.1)

    return action


def read_only(at):
    """From the opening number `at` for writing on, nothing can be opened for writing."""
    real, calls = builtins.open, itertools.count(1)

    def call(file, mode="r", *args, **kwargs):
        if set(mode) & set("wa+") and next(calls) >= at:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return real(file, mode, *args, **kwargs)

    builtins.open = call


def clock_set_back():
    real = time.time
    time.time = lambda: real() - 1e8


# ------------------------------------------------------------------------------------------------
# The faults. Each takes (job, folder, rng, seconds of an undisturbed job), -> (status, out, err)


def signalled(number, job, folder, rng, seconds):
    pid = start(job, folder)
    time.sleep(rng.uniform(0, 0.6 * seconds))
    os.kill(pid, number)
    return wait(pid, folder)


def inside(make, job, folder, rng, seconds):
    """make(at) -> what to prepare; at: the number of a call, of which a job has a few dozen."""
    at = rng.randint(1, rng.choice((4, 8, 40)))  # early ones more often: it may have gone on
    return wait(start(job, folder, make(at)), folder)


def slowed(number, job, folder, rng, seconds):
    ready, tell = os.pipe()
    at = rng.randint(1, 16)
    pid = start(job, folder, lambda: at_call("fsync", at, slow(tell)))
    os.close(tell)
    if os.read(ready, 1):  # or it has ended
        os.kill(pid, number)
    os.close(ready)
    return wait(pid, folder)


def full(job, folder, rng, seconds):
    """No file may pass a random size: a write stops in the middle, with an error."""
    limit = rng.randint(500, 150_000)
    return wait(
        start(job, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        folder,
    )


def damaged(damage, job, folder, rng, seconds):
    """Kill it when it has probably written several checkpoints, and damage the newest one."""
    at = rng.randint(6, 30)
    done = wait(start(job, folder, lambda: at_call("replace", at, die)), folder)
    path = last_file(folder)
    if path is not None:
        damage(path, rng)
    return done


def cut(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * rng.randint(0, 9) // 10])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def torn_log(job, folder, rng, seconds):
    """Killed, and the last row of the log is torn, as by a disk that lost the end of the file."""
    done = signalled(signal.SIGKILL, job, folder, rng, seconds)
    found = open_log(folder)
    if found is not None:
        content = found[0].read_bytes()
        found[0].write_bytes(content[: -rng.randint(1, len(content.splitlines()[-1]))])
    return done


def moved_clock(job, folder, rng, seconds):
    """Killed; its files are of the far future, and then the clock is years behind."""
    signalled(signal.SIGKILL, job, folder, rng, seconds)
    for path in folder.rglob("*"):
        seconds_then = path.stat().st_mtime + 2e9
        os.utime(path, (seconds_then, seconds_then))
    at = rng.randint(1, 8)

    def prepare():
        clock_set_back()
        at_call("replace", at, die)

    return wait(start(job, folder, prepare), folder)


def is_free(lock):
    """Whether no process holds the lock; its file may be gone."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def twice(job, folder, rng, seconds):
    """A second process on the same files is refused while the first one lives."""
    pid = start(job, folder)
    lock, refusal = folder / job / "x-s0" / "lock", f"in use by process {pid};"
    if job == "eval_robustness":
        lock = folder / "out.json.state" / "lock"
    while not (lock.exists() and lock.read_text() == str(pid)):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # was finished before
            return wait(pid, folder)
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if is_free(lock):  # it was finished just before it was stopped
        os.kill(pid, signal.SIGCONT)
        status, out, err = wait(pid, folder)
        assert status == 0 and result(job, folder), (status, err)
        return status, out, err
    status, _, err = wait(start(job, folder), folder)
    assert status == 2 and refusal in err, (status, err)
    os.kill(pid, signal.SIGKILL)  # the next takes over
    return wait(pid, folder)


def calls(name, action):
    """A fault at a random call of os.<name>."""
    return functools.partial(inside, lambda at: functools.partial(at_call, name, at, action))


@dataclasses.dataclass
class Fault:
    """What happens, the exit statuses that are right, and how many epochs may be done again."""

    run: object
    statuses: tuple
    again: int = 0


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS = {
    "SIGKILL": Fault(functools.partial(signalled, KILL), (-KILL,)),
    "SIGTERM": Fault(functools.partial(signalled, TERM), (143, -TERM)),
    "Ctrl-C": Fault(functools.partial(signalled, INT), (130, -INT)),
    "SIGKILL in a write": Fault(calls("fsync", die_half_written), (-KILL,)),
    "SIGKILL before the move": Fault(calls("replace", die), (-KILL,)),
    "SIGKILL after a write": Fault(calls("fsync", die), (-KILL,)),
    "SIGKILL in a slow write": Fault(functools.partial(slowed, KILL), (-KILL,)),
    "SIGTERM in a slow write": Fault(functools.partial(slowed, TERM), (143,)),
    "full disk": Fault(full, (2,)),
    "full disk at the end of a write": Fault(calls("fsync", refuse(errno.ENOSPC)), (2,)),
    "broken disk": Fault(calls("replace", refuse(errno.EIO)), (2,)),
    "read-only disk": Fault(
        functools.partial(inside, lambda at: functools.partial(read_only, at)), (2,)
    ),
    "checkpoint cut at a tenth": Fault(functools.partial(damaged, cut), (-KILL,), 1),
    "a flipped bit in the checkpoint": Fault(functools.partial(damaged, flip), (-KILL,), 1),
    "torn log": Fault(torn_log, (-KILL,)),
    "clock set back": Fault(moved_clock, (-KILL,)),
    "started twice": Fault(twice, (-KILL,)),
}


# ------------------------------------------------------------------------------------------------
# Trials


@functools.cache
def undisturbed(job, folder):
    """-> (the result of the job, its seconds)."""
    prepared()
    begin = time.monotonic()
    status, _, err = wait(start(job, folder), folder)
    assert status == 0, err
    return result(job, folder), time.monotonic() - begin


def trial(job, names, seed, folder, reference):
    """Disturb the job by the faults, then repeat its command to the end -> counts, for a sum."""
    expected, seconds = undisturbed(job, reference)
    rng = random.Random(f"{seed} {job} {names}")
    counts = {"faults": 0, "runs": 1, "equal": 0, "lost": 0, "fallbacks": 0}
    before, again = None, 0
    for name in [*names, None]:
        if name is None:
            status, out, err = wait(start(job, folder), folder)
        else:
            status, out, err = FAULTS[name].run(job, folder, rng, seconds)
        what = f"{job}, {name}, seed {seed}: status {status}\n{out}\n{err}"
        assert "Traceback" not in err, what
        assert status in (0, *(FAULTS[name].statuses if name else ())), what
        if status == 2:
            assert err.startswith("error: ") and err.count("\n") == 1, what
        if status in (130, 143) and err:
            assert "goes on:" in err and job in err.splitlines()[-1], what
        went_on = "goes on after" in out or "goes on from" in out  # a training, an evaluation
        counts["fallbacks"] += "the checkpoint before it is taken" in out and went_on
        # a stage that had epochs when the command was repeated must go on after them
        if before and f"{before[0]}: goes on after epoch" in out:
            went_on = int(out.split(f"{before[0]}: goes on after epoch ")[1].split()[0])
            counts["lost"] += max(before[1] - again - went_on, 0)
        elif before and f"{before[0]} {before[1]}/" in out:
            counts["lost"] += max(before[1] - again, 0)
        if name is not None:
            counts["faults"] += status != 0
            now = finished_epochs(folder)  # the same: damage of before may not be met yet
            again, before = max(again * (now == before), FAULTS[name].again), now
    assert leftovers(folder) == [], what
    counts["equal"] += result(job, folder) == expected
    return counts
