"""Speed on CUDA, without CUDA: torch.compile, bfloat16, and a stand-in for the device."""

import collections
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from emulated import DEVICE, device
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor

import common
import eval_robustness
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd

SMALL = (
    "--data shapes --train-subset 20 --test-subset 8 --val-size 6 --batch-size 16 --epochs 2 "
    "--teacher-epochs 1 --name run"
)
WRN, MLP = "--model wrn-10-1", "--model mlp-8"
ROBUST = "--teacher-batch-size 16 --steps 1"


@pytest.fixture
def no_evaluation(monkeypatch):
    """Runs end after their training."""

    def summary_rows(nets, data, folder, attacks, **settings):
        return [{"net": role, "model": label} for role, (label, _) in nets.items()]

    monkeypatch.setattr(eval_robustness, "summary_rows", summary_rows)


def student(runs, script):
    return runs / script.__name__ / "run-s0" / "student.pt"


# ------------------------------------------------------------------------------------------------
# --compile: a backend that runs what it is given, so that no compiler is needed

IMAGE = (3, 32, 32)
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


@pytest.fixture
def compiled(monkeypatch):
    """Batch sizes of the graphs made, output masks of convolution_backward, modes of --compile."""
    sizes, masks, modes, compile_net = [], [], [], nn.Module.compile

    def keep(graph, inputs):
        sizes.append({v.shape[0] for v in inputs if torch.is_tensor(v) and v.shape[1:] == IMAGE})
        nodes = graph.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        masks.extend(node.args[-1] for node in nodes)
        return graph

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    def compile_without_compiler(net, mode="default", **options):
        modes.append(mode)
        compile_net(net, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_without_compiler)
    torch._dynamo.reset()
    config = torch._dynamo.config
    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield sizes, masks, modes
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "script, flags, sizes",
    [
        (robust_kd, f"--loss akd+ {WRN} {ROBUST} --train-subset 16", {16}),
        (robust_kd, f"--loss adaad {WRN} {ROBUST} --train-subset 16 --awp 0.01", {16}),
        (fickle_teacher, f"--method hinton {MLP} --teacher-model wrn-10-1", {16, 4}),
        (teacher_free_kd, f"--method self-distillation {WRN} --train-subset 16", {16}),
        (teacher_free_kd, f"--method plain {WRN} --train-subset 16 --grad-heatmap", {16}),
    ],
)
def test_compiled_nets_train_alike_and_evaluations_run_as_they_are(
    script, flags, sizes, tmp_path, compiled
):
    flags = f"{SMALL} --epochs 1 {flags} --runs {tmp_path}/"
    script.main(f"{flags}plain".split())
    script.main([*f"{flags}compiled".split(), "--compile", "reduce-overhead"])
    found, _, modes = compiled
    assert modes and set(modes) == {"reduce-overhead"}
    assert set().union(*found) == sizes  # of the batches: not the 8 or 6 of the evaluations
    a = common.load(student(tmp_path / "plain", script))["weights"]
    b = common.load(student(tmp_path / "compiled", script))["weights"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


@pytest.fixture
def cuda_graphs(monkeypatch):
    """Compiled nets answer as with CUDA graphs, whose memory the next call of a net may take.

    Unless a backward pass through one of the answers is still to come, as the documentation of
    torch.compiler.cudagraph_mark_step_begin has it. What would be lost becomes NaN.
    """
    answers, waiting = [], []  # waiting: for their backward pass

    def compile_net(net, **options):
        forward = net.forward

        def call(x):
            if not waiting:
                for answer in answers:
                    answer.detach().fill_(torch.nan)
                answers.clear()
            answer = forward(x)
            parts = [answer] if torch.is_tensor(answer) else [*answer[0]]
            answers.extend(parts)
            if parts[-1].requires_grad:
                waiting.append(net)
                parts[-1].register_hook(lambda gradient: waiting.remove(net))
            return answer

        net.forward = call

    monkeypatch.setattr(nn.Module, "compile", compile_net)


@pytest.mark.parametrize(
    "script, flags",
    [
        *((robust_kd, f"--loss {loss} {ROBUST}") for loss in robust_kd.LOSSES),
        *((fickle_teacher, f"--method {method}") for method in ("fickle", "signal", "swap")),
        (soft_randomization, "--method soft-randomization"),
        (messy_collab, "--method mc-ts"),
        *(
            (teacher_free_kd, f"--method {method}")
            for method in teacher_free_kd.METHODS
            if method != "self-distillation"  # an MLP has no exits
        ),
    ],
)
def test_no_answer_is_used_after_its_memory_may_be_taken(
    script, flags, tmp_path, cuda_graphs, no_evaluation
):
    flags = f"{SMALL} {flags} --epochs 1 --val-size 0 {MLP} --teacher-model mlp-8 "
    if script is teacher_free_kd and "at" in flags.split("--method ")[1].split()[0].split("-"):
        flags += "--steps 1 "
    flags += f"--runs {tmp_path}/"
    script.main(f"{flags}plain".split())
    script.main([*f"{flags}compiled".split(), "--compile", "reduce-overhead"])
    a = common.load(student(tmp_path / "plain", script))["weights"]
    b = common.load(student(tmp_path / "compiled", script))["weights"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_compiled_attack_makes_no_gradient_of_weights(compiled):
    net = common.build_model("wrn-10-1")
    net.eval().compile()
    x, labels = torch.rand(4, *IMAGE), torch.arange(4)
    common.pgd(net, x, labels, 8 / 255, 2 / 255, 2)
    _, masks, _ = compiled
    assert masks and all(mask == [True, False, False] for mask in masks)
    net(x).sum().backward()  # and they have them again
    assert [True, True, False] in masks and net.fc.weight.grad is not None


def compile_nets(number):
    """Compile so many different nets, and call each in training and in evaluation mode."""
    for classes in range(2, 2 + number):  # all of them share one code object
        net = common.build_model("mlp-8", classes, dropout=0.5)
        common.compile_model(net, "default")
        for training in (True, False):
            with torch.no_grad():
                net.train(training)(torch.rand(4, *IMAGE))


def test_more_variants_than_pytorch_compiles_by_default_are_all_compiled(compiled):
    sizes, _, _ = compiled
    compile_nets(6)
    assert len([size for size in sizes if size]) >= 12


def test_one_line_says_that_the_limit_of_compiling_is_hit(compiled, ended, monkeypatch):
    compile_model = common.compile_model

    def compile_few(net, mode):
        compile_model(net, mode)
        torch._dynamo.config.recompile_limit = 2

    monkeypatch.setattr(common, "compile_model", compile_few)
    status, error = ended(lambda: compile_nets(3))
    line = error.splitlines()[-1]  # PyTorch warns before it
    assert status == 2 and line.startswith("error: --compile: ") and "recompile_limit" in line
    assert line.endswith("goes on without --compile")


def test_what_torch_compile_cannot_do_is_one_line(monkeypatch, tmp_path, ended):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    compile_net = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net, **_: compile_net(net, backend=backend))
    flags = f"{SMALL} {WRN} --loss st {ROBUST} --runs {tmp_path} --compile".split()
    status, error = ended(lambda: robust_kd.main(flags))
    assert status == 2 and error.startswith("error: --compile") and error.count("\n") == 1
    assert "no compiler" in error and "goes on without --compile" in error


# ------------------------------------------------------------------------------------------------
# A device that is not the CPU: no operation mixes the two, and nothing waits within a step


@pytest.fixture
def trained_on(monkeypatch, tmp_path, no_evaluation):
    """trained_on(script, flags) -> (the Device, [images of each step], what waited in a step)."""

    def run(script, flags):
        sizes, within, batches = [], [], common.batches

        def watched(*given):
            for x, labels in batches(*given):
                before = len(gpu.waits)
                yield x, labels  # the rest of the step
                within.extend(gpu.waits[before:])
                sizes.append(len(x))

        monkeypatch.setattr(common, "batches", watched)
        with device(monkeypatch) as gpu:
            script.main(f"{SMALL} {flags} --runs {tmp_path}".split())
        return gpu, sizes, within

    return run


AKD = f"--loss akd+ {WRN} {ROBUST} --teacher-training at ffgsm --augment cutout --val-size 0"
RSLAD = f"--loss rslad+ {WRN} {ROBUST} --teacher-training trades --ema 0.9 --augment cutmix"


@pytest.mark.parametrize(
    "script, flags",
    [
        (robust_kd, AKD),
        (robust_kd, f"{RSLAD} --val-size 0"),
        (robust_kd, f"--loss adr {WRN} {ROBUST} --val-size 0 --awp 0.01"),
        (robust_kd, f"--loss igdm {MLP} {ROBUST} --val-size 0"),
        (robust_kd, f"--loss iad {MLP} {ROBUST} --val-size 0"),
        (robust_kd, f"--loss mart {MLP} {ROBUST} --val-size 0"),
        (fickle_teacher, f"--method fickle {WRN} --teacher-model wrn-10-1"),
        (fickle_teacher, f"--method swap {MLP} --teacher-model mlp-8"),
        (fickle_teacher, f"--method signal {MLP} --teacher-model mlp-8"),
        (soft_randomization, f"--method soft-randomization {MLP} --teacher-model mlp-8"),
        (messy_collab, f"--method mc-ts {WRN} --teacher-model mlp-8"),
        (teacher_free_kd, f"--method at-tf-kd-self {WRN} --steps 1"),
        (teacher_free_kd, f"--method tf-kd-reg {MLP}"),
    ],
)
def test_a_step_waits_for_nothing_and_an_epoch_for_its_numbers(script, flags, trained_on):
    gpu, sizes, within = trained_on(script, flags)
    epochs = len(sizes) // 2
    assert sizes == [16, 4] * epochs and epochs >= 2 and not within
    waits = collections.Counter(gpu.waits)
    # the metrics; whether all weights are finite
    assert waits.pop("common.epoch_row") == waits.pop("common.weights_are_finite") == epochs
    assert waits.pop("common.batches") == epochs  # the draws of the epoch go there in one copy
    beginning = {"common.load_data", "common.new_model", "common.load_model"}
    validation = {"common.check_finite", "common.accuracy"}  # one number each
    assert set(waits) <= beginning | validation


def test_averaging_the_gradients_of_two_processes_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda tensor: None)
    with device(monkeypatch) as gpu:
        net = torch.nn.Linear(2, 2).to(DEVICE)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gpu.waits.clear()
        common.average_gradients(net, 32)
        assert gpu.waits == []


def test_a_step_that_waits_is_found(trained_on, monkeypatch):
    cross_entropy = F.cross_entropy

    def waiting_loss(logits, labels, **options):
        loss = cross_entropy(logits, labels, **options)
        return loss if loss.item() > 0 else 0 * loss

    monkeypatch.setattr(F, "cross_entropy", waiting_loss)
    _, sizes, within = trained_on(robust_kd, f"--loss st {WRN} {ROBUST}")
    assert len(within) == len(sizes) == 4


def test_tensors_on_two_devices_are_an_error(trained_on, monkeypatch):
    def loss_on_the_host(logits, labels, **options):
        return (logits * torch.arange(10.0)).mean()

    monkeypatch.setattr(F, "cross_entropy", loss_on_the_host)
    with pytest.raises(Exception, match=r"lazy:0.* cpu"):
        trained_on(robust_kd, f"--loss st {WRN} {ROBUST}")


# ------------------------------------------------------------------------------------------------
# Precision


def in_tf32():
    """(convolutions in TF32, matrix products in TF32), as PyTorch's switches have it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"


@pytest.fixture
def precisions(monkeypatch):
    """{whether the net was in training mode: in_tf32() in its forward passes}, as sets."""
    found, forward = {True: set(), False: set()}, common.ConvNet.forward

    def watched_forward(net, x):
        found[net.training].add(in_tf32())
        return forward(net, x)

    monkeypatch.setattr(common.ConvNet, "forward", watched_forward)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's defaults
    torch.backends.cuda.matmul.allow_tf32 = False
    yield found
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_precision_of_training_is_what_its_name_says(precision, precisions, tmp_path):
    flags = f"{SMALL} {WRN} --epochs 1 --loss st {ROBUST} --precision {precision}"
    robust_kd.main([*flags.split(), "--runs", str(tmp_path)])
    assert precisions == {True: {(False, False)}, False: {(False, False)}}
    # torch.compile reads the old switches and refuses those that contradict the new ones
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_autocast_is_asked_for_what_the_flag_says(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *a, **options: asked.append((*a, options)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for precision, name, capability in (
        ("bf16", "cuda", 9),
        ("bf16", "cuda", 7),  # PyTorch emulates bfloat16 there
        ("fp32", "cuda", 9),
        ("bf16", "cpu", 9),
    ):
        gpu = SimpleNamespace(major=capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number, gpu=gpu: gpu)
        common.autocast(SimpleNamespace(precision=precision), torch.device(name))
    assert [call[1:] for call in asked] == [
        (torch.bfloat16, enabled, {"cache_enabled": False})
        for enabled in (True, False, False, False)
    ]


@pytest.mark.parametrize(
    "script, flags",
    [
        (robust_kd, f"--loss rslad+ {WRN} {ROBUST} --augment cutmix"),
        (robust_kd, f"--loss trades {WRN} {ROBUST}"),
        (robust_kd, f"--loss igdm {WRN} {ROBUST} --awp 0.01"),
        (robust_kd, f"--loss iad {WRN} {ROBUST}"),
        (robust_kd, f"--loss mart {WRN} {ROBUST}"),
        (messy_collab, f"--method mc-ts {WRN} --teacher-model mlp-8"),
        (teacher_free_kd, f"--method self-distillation {WRN}"),
    ],
)
def test_training_in_bfloat16_has_the_losses_of_float32(
    script, flags, tmp_path, monkeypatch, no_evaluation
):
    losses, autocast = [], torch.autocast
    for bf16 in (False, True):

        def autocast_as_on_cuda(_, dtype, enabled, *, cache_enabled, bf16=bf16):
            return autocast("cpu", dtype, bf16, cache_enabled=cache_enabled)

        monkeypatch.setattr(torch, "autocast", autocast_as_on_cuda)
        script.main(f"{SMALL} {flags} --val-size 0 --runs {tmp_path}/{bf16}".split())
        log = student(tmp_path / f"{bf16}", script).with_name("log.jsonl")
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------
# Evaluations on the device


@pytest.mark.parametrize("attack", eval_robustness.ATTACKS)
def test_an_attack_waits_only_to_drop_what_is_broken(attack, monkeypatch):
    settings = eval_robustness.Settings(steps=4, queries=4, targets=2)
    model = common.build_model("mlp-8")
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    with device(monkeypatch) as gpu, torch.no_grad():
        model.to(DEVICE).eval()
        x = torch.rand(3, 3, 32, 32, device=DEVICE)
        labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        index = torch.zeros(3, dtype=torch.int64)
        batch = eval_robustness.Batch(x, labels, model(x), index, settings, attack)
        gpu.waits.clear()
        x_adv = eval_robustness.ATTACKS[attack](model, batch)
        assert x_adv.shape == x.shape and x_adv.device == DEVICE
    waits = collections.Counter(gpu.waits)
    assert waits.pop("eval_robustness.drop_done") == 3  # after 1, 2 and 4
    assert set(waits) <= {"eval_robustness.square"}  # once, for the signs
    assert waits["eval_robustness.square"] <= 1


@pytest.mark.parametrize("name", ["pgd2", "aa"])
def test_an_evaluation_runs_on_the_device(name, monkeypatch):
    data = common.load_data("shapes", test_subset=8)
    monkeypatch.setattr(eval_robustness, "is_probabilities", lambda logits: False)
    monkeypatch.setattr(
        eval_robustness, "clean_logits", lambda model, x, *rest, **more: model(common.to_float(x))
    )
    with device(monkeypatch):
        model = common.build_model("mlp-8").to(DEVICE)
        x, labels = data.x_test.to(DEVICE), data.y_test.to(DEVICE)
        settings = eval_robustness.Settings(steps=3)
        attacks = ["clean", name, "calibration"]
        row = eval_robustness.measure(model, x, labels, attacks, settings)
    assert row["clean_acc"] == 1
