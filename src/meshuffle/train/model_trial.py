"""Try a model on two images before a run begins: its outputs, and which memory format it takes.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshuffle.errors import ModelError
from meshuffle.models.outputs import unused_outputs
from meshuffle.tasks.base import Task

_CLOSE = {torch.float64: 1e-6, torch.float32: 2e-2}
"""Largest difference between two memory formats, as a share of the largest value."""


@dataclass(frozen=True)
class Trial:
    """What was seen of a model.

    Attributes:
        channels_last: forward and backward are the same with channels-last images and weights.
        unused: names of outputs that take no part in the loss.
    """

    channels_last: bool
    unused: list[str]


def try_model(model: nn.Module, task: Task, name: str) -> Trial:
    """Run a copy of `model` on two random images of the run's size, in both memory formats.

    Args:
        name: as the user gave it, for errors.

    Raises:
        ModelError: it fails on images of this size, or has other outputs than the task needs.
    """
    height, width = task.card.preprocess.size
    x_NCHW = torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(0))
    what = f"{name} on images of 3×{height}×{width}"
    dtype, plain = torch.float64, _run(model, x_NCHW.double())
    if isinstance(plain, Exception):  # it casts to float32 inside
        dtype, plain = torch.float32, _run(model, x_NCHW)
    if isinstance(plain, Exception):
        reason = str(plain).partition("\n")[0] or type(plain).__name__
        raise ModelError(f"{what}: {reason}") from plain
    outputs, *_ = plain
    task.check_outputs(outputs, name)
    other = _run(model, x_NCHW.to(dtype, memory_format=torch.channels_last))
    same = not isinstance(other, Exception) and all(
        _is_close(a, b, _CLOSE[dtype]) for a, b in zip(plain, other, strict=True)
    )
    return Trial(same, _unused(model, x_NCHW))


def _run(model: nn.Module, x_NCHW: Tensor) -> list[Tensor] | Exception:
    """Return the outputs and all gradients of a copy in train mode, or the error."""
    last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
    network = copy.deepcopy(model).to(x_NCHW.dtype).train()
    if last:
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same dropout in both formats
            outputs: Tensor = network(x_NCHW)
            weights = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(1))
            if outputs.requires_grad:
                (outputs * weights.to(outputs.dtype)).sum().backward()
    except Exception as error:  # noqa: BLE001  # of foreign code, told by the caller
        return error
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [outputs.detach(), *gradients]


def _is_close(a: Tensor, b: Tensor, share: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= share * a.abs().max() + 1e-12)


def _unused(model: nn.Module, x_NCHW: Tensor) -> list[str]:
    """Return the names of outputs beside the main one, in train mode."""
    network: Any = copy.deepcopy(model).train()
    with torch.no_grad():
        x_NCHW = x_NCHW.to(next((p.dtype for p in network.parameters()), x_NCHW.dtype))
        return unused_outputs(network.forward(x_NCHW))  # around the hook that picks the main one
