"""What each call of a program costs on one rank: seconds of its forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.comm.device import synchronize
from meshuffle.graph.node import is_in_place
from meshuffle.layout.assign import Assignment
from meshuffle.layout.program import Program

_FLOPS_PER_S, _BYTES_PER_S = 5e10, 1e10  # of a CPU core; their ratio alone decides a cut
_RUNS, _SHORT_S = 3, 2e-4


def estimated(program: Program) -> dict[str, float]:
    """Return seconds by FLOPs and by bytes, the longer of the two; a backward is two forwards."""
    seconds = {}
    for op in program.graph.ops(program.ops_batch):
        moved = (op.read_bytes + op.written_bytes) / _BYTES_PER_S
        seconds[op.name] = 3 * max(op.flops / _FLOPS_PER_S, moved)
    for call in program.calls:  # one that replaced several
        if call.node.name not in seconds:
            seconds[call.node.name] = 6 * program.num_bytes(call.node) / _BYTES_PER_S
    return seconds


def measured(program: Program, device: torch.device) -> dict[str, float]:
    """Return seconds as they are measured, call by call, on random values.

    Equal calls are timed once. The inputs of a call are computed by the calls before it, so that no
    value is one that arithmetic is slow with, as denormal numbers are.
    """
    clock = _Clock(program, device)
    for call in program.calls:
        clock.run(call.node)
    return clock.seconds


def per_rank(assignment: Assignment, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each call on the rank of the `tp` axis that does most of it."""
    choices = assignment.choices
    return {
        name: cost * float(max(assignment.work_fractions(name))) if name in choices else cost
        for name, cost in seconds.items()
    }


class _Clock:
    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.seconds: dict[str, float] = {}
        self.values: dict[Node, Any] = {}
        self._known: dict[str, tuple[float, Any]] = {}
        self._generator = torch.Generator().manual_seed(0)
        for node in program.placeholders():
            self.values[node] = self._random(node)
        self._readers = {node: len(node.users) for node in program.fx.nodes}

    def _random(self, node: Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        shape = self.program.shape(node)
        if value.is_floating_point():
            made = torch.rand(shape, generator=self._generator).to(value.dtype) * 0.1
        else:
            made = torch.zeros(shape, dtype=value.dtype)
        return made.to(self.device)

    def run(self, node: Node) -> None:
        """Time a call, and keep its result for the calls that read it."""
        arguments, _ = self._arguments(node)
        key = repr(pytree.tree_map(_key_of, (str(node.target), *arguments)))
        if key not in self._known or is_in_place(node):
            self._known[key] = self._time(node)
        self.seconds[node.name], self.values[node] = self._known[key]
        for source in node.all_input_nodes:
            self._readers[source] -= 1
            if not self._readers[source]:
                self.values.pop(source, None)

    def _arguments(self, node: Node) -> tuple[tuple[Any, dict[str, Any]], list[Tensor]]:
        """Return what a call is called with, and those of it that want a gradient."""
        leaves: list[Tensor] = []

        def concrete(argument: Any) -> Any:
            if isinstance(argument, torch.device):
                return self.device
            if not isinstance(argument, Node):
                return argument
            value = self.values.get(argument, argument.meta.get("val"))
            if isinstance(value, torch.SymInt):
                return self.program.graph.number(value, self.program.ops_batch)
            if isinstance(value, Tensor) and self.program.has_grad(argument):
                value = value.detach().requires_grad_(not is_in_place(node))
                leaves.append(value)
            return value

        return pytree.tree_map(concrete, (node.args, node.kwargs)), leaves

    def _time(self, node: Node) -> tuple[float, Any]:
        """Return seconds, and the result without its history."""
        times: list[float] = []
        while len(times) <= _RUNS and (not times or times[-1] > _SHORT_S):
            (args, kwargs), leaves = self._arguments(node)
            began = self._now()
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            outputs = [x for x in pytree.tree_leaves(result) if _wants_grad(x)]
            if outputs:
                ones = [torch.ones_like(x) for x in outputs]
                torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
            times.append(self._now() - began)
        detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)
        return statistics.median(times[1:] or times), detached

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _key_of(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return (tuple(argument.shape), argument.dtype)
    return argument
