"""Data parallel: each rank computes its samples' part of one gradient.

Losses are sums over samples divided by the global number of samples, so gradients are *summed*
over ranks; uneven and empty parts need no special case. Buckets have a fixed layout and a fixed
order from the first step on, so a resumed run adds in the same order as an uninterrupted one
(torch's DDP re-buckets after its first step).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm.sent_bytes import labelled

Mode = Literal["replicate", "central", "shard"]
MODES: dict[str | None, Mode] = {None: "replicate", "central": "central", "shard": "shard"}
"""By a plan's `dp_kind`."""
_BUCKET_BYTES = 25 << 20


class Bucket:
    """Some parameters whose gradients travel in one flat buffer, in one group."""

    def __init__(self, group: dist.ProcessGroup, are_terms: bool) -> None:
        self.group, self.are_terms = group, are_terms
        self.parameters: list[nn.Parameter] = []
        self.size_bytes = self.pending = 0
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def add(self, parameter: nn.Parameter) -> None:
        """Let one more parameter travel in it."""
        self.parameters.append(parameter)
        self.size_bytes += _num_bytes(parameter)
        self.pending += 1

    def pack(self) -> Tensor:
        """Copy the gradients into one flat tensor; a missing one counts as zero."""
        pieces = [
            (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1)
            for p in self.parameters
        ]
        self.flat = torch.cat(pieces)
        return self.flat

    def unpack(self) -> None:
        """Copy the sums back and get ready for the next step."""
        assert self.flat is not None
        sizes = [p.numel() for p in self.parameters]
        for parameter, piece in zip(self.parameters, self.flat.split(sizes), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(piece.view_as(parameter))
            elif self.are_terms:  # the others' terms are its gradient
                parameter.grad = piece.view_as(parameter).clone()
        self.pending, self.flat, self.work = len(self.parameters), None, None


class DataParallel:
    """Keeps the replicas of a model equal, step after step.

    `replicate`: gradients are all-reduced and every rank updates. `central`: gradients are
    reduced to rank 0, which updates and broadcasts the parameters (the classic
    parameter-server step, kept for comparison). `shard`: gradients are all-reduced, each rank
    updates some of the parameters and broadcasts those, so that it keeps the optimiser's state of
    no others (the first stage of ZeRO, arXiv 1910.02054); half as many bytes more are sent.

    Use it as: backward of each micro-batch, the last one after `expect_last_backward()`;
    `reduce_gradients()`; where `updates_here`, `drop_others()` and the optimiser's step;
    `share_update()`.

    Where the model is split within its layers too, some parameters are used in another part by
    each rank of a replica: their gradients are summed over all ranks.

    Args:
        model: the same on all ranks of `group`; parameters that need no gradient are left out.
        group: the ranks that share a batch.
        mode: see above.
        terms: names of the parameters of which each rank of `every` has a term of the gradient.
        every: all ranks of all replicas; needed with `terms`.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        mode: Mode = "replicate",
        bucket_bytes: int = _BUCKET_BYTES,
        *,
        terms: Collection[str] = (),
        every: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.mode = group, mode
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.updates_here = mode != "central" or self.rank == 0
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._owners = _even(self._trained, self.world if mode == "shard" else 1)
        self._buckets = fill_buckets(model, group, terms, every, bucket_bytes)
        self._next, self._armed = 0, False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]

    def _hook(self, bucket: Bucket):  # type: ignore[no-untyped-def]
        def arrived(_: Tensor) -> None:
            if self._armed:
                bucket.pending -= 1
                self._launch_ready()

        return arrived

    def expect_last_backward(self) -> None:
        """Let the reduction start as soon as gradients arrive in the next backward."""
        self._armed = True

    def reduce_gradients(self) -> None:
        """Finish the sum of all gradients over the ranks."""
        self._armed = False
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.unpack()
        self._next = 0

    def _launch_ready(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].pending == 0:
            self._launch(self._buckets[self._next])

    def _launch(self, bucket: Bucket) -> None:
        # Strictly in order: the ranks' collectives must match even where a gradient is missing.
        flat = bucket.pack()
        with labelled("parameters"):
            if self.mode == "central":
                bucket.work = dist.reduce(flat, group_dst=0, group=bucket.group, async_op=True)
            else:
                bucket.work = dist.all_reduce(flat, group=bucket.group, async_op=True)
        self._next += 1

    def keeps_state_of(self, parameter: nn.Parameter) -> bool:
        """Whether this rank keeps the optimiser's state of a parameter that is trained."""
        if self.mode == "replicate":
            return True
        return self._owners.get(parameter, self.rank) == self.rank

    def drop_others(self) -> None:
        """Drop the gradients of what another rank updates, so that the optimiser leaves it."""
        for parameter, owner in self._owners.items():
            if self.mode == "shard" and owner != self.rank:
                parameter.grad = None

    @torch.no_grad()
    def share_update(self) -> None:
        """Broadcast what one rank alone updated; nothing to do where every rank did."""
        if self.mode == "replicate" or self.world == 1:
            return
        for owner in sorted(set(self._owners.values())):
            theirs = [p for p in self._trained if self._owners[p] == owner]
            flat = torch.cat([p.detach().reshape(-1) for p in theirs])
            dist.broadcast(flat, group_src=owner, group=self.group)
            sizes = [p.numel() for p in theirs]
            for parameter, piece in zip(theirs, flat.split(sizes), strict=True):
                parameter.copy_(piece.view_as(parameter))

    def close(self) -> None:
        """Remove the hooks, for example before other parameters are unfrozen."""
        for hook in self._hooks:
            hook.remove()


def fill_buckets(
    model: nn.Module,
    group: dist.ProcessGroup,
    terms: Collection[str] = (),
    every: dist.ProcessGroup | None = None,
    limit_bytes: int = _BUCKET_BYTES,
) -> list[Bucket]:
    """Put the trained parameters that several ranks share into buckets of about `limit_bytes`.

    From the last to the first, as gradients arrive. A bucket has one dtype, device and group.
    Buckets come in the order of their last parameters. Arguments are as of `DataParallel`.
    """
    filling: dict[Any, Bucket] = {}
    place: dict[Bucket, int] = {}
    for i, (name, parameter) in enumerate(reversed([*model.named_parameters()])):
        own = (every or group) if name in terms else group
        if not parameter.requires_grad or dist.get_world_size(own) == 1:
            continue
        kind = (parameter.dtype, parameter.device, own, name in terms)
        bucket = filling.get(kind)
        if bucket is None or bucket.size_bytes + _num_bytes(parameter) > limit_bytes:
            bucket = filling[kind] = Bucket(own, name in terms)
        bucket.add(parameter)
        place[bucket] = i
    return sorted(place, key=lambda bucket: place[bucket])


def _even(parameters: Iterable[nn.Parameter], world: int) -> dict[nn.Parameter, int]:
    """Return the rank that updates each parameter: the largest first, to who has least so far."""
    loads, owners = [0] * world, {}
    for parameter in sorted(parameters, key=_num_bytes, reverse=True):
        owners[parameter] = loads.index(min(loads))
        loads[owners[parameter]] += _num_bytes(parameter)
    return owners


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


@torch.no_grad()
def broadcast_from_main(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if dist.get_world_size(group) > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, group_src=0, group=group)
