"""Functions that a rewritten or lowered program calls when it runs, beside ATen's ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


def weighted_part(x: Tensor, part: float) -> Tensor:
    """Return the mean of a rank's part times its fraction of the whole; 0 of an empty part."""
    return x * part if part else x.nan_to_num(0.0)


def without_autocast(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `op` as in a region where the model switches autocast off."""
    device = next((x.device.type for x in pytree.tree_leaves(args) if isinstance(x, Tensor)), "cpu")
    with torch.autocast(device, enabled=False):
        return op(*args, **kwargs)


class WithoutAutocast(nn.Module):
    """A module in a region where the model switches autocast off."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        """Return what the module does."""
        return without_autocast(self.module, *args)


def fraction(count: int, batch: int) -> float:
    """Return `count` as a fraction of `batch`, which may be empty."""
    return count / max(1, batch)
