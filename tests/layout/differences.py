"""Ranks' parts of a result, put together and compared with the whole, and so their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshuffle.layout.layout import Layout, Partial, Samples, Shard, samples_owners


def joined(layout: Layout, parts: Sequence[Tensor], whole: Tensor, batch: int) -> Tensor:
    """Return the parts put together as `layout` says; ValueError where they do not fit."""
    if isinstance(layout, Partial):
        return sum(parts[1:], parts[0])
    if not isinstance(layout, Shard | Samples):
        return parts[0]
    owners = (
        layout.owners
        if isinstance(layout, Shard)
        else samples_owners(whole.shape[layout.dim], batch, len(parts))
    )
    lengths = [part.shape[layout.dim] for part in parts]
    if lengths != [len(part) for part in owners]:
        raise ValueError(f"parts of {lengths}")
    index = torch.tensor([i for part in owners for i in part])
    return torch.cat(list(parts), layout.dim).index_select(layout.dim, index.argsort())


def differs(found: Tensor, whole: Tensor) -> str | None:
    """Say how a tensor differs from what it should be."""
    found, whole = found.detach(), whole.detach()
    if found.shape != whole.shape or found.dtype != whole.dtype:
        return f"{found.dtype} {tuple(found.shape)} for {whole.dtype} {tuple(whole.shape)}"
    if not whole.is_floating_point():
        return None if torch.equal(found, whole) else "other values"
    finite = whole[whole.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    if torch.allclose(found, whole, rtol=0, atol=1e-12 * scale, equal_nan=True):
        return None
    return f"differs by up to {float((found - whole).abs().nan_to_num(0).max()):.1e}"


def gradients_differ(found: Tensor, whole: Tensor, leaves: Sequence[Tensor]) -> str | None:
    """Say how the gradients of some weighted sum of the elements differ."""
    weights = torch.arange(whole.numel(), dtype=whole.dtype).view(whole.shape).sin()
    for x, a, b in zip(
        leaves, *(_gradients(y, leaves, weights) for y in (found, whole)), strict=True
    ):
        fault = differs(a, b)
        if fault:
            return f"gradient of {tuple(x.shape)} {fault}"
    return None


def _gradients(y: Tensor, leaves: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad(
        y, leaves, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
