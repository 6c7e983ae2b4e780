import pytest
import torch
from torch import nn

from meshuffle.models import count_macs, count_parameters, create_model


@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_a_convolution_by_hand(groups):
    model = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=groups)
    assert count_macs(model, (12, 9, 9)) == 24 * (12 // groups) * 9 * 5 * 5
    assert count_parameters(model) == 24 * (12 // groups) * 9 + 24


def test_a_linear_layer_by_hand():
    assert count_macs(nn.Linear(6, 5), (6,)) == 30


@pytest.mark.parametrize(
    # torchvision states 1.81, 4.09 and 17.56 GFLOPS, which are multiply-accumulates, for them.
    ("name", "giga"),
    [("resnet18", 1.814), ("resnet50", 4.089), ("vit_b_16", 17.564)],
)
def test_torchvision_models(name, giga):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}")
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(giga, abs=0.001)


def test_a_parameter_that_is_shared_counts_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 16 + 4 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_stays_as_it_was(dtype):
    model = create_model("shufflenet_v2_x0_5", seed=0).to(dtype)
    model.stage2.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert count_macs(model, (3, 64, 64)) > 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_modes_come_back_when_the_shape_does_not_fit():
    model = create_model("shufflenet_v2_x0_5", seed=0)
    with pytest.raises(RuntimeError, match="channel"):
        count_macs(model, (1, 64, 64))
    assert model.training


def test_macs_grow_with_the_area():
    model = nn.Conv2d(3, 8, 3, padding=1)
    assert count_macs(model, (3, 20, 20)) == 4 * count_macs(model, (3, 10, 10))
