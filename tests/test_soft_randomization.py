"""Soft randomization: the noise, and who sees it."""

import pytest
import torch

import common
import soft_randomization

SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05 "
    "--test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 1 --epochs 1 "
    "--eval-restarts 1 --name x"
)


def test_the_noise_has_the_moments_of_its_equation_pixel_by_pixel():
    x = torch.rand(64, 3, 32, 32)
    noise = soft_randomization.add_noise(x, 0.2) - x
    n = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=5 * 0.2 / n**0.5)
    assert noise.std().item() == pytest.approx(0.2, rel=0.01)
    assert (noise**4).mean().item() == pytest.approx(3 * 0.2**4, rel=0.05)  # it is Gaussian
    first, second = noise[:, 0].flatten(), noise[:, 1].flatten()  # channels, ...
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.02
    first, second = noise[..., 1:].flatten(), noise[..., :-1].flatten()  # ... and neighbours
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.02
    again = soft_randomization.add_noise(x, 0.2) - x
    assert not torch.equal(noise, again)


def test_the_noise_is_clipped_only_if_asked_and_none_at_sigma_zero():
    x = torch.rand(8, 3, 8, 8)
    free = soft_randomization.add_noise(x, 0.5)
    assert free.min() < 0 and free.max() > 1
    clipped = soft_randomization.add_noise(x, 0.5, clip=True)
    assert clipped.min() == 0 and clipped.max() == 1
    assert torch.equal(soft_randomization.add_noise(x, 0.0), x)


def test_the_student_sees_noise_and_its_teacher_the_same_images_without(tmp_path, monkeypatch):
    seen = {"teacher": [], "student": [], "teaching": []}
    new_model, get_teacher = common.new_model, soft_randomization.get_teacher
    stages = iter(["teacher", "student"])

    def record_inputs_while_training(*arguments):
        model, stage = new_model(*arguments), next(stages)

        def record(module, inputs):
            if module.training:
                seen[stage].append(inputs[0])

        model.register_forward_pre_hook(record)
        return model

    def record_inputs_of_the_teacher(args, data):
        teacher = get_teacher(args, data)
        teacher.register_forward_pre_hook(lambda _, inputs: seen["teaching"].append(inputs[0]))
        return teacher

    monkeypatch.setattr(common, "new_model", record_inputs_while_training)
    monkeypatch.setattr(soft_randomization, "get_teacher", record_inputs_of_the_teacher)
    soft_randomization.main([*SMALL.split(), "--sigma", "0.1", "--runs", str(tmp_path)])
    data = common.load_data("shapes", val_size=20, train_subset=48)
    batches = [x for x, _ in common.batches(data, 16, 0, "student", 0)]
    assert len(batches) == len(seen["student"]) == 3
    taught = seen["teaching"][:3]  # after them it is evaluated
    for x, noisy, clean in zip(batches, seen["student"], taught, strict=True):
        assert torch.equal(clean, x)
        assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.1)
    assert len(seen["teacher"]) == 3
    for x in seen["teacher"]:  # nor does the teacher learn on noisy images: these have 256 levels
        assert torch.equal((x * 255).round() / 255, x)


def test_the_teacher_of_soft_randomization_is_a_plain_one():
    clean = soft_randomization.parse_args(["--method", "hinton"])
    noisy = soft_randomization.parse_args(["--sigma", "0.3", "--clip"])
    first, second = (
        common.run_flags(soft_randomization.teacher_args(args)) for args in (clean, noisy)
    )
    assert first == second and first["method"] == "teacher"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--sigma -0.1", "--sigma: expected a number or a fraction between 0 and 1e+15"),
        ("--sigma x", "--sigma: expected a number or a fraction between 0 and 1e+15"),
        ("--method hinton --sigma 0.1", "--sigma: has no effect with --method hinton"),
        ("--method student --clip", "--clip: has no effect with --method student"),
        ("--method soft", "--method: invalid choice"),
        ("--model resnet19", "--model: expected resnet18"),
        ("--teacher-model wrn-9-1", "--teacher-model"),
        ("--eval-step-size -1", "--eval-step-size: expected"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(flags, message, tmp_path, refused):
    argv = [*SMALL.split(), *flags.split(), "--runs", str(tmp_path / "runs")]
    assert message in refused(soft_randomization.main, argv)
    assert list(tmp_path.iterdir()) == []
