"""Ops that move data and compute none: a rank moves what it has, and the layout follows."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout.layout import Owners, Samples, Shard, Split, samples_owners, splits, unique
from meshuffle.layout.reshape import reshaped
from meshuffle.layout.rule import Choice, Choices, Emitter, Local, Query, alike, rule
from meshuffle.layout.rules.groups import blocks
from meshuffle.layout.rules.pointwise import broadcast, raised

aten = torch.ops.aten


@rule(
    *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as),
    *(aten.squeeze, aten.unsqueeze, aten.ravel),
)
def reshape(call: Query) -> Choices:
    """The parts of the ranks must be blocks of one dim, before and after."""
    (x, *_) = call.inputs
    if call.node.target == aten.view.dtype:
        return
    before, after = call.shape(x), call.out
    back = [
        _as_layout(call, x, shard)
        for layout in splits(call.wanted)
        for shard in reshaped(_as_shard(call, call.node, layout), after, before)
    ]
    for layout in call.splits_of(x, back):
        for shard in reshaped(_as_shard(call, x, layout), before, after):
            result = _as_layout(call, call.node, shard)
            if result is not None and isinstance(result, Samples) == isinstance(layout, Samples):
                yield call.choice({x: layout}, result, result, rest=result, local=_to_sizes)


def _to_sizes(emit: Emitter) -> Node:
    return emit.call(aten.reshape.default, emit.given["self"], emit.sizes())


def _as_shard(call: Query, node: Node, layout: Split) -> Shard:
    """Return the indices that `layout` means for this batch."""
    if isinstance(layout, Shard):
        return layout
    size = call.shape(node)[layout.dim]
    return Shard(layout.dim, samples_owners(size, call.program.batch, call.world))


def _as_layout(call: Query, node: Node, shard: Shard) -> Split | None:
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
def permute(call: Query) -> Choices:
    """The sharded dim goes where the op takes it."""
    (x,) = call.inputs
    order = _order(call, x)
    back = [layout.on(order[layout.dim]) for layout in splits(call.wanted)]
    for layout in call.splits_of(x, back):
        result = layout.on(order.index(layout.dim))
        yield Choice((layout,), result, result)


def _order(call: Query, x: Node) -> list[int]:
    """Return from which dim of `x` each dim of the result comes."""
    strides = [7**d for d in range(len(call.shape(x)))]
    probe = torch.empty_strided([2] * len(strides), strides, device="meta")
    moved = call.node.target(*(probe, *call.node.args[1:]), **call.node.kwargs)  # type: ignore[operator]
    return [strides.index(stride) for stride in moved.stride()]


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def expand(call: Query) -> Choices:
    """Split what is there, or a dim that the op makes."""
    x = call.inputs[0]
    arriving = [raised(layout, call.out, call.shape(x)) for layout in call.arriving[x]]
    for layout in splits([*call.wanted, *arriving, call.samples()]):
        needed = broadcast(layout, call.out, call.shape(x))
        yield call.choice({x: needed}, layout, layout, rest=layout, local=_expand)


def _expand(emit: Emitter) -> Node:
    # Its −1 would keep the size 1 of what is spread over the batch.
    return emit.call(aten.expand.default, emit.given["self"], emit.sizes(exact=True))


@rule(reorder)
def reorder_rule(call: Query) -> Choices:
    """Along its dim a permutation only renames what each rank has."""
    (x,) = call.inputs
    dim, index = call["dim"], call["index"]
    place = {source: j for j, source in enumerate(index)}
    back = [_renamed(layout, dim, index) for layout in splits(call.wanted)]
    for layout in call.splits_of(x, back):
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
def pixel_shuffle(call: Query) -> Choices:
    """input (N, C, H, W): a block of a dim becomes a block of it, of another size."""
    (x,) = call.inputs
    if (samples := call.samples()) is not None:
        yield Choice((samples,), samples, samples)
    for dim, (before, after) in enumerate(zip(call.shape(x), call.out, strict=True)):
        num = min(before, after)
        sizes = (before // num, after // num)
        for source, result in blocks(call, x, dim, num, sizes):
            yield Choice((source,), result, result)


@rule(aten.cat, aten.concat)
def cat(call: Query) -> Choices:
    """Along its dim each rank joins its parts; along another all lie alike."""
    tensors: list[Node] = list(call["tensors"])
    dim = call["dim"] % len(call.out)
    starts, sizes = _runs([call.shape(x)[dim] for x in tensors])
    for layout in splits([*call.wanted, *call.all_arriving(), call.samples()]):
        if layout.dim != dim:
            yield call.choice({}, layout, layout, rest=layout)
    if call.program.samples_dim(call.node) == dim:
        return
    back = [_owners_of_pieces(owners, starts, sizes) for owners in _owners_along(call.wanted, dim)]
    options = [_owners_along(call.arriving[x], dim) for x in tensors]
    for pieces in dict.fromkeys([*back, *_combinations(options)]):
        if pieces is None:
            continue
        given = dict(zip(tensors, pieces, strict=True))
        if [given[x] for x in tensors] != list(pieces):
            continue  # one tensor stands twice and would lie in two ways
        result = _joined(dim, pieces, starts)
        inputs = {x: Shard(dim, owners) for x, owners in given.items()}
        yield call.choice(inputs, result, result, rest=result)


def _runs(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return where each of the pieces of a dim starts, and how long it is."""
    return [sum(sizes[:i]) for i in range(len(sizes))], list(sizes)


def _owners_along(layouts: Iterable[Any], dim: int) -> list[Owners]:
    return [x.owners for x in unique(layouts) if isinstance(x, Shard) and x.dim == dim]


def _owners_of_pieces(
    owners: Owners, starts: Sequence[int], sizes: Sequence[int]
) -> tuple[Owners, ...] | None:
    """Return the owners of each piece of a dim; None where a rank has nothing of one."""
    pieces = tuple(
        tuple(tuple(i - start for i in part if start <= i < start + size) for part in owners)
        for start, size in zip(starts, sizes, strict=True)
    )
    return pieces if all(all(piece) for piece in pieces) else None


def _joined(dim: int, pieces: Sequence[Owners], starts: Sequence[int]) -> Shard:
    """Return how the whole lies if its pieces have these owners."""
    parts = [
        tuple(start + i for start, part in zip(starts, of_rank, strict=True) for i in part)
        for of_rank in zip(*pieces, strict=True)
    ]
    return Shard(dim, tuple(parts))


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
def split(call: Query) -> Choices:
    """Along its dim each rank has its part of every piece."""
    (x,) = call.inputs
    dim = call["dim"] % len(call.shape(x))
    starts, sizes = _runs([call.program.shape_of(piece)[dim] for piece in call.results])
    back = []
    for want in call.wanted:
        assert isinstance(want, tuple)
        owners = [
            layout.owners for layout in want if isinstance(layout, Shard) and layout.dim == dim
        ]
        if len(owners) == len(want):
            back.append(_joined(dim, owners, starts))
    for layout in call.splits_of(x, [*back, *call.wanted]):
        if layout.dim != dim:
            yield call.choice({x: layout}, alike(call, layout), layout)
        elif isinstance(layout, Shard) and layout.size == sum(sizes):
            pieces = _owners_of_pieces(layout.owners, starts, sizes)
            if pieces is not None:
                outputs = tuple(Shard(dim, parts) for parts in pieces)
                local = _Pieces(layout, starts, sizes)
                yield call.choice({x: layout}, outputs, layout, local=local)


class _Pieces:
    """Takes a rank's part of each piece out of its part of the whole."""

    def __init__(self, layout: Shard, starts: Sequence[int], sizes: Sequence[int]) -> None:
        self.layout, self.starts, self.sizes = layout, starts, sizes

    def __call__(self, emit: Emitter) -> Any:
        dim, held = self.layout.dim, self.layout.owners[emit.rank]
        x = emit.given["tensor" if "tensor" in emit.given else "self"]
        pieces = [range(s, s + n) for s, n in zip(self.starts, self.sizes, strict=True)]
        return [emit.take(x, dim, _positions(held, piece)) for piece in pieces]


def _positions(held: Sequence[int], kept: Container[int]) -> list[int]:
    """Return the places of those indices that are kept, among those that a rank has."""
    return [place for place, index in enumerate(held) if index in kept]


@rule(aten.slice, aten.narrow)
def slice_rule(call: Query) -> Choices:
    """Along its dim each rank keeps what it has of the slice."""
    x = call.inputs[0]
    dim = call["dim"] % len(call.out)
    size = call.shape(x)[dim]
    for layout in call.splits_of(x):
        if layout.dim != dim:
            yield call.choice({x: layout}, layout, layout, rest=layout)
        elif size == call.out[dim]:  # all of it
            yield call.choice({x: layout}, layout, layout, local=lambda emit: emit.given["self"])
    bounds = [call.given.get(name) for name in ("start", "end", "step")]
    if call.node.target != aten.slice.Tensor or not all(isinstance(b, int | None) for b in bounds):
        return
    kept = range(size)[slice(*bounds)]
    back = [_completed(owners, kept, size) for owners in _owners_along(call.wanted, dim)]
    for owners in dict.fromkeys([*back, *_owners_along(call.arriving[x], dim)]):
        held = tuple(tuple(kept.index(i) for i in part if i in kept) for part in owners)
        if all(held) and sum(map(len, owners)) == size:
            result = Shard(dim, held)
            local = _kept_of([_positions(part, kept) for part in owners], dim)
            yield call.choice({x: Shard(dim, owners)}, result, result, local=local)


def _completed(owners: Owners, kept: range, size: int) -> Owners:
    """Return owners of all indices: the kept ones as wanted, the others evenly."""
    others = [i for i in range(size) if i not in kept]
    rest = Shard.even(0, len(others), len(owners)).owners
    return tuple(
        tuple([kept[j] for j in part] + [others[j] for j in own])
        for part, own in zip(owners, rest, strict=True)
    )


def _kept_of(positions: Sequence[Sequence[int]], dim: int) -> Local:
    """Return what takes some of a rank's own positions along a dim."""
    return lambda emit: emit.take(emit.given["self"], dim, positions[emit.rank])


@rule(aten.select, aten.unbind, aten.stack)
def drop_or_add(call: Query) -> Choices:
    """A dim goes or comes; the others keep their layout."""
    first = call.inputs[0]
    if call.node.target == aten.stack.default:
        dim, change = call["dim"] % len(call.out), 1
    else:
        dim, change = call["dim"] % len(call.shape(first)), -1
    back = [_shifted(layout, dim, -change) for layout in splits(call.wanted)]
    for layout in splits([*back, *call.all_arriving(), call.samples(first)]):
        result = _shifted(layout, dim, change)
        if result is not None:
            yield call.choice({}, alike(call, result), layout, rest=layout)


def _shifted(layout: Split, dim: int, change: int) -> Split | None:
    """Return the layout with dim `dim` taken away (-1) or put in (+1); None for that dim."""
    if change < 0:
        return None if layout.dim == dim else layout.on(layout.dim - (layout.dim > dim))
    return layout.on(layout.dim + (layout.dim >= dim))
