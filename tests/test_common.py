"""Data, models, attacks, files: against closed forms and published numbers."""

import argparse
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import plumbing

# Flags ------------------------------------------------------------------------------------------


def test_fractions_are_read_and_nonsense_is_refused():
    assert common.fraction("8/255") == 8 / 255 and common.fraction("0.03") == 0.03
    for text in ("8//255", "-1", "nan", "inf", "1/0", "", "eight"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number or a fraction"):
            common.fraction(text)
    with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
        common.probability("1.5")
    for text in ("0", "2.5", "-3", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            common.count(text)
    assert common.count0("0") == 0


# Models -----------------------------------------------------------------------------------------

PUBLISHED = {  # name, classes, width -> parameters (He et al.; Zagoruyko and Komodakis; 3x3 stems)
    ("resnet18", 10, 1.0): 11_173_962,
    ("resnet50", 10, 1.0): 23_520_842,
    ("preact-resnet18", 10, 1.0): 11_172_170,  # with the last BatchNorm of He et al. 2016
    ("wrn-16-2", 100, 1.0): 703_284,
    ("wrn-40-2", 100, 1.0): 2_255_156,
    ("wrn-16-2", 10, 1.0): 691_674,
    ("wrn-28-10", 10, 1.0): 36_479_194,
    ("wrn-28-10-silu", 100, 1.0): 36_536_884,
}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "-".join(map(str, case)))
def test_parameter_counts_are_the_published_ones(case):
    with torch.device("meta"):
        model = common.build_model(*case)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[case]


def test_the_mlp_of_paper_three_has_2_4_million_parameters():
    model = common.build_model("mlp-1200-1200", channels=1, size=28)
    assert sum(p.numel() for p in model.parameters()) == 2_395_210


def test_width_scales_the_channels_and_dropout_is_active_in_train_mode_only():
    assert common.build_model("resnet18", width=1 / 16).fc.in_features == 32
    model, x = common.build_model("wrn-10-1", dropout=0.5), torch.rand(2, 3, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "preact-resnet18-silu", "wrn-10-1", "mlp-9-8"]
)
def test_predictions_do_not_depend_on_the_other_images_of_the_batch(name):
    width = 1 / 16 if "resnet" in name else 1
    model = common.build_model(name, 7, width, mean=[0.5] * 3, std=[0.2] * 3)
    x = torch.rand(5, 3, 32, 32)
    model(x)  # moves the running statistics away from 0 and 1
    model.eval()
    together = model(x)
    assert together.shape == (5, 7) and together.dtype == torch.float32
    alone = torch.cat([model(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_the_narrow_strided_shortcut_is_a_strided_convolution():
    narrow = common._conv(4, 8, 1, 2)
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(narrow(x), F.conv2d(x, narrow[1].weight, stride=2))


def test_models_normalise_inside():
    model = common.build_model("mlp-4", 3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], size=4)
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    plain = ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).flatten(1)
    torch.testing.assert_close(model(x), model.layers[2:](plain))


@pytest.mark.parametrize(
    "name", ["resnet19", "wrn-17-2", "wrn-16", "mlp", "mlp-0", "wrn-16-2-gelu", ""]
)
def test_unknown_models_are_one_line(name, refused):
    assert "--model" in refused(common.check_model, "--model", name)


def test_width_and_dropout_only_where_they_mean_something(refused):
    assert "width" in refused(common.check_model, "--model", "wrn-16-2", 0.5)
    assert "dropout" in refused(common.check_model, "--model", "resnet18", 1.0, 0.1)


# Attacks ----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two classes, logits (0, w.x): every attack has a closed form on it."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def test_pgd_stays_in_the_ball_and_in_the_image_range():
    model = common.build_model("mlp-16", 10, size=8).eval()
    x = torch.rand(20, 3, 8, 8).round(decimals=1)  # many pixels at 0 and 1
    with pytest.raises(KeyError):
        common.pgd(model, x, torch.arange(20) % 10, 0.1, 0.07, 5, "unifrom")
    for start in ("uniform", "gaussian", "none"):
        x_adv = common.pgd(model, x, torch.arange(20) % 10, 0.1, 0.07, 5, start)
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


@pytest.mark.parametrize("name", ["preact-resnet18", "resnet18", "wrn-10-1"])
def test_the_attacked_net_is_the_net_of_now_without_its_batchnorm(name):
    model, x = (
        common.build_model(name, width=1 if "wrn" in name else 1 / 16),
        torch.rand(8, 3, 32, 32),
    )
    optimizer, keys = common.sgd(model, 0.1, 0.9, 0.0), [*model.state_dict()]
    for _ in range(3):  # weights and statistics change
        attacked = common.attacked(model, "eval")
        assert not model.training and not attacked.training and attacked is not model
        torch.testing.assert_close(attacked(x), model(x))
        assert not attacked(x).requires_grad
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), torch.arange(8)).backward()
        optimizer.step()
    assert common.attacked(model, "eval") is attacked  # kept, but no part of what is saved
    assert [*model.state_dict()] == keys and attacked not in model.modules()
    assert common.attacked(model, "train") is model and model.training


def test_pgd_solves_the_linear_model_exactly():
    model, eps = Linear(torch.randn(3, 4, 4)), 0.1
    x, labels = torch.full((6, 3, 4, 4), 0.5), torch.arange(6) % 2
    x_adv = common.pgd(model, x, labels, eps, 0.05, 5)  # 5 steps of eps / 2 cross the ball
    gain = (model(x_adv) - model(x))[:, 1]
    bound = eps * model.w.abs().sum()
    torch.testing.assert_close(gain, torch.where(labels == 0, bound, -bound))


def test_pgd_computes_no_weight_gradient_and_keeps_the_mode():
    model = common.build_model("wrn-10-1", 10).train()
    x = torch.rand(2, 3, 32, 32)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():  # works inside no_grad as well
        common.pgd(model, x, torch.tensor([1, 2]), 8 / 255, 2 / 255, 2)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_pgd_in_eval_mode_leaves_the_batchnorm_statistics():
    model = common.build_model("wrn-10-1", 10).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    common.pgd(model, torch.rand(4, 3, 32, 32), torch.arange(4), 8 / 255, 2 / 255, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pgd_with_probabilities_follows_the_gradient_of_the_kl():
    model = common.build_model("mlp-16", 5, size=4).eval()
    x = torch.rand(3, 3, 4, 4)
    targets = torch.randn(3, 5).softmax(1)
    x_adv = common.pgd(model, x, targets, 0.1, 0.02, 1, "none")
    leaf = x.clone().requires_grad_()
    F.kl_div(model(leaf).log_softmax(1), targets, reduction="batchmean").backward()
    torch.testing.assert_close(x_adv, (x + 0.02 * leaf.grad.sign()).clamp(0, 1))


def test_ffgsm_is_one_projected_step_of_its_own_size():
    model = Linear(torch.randn(3, 4, 4))
    x, labels = torch.full((50, 3, 4, 4), 0.5), torch.zeros(50, dtype=torch.long)
    delta = common.pgd(model, x, labels, 0.08, 0.1, steps=1) - x
    assert delta.abs().max() <= 0.08 + 1e-6
    # start u ~ U(-eps, eps), step 1.25 eps along the sign, projected: > 0.02 in the right direction
    assert ((delta * model.w.sign()).amin() > 0.02 - 1e-6) and (delta.abs() < 0.08 - 1e-4).any()


def test_a_zero_radius_changes_nothing():
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(
        common.pgd(Linear(torch.randn(3, 4, 4)), x, torch.zeros(2).long(), 0.0, 0.0, 3), x
    )


# Evaluation and files ---------------------------------------------------------------------------


def test_evaluating_puts_everything_back():
    model = common.build_model("mlp-4", size=4).train()
    next(model.parameters()).requires_grad_(False)
    with common.evaluating(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_a_model_comes_back_from_its_file(tmp_path):
    model = common.build_model("preact-resnet18-silu", 4, 1 / 16, mean=[0.3] * 3, std=[0.2] * 3)
    model(torch.rand(4, 3, 32, 32))
    common.save_model(tmp_path / "m.pt", model, {"epoch": 3})
    again, meta = common.load_model(tmp_path / "m.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), model.eval()(x)) and meta == {"epoch": 3} and not again.training


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemError('a pickle was run')",)


def test_bad_checkpoints_are_one_line_and_never_run(tmp_path, refused):
    model = common.build_model("mlp-4", 3, size=4)
    good = tmp_path / "good.pt"
    common.save_model(good, model, {})
    content = good.read_bytes()
    for part in range(1, 10):
        (tmp_path / "cut.pt").write_bytes(content[: len(content) * part // 10])
        assert "truncated, changed, or no checkpoint" in refused(
            common.load_model, tmp_path / "cut.pt"
        )
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
    assert "3 classes" in refused(common.load_model, good, "cpu", data)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    common.save(path, {"a": 1})

    def broken(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, broken)
    assert common.load(path)["a"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_derived_seeds_differ():
    seeds = {common.derive_seed(s, stage, e) for s in range(9) for stage in "ab" for e in range(99)}
    assert len(seeds) == 9 * 2 * 99 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_table_is_aligned():
    text = common.table(
        [{"model": "a", "clean_acc": 0.5}, {"model": "long", "x": None, "s": 1234.5}]
    )
    lines = text.splitlines()
    assert (
        len({len(line) for line in lines}) == 1 and "0.5000" in lines[2] and "1,234.5" in lines[3]
    )


def test_metrics_are_sums_over_the_batch():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 0, 0])
    assert plumbing.metrics(torch.tensor(0.5), logits, labels).tolist() == [1.5, 2.0, 3.0]
