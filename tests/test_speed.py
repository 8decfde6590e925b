"""What measures speed: all ways do the same, and the page is made of the JSON."""

import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import common
import eval_robustness as ev
from benchmark import autoattack, correct, seeds, train_step

SMALL = "--ladder --data shapes --model wrn-10-1 --teacher-model mlp-8 --batch-size 32"
SMALL = f"{SMALL} --rounds 2 --steps 2 --workers 0 --device cpu"


@pytest.mark.parametrize("loss", ["st", "ckd", "akd+"])
def test_the_ladder_of_a_cpu_has_five_rungs_that_agree(loss, capsys):
    train_step.main(f"{SMALL} --loss {loss}".split())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0][2:] for line in lines] == list(train_step.RUNGS)[
        : train_step.ON_CPU
    ]
    assert all(re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \|", line) for line in lines)


def test_a_rung_that_trains_another_way_is_an_error(monkeypatch, refused):
    wrong = lambda model, x, labels: 20 * x  # noqa: E731
    monkeypatch.setattr(train_step, "input_pgd", wrong)
    error = refused(train_step.main, f"{SMALL} --loss at".split())
    assert "in the attack the gradient of x alone: first loss" in error


def test_operations_are_those_of_the_passes():
    data = common.load_data("shapes", train_subset=4)
    flags = "--model mlp-8 --teacher-model mlp-8 --batch-size 4 --loss"
    forward = 4 * 2 * (3072 * 8 + 8 * 10)
    for loss, passes in (("st", 3), ("at", 17), ("ckd", 4), ("akd+", 18)):
        args = train_step.parse_args(f"{flags} {loss}".split())
        assert train_step.flops(data, args) == passes * forward


def test_the_page_is_made_of_the_numbers_that_were_kept():
    records = json.loads((ROOT / "benchmark" / "speed.json").read_text())
    assert records and (ROOT / "docs" / "SPEED.md").read_text() == train_step.page(records)


class Graphed:
    """What torch.cuda.make_graphed_callables makes: it writes over its last output and gradient."""

    def __init__(self, function, sample):
        self.function, (self.x,), self.calls = function, sample, 0
        self.out, self.grad = function(self.x).detach(), torch.zeros_like(self.x)

    def __call__(self, x):
        graph = self
        graph.calls += 1

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                assert x.shape == graph.x.shape
                graph.x.data.copy_(x)
                with torch.enable_grad():
                    graph.live = graph.function(graph.x)
                graph.out.copy_(graph.live)
                return graph.out.detach()

            @staticmethod
            def backward(ctx, grad):
                found = torch.autograd.grad(graph.live, graph.x, grad, retain_graph=True)
                graph.grad.copy_(found[0])
                return graph.grad.detach()

        return Function.apply(x)


@pytest.mark.parametrize("n", [40, 64])
def test_what_a_replayed_net_returned_stays_as_it_is(n, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", Graphed)
    net, found, expected = common.build_model("mlp-8"), [], []
    replayed = autoattack.Captured(net.requires_grad_(False), 64)
    for x in torch.rand(3, n, 3, 32, 32):
        x.requires_grad_()
        for out, forward in ((found, replayed), (expected, net)):
            logits = forward(x)
            out += [logits.detach(), *torch.autograd.grad(logits[:, 0].sum(), x)]
    torch.testing.assert_close(found, expected)
    assert len(replayed.graphs) == 1


def test_an_attack_on_the_replayed_net_breaks_the_same_images(monkeypatch):
    data = common.load_data("shapes", train_subset=200, test_subset=500)
    model, graphs = autoattack.trained_model(data), []
    points = data.x_test, data.y_test, ev.clean_logits(model, data.x_test, data.y_test)

    def make(function, sample):
        graphs.append(Graphed(function, sample))
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    s = ev.Settings(4 / 255, steps=8, queries=60, targets=2, batch_size=400)

    def broken():
        with common.evaluating(model):
            return ev.run_attack(
                model, points, "apgd-ce+apgd-t+fab+square", s, ev.open_store(), ""
            )["broken"]

    plain, folded = broken(), common.Folded
    monkeypatch.setattr(common, "Folded", lambda net: autoattack.Captured(folded(net), 400))
    assert torch.equal(broken(), plain) and 0 < (plain > 0).sum() < (plain >= 0).sum()
    shapes = {(len(g.x), g.x.requires_grad) for g in graphs}
    assert {(100, True), (50, True), (50, False)} <= shapes and len(graphs) <= 6
    assert sum(g.calls for g in graphs) > 100


def test_what_is_fast_is_compared_with_what_is_exact(capsys, refused, monkeypatch):
    flags = "--model wrn-10-1 --batch-size 4 --steps 2 --precision fp32 bf16 --device cpu"
    monkeypatch.setattr(train_step, "STEPS", 1)
    correct.main(flags.split())
    out = capsys.readouterr().out
    assert len(re.findall(r"^\d x \d+ -> \d+, kernel .* (?:fp32|bf16) ", out, re.M)) == 16
    assert "reference, other starts" in out and "channels_last" in out
    assert len(re.findall(r"^pgd(?:7|20) +(?:fp32|bf16) +\d\.\d+$", out, re.M)) == 4
    real, pgd = correct.convolve, common.pgd

    def convolve(x, w, *options):
        y, gx, gw = real(x, w, *options)
        return y, gx, gw * (1.02 if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(correct, "convolve", convolve)
    weak = lambda model, x, *rest: x if torch.is_autocast_enabled("cpu") else pgd(model, x, *rest)  # noqa: E731
    monkeypatch.setattr(common, "pgd", weak)
    monkeypatch.setattr(train_step, "first", lambda x: torch.full_like(x, 8 / 255))
    error = refused(correct.main, flags.split())
    assert "side 8 in fp32: of w is off by 2.0e-02; " in error and "pgd20 in bf16: loss" in error
    assert "channels_last: losses differ" in error  # here both references have the same start


def test_seeds_as_branches_train_as_one_after_another(monkeypatch):
    class Graph:
        """Replayed, it writes what a capture has made: losses and gradients."""

        def replay(self):
            for seed, (loss, gradients) in zip(made, kept):
                seed.model.zero_grad()
                loss.copy_(compute(seed))
                for gradient, p in zip(gradients, seed.model.parameters()):
                    gradient.copy_(p.grad)

    compute, made, kept = seeds.Seed.compute, [], []

    def watched(seed):
        loss = compute(seed)
        if capturing:
            made.append(seed)
            kept.append((loss, [p.grad for p in seed.model.parameters()]))
        return loss

    @contextlib.contextmanager
    def graph(_):
        capturing.append(True)
        yield
        capturing.clear()

    capturing = []
    monkeypatch.setattr(seeds.Seed, "compute", watched)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stream = lambda: SimpleNamespace(wait_stream=lambda other: None)  # noqa: E731
    for name, fake in (("Stream", stream), ("current_stream", stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    data = common.load_data("shapes", train_subset=20)
    args = seeds.parse_args("--seeds 2 --batch-size 8 --loss at --device cpu".split())
    monkeypatch.setattr(train_step, "STEPS", 1)
    plain, branches = (
        [float(loss) for loss in itertools.islice(seeds.training(data, args, way), 4)]
        for way in (seeds.in_turn, seeds.branches)
    )
    assert plain == branches and len(made) == 2


def test_the_program_that_times_seeds_runs(capsys):
    flags = "--model mlp-8 --seeds 2 --batch-size 8 --rounds 2 --steps 1 --device cpu"
    seeds.main(flags.split())
    assert "both are the same" in capsys.readouterr().out
