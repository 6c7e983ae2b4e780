"""Do ranks still hold the same where they should? Fingerprints, compared every so many steps.

What is replicated is equal bit for bit: gradients and batch statistics are summed once and handed
to all, or summed in the order of the ranks, and each rank then does the same arithmetic. So

- over `dp`, the replicas of a place on `tp` and `pp` have equal parameters and buffers;
- over `tp`, so do the ranks of a replica, but for what is split (`Parallel.shards`). Some gradients
  are computed on each of them, so this holds where arithmetic repeats: on a CPU, and with
  `--deterministic`. Elsewhere kernels that add in any order let the ranks drift apart by rounding,
  and each is compared with its own replicas alone;
- over `pp`, so do the stages that share a parameter.

The average of `--ema` is such a state too. The optimiser's is not compared: a difference in it is
one in the parameters after the next step. Step counts must agree on all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm.exchange import Exchange
from meshuffle.comm.lost_ranks import ranks_in_words
from meshuffle.errors import MeshuffleError
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.place import Place
from meshuffle.train.checkpoint.checkpoint import recovery_hint
from meshuffle.train.state import TrainState

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ over the golden ratio, as a signed number
_BLOCK = 1 << 18  # elements at a time: 2 MB of weights, and no large temporary tensor
_SMALL = 1 << 16  # elements of a tensor that is not worth operations of its own
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_MOST_NAMED = 3

Scope = tuple[int | None, tuple[int, ...]]
"""Who must agree, besides all of `dp`: a `tp` rank or None for all of them, and ranks on `pp`."""


@functools.lru_cache(maxsize=2)
def _weights(device: torch.device) -> Tensor:
    """Return an odd number per position of a block, int64: no two alike."""
    return (torch.arange(_BLOCK, device=device) * _ODD * 2) | 1


def fingerprint(tensor: Tensor) -> Tensor:
    """Return an int64 scalar of a tensor's bits, their positions and nothing else.

    The bits of an element are a whole number, or two where it has eight bytes; the fingerprint is
    their sum modulo 2⁶⁴, each times an odd number that depends on its position. So a change in one
    number, even of the sign of a zero or among NaNs, always changes it; changes in several cancel
    by chance, once in 2³² or less. (With numbers of 64 bits any two signs that flip would cancel:
    2⁶³ times an odd number is 2⁶³.)
    """
    return _sum_of(_words(tensor.detach()))


def _words(tensor: Tensor) -> Tensor:
    """Return the bits of each element as whole numbers, in the order of the positions."""
    x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return x.reshape(-1).contiguous().view(_WORDS[x.element_size()])


def _sum_of(words: Tensor) -> Tensor:
    weights = _weights(words.device)
    first, *others = ((block * weights[: len(block)]).sum() for block in words.split(_BLOCK))
    return functools.reduce(lambda total, value: total * _ODD + value, others, first)


class Consistency:
    """Compares what ranks hold in common; all ranks call it at the same steps.

    Args:
        run: the run folder, which an error names.
        state: this rank's.
        exchange: of all ranks, for a few numbers; `control` for what differs.
    """

    def __init__(
        self, run: Path, state: TrainState, exchange: Exchange, control: dist.ProcessGroup
    ) -> None:
        self._run, self._state = run, state
        self._exchange, self._control = exchange, control
        self._every = state.config.check_every if exchange.world > 1 else 0
        self._done = state.progress.step  # counted here: a rank that has lost count must come too
        self._checked = -1

    def after_step(self) -> None:
        """Compare every `--check-every` steps; raises as `check`."""
        self._done += 1
        if self._every and self._done % self._every == 0:
            self.check()

    def before_saving(self) -> None:
        """Compare what is about to be written, unless this step has been; raises as `check`."""
        if self._every and self._done != self._checked:
            self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Compare now.

        Raises:
            MeshuffleError: names the tensors and the ranks that differ; the same on all ranks.
        """
        state, step = self._state, self._state.progress.step
        tensors, scopes = replicated(state), _scopes(state)
        own = torch.tensor([step, *_digests(tensors, scopes)])
        table = self._exchange.all_gather(own).tolist()
        self._checked = self._done
        steps = dict(enumerate(row[0] for row in table))
        wrong = [
            scope
            for i, scope in enumerate(scopes, 1)
            if len({table[rank][i] for rank in members(scope, state.place)}) > 1
        ]
        if wrong or len(set(steps.values())) > 1:
            self._fail(steps, {name: pair for name, pair in tensors.items() if pair[0] in wrong})

    def _fail(self, steps: Mapping[int, int], own: Mapping[str, tuple[Scope, Tensor]]) -> None:
        """Find out which tensors differ, and raise."""
        rows: list[Any] = [None] * self._exchange.world
        values = {name: (scope, int(fingerprint(x))) for name, (scope, x) in own.items()}
        dist.all_gather_object(rows, values, group=self._control)
        found = [_differing("the number of steps done", steps)]
        for name, scope in {n: s for row in rows for n, (s, _) in row.items()}.items():
            ranks = members(scope, self._state.place)
            found.append(_differing(name, {rank: rows[rank][name][1] for rank in ranks}))
        differences = [text for text in found if text]
        num_more = len(differences) - _MOST_NAMED
        more = f", and {num_more} more tensors" if num_more > 0 else ""
        raise MeshuffleError(
            f"ranks that should hold the same do not, found after step {steps[0]}: "
            f"{'; '.join(differences[:_MOST_NAMED])}{more}. "
            "Memory or a link is at fault, or code that "
            "does not do the same on all ranks. No checkpoint holds this; "
            f"{recovery_hint(self._run)}"
        )


def replicated(state: TrainState) -> dict[str, tuple[Scope, Tensor]]:
    """Return this rank's parameters and buffers by name, with who must agree on each."""
    found = {name: (_scope(state, name), x) for name, x in _named(state.model)}
    if state.average is None:
        return found
    average = dict(_named(state.average.module))
    return found | {f"ema.{name}": (_scope(state, name), x) for name, x in average.items()}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _scope(state: TrainState, name: str) -> Scope:
    model, place = state.model, state.place
    if not isinstance(model, Parallel):
        return None, (0,)
    is_own = name in model.shards or not _repeats(state)
    part = place.tp_rank if place.tp > 1 and is_own else None
    stages = model.stages_of.get(name, frozenset(model.stages))
    return part, _ranks_of(model, stages)


def _ranks_of(model: Parallel, stages: Iterable[int]) -> tuple[int, ...]:
    """Return the ranks on `pp` that hold some stages."""
    pipeline = model.pipeline
    return tuple(sorted({pipeline.schedule.ranks[s] for s in stages})) if pipeline else (0,)


def _repeats(state: TrainState) -> bool:
    """Whether the same arithmetic on two ranks gives the same bits."""
    return state.step.device.type == "cpu" or state.config.deterministic


def _scopes(state: TrainState) -> list[Scope]:
    """Return all scopes there are, on any rank: the same list on all of them."""
    if not isinstance(state.model, Parallel):
        return [(None, (0,))]
    model = state.model
    alone = {(rank,) for rank in range(state.place.pp)}
    shared = {_ranks_of(model, stages) for stages in model.stages_of.values() if stages}
    parts = [None, *range(state.place.tp)] if state.place.tp > 1 else [None]
    return [(part, ranks) for ranks in sorted(alone | shared) for part in parts]


def members(scope: Scope, place: Place) -> list[int]:
    """Return the ranks, in the world, that must agree."""
    part, stages = scope
    columns = range(place.tp) if part is None else [part]
    replicas = [(stage, dp_rank) for stage in stages for dp_rank in range(place.dp)]
    return [(s * place.dp + d) * place.tp + column for s, d in replicas for column in columns]


def _digests(tensors: Mapping[str, tuple[Scope, Tensor]], scopes: Sequence[Scope]) -> list[int]:
    """Return one number of all tensors of a scope; small ones are put together to go fast."""
    small: dict[tuple[Scope, torch.dtype], list[Tensor]] = {}
    found: list[tuple[Scope, Tensor]] = []
    for _, (scope, tensor) in sorted(tensors.items()):
        words = _words(tensor)
        if len(words) > _SMALL:
            found.append((scope, _sum_of(words)))
        else:
            small.setdefault((scope, words.dtype), []).append(words)
    found += [(scope, _sum_of(torch.cat(words))) for (scope, _), words in small.items()]
    sums = torch.stack([value for _, value in found]).tolist() if found else []  # waits once
    totals = dict.fromkeys(scopes, 0)
    for (scope, _), value in zip(found, sums, strict=True):
        totals[scope] = (totals[scope] * _ODD + value) % (1 << 64)
    return [total - (total >> 63 << 64) for total in totals.values()]


def _differing(name: str, values: Mapping[int, int]) -> str:
    """Return who differs from whom, or "" where ranks agree; most ranks are taken to be right."""
    groups: dict[int, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    if len(groups) < 2:
        return ""
    right = max(groups.values(), key=len)
    wrong = sorted(rank for group in groups.values() if group is not right for rank in group)
    return f"{name} of {ranks_in_words(wrong)} differs from that of {ranks_in_words(sorted(right))}"
