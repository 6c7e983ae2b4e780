"""One rank's model: its parts of the parameters, under the model's own names, and its code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from meshuffle.comm.exchange import Exchange
from meshuffle.errors import ModelError
from meshuffle.graph import Graph, capture
from meshuffle.graph.capture import named_tensors, tied_names
from meshuffle.graph.own_gradients import refuse_own_gradients
from meshuffle.layout.assign import Assignment, assign
from meshuffle.layout.program import Program
from meshuffle.parallel import printout
from meshuffle.parallel.batch_norm import SyncNorm, exchange_handle
from meshuffle.parallel.code import StageCode, stages_of
from meshuffle.parallel.lower import lower_stages
from meshuffle.parallel.random_masks import Draw
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.redistribute import Redistribute
from meshuffle.planner.costs import estimated, per_rank
from meshuffle.planner.cut import choose_cuts, cuts_at, cuts_like

_HOME = "tp"  # the submodule that holds redistributions
Costs = Callable[[Program], Mapping[str, float]]
"""Seconds of each call of a program, by name."""


@dataclass
class _Mode:
    """What a module runs in train or in eval mode.

    Attributes:
        assignment: the layouts.
        cuts: how many calls lie in front of each pipeline cut.
        codes: the code of every stage.
        spec: the structure of the model's outputs.
        graph_modules, forwards: the modules of this rank's stages, by number, and what they run.
    """

    assignment: Assignment
    cuts: tuple[int, ...]
    codes: list[StageCode]
    spec: Any
    graph_modules: dict[int, fx.GraphModule] = field(default_factory=dict)
    forwards: dict[int, Callable[..., Any]] = field(default_factory=dict)


class Parallel(RankModule):
    """A captured model: replicated, split within its layers, or cut into stages.

    It takes and returns what the model does: whole tensors of one replica's batch. A model that is
    cut has the parameters of this rank's stages alone, and `pipeline.Pipeline` runs it.

    Args:
        model: on any device. On `meta`, parameters are empty until weights are loaded.
        example: inputs of a replica's batch; only shapes and dtypes count.
        tp: ranks along the axis.
        rank: this one's number along the axis.
        prefer: the dimension that layouts prefer; None chooses per op.
        dp: replicas whose batch statistics are joined.
        device: where this rank computes.
        num_stages: stages of the pipeline; `stages` are this rank's.
        costs: the seconds that `choose_cuts` balances, where `cuts` does not say where to cut.
        cuts: see `Plan`.

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
        costs: Costs = estimated,
        cuts: Sequence[str] = (),
    ) -> None:
        super().__init__(nn.Module(), rank, device)
        self._tp, self._prefer, self._dp = tp, prefer, dp
        if model.training:
            refuse_own_gradients(model)  # the skeleton's parameters have no hooks
        self._example = tuple(_empty(x) for x in example)
        self._skeleton = [_without_values(model)]  # in a list: not a submodule
        self.num_stages, self.stages = num_stages, tuple(stages)
        self._modes: dict[bool, _Mode] = {}

        mode = self._lower(model.training, lambda made: self._choose_cuts(made, costs, cuts))
        program = mode.assignment.program
        self.cuts = tuple(program.calls[i].node.name for i in mode.cuts)
        self.stages_of = stages_of(model, mode.codes)
        self._register(model, program.graph, mode.codes)
        self._frozen = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)
        self._install(model.training, mode)
        self.train(model.training)

    def _choose_cuts(
        self, assignment: Assignment, costs: Costs, names: Sequence[str]
    ) -> tuple[int, ...]:
        """Return how many calls lie in front of each cut: where the plan says, or balanced."""
        known = cuts_at(assignment.program, names) if names else None
        if known is not None or self.num_stages == 1:
            return known or ()
        seconds = per_rank(assignment, costs(assignment.program))
        return choose_cuts(assignment.program, seconds, self.num_stages)

    def _lower(self, training: bool, cut: Callable[[Assignment], tuple[int, ...]]) -> _Mode:
        """Capture, assign, cut and lower the model; parts that exist already stay as they are."""
        graph = capture(self._skeleton[0], self._example, train=training)
        assignment = assign(
            graph,
            self._tp,
            batch=len(self._example[0]),
            prefer=self._prefer,
            stored=self.shards,
            must_split=not self._modes,
        )
        cuts = cut(assignment)
        codes = self._stage_codes_of(assignment, cuts)
        return _Mode(assignment, cuts, codes, graph.program.call_spec.out_spec)

    def _stage_codes_of(self, assignment: Assignment, cuts: Sequence[int]) -> list[StageCode]:
        return lower_stages(
            assignment,
            self._rank,
            cuts,
            replicas=self._dp,
            device=self.device,
            stored=self.shards if self._modes else None,
        )

    def _register(self, model: nn.Module, graph: Graph, codes: Sequence[StageCode]) -> None:
        """Give this module the model's parameters and buffers, or this rank's parts of them."""
        tied, persistent = tied_names(model), set(model.state_dict(keep_vars=True))
        for code in codes:
            self.shards |= code.stored
        self.shards |= {n: self.shards[first] for n, first in tied.items() if first in self.shards}
        terms = {name for code in codes for name in code.summed_over_tp}
        made: dict[str, Tensor] = {}
        own = {name: tensor for name, tensor in named_tensors(model) if self.has(name)}
        for name, tensor in own.items():
            first = tied.get(name, name)
            if first not in made:
                made[first] = self._part(name, tensor)
            self._keep(name, made[first], name in persistent)
        named = self.named_parameters(remove_duplicate=False)
        self.summed_over_tp = frozenset(name for name, _ in named if tied.get(name, name) in terms)

    def _keep_constants(self, graph: Graph, codes: Sequence[StageCode]) -> None:
        """Keep the tensors that this rank's stages read and the model does not register."""
        for name in {n for stage in self.stages for n in codes[stage].names} & set(graph.constants):
            value = graph.constants[name]
            if value.device.type == "meta":
                raise ModelError(
                    f"the model makes the constant {name} on the meta device; build it on the CPU"
                )
            self._keep(name, self._part(name, value), False)

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        part = self.part_of(name, tensor.detach())
        if part.device.type == "meta":
            part = torch.empty_like(part, device=self.device)
        part = part.to(self.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(part, requires_grad=tensor.requires_grad)
        return part

    def _keep(self, name: str, tensor: Tensor, persistent: bool) -> None:
        """Register a parameter or buffer under the model's name."""
        *path, leaf = name.split(".")
        home = self._root[0]
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            home.register_parameter(leaf, tensor)
        else:
            home.register_buffer(leaf, tensor, persistent=persistent)

    def _install(self, training: bool, mode: _Mode) -> None:
        """Write the code of this rank's stages, with its redistributions under a name of ours."""
        home, root, holder = _HOME if training else f"{_HOME}_eval", self._root[0], nn.Module()
        if hasattr(root, home):
            raise ModelError(f"the model has a part named '{home}', which is meant for ours")
        root.add_module(home, holder)
        self._keep_constants(mode.assignment.program.graph, mode.codes)
        for stage in self.stages:
            code = mode.codes[stage]
            for name, module in code.modules.items():
                holder.add_module(name, module)
            for node in code.graph.nodes:
                if node.op == "call_module":
                    node.target = f"{home}.{node.target}"
            mode.graph_modules[stage] = fx.GraphModule(root, code.graph)
            mode.forwards[stage] = type(mode.graph_modules[stage]).forward
        self._modes[training] = mode
        holder.train(training)
        if self._ranks is not None:
            self.bind(self._ranks)

    def bind(self, ranks: Ranks) -> Parallel:
        """Let the redistributions run in these groups."""
        self._ranks = ranks
        for module in self.modules():
            if isinstance(module, Redistribute):
                module.group = ranks.tp
            elif isinstance(module, Draw):
                module.state = ranks.draw_state
        self.join_norms(ranks.over_tp, ranks.over_dp)
        return self

    def join_norms(self, over_tp: Exchange, over_dp: Exchange) -> None:
        """Let batch norms join their statistics by these."""
        for module in self.modules():
            if isinstance(module, SyncNorm):
                module.handle = exchange_handle(over_tp if module.over_tp else over_dp)

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
        copied._keep_in(root)
        if self.pipeline is not None:
            copied.attach(self.pipeline.for_copy(copied))
        return copied

    def train(self, mode: bool = True) -> Parallel:
        """Switch between the code of train and of eval mode; the other is made when first asked.

        A whole model needs none in eval mode, where replicas have nothing to say to each other.
        """
        super().train(mode)
        if mode not in self._modes and (mode or self._tp * self.num_stages > 1):
            with torch.inference_mode(False):
                stages, num = self.stages_of, self.num_stages
                self._install(
                    mode, self._lower(mode, lambda made: cuts_like(made.program, stages, num))
                )
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns, whole on every rank; a pipeline's is without gradient."""
        if self.num_stages == 1:
            return self.run_stage(0, *inputs)
        if self.pipeline is None:
            raise RuntimeError("a model that is cut into stages is run by pipeline.Pipeline")
        return pytree.tree_unflatten(self.pipeline.whole(*inputs), self._modes[self.training].spec)

    def run_stage(self, stage: int, *arguments: Any) -> Any:
        """Return what a stage of this rank sends on; for the last stage, what the model returns.

        Args:
            arguments: the model's inputs for the first stage; for others the number of samples, and
                the values that the stage before sends.
        """
        if self.training not in self._modes:
            return self._as_written(*arguments)
        mode = self._modes[self.training]
        self._refuse_unfrozen()
        result = mode.forwards[stage](self._root[0], *arguments)
        return pytree.tree_unflatten(result, mode.spec) if stage + 1 == self.num_stages else result

    def _as_written(self, *inputs: Tensor) -> Any:
        """Return what the model itself returns in eval mode, with this module's tensors."""
        model = self._skeleton[0].eval()
        names = {name for name, _ in named_tensors(model)}
        own = (*self.named_parameters(remove_duplicate=False), *self.named_buffers())
        return functional_call(model, {n: x for n, x in own if n in names}, inputs)

    def _refuse_unfrozen(self) -> None:
        """Refuse parameters that are trained now and were not when the model was captured."""
        if not self._frozen or not self.training or torch.compiler.is_compiling():
            return
        late = [n for n, p in self.named_parameters() if p.requires_grad and n in self._frozen]
        if late:
            raise ModelError(
                f"{late[0]} is to be trained now, and was frozen when the model was captured; "
                "unfreeze before `parallelize`, or call it anew"
            )

    @property
    def assignment(self) -> Assignment:
        """The layouts of the current mode."""
        return self._mode.assignment

    @property
    def _mode(self) -> _Mode:
        """The current mode, or train mode where eval mode runs the model as it is written."""
        return self._modes.get(self.training) or self._modes[True]

    @property
    def stage_codes(self) -> list[StageCode]:
        """The calls of all stages in the current mode, with what they send."""
        return self._mode.codes

    @property
    def kept_fraction(self) -> float:
        """The part of the model's parameters, by elements, that this rank keeps."""
        whole = sum(p.numel() for p in self._skeleton[0].parameters())
        return sum(p.numel() for p in self.parameters()) / max(1, whole)

    def summary(self) -> str:
        """Return what is split, and what a step sends, in a few lines."""
        return printout.summary(self.assignment, self.stage_codes, self.kept_fraction)

    def stage_codes_for(self, batch: int) -> list[StageCode]:
        """Return `stage_codes` for another number of samples of a replica: for what they send."""
        mode = self._mode
        if batch == mode.assignment.program.batch:
            return mode.codes
        return self._stage_codes_of(mode.assignment.resized(batch), mode.cuts)

    @property
    def graph_modules(self) -> list[fx.GraphModule]:
        """The current mode's code as torch.fx knows it; it shares this module's parameters."""
        return list(self._mode.graph_modules.values())

    @property
    def code(self) -> str:
        """The current mode's code, a line per call; a redistribution names both of its layouts."""
        return printout.code(self.graph_modules, self._root[0], _HOME)


def _empty(x: Tensor) -> Tensor:
    """Return memory that is never filled, contiguous: code that is captured is for any format."""
    return torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format)


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are never filled, and so take no memory.

    On the CPU and not on `meta`, where constants that the model makes have no values.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = _empty(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    copied = copy.deepcopy(model, memo)
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        module.training = original.training  # torch.fx's modules forget it
    return copied
