"""--graph: the same code as on CUDA, with a stand-in for the graph that computes when replayed."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import common
import plumbing
import robust_kd as rk


class FakeCuda:
    """torch.cuda for plumbing._capture: a `graph` keeps nothing but the call, and replays it.

    As in a real capture, what is captured changes no weight, buffer, gradient or generator.
    """

    def __init__(self):
        self.calls = []
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = contextlib.nullcontext
        self.get_rng_state, self.set_rng_state = torch.get_rng_state, torch.set_rng_state
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: None)
        self.graph = contextlib.nullcontext

    def capture(self, compute, model, inputs):
        """plumbing._capture, whose graph then computes again into the tensors of the capture."""
        _, inputs, out, gradients = real_capture(compute, model, inputs)

        def replay():
            for parameter in model.parameters():
                parameter.grad = None
            out.copy_(compute(*inputs))
            for gradient, parameter in zip(gradients, model.parameters()):
                gradient.copy_(parameter.grad)

        self.calls.append([tuple(tensor.shape) for tensor in inputs])
        return replay, inputs, out, gradients


real_capture = plumbing._capture


@pytest.mark.parametrize("loss", ["at", "akd+", "rslad+"])
def test_replayed_steps_train_as_plain_ones_and_each_shape_has_its_graph(
    loss, tmp_path, monkeypatch
):
    flags = f"--loss {loss} --data shapes --model wrn-10-1 --train-subset 40 --test-subset 8 --name"
    flags += " run --val-size 8 --batch-size 16 --teacher-batch-size 16 --epochs 2"
    flags += " --teacher-epochs 1 --steps 2 --eval-steps 1 --runs"
    rk.main(f"{flags} {tmp_path}/plain".split())
    fake = FakeCuda()
    monkeypatch.setattr(plumbing, "_capture", fake.capture)
    names = "Stream current_stream stream get_rng_state set_rng_state CUDAGraph graph".split()
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    plain = plumbing.captured

    def as_on_cuda(run, compute, model):
        cuda = SimpleNamespace(device=torch.device("cuda"), args=run.args)
        return plain(cuda, compute, model)

    monkeypatch.setattr(plumbing, "captured", as_on_cuda)
    rk.main([*f"{flags} {tmp_path}/graph".split(), "--graph"])
    shapes = [[(n, 3, 32, 32), (n,)] for n in (16, 8)]
    assert fake.calls == shapes * (1 if loss == "at" else 2)
    a, b = (common.load(tmp_path / k / "robust_kd/run-s0/student.pt") for k in ("plain", "graph"))
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])


def test_on_a_cpu_the_step_is_the_plain_call():
    run = SimpleNamespace(device=torch.device("cpu"), args=SimpleNamespace(graph=True))
    assert plumbing.captured(run, len, torch.nn.Linear(1, 1)) is len
