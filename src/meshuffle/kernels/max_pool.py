"""Max pooling that a compiled model calls as ATen has it.

The backward that inductor makes for a CPU is several times slower (dev/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meshuffle.comm.device import inductor_reduces_slowly

Size = int | list[int] | tuple[int, ...]


def max_pool2d(
    x: Tensor,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Return `x` (N, C, H, W) pooled; arguments are those of `aten.max_pool2d`."""
    if not (torch.compiler.is_compiling() and inductor_reduces_slowly(x.device)):
        return F.max_pool2d(x, kernel, stride or None, padding, dilation, ceil_mode)
    sizes = map(_pair, (kernel, stride or kernel, padding, dilation))
    pooled: Tensor = torch.ops.meshuffle.max_pool2d(x, *sizes, ceil_mode)[0]
    return pooled


def _pair(size: Size) -> list[int]:
    pair = [size] if isinstance(size, int) else list(size)
    return pair * 2 if len(pair) == 1 else pair


@torch.library.custom_op("meshuffle::max_pool2d", mutates_args=())
def _max_pool2d(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)


@torch.library.custom_op("meshuffle::max_pool2d_backward", mutates_args=())
def _max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil: bool,
) -> Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad, x, kernel, stride, padding, dilation, ceil, indices
    )


_max_pool2d.register_fake(torch.ops.aten.max_pool2d_with_indices)
_max_pool2d_backward.register_fake(lambda grad, x, *_: torch.empty_like(x))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.sizes = inputs[1:]


def _pool_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, indices = ctx.saved_tensors
    grad_x = torch.ops.meshuffle.max_pool2d_backward(grad, x, indices, *ctx.sizes)
    return grad_x, *(None,) * len(ctx.sizes)


_max_pool2d.register_autograd(_pool_gradient, setup_context=_keep_for_backward)
