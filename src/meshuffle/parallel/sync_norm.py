"""Batch norm of a lowered model whose samples or rows lie on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshuffle.parallel.batch_norm import joint_batch_norm, update_running


class SyncNorm(nn.Module):
    """Normalises with the statistics of all ranks' values together; training only.

    Parameters and buffers are the model's, passed in.

    Args:
        over_tp: over the `tp` axis and its replicas; otherwise over the replicas alone.
        momentum, eps: as of the model's layer.
    """

    handle: int

    def __init__(self, over_tp: bool, momentum: float, eps: float) -> None:
        super().__init__()
        self.over_tp, self.momentum, self.eps = over_tp, momentum, eps

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> Tensor:
        """Return `x` (N, C, …) normalised, and update the running statistics."""
        return joint_batch_norm(
            x, weight, bias, running_mean, running_var, self.momentum, self.eps, self.handle
        )

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

    Of one value per channel torch's running variance would be 0 / 0.
    """
    if x.numel() > x.shape[1]:
        running = (running_mean, running_var)
        return torch.batch_norm(x, weight, bias, *running, True, momentum, eps, cudnn)
    if running_mean is not None and running_var is not None and x.numel():
        mean_C = x.detach().reshape(-1)
        one = torch.ones((), dtype=x.dtype, device=x.device)
        update_running(running_mean, running_var, mean_C, torch.zeros_like(mean_C), one, momentum)
    return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, cudnn)
