"""Where each element comes from, behind any chain of ops that only move data.

The chain (view, permute, cat, chunk, select, …) is run once on integer ids, of one sample, in place
of the values. Reading the ids tells from which index of which source each index of the result
comes: shuffle, concat and split compose into one map by themselves, without a case by hand, and the
intermediates exist as ids only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.graph import Graph
from meshuffle.layout.layout import Owners

aten = torch.ops.aten

MOVEMENTS = frozenset(
    {
        *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as),
        *(aten.permute, aten.transpose, aten.t, aten.movedim, aten.swapaxes, aten.numpy_T),
        *(aten.unsqueeze, aten.squeeze, aten.expand, aten.expand_as, aten.contiguous, aten.clone),
        *(aten.cat, aten.concat, aten.stack, aten.chunk, aten.split, aten.split_with_sizes),
        *(aten.slice, aten.select, aten.narrow, aten.unbind, aten.index_select, aten.flip),
        *(aten.roll, aten.channel_shuffle, aten.pixel_shuffle, aten.pixel_unshuffle),
        *(aten.alias, aten.detach, aten.detach_, aten.lift_fresh_copy),
    }
)
"""Ops whose result holds elements of their inputs and computes none."""

Origin = tuple[str, int]
"""(name of the source, index along its sharded dim)."""


def is_movement(node: Node) -> bool:
    """Tell whether `node` only moves data; picking one of several results does."""
    packet = getattr(node.target, "_overloadpacket", None)
    return packet in MOVEMENTS or getattr(node.target, "__name__", "") == "getitem"


def origins(
    graph: Graph, node: Node, dim: int, source_dims: Mapping[str, int]
) -> tuple[Origin, ...] | None:
    """Return, for each index of `node` along `dim`, where it comes from.

    Args:
        graph: holds `node`.
        node: a source, or what movements make of sources.
        dim: of `node`.
        source_dims: the sharded dim of each source, by the name of its node. The chain ends there.

    Returns:
        None where some index along `dim` mixes elements of several indices or sources, or where
        the chain reaches a value that is neither a source nor moved.
    """
    sources = list(source_dims)
    ids = _Ids(graph, source_dims).of(node)
    if not isinstance(ids, Tensor):
        return None
    rows = ids.movedim(dim, 0).reshape(ids.shape[dim], -1)
    if rows.shape[1] == 0 or not bool((rows == rows[:, :1]).all()):
        return None
    return tuple((sources[i % len(sources)], i // len(sources)) for i in rows[:, 0].tolist())


def moved_owners(found: Sequence[Origin], owners: Mapping[str, Owners]) -> Owners:
    """Return who holds which index of the result if every rank moves what it has of the sources.

    Args:
        found: as `origins` gives them.
        owners: of each source, all over the same ranks.
    """
    world = len(next(iter(owners.values())))
    holder = {
        (source, index): rank
        for source, parts in owners.items()
        for rank, part in enumerate(parts)
        for index in part
    }
    return tuple(
        tuple(j for j, origin in enumerate(found) if holder[origin] == rank)
        for rank in range(world)
    )


class _Ids:
    """Runs movements on ids: `index · number of sources + position of the source`."""

    def __init__(self, graph: Graph, source_dims: Mapping[str, int]) -> None:
        self._graph, self._source_dims = graph, source_dims
        self._batch = None if graph.symbol is None else 1
        self._known: dict[Node, Any] = {}

    def of(self, node: Node) -> Any:
        """Return the ids of a node, several for `chunk`; None where they are not known."""
        if node not in self._known:
            self._known[node] = self._run(node)
        return self._known[node]

    def _run(self, node: Node) -> Any:
        if node.name in self._source_dims:
            return self._source(node)
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._graph.number(value, self._batch)
        if node.op != "call_function" or not is_movement(node):
            return None
        if any(self.of(given) is None for given in node.all_input_nodes):
            return None
        args, kwargs = pytree.tree_map(self._concrete, (node.args, node.kwargs))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _concrete(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.of(argument)
        if isinstance(argument, torch.SymInt):
            return self._graph.number(argument, self._batch)
        return argument

    def _source(self, node: Node) -> Tensor:
        names = list(self._source_dims)
        shape = self._graph.shape(node.meta["val"], self._batch)
        dim = self._source_dims[node.name]
        ids = torch.arange(shape[dim]) * len(names) + names.index(node.name)
        return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
