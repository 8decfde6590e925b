"""On a device that is not the CPU: no operation mixes the two, and nothing waits within a step."""

import collections
import json

import pytest
import torch
from emulated import DEVICE, device

import common
import eval_robustness as ev
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd

SMALL = "--data shapes --train-subset 20 --test-subset 8 --val-size 8"
SMALL += " --batch-size 16 --epochs 2 --teacher-epochs 1 --name run"
WRN, MLP = "--model wrn-10-1", "--model mlp-8"
ROBUST = f"{WRN} --teacher-batch-size 16 --steps 1"
AKD = f"--loss akd+ {ROBUST} --teachers 2 --augment cutout --trajectories"


@pytest.fixture
def trained_on(monkeypatch, tmp_path):
    """trained_on(script, flags) -> (the Device, [images of each step], what waited in a step)."""

    def run(script, flags):
        sizes, within = [], []

        def watched(step, model, args):
            def watched_step(*tensors):
                before = len(gpu.waits)
                out = step(*tensors)
                within.extend(gpu.waits[before:])
                sizes.append(len(tensors[0]))
                return out

            return watched_step

        monkeypatch.setattr(common, "speed_up", watched)
        rows = lambda args, files, folder: [{"model": name} for name in files]  # noqa: E731
        monkeypatch.setattr(ev, "evaluate_files", rows)
        monkeypatch.setattr(ev, "evaluate", lambda *args, **options: {})
        with device(monkeypatch) as gpu:
            script.main(f"{SMALL} {flags} --runs {tmp_path}".split())
        return gpu, sizes, within

    return run


@pytest.mark.parametrize(
    "script, flags",
    [
        (robust_kd, AKD),
        (robust_kd, f"--loss rslad+ {ROBUST} --teacher-training trades --ema 0.9 --augment cutmix"),
        (fickle_teacher, f"--method fickle {WRN}"),
        (fickle_teacher, f"--method swap {MLP}"),
        (fickle_teacher, f"--method signal {MLP}"),
        (soft_randomization, f"--method soft-randomization {MLP}"),
        (messy_collab, f"--method mc-ts {WRN}"),
        (teacher_free_kd, f"--method at-tf-kd-self {WRN} --steps 1"),
        (teacher_free_kd, f"--method tf-kd-reg {MLP}"),
    ],
)
def test_a_step_waits_for_nothing_and_an_epoch_for_its_numbers(script, flags, trained_on):
    gpu, sizes, within = trained_on(script, flags)
    epochs = len(sizes) // 2
    assert sizes == [16, 4] * epochs and epochs >= 2 and not within
    waits = collections.Counter(gpu.waits)
    assert waits["common.epoch_row"] == 2 * epochs  # the metrics; whether all is finite
    assert waits["common.batches"] == 2 * epochs  # the draws of the epoch and a constant go there
    rest = {"common.load_data", "common.new_model", "common.load_model"}
    rest |= {"common.accuracy", "robust_kd.record"}
    assert set(waits) <= rest | {"common.epoch_row", "common.batches"}


def test_a_step_that_waits_is_found(trained_on, monkeypatch):
    st_loss = robust_kd.st_loss

    def loss(student_logits, labels):
        found = st_loss(student_logits, labels)
        return found if found.item() > 0 else 0 * found

    monkeypatch.setattr(robust_kd, "st_loss", loss)
    _, sizes, within = trained_on(robust_kd, f"--loss st {ROBUST}")
    assert len(within) == len(sizes) == 4


def test_tensors_on_two_devices_are_an_error(trained_on, monkeypatch):
    def loss(student_logits, labels):
        return (student_logits * torch.arange(10.0)).mean()

    monkeypatch.setattr(robust_kd, "st_loss", loss)
    with pytest.raises(Exception, match=r"lazy:0.* cpu"):
        trained_on(robust_kd, f"--loss st {ROBUST}")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ev.ATTACKS)
def test_an_attack_waits_only_to_drop_what_is_broken(attack, norm, monkeypatch):
    steps = ev.Settings(norm=norm, steps=10, queries=10, targets=2)
    model = common.build_model("mlp-8")
    with device(monkeypatch) as gpu, torch.no_grad():
        model.to(DEVICE).eval()
        x = torch.rand(3, 3, 32, 32, device=DEVICE)
        labels, index = (torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(2))
        batch = ev.Batch(x, labels, model(x), index, steps, attack)
        gpu.waits.clear()
        x_adv = ev.ATTACKS[attack](model, batch)
        assert x_adv.shape == x.shape and x_adv.device == DEVICE
    waits = collections.Counter(gpu.waits)
    assert waits.pop("eval_robustness.survivors") == 5  # after 1, 2, 4, 8, and 10
    # once for the signs of Square, and once for each of its shapes in L2
    assert set(waits) <= {"eval_robustness.bump", "eval_robustness.square"}
    assert waits["eval_robustness.square"] <= 1 and waits["eval_robustness.bump"] <= 4


@pytest.mark.parametrize("name", ["pgd2", "aa"])
def test_an_evaluation_runs_on_the_device(name, monkeypatch):
    data = common.load_data("shapes", test_subset=8)
    monkeypatch.setattr(ev, "is_probabilities", lambda logits: False)
    monkeypatch.setattr(ev, "clean_logits", lambda model, x, *rest: model(common.to_float(x)))
    with device(monkeypatch):
        model = common.build_model("mlp-8").to(DEVICE)
        x, labels = data.x_test.to(DEVICE), data.y_test.to(DEVICE)
        row = ev.evaluate_all(model, x, labels, ["clean", name, "calibration"], steps=3)
    assert row["clean_acc"] == 1


@pytest.mark.parametrize(
    "script, flags",
    [
        (robust_kd, f"--loss rslad+ {ROBUST} --augment cutmix"),
        (robust_kd, f"--loss trades {ROBUST}"),
        (messy_collab, f"--method mc-ts {WRN} --teacher-model mlp-8"),
        (teacher_free_kd, f"--method self-distillation {WRN}"),
    ],
)
def test_training_in_bfloat16_has_the_losses_of_float32(script, flags, tmp_path, monkeypatch):
    rows = lambda args, files, folder: [{"model": name} for name in files]  # noqa: E731
    monkeypatch.setattr(ev, "evaluate_files", rows)
    monkeypatch.setattr(ev, "evaluate", lambda *args, **options: {})
    losses, autocast = [], torch.autocast
    for bf16 in (False, True):
        options = {"dtype": torch.bfloat16, "enabled": bf16, "cache_enabled": False}
        cast = lambda *_, options=options, **more: autocast("cpu", **options)  # noqa: E731
        monkeypatch.setattr(torch, "autocast", cast)  # as on CUDA
        script.main(f"{SMALL} {flags} --runs {tmp_path}/{bf16}".split())
        (log,) = (tmp_path / f"{bf16}").rglob("log.jsonl")
        found = [json.loads(line) for line in log.read_text().splitlines()]
        losses.append([row["loss"] for row in found if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
