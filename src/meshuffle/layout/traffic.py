"""What a step sends: the collectives within layers, and the values that cross pipeline cuts.

Plain data and sums, so that a cost model can read them without the code that runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from meshuffle.layout.layout import Layout, Samples, Shard, Varying, even_size
from meshuffle.layout.program import Program
from meshuffle.layout.redistribution import Value


@dataclass
class Sent:
    """What one collective of a step sends, in bytes, by all `tp` ranks of one replica together.

    Attributes:
        name: the module that sends.
        value: the value whose parts are sent.
        forward, backward: for the value, and for its gradient.
        is_statistics: a batch norm sends it, to join the statistics of several ranks.
    """

    name: str
    value: str
    forward: int
    backward: int
    is_statistics: bool = False


@dataclass(frozen=True)
class Crossing:
    """A value that one pipeline stage sends to the next, rank by rank of the `tp` axis.

    Attributes:
        node: the value, in the whole program.
        layout: the layout in which it is sent; its gradient comes back in the same parts.
        has_grad: whether a gradient comes back.
    """

    node: Node
    layout: Layout
    has_grad: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the value, as it was captured."""
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def num_bytes(self, program: Program, rank: int, batch: int) -> int:
        """Return the bytes of a rank's part, of a micro-batch of `batch` samples."""
        return math.prod(self.shape(program, rank, batch)) * self.dtype.itemsize

    def shape(self, program: Program, rank: int, batch: int) -> tuple[int, ...]:
        """Return the sizes of a rank's part, of a micro-batch of `batch` samples."""
        fixed = program.graph.symbol is None
        sizes = list(program.graph.shape(self.node.meta["val"], None if fixed else batch))
        layout = self.layout
        if isinstance(layout, Shard):
            sizes[layout.dim] = len(layout.owners[rank])
        elif isinstance(layout, Samples):
            rows = sizes[layout.dim] // max(1, batch)
            sizes[layout.dim] = even_size(rank, program.world, batch) * rows
        return tuple(sizes)


@dataclass
class Traffic:
    """What one pipeline stage sends.

    Attributes:
        sent: its collectives, in order.
        reduced_bytes: bytes that the reduction of parameter gradients over the `tp` axis sends.
        leaving: the values that go to the next stage, in order.
    """

    sent: list[Sent] = field(default_factory=list)
    reduced_bytes: int = 0
    leaving: list[Crossing] = field(default_factory=list)


def sent_across_cuts(
    stages: Sequence[Traffic], ranks: Sequence[int], program: Program, batch: int
) -> int:
    """Return what one replica's ranks send across cuts for a micro-batch, there and back.

    Args:
        stages: the stages of the pipeline, in order.
        ranks: the rank of the `pp` axis that holds each stage.
        program: the whole model.
        batch: samples of the micro-batch.
    """
    return sum(
        crossing.num_bytes(program, rank, batch) * (1 + crossing.has_grad)
        for i, stage in enumerate(stages)
        for crossing in stage.leaving
        for rank in range(program.world)
        if ranks[i] != ranks[i + 1]
    )


def predicted_bytes(
    stages: Sequence[Traffic],
    ranks: Sequence[int],
    program: Program,
    batch: int,
    split_backwards: Collection[int] = (),
) -> int:
    """Return what one replica's ranks send for a micro-batch of `batch` samples, in all stages.

    Arguments are as of `sent_across_cuts`.

    Args:
        split_backwards: stages whose backward is split in two. The second one, to the weights,
            repeats that of each batch norm.
    """
    total = sent_across_cuts(stages, ranks, program, batch)
    for i, stage in enumerate(stages):
        sends_back = i > 0 and any(crossing.has_grad for crossing in stages[i - 1].leaving)
        for sent in stage.sent:
            twice = sent.is_statistics and sends_back and i in split_backwards
            total += sent.forward + sent.backward * (2 if twice else 1)
    return total


def gradient_bytes(value: Value, layout: Layout) -> int:
    """Return what the gradient of a parameter sends that is read in `layout`.

    It is reduced where it is a term of a sum; otherwise nothing is sent.
    """
    is_term = isinstance(layout, Varying) and value.has_grad
    return 2 * (value.world - 1) * value.num_bytes if is_term else 0


def statistics_bytes(
    num_channels: int, itemsize: int, num_ranks: int, num_others: int
) -> tuple[int, int]:
    """Return what a batch norm sends to join its statistics, forward and backward.

    Forward, means and variances in float64 and a count are gathered; backward, two sums per
    channel are reduced.

    Args:
        num_channels: those of all `num_ranks` together.
        itemsize: bytes of an element of the input.
        num_ranks: the ranks whose bytes are counted.
        num_others: how many ranks each of them exchanges with.
    """
    forward = num_others * (16 * num_channels + 8 * num_ranks)
    return forward, num_others * 2 * num_channels * itemsize
