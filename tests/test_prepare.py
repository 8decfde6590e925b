"""benchmark/prepare.py: data sets as .npz files, and how they are then read."""

import numpy as np
import pytest
from conftest import save_image
from PIL import Image

import common
import eval_robustness as ev
from benchmark import prepare


@pytest.fixture
def cinic(tmp_path):
    """CINIC-10 of two classes: in each part four images from ImageNet and two from CIFAR-10.

    Their grey levels: 100 and 101 for the classes, 200 for CIFAR-10.
    """
    folder = tmp_path / "CINIC-10"
    for part in ("train", "valid", "test"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(4):
                save_image(folder / part / name / f"n0123456{k}_{i}.png", 100 + k)
            for i in range(2):
                save_image(folder / part / name / f"cifar-10-{part}-{i}.png", 200)
    return folder


def test_of_cinic_only_images_from_imagenet_are_kept_with_labels_by_name(cinic, tmp_path, capsys):
    out = tmp_path / "cinic10.npz"
    prepare.main(["cinic10", str(cinic), "--data-root", str(tmp_path), "--per-class", "12"])
    assert "24 test images of 2 classes" in capsys.readouterr().out
    found = ev.load_other_images(out, ["dog", "cat"])
    assert found.x.shape == (24, 32, 32, 3) and found.labels.bincount().tolist() == [12, 12]
    assert (found.x[:, 0, 0, 0] == 100 + (found.labels == 0)).all()


def test_the_cinic_images_per_class_are_always_the_same_choice(cinic, tmp_path):
    notes = []
    for part in ("train", "valid", "test"):  # each image is another one
        for i, path in enumerate(sorted((cinic / part).rglob("n*.png"))):
            save_image(path, 10 * i + len(part))
    for number, per_class in enumerate((5, 5, 6)):
        out = tmp_path / f"{number}/cinic10.npz"
        flags = ["cinic10", str(cinic), "--data-root", str(out.parent)]
        prepare.main([*flags, "--per-class", str(per_class)])
        found = ev.load_other_images(out, ["cat", "dog"])
        assert found.labels.bincount().tolist() == [per_class] * 2
        notes.append(found.note)
    assert notes[0] == notes[1] != notes[2]
    chosen = np.random.RandomState(0).choice(12, 5, replace=False)  # as before there was a program
    files = []
    for part in ("train", "valid", "test"):
        files += sorted((cinic / part / "cat").glob("n*.png"))
    expected = [common.read_image(files[i])[0, 0, 0] for i in sorted(chosen)]
    assert np.load(tmp_path / "0/cinic10.npz")["x_test"][:5, 0, 0, 0].tolist() == expected


def test_a_net_is_evaluated_on_the_prepared_images_as_on_any_others(cinic, tmp_path):
    out = tmp_path / "cinic10.npz"
    prepare.main(["cinic10", str(cinic), "--data-root", str(tmp_path), "--per-class", "3"])
    rng = np.random.default_rng(0)
    arrays = {f"x_{p}": rng.integers(0, 256, (8, 32, 32, 3), "u1") for p in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(8) % 2 for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, classes=["cat", "dog"])
    common.save_model(tmp_path / "net.pt", common.build_model("mlp-8", classes=2))
    notes = set()
    for seed in (0, 1):
        flags = f"{tmp_path}/net.pt --data {tmp_path}/data.npz --attack clean cinic ood"
        flags += f" --cinic {out} --ood {out} --seed {seed} --json {tmp_path}/{seed}.json"
        ev.main(flags.split())
        (row,) = common.read_json(tmp_path / f"{seed}.json")["rows"]
        assert 0 <= row["cinic_acc"] == row["ood_acc"] <= 1
        notes |= {row["cinic_note"], row["ood_note"]}
    assert len(notes) == 1


@pytest.mark.parametrize(
    "damage, per_class, word",
    [
        (lambda f: save_image(f / "train" / "owl" / "n00000000_1.png", 1), 3, "class folders"),
        (lambda f: [p.unlink() for p in (f / "test" / "cat").glob("n*")], 3, "cat"),
        (lambda f: save_image(f / "test/cat/n01234560_1.png", 1, 40), 12, "40"),
        (lambda f: save_image(f / "test" / "cat" / "photo.png", 1), 3, "photo"),
        (lambda f: (f / "test/cat/n01234560_1.png").write_bytes(b""), 12, "n01234560_1"),
        (lambda f: (f / "valid").rename(f / "other"), 3, "valid"),
        (lambda f: None, 13, "--per-class 13: "),
        (lambda f: None, 13, "class cat has 12 images"),
    ],
)
def test_a_broken_cinic_folder_is_one_line(cinic, damage, per_class, word, tmp_path, refused):
    damage(cinic)
    flags = ["cinic10", str(cinic), "--data-root", str(tmp_path), "--per-class", str(per_class)]
    assert word in refused(prepare.main, flags)
    assert not (tmp_path / "cinic10.npz").exists()


def test_tiny_imagenet_is_made_from_its_official_folder(tmp_path, refused, capsys):
    folder = tmp_path / "tiny-imagenet-200"
    message = refused(common.load_data, "tiny-imagenet", tmp_path)
    assert message.startswith(f"--data tiny-imagenet: there is no {tmp_path}/tiny-imagenet.npz; ")
    assert message.endswith("benchmark/prepare.py makes it from the unpacked zip")
    flags = ["tiny-imagenet", str(folder), "--data-root", str(tmp_path)]
    assert "tiny-imagenet-200/train: expected class folders" in refused(prepare.main, flags)
    rng = np.random.default_rng(0)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for k, name in enumerate(["n02", "n01", "n03"]):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (64, 64, 3 if i else 1), dtype=np.uint8).squeeze()
            Image.fromarray(pixels).save(images / f"{name}_{i}.JPEG")  # some are grey
        image = Image.new("RGB", (64, 64), (80 * k, 0, 0))
        image.save(folder / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t62\t62")
    assert "tiny-imagenet-200: expected the unpacked" in refused(prepare.main, flags)
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    prepare.main(flags)
    data = common.load_data("tiny-imagenet", tmp_path)
    assert data.classes == ["n01", "n02", "n03"] and data.x_train.shape == (6, 64, 64, 3)
    assert data.y_train.tolist() == [0, 0, 1, 1, 2, 2] and data.y_test.tolist() == [1, 0, 2]
    assert data.x_test[2, 0, 0, 0] > 150
    prepare.main(flags)
    assert capsys.readouterr().out.endswith(f"{tmp_path}/tiny-imagenet.npz is there\n")


@pytest.mark.parametrize("flags", ["tiny-imagenet", "cifar10-16 folder", "cifar10-8"])
def test_a_wrong_name_or_folder_is_one_line(flags, refused):
    error = refused(prepare.parse_args, flags.split())
    assert error.startswith("NAME: " if "8" in flags else "FOLDER: ")


def test_data_sets_are_made_of_cifar10(tmp_path, refused):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 20), ("test", 11)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(tmp_path / "cifar10.npz", **arrays)
    for name in ("planes-cars", "cifar10-16"):
        prepare.main([name, "--data-root", str(tmp_path)])
    data = common.load_data(str(tmp_path / "planes-cars.npz"))
    assert data.classes == ["airplane", "automobile"]
    assert data.y_train.tolist() == [0, 1, 0, 1] and data.y_test.tolist() == [0, 1, 0]
    assert (data.x_test[2].numpy() == arrays["x_test"][10]).all()
    small = common.load_data(str(tmp_path / "cifar10-16.npz"))
    means = arrays["x_train"].reshape(20, 2, 2, 2, 2, 3).mean((2, 4)).round()
    assert (small.x_train.numpy() == means).all() and small.y_test.tolist() == [*range(10), 0]
    assert "cifar10.npz" in refused(prepare.main, ["cifar10-16", "--data-root", f"{tmp_path}/no"])
