"""The functional program, which layouts are put on: no in-place ops, each shuffle one op.

Four rewrites of a copy of the program:

- In-place ops become functional ones, and what reads their target afterwards reads their result.
  Two kinds stay in place: updates of the model's buffers, and ops on memory that an older value
  also shows. The latter are `pinned`: they run whole on every rank.
- A chain of movements that only reorders one dim (view, transpose and flatten: the channel
  shuffle) becomes one `reorder`, so that its index map is known whatever lies behind it.
- A parameter that has several names is read by the first.
- Calls that nobody reads are dropped, unless they update a buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.graph.graph import Graph
from meshuffle.graph.node import (
    is_in_place,
    is_tensor,
    memory_owners,
    original,
    packet_of,
    updates_statistics,
)
from meshuffle.graph.random_ops import number_draws
from meshuffle.graph.runtime_ops import reorder

aten = torch.ops.aten

_FUNCTIONAL = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.squeeze_.dim: aten.squeeze.dim,
}
_PERMUTING = frozenset(
    {
        *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten),
        *(aten.permute, aten.transpose, aten.swapaxes, aten.contiguous, aten.clone),
        aten.channel_shuffle,
    }
)


def functional_program(graph: Graph) -> tuple[fx.Graph, frozenset[str]]:
    """Return the rewritten copy of the program, and the names of its pinned calls."""
    program = fx.Graph()
    copies: dict[Node, Node] = {}
    pinned = _pinned(graph)
    number_draws(graph.program.graph.nodes)
    first: dict[str, Node] = {}
    for node in graph.program.graph.nodes:
        if node.op == "placeholder" and graph.names.get(node.name) in first:
            copies[node] = first[graph.names[node.name]]
            continue
        copies[node] = program.node_copy(node, copies.__getitem__)
        copies[node].name = node.name  # fx would rename an `input`
        if node.name in graph.names:
            first[graph.names[node.name]] = copies[node]
        if node.op == "call_function" and is_in_place(node) and node.name not in pinned:
            target = node.args[0]
            if original(target).op == "placeholder":
                continue
            _make_functional(copies[node])
            # What reads the target from here on, by any name, reads the result.
            before = copies[target]
            copies |= {n: copies[node] for n, copy in copies.items() if copy is before}
    _fuse_reorders(program, graph, pinned)
    _drop_unread(program, pinned)
    return program, frozenset(pinned)


def _make_functional(node: Node) -> None:
    """Let a call return what it changed in place; a default that only it had is written out.

    Its `meta` keeps the op under `in_place`: nothing reads the old value behind it.
    """
    before: Any = node.target
    packet = getattr(aten, before._overloadpacket.__name__.removesuffix("_"), None)
    after = _FUNCTIONAL.get(before) or getattr(packet, before._overloadname)
    optional = {a.name: a.default_value for a in before._schema.arguments if a.has_default_value()}
    for argument in after._schema.arguments[len(node.args) :]:
        if argument.name in optional and not argument.has_default_value():
            node.kwargs = {argument.name: optional[argument.name], **node.kwargs}
    node.target = after
    node.meta["in_place"] = before


def _pinned(graph: Graph) -> set[str]:
    """Return the calls on memory that is changed while an older view of it is still to be read."""
    nodes = list(graph.nodes())
    position = {node: i for i, node in enumerate(nodes)}
    owners = memory_owners(nodes)
    pinned: set[Node] = set()
    for i, node in enumerate(nodes):
        if not is_in_place(node):
            continue
        target = node.args[0]
        assert isinstance(target, Node)
        owner = owners.get(target, target)
        older = [n for n in {owner, *nodes[:i]} if owners.get(n, n) is owner]
        past = _rebound(target)
        read_later = (
            user
            for old in older
            if old not in past and old.op == "call_function"
            for user in old.users
            if position.get(user, len(nodes)) > i
        )
        # A part of an input or a buffer is written where it lies.
        through_view = owner.op == "placeholder" and owner not in past
        if through_view or any(read_later):
            pinned |= {n for n in [owner, *nodes] if owners.get(n, n) is owner}
    return {node.name for node in pinned}


def _rebound(target: Node) -> set[Node]:
    """Return `target` and the values that it is the in-place result of."""
    values = {target}
    while is_in_place(target):
        target = target.args[0]  # type: ignore[assignment]
        values.add(target)
    return values


def _fuse_reorders(program: fx.Graph, graph: Graph, pinned: set[str]) -> None:
    for node in list(program.nodes):
        packet = packet_of(node)
        if packet not in _PERMUTING or node.name in pinned:
            continue
        before: Any = node
        while packet_of(before) in _PERMUTING:
            before = before.args[0]
            permutation = _reordered(graph, before, node)
            if permutation is not None:
                dim, index = permutation
                with program.inserting_before(node):
                    call = program.call_function(reorder, (before, dim, index))
                call.meta = dict(node.meta)
                node.replace_all_uses_with(call)
                break


def _reordered(graph: Graph, before: Node, node: Node) -> tuple[int, tuple[int, ...]] | None:
    """Return the dim and the permutation by which `node` reorders `before`, if it does that."""
    shape, batch = graph.shape(before.meta["val"], 2), 2
    if graph.symbol is None:
        shape, batch = graph.shape(before.meta["val"]), graph.batch
    if len(shape) < 3 or shape != graph.shape(node.meta["val"], batch) or math.prod(shape) > 2**22:
        return None
    ids = torch.arange(math.prod(shape)).view(shape)
    moved = _run(graph, before, node, ids, batch)
    for dim, size in enumerate(shape):
        stride = math.prod(shape[dim + 1 :])
        order = moved.movedim(dim, 0).reshape(size, -1)[:, 0] // stride % size
        if not torch.equal(order, torch.arange(size)) and torch.equal(
            moved, ids.index_select(dim, order)
        ):
            return dim, tuple(order.tolist())
    return None


def _run(graph: Graph, before: Node, node: Node, ids: Tensor, batch: int) -> Tensor:
    if node is before:
        return ids

    def concrete(argument: Any) -> Any:
        if isinstance(argument, Node) and is_tensor(argument):
            return _run(graph, before, argument, ids, batch)
        return graph.concrete(argument, batch)

    args, kwargs = pytree.tree_map(concrete, (node.args, node.kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _drop_unread(program: fx.Graph, pinned: set[str]) -> None:
    for node in reversed(list(program.nodes)):
        if node.op == "call_function" and not node.users and node.name not in pinned:
            on_buffer = is_in_place(node) and original(node).op == "placeholder"
            if on_buffer or updates_statistics(node):
                continue
            program.erase_node(node)
