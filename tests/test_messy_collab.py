"""Messy collaboration: which labels are wrong, how often, and who learns from them."""

import json
import math

import numpy as np
import pytest
import torch

import common
import images
import messy_collab as mc
import plumbing

SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05"
)
SMALL += " --test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 2 --epochs 2"
SMALL += " --restarts 1 --eval-steps 1"
N = 40_000


def run(runs, flags):
    """Run the script with the small flags; -> the folder of its last run."""
    mc.main([*SMALL.split(), *flags.split(), "--runs", str(runs)])
    return max(runs.glob("messy_collab/*/"), key=lambda folder: folder.stat().st_mtime)


def weights(path):
    return torch.cat([value.flatten() for value in common.load(path)["weights"].values()])


# The draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("draw, share", [("exclusive", 1.0), ("inclusive", 0.9)])
def test_varying_labels_are_wrong_at_their_rate_and_uniform_over_the_wrong_classes(
    rate, draw, share
):
    labels = torch.arange(N) % 10
    moves = (mc.vary_labels(labels, rate, 10, draw) - labels) % 10
    wrong = int((moves != 0).sum())
    p = rate * share
    assert wrong == pytest.approx(N * p, abs=5 * math.sqrt(N * p * (1 - p)))
    counts = torch.bincount(moves[moves != 0], minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - wrong / 9).abs().max() < 5 * math.sqrt(wrong / 9)
    assert not torch.equal(mc.vary_labels(labels, rate, 10, draw), (labels + moves) % 10)  # anew


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15, 0.25, 0.5])
def test_corrupted_labels_are_exactly_the_rate_and_uniform_over_the_wrong_classes(rate):
    labels = torch.arange(N) % 10
    corrupted = mc.corrupt_labels(labels, rate, 10, seed=3)
    moves = (corrupted - labels) % 10
    counts = torch.bincount(moves[moves != 0], minlength=10)
    assert counts.sum() == round(rate * N) and corrupted.min() == 0 and corrupted.max() == 9
    assert (counts[1:] - rate * N / 9).abs().max() < 5 * math.sqrt(rate * N / 9)
    per_class = torch.bincount(labels[moves != 0])
    assert (per_class - rate * N / 10).abs().max() < 5 * math.sqrt(rate * N / 10)


def test_corrupted_labels_depend_on_seed_and_rate_alone():
    labels = torch.arange(1000) % 10
    first = mc.corrupt_labels(labels, 0.3, 10, 0)
    torch.manual_seed(99)
    assert torch.equal(first, mc.corrupt_labels(labels, 0.3, 10, 0))
    assert not torch.equal(first, mc.corrupt_labels(labels, 0.3, 10, 1))
    assert torch.equal(labels, torch.arange(1000) % 10)  # the true ones are not changed in place
    inclusive = mc.corrupt_labels(labels, 0.3, 10, 0, "inclusive")
    assert 0.2 < (inclusive != labels).double().mean() < 0.3
    assert torch.equal(mc.corrupt_labels(labels, 0.0, 10, 0), labels)
    assert torch.equal(mc.vary_labels(labels, 0.0, 10), labels)


# Who learns from which labels -------------------------------------------------------------------

WHO = {  # method -> whose labels vary, whose are corrupted, with --noise-rate and --corruption-rate
    "teacher": ("t", "ts"), "student": ("s", "ts"), "mc-t": ("t", "ts"), "mc-s": ("s", "ts"),
    "mc-ts": ("ts", "ts"), "hinton": ("", "ts"), "flc-t": ("", "t"), "flc-s": ("", "s"),
    "flc-ts": ("", "ts"),
}  # fmt: skip


@pytest.mark.parametrize("method", WHO)
def test_each_method_disturbs_the_labels_of_whom_it_says(method, tmp_path, monkeypatch):
    varied, corrupted = WHO[method]
    noise = " --noise-rate 0.3" * bool(varied)
    seen, stage_of, right = {}, {}, [0]
    end_epoch, metrics = plumbing.end_epoch, plumbing.metrics

    def spy(run, epoch, history, data, *attack):
        seen[run.stage[0], epoch] = torch.cat(stage_of.pop("labels"))
        return end_epoch(run, epoch, history, data, *attack)

    def record(loss, logits, labels):
        stage_of.setdefault("labels", []).append(labels)
        right[0] += int((logits.argmax(1) == labels).sum())
        return metrics(loss, logits, labels)

    monkeypatch.setattr(plumbing, "end_epoch", spy)
    monkeypatch.setattr(plumbing, "metrics", record)
    folder = run(tmp_path, f"--method {method} --corruption-rate 0.25{noise}")
    data = common.load_data("shapes", val_size=20, train_subset=48, test_subset=20)
    wrong = common.load(folder / "labels.pt")["labels"]
    assert (wrong != data.y_train).sum() == 12
    assert {net for net, _ in seen} == {"teacher": {"t"}, "student": {"s"}}.get(method, {"t", "s"})
    for (net, epoch), labels in seen.items():
        seed = common.derive_seed(0, "teacher") if net == "t" else 0
        given = wrong if net in corrupted else data.y_train
        true, data.y_train = data.y_train, given
        expected = torch.cat([y for _, y in common.batches(data, 16, seed, epoch)])
        data.y_train = true
        share = (labels != expected).double().mean().item()
        assert 0.05 < share < 0.6 if net in varied else share == 0, (net, epoch)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    accuracies = [row["train_acc"] for row in rows if "train_acc" in row]
    assert sum(accuracies) == pytest.approx(right[0] / 48)  # on the labels that were trained on
    for net in {net for net, _ in seen if net in varied}:
        assert not torch.equal(seen[net, 0].sort().values, seen[net, 1].sort().values)


def test_the_defaults_disturb_by_the_method():
    def rates(flags):
        args = vars(mc.parse_args(flags.split()))
        return [mc.wrong_labels(args, net) for net in "ts"]

    clean = [0.0, None]
    assert rates("") == [[0.25, None], [0.25, None]]
    assert rates("--method mc-t --noise-rate 0.5") == [[0.5, None], clean]
    assert rates("--method hinton") == rates("--method teacher") == [clean, clean]
    assert rates("--method flc-s") == [clean, [0.0, [0.25, 0]]]
    both = [0.0, [0.1, 7]]
    assert rates("--method hinton --corruption-rate 0.1 --corruption-seed 7") == [both, both]


def test_the_true_labels_of_corrupted_images_are_never_used(tmp_path):
    arrays = images.make_shapes()
    np.savez(tmp_path / "a.npz", **arrays)
    lie = {"y_train": np.roll(arrays["y_train"], 1)}  # other truths of the same images
    np.savez(tmp_path / "b.npz", **(arrays | lie))
    flags = "--method mc-ts --noise-rate 0.2 --val-size 0 --data"
    first = run(tmp_path / "1", f"{flags} {tmp_path / 'a.npz'} --corruption-rate 0.5")
    record = common.load(first / "labels.pt")
    record["fingerprint"] = common.load_data(f"{tmp_path}/b.npz", train_subset=48).fingerprint
    common.save(tmp_path / "labels.pt", record)  # else refused, since the labels differ
    more = f"--labels-file {tmp_path / 'labels.pt'}"
    second = run(tmp_path / "2", f"{flags} {tmp_path / 'b.npz'} {more}")
    for name in ("teacher.pt", "student.pt"):
        assert torch.equal(weights(first / name), weights(second / name)), name


def test_all_seeds_and_runs_have_the_same_corrupted_labels_and_held_out_ones_are_true(tmp_path):
    run(tmp_path, "--method flc-s --corruption-rate 0.5 --seeds 0 4")
    run(tmp_path, "--method student --corruption-rate 0.5")
    labels = [common.load(path)["labels"] for path in tmp_path.glob("*/*/labels.pt")]
    assert len(labels) == 3 and all(torch.equal(labels[0], other) for other in labels)
    data = common.load_data("shapes", val_size=20, train_subset=48)
    y = data.y_val.clone()
    args = mc.parse_args([*SMALL.split(), "--corruption-rate", "0.5", "--runs", str(tmp_path)])
    noisy = mc.corrupted(data, args, plumbing.Run("x", args, torch.device("cpu")))
    assert noisy.y_val is data.y_val and torch.equal(data.y_val, y)
    assert (noisy.y_train != data.y_train).sum() == 24 and noisy.x_train is data.x_train


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_in", ["teacher0", "student"])
def test_a_stopped_run_goes_on_with_its_labels_and_ends_with_the_same_bits(
    stop_in, tmp_path, monkeypatch
):
    flags = "--method mc-ts --noise-rate 0.2 --corruption-rate 0.3"
    whole, end_epoch = run(tmp_path / "whole", flags), plumbing.end_epoch

    def stop(run, epoch, *rest):
        end_epoch(run, epoch, *rest)
        if run.stage == stop_in:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(plumbing, "end_epoch", stop)
        run(tmp_path / "cut", flags)
    assert end.value.code == 130
    (labels,) = tmp_path.glob("cut/*/*/labels.pt")
    before = labels.read_bytes(), labels.stat().st_mtime_ns
    cut = run(tmp_path / "cut", flags)
    assert (labels.read_bytes(), labels.stat().st_mtime_ns) == before
    for name in ("teacher.pt", "student.pt"):
        assert torch.equal(weights(whole / name), weights(cut / name)), name


def test_the_labels_on_the_disk_are_those_that_a_run_goes_on_with(tmp_path, monkeypatch):
    flags = "--method student --corruption-rate 0.3 --name x"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(mc, "train_student", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, flags)
    path = tmp_path / "messy_collab" / "x-s0" / "labels.pt"
    record = common.load(path)
    record["labels"] = record["labels"].flip(0)
    common.save(path, {key: record[key] for key in ("labels", "fingerprint")})
    run(tmp_path, flags)
    assert torch.equal(common.load(path)["labels"], record["labels"])
    other = run(tmp_path / "other", flags)
    assert not torch.equal(weights(path.parent / "student.pt"), weights(other / "student.pt"))


def test_labels_of_other_images_are_refused(tmp_path, refused):
    folder = run(tmp_path, "--method student --corruption-rate 0.3")
    argv = [*SMALL.split(), "--labels-file", str(folder / "labels.pt")]
    argv += ["--runs", str(tmp_path / "runs")]
    message = refused(mc.main, [*argv, "--train-subset", "47"])
    assert "labels.pt" in message and "these training images" in message
    assert "holds no labels" in refused(
        mc.main, [*argv[:-3], str(folder / "student.pt"), *argv[-2:]]
    )
    assert not (tmp_path / "runs").exists()


BAD = {
    "--noise-rate 1": "--noise-rate: expected a number or a fraction of at least 0 and below 1",
    "--noise-rate -0.1": "--noise-rate",
    "--noise-rate nan": "--noise-rate",
    "--corruption-rate 1": "--corruption-rate",
    "--corruption-rate -1/10": "--corruption-rate",
    "--corruption-seed -1": "--corruption-seed",
    "--method hinton --noise-rate 0.1": "--noise-rate: --method hinton has none",
    "--method flc-ts --noise-rate 0.1": "--noise-rate: --method flc-ts has none",
    "--label-draw both": "--label-draw",
    "--labels-file none.pt": "none.pt",
    "--labels-file none.pt --corruption-rate 0.1": "--corruption-rate: the labels of --labels-file",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = ["--data", "shapes", *flags.split(), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert BAD[flags] in refused(mc.main, argv)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_teacher_is_trained_once_for_the_three_scripts_with_the_same_bits(tmp_path, capsys):
    import fickle_teacher
    import soft_randomization

    scripts = [(fickle_teacher, "hinton"), (soft_randomization, "soft-randomization"), (mc, "mc-s")]
    weights = []
    for script, method in scripts:
        for runs in ("shared", script.__name__):
            flags = f"{SMALL} --method {method} --name run --runs {tmp_path}/{runs}"
            script.main(flags.split())
        own = tmp_path / script.__name__ / script.__name__ / "run-s0" / "teacher.pt"
        weights.append(common.load(own)["weights"])
    assert capsys.readouterr().out.count("teacher0: taken from") == 2
    assert all(torch.equal(weights[0][k], other[k]) for other in weights for k in weights[0])
    for script, method in ((fickle_teacher, "fickle"), (mc, "mc-t")):  # no plain teachers
        script.main(f"{SMALL} --method {method} --runs {tmp_path}/shared".split())
    assert "taken from" not in capsys.readouterr().out
