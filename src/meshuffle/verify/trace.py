"""Where a run that is not equal first differs: its values, one after the other, then gradients.

The captured program is run op by op on the first micro-batch, and every value and its gradient is
kept; each rank runs its lowered code in the same way and compares.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch.fx import Node

from meshuffle.graph import capture
from meshuffle.layout.layout import Layout, Partial, Samples, Shard, Varying, Window
from meshuffle.layout.program import Program
from meshuffle.layout.redistribution import Value, held_indices
from meshuffle.parallel.redistribute import Redistribute
from meshuffle.verify.job import (
    DTYPES,
    Job,
    build_model,
    loss_of,
    make_inputs,
    raised_casts,
    rows_of,
    tensors_of,
)
from meshuffle.verify.rank import Run
from meshuffle.verify.reference import Reference, reference_draws, squared_difference

_TOLERANCE = {"float64": 1e-7, "float32": 1e-2}
_FLOOR = 1e-3


class Recorder(fx.Interpreter):
    """Runs a program and keeps `values/NAME`, and `gradients/NAME` once backward has run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one call."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "get_attr":
            self._keep(f"values/{n.name}", result)
            if result.requires_grad and n.op.startswith("call"):
                result.register_hook(functools.partial(self._keep, f"gradients/{n.name}"))
        return result

    def _keep(self, key: str, x: Tensor | None) -> None:
        if x is not None:  # no gradient comes back to it
            self.kept[key] = x.detach().clone(memory_format=torch.contiguous_format)


def make_trace(job: Job, reference: Reference) -> None:
    """Save the values and gradients of the first step on one device, in the reference's dtype."""
    dtype = DTYPES[job.reference_dtype]
    model = build_model(job, dtype)
    samples = torch.cat(job.micro_batches()[0])
    inputs = tuple(x[samples] for x in make_inputs(job, model, dtype))
    with raised_casts(dtype):
        graph = capture(model, inputs, train=True)
    stored: dict[str, Any] = {
        **graph.constants,
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    given = iter(inputs)
    arguments = [
        next(given) if graph.is_input(node.name) else stored[graph.names[node.name]]
        for node in graph.nodes("placeholder")
    ]
    recorder = Recorder(graph.program.graph_module)
    with reference_draws(job, reference.facts, 0):
        outputs = tensors_of(recorder.run(*arguments))
    loss_of(outputs, reference.facts.output_dims, samples, job).backward()
    program = Program(graph, len(samples), 1)
    calls = {
        op.name: (op.module, op.target, program.samples_dim_of(node.meta["val"]))
        for op, node in zip(graph.ops(), graph.nodes(), strict=True)
        if f"values/{op.name}" in recorder.kept
    }
    gradients = [x for key, x in recorder.kept.items() if key.startswith("gradients/")]
    squared = sum(float(x.square().sum()) for x in gradients)
    rms = math.sqrt(squared / max(1, sum(x.numel() for x in gradients)))
    facts = json.dumps({"calls": calls, "rms": rms})
    save_file(recorder.kept, reference.trace_path, metadata={"facts": facts})


class Comparison:
    """One rank's values and gradients against those of the reference.

    Args:
        run: this rank's part of a job.
        trace: the opened file of `make_trace`.
    """

    def __init__(self, run: Run, trace: Any) -> None:
        self.run, self.trace, self.keys = run, trace, set(trace.keys())
        facts = json.loads(trace.metadata()["facts"])
        self.calls: dict[str, Any] = facts["calls"]
        self.scales = {"values": 0.0, "gradients": facts["rms"]}
        self.size = sum(map(len, run.job.micro_batches()[0]))
        self.samples = torch.arange(len(run.parts[0])) + run.firsts[0]
        assert run.captured is not None
        self.module = run.captured
        modules = zip(self.module.stages, self.module.graph_modules, strict=True)
        recorders = {stage: Recorder(module) for stage, module in modules}
        self.module.run_stage = lambda stage, *given: recorders[stage].run(*given)  # type: ignore[method-assign]
        run.run_micro_batches(0, 1)
        self.got = {stage: recorder.kept for stage, recorder in recorders.items()}

    def differing(self, kind: str) -> list[tuple[list[int], str]]:
        """Return the places and names of the values, or gradients, that differ on this rank."""
        differing = []
        modules = zip(self.module.stages, self.module.graph_modules, strict=True)
        for stage, module in modules:
            for place, (name, source, layout) in enumerate(self._shared(kind, stage, module)):
                path, target, dim = self.calls[source]
                whole = self.trace.get_tensor(f"{kind}/{source}")
                whole = rows_of(whole, dim, self.samples, self.size)
                if self._differs(kind, layout, self.got[stage][f"{kind}/{name}"], whole):
                    how = source if name == source else f"{source}, as {name}"
                    differing.append(([stage, place], f"{path or 'the model'}: {target} ({how})"))
        return differing

    def _shared(
        self, kind: str, stage: int, written: fx.GraphModule
    ) -> list[tuple[str, str, Layout]]:
        """Return (name, value of the program, layout) of what all ranks of `tp` have, in order."""
        code, got = self.module.stage_codes[stage], self.got[stage]
        lies = dict(code.sources)
        converted = {sent.name: sent.value for sent in code.sent if kind == "values"}
        nodes = list(written.graph.nodes)
        for node in nodes:
            if node.op == "call_module" and node.name in converted:
                move = written.get_submodule(str(node.target))
                if isinstance(move, Redistribute):
                    lies.setdefault(node.name, (converted[node.name], move.step.target))
        shared = {}
        for name in [node.name for node in nodes if node.name in lies]:
            source, layout = lies[name]
            has_both = f"{kind}/{name}" in got and f"{kind}/{source}" in self.keys
            if has_both and source in self.calls:
                shared[f"{name} {source} {layout}"] = (name, source, layout)
        keys_of_ranks: list[Any] = [None] * self.run.ranks.tp_world
        dist.all_gather_object(keys_of_ranks, list(shared), self.run.ranks.tp)
        return [
            entry for key, entry in shared.items() if all(key in keys for keys in keys_of_ranks)
        ]

    def _differs(self, kind: str, layout: Layout, value: Tensor, whole: Tensor) -> bool:
        ranks = self.run.ranks
        if isinstance(layout, Partial if kind == "values" else Varying):
            value = value.clone()
            dist.all_reduce(value, group=ranks.tp)
        elif isinstance(layout, Shard | Samples | Window):
            like = Value(tuple(whole.shape), 0, False, len(self.samples), ranks.tp_world)
            own = torch.tensor(held_indices(layout, like)[ranks.tp_rank], dtype=torch.int64)
            whole = whole.index_select(layout.dim, own)
        if value.shape != whole.shape:
            return True
        difference = math.sqrt(squared_difference(value, whole))
        size = float(whole.double().norm()) + _FLOOR * self.scales[kind] * whole.numel() ** 0.5
        return not difference <= _TOLERANCE[self.run.job.dtype] * size


def trace(run: Run) -> dict[str, Any]:
    """Return the first of this rank's values that differs, and the last of its gradients."""
    if run.captured is None:
        return {"values": [], "gradients": []}
    with safe_open(run.reference.trace_path, "pt") as file:
        comparison = Comparison(run, file)
        values, gradients = comparison.differing("values"), comparison.differing("gradients")
    return {"values": values[:1], "gradients": gradients[-1:]}


def first_diverging(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the first value that differs on any rank, else gradient, else None."""
    values, gradients = (
        [place for report in reports for place in report[kind]] for kind in ("values", "gradients")
    )
    if values:
        return str(min(values)[1])
    return f"gradient at {max(gradients)[1]}" if gradients else None
