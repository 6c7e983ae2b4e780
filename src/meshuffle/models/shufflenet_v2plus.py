"""ShuffleNet V2+: V2 units with kernels 3, 5 and 7, squeeze-and-excitation and hard swish.

The module tree and the `state_dict` keys are those of the authors' released weights
(github.com/megvii-model/ShuffleNet-Series, folder `ShuffleNetV2+`), which is the only source:
there is no paper of it.

Shape suffixes: N batch, C channels, H height, W width, D = C/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from meshuffle.errors import ModelError
from meshuffle.models.knobs import (
    auto_kernel_size,
    per_unit,
    require_at_least,
    require_depths,
    require_divisible,
    require_kernels,
    require_length,
    scaled_channels,
    unit_map_sides,
)
from meshuffle.models.layers import conv, conv_bn, depthwise, dropout_layer
from meshuffle.models.permutation import ChannelShuffle, Permutation

Block = int | Literal["xception"]

AUTHORS_BLOCKS: tuple[Block, ...] = (
    *(3, 3, "xception", 5),
    *(5, 5, 3, 3),
    *(7, 3, 7, 5, 5, 3, 7, 3),
    *(7, 5, "xception", 7),
)
"""The blocks of the authors' search for all three sizes: a kernel size, or an Xception block."""

STEM_CHANNELS = 16
HEAD_CHANNELS = 1280
STRIDES = (2, 2, 2, 2)
FIRST_STAGE_WITH_HARD_SWISH = 1
FIRST_STAGE_WITH_SE = 2


class HardSqueezeExcite(nn.Module):
    """Squeeze-and-excitation with a batch norm and a hard sigmoid, under the authors' keys.

    Args:
        channels: C; the hidden layer has C / 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.SE_opr = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *conv_bn(channels, hidden),
            nn.ReLU(inplace=True),
            conv(hidden, channels),
        )
        self.gate = nn.Hardsigmoid()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return x (N, C, H, W), scaled per image and channel."""
        return x_NCHW * self.gate(self.SE_opr(x_NCHW))


class ShuffleUnitV2Plus(nn.Module):
    """One V2+ unit: shuffle and split (stride 1), or project all of x (stride 2); then join.

    Args:
        in_channels, out_channels: channels of the unit; equal where `stride` is 1.
        block: kernel size of the one depthwise convolution, or "xception" for three 3×3 ones.
        stride: 1 or 2.
        hard_swish: in place of ReLU.
        se: squeeze-and-excitation at the end of the branch.
        permutation, seed: see `channel_permutation`; two groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block: Block,
        stride: int,
        hard_swish: bool = True,
        se: bool = False,
        permutation: Permutation = "inverse",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_divisible("out_channels", out_channels, "halves", 2)
        act = nn.Hardswish if hard_swish else nn.ReLU
        kept = in_channels if stride == 2 else in_channels // 2
        wide, middle = out_channels - kept, out_channels // 2
        if wide < 1:
            raise ModelError(
                f"`out_channels` (={out_channels}) must be above `in_channels` (={in_channels}) "
                f"where the stride is 2: the input's channels are part of the output"
            )
        branch = _xception if block == "xception" else _shuffle_block
        kernel_size = 3 if block == "xception" else int(block)
        layers = branch(kept, middle, wide, kernel_size, stride, act)
        self.branch_main = nn.Sequential(*layers, *([HardSqueezeExcite(wide)] if se else []))
        self.shuffle: ChannelShuffle | None = None
        self.branch_proj: nn.Sequential | None = None
        if stride == 1:
            self.shuffle = ChannelShuffle(in_channels, 2, permutation, seed)
        else:
            self.branch_proj = nn.Sequential(
                depthwise(kept, kernel_size, stride),
                nn.BatchNorm2d(kept),
                *conv_bn(kept, kept),
                act(inplace=True),
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride), halves rounded up."""
        if self.branch_proj is not None:
            return torch.cat((self.branch_proj(x_NCHW), self.branch_main(x_NCHW)), dim=1)
        assert self.shuffle is not None
        kept_NDHW, active_NDHW = self.shuffle.split(x_NCHW)
        return torch.cat((kept_NDHW, self.branch_main(active_NDHW)), dim=1)


def _shuffle_block(
    in_channels: int, middle: int, out_channels: int, kernel_size: int, stride: int, act: type
) -> list[nn.Module]:
    """Return 1×1 conv, depthwise, 1×1 conv."""
    return [
        *conv_bn(in_channels, middle),
        act(inplace=True),
        depthwise(middle, kernel_size, stride),
        nn.BatchNorm2d(middle),
        *conv_bn(middle, out_channels),
        act(inplace=True),
    ]


def _xception(
    in_channels: int, middle: int, out_channels: int, kernel_size: int, stride: int, act: type
) -> list[nn.Module]:
    """Return three times depthwise and 1×1 conv; the first takes the stride."""
    layers: list[nn.Module] = []
    for width_in, width_out, s in (
        (in_channels, middle, stride),
        (middle, middle, 1),
        (middle, out_channels, 1),
    ):
        layers += [depthwise(width_in, kernel_size, s), nn.BatchNorm2d(width_in)]
        layers += [*conv_bn(width_in, width_out), act(inplace=True)]
    return layers


class ShuffleNetV2Plus(nn.Module):
    """ShuffleNet V2+: 3×3 conv, four stages, 1×1 conv, global mean, SE, two linear layers.

    Args:
        stage_channels: output channels of each of the four stages at width 1, even numbers.
        width: factor on `stage_channels`, above 0; the product is rounded up to an even number.
        depths: units of each stage.
        kernel_size: of the depthwise convolutions: 3, 5, 7 or another odd number for all units,
            one per unit, where "xception" stands for the authors' Xception block, or "auto"
            (see `auto_kernel_size`). None is what the authors' search found for depths 4, 4, 8, 4.
        input_size: side of the input in pixels, which "auto" reads the maps' sides from.
        permutation: of the stride-1 units (see `channel_permutation`): the authors put the even
            channels in front of the odd ones, which is "inverse". An explicit list fits a single
            number of channels, so it needs stages of equal width.
        permutation_seed: of the "random" permutation; unit i takes `permutation_seed + i`.
        se: squeeze-and-excitation in stages 3 and 4, as the authors have it.
        dropout: probability in front of the classifier; the authors use 0.2.
        num_classes, in_channels: sizes of the output and of the input.

    Raises:
        ModelError: knobs that do not fit, with their values.
    """

    head_names = ("classifier",)

    def __init__(
        self,
        *,
        stage_channels: Sequence[int] = (36, 104, 208, 416),
        width: float = 1.0,
        depths: Sequence[int] = (4, 4, 8, 4),
        kernel_size: int | Sequence[Block] | Literal["auto"] | None = None,
        input_size: int = 224,
        permutation: Permutation = "inverse",
        permutation_seed: int = 0,
        se: bool = True,
        dropout: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        require_at_least("num_classes", num_classes, 1)
        require_at_least("in_channels", in_channels, 1)
        require_length("stage_channels", stage_channels, len(STRIDES))
        depths = require_depths(depths, len(STRIDES))
        channels = scaled_channels(stage_channels, width, 2)
        blocks = _blocks(kernel_size, unit_map_sides(input_size, 2, depths, STRIDES))

        self.first_conv = nn.Sequential(
            *conv_bn(in_channels, STEM_CHANNELS, 3, stride=2), nn.Hardswish(inplace=True)
        )
        units: list[nn.Module] = []
        in_unit = STEM_CHANNELS
        for stage, (depth, out_unit) in enumerate(zip(depths, channels, strict=True)):
            for position in range(depth):
                units.append(
                    ShuffleUnitV2Plus(
                        in_unit,
                        out_unit,
                        block=blocks[len(units)],
                        stride=1 if position else 2,
                        hard_swish=stage >= FIRST_STAGE_WITH_HARD_SWISH,
                        se=se and stage >= FIRST_STAGE_WITH_SE,
                        permutation=permutation,
                        seed=permutation_seed + len(units),
                    )
                )
                in_unit = out_unit
        self.features = nn.Sequential(*units)
        self.conv_last = nn.Sequential(
            *conv_bn(channels[-1], HEAD_CHANNELS), nn.Hardswish(inplace=True)
        )
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.LastSE = HardSqueezeExcite(HEAD_CHANNELS)
        self.fc = nn.Sequential(
            nn.Linear(HEAD_CHANNELS, HEAD_CHANNELS, bias=False), nn.Hardswish(inplace=True)
        )
        self.dropout = dropout_layer(dropout)
        self.classifier = nn.Sequential(nn.Linear(HEAD_CHANNELS, num_classes, bias=False))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        x_NCHW = self.conv_last(self.features(self.first_conv(x_NCHW)))
        x_NC = self.LastSE(self.globalpool(x_NCHW)).flatten(1)
        return self.classifier(self.dropout(self.fc(x_NC)))


def _blocks(
    kernel_size: int | Sequence[Block] | Literal["auto"] | None, map_sides: Sequence[int]
) -> tuple[Block, ...]:
    """Return the block of each unit, or raise ModelError."""
    if kernel_size is None:
        kernel_size = AUTHORS_BLOCKS
    if isinstance(kernel_size, (int, str)):
        sizes = per_unit("kernel_size", kernel_size, map_sides, auto_kernel_size)
        require_kernels(sizes)
        return sizes
    require_length("kernel_size", kernel_size, len(map_sides))
    for block in kernel_size:
        if isinstance(block, str) and block != "xception":
            raise ModelError(f"`kernel_size` has {block!r}; it must be a number or 'xception'")
    require_kernels([block for block in kernel_size if isinstance(block, int)])
    return tuple(kernel_size)
