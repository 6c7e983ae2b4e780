"""torchvision's vision transformers for small images, with a classifier that is not zero.

(Their own starts at zero, so that no gradient reaches the layers in front of it in the first step.)
"""

from __future__ import annotations

import torchvision
from torch import nn

SIZE = {"vit_b_16": 64, "vit_b_32": 64, "vit_l_16": 64, "vit_l_32": 64, "vit_h_14": 56}


def _make(name: str) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None, image_size=SIZE[name])
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def vit_b_16() -> nn.Module:
    return _make("vit_b_16")


def vit_b_32() -> nn.Module:
    return _make("vit_b_32")


def vit_l_16() -> nn.Module:
    return _make("vit_l_16")


def vit_l_32() -> nn.Module:
    return _make("vit_l_32")


def vit_h_14() -> nn.Module:
    return _make("vit_h_14")
