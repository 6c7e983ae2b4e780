"""Recurrent layers with dropout between them, put as one call per layer.

torch makes one op of all layers, in which no plan could draw the numbers of dropout by element. As
torch does it, the numbers are drawn for the sequence of (T, N, features).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.graph.node import arguments_of, packet_of

aten = torch.ops.aten

_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)


def part_recurrent_layers(graph: fx.Graph) -> None:
    """Replace each call of several recurrent layers with dropout between them; changes `graph`."""
    for node in list(graph.nodes):
        if packet_of(node) not in _RECURRENT or "input" not in node.target._overloadname:
            continue
        given = arguments_of(node.target, node.args, node.kwargs)
        if given["dropout"] and given["num_layers"] > 1:  # in eval mode too: stages are alike
            with graph.inserting_before(node):
                results = _parted(graph, node, given)
            for user in list(node.users):  # each takes one of the results
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def _parted(graph: fx.Graph, node: Node, given: dict[str, Any]) -> list[Node]:
    """Write the calls; return the sequence, and the last states."""

    def call(target: Any, *args: Any, value: Any = None) -> Node:
        made = graph.call_function(target, args)
        if value is None:
            value = target(*pytree.tree_map(_value_of, args))
        made.meta = {**node.meta, "val": value}
        return made

    x, states, rows = given["input"], given["hx"], 1 + given["bidirectional"]
    states = states if isinstance(states, list | tuple) else [states]
    num, weights = given["num_layers"], given["params"]
    size, lasts = len(weights) // num, []
    sequence, *ends = node.meta["val"]
    if given["batch_first"]:
        x, sequence = call(aten.transpose.int, x, 0, 1), sequence.transpose(0, 1)
    value = (sequence, *(end.narrow(0, 0, rows) for end in ends))  # of every layer
    for i in range(num):
        if i:
            x = call(aten.dropout.default, x, given["dropout"], given["train"])
        own = [call(aten.narrow.default, state, 0, i * rows, rows) for state in states]
        hx = own if packet_of(node) is aten.lstm else own[0]
        flags = (given["has_biases"], 1, 0.0, given["train"], given["bidirectional"], False)
        part = weights[i * size : (i + 1) * size]
        made = call(node.target, x, hx, part, *flags, value=value)
        x, *last = (call(operator.getitem, made, k) for k in range(len(value)))
        lasts.append(last)
    if given["batch_first"]:
        x = call(aten.transpose.int, x, 0, 1)
    return [x, *(call(aten.cat.default, list(parts), 0) for parts in zip(*lasts, strict=True))]


def _value_of(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument
