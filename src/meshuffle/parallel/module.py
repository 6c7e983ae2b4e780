"""One rank's model: its parts of the parameters, under the model's own names, and its code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from meshuffle.errors import ModelError
from meshuffle.graph import Graph, capture
from meshuffle.layout.assign import Assignment, assign
from meshuffle.layout.call import Program
from meshuffle.layout.layout import Shard
from meshuffle.parallel import printout
from meshuffle.parallel.batch_norm import exchange_handle
from meshuffle.parallel.code import Code, stages_of
from meshuffle.parallel.draws import Draw
from meshuffle.parallel.lower import lower_stages
from meshuffle.parallel.moves import Move
from meshuffle.parallel.parts import cut_part, gather_named, join_parts
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.sync_norm import SyncNorm
from meshuffle.planner.costs import estimated, per_rank
from meshuffle.planner.cut import choose_cuts, cuts_at, cuts_like

_HOME = "tp"  # the submodule that holds conversions


@dataclass
class _Mode:
    """What a module runs in train or in eval mode; `written` has this rank's stages."""

    assignment: Assignment
    places: tuple[int, ...]
    codes: list[Code]
    written: dict[int, fx.GraphModule]
    spec: Any

    def __post_init__(self) -> None:
        self.runs = {stage: type(written).forward for stage, written in self.written.items()}


class Parallel(nn.Module):
    """A model split within its layers, or cut into stages; on each rank an ordinary module.

    It takes and returns what the model does: whole tensors of one replica's batch. One that is cut
    has the parameters of this rank's stages alone, and `pipeline.Pipeline` runs it.

    Args:
        model: on any device. On `meta`, parameters are empty until weights are loaded.
        example: inputs of a replica's batch; only shapes and dtypes count.
        tp: ranks along the axis; `rank` is this one.
        prefer: the dimension that layouts prefer; None chooses per op.
        dp: replicas whose batch statistics are joined.
        device: where this rank computes.
        num_stages: stages of the pipeline; `stages` are this rank's.
        costs: what `choose_cuts` balances, where `cuts` does not say where to cut.
        cuts: see `Plan`.

    Attributes:
        shards: the layout of each split parameter and buffer, by name.
        partial: names of parameters whose gradients must be summed over `tp`.
        stages_of: by name, the stages that have a parameter or buffer.
        cuts: where it is cut; see `Plan`.
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
        num_stages: int = 1,
        stages: Sequence[int] = (0,),
        costs: Callable[[Program], Mapping[str, float]] = estimated,
        cuts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._share(nn.Module())
        self._tp, self._rank, self._prefer, self._dp = tp, rank, prefer, dp
        self.device = device or torch.device("cpu")
        self._example = tuple(torch.empty_like(x, device="cpu") for x in example)
        self._skeleton = [_without_values(model)]  # in a list: not a submodule
        self.num_stages, self.stages = num_stages, tuple(stages)
        self.pipeline: Any = None
        self.forward_backward: Any = None  # see `parallelize`
        self._modes: dict[bool, _Mode] = {}
        self._ranks: Ranks | None = None
        training = model.training
        graph = capture(self._skeleton[0], self._example, train=training)
        assignment = assign(graph, tp, batch=example[0].shape[0], prefer=prefer)
        places = cuts_at(assignment.program, cuts) if cuts else None
        if places is None and num_stages > 1:
            seconds = per_rank(assignment, costs(assignment.program))
            places = choose_cuts(assignment.program, seconds, num_stages)
        self.cuts = tuple(assignment.program.calls[i].node.name for i in places or ())
        codes = lower_stages(assignment, rank, places or (), replicas=dp, device=self.device)
        self.shards: dict[str, Shard] = {k: v for code in codes for k, v in code.stored.items()}
        self.stages_of = stages_of(model, codes)
        self._register(model, graph)
        terms = {id(p) for n, p in self._all_parameters() if any(n in c.partial for c in codes)}
        self.partial = frozenset(n for n, p in self._all_parameters() if id(p) in terms)
        self._install(graph, assignment, places or (), codes, training)
        self.train(training)

    def _share(self, root: nn.Module) -> None:
        """Let parameters, buffers and parts be those of `root`, which the code runs on.

        A model may have a part that has the name of something of this class: `stages`, `pipeline`.
        """
        self._root = [root]  # in a list: not a submodule
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = root.__dict__[kind]

    def _register(self, model: nn.Module, graph: Graph) -> None:
        """Give this module the model's parameters and buffers, or this rank's parts of them."""
        known = set(graph.names.values())
        made: dict[int, Tensor] = {}
        parameters = [p for p in model.named_parameters(remove_duplicate=False) if self.has(p[0])]
        buffers = [b for b in model.named_buffers(remove_duplicate=False) if self.has(b[0])]
        for name, tensor in [*parameters, *buffers]:
            if id(tensor) not in made or name in known:
                made[id(tensor)] = self._part(name, tensor)
        names = {id(tensor): name for name, tensor in [*parameters, *buffers] if name in known}
        for name, tensor in [*parameters, *buffers]:  # a tied tensor has several names
            if (shard := self.shards.get(names.get(id(tensor), ""))) is not None:
                self.shards[name] = shard
        persistent = set(model.state_dict(keep_vars=True))
        for name, tensor in parameters:
            self._home_of(name).register_parameter(name.rpartition(".")[2], made[id(tensor)])  # type: ignore[arg-type]
        for name, tensor in buffers:
            self._home_of(name).register_buffer(
                name.rpartition(".")[2], made[id(tensor)], persistent=name in persistent
            )
        for name in known - {name for name, _ in [*parameters, *buffers]}:
            if self.has(name) and name in graph.program.constants:
                self._constant(name, graph)

    def has(self, name: str) -> bool:
        """Tell whether this rank's stages have a parameter, buffer or constant."""
        return not self.stages_of.get(name, frozenset((0,))).isdisjoint(self.stages)

    def _all_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter), a tied one under each of its names."""
        return list(self.named_parameters(remove_duplicate=False))

    def _constant(self, name: str, graph: Graph) -> None:
        value = graph.program.constants[name]
        if value.device.type == "meta":
            raise ModelError(
                f"the model makes the constant {name} on the meta device; build it on the CPU"
            )
        home = self._home_of(name)
        own = self.cut(name, value).to(self.device)
        home.register_buffer(name.rpartition(".")[2], own, persistent=False)

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        part = tensor.detach()
        if name in self.shards:
            part = self.cut(name, part)
        if part.device.type == "meta":
            part = torch.empty_like(part, device=self.device)
        part = part.to(self.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(part, requires_grad=tensor.requires_grad)
        return part.clone() if part is tensor else part

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor that has the layout of `name`.

        Raises:
            RuntimeError: it has another size.
        """
        shard = self.shards.get(name)
        return whole if shard is None else cut_part(whole, shard, self._rank)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of which each rank has the part that `cut` gives.

        All ranks of the `tp` axis call it; it sends where `name` is split.
        """
        shard = self.shards.get(name)
        if shard is None:
            return part
        assert self._ranks is not None
        return join_parts(part.detach(), shard, self._ranks.tp)

    def _home_of(self, name: str) -> nn.Module:
        home = self._root[0]
        for part in name.split(".")[:-1]:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        return home

    def _install(
        self,
        graph: Graph,
        assignment: Assignment,
        places: tuple[int, ...],
        codes: list[Code],
        training: bool,
    ) -> None:
        home = _HOME if training else f"{_HOME}_eval"
        root = self._root[0]
        if hasattr(root, home):
            raise ModelError(f"the model has a part named '{home}', which is meant for ours")
        holder = nn.Module()
        root.add_module(home, holder)
        written = {}
        for stage in self.stages:
            code = codes[stage]
            for name, module in code.modules.items():
                holder.add_module(name, module)
            for node in code.graph.nodes:
                if node.op == "call_module":
                    node.target = f"{home}.{node.target}"
            written[stage] = fx.GraphModule(root, code.graph)
        spec = graph.program.call_spec.out_spec
        self._modes[training] = _Mode(assignment, places, codes, written, spec)
        holder.train(training)
        if self._ranks is not None:
            self.bind(self._ranks)

    def bind(self, ranks: Ranks) -> Parallel:
        """Let the conversions run in these groups."""
        self._ranks = ranks
        for module in self.modules():
            if isinstance(module, Move):
                module.group = ranks.tp
            elif isinstance(module, SyncNorm):
                module.handle = exchange_handle(ranks.over_tp if module.over_tp else ranks.over_dp)
            elif isinstance(module, Draw):
                module.state = ranks.draws
        return self

    def attach(self, pipeline: Any) -> None:
        """Let `pipeline` run this module's stages."""
        self.__dict__["pipeline"] = pipeline  # also where the model has a part of that name

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        """Return a module with parameters and buffers of its own, and the same code and ranks."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for key, value in vars(self).items():
            copied.__dict__[key] = value.copy() if isinstance(value, dict) else value
        root, shared = nn.Module(), (_HOME, f"{_HOME}_eval")
        for kind in ("_parameters", "_buffers"):
            root.__dict__[kind] = copy.deepcopy(vars(self)[kind], memo)
        root._non_persistent_buffers_set |= self._non_persistent_buffers_set
        for name, part in self._modules.items():
            root._modules[name] = part if name in shared else copy.deepcopy(part, memo)
        copied._share(root)
        copied.attach(self.pipeline and self.pipeline.on(copied))
        return copied

    def train(self, mode: bool = True) -> Parallel:
        """Switch between the code of train and of eval mode; the other is made when first asked."""
        super().train(mode)
        if mode not in self._modes:
            with torch.inference_mode(False):
                self._add_mode(mode)
        return self

    def _add_mode(self, mode: bool) -> None:
        graph = capture(self._skeleton[0], self._example, train=mode)
        batch = self._example[0].shape[0]
        options = {"batch": batch, "prefer": self._prefer, "stored": self.shards}
        assignment = assign(graph, self._tp, **options)  # type: ignore[arg-type]
        places = cuts_like(assignment.program, self.stages_of, self.num_stages)
        codes = lower_stages(
            assignment,
            self._rank,
            places,
            replicas=self._dp,
            device=self.device,
            stored=dict(self.shards),
        )
        self._install(graph, assignment, places, codes, mode)

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns, whole on every rank; a pipeline's is without gradient."""
        if self.num_stages == 1:
            return self.run_stage(0, *inputs)
        if self.pipeline is None:
            raise RuntimeError("a model that is cut into stages is run by pipeline.Pipeline")
        return pytree.tree_unflatten(self.pipeline.whole(*inputs), self._modes[self.training].spec)

    def run_stage(self, stage: int, *arguments: Any) -> Any:
        """Return what a stage of this rank sends on; of the last one, what the model returns.

        Args:
            arguments: of the first stage the model's inputs; of others the number of samples, and
                what the stage before sends.
        """
        mode = self._modes[self.training]
        result = mode.runs[stage](self._root[0], *arguments)
        return pytree.tree_unflatten(result, mode.spec) if stage + 1 == self.num_stages else result

    @property
    def assignment(self) -> Assignment:
        """The layouts of the current mode."""
        return self._modes[self.training].assignment

    @property
    def codes(self) -> list[Code]:
        """The calls of all stages in the current mode, with what they send."""
        return self._modes[self.training].codes

    @property
    def is_main(self) -> bool:
        """True on the one rank that should print and write."""
        return self._ranks is None or self._ranks.mesh.get_rank() == 0

    @property
    def kept_share(self) -> float:
        """The part of the model's parameters, by elements, that this rank keeps."""
        whole = sum(p.numel() for p in self._skeleton[0].parameters())
        return sum(p.numel() for p in self.parameters()) / max(1, whole)

    def summary(self) -> str:
        """Return what is split, and what a step sends, in a few lines."""
        return printout.summary(
            self.assignment, self.codes, self._tp, self.num_stages, self.kept_share
        )

    def codes_for(self, batch: int) -> list[Code]:
        """Return `codes` for another number of samples of a replica: for what they send."""
        mode = self._modes[self.training]
        if batch == mode.assignment.program.batch:
            return mode.codes
        again = mode.assignment.resized(batch)
        return lower_stages(
            again, self._rank, mode.places, replicas=self._dp, stored=dict(self.shards)
        )

    @property
    def graph_modules(self) -> list[fx.GraphModule]:
        """The current mode's code as torch.fx knows it; it shares this module's parameters."""
        return list(self._modes[self.training].written.values())

    @property
    def code(self) -> str:
        """The current mode's code, a line per call; conversions say from what to what."""
        return printout.code(self.graph_modules, self._root[0], _HOME)

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
        self.load_state_dict({name: self.cut(name, whole) for name, whole in own.items()})


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are never filled, and so take no memory.

    On the CPU and not on `meta`, where constants that the model makes have no values.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="cpu")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)
