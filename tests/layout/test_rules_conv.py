"""Convolution, pooling and resizing: every choice computes what the op computes on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.graph.runtime_ops import weighted
from meshuffle.layout import Partial
from meshuffle.layout.rules.pool import _terms
from tests.layout.harness import Apply, check, few, ok

aten = torch.ops.aten
CONVS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
KERNEL = ("kernel_size", "stride", "padding", "dilation", "output_padding")
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
    """Rows in the gaps of a large stride and behind the last input too."""
    arguments = data.draw(convolutions(num))
    arguments["output_padding"] = tuple(
        data.draw(st.integers(0, max(s, d) - 1))
        for s, d in zip(arguments["stride"], arguments["dilation"], strict=True)
    )
    op, sizes = TRANSPOSED[num], [5, 4, 3][:num]
    world, seed = data.draw(st.integers(2, 3)), data.draw(st.integers(0, 99))
    x, model = image(4, arguments["in_channels"], *sizes), MODULES[op](**arguments).double()
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + behind
        for n, k, s, p, d, behind in zip(sizes, *(arguments[key] for key in KERNEL), strict=True)
    ]
    assume(min(out) > 0)
    checked = ok(check(model, x, op=op, world=world, seed=seed), 0)
    ends = zip(out, arguments["output_padding"], arguments["padding"], strict=True)
    split = {d + 2 for d, (n, behind, pad) in enumerate(ends) if n >= world and behind <= pad}
    assert checked.dims() >= split


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
@pytest.mark.parametrize("width", [(3, 2), (2, 1), (4, 5)])
def test_padding_by_name(padding: str, width: tuple[int, int]) -> None:
    model = nn.Conv2d(4, 6, width, padding=padding, dilation=(1, 2))
    ok(check(model, image(4, 4, 9, 12), op=aten.conv2d, world=3), 0, 1, 2, 3)


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
    dims = (0, 1) if divisor else (0, 1, 2, 3)
    ok(check(model, image(4, 3, 8, 7), op=aten.avg_pool2d, seed=seed), *dims)


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


@given(st.integers(1, 10), st.integers(1, 9), st.integers(0, 99))
@few(8)
def test_adaptive_average_pool(height: int, width: int, seed: int) -> None:
    """Windows that overlap and differ in size; more results than inputs too."""
    model = nn.AdaptiveAvgPool2d((height, width))
    checked = check(model, image(4, 4, 8, 9), op=aten.adaptive_avg_pool2d, seed=seed)
    dims = {0, 1} | {d for d, size in ((2, height), (3, width)) if size > 1}
    assert ok(checked).dims() == dims
    assert checked.has(Partial) == (1 in (height, width))


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


RESIZES: dict[str, Any] = {
    "nearest": {n: getattr(aten, f"upsample_nearest{n}d") for n in (1, 2, 3)},
    "nearest-exact": {n: getattr(aten, f"_upsample_nearest_exact{n}d") for n in (1, 2, 3)},
    "linear": {1: aten.upsample_linear1d},
    "bilinear": {2: aten.upsample_bilinear2d},
    "trilinear": {3: aten.upsample_trilinear3d},
    "bicubic": {2: aten.upsample_bicubic2d},
}
SCALES = st.sampled_from([0.5, 2, 3]) | st.floats(0.3, 3.3)


@st.composite
def resizes(draw: st.DrawFn) -> tuple[Any, list[int], dict[str, Any]]:
    """An op, sizes of space, and arguments of `F.interpolate`."""
    mode = draw(st.sampled_from(list(RESIZES)))
    num = draw(st.sampled_from(list(RESIZES[mode])))
    sizes = draw(st.lists(st.integers(1, 8), min_size=num, max_size=num))
    arguments: dict[str, Any] = {"mode": mode}
    if "nearest" not in mode:
        arguments["align_corners"] = draw(st.booleans())
    if draw(st.booleans()):
        arguments["size"] = draw(st.lists(st.integers(1, 9), min_size=num, max_size=num))
        return RESIZES[mode][num], sizes, arguments
    scales = draw(st.lists(SCALES, min_size=num, max_size=num))
    assume(all(size * scale >= 1 for size, scale in zip(sizes, scales, strict=True)))
    arguments["scale_factor"] = scales
    arguments["recompute_scale_factor"] = draw(st.booleans())
    return RESIZES[mode][num], sizes, arguments


@given(resizes(), st.integers(2, 3), st.integers(0, 99))
@few(30)
def test_interpolation(case: Any, world: int, seed: int) -> None:
    """Any scale up and down; a dim with fewer results than ranks is not split, all others are.

    But none where torch may contradict itself (2.15, nearest and bicubic with a scale that the
    sizes have not, and once or twice as many results): its gradient then takes other rows.
    """
    op, sizes, arguments = case
    x = image(4, 3, *sizes)
    model = Apply(lambda x: F.interpolate(x, **arguments))
    checked = check(model, x, op=op, world=world, seed=seed)
    out = model(x).shape
    expected = {d for d in range(len(out)) if out[d] >= world}
    if not arguments.get("recompute_scale_factor", True):
        each = zip(sizes, out[2:], arguments["scale_factor"], strict=True)
        if any(n in (size, 2 * size) and n != scale * size for size, n, scale in each):
            expected -= {2, 3, 4}
    assert ok(checked).dims() == expected


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialiased_rows_are_left_whole(mode: str) -> None:
    model = Apply(lambda x: F.interpolate(x, scale_factor=0.6, mode=mode, antialias=True))
    op = getattr(aten, f"_upsample_{mode}2d_aa")
    assert ok(check(model, image(4, 3, 9, 8), op=op)).dims() == {0, 1}


@given(st.sampled_from(list(RESIZES)), st.integers(1, 5000), SCALES, st.booleans())
@few(60)
def test_the_op_says_which_rows_it_sees(mode: str, size: int, scale: float, aligned: bool) -> None:
    """In float32 torch rounds in its own way; both ends of long tensors."""
    assume(size * scale >= 1)
    num = min(RESIZES[mode])
    options = () if "nearest" in mode else (aligned,)
    constants = (None, *options, (scale, *[1.0] * (num - 1)))
    op = RESIZES[mode][num].vec
    terms = _terms(op, constants, 0, num, size, torch.float32)
    assert terms is not None
    x = torch.randn(1, 2, size, *[1] * (num - 1))
    found = weighted(x, 2, terms[0].tolist(), terms[1].tolist())
    whole = op(x, *constants)
    assert torch.allclose(found, whole, rtol=0, atol=0 if "nearest" in mode else 1e-5)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("amounts", [(1, 2, 3, 0), (2, 0), (0, 0, 1, 1), (2, -2, -1, 1)])
def test_padding_of_what_is_split(mode: str, amounts: tuple[int, ...]) -> None:
    if mode != "constant" and min(amounts) < 0:
        return
    sizes = (4, 3, 7, 8) if len(amounts) == 4 else (4, 3, 8)
    for world in (2, 3):
        x = image(*sizes)
        model = Apply(lambda x: F.pad(x, amounts, mode=mode))
        ok(check(model, x, op=aten.pad, world=world), *range(len(sizes)))


@pytest.mark.parametrize(
    ("model", "op", "sizes", "dims"),
    [
        (nn.PixelShuffle(2), aten.pixel_shuffle, (4, 12, 4, 5), (0, 1, 2, 3)),
        (nn.PixelUnshuffle(3), aten.pixel_unshuffle, (4, 4, 9, 12), (0, 1, 2, 3)),
        (nn.LocalResponseNorm(3), aten.avg_pool3d, (4, 6, 5, 4), (0, 2, 3, 4)),
        (nn.MaxPool1d(2, return_indices=True), aten.max_pool1d_with_indices, (4, 3, 7), (0, 1)),
        (nn.MaxPool2d(2, return_indices=True), aten.max_pool2d_with_indices, (4, 3, 7, 4), (0, 1)),
    ],
)
def test_other_ops_of_space(model: Any, op: Any, sizes: Any, dims: tuple[int, ...]) -> None:
    for other_batch in (0, 7):
        ok(check(model, image(*sizes), op=op, other_batch=other_batch), *dims)


@pytest.mark.parametrize("other_batch", [3, 7])
def test_another_batch_than_planned(other_batch: int) -> None:
    model, x = nn.Conv2d(4, 6, 3, 2, 1), image(4, 4, 9, 8)
    ok(check(model, x, op=aten.conv2d, world=3, other_batch=other_batch), 0, 1, 2, 3)
