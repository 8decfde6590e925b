"""Soft randomization: the noise, and who sees it."""

import pytest
import torch

import common
import soft_randomization as sr

SMALL = (
    "--data shapes --model mlp-8 --teacher-model mlp-12 --device cpu --train-subset 48 --lr 0.05"
)
SMALL += " --test-subset 20 --val-size 20 --batch-size 16 --teacher-epochs 1 --epochs 1"
SMALL += " --restarts 1 --eval-steps 1"


def test_the_noise_has_the_moments_of_its_equation_pixel_by_pixel():
    x = torch.rand(64, 3, 32, 32)
    noise = sr.add_noise(x, 0.2) - x
    n = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=5 * 0.2 / n**0.5)
    assert noise.std().item() == pytest.approx(0.2, rel=0.01)
    assert (noise**4).mean().item() == pytest.approx(3 * 0.2**4, rel=0.05)  # it is Gaussian
    a, b = noise[:, 0].flatten(), noise[:, 1].flatten()  # channels, ...
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.02
    a, b = noise[..., 1:].flatten(), noise[..., :-1].flatten()  # and neighbours draw their own
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.02
    assert not torch.equal(sr.add_noise(x, 0.2), sr.add_noise(x, 0.2))


def test_the_noise_is_clipped_only_if_asked_and_none_at_sigma_zero():
    x = torch.rand(8, 3, 8, 8)
    assert sr.add_noise(x, 0.5).min() < 0 < 1 < sr.add_noise(x, 0.5).max()
    clipped = sr.add_noise(x, 0.5, clip=True)
    assert clipped.min() == 0 and clipped.max() == 1
    assert torch.equal(sr.add_noise(x, 0.0), x)


def test_the_student_sees_noise_and_its_teacher_the_same_views_without(tmp_path, monkeypatch):
    seen, build, load = (
        {"teacher": [], "student": [], "taught": []},
        common.model_for,
        common.load_model,
    )

    def watch(model, name):
        def hook(module, args):
            if module.training or name == "taught":
                seen[name].append(args[0])

        model.register_forward_pre_hook(hook)
        return model

    def spy_load(path, *rest, **options):
        model, meta = load(path, *rest, **options)
        return watch(model, "taught") if str(path).endswith("teacher.pt") else model, meta

    monkeypatch.setattr(common, "model_for", lambda *rest: watch(build(*rest), rest[3]))
    monkeypatch.setattr(common, "load_model", spy_load)
    sr.main([*SMALL.split(), "--sigma", "0.1", "--runs", str(tmp_path)])
    data = common.load_data("shapes", val_size=20, train_subset=48)
    batches = [x for x, _ in common.batches(data, 16, 0, 0)]
    assert len(batches) == len(seen["student"]) == 3
    for x, noisy, clean in zip(batches, seen["student"], seen["taught"]):
        assert torch.equal(clean, x)
        assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.1)
    for x in seen["teacher"]:  # nor does the teacher learn on noisy images: these have 256 levels
        assert torch.equal((x * 255).round() / 255, x)


BAD = {
    "--sigma -0.1": "--sigma",
    "--sigma x": "--sigma",
    "--method hinton --sigma 0.1": "--sigma: --method hinton has none",
    "--method student --clip": "--clip: --method student has none",
    "--method soft": "--method",
    "--model resnet19": "--model",
    "--teacher-model wrn-9-1": "--teacher-model",
    "--data mnist --data-root nowhere --eval half": "--eval",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_one_line_and_write_nothing(flags, tmp_path, refused):
    argv = ["--data", "shapes", *flags.split(), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert BAD[flags] in refused(sr.main, argv)
    assert list(tmp_path.iterdir()) == []
