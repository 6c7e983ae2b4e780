"""Convolutions: samples, filters, contraction, groups, depthwise, and space with a halo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from meshuffle.layout.layout import Layout, Partial, Shard, Varying, splits
from meshuffle.layout.program import Call
from meshuffle.layout.rule import Choice, Emitter, rule
from meshuffle.layout.rules.groups import blocks
from meshuffle.layout.rules.window import Kernel, Padded, Pads, read, rows

aten = torch.ops.aten
Arriving = Sequence[Sequence[Layout]]


@dataclass(frozen=True)
class _Channels:
    """Where channels are: `O` and `I` dims of the weight, numbers per group."""

    groups: int
    outs: int
    ins: int
    transposed: bool

    @property
    def out_dim(self) -> int:
        """Dim of the weight that holds outputs of a group (of all groups where not transposed)."""
        return 1 if self.transposed else 0


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """input (N, C, …), weight (O, C / groups, …)."""
    yield from _channels(call, wanted, arriving, transposed=False)
    yield from _space(call, wanted, arriving, Kernel)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """input (N, C, …), weight (C, O / groups, …)."""
    yield from _channels(call, wanted, arriving, transposed=True)
    yield from _space(call, wanted, arriving, _Adjoint)


def _channels(
    call: Call, wanted: Sequence[Layout], arriving: Arriving, transposed: bool
) -> Iterator[Choice]:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if len(call.shape(x)) != len(call.shape(weight)):
        return  # without a batch
    if (samples := call.samples()) is not None:
        inputs = call.lie({x: call.samples(x)}, Varying())
        yield Choice(inputs, samples, samples, "batch")
    groups = int(call["groups"])
    sizes = _Channels(groups, call.out[1] // groups, call.shape(x)[1] // groups, transposed)
    arrived = arriving[call.inputs.index(x)]
    if groups == 1:
        yield from _filters(call, wanted, sizes, (x, weight, bias))
        yield from _contraction(call, arrived, sizes, (x, weight, bias))
    elif groups >= call.world:
        yield from _groups(call, wanted, arrived, sizes, (x, weight, bias))
    else:
        yield from _within_groups(call, sizes, (x, weight, bias))


def _filters(
    call: Call, wanted: Sequence[Layout], sizes: _Channels, nodes: tuple[Any, ...]
) -> Iterator[Choice]:
    x, weight, bias = nodes
    for layout in splits([*wanted, call.even(1)]):
        if layout.dim == 1 and isinstance(layout, Shard):
            given: dict[Any, Layout] = {x: Varying(), weight: layout.on(sizes.out_dim)}
            given[bias] = layout.on(0)
            yield Choice(call.lie(given, Varying()), layout, layout, "channel")


def _contraction(
    call: Call, arrived: Sequence[Layout], sizes: _Channels, nodes: tuple[Any, ...]
) -> Iterator[Choice]:
    x, weight, bias = nodes
    for layout in splits([*arrived, call.even(1, sizes.ins)]):
        if layout.dim == 1 and isinstance(layout, Shard):
            given: dict[Any, Layout] = {x: layout, weight: layout.on(1 - sizes.out_dim)}
            given[bias] = Partial()
            yield Choice(call.lie(given, Varying()), Partial(), layout, "channel")


def _groups(
    call: Call,
    wanted: Sequence[Layout],
    arrived: Sequence[Layout],
    sizes: _Channels,
    nodes: tuple[Any, ...],
) -> Iterator[Choice]:
    """Each rank computes some groups, in any order."""
    x, weight, bias = nodes
    each = (sizes.ins, sizes.outs)
    for source, split in blocks(call, 1, sizes.groups, each, wanted, arrived):
        in_weight = source if sizes.transposed else split
        given = {x: source, weight: in_weight.on(0), bias: split.on(0)}
        local = _LocalGroups([len(part) // sizes.ins for part in source.owners])
        yield Choice(call.lie(given, Varying()), split, split, "channel", local=local)


class _LocalGroups:
    """The same convolution with a rank's number of groups."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts

    def __call__(self, emit: Emitter) -> Node:
        return emit.again(groups=self.counts[emit.rank])


def _within_groups(call: Call, sizes: _Channels, nodes: tuple[Any, ...]) -> Iterator[Choice]:
    """Fewer groups than ranks: several ranks share the filters of one group."""
    x, weight, bias = nodes
    if sizes.transposed:
        return
    sharing = Shard.even(0, call.world, sizes.groups).owners
    owners, needs = [], []
    for group, ranks in enumerate(sharing):
        if sizes.outs < len(ranks):
            return
        start = group * sizes.outs
        for part in Shard.even(0, sizes.outs, len(ranks)).owners:
            owners.append(tuple(start + i for i in part))
            needs.append(tuple(range(group * sizes.ins, (group + 1) * sizes.ins)))
    layout = Shard(1, tuple(owners))
    source = read(1, tuple(needs), call.shape(x)[1])
    given = {x: source, weight: layout.on(0), bias: layout.on(0)}
    local = _LocalGroups([1] * call.world)
    yield Choice(call.lie(given, Varying()), layout, layout, "channel", local=local)


def _space(
    call: Call, wanted: Sequence[Layout], arriving: Arriving, kind: type[Kernel]
) -> Iterator[Choice]:
    """Each rank computes some rows; what it needs beyond its own comes from its neighbours."""
    x = call["input"]
    kernels = _kernels(call, kind)
    for d, layout, needed, ends in rows(call, kernels, wanted, arriving[call.inputs.index(x)]):
        inputs = call.lie({x: needed}, Varying())
        local: Any = _padded(call, d, kernels, ends)
        if kind is _Adjoint:
            local = _Spread(d, kernels, layout, call.ints("output_padding", len(kernels)))
        yield Choice(inputs, layout, layout, "spatial", local=local)


def _kernels(call: Call, kind: type[Kernel]) -> list[Kernel]:
    """Return those of the dims of space; none without a batch."""
    sizes, widths = call.shape(call["input"])[2:], call.shape(call["weight"])[2:]
    num, paddings = len(widths), [0] * len(widths)  # "valid"
    strides, dilations = call.ints("stride", num), call.ints("dilation", num)
    if call["padding"] == "same":
        paddings = [d * (w - 1) // 2 for d, w in zip(dilations, widths, strict=True)]
    elif not isinstance(call["padding"], str):
        paddings = call.ints("padding", num)
    each = zip(sizes, widths, strides, paddings, dilations, strict=False)
    return [kind(*numbers) for numbers in each] if len(sizes) == num else []


def _padded(call: Call, d: int, kernels: Sequence[Kernel], ends: Pads) -> Padded:
    """Return the convolution of a rank's window, padded only where the tensor ends."""
    rest = [0 if i == d else k.padding for i, k in enumerate(kernels)]
    if not isinstance(call["padding"], str):
        return Padded(d, ends, [(0, 0)] * len(kernels), padding=rest)
    same = call["padding"] == "same"  # an odd padding is longer behind
    around = [(k.padding, k.reach - k.padding if same else 0) for k in kernels]
    return Padded(d, ends, around, padding="valid")


class _Adjoint(Kernel):
    """The kernel of a transposed convolution: its `stride` is that of the outputs."""

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """Return the inputs that add to outputs first … last; one in front of those in gaps."""
        first, last = first + self.padding, last + self.padding
        start = -((self.reach - first) // self.stride)
        return min(first // self.stride, start), last // self.stride


class _Spread:
    """The transposed convolution of a rank's window without padding, and of that its rows."""

    def __init__(
        self, d: int, kernels: Sequence[Kernel], layout: Shard, behind: Sequence[int]
    ) -> None:
        self.d, self.kernels, self.layout, self.behind = d, kernels, layout, behind

    def __call__(self, emit: Emitter) -> Node:
        kernel, part = self.kernels[self.d], self.layout.owners[emit.rank]
        held = kernel.held(part)
        start, stop = (i * kernel.stride - kernel.padding for i in (held[0], held[-1]))
        padding, behind = [k.padding for k in self.kernels], list(self.behind)
        padding[self.d], behind[self.d] = 0, max(0, part[-1] - stop - kernel.reach)
        y = emit.again(padding=padding, output_padding=behind)
        return emit.take(y, self.layout.dim, range(part[0] - start, part[-1] - start + 1))
