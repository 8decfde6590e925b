"""Files made to do harm: checkpoints, arrays, images. hostile_runs.py hands them to their readers.

Each function writes its files into a folder and gives {name: path}.
"""

import os
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import eval_robustness

BOMB = 17 << 24  # bytes, of zeros


class Runs:
    """A pickle that makes a file `ran` if it is executed."""

    def __init__(self, folder, function=exec):
        self.folder, self.function = folder, function

    def __reduce__(self):
        if self.function is exec:
            return exec, (f"open({str(self.folder / 'ran')!r}, 'w').close()",)
        return self.function, (f"touch {self.folder / 'ran'}",)


def saved(path, record, version=1):
    torch.save({"format": version} | record if isinstance(record, dict) else record, path)
    return path


def packed(path, parts, kind=zipfile.ZIP_DEFLATED):
    """A zip of {name: bytes}; a number instead is so many zeros."""
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as file:
        for name, content in parts.items():
            with file.open(name, "w", force_zip64=True) as out:
                if isinstance(content, bytes):
                    out.write(content)
                else:
                    for _ in range(content >> 24):
                        out.write(bytes(1 << 24))
    return path


def npy(shape, descr="|u1", content=b""):
    """The bytes of a .npy file whose header says this, whatever the content."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def arrays(**changes):
    """Arrays of a data set of 20 images of three classes, some of them changed."""
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8), np.arange(20) % 3
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changes


def checkpoints(folder):
    """{name: path} of what is no model, or one that is too much."""
    model = common.build_model("mlp-4", 3, size=8)
    good = {"arch": model.build_arguments, "weights": model.state_dict(), "meta": {"epoch": 1}}
    weights, found = good["weights"], {}

    def save(name, record):
        found[name] = saved(folder / f"{name}.pt", record)

    def changed(name, **changes):
        save(name, good | changes)

    for protocol in (0, 2, 4):
        found[f"pickle {protocol}"] = folder / f"pickle{protocol}.pt"
        found[f"pickle {protocol}"].write_bytes(pickle.dumps(Runs(folder), protocol))
    found["pickle in a zip"] = packed(
        folder / "inside.pt", {"a/data.pkl": pickle.dumps(Runs(folder), 2), "a/version": b"3\n"}, 0
    )
    save("exec", Runs(folder))
    save("os.system", Runs(folder, os.system))
    changed("exec in the meta", meta={"epoch": Runs(folder)})
    changed("exec in the weights", weights=weights | {"x": Runs(folder)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "script.pt")
    torch.save(good, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    found |= {"script": folder / "script.pt", "legacy": folder / "legacy.pt"}
    for name, content in {"empty": b"", "text": b"hello", "zeros": bytes(1000)}.items():
        found[name] = folder / f"{name}.pt"
        found[name].write_bytes(content)
    os.mkfifo(folder / "pipe.pt")
    (folder / "folder.pt").mkdir()
    found |= {"pipe": folder / "pipe.pt", "folder": folder / "folder.pt", "none": folder / "-.pt"}
    found["device"] = Path("/dev/zero")
    huge = {"a/data.pkl": pickle.dumps(good["meta"], 2), "a/data/0": BOMB}
    found["zip bomb"] = packed(folder / "bomb.pt", huge)
    huge["a/data/0"] = 1 << 24
    found["bz2"] = packed(folder / "bz2.pt", huge, zipfile.ZIP_BZIP2)
    call = b"cbuiltins\nbytearray\n(I100000000000\ntR."
    found["bytearray"] = packed(folder / "array.pt", {"a/data.pkl": call, "a/version": b"3\n"}, 0)
    deep = b"(" * 100_000 + b"l" * 100_000 + b"."
    found["nested pickle"] = packed(folder / "nest.pt", {"a/data.pkl": deep, "a/version": b"3"}, 0)
    for i, arch in enumerate(
        [{"name": "wrn-4000-99"}, {"name": "mlp" + "-99999" * 8}, {"classes": 10**12}, {"size": -1}]
        + [{"size": 10**9}, {"channels": -3}, {"classes": 2.5}, {"name": "no"}, {"name": 3}]
        + [{"width": "1"}, {"width": float("nan")}, {"dropout": 7}, {"other": 1}, {"mean": 1}]
    ):
        changed(f"arch {i}", arch=good["arch"] | arch)
    changed("no arch", arch=None)
    key = "layers.2.weight"
    one = torch.ones(1)
    big = common.build_model("mlp-4000-4000", 3, size=8).state_dict()
    for name, change in {
        "wrong shape": {key: torch.zeros(4, 3)},
        "float64": {key: weights[key].double()},
        "whole numbers": {key: weights[key].long()},
        "NaN": {key: weights[key] * float("nan")},
        "infinite": {key: weights[key] + float("inf")},
        "no tensor": {key: "weights"},
        "more": {"more": one},
        "sparse": {key: weights[key].to_sparse()},
    }.items():
        changed(name, weights=weights | change)
    changed("fewer", weights={key: weights[key]})
    changed("weights that are a list", weights=[1])
    swollen = {k: one.expand(v.shape) if v.is_floating_point() else v for k, v in big.items()}
    changed("swollen", weights=swollen, arch=good["arch"] | {"name": "mlp-4000-4000"})
    deep, wide = {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}, {"a": one.expand(10**12)}
    for i, meta in enumerate([[], deep, {"a": "x" * 10**6}, wide, dict.fromkeys(range(2000))]):
        changed(f"meta {i}", meta=meta)
    for name, record in {"list": [1], "format 2": good | {"format": 2}, "tensor": one}.items():
        torch.save(record, folder / f"{name}.pt")
        found[name] = folder / f"{name}.pt"
    return found


def data_files(folder):
    """{name: path} of .npz files that hold no data set."""
    found, x, y = {}, arrays()["x_train"], arrays()["y_train"]
    changes = {
        "objects": {"x_train": np.array([Runs(folder)] * 20, object)},
        "object classes": {"classes": np.array([Runs(folder)], object)},
        "float": {"x_train": x / 255},
        "NaN": {"x_train": np.full(x.shape, np.nan)},
        "other byte order": {"x_train": x.astype(">u2")},
        "flat": {"x_test": x.reshape(20, -1)},
        "not square": {"x_test": x[:, :4]},
        "four channels": {"x_test": np.zeros((20, 8, 8, 4), np.uint8)},
        "other size": {"x_test": np.zeros((20, 4, 4, 3), np.uint8)},
        "no images": {"x_train": x[:0], "y_train": y[:0]},
        "negative labels": {"y_train": y - 1},
        "large labels": {"y_train": y + 10**9},
        "huge labels": {"y_train": np.full(20, 2**64 - 1, np.uint64)},
        "float labels": {"y_train": y / 2},
        "labels of text": {"y_train": np.array(["a"] * 20)},
        "labels of dates": {"y_train": np.zeros(20, "M8[s]")},
        "fewer labels": {"y_train": y[:19]},
        "a number": {"y_train": np.array(3)},
        "records": {"x_train": np.zeros(20, [("a", "u1")])},
        "unseen labels": {"y_test": y + 5},
        "fewer classes": {"classes": np.array(["a"])},
    }
    for name, change in changes.items():
        found[name] = folder / f"{name}.npz"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.savez(found[name], **arrays(**change))
    rest = {f"{k}.npy": npy((20,), "<i8", bytes(160)) for k in ("y_train", "x_test", "y_test")}
    for name, content in {
        "a header of gigabytes": npy((10**7, 32, 32, 3)),
        "a header of more": npy((2**62, 2**62)),
        "a negative header": npy((-1, 8, 8, 3)),
        "a nested header": npy("(" * 5000 + ")" * 5000),
        "a header that calls": npy(f"open({str(folder / 'ran')!r}, 'w')"),
        "a header of objects": npy((1,), "|O", pickle.dumps(Runs(folder))),
        "a bomb": BOMB,
        "no array": b"hello",
    }.items():
        found[name] = packed(folder / f"{name}.npz", {"x_train.npy": content} | rest)
    found["no npy"] = packed(folder / "bare.npz", {"x_train": b"hello"} | rest)
    flipped = bytearray((folder / "other size.npz").read_bytes())
    flipped[1000] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    os.mkfifo(folder / "pipe.npz")
    return found | {"flipped": folder / "flipped.npz", "pipe": folder / "pipe.npz"}


def extra_files(folder):
    """{name: path} of files of extra images that must be refused, none of them unpacked."""
    y, x, found = npy((2,), "<i8", bytes(16)), npy((2, 32, 32, 3), content=bytes(6144)), {}
    for name, (image, label) in {
        "a bomb": (BOMB, y),
        "a header of gigabytes": (npy((10**7, 32, 32, 3)), y),
        "a header of less": (npy((1, 32, 32, 3), content=bytes(10**5)), y),
        "objects": (npy((2, 32, 32, 3), "|O", pickle.dumps(Runs(folder))), y),
        "object labels": (x, npy((2,), "|O", pickle.dumps(Runs(folder)))),
        "float": (npy((2, 32, 32, 3), "<f4", bytes(4 * 6144)), y),
        "other shape": (npy((2, 8, 8, 3), content=bytes(384)), y),
        "more labels": (x, npy((9,), "<i8", bytes(72))),
        "no images": (npy((0, 32, 32, 3)), npy((0,), "<i8")),
        "large labels": (x, npy((2,), "<i8", b"\x7f" * 16)),
        "negative labels": (x, npy((2,), "<i8", b"\xff" * 16)),
        "no array": (b"hello", y),
    }.items():
        found[name] = packed(folder / f"{name}.npz", {"image.npy": image, "label.npy": label})
    found["nothing"] = packed(folder / "nothing.npz", {"x": b""})
    os.mkfifo(folder / "pipe.npz")
    return found | {"pipe": folder / "pipe.npz"}


def png(width, height, content=b""):
    """The bytes of a PNG whose header says this."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content))


def image_folder(path, name="0.png", content=None, size=8, link=None):
    """train/ and test/ with class folders a and b; in train/a one more file, or link."""
    for part in ("train", "test"):
        for label in "ab":
            (path / part / label).mkdir(parents=True)
            Image.new("RGB", (size, size)).save(path / part / label / "1.png")
    if link:
        (path / "train" / "a" / name).symlink_to(link)
    elif content is not None:
        (path / "train" / "a" / name).write_bytes(content)
    return path


def folders(folder):
    """{name: path} of folders of images that must be refused."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(folder / "outside.png")
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({folder}/ran) (w) file\n"
    contents = {
        "a bomb": png(30_000, 30_000),
        "a larger bomb": png(2**31 - 1, 2**31 - 1),
        "no image": b"hello",
        "postscript": postscript.encode(),
        "cut": (folder / "outside.png").read_bytes()[:120],
        "of another size": png(4, 4, bytes(4 * 13)),
    }
    links = {"out": folder / "outside.png", "device": "/dev/zero", "loop": "0.png", "up": ".."}
    found = {k: image_folder(folder / f"with {k}", content=v) for k, v in contents.items()}
    found |= {k: image_folder(folder / f"link {k}", link=v) for k, v in links.items()}
    (image_folder(folder / "pipe") / "train" / "a" / "0.png").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe" / "train" / "a" / "0.png")
    (folder / "nothing" / "train").mkdir(parents=True)
    return found | {"pipe": folder / "pipe", "nothing": folder / "nothing"}


def corruption_folder(path, **changes):
    """The files of CIFAR-10-C for two images; changes: {name: array, or bytes of the file}."""
    path.mkdir()
    files = {name: np.zeros((10, 32, 32, 3), np.uint8) for name in eval_robustness.CORRUPTIONS}
    for name, content in (files | {"labels": np.tile([0, 1], 5)} | changes).items():
        if isinstance(content, bytes):
            (path / f"{name}.npy").write_bytes(content)
        elif isinstance(content, Path):
            (path / f"{name}.npy").symlink_to(content)
        else:
            np.save(path / f"{name}.npy", content, allow_pickle=True)
    return path


def corruptions(folder):
    """{name: path} of folders like CIFAR-10-C that must be refused."""
    np.save(folder / "outside.npy", np.zeros((10, 32, 32, 3), np.uint8))
    changes = {
        "objects": {"fog": np.array([Runs(folder)] * 10, object)},
        "pickle": {"fog": pickle.dumps(Runs(folder))},
        "gigabytes": {"fog": npy((10**8, 32, 32, 3))},
        "gigabytes of labels": {"labels": npy((10**10,), "<i8")},
        "float": {"fog": np.full((10, 32, 32, 3), np.nan)},
        "other byte order": {"fog": np.zeros((10, 32, 32, 3), ">u2")},
        "shape": {"fog": np.zeros((10, 3, 32, 32), np.uint8)},
        "link out": {"fog": folder / "outside.npy"},
        "device": {"fog": Path("/dev/zero")},
        "cut": {"fog": npy((10, 32, 32, 3), content=bytes(999))},
        "negative labels": {"labels": np.tile([0, -1], 5)},
        "large labels": {"labels": np.tile([0, 10**9], 5)},
        "NaN labels": {"labels": np.full(10, np.nan)},
        "labels of other images": {"labels": np.arange(10)},
        "a label": {"labels": np.array(1)},
        "nested header": {"labels": npy("(" * 5000 + ")" * 5000)},
    }
    return {k: corruption_folder(folder / f"c {k}", **v) for k, v in changes.items()}
