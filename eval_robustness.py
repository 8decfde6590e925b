"""Evaluate checkpoints: clean accuracy and PGD-N accuracy with restarts, in float32.

Paper    PGD: Madry et al. 2018. PGD-20 is the number beside AutoAttack in the robust-KD paper.
Usage    python eval_robustness.py runs/robust_kd/*/student.pt
         python eval_robustness.py CKPT --attack clean pgd20 pgd50 --restarts 5 --json out.json
Shapes   x uint8 (N, H, W, C); batches float32 (B, C, H, W) in [0, 1]; labels (N,); logits (B, K)
Numbers  An image counts as robust if the model is right on it clean and on the last iterate of
         every restart (the worst case over restarts). All accuracies are over all N images.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch

import common


def parse_args(argv=None):
    """The flags of this script as a namespace; errors are one line with exit status 2."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="files written by the training scripts")
    add("--attack", nargs="+", type=attack_name, default=["clean", "pgd20"], help="clean, pgdN")
    add("--data", default="cifar10", help="cifar10, cifar100, mnist, shapes, FILE.npz or a FOLDER")
    add("--data-root", default="data", help="where data sets are, and missing ones are downloaded")
    add("--n", type=common.count, help="use so many test images (a fixed choice); None: all")
    add("--eps", type=common.probability, default="8/255", help="L-infinity radius")
    add("--step-size", type=common.fraction, help="PGD step; None: a quarter of the radius")
    add("--restarts", type=common.count, default=1, help="random restarts of PGD")
    add("--batch-size", type=common.count, default=500, help="images at once; changes no result")
    add("--seed", type=common.count0, default=0, help="seed of the random starts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there")
    add("--json", metavar="FILE", help="write all numbers here as well")
    args = parser.parse_args(argv)
    args.deterministic = False
    return args


def attack_name(text):
    """The `type=` of --attack: 'clean' or 'pgd' and a number of steps."""
    if text != "clean" and not re.fullmatch(r"pgd[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"expected clean or pgdN (pgd20), got {text!r}")
    return text


def pgd_correct(model, x, labels, right, eps, step_size, steps, restarts, seed, batch_size=500):
    """Which images stay right under PGD: bool (N,), from `right`, those that are right when clean.

    x uint8 (N, H, W, C), labels (N,). Only images that no restart has broken are attacked again.
    The random start of an image depends on (seed, restart, image) alone, not on the batch.
    """
    right = right.clone()
    for restart in range(restarts):
        alive = right.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(common.derive_seed("pgd", seed, restart))
        noise = torch.rand(x.shape, generator=generator).mul_(2 * eps).sub_(eps).permute(0, 3, 1, 2)
        for part in alive.split(batch_size):
            clean, start = common.to_float(x[part]), noise[part.to(noise.device)].to(x.device)
            x_adv = common.pgd(model, clean, labels[part], eps, step_size, steps, start)
            right[part] = common.correct(model, x_adv, labels[part])
    return right


def evaluate(
    model, x, labels, attacks, eps=8 / 255, step_size=None, restarts=1, seed=0, batch_size=500
):
    """{'clean_acc': ..., 'pgd20_acc': ...} of a model on x uint8 (N, H, W, C), labels (N,).

    attacks: 'clean' and 'pgdN'; eps, step_size (None: eps / 4) in pixel units of [0, 1].
    """
    accuracies = {}
    with common.evaluating(model):
        clean = common.correct(model, x, labels, batch_size)
        for attack in attacks:
            right = clean
            if attack != "clean":
                step = eps / 4 if step_size is None else step_size
                options = (eps, step, int(attack[3:]), restarts, seed, batch_size)
                right = pgd_correct(model, x, labels, clean, *options)
            accuracies[f"{attack}_acc"] = right.double().mean().item()
    return accuracies


def main(argv=None):
    """Evaluate every checkpoint, print one table, write the JSON."""
    args = parse_args(argv)
    device = common.setup_device(args)
    data = common.load_data(args.data, args.data_root, device, test_subset=args.n)
    models = {path: common.load_model(path, device, data)[0] for path in args.checkpoints}
    if args.json and not Path(args.json).absolute().parent.is_dir():  # before the work, not after
        common.fail(f"--json: there is no folder {Path(args.json).parent}")
    rows = []
    for path, model in models.items():
        start = time.monotonic()
        options = (args.eps, args.step_size, args.restarts, args.seed, args.batch_size)
        accuracies = evaluate(model, data.x_test, data.y_test, args.attack, *options)
        seconds = time.monotonic() - start
        rows.append({"checkpoint": path, **accuracies, "n": len(data.x_test), "seconds": seconds})
    print(common.table(rows))
    if args.json:
        record = {"flags": {k: v for k, v in vars(args).items() if k != "json"}, "rows": rows}
        text = json.dumps(record | {"torch": torch.__version__}, indent=1) + "\n"
        common.write_atomically(Path(args.json), lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
