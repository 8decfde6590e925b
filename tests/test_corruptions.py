"""The 19 corruptions against the reference generator and known answers; folders; other images."""

import hashlib
import json
import math
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save_image, statistics, textured

import common
import eval_robustness as ev
from benchmark import corruptions

# The reference generator on 1,000 CIFAR-10 test images (clean: mean 120.45, std 62.96, gradient
# 14.57): mean |change|, std and mean |neighbour difference|, severities 1..5, in grey levels.
FINGERPRINTS = {
    "gaussian_noise": (
        [8.01, 11.93, 15.77, 17.69, 19.56],
        [63.5, 64.2, 65.1, 65.7, 66.3],
        [19.86, 23.89, 28.19, 30.42, 32.65],
    ),
    "shot_noise": (
        [5.92, 8.31, 13.02, 14.98, 18.24],
        [63.2, 63.5, 64.5, 65.0, 66.0],
        [18.03, 20.24, 25.16, 27.34, 31.08],
    ),
    "impulse_noise": (
        [1.28, 2.59, 3.81, 6.35, 8.96],
        [63.9, 64.9, 65.8, 67.7, 69.5],
        [16.82, 19.11, 21.22, 25.54, 29.89],
    ),
    "defocus_blur": (
        [1.38, 3.33, 5.02, 6.54, 9.32],
        [62.3, 61.2, 60.4, 60.0, 58.8],
        [13.42, 11.85, 10.68, 9.96, 8.63],
    ),
    "glass_blur": (
        [11.07, 11.23, 11.02, 17.94, 17.17],
        [63.1, 62.8, 61.6, 63.0, 61.6],
        [16.49, 15.84, 13.7, 16.55, 14.23],
    ),
    "motion_blur": (
        [7.0, 10.31, 12.94, 12.88, 15.04],
        [61.2, 60.2, 59.4, 59.4, 58.6],
        [11.87, 10.75, 9.87, 9.87, 9.19],
    ),
    "zoom_blur": (
        [8.72, 10.27, 12.24, 14.25, 16.18],
        [60.7, 60.2, 59.7, 59.2, 58.5],
        [11.18, 10.63, 10.14, 9.77, 9.25],
    ),
    "snow": (
        [10.68, 23.76, 25.18, 37.24, 51.35],
        [63.8, 63.9, 64.4, 63.7, 61.6],
        [16.3, 18.4, 18.11, 17.92, 17.53],
    ),
    "frost": (
        [30.68, 45.36, 50.38, 45.17, 43.53],
        [61.2, 59.7, 55.3, 53.8, 50.7],
        [15.13, 15.34, 15.21, 15.05, 14.89],
    ),
    "fog": (
        [10.63, 21.27, 27.44, 31.85, 38.67],
        [52.9, 44.3, 40.7, 39.5, 38.8],
        [12.13, 9.9, 8.79, 8.17, 7.66],
    ),
    "brightness": (
        [10.03, 20.33, 30.21, 39.55, 56.25],
        [63.5, 63.6, 63.3, 62.5, 60.1],
        [14.72, 14.77, 14.71, 14.53, 13.84],
    ),
    "contrast": (
        [10.31, 20.61, 24.73, 28.85, 35.04],
        [52.7, 43.8, 41.0, 38.6, 36.1],
        [10.92, 7.28, 5.83, 4.37, 2.18],
    ),
    "elastic_transform": (
        [21.46, 19.61, 17.6, 16.28, 13.42],
        [61.5, 61.1, 60.6, 60.5, 60.4],
        [12.36, 11.95, 11.05, 10.95, 11.39],
    ),
    "pixelate": (
        [1.8, 3.35, 4.11, 6.22, 8.61],
        [62.7, 62.4, 62.3, 61.9, 61.3],
        [13.97, 13.43, 13.14, 12.34, 11.0],
    ),
    "jpeg_compression": (
        [5.35, 6.63, 7.07, 7.52, 8.13],
        [62.7, 62.6, 62.5, 62.5, 62.4],
        [15.08, 14.99, 14.9, 14.8, 14.65],
    ),
    "speckle_noise": (
        [5.63, 9.27, 11.07, 14.61, 18.06],
        [63.1, 63.6, 63.9, 64.7, 65.8],
        [17.99, 21.45, 23.33, 27.22, 31.25],
    ),
    "gaussian_blur": (
        [1.34, 4.92, 6.29, 7.45, 9.45],
        [62.3, 60.4, 59.8, 59.2, 58.0],
        [13.46, 10.72, 9.85, 9.16, 8.06],
    ),
    "spatter": (
        [1.05, 2.77, 6.76, 2.96, 4.95],
        [63.3, 63.8, 64.5, 63.2, 63.3],
        [15.75, 17.24, 18.73, 16.88, 18.76],
    ),
    "saturate": (
        [12.1, 15.63, 8.39, 20.71, 29.73],
        [61.0, 61.4, 66.4, 68.4, 69.4],
        [14.57, 14.72, 14.83, 14.54, 14.23],
    ),
}
CIFAR = ROOT / "data" / "cifar10.npz"


def predicted(y, x):
    """The mean of y (N,) for images with the clean statistics of the table, and its error.

    A regression on mean, mean square and gradient of the clean images takes out most of what
    differs between our images and the table's; the error counts both samples (ours, and 1,000).
    """
    _, mean, square, gradient = statistics(x, x)
    offsets = mean - 120.45, square - 62.96**2 - 120.45**2, gradient - 14.57
    design = torch.stack([torch.ones_like(mean), *offsets], 1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution
    rest = (y - (design @ solution)[:, 0]).std() * math.sqrt(1 / len(x) + 1 / 1000)
    return solution[0].item(), rest.item()


@pytest.fixture(scope="module")
def photographs():
    """200 real test images, uint8 (200, 32, 32, 3)."""
    if not CIFAR.exists():  # the tests on generated images need no file and always run
        pytest.skip(f"the fingerprints of real images need data/{CIFAR.name}")
    with np.load(CIFAR) as file:
        return torch.from_numpy(file["x_test"][:200])


# frost is drawn by code here, and has its own test
@pytest.mark.parametrize("name", [name for name in corruptions.CORRUPTIONS if name != "frost"])
def test_real_images_match_the_fingerprints_of_the_reference_generator(name, photographs):
    for severity in range(1, 6):
        out = corruptions.corrupt(photographs, name, severity)
        change, mean, square, gradient = statistics(out, photographs)
        table = [row[severity - 1] for row in FINGERPRINTS[name]]
        m = predicted(mean, photographs)[0]
        variance, error = predicted(square - 2 * m * mean, photographs)
        std = math.sqrt(variance + m * m)
        results = {
            "change": (*predicted(change, photographs), table[0]),
            "std": (std, error / (2 * std), table[1]),
            "gradient": (*predicted(gradient, photographs), table[2]),
        }
        for what, (got, error, expected) in results.items():
            # 4.5 standard errors (270 comparisons); the last printed digit of the table, also of
            # its clean statistics, which the prediction is made for
            slack = 0.07 if what == "std" else 0.03
            assert abs(got - expected) < 4.5 * error + slack, (what, severity, got, expected, error)


# Measured with this code, when it matched the table above on real images.
CHANGE_OF_TEXTURES = {
    "gaussian_noise": [8.12, 12.16, 16.16, 18.2, 20.11],
    "shot_noise": [6.24, 8.81, 13.87, 15.95, 19.5],
    "impulse_noise": [1.29, 2.53, 3.9, 6.46, 8.86],
    "defocus_blur": [0.9, 2.11, 3.08, 4.36, 5.24],
    "glass_blur": [7.6, 7.64, 7.46, 12.36, 11.99],
    "motion_blur": [5.26, 8.13, 10.43, 10.58, 12.6],
    "zoom_blur": [6.09, 7.06, 8.52, 10.0, 11.59],
    "snow": [11.17, 24.97, 26.19, 39.59, 55.94],
    "frost": [30.74, 44.9, 46.53, 44.36, 37.2],
    "fog": [9.37, 18.18, 23.3, 28.97, 35.62],
    "brightness": [8.98, 18.47, 27.58, 35.98, 49.8],
    "contrast": [9.65, 19.29, 23.15, 27.0, 32.79],
    "elastic_transform": [17.57, 15.63, 13.77, 12.08, 9.94],
    "pixelate": [1.26, 2.45, 2.97, 4.43, 5.94],
    "jpeg_compression": [7.35, 8.33, 8.62, 8.96, 9.48],
    "speckle_noise": [5.99, 9.94, 11.9, 15.78, 19.49],
    "gaussian_blur": [0.86, 2.97, 3.67, 4.19, 5.05],
    "spatter": [1.08, 2.78, 7.04, 3.06, 5.07],
    "saturate": [29.47, 37.97, 18.34, 32.22, 38.19],
}
DIGESTS = {
    "impulse_noise": "2911a2a7c955817e",
    "brightness": "a7a05e2fb61e9691",
    "pixelate": "e9278b705712a084",
}


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_generated_images_change_as_they_did_when_real_ones_matched(name):
    x = textured()
    for severity, expected in enumerate(CHANGE_OF_TEXTURES[name], 1):
        change = statistics(corruptions.corrupt(x, name, severity), x)[0].mean().item()
        # the draws are the same everywhere; sums may round otherwise, which truncation turns
        # into one level in a few pixels of a thousand
        assert change == pytest.approx(expected, abs=0.03), severity


def test_the_images_are_the_same_as_ever():
    """Those whose arithmetic is exact on every machine; the others may round by one level."""
    x, digests = textured(20), {}
    for name in ("impulse_noise", "brightness", "pixelate"):
        outs = [corruptions.corrupt(x, name, s).numpy().tobytes() for s in range(1, 6)]
        digests[name] = hashlib.sha256(b"".join(outs)).hexdigest()[:16]
    assert digests == DIGESTS


def test_every_corruption_has_five_severities_and_keeps_the_shape(shapes):
    assert list(corruptions.CORRUPTIONS) == list(ev.CORRUPTIONS) == list(FINGERPRINTS)
    for name in corruptions.CORRUPTIONS:
        outs = [corruptions.corrupt(shapes[0][:8], name, severity) for severity in range(1, 6)]
        assert all(out.dtype == torch.uint8 and out.shape == (8, 32, 32, 3) for out in outs)
        assert len({out.numpy().tobytes() for out in outs}) == 5, name


def test_uniform_draws_are_uniform_and_independent_between_images_and_calls():
    draw = ev.uniform(torch.arange(1000), "uniformity")
    a, b = draw(1000), draw(1000)
    counts = torch.histc(a.float(), 64, 0, 1)
    assert ((counts - 15625) ** 2 / 15625).sum() < 63 + 5 * math.sqrt(126)  # chi squared
    for u, v in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        assert abs(((u - 0.5) * (v - 0.5)).mean().item() * 12) < 5e-3  # five standard errors


def test_an_image_is_corrupted_alike_alone_in_a_batch_and_whatever_the_global_generator(shapes):
    x = shapes[0][:12]
    for name in corruptions.CORRUPTIONS:
        torch.manual_seed(0)
        whole = corruptions.corrupt(x, name, 3, seed=1)
        torch.manual_seed(5)
        np.random.seed(5)
        pieces = [corruptions.corrupt(x[i : i + 5], name, 3, seed=1, start=i) for i in (0, 5, 10)]
        difference = (torch.cat(pieces).int() - whole.int()).abs()
        # another batch size may order sums otherwise: truncation can then differ by one level
        assert difference.max() <= 1 and difference.float().mean() < 1e-3, name


def test_draws_differ_between_seeds_severities_corruptions_and_images(shapes):
    x = shapes[0][:1].repeat(2, 1, 1, 1)
    for name in (
        "gaussian_noise",
        "shot_noise",
        "glass_blur",
        "motion_blur",
        "snow",
        "frost",
        "fog",
        "spatter",
    ):
        out, other = (corruptions.corrupt(x, name, 4, seed=seed) for seed in (0, 1))
        assert not torch.equal(out, other), name
        assert not torch.equal(out[0], out[1]), name
    a, b = (ev.uniform(torch.arange(1), "corrupt", 0, "snow", s)(9) for s in (1, 2))
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------------
# Each corruption alone: what it does to images for which the answer is known


@pytest.mark.parametrize("name", "gaussian_noise shot_noise impulse_noise speckle_noise".split())
def test_noise_on_a_grey_image_has_the_published_standard_deviation(name):
    x = torch.full((200, 32, 32, 3), 102, dtype=torch.uint8)
    level = 102 / 255
    for severity, c in enumerate(corruptions.SEVERITIES[name], 1):
        variance = {
            "gaussian_noise": c * c,
            "shot_noise": level / c,
            "speckle_noise": (c * level) ** 2,
            "impulse_noise": c / 2 * (level**2 + (1 - level) ** 2) - (c / 2 * (1 - 2 * level)) ** 2,
        }[name]
        out = corruptions.corrupt(x, name, severity).double()
        expected = 255 * math.sqrt(variance)
        # 614,400 draws: a relative error of .1 % for the normal ones, of 1 % for impulses; the
        # truncation to whole levels adds a variance of 1/12
        assert out.std().item() == pytest.approx(math.hypot(expected, 12**-0.5), rel=0.03)
        bias = 255 * c / 2 * (1 - 2 * level) if name == "impulse_noise" else -0.5
        assert out.mean().item() - 102 == pytest.approx(bias, abs=5 * expected / 614400**0.5 + 0.02)


def test_poisson_counts_have_the_mean_and_the_third_moment_of_the_law():
    x = torch.full((200, 32, 32, 3), 51, dtype=torch.uint8)  # rate 50 / 5 = 10
    draw = ev.uniform(torch.arange(200), "poisson")
    counts = 50 * corruptions.shot_noise(x.permute(0, 3, 1, 2).double() / 255, draw, 50)
    assert (counts - counts.round()).abs().max() < 1e-9
    assert counts.mean().item() == pytest.approx(10, abs=0.03)
    assert ((counts - 10) ** 3).mean().item() == pytest.approx(10, abs=0.6)


@pytest.mark.parametrize("name", "gaussian_noise shot_noise impulse_noise speckle_noise".split())
def test_distance_from_the_clean_image_grows_with_the_severity_of_noise(name, shapes):
    x = shapes[0]
    change = [statistics(corruptions.corrupt(x, name, s), x)[0].mean() for s in range(1, 6)]
    assert change == sorted(change)


@pytest.mark.parametrize("name", "defocus_blur gaussian_blur zoom_blur pixelate".split())
def test_blur_moves_away_and_loses_gradient_with_every_severity(name):
    x = textured()
    rows = [statistics(corruptions.corrupt(x, name, s), x) for s in range(1, 6)]
    change, gradient = ([row[k].mean().item() for row in rows] for k in (0, 3))
    assert change == sorted(change)
    assert gradient == sorted(gradient, reverse=True)
    assert gradient[0] < statistics(x, x)[3].mean()


def test_contrast_scales_the_spread_of_every_channel_by_the_published_factor():
    x = textured() // 2 + 64  # far from the ends: nothing is clipped
    for severity, factor in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1):
        out = corruptions.corrupt(x, "contrast", severity).double()
        ratio = out.std((1, 2)) / x.double().std((1, 2))
        assert ratio.sub(factor).abs().max() < 0.01 * (1 + 2 * factor)


def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation():
    x = textured() // 2 + 32
    out = corruptions.corrupt(x, "brightness", 4).double()
    assert (out.amax(3) - x.double().amax(3)).sub(51).abs().max() <= 1
    ratio = out.amin(3) / out.amax(3) - x.double().amin(3) / x.double().amax(3)
    assert ratio.abs().max() < 0.02


def test_saturation_leaves_the_value_and_turns_grey_to_red():
    x = textured()
    out = corruptions.corrupt(x, "saturate", 5)
    assert (out.amax(3).int() - x.amax(3).int()).abs().max() <= 1
    grey = corruptions.corrupt(torch.full((1, 32, 32, 3), 100, dtype=torch.uint8), "saturate", 5)
    assert grey[0, 0, 0].tolist() == [100, 80, 80]  # a shift of .2


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_equals_pillow_bit_for_bit(severity):
    from PIL import Image

    x = torch.from_numpy(np.random.default_rng(severity).integers(0, 256, (20, 32, 32, 3), "u1"))
    side = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    for image, out in zip(x.numpy(), corruptions.corrupt(x, "pixelate", severity).numpy()):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(small.resize((32, 32), Image.Resampling.BOX)), out)


def test_jpeg_equals_pillow_bit_for_bit():
    import io

    from PIL import Image

    x = textured(4)
    for image, out in zip(x.numpy(), corruptions.corrupt(x, "jpeg_compression", 5).numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=40)
        assert np.array_equal(np.asarray(Image.open(file)), out)


def test_defocus_kernels_are_the_published_ones():
    x = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    x[0, 16, 16] = 255
    plus = corruptions.corrupt(x, "defocus_blur", 4)[0, :, :, 0]
    box = corruptions.corrupt(x, "defocus_blur", 5)[0, :, :, 0]
    assert (plus > 45).sum() == 5 and (plus > 0).sum() == 5
    assert (box[15:18, 15:18] == 28).all() and (box > 0).sum() == 9
    line = torch.tensor([0.0404, 0.9192, 0.0404])  # severity 1 is an outer product of this
    mild = corruptions.corrupt(x, "defocus_blur", 1)[0, 15:18, 15:18, 0].float()
    assert (mild - torch.outer(line, line) * 255).abs().max() <= 1


def test_motion_blur_takes_whole_pixels_along_one_direction_and_keeps_the_mean():
    v = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    v[:, :, 16, 16] = 255
    out = corruptions.motion(v, 6, 2.0, torch.tensor([0.0, 90.0]).double())
    # tap i reads i pixels further right (0 degrees) or down (90): the light goes left or up
    weights = torch.exp(-(torch.arange(13).double() ** 2) / 8)
    expected = (weights / weights.sum() * 255).floor()
    assert (out[0, 0, 16, 4:17].flip(0) - expected).abs().max() <= 1
    assert (out[1, 0, 4:17, 16].flip(0) - expected).abs().max() <= 1
    assert out[0].sum() == out[0, 0, 16].sum()
    flat = torch.full((1, 1, 32, 32), 77.0).double()
    assert torch.equal(corruptions.motion(flat, 9, 2.5, torch.tensor([30.0]).double()), flat)


def test_zoom_factors_and_the_enlarged_crop_are_those_of_the_reference():
    ends = corruptions.SEVERITIES["zoom_blur"]
    assert [len(np.arange(1, end, 0.01)) for end in ends] == [7, 12, 16, 21, 26]
    x = torch.rand(1, 1, 32, 32).double()
    side = 26  # the crop of factor 1.25: 26 pixels at row 3, enlarged to round(32.5) = 32 or 33
    crop = x[:, :, 3:29, 3:29]
    whole = F.interpolate(crop, (32, 32), mode="bilinear", align_corners=True)
    assert side == math.ceil(32 / 1.25) and torch.allclose(corruptions.zoom(x, 1.25), whole)


def test_glass_blur_only_moves_pixels_right_or_down_by_one_per_pass():
    x = torch.arange(1024).view(1, 1, 32, 32).expand(5, 3, 32, 32).double() / 1024
    draw = ev.uniform(torch.arange(5), "glass")
    out = corruptions.glass_blur(x, draw, 0.05, 1)
    allowed = torch.stack([x, *(x.roll(s, d) for s, d in ((1, 2), (1, 3), ((1, 1), (2, 3))))])
    allowed = (allowed * 255).floor() / 255
    assert ((out - allowed).abs().amin(0) < 1e-12).all()
    assert torch.equal(out[:, :, :2], allowed[0][:, :, :2])


def test_elastic_transform_without_jitter_is_the_identity_and_moves_smoothly_with_it():
    x = textured(8).permute(0, 3, 1, 2).double() / 255
    draw = ev.uniform(torch.arange(8), "elastic")
    assert torch.allclose(corruptions.elastic_transform(x, draw, 0, 0, 0.0), x)
    ramp = (torch.arange(32.0).double() / 64 + 0.25).expand(8, 3, 32, 32)
    moved = corruptions.elastic_transform(ramp, draw, 0, 0, 2.56)
    assert (moved.diff(dim=3)[..., 8:-8] > 0).all()  # still a ramp away from the mirrored border


def test_fog_is_a_fractal_from_zero_to_one_and_keeps_the_brightest_level():
    plasma = corruptions.plasma(ev.uniform(torch.arange(50), "fog"), 3)
    assert plasma.amin((1, 2)).eq(0).all() and plasma.amax((1, 2)).eq(1).all()
    step = plasma.diff(dim=1).abs().mean() / (plasma.std() * math.sqrt(2))
    assert step < 0.3  # smooth: independent pixels would give 0.8
    x = textured(20)
    assert corruptions.corrupt(x, "fog", 5).amax() <= x.amax()


def test_spatter_pieces_agree_with_hand_worked_cases():
    v = torch.zeros(1, 1, 32, 32).double()
    v[..., 16:] = 200
    edges = corruptions.canny_edges(v)
    assert edges[0, 0, :, 15].all() and edges.sum() == 32  # one line, on the first of two equals
    fractal = textured(60)[..., :1].permute(0, 3, 1, 2).double()
    assert corruptions.canny_edges(fractal).sum() == 17638  # OpenCV 5.0 marks the same pixels
    distance = corruptions.edge_distance(edges)
    assert distance[0, 0, 5, 15 + 7] == 7 and distance[0, 0, 5, 0] == 15
    point = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    point[0, 0, 3, 3] = True
    distance = corruptions.edge_distance(point)[0, 0]
    hand = {(3, 3): 0, (4, 4): 1.4, (4, 5): 2.1969, (4, 6): 3.1969, (6, 8): 2 * 2.1969 + 1.4}
    assert all(abs(distance[k].item() - value) < 1e-9 for k, value in hand.items())
    assert distance[31, 31] == 20
    levels = torch.tensor([3.0] * 512 + [5.0] * 256 + [9.0] * 256).view(1, 1, 32, 32)
    assert corruptions.equalise(levels).unique().tolist() == [0, 128, 255]


def test_frost_drawn_by_code_is_near_the_published_one_and_files_are_read(tmp_path, refused):
    from PIL import Image

    x = textured(100)
    bias = (corruptions.corrupt(x, "frost", 1).double() - x.double()).mean().item()
    assert 20 < bias < 40  # the table has 30.7, for other images
    for i in range(1, 6):
        image = np.full((200 + 10 * i, 300, 3), 40 * i, np.uint8)
        if i < 4:  # a fifth of the size takes pixels 2, 7, 12 ...; the others are white
            image[np.arange(len(image)) % 5 != 2] = 255
            image[:, np.arange(300) % 5 != 2] = 255
        Image.fromarray(image).save(tmp_path / f"frost{i}.{'png' if i < 4 else 'jpg'}")
    dark = torch.zeros(200, 32, 32, 3, dtype=torch.uint8)
    out = corruptions.corrupt(dark, "frost", 1, frost_dir=str(tmp_path))
    values, counts = out.flatten(1)[:, 0].unique(return_counts=True)
    assert values.tolist() == [8, 16, 24, 32, 40]  # a fifth of each texture
    assert counts.min() > 15
    (tmp_path / "frost4.jpg").unlink()
    corruptions.frost_textures.cache_clear()
    message = refused(corruptions.corrupt, dark, "frost", 1, frost_dir=str(tmp_path))
    assert "frost4.jpg" in message


def test_other_sizes_are_refused_with_one_line(refused):
    x = torch.zeros(2, 28, 28, 1, dtype=torch.uint8)
    assert "(2, 28, 28, 1)" in refused(corruptions.corrupt, x, "snow", 1)


# ------------------------------------------------------------------------------------------------
# Accuracy under corruptions


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
    blurred = corruptions.corrupt(x, "gaussian_blur", 1)
    for name in ev.CORRUPTIONS:
        images = [blurred] * 5
        if name == "fog":
            images[4] = torch.zeros_like(x)  # all dark: right only where the label is 0
        np.save(tmp_path / f"{name}.npy", torch.cat(images).numpy())
    np.save(tmp_path / "labels.npy", np.tile(y.numpy(), 5))
    return tmp_path, x, y


def test_official_files_give_accuracy_and_the_papers_conditional_form(official):
    folder, x, y = official
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    counts, saved = {}, []
    result = ev.corruption_accuracy(
        Brightness(),
        x[order],
        y[order],
        ev.read_corruptions(folder, x[order], y[order]),
        batch_size=7,
        counts=counts,
        save=lambda: saved.append(len(counts)),
    )
    assert result["clean_acc"] == pytest.approx(0.75) and result["n"] == 40
    assert saved == list(range(1, 20))
    clean = (x.float().mean((1, 2, 3)) > 127.5).long() == y
    dark = (y == 0).double().mean().item()
    both = ((y == 0) & clean).sum().item() / clean.sum().item()
    assert result["corruptions_acc"]["fog"][4] == pytest.approx(dark)
    assert result["conditional_acc"]["fog"][4] == pytest.approx(both)
    of_all = [v for name in ev.CORRUPTIONS for v in result["conditional_acc"][name]]
    assert result["mca_acc"] == pytest.approx(np.mean(of_all))
    of_15 = [v for name in list(ev.CORRUPTIONS)[:15] for v in result["corruptions_acc"][name]]
    assert result["mean15_acc"] == pytest.approx(np.mean(of_15))
    means = {name: np.mean(values) for name, values in result["corruptions_acc"].items()}
    conditional = {name: np.mean(values) for name, values in result["conditional_acc"].items()}
    assert result["mean19_acc"] == pytest.approx(np.mean([*means.values()]))
    without_frost = [value for name, value in conditional.items() if name != "frost"]
    assert result["mca18_acc"] == pytest.approx(np.mean(without_frost))
    for row in ev.corruption_rows(result):
        found = row["mean_acc"], row["conditional_acc"]
        name = row["corruption"]
        assert found == pytest.approx((means[name], conditional[name]))
    five = x[y == 0][:5], y[y == 0][:5]
    few = ev.corruption_accuracy(Brightness(), *five, ev.read_corruptions(folder, *five))
    assert few["n"] == 5 and few["corruptions_acc"]["fog"] == [few["clean_acc"]] * 4 + [1.0]


def test_two_nets_in_one_command_have_the_numbers_that_each_has_alone(official, tmp_path):
    folder, x, y = official
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = common.build_model("mlp-8", 2, size=x.shape[1])
        net.layers[-1].weight.data *= 30
        common.save_model(tmp_path / f"{seed}.pt", net)

    def rows(out, *nets):
        argv = [f"{tmp_path}/{net}.pt" for net in nets]
        argv += f"--data {tmp_path}/d.npz --device cpu --attack clean pgd2 corruptions".split()
        ev.main([*argv, "--corruptions", str(folder), "--json", f"{tmp_path}/{out}"])
        found = json.loads((tmp_path / out).read_text())["rows"]
        return [{k: v for k, v in row.items() if k != "reports"} | {"seconds": 0} for row in found]

    both = rows("both.json", 0, 1)
    assert both == rows("first.json", 0) + rows("second.json", 1)
    assert both[0]["corruptions"]["corruptions_acc"] != both[1]["corruptions"]["corruptions_acc"]
    assert both[0]["corruptions"]["note"] == f"images of {folder}"
    for key in ("mean15_acc", "mean18_acc", "mean19_acc", "mca_acc"):
        assert both[0][key] == both[0]["corruptions"][key]


def test_test_images_that_are_not_in_the_folder_are_refused(official, refused):
    folder, x, y = official
    files, rows = ev.read_corruptions(folder, x.flip(0), y.flip(0))
    assert rows.tolist() == list(range(39, -1, -1)) and len(files) == 19
    for images, labels in (
        (textured(12, seed=9), torch.arange(12) % 2),  # other images
        (torch.cat([x, textured(1, seed=9)]), torch.cat([y, y[:1]])),  # one more
        (x, y.roll(1)),  # other labels
        (x, y + 1),  # a class that the folder does not have
    ):
        message = refused(ev.read_corruptions, folder, images, labels)
        assert "not every test image is among its 40 images" in message
    small = refused(ev.read_corruptions, folder, x[:, :28, :28], y)
    assert "expected uint8 (200, 28, 28, 3), got uint8 (200, 32, 32, 3)" in small


def linear_net():
    weights = torch.randn(2, 3072, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2, bias=False))
    model[1].weight.data = weights - weights.mean(1, keepdim=True)
    return model


def test_an_evaluation_reads_what_the_program_has_written_and_goes_on(shapes, tmp_path):
    x, y, model = shapes[0][:30], torch.arange(30) % 2, linear_net()
    corruptions.write_folder(tmp_path, x, y)
    counts, after_nine = {}, {}

    def keep_nine():
        if len(counts) == 9:
            after_nine.update(counts)

    files = ev.read_corruptions(tmp_path, x, y)
    full = ev.corruption_accuracy(model, x, y, files, batch_size=4, counts=counts, save=keep_nine)
    for name in ("snow", "pixelate"):
        foggy = corruptions.corrupt(x, name, 3)
        correct = common.predict(model, foggy).argmax(1) == y
        assert full["corruptions_acc"][name][2] == correct.double().mean().item()
    again = ev.corruption_accuracy(model, x, y, files, counts=dict(after_nine))
    assert again == full  # in other batches, from the tenth corruption on
    zeros = {name: [[0, 0]] * 5 for name in after_nine}
    again = ev.corruption_accuracy(model, x, y, files, counts=zeros)["corruptions_acc"]
    for name in ev.CORRUPTIONS:  # what is counted already is not run again
        assert again[name] == ([0.0] * 5 if name in after_nine else full["corruptions_acc"][name])
    rows = ev.corruption_rows(full)
    assert len(common.table(rows).splitlines()) == 2 + 19 and len(rows[0]) == 8
    assert "mca18_acc" in full
    rest = [np.mean(v) for name, v in full["corruptions_acc"].items() if name != "frost"]
    assert full["mean18_acc"] == pytest.approx(np.mean(rest))


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda f: (f / "fog.npy").unlink(), "fog.npy"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy"),
        (lambda f: np.save(f / "snow.npy", np.zeros((200, 32, 32, 1), np.uint8)), "snow.npy"),
        (lambda f: np.save(f / "snow.npy", np.zeros((200, 32, 32, 3), np.float32)), "float32"),
        (lambda f: truncate(f / "frost.npy"), "frost"),
        (lambda f: np.save(f / "labels.npy", np.arange(200) // 100), "labels.npy"),
        (lambda f: np.save(f / "labels.npy", np.full(200, 7)), "with the same label"),
        (lambda f: np.save(f / "labels.npy", np.full(200, -1)), "labels 0..K-1"),
    ],
)
def test_a_broken_folder_of_corruptions_is_one_line(official, damage, word, refused):
    folder, x, y = official
    ev.read_corruptions(folder, x, y)
    damage(folder)
    assert word in refused(ev.read_corruptions, folder, x, y)


def test_a_folder_that_is_not_there_is_one_line_that_says_how_to_make_it(tmp_path, refused):
    common.save_model(tmp_path / "net.pt", common.build_model("mlp-8"))
    flags = [str(tmp_path / "net.pt"), *"--data shapes --n 8 --attack corruptions".split()]
    assert "--corruptions" in refused(ev.parse_args, flags)
    message = refused(ev.main, [*flags, "--corruptions", "my folder"])
    command = "python benchmark/corruptions.py --data shapes --n 8 --out 'my folder'"
    assert message.startswith("--corruptions: there is no folder my folder; ")
    assert message.endswith(command)
    args = corruptions.parse_args(shlex.split(command)[2:])
    assert (args.data, args.n, args.out) == ("shapes", 8, "my folder")


# ------------------------------------------------------------------------------------------------
# The program that writes a folder


def write(folder, *flags):
    corruptions.main(["--data", "shapes", "--n", "3", "--out", str(folder), *flags])


def test_the_program_writes_the_published_format(tmp_path, capsys):
    write(tmp_path / "out")
    data = common.load_data("shapes", test_subset=3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.npy" for name in ev.CORRUPTIONS} | {"labels.npy", "source.json"}
    labels = np.load(tmp_path / "out" / "labels.npy")
    assert labels.tolist() == data.y_test.tolist() * 5
    for name in ("fog", "gaussian_noise", "jpeg_compression"):
        images = np.load(tmp_path / "out" / f"{name}.npy")
        assert images.dtype == np.uint8 and images.shape == (15, 32, 32, 3)
        for severity in range(1, 6):
            expected = corruptions.corrupt(data.x_test, name, severity).numpy()
            assert np.array_equal(images[3 * severity - 3 : 3 * severity], expected)
    assert "19 of 19" in capsys.readouterr().out


def test_more_images_than_a_batch_have_their_own_numbers(shapes, tmp_path, monkeypatch):
    x, y = shapes[0][:5], shapes[1][:5]
    noise = {"gaussian_noise": corruptions.gaussian_noise}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", noise)
    corruptions.write_folder(tmp_path / "one", x, y)
    monkeypatch.setattr(corruptions, "BATCH_SIZE", 2)
    corruptions.write_folder(tmp_path / "three", x, y)
    one, three = (np.load(tmp_path / f / "gaussian_noise.npy") for f in ("one", "three"))
    assert np.array_equal(one, three)


def test_a_killed_program_goes_on_after_its_last_file(tmp_path, monkeypatch, capsys):
    out, calls, kept = tmp_path / "out", [], list(ev.CORRUPTIONS)[:2]

    def stopping(x, name, *args):
        calls.append(name)
        if name not in kept:
            raise KeyboardInterrupt
        return corrupt(x, name, *args)

    corrupt = corruptions.corrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corruptions, "corrupt", stopping)
        write(out)
    assert {path.stem for path in out.iterdir()} == {*kept, "labels", "source"}
    before = {name: (out / f"{name}.npy").stat().st_mtime_ns for name in kept}
    capsys.readouterr()
    write(out)
    printed = capsys.readouterr().out
    assert printed.count("is there") == 2 and printed.count("is written") == 17
    assert before == {name: (out / f"{name}.npy").stat().st_mtime_ns for name in kept}
    data = common.load_data("shapes", test_subset=3)
    ev.read_corruptions(out, data.x_test, data.y_test)


def test_a_folder_of_something_else_is_refused_by_name(tmp_path, monkeypatch, refused):
    brightness = {"brightness": corruptions.brightness}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", brightness)
    out = tmp_path / "out"
    write(out)
    message = refused(corruptions.main, ["--data", "shapes", "--n", "4", "--out", str(out)])
    assert message.startswith(f"--out: {out} has files from") and "'n': 3" in message
    truncate(out / "brightness.npy")
    assert "brightness.npy" in refused(write, out)
    np.save(out / "brightness.npy", np.zeros((15, 32, 32, 1), np.uint8))
    assert "brightness.npy: expected uint8 (15, 32, 32, 3)" in refused(write, out)
    (out / "source.json").unlink()  # as in the published folder
    assert "has files from elsewhere" in refused(write, out)
    (tmp_path / "file").touch()
    assert "is a file" in refused(write, tmp_path / "file")
    np.savez(
        tmp_path / "grey.npz",
        **{f"x_{part}": np.zeros((2, 28, 28), np.uint8) for part in ("train", "test")},
        **{f"y_{part}": np.arange(2) for part in ("train", "test")},
    )
    flags = ["--data", str(tmp_path / "grey.npz"), "--out", str(tmp_path / "grey")]
    assert "needs images of (32, 32, 3), got (28, 28, 1)" in refused(corruptions.main, flags)
    assert not (tmp_path / "grey").exists()
    flags = ["--frost-dir", str(tmp_path)]
    assert "frost1.png" in refused(write, tmp_path / "frosty", *flags)
    assert not (tmp_path / "frosty").exists()


# ------------------------------------------------------------------------------------------------
# Other images


def test_an_npz_with_class_names_is_matched_by_name(tmp_path, refused):
    x = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_test=x, y_test=np.array([0, 1, 1]), classes=["cat", "dog"])
    found = ev.load_other_images(tmp_path / "a.npz", ["dog", "cat", "owl"])
    assert found.labels.tolist() == [1, 0, 0] and found.x[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert found.note.startswith("3 images; sha256 of images and labels: ")
    assert "dog: none of the classes cat" in refused(
        ev.load_other_images, tmp_path / "a.npz", ["cat"]
    )


def test_folders_and_npz_files_of_other_images_are_read(tmp_path):
    classes = ["cat", "dog", "owl"]
    save_image(tmp_path / "a" / "dog" / "1.png", 9)
    save_image(tmp_path / "a" / "cat" / "2.jpg", 50)
    found = ev.load_other_images(tmp_path / "a", classes)
    assert found.labels.tolist() == [0, 1] and found.x[1, 0, 0].tolist() == [9, 9, 9]
    np.savez(tmp_path / "b.npz", x_test=found.x.numpy(), y_test=np.array([2, 0]))
    again = ev.load_other_images(tmp_path / "b.npz", classes)
    assert torch.equal(again.x, found.x) and again.labels.tolist() == [2, 0]
    (tmp_path / "a" / "cat" / "link.png").symlink_to(tmp_path / "a" / "dog" / "1.png")
    with pytest.raises(common.UserError, match="is a link"):
        ev.load_other_images(tmp_path / "a", classes)


def test_missing_and_foreign_files_of_other_images_are_refused(tmp_path, refused):
    images = np.zeros((2, 28, 28, 3), np.uint8)
    np.savez(tmp_path / "size.npz", x_test=images, y_test=np.zeros(2, int))
    images = np.zeros((2, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "label.npz", x_test=images, y_test=np.full(2, 2))
    np.savez(tmp_path / "arrays.npz", x=np.zeros(1))
    (tmp_path / "bytes.npz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    for name in ("none", "none.npz", "size.npz", "label.npz", "arrays.npz", "bytes.npz", "empty"):
        assert name in refused(ev.load_other_images, tmp_path / name, ["cat", "dog"])
