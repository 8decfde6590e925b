"""Images: data sets read or drawn, the 19 corruptions of CIFAR-10-C, CINIC-10 and other images.

Paper    Hendrycks and Dietterich, ICLR 2019 (1903.12261); CINIC-10: Darlow et al. 2018.
Usage    x = corrupt(x, "fog", severity=3)       # any uint8 images (B, 32, 32, 3), on any device
         python eval_robustness.py CKPT --attack clean corruptions cinic --cinic DIR
Shapes   images uint8 (B, 32, 32, 3), labels (B,)
Differs  1. Draws depend on (seed, corruption, severity, image) alone, not on the batch.
         2. Frost is a texture drawn by code unless the published pictures are given.

common.load_data and eval_robustness.py use it; for the corruptions alone copy it with common.py.
"""

import functools
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common

# ------------------------------------------------------------------------------------------------
# Data sets


CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "shapes": "disc ring square frame triangle diamond plus cross bar pole".split(),
}


def read_data(name, root):
    """-> (x_train, y_train), (x_test, y_test), class names of common.load_data, as numpy arrays."""
    path = root / f"{name}.npz"
    if name == "shapes":
        arrays = make_shapes()
    elif name in ("cifar10", "cifar100", "mnist", "tiny-imagenet"):
        if not path.exists():
            tiny = name == "tiny-imagenet"
            source = root / "tiny-imagenet-200" if tiny else "torchvision, downloaded if need be"
            print(f"no {path}: taking {name} from {source}", flush=True)
            found = read_tiny_imagenet(source) if tiny else read_torchvision(name, root)
            common.write_atomically(path, lambda file: np.savez(file, **found))
        arrays = read_npz(path)
    elif name.endswith(".npz"):
        arrays = read_npz(Path(name))
    elif Path(name).is_dir():
        arrays = read_folder(Path(name))
    else:
        known = "cifar10, cifar100, mnist, tiny-imagenet, shapes, FILE.npz or FOLDER"
        common.fail(f"--data: expected {known}, got {name!r}")
    train, test = (check(part, name, arrays) for part in ("train", "test"))
    most = max(train[1].max(), test[1].max())
    classes = arrays.get("classes") or CLASSES.get(name)
    classes = classes or [str(k) for k in range(train[1].max() + 1)]
    if train[0].shape[1:] != test[0].shape[1:] or most >= len(classes):
        wrong = f"training and test images differ in shape, or labels reach {len(classes)}"
        common.fail(f"{name}: {wrong}")
    return train, test, classes


def check(part, name, arrays):
    """The images of a part as uint8 (N, S, S, C) and its labels as int64 (N,), or an error."""
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    x = x[..., None] if x.ndim == 3 else x
    square = x.ndim == 4 and x.shape[1] == x.shape[2] and x.shape[3] in (1, 3)
    if x.dtype != np.uint8 or not square or not x.size:
        wanted = "uint8 (N, S, S, 3) or (N, S, S)"
        common.fail(f"{name}: x_{part} must be {wanted}, got {x.dtype} {x.shape}")
    if not _are_labels(y, len(x), 100_000):
        common.fail(f"{name}: y_{part} must be {len(x)} labels 0..K-1, got {y.dtype} {y.shape}")
    return np.ascontiguousarray(x), y.astype(np.int64)


def _are_labels(y, n, classes):
    """Whether y holds n whole numbers 0..classes-1, one at least."""
    whole = y.shape == (n,) and n > 0 and y.dtype.kind in "iu"
    return whole and 0 <= y.min() <= y.max() < classes


def read_npz(path, needed=("x_train", "y_train", "x_test", "y_test")) -> dict:
    """The arrays `needed` and the class names of an .npz file, or an error; no pickles."""
    if not path.is_file():  # a pipe would block
        common.fail(f"{path}: no such file")
    try:
        common.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            if missing := set(needed) - set(file.files):
                common.fail(f"{path}: expected {', '.join(needed)}; no {min(missing)} there")
            arrays = {key: np.asarray(file[key]) for key in needed}
            if "classes" in file.files:
                arrays["classes"] = [str(name) for name in np.atleast_1d(file["classes"])]
            return arrays
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        common.fail(f"{path}: truncated, or not an .npz file ({str(error)[:200]})")


def read_extra(path, data):
    """What common.load_extra returns; nothing is unpacked that does not fit `data`."""
    path, shape, classes = Path(path), data.x_train.shape[1:], len(data.classes)
    if not path.is_file():
        common.fail(f"--extra-data: {path}: no such file")
    try:
        common.check_zip(path, whole=False)
        with zipfile.ZipFile(path) as archive:
            image, label = (archive.getinfo(f"{key}.npy") for key in ("image", "label"))
            with archive.open(image) as file:
                major, minor = np.lib.format.read_magic(file)
                read = getattr(np.lib.format, f"read_array_header_{major}_{minor}")
                (count, *sizes), fortran, dtype = read(file)
            if dtype != np.uint8 or fortran or sizes != list(shape):
                wrong = f"uint8 (M, {', '.join(map(str, shape))}), got {dtype} {sizes}"
                common.fail(f"--extra-data: {path}: image must be {wrong}")
            most = math.prod(shape) * count + 1000
            if image.file_size > most or label.file_size > 8 * count + 1000:
                raise ValueError("more bytes than its headers say")
            with archive.open(label) as file:
                y = np.lib.format.read_array(file, allow_pickle=False)
            if not _are_labels(y, count, classes):
                wrong = f"{count} labels 0..{classes - 1}, got {y.dtype} {y.shape}"
                common.fail(f"--extra-data: {path}: label must be {wrong}")
            unpacked = path.with_name(f"{path.name}.{image.CRC:08x}.npy")
            if not unpacked.exists():
                print(f"{path}: unpacking {image.file_size / 1e6:,.0f} MB of images", flush=True)
                with archive.open(image) as file:
                    common.write_atomically(unpacked, lambda out: shutil.copyfileobj(file, out))
        x = np.load(unpacked, mmap_mode="r", allow_pickle=False)
        if (x.dtype, x.shape) != (np.uint8, (count, *shape)):
            raise ValueError(f"{unpacked.name} holds something else; delete it")
    except KeyError:
        common.fail(f"--extra-data: {path}: expected the arrays image and label")
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        common.fail(f"--extra-data: {path}: truncated, or not an .npz file ({error})")
    return x, torch.from_numpy(y.astype(np.int64))


def read_torchvision(name: str, root: Path) -> dict:
    """The arrays of a torchvision data set, downloaded if need be (checked before it is read)."""
    from torchvision import datasets

    arrays = {}
    try:
        for part in ("train", "test"):
            found = getattr(datasets, name.upper())(root, train=part == "train", download=True)
            arrays |= {f"x_{part}": np.asarray(found.data), f"y_{part}": np.array(found.targets)}
            arrays["classes"] = [c.split(" - ")[0] for c in found.classes]  # of MNIST "0 - zero"
    except Exception as error:  # of the network, or what a damaged file makes torchvision raise
        wanted = f"{name}.npz, or to download it by torchvision"
        common.fail(f"--data: expected {wanted}, in {root}: {error}")
    return arrays


def read_folder(folder: Path) -> dict:
    """The arrays of train/ and test/ (or val/) with a folder of images for each class."""
    arrays, sub = {}, "test" if (folder / "test").is_dir() else "val"
    for part, within in (("train", folder / "train"), ("test", folder / sub)):
        classes, pairs = _list_classes(within, lambda file: file.suffix.lower() in SUFFIXES)
        arrays |= _read_images(part, pairs, folder)
        if arrays.setdefault("classes", classes) != classes:
            common.fail(f"{folder}: train and {sub} have different class folders")
    return arrays


def read_tiny_imagenet(folder):
    """The arrays of the unpacked official zip: 64x64; its validation images are the test images."""
    try:
        classes, train = _list_classes(folder / "train", lambda file: file.parent.name == "images")
        lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        names = [line.split()[:2] for line in lines]
        test = [(classes.index(c), folder / "val" / "images" / file) for file, c in names]
    except (OSError, ValueError) as error:
        common.fail(f"--data tiny-imagenet: expected the unpacked tiny-imagenet-200.zip: {error}")
    arrays = _read_images("train", train, folder) | _read_images("test", test, folder)
    return arrays | {"classes": classes}


SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def _list_classes(folder, wanted):
    """-> (sorted names of the class folders, [(label, file)] with the files of a class sorted)."""
    pairs = []
    try:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        for k, name in enumerate(classes):
            for where, folders, files in sorted(os.walk(folder / name)):  # follows no links
                if links := [sub for sub in folders if Path(where, sub).is_symlink()]:
                    raise ValueError(f"{where}/{links[0]} is a link to a folder")
                pairs += [(k, Path(where, f)) for f in sorted(files) if wanted(Path(where, f))]
            if not pairs or pairs[-1][0] != k:
                raise ValueError(f"no images in {name}")
        if not classes:
            raise ValueError("no folder in it")
    except (OSError, ValueError) as error:
        common.fail(f"{folder}: expected class folders of images, none of them empty ({error})")
    return classes, pairs


def _read_images(part, pairs, root, shape=None):
    """{x_<part>: uint8 (N, H, W, 3), y_<part>: labels (N,)} of [(label, file)], of one shape."""
    found = []
    for _, file in pairs:
        found.append(_read_image(file, root))
        shape = shape or found[0].shape
        if found[-1].shape != shape:
            common.fail(f"{file}: an image of {found[-1].shape}, not {shape}")
    if not pairs:
        common.fail(f"{root}: no images")
    return {f"x_{part}": np.stack(found), f"y_{part}": np.array([label for label, _ in pairs])}


def _must_be_in(root, file):
    """ValueError if there is no regular file (a pipe would block) or it lies outside of root."""
    if not (file.is_file() and file.resolve().is_relative_to(root.resolve())):
        raise ValueError(f"no file, or a link out of {root}")


def _read_image(file, root):
    """An image file as uint8 (H, W, 3); an error if it lies outside of the folder root."""
    from PIL import Image

    try:
        _must_be_in(root, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb, which is refused below
            # no other formats: that of EPS would start another program
            with Image.open(file, formats=("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")) as image:
                if image.width * image.height > 2**24:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # the decoders raise whatever comes
        common.fail(f"{file}: not a readable image ({str(error)[:200]})")


def make_shapes(train: int = 4000, test: int = 1000, seed: int = 0) -> dict:
    """Ten classes of coloured shapes, 32x32, drawn by code: the data of --demo and of the tests.

    Each image has two cues for its class: the shape, and a faint grating of amplitude 8/255, which
    PGD can erase. Standard training takes that; adversarial training must learn the shape.
    """
    rng = np.random.default_rng(seed)
    n = train + test
    labels = np.arange(n) % 10
    y, x = np.mgrid[:32, :32] - 15.5
    size = rng.uniform(7.5, 11, (n, 1, 1))
    u, v = (x - rng.uniform(-4, 4, (n, 1, 1))) / size, (y - rng.uniform(-4, 4, (n, 1, 1))) / size
    a, b, r, box = abs(u), abs(v), np.hypot(u, v), np.maximum(abs(u), abs(v))
    # fmt: off
    masks = [
        r < 0.95, (r < 1.0) & (r > 0.6), box < 0.85, (box < 0.95) & (box > 0.6),  # disc ... frame
        (v > -0.9) & (v < 0.8) & (a < (v + 0.9) * 0.6), a + b < 1.1,  # triangle, diamond
        (np.minimum(a, b) < 0.27) & (box < 1.0), (abs(a - b) < 0.35) & (box < 0.9),  # plus, cross
        (b < 0.3) & (a < 1.0), (a < 0.3) & (b < 1.0),  # bar, pole
    ]
    # fmt: on
    mask = np.choose(labels[:, None, None], masks)[..., None]
    hue = (labels / 10 + rng.normal(0, 0.2, n))[:, None] + np.array([0, 1 / 3, 2 / 3])
    ink = 0.58 + 0.1 * np.cos(2 * np.pi * hue)[:, None, None]  # the hue leans to one per class
    ground = rng.uniform(0.25, 0.42, (n, 1, 1, 3))
    image = rng.normal(0, 0.05, (n, 32, 32, 3))  # changed in place: it is large
    image += np.where(mask, ink, ground)
    angle = labels[:, None, None] * np.pi / 20  # within a quarter turn: unchanged by a flip ...
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    grating = np.sin(1.8 * (np.cos(angle) * abs(x) + np.sin(angle) * y) + phase)  # ... as |x| is
    image += 8 / 255 * grating[..., None]
    image = np.rint(image.clip(0, 1, out=image) * 255).astype(np.uint8)
    train_part = {"x_train": image[:train], "y_train": labels[:train]}
    return train_part | {"x_test": image[train:], "y_test": labels[train:]}


# ------------------------------------------------------------------------------------------------
# The 19 corruptions of CIFAR-10-C (Hendrycks and Dietterich 2019), with its parameters for 32x32.
# Each takes x float64 (B, 3, 32, 32) in [0, 1], draw and the parameters of a severity, and returns
# the same shape; float results are clipped and truncated to uint8, as in the published set.

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd constants of splitmix64, as signed 64-bit numbers
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def corrupt(x, name, severity, seed=0, start=0, frost_dir=None):
    """x uint8 (B, 32, 32, 3) -> the same under a corruption of CIFAR-10-C at severity 1..5.

    Random draws of an image depend on (seed, name, severity, its index) alone, where x[0] has the
    index `start`: neither on the batch nor on the device. frost_dir: the folder with frost1.png ..
    frost5.jpg of the reference generator; None: textures drawn by code. Errors: one line.
    """
    if x.dtype != torch.uint8 or x.shape[1:] != (32, 32, 3):
        common.fail(f"corruptions: need uint8 (N, 32, 32, 3), got {x.dtype} {tuple(x.shape)}")
    function, parameters = CORRUPTIONS[name]
    numbers = torch.arange(start, start + len(x), device=x.device)
    draw = uniform(numbers, "corrupt", seed, name, severity)
    extra = (frost_dir,) if name == "frost" else ()
    # by a tensor: for a number, a GPU multiplies by 1 / 255 instead, and k becomes k - 1
    clean = x.permute(0, 3, 1, 2) / torch.tensor([255.0], device=x.device).double()
    out = function(clean, draw, *np.atleast_1d(parameters[severity - 1]).tolist(), *extra)
    if out.dtype != torch.uint8:
        out = (out.clamp(0, 1) * 255).to(torch.uint8)
    return out.permute(0, 2, 3, 1).contiguous()


def uniform(images, *key):
    """-> draw(*shape): float64 (B, *shape) in (0, 1), others at each call; images int64 (B,).

    splitmix64 of a counter: they depend on the image's number and `key`, not on batch or device.
    """
    calls = itertools.count()

    def mix(z):
        for shift, factor in MIX:
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    def draw(*shape):
        stream = mix(images * GOLDEN + common.derive_seed(*key, next(calls)))[:, None]
        bits = mix(stream + torch.arange(1, math.prod(shape) + 1, device=images.device) * GOLDEN)
        bits = (bits >> 12) & ((1 << 52) - 1)
        return ((bits.double() + 0.5) * 2.0**-52).view(-1, *shape)

    return draw


def _normal(draw, channels):
    return math.sqrt(2) * torch.erfinv(2 * draw(channels, 32, 32) - 1)


def _inside(i, border):
    """What a row or column outside 0..31 means, by border."""
    if border == "edge":  # a a | a b c | c c
        return i.clamp(0, 31)
    period = 64 if border == "mirror" else 62  # b a | a b c | c b, and c b | a b c | b a
    i = i.remainder(period)
    return torch.minimum(i, min(period, 63) - i)


def _at(x, row, column):
    """x (B, C, 32, 32) at whole row, column (B, 32, 32): (B, C, 32, 32)."""
    index = (row * 32 + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view(x.shape)


def _bilinear(x, row, column, border):
    """x (B, C, 32, 32) at fractional row, column (B, 32, 32)."""
    total = 0
    for near, side in itertools.product((0, 1), (0, 1)):
        r, c = row.floor() + near, column.floor() + side
        weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
        corner = _at(x, _inside(r.long(), border), _inside(c.long(), border))
        total = total + weight[:, None] * corner
    return total


def _separable(x, matrix):
    matrix = matrix.to(x.device)
    return matrix @ x.contiguous() @ matrix.T


def _blur(x, sigma, truncate=4.0, border="edge"):
    """Gaussian blur of x (B, C, 32, 32): a 32 x 32 matrix from either side."""
    taps = torch.arange(-int(truncate * sigma + 0.5), int(truncate * sigma + 0.5) + 1)
    weights = torch.exp(-(taps.double() ** 2) / (2 * sigma**2))
    index = _inside(torch.arange(32)[:, None] + taps, border)
    matrix = torch.zeros(32, 32, dtype=torch.float64)
    return _separable(x, matrix.scatter_add_(1, index, (weights / weights.sum()).expand(32, -1)))


def _zoom(x, factor):
    """The centre of x enlarged by `factor`, linear between aligned corners, the middle 32 x 32."""
    side = math.ceil(32 / factor)
    count = round(side * factor)
    position = (torch.arange(32).double() + (count - 32) // 2) * (side - 1) / (count - 1)
    position = position + (32 - side) // 2
    return _separable(x, (1 - (position[:, None] - torch.arange(32)).abs()).clamp(min=0))


def _motion(v, radius, sigma, degrees):
    """One-sided motion blur of whole numbers v (B, C, 32, 32) along degrees (B,); whole again.

    Offsets, border and the 16-bit rounding are those of ImageMagick 6, which made the set.
    """
    count, angle = 2 * math.ceil(radius) + 1, torch.deg2rad(degrees)[:, None]
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    grid, total = torch.arange(32, device=v.device), 0
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        column = (grid + (i * angle.cos() - 0.5).ceil().long()).clamp(0, 31)[:, None]
        row = (grid + (i * angle.sin() - 0.5).ceil().long()).clamp(0, 31)[:, :, None]
        total = total + weight * _at(v, row, column)
    return (257 * total + 0.5).floor().div(257, rounding_mode="floor")


def _shot_noise(x, draw, photons):
    """Poisson counts by inversion: a pixel has 256 levels, so a table holds every distribution."""
    rate, top = photons * torch.arange(256).double()[:, None] / 255, int(photons + 10) * 2
    k = torch.arange(top).double()
    pmf = torch.exp(torch.xlogy(k, rate) - rate - torch.lgamma(k + 1))
    level = (x * 255).round()
    # row v of the table lies in [2 v, 2 v + 1], so that one search finds level and count
    table = (pmf.cumsum(1).clamp(max=1) + 2 * torch.arange(256)[:, None]).flatten().to(x.device)
    found = torch.searchsorted(table, draw(3, 32, 32) + 2 * level)
    return (found - level * top) / photons


def _impulse_noise(x, draw, rate):
    u = draw(3, 32, 32)
    return torch.where(u < rate, (u < rate / 2).double(), x)


def _glass_blur(x, draw, sigma, passes):
    """Each pass moves every pixel from row 2, column 2 on to a copy of itself or up-left of it."""
    x = (_blur(x, sigma) * 255).floor() / 255
    grid = torch.arange(32, device=x.device)
    for _ in range(int(passes)):
        move = (draw(2, 32, 32) < 0.5) & (grid >= 2) & (grid[:, None] >= 2)
        x = _at(x, grid[:, None] - move[:, 0].long(), grid - move[:, 1].long())
    return _blur(x, sigma)


def _defocus_blur(x, draw, radius, alias):
    axis = torch.arange(-2, 3).double()
    disk = (axis**2 + axis[:, None] ** 2 <= radius**2).double()
    taps = torch.exp(-(torch.arange(-1, 2).double() ** 2) / (2 * alias**2))
    taps = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    kernel = F.conv2d((disk / disk.sum())[None, None], taps, padding=1)[0, 0].numpy()
    padded = F.pad(x, (2,) * 4, mode="reflect")
    taps = [(i, j, w) for (i, j), w in np.ndenumerate(kernel) if w > 1e-9]
    return sum(float(w) * padded[..., i : i + 32, j : j + 32] for i, j, w in taps)


def _zoom_blur(x, draw, end):
    factors = np.arange(1, end, 0.01)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x, draw, mean, std, zoom, threshold, radius, sigma, weight):
    flakes = _zoom(mean + std * _normal(draw, 1), zoom)
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor()
    flakes = _motion(flakes, radius, sigma, 90 * draw(1)[:, 0] - 135) / 255
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    x = weight * x + (1 - weight) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.flip(2, 3)


def _frost(x, draw, weight, frost_weight, folder=None):
    textures, sizes = _frost_textures(folder)
    which, *place = draw(3).T
    which, grid = (which * 5).long(), torch.arange(32, device=x.device)
    room = torch.tensor(sizes, device=x.device)[which].T - 32
    row, column = ((u * r).long()[:, None] + grid for u, r in zip(place, room))
    ice = textures.to(x.device)[which[:, None, None], row[:, :, None], column[:, None]]
    out = weight * (x * 255).round() + frost_weight * ice.permute(0, 3, 1, 2)
    return out.clamp(0, 255).to(torch.uint8)


@functools.cache
def _frost_textures(folder):
    """Five textures as float64 (5, H, W, 3), 0..255, padded to one size, and their own sizes."""
    if folder is None:  # ridges and grain, about as bright and as contrasted as the published ones
        draw = uniform(torch.arange(5), "frost textures")
        ice = _plasma(draw, 1.7, 128)[..., None] * torch.tensor([225.0, 235.0, 245.0])
        return (ice + 24 + 60 * draw(128, 128, 1)).clamp(0, 255), [(128, 128)] * 5
    textures, sizes = torch.zeros(5, 400, 400, 3, dtype=torch.float64), []
    for i, name in enumerate("frost1.png frost2.png frost3.png frost4.jpg frost5.jpg".split()):
        image = _read_image(Path(folder) / name, Path(folder))
        image = image[2::5, 2::5]  # bilinear at a fifth of the size falls on these pixels exactly
        if min(image.shape[:2]) < 33 or max(image.shape[:2]) > 400:
            common.fail(f"--frost-dir: {name}: expected 165 to 2000 pixels a side")
        sizes.append(image.shape[:2])
        textures[i, : len(image), : image.shape[1]] = torch.tensor(image)
    return textures, sizes


def _plasma(draw, decay, side=32):
    """Diamond-square on a torus, each image scaled to 0..1: (B, side, side)."""
    plasma, wobble, n = torch.zeros_like(draw(1, 1)), 100.0, 1
    while n < side:  # a grid of n x n becomes one of 2n x 2n; the square is the reference's
        centre, left, top = (wobble**2 * (2 * draw(n, n) - 1) for _ in range(3))
        below = plasma + plasma.roll(-1, 1)  # with the next corner in the column
        right = plasma + plasma.roll(-1, 2)
        centre += (below + below.roll(-1, 2)) / 4
        left += (below + centre + centre.roll(1, 2)) / 4
        top += (right + centre + centre.roll(1, 1)) / 4
        rows = torch.stack([plasma, top], 3), torch.stack([left, centre], 3)
        plasma = torch.stack(rows, 2).view(-1, 2 * n, 2 * n)
        wobble, n = wobble / decay, 2 * n
    low, high = plasma.amin((1, 2), True), plasma.amax((1, 2), True)
    return (plasma - low) / (high - low)


def _fog(x, draw, strength, decay):
    top = x.amax((1, 2, 3), True)
    return (x + strength * _plasma(draw, decay)[:, None]) * top / (top + strength)


def _brightness(x, draw, shift):
    value = x.amax(1, True)
    saturation = torch.where(value > 0, (value - x) / value, 0)
    return (value + shift).clamp(max=1) * (1 - saturation)


def _saturate(x, draw, scale, shift):
    value, span = x.amax(1, True), x.amax(1, True) - x.amin(1, True)
    grey = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)  # the hue of grey is red
    part = torch.where(span > 0, (value - x) / span, grey)
    saturation = torch.where(span > 0, span / value, 0)
    return value * (1 - part * (scale * saturation + shift).clamp(0, 1))


def _contrast(x, draw, factor):
    mean = x.mean((2, 3), True)
    return (x - mean) * factor + mean


def _elastic_transform(x, draw, alpha, sigma, jitter):
    points = torch.tensor([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]], device=x.device).double()
    moved = F.pad(points + jitter * (2 * draw(3, 2) - 1), (0, 1), value=1.0)
    grid = torch.arange(32, device=x.device).double()
    back = torch.linalg.solve(moved, points.expand(len(x), 3, 2))  # (B, 3, 2): to x, y
    a, b, c = back[..., None, None].unbind(1)
    column, row = (a * grid + b * grid[:, None] + c).unbind(1)
    x = _bilinear(x, (row * 32).round() / 32, (column * 32).round() / 32, "mirror101")
    if alpha:
        shift = alpha * _blur(2 * draw(2, 32, 32) - 1, sigma, 3.0, "mirror")
        x = _bilinear(x, grid[:, None] + shift[:, 1], grid + shift[:, 0], "mirror")
    return x


def _box(v, out):
    """Pillow's box filter from v (B, C, n, n) to (B, C, out, out): columns, then rows, rounded."""
    n = v.shape[2]
    offset = torch.arange(n) + 0.5 - ((torch.arange(out).double() + 0.5) * (n / out))[:, None]
    offset = offset / max(n / out, 1)
    taps = ((offset > -0.5) & (offset <= 0.5)).double()
    taps = (taps / taps.sum(1, keepdim=True)).to(v.device)
    return (taps @ (v @ taps.T + 0.5).floor() + 0.5).floor()


def _jpeg_compression(x, draw, quality):
    from PIL import Image  # libjpeg, as in the published set: no other decoder agrees exactly

    images = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        images.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(x.device)


def _spatter(x, draw, mean, std, sigma, threshold, strength, mud):
    liquid = _blur(mean + std * _normal(draw, 1), sigma)
    liquid = torch.where(liquid < threshold, 0, liquid)
    color = torch.tensor([63, 42, 20] if mud else [175, 238, 238], device=x.device).view(3, 1, 1)
    if mud:
        mask = _blur((liquid > threshold).double(), strength)
        mask = torch.where(mask < 0.8, 0, mask)
        return x * (1 - mask) + mask * color / 255
    liquid = (liquid * 255).floor() % 256
    relief = _equalise(_around(_edge_distance(_canny(liquid))).floor())
    kernel = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=x.device).double()
    relief = F.conv2d(F.pad(relief, (1,) * 4, mode="reflect"), kernel[None, None]).clamp(0, 255)
    mask = liquid * _around(relief).round()
    return x + strength * mask / mask.amax((2, 3), True).clamp(min=1) * color / 255


def _around(v):
    return F.avg_pool2d(F.pad(v, (1,) * 4, mode="reflect"), 3, 1)


def _canny(v, low=50, high=150):
    """Edges (bool) of whole numbers v (B, 1, 32, 32), with the tie rules of OpenCV."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=v.device).double()
    sobel = torch.stack([sobel, sobel.T])[:, None]
    dx, dy = F.conv2d(F.pad(v, (1,) * 4, mode="replicate"), sobel).split(1, 1)
    size, slope = dx.abs() + dy.abs(), 13573 / 32768  # tan 22.5 degrees, as OpenCV rounds it
    q = F.pad(size, (1,) * 4)

    def beats(row, column):  # the neighbour on one side, and the one on the other
        a = q[:, :, 1 - row : 33 - row, 1 - column : 33 - column]
        b = q[:, :, 1 + row : 33 + row, 1 + column : 33 + column]
        return (size > a) & ((size > b) if row and column else (size >= b))

    diagonal = torch.where(dx * dy < 0, beats(1, -1), beats(1, 1))
    steep = dy.abs() > dx.abs() * (2 + slope)
    ridge = torch.where(steep, beats(1, 0), diagonal)
    ridge = torch.where(dy.abs() < dx.abs() * slope, beats(0, 1), ridge) & (size > low)
    edges, grown = torch.zeros_like(ridge), ridge & (size > high)
    while not torch.equal(edges, grown):
        edges = grown
        grown = (F.max_pool2d(edges.double(), 3, 1, 1) > 0) & ridge
    return edges


def _edge_distance(edges, most=20.0):
    """Distance to the nearest edge in the 5 x 5 chamfer metric 1, 1.4, 2.1969, at most `most`."""
    costs = {1: 1.0, 2: 1.4, 5: 2.1969}
    steps = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if i * i + j * j in costs]
    before, distance = None, torch.where(edges, 0.0, most).double()
    while before is None or not torch.equal(before, distance):
        before, p = distance, F.pad(distance, (2,) * 4, value=most)
        for i, j in steps:
            near = p[:, :, 2 + i : 34 + i, 2 + j : 34 + j] + costs[i * i + j * j]
            distance = torch.minimum(distance, near)
    return distance


def _equalise(v, bins=21):
    """Histogram equalisation of whole numbers v (B, 1, 32, 32) below `bins` to 0..255."""
    level = v.long().flatten(1)
    counts = torch.stack([(level == k).sum(1) for k in range(bins)], 1).double()
    lowest = level.amin(1, True)
    first = counts.gather(1, lowest)
    table = ((counts.cumsum(1) - first) * 255 / (1024 - first).clamp(min=1)).round()
    return torch.where(first == 1024, lowest, table.gather(1, level)).view(v.shape)


# name: (function, its parameters at severities 1..5); the last four are not in the benchmark's mean
# fmt: off
CORRUPTIONS = {
    "gaussian_noise": (lambda x, draw, c: x + c * _normal(draw, 3), (0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (lambda x, draw, radius, sigma: _motion(
        (x * 255).round(), radius, sigma, 90 * draw(1)[:, 0] - 45).to(torch.uint8),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (_snow, ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (_elastic_transform, ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92),
                                              (3.2, 1.28, 1.6), (3.2, 0.96, 0.96))),
    "pixelate": (lambda x, draw, n: _box(_box((x * 255).round(), int(n)), 32).to(torch.uint8),
                 (30, 28, 27, 24, 20)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (lambda x, draw, c: x + c * x * _normal(draw, 3),
                      (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (lambda x, draw, sigma: _blur(x, sigma), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (_spatter, ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                          (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                          (0.65, 0.1, 0.5, 0.68, 0.6, 1))),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
# fmt: on

# ------------------------------------------------------------------------------------------------
# Accuracy under corruptions, and on other data


def corruption_accuracy(
    model, x, labels, folder=None, frost_dir=None, seed=0, batch_size=500, done=None, save=None
):
    """Accuracy of a model under the 19 corruptions at 5 severities -> the dict of `summarise`.

    x uint8 (N, 32, 32, 3) clean test images, labels (N,). folder: the unpacked CIFAR-10-C, whose
    images are paired with x, in any order, or a part of it; None: x is corrupted here. done: what
    an earlier call gave to save(done), called after each corruption; those are not run again.
    Errors (a file missing or of a wrong shape): one line, exit status 2.
    """
    note = "published files" if folder else "corruptions generated from the test images"
    done = {} if done is None else done
    with common.evaluating(model):
        clean = common.correct(model, x, labels, batch_size)
        if folder:
            files, y = read_corruptions(folder)
            rows = pair_images(x, labels, files["gaussian_blur"][: len(y)], y)
            if rows is None:
                rows, labels, clean = torch.arange(len(y)), y.to(labels.device), None
                note += ", all of them; no conditional accuracy: the test images are others"
        elif frost_dir is None:
            note += ", frost from textures drawn by code, not the published ones"
        for name in (name for name in CORRUPTIONS if name not in done):
            counts = []
            for severity in range(5):
                right = []
                for start in range(0, len(labels), batch_size):
                    part = slice(start, start + batch_size)
                    if folder:
                        batch = files[name][(rows[part] + severity * len(y)).numpy()]
                        batch = torch.from_numpy(batch).to(labels.device)
                    else:
                        batch = corrupt(x[part], name, severity + 1, seed, start, frost_dir)
                    right.append(common.correct(model, batch, labels[part]))
                right = torch.cat(right)
                both = right if clean is None else right & clean
                counts.append([right.sum().item(), both.sum().item()])
            done[name] = counts
            if save:
                save(done)
    right = None if clean is None else clean.sum().item()
    return summarise(done, len(labels), right) | {"note": note}


def summarise(counts, n, clean=None):
    """counts[name] = five of [right, right here and when clean], of n images -> a summary.

    corruptions_acc: {name: [5]}; mean15_acc: the benchmark's 15, mean19_acc: all, mean18_acc: all
    but frost. clean: how many are right when clean; with it conditional_acc, over those alone, and
    mca_acc, the paper's: its mean over severities, then over the 19; mca18_acc: without frost.
    """
    every, kept = list(CORRUPTIONS), [name for name in CORRUPTIONS if name != "frost"]
    acc = {k: [right / n for right, _ in counts[k]] for k in every}
    of_right = {k: [both / clean for _, both in counts[k]] for k in every} if clean else None
    means = {"mean15_acc": (acc, every[:15]), "mean18_acc": (acc, kept), "mean19_acc": (acc, every)}
    means |= {"mca_acc": (of_right, every), "mca18_acc": (of_right, kept)}
    result = {"n": n, "clean_acc": None if clean is None else clean / n}
    for key, (table, names) in means.items():
        result[key] = np.mean([table[name] for name in names]).item() if table else None
    return result | {"corruptions_acc": acc, "conditional_acc": of_right}


def corruption_rows(result):
    """A row for each corruption, for common.table: accuracy by severity, mean, conditional mean."""
    rows = []
    for name, acc in result["corruptions_acc"].items():
        row = {"corruption": name} | {f"{k}_acc": value for k, value in enumerate(acc, 1)}
        row["mean_acc"], of_right = np.mean(acc).item(), result["conditional_acc"]
        row["conditional_acc"] = np.mean(of_right[name]).item() if of_right else None
        rows.append(row)
    return rows


def read_corruptions(folder, classes=100_000):
    """The 19 files of CIFAR-10-C as memory maps {name: uint8 (5 N, 32, 32, 3)}, labels (N,)."""
    arrays = {}
    for name in ("labels", *CORRUPTIONS):
        path = Path(folder) / f"{name}.npy"
        try:
            _must_be_in(Path(folder), path)
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy's of a header that is none
            wrong = f"missing, truncated, or not an .npy file ({str(error)[:200]})"
            common.fail(f"--corruptions: {path}: {wrong}; expected 19 corruptions and labels")
    labels = arrays.pop("labels")
    n, rest = divmod(labels.size, 5)
    if rest or not _are_labels(labels, 5 * n, classes) or (labels != np.tile(labels[:n], 5)).any():
        wanted = f"N labels 0..{classes - 1}, five times over"
        common.fail(f"--corruptions: {folder}/labels.npy: expected {wanted}")
    for name, array in arrays.items():
        if (array.dtype, array.shape) != (np.uint8, (5 * n, 32, 32, 3)):
            wanted, got = f"uint8 {(5 * n, 32, 32, 3)}", f"{array.dtype} {array.shape}"
            common.fail(f"--corruptions: {folder}/{name}.npy: expected {wanted}, got {got}")
    return arrays, torch.from_numpy(labels[:n].astype(np.int64))


def pair_images(x, labels, blurred, blurred_labels):
    """The row of each of x in `blurred`, its mildest corruption: int64 (N,); None if x is others.

    The published rows are in the order of CIFAR-10's test batch, which a converted data set may
    not keep; an image under a blur of 0.4 pixels is 1.4 levels away, another image 30 and more.
    """
    rows = torch.zeros(len(x), dtype=torch.long)
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0].cpu()
        theirs = (blurred_labels == label.cpu()).nonzero()[:, 0]
        if not len(theirs):
            return None
        a = x[mine.to(x.device)].cpu().flatten(1).float()
        b = torch.from_numpy(blurred[theirs.numpy()]).flatten(1).float()
        distance, nearest = torch.cdist(a, b).min(1)
        if (distance > 12 * math.sqrt(a.shape[1])).any():
            return None
        rows[mine] = theirs[nearest]
    return rows


def load_ood(path, classes, per_class=None, seed=0, cinic=False, size=(32, 32)):
    """Other images of the same classes -> x uint8 (N, H, W, 3), labels int64 (N,), a note.

    path: an .npz with x_test, y_test, or a folder of class folders named as in `classes`. cinic:
    the CINIC-10 folder (train, valid, test), of which only the images from ImageNet count.
    per_class: so many of each class, a fixed choice for a seed (the paper: 2100); the note holds
    the hash of the list. Errors (no file, an empty class folder, another image size): one line.
    """
    path, shape = Path(path), (*size, 3)
    if npz := path.suffix == ".npz":
        x, labels = check("test", path, read_npz(path, ("x_test", "y_test")))
        if x.shape[1:] != shape:
            common.fail(f"{path}: an image of {x.shape[1:]}, not {shape}")
        if labels.max() >= len(classes):
            common.fail(f"{path}: label {labels.max()}, but the model has {len(classes)} classes")
    else:
        pairs = _list_others(path, classes, cinic)
        labels = np.array([label for label, _ in pairs])
    keep = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    if per_class is not None:
        if (fewest := min(map(len, keep))) < per_class:
            common.fail(f"{path}: a class has {fewest} images, fewer than {per_class}")
        rng = np.random.RandomState(seed)
        keep = [rng.choice(k, per_class, replace=False) for k in keep]
    keep = np.sort(np.concatenate(keep))
    x = x[keep] if npz else _read_images("test", [pairs[i] for i in keep], path, shape)["x_test"]
    chosen = "\n".join(str(i if npz else pairs[i][1].relative_to(path)) for i in keep)
    digest = hashlib.sha256(chosen.encode()).hexdigest()[:12]
    note = f"{len(keep)} images; sha256 of their list: {digest}"
    return torch.from_numpy(x), torch.from_numpy(labels[keep]), note


def _list_others(path, classes, cinic):
    """[(label, file)] of the images below a folder, class by class and sorted."""

    def wanted(file):  # the images of CIFAR-10 have cifar in their names
        return file.name[0] != "." and not (cinic and "cifar" in file.name)

    found = []
    for part in ("train", "valid", "test") if cinic else ("",):
        names, pairs = _list_classes(path / part, wanted)
        if foreign := set(names) - set(classes):
            common.fail(f"{path / part / min(foreign)}: none of the classes {', '.join(classes)}")
        found += [(classes.index(names[k]), file) for k, file in pairs]
    for _, file in found if cinic else ():
        if not re.fullmatch(r"n\d{8}_\d+\.png", file.name):
            common.fail(f"{file}: neither an ImageNet name nor a CIFAR one")
    if cinic and len({label for label, _ in found}) < len(classes):
        common.fail(f"{path}: expected folders named {', '.join(classes)}")
    return sorted(found, key=lambda pair: pair[0])  # stable: the order within a class stays


def load_others(args, data, x):
    """{name: (x uint8 (M, H, W, C), labels (M,), note)} of --cinic, --ood; checks --corruptions."""
    if "corruptions" in args.attack and args.corruptions != "generate":
        read_corruptions(args.corruptions, len(data.classes))
    elif "corruptions" in args.attack:
        corrupt(x[:1], "frost", 1, frost_dir=args.frost_dir)
    found = {}
    for name in [name for name in ("cinic", "ood") if name in args.attack]:
        number = args.cinic_per_class if name == "cinic" else None
        options = {"cinic": name == "cinic", "size": tuple(x.shape[1:3])}  # the same for all seeds
        *tensors, note = load_ood(getattr(args, name), data.classes, number, **options)
        found[name] = *(tensor.to(x.device) for tensor in tensors), note
    return found


def natural(model, x, labels, others, args, done, save):
    """The fields of a row for --attack corruptions, cinic and ood: accuracies, tables and notes.

    others: of load_others; done, save: of corruption_accuracy.
    """
    found = {}
    if "corruptions" in args.attack:
        folder = None if args.corruptions == "generate" else args.corruptions
        rest = folder, args.frost_dir, args.seed, args.batch_size, done, save
        result = corruption_accuracy(model, x, labels, *rest)
        found |= {k: result[k] for k in ("mean15_acc", "mean18_acc", "mean19_acc", "mca_acc")}
        found["corruptions"] = result
    for name, (x_other, y_other, note) in others.items():
        with common.evaluating(model):
            right = common.correct(model, x_other, y_other, args.batch_size)
        found |= {f"{name}_acc": right.double().mean().item(), f"{name}_note": [note]}
    return found
