"""Training trajectories: numbers against hand-made ones, errors, one run from end to end."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import images

import common
import robust_kd
from benchmark import run as benchmark_run
from benchmark import trajectories

N_TRAIN, N_TEST = 30, 10
EASY = np.arange(N_TEST)[
    ::-1
]  # the images by difficulty in the runs made here: the last is easiest


def log_probs(probs):
    """Lists (E, N) of probabilities as the recorder keeps them."""
    return torch.tensor(np.asarray(probs)).log().to(torch.float16)


def recorded(epochs, shift=0.0, test=N_TEST, train=N_TRAIN):
    """Trajectories in which a later image is easier, all of them get easier by the epoch."""
    rise = np.linspace(0.5, 1, epochs)[:, None]
    parts = {
        name: rise * np.linspace(0.3, 0.8, n) for name, n in [("train", train), ("test", test)]
    }
    parts["adv"] = parts["test"] / 2
    kept = {name: log_probs(part + shift) for name, part in parts.items()}
    return kept | {"entropy": torch.linspace(2, 1, epochs)}


@pytest.fixture(scope="module")
def images_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "two.npz"
    arrays = images.make_shapes(N_TRAIN, N_TEST)
    arrays |= {key: arrays[key] % 2 for key in ("y_train", "y_test")}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def make(tmp_path, images_file):
    """make(name, student, teacher) -> a run's folder; {}: without trajectories, None: no file."""

    def make(name, student, teacher=None, **config):
        folder, model = tmp_path / name, common.build_model("mlp-2", 2)
        flags = {"data": images_file, "val_size": 0, "train_subset": None, "test_subset": None}
        fingerprint = common.load_data(images_file).fingerprint
        for file, kept in (("student.pt", student), ("teacher.pt", teacher)):
            if kept is not None:
                meta = {"trajectories": kept} if kept else {}
                common.save_model(folder / file, model, meta)
        config = {"flags": flags, "fingerprint": fingerprint} | config
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


# ------------------------------------------------------------------------------------------------
# The numbers


def test_difficulty_is_the_mean_cross_entropy_and_ranks_the_images():
    logits = torch.randn(4, 7, 3)  # epochs, images, classes
    labels = torch.randint(3, (7,))
    each = [torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in logits]
    right = logits.log_softmax(2)[:, torch.arange(7), labels].numpy()
    score = trajectories.difficulty(right)
    np.testing.assert_allclose(score, torch.stack(each).mean(0), rtol=1e-5)
    assert list(trajectories.ranked(score)) == sorted(range(7), key=lambda i: score[i])


def test_cosine_of_equal_proportional_orthogonal_and_other_trajectories():
    student = np.log([[0.1, 0.2, 1.0, 0.3, 0.4], [0.4, 0.4, 1e-300, 0.4, 0.2]])
    teacher = np.log([[0.1, 0.4, 1e-300, 0.4, 0.9], [0.4, 0.8, 1.0, 0.3, 0.3]])
    expected = [1, 1, 0, 24 / 25, 0.42 / (0.2 * 0.9) ** 0.5]
    np.testing.assert_allclose(trajectories.cosine(student, teacher), expected, atol=1e-9)
    np.testing.assert_allclose(trajectories.cosine(teacher, student), expected, atol=1e-9)


def test_cosine_of_vanishing_probabilities_is_a_number():
    tiny = np.array([[-2000.0], [-2000.0]])  # exp() is 0
    np.testing.assert_allclose(trajectories.cosine(tiny, np.log([[0.5], [0.5]])), [1])


def test_cosine_with_an_early_stopped_teacher_is_over_its_epochs():
    full = np.log(np.random.default_rng(0).uniform(0.1, 1, (9, 5)))
    other = np.log(np.random.default_rng(1).uniform(0.1, 1, (9, 5)))
    short = trajectories.cosine(full, other[:4])
    np.testing.assert_array_equal(short, trajectories.cosine(full[:4], other[:4]))
    assert not np.allclose(short, trajectories.cosine(full, other))


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_smooth_is_the_mean_of_the_neighbours_that_there_are(window):
    values = np.random.default_rng(0).normal(size=12)
    expected = []
    for i in range(12):
        places = range(i - window // 2, i - window // 2 + window)
        expected.append(np.mean([values[j] for j in places if 0 <= j < 12]))
    np.testing.assert_allclose(trajectories.smooth(values, window), expected)


def test_quintiles_are_by_difficulty_and_each_kind_has_its_own():
    values = {"difficulty": -EASY, "cosine": EASY / 10, "teacher": EASY / 10, "change": 0 * EASY}
    turned = values | {"difficulty": EASY}
    rows = trajectories.quintiles({"natural": values, "adversarial": turned})
    assert [row["nat. p_T"] for row in rows] == "0.850 0.650 0.450 0.250 0.050 0.450".split()
    assert [row["adv. p_T"] for row in rows] == "0.050 0.250 0.450 0.650 0.850 0.450".split()
    assert rows[0]["images"] == "easiest fifth" and rows[4]["images"] == "hardest fifth"


def test_extremes_are_of_each_class_the_extreme_one_first():
    found = trajectories.extremes(np.array([5, 1, 4, 2, 3, 0]), np.array([0, 0, 0, 1, 1, 1]), 2)
    assert [[list(part) for part in pair] for pair in found] == [[[1, 2], [0, 2]], [[5, 3], [4, 3]]]


def test_a_sheet_has_the_images_in_rows_of_eight():
    x = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    found = trajectories.sheet(x)
    assert found.shape == (8, 32, 3) and (found[1:3, 29:31] == 7).all()
    assert (found[5:7, 1:3] == 8).all() and (found[4:, 4:] == 255).all()


# ------------------------------------------------------------------------------------------------
# The program


def test_tables_numbers_and_pictures_of_two_runs(make, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a = make("a", recorded(4, shift=0.1), recorded(4))
    b = make("b", recorded(4), recorded(2))  # stopped early
    out = tmp_path / "out"
    trajectories.main([a, b, "--labels", "all", "stopped", "--window", "3", "--out", str(out)])
    text = capsys.readouterr().out
    assert "stopped: student of 4 epochs, teacher of 2; cosine over the first 2" in text
    found = json.loads((out / "trajectories.json").read_text())
    ours = found["runs"]["all"]["natural"]
    assert list(np.argsort(ours["difficulty"])) == list(EASY)
    np.testing.assert_allclose(ours["change"], 0.1, atol=2e-3)  # float16
    np.testing.assert_allclose(ours["teacher"], np.linspace(0.3, 0.8, N_TEST), atol=2e-3)
    np.testing.assert_allclose(found["runs"]["stopped"]["adversarial"]["change"], 0, atol=2e-3)
    assert found["runs"]["all"]["entropy"]["student"] == pytest.approx([2, 5 / 3, 4 / 3, 1], 1e-4)
    labels = images.make_shapes(N_TRAIN, N_TEST)["y_train"] % 2
    assert found["images"][1]["easiest"] == [i for i in range(N_TRAIN)[::-1] if labels[i] == 1]
    names = ["comparison.png", "images.png", "run-all.png", "run-stopped.png", "trajectories.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names[:-1])


def test_another_model_ranks_or_is_compared_with(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no pictures: it is faster
    turned = {name: values.flip(-1) for name, values in recorded(3).items()}
    a, other = make("a", recorded(4), recorded(4)), make("other", turned)
    found = []
    for flags in (["--difficulty-of", f"{other}/student.pt"], ["--teacher", f"{other}/student.pt"]):
        trajectories.main([a, "--images", "0", *flags])
        text = (tmp_path / "a" / "trajectories" / "trajectories.json").read_text()
        found.append(json.loads(text)["runs"]["a"]["natural"])
    assert list(np.argsort(found[0]["difficulty"])) == list(EASY[::-1])
    np.testing.assert_allclose(found[0]["change"], 0, atol=1e-6)
    np.testing.assert_allclose(found[1]["change"], np.linspace(-0.5, 0.5, N_TEST), atol=2e-3)


def test_without_matplotlib_there_are_tables_and_numbers(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trajectories.main([make("a", recorded(2), recorded(2))])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "a/trajectories").iterdir()] == ["trajectories.json"]


def test_a_run_without_teacher_has_entropies_and_images(make, tmp_path, capsys):
    trajectories.main([make("a", recorded(2))])
    assert "a: no teacher to compare with" in capsys.readouterr().out
    found = json.loads((tmp_path / "a/trajectories/trajectories.json").read_text())
    assert len(found["images"]) == 2 and found["runs"]["a"]["table"] is None


def test_what_does_not_fit_is_refused_and_nothing_is_written(make, refused, tmp_path):
    main, a = trajectories.main, make("a", recorded(2), recorded(2))
    fewer = make("fewer", recorded(2, test=9), recorded(2, test=9))
    assert "nowhere: not the folder of a run" in refused(main, [str(tmp_path / "nowhere")])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    assert "its run is not finished" in refused(main, [str(tmp_path / "half")])
    without = refused(main, [make("b", recorded(2), {})])
    assert "teacher.pt: has no trajectories; train with --trajectories" in without
    assert "fewer: was trained on other images" in refused(main, [a, fewer])
    other = make("c", recorded(2), fingerprint=1)
    assert "c: was trained on other images" in refused(main, [a, other])
    assert "--data-root" in refused(main, [other])
    message = refused(main, [a, "--difficulty-of", f"{fewer}/student.pt"])
    assert "--difficulty-of" in message and "30 training and 9 test images" in message
    assert "no such checkpoint" in refused(main, [a, "--teacher", "nowhere.pt"])
    assert "--window: expected" in refused(main, [a, "--window", "0"])
    assert "--labels" in refused(main, [a, a])
    assert "fewer than 5" in refused(main, [make("few", recorded(2, test=4))])
    assert "--out" in refused(main, [a, "--out", f"{a}/config.json"])
    assert not list(tmp_path.rglob("trajectories*"))


def test_planes_and_cars_are_the_first_two_classes(tmp_path, refused):
    rng = np.random.default_rng(0)
    arrays = {f"x_{p}": rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for p, n in PARTS}
    arrays |= {f"y_{p}": np.arange(n) % 10 for p, n in PARTS}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    benchmark_run.main(["--prepare", "--data", str(tmp_path)])
    data = common.load_data(str(tmp_path / "planes-cars.npz"))
    assert data.classes == ["airplane", "automobile"]
    assert data.y_train.tolist() == [0, 1, 0, 1] and data.y_test.tolist() == [0, 1, 0]
    assert (data.x_test[2].numpy() == arrays["x_test"][10]).all()
    assert "cifar10.npz" in refused(benchmark_run.main, ["--prepare", "--data", f"{tmp_path}/no"])


PARTS = [("train", 20), ("test", 11)]
SMALL = "--val-size 0 --steps 1 --epochs 3 --batch-size 20 --teacher-batch-size 20 --eval-steps 1 "
SMALL += "--teacher-epochs 2 --model mlp-8 --loss akd --trajectories --device cpu --name t"


def test_a_run_from_end_to_end(images_file, tmp_path, capsys):
    robust_kd.main([*SMALL.split(), "--data", images_file, "--runs", str(tmp_path)])
    folder = tmp_path / "robust_kd" / "t-s0"
    trajectories.main([str(folder), "--out", str(tmp_path)])
    assert "student of 3 epochs, teacher of 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "trajectories.json").read_text())["runs"]["t-s0"]
    assert [len(found["entropy"][key]) for key in ("student", "teacher")] == [3, 2]
    data, p = common.load_data(images_file), {}
    for name in ("student", "teacher"):
        model, _ = common.load_model(folder / f"{name}.pt")
        probs = model(common.to_float(data.x_test)).softmax(1).detach().numpy()
        p[name] = probs[np.arange(N_TEST), data.y_test]
    np.testing.assert_allclose(found["natural"]["teacher"], p["teacher"], atol=2e-3)  # float16
    np.testing.assert_allclose(found["natural"]["change"], p["student"] - p["teacher"], atol=4e-3)
    assert np.mean(found["adversarial"]["teacher"]) < np.mean(p["teacher"])
