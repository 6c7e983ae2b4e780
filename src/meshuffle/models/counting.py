"""Parameters and multiply-accumulates, counted from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from meshuffle.models.layers import evaluating

FLOPS_PER_MAC = 2


def count_parameters(model: nn.Module) -> int:
    """Return the number of elements of all parameters; one that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of one forward pass over one sample.

    Convolutions and matrix products count, as in the papers; norms, activations, pooling and
    padding do not. Nothing is computed: the pass runs on the meta device with the shapes of
    the parameters, and the model is left as it was, its training flags included.

    Args:
        model: any module on any device whose forward takes one float tensor.
        input_shape: shape of one sample without the batch, such as (3, 224, 224).
    """
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    floats = (tensor.dtype for tensor in on_meta.values() if tensor.is_floating_point())
    sample = torch.empty(1, *input_shape, device="meta", dtype=next(floats, torch.float32))
    counter = FlopCounterMode(display=False)
    with evaluating(model), _WithoutBatchNorm(), counter:
        torch.func.functional_call(model, on_meta, (sample,))
    return counter.get_total_flops() // FLOPS_PER_MAC


class _WithoutBatchNorm(TorchFunctionMode):
    """Pass a batch norm's input on: it counts nothing, and takes half of the time on meta."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.batch_norm:
            return args[0]
        return func(*args, **(kwargs or {}))
