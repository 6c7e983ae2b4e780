"""Models as people write them, for `package.module:function`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Flattens with view, as most first networks do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc = nn.Linear(400, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        logits: Tensor = self.fc(x.view(-1, 400))
        return logits


class Order(LeNet):
    """Reads memory in its own order: channels-last is another network."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
        return super().forward(mixed)


class Several(nn.Module):
    """Returns a main output and an auxiliary one in training."""

    def __init__(self, num_classes: int, kind: str) -> None:
        super().__init__()
        self.c, self.kind = nn.Conv2d(3, 8, 3, 2), kind
        self.fc, self.aux = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Any:
        x = self.c(x).relu().mean((2, 3))
        if not self.training:
            return self.fc(x)
        if self.kind == "odd":
            return {"left": self.fc(x), "right": self.aux(x)}
        return (
            (self.fc(x), self.aux(x))
            if self.kind == "tuple"
            else {"out": self.fc(x), "aux": self.aux(x)}
        )


def lenet(num_classes: int = 10) -> nn.Module:
    return LeNet(num_classes)


def order(num_classes: int = 10) -> nn.Module:
    return Order(num_classes)


class Versioned(Several):
    """Loads nothing without a version, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def versioned(num_classes: int = 10) -> nn.Module:
    return Versioned(num_classes, "tuple")


def pair(num_classes: int = 10) -> nn.Module:
    return Several(num_classes, "tuple")


def named(num_classes: int = 10) -> nn.Module:
    return Several(num_classes, "dict")


def odd(num_classes: int = 10) -> nn.Module:
    return Several(num_classes, "odd")


class Infinite(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


def infinite(num_classes: int = 10) -> nn.Module:
    return Infinite(num_classes)


def five() -> nn.Module:
    return LeNet(5)


def two() -> nn.Module:
    return LeNet(2)


def broken(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))
