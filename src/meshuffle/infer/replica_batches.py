"""The batches of a replica: its first rank reads them, the others get them from it.

Reading an image takes milliseconds of a core and may fail on one rank and not on another; a copy
takes neither. Every rank of a replica then sees the same samples by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.group import new_group
from meshuffle.data import Batch
from meshuffle.parallel.place import Place

_FIELDS = ("images", "targets", "indices", "draws", "positions")


def replica_group(place: Place) -> dist.ProcessGroup | None:
    """Return a CPU group of the ranks of this replica; None where it is one rank.

    Every rank of all replicas calls it.
    """
    if not place.is_split:
        return None
    groups = [new_group(place.replica(i), backend="gloo") for i in range(place.dp)]
    return groups[place.dp_rank]


def broadcast_batches(
    read: Callable[[], Iterator[Batch | None]], group: dist.ProcessGroup | None
) -> Iterator[Batch | None]:
    """Yield on each rank of `group` what `read` yields on its first one.

    Args:
        read: called on the first rank alone. None stands for a batch that was lost.
        group: as `replica_group` returns it; with None this is `read()`.
    """
    if group is None:
        yield from read()
    elif dist.get_rank(group) == 0:
        for batch in read():
            _send(("none" if batch is None else "batch", batch), group)
            yield batch
        _send(("end", None), group)
    else:
        while (message := _receive(group))[0] != "end":
            yield message[1]


def _send(message: tuple[str, Batch | None], group: dist.ProcessGroup) -> None:
    kind, batch = message
    tensors = [] if batch is None else [getattr(batch, name) for name in _FIELDS]
    form = [(tuple(x.shape), x.dtype) for x in tensors]
    _broadcast_value((kind, form, [] if batch is None else batch.skipped), group)
    for tensor in tensors:
        _broadcast(_flat(tensor), group)


def _receive(group: dist.ProcessGroup) -> tuple[str, Batch | None]:
    kind, form, skipped = _broadcast_value(None, group)
    if kind != "batch":
        return kind, None
    tensors = []
    for shape, dtype in form:
        is_image = len(shape) == 4
        layout = torch.channels_last if is_image else torch.contiguous_format
        tensor = torch.empty(shape, dtype=dtype, memory_format=layout)
        _broadcast(_flat(tensor), group)
        tensors.append(tensor)
    return kind, Batch(**dict(zip(_FIELDS, tensors, strict=True)), skipped=skipped)


def _flat(x: Tensor) -> Tensor:
    """Return the tensor's own memory as one line; images are channels-last in it."""
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    return x.contiguous().view(-1)


def _broadcast(x: Tensor, group: dist.ProcessGroup) -> None:
    if x.numel():
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)


def _broadcast_value(value: Any, group: dist.ProcessGroup) -> Any:
    values = [value]
    dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group=group)
    return values[0]
