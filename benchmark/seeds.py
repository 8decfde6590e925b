"""Several seeds of one net at once: one graph after the other, or as branches of one CUDA graph.

Usage    python benchmark/seeds.py --device cuda --model wrn-16-2 --loss st --seeds 4
One      A step of each seed in turn, each replayed as a CUDA graph of its own (on a CPU: as it is).
Branches The steps of all seeds as one CUDA graph, each on a stream of its own: what one small net
         leaves idle on the GPU, another one may use. On a CPU there are none: in turn as well.
Both     have the same weights, batches and attacks; the losses of all steps must agree to 1e-3.
         They are timed in turn; medians and quartiles. The scripts train the --seeds one after the
         other; branches are worth their code if they train 1.3 times as many images a second.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import plumbing
from benchmark import train_step


def parse_args(argv=None):
    """The flags of this benchmark."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="wrn-10-1", help="the net")
    add("--loss", choices=["st", "at"], default="st", help="standard or PGD-7 training")
    add("--seeds", type=common.count, default=4, help="how many")
    add("--batch-size", type=common.count, default=128, help="of each seed")
    add("--rounds", type=common.count, default=9, help="timed rounds, at least 2")
    add("--steps", type=common.count, default=3, help="steps of all seeds in a round")
    add("--data", default="shapes", help="as of the scripts")
    add("--data-root", default="data", help="as of the scripts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    return parser.parse_args(argv)


class Seed:
    """One seed: its net, optimizer, static batch, and the part of its step that is captured."""

    def __init__(self, data, args, seed):
        self.model = common.model_for(data, args.model, seed, "student")
        self.optimizer = common.sgd(self.model, 0.1, 0.9, 5e-4)
        self.batches, self.args = self.forever(data, args.batch_size, seed), args
        x, labels = next(self.batches)
        self.x, self.start, self.labels = x.clone(), torch.zeros_like(x), labels.clone()
        self.draw = torch.Generator(x.device).manual_seed(seed)

    def forever(self, data, size, seed):
        """Yield whole batches, epoch after epoch."""
        for epoch in range(10**9):
            yield from (b for b in common.batches(data, size, seed, epoch) if len(b[0]) == size)

    def load(self):
        """Put the next batch, and the start of its attack, where the graph reads them."""
        for mine, given in zip((self.x, self.labels), next(self.batches)):
            mine.copy_(given)
        eps = train_step.EPS
        self.start.uniform_(-eps, eps, generator=self.draw)
        self.optimizer.zero_grad()

    def compute(self):
        """Attack, forward and backward of the batch: -> loss ()."""
        x, eps = self.x, train_step.EPS
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            if self.args.loss == "at":
                options = eps, train_step.STEP, train_step.STEPS, self.start
                x = common.pgd(common.attacked(self.model, "eval"), x, self.labels, *options)
            loss = F.cross_entropy(self.model.train()(x), self.labels)
        loss.backward()
        return loss.detach()


def branches(seeds):
    """-> f() -> [loss of each seed], with their gradients set: a replay of one CUDA graph."""
    before = [[b.clone() for b in seed.model.buffers()] for seed in seeds]
    streams, main = [torch.cuda.Stream() for _ in seeds], torch.cuda.current_stream()
    for seed, stream in zip(seeds, streams):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for _ in range(3):
                seed.model.zero_grad()
                seed.compute()
            seed.model.zero_grad()
        main.wait_stream(stream)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        main, out = torch.cuda.current_stream(), []
        for seed, stream in zip(seeds, streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                out.append(seed.compute())
        for stream in streams:
            main.wait_stream(stream)
    gradients = [[p.grad for p in seed.model.parameters()] for seed in seeds]
    for seed, buffers in zip(seeds, before):
        for buffer, value in zip(seed.model.buffers(), buffers):
            buffer.copy_(value)

    def replay():
        graph.replay()
        for seed, own in zip(seeds, gradients):
            for parameter, gradient in zip(seed.model.parameters(), own):
                parameter.grad = gradient
        return [loss.clone() for loss in out]

    return replay


def in_turn(seeds):
    """-> f() -> [loss of each seed], with their gradients set: on CUDA each a replay of its own."""
    run = argparse.Namespace(device=seeds[0].x.device, args=argparse.Namespace(graph=True))
    each = [plumbing.captured(run, seed.model)(seed.compute) for seed in seeds]
    return lambda: [compute() for compute in each]


def training(data, args, way):
    """Yield the sum of the losses of one step of all seeds after another, for ever."""
    seeds = [Seed(data, args, seed) for seed in range(args.seeds)]
    step = way(seeds)
    while True:
        for seed in seeds:
            seed.load()
        losses = step()
        for seed in seeds:
            seed.optimizer.step()
        yield torch.stack(losses).sum()


def main(argv=None):
    """Check that both train alike, time them in turn, print the gain."""
    args = parse_args(argv)
    args.deterministic = False
    device = common.setup_device(args)
    data = common.load_data(args.data, args.data_root, device)
    ways = {"one after another": in_turn}
    ways["branches of one graph"] = branches if device.type == "cuda" else in_turn
    loops = {name: training(data, args, way) for name, way in ways.items()}
    found = {name: [float(next(loop)) for _ in range(args.steps)] for name, loop in loops.items()}
    one, other = found.values()
    if any(not abs(a - b) <= 1e-3 * abs(a) for a, b in zip(one, other)):
        common.fail(f"the two train otherwise: sums of losses {one} and {other}")
    seconds = train_step.timed(loops, args, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.seeds} seeds of {args.model}, {args.loss}, batch {args.batch_size}, {where}")
    for name, times in seconds.items():
        low, middle, high = (1e3 * t for t in statistics.quantiles(times, n=4))
        rate = 1e3 * args.seeds * args.batch_size / middle
        print(f"{name:22} {middle:8.1f} ms ({low:.1f} to {high:.1f})  {rate:,.0f} images/s")
    one, other = seconds.values()
    gain = statistics.median(a / b for a, b in zip(one, other))
    print(f"gain {gain:.3f}" if device.type == "cuda" else "no graph on a CPU: both are the same")


if __name__ == "__main__":
    common.start(main)
