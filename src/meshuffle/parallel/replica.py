"""A model that runs as it is written, a whole copy on each rank: where it cannot be captured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from meshuffle.comm.exchange import Exchange
from meshuffle.graph.capture import named_tensors
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.random_masks import key_dropout
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks


class Replica(RankModule):
    """The model itself, changed in place: its batch norms see the batch of all ranks.

    `nn.Dropout` drops what it does under every plan; other random numbers are each rank's own.

    Args:
        model: whole; parts in eval mode stay in it.
        device: where this rank computes.
        why: why it is not captured, for the user.
    """

    def __init__(self, model: nn.Module, device: torch.device, why: str) -> None:
        super().__init__(model.to(device), device=device)
        self.why = why
        self.stages_of = {name: frozenset((0,)) for name, _ in named_tensors(model)}
        modes = {name: part.training for name, part in model.named_modules()}
        self._frozen = [n for n, training in modes.items() if model.training and not training]
        self.training = model.training

    def bind(self, ranks: Ranks) -> Replica:
        """Let batch norms join over the replicas, and dropout draw what it does under any plan."""
        self.__dict__["_ranks"] = ranks
        self.join_norms(ranks.over_tp, ranks.over_dp)
        key_dropout(self._root[0], ranks.draw_state)
        return self

    def join_norms(self, over_tp: Exchange, over_dp: Exchange) -> None:
        """Let batch norms join their statistics over the replicas."""
        synchronise_batch_norm(self._root[0], over_dp)

    def train(self, mode: bool = True) -> Replica:
        """Switch all parts but those that were in eval mode from the beginning."""
        self.training = mode
        self._root[0].train(mode)
        for name in self._frozen:
            self._root[0].get_submodule(name).training = False
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns."""
        return self._root[0](*inputs)

    def run_stage(self, stage: int, *arguments: Any) -> Any:
        """Return what the model returns; it is its only stage."""
        return self._root[0](*arguments)

    def summary(self) -> str:
        """Say in a line that it is not captured, and why."""
        return f"it runs as it is written, since {self.why}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Replica:
        """Return one with a copy of the model; a pipeline runs the original alone."""
        copied = Replica(copy.deepcopy(self._root[0], memo), self.device, self.why)
        copied.__dict__ |= {"_ranks": self._ranks, "_frozen": self._frozen}
        return copied
