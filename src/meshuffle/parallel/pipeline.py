"""The pipeline of one rank: its stages, in the order of a schedule, over micro-batches of any size.

What crosses a cut goes from rank to rank of the same place on `tp` and `dp`, each tensor by itself,
in the layout that it has there. What is to arrive next is asked for one action ahead; sends are
waited for at the end of the step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from meshuffle.comm.group import new_group, wait
from meshuffle.comm.sent_bytes import labelled
from meshuffle.layout.layout import Replicate
from meshuffle.layout.mixing import is_per_sample
from meshuffle.layout.traffic import Crossing
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.runner import Inputs, Loss
from meshuffle.planner.cut import refuse_overlap
from meshuffle.planner.schedules import Action, Schedule, all_forward_all_backward

_MOST_CROSSING = 1024
_is_per_sample = functools.lru_cache(maxsize=4)(is_per_sample)


@dataclass
class _Kept:
    """What a stage keeps of a micro-batch between its forward and its backward.

    Attributes:
        given: the values that it took in.
        results: the values that it made and that a gradient comes back for; the last stage's loss.
        weights: computes the gradients of the weights, where that is done later.
    """

    given: list[Tensor]
    results: list[Tensor]
    weights: Callable[[], Any] | None = None


@dataclass
class _StepState:
    """A step in progress: what it needs, and which messages are under way."""

    sizes: Sequence[int]
    inputs: Inputs
    finish: Callable[[int, Any], Tensor | None]
    prepare: Callable[[int], None]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    here: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=dict)
    asked: dict[tuple[str, int, int], list[tuple[dist.Work, Tensor]]] = field(default_factory=dict)
    sent: dict[tuple[str, int, int], list[tuple[dist.Work, Tensor]]] = field(default_factory=dict)

    def wait(self, group: dist.ProcessGroup) -> None:
        """Wait until all that was sent has gone."""
        for key in list(self.sent):
            self.received(key, group)

    def received(self, key: tuple[str, int, int], group: dist.ProcessGroup) -> None:
        """Free what was sent, once the other stage has it."""
        for work, _ in self.sent.pop(key, ()):
            wait(work, group, "what was sent to another stage")


class Pipeline:
    """Runs this rank's stages of a model that is cut; a `Runner`.

    Args:
        module: with the stages that `schedule` gives this rank.
        ranks: the mesh.
        schedule: for any number of micro-batches; see `make_schedule`.
        edge_groups: a process group per cut and direction; None where the backend needs it (NCCL
            matches messages by their order, gloo by their number).
    """

    def __init__(
        self, module: RankModule, ranks: Ranks, schedule: Schedule, edge_groups: bool | None = None
    ) -> None:
        self.module, self.ranks, self.schedule = module, ranks, schedule
        if edge_groups is None:
            edge_groups = dist.get_backend(ranks.pp) == "nccl"
        module.attach(self)
        self._groups = self._make_groups() if edge_groups else {}
        if isinstance(module, Parallel):
            refuse_overlap(module.assignment.program, module.stages_of, schedule)
        self._tied = self._tied_groups()

    @property
    def has_last(self) -> bool:
        """True on the ranks that compute the loss."""
        return self.schedule.num_stages - 1 in self.module.stages

    @property
    def _captured(self) -> Parallel:
        assert isinstance(self.module, Parallel)  # one that runs as it is written has no stages
        return self.module

    # Process groups

    def _new_group(self, stages: Iterable[int]) -> dist.ProcessGroup | None:
        """Return the group of some stages at this place on `tp` and `dp`; None outside of it.

        All ranks make the groups of all places: torch names a group by how many there are, and
        ranks that have made different numbers of them wait for each other for ever.
        """
        own, joined = sorted({self.schedule.ranks[stage] for stage in stages}), None
        for place in self.ranks.mesh.mesh.flatten(1).T if len(own) > 1 else ():
            members = place[own].tolist()
            group = new_group(members)
            joined = group if dist.get_rank() in members else joined
        return joined

    def _make_groups(self) -> dict[tuple[str, int], dist.ProcessGroup]:
        groups = {}
        for stage in range(self.schedule.num_stages - 1):
            for key in (("F", stage), ("B", stage + 1)):
                if (group := self._new_group((stage, stage + 1))) is not None:
                    groups[key] = group
        return groups

    def _tied_groups(self) -> dict[str, dist.ProcessGroup]:
        """Return, by name, the groups of ranks that share a parameter."""
        stages_of = self.module.stages_of
        shared = sorted({tuple(sorted(stages)) for stages in stages_of.values()})
        groups = {frozenset(stages): self._new_group(stages) for stages in shared}
        tied = {}
        for name, parameter in self.module.named_parameters():
            group = groups[stages_of[name]]
            if parameter.requires_grad and group is not None:
                tied[name] = group
        return tied

    # Steps

    def train(
        self,
        sizes: Sequence[int],
        inputs: Inputs,
        loss: Loss,
        prepare: Callable[[int], None] = lambda _: None,
        before_last: Callable[[], None] = lambda: None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Go forward and backward through all micro-batches; see `Runner.train`."""
        step = _StepState(sizes, inputs, loss, prepare, around)
        schedule = self.schedule
        if len(sizes) != schedule.num_micro_batches:  # at the end of an epoch
            schedule = all_forward_all_backward(schedule.ranks, len(sizes))
        order = schedule.orders[self.ranks.pp_rank]
        last = max(i for i, action in enumerate(order) if action.work != "F")
        self._ask(step, order[0])
        for i, action in enumerate(order):
            if i + 1 < len(order):
                self._ask(step, order[i + 1])
            if i == last:
                before_last()
            self._do(step, action)
        step.wait(self.ranks.pp)

    @torch.no_grad()
    def whole(self, *inputs: Tensor) -> list[Tensor]:
        """Return the model's outputs for a batch of this replica, on all of its ranks.

        In eval mode the batch goes through in as many micro-batches as there are stages; in one in
        train mode, and where an op mixes samples.
        """
        module, program = self._captured, self._captured.assignment.program
        dims = [program.samples_dim_of(node.meta["val"]) for node in program.outputs()]
        can_cut = not module.training and None not in dims and _is_per_sample(program.graph)
        num = max(1, min(self.schedule.num_stages, len(inputs[0]))) if can_cut else 1
        parts = list(zip(*(x.tensor_split(num) for x in inputs), strict=True))
        results: list[list[Tensor]] = []

        def keep(_: int, result: Any) -> None:
            results.append([x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)])

        step = _StepState([len(part[0]) for part in parts], parts.__getitem__, keep, lambda _: None)
        for stage in module.stages:
            for i in range(len(parts)):
                self._ask(step, Action(stage, "F", i))
                self._forward(step, stage, i)
                step.kept.clear()
        step.wait(self.ranks.pp)
        outputs = []
        for k, (node, dim) in enumerate(zip(program.outputs(), dims, strict=True)):
            output = Crossing(node, Replicate(), has_grad=False)
            if results:
                x = (
                    torch.cat([part[k] for part in results], dim)
                    if dim is not None
                    else results[0][k]
                )
            else:
                shape = output.shape(program, 0, len(inputs[0]))
                x = torch.empty(shape, dtype=output.dtype, device=module.device)
            x = x.to(output.dtype).contiguous()
            dist.broadcast(x, group=self.ranks.pp, group_src=self.schedule.ranks[-1])
            outputs.append(x)
        return outputs

    def for_copy(self, module: nn.Module) -> Pipeline:
        """Return a runner of the same stages that calls `module`, a copy; for forwards alone."""
        assert isinstance(module, RankModule)
        (other := copy.copy(self)).module = module
        return other

    def _do(self, step: _StepState, action: Action) -> None:
        stage, work, i = action
        if work == "F":
            self._forward(step, stage, i)
        elif work == "B":
            self._backward(step, stage, i)
        elif work == "I":
            self._backward_to_inputs(step, stage, i)
        else:
            kept = step.kept.pop((stage, i))
            assert kept.weights is not None
            kept.weights()

    def _forward(self, step: _StepState, stage: int, i: int) -> None:
        given = list(step.inputs(i)) if stage == 0 else self._arrived(step, "F", stage - 1, i)
        if stage and torch.is_grad_enabled():
            for x, crossing in zip(given, self._crossing("F", stage - 1), strict=True):
                x.requires_grad_(crossing.has_grad)
        step.prepare(i)
        arguments = given if stage == 0 else [step.sizes[i], *given]
        with step.around():
            result = self.module.run_stage(stage, *arguments)
        if stage + 1 == self.schedule.num_stages:
            loss = step.finish(i, result)
            losses = [loss] if loss is not None and loss.requires_grad else []
            step.kept[stage, i] = _Kept(given, losses)
            return
        step.kept[stage, i] = _Kept(given, self._returning(result, stage))
        pairs = zip(result, self._crossing("F", stage), strict=True)
        values = [x.detach().to(crossing.dtype) for x, crossing in pairs]
        self._send(step, "F", stage, i, values)

    def _gradients(
        self, step: _StepState, stage: int, i: int
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the results of a forward that have gradients, and these; the loss has None."""
        kept = step.kept[stage, i]
        if stage + 1 == self.schedule.num_stages:
            return kept.results, None
        arrived = self._arrived(step, "B", stage + 1, i)
        pairs = zip(kept.results, arrived, strict=True)
        wanted = [(x, grad.to(x.dtype)) for x, grad in pairs if x.requires_grad]
        return [x for x, _ in wanted], [grad for _, grad in wanted]

    def _returning(self, values: Sequence[Tensor], stage: int) -> list[Tensor]:
        """Return those of the values that leave a stage whose gradients come back."""
        pairs = zip(values, self._crossing("F", stage), strict=True)
        return [x for x, crossing in pairs if crossing.has_grad]

    def _backward(self, step: _StepState, stage: int, i: int) -> None:
        results, gradients = self._gradients(step, stage, i)
        if results:
            torch.autograd.backward(results, gradients)
        self._send_back(step, stage, i)
        del step.kept[stage, i]

    def _backward_to_inputs(self, step: _StepState, stage: int, i: int) -> None:
        """Compute the gradients that the stage before waits for; keep what weights still need."""
        kept = step.kept[stage, i]
        results, gradients = self._gradients(step, stage, i)
        wanted = [x for x in kept.given if x.requires_grad]
        if not (wanted and results):
            kept.weights = lambda: torch.autograd.backward(results, gradients) if results else None
            self._send_back(step, stage, i)
            return
        weights = self._weights(stage)
        edges = [get_gradient_edge(x) for x in results]
        copies = [x.clone() for x in results]  # torch detaches in place, also what ops have saved
        _, groups = stage_backward_input(copies, gradients, wanted, iter(weights))
        reached = {acc for group in groups for acc in group["params"]}
        alone = [w for w in weights if get_gradient_edge(w).node not in reached]
        if alone:  # no path from the stage's inputs leads past them
            ones = gradients or [torch.ones(()).to(x) for x in results]
            late = torch.autograd.grad(edges, alone, ones, retain_graph=True, allow_unused=True)
            for weight, grad in zip(alone, late, strict=True):
                if grad is not None:
                    weight.grad = grad if weight.grad is None else weight.grad + grad
        kept.weights = lambda: stage_backward_weight(iter(weights), groups)
        self._send_back(step, stage, i)

    def _weights(self, stage: int) -> list[Parameter]:
        names = self._captured.stage_codes[stage].names
        named = self.module.named_parameters(remove_duplicate=False)
        return [p for name, p in named if name in names and p.requires_grad]

    # Messages

    def _crossing(self, direction: str, sender: int) -> list[Crossing]:
        """Return what a stage sends to the next, or as gradients to the one before."""
        if direction == "F":
            return self._captured.stage_codes[sender].leaving
        return [c for c in self._captured.stage_codes[sender - 1].leaving if c.has_grad]

    def _source(self, action: Action) -> tuple[str, int, int] | None:
        """Return the message that an action needs: (direction, sending stage, micro-batch)."""
        stage, work, i = action
        if work == "F":
            return ("F", stage - 1, i) if stage else None
        if work in "BI":
            return ("B", stage + 1, i) if stage + 1 < self.schedule.num_stages else None
        return None

    def _tag(self, direction: str, stage: int, i: int, number: int, num: int) -> int:
        """Return the number of a message."""
        return ((2 * stage + (direction == "B")) * num + i) * _MOST_CROSSING + number

    def _group(self, direction: str, stage: int) -> dist.ProcessGroup:
        return self._groups.get((direction, stage), self.ranks.pp)

    def _ask(self, step: _StepState, action: Action) -> None:
        """Ask for what an action needs, unless it is here or asked for."""
        key = self._source(action)
        if key is None or key in step.asked or key in step.here:
            return
        (direction, sender, i), peer = key, self.schedule.ranks[key[1]]
        if peer == self.ranks.pp_rank:
            return
        program, group = self._captured.assignment.program, self._group(direction, sender)
        asked = []
        for number, crossing in enumerate(self._crossing(direction, sender)):
            shape = crossing.shape(program, self.ranks.tp_rank, step.sizes[i])
            buffer = torch.empty(shape, dtype=crossing.dtype, device=self.module.device)
            tag = self._tag(direction, sender, i, number, len(step.sizes))
            source = dist.get_global_rank(self.ranks.pp, peer)
            work = dist.irecv(buffer, src=source, group=group, tag=tag)
            assert work is not None
            asked.append((work, buffer))
        step.asked[key] = asked

    def _arrived(self, step: _StepState, direction: str, sender: int, i: int) -> list[Tensor]:
        key = (direction, sender, i)
        if key in step.here:
            return step.here.pop(key)
        asked = step.asked.pop(key)
        kind = "values" if direction == "F" else "gradients"
        for work, _ in asked:
            what = f"{kind} of micro-batch {i} from stage {sender}"
            wait(work, self._group(direction, sender), what)
        if direction == "B":  # they are of values that were sent there
            step.received(("F", sender - 1, i), self._group("F", sender - 1))
        return [buffer for _, buffer in asked]

    def _send(
        self, step: _StepState, direction: str, stage: int, i: int, values: Sequence[Tensor]
    ) -> None:
        receiver = stage + 1 if direction == "F" else stage - 1
        peer = self.schedule.ranks[receiver]
        if peer == self.ranks.pp_rank:
            step.here[direction, stage, i] = list(values)
            return
        target = dist.get_global_rank(self.ranks.pp, peer)
        for number, value in enumerate(values):
            tag = self._tag(direction, stage, i, number, len(step.sizes))
            whole = value.contiguous()
            with labelled("stages"):
                work = dist.isend(whole, dst=target, group=self._group(direction, stage), tag=tag)
            assert work is not None
            step.sent.setdefault((direction, stage, i), []).append((work, whole))

    def _send_back(self, step: _StepState, stage: int, i: int) -> None:
        if stage == 0:
            return
        waiting = self._returning(step.kept[stage, i].given, stage - 1)
        values = [torch.zeros_like(x) if x.grad is None else x.grad for x in waiting]
        self._send(step, "B", stage, i, values)

    # Parameters that several stages share

    @torch.no_grad()
    def sum_tied(self) -> None:
        """Add up the gradients of parameters that several stages use, once a step."""
        named = dict(self.module.named_parameters()) if self._tied else {}
        for name, group in self._tied.items():
            parameter = named[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with labelled("parameters"):
                dist.all_reduce(parameter.grad, group=group)
