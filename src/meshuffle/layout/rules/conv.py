"""Convolutions: samples, filters, contraction, groups, depthwise, and space with a halo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from meshuffle.layout.layout import Shard
from meshuffle.layout.rule import Choices, Emitter, Query, rule
from meshuffle.layout.rules.groups import blocks, own_number
from meshuffle.layout.rules.labels import Labelled, choices
from meshuffle.layout.rules.window import Kernel, Padded, Pads, read, rows

aten = torch.ops.aten


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(call: Query) -> Choices:
    """input (N, C, …), weight (O, C / groups, …)."""
    yield from _channels(call, "OI")
    yield from _space(call, Kernel)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed(call: Query) -> Choices:
    """input (N, C, …), weight (C, O / groups, …)."""
    yield from _channels(call, "IO")
    yield from _space(call, _Adjoint)


def _channels(call: Query, weight_labels: str) -> Choices:
    """Split samples; filters or the contraction where there is one group, otherwise groups."""
    x, weight, groups = call["input"], call["weight"], int(call["groups"])
    if len(call.shape(x)) != len(call.shape(weight)):
        return  # without a batch
    fixed = ("" if groups == 1 else "OI") + ("" if call.samples() else "N")
    operands, added = [(x, "NI"), (weight, weight_labels)], [(call["bias"], "O")]
    op = Labelled(operands, "NO", added, fixed, channels="OI")
    yield from choices(call, op, {x: call.arriving[x]})
    if groups >= call.world:
        yield from _groups(call, groups, weight_labels)
    elif groups > 1 and weight_labels == "OI":
        yield from _within_groups(call, groups)


def _groups(call: Query, groups: int, weight_labels: str) -> Choices:
    """Each rank computes some groups, in any order."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    each = (call.shape(x)[1] // groups, call.out[1] // groups)
    for source, split in blocks(call, x, 1, groups, each):
        in_weight = split if weight_labels == "OI" else source
        given = {x: source, weight: in_weight.on(0), bias: split.on(0)}
        local = own_number("groups", [len(part) // each[0] for part in source.owners])
        yield call.choice(given, split, split, kind="channel", local=local)


def _within_groups(call: Query, groups: int) -> Choices:
    """Fewer groups than ranks: several ranks divide the filters of one group."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    num_in, num_out = call.shape(x)[1] // groups, call.out[1] // groups
    owners, needs = [], []
    for group, ranks in enumerate(Shard.even(0, call.world, groups).owners):
        if num_out < len(ranks):
            return
        for part in Shard.even(0, num_out, len(ranks)).owners:
            owners.append(tuple(group * num_out + i for i in part))
            needs.append(tuple(range(group * num_in, (group + 1) * num_in)))
    layout = Shard(1, tuple(owners))
    source = read(1, tuple(needs), call.shape(x)[1])
    given = {x: source, weight: layout.on(0), bias: layout.on(0)}
    local = own_number("groups", [1] * call.world)
    yield call.choice(given, layout, layout, kind="channel", local=local)


def _space(call: Query, kind: type[Kernel]) -> Choices:
    """Each rank computes some rows; what it needs beyond its own comes from its neighbours."""
    x, kernels = call["input"], _kernels(call, kind)
    for d, layout, needed, ends in rows(call, x, kernels):
        local: Any = _padded(call, d, kernels, ends)
        if kind is _Adjoint:
            local = _Spread(d, kernels, layout, call.ints("output_padding", len(kernels)))
        yield call.choice({x: needed}, layout, layout, kind="spatial", local=local)


def _kernels(call: Query, kind: type[Kernel]) -> list[Kernel]:
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


def _padded(call: Query, d: int, kernels: Sequence[Kernel], ends: Pads) -> Padded:
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
