"""From what ranks hold to what they need: the least data that has to move, as index lists.

Pure: ranks are numbers, and every rank computes all ranks' routes from the same lists, so all
agree on whether anything moves at all. The channel shuffle, a concat's relayout, an all-gather
and a halo differ only in `needs`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from meshuffle.comm.collectives import Route
from meshuffle.layout.layout import Owners


def routes(owners: Owners, needs: Sequence[Sequence[int]]) -> list[Route]:
    """Return each rank's part in an exchange.

    Every element that a rank needs and lacks is sent to it once, however often it is needed;
    what a rank holds itself stays where it is.

    Args:
        owners: indices along one dim that each rank holds; no index twice.
        needs: indices that each rank shall hold next, in that order. Some may be needed on
            several ranks, or on none; none is listed twice for one rank.

    Raises:
        ValueError: an index that nobody holds, or twice in one rank's list.
    """
    place = {index: (rank, i) for rank, part in enumerate(owners) for i, index in enumerate(part)}
    for rank, need in enumerate(needs):
        if len(set(need)) < len(need) or not place.keys() >= set(need):
            raise ValueError(f"rank {rank} needs {list(need)}; held are {sorted(place)}, once each")
    # sent[sender][receiver]: global indices in the order in which they are needed; own ones too.
    world = range(len(owners))
    sent = [[[i for i in needs[to] if place[i][0] == rank] for to in world] for rank in world]
    communicates = any(sent[rank][to] for rank in world for to in world if rank != to)
    return [_route(rank, owners, needs[rank], sent, communicates) for rank in world]


@functools.lru_cache(maxsize=1024)
def whole_route(owners: Owners, rank: int) -> Route:
    """Return a rank's part in an exchange behind which every rank has the whole."""
    return routes(owners, [tuple(range(sum(map(len, owners))))] * len(owners))[rank]


def _route(
    rank: int,
    owners: Owners,
    need: Sequence[int],
    sent: Sequence[Sequence[Sequence[int]]],
    communicates: bool,
) -> Route:
    local = {index: i for i, index in enumerate(owners[rank])}
    arrivals = [index for row in sent for index in row[rank]]
    arrived = {index: i for i, index in enumerate(arrivals)}
    wanted = {index: j for j, index in enumerate(need)}
    outgoing = [part if to != rank else () for to, part in enumerate(sent[rank])]
    incoming = [len(row[rank]) if frm != rank else 0 for frm, row in enumerate(sent)]
    return Route(
        size=len(owners[rank]),
        kept_index=tuple(local[index] for index in sent[rank][rank]),
        send_index=tuple(local[index] for part in outgoing for index in part),
        send_splits=tuple(map(len, outgoing)),
        receive_splits=tuple(incoming),
        before=sum(incoming[:rank]),
        receive_index=tuple(arrived[index] for index in need),
        own_index=tuple(wanted[index] for index in owners[rank] if index in wanted),
        communicates=communicates,
    )


def sent_elements(owners: Owners, needs: Sequence[Sequence[int]]) -> int:
    """Return how many elements along the dim cross between ranks, summed over ranks."""
    return sum(len(set(need).difference(part)) for part, need in zip(owners, needs, strict=True))
