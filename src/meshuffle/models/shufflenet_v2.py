"""ShuffleNet V2 (Ma, Zhang, Zheng, Sun, arXiv 1807.11164), and its large variants.

With the sizes 0.5×, 1×, 1.5× and 2× the module tree, the `state_dict` keys, the order in which
the initialisation draws, and every number computed are torchvision's. The authors' released
weights (github.com/megvii-model/ShuffleNet-Series, folder `ShuffleNetV2`) are of another order.

Shape suffixes: N batch, C channels, H height, W width, D = C/2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from meshuffle.errors import ModelError
from meshuffle.models.knobs import (
    Order,
    PerUnit,
    auto_kernel_size,
    auto_num_branches,
    branch_widths,
    most_branches,
    per_unit,
    require_at_least,
    require_choice,
    require_depths,
    require_divisible,
    require_fraction,
    require_kernels,
    scaled_channels,
    unit_map_sides,
)
from meshuffle.models.layers import SqueezeExcite, conv_bn, conv_bn_relu, depthwise, dropout_layer
from meshuffle.models.permutation import ChannelShuffle, Permutation

SE_REDUCTION = 4


class MultiBranch(nn.Module):
    """Several parallel branches whose outputs are concatenated to `out_channels` channels.

    Branch i (from 1) is 1×1 conv, i depthwise convolutions, 1×1 conv, each with batch norm, and
    a ReLU behind each but the last depthwise; the first depthwise takes the stride. The widths
    are `branch_widths(out_channels, num_branches)`.

    Args:
        in_channels, out_channels: channels of the input and of the joined output.
        num_branches: at least 2.
        stride, kernel_size: of the depthwise convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_branches: int, stride: int, kernel_size: int
    ) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            _path(in_channels, width, i + 1, stride, kernel_size)
            for i, width in enumerate(branch_widths(out_channels, num_branches))
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride), halves rounded up."""
        return torch.cat([path(x_NCHW) for path in self.paths], dim=1)


def _path(
    in_channels: int, width: int, num_depthwise: int, stride: int, kernel_size: int
) -> nn.Sequential:
    """Return one branch of a `MultiBranch`."""
    layers: list[nn.Module] = [*conv_bn_relu(in_channels, width)]
    for i in range(num_depthwise):
        if i:
            layers.append(nn.ReLU(inplace=True))
        layers += [depthwise(width, kernel_size, 1 if i else stride), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, *conv_bn_relu(width, width))


class ShuffleUnitV2(nn.Module):
    """One V2 unit: split, one half through a branch, join, shuffle.

    A unit that keeps the map and the channels passes one half of x on and sends the other
    through `branch2`. A unit that changes the map or the channels sends all of x through both
    `branch1` (depthwise, 1×1) and `branch2` (1×1, depthwise, 1×1).

    The authors' order shuffles in front of the split instead, and where all of x goes through
    both branches `branch1` keeps its number of channels and `branch2` makes the rest.

    Args:
        in_channels, out_channels: channels of the unit; `out_channels` must be even.
        stride: 1 or 2.
        kernel_size: of the depthwise convolutions, odd.
        order: "paper", which is torchvision's, or "authors".
        branches: parallel branches in place of `branch2` (see `MultiBranch`); 1 for none.
        permutation: see `channel_permutation`; two groups, one for each half.
        seed: of the "random" permutation.
        se: squeeze-and-excitation at the end of `branch2`, reduction 4.
        residual: add the half to what its branch makes of it, where the unit keeps the map.
        drop_path: with `residual`, probability in 0…1 of skipping the branch, per image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        kernel_size: int = 3,
        order: Order = "paper",
        branches: int = 1,
        permutation: Permutation = "paper",
        seed: int = 0,
        se: bool = False,
        residual: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_divisible("out_channels", out_channels, "halves", 2)
        half = wide = out_channels // 2
        self.splits = stride == 1 and in_channels == out_channels
        self.adds = residual and self.splits
        self.shuffles_first = order == "authors"
        self.branch1 = nn.Sequential()
        if not self.splits:
            if self.shuffles_first:
                wide = out_channels - in_channels
                require_at_least("out_channels - in_channels", wide, 1)
            self.branch1 = nn.Sequential(
                depthwise(in_channels, kernel_size, stride),
                nn.BatchNorm2d(in_channels),
                *conv_bn_relu(in_channels, out_channels - wide),
            )
        branch_in = half if self.splits else in_channels
        self.branch2: nn.Module
        if branches == 1:
            self.branch2 = nn.Sequential(
                *conv_bn_relu(branch_in, half),
                depthwise(half, kernel_size, stride),
                nn.BatchNorm2d(half),
                *(conv_bn if self.adds else conv_bn_relu)(half, wide),
            )
        else:
            self.branch2 = MultiBranch(branch_in, wide, branches, stride, kernel_size)
        self.se = SqueezeExcite(wide, SE_REDUCTION) if se else nn.Identity()
        drops = self.adds and drop_path > 0
        self.drop_path = StochasticDepth(drop_path, "row") if drops else nn.Identity()
        self.shuffle = ChannelShuffle(out_channels, 2, permutation, seed)

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], as_halves: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (N, out_channels, H / stride, W / stride), H and W rounded up.

        `x` may be the two halves of its channels; with `as_halves` so may be the result.
        """
        join = self.shuffle.join_halves if as_halves else self.shuffle.join
        split = _halves
        if self.shuffles_first:
            join, split = _join, self.shuffle.split
        if not self.splits:
            x_NCHW = torch.cat(x, dim=1) if isinstance(x, tuple) else x
            return join(self.branch1(x_NCHW), self.se(self.branch2(x_NCHW)))
        kept_NDHW, active_NDHW = x if isinstance(x, tuple) else split(x)
        y_NDHW = self.se(self.branch2(active_NDHW))
        if self.adds:
            y_NDHW = torch.relu(active_NDHW + self.drop_path(y_NDHW))
        return join(kept_NDHW, y_NDHW)


def _halves(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    first_NDHW, second_NDHW = x_NCHW.chunk(2, dim=1)
    return first_NDHW, second_NDHW


def _join(a_NDHW: Tensor, b_NDHW: Tensor) -> Tensor:
    return torch.cat((a_NDHW, b_NDHW), dim=1)


class Stage(nn.Sequential):
    """Units in a row; between them the two halves of the channels travel as two tensors."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, out_channels, H, W) of the last unit."""
        x: Tensor | tuple[Tensor, Tensor] = input
        last = len(self) - 1
        for position, unit in enumerate(self):
            x = unit(x, as_halves=position < last)
        assert isinstance(x, Tensor)
        return x


class ShuffleNetV2(nn.Module):
    """ShuffleNet V2: 3×3 stem, max pool, stages of V2 units, 1×1 conv, global mean, linear.

    Three stages are `stage2`, `stage3` and `stage4`, each halving the map. Four, as in the
    large variants, begin with a `stage1` that keeps the 56×56 map of the max pool.

    Args:
        stage_channels: output channels of each stage at width 1; three or four even numbers.
        width: factor on `stage_channels`, above 0; the product is rounded up to an even number.
        depths: units of each stage.
        stem_channels: channels of each 3×3 convolution in front; the first has stride 2.
        head_channels: channels of the 1×1 convolution behind the stages.
        kernel_size: of the depthwise convolutions: odd; one for all, one per unit, or "auto"
            (see `auto_kernel_size`).
        branches: parallel branches per unit: one number for all, one per unit, or "auto", by
            which number, depth and width follow the map's side (see `auto_num_branches`,
            `branch_widths` and `MultiBranch`).
        input_size: side of the input in pixels, which "auto" reads the maps' sides from.
        order: "paper", or "authors", whose weights go with the "inverse" permutation (see
            `ShuffleUnitV2`).
        permutation: the channel permutation (see `channel_permutation`). An explicit list
            fits a single number of channels, so it needs stages of equal width.
        permutation_seed: of the "random" permutation; unit i takes `permutation_seed + i`.
        se: squeeze-and-excitation at the end of each branch, reduction 4.
        residual: add a branch's input to its output (appendix of the paper).
        drop_path: stochastic depth (arXiv 1603.09382), with `residual`: probability of
            skipping the last unit's branch, rising linearly from 0 at the first unit.
        dropout: probability in front of the classifier.
        num_classes, in_channels: sizes of the output and of the input.

    Raises:
        ModelError: knobs that do not fit, with their values.
    """

    head_names = ("fc",)

    def __init__(
        self,
        *,
        stage_channels: Sequence[int] = (116, 232, 464),
        width: float = 1.0,
        depths: Sequence[int] = (4, 8, 4),
        stem_channels: Sequence[int] = (24,),
        head_channels: int = 1024,
        kernel_size: PerUnit = 3,
        branches: PerUnit = 1,
        input_size: int = 224,
        order: Order = "paper",
        permutation: Permutation = "paper",
        permutation_seed: int = 0,
        se: bool = False,
        residual: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        require_choice("order", order, ("paper", "authors"))
        require_at_least("num_classes", num_classes, 1)
        require_at_least("in_channels", in_channels, 1)
        require_at_least("head_channels", head_channels, 1)
        require_fraction("drop_path", drop_path)
        if drop_path and not residual:
            raise ModelError(f"`drop_path` (={drop_path}) needs `residual=True`")
        strides = _strides(stage_channels)
        depths = require_depths(depths, len(strides))
        channels = scaled_channels(stage_channels, width, 2)
        sides = unit_map_sides(input_size, 4, depths, strides)
        kernels = per_unit("kernel_size", kernel_size, sides, auto_kernel_size)
        require_kernels(kernels)
        num_branches = _branches(branches, sides, channels, depths)

        self.conv1 = _stem(in_channels, stem_channels)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage_names = tuple(f"stage{i}" for i in range(5 - len(channels), 5))
        same = {"order": order, "permutation": permutation, "se": se, "residual": residual}
        units = [
            {
                **same,
                "kernel_size": kernels[i],
                "branches": num_branches[i],
                "seed": permutation_seed + i,
                "drop_path": drop_path * i / max(1, len(kernels) - 1),
            }
            for i in range(len(kernels))
        ]
        stages = _stages(stem_channels[-1], channels, depths, strides, units)
        for name, stage in zip(self.stage_names, stages, strict=True):
            self.add_module(name, stage)
        self.conv5 = nn.Sequential(*conv_bn_relu(channels[-1], head_channels))
        self.dropout = dropout_layer(dropout)
        self.fc = nn.Linear(head_channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        x_NCHW = self.maxpool(self.conv1(x_NCHW))
        for name in self.stage_names:
            x_NCHW = getattr(self, name)(x_NCHW)
        x_NCHW = self.conv5(x_NCHW)
        return self.fc(self.dropout(x_NCHW.mean((2, 3))))


def _strides(stage_channels: Sequence[int]) -> tuple[int, ...]:
    """Return the stride of each stage: 2, but 1 for the first of four."""
    if len(stage_channels) not in (3, 4):
        raise ModelError(
            f"`stage_channels` has {len(stage_channels)} entries {tuple(stage_channels)}; "
            f"it needs 3, or 4 to begin with a stage that keeps the max pool's map"
        )
    return (2, 2, 2) if len(stage_channels) == 3 else (1, 2, 2, 2)


def _branches(
    branches: PerUnit, sides: Sequence[int], channels: Sequence[int], depths: Sequence[int]
) -> tuple[int, ...]:
    """Return the branches of each unit; "auto" is limited by the channels of the unit."""
    numbers = per_unit("branches", branches, sides, auto_num_branches)
    for number in numbers:
        require_at_least("branches", number, 1)
    if branches == "auto":
        halves = [c // 2 for c, depth in zip(channels, depths, strict=True) for _ in range(depth)]
        numbers = tuple(map(min, numbers, map(most_branches, halves)))
    return numbers


def _stages(
    in_channels: int,
    channels: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    units: Sequence[Mapping[str, Any]],
) -> Iterator[Stage]:
    """Yield the stages; `units` holds the arguments of each unit, in order."""
    arguments = iter(units)
    for out_channels, depth, stride in zip(channels, depths, strides, strict=True):
        stage = Stage()
        for position in range(depth):
            unit_stride = 1 if position else stride
            stage.append(
                ShuffleUnitV2(in_channels, out_channels, stride=unit_stride, **next(arguments))
            )
            in_channels = out_channels
        yield stage


def _stem(in_channels: int, stem_channels: Sequence[int]) -> nn.Sequential:
    """Return the 3×3 convolutions in front, of which the first halves the map."""
    require_at_least("len(stem_channels)", len(stem_channels), 1)
    for count in stem_channels:
        require_at_least("stem_channels", count, 1)
    layers: list[nn.Module] = []
    for i, out_channels in enumerate(stem_channels):
        layers += conv_bn_relu(in_channels, out_channels, 3, stride=1 if i else 2)
        in_channels = out_channels
    return nn.Sequential(*layers)
