"""The feature maps that detectors and segmenters stand on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import create_model
from meshuffle.models.features import BACKBONE, Features, backbone_prefix

NAMES = (
    *("shufflenet_v2_x0_5", "shufflenet_v1_x0_5_g3", "shufflenet_v2plus_small"),
    *("torchvision:resnet18", "torchvision:mobilenet_v3_small"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_per_stride_under_the_backbones_names(name: str) -> None:
    model = create_model(name, num_classes=10, seed=0)
    names = set(model.state_dict())
    features = Features(model, (8, 16, 32)).eval()
    maps = features(torch.zeros(2, 3, 96, 160))
    assert [tuple(x.shape[2:]) for x in maps] == [(12, 20), (6, 10), (3, 5)]
    assert tuple(x.shape[1] for x in maps) == features.channels
    assert {key.removeprefix("body.") for key in features.state_dict()} < names


def test_the_last_map_is_what_the_classifier_sees() -> None:
    model = create_model("shufflenet_v2_x0_5", num_classes=10, seed=0).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        last = Features(model, (32,)).eval()(x)[0]
        torch.testing.assert_close(model.fc(last.mean((2, 3))), logits)


def test_the_prefix_tells_what_stands_on_a_backbone() -> None:
    model = create_model("shufflenet_v2_x0_5", num_classes=10, seed=0)
    assert backbone_prefix(model) == ""
    whole = nn.Module()
    whole.features = Features(model)
    assert backbone_prefix(whole) == BACKBONE


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten()), "no feature map of stride 8"),
        (create_model("torchvision:vit_b_32", num_classes=2, image_size=32), "cannot be traced"),
    ],
    ids=["shallow", "fixed size"],
)
def test_what_has_no_maps(model: nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Features(model)
