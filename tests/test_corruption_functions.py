"""Each corruption alone: what it does to images for which the answer is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import statistics, textured

import images as part


@pytest.mark.parametrize("name", "gaussian_noise shot_noise impulse_noise speckle_noise".split())
def test_noise_on_a_grey_image_has_the_published_standard_deviation(name):
    x = torch.full((200, 32, 32, 3), 102, dtype=torch.uint8)
    level = 102 / 255
    for severity, c in enumerate(part.CORRUPTIONS[name][1], 1):
        variance = {
            "gaussian_noise": c * c,
            "shot_noise": level / c,
            "speckle_noise": (c * level) ** 2,
            "impulse_noise": c / 2 * (level**2 + (1 - level) ** 2) - (c / 2 * (1 - 2 * level)) ** 2,
        }[name]
        out = part.corrupt(x, name, severity).double()
        expected = 255 * math.sqrt(variance)
        # 614,400 draws: a relative error of .1 % for the normal ones, of 1 % for impulses; the
        # truncation to whole levels adds a variance of 1/12
        assert out.std().item() == pytest.approx(math.hypot(expected, 12**-0.5), rel=0.03)
        bias = 255 * c / 2 * (1 - 2 * level) if name == "impulse_noise" else -0.5
        assert out.mean().item() - 102 == pytest.approx(bias, abs=5 * expected / 614400**0.5 + 0.02)


def test_poisson_counts_have_the_mean_and_the_third_moment_of_the_law():
    x = torch.full((200, 32, 32, 3), 51, dtype=torch.uint8)  # rate 50 / 5 = 10
    draw = part.uniform(torch.arange(200), "poisson")
    counts = 50 * part._shot_noise(x.permute(0, 3, 1, 2).double() / 255, draw, 50)
    assert (counts - counts.round()).abs().max() < 1e-9
    assert counts.mean().item() == pytest.approx(10, abs=0.03)
    assert ((counts - 10) ** 3).mean().item() == pytest.approx(10, abs=0.6)


@pytest.mark.parametrize("name", "gaussian_noise shot_noise impulse_noise speckle_noise".split())
def test_distance_from_the_clean_image_grows_with_the_severity_of_noise(name, shapes):
    x = shapes[0]
    change = [statistics(part.corrupt(x, name, s), x)[0].mean() for s in range(1, 6)]
    assert change == sorted(change)


@pytest.mark.parametrize("name", "defocus_blur gaussian_blur zoom_blur pixelate".split())
def test_blur_moves_away_and_loses_gradient_with_every_severity(name):
    x = textured()
    rows = [statistics(part.corrupt(x, name, s), x) for s in range(1, 6)]
    change, gradient = ([row[k].mean().item() for row in rows] for k in (0, 3))
    assert change == sorted(change)
    assert gradient == sorted(gradient, reverse=True)
    assert gradient[0] < statistics(x, x)[3].mean()


def test_contrast_scales_the_spread_of_every_channel_by_the_published_factor():
    x = textured() // 2 + 64  # far from the ends: nothing is clipped
    for severity, factor in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1):
        out = part.corrupt(x, "contrast", severity).double()
        ratio = out.std((1, 2)) / x.double().std((1, 2))
        assert ratio.sub(factor).abs().max() < 0.01 * (1 + 2 * factor)


def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation():
    x = textured() // 2 + 32
    out = part.corrupt(x, "brightness", 4).double()
    assert (out.amax(3) - x.double().amax(3)).sub(51).abs().max() <= 1
    ratio = out.amin(3) / out.amax(3) - x.double().amin(3) / x.double().amax(3)
    assert ratio.abs().max() < 0.02


def test_saturation_leaves_the_value_and_turns_grey_to_red():
    x = textured()
    out = part.corrupt(x, "saturate", 5)
    assert (out.amax(3).int() - x.amax(3).int()).abs().max() <= 1
    grey = part.corrupt(torch.full((1, 32, 32, 3), 100, dtype=torch.uint8), "saturate", 5)
    assert grey[0, 0, 0].tolist() == [100, 80, 80]  # a shift of .2


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_equals_pillow_bit_for_bit(severity):
    from PIL import Image

    x = torch.from_numpy(np.random.default_rng(severity).integers(0, 256, (20, 32, 32, 3), "u1"))
    side = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    for image, out in zip(x.numpy(), part.corrupt(x, "pixelate", severity).numpy()):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(small.resize((32, 32), Image.Resampling.BOX)), out)


def test_jpeg_equals_pillow_bit_for_bit():
    import io

    from PIL import Image

    x = textured(4)
    for image, out in zip(x.numpy(), part.corrupt(x, "jpeg_compression", 5).numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=40)
        assert np.array_equal(np.asarray(Image.open(file)), out)


def test_defocus_kernels_are_the_published_ones():
    x = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    x[0, 16, 16] = 255
    plus = part.corrupt(x, "defocus_blur", 4)[0, :, :, 0]
    box = part.corrupt(x, "defocus_blur", 5)[0, :, :, 0]
    assert (plus > 45).sum() == 5 and (plus > 0).sum() == 5
    assert (box[15:18, 15:18] == 28).all() and (box > 0).sum() == 9
    line = torch.tensor([0.0404, 0.9192, 0.0404])  # severity 1 is an outer product of this
    mild = part.corrupt(x, "defocus_blur", 1)[0, 15:18, 15:18, 0].float()
    assert (mild - torch.outer(line, line) * 255).abs().max() <= 1


def test_motion_blur_takes_whole_pixels_along_one_direction_and_keeps_the_mean():
    v = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    v[:, :, 16, 16] = 255
    out = part._motion(v, 6, 2.0, torch.tensor([0.0, 90.0]).double())
    # tap i reads i pixels further right (0 degrees) or down (90): the light goes left or up
    weights = torch.exp(-(torch.arange(13).double() ** 2) / 8)
    expected = (weights / weights.sum() * 255).floor()
    assert (out[0, 0, 16, 4:17].flip(0) - expected).abs().max() <= 1
    assert (out[1, 0, 4:17, 16].flip(0) - expected).abs().max() <= 1
    assert out[0].sum() == out[0, 0, 16].sum()
    flat = torch.full((1, 1, 32, 32), 77.0).double()
    assert torch.equal(part._motion(flat, 9, 2.5, torch.tensor([30.0]).double()), flat)


def test_zoom_factors_and_the_enlarged_crop_are_those_of_the_reference():
    ends = part.CORRUPTIONS["zoom_blur"][1]
    assert [len(np.arange(1, end, 0.01)) for end in ends] == [7, 12, 16, 21, 26]
    x = torch.rand(1, 1, 32, 32).double()
    side = 26  # the crop of factor 1.25: 26 pixels at row 3, enlarged to round(32.5) = 32 or 33
    crop = x[:, :, 3:29, 3:29]
    whole = F.interpolate(crop, (32, 32), mode="bilinear", align_corners=True)
    assert side == math.ceil(32 / 1.25) and torch.allclose(part._zoom(x, 1.25), whole)


def test_glass_blur_only_moves_pixels_right_or_down_by_one_per_pass():
    x = torch.arange(1024).view(1, 1, 32, 32).expand(5, 3, 32, 32).double() / 1024
    draw = part.uniform(torch.arange(5), "glass")
    out = part._glass_blur(x, draw, 0.05, 1)
    allowed = torch.stack([x, *(x.roll(s, d) for s, d in ((1, 2), (1, 3), ((1, 1), (2, 3))))])
    allowed = (allowed * 255).floor() / 255
    assert ((out - allowed).abs().amin(0) < 1e-12).all()
    assert torch.equal(out[:, :, :2], allowed[0][:, :, :2])


def test_elastic_transform_without_jitter_is_the_identity_and_moves_smoothly_with_it():
    x = textured(8).permute(0, 3, 1, 2).double() / 255
    draw = part.uniform(torch.arange(8), "elastic")
    assert torch.allclose(part._elastic_transform(x, draw, 0, 0, 0.0), x)
    ramp = (torch.arange(32.0).double() / 64 + 0.25).expand(8, 3, 32, 32)
    moved = part._elastic_transform(ramp, draw, 0, 0, 2.56)
    assert (moved.diff(dim=3)[..., 8:-8] > 0).all()  # still a ramp away from the mirrored border


def test_fog_is_a_fractal_from_zero_to_one_and_keeps_the_brightest_level():
    plasma = part._plasma(part.uniform(torch.arange(50), "fog"), 3)
    assert plasma.amin((1, 2)).eq(0).all() and plasma.amax((1, 2)).eq(1).all()
    step = plasma.diff(dim=1).abs().mean() / (plasma.std() * math.sqrt(2))
    assert step < 0.3  # smooth: independent pixels would give 0.8
    x = textured(20)
    assert part.corrupt(x, "fog", 5).amax() <= x.amax()


def test_spatter_pieces_agree_with_hand_worked_cases():
    v = torch.zeros(1, 1, 32, 32).double()
    v[..., 16:] = 200
    edges = part._canny(v)
    assert edges[0, 0, :, 15].all() and edges.sum() == 32  # one line, on the first of two equals
    fractal = textured(60)[..., :1].permute(0, 3, 1, 2).double()
    assert part._canny(fractal).sum() == 18223  # OpenCV 5.0 marks the same pixels
    distance = part._edge_distance(edges)
    assert distance[0, 0, 5, 15 + 7] == 7 and distance[0, 0, 5, 0] == 15
    point = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    point[0, 0, 3, 3] = True
    distance = part._edge_distance(point)[0, 0]
    hand = {(3, 3): 0, (4, 4): 1.4, (4, 5): 2.1969, (4, 6): 3.1969, (6, 8): 2 * 2.1969 + 1.4}
    assert all(abs(distance[k].item() - value) < 1e-9 for k, value in hand.items())
    assert distance[31, 31] == 20
    levels = torch.tensor([3.0] * 512 + [5.0] * 256 + [9.0] * 256).view(1, 1, 32, 32)
    assert part._equalise(levels).unique().tolist() == [0, 128, 255]


def test_frost_drawn_by_code_is_near_the_published_one_and_files_are_read(tmp_path, shapes):
    from PIL import Image

    x = textured(100)
    bias = (part.corrupt(x, "frost", 1).double() - x.double()).mean().item()
    assert 20 < bias < 40  # the table has 30.7, for other images
    for i in range(1, 6):
        image = np.full((200 + 10 * i, 300, 3), 40 * i, np.uint8)
        if i < 4:  # a fifth of the size takes pixels 2, 7, 12 ...; the others are white
            image[np.arange(len(image)) % 5 != 2] = 255
            image[:, np.arange(300) % 5 != 2] = 255
        Image.fromarray(image).save(tmp_path / f"frost{i}.{'png' if i < 4 else 'jpg'}")
    dark = torch.zeros(200, 32, 32, 3, dtype=torch.uint8)
    out = part.corrupt(dark, "frost", 1, frost_dir=str(tmp_path))
    values, counts = out.flatten(1)[:, 0].unique(return_counts=True)
    assert values.tolist() == [8, 16, 24, 32, 40]  # a fifth of each texture
    assert counts.min() > 15
    (tmp_path / "frost4.jpg").unlink()
    part._frost_textures.cache_clear()
    with pytest.raises(SystemExit):
        part.corrupt(dark, "frost", 1, frost_dir=str(tmp_path))


def test_other_sizes_are_refused_with_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        part.corrupt(torch.zeros(2, 28, 28, 1, dtype=torch.uint8), "snow", 1)
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
