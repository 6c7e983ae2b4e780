"""Which calls of a program draw random numbers, numbered in the order in which they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from meshuffle.graph.node import arguments_of


def number_draws(nodes: Iterable[Node]) -> None:
    """Set `meta["draw"]` of each call that draws random numbers: its number, from 0 on."""
    number = 0
    for node in nodes:
        if is_random(node.target) and draws_numbers(
            arguments_of(node.target, node.args, node.kwargs)
        ):
            node.meta["draw"] = number
            number += 1


def is_random(op: Any) -> bool:
    """Tell whether an op may draw random numbers, as torch marks it."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def draws_numbers(given: Mapping[str, Any]) -> bool:
    """Tell whether a random op draws numbers when it is called with these arguments, by name."""
    if given.get("train") is False or given.get("training") is False:
        return False
    if "dropout_p" in given:  # attention
        return bool(given["dropout_p"])
    if "dropout" in given:  # recurrent layers: between one and the next
        return bool(given["dropout"] and given["num_layers"] > 1)
    return "train" not in given or 0 < given["p"] < 1  # dropout: 0 and 1 need no numbers
