"""Files: written whole or not at all, read without running what they hold; tables."""

import pickle

import pytest
import torch

import common


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
        assert "damaged, or no checkpoint" in refused(common.load_model, tmp_path / "cut.pt")
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
    data = common.load_data("shapes", train_subset=1)
    assert "3 classes" in refused(common.load_model, good, data)


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
