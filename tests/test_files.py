"""Files: written whole or not at all, read without running what they hold; tables."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import common
import eval_robustness
import robust_kd


def test_a_model_comes_back_from_its_file(tmp_path):
    model = common.build_model("preact-resnet18-w4-silu", 4, mean=[0.3] * 3, std=[0.2] * 3)
    model(torch.rand(4, 3, 32, 32))
    common.save_model(tmp_path / "m.pt", model, epoch=3)
    again = common.load_model(tmp_path / "m.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), model.eval()(x)) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert again.meta == {"epoch": 3, "file": f"{tmp_path}/m.pt"}


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemError('a pickle was run')",)


def test_bad_checkpoints_are_one_line_and_never_run(tmp_path, refused):
    model = common.build_model("mlp-4", 3, size=4)
    good = tmp_path / "good.pt"
    common.save_model(good, model)
    content = good.read_bytes()
    for part in range(1, 10):
        (tmp_path / "cut.pt").write_bytes(content[: len(content) * part // 10])
        line = refused(common.load_model, tmp_path / "cut.pt")
        assert f"damaged, or no checkpoint ({common.NO_TORCH_FILE})" in line
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "bomb2.pt")
    torch.save({"weights": 1}, tmp_path / "dict.pt")
    torch.save(
        {"format": 1, "arch": {"name": "mlp-4"}, "weights": {}, "meta": {}}, tmp_path / "arch.pt"
    )
    for name in ("bomb.pt", "bomb2.pt", "dict.pt", "arch.pt"):
        assert name in refused(common.load_model, tmp_path / name)
    assert "no such checkpoint" in refused(common.load_model, tmp_path / "none.pt")
    assert "expected a wrn-10-1" in refused(common.load_model, good, name="wrn-10-1")
    data = common.load_data("shapes", train_subset=2)
    assert "3 classes" in refused(common.load_model, good, data)


def test_a_checkpoint_without_a_part_of_its_arch_is_one_line(tmp_path, refused):
    data, path = common.load_data("shapes", train_subset=2), tmp_path / "x.pt"
    model = common.build_model("wrn-10-1")
    common.save_model(path, model)
    record = common.load(path)
    for key in ("classes", "size", "channels"):
        for arch in (
            {name: value for name, value in record["arch"].items() if name != key},
            record["arch"] | {key: torch.zeros(3)},
            record["arch"] | {key: "10"},
        ):
            common.save(path, record | {"arch": arch})
            assert "holds no model of these scripts" in refused(common.load_model, path, data)


def test_thousands_of_numbers_beside_the_weights_are_loaded(tmp_path):
    """As those that --grad-heatmap keeps of a thousand epochs."""
    path, model = tmp_path / "x.pt", common.build_model("mlp-4")
    gradients = {"epochs": [*range(1, 1001)], "means": [[0.5] * 50] * 1000}
    common.save_model(path, model, gradients=gradients)
    assert common.load_model(path).meta["gradients"] == gradients


def test_lists_that_repeat_themselves_beside_the_weights_are_refused_at_once(tmp_path, refused):
    path, model = tmp_path / "x.pt", common.build_model("mlp-4")
    nested = ["a"]
    for _ in range(40):
        nested = [nested] * 999
    itself = []
    itself.append(itself)
    for value in (nested, itself, ["a"] * 2_000_000, "a" * 1000, [[(1, 2)]]):
        common.save_model(path, model, value=value)
        assert "more than numbers, names and tensors" in refused(common.load_model, path)


def test_a_state_dict_with_a_tensor_called_format_is_a_state_dict(tmp_path, refused):
    torch.save({"format": torch.zeros(3)}, tmp_path / "x.pt")
    line = refused(common.load, tmp_path / "x.pt")
    assert "not a checkpoint of these scripts; for a state_dict type" in line


def torch_bytes(value, **options):
    """The bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes(**parts):
    """The bytes of a zip archive with these texts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in parts.items():
            file.writestr(name, text)
    return buffer.getvalue()


def tar_bytes():
    """The bytes of a tar archive with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pt"), io.BytesIO())
    return buffer.getvalue()


def numpy_bytes(save):
    """The bytes of np.save or np.savez."""
    buffer = io.BytesIO()
    save(buffer, np.zeros(3))
    return buffer.getvalue()


def script_bytes():
    """The bytes of torch.jit.save."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), buffer)
    return buffer.getvalue()


STATE = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
HEADER = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
NO_CHECKPOINTS = {
    "a web page": lambda: b"<!DOCTYPE html><html></html>",
    "a web page; download": lambda: b"\n <html lang='en'><head>",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "an empty file": lambda: b"",
    "a safetensors file": lambda: len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
    "a TorchScript archive": script_bytes,
    "the file contains Python objects": lambda: torch_bytes({"state_dict": Bomb()}),
}
OTHERS = {  # what torch.save has not written, and nothing else says what it is
    "text": lambda: b"weights",
    "a packed archive": lambda: gzip.compress(torch_bytes(STATE)),
    "a tar archive": tar_bytes,
    "a tar archive with a checkpoint at its end": lambda: tar_bytes() + torch_bytes(STATE),
    "a zip archive": lambda: zip_bytes(readme="weights"),
    "half a checkpoint": lambda: torch_bytes(STATE)[:600],
    "half a zip archive": lambda: zip_bytes(readme="weights" * 99)[:300],
    "an empty zip archive": lambda: zip_bytes(),
    "a numpy array": lambda: numpy_bytes(np.save),
    "a numpy .npz file": lambda: numpy_bytes(np.savez),
    "an HDF5 file": lambda: b"\x89HDF\r\n\x1a\n" + bytes(90),
    "a pickle": lambda: pickle.dumps({"weight": [1.0]}),
    "a pickle with code": lambda: pickle.dumps(Bomb(), 2),
    "a pickle of a large number": lambda: pickle.dumps(2**70, 2),
    "a pickle with code and a checkpoint": lambda: pickle.dumps(Bomb(), 0) + torch_bytes(STATE),
}


@pytest.mark.parametrize("what", [*NO_CHECKPOINTS, *OTHERS])
def test_a_file_that_is_no_checkpoint_is_named_as_what_it_is(what, tmp_path, refused):
    path = tmp_path / "weights.pt"
    path.write_bytes((NO_CHECKPOINTS | OTHERS)[what]())
    if what in OTHERS:
        what = "damaged, or no checkpoint (not a zip of torch.save, or half of one)"
    model = torch.nn.Linear(3, 2)
    small = "--data shapes --device cpu"
    teacher = f"--loss akd --model mlp-4 --runs {tmp_path}/runs --teacher-ckpt {path}"
    for call in (
        lambda: common.load_weights("--weights", path, model),
        lambda: common.load_model(path),
        lambda: eval_robustness.main([str(path), *small.split()]),
        lambda: robust_kd.main(f"{small} {teacher} --train-subset 20 --val-size 0".split()),
    ):
        line = refused(call)
        assert f"{path}: " in line and what in line
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]  # nothing is unpacked


def test_half_a_file_of_an_old_torch_is_one_line_and_a_whole_one_is_loaded(tmp_path, refused):
    content, path = torch_bytes(STATE, _use_new_zipfile_serialization=False), tmp_path / "w.pt"
    path.write_bytes(content)
    common.load_weights("--weights", path, torch.nn.Linear(3, 2))
    assert "type --model NET --weights" in refused(common.load_model, path)
    for part in (20, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:part])
        line = refused(common.load_weights, "--weights", path, torch.nn.Linear(3, 2))
        assert "damaged, or no checkpoint" in line and "Python objects" not in line


@pytest.mark.parametrize("key", [None, "state_dict", "model_ema"])
def test_a_state_dict_in_place_of_a_checkpoint_says_what_to_type(key, tmp_path, refused):
    model, path = common.build_model("mlp-4"), tmp_path / "w.pt"
    state = model.state_dict()
    torch.save(state if key is None else {key: state}, path)
    line = refused(eval_robustness.main, [str(path), "--data", "shapes"])
    assert f"--model NET --weights {path}" in line
    assert f"--teacher-model NET --teacher-ckpt {path}" in line
    # as the line says it for a net of ours
    argv = ["--model", "common:build_model(name='mlp-4')", "--weights", str(path), "--n", "10"]
    eval_robustness.main([*argv, "--data", "shapes", "--device", "cpu", "--attack", "clean"])


def test_a_file_without_read_permission_is_not_called_damaged(tmp_path, refused):
    path, model = tmp_path / "w.pt", common.build_model("mlp-4")
    common.save_model(path, model)
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # root may read everything
    try:
        lines = [
            refused(common.load_model, path),
            refused(common.load_weights, "--weights", path, model),
            refused(eval_robustness.main, [str(path), "--data", "shapes"]),
        ]
    finally:
        if is_root:
            os.seteuid(0)
    for line in lines:
        assert f"{path}: not readable (Permission denied)" in line and "delete" not in line


def test_a_folder_in_place_of_a_file_is_named(tmp_path, refused):
    assert "a folder; give a file in it" in refused(common.load_model, tmp_path)
    line = refused(common.load_weights, "--weights", tmp_path, common.build_model("mlp-4"))
    assert line == f"--weights {tmp_path}: a folder; give a file in it"


# ------------------------------------------------------------------------------------------------
# Names of classes


def named(*names):
    """Data of drawn images with these names of the ten classes; the others keep theirs."""
    data = common.load_data("shapes", train_subset=4, test_subset=4)
    data.classes = [*names, *data.classes[len(names) :]]
    return data


def test_the_names_of_classes_are_kept_and_compared(tmp_path, refused):
    path = tmp_path / "net.pt"
    common.save_model(path, common.new_model(named(), "mlp-4", 0, "student"))
    model = common.load_model(path, named())
    common.save_model(path, model)  # a model that was loaded keeps them
    assert common.load(path)["arch"]["class_names"] == list(common.SHAPES)
    for names in (("ring", "disc"), ("disc", "circle")):
        line = refused(common.load_model, path, named(*names))
        number = 0 if names[0] == "ring" else 1
        assert f"class {number} is {common.SHAPES[number]!r}, in shapes it is" in line
        assert repr(names[number]) in line
    common.load_model(path)


def test_numbers_that_are_names_are_compared(tmp_path, refused):
    """Folders 0 to 11 are read as 0, 1, 10, 11, 2, ..., an .npz without names as 0, 1, 2, ..."""
    numbers = [str(number) for number in range(12)]
    data = common.load_data("shapes", train_subset=20, test_subset=10)
    for ours, theirs in ((numbers, sorted(numbers)), (sorted(numbers), numbers)):
        data.classes = ours
        common.save_model(tmp_path / "a.pt", common.new_model(data, "mlp-4", 0, "student"))
        common.load_model(tmp_path / "a.pt", data)
        data.classes = theirs
        there = f"class 2 is '{ours[2]}', in shapes it is '{theirs[2]}'"
        assert there in refused(common.load_model, tmp_path / "a.pt", data)


def test_unknown_names_of_classes_are_not_compared(tmp_path):
    path, numbers = tmp_path / "net.pt", [str(number) for number in range(10)]
    common.save_model(path, common.new_model(named(), "mlp-4", 0, "student"))
    common.load_model(path, named(*numbers))
    common.save_model(path, common.new_model(named(*numbers), "mlp-4", 0, "student"))
    common.load_model(path, named())
    record = common.load(path)
    del record["arch"]["class_names"]  # as in files that were written before there were names
    common.save(path, record)
    common.load_model(path, named())


@pytest.mark.parametrize("names", [["a"], 3, [1] * 10, "abcdefghij", {"a": 1}])
def test_names_of_classes_in_a_foreign_file_are_checked(names, tmp_path, refused):
    path = tmp_path / "net.pt"
    model = common.build_model("mlp-4")
    model.build_arguments["class_names"] = names
    common.save_model(path, model)
    assert "holds no model of these scripts" in refused(common.load_model, path, named())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    common.save(path, {"a": 1})

    def broken(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, broken)
    assert common.load(path)["a"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_table_is_aligned():
    text = common.table(
        [{"model": "a", "clean_acc": 0.5}, {"model": "long", "x": None, "s": 1234.5}]
    )
    lines = text.splitlines()
    assert (
        len({len(line) for line in lines}) == 1 and "0.5000" in lines[2] and "1,234.5" in lines[3]
    )
