"""What the modules have in common that a rank runs: names, parts of tensors, who runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meshuffle.comm.exchange import Exchange
from meshuffle.layout.layout import Shard
from meshuffle.parallel.parts import gather_named, join_parts, take_part
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.runner import Runner


class RankModule(nn.Module):
    """One rank's model, under the model's own names.

    Args:
        root: the parameters, buffers and parts are its.
        rank: this one's number along the `tp` axis.
        device: where this rank computes.

    Attributes:
        shards: the layout of each split parameter and buffer, by name.
        summed_over_tp: names of parameters whose gradients must be summed over `tp`.
        stages_of: by name, the stages that have a parameter or buffer; it is in the first where it
            has none.
        num_stages, stages: how many stages there are, and this rank's.
        cuts: where it is cut; see `Plan`.
    """

    def __init__(self, root: nn.Module, rank: int = 0, device: torch.device | None = None) -> None:
        super().__init__()
        self._rank, self.device = rank, device or torch.device("cpu")
        self.num_stages = 1
        self.stages: tuple[int, ...] = (0,)
        self.cuts: tuple[str, ...] = ()
        self.shards: dict[str, Shard] = {}
        self.summed_over_tp: frozenset[str] = frozenset()
        self.stages_of: Mapping[str, frozenset[int]] = {}
        self.pipeline: Runner | None = None
        self.forward_backward: Callable[..., Tensor] = _no_steps  # see `parallelize`
        self._ranks: Ranks | None = None
        self._keep_in(root)  # last: a part of the model may have one of these names

    def _keep_in(self, root: nn.Module) -> None:
        """Let parameters, buffers and parts be those of `root`, which the code runs on."""
        self._root = [root]  # in a list: not a submodule
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = root.__dict__[kind]

    def bind(self, ranks: Ranks) -> RankModule:
        """Let it communicate in these groups."""
        raise NotImplementedError

    def join_norms(self, over_tp: Exchange, over_dp: Exchange) -> None:
        """Let batch norms join their statistics by these."""
        raise NotImplementedError

    def run_stage(self, stage: int, *arguments: Any) -> Any:
        """Return what a stage of this rank sends on; for the last stage, what the model returns."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Tell whether this rank's stages have a parameter, buffer or constant."""
        return not self.stages_of.get(name, frozenset((0,))).isdisjoint(self.stages)

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor that has the layout of `name`.

        Raises:
            RuntimeError: it has another size.
        """
        shard = self.shards.get(name)
        return whole if shard is None else take_part(whole, shard, self._rank)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of which each rank has the part that `part_of` gives.

        All ranks of the `tp` axis call it; it sends where `name` is split.
        """
        shard = self.shards.get(name)
        if shard is None:
            return part
        assert self._ranks is not None
        return join_parts(part.detach(), shard, self._ranks.tp)

    def attach(self, pipeline: Runner) -> None:
        """Let `pipeline` run this module's stages."""
        self.__dict__["pipeline"] = pipeline  # also where the model has a part of that name

    @property
    def is_main(self) -> bool:
        """True on the one rank that should print and write."""
        return self._ranks is None or self._ranks.mesh.get_rank() == 0

    def whole_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the plain model, on every rank; all of a replica call it."""
        whole = {name: self.whole(name, part) for name, part in self.state_dict().items()}
        if self.num_stages == 1 or self._ranks is None:
            return whole
        return gather_named(whole, self._ranks.pp, everywhere=True)

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Load this rank's parts of a state dict of the plain model.

        Raises:
            RuntimeError: as `load_state_dict`.
        """
        own = {name: whole for name, whole in tensors.items() if self.has(name)}
        self.load_state_dict({name: self.part_of(name, whole) for name, whole in own.items()})


def _no_steps(*_: Any) -> Tensor:
    raise RuntimeError("forward_backward is for models that `parallelize` made")
