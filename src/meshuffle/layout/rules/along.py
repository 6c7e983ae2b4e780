"""Ops that act along some dims, and on each index of the others alone: norms, softmax, sums."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from meshuffle.graph.runtime_ops import weighted_part
from meshuffle.layout.layout import Partial, Replicate, Samples, Shard, Split, splits
from meshuffle.layout.program import Call
from meshuffle.layout.rule import Choice, Choices, Local, Query, alike, rule
from meshuffle.layout.rules.groups import blocks, own_number
from meshuffle.layout.rules.pointwise import pointwise
from meshuffle.layout.traffic import statistics_bytes

aten = torch.ops.aten


def of_1d_to_3d(*names: str) -> list[Any]:
    """Return the ops whose names say "Nd", for 1 to 3 dims of space."""
    return [getattr(aten, name.replace("Nd", f"{n}d")) for name in names for n in (1, 2, 3)]


RESAMPLING = (
    *of_1d_to_3d("adaptive_avg_poolNd", "upsample_nearestNd", "_upsample_nearest_exactNd"),
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d),
    aten.upsample_bicubic2d,
)
_OTHER_SPATIAL = (
    *of_1d_to_3d("max_poolNd", "max_poolNd_with_indices", "avg_poolNd", "adaptive_max_poolNd"),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
)


def _dims(value: Any, num: int) -> set[int]:
    """Return dims from 0; all where none are given."""
    if value is None or value == []:
        return set(range(num))
    given = [value] if isinstance(value, int) else value
    return {int(d) % num for d in given}


def _padded(call: Call) -> set[int]:
    num = len(call.out)
    return {num - 1 - i // 2 for i, amount in enumerate(list(call["pad"])) if amount != 0}


def _normalised(call: Call) -> set[int]:
    num = len(call.out)
    return set(range(num - len(call["normalized_shape"]), num))


def num_space(call: Call) -> int:
    """Return over how many of the last dims an op goes, as its name says."""
    return int(re.findall(r"(\d)d", str(call.node.target))[0])


_ACTING: dict[Any, Callable[[Call], set[int]]] = {
    **dict.fromkeys(
        [
            *(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum),
            *(aten.cumprod, aten.sort, aten.argsort, aten.topk, aten.glu, aten.logcumsumexp),
        ],
        lambda call: _dims(call["dim"], len(call.shape(call.inputs[0]))),
    ),
    **dict.fromkeys([aten.flip, aten.roll], lambda call: _dims(call["dims"], len(call.out))),
    **dict.fromkeys([aten.pad, aten.constant_pad_nd], _padded),
    **dict.fromkeys([aten.layer_norm, aten.rms_norm, aten._fused_rms_norm], _normalised),
    **dict.fromkeys(
        [*RESAMPLING, *_OTHER_SPATIAL],
        lambda call: _dims(range(-num_space(call), 0), len(call.shape(call.inputs[0]))),
    ),
}


@rule(*_ACTING)
def along(call: Query) -> Choices:
    """Split any dim that the op does not act on; weights are whole."""
    x = call.inputs[0]
    acting = _ACTING[call.packet](call)
    for layout in call.splits_of(x):
        if layout.dim not in acting:
            yield call.choice({x: layout}, alike(call, layout), layout)


_REDUCING = (
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp, aten.prod),
    *(aten.argmax, aten.argmin, aten.linalg_vector_norm, aten.norm, aten.any, aten.all),
    *(aten.max, aten.min),
)


@rule(*_REDUCING)
def reduce(call: Query) -> Choices:
    """Split a dim that stays; of a sum or a mean also one that goes: each rank has a term."""
    if "other" in call.given:  # the larger of two tensors
        yield from pointwise(call)
        return
    (x,) = call.inputs
    num = len(call.shape(x))
    acting = _dims(call.given.get("dim"), num)
    keeps = bool(call.given.get("keepdim", False))
    stay = [d for d in range(num) if d not in acting]
    place = {d: d if keeps else i for i, d in enumerate(stay)}
    source = {j: d for d, j in place.items()}
    back = [layout.on(source[layout.dim]) for layout in splits(call.wanted) if layout.dim in source]
    for layout in call.splits_of(x, back):
        if layout.dim in place:
            yield Choice((layout,), alike(call, layout.on(place[layout.dim])), layout)
        elif call.packet in (aten.mean, aten.sum) and call.given.get("dtype") is None:
            mean = weighted_mean(layout, call.shape(x)[layout.dim])
            local = mean if call.packet is aten.mean else None
            yield Choice((layout,), Partial(), layout, local=local)


def weighted_mean(layout: Split, size: int) -> Local:
    """Return what takes the mean of a rank's part, times its fraction of a dim of `size`."""
    return lambda emit: emit.call(weighted_part, emit.again(), emit.fraction_of(layout, size))


@rule(aten.batch_norm)
def batch_norm(call: Query) -> Choices:
    """Over channels each rank alone; over samples or space all ranks' statistics are joined."""
    x = call["input"]
    channels = call.shape(x)[1]
    rest = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    for layout in splits([*call.splits_of(x), call.even(1, channels)]):
        if layout.dim == 1 and isinstance(layout, Shard):
            yield call.choice({x: layout, **dict.fromkeys(rest, layout.on(0))}, layout, layout)
            continue
        # The running statistics are updated in the same way on all ranks: no term of a sum.
        whole = dict.fromkeys(rest[2:], Replicate())
        itemsize, world = x.meta["val"].itemsize, call.world
        sent = sum(statistics_bytes(channels * world, itemsize, world, world - 1))
        sent = sent if call["training"] else 0
        yield call.choice({x: layout, **whole}, layout, layout, sent_bytes=sent)


@rule(aten.group_norm, aten.instance_norm)
def group_norm(call: Query) -> Choices:
    """Over samples, or over whole groups of channels; in instance norm each is a group."""
    x = call["input"]
    if call.given.get("running_mean") is not None:
        return  # statistics of all samples
    num_groups = int(call.given.get("num_groups", call.shape(x)[1]))
    size = call.shape(x)[1] // num_groups
    if (samples := call.samples(x)) is not None:
        yield call.choice({x: samples}, samples, samples)
    for layout, _ in blocks(call, x, 1, num_groups, (size, size)):
        counts = [len(part) // size for part in layout.owners]
        local = own_number("num_groups", counts) if "num_groups" in call.given else None
        yield call.choice({x: layout}, layout, layout, rest=layout.on(0), local=local)


@rule(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def recurrent(call: Query) -> Choices:
    """Over samples; weights are whole."""
    dims = [call.program.samples_dim_of(result) for result in call.results]
    outputs = tuple(Samples(dim) for dim in dims if dim is not None)
    if len(outputs) == len(dims):
        yield call.choice(
            {x: call.samples(x) for x in call.inputs}, outputs, outputs[0], kind="batch"
        )
