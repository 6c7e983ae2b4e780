"""One rank's model: its parts of the parameters, under the model's own names, and its code."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from meshuffle.errors import ModelError
from meshuffle.graph import Graph, capture
from meshuffle.layout.assign import Assignment, assign
from meshuffle.layout.layout import Shard
from meshuffle.parallel.batch_norm import exchange_handle
from meshuffle.parallel.draws import Draw
from meshuffle.parallel.lower import Code, lower
from meshuffle.parallel.moves import Move
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.sync_norm import SyncNorm

_HOME = "tp"  # the submodule that holds conversions


class Parallel(nn.Module):
    """A model split within its layers; on each rank an ordinary module.

    It takes and returns what the model does: whole tensors of one replica's batch.

    Args:
        model: on any device. On `meta`, parameters are empty until weights are loaded.
        example: inputs of a replica's batch; only shapes and dtypes count.
        tp: ranks along the axis; `rank` is this one.
        prefer: the dimension that layouts prefer; None chooses per op.
        dp: replicas whose batch statistics are joined.
        device: where this rank computes.

    Attributes:
        shards: the layout of each split parameter and buffer, by name.
        partial: names of parameters whose gradients must be summed over `tp`.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Tensor, ...],
        tp: int,
        rank: int,
        *,
        prefer: str | None = None,
        dp: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._tp, self._rank, self._prefer, self._dp = tp, rank, prefer, dp
        self._device = device or torch.device("cpu")
        self._example = tuple(x.to("meta") for x in example)
        self._skeleton = [copy.deepcopy(model).to("meta")]  # in a list: not a submodule
        self._forwards: dict[bool, Any] = {}
        self._ranks: Ranks | None = None
        training = model.training
        graph = capture(self._skeleton[0], self._example, train=training)
        assignment = assign(graph, tp, batch=example[0].shape[0], prefer=prefer)
        code = lower(assignment, rank, replicas=dp, device=self._device)
        self.shards: dict[str, Shard] = dict(code.stored)
        self._register(model, graph)
        self.partial = frozenset(code.partial)
        self._install(graph, assignment, code, training)
        self.train(training)

    def _register(self, model: nn.Module, graph: Graph) -> None:
        """Give this module the model's parameters and buffers, or this rank's parts of them."""
        known = set(graph.names.values())
        made: dict[int, Tensor] = {}
        parameters = list(model.named_parameters(remove_duplicate=False))
        buffers = list(model.named_buffers(remove_duplicate=False))
        for name, tensor in [*parameters, *buffers]:
            if id(tensor) not in made or name in known:
                made[id(tensor)] = self._part(name, tensor)
        persistent = set(model.state_dict(keep_vars=True))
        for name, tensor in parameters:
            self._home_of(name).register_parameter(name.rpartition(".")[2], made[id(tensor)])  # type: ignore[arg-type]
        for name, tensor in buffers:
            self._home_of(name).register_buffer(
                name.rpartition(".")[2], made[id(tensor)], persistent=name in persistent
            )
        for name in known - set(dict(self.named_parameters())) - set(dict(self.named_buffers())):
            tied = [n for n, t in [*parameters, *buffers] if n == name]
            if not tied:
                self._constant(name, graph)

    def _constant(self, name: str, graph: Graph) -> None:
        value = graph.program.constants[name]
        if value.device.type == "meta":
            raise ModelError(
                f"the model makes the constant {name} on the meta device; build it on the CPU"
            )
        home = self._home_of(name)
        home.register_buffer(name.rpartition(".")[2], value.to(self._device), persistent=False)

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        part = tensor.detach()
        if name in self.shards:
            part = self.cut(name, part)
        if part.device.type == "meta":
            part = torch.empty_like(part, device=self._device)
        part = part.to(self._device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(part, requires_grad=tensor.requires_grad)
        return part.clone() if part is tensor else part

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor that has the layout of `name`."""
        shard = self.shards.get(name)
        if shard is None:
            return whole
        index = torch.tensor(shard.owners[self._rank], device=whole.device)
        return whole.index_select(shard.dim, index)

    def _home_of(self, name: str) -> nn.Module:
        home: nn.Module = self
        for part in name.split(".")[:-1]:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        return home

    def _install(self, graph: Graph, assignment: Assignment, code: Code, training: bool) -> None:
        home = _HOME if training else f"{_HOME}_eval"
        if hasattr(self, home):
            raise ModelError(f"the model has a part named '{home}', which is meant for ours")
        holder = nn.Module()
        self.add_module(home, holder)
        for name, module in code.modules.items():
            holder.add_module(name, module)
        for node in code.graph.nodes:
            if node.op == "call_module":
                node.target = f"{home}.{node.target}"
        written = fx.GraphModule(self, code.graph)
        spec = graph.program.call_spec.out_spec
        self._forwards[training] = (written, type(written).forward, spec, assignment, code)
        holder.train(training)
        if self._ranks is not None:
            self.bind(self._ranks)

    def bind(self, ranks: Ranks) -> Parallel:
        """Let the conversions run in these groups."""
        self._ranks = ranks
        for module in self.modules():
            if isinstance(module, Move):
                module.ranks = ranks
            elif isinstance(module, SyncNorm):
                module.handle = exchange_handle(ranks.over_tp if module.over_tp else ranks.over_dp)
            elif isinstance(module, Draw):
                module.state = ranks.draws
        return self

    def train(self, mode: bool = True) -> Parallel:
        """Switch between the code of train and of eval mode; the other is made when first asked."""
        super().train(mode)
        if mode not in self._forwards:
            graph = capture(self._skeleton[0], self._example, train=mode)
            batch = self._example[0].shape[0]
            options = {"batch": batch, "prefer": self._prefer, "stored": self.shards}
            assignment = assign(graph, self._tp, **options)  # type: ignore[arg-type]
            code = lower(
                assignment,
                self._rank,
                replicas=self._dp,
                device=self._device,
                stored=dict(self.shards),
            )
            self._install(graph, assignment, code, mode)
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns, whole on every rank."""
        _, run, spec, _, _ = self._forwards[self.training]
        return pytree.tree_unflatten(run(self, *inputs), spec)

    @property
    def assignment(self) -> Assignment:
        """The layouts of the current mode."""
        found: Assignment = self._forwards[self.training][3]
        return found

    @property
    def lowered(self) -> Code:
        """The calls of the current mode, with what they send."""
        found: Code = self._forwards[self.training][4]
        return found

    @property
    def graph_module(self) -> fx.GraphModule:
        """The current mode's code as torch.fx knows it; it shares this module's parameters."""
        found: fx.GraphModule = self._forwards[self.training][0]
        return found

    @property
    def code(self) -> str:
        """The current mode's code, a line per call."""
        return str(self.graph_module.code)

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Load this rank's parts of a state dict of the plain model.

        Raises:
            RuntimeError: as `load_state_dict`.
        """
        self.load_state_dict({name: self.cut(name, whole) for name, whole in tensors.items()})
