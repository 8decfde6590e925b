"""Accuracy under published and generated corruptions; CINIC-10 and other images from files."""

import numpy as np
import pytest
import torch
from conftest import textured

import common
import images as part


class Brightness(torch.nn.Module):
    """Class 1 for bright images, else class 0: an answer that can be worked out by hand."""

    def forward(self, x):
        score = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], 1)


@pytest.fixture
def official(tmp_path):
    """A folder in the official layout: 40 images; severity s of a corruption is known."""
    x = textured(40)
    y = (x.float().mean((1, 2, 3)) > 127.5).long()
    y[:10] = 1 - y[:10]  # the model is wrong on ten
    for name in part.CORRUPTIONS:
        sets = [part.corrupt(x, "gaussian_blur", 1)] * 5
        if name == "fog":
            sets[4] = torch.zeros_like(x)  # all dark: right only where the label is 0
        np.save(tmp_path / f"{name}.npy", torch.cat(sets).numpy())
    np.save(tmp_path / "labels.npy", np.tile(y.numpy(), 5))
    return tmp_path, x, y


def test_official_files_give_accuracy_and_the_papers_conditional_form(official):
    folder, x, y = official
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    seen = []
    result = part.corruption_accuracy(
        Brightness(), x[order], y[order], folder, batch_size=7, save=lambda d: seen.append(len(d))
    )
    assert result["clean_acc"] == pytest.approx(0.75) and result["n"] == 40
    assert seen == list(range(1, 20))
    clean = (x.float().mean((1, 2, 3)) > 127.5).long() == y
    dark = (y == 0).double().mean().item()
    both = ((y == 0) & clean).sum().item() / clean.sum().item()
    assert result["corruptions_acc"]["fog"][4] == pytest.approx(dark)
    assert result["conditional_acc"]["fog"][4] == pytest.approx(both)
    flat = [v for name in part.CORRUPTIONS for v in result["conditional_acc"][name]]
    assert result["mca_acc"] == pytest.approx(np.mean(flat))
    first = [v for name in list(part.CORRUPTIONS)[:15] for v in result["corruptions_acc"][name]]
    assert result["mean15_acc"] == pytest.approx(np.mean(first))
    assert len(result["note"]) < 40
    few = part.corruption_accuracy(Brightness(), x[y == 0][:5], y[y == 0][:5], folder)
    assert few["n"] == 5 and few["clean_acc"] is not None  # the files hold more classes


def test_images_that_are_not_those_of_the_files_leave_the_conditional_form_out(official):
    folder, _, _ = official
    x = textured(12, seed=9)
    y = torch.arange(12) % 2
    result = part.corruption_accuracy(Brightness(), x, y, folder)
    assert result["conditional_acc"] is None and result["mca_acc"] is None
    assert "conditional" in result["note"] and result["n"] == 40


def test_generated_sets_resume_and_name_the_frost_textures(shapes):
    x = shapes[0][:30]
    y = torch.arange(30) % 2
    weights = torch.randn(2, 3072, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2, bias=False))
    model[1].weight.data = weights - weights.mean(1, keepdim=True)
    states = []
    full = part.corruption_accuracy(
        model, x, y, batch_size=4, save=lambda d: states.append(dict(d))
    )
    again = part.corruption_accuracy(model, x, y, done=dict(states[8]))
    assert again == full  # in other batches, from the ninth corruption on
    faked = {name: [[0, 0]] * 5 for name in states[8]}
    again = part.corruption_accuracy(model, x, y, done=faked)
    assert sum(map(sum, again["corruptions_acc"].values())) == pytest.approx(
        sum(sum(v) for k, v in full["corruptions_acc"].items() if k not in states[8])
    )
    rows = part.corruption_rows(full)
    assert len(common.table(rows).splitlines()) == 2 + 19 and len(rows[0]) == 8
    assert "frost" in full["note"] and 0 <= full["mean18_acc"] <= 1 and "mca18_acc" in full
    rest = [np.mean(v) for k, v in full["corruptions_acc"].items() if k != "frost"]
    assert full["mean18_acc"] == pytest.approx(np.mean(rest))


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda f: (f / "fog.npy").unlink(), "fog.npy"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy"),
        (lambda f: np.save(f / "snow.npy", np.zeros((200, 32, 32, 1), np.uint8)), "snow.npy"),
        (lambda f: np.save(f / "snow.npy", np.zeros((200, 32, 32, 3), np.float32)), "float32"),
        (lambda f: (f / "frost.npy").write_bytes((f / "frost.npy").read_bytes()[:5000]), "frost"),
        (lambda f: np.save(f / "labels.npy", np.arange(200) % 2 + np.arange(200) // 200), None),
        (lambda f: np.save(f / "labels.npy", np.arange(200) // 100), "labels.npy"),
        (lambda f: np.save(f / "labels.npy", np.full(200, 7)), "labels 0..1"),
    ],
)
def test_a_broken_folder_of_corruptions_is_one_line_with_status_2(official, break_it, word, capsys):
    folder, _, _ = official
    break_it(folder)
    if word is None:  # 0 1 0 1 ..., five times over, is a fine label file
        part.read_corruptions(folder, 2)
        return
    with pytest.raises(SystemExit) as error:
        part.read_corruptions(folder, 2)
    message = capsys.readouterr().err
    assert error.value.code == 2 and word in message and message.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Other data


def save_image(path, level, size=32):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(path)


@pytest.fixture
def cinic(tmp_path):
    """Two classes, three splits, four ImageNet images (level 100 + class) and two CIFAR ones."""
    for split in ("train", "valid", "test"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(4):
                save_image(tmp_path / split / name / f"n0123456{k}_{i}.png", 100 + k)
            for i in range(2):
                save_image(tmp_path / split / name / f"cifar-10-{split}-{i}.png", 200)
    return tmp_path


def test_cinic_keeps_only_images_named_by_imagenet_with_labels_by_class_name(cinic):
    x, labels, _ = part.load_ood(cinic, ["dog", "cat"], cinic=True)
    assert x.shape == (24, 32, 32, 3) and x.dtype == torch.uint8
    assert (x[:, 0, 0, 0] == torch.where(labels == 0, 101, 100)).all()
    assert labels.bincount().tolist() == [12, 12]


def test_cinic_per_class_is_a_fixed_choice_for_a_seed(cinic):
    runs = [part.load_ood(cinic, ["cat", "dog"], 5, seed, cinic=True) for seed in (0, 0, 1)]
    assert [run[1].bincount().tolist() for run in runs] == [[5, 5]] * 3
    assert runs[0][2] == runs[1][2] != runs[2][2]  # the hash of the list
    whole = part.load_ood(cinic, ["cat", "dog"], 12, cinic=True)
    assert whole[2] == part.load_ood(cinic, ["cat", "dog"], cinic=True)[2]


def test_folders_and_npz_files_of_other_images_are_read(tmp_path):
    save_image(tmp_path / "a" / "dog" / "1.png", 9)
    save_image(tmp_path / "a" / "cat" / "2.jpg", 50)
    x, labels, _ = part.load_ood(tmp_path / "a", ["cat", "dog", "owl"])
    assert labels.tolist() == [0, 1] and x[1, 0, 0].tolist() == [9, 9, 9]
    np.savez(tmp_path / "b.npz", x_test=x.numpy(), y_test=np.array([2, 0]))
    again, labels, _ = part.load_ood(tmp_path / "b.npz", ["cat", "dog", "owl"])
    assert torch.equal(again, x) and labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    "break_it, options, word",
    [
        (lambda f: (f / "train" / "owl").mkdir(), {}, "owl"),
        (lambda f: [p.unlink() for p in (f / "test" / "cat").glob("n*")], {}, "empty"),
        (lambda f: save_image(f / "test" / "cat" / "n00000000_1.png", 1, 40), {}, "40"),
        (lambda f: save_image(f / "test" / "cat" / "photo.png", 1), {}, "photo"),
        (lambda f: (f / "test" / "cat" / "n00000000_1.png").write_bytes(b""), {}, "n00000000_1"),
        (lambda f: (f / "valid").rename(f / "other"), {}, "valid"),
        (lambda f: None, {"per_class": 13}, "12 images"),
    ],
)
def test_a_broken_cinic_folder_is_one_line_with_status_2(cinic, break_it, options, word, capsys):
    break_it(cinic)
    with pytest.raises(SystemExit) as error:
        part.load_ood(cinic, ["cat", "dog"], cinic=True, **options)
    message = capsys.readouterr().err
    assert error.value.code == 2 and word in message and message.count("\n") == 1


def test_missing_and_foreign_files_of_other_images_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "c.npz", x_test=np.zeros((2, 28, 28, 3), np.uint8), y_test=np.zeros(2, int))
    np.savez(tmp_path / "d.npz", x=np.zeros(1))
    (tmp_path / "e.npz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    for name in ("none", "none.npz", "c.npz", "d.npz", "e.npz", "empty"):
        with pytest.raises(SystemExit) as error:
            part.load_ood(tmp_path / name, ["cat", "dog"])
        message = capsys.readouterr().err
        assert error.value.code == 2 and name in message and message.count("\n") == 1
