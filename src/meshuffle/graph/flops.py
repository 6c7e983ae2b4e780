"""FLOPs of one op, from shapes alone: 2 per multiply-add, as torch's FlopCounterMode counts.

A table from ATen ops to formulas. An op that is not in it does no multiply-adds worth counting:
pooling, norms and element-wise ops are bound by memory, and their bytes are counted instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import conv_flop_count, flop_registry

from meshuffle.graph.node import packet_of

Shape = tuple[int, ...]
Formula = Callable[..., int]
"""(arguments with shapes for tensors, out=shapes of the result) → FLOPs."""

aten = torch.ops.aten


def _convolution(x: Shape, weight: Shape, *_: Any, out: Sequence[Shape], **__: Any) -> int:
    return conv_flop_count(list(x), list(weight), list(out[0]), transposed=False)


def _transposed_convolution(
    x: Shape, weight: Shape, *_: Any, out: Sequence[Shape], **__: Any
) -> int:
    return conv_flop_count(list(x), list(weight), list(out[0]), transposed=True)


def _linear(x: Shape, weight: Shape, *_: Any, out: Sequence[Shape], **__: Any) -> int:
    return 2 * math.prod(x) * (weight[0] if len(weight) == 2 else 1)


def _matmul(a: Shape, b: Shape, *, out: Sequence[Shape], **_: Any) -> int:
    return 2 * math.prod(out[0]) * a[-1]


def _einsum(equation: str, operands: Sequence[Shape], *, out: Sequence[Shape], **_: Any) -> int:
    """Count a contraction of two operands; of one it is only a sum."""
    if len(operands) != 2:
        return 0
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(terms, operands, strict=True):
        front, dots, back = term.partition("...")
        spread = [f"{dots}{i}" for i in range(len(shape) - len(front) - len(back), 0, -1)]
        for label, size in zip([*front, *spread, *back], shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return 2 * math.prod(sizes.values())


def _recurrent(x: Shape, _: Any, weights: Sequence[Shape], *__: Any, **___: Any) -> int:
    """Count x·W_ih and h·W_hh (and a projection) of each layer, direction and time step."""
    return sum(2 * x[0] * x[1] * math.prod(weight) for weight in weights if len(weight) == 2)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count q·kᵀ and its product with v; a query's heads may share those of k and v."""
    *heads, length, width = query
    return 2 * math.prod(heads) * length * key[-2] * (width + value[-1])


_FORMULAS: dict[Any, Formula] = {
    **dict.fromkeys([aten.conv1d, aten.conv2d, aten.conv3d], _convolution),
    **dict.fromkeys(
        [aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d],
        _transposed_convolution,
    ),
    aten.linear: _linear,
    aten.matmul: _matmul,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    **dict.fromkeys([aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu], _recurrent),
}


def flops_of(node: Node, concrete: Callable[[Any], Any]) -> int:
    """Return the FLOPs of a call.

    Args:
        node: a `call_function`.
        concrete: gives an argument's shape in place of a Node or tensor.
    """
    packet = packet_of(node)
    formula = _FORMULAS.get(packet)
    if formula is None and packet not in flop_registry:
        return 0
    args, kwargs = pytree.tree_map(concrete, (node.args, node.kwargs))
    out = pytree.tree_map(concrete, node.meta["val"])
    if formula is not None:
        return int(formula(*args, **kwargs, out=[out] if _is_shape(out) else out))
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)
