"""Pooling, interpolation and padding: samples, channels, and space row by row.

A maximum is the op itself on a window, as a convolution is. All others are linear and take one
dim after the other, and along a dim each result is a weighted sum of a few inputs. The op itself
is run to learn which inputs these are, and with what weights: so torch's rules of rounding,
alignment and scale factors hold. Antialiased rows are left whole: in torch 2.15 they are wrong
where the width is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from meshuffle.graph.runtime_ops import weighted
from meshuffle.layout.layout import Partial, Shard, splits
from meshuffle.layout.rule import Choice, Choices, Emitter, Query, rule
from meshuffle.layout.rules.along import RESAMPLING, along, num_space, of_1d_to_3d, weighted_mean
from meshuffle.layout.rules.window import Kernel, Padded, dim_splits, read, rows

aten = torch.ops.aten
Arguments = Mapping[str, Sequence[Any]]

_NEUTRAL = {"scale_factors": 1.0, "kernel_size": 1, "stride": 1, "padding": 0, "pad": (0, 0)}
"""What leaves a dim as it is; so does an `output_size` that is the input's."""


@rule(*of_1d_to_3d("max_poolNd", "avg_poolNd"))
def pool(call: Query) -> Choices:
    """input (N, C, …): windows of one channel."""
    yield from along(call)
    num = num_space(call)
    names = ("kernel_size", "stride" if call["stride"] else "kernel_size", "padding")
    widths, strides, paddings = (call.ints(name, num) for name in names)
    if "dilation" not in call.given:  # an average
        arguments = {"kernel_size": widths, "stride": strides, "padding": paddings}
        if call.given.get("divisor_override") is None:
            yield from _resampled(call, arguments)
        return
    (x,) = call.inputs
    each = zip(
        call.shape(x)[-num:], widths, strides, paddings, call.ints("dilation", num), strict=True
    )
    kernels = [Kernel(*numbers) for numbers in each]
    # Padding of a dim that is not split: in front, and behind as far as the last window goes.
    around = [
        (k.padding, max(0, k.needs(0, out - 1)[1] - k.size + 1))
        for k, out in zip(kernels, call.out[-num:], strict=True)
    ]
    for d, layout, needed, ends in rows(call, call.inputs[0], kernels):
        local = Padded(d, ends, around, -math.inf, padding=[0] * num, ceil_mode=False)
        yield Choice((needed,), layout, layout, local=local)


@rule(*RESAMPLING)
def resize(call: Query) -> Choices:
    """Samples, channels and space; one mean of all of a dim also as a sum of terms."""
    yield from along(call)
    given = {key: call.given.get(key) for key in ("output_size", "scale_factors")}
    arguments = {key: values for key, values in given.items() if values is not None}
    yield from _resampled(call, arguments)
    lead = len(call.out) - num_space(call)
    for layout in splits(call.arriving[call.inputs[0]] if "avg" in str(call.node.target) else []):
        if layout.dim >= lead and call.out[layout.dim] == 1:
            local = weighted_mean(layout, call.shape(call.inputs[0])[layout.dim])
            yield Choice((layout,), Partial(), layout, local=local)


@rule(aten.pad, aten.constant_pad_nd)
def pad(call: Query) -> Choices:
    """A dim that is not padded, or one whose ends have ranks that pad their parts."""
    yield from along(call)
    pairs = list(zip(call["pad"][::2], call["pad"][1::2], strict=True))[::-1]
    if call.given.get("mode", "constant") != "constant":
        yield from _resampled(call, {"pad": pairs})
        return
    sizes = call.out[len(call.out) - len(pairs) :]
    kernels = [Kernel(n - sum(pair), 1, 1, pair[0]) for n, pair in zip(sizes, pairs, strict=True)]
    for d, layout, needed, ends in rows(call, call.inputs[0], kernels):
        local = Padded(d, ends, pairs, call["value"] or 0.0)
        yield Choice((needed,), layout, layout, local=local)


def _resampled(call: Query, arguments: Arguments) -> Choices:
    """Yield splits along dims of which each result sees a few inputs; `arguments` are per dim."""
    (x,) = call.inputs
    fixed = all(isinstance(v, int | float | tuple) for values in arguments.values() for v in values)
    other = any(call.given.get(key) for key in ("scales", "scales_h"))  # of the other overload
    if not fixed or other or not x.meta["val"].is_floating_point():
        return
    num = max(map(len, arguments.values()))
    sizes, outs = call.shape(x)[-num:], call.out[-num:]
    # By a scale that the sizes do not have, torch 2.15 may take other rows back than forth.
    for size, out, scale in zip(sizes, outs, arguments.get("scale_factors", ()), strict=False):
        if out in (size, 2 * size) and out != scale * size:
            return
    dtype = torch.promote_types(x.meta["val"].dtype, torch.float32)
    for d, size in enumerate(sizes):
        dim = len(call.out) - num + d
        others = [i for i in range(num) if i != d]
        _, *rest = (call.given | _leaving(others, 1, arguments)).values()
        constants = tuple(tuple(v) if isinstance(v, list) else v for v in rest)
        if (terms := _terms(call.node.target, constants, d, num, size, dtype)) is None:
            continue
        for layout in dim_splits(call, x, dim, size):
            local = _Rows(d, layout, arguments, terms)
            yield Choice((read(dim, local.needs, size),), layout, layout, local=local)


def _leaving(dims: Sequence[int], size: int, arguments: Arguments) -> dict[str, list[Any]]:
    """Return the arguments with which the op leaves some dims, of `size`, as they are."""
    written = {}
    for name, values in arguments.items():
        left = [_NEUTRAL.get(name, size) if i in dims else v for i, v in enumerate(values)]
        written[name] = [n for pair in reversed(left) for n in pair] if name == "pad" else left
    return written


@functools.lru_cache(maxsize=4096)
def _terms(
    op: Any, constants: tuple[Any, ...], d: int, num: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return of which inputs each result is a sum, and their weights: (terms, results) each.

    The op, with all its arguments but the first, resizes the d-th of the last `num` dims alone.
    Lines that are 1 at every `period`-th input give the weights, if no result sees two ones of
    a line; it sees the one that is nearest to the middle of all it sees. None: it sees too many.
    """
    shape = [1, -1, *[1] * num]
    shape[2 + d] = size
    place, period = torch.arange(size, dtype=dtype), 8
    noise = place.square().sin()
    while period <= max(8, 4 * size) and period * size < 2**24:
        first = torch.arange(period)[:, None]
        lines = torch.cat([place % period == first, torch.stack([place**0, place, noise])])
        seen = op(lines.view(shape), *constants).reshape(period + 3, -1)
        weights, (total, middle, expected) = seen[:period], seen[period:]
        index = first + period * ((middle / total - first) / period).round().long()
        index = index.clamp(0, size - 1)
        error = (weights * noise[index]).sum(0) - expected
        if error.abs().max() < 100 * torch.finfo(dtype).eps:
            order = weights.abs().topk(int((weights != 0).sum(0).max()), dim=0).indices
            weights, index = weights.gather(0, order), index.gather(0, order)
            return torch.where(weights == 0, index[:1], index), weights
        period *= 2
    return None


class _Rows:
    """The op on all dims but one, and along that one a rank's weighted sums."""

    def __init__(
        self, d: int, layout: Shard, arguments: Arguments, terms: tuple[Tensor, Tensor]
    ) -> None:
        self.d, self.layout, self.arguments = d, layout, arguments
        of_ranks = [[t[:, list(part)] for t in terms] for part in layout.owners]
        held = [index.unique(return_inverse=True) for index, _ in of_ranks]
        self.needs = tuple(tuple(inputs.tolist()) for inputs, _ in held)
        self.index = [places.tolist() for _, places in held]
        self.weights = [weights.tolist() for _, weights in of_ranks]

    def __call__(self, emit: Emitter) -> Node:
        index, weights = self.index[emit.rank], self.weights[emit.rank]
        rest = _leaving([self.d], len(self.needs[emit.rank]), self.arguments)
        x, dim = emit.again(**rest), self.layout.dim
        if len(weights) == 1 and set(weights[0]) == {1.0}:
            return emit.take(x, dim, index[0])
        return emit.call(weighted, x, dim, index, weights)
