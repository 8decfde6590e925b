"""--compile, with a backend that runs what it is given: no compiler is needed."""

import pytest
import torch
import torch.nn as nn
from torch._dynamo.backends.common import aot_autograd

import common
import fickle_teacher
import robust_kd
import teacher_free_kd

SMALL = "--data shapes --model wrn-10-1 --train-subset 20 --test-subset 5 --val-size 6"
SMALL += " --batch-size 16 --epochs 2 --teacher-epochs 1 --name run"


@pytest.fixture
def compiled(monkeypatch):
    """Batch sizes of the graphs that were made, and the output masks of convolution_backward."""
    sizes, masks = [], []

    def keep(graph, inputs):
        sizes.append({v.shape[0] for v in inputs if torch.is_tensor(v) and v.shape[1:] == IMAGE})
        nodes = graph.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        masks.extend(node.args[-1] for node in nodes)
        return graph

    backend, real = aot_autograd(fw_compiler=keep, bw_compiler=keep), nn.Module.compile
    given = lambda net, **options: real(net, backend=backend, **options)  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", given)
    torch._dynamo.reset()
    yield sizes, masks
    torch._dynamo.reset()


IMAGE = (3, 32, 32)
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


@pytest.mark.parametrize(
    "script, flags",
    [
        (robust_kd, "--loss akd+ --teacher-batch-size 16 --steps 2 --eval-steps 1"),
        (fickle_teacher, "--method hinton --teacher-model wrn-10-1 --eval-steps 1 --restarts 1"),
        (teacher_free_kd, "--method self-distillation"),
    ],
)
def test_compiled_nets_train_alike_and_evaluations_run_as_they_are(
    script, flags, tmp_path, compiled, monkeypatch
):
    # folded, the attack takes another sign where a gradient is nearly 0
    as_it_is = lambda model, norms: model.train(norms == "train")  # noqa: E731
    monkeypatch.setattr(common, "attacked", as_it_is)
    flags = f"{SMALL} {flags} --runs {tmp_path}/"
    script.main(f"{flags}plain".split())
    script.main([*f"{flags}compiled".split(), "--compile"])
    sizes, _ = compiled
    assert set().union(*sizes) == {16, 4}  # the sizes of the batches: not 5 or 6
    file = f"{script.__name__}/run-s0/student.pt"
    a, b = (common.load(tmp_path / kind / file)["weights"] for kind in ("plain", "compiled"))
    gaps = {k: (a[k] - b[k]).abs().max().item() for k in a}
    assert max(gaps.values()) < 1e-4, gaps


def test_a_compiled_attack_makes_no_gradient_of_weights(compiled):
    net = common.build_model("wrn-10-1")
    net.eval().compile()
    x, labels = torch.rand(4, *IMAGE), torch.arange(4)
    common.pgd(net, x, labels, 8 / 255, 2 / 255, 2)
    _, masks = compiled
    assert masks and all(mask == [True, False, False] for mask in masks)
    net(x).sum().backward()  # and they have them again
    assert [True, True, False] in masks and net.fc.weight.grad is not None


def test_what_torch_compile_cannot_do_is_one_line(monkeypatch, tmp_path, ended):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net, **_: real(net, backend=backend))
    flags = f"{SMALL} --loss st --runs {tmp_path} --compile".split()
    status, error = ended(lambda: robust_kd.main(flags))
    assert status == 2 and error.startswith("error: --compile") and error.count("\n") == 1
    assert "no compiler" in error and "goes on without --compile" in error


def test_more_variants_than_pytorch_allows_by_default_are_all_compiled(compiled):
    sizes, _ = compiled
    for _ in range(6):  # student, teacher, ...: nets of one class share one code object
        net = common.build_model("wrn-10-1")
        common.compile_model(net)
        for training in (True, False):
            with torch.no_grad():
                net.train(training)(torch.rand(4, *IMAGE))
    assert len([size for size in sizes if size]) >= 12
