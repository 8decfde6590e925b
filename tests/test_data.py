"""Data sets: read, checked, held out, shuffled and augmented."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common


def tiny(n=40, size=8, classes=3, channels=3):
    """Arrays of a small data set of random images."""
    rng = np.random.default_rng(0)
    shape = (n, size, size) + (channels,) * (channels > 1)
    x, y = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(n) % classes
    return {"x_train": x, "y_train": y, "x_test": x[:10].copy(), "y_test": y[:10].copy()}


def saved(path, **changes):
    """The path of an .npz of `tiny` with some arrays changed (None: left out)."""
    arrays = {k: v for k, v in (tiny() | changes).items() if v is not None}
    np.savez(path, **arrays)
    return str(path)


def test_shapes_are_the_same_every_time_and_balanced():
    first = common.make_shapes.__wrapped__(200, 50)  # conftest.py keeps what was drawn once
    again = common.make_shapes.__wrapped__(200, 50)
    assert all((first[key] == again[key]).all() for key in first)
    assert np.bincount(first["y_train"]).tolist() == [20] * 10
    assert first["x_train"].shape == (200, 32, 32, 3) and first["x_train"].dtype == np.uint8


def test_npz_is_loaded_with_statistics_of_the_training_images(tmp_path):
    arrays = tiny()
    data = common.load_data(saved(tmp_path / "a.npz", classes=np.array(["p", "q", "r"])))
    x = arrays["x_train"] / 255
    assert data.classes == ["p", "q", "r"]
    np.testing.assert_allclose(data.mean, x.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(data.std, x.std((0, 1, 2)), atol=1e-12)
    assert (data.x_train.numpy() == arrays["x_train"]).all() and data.y_test.dtype == torch.int64


def test_held_out_images_are_never_trained_on_and_do_not_depend_on_the_subset(tmp_path):
    path = saved(tmp_path / "a.npz")
    small = common.load_data(path, val_size=10, train_subset=5)
    large = common.load_data(path, val_size=10)
    assert (small.x_val == large.x_val).all() and len(large.x_train) == 30
    held_out = {x.numpy().tobytes() for x in large.x_val}
    assert not held_out & {x.numpy().tobytes() for x in large.x_train}
    trained = {x.numpy().tobytes() for x in large.x_train}
    assert {x.numpy().tobytes() for x in small.x_train} <= trained


def test_grey_images_get_a_channel(tmp_path):
    np.savez(tmp_path / "g.npz", **tiny(channels=1))
    assert common.load_data(str(tmp_path / "g.npz")).x_train.shape == (40, 8, 8, 1)


def test_a_folder_of_class_folders_is_read(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / part / name / f"{i}.png")
    data = common.load_data(str(tmp_path))
    assert data.classes == ["cat", "dog"] and data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.x_test[-1].numpy() == image).all()


def test_bad_data_is_one_line(tmp_path, refused):
    whole = saved(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    (tmp_path / "text.npz").write_text("hello")
    objects = np.array([{"a": 1}] * 40, dtype=object)
    cases = {
        "expected cifar10": "cifar11",
        "none.npz: no such file": str(tmp_path / "none.npz"),
        "cut.npz: expected an .npz file with x_train": str(tmp_path / "cut.npz"),
        "text.npz: expected an .npz file": str(tmp_path / "text.npz"),
        "no array y_test": saved(tmp_path / "missing.npz", y_test=None),
        "x_train must be uint8": saved(tmp_path / "float.npz", x_train=tiny()["x_train"] / 255),
        "x_test must be": saved(tmp_path / "flat.npz", x_test=tiny()["x_test"].reshape(10, -1)),
        "y_train must be 40 labels": saved(tmp_path / "short.npz", y_train=np.arange(39) % 3),
        "labels 0..K-1": saved(tmp_path / "minus.npz", y_train=np.arange(40) % 3 - 1),
        "labels reach 7, classes 3": saved(tmp_path / "new.npz", y_test=np.full(10, 7)),
        "pickle": saved(tmp_path / "object.npz", x_train=objects),
        "class folders": str(tmp_path),
    }
    for expected, name in cases.items():
        assert expected in refused(common.load_data, name), expected
    for sizes in ({"val_size": 41}, {"test_subset": 11}, {"train_subset": 31, "val_size": 10}):
        message = refused(common.load_data, whole, **sizes)
        assert "too large" in message and "40 training and 10 test images" in message


def test_the_fingerprint_is_of_all_images_and_labels(tmp_path):
    original = common.load_data(saved(tmp_path / "a.npz")).fingerprint
    assert common.load_data(saved(tmp_path / "b.npz"), test_subset=3).fingerprint == original
    assert common.load_data(saved(tmp_path / "b.npz"), val_size=3).fingerprint != original
    for part in ("x_train", "y_train", "x_test", "y_test"):
        changed = tiny()[part].copy()
        changed[-1] = (changed[-1] + 1) % 3
        path = saved(tmp_path / "c.npz", **{part: changed})
        assert common.load_data(path).fingerprint != original, part


def test_a_failed_download_says_where_the_data_were_looked_for(tmp_path, refused):
    message = refused(common.load_data, "cifar10", tmp_path)  # conftest.py cuts the network off
    assert f"put cifar10.npz into {tmp_path}" in message and message.startswith("--data cifar10: ")
    assert list(tmp_path.glob("*.npz")) == []


def test_torchvision_s_data_are_kept_as_an_npz(tmp_path, monkeypatch, capsys):
    import torchvision

    class Fake:
        classes = ["0 - zero", "1 - one", "2 - two"]

        def __init__(self, root, train, download):
            arrays, part = tiny(), "train" if train else "test"
            self.data = torch.from_numpy(arrays[f"x_{part}"])
            self.targets = arrays[f"y_{part}"].tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    first = common.load_data("cifar100", tmp_path)
    assert "from torchvision" in capsys.readouterr().out
    monkeypatch.delattr(torchvision.datasets, "CIFAR100")
    again = common.load_data("cifar100", tmp_path)
    assert torch.equal(first.x_train, again.x_train)
    # the names are torchvision's own, "0 - zero" for a digit
    assert first.classes == again.classes == ["0", "1", "2"] and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------
# Batches


def whole_epoch(data, batch_size, seed, stage, epoch):
    parts = list(common.batches(data, batch_size, seed, stage, epoch))
    return torch.cat([x for x, _ in parts]), torch.cat([labels for _, labels in parts])


def test_batches_depend_on_seed_stage_and_epoch_alone():
    data = common.load_data("shapes", train_subset=100)
    x, labels = whole_epoch(data, 32, 0, "student", 3)
    assert x.shape == (100, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    torch.rand(7)  # the global generator is moved: it must not matter
    for batch_size, stage in ((32, "student"), (7, "student"), (32, "student-alone")):
        other_x, other_labels = whole_epoch(data, batch_size, 0, stage, 3)
        assert torch.equal(x, other_x) and torch.equal(labels, other_labels)
    for seed, stage, epoch in ((0, "student", 4), (1, "student", 3), (0, "teacher", 3)):
        assert not torch.equal(x, whole_epoch(data, 32, seed, stage, epoch)[0])


def test_every_image_comes_once_an_epoch_cropped_and_flipped_as_one_of_its_162_views():
    data = common.load_data("shapes", train_subset=20)
    padded = F.pad(data.x_train.permute(0, 3, 1, 2).float() / 255, (4, 4, 4, 4))
    views = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, C, 9, 9, 32, 32)
    seen = []
    for x, labels in common.batches(data, 6, 0, "student", 0):
        for image, label in zip(x, labels):
            found = torch.zeros(20, dtype=torch.bool)
            for mirrored in (image, image.flip(-1)):
                equal = (views == mirrored[:, None, None]).all(-1).all(-1).all(1)  # (N, 9, 9)
                found |= equal.flatten(1).any(1)
            assert found.sum() == 1 and data.y_train[found] == label
            seen.append(found.nonzero().item())
    assert sorted(seen) == list(range(20))


def test_without_augmentation_images_are_as_they_are():
    data = common.load_data("shapes", train_subset=20, augment="none")
    own = {image.numpy().tobytes() for image in data.x_train}
    x, _ = whole_epoch(data, 6, 0, "student", 0)
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1)
    assert {image.contiguous().numpy().tobytes() for image in pixels} == own


def gradient(model, x, labels):
    loss = F.cross_entropy(model(x), labels)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, model.parameters())])


@pytest.mark.parametrize("batch_size", [32, 10, 3])
def test_any_split_of_a_batch_has_the_gradient_of_the_whole(batch_size, monkeypatch):
    data = common.load_data("shapes", train_subset=33)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    shares = []
    for rank in range(4):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(common.batches(data, batch_size, 0, "student", 0)))
    monkeypatch.delenv("WORLD_SIZE")
    for step, (x, labels) in enumerate(common.batches(data, batch_size, 0, "student", 0)):
        parts = [share[step] for share in shares]
        assert all(len(x_part) > 0 for x_part, _ in parts)
        # as average_gradients weighs them
        images = sum(len(x_part) for x_part, _ in parts)
        together = sum(len(x_part) * gradient(model, x_part, y) for x_part, y in parts) / images
        torch.testing.assert_close(together, gradient(model, x, labels), atol=1e-6, rtol=1e-5)
        if len(x) >= 4:
            for rank, (x_part, labels_part) in enumerate(parts):
                assert torch.equal(x_part, x[rank::4])
                assert torch.equal(labels_part, labels[rank::4])
