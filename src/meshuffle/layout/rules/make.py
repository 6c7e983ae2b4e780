"""Ops that make a tensor of one value, or of random numbers, from sizes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from meshuffle.layout.layout import Layout, Varying, splits
from meshuffle.layout.program import Call
from meshuffle.layout.rule import Choice, Emitter, rule

aten = torch.ops.aten


@rule(
    *(aten.empty, aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones),
    *(aten.new_full, aten.new_empty, aten.rand, aten.randn),
)
def make(call: Call, wanted: Sequence[Layout], _: Sequence[Sequence[Layout]]) -> Iterator[Choice]:
    """Each rank makes its part; random numbers are those of the whole at their indices."""
    for layout in splits([*wanted, call.samples()]):
        yield Choice(call.lie({}, Varying()), layout, layout, local=_sized)


def _sized(emit: Emitter) -> Node:
    name = "size" if "size" in emit.given else "shape"
    return emit.again(**{name: emit.sizes(exact=True)})
