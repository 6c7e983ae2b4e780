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
    plain = _run(model, x_NCHW)
    if isinstance(plain, Exception):
        reason = str(plain).partition("\n")[0] or type(plain).__name__
        raise ModelError(f"{name} on images of 3×{height}×{width}: {reason}") from plain
    task.check_outputs(plain[0], name)
    if not plain[0].isfinite().all():
        raise ModelError(f"{name} returns NaN or infinity for random images of 3×{height}×{width}")
    # float32 is quick, and tells nearly always; where rounding is amplified, float64 decides.
    same = _agree(plain, _run(model, _last(x_NCHW)), 0.05)
    if same is False and not isinstance(exact := _run(model, x_NCHW.double()), Exception):
        same = _agree(exact, _run(model, _last(x_NCHW.double())), 1e-6)
    return Trial(bool(same), _unused(model, x_NCHW))


def _last(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.contiguous(memory_format=torch.channels_last)


def _agree(plain: list[Tensor], other: list[Tensor] | Exception, share: float) -> bool | None:
    """Tell whether the outputs, and the gradients together, differ by no more than a share.

    A network that reads memory in another order differs by about 1. None after an error.
    """
    if isinstance(other, Exception):
        return None
    kinds = ((plain[:1], other[:1]), (plain[1:], other[1:]))
    return all(
        torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
        <= share * torch.stack([a.norm() for a in ours]).norm() + 1e-12
        for ours, theirs in kinds
        if ours
    )


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
    except Exception as error:  # noqa: BLE001  # of other people's code; the caller reports it
        return error
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [outputs.detach(), *gradients]


def _unused(model: nn.Module, x_NCHW: Tensor) -> list[str]:
    """Return the names of outputs beside the main one, in train mode."""
    network: Any = copy.deepcopy(model).train()
    with torch.no_grad():
        x_NCHW = x_NCHW.to(next((p.dtype for p in network.parameters()), x_NCHW.dtype))
        return unused_outputs(network.forward(x_NCHW))  # around the hook that picks the main one
