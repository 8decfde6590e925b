"""--graph: the same code as on CUDA, with a stand-in for the graph that computes when replayed."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import common
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd


class FakeCuda:
    """torch.cuda for common.Graphs: a `graph` keeps nothing but the call, and replays it.

    As in a real capture, what is captured changes no weight, buffer, gradient or generator.
    """

    def __init__(self):
        self.calls = []
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = contextlib.nullcontext
        self.get_rng_state, self.set_rng_state = torch.get_rng_state, torch.set_rng_state
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: None)
        self.graph = contextlib.nullcontext

    def capture(self, graphs, inputs):
        """Graphs.capture, whose graph then computes again into the tensors of the capture."""
        _, inputs, out, gradients = real_capture(graphs, inputs)

        def replay():
            for parameter in graphs.model.parameters():
                parameter.grad = None
            out.copy_(graphs.step(*inputs))
            for gradient, parameter in zip(gradients, graphs.model.parameters()):
                gradient.copy_(parameter.grad)

        self.calls.append([tuple(tensor.shape) for tensor in inputs])
        return SimpleNamespace(replay=replay), inputs, out, gradients


real_capture = common.Graphs.capture

SMALL = "--data shapes --model wrn-10-1 --teacher-model wrn-10-1 --train-subset 40 --test-subset 8"
SMALL += " --val-size 8 --batch-size 16 --epochs 2 --teacher-epochs 1 --name run"
ATTACK = "--teacher-batch-size 16 --steps 2 --eval-steps 1"
PLAIN = "--eval-steps 1 --restarts 1"


@pytest.mark.parametrize(
    "script, flags, nets",
    [
        (robust_kd, f"--loss at {ATTACK}", 1),
        (robust_kd, f"--loss akd+ {ATTACK}", 2),
        (robust_kd, f"--loss rslad+ {ATTACK}", 2),
        (fickle_teacher, f"--method fickle {PLAIN}", 2),
        (fickle_teacher, f"--method swap {PLAIN}", 2),
        (soft_randomization, f"--method soft-randomization {PLAIN}", 2),
        (messy_collab, f"--method mc-ts {PLAIN}", 2),
        (teacher_free_kd, "--method at-tf-kd-self --steps 2 --eval-attack clean", 2),
        (teacher_free_kd, "--method self-distillation", 1),
    ],
)
def test_replayed_steps_train_as_plain_ones_and_each_shape_has_its_graph(
    script, flags, nets, tmp_path, monkeypatch
):
    small = SMALL.replace("--teacher-model wrn-10-1", "") if nets == 1 else SMALL
    flags = f"{small} {flags} --runs {tmp_path}/"
    script.main(f"{flags}plain".split())
    fake = FakeCuda()
    monkeypatch.setattr(common.Graphs, "capture", lambda graphs, x: fake.capture(graphs, x))
    names = "Stream current_stream stream get_rng_state set_rng_state CUDAGraph graph".split()
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(common, "speed_up", lambda step, model, args: common.Graphs(step, model))
    script.main([*f"{flags}graph".split(), "--graph"])
    assert [call[:2] for call in fake.calls] == [[(n, 3, 32, 32), (n,)] for n in (16, 8)] * nets
    file = f"{script.__name__}/run-s0/student.pt"
    a, b = (common.load(tmp_path / kind / file)["weights"] for kind in ("plain", "graph"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_on_a_cpu_the_step_is_the_plain_call():
    args = SimpleNamespace(graph=True, compile=False)
    assert common.speed_up(len, torch.nn.Linear(1, 1), args) is len


def test_on_a_cpu_the_flag_says_that_it_has_no_effect(tmp_path, capsys):
    robust_kd.main(f"{SMALL} --model mlp-8 --loss st {ATTACK} --runs {tmp_path} --graph".split())
    assert capsys.readouterr().out.count("--graph has no effect here") == 1
