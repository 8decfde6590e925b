"""benchmark/report_run.py: the page of a run says what the run and its net say, and is safe."""

import base64
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import common
import fickle_teacher
import messy_collab
import robust_kd
import soft_randomization
import teacher_free_kd
from benchmark import evaluation_attack, report_run

SMALL = "--data shapes --test-subset 60 --val-size 20 --batch-size 32 --model mlp-32 --device cpu"
SMALL_NOISY = f"{SMALL} --train-subset 60 --teacher-model mlp-8 --teacher-epochs 1 --epochs 1"
RUNS = {
    "robust_kd": (
        robust_kd,
        f"{SMALL} --train-subset 2000 --loss st --epochs 3 --lr 0.02 --eps 2/255",
    ),
    "ensemble": (
        robust_kd,
        f"{SMALL} --train-subset 60 --teacher-training at at --teacher-epochs 1 --epochs 1",
    ),
    "fickle_teacher": (fickle_teacher, SMALL_NOISY),
    "soft_randomization": (soft_randomization, SMALL_NOISY),
    "messy_collab": (messy_collab, f"{SMALL_NOISY} --method teacher"),
    "teacher_free_kd": (
        teacher_free_kd,
        f"{SMALL} --train-subset 60 --method re-kd --teacher-model mlp-8 --epochs 1",
    ),
}


class Page(HTMLParser):
    """What a browser finds in the source of a page: its tags, tables, images and text."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.tags, self.tables, self.images, self.text = [], [], [], ""
        self.in_cell = False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        elif tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *head):
        """The rows below the first table whose first line begins with `head`."""
        for first, *rows in self.tables:
            if first[: len(head)] == list(head):
                return rows
        raise AssertionError(head)

    def matrices(self):
        """The counts of the two confusion tables, with the sums in the last column."""
        found = []
        for first, *rows in self.tables:
            if first[0] == "true class" and first[-1] == "images" and len(first) > 3:
                found.append(np.array([[int(cell) for cell in row[1:]] for row in rows]))
        return found


def pixels(image):
    """The uint8 array in the address of an image of a page."""
    kind, text = image["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(name) -> the folder of that run of RUNS, trained once."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def call(name):
        if name not in folders:
            script, flags = RUNS[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(common, "draw_run", lambda *_: None)
                script.main([*flags.split(), "--runs", str(root), "--name", name])
            folders[name] = root / script.__name__ / f"{name}-s0"
        return folders[name]

    return call


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run robust_kd, in a folder of its own."""
    return shutil.copytree(finished("robust_kd"), tmp_path / "robust_kd" / "run-s0")


def page_of(folder, *flags):
    """The page that the program writes for the run in a folder."""
    out = folder.parent / "page.html"
    report_run.main([str(folder), "--out", str(out), *flags])
    return Page(out.read_text())


def rewrite(path, **values):
    """Replace values in a JSON file that holds a dict."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flags_of(run, **values):
    """Replace flags in config.json of a run."""
    config = json.loads((run / "config.json").read_text())
    rewrite(run / "config.json", flags=config["flags"] | values)


def data_and_net(folder):
    """The data and the student of the run robust_kd."""
    data = common.load_data("shapes", val_size=20, train_subset=2000, test_subset=60)
    return data, common.load_model(folder / "student.pt")


# ------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_every_script_has_a_page_with_its_numbers(finished, name):
    folder = finished(name)
    page = page_of(folder)
    rows = json.loads((folder / "summary.json").read_text())
    shown = page.table("model")
    assert [row[0] for row in shown] == [row["model"] for row in rows]
    columns = next(first for first, *_ in page.tables if first[0] == "model")
    nets = [row["net"] for row in rows]  # a field for programs, which is not shown
    assert len(set(nets)) == len(nets) and {"student", "teacher"} & set(nets)
    assert "net" not in columns
    clean, pgd = columns.index("clean"), [c for c in columns if re.fullmatch(r"PGD-\d+", c)]
    for cells, row in zip(shown, rows):
        assert cells[clean] == f"{100 * row['clean_acc']:.2f}"
        for column in pgd:
            number = row[f"pgd{column.removeprefix('PGD-')}_acc"]
            assert cells[columns.index(column)] == f"{100 * number:.2f}"
    net = rows[0] if name == "messy_collab" else rows[[r["file"] for r in rows].index("student.pt")]
    facts = {row[0]: row[1] for row in page.table("what", "value")}
    assert facts["attacked net"] == net["file"] and facts["data"] == "shapes"
    assert f"Clean images: {round(60 * net['clean_acc'])} of 60 right" in page.text
    assert len(page.images) == 3 * report_run.EXAMPLES
    assert "is refused" not in page.text


def test_the_page_needs_nothing_else(finished):
    page = page_of(finished("robust_kd"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    for tag, attributes in page.tags:
        assert "href" not in attributes and "srcset" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import", page.source)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")


def test_the_page_is_the_same_each_time_and_lies_in_the_folder_of_the_run(run, capsys):
    report_run.main([str(run), "--n", "20"])
    assert capsys.readouterr().out.endswith(f"written: {run / 'report.html'}\n")
    first = (run / "report.html").read_bytes()
    report_run.main([str(run), "--n", "20"])
    assert (run / "report.html").read_bytes() == first
    page = Page((run / "report.html").read_text())
    assert "on 20 of the 60 test images" in page.text and page.matrices()[0][:, -1].sum() == 20


def test_text_of_the_run_is_escaped(run, tmp_path):
    wild = '"><script>alert(1)</script>'
    arrays = common.make_shapes()
    names = np.array([f'{i}<img src=x onerror="a">&amp;' for i in range(10)])
    np.savez(tmp_path / "wild.npz", classes=names, **arrays)
    for path in run.glob("*.pt"):  # the names that a net has learned are compared
        record = common.load(path)
        record["arch"]["class_names"] = names.tolist()
        common.save(path, record)
    flags_of(run, data=str(tmp_path / "wild.npz"), wild=wild)
    rewrite(run / "config.json", command=wild, commit=wild, torch="\ud800", gpu=wild)
    rows = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps([{**row, "model": wild, wild: 1} for row in rows]))
    page = page_of(run)
    assert {tag for tag, _ in page.tags} & {"script"} == set()
    assert len(page.images) == 3 * report_run.EXAMPLES
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
    assert page.table("model")[0][0] == wild
    assert page.text.count(wild) > 4 and names[3] in page.text


# ------------------------------------------------------------------------------------------------
# The net and its images


def test_the_confusions_are_those_of_the_net(finished):
    folder = finished("robust_kd")
    clean, attacked = page_of(folder).matrices()
    data, net = data_and_net(folder)
    counts = torch.bincount(data.y_test, minlength=10).tolist()
    for matrix in (clean, attacked):
        assert matrix[:, -1].tolist() == matrix[:, :-1].sum(1).tolist() == counts
    predicted = common.predict(net, data.x_test).argmax(1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (data.y_test.numpy(), predicted.numpy()), 1)
    assert np.array_equal(clean[:, :-1], expected)
    assert np.trace(attacked) < np.trace(clean)


def test_the_attack_is_that_of_the_evaluation(finished):
    folder = finished("robust_kd")
    data, net = data_and_net(folder)
    run = report_run.read_run(folder)
    attacked = report_run.attack_images(net, data, 1000, run.config["flags"])
    assert (attacked.x_adv - attacked.x).abs().max() <= 2 / 255 + 1e-6
    # the image and its start are the same as in the evaluation, whatever the order
    withstands = attacked.outcomes().count(report_run.WITHSTANDS)
    assert withstands / 60 == run.net["pgd20_acc"]
    with common.evaluating(net):
        probs = net(attacked.x_adv).softmax(1)
    torch.testing.assert_close(attacked.probs_adv, probs)


def test_the_attack_is_that_of_the_evaluation_and_not_of_the_training(finished):
    fickle = report_run.read_run(finished("fickle_teacher")).config["flags"]
    robust = report_run.read_run(finished("robust_kd")).config["flags"]
    assert evaluation_attack(fickle) == (0.031, 0.003)
    assert evaluation_attack(robust | {"step_size": 0.5}) == (2 / 255, 0.5 / 255)


def test_examples_show_the_images_and_what_the_net_says(finished):
    folder = finished("robust_kd")
    data, net = data_and_net(folder)
    attacked = report_run.attack_images(
        net, data, 1000, report_run.read_run(folder).config["flags"]
    )
    page = page_of(folder)
    cards = re.findall(r'<div class="card (\w+)">(.*?)</div></div>', page.source, re.S)
    kinds = [kind for kind, _ in cards]
    assert kinds == ["broken"] * 4 + ["withstands"] * 4
    test_images = {image.numpy().tobytes(): i for i, image in enumerate(data.x_test)}
    for number, (kind, card) in enumerate(cards):
        image, change, image_adv = map(pixels, page.images[3 * number : 3 * number + 3])
        i = test_images[image.tobytes()]  # the very image, bit for bit
        label = data.classes[data.y_test[i]]
        assert f"True class: <b>{label}</b>" in card
        probs = common.predict(net, data.x_test[i : i + 1]).softmax(1)[0]
        clean, adv = re.findall(r"<b>([✓✗]) (\w+), ([\d.]+)&nbsp;%</b>", card)
        assert clean == ("✓", label, f"{100 * probs.max():.1f}")
        assert (adv[0] == "✓", adv[1] == label) == (kind == "withstands",) * 2
        # of the image that is shown, which is rounded
        moved = image_adv.astype(int) - image
        assert 0 < abs(moved).max() <= 2 and np.all(abs(change.astype(int) - 128 - 10 * moved) < 7)
        probs = common.predict(net, torch.from_numpy(image_adv.copy())[None]).softmax(1)[0]
        assert float(adv[2]) == pytest.approx(100 * probs[data.classes.index(adv[1])], abs=5)
    order = [attacked.outcomes()[i] for i in report_run.choose_examples(attacked.outcomes())]
    assert order == [report_run.BROKEN] * 4 + [report_run.WITHSTANDS] * 4


@pytest.mark.parametrize(
    "outcomes, chosen",
    [
        ("wbs" * 10, [1, 4, 7, 10, 2, 5, 8, 11]),
        ("bbsssssssss", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("wwwbsbwwbbbbb", [3, 5, 8, 9, 10, 11, 12, 4]),
        ("wbws", [1, 3, 0, 2]),
        ("wwwwwwwwww", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_examples_are_of_both_kinds_where_there_are_both(outcomes, chosen):
    kinds = {
        "b": report_run.BROKEN,
        "s": report_run.WITHSTANDS,
        "w": report_run.WRONG_BEFORE,
    }
    assert report_run.choose_examples([kinds[letter] for letter in outcomes]) == chosen


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    labels, probs = torch.tensor([0, 0, 0, 1, 2, 2]), torch.eye(30)[[5, 5, 0, 6, 2, 2]]
    text = report_run.confusion("Clean", labels, probs, [f"c{i}" for i in range(30)])
    page = Page(text)
    assert page.table("true class") == [["c0", "c5", "2"], ["c1", "c6", "1"]]
    assert "Clean: 3 of 6 right (50.00" in page.text


def test_grey_images_and_images_out_of_range_are_shown():
    image = torch.tensor([[[-0.2, 0.0, 0.5], [1.0, 1.4, 0.1]]])
    shown = pixels({"src": report_run.image_uri(report_run.to_pixels(image))})
    assert shown.tolist() == [[0, 0, 128], [255, 255, 26]]


# ------------------------------------------------------------------------------------------------
# Figures, nets of your own, generated images


@pytest.mark.curves
def test_learning_curves_are_drawn_once_and_then_taken_as_they_are(run):
    pytest.importorskip("matplotlib")
    assert len(page_of(run).images) == 1 + 3 * report_run.EXAMPLES
    Image.new("RGB", (7, 5)).save(run / "curves.png")
    assert pixels(page_of(run).images[0]).shape == (5, 7, 3)


def test_without_matplotlib_the_page_says_so(run, monkeypatch):
    monkeypatch.setattr(common, "new_figure", lambda *_: None)
    assert "No figure: matplotlib is not installed" in page_of(run).text


def test_a_net_of_your_own_is_imported_only_if_its_flag_is_given(tmp_path, monkeypatch, refused):
    net = "import torch.nn as nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), "
    (tmp_path / "nets_of_a_page.py").write_text(net + "nn.Linear(3072, 10))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "FUNCTIONS", {})
    flags = f"{SMALL} --train-subset 60 --loss st --epochs 1 --runs . --name own".split()
    flags[flags.index("mlp-32")] = "nets_of_a_page:net"
    robust_kd.main(flags)
    monkeypatch.setattr(common, "FUNCTIONS", {})
    del sys.modules["nets_of_a_page"]
    folder = tmp_path / "robust_kd" / "own-s0"
    assert "which no file can import; give it as --model" in refused(page_of, folder)
    assert "nets_of_a_page" not in sys.modules
    assert page_of(folder, "--model", "nets_of_a_page:net").images


def test_generated_images_belong_to_the_data_of_a_run(tmp_path, refused):
    path = tmp_path / "extra.npz"
    arrays = {"image": np.zeros((20, 32, 32, 3), np.uint8), "label": np.arange(20) % 10}
    np.savez(path, **arrays)
    flags = f"{SMALL} --train-subset 60 --loss st --epochs 1 --extra-data {path} --name extra"
    robust_kd.main([*flags.split(), "--runs", str(tmp_path)])
    folder = tmp_path / "robust_kd" / "extra-s0"
    assert page_of(folder).images
    np.savez(path, **arrays | {"label": np.zeros(20, int)})
    assert "other images or labels" in refused(page_of, folder)
    path.write_bytes(b"no zip")
    assert "expected an .npz file with image, label" in refused(page_of, folder)
    path.unlink()
    assert f"{path}: no such file" in refused(page_of, folder)


# ------------------------------------------------------------------------------------------------
# Bad input


def file_in_rows(run, file):
    rows = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps([{**row, "file": file} for row in rows]))


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {  # what is done to the folder of the run -> what the line says
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda run: (run / "config.json").unlink(), "has no config.json"),
    "torn config": (lambda run: torn(run / "config.json"), "config.json: damaged"),
    "a list": (lambda run: (run / "config.json").write_text("[1]"), "config.json: damaged"),
    "no flags": (lambda run: rewrite(run / "config.json", flags={}), "config.json: damaged"),
    "no radius": (lambda run: flags_of(run, eps="much"), "config.json: damaged"),
    "not a number": (lambda run: flags_of(run, eps=float("nan")), "config.json: damaged"),
    "no subset": (lambda run: flags_of(run, test_subset=0), "config.json: damaged"),
    "half a subset": (lambda run: flags_of(run, train_subset=1.5), "config.json: damaged"),
    "no name": (lambda run: flags_of(run, data=None), "config.json: damaged"),
    "large subset": (lambda run: flags_of(run, test_subset=10**6), "too large; shapes has"),
    "not finished": (lambda run: (run / "summary.json").unlink(), "not finished"),
    "torn summary": (lambda run: torn(run / "summary.json"), "summary.json: damaged"),
    "no rows": (lambda run: (run / "summary.json").write_text("[]"), "summary.json: damaged"),
    "no net": (lambda run: file_in_rows(run, None), "summary.json: names no file of a net"),
    "a number": (lambda run: file_in_rows(run, 3), "summary.json: damaged"),
    "no student": (lambda run: (run / "student.pt").unlink(), "student.pt: no such checkpoint"),
    "torn student": (lambda run: torn(run / "student.pt"), "student.pt: damaged"),
    "other data": (lambda run: rewrite(run / "config.json", fingerprint=1), "other images or"),
    "other subset": (lambda run: flags_of(run, train_subset=1999), "other images or"),
    "no data": (lambda run: flags_of(run, data="no.npz"), "no.npz: no such file"),
    "unknown data": (lambda run: flags_of(run, data="no-name"), "--data: expected cifar10"),
    "data far away": (lambda run: flags_of(run, data="cifar10"), "--data cifar10"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(run, ended, tmp_path, name):
    harm, message = BAD[name]
    harm(run)
    data_root = tmp_path / "data"
    data_root.mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*") if path.is_file()}
    status, line = ended(lambda: report_run.main([str(run), "--data-root", str(data_root)]))
    assert status == 2 and message in line and len(line.splitlines()) == 1
    after = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.curves
def test_a_damaged_log_is_a_warning(run, capsys):
    pytest.importorskip("matplotlib")
    (run / "log.jsonl").write_text('{"stage": "student", "epo')
    report_run.main([str(run)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "curves.png is not drawn" in line and "log.jsonl: damaged: line 1" in line
    assert "No figure" in (run / "report.html").read_text()


def test_a_figure_that_is_none_is_refused(run, refused, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for others")
    (run / "curves.png").symlink_to(secret)
    assert "curves.png: not a readable image" in refused(report_run.main, [str(run)])
    (run / "curves.png").unlink()
    (run / "curves.png").write_bytes(b"no image")
    assert "curves.png: not a readable image" in refused(report_run.main, [str(run)])
    assert not (run / "report.html").exists()


def test_a_folder_that_is_of_no_script_is_refused(run, refused):
    other = shutil.copytree(run, run.parent.parent / "elsewhere" / "run-s0")
    assert "elsewhere is none of fickle_teacher" in refused(report_run.main, [str(other)])


def test_a_net_for_other_images_is_refused(run, refused):
    model = common.build_model("mlp-8", 10, channels=1, size=28)
    common.save_model(run / "student.pt", model)
    assert "is for 10 classes, 28 x 1 images" in refused(report_run.main, [str(run)])


def test_flags_that_make_no_sense_are_refused(refused):
    assert "expected FILE.html" in refused(report_run.parse_args, ["run", "--out", "page.png"])
    assert "--n: expected" in refused(report_run.parse_args, ["run", "--n", "0"])
    assert report_run.parse_args(["run"]).n == 1000
