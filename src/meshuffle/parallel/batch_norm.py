"""Batch norm over the whole batch, wherever its samples are.

`SyncBatchNorm` of torch refuses CPU tensors, and its statistics of an uneven batch are only
right on GPUs. This one is made of ATen's own batch-norm kernels, on any device:

    forward    local mean and variance → all-gather (mean, variance, count) → combine → normalise
    backward   local Σg and Σg·x̂ → all-reduce → grad_x = a·g + b·x + c, per channel

One small collective in each direction. The all-reduced Σg·x̂ and Σg are the exact gradients of
weight and bias, so that each rank keeps only its own part (the reducer sums all gradients).

Under torch.compile the reductions and the collectives are operators of their own, which the
compiler calls and does not look into, and everything between them is fused with its neighbours.

Legend: N batch, C channels, R ranks.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meshuffle.comm.exchange import Exchange

# An operator of torch takes numbers, not objects. Small ones, so that compiled code is reused.
_EXCHANGES: WeakValueDictionary[int, Exchange] = WeakValueDictionary()
_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of all ranks' samples together.

    In eval mode, and on one rank, it is the ordinary layer. A rank may hold no sample at all.
    Parameters and buffers have torch's names.
    """

    exchange: Exchange
    handle: int
    keeps_reductions = False
    """Whether a compiled model, too, reduces by ATen's kernels; where inductor's are slower."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dims, (N, C, …); got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` of shape (N, C, …)."""
        self._check_input_dim(input)
        use_batch = self.training or self.running_mean is None
        several_values = input.numel() > input.shape[1]  # of one value alone torch refuses the mean
        alone = self.exchange.world == 1 and several_values
        if alone and self.keeps_reductions and torch.compiler.is_compiling():
            alone = False
        if not use_batch or alone:
            return super().forward(input)
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        rate: Any = self.momentum
        if rate is None and self.num_batches_tracked is not None:
            rate = 1.0 / self.num_batches_tracked.to(input.dtype)
        running = (self.running_mean, self.running_var) if self.training else (None, None)
        given = (input, self.weight, self.bias, *running)
        return joint_batch_norm(*given, momentum=rate, eps=self.eps, handle=self.handle)


def joint_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: Any,
    eps: float,
    handle: int,
) -> Tensor:
    """Return `x` (N, C, …) normalised over all ranks' values, and update the running statistics.

    Args:
        weight, bias, running_mean, running_var: (C,), or None.
        momentum: weight of this batch in the running statistics.
        handle: number of the exchange between the ranks, see `exchange_handle`.
    """
    num_channels = x.shape[1]
    weight = x.new_ones(num_channels) if weight is None else weight
    bias = x.new_zeros(num_channels) if bias is None else bias
    output, mean_C, var_C, count = _SyncBatchNorm.apply(x, weight, bias, eps, handle)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean_C, var_C, count, momentum)
    return output


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean_C: Tensor,
    var_C: Tensor,
    count: Tensor,
    momentum: Any,
) -> None:
    """Move the running statistics by `momentum` towards those of a batch of `count` values."""
    unbiased_C = var_C * (count / (count - 1).clamp_min(1))
    running_mean += momentum * (mean_C - running_mean).to(running_mean.dtype)
    running_var += momentum * (unbiased_C - running_var).to(running_var.dtype)


class _SyncBatchNorm(Function):
    """The forward and the backward of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, handle: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            mean_C, var_C, count = torch.ops.meshuffle.batch_statistics(x, handle)
        else:
            mean_C, var_C, count = global_statistics(x, _EXCHANGES[handle])
        stat_dtype = weight.dtype
        mean_C, var_C = mean_C.to(stat_dtype), var_C.to(stat_dtype)
        output = (
            _normalise(x, weight, bias, mean_C, var_C, eps) if x.numel() else torch.empty_like(x)
        )
        ctx.save_for_backward(x, weight, mean_C, var_C, count)
        ctx.eps, ctx.handle = eps, handle
        ctx.mark_non_differentiable(mean_C, var_C, count)
        return output, mean_C, var_C, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, var_C, count = ctx.saved_tensors
        inv_std_C = torch.rsqrt(var_C + ctx.eps)
        if torch.compiler.is_compiling():
            operators = torch.ops.meshuffle
            local_2C = operators.batch_norm_sums(grad, x, mean_C, inv_std_C, ctx.eps)
            total_2C = operators.all_sum(local_2C, ctx.handle)
        else:
            local_2C = _local_sums(grad, x, mean_C, inv_std_C, ctx.eps)
            total_2C = _EXCHANGES[ctx.handle].all_sum(local_2C)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, x, weight, mean_C, inv_std_C, total_2C / count)
        num_channels = weight.numel()
        return grad_x, local_2C[:num_channels], local_2C[num_channels:], None, None


def global_statistics(x: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean_C, biased variance_C, count) over all ranks' samples.

    The ranks' moments are combined by Chan's formula, so that no precision is lost where the
    mean is large against the deviation. Source: Chan, Golub, LeVeque, STAN-CS-79-773 (1979).

    Args:
        x: (N, C, …) of this rank; N may be 0.
        exchange: between the ranks that share a batch.
    """
    local, num_channels = _local_statistics(x), x.shape[1]
    if exchange.world == 1:
        return local[:num_channels], local[num_channels:-1], local[-1]
    mean_RC, var_RC, count_R1 = exchange.all_gather(local).split([num_channels, num_channels, 1], 1)
    count = count_R1.sum()
    mean_C = (mean_RC * count_R1).sum(0) / count
    var_C = ((var_RC + (mean_RC - mean_C).square()) * count_R1).sum(0) / count
    return mean_C, var_C, count


def _local_statistics(x: Tensor) -> Tensor:
    """Return [mean_C, biased variance_C, count] of this rank, one vector of `_stat_dtype`."""
    num_channels = x.shape[1]
    vector = torch.zeros(2 * num_channels + 1, dtype=_stat_dtype(x), device=x.device)
    if x.numel():
        mean_C, var_C = torch.batch_norm_update_stats(x, None, None, 0.0)
        vector[:num_channels], vector[num_channels:-1] = mean_C, var_C
        vector[-1] = x.numel() // num_channels
    return vector


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, mean_C: Tensor, var_C: Tensor, eps: float
) -> Tensor:
    if torch.compiler.is_compiling():  # pointwise, so that it is fused, or done again backward
        scale_C = weight * torch.rsqrt(var_C + eps)
        scale, shift = _per_channel(x, scale_C, bias - mean_C * scale_C)
        return torch.addcmul(shift, x, scale)
    return torch.native_batch_norm(x, weight, bias, mean_C, var_C, False, 0.0, eps)[0]


def _per_channel(x: Tensor, *vectors_C: Tensor) -> list[Tensor]:
    """Return each vector in the dtype of x (N, C, …), in a shape that spreads over it."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return [vector_C.to(x.dtype).view(shape) for vector_C in vectors_C]


def _local_sums(grad: Tensor, x: Tensor, mean_C: Tensor, inv_std_C: Tensor, eps: float) -> Tensor:
    """Return this rank's [Σ g·x̂, Σ g] over all dims but C, shape (2C,)."""
    if x.numel() == 0:
        return torch.zeros(2 * mean_C.numel(), dtype=mean_C.dtype, device=x.device)
    ones = torch.ones_like(mean_C)
    mask = [False, True, True]
    _, sum_gx_C, sum_g_C = torch.ops.aten.native_batch_norm_backward(
        grad, x, ones, None, None, mean_C, inv_std_C, True, eps, mask
    )
    return torch.cat((sum_gx_C, sum_g_C))


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mean_C: Tensor, inv_std_C: Tensor, mean_2C: Tensor
) -> Tensor:
    """Return w·s·(g − mean(g) − x̂·mean(g·x̂)) as a·g + b·x + c with s = 1/√(var + eps)."""
    num_channels = weight.numel()
    a_C = weight * inv_std_C
    b_C = -a_C * inv_std_C * mean_2C[:num_channels]
    c_C = -a_C * mean_2C[num_channels:] - b_C * mean_C
    a, b, c = _per_channel(x, a_C, b_C, c_C)
    return torch.addcmul(c, x, b).addcmul_(grad, a)


class SyncNorm(nn.Module):
    """Batch norm of a lowered model whose samples or rows lie on several ranks; training only.

    Parameters and buffers are the model's, passed in.

    Args:
        over_tp: over the `tp` axis and its replicas; otherwise over the replicas alone.
        momentum, eps: as of the model's layer.
    """

    handle: int

    def __init__(self, over_tp: bool, momentum: float, eps: float) -> None:
        super().__init__()
        self.over_tp, self.momentum, self.eps = over_tp, momentum, eps

    def forward(self, x: Tensor, *tensors: Any) -> Tensor:
        """Return `x` (N, C, …) normalised, and update the running statistics.

        Args:
            tensors: weight, bias, running mean and variance; see `joint_batch_norm`.
        """
        momentum, eps, handle = self.momentum, self.eps, self.handle
        return joint_batch_norm(x, *tensors, momentum=momentum, eps=eps, handle=handle)

    def extra_repr(self) -> str:
        """Say whose statistics are joined."""
        return "tp and dp" if self.over_tp else "dp"


def local_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """Return `x` (N, C, …) normalised with its own statistics, and update the running ones.

    Where a channel has one value, torch's running variance would be 0 / 0, so the value is given
    twice. (torch updates the running statistics, because autograd does not take that for a change:
    the backward of an earlier micro-batch has saved them.)
    """
    running = (running_mean, running_var)
    if x.numel() == x.shape[1]:
        twice = torch.cat([x, x])
        return torch.batch_norm(twice, weight, bias, *running, True, momentum, eps, cudnn)[:1]
    if not x.numel():
        running = (None, None)
    return torch.batch_norm(x, weight, bias, *running, True, momentum, eps, cudnn)


def synchronise_batch_norm(model: nn.Module, exchange: Exchange) -> nn.Module:
    """Let every batch norm of `model` see all ranks' values, in place; returns `model`.

    torch's own layers become `BatchNorm`; a subclass of theirs, as timm's fused one, stays one.
    Whatever else calls `F.batch_norm` in train mode gets the joint one there. Parameters and
    buffers are kept, the same objects under the same names.
    """
    handle = exchange_handle(exchange)
    for module in model.modules():
        if type(module) in _LAYERS:
            module.__class__ = BatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and exchange.world > 1:
            _join(module, handle, is_needed=True)
        if isinstance(module, BatchNorm):
            module.exchange, module.handle = exchange, handle
    if exchange.world > 1:
        _join(model, handle)
    return model


def _join(module: nn.Module, handle: int, *, is_needed: bool | None = None) -> None:
    """Let the joint batch norm stand for `F.batch_norm` in the forward of `module`."""
    if type(module) is BatchNorm:
        return
    if "joined_norms" not in vars(module):
        module.__class__ = _joining(type(module))  # type: ignore[arg-type]
    vars(module)["joined_norms"] = _JoinedNorms(handle, is_needed)


@functools.cache  # a model has one class, wherever it is copied to
def _joining(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a module whose calls of `F.batch_norm` in train mode are joint."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms: _JoinedNorms = self.joined_norms
        if not self.training or norms.is_needed is False:
            return kind.forward(self, *args, **kwargs)
        with norms:
            outputs = kind.forward(self, *args, **kwargs)
        if norms.is_needed is None and not torch.compiler.is_compiling():  # there it costs nothing
            norms.is_needed = norms.num_calls > 0
        return outputs

    is_norm = issubclass(kind, nn.modules.batchnorm._BatchNorm)
    bases = (kind, BatchNorm) if is_norm else (kind,)
    return type(kind.__name__, bases, {"forward": forward, "__module__": kind.__module__})


class _JoinedNorms(TorchFunctionMode):
    """Joins the statistics of whatever calls `F.batch_norm` in train mode.

    Attributes:
        num_calls: how many there were.
        is_needed: whether there was one in the first forward pass; None before that.
    """

    def __init__(self, handle: int, is_needed: bool | None = None) -> None:
        super().__init__()
        self.handle, self.num_calls, self.is_needed = handle, 0, is_needed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or the joint batch norm in place of a batch norm."""
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        x, mean, var, weight, bias, training, momentum, eps = given.arguments.values()
        if not training:
            return func(*args, **(kwargs or {}))
        self.num_calls += 1
        return joint_batch_norm(
            x, weight, bias, mean, var, momentum=momentum, eps=eps, handle=self.handle
        )


def exchange_handle(exchange: Exchange) -> int:
    """Return the number by which operators know `exchange`, for as long as that lives."""
    known = (number for number, other in _EXCHANGES.items() if other is exchange)
    handle = next(known, next(n for n in itertools.count() if n not in _EXCHANGES))
    _EXCHANGES[handle] = exchange
    return handle


@torch.library.custom_op("meshuffle::batch_statistics", mutates_args=())
def _batch_statistics(x: Tensor, exchange: int) -> tuple[Tensor, Tensor, Tensor]:
    mean_C, var_C, count = global_statistics(x, _EXCHANGES[exchange])
    return mean_C.clone(), var_C.clone(), count.clone()  # an operator's results share no memory


@_batch_statistics.register_fake
def _(x: Tensor, exchange: int) -> tuple[Tensor, Tensor, Tensor]:
    vector_C = x.new_empty(x.shape[1], dtype=_stat_dtype(x))
    return vector_C, torch.empty_like(vector_C), vector_C.new_empty(())


_batch_norm_sums = torch.library.custom_op(
    "meshuffle::batch_norm_sums", _local_sums, mutates_args=()
)


@_batch_norm_sums.register_fake
def _(grad: Tensor, x: Tensor, mean_C: Tensor, inv_std_C: Tensor, eps: float) -> Tensor:
    return mean_C.new_empty(2 * mean_C.numel())


@torch.library.custom_op("meshuffle::all_sum", mutates_args=())
def _all_sum(vector: Tensor, exchange: int) -> Tensor:
    return _EXCHANGES[exchange].all_sum(vector).clone()


@_all_sum.register_fake
def _(vector: Tensor, exchange: int) -> Tensor:
    return torch.empty_like(vector)
