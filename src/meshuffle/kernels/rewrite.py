"""The rewrite of a rank's code: what ATen has no op for, in fewer or faster calls.

A pattern is looked for in the code that a rank runs, behind lowering, so it holds whatever the
rank's parts are: on the tensors that are there the new calls return the same values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from meshuffle.graph.runtime_ops import reorder
from meshuffle.kernels.max_pool import max_pool2d
from meshuffle.models.permutation import interleaved_halves, transposed_channels

aten = torch.ops.aten


def rewrite(graph: fx.Graph) -> None:
    """Put faster calls in the place of those that compute the same; what is unread then stays."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (change := _CHANGES.get(node.target)):
            change(node)


def _pool(node: Node) -> None:
    node.target = max_pool2d


def _transpose(node: Node) -> None:
    """A permutation that is a transpose of rows and columns, as the channel shuffle is."""
    x, dim, index = node.args
    rows = _rows_of(index)
    if dim == 1 and rows:
        node.target, node.args = transposed_channels, (x, rows)


def _rows_of(index: Any) -> int:
    """Return r where `index` reads r rows by columns; 0 where it does something else."""
    num = len(index)
    columns = index[1] if num > 1 else 0
    if columns < 2 or num % columns:
        return 0
    transposed = [row + column for column in range(columns) for row in range(0, num, columns)]
    return num // columns if list(index) == transposed else 0


def _interleave(node: Node) -> None:
    """The halves of a stack along a new last dim of the channels: V2's shuffle."""
    flat: Any = node.args[0]
    stack: Any = flat.args[0] if _is(flat, aten.flatten.using_ints, 1, 2) else None
    if node.args[1:] != (2, 1) or not _is(stack, aten.stack.default, 2) or len(stack.args[0]) != 2:
        return
    if {user.target for user in node.users} == {operator.getitem} and len(flat.users) == 1:
        node.target, node.args = interleaved_halves, tuple(stack.args[0])


def _is(node: object, target: object, *rest: object) -> bool:
    return isinstance(node, Node) and node.target is target and node.args[1:] == rest


_CHANGES: dict[object, Callable[[Node], None]] = {
    aten.max_pool2d.default: _pool,
    reorder: _transpose,
    aten.chunk.default: _interleave,
}
