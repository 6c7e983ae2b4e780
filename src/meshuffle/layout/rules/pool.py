"""Pooling: samples, channels, and space with a halo."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from meshuffle.layout.call import Call, Choice, Emitter, rule, splits, unique
from meshuffle.layout.layout import Layout, Partial, Shard
from meshuffle.layout.rules.window import Kernel, is_contiguous, padded, window

aten = torch.ops.aten
Arriving = Sequence[Sequence[Layout]]

_MAX = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)
_AVERAGE = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
_DIMS = {packet: i % 3 + 1 for i, packet in enumerate([*_MAX, *_AVERAGE])}


@rule(*_MAX, *_AVERAGE)
def pool(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """input (N, C, …): windows of one channel."""
    (x,) = call.inputs
    packet = call.node.target._overloadpacket  # type: ignore[union-attr]
    num = _DIMS[packet]
    lead = len(call.out) - num
    for layout in splits([*wanted, *arriving[0], call.samples(x)]):
        if layout.dim < lead:
            yield Choice((layout,), layout, layout)
    widths = call.ints("kernel_size", num)
    strides = call.ints("stride", num) if call["stride"] else widths
    paddings = call.ints("padding", num)
    dilations = call.ints("dilation", num) if "dilation" in call.given else [1] * num
    sizes = call.shape(x)[lead:]
    kernels = [Kernel(*k) for k in zip(sizes, widths, strides, paddings, dilations, strict=True)]
    if packet in _AVERAGE and not _is_plain_average(call, kernels, lead):
        return
    for d, kernel in enumerate(kernels):
        dim = d + lead
        same = arriving[0] if call.out[dim] == kernel.size else []
        found = [w for w in [*wanted, *same] if is_contiguous(w) and w.dim == dim]  # type: ignore[union-attr]
        for rows in unique([*found, call.even(dim)]):
            needed = window(rows, kernel) if isinstance(rows, Shard) else None
            if needed is None or not isinstance(rows, Shard):
                continue
            local = _Rows(d, kernels, needed[1], call.out[lead:], packet in _MAX)
            yield Choice((needed[0],), rows, rows, local=local)


def _is_plain_average(call: Call, kernels: Sequence[Kernel], lead: int) -> bool:
    """Tell whether every window is divided by the same number."""
    if not call["count_include_pad"] and any(k.padding for k in kernels):
        return False
    return all(
        k.needs(0, out - 1)[1] < k.size + k.padding
        for k, out in zip(kernels, call.out[lead:], strict=True)
    )


class _Rows:
    """Pools a rank's window; all padding is made explicit, so that ends are ends of the tensor."""

    def __init__(
        self,
        d: int,
        kernels: Sequence[Kernel],
        pads: Sequence[tuple[int, int]],
        outs: Sequence[int],
        is_max: bool,
    ) -> None:
        self.d, self.pads = d, pads
        # Of a dim that is not split: in front, and behind as far as the last window goes.
        self.around = [
            (k.padding, max(0, k.needs(0, out - 1)[1] - k.size + 1))
            for k, out in zip(kernels, outs, strict=True)
        ]
        self.value = -math.inf if is_max else 0.0

    def __call__(self, emit: Emitter) -> Node:
        around = list(self.around)
        around[self.d] = self.pads[emit.rank]
        x = padded(emit, emit.given["self"], around, self.value)
        return emit.again(self=x, padding=[0] * len(around), ceil_mode=False)


@rule(
    *(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d),
    *(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.upsample_nearest1d, aten.upsample_linear1d, aten.upsample_nearest3d),
)
def adaptive(call: Call, wanted: Sequence[Any], arriving: Arriving) -> Iterator[Choice]:
    """Samples and channels; space where every output has windows of its own, or there is one."""
    (x,) = call.inputs
    packet = str(call.node.target)
    lead = len(call.shape(x)) - int(packet[packet.index("d.") - 1])  # 1 without a batch
    several = not hasattr(call.node.meta["val"], "shape")  # values and where they are
    flat = [layout for want in wanted for layout in (want if several else [want])]
    for layout in splits([*flat, *arriving[0], call.samples(x)]):
        if layout.dim < lead:
            yield Choice((layout,), (layout,) * 2 if several else layout, layout)
    if several:
        return
    for layout in splits(arriving[0] if "adaptive_avg" in packet else []):
        if layout.dim >= lead and isinstance(layout, Shard) and call.out[layout.dim] == 1:
            yield Choice((layout,), Partial(), layout, local=_Term(layout))
    for dim in range(lead, len(call.out)) if "adaptive" in packet else ():
        yield from _uniform(call, x, dim, lead, wanted)


def _uniform(
    call: Call, x: Node, dim: int, lead: int, wanted: Sequence[Layout]
) -> Iterator[Choice]:
    """Yield choices along a dim whose windows have one size and do not overlap."""
    width, rest = divmod(call.shape(x)[dim], call.out[dim])
    if rest:
        return
    for layout in unique([*wanted, call.even(dim)]):
        if isinstance(layout, Shard) and layout.dim == dim and is_contiguous(layout):
            needed = window(layout, Kernel(call.shape(x)[dim], width, width))
            assert needed is not None
            local = _Own(layout, lead, call.out[lead:])
            yield Choice((needed[0],), layout, layout, local=local)


class _Term:
    """A rank's mean, weighted by its share of the dim."""

    def __init__(self, layout: Shard) -> None:
        self.layout = layout

    def __call__(self, emit: Emitter) -> Node:
        return emit.call(aten.mul.Tensor, emit.again(), emit.share(self.layout, self.layout.size))


class _Own:
    """Pools to a rank's number of outputs."""

    def __init__(self, layout: Shard, lead: int, outs: Sequence[int]) -> None:
        self.layout, self.lead, self.outs = layout, lead, outs

    def __call__(self, emit: Emitter) -> Node:
        outs = list(self.outs)
        outs[self.layout.dim - self.lead] = len(self.layout.owners[emit.rank])
        return emit.again(output_size=outs)
