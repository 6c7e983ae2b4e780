"""Convolutions: samples, filters, contraction, groups, depthwise, and space with a halo."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from meshuffle.layout.call import Call, Choice, Emitter, rule, splits, unique
from meshuffle.layout.layout import Layout, Partial, Shard, Varying, Window
from meshuffle.layout.rules.window import Kernel, is_contiguous, padded, window

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
    yield from _space(call, wanted, arriving)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """input (N, C, …), weight (C, O / groups, …)."""
    yield from _channels(call, wanted, arriving, transposed=True)


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
    even = Shard.even(1, sizes.groups, call.world).owners
    found = [_groups_of(w, sizes.outs) for w in wanted]
    found += [_groups_of(a, sizes.ins) for a in arrived]
    for groups in dict.fromkeys([*found, even]):
        if groups is None or sum(map(len, groups)) != sizes.groups:
            continue
        source, result = _channels_of(groups, sizes.ins), _channels_of(groups, sizes.outs)
        split = Shard(1, result)
        in_weight = source if sizes.transposed else result
        given = {x: Shard(1, source), weight: Shard(0, in_weight), bias: split.on(0)}
        local = _LocalGroups([len(part) for part in groups])
        yield Choice(call.lie(given, Varying()), split, split, "channel", local=local)


def _groups_of(layout: Layout, size: int) -> tuple[tuple[int, ...], ...] | None:
    """Return the groups of `size` channels that each rank has, if it has whole ones."""
    if not isinstance(layout, Shard) or layout.dim != 1:
        return None
    groups = tuple(tuple(i // size for i in part[::size]) for part in layout.owners)
    return groups if all(groups) and _channels_of(groups, size) == layout.owners else None


@functools.lru_cache(maxsize=4096)
def _channels_of(groups: tuple[tuple[int, ...], ...], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(g * size + i for g in part for i in range(size)) for part in groups)


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
    once = len(sharing) == call.world
    source = Shard(1, tuple(needs)) if once else Window(1, tuple(needs))
    given = {x: source, weight: layout.on(0), bias: layout.on(0)}
    local = _LocalGroups([1] * call.world)
    yield Choice(call.lie(given, Varying()), layout, layout, "channel", local=local)


def _space(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """Each rank computes some rows; what it needs beyond its own comes from its neighbours."""
    x, weight = call["input"], call["weight"]
    num = len(call.shape(weight)) - 2
    if len(call.shape(x)) != num + 2 or isinstance(call["padding"], str):
        return
    sizes = call.shape(x)[2:], call.shape(weight)[2:]
    steps = [call.ints(name, num) for name in ("stride", "padding", "dilation")]
    arrived = [a for a in arriving[call.inputs.index(x)] if is_contiguous(a)]
    for d in range(num):
        kernel = Kernel(sizes[0][d], sizes[1][d], *(step[d] for step in steps))
        same = arrived if call.out[d + 2] == kernel.size else []
        found = [w for w in [*wanted, *same] if is_contiguous(w) and w.dim == d + 2]  # type: ignore[union-attr]
        for layout in unique([*found, call.even(d + 2)]):
            needed = window(layout, kernel) if isinstance(layout, Shard) else None
            if needed is None or not isinstance(layout, Shard):
                continue
            inputs = call.lie({x: needed[0]}, Varying())
            local = _Rows(d, num, needed[1], steps[1])
            yield Choice(inputs, layout, layout, "spatial", local=local)


class _Rows:
    """The convolution of a rank's window, padded only where the tensor ends."""

    def __init__(
        self, d: int, num: int, pads: Sequence[tuple[int, int]], padding: Sequence[int]
    ) -> None:
        self.d, self.num, self.pads, self.padding = d, num, pads, list(padding)

    def __call__(self, emit: Emitter) -> Node:
        around = [(0, 0)] * self.num
        around[self.d] = self.pads[emit.rank]
        rest = [0 if i == self.d else p for i, p in enumerate(self.padding)]
        return emit.again(input=padded(emit, emit.given["input"], around), padding=rest)
