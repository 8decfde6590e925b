"""Time eval_robustness.py's AutoAttack against a plain rendering of it, in one process.

Usage    python benchmark/autoattack.py --n 60 --batch-size 20 --threads 2
         python benchmark/autoattack.py --device cuda --checkpoint CKPT --n 1000 --batch-size 500
         (the standard attack has --steps 100 --queries 5000)
Plain    One batch after the other through all four attacks; `backward` with weight gradients; the
         projection of FAB by sorting; rows that are done are cut out by boolean masks at each
         query, and stay to the end of a run of APGD and FAB; BatchNorm as it is. L-infinity only.
Model    A WRN-10-1 trained for seconds on the embedded shapes; eps is chosen by APGD-CE such that
         about half of the images survive. Both use the same random draws.
Ours     On CUDA three times: searching in float32; in TF32, where only what float32 confirms
         counts; so, with the net replayed as CUDA graphs, which eval_robustness.py does not do. For
         each way the images are counted on which it differs from the first.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_robustness as ev


def parse_args(argv=None):
    """The flags of this script as a namespace."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--n", type=common.count, default=60, help="images")
    add("--batch-size", type=common.count, default=20, help="of all")
    add("--steps", type=common.count, default=20, help="iterations of APGD and FAB")
    add("--queries", type=common.count, default=1000, help="queries of Square")
    add("--threads", type=common.count, default=2, help="CPU threads")
    add("--repeats", type=common.count, default=2, help="of all, in turn; the fastest counts")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where all run")
    add("--checkpoint", help="of a script, instead of that small net; without the plain rendering")
    add("--data", default="cifar10", help="that the checkpoint was trained on")
    return parser.parse_args(argv)


def plain_gradient(model, x, loss):
    """Logits, loss (B,) and gradient in x, by `backward`: weight gradients are made too."""
    x = x.clone().requires_grad_()
    logits = model(x)
    value = loss(logits)
    value.sum().backward()
    return logits.detach(), value.detach(), x.grad


def plain_apgd(model, b, loss, target):
    """APGD as in the paper, with the history of the losses kept and read at the checkpoints."""
    eps, steps, clean, labels = b.s.eps, b.s.steps, b.x, b.labels
    x, step = ev.random_start(b, eps), torch.full((len(clean), 1, 1, 1), 2 * eps)
    step = step.to(clean.device)
    logits, f, g = plain_gradient(model, x, lambda z: loss(z, labels, target))
    x_adv, done = clean.clone(), logits.argmax(1) != labels
    x_adv[done] = x[done]
    best, best_g, best_f, history, previous = x.clone(), g.clone(), f.clone(), [f], x
    check_f, halved = f.clone(), torch.ones_like(done)
    for i in range(1, steps + 1):
        z = torch.clamp(x + step * g.sign(), clean - eps, clean + eps).clamp(0, 1)
        if i > 1:
            z = x + 0.75 * (z - x) + 0.25 * (x - previous)
            z = torch.clamp(z, clean - eps, clean + eps).clamp(0, 1)
        previous, x = x, z
        logits, f, g = plain_gradient(model, x, lambda z: loss(z, labels, target))
        wrong = logits.argmax(1) != labels
        done |= wrong
        x_adv[wrong] = x[wrong]
        better = (f > best_f).nonzero()[:, 0]
        best[better], best_g[better], best_f[better] = x[better], g[better], f[better]
        history.append(f)
        if period := ev.apgd_checkpoints(steps).get(i):
            rises = sum((history[j] > history[j - 1]).long() for j in range(i - period + 1, i + 1))
            halved = (rises <= 0.75 * period) | (~halved & (check_f >= best_f))
            check_f = best_f.clone()
            if halved.any():
                step[halved] /= 2
                x, g = x.clone(), g.clone()
                x[halved], g[halved] = best[halved], best_g[halved]
    return x_adv


def plain_projection(x, w, c):
    """The smallest step (B, D) in the box to the hyperplane: kinks sorted, sums accumulated."""
    w = w * torch.where(c < 0, -1.0, 1.0)[:, None]
    c, room, size = c.abs()[:, None], torch.where(w > 0, x, 1 - x), w.abs()
    kinks, order = room.sort(1)
    slopes = size.gather(1, order)
    filled = (slopes * kinks).cumsum(1)
    rest = slopes.flip(1).cumsum(1).flip(1)
    reached = filled + kinks * (rest - slopes) >= c  # with the radius at this kink
    at = reached.long().argmax(1, keepdim=True)
    before = torch.where(at > 0, filled.gather(1, (at - 1).clamp(min=0)), 0)
    radius = (c - before) / rest.gather(1, at).clamp(min=1e-30)
    radius = torch.where(reached.any(1, keepdim=True), radius, 1e30)
    return -w.sign() * torch.minimum(radius, room)


def plain_fab(model, b, target):
    """Targeted FAB to the end of its iterations, from the clean image."""
    x, labels, n = b.x.flatten(1), b.labels, len(b.x)
    now, best, size = x.clone(), x.clone(), torch.full((n,), 1e10, device=x.device)

    def difference(z):
        return (z.gather(1, target[:, None]) - z.gather(1, labels[:, None]))[:, 0]

    for _ in range(b.s.steps):
        _, df, w = plain_gradient(model, now.view_as(b.x), difference)
        w = w.flatten(1)
        c = torch.cat([df, df + (w * (x - now)).sum(1)])
        d1, d2 = plain_projection(torch.cat([now, x]), torch.cat([w, w]), c).chunk(2)
        r1, r2 = (d.abs().amax(1, keepdim=True).clamp(min=1e-8) for d in (d1, d2))
        alpha = (r1 / (r1 + r2)).clamp(max=0.1)
        now = ((1 - alpha) * (now + 1.05 * d1) + alpha * (x + 1.05 * d2)).clamp(0, 1)
        with torch.no_grad():
            wrong = model(now.view_as(b.x)).argmax(1) != labels
        if wrong.any():
            rows = wrong.nonzero()[:, 0]
            norm = (now[rows] - x[rows]).abs().amax(1)
            better = norm < size[rows]
            best[rows[better]], size[rows[better]] = now[rows[better]], norm[better]
            now[rows] = x[rows] + 0.9 * (now[rows] - x[rows])
    best[size > b.s.eps] = x[size > b.s.eps]
    return best.view_as(b.x)


@torch.no_grad()
def plain_square(model, b):
    """Square with a whole new image for each query, on the rows that are not done."""
    eps, (_, channels, height, width) = b.s.eps, b.x.shape
    generator = torch.Generator().manual_seed(common.derive_seed("queries", b.s.seed, b.which))
    draws = torch.rand(b.s.queries, 5, generator=generator)
    signs = torch.rand(b.s.queries, channels, generator=generator)
    signs = (signs - 0.5).sign().to(b.x.device)
    best = ev.square_start(b)
    margin = ev.margin(model(best), b.labels)
    for i in range(b.s.queries):
        rows = (margin > 0).nonzero()[:, 0]
        if not len(rows):
            break
        side = ev.square_side(i, height, width)
        r, c = (int(u * (k - side)) for u, k in zip(draws[i, :2].tolist(), (height, width)))
        delta = best[rows] - b.x[rows]
        sign = signs[i, :, None, None]
        delta[:, :, r : r + side, c : c + side] = eps * sign
        new = (b.x[rows] + delta).clamp(0, 1)
        logits = model(new)
        value = ev.margin(logits, b.labels[rows])
        F.cross_entropy(logits, b.labels[rows], reduction="none")
        take = (value < margin[rows]) | (value <= 0)
        best[rows[take]], margin[rows[take]] = new[take], value[take]
    wrong = (margin <= 0)[:, None, None, None]
    return torch.where(wrong, best, b.x)


def plain_autoattack(model, points, s):
    """Which images stay right (N,): each batch through all attacks."""
    robust = (points[2].argmax(1) == points[1]).clone()
    for part, _ in ev.batches(points, torch.arange(len(robust)), s):
        for attack, which in ev.passes("aa", points[2].shape[1], s):
            alive = part[robust[part].cpu()]
            for index, b in ev.batches(points, alive, s, attack, which):
                if attack == "apgd-ce":
                    x_adv = plain_apgd(model, b, ev.ce_loss, None)
                elif attack == "apgd-t":
                    x_adv = plain_apgd(model, b, ev.targeted_dlr_loss, b.target())
                elif attack == "fab-t":
                    x_adv = plain_fab(model, b, b.target())
                else:
                    x_adv = plain_square(model, b)
                with torch.no_grad():
                    robust[index] &= model(x_adv).argmax(1) == b.labels
    return robust.cpu()


class Captured(torch.nn.Module):
    """net(x) as CUDA graphs, its gradient in x too, for batches filled up to most / 2 / 2 ...

    A graph for each of those sizes, with and without gradient, in TF32 and in float32.
    """

    def __init__(self, net, most):
        super().__init__()
        self.net, self.most, self.graphs = net, most, {}

    def forward(self, x):
        n, size = len(x), self.most
        while size // 2 >= max(n, 32):
            size //= 2
        x = F.pad(x, [0] * 7 + [size - n])  # a copy, as its gradient: a graph writes over its own
        key = size, x.requires_grad, torch.backends.cudnn.conv.fp32_precision
        if key not in self.graphs:
            sample = x.detach().clone().requires_grad_(x.requires_grad)
            with torch.enable_grad():
                self.graphs[key] = torch.cuda.make_graphed_callables(self.net.forward, (sample,))
        return self.graphs[key](x)[:n].clone()


def trained_model(data):
    """A WRN-10-1 after three epochs of FGSM training on the shapes."""
    model = common.model_for(data, "wrn-10-1", 0, "benchmark")
    optimizer = common.sgd(model, 0.1, 0.9, 5e-4)
    for epoch in range(3):
        for x, labels in common.batches(data, 50, 0, epoch):
            x_adv = common.pgd(model.eval(), x, labels, 8 / 255, 10 / 255, steps=1)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x_adv), labels).backward()
            optimizer.step()
    return model.eval()


def main(argv=None):
    """Train or load, choose eps, run all in turn, print a table and the ratio."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        common.fail("--device: there is no CUDA device here; --device cpu works everywhere")
    if args.checkpoint:
        data = common.load_data(args.data, device=device, test_subset=args.n)
        model, eps = common.load_model(args.checkpoint, device, data)[0], 8 / 255
    else:
        data = common.load_data("shapes", device=device, train_subset=2000, test_subset=args.n)
        model = trained_model(data)
        curve = ev.accuracy_curve(model, data.x_test, data.y_test, ev.Settings(steps=20))
        eps = min(curve, key=lambda point: abs(point[1] - 0.5))[0]
    points = data.x_test, data.y_test, ev.clean_logits(model, data.x_test, data.y_test)
    options = {"batch_size": args.batch_size, "steps": args.steps, "queries": args.queries}
    seconds, robust = {}, {}

    def ours(s):
        with common.evaluating(model):
            return ev.run_attack(model, points, "aa", s, ev.open_store(), "")["broken"] == 0

    def captured(s, folded=common.Folded):
        common.Folded = lambda model: Captured(folded(model), args.batch_size)
        try:
            return ours(s)
        finally:
            common.Folded = folded

    def plain(s):
        with common.convolutions(tf32=False):  # as ours
            return plain_autoattack(model, points, s)

    ways = {} if args.checkpoint else {"plain": ("fp32", plain)}
    ways["ours, search in fp32"] = "fp32", ours
    if device.type == "cuda":
        ways["ours, search in tf32"] = "tf32", ours
        ways["ours, tf32, as CUDA graphs"] = "tf32", captured
    for name in [*ways] * args.repeats:
        search, attack = ways[name]
        begin = time.perf_counter()
        robust[name] = attack(ev.Settings(eps, search=search, **options))
        seconds.setdefault(name, []).append(time.perf_counter() - begin)
        print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    clean = (points[2].argmax(1) == data.y_test).double().mean().item()
    where = f"{args.device}, {torch.get_num_threads()} threads"
    print(f"eps {255 * eps:.3g}/255, {args.n} images, clean accuracy {clean:.4f}, {where}")
    first, rows = next(iter(ways)), []
    for name, times in seconds.items():
        differ = int((robust[name] != robust[first]).sum())
        rows.append({"": name, "aa_acc": robust[name].double().mean().item()})
        rows[-1] |= {"images that differ": differ, "seconds": min(times)}
        rows[-1]["ratio"] = f"{min(times) / min(seconds[first]):.3f}"
    print(common.table(rows))


if __name__ == "__main__":
    common.start(main)
