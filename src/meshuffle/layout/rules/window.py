"""Which inputs a rank's outputs need, where a kernel slides along one dim: the halo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from meshuffle.comm.primitives import is_run
from meshuffle.layout.layout import Layout, Owners, Shard, Window, splits
from meshuffle.layout.rule import Emitter, Query

aten = torch.ops.aten
Pads = Sequence[tuple[int, int]]
"""How much padding is in front and behind, for each dim or for each rank."""


@dataclass(frozen=True)
class Kernel:
    """A sliding window along one dim of `size` inputs; `padding` is in front of them."""

    size: int
    width: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """From the first to the last input that an output sees."""
        return self.dilation * (self.width - 1)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last input that outputs first … last see, beyond the ends too."""
        start = first * self.stride - self.padding
        return start, last * self.stride - self.padding + self.reach

    def held(self, part: Sequence[int]) -> range:
        """Return the inputs that a run of outputs needs."""
        start, stop = self.needs(part[0], part[-1])
        return range(max(0, start), min(self.size - 1, stop) + 1)


def is_contiguous(layout: Layout) -> bool:
    """Tell whether each rank's indices are one run, none empty."""
    return isinstance(layout, Shard) and all(map(is_run, layout.owners))


def rows(
    call: Query, x: Node, kernels: Sequence[Kernel]
) -> Iterator[tuple[int, Shard, Layout, Pads]]:
    """Yield which of the last dims is split, how the result may lie, and the `window` of that."""
    for d, kernel in enumerate(kernels):
        dim = len(call.out) - len(kernels) + d
        for layout in dim_splits(call, x, dim, kernel.size):
            if is_contiguous(layout) and (needed := window(layout, kernel)) is not None:
                yield d, layout, *needed


def dim_splits(call: Query, x: Node, dim: int, size: int) -> Iterator[Shard]:
    """Yield how a dim may lie: as wanted, as `x` if that has as many indices, `size`, evenly."""
    same = call.arriving[x] if call.out[dim] == size else []
    for layout in splits([*call.wanted, *same, call.even(dim)]):
        if isinstance(layout, Shard) and layout.dim == dim and all(layout.owners):
            yield layout


def window(layout: Shard, kernel: Kernel) -> tuple[Layout, Pads] | None:
    """Return what each rank needs for its outputs, and how much padding goes round that.

    None where a rank would see nothing but padding.
    """
    needs, pads = [], []
    for part in layout.owners:
        start, stop = kernel.needs(part[0], part[-1])
        needs.append(tuple(kernel.held(part)))
        pads.append((max(0, -start), max(0, stop - kernel.size + 1)))
    return (read(layout.dim, tuple(needs), kernel.size), pads) if all(needs) else None


def read(dim: int, needs: Owners, size: int) -> Layout:
    """Return the layout in which each rank has what it needs of a dim of `size`."""
    once = sorted(i for part in needs for i in part) == list(range(size))
    return Shard(dim, needs) if once else Window(dim, needs)


class Padded:
    """A rank's window with its padding made explicit, and the op on that with some `changes`.

    Dim `d` of the last ones is split; there each rank has its `ends`, and the others what is
    `around` them: only where the tensor ends is there any padding.
    """

    def __init__(
        self, d: int, ends: Pads, around: Pads, value: float = 0.0, **changes: object
    ) -> None:
        self.d, self.ends, self.around = d, ends, around
        self.value, self.changes = value, changes

    def __call__(self, emit: Emitter) -> Node:
        """Add both; without changes the padding is all, and nothing where there is none."""
        name = "input" if "input" in emit.given else "self"
        x, pads = emit.given[name], [*self.around]
        pads[self.d] = self.ends[emit.rank]
        flat = [amount for pair in reversed(pads) for amount in pair]
        while flat and flat[-2:] == [0, 0]:
            flat = flat[:-2]
        if flat:
            x = emit.call(aten.pad.default, x, flat, "constant", self.value)
        return emit.again(**{name: x}, **self.changes) if self.changes else x
