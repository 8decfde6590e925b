"""Time of one training step, as ratios: PGD-7 against a plain loop; a table against the teacher.

Usage    python benchmark/train_step.py                          # WRN-10-1, batch 128, on the CPU
         python benchmark/train_step.py --model resnet18 --device cuda --batch-size 128
         python benchmark/train_step.py --job distillation --model wrn-16-2 --teacher-model wrn-40-2
Plain    what most published code does: DataLoader with torchvision transforms, float32, NCHW, the
         attack by loss.backward(), which also makes the gradients of all weights in every step.
Ours     data on the device, one gather a batch, channels_last (and bf16 on CUDA), the gradient of
         the input alone in the attack. The loss, the attack and the update are the same.
Both     live in one process and are timed in turn, a few steps each; medians and quartiles. Before
         that, both do one step from the same weights on the same images, and must agree.
Table    --job distillation: a step of fickle_teacher.py --method hinton, with the live teacher and
         with the table of its logits, which must give the same loss; and the student alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import fickle_teacher
import plumbing

EPS, STEP, STEPS = 8 / 255, 2 / 255, 7


def plain_pgd(model, x, labels):
    """PGD-7 by loss.backward(): the gradients of the weights are computed and thrown away."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(x_adv), labels).backward()
        x_adv = x_adv.detach() + STEP * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def step(model, optimizer, attack, x, labels):
    """One step of adversarial training, BatchNorm in eval mode in the attack: -> loss ()."""
    model.eval()
    x_adv = attack(model, x, labels)
    model.train()
    loss = F.cross_entropy(model(x_adv), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Images(torch.utils.data.Dataset):
    """The training set as torchvision's own CIFAR10 gives it: one image at a time, transformed."""

    def __init__(self, data):
        from PIL import Image

        self.images = [Image.fromarray(x) for x in data.x_train.cpu().numpy()]
        self.labels = data.y_train.tolist()
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*augment, transforms.ToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def plain(data, model, batch_size, workers):
    """Yield the loss of one plain step after another, for ever."""
    device = data.x_train.device
    model = model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    options = {"shuffle": True, "num_workers": workers, "pin_memory": device.type == "cuda"}
    loader = torch.utils.data.DataLoader(Images(data), batch_size, drop_last=True, **options)
    while True:
        for x, labels in loader:
            x, labels = x.to(device), labels.to(device)
            yield step(model, optimizer, plain_pgd, x, labels).item()  # .item(): as usual there


def ours(data, model, batch_size):
    """Yield the loss of one of our steps after another, for ever."""
    optimizer = common.sgd(model, 0.1, 0.9, 5e-4)
    epoch = 0
    while True:
        for x, labels in common.batches(data, batch_size, 0, epoch):
            if len(x) == batch_size:
                with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
                    yield step(model, optimizer, our_pgd, x, labels)
        epoch += 1


def distilling(data, model, batch_size, teach):
    """Yield the loss of one step of a student after another; teach(x, view): or None, alone."""
    optimizer = common.sgd(model, 0.1, 0.9, 5e-4)
    epoch = 0
    while True:
        for x, labels, view in common.batches(data, batch_size, 0, epoch, views=True):
            with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
                logits = model(x)
                if teach is None:
                    loss = F.cross_entropy(logits, labels)
                else:
                    with torch.no_grad():
                        teacher_logits = teach(x, view)
                    loss = fickle_teacher.hinton_loss(logits, teacher_logits, labels, 0.9, 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach()
        epoch += 1


def distillation(args, device):
    """{name: loop} of the student alone, with a live teacher and with the table of its logits."""
    data = common.load_data(args.data, args.data_root, device, train_subset=args.batch_size)
    teacher = common.model_for(data, args.teacher_model, 0, "teacher").eval().requires_grad_(False)
    flags = argparse.Namespace(teacher_table="yes", seeds=None, precision="bf16", runs="", name="")
    run = plumbing.Run("train_step", argparse.Namespace(**vars(flags), seed=0), device)
    table = plumbing.teacher_table(teacher, data, run, 1, {})
    ways = {"alone": None, "live": lambda x, view: teacher(x), "table": lambda x, view: table[view]}
    loops, first = {}, {}
    for name, teach in ways.items():
        model = common.model_for(data, args.model, 0, "student")
        loops[name] = distilling(data, model, args.batch_size, teach)
        first[name] = next(loops[name]).item()
    print(f"first losses: live {first['live']:.6f}, table {first['table']:.6f}")
    if abs(first["live"] - first["table"]) > (1e-2 if device.type == "cuda" else 1e-4):
        common.fail("the table and the live teacher give different losses")
    return loops


def adversarial(args, device):
    """{name: loop} of the plain and of our adversarial training."""
    data = common.load_data(args.data, args.data_root, device)
    gap = agree(data, args.model, 32)
    print(f"largest difference of the weights after one step: {gap:.1e}")
    if gap > 1e-3:  # lr 0.1: the sign of a gradient of about 0 may differ at a few pixels
        common.fail(f"the two do not do the same: weights differ by {gap:.1e} after one step")
    models = [common.model_for(data, args.model, 0, "benchmark") for _ in range(2)]
    return {
        "plain": plain(data, models[0], args.batch_size, args.workers),
        "ours": ours(data, models[1], args.batch_size),
    }


def our_pgd(model, x, labels):
    """The attack of the scripts."""
    return common.pgd(model, x, labels, EPS, STEP, STEPS)


def agree(data, name, batch_size):
    """Largest difference between the weights after one plain and one of our steps, in float32."""
    x, labels = next(common.batches(data, batch_size, 0, 0))
    weights = []
    for attack, layout in ((plain_pgd, torch.contiguous_format), (our_pgd, torch.channels_last)):
        model = common.model_for(data, name, 0, "benchmark").to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        torch.manual_seed(0)  # draws the same start; the layout of x decides in which order
        step(model, optimizer, attack, x, labels)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return (weights[0] - weights[1]).abs().max().item()


def parse_args(argv=None):
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default="pgd", choices=["pgd", "distillation"])
    parser.add_argument("--model", default="wrn-10-1")
    parser.add_argument("--teacher-model", default="wrn-16-1", help="of --job distillation")
    parser.add_argument("--batch-size", type=common.count, default=128)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=common.count, default=9, help="timed rounds, at least 2")
    parser.add_argument("--steps", type=common.count, default=3, help="steps a round")
    parser.add_argument("--workers", type=common.count0, default=2, help="of the plain DataLoader")
    return parser.parse_args(argv)


def main(argv=None):
    """Time both in turn and print the ratio."""
    args = parse_args(argv)
    args.deterministic = False
    device = common.setup_device(args)
    loops = adversarial(args, device) if args.job == "pgd" else distillation(args, device)
    seconds = {name: [] for name in loops}
    for round_ in range(max(args.rounds, 2) + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                loss = next(loop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / args.steps)
            assert torch.isfinite(torch.as_tensor(loss)), name
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    job = "PGD-7" if args.job == "pgd" else f"distilled from {args.teacher_model}"
    print(f"{args.model}, {job}, batch {args.batch_size}, {where}, torch {torch.__version__}")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        spread, rate = f"({low * 1e3:.1f} to {high * 1e3:.1f})", args.batch_size / middle
        print(f"{name:6} {middle * 1e3:8.1f} ms a step {spread}  {rate:,.0f} images/s")
    for a, b in {"pgd": [("plain", "ours")]}.get(args.job, [("live", "table"), ("alone", "table")]):
        ratio = statistics.median(y / x for x, y in zip(seconds[a], seconds[b]))
        print(f"ratio  {ratio:8.3f} ({b} / {a}, median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
