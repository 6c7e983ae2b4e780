"""Ops that move data and compute none: a rank moves what it has, and the layout follows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout.layout import (
    Layout,
    Owners,
    Samples,
    Shard,
    Split,
    samples_owners,
    splits,
    unique,
)
from meshuffle.layout.program import Call
from meshuffle.layout.reshape import reshaped
from meshuffle.layout.rule import Choice, Emitter, alike, rule
from meshuffle.layout.rules.groups import blocks
from meshuffle.layout.rules.pointwise import broadcast, raised

aten = torch.ops.aten
Arriving = Sequence[Sequence[Layout]]


@rule(
    *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as),
    *(aten.squeeze, aten.unsqueeze, aten.ravel),
)
def reshape(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """The parts of the ranks must be blocks of one dim, before and after."""
    (x, *_) = call.inputs
    if call.node.target == aten.view.dtype:
        return
    before, after = call.shape(x), call.out
    back = [
        _as_layout(call, x, found)
        for layout in splits(wanted)
        for found in reshaped(_as_shard(call, call.node, layout), after, before)
    ]
    for layout in splits([*back, *arriving[0], call.samples(x)]):
        for found in reshaped(_as_shard(call, x, layout), before, after):
            result = _as_layout(call, call.node, found)
            if result is not None and isinstance(result, Samples) == isinstance(layout, Samples):
                yield Choice(call.lie({x: layout}, result), result, result, local=_to_sizes)


def _to_sizes(emit: Emitter) -> Node:
    return emit.call(aten.reshape.default, emit.given["self"], emit.sizes())


def _as_shard(call: Call, node: Node, layout: Split) -> Shard:
    """Return the indices that `layout` means for this batch."""
    if isinstance(layout, Shard):
        return layout
    size = call.shape(node)[layout.dim]
    return Shard(layout.dim, samples_owners(size, call.program.batch, call.world))


def _as_layout(call: Call, node: Node, shard: Shard) -> Split | None:
    """Return `shard`, or the split by samples that it is; None where it cuts the batch else."""
    samples = call.program.samples_dim(node)
    if samples != shard.dim:
        return shard
    same = shard == _as_shard(call, node, Samples(shard.dim))
    return Samples(shard.dim) if same else None


@rule(
    *(aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.swapaxes, aten.movedim, aten.mT),
    aten.adjoint,
)
def permute(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """The sharded dim goes where the op takes it."""
    (x,) = call.inputs
    order = _order(call, x)
    back = [layout.on(order[layout.dim]) for layout in splits(wanted)]
    for layout in splits([*back, *arriving[0], call.samples(x)]):
        result = layout.on(order.index(layout.dim))
        yield Choice((layout,), result, result)


def _order(call: Call, x: Node) -> list[int]:
    """Return from which dim of `x` each dim of the result comes."""
    strides = [7**d for d in range(len(call.shape(x)))]
    probe = torch.empty_strided([2] * len(strides), strides, device="meta")
    moved = call.node.target(*(probe, *call.node.args[1:]), **call.node.kwargs)  # type: ignore[operator]
    return [strides.index(stride) for stride in moved.stride()]


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def expand(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """Split what is there, or a dim that the op makes."""
    x = call.inputs[0]
    found = [raised(layout, call.out, call.shape(x)) for layout in arriving[0]]
    for layout in splits([*wanted, *found, call.samples()]):
        needed = broadcast(layout, call.out, call.shape(x))
        yield Choice(call.lie({x: needed}, layout), layout, layout, local=_expand)


def _expand(emit: Emitter) -> Node:
    # Its −1 would keep the size 1 of what is spread over the batch.
    return emit.call(aten.expand.default, emit.given["self"], emit.sizes(exact=True))


@rule(reorder)
def reorder_rule(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """Along its dim a permutation only renames what each rank has."""
    (x,) = call.inputs
    dim, index = call["dim"], call["index"]
    place = {source: j for j, source in enumerate(index)}
    back = [_renamed(w, dim, index) for w in splits(wanted)]
    for layout in splits([*back, *arriving[0], call.samples(x)]):
        result = _renamed(layout, dim, place)
        local = _same if layout.dim == dim else None
        yield Choice((layout,), result, result, local=local)


def _renamed(layout: Split, dim: int, names: Any) -> Split:
    if isinstance(layout, Samples) or layout.dim != dim:
        return layout
    return Shard(dim, tuple(tuple(names[i] for i in part) for part in layout.owners))


def _same(emit: Emitter) -> Node:
    x: Node = emit.given["x"]
    return x


@rule(aten.pixel_shuffle, aten.pixel_unshuffle)
def pixel_shuffle(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """input (N, C, H, W): a block of a dim becomes a block of it, of another size."""
    (x,) = call.inputs
    if (samples := call.samples()) is not None:
        yield Choice((samples,), samples, samples)
    for dim, (before, after) in enumerate(zip(call.shape(x), call.out, strict=True)):
        num = min(before, after)
        sizes = (before // num, after // num)
        for source, result in blocks(call, dim, num, sizes, wanted, arriving[0]):
            yield Choice((source,), result, result)


@rule(aten.cat, aten.concat)
def cat(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """Along its dim each rank joins its parts; along another all lie alike."""
    tensors: list[Node] = list(call["tensors"])
    dim = call["dim"] % len(call.out)
    sizes = [call.shape(x)[dim] for x in tensors]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    across = [layout for layouts in arriving for layout in layouts]
    for layout in splits([*wanted, *across, call.samples()]):
        if layout.dim != dim:
            yield Choice(call.lie({}, layout), layout, layout)
    if call.program.samples_dim(call.node) == dim:
        return
    back = [_cut(owners, starts, sizes) for owners in _owners_along(wanted, dim)]
    options = [_owners_along(arriving[call.inputs.index(x)], dim) for x in tensors]
    for owners in dict.fromkeys([*back, *_combinations(options)]):
        if owners is None:
            continue
        given = dict(zip(tensors, owners, strict=True))
        if [given[x] for x in tensors] != list(owners):
            continue  # one tensor stands twice and would lie in two ways
        joined = tuple(
            tuple(start + i for start, parts in zip(starts, owners, strict=True) for i in parts[r])
            for r in range(call.world)
        )
        result = Shard(dim, joined)
        inputs = call.lie({x: Shard(dim, parts) for x, parts in given.items()}, result)
        yield Choice(inputs, result, result)


def _owners_along(layouts: Sequence[Layout], dim: int) -> list[Owners]:
    return [x.owners for x in unique(layouts) if isinstance(x, Shard) and x.dim == dim]


def _cut(owners: Owners, starts: Sequence[int], sizes: Sequence[int]) -> tuple[Owners, ...] | None:
    """Return the owners of each piece of a dim; None where a rank has nothing of one."""
    pieces = tuple(
        tuple(tuple(i - start for i in part if start <= i < start + size) for part in owners)
        for start, size in zip(starts, sizes, strict=True)
    )
    return pieces if all(all(piece) for piece in pieces) else None


def _combinations(
    options: Sequence[Sequence[Owners]], most: int = 6
) -> Iterator[tuple[Owners, ...]]:
    """Yield some ways to take one of each: all of few, else the first, the second … of all."""
    if not all(options):
        return
    longest = max(len(o) for o in options)
    if longest ** len(options) <= most:
        yield from itertools.product(*options)
        return
    for k in range(min(most, longest)):
        yield tuple(o[min(k, len(o) - 1)] for o in options)


@rule(aten.chunk, aten.split, aten.split_with_sizes)
def split(call: Call, wanted: Sequence[Any], arriving: Arriving) -> Iterator[Choice]:
    """Along its dim each rank has its part of every piece."""
    (x,) = call.inputs
    dim = call["dim"] % len(call.shape(x))
    sizes = [call.program.shape_of(piece)[dim] for piece in call.results]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    back = [_joined(want, dim, starts) for want in wanted]
    for layout in splits([*back, *wanted, *arriving[0], call.samples(x)]):
        if layout.dim != dim:
            yield Choice((layout,), (layout,) * len(sizes), layout)
        elif isinstance(layout, Shard) and layout.size == sum(sizes):
            owners = _cut(layout.owners, starts, sizes)
            if owners is not None:
                outputs = tuple(Shard(dim, parts) for parts in owners)
                yield Choice((layout,), outputs, layout, local=_Pieces(layout, starts, sizes))


def _joined(want: Sequence[Layout], dim: int, starts: Sequence[int]) -> Shard | None:
    """Return how the whole lies if its pieces lie as wanted."""
    owners = [x.owners for x in want if isinstance(x, Shard) and x.dim == dim]
    if len(owners) < len(want):
        return None
    world = len(owners[0])
    return Shard(
        dim,
        tuple(
            tuple(start + i for start, parts in zip(starts, owners, strict=True) for i in parts[r])
            for r in range(world)
        ),
    )


class _Pieces:
    """Takes a rank's part of each piece out of its part of the whole."""

    def __init__(self, layout: Shard, starts: Sequence[int], sizes: Sequence[int]) -> None:
        self.layout, self.starts, self.sizes = layout, starts, sizes

    def __call__(self, emit: Emitter) -> Any:
        held = self.layout.owners[emit.rank]
        x = emit.given["tensor" if "tensor" in emit.given else "self"]
        return [
            emit.take(
                x, self.layout.dim, [j for j, i in enumerate(held) if start <= i < start + size]
            )
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]


@rule(aten.slice, aten.narrow)
def slice_rule(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """Along its dim each rank keeps what it has of the slice."""
    x = call.inputs[0]
    dim = call["dim"] % len(call.out)
    size = call.shape(x)[dim]
    for layout in splits([*wanted, *arriving[0], call.samples(x)]):
        if layout.dim != dim or size == call.out[dim]:
            yield Choice((layout,), layout, layout)
    bounds = [call.given.get(name) for name in ("start", "end", "step")]
    if call.node.target != aten.slice.Tensor or not all(isinstance(b, int | None) for b in bounds):
        return
    kept = range(size)[slice(*bounds)]
    back = [_completed(owners, kept, size) for owners in _owners_along(wanted, dim)]
    for owners in dict.fromkeys([*back, *_owners_along(arriving[0], dim)]):
        place = {i: j for j, i in enumerate(kept)}
        held = tuple(tuple(place[i] for i in part if i in place) for part in owners)
        if all(held) and sum(map(len, owners)) == size:
            local = _Kept([[j for j, i in enumerate(part) if i in place] for part in owners], dim)
            result = Shard(dim, held)
            yield Choice((Shard(dim, owners),), result, result, local=local)


def _completed(owners: Owners, kept: Sequence[int], size: int) -> Owners:
    """Return owners of all indices: of the kept as wanted, of the others evenly."""
    inside = set(kept)
    others = [i for i in range(size) if i not in inside]
    shares = Shard.even(0, len(others), len(owners)).owners
    return tuple(
        tuple([kept[j] for j in part] + [others[j] for j in share])
        for part, share in zip(owners, shares, strict=True)
    )


class _Kept:
    """Takes some local positions along a dim."""

    def __init__(self, positions: Sequence[Sequence[int]], dim: int) -> None:
        self.positions, self.dim = positions, dim

    def __call__(self, emit: Emitter) -> Node:
        return emit.take(emit.given["self"], self.dim, self.positions[emit.rank])


@rule(aten.select, aten.unbind, aten.stack)
def drop_or_add(call: Call, wanted: Sequence[Any], arriving: Arriving) -> Iterator[Choice]:
    """A dim goes or comes; the others keep their layout."""
    first = call.inputs[0]
    if call.node.target == aten.stack.default:
        dim, change = call["dim"] % len(call.out), 1
    else:
        dim, change = call["dim"] % len(call.shape(first)), -1
    back = [_shifted(layout, dim, -change) for layout in splits(wanted)]
    across = [layout for layouts in arriving for layout in layouts]
    for layout in splits([*back, *across, call.samples(first)]):
        result = _shifted(layout, dim, change)
        if result is not None:
            yield Choice(call.lie({}, layout), alike(call, result), layout)


def _shifted(layout: Split, dim: int, change: int) -> Split | None:
    """Return the layout with dim `dim` taken away (-1) or put in (+1); None for that dim."""
    if change < 0:
        moved = layout.dim - (layout.dim > dim)
        return None if layout.dim == dim else layout.on(moved)
    return layout.on(layout.dim + (layout.dim >= dim))
