"""Small blocks that the models share, and the context in which they are inspected.

Shape suffixes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meshuffle.models.knobs import require_at_least, require_fraction


def conv(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias, padded so that only `stride` shrinks the map."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )


def depthwise(channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """Return a depthwise convolution: one filter per channel, no bias, padded."""
    return conv(channels, channels, kernel_size, stride, groups=channels)


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution and its batch norm, to be unpacked into a Sequential."""
    return [
        conv(in_channels, out_channels, kernel_size, stride, groups),
        nn.BatchNorm2d(out_channels),
    ]


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution, its batch norm and a ReLU, to be unpacked into a Sequential."""
    return [*conv_bn(in_channels, out_channels, kernel_size, stride, groups), nn.ReLU(inplace=True)]


def dropout_layer(probability: float) -> nn.Module:
    """Return a dropout, or at probability 0 a layer that does nothing and draws nothing.

    Raises:
        ModelError: unless 0 ≤ `probability` < 1.
    """
    require_fraction("dropout", probability)
    return nn.Dropout(probability) if probability else nn.Identity()


class SqueezeExcite(nn.Module):
    """Scale each channel of x (N, C, H, W) by a gate in 0…1 computed from the channel means.

    The gate is sigmoid(expand(relu(reduce(mean(x))))), with a bias in both steps.

    Args:
        channels: C.
        reduction: the hidden layer has C / `reduction` channels (rounded down, at least 1).

    Source: Hu, Shen, Sun: "Squeeze-and-Excitation Networks", arXiv 1709.01507.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        require_at_least("reduction", reduction, 1)
        hidden = max(1, channels // reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return x (N, C, H, W), scaled per image and channel."""
        mean_NC11 = x_NCHW.mean((2, 3), keepdim=True)
        return x_NCHW * self.gate(self.expand(self.act(self.reduce(mean_NC11))))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute without gradients and in eval mode; each module has its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
