"""Functions that a rewritten or lowered program calls when it runs, beside ATen's ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reorder(x: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Return `x` with its index `index[j]` of `dim` at j, a permutation."""
    return x.index_select(dim, torch.tensor(index, device=x.device))


def weighted(
    x: Tensor, dim: int, index: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
) -> Tensor:
    """Return the sum of some indices of a dim, index[k][i] for result i, each with its weight."""
    places, factors = torch.tensor(index, device=x.device), x.new_tensor(weights)
    factors = factors.view(*places.shape, *[1] * (x.dim() - dim - 1))
    total = x.index_select(dim, places[0]).mul_(factors[0])
    for place, factor in zip(places[1:], factors[1:], strict=True):
        total.addcmul_(x.index_select(dim, place), factor)
    return total


def fraction(count: int, batch: int) -> float:
    """Return `count` as a fraction of `batch`, which may be empty."""
    return count / max(1, batch)
