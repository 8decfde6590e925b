"""Write a folder of .npy files like CIFAR-10-C: the test images of a data set under 19 corruptions.

Paper    Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
         perturbations, ICLR 2019 (1903.12261).
Usage    python benchmark/corruptions.py --data cifar10 --out data/CIFAR-10-C
         python benchmark/corruptions.py --data cifar10 --n 1000 --out data/CIFAR-10-C-1000
         python eval_robustness.py CKPT --attack clean corruptions --corruptions data/CIFAR-10-C
Written  The published format: <corruption>.npy, uint8 (5 N, 32, 32, 3), holds the N test images at
         severity 1, then at severity 2, ...; labels.npy holds the N labels five times over.
         source.json says what the images were made from. A file is written whole or not at all,
         and the same command goes on after the last one.
Differs  1. The draws depend on (corruption, severity, number of the image) alone: the set is the
            same in every run, not the published one.
         2. frost is a texture drawn by code unless --frost-dir has the published pictures.
"""

import functools
import hashlib
import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_robustness
from eval_robustness import uniform

BATCH_SIZE = 500  # images at once; fixed, because another size may round sums in another way


def parse_args(argv=None):
    """The flags of this program as a namespace; raises UserError."""
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--data", default="cifar10", help=f"data set with images of 32 x 32: {common.DATA_NAMES}")
    add("--data-root", default="data", help="folder of the data sets; downloads go there")
    add("--out", required=True, metavar="FOLDER", help="folder that the files are written to")
    add(
        "--n",
        type=common.whole,
        help="number of test images of each severity, those of eval_robustness.py --n (default: "
        "all)",
    )
    add(
        "--frost-dir",
        metavar="DIR",
        help="folder of frost1.png to frost5.jpg, the published textures (default: drawn by code)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Write the folder of --out, or what is missing in it."""
    args = parse_args(argv)
    data = common.load_data(args.data, args.data_root, test_subset=args.n)
    if data.x_test.shape[1:] != (32, 32, 3):
        shape = tuple(data.x_test.shape[1:])
        raise common.UserError(f"--data {args.data}: needs images of (32, 32, 3), got {shape}")
    write_folder(Path(args.out), data.x_test, data.y_test, args.frost_dir)
    print(f"{args.out} is complete: --attack corruptions --corruptions {args.out}")


def write_folder(folder, x, labels, frost_dir=None):
    """Write the files of x uint8 (N, 32, 32, 3) and labels (N,) that the folder does not have yet.

    Raises UserError if the folder has files that were made from other images or textures.
    """
    source = describe_source(x, labels, frost_dir)
    check_source(folder, source)
    common.write_json(folder / "source.json", source)
    write_array(folder / "labels.npy", np.tile(labels.numpy(), 5))
    shape = (5 * len(x), 32, 32, 3)
    for number, name in enumerate(CORRUPTIONS, 1):
        path = folder / f"{name}.npy"
        progress = f"{number} of {len(CORRUPTIONS)}: {path}"
        if path.exists():
            images = eval_robustness.read_npy("--out", path)
            if images.dtype != np.uint8 or images.shape != shape:
                wrong = f"expected uint8 {shape}, got {images.dtype} {images.shape}"
                raise common.UserError(f"--out: {path}: {wrong}; delete it")
            common.print_line(f"{progress} is there")
            continue
        images = np.empty(shape, np.uint8)
        for severity in range(1, 6):
            for start in range(0, len(x), BATCH_SIZE):
                common.print_line(f"{progress}, severity {severity}, image {start}", live=True)
                part = corrupt(x[start : start + BATCH_SIZE], name, severity, 0, start, frost_dir)
                first = (severity - 1) * len(x) + start
                images[first : first + len(part)] = part.numpy()
        write_array(path, images)
        common.print_line(f"{progress} is written")


def describe_source(x, labels, frost_dir):
    """{"images": ..., "frost": ...}: digests of what a folder is made from."""
    content = x.numpy().tobytes() + labels.numpy().tobytes()
    frost = "drawn by code"
    if frost_dir is not None:
        frost = hashlib.sha256(frost_textures(frost_dir)[0].numpy()).hexdigest()[:16]
    return {"images": hashlib.sha256(content).hexdigest()[:16], "n": len(x), "frost": frost}


def check_source(folder, source):
    """A UserError if the folder has files that were not made from this source."""
    if folder.exists() and not folder.is_dir():
        raise common.UserError(f"--out: {folder} is a file; take another folder")
    path = folder / "source.json"
    if not path.exists() and not any(folder.glob("*.npy")):
        return
    try:
        there = common.read_json(path)
    except common.UserError:
        there = None
    if there != source:
        difference = f"has files from {there or 'elsewhere'}, not from {source}"
        raise common.UserError(f"--out: {folder} {difference}; take another folder, or delete it")


def write_array(path, array):
    """Write an .npy file, whole or not at all."""
    common.write_atomically(path, lambda file: np.save(file, array))


# ------------------------------------------------------------------------------------------------
# The corruptions, for images of 32 x 32. Each function takes x float64 (B, 3, 32, 32) in [0, 1],
# draw of `uniform`, and the parameters of a severity, and returns the same shape. Float results are
# clipped to [0, 1] and truncated to uint8, as in the published set.


def corrupt(x, name, severity, seed=0, start=0, frost_dir=None):
    """x uint8 (B, 32, 32, 3) -> the same under a corruption of CIFAR-10-C at severity 1..5.

    Random draws of an image depend on (seed, name, severity, its number) alone, where x[0] has the
    number `start`: neither on the batch nor on the device. frost_dir: the folder with frost1.png ..
    frost5.jpg of the reference generator; None: textures drawn by code. Raises UserError.
    """
    if x.dtype != torch.uint8 or x.shape[1:] != (32, 32, 3):
        got = f"{x.dtype} {tuple(x.shape)}"
        raise common.UserError(f"corruptions: need images uint8 (N, 32, 32, 3), got {got}")
    numbers = torch.arange(start, start + len(x), device=x.device)
    draw = uniform(numbers, "corrupt", seed, name, severity)
    parameters = np.atleast_1d(SEVERITIES[name][severity - 1]).tolist()
    if name == "frost":
        parameters.append(frost_dir)
    # divided by a tensor: for a number, a GPU multiplies by 1 / 255 instead, and k becomes k - 1
    clean = x.permute(0, 3, 1, 2) / torch.tensor([255.0], device=x.device).double()
    out = CORRUPTIONS[name](clean, draw, *parameters)
    if out.dtype != torch.uint8:
        out = (out.clamp(0, 1) * 255).to(torch.uint8)
    return out.permute(0, 2, 3, 1).contiguous()


def normal(draw, channels):
    """Standard normal numbers (B, channels, 32, 32)."""
    return math.sqrt(2) * torch.erfinv(2 * draw(channels, 32, 32) - 1)


def fold_index(i, border):
    """The row or column in 0..31 that i stands for outside of the image, by the kind of border."""
    if border == "edge":  # a a | a b c | c c
        return i.clamp(0, 31)
    period = 64 if border == "mirror" else 62  # b a | a b c | c b, or c b | a b c | b a
    i = i.remainder(period)
    return torch.minimum(i, min(period, 63) - i)


def gather_pixels(x, row, column):
    """x (B, C, 32, 32) at whole row, column (B, 32, 32): (B, C, 32, 32)."""
    index = (row * 32 + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view(x.shape)


def bilinear(x, row, column, border):
    """x (B, C, 32, 32) at fractional row, column (B, 32, 32)."""
    total = 0
    for down, right in itertools.product((0, 1), (0, 1)):
        r, c = row.floor() + down, column.floor() + right
        weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
        corner = gather_pixels(x, fold_index(r.long(), border), fold_index(c.long(), border))
        total = total + weight[:, None] * corner
    return total


def from_both_sides(x, matrix):
    """matrix @ x @ matrix^T for each channel of x (B, C, 32, 32)."""
    matrix = matrix.to(x.device)
    return matrix @ x.contiguous() @ matrix.T


def blur(x, sigma, truncate=4.0, border="edge"):
    """Gaussian blur of x (B, C, 32, 32): a 32 x 32 matrix from either side."""
    reach = int(truncate * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(taps.double() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(32, -1)
    index = fold_index(torch.arange(32)[:, None] + taps, border)
    matrix = torch.zeros(32, 32, dtype=torch.float64)
    return from_both_sides(x, matrix.scatter_add_(1, index, weights))


def zoom(x, factor):
    """The centre of x enlarged by `factor`, linear between aligned corners, the middle 32 x 32."""
    side = math.ceil(32 / factor)
    enlarged = round(side * factor)
    position = torch.arange(32).double() + (enlarged - 32) // 2
    position = position * (side - 1) / (enlarged - 1) + (32 - side) // 2
    return from_both_sides(x, (1 - (position[:, None] - torch.arange(32)).abs()).clamp(min=0))


def motion(v, radius, sigma, degrees):
    """One-sided motion blur of whole numbers v (B, C, 32, 32) along degrees (B,); whole again.

    Offsets, border and the 16-bit rounding are those of ImageMagick 6, which made the set.
    """
    taps, angle = np.arange(2 * math.ceil(radius) + 1), torch.deg2rad(degrees)[:, None]
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    grid, total = torch.arange(32, device=v.device), 0
    for i, weight in enumerate(weights):
        column = (grid + (i * angle.cos() - 0.5).ceil().long()).clamp(0, 31)[:, None]
        row = (grid + (i * angle.sin() - 0.5).ceil().long()).clamp(0, 31)[:, :, None]
        total = total + weight * gather_pixels(v, row, column)
    return (257 * total + 0.5).floor().div(257, rounding_mode="floor")


# ---- noise


def gaussian_noise(x, draw, sigma):
    """x + sigma N(0, 1)."""
    return x + sigma * normal(draw, 3)


def shot_noise(x, draw, photons):
    """Poisson counts by inversion: a pixel has 256 levels, so a table holds every distribution."""
    rate = photons * torch.arange(256).double()[:, None] / 255
    largest = int(photons + 10) * 2
    k = torch.arange(largest).double()
    probability = torch.exp(torch.xlogy(k, rate) - rate - torch.lgamma(k + 1))
    level = (x * 255).round()
    # row v of the table lies in [2 v, 2 v + 1], so that one search finds level and count
    table = probability.cumsum(1).clamp(max=1) + 2 * torch.arange(256)[:, None]
    place = torch.searchsorted(table.flatten().to(x.device), draw(3, 32, 32) + 2 * level)
    return (place - level * largest) / photons


def impulse_noise(x, draw, rate):
    """Salt and pepper: each with half of the rate."""
    u = draw(3, 32, 32)
    return torch.where(u < rate, (u < rate / 2).double(), x)


def speckle_noise(x, draw, sigma):
    """x (1 + sigma N(0, 1))."""
    return x + sigma * x * normal(draw, 3)


# ---- blur


def defocus_blur(x, draw, radius, alias_sigma):
    """A disk, itself blurred by 3 x 3."""
    axis = torch.arange(-2, 3).double()
    disk = (axis**2 + axis[:, None] ** 2 <= radius**2).double()
    taps = torch.exp(-(torch.arange(-1, 2).double() ** 2) / (2 * alias_sigma**2))
    taps = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    kernel = F.conv2d((disk / disk.sum())[None, None], taps, padding=1)[0, 0].numpy()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    total = 0
    for (i, j), weight in np.ndenumerate(kernel):
        if weight > 1e-9:
            total = total + float(weight) * padded[..., i : i + 32, j : j + 32]
    return total


def glass_blur(x, draw, sigma, passes):
    """Each pass moves every pixel from row 2, column 2 on to a copy of itself or up-left of it."""
    x = (blur(x, sigma) * 255).floor() / 255
    grid = torch.arange(32, device=x.device)
    for _ in range(int(passes)):
        move = (draw(2, 32, 32) < 0.5) & (grid >= 2) & (grid[:, None] >= 2)
        x = gather_pixels(x, grid[:, None] - move[:, 0].long(), grid - move[:, 1].long())
    return blur(x, sigma)


def motion_blur(x, draw, radius, sigma):
    """Motion blur in a direction of -45 to 45 degrees."""
    return motion((x * 255).round(), radius, sigma, 90 * draw(1)[:, 0] - 45).to(torch.uint8)


def zoom_blur(x, draw, end):
    """The mean of the image and its enlargements by 1, 1.01, ... below `end`."""
    factors = np.arange(1, end, 0.01)
    return (x + sum(zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def gaussian_blur(x, draw, sigma):
    """Gaussian blur, see `blur`."""
    return blur(x, sigma)


# ---- weather


def snow(x, draw, mean, std, factor, threshold, radius, sigma, weight):
    """Noise above a threshold, enlarged, moved and added to a whitened image, with its mirror."""
    flakes = zoom(mean + std * normal(draw, 1), factor)
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor()
    flakes = motion(flakes, radius, sigma, 90 * draw(1)[:, 0] - 135) / 255
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    x = weight * x + (1 - weight) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.flip(2, 3)


def frost(x, draw, weight, frost_weight, folder=None):
    """The image plus a window of a texture, both weighted."""
    textures, sizes = frost_textures(folder)
    texture, top, left = draw(3).T
    texture, grid = (texture * 5).long(), torch.arange(32, device=x.device)
    rows, columns = torch.tensor(sizes, device=x.device)[texture].T - 32
    row = (top * rows).long()[:, None] + grid
    column = (left * columns).long()[:, None] + grid
    ice = textures.to(x.device)[texture[:, None, None], row[:, :, None], column[:, None]]
    out = weight * (x * 255).round() + frost_weight * ice.permute(0, 3, 1, 2)
    return out.clamp(0, 255).to(torch.uint8)


@functools.cache
def frost_textures(folder):
    """Five textures as float64 (5, H, W, 3), 0..255, padded to one size, and their own sizes."""
    if folder is None:  # ridges and grain, about as bright and as contrasted as the published ones
        draw = uniform(torch.arange(5), "frost textures")
        ice = plasma(draw, 1.7, 128)[..., None] * torch.tensor([225.0, 235.0, 245.0])
        return (ice + 24 + 60 * draw(128, 128, 1)).clamp(0, 255), [(128, 128)] * 5
    textures, sizes = torch.zeros(5, 400, 400, 3, dtype=torch.float64), []
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    for i, name in enumerate(names):
        image = common.read_image(Path(folder) / name)
        image = image[2::5, 2::5]  # bilinear at a fifth of the size falls on these pixels exactly
        if min(image.shape[:2]) < 33 or max(image.shape[:2]) > 400:
            sides = f"{5 * image.shape[0]} x {5 * image.shape[1]}"
            wanted = "expected 165 to 2000 pixels a side"
            raise common.UserError(f"--frost-dir: {name}: {wanted}, got about {sides}")
        sizes.append(image.shape[:2])
        textures[i, : image.shape[0], : image.shape[1]] = torch.tensor(image)
    return textures, sizes


def plasma(draw, decay, side=32):
    """Diamond-square on a torus, each image scaled to 0..1: (B, side, side)."""
    heights, wobble, n = torch.zeros_like(draw(1, 1)), 100.0, 1
    while n < side:  # a grid of n x n becomes one of 2n x 2n; the square is the reference's
        centre, left, top = (wobble**2 * (2 * draw(n, n) - 1) for _ in range(3))
        below = heights + heights.roll(-1, 1)  # with the next corner in the column
        right = heights + heights.roll(-1, 2)
        centre += (below + below.roll(-1, 2)) / 4
        left += (below + centre + centre.roll(1, 2)) / 4
        top += (right + centre + centre.roll(1, 1)) / 4
        rows = torch.stack([heights, top], 3), torch.stack([left, centre], 3)
        heights = torch.stack(rows, 2).view(-1, 2 * n, 2 * n)
        wobble, n = wobble / decay, 2 * n
    low, high = heights.amin((1, 2), True), heights.amax((1, 2), True)
    return (heights - low) / (high - low)


def fog(x, draw, strength, decay):
    """A fractal added to the image, which is then as bright as before at its brightest."""
    top = x.amax((1, 2, 3), True)
    return (x + strength * plasma(draw, decay)[:, None]) * top / (top + strength)


def spatter(x, draw, mean, std, sigma, threshold, strength, mud):
    """Drops of water (mud: 0) or of mud (1)."""
    liquid = blur(mean + std * normal(draw, 1), sigma)
    liquid = torch.where(liquid < threshold, 0, liquid)
    color = torch.tensor([63, 42, 20] if mud else [175, 238, 238], device=x.device).view(3, 1, 1)
    if mud:
        mask = blur((liquid > threshold).double(), strength)
        mask = torch.where(mask < 0.8, 0, mask)
        return x * (1 - mask) + mask * color / 255
    liquid = (liquid * 255).floor() % 256
    relief = equalise(box_mean(edge_distance(canny_edges(liquid))).floor())
    kernel = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=x.device).double()
    relief = F.conv2d(F.pad(relief, (1, 1, 1, 1), mode="reflect"), kernel[None, None])
    mask = liquid * box_mean(relief.clamp(0, 255)).round()
    return x + strength * mask / mask.amax((2, 3), True).clamp(min=1) * color / 255


def box_mean(v):
    """The mean of each pixel of v (B, C, 32, 32) and its eight neighbours."""
    return F.avg_pool2d(F.pad(v, (1, 1, 1, 1), mode="reflect"), 3, 1)


def canny_edges(v, low=50, high=150):
    """Edges (bool) of whole numbers v (B, 1, 32, 32), with the tie rules of OpenCV."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=v.device).double()
    sobel = torch.stack([sobel, sobel.T])[:, None]
    dx, dy = F.conv2d(F.pad(v, (1, 1, 1, 1), mode="replicate"), sobel).split(1, 1)
    size, slope = dx.abs() + dy.abs(), 13573 / 32768  # tan 22.5 degrees, as OpenCV rounds it
    padded = F.pad(size, (1, 1, 1, 1))

    def exceeds_neighbours(row, column):  # the one on one side, and the one on the other
        before = padded[:, :, 1 - row : 33 - row, 1 - column : 33 - column]
        after = padded[:, :, 1 + row : 33 + row, 1 + column : 33 + column]
        diagonal = row != 0 and column != 0
        return (size > before) & ((size > after) if diagonal else (size >= after))

    diagonal = torch.where(dx * dy < 0, exceeds_neighbours(1, -1), exceeds_neighbours(1, 1))
    steep = dy.abs() > dx.abs() * (2 + slope)
    flat = dy.abs() < dx.abs() * slope
    ridge = torch.where(steep, exceeds_neighbours(1, 0), diagonal)
    ridge = torch.where(flat, exceeds_neighbours(0, 1), ridge) & (size > low)
    edges, grown = torch.zeros_like(ridge), ridge & (size > high)
    while not torch.equal(edges, grown):
        edges = grown
        grown = (F.max_pool2d(edges.double(), 3, 1, 1) > 0) & ridge
    return edges


def edge_distance(edges, largest=20.0):
    """Distance to the nearest edge in the 5 x 5 chamfer metric 1, 1.4, 2.1969, up to `largest`."""
    costs = {1: 1.0, 2: 1.4, 5: 2.1969}  # by the squared length of the step
    steps = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if i * i + j * j in costs]
    before, distance = None, torch.where(edges, 0.0, largest).double()
    while before is None or not torch.equal(before, distance):
        before, padded = distance, F.pad(distance, (2, 2, 2, 2), value=largest)
        for i, j in steps:
            neighbour = padded[:, :, 2 + i : 34 + i, 2 + j : 34 + j]
            distance = torch.minimum(distance, neighbour + costs[i * i + j * j])
    return distance


def equalise(v, bins=21):
    """Histogram equalisation of whole numbers v (B, 1, 32, 32) below `bins` to 0..255."""
    level = v.long().flatten(1)
    counts = torch.stack([(level == k).sum(1) for k in range(bins)], 1).double()
    lowest = level.amin(1, True)
    first = counts.gather(1, lowest)
    table = ((counts.cumsum(1) - first) * 255 / (1024 - first).clamp(min=1)).round()
    return torch.where(first == 1024, lowest, table.gather(1, level)).view(v.shape)


# ---- digital


def brightness(x, draw, shift):
    """The value of HSV plus a shift."""
    value = x.amax(1, True)
    saturation = torch.where(value > 0, (value - x) / value, 0)
    return (value + shift).clamp(max=1) * (1 - saturation)


def saturate(x, draw, scale, shift):
    """The saturation of HSV, scaled and shifted."""
    value, span = x.amax(1, True), x.amax(1, True) - x.amin(1, True)
    grey = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)  # the hue of grey is red
    part = torch.where(span > 0, (value - x) / span, grey)
    saturation = torch.where(span > 0, span / value, 0)
    return value * (1 - part * (scale * saturation + shift).clamp(0, 1))


def contrast(x, draw, factor):
    """The distance from the mean of each channel, scaled."""
    mean = x.mean((2, 3), True)
    return (x - mean) * factor + mean


def elastic_transform(x, draw, alpha, sigma, jitter):
    """An affine map that moves three corners by up to `jitter`, then a smooth random field."""
    points = torch.tensor([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]], device=x.device).double()
    moved = F.pad(points + jitter * (2 * draw(3, 2) - 1), (0, 1), value=1.0)
    grid = torch.arange(32, device=x.device).double()
    back = torch.linalg.solve(moved, points.expand(len(x), 3, 2))  # (B, 3, 2): to x, y
    a, b, c = back[..., None, None].unbind(1)
    column, row = (a * grid + b * grid[:, None] + c).unbind(1)
    x = bilinear(x, (row * 32).round() / 32, (column * 32).round() / 32, "mirror101")
    if alpha:
        shift = alpha * blur(2 * draw(2, 32, 32) - 1, sigma, 3.0, "mirror")
        x = bilinear(x, grid[:, None] + shift[:, 1], grid + shift[:, 0], "mirror")
    return x


def pixelate(x, draw, side):
    """Down to `side` x `side` pixels and up again, by Pillow's box filter."""
    return resize_by_box(resize_by_box((x * 255).round(), int(side)), 32).to(torch.uint8)


def resize_by_box(v, side):
    """Pillow's box filter from v (B, C, n, n) to `side` x `side`: columns, then rows, rounded."""
    n = v.shape[2]
    centre = (torch.arange(side).double() + 0.5) * (n / side)
    offset = (torch.arange(n) + 0.5 - centre[:, None]) / max(n / side, 1)
    taps = ((offset > -0.5) & (offset <= 0.5)).double()
    taps = (taps / taps.sum(1, keepdim=True)).to(v.device)
    return (taps @ (v @ taps.T + 0.5).floor() + 0.5).floor()


def jpeg_compression(x, draw, quality):
    """JPEG by Pillow's libjpeg, as in the published set: no other decoder agrees exactly."""
    from PIL import Image

    decoded = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(x.device)


# In the order of the benchmark; the last four are not in its mean
CORRUPTIONS = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur,
    "spatter": spatter,
    "saturate": saturate,
}
# The parameters of each function above at severities 1 to 5, for images of 32 x 32
# fmt: off
SEVERITIES = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.1),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
             (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
             (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6),
                          (3.2, 0.96, 0.96)),
    "pixelate": (30, 28, 27, 24, 20),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "spatter": ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}
# fmt: on


if __name__ == "__main__":
    common.start(main, stopped="finished files are kept; the same command goes on:")
