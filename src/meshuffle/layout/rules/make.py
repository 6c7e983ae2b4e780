"""Ops that make a tensor of one value, or of random numbers, from sizes alone."""

from __future__ import annotations

import torch
from torch.fx import Node

from meshuffle.layout.layout import splits
from meshuffle.layout.rule import Choices, Emitter, Query, rule

aten = torch.ops.aten


@rule(
    *(aten.empty, aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones),
    *(aten.new_full, aten.new_empty, aten.rand, aten.randn),
)
def make(call: Query) -> Choices:
    """Each rank makes its part; random numbers are those of the whole at their indices."""
    for layout in splits([*call.wanted, call.samples()]):
        yield call.choice({}, layout, layout, local=_sized)


def _sized(emit: Emitter) -> Node:
    name = "size" if "size" in emit.given else "shape"
    return emit.again(**{name: emit.sizes(exact=True)})
