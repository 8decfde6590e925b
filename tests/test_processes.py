"""Several processes under torchrun (gloo): the losses of one, going on with others, a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import messy_collab
import robust_kd

SMALL = "--data shapes --model mlp-16 --train-subset 150 --val-size 20 --test-subset 20 --steps 1"
SMALL += " --batch-size 64 --teacher-batch-size 32 --teacher-epochs 2 --eval-steps 2"
# no BatchNorm and no random start of an attack: the trace may not depend on the processes
SMALL += " --loss ckd --teacher-training st --name run"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes, flags, **options):
    """Start robust_kd.py with the flags in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_port", str(20000 + os.getpid() % 20000), str(ROOT / "robust_kd.py")]
    return subprocess.Popen([*launcher, *flags.split()], env=ENVIRONMENT, text=True, **options)


def weights(runs):
    return common.load(runs / "robust_kd" / "run-s0" / "student.pt")["weights"]


def losses(runs):
    lines = (runs / "robust_kd" / "run-s0" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_go_on_where_one_stopped_with_the_same_losses(tmp_path, stop_at):
    flags = f"{SMALL} --epochs 3 --runs"
    robust_kd.main(f"{flags} {tmp_path}/one".split())
    stop_at(robust_kd, f"{flags} {tmp_path}/two", "student", 1)
    run = torchrun(2, f"{flags} {tmp_path}/two", stdout=subprocess.PIPE)
    text = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and text.count("goes on after epoch 1 of 3") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    for name, value in weights(tmp_path / "two").items():
        assert torch.allclose(value, weights(tmp_path / "one")[name], atol=1e-4), name


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc, as on Linux")
def test_when_one_process_is_killed_the_others_end_and_the_command_goes_on(tmp_path):
    flags = f"{SMALL} --epochs 100000 --runs {tmp_path}"
    run = torchrun(4, flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("student") and " 3/" in line:
            break
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    second = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    start = time.monotonic()
    os.kill(int(second[0]), signal.SIGKILL)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode != 0 and time.monotonic() - start < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    said = re.findall(
        r"^(?:error: process 0: another process has ended|stopped; finished)", errors, re.M
    )
    assert said, errors
    again = torchrun(4, flags, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in again.stdout:
        if "goes on" in line:
            break
    else:
        raise AssertionError("it did not go on")
    again.terminate()
    again.communicate(timeout=60)


@pytest.mark.parametrize("rank, order", [(0, ["data", "sync"]), (1, ["sync", "data"])])
def test_the_first_process_downloads_and_unpacks_for_the_others(monkeypatch, rank, order):
    seen = []
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "sync", lambda: seen.append("sync"))
    with common.first_process_first():
        seen.append("data")
    assert seen == order


@pytest.mark.parametrize("batch_size", [16, 32])
def test_any_split_of_a_batch_has_the_gradient_of_the_whole(batch_size, monkeypatch):
    data = common.load_data("shapes", train_subset=33)
    net = common.build_model("mlp-8")

    def gradient(x, labels):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    whole = [gradient(x, y) for x, y in common.batches(data, batch_size, 0, "student", 0)]
    monkeypatch.setattr(common, "world", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        batches = common.batches(data, batch_size, 0, "student", 0)
        shares.append([(gradient(x, y), len(y)) for x, y in batches])
    for step, expected in enumerate(whole):  # what average_gradients adds up over the processes
        images = sum(process[step][1] for process in shares)
        average = sum(process[step][0] * process[step][1] for process in shares) / images
        torch.testing.assert_close(average, expected)
    assert [process[-1][1] for process in shares] == [1, 1, 1, 1]  # one image is left: all have it


def test_processes_average_their_gradients_by_their_images(tmp_path):
    code = """
import torch, torch.distributed as dist, common
dist.init_process_group("gloo")
net = torch.nn.Linear(1, 1, bias=False)
net.weight.grad = torch.tensor([[float(common.rank() + 1)]])
common.average_gradients(net, images=[1, 3][common.rank()])
assert net.weight.grad.item() == (1 * 1 + 2 * 3) / 4, net.weight.grad
dist.destroy_process_group()
"""
    (tmp_path / "average.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(20000 + (os.getpid() + 7) % 20000)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "average.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_noise_differs_by_process_and_what_must_be_equal_does_not(monkeypatch):
    data = common.load_data("shapes", train_subset=8)
    noise, same = [], []
    for rank in range(2):
        monkeypatch.setattr(common, "world", lambda: 2)
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        common.seed_epoch(0, "student", 3)
        noise.append(messy_collab.vary_labels(torch.zeros(100, dtype=torch.int64), 0.5, 10))
        weights = common.new_model(data, "mlp-4", 0, "student").state_dict()
        corrupted = messy_collab.corrupt_labels(data.y_train, 0.5, 10, seed=0)
        same.append([*weights.values(), corrupted])
    assert not torch.equal(*noise)
    assert all(torch.equal(a, b) for a, b in zip(*same))
