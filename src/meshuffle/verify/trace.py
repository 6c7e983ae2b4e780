"""Where a run that is not equal first differs: its values, one after the other, then gradients.

The captured program is run op by op on the whole batch, and every value and its gradient is kept;
each rank runs its lowered code in the same way and compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.errors import RankFailed
from meshuffle.graph import capture
from meshuffle.layout.call import Program
from meshuffle.layout.layout import Layout, Partial, Samples, Shard, Varying, Window, samples_owners
from meshuffle.parallel.draws import draw_key
from meshuffle.parallel.moves import Move
from meshuffle.verify.job import Job, build_model, loss_of, make_inputs, rows_of
from meshuffle.verify.rank import Run
from meshuffle.verify.reference import Reference, reference_draws, squared_difference

_TOLERANCE = {"float64": 1e-7, "float32": 1e-2}
_FLOOR = 1e-3


class Recorder(fx.Interpreter):
    """Runs a program and keeps its values, and their gradients once backward has run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one call."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "get_attr":
            self.values[n.name] = result.detach().clone()
            if result.requires_grad and n.op.startswith("call"):
                result.register_hook(lambda grad, name=n.name: self._keep(name, grad))
        return result

    def _keep(self, name: str, grad: Tensor) -> None:
        self.gradients[name] = grad.detach().clone()


def trace_path(reference: Reference) -> Path:
    """Return where the trace of a reference is kept."""
    return reference.path.with_suffix(".trace")


def make_trace(job: Job, reference: Reference) -> None:
    """Save the values and gradients of the first step on one device, in float64."""
    model = build_model(job, torch.float64)
    inputs = make_inputs(job, model, torch.float64)
    graph = capture(model, inputs, train=True)
    state: dict[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    constants = graph.program.constants
    given = iter(inputs)
    arguments = [
        next(given)
        if graph.is_input(node.name)
        else _stored(graph.names[node.name], state, constants)
        for node in graph.nodes("placeholder")
    ]
    recorder = Recorder(graph.program.graph_module)
    with reference_draws(job, reference.facts, 0):
        outputs = recorder.run(*arguments)
    returned = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    samples = torch.arange(job.batch)
    loss_of(returned, reference.facts.output_dims, samples, job).backward()
    program = Program(graph, job.batch, 1)
    calls = {
        node.name: (_module(node), str(node.target), program.samples_dim_of(node.meta["val"]))
        for node in graph.nodes()
        if node.name in recorder.values
    }
    kinds = {"values": recorder.values, "gradients": recorder.gradients}
    tensors = {f"{k}/{n}": x.contiguous() for k, xs in kinds.items() for n, x in xs.items()}
    save_file(tensors, trace_path(reference), metadata={"calls": json.dumps(calls)})


def _stored(name: str, state: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    return state[name] if name in state else constants[name]


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


class Comparison:
    """One rank's values against those of the reference.

    Args:
        run: of a job.
        trace: opened.
    """

    def __init__(self, run: Run, trace: Any) -> None:
        self.run, self.trace = run, trace
        self.calls: dict[str, Any] = json.loads(trace.metadata()["calls"])
        self.keys = set(trace.keys())
        module = run.module
        run.ranks.draws.set(draw_key(run.job.seed, 0), int(run.samples[0]))
        self.recorder = Recorder(module.graph_module)
        outputs = pytree.tree_leaves(self.recorder.run(*run.inputs))
        returned = [x for x in outputs if isinstance(x, Tensor)]
        loss_of(returned, run.reference.facts.output_dims, run.samples, run.job).backward()

    def first(self, kind: str) -> tuple[int, str] | None:
        """Return the place and the name of the first value that differs; gradients from the end."""
        got = self.recorder.values if kind == "values" else self.recorder.gradients
        found = list(enumerate(self._shared(kind, got)))
        for place, (name, source, layout) in found if kind == "values" else reversed(found):
            path, target, dim = self.calls[source]
            whole = self.trace.get_tensor(f"{kind}/{source}")
            whole = rows_of(whole, dim, self.run.samples, self.run.job.batch)
            if self._differs(kind, layout, got[name], whole):
                how = source if name == source else f"{source}, as {name}"
                return place, f"{path or 'the model'}: {target} ({how})"
        return None

    def _shared(self, kind: str, got: Mapping[str, Tensor]) -> list[tuple[str, str, Layout]]:
        """Return (name, value of the program, layout) of what all ranks of `tp` have, in order."""
        module, found = self.run.module, {}
        converted = {sent.name: sent.value for sent in module.lowered.sent}
        for node in module.graph_module.graph.nodes:
            if node.name in module.lowered.sources:
                source, layout = module.lowered.sources[node.name]
            elif kind == "values" and node.op == "call_module" and node.name in converted:
                move = module.get_submodule(node.target)
                if not isinstance(move, Move):
                    continue
                source, layout = converted[node.name], move.step.target
            else:
                continue
            if node.name in got and source in self.calls and f"{kind}/{source}" in self.keys:
                found[f"{node.name} {source} {layout}"] = (node.name, source, layout)
        told: list[Any] = [None] * self.run.ranks.tp_world
        dist.all_gather_object(told, list(found), self.run.ranks.tp)
        return [entry for key, entry in found.items() if all(key in keys for keys in told)]

    def _differs(self, kind: str, layout: Layout, value: Tensor, whole: Tensor) -> bool:
        """Tell whether any rank of the `tp` axis differs."""
        if isinstance(layout, Partial if kind == "values" else Varying):
            value = value.clone()
            dist.all_reduce(value, group=self.run.ranks.tp)
        elif isinstance(layout, Shard | Window):
            parts = layout.owners if isinstance(layout, Shard) else layout.needs
            whole = whole.index_select(layout.dim, torch.tensor(parts[self.run.ranks.tp_rank]))
        elif isinstance(layout, Samples):
            size, ranks = whole.shape[layout.dim], self.run.ranks
            owners = samples_owners(size, len(self.run.samples), ranks.tp_world)
            whole = whole.index_select(layout.dim, torch.tensor(owners[ranks.tp_rank]))
        bad = value.shape != whole.shape
        if not bad:
            difference = math.sqrt(squared_difference(value, whole))
            size = float(whole.double().norm()) + _FLOOR * self._scale(kind) * whole.numel() ** 0.5
            bad = not difference <= _TOLERANCE[self.run.job.dtype] * size
        found = torch.tensor(int(bad))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.run.ranks.tp)
        return bool(found)

    def _scale(self, kind: str) -> float:
        """Return the root mean square of all gradients; a value has its own."""
        if kind == "values":
            return 0.0
        if not hasattr(self, "_rms"):
            keys = [key for key in self.keys if key.startswith("gradients/")]
            tensors = [self.trace.get_tensor(key) for key in keys]
            total = sum(float(x.square().sum()) for x in tensors)
            self._rms = math.sqrt(total / max(1, sum(x.numel() for x in tensors)))
        return self._rms


def trace(run: Run) -> dict[str, Any]:
    """Return where the values of this rank's replica first differ, and where their gradients do."""
    with safe_open(trace_path(run.reference), "pt") as file:
        comparison = Comparison(run, file)
        return {kind: comparison.first(kind) for kind in ("values", "gradients")}


def first_diverging(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the first value that differs on any rank, else gradient, else None.

    Raises:
        RankFailed: a rank could not compare.
    """
    broken = next((r["error"] for r in reports if r.get("error")), None)
    if broken is not None:
        raise RankFailed(broken)
    values = [r["values"] for r in reports if r.get("values")]
    if values:
        return str(min(values)[1])
    gradients = [r["gradients"] for r in reports if r.get("gradients")]
    return f"gradient at {max(gradients)[1]}" if gradients else None
