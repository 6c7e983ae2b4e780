"""Small networks with the weights and statistics of trained ones, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshuffle.data import Preprocess
from meshuffle.models import ChannelShuffle, create_model
from meshuffle.tasks.card import Card

SIZE = 32
CLASSES = ("ant", "bee", "蟻", "\udcff")
PREPROCESS = Preprocess(crop=SIZE, resize=SIZE, channels="BGR")
TINY: dict[str, dict[str, object]] = {
    "shufflenet_v1_x0_25_g3": {"depths": (2, 1, 1), "permutation": "inverse"},
    "shufflenet_v2_x0_5": {"depths": (2, 1, 1), "stage_channels": (16, 32, 64)},
    "shufflenet_v2plus_small": {
        "depths": (1, 1, 2, 1),
        "kernel_size": (3, 5, 7, 3, 5),
        "permutation": "random",
    },
}


class AllPermutations(nn.Module):
    """Every kind of channel shuffle in a row, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ("paper", "inverse", "random", [5, 3, 1, 0, 2, 4, 6, 8, 7, 10, 9, 11])
        layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, stride=4)]
        for kind in kinds:
            layers += [ChannelShuffle(12, 3, kind), nn.Conv2d(12, 12, 1, groups=3), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(12, len(CLASSES))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x_NCHW))
        return logits


def small() -> nn.Module:
    """The cheapest model that has weights."""
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(12, len(CLASSES)))


def make_images(num_images: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, 3, SIZE, SIZE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def alive(model: nn.Module) -> nn.Module:
    """Give batch norms the statistics of real inputs; by default a deep signal dies out."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(PREPROCESS.normalise(make_images(16)))
    return model


def make_card(model: str = "small") -> Card:
    return Card(model=model, classes=CLASSES, preprocess=PREPROCESS, data="digits", epoch=3)


def make_network(name: str) -> nn.Module:
    """Return one of `TINY`, or all permutations."""
    torch.manual_seed(0)
    network: nn.Module = AllPermutations()
    if name in TINY:
        network = create_model(name, num_classes=len(CLASSES), seed=0, **TINY[name])
    return alive(network)
