"""This rank's part of a model that only infers: split within its layers, or cut into stages."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from meshuffle.comm.group import RankEnv
from meshuffle.comm.heap import return_freed_blocks
from meshuffle.data import Preprocess
from meshuffle.parallel.build import build
from meshuffle.parallel.place import join_ranks
from meshuffle.planner.plan import Plan


class Normalised(nn.Module):
    """`Preprocess.normalise` in front of a network, so that each rank does its part of that."""

    factor: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.reverse = network, preprocess.channels == "BGR"
        factor, shift = preprocess.affine()
        self.register_buffer("factor", factor[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the outputs for uint8 RGB images (N, 3, h, w)."""
        images_NCHW = images_NCHW.flip(1) if self.reverse else images_NCHW
        x_NCHW = torch.addcmul(self.shift, images_NCHW.to(torch.float32), self.factor)
        outputs: Tensor = self.network(x_NCHW)
        return outputs


def own_part(
    network: nn.Module, example: Tensor, plan: Plan, env: RankEnv, device: torch.device
) -> nn.Module:
    """Return this rank's part of a model, for its forward in eval mode.

    Args:
        network: with its weights; it computes no gradients any more.
        example: a replica's batch; only shape and dtype count.
        env: of the ranks that are joined.
    """
    network.eval().requires_grad_(False)
    if not plan.is_split:  # in eval mode replicas have nothing to say to each other
        return network.to(device)
    ranks = join_ranks(plan, env, device)
    if device.type == "cpu":
        return_freed_blocks(4 << 20)  # who splits a network lacks memory rather than time
    alone = dataclasses.replace(plan, dp=1)  # in eval mode replicas share no statistics
    part = build(network, (example,), alone, ranks, device)
    if device.type == "cpu":  # out of the file, which may be written meanwhile
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return part
