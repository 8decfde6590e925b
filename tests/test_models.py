"""Models: sizes against the published ones, modes, names."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet

import common

PUBLISHED = {  # name, classes -> parameters (He et al.; Zagoruyko and Komodakis; 3x3 stems)
    ("resnet18", 10): 11_173_962,
    ("resnet50", 10): 23_520_842,
    ("preact-resnet18", 10): 11_172_170,  # with the last BatchNorm of He et al. 2016
    ("wrn-16-2", 100): 703_284,
    ("wrn-40-2", 100): 2_255_156,
    ("wrn-16-2", 10): 691_674,
    ("wrn-28-10", 10): 36_479_194,
    ("wrn-28-10-silu", 100): 36_536_884,
}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "-".join(map(str, case)))
def test_parameter_counts_are_the_published_ones(case):
    with torch.device("meta"):
        model = common.build_model(*case)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[case]


@pytest.mark.parametrize(
    "name, block, layers",
    [("resnet18", "BasicBlock", [2, 2, 2, 2]), ("resnet50", "Bottleneck", [3, 4, 6, 3])],
)
def test_resnets_compute_what_those_of_torchvision_do(name, block, layers):
    theirs = resnet.ResNet(getattr(resnet, block), layers, num_classes=10)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the stem for small images
    theirs.maxpool = torch.nn.Identity()
    ours, x = common.build_model(name), torch.rand(4, 3, 32, 32)
    ours.train()(x)  # moves the statistics
    state = [value for key, value in ours.state_dict().items() if "normalize" not in key]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state, strict=True)))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-4, rtol=1e-4)


def test_convolutions_begin_with_the_deviation_of_their_outgoing_connections():
    net = common.build_model("resnet18")
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 20
    for conv in convolutions:
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_the_mlp_of_paper_three_has_2_4_million_parameters():
    model = common.build_model("mlp-1200-1200", channels=1, size=28)
    assert sum(p.numel() for p in model.parameters()) == 2_395_210


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact-resnet18"])
def test_a_width_in_the_name_is_the_number_of_channels_in_the_first_stage(name):
    with torch.device("meta"):
        plain, narrow = common.build_model(name), common.build_model(f"{name}-w4")
        same = common.build_model(f"{name}-w64")
    assert narrow.stem[0].out_channels == 4
    assert narrow.fc.in_features * 16 == plain.fc.in_features
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (plain, same)]
    assert shapes[0] == shapes[1]


def test_dropout_is_active_in_train_mode_only():
    model, x = common.build_model("wrn-10-1", dropout=0.5), torch.rand(2, 3, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "name", ["resnet18-w4", "resnet50-w4", "preact-resnet18-w4-silu", "wrn-10-1", "mlp-9-8"]
)
def test_predictions_do_not_depend_on_the_other_images_of_the_batch(name):
    model = common.build_model(name, 7, mean=[0.5] * 3, std=[0.2] * 3)
    x = torch.rand(5, 3, 32, 32)
    model(x)  # moves the running statistics away from 0 and 1
    model.eval()
    together = model(x)
    assert together.shape == (5, 7) and together.dtype == torch.float32
    alone = torch.cat([model(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_the_narrow_strided_shortcut_is_a_strided_convolution():
    narrow = common.conv(4, 8, 1, 2)
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(narrow(x), F.conv2d(x, narrow[1].weight, stride=2))


def test_models_normalise_inside():
    model = common.build_model("mlp-4", 3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], size=4)
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    plain = ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).flatten(1)
    torch.testing.assert_close(model(x), model.layers[2:](plain))


@pytest.mark.parametrize(
    "name",
    [
        "resnet19",
        "resnet18-w0",
        "resnet18-16",
        "resnet18-silu",
        "wrn-17-2",
        "wrn-16",
        "wrn-16-2-w8",
        "wrn-16-2-gelu",
        "mlp",
        "mlp-0",
        "",
    ],
)
def test_unknown_models_are_refused_by_the_name_of_the_flag(name, refused):
    message = refused(common.check_model, "--teacher-model", name)
    assert message.startswith("--teacher-model: ") and repr(name) in message


def test_a_resnet_has_no_dropout(refused):
    assert "dropout" in refused(common.check_model, "--model", "resnet18-w4", 0.1)


def test_a_new_model_fits_the_data_and_is_drawn_from_seed_and_stage():
    data = common.load_data("shapes", train_subset=10)
    first = common.new_model(data, "mlp-4", 0, "student")
    torch.rand(3)  # the global generator does not matter
    again = common.new_model(data, "mlp-4", 0, "student")
    others = [
        common.new_model(data, "mlp-4", 1, "student"),
        common.new_model(data, "mlp-4", 0, "t"),
    ]
    weights = [net.layers[2].weight for net in (first, again, *others)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert first(common.to_float(data.x_train)).shape == (10, 10)
    assert first.layers[0].mean.flatten().tolist() == pytest.approx(data.mean)
