"""ShuffleNet V1 (Zhang, Zhou, Lin, Sun, arXiv 1707.01083).

The module tree and the `state_dict` keys are those of the authors' released weights
(github.com/megvii-model/ShuffleNet-Series); their files load once `module.` is stripped
from the keys, into a model with `order="authors", permutation="inverse"`.

Shape suffixes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from meshuffle.errors import ModelError
from meshuffle.models.knobs import (
    Order,
    PerUnit,
    auto_kernel_size,
    per_unit,
    require_at_least,
    require_choice,
    require_depths,
    require_divisible,
    require_fraction,
    require_kernels,
    require_length,
    round_up,
    scaled_channels,
    unit_map_sides,
)
from meshuffle.models.layers import SqueezeExcite, conv_bn, conv_bn_relu, depthwise, dropout_layer
from meshuffle.models.permutation import ChannelShuffle, Permutation

STAGE_CHANNELS = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
"""Output channels of stages 2, 3 and 4 at width 1, by groups (table 1 of the paper)."""

STEM_CHANNELS = 24
STEM_CHANNELS_AT_WIDTH = {1.5: 24}
"""The authors' exceptions to `width` · 24 (36 here); 24 gives their 292 and 290 MFLOPs."""

STRIDES = (2, 2, 2)


class ShuffleUnitV1(nn.Module):
    """One V1 unit: group conv → shuffle → depthwise → group conv, added to or joined with x.

    With stride 1 the unit returns relu(x + branch(x)). With stride 2 it returns
    cat(avgpool(x), relu(branch(x))), so its branch has `out_channels - in_channels` channels.

    Args:
        in_channels, out_channels: channels of the unit; equal where `stride` is 1.
        groups: of both 1×1 convolutions and of the shuffle.
        first_groups: of the first 1×1 convolution where it differs (1 in the first unit).
        stride: 1 or 2.
        kernel_size: of the depthwise convolution, odd.
        order: "paper" shuffles in front of the depthwise convolution, "authors" behind it.
        permutation: see `channel_permutation`; an explicit list has one entry per
            bottleneck channel.
        seed: of the "random" permutation.
        se: end the branch with squeeze-and-excitation.
        drop_path: probability in 0…1 of skipping the branch of a stride-1 unit, per image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        first_groups: int | None = None,
        stride: int,
        kernel_size: int = 3,
        order: Order = "paper",
        permutation: Permutation = "paper",
        seed: int = 0,
        se: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        first_groups = groups if first_groups is None else first_groups
        branch_channels = out_channels - in_channels if stride == 2 else out_channels
        middle = bottleneck_channels(out_channels, groups)
        require_divisible("in_channels", in_channels, "groups", first_groups)
        require_divisible("branch_channels", branch_channels, "groups", groups)
        shuffle = ChannelShuffle(middle, groups, permutation, seed)
        # The shuffle shares a slot, so that the keys are the same in both orders.
        paper = order == "paper"
        relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.branch_main_1 = nn.Sequential(
            *conv_bn(in_channels, middle, groups=first_groups),
            nn.Sequential(relu, shuffle) if paper else relu,
            depthwise(middle, kernel_size, stride),
            nn.BatchNorm2d(middle),
            nn.Identity() if paper else shuffle,
        )
        self.branch_main_2 = nn.Sequential(*conv_bn(middle, branch_channels, groups=groups))
        self.se = SqueezeExcite(branch_channels) if se else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        if stride == 2:
            self.branch_proj = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride), halves rounded up."""
        y_NCHW = self.se(self.branch_main_2(self.branch_main_1(x_NCHW)))
        if self.stride == 2:
            return torch.cat((self.branch_proj(x_NCHW), self.relu(y_NCHW)), dim=1)
        return self.relu(x_NCHW + self.drop_path(y_NCHW))


class ShuffleNetV1(nn.Module):
    """ShuffleNet V1: 3×3 conv, max pool, three stages of V1 units, global mean, linear.

    Rounding rule, as not every width divides by every number of groups: a stage's channels
    are `width` times the paper's, rounded up to a multiple of `groups`; a unit's bottleneck
    is a quarter of its output, rounded up to a multiple of `groups`; the first convolution
    has `width` · 24 channels, rounded up until the branch of the first unit, which is the
    stage's channels less the first convolution's, divides by `groups` (so 12 at 0.5× g=3,
    and the authors' 16 at 0.5× g=8). At 1.5× the authors start from 24 channels, and so do we.
    At 0.25× the paper's 13 MFLOPs would need more channels (12 for g=1 and g=3) than the 6
    that its text asks for; this rule gives 11.0 to 12.4.

    Args:
        groups: 1, 2, 3, 4 or 8; any other number needs `stage_channels`.
        width: factor on all channels, above 0.
        depths: units of each of the three stages.
        stage_channels: output channels of each stage at width 1; the paper's by default.
        stem_channels: channels of the first convolution, in place of the rule above.
        kernel_size: of the depthwise convolutions: odd; one for all, one per unit, or "auto"
            (see `auto_kernel_size`).
        input_size: side of the input in pixels, which "auto" reads the maps' sides from.
        order: "paper" shuffles in front of the depthwise convolution, "authors" behind it.
        permutation: the channel permutation (see `channel_permutation`). An explicit list
            fits a single number of bottleneck channels, so it needs stages of equal width.
        permutation_seed: of the "random" permutation; unit i takes `permutation_seed + i`.
        se: squeeze-and-excitation at the end of each branch, reduction 16.
        drop_path: stochastic depth (arXiv 1603.09382): probability of skipping the last
            stride-1 unit, rising linearly from 0 at the first unit.
        dropout: probability in front of the classifier.
        num_classes, in_channels: sizes of the output and of the input.

    Raises:
        ModelError: knobs that do not fit, with their values.
    """

    head_names = ("classifier",)

    def __init__(
        self,
        *,
        groups: int = 3,
        width: float = 1.0,
        depths: Sequence[int] = (4, 8, 4),
        stage_channels: Sequence[int] | None = None,
        stem_channels: int | None = None,
        kernel_size: PerUnit = 3,
        input_size: int = 224,
        order: Order = "paper",
        permutation: Permutation = "paper",
        permutation_seed: int = 0,
        se: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        require_choice("order", order, ("paper", "authors"))
        require_fraction("drop_path", drop_path)
        require_at_least("in_channels", in_channels, 1)
        require_at_least("num_classes", num_classes, 1)
        depths = require_depths(depths, len(STRIDES))
        channels = _stage_channels(groups, width, stage_channels)
        stem = stem_channels
        if stem is None:
            stem = _stem_channels(channels[0], groups, width)
        require_at_least("stem_channels", stem, 1)
        sides = unit_map_sides(input_size, 4, depths, STRIDES)
        kernels = per_unit("kernel_size", kernel_size, sides, auto_kernel_size)
        require_kernels(kernels)

        self.first_conv = nn.Sequential(*conv_bn_relu(in_channels, stem, 3, stride=2))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        units: list[nn.Module] = []
        in_unit = stem
        for depth, out_unit in zip(depths, channels, strict=True):
            for position in range(depth):
                i = len(units)
                units.append(
                    ShuffleUnitV1(
                        in_unit,
                        out_unit,
                        groups=groups,
                        first_groups=1 if i == 0 else groups,
                        stride=1 if position else 2,
                        kernel_size=kernels[i],
                        order=order,
                        permutation=permutation,
                        seed=permutation_seed + i,
                        se=se,
                        drop_path=drop_path * i / max(1, len(kernels) - 1) if position else 0.0,
                    )
                )
                in_unit = out_unit
        self.features = nn.Sequential(*units)
        self.dropout = dropout_layer(dropout)
        self.classifier = nn.Sequential(nn.Linear(channels[-1], num_classes, bias=False))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        x_NCHW = self.features(self.maxpool(self.first_conv(x_NCHW)))
        return self.classifier(self.dropout(x_NCHW.mean((2, 3))))


def bottleneck_channels(out_channels: int, groups: int) -> int:
    """Return a quarter of `out_channels`, rounded up to a multiple of `groups`.

    >>> bottleneck_channels(240, 3), bottleneck_channels(272 // 4, 4)
    (60, 20)
    """
    return round_up(-(-out_channels // 4), groups)


def _stage_channels(
    groups: int, width: float, stage_channels: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the output channels of each stage, or raise ModelError."""
    require_at_least("groups", groups, 1)
    if stage_channels is None:
        if groups not in STAGE_CHANNELS:
            raise ModelError(
                f"`groups` (={groups}) is none of {', '.join(map(str, STAGE_CHANNELS))}, for "
                f"which the paper gives widths; pass `stage_channels` as well"
            )
        stage_channels = STAGE_CHANNELS[groups]
    require_length("stage_channels", stage_channels, len(STRIDES))
    return scaled_channels(stage_channels, width, groups)


def _stem_channels(stage2_channels: int, groups: int, width: float) -> int:
    """Return `width` · 24, rounded up until (stage2_channels − it) divides by `groups`."""
    scaled = scaled_channels((STEM_CHANNELS,), width, 1)[0]
    stem = STEM_CHANNELS_AT_WIDTH.get(width, scaled)
    return stem + (stage2_channels - stem) % groups
