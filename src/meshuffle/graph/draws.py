"""Which calls of a program draw random numbers, numbered in the order in which they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

_DROPOUTS = (
    *(aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_),
    *(aten.alpha_dropout, aten.alpha_dropout_, aten.feature_alpha_dropout),
)
_ALWAYS = (
    *(aten.bernoulli, aten.bernoulli_, aten.rand, aten.randn, aten.rand_like, aten.randn_like),
    *(aten.randint, aten.randperm, aten.uniform_, aten.normal_, aten.rrelu, aten.multinomial),
    *(aten.exponential_, aten.poisson, aten.normal, aten.native_dropout),
)
_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)


def number_draws(nodes: Iterable[Node]) -> None:
    """Set `meta["draw"]` of each call that draws, from 0 on."""
    number = 0
    for node in nodes:
        if node.op == "call_function" and _draws(node):
            node.meta["draw"] = number
            number += 1


def _draws(node: Node) -> bool:
    packet = getattr(node.target, "_overloadpacket", None)
    if packet not in (*_DROPOUTS, *_RECURRENT, aten.scaled_dot_product_attention):
        return packet in _ALWAYS
    schema: Any = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if packet in _DROPOUTS:
        return bool(given["train"]) and 0 < given["p"] < 1  # 0 and 1 need no numbers
    if packet in _RECURRENT:
        return bool(given["train"] and given["dropout"] and given["num_layers"] > 1)
    return bool(given.get("dropout_p"))
