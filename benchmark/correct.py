"""Is what is fast also right? Convolutions against float64, losses and attacks against float32.

Usage    python benchmark/correct.py --device cuda --model resnet18
         python benchmark/correct.py --model wrn-10-1 --batch-size 32 --precision fp32 bf16
Conv     Each shape of convolution in the net: its output and both gradients in the precisions of
         --precision, with the layout and the cuDNN settings of training, on normal numbers, as
         |a - b| / |b| against float64 on the CPU. LIMITS says what is an error.
Losses   The first --steps losses of adversarial training by each rung of the ladder of
         benchmark/train_step.py, against those in float32 without its tricks: the mean difference
         must be at most twice that of two such runs with other starts of the attack.
Attack   PGD-7 and PGD-20 by each precision on the net that the reference has trained: the loss in
         float32 on their images must be within 1 % of that of the attack in float32.
"""

import collections
import contextlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmark import train_step

LIMITS = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 1e-2}  # of 24, 11 and 8 bits
WAYS = "reference", "reference, other starts"


def parse_args(argv=None):
    """The flags of this benchmark."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="wrn-10-1", help="the net")
    add("--batch-size", type=common.count, default=128, help="of training")
    add("--steps", type=common.count, default=20, help="of the losses that are compared")
    add("--precision", nargs="+", choices=LIMITS, default=["fp32"], help="to compare")
    add("--data", default="shapes", help="as of the scripts")
    add("--data-root", default="data", help="as of the scripts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    args = parser.parse_args(argv)
    if "tf32" in args.precision and not torch.cuda.is_available():
        parser.error("--precision tf32: needs CUDA")
    return args


@contextlib.contextmanager
def computing(precision, device):
    """float32 nets compute as named inside; cuDNN times its kernels, as in training."""
    bf16 = {"enabled": precision == "bf16", "cache_enabled": False}
    cast = torch.autocast(device.type, torch.bfloat16, **bf16)
    with common.convolutions(precision == "tf32"), cast:
        torch.backends.cudnn.benchmark = True  # put back like the rest
        common.set_matmul_tf32(precision == "tf32")
        yield


def shapes(model, x):
    """{(input shape, weight shape, stride, padding): how often} of the convolutions in model(x)."""
    found = collections.Counter()

    def keep(conv, inputs, output):
        found[(*inputs[0].shape,), (*conv.weight.shape,), conv.stride, conv.padding] += 1

    hooks = [m.register_forward_hook(keep) for m in model.modules() if type(m) is torch.nn.Conv2d]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def convolve(x, w, stride, padding):
    """Output of a convolution and the gradients of its sum of squares in x and w."""
    x, w = x.requires_grad_(), w.requires_grad_()
    y = F.conv2d(x, w, None, stride, padding)
    return y.detach(), *torch.autograd.grad(y.double().square().sum(), (x, w))


def convolutions(model, x, precisions):
    """Rows of a table: the errors of each shape of convolution in each precision."""
    rows, draw = [], torch.Generator().manual_seed(0)
    for (inputs, weights, stride, padding), times in shapes(model, x).items():
        given = [torch.randn(shape, generator=draw) for shape in (inputs, weights)]
        given = [t.contiguous(memory_format=torch.channels_last) for t in given]
        exact = convolve(*(t.double() for t in given), stride, padding)
        name = f"{times} x {inputs[1]} -> {weights[0]}, kernel {weights[2]}, stride {stride[0]}"
        for precision in precisions:
            with computing(precision, x.device):
                found = convolve(*(t.to(x.device) for t in given), stride, padding)
            row = {"convolution": f"{name}, side {inputs[2]}", "in": precision}
            for part, a, b in zip(("output", "gradient of x", "of w"), found, exact):
                row[part] = float((a.cpu().double() - b).norm() / b.norm())
            rows.append(row)
    return rows


def losses(args, data):
    """{way: the first losses of training}: those of the reference, twice, and of each rung."""
    rungs = [*train_step.RUNGS.items()][1 : None if data.x_train.is_cuda else train_step.ON_CPU]
    ways, tricks = {}, set()
    for name, more in rungs:  # without the first: the DataLoader draws other images
        tricks = tricks | more
        ways[name] = tricks
    ways = dict.fromkeys(WAYS, ways.pop(rungs[0][0])) | ways
    found = {}
    for name, tricks in ways.items():
        loop = train_step.rung(data, args, tricks)
        strict = computing("fp32", data.x_train.device)  # a rung sets its own, but for TF32
        with strict if name in WAYS else contextlib.nullcontext():
            found[name] = [float(next(loop))]
            if "other" in name:
                torch.manual_seed(1)  # from the second step on
            found[name] += [float(next(loop)) for _ in range(args.steps - 1)]
    return found


def attacks(args, data):
    """Rows of a table: the loss in float32 of what PGD finds in each precision."""
    model = common.model_for(data, args.model, 0, "attacked")
    optimizer, rows = common.sgd(model, 0.1, 0.9, 5e-4), []
    for _, (x, labels) in zip(range(args.steps), common.batches(data, args.batch_size, 0, 0)):
        train_step.step(model, optimizer, train_step.our_pgd, x, labels)
    n = 4 * args.batch_size
    x, labels = common.to_float(data.x_test[:n]), data.y_test[:n]
    with common.evaluating(model):
        for steps in (7, 20):
            for precision in dict.fromkeys(["fp32", *args.precision]):
                torch.manual_seed(0)
                with computing(precision, x.device):
                    x_adv = common.pgd(model, x, labels, train_step.EPS, train_step.STEP, steps)
                rows.append({"attack": f"pgd{steps}", "in": precision})
                rows[-1]["loss"] = F.cross_entropy(model(x_adv), labels).item()
    return rows


def main(argv=None):
    """Print the three tables; what is out of its limit ends it with one line and status 2."""
    args = parse_args(argv)
    args.deterministic, args.loss, args.teacher_model, args.workers = False, "at", "mlp-8", 0
    device = common.setup_device(args)
    data, wrong = common.load_data(args.data, args.data_root, device), []
    model = common.model_for(data, args.model, 0, "convolutions").eval()
    rows = convolutions(model, common.to_float(data.x_train[: args.batch_size]), args.precision)
    for row in rows:
        parts = [key for key, value in row.items() if isinstance(value, float)]
        where = f"{row['convolution']} in {row['in']}"
        off = [key for key in parts if not row[key] <= LIMITS[row["in"]]]
        wrong += [f"{where}: {key} is off by {row[key]:.1e}" for key in off]
        row |= {key: f"{row[key]:.1e}" for key in parts}
    print(common.table(rows))
    found, rows = losses(args, data), []
    same, limit = torch.tensor(found["reference"]), math.nan
    for name, one in found.items():
        gap = (torch.tensor(one) - same).abs().mean().item()
        limit = 2 * gap if "other" in name else limit
        wrong += [f"{name}: losses differ by {gap:.4f}"] * (name not in WAYS and not gap <= limit)
        rows.append({"losses": name, "last": f"{one[-1]:.4f}", "mean difference": f"{gap:.5f}"})
    print("\n" + common.table(rows))
    rows = attacks(args, data)
    for row in rows:
        exact = next(r["loss"] for r in rows if r["attack"] == row["attack"])
        if not abs(row["loss"] / exact - 1) <= 0.01:
            wrong.append(f"{row['attack']} in {row['in']}: loss {row['loss']:.4f}, not {exact:.4f}")
    print("\n" + common.table([row | {"loss": f"{row['loss']:.4f}"} for row in rows]))
    if wrong:
        common.fail("; ".join(wrong))


if __name__ == "__main__":
    common.start(main)
