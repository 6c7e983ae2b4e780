"""Batches of decoded and transformed images, by torch's DataLoader.

Worker processes come from a fork server. A plain fork would copy a process that has gloo's,
NCCL's and OpenMP's threads: the child inherits locks whose holders do not exist there, and
the parent's SIGTERM handler besides. The server is a small process that has imported this
module and started no thread of ours; workers fork from it in milliseconds. (A script that
trains with workers therefore needs `if __name__ == "__main__":`, as on macOS and Windows,
and by default on Linux since Python 3.14.)

A broken image leaves its batch and is named in `Batch.skipped`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meshuffle.comm.device import num_cores
from meshuffle.comm.forking import fork_server
from meshuffle.comm.heap import return_freed_blocks
from meshuffle.data.base import ImageSource
from meshuffle.data.dense import build_eval_transform
from meshuffle.data.preprocess import Preprocess
from meshuffle.data.sampler import EpochSampler, SampleKey
from meshuffle.errors import ImageError, MeshuffleError

_MAX_WORKERS = 8  # per rank; beyond it the decoding of a rank rarely limits


class Transform(Protocol):
    """A function from an image to its view as bytes; `size` is (height, width) of the view."""

    size: tuple[int, int]

    def pair(self, image: Image.Image, target: Any, draw: int) -> tuple[Tensor, Tensor]:
        """Return the view, uint8 [3, height, width], and its target."""


@dataclass
class Batch:
    """One rank's valid samples of one step; N may be 0.

    Attributes:
        images: uint8 [N, 3, H, W], channels-last in memory.
        targets: targets of the task, [N, …]; labels, int64 [N], for a classifier. If samples have
            different numbers of rows (boxes), the missing ones are −1.
        indices: indices in the source, int64 [N].
        draws: draws of the augmentation, int64 [N].
        positions: places in the rank's part of the batch, counted with broken images, int64 [N].
        skipped: one message per broken image.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    draws: Tensor
    positions: Tensor
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Move the images to page-locked memory; the DataLoader calls this."""
        self.images = self.images.pin_memory()
        return self


def train_loader(
    source: ImageSource,
    transform: Transform,
    sampler: EpochSampler,
    epoch: int,
    *,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's batches of `epoch` from `start_step` on.

    Worker processes end with the iterator, also when it is closed or dropped midway. Raises
    `MeshuffleError` when a worker is killed, for example by a lack of memory.
    """
    batches = sampler.batches(epoch, start_step)
    return _batches(_Samples(source, transform), batches, num_workers, pin_memory)


def eval_loader(
    source: ImageSource,
    preprocess: Preprocess,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    dense: bool = False,
) -> Iterator[Batch]:
    """Yield every image once in order, in the evaluation geometry.

    `batch_size` is global; each rank has a contiguous part of each batch, possibly empty, so
    that all ranks take the same number of steps. `dense`: see `build_eval_transform`.
    """
    sampler = EpochSampler(len(source), batch_size, rank=rank, world=world, shuffle=False)
    return train_loader(
        source,
        build_eval_transform(preprocess, dense=dense),
        sampler,
        0,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def auto_workers(source: ImageSource, num_ranks: int = 1, threads: int | None = None) -> int:
    """Return how many worker processes each of `num_ranks` ranks on this machine should use.

    For images in memory it is one, if `threads` leaves a core of the rank idle, and otherwise none.
    For files it is the cores of the rank minus one, at most 8.
    """
    cores = num_cores() // num_ranks
    if source.in_memory:
        return int(threads is not None and cores > threads)
    return max(0, min(_MAX_WORKERS, cores - 1))


def prepare_workers() -> None:
    """Start the imports of the worker processes, which take a few seconds, in the background."""
    _fork_server()


class SkipLog:
    """Remembers the broken images of a run, so that each is reported once.

    With `strict=True` the first one raises `ImageError`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.messages: list[str] = []
        self._strict = strict
        self._known: set[str] = set()

    def __len__(self) -> int:
        return len(self.messages)

    def note(self, skipped: Iterable[str]) -> list[str]:
        """Return the messages that are new, and remember them."""
        new = [message for message in dict.fromkeys(skipped) if message not in self._known]
        if new and self._strict:
            raise ImageError(new[0])
        self._known.update(new)
        self.messages += new
        return new


class _Samples(Dataset[Batch]):
    """A data set that returns a whole `Batch` for a list of sample keys."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self._source = source
        self._transform = transform

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        views, targets, kept, skipped = [], [], [], []
        for position, key in enumerate(keys):
            try:
                image, target = self._source.image(key.index), self._source.target(key.index)
                view, target = self._transform.pair(image, target, key.draw)
                views.append(view)
                targets.append(target)
                kept.append((key.index, key.draw, position))
            except ImageError as error:
                skipped.append(str(error))
        images = self._stack(views)
        indices, draws, positions = torch.tensor(kept, dtype=torch.int64).reshape(-1, 3).T
        return Batch(images, _joined(targets), indices, draws, positions, skipped)

    def _stack(self, views: list[Tensor]) -> Tensor:
        """Stack in channels-last, as PIL stores pixels: a plain copy, and the faster format."""
        if not views:
            return torch.empty((0, 3, *self._transform.size), dtype=torch.uint8)
        return torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)


def _joined(targets: list[Tensor]) -> Tensor:
    """Stack the targets; missing rows become −1."""
    if not targets:
        return torch.empty(0, dtype=torch.int64)
    if len({target.shape for target in targets}) == 1:
        return torch.stack(targets)
    return nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)


def _batches(
    samples: _Samples, batches: Iterable[list[SampleKey]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=_fork_server() if num_workers else None,
        worker_init_fn=_init_worker if num_workers else None,
    )
    iterator = iter(loader)
    reader = ThreadPoolExecutor(1, "batches") if num_workers else None
    try:
        yield from iterator if reader is None else _received(iterator, reader)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise MeshuffleError(" ".join(str(error).split())) from error
    finally:
        # The only way to end the workers now; dropping the last reference would do, but the
        # traceback of an exception may hold one.
        getattr(iterator, "_shutdown_workers", lambda: None)()
        if reader is not None:
            reader.shutdown(wait=False)


def _received(iterator: Iterator[Batch], reader: ThreadPoolExecutor) -> Iterator[Batch]:
    """Yield batches that a thread receives from the workers.

    What receiving allocates is small and comes between steps. In the caller's heap it would break
    up the big blocks that a step has freed: 1.7 times the memory of the main process.
    """
    while (batch := reader.submit(next, iterator, None).result()) is not None:
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _fork_server() -> multiprocessing.context.BaseContext:
    """Return what workers come from; see the top of this file."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # Windows
    return fork_server(__name__)


def _init_worker(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the rank decides, and ends its workers.

    When the rank is killed outright, nobody does: DataLoader's workers watch their parent,
    which is the server, and the server waits for them. So each watches the rank itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    return_freed_blocks(1 << 20)
    gc.freeze()  # or the collector copies 90 MB that are shared with the server, by writing there
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()
        os._exit(1)
