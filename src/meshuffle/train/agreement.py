"""What the ranks agree on before each step: who has how many samples, and who wants to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshuffle.comm.exchange import Exchange
from meshuffle.parallel.place import Place
from meshuffle.train.step import gather_over_ranks


@dataclass(frozen=True)
class Agreement:
    """What the ranks know of a step before they do it.

    Attributes:
        counts: valid samples of each micro-batch, over all replicas.
        firsts: of these, how many belong to the replicas before this one.
        stop, save, lost: whether any rank is asked to stop, wants to save, has lost its loader.
    """

    counts: list[int]
    firsts: list[int]
    stop: int
    save: int
    lost: int


def agree(
    sizes: Sequence[int], signals: tuple[int, bool, bool], place: Place, exchange: Exchange
) -> Agreement:
    """Tell the other ranks what this one has; returns the same on all ranks of a replica.

    Args:
        sizes: samples of each of this rank's micro-batches.
        signals: the number of the signal that asks this rank to stop, or 0; whether it wants to
            save; whether it has lost its loader.
    """
    num = len(sizes)
    rows = gather_over_ranks([float(value) for value in (*sizes, *signals)], exchange)
    output_ranks = [rows[place.replica(dp_rank)[0]] for dp_rank in range(place.dp)]
    replicas = [list(map(round, row[:num])) for row in output_ranks]
    stop, save, lost = (round(sum(column)) for column in list(zip(*rows, strict=True))[num:])
    return Agreement(
        counts=[sum(column) for column in zip(*replicas, strict=True)],
        firsts=[sum(row[i] for row in replicas[: place.dp_rank]) for i in range(num)],
        stop=stop,
        save=save,
        lost=lost,
    )
