"""Time of one training step, as ratios: PGD-7 against a plain loop; a table against the teacher.

Usage    python benchmark/train_step.py                          # WRN-10-1, batch 128, on the CPU
         python benchmark/train_step.py --model resnet18 --device cuda --batch-size 128
         python benchmark/train_step.py --job distillation --model wrn-16-2 --teacher-model wrn-40-2
         python benchmark/train_step.py --ladder --loss akd+ --model resnet18 --device cuda
Plain    what most published code does: DataLoader with torchvision transforms, float32 (on CUDA
         with TF32 convolutions, PyTorch's default), NCHW, the attack by loss.backward(), which
         also makes the gradients of all weights in every step.
Ours     data on the device, one gather a batch, channels_last (and bf16 on CUDA), the gradient of
         the input alone in the attack. The loss, the attack and the update are the same.
Both     live in one process and are timed in turn, a few steps each; medians and quartiles. Before
         that, both do one step from the same weights on the same images, and must agree.
Table    --job distillation: a step of fickle_teacher.py --method hinton, with the live teacher and
         with the table of its logits, which must give the same loss; and the student alone.
Ladder   --ladder: what each trick is worth, one after the other on top of those before, for --loss
         st, at, ckd or akd+ of robust_kd.py. The first losses of all rungs must agree to 1e-3, in
         bf16 to 3e-2, but for that of the DataLoader, which draws other images. TFLOP/s count the
         multiply-adds (times two) that the job needs, without the gradients that the first rung
         throws away. The first step, with torch.compile and the capture, is apart. --keep puts
         the ladder into benchmark/speed.json and makes docs/SPEED.md of that.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import fickle_teacher
import plumbing
import robust_kd

ROOT = Path(__file__).resolve().parent.parent
EPS, STEP, STEPS = 8 / 255, 2 / 255, 7


def first(x):
    """The uniform start of the attack, the same numbers for every layout of x."""
    return torch.empty(x.shape, device=x.device).uniform_(-EPS, EPS)


def plain_pgd(model, x, labels):
    """PGD-7 by loss.backward(): the gradients of the weights are computed and thrown away."""
    x_adv = (x + first(x)).clamp(0, 1)
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


# What is switched on from a rung on; those after the fifth are for CUDA
RUNGS = {
    "DataLoader, float32, NCHW, all gradients": set(),
    "images on the device, one gather a batch": {"gather"},
    "in the attack the gradient of x alone": {"input"},
    "channels_last": {"nhwc"},
    "in the attack BatchNorm in the convolution": {"fold"},
    "bfloat16": {"bf16"},
    "torch.compile": {"compile"},
    "CUDA graph of attack, forward, backward": {"graph"},
}


ON_CPU = 5


def rung(data, args, tricks):
    """Yield the loss of one step of --loss after another with a set of tricks, for ever."""
    device, size = data.x_train.device, args.batch_size
    layout = torch.channels_last if "nhwc" in tricks else torch.contiguous_format
    model, teacher = (
        common.model_for(data, name, 0, stage).to(memory_format=layout)
        for name, stage in ((args.model, "student"), (args.teacher_model, "teacher"))
    )
    teacher.eval().requires_grad_(False)
    optimizer, wanted = common.sgd(model, 0.1, 0.9, 5e-4), robust_kd.needs(args.loss)
    attack = our_pgd if "fold" in tricks else input_pgd if "input" in tricks else plain_pgd
    if "compile" in tricks:
        model.compile()
        teacher.compile()

    def compute(x, labels):
        options = {"enabled": "bf16" in tricks, "cache_enabled": False}
        with torch.autocast(device.type, torch.bfloat16, **options):
            known = {"labels": labels, "alpha": 0.8, "lam": 5 / 6}
            x_adv = attack(model.eval(), x, labels) if "student_adv_logits" in wanted else None
            model.train()
            views = {"logits": x, "adv_logits": x_adv}
            for name in (name for name in wanted if name.endswith("logits")):
                who, _, view = name.partition("_")
                with torch.set_grad_enabled(who == "student"):
                    known[name] = (model if who == "student" else teacher)(views[view])
            loss = robust_kd.LOSSES[args.loss](**{k: v for k, v in known.items() if k in wanted})
        model.zero_grad()  # of the attack
        loss.backward()
        return loss.detach()

    if "graph" in tricks:
        run = argparse.Namespace(device=device, args=argparse.Namespace(graph=True))
        compute = plumbing.captured(run, model)(compute)
    images = None if "gather" in tricks else Images(data)
    options = {"shuffle": True, "num_workers": args.workers, "pin_memory": device.type == "cuda"}
    for epoch in range(10**9):
        pairs = common.batches(data, size, 0, epoch)
        if images:
            pairs = torch.utils.data.DataLoader(images, size, drop_last=True, **options)
        for x, labels in (pair for pair in pairs if len(pair[0]) == size):
            optimizer.zero_grad()
            loss = compute(x.to(device).to(memory_format=layout), labels.to(device))
            optimizer.step()
            yield loss if "gather" in tricks else loss.item()


def flops(data, args):
    """Floating-point operations of one step of --loss, two for each multiply-add.

    Of a forward pass F, as counted: 3 F to train, 2 F for each step of the attack, the teacher's F.
    """
    forward = {}
    for name in (args.model, args.teacher_model):
        model = common.model_for(data, name, 0, "count")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(common.to_float(data.x_train[: args.batch_size]))
        forward[name] = counter.get_total_flops()
    passes = 3 + 2 * STEPS * (args.loss in ("at", "akd+"))
    taught = args.loss in ("ckd", "akd+")
    return passes * forward[args.model] + taught * forward[args.teacher_model]


def ladder(args, device):
    """({name: loop} of the rungs that this device has, {name: seconds of the first step})."""
    data = common.load_data(args.data, args.data_root, device)
    loops, firsts, tricks, expected = {}, {}, set(), math.nan
    for name in list(RUNGS)[: None if device.type == "cuda" else ON_CPU]:
        tricks = tricks | RUNGS[name]
        torch.manual_seed(0)
        loops[name], start = rung(data, args, tricks), time.perf_counter()
        loss = torch.as_tensor(next(loops[name])).item()
        firsts[name] = time.perf_counter() - start
        expected = loss if tricks == {"gather"} else expected
        if tricks and abs(loss - expected) > (3e-2 if "bf16" in tricks else 1e-3) * expected:
            common.fail(f"{name}: first loss {loss:.4f}, expected {expected:.4f}")
    return loops, firsts, flops(data, args)


def page(records):
    """docs/SPEED.md, of the records in benchmark/speed.json."""
    text = [SPEED]
    for record in sorted(records, key=lambda r: (r["device"], r["model"], r["loss"])):
        taught = f" from {record['teacher']}" * (record["loss"] in ("ckd", "akd+"))
        job = f"{record['model']}, `{record['loss']}`{taught}, batch {record['batch_size']}"
        text += [f"\n## {job}\n\n{record['device']}, torch {record['torch']}, commit"]
        text[-1] += f" {record['commit']}; {record['gflop_per_image']:.2f} GFLOP an image.\n"
        text += [
            "| | ms a step (quartiles) | images/s | TFLOP/s | of the line above | first step, s |"
        ]
        text += ["|---|---|---|---|---|---|"]
        before = None
        for r in record["rungs"]:
            ratio = f"{r['ms'] / before:.2f}" if before else "-"
            line = f"| {r['name']} | {r['ms']:.1f} ({r['low']:.1f} to {r['high']:.1f}) |"
            line += f" {r['images_per_second']:,.0f} | {r['tflops']:.3g} | {ratio} |"
            text.append(f"{line} {r['first_step_seconds']:.1f} |")
            before = r["ms"]
    return "\n".join(text) + "\n"


SPEED = """# Speed

What each trick is worth for one training step, one on top of the other: made by
`python benchmark/train_step.py --ladder --keep` (flags: `--loss`, `--model`, `--teacher-model`,
`--batch-size`, `--device`) from `benchmark/speed.json`. All rungs live in one process and are timed
in turn; medians and quartiles. The scripts do what the last line of a CPU table does; on CUDA bf16
too. torch.compile and the CUDA graph are off without `--compile` and `--graph` until they have been
measured on a GPU. So far there are no GPU numbers here. `python benchmark/correct.py` says whether
what is fast is right; `benchmark/autoattack.py` times AutoAttack."""


def input_pgd(model, x, labels):
    """The attack of the scripts, on the net as it is."""
    return common.pgd(model, x, labels, EPS, STEP, STEPS, first(x))


def our_pgd(model, x, labels):
    """The attack of the scripts: on the net with BatchNorm in the convolutions."""
    return input_pgd(common.attacked(model, "eval"), x, labels)


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
    parser = common.make_parser(__doc__)
    parser.add_argument("--job", default="pgd", choices=["pgd", "distillation"])
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--loss", default="at", choices=["st", "at", "ckd", "akd+"])
    parser.add_argument("--keep", action="store_true", help="the ladder, for docs/SPEED.md")
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


def timed(loops, args, device):
    """{name: loop} -> {name: seconds a step, of each round}, the loops in turn."""
    seconds = {name: [] for name in loops}
    for round_ in range(max(args.rounds, 2) + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            found = [next(loop) for _ in range(args.steps)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / args.steps)
            if not all(math.isfinite(loss) for loss in found):
                common.fail(f"{name}: a loss is not finite")
    return seconds


def show_ladder(args, device, where):
    """Time the rungs, print them, and keep them with --keep."""
    loops, firsts, operations = ladder(args, device)
    seconds = timed(loops, args, device)
    rungs = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rungs.append({"name": name, "ms": middle * 1e3, "low": low * 1e3, "high": high * 1e3})
        rungs[-1] |= {"images_per_second": args.batch_size / middle}
        rungs[-1] |= {"tflops": operations / middle / 1e12, "first_step_seconds": firsts[name]}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    record = {"device": where, "torch": torch.__version__, "model": args.model, "loss": args.loss}
    record |= {"teacher": args.teacher_model, "batch_size": args.batch_size}
    record["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    record |= {"gflop_per_image": operations / args.batch_size / 1e9, "rungs": rungs}
    print(page([record]).removeprefix(SPEED))
    if args.keep:
        path = ROOT / "benchmark" / "speed.json"
        key = ("device", "model", "loss", "teacher", "batch_size")
        kept = json.loads(path.read_text()) if path.exists() else []
        kept = [old for old in kept if any(old[k] != record[k] for k in key)] + [record]
        text = json.dumps(kept, indent=1) + "\n"
        common.write_atomically(path, lambda file: file.write(text.encode()))
        whole = page(kept).encode()
        common.write_atomically(ROOT / "docs" / "SPEED.md", lambda file: file.write(whole))


def main(argv=None):
    """Time both in turn and print the ratio, or the rungs of the ladder."""
    args = parse_args(argv)
    args.deterministic = False
    device = common.setup_device(args)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    if args.ladder:
        return show_ladder(args, device, where)
    loops = adversarial(args, device) if args.job == "pgd" else distillation(args, device)
    seconds = timed(loops, args, device)
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
    common.start(main)
