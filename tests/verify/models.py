"""Small models that ranks build by name."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Grouped convolution, shuffle, depthwise, as in ShuffleNet V1."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.squeeze = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, channels, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.squeeze(x)))
        y = F.channel_shuffle(y, self.groups)
        return F.relu(x + self.expand(self.depthwise(y)))


class Net(nn.Module):
    def __init__(self, channels: int = 12, groups: int = 3, p: float = 0.25) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.block = Block(channels, groups)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.norm(self.stem(x))))
        return self.head(self.drop(x.mean((2, 3))))


class Tokens(nn.Module):
    """Token ids in, (N, L, C) out: no classifier, so the loss is a projection.

    A part is computed in float32, as language models do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        wide = F.gelu(self.up(x).float()).to(x.dtype)
        y = self.norm(x + self.down(wide))
        return {"tokens": y, "pooled": y.mean(1).tanh()}


class Placed(Tokens):
    """Adds the places of the tokens, kept for the next input of the same length (timm's ConViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        if len(self.places) != ids.shape[1]:
            self.places = torch.linspace(0, 1, ids.shape[1], dtype=self.table.weight.dtype)
        found = super().forward(ids)
        return found | {"placed": found["tokens"] * self.places[:, None]}


class Tied(nn.Module):
    """The table of tokens is the classifier too; so the first and the last stage have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.layers(x))


class Branching(nn.Module):
    """Cannot be captured: what it does depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.poisson(x.abs()))


def net() -> nn.Module:
    return Net()


def wide() -> nn.Module:
    """Two groups, so that two ranks can have one each."""
    return Net(16, 2)


def tokens() -> nn.Module:
    return Tokens()


def placed() -> nn.Module:
    return Placed()


def tied() -> nn.Module:
    return Tied()


def branching() -> nn.Module:
    return Branching()


def noisy() -> nn.Module:
    return Noisy()


def mortal() -> nn.Module:
    """Kills the rank that builds it, if that is number 1."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return Net()


def anything(**_: Any) -> nn.Module:
    return Net()
