"""Ops that compute each element of the result from the same element of operands that spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshuffle.layout.layout import Layout, Partial, Samples, Shard, Varying, splits
from meshuffle.layout.rule import Choice, Choices, Query, rule

aten = torch.ops.aten

POINTWISE = (
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.abs, aten.pow, aten.sqrt),
    *(aten.rsqrt, aten.reciprocal, aten.exp, aten.log, aten.log1p, aten.expm1, aten.sin, aten.cos),
    *(aten.tanh, aten.sigmoid, aten.erf, aten.relu, aten.relu6, aten.leaky_relu, aten.elu),
    *(aten.silu, aten.gelu, aten.mish, aten.selu, aten.celu, aten.softplus),
    *(aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.hardshrink, aten.threshold),
    *(aten.log_sigmoid, aten.rrelu, aten.square, aten.sign),
    *(aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.where),
    *(aten.masked_fill, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.logical_not),
    *(aten.logical_and, aten.logical_or, aten.bitwise_not, aten.bitwise_and, aten.bitwise_or),
    *(aten.floor, aten.ceil, aten.round, aten.fmod, aten.remainder, aten.floor_divide),
    *(aten.to, aten._to_copy, aten.type_as, aten.addcmul, aten.addcdiv, aten.lerp),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.fill, aten.zero),
    *(aten.dropout, aten.feature_dropout, aten.bernoulli, aten.isnan, aten.isfinite, aten.atan2),
    *(aten.nan_to_num, aten.copy, aten.softshrink, aten.hypot, aten.__and__),
    *(aten.__or__, aten.__xor__, aten.detach, aten.alias, aten.clone),
    *(aten.contiguous, aten.lift_fresh_copy, aten.true_divide, aten.tan, aten.atan, aten.acos),
)


@rule(*POINTWISE)
def pointwise(call: Query) -> Choices:
    """Split alike whatever is split; an operand of size 1 there is whole."""
    arriving = [
        raised(layout, call.out, call.shape(node))
        for node in call.inputs
        for layout in call.arriving[node]
    ]
    for layout in splits([*call.wanted, *arriving, call.samples()]):
        inputs = tuple(broadcast(layout, call.out, call.shape(node)) for node in call.inputs)
        yield Choice(inputs, layout, layout)


@rule(aten.prelu)
def prelu(call: Query) -> Choices:
    """input (N, C, …), weight (C) or (1): it spreads over the others, and lies as dim 1."""
    x, weight = call["self"], call["weight"]
    for layout in splits([*call.wanted, *call.arriving[x], call.samples()]):
        along = layout.dim == 1 and call.shape(weight) != (1,)
        yield call.choice({x: layout, weight: layout.on(0) if along else None}, layout, layout)


@rule(aten.add, aten.sub)
def terms(call: Query) -> Choices:
    """Split as the others; terms of two sums may also be added as they are."""
    yield from pointwise(call)
    same = all(call.shape(node) == call.out for node in call.inputs)
    if same and len(call.inputs) == 2 and Partial() in call.all_arriving():
        yield Choice((Partial(), Partial()), Partial(), None)


def broadcast(layout: Shard | Samples, out: Sequence[int], shape: Sequence[int]) -> Layout:
    """Return how an operand of `shape` must lie where the result of `out` lies as `layout`."""
    dim = layout.dim - (len(out) - len(shape))
    if dim < 0 or shape[dim] != out[layout.dim]:
        return Varying()  # spreads there; or gives but its dtype, as in `type_as`
    return layout.on(dim)


def raised(layout: Layout, out: Sequence[int], shape: Sequence[int]) -> Layout | None:
    """Return how the result lies where an operand of `shape` that spreads over it does so."""
    if not isinstance(layout, Shard | Samples):
        return None
    dim = layout.dim + len(out) - len(shape)
    return layout.on(dim) if dim >= 0 and out[dim] == shape[layout.dim] else None
