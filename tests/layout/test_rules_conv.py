"""Convolution, pooling and resizing: every choice computes what the op computes on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.layout import Partial

from .harness import Apply, check, few, ok

aten = torch.ops.aten
CONVS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
TRANSPOSED = {1: aten.conv_transpose1d, 2: aten.conv_transpose2d, 3: aten.conv_transpose3d}
MODULES: dict[Any, Any] = {
    **{CONVS[n]: m for n, m in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))},
    **{
        TRANSPOSED[n]: m
        for n, m in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d))
    },
}


def image(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn, num: int) -> dict[str, Any]:
    """Arguments of a convolution of (4, C, 8, …) images."""

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(num))

    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    ins, outs = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    return {
        "in_channels": ins if groups > 1 else ins + 1,
        "out_channels": outs if groups > 1 else outs + 1,
        "kernel_size": per_dim(1, 3),
        "stride": per_dim(1, 3),
        "padding": per_dim(0, 3),
        "dilation": per_dim(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


@pytest.mark.parametrize("num", [1, 2, 3])
@given(data=st.data())
@few(12)
def test_convolution(num: int, data: st.DataObject) -> None:
    arguments = data.draw(convolutions(num))
    world, seed = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 99))
    x = image(4, arguments["in_channels"], *[8, 6, 5][:num])
    ok(check(MODULES[CONVS[num]](**arguments), x, op=CONVS[num], world=world, seed=seed), 0)


@pytest.mark.parametrize("num", [1, 2, 3])
@given(data=st.data())
@few(6)
def test_transposed_convolution(num: int, data: st.DataObject) -> None:
    arguments = data.draw(convolutions(num)) | {"padding": 0}
    world, seed = data.draw(st.integers(2, 3)), data.draw(st.integers(0, 99))
    x = image(4, arguments["in_channels"], *[5, 4, 3][:num])
    op = TRANSPOSED[num]
    ok(check(MODULES[op](**arguments), x, op=op, world=world, seed=seed), 0)


@pytest.mark.parametrize(
    ("groups", "world", "dims"),
    [(1, 2, (0, 1, 2, 3)), (4, 3, (0, 1, 2, 3)), (2, 4, (0, 1, 2, 3)), (12, 4, (0, 1, 2, 3))],
)
def test_convolution_splits_every_dim(groups: int, world: int, dims: tuple[int, ...]) -> None:
    """Dense, groups that do not divide the world, fewer groups than ranks, depthwise."""
    model = nn.Conv2d(12, 12, 3, padding=1, groups=groups)
    checked = ok(check(model, image(4, 12, 9, 8), op=aten.conv2d, world=world), *dims)
    assert checked.has(Partial) == (groups == 1)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    model = nn.Conv2d(4, 6, 3, padding=padding, dilation=2)
    ok(check(model, image(4, 4, 9, 8), op=aten.conv2d), 0, 1)


def test_padding_beyond_the_image() -> None:
    """A rank that would see nothing but padding: such a split is not offered, others are."""
    model = nn.Conv2d(3, 4, 2, padding=5)
    ok(check(model, image(4, 3, 3, 4), op=aten.conv2d, world=3), 0, 1)


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    width = draw(st.integers(1, 3))
    return {
        "kernel_size": width,
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, width // 2)),
        "ceil_mode": draw(st.booleans()),
    }


@given(pools(), st.integers(1, 2), st.integers(2, 3), st.integers(0, 99))
@few(12)
def test_max_pool(arguments: dict[str, Any], dilation: int, world: int, seed: int) -> None:
    model = nn.MaxPool2d(**arguments, dilation=dilation)
    ok(check(model, image(4, 3, 8, 7), op=aten.max_pool2d, world=world, seed=seed), 0, 1)


@given(pools(), st.booleans(), st.sampled_from([None, 5]), st.integers(0, 99))
@few(12)
def test_average_pool(
    arguments: dict[str, Any], counted: bool, divisor: int | None, seed: int
) -> None:
    model = nn.AvgPool2d(**arguments, count_include_pad=counted, divisor_override=divisor)
    ok(check(model, image(4, 3, 8, 7), op=aten.avg_pool2d, seed=seed), 0, 1)


@pytest.mark.parametrize(
    ("model", "op", "sizes"),
    [
        (nn.MaxPool1d(3, 1, 1), aten.max_pool1d, (4, 3, 7)),
        (nn.MaxPool2d(3, 2, 1), aten.max_pool2d, (4, 3, 8, 7)),
        (nn.MaxPool3d(2, 2), aten.max_pool3d, (4, 3, 4, 6, 5)),
        (nn.AvgPool1d(2, 2), aten.avg_pool1d, (4, 3, 8)),
        (nn.AvgPool2d(3, 2, 1), aten.avg_pool2d, (4, 3, 8, 7)),
        (nn.AvgPool3d(2, 2), aten.avg_pool3d, (4, 3, 4, 6, 5)),
    ],
)
def test_pools_split_every_dim(model: nn.Module, op: Any, sizes: tuple[int, ...]) -> None:
    ok(check(model, image(*sizes), op=op), *range(len(sizes)))


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 99))
@few(8)
def test_adaptive_average_pool(height: int, width: int, seed: int) -> None:
    model = nn.AdaptiveAvgPool2d((height, width))
    checked = check(model, image(4, 4, 8, 9), op=aten.adaptive_avg_pool2d, seed=seed)
    assert ok(checked, 0, 1).has(Partial) == (1 in (height, width))


@pytest.mark.parametrize(
    ("function", "op", "sizes", "dims"),
    [
        (lambda x: F.adaptive_avg_pool1d(x, 1), aten.adaptive_avg_pool1d, (4, 6, 5), (0, 1)),
        (lambda x: F.adaptive_avg_pool1d(x, 2), aten.adaptive_avg_pool1d, (4, 6), (0, 1)),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), aten.adaptive_avg_pool2d, (4, 6, 6), (0, 1)),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 5)), aten.adaptive_avg_pool2d, (4, 9, 5), (0, 2)),
        (lambda x: F.adaptive_max_pool2d(x, 3), aten.adaptive_max_pool2d, (4, 4, 9, 6), (0, 1)),
        (lambda x: F.max_pool1d(x, 3, 1, 1), aten.max_pool1d, (4, 7), (0, 1)),
        (lambda x: F.interpolate(x, scale_factor=2), aten.upsample_nearest2d, (4, 4, 5, 3), (0, 1)),
        (
            lambda x: F.interpolate(x, (5, 6), mode="bilinear"),
            aten.upsample_bilinear2d,
            (4, 4, 5, 3),
            (0, 1),
        ),
    ],
)
def test_without_a_batch_or_with_a_fixed_size(
    function: Any, op: Any, sizes: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    """torch takes (C, H, W) too: dim 1 is then a row, not a channel."""
    ok(check(Apply(function), image(*sizes), op=op), *dims)


@pytest.mark.parametrize("other_batch", [3, 7])
def test_another_batch_than_planned(other_batch: int) -> None:
    model, x = nn.Conv2d(4, 6, 3, 2, 1), image(4, 4, 9, 8)
    ok(check(model, x, op=aten.conv2d, world=3, other_batch=other_batch), 0, 1, 2, 3)
