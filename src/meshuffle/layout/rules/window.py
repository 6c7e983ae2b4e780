"""Which inputs a rank's outputs need, for convolution and pooling along one dim: the halo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from meshuffle.layout.call import Emitter
from meshuffle.layout.layout import Layout, Shard, Window

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A sliding window along one dim of `size` inputs; `padding` is in front of them."""

    size: int
    width: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last input that outputs first … last see, beyond the ends too."""
        start = first * self.stride - self.padding
        return start, last * self.stride - self.padding + self.dilation * (self.width - 1)


def is_contiguous(layout: Layout) -> bool:
    """Tell whether each rank's indices are one run, none empty."""
    return isinstance(layout, Shard) and all(
        part and part[-1] - part[0] == len(part) - 1 and list(part) == sorted(part)
        for part in layout.owners
    )


def window(layout: Shard, kernel: Kernel) -> tuple[Layout, list[tuple[int, int]]] | None:
    """Return what each rank needs for its outputs, and how much padding goes round that.

    None where a rank would see nothing but padding.
    """
    needs, pads = [], []
    for part in layout.owners:
        start, stop = kernel.needs(part[0], part[-1])
        held = tuple(range(max(0, start), min(kernel.size - 1, stop) + 1))
        if not held:
            return None
        needs.append(held)
        pads.append((max(0, -start), max(0, stop - kernel.size + 1)))
    held_once = sorted(i for part in needs for i in part) == list(range(kernel.size))
    owners = tuple(needs)
    return (Shard(layout.dim, owners) if held_once else Window(layout.dim, owners)), pads


def padded(emit: Emitter, x: Node, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Node:
    """Add the calls that pad the last dims, given from the front; nothing where all are 0."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return emit.call(aten.pad.default, x, flat, "constant", value) if flat else x
