"""What a rank does when: spans of time around calls, recorded while hooks are in place.

A hook replaces one function, method or attribute of an object, and `remove` puts the original back,
so that nothing is left of it where nothing is recorded.

On the CPU a span is the wall time around a call. On CUDA, where a call only queues work, it lies
between two events on the stream that the call was made on: what the device did, waits for other
ranks included, and without making the host wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Label = tuple[str, Mapping[str, Any]]
"""A span's name and what else describes it, as plain data."""

_ROUNDS = 10


class Span(NamedTuple):
    """One piece of a lane; times in nanoseconds of this rank's `time.perf_counter_ns`."""

    lane: str
    name: str
    begin_ns: int
    end_ns: int
    notes: Mapping[str, Any]


class _HostClock:
    """Reads the host's clock."""

    def mark(self) -> Any:
        return time.perf_counter_ns()

    def to_ns(self, mark: Any) -> int:
        return int(mark)


class _CudaClock:
    """Leaves events in the current stream; `to_ns` waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._first, self._first_ns = self.mark(), time.perf_counter_ns()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def to_ns(self, mark: Any) -> int:
        mark.synchronize()
        return self._first_ns + round(1e6 * self._first.elapsed_time(mark))


class Spans:
    """Records spans in lanes.

    A span of the lane `idle` inside another one is a wait for its input: the outer span begins
    where it ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
        self._found: list[tuple[str, Label, Any, Any]] = []
        self._open: list[list[Any]] = []  # the beginnings of the spans that we are in
        self._hooks: list[tuple[Any, str, bool, Any]] = []
        self._given: list[Span] = []

    def hook(self, owner: Any, name: str, lane: str, label: Callable[..., Label | None]) -> None:
        """Record each call of `owner.name`.

        Args:
            owner: an object, a class or a module.
            label: takes the call's arguments; None leaves this call out.
        """
        original = getattr(owner, name)
        self._hooks.append((owner, name, name in vars(owner), original))

        def recorded(*arguments: Any, **options: Any) -> Any:
            labelled = label(*arguments, **options)
            if labelled is None:
                return original(*arguments, **options)
            own = [self._clock.mark()]
            self._open.append(own)
            try:
                return original(*arguments, **options)
            finally:
                end = self._clock.mark()
                self._open.pop()
                self._found.append((lane, labelled, own[0], end))
                if lane == "idle" and self._open:
                    self._open[-1][0] = end

        setattr(owner, name, recorded)

    def remove(self) -> None:
        """Put all originals back."""
        while self._hooks:
            owner, name, was_own, original = self._hooks.pop()
            if was_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

    def add(self, span: Span) -> None:
        """Record a span of the host."""
        self._given.append(span)

    def take(self) -> list[Span]:
        """Return what has been recorded since the last call, by their beginning."""
        to_ns = self._clock.to_ns
        found = [
            Span(lane, name, to_ns(begin), to_ns(end), notes)
            for lane, (name, notes), begin, end in self._found
        ]
        found = sorted([*self._given, *found], key=lambda span: span.begin_ns)
        self._given, self._found = [], []
        return found


def clock_ahead_ns(
    group: dist.ProcessGroup, clock: Callable[[], int] = time.perf_counter_ns
) -> int:
    """Return by how much this rank's clock is ahead of rank 0's; all ranks of a CPU group call it.

    Rank 0 asks each rank for the time, a few times; of the quickest answer it takes the middle.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    word = torch.zeros(1, dtype=torch.int64)
    for other in range(1, world):
        if rank == 0:
            answers = []
            for _ in range(_ROUNDS):
                asked = clock()
                dist.send(word, group_dst=other, group=group)
                dist.recv(word, group_src=other, group=group)
                heard = clock()
                answers.append((heard - asked, int(word) - (asked + heard) // 2))
            dist.send(torch.tensor([min(answers)[1]]), group_dst=other, group=group)
        elif rank == other:
            for _ in range(_ROUNDS):
                dist.recv(word, group_src=0, group=group)
                dist.send(torch.tensor([clock()]), group_dst=0, group=group)
            dist.recv(word, group_src=0, group=group)
    return int(word) if rank else 0
