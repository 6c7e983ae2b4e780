"""Ops that are sums over labelled dims: one rule for products of every kind.

A label of the result splits the operands that carry it, and the result. A label that is summed
over splits the operands, and each rank has a term of the sum: column and row of Megatron, heads
of attention, filters of a convolution and the rest are the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from meshuffle.layout.layout import Layout, Partial, Samples, Shard, Split, Varying, splits, unique
from meshuffle.layout.rule import Choices, Kind, Query


@dataclass
class Labelled:
    """Labels of each operand's dims and of the result's.

    Labels of the last dims may be left out: those are not split. Operands that are None, as a bias
    may be, are left out too.

    Attributes:
        operands: the factors.
        out: labels of the result.
        added: operands that are no factors but are added to the product.
        fixed: labels that cannot be split.
        channels: labels that a plan text calls channel.
    """

    operands: list[tuple[Node, str]]
    out: str
    added: Sequence[tuple[Node, str]] = ()
    fixed: str = ""
    channels: str = ""

    def __post_init__(self) -> None:
        """Leave out what is None."""
        self.operands = [(node, text) for node, text in self.operands if node is not None]
        self.added = [(node, text) for node, text in self.added if node is not None]

    @property
    def all_operands(self) -> list[tuple[Node, str]]:
        """Factors and addends."""
        return [*self.operands, *self.added]


def choices(
    call: Query, op: Labelled, arriving: Mapping[Node, Sequence[Layout]] | None = None
) -> Choices:
    """Yield a choice per label and per split of it.

    Args:
        arriving: the layouts in which operands arrive that are worth trying; None is all.
    """
    arriving = call.arriving if arriving is None else arriving
    labels = dict.fromkeys(op.out + "".join(text for _, text in op.operands))
    for label in labels:
        if label not in op.fixed:
            for split in _splits_of(call, op, label, arriving):
                yield from _choice(call, op, label, split)


def _splits_of(
    call: Query, op: Labelled, label: str, arriving: Mapping[Node, Sequence[Layout]]
) -> Iterator[Split]:
    """Yield splits of a label, each as a layout of dim 0."""
    holders = [(node, text.index(label)) for node, text in op.all_operands if label in text]
    tried: list[Layout | None] = []
    if label in op.out:
        place = op.out.index(label)
        tried += [wanted.on(0) for wanted in splits(call.wanted) if wanted.dim == place]
    for node, place in holders:
        tried += [layout.on(0) for layout in splits(arriving.get(node, ())) if layout.dim == place]
        if call.program.samples_dim(node) == place:
            if call.has_samples:
                yield Samples(0)
            return
    size = max(call.shape(node)[place] for node, place in holders)
    for split in unique([*tried, call.even(0, size)]):
        if isinstance(split, Shard) and split.size == size:
            yield split


def _choice(call: Query, op: Labelled, label: str, split: Split) -> Choices:
    given: dict[Any, Layout] = {}
    for node, text in op.all_operands:
        place = text.find(label)
        spreads = place < 0 or call.shape(node)[place] == 1
        needed: Layout = Varying() if spreads else split.on(place)
        if given.setdefault(node, needed) != needed:
            return  # one tensor stands twice and would lie in two ways
    kind: Kind = "batch" if isinstance(split, Samples) else "spatial"
    if label in op.channels and kind != "batch":
        kind = "channel"
    if label in op.out:
        result = split.on(op.out.index(label))
        yield call.choice(given, result, result, kind=kind)
        return
    # Each rank has a term of the sum; what is added is divided among the terms.
    for node, _ in op.added:
        if node in dict(op.operands):
            return
        given[node] = Partial()
    first = next(text.index(label) for _, text in op.operands if label in text)
    yield call.choice(given, Partial(), split.on(first), kind=kind)
