"""Data sets: read, checked, held out, shuffled and augmented."""

import codecs
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import read_only
from PIL import Image, ImageOps

import common
import messy_collab
import robust_kd


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


@pytest.mark.parametrize("order", ["<", ">"])
def test_class_names_of_bytes_that_are_no_letters_are_refused(order, tmp_path, refused):
    names = np.frombuffer(b"\xff" * 36, dtype=f"{order}U3")  # Python stops at 0x10FFFF
    path = saved(tmp_path / "a.npz", classes=names)
    assert f"{path}: expected an .npz" in refused(common.load_data, path)
    names = np.array(["p", "", "\U0001f431"]).astype(f"{order}U3")
    assert common.load_data(saved(path, classes=names)).classes == ["p", "", "\U0001f431"]


def test_class_names_of_bytes_are_their_letters(tmp_path):
    """As CIFAR's own files have them, read with encoding="bytes"."""
    path = saved(tmp_path / "a.npz", classes=np.array([b"airplane", b"cat", b"dog"]))
    assert common.load_data(path).classes == ["airplane", "cat", "dog"]


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
        "whole numbers": saved(tmp_path / "half.npz", y_train=np.arange(40) % 3 / 1.0),
        "labels 0..K-1, got int64 (40,) from -1 to 1": saved(
            tmp_path / "minus.npz", y_train=np.arange(40) % 3 - 1
        ),
        "labels reach 7, classes 3": saved(tmp_path / "new.npz", y_test=np.full(10, 7)),
        "pickle": saved(tmp_path / "object.npz", x_train=objects),
        "class folders": str(tmp_path),
    }
    for expected, name in cases.items():
        assert expected in refused(common.load_data, name), expected
    for sizes in ({"val_size": 41}, {"test_subset": 11}, {"train_subset": 31, "val_size": 10}):
        message = refused(common.load_data, whole, **sizes)
        assert "too large" in message and "40 training and 10 test images" in message
        for flag, value in sizes.items():
            assert f"--{flag.replace('_', '-')}" in message and str(value) in message


def test_too_few_images_for_the_default_of_val_size_name_it(tmp_path, refused):
    path = saved(tmp_path / "a.npz")
    message = refused(robust_kd.main, ["--data", path, "--runs", str(tmp_path / "runs")])
    assert message.startswith("--val-size 1024: too large") and "1024 by default" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", ["x_train", "x_test"])
def test_arrays_of_images_of_another_depth_are_refused_with_the_remedy(part, tmp_path, refused):
    x = tiny()[part]
    cases = [
        (x // 128, "multiply by 255"),  # uint8, 0 and 1 alone
        (x // 128 > 0, "from 0 to 1; scale to 0 to 255"),  # bool
        (x / 255, "from 0 to 1; scale to 0 to 255"),
        (x.astype(np.float32), "from 0 to 255; scale to 0 to 255, round and convert to uint8"),
        (x.astype(np.int64), "round and convert to uint8"),
        (x.astype(np.uint16) * 16, "scale to 0 to 255"),
        (x.astype(np.int8), "scale to 0 to 255"),
        (x / 127.5 - 1, "scale to 0 to 255"),
    ]
    for array, remedy in cases:
        message = refused(common.load_data, saved(tmp_path / "a.npz", **{part: array}))
        assert part in message and remedy in message, (array.dtype, message)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_type_and_in_one_column_are_taken(dtype, tmp_path):
    arrays = tiny()
    columns = {part: arrays[part].astype(dtype)[:, None] for part in ("y_train", "y_test")}
    data = common.load_data(saved(tmp_path / "a.npz", **columns))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == arrays["y_train"].tolist()
    assert data.y_test.tolist() == arrays["y_test"].tolist()


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_images_of_other_depths_keep_their_256_levels(tmp_path):
    deep = LEVELS.astype(np.uint16) * 257  # 255 becomes 65535
    opaque = np.stack([LEVELS, np.full_like(LEVELS, 255)], axis=-1)
    (tmp_path / "deep.pgm").write_bytes(b"P5 16 16 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(LEVELS).save(tmp_path / "grey.png")
    Image.fromarray(LEVELS).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    for file in tmp_path.iterdir():
        x = common.read_image(file)
        assert x.dtype == np.uint8 and x.shape == (16, 16, 3), file.name
        assert (x == LEVELS[..., None]).all(), file.name
    Image.fromarray(LEVELS > 100).save(tmp_path / "bits.png")
    bits = common.read_image(tmp_path / "bits.png")
    assert (bits == 255 * (LEVELS > 100)[..., None]).all()


@pytest.mark.parametrize(
    "array, name, remedy",
    [
        (LEVELS / np.float32(255), "float.tif", "convert it to 8 bits"),
        (LEVELS.astype(np.int32) * 2**16, "deep.tif", "convert it to 8 bits"),
        (LEVELS.astype(np.int32), "shallow.tif", "convert it to 8 bits"),
        (np.stack([LEVELS] * 4, axis=-1), "rgba.png", "transparent pixels; paint it"),
        (np.stack([LEVELS] * 2, axis=-1), "grey.png", "transparent pixels; paint it"),
    ],
)
def test_images_without_a_certain_black_and_white_are_refused(
    array, name, remedy, tmp_path, refused
):
    Image.fromarray(array).save(tmp_path / name)
    message = refused(common.read_image, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and remedy in message


def test_images_that_are_to_be_turned_are_refused_or_turned(tmp_path, refused):
    picture, exif = Image.fromarray(LEVELS), Image.Exif()
    for orientation in range(9):  # 0 is no value of the standard
        exif[0x0112] = orientation
        for file in (tmp_path / "a.png", tmp_path / "a.tif"):
            picture.save(file, exif=exif)
        if orientation < 2:
            assert (common.read_image(tmp_path / "a.png")[..., 0] == LEVELS).all()
        else:
            message = refused(common.read_image, tmp_path / "a.png")
            assert "EXIF asks to turn or mirror it" in message
        upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.tif"))
        assert (common.read_image(tmp_path / "a.tif")[..., 0] == np.asarray(upright)).all()
    picture.save(tmp_path / "damaged.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (common.read_image(tmp_path / "damaged.png")[..., 0] == LEVELS).all()


def test_images_in_a_sequence_and_deep_ones_with_a_transparent_grey_are_refused(tmp_path, refused):
    picture = Image.fromarray(LEVELS)
    for file in (tmp_path / "a.png", tmp_path / "a.tif"):
        picture.save(file, save_all=True, append_images=[picture.rotate(90)])
        assert "holds several images" in refused(common.read_image, file)
    deep = Image.fromarray(LEVELS.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", transparency=0)
    assert "convert it to 8 bits" in refused(common.read_image, tmp_path / "deep.png")


def save_images(folder, *names):
    """Random colour images of 8 x 8 pixels below train/ and test/ of a folder."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in names:
            file = folder / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)


def test_one_line_says_what_is_in_a_folder_and_hidden_files_are_left_out(tmp_path, capsys):
    names = ("cat/0.png", "cat/1.PNG", "cat-2/0.bmp", "cat/more/0.png")
    hidden = (".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/._0.png", "cat/.old/1.png")
    save_images(tmp_path, *names, *hidden)
    for name in ("train/cat/Thumbs.db", "train/list.txt", "README", "val/cat/0.png", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    data = common.load_data(str(tmp_path))
    assert data.classes == ["cat", "cat-2"] and data.y_train.tolist() == [0, 0, 0, 1]
    assert capsys.readouterr().out == (
        f"{tmp_path}: 4 training and 4 test images of 8 x 8 pixels, colour; 2 classes (cat, cat-2) "
        "of 1 to 3 training images; 4 other files left out\n"
    )


def test_the_line_says_what_is_unexpected_in_arrays(tmp_path, capsys):
    x = np.zeros((24, 8, 8), np.uint8)
    x[0] = 16
    white = np.full_like(x, 255)
    y = np.arange(24) % 12 + 1  # 1 to 12: class 0 has no image
    common.load_data(saved(tmp_path / "b.npz", x_train=white, y_train=y, x_test=x, y_test=y))
    assert "; no pixel of the test images above 16, where 255 is white" in capsys.readouterr().out
    common.load_data(saved(tmp_path / "a.npz", x_train=x, y_train=y, x_test=white, y_test=y))
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.npz: 24 training and 24 test images of 8 x 8 pixels, grey; 13 classes "
        "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...) of 0 to 2 training images; no training image of 0; no "
        "pixel of the training images above 16, where 255 is white; random crops and flips with "
        "--augment crop alone\n"
    )


def test_one_class_is_refused_before_anything_is_written(tmp_path, refused):
    save_images(tmp_path / "d", "cat/0.png", "cat/1.png")
    ones = saved(tmp_path / "a.npz", y_train=np.ones(40, int), y_test=np.ones(10, int))
    for name, only in ((str(tmp_path / "d"), "cat"), (ones, "1")):
        flags = f"--data {name} --val-size 0 --method flc-s --corruption-rate 0.5 --runs"
        message = refused(messy_collab.main, [*flags.split(), str(tmp_path / "runs")])
        assert message.startswith(f"{name}: ") and f"one class, {only};" in message
    assert not (tmp_path / "runs").exists()


def test_augment_means_the_same_by_name_by_path_and_in_a_folder(tmp_path):
    grey, colour = tiny(channels=1), tiny()
    np.savez(tmp_path / "mnist.npz", **grey)
    np.savez(tmp_path / "cifar10.npz", **colour)
    for part in ("train", "test"):
        for k, image in enumerate(grey[f"x_{part}"][:4]):
            file = tmp_path / "folder" / part / str(k % 2) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)  # read as three channels that are equal
    digits = ("mnist", str(tmp_path / "mnist.npz"), str(tmp_path / "folder"))
    for names, default in ((digits, False), (("cifar10", str(tmp_path / "cifar10.npz")), True)):
        for name in names:
            for augment, crops in ((None, default), ("crop", True), ("none", False)):
                data = common.load_data(name, tmp_path, augment=augment)
                assert data.flip == crops and data.pad == 4 * crops, (name, augment)
            assert common.load_data(name, tmp_path, augment="cutout").flip == default
    assert robust_kd.parse_args([]).augment is None


def test_all_that_the_data_decide_of_a_teacher_is_in_its_digest(tmp_path):
    args = robust_kd.parse_args(["--runs", str(tmp_path), "--model", "mlp-8"])
    args.seed = 0
    data = common.load_data(saved(tmp_path / "a.npz"), train_subset=20)
    original = common.teacher_folder(args, data)
    assert common.teacher_folder(args, dataclasses.replace(data)) == original
    changes = {"pad": 0, "flip": False, "fingerprint": 1, "mean": [0.5] * 3, "std": [1.0] * 3}
    for name, value in (changes | {"classes": ["0", "1", "2", "3"]}).items():
        changed = dataclasses.replace(data, **{name: value})
        assert common.teacher_folder(args, changed) != original, name


def test_a_read_only_root_is_read_and_the_converted_file_goes_beside_the_runs(
    public_folder, capsys
):
    import torchvision.datasets  # noqa: F401  (read_only may take away the right to read it)

    codecs.lookup("hex")  # which torchvision uses: for the same reason
    root, runs = public_folder / "root", public_folder / "runs"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 40), ("t10k", 10)):
        sizes = np.array([n, 28, 28], dtype=">i4").tobytes()
        x, y = np.arange(n * 784) % 251, np.arange(n) % 10
        images = b"\0\0\x08\x03" + sizes + x.astype(np.uint8).tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = b"\0\0\x08\x01" + sizes[:4] + y.astype(np.uint8).tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    with read_only(root):
        first = common.load_data("mnist", root, runs=runs)
        out = capsys.readouterr().out
        assert f"{root} is read-only: converted data are kept in {runs}/data\n" in out
        assert "from torchvision" in out
        again = common.load_data("mnist", root, runs=runs)
        assert "from torchvision" not in capsys.readouterr().out
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert [path.name for path in (runs / "data").iterdir()] == ["mnist.npz"]
    assert first.fingerprint == again.fingerprint and first.y_train.tolist()[:3] == [0, 1, 2]


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
    assert first.classes == again.classes == ["0", "1", "2"]
    assert "torchvision" not in capsys.readouterr().out


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


def test_held_out_and_test_images_are_a_fixed_choice(tmp_path):
    """Kept results are of these images: another choice would be another test."""
    arrays = tiny()
    sizes = {"val_size": 10, "train_subset": 5, "test_subset": 3}
    data = common.load_data(saved(tmp_path / "a.npz"), **sizes)
    order = np.random.default_rng(0).permutation(40)
    test = np.sort(np.random.default_rng(0).permutation(10)[:3])
    assert (data.x_val.numpy() == arrays["x_train"][order[:10]]).all()
    assert (data.x_train.numpy() == arrays["x_train"][np.sort(order[10:15])]).all()
    assert (data.x_test.numpy() == arrays["x_test"][test]).all()


# An image whose pixels tell where they came from: its row and its column, from 1
ROW = torch.arange(1, 33, dtype=torch.uint8)
PLACES = torch.stack(
    [ROW[:, None].expand(32, 32), ROW.expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)], -1
)


def counts_of_views(x):
    """How often each of the 162 crops and mirrorings of PLACES is among x (N, 3, 32, 32)."""
    x = (255 * x).round().long()
    flipped = x[:, 1, 16, 17] < x[:, 1, 16, 16]
    top = x[:, 0, 16, 16] - 13
    left = torch.where(flipped, x[:, 1, 16, 15], x[:, 1, 16, 16]) - 13
    return torch.bincount(81 * flipped + 9 * top + left, minlength=162)


@pytest.mark.parametrize("which", ["own", "generated"])
def test_all_views_of_an_image_are_drawn_alike(which):
    n, data = 8100, common.load_data("shapes", train_subset=2)
    x, labels = PLACES.expand(n, 32, 32, 3).contiguous(), torch.zeros(n, dtype=torch.long)
    if which == "own":
        data = dataclasses.replace(data, x_train=x, y_train=labels)
        images = whole_epoch(data, 1000, 0, "student", 0)[0]
    else:
        torch.manual_seed(0)
        data = dataclasses.replace(data, x_extra=x, y_extra=labels)
        images = robust_kd.draw_extra(data, n)[0]
    counts = counts_of_views(images)
    assert len(counts) == 162 and counts.sum() == n
    assert (counts - n / 162).abs().max() < 6 * (n / 162) ** 0.5


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
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(common.batches(data, batch_size, 0, "student", 0)))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
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
