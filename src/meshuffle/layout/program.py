"""The program that layouts are put on, at one batch size: its calls, and facts of its values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from meshuffle.graph import Graph
from meshuffle.graph.functional import functional_program
from meshuffle.graph.node import arguments_of, is_tensor, is_tuple, packet_of, tensors_of_node
from meshuffle.layout.layout import Samples, Shard
from meshuffle.layout.redistribution import Value

aten = torch.ops.aten

_CONSTANT = (
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.detach, aten.bernoulli),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like),
    aten.randn_like,
    *(aten.zero, aten.sign, aten.floor, aten.ceil, aten.round),
)
"""Ops through which no gradient flows, whatever they read; `fill` of a number is one by meaning."""


class Program:
    """A Graph's functional program at one batch size, on `world` ranks of the `tp` axis.

    Attributes:
        calls: the ops, in order.
        pinned: names of calls that must run whole on every rank.
    """

    def __init__(self, graph: Graph, batch: int, world: int) -> None:
        self.graph, self.batch, self.world = graph, batch, world
        self.fx, self.pinned = functional_program(graph)
        self.calls = [Call(self, node) for node in self.fx.nodes if node.op == "call_function"]
        self._shapes: dict[Node, tuple[int, ...]] = {}
        self._samples: dict[Node, int | None] = {}
        self._values: dict[Node, Value] = {}
        self._grads: dict[Node, bool] = {}
        for node in self.fx.nodes:
            self.has_grad(node)  # from front to back: no deep recursion
        self._leave_unasked()

    @property
    def ops_batch(self) -> int | None:
        """The batch to ask the Graph for: None where the model fixes it."""
        return self.batch if self.graph.symbol is not None else None

    def has_grad(self, node: Node) -> bool:
        """Tell whether a gradient flows into a value, from outputs and to trained parameters."""
        if node not in self._grads:
            value = node.meta.get("val")
            floating = isinstance(value, Tensor | tuple | list) and (
                not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
            )
            if node.op == "placeholder":
                self._grads[node] = self.graph.is_trained(node.name)
            elif packet_of(node) in _CONSTANT:
                self._grads[node] = False
            else:
                self._grads[node] = floating and any(map(self.has_grad, node.all_input_nodes))
        return self._grads[node]

    def _leave_unasked(self) -> None:
        """Let values that no output depends on have no gradient."""
        asked: set[Node] = set()
        for node in reversed(self.fx.nodes):
            asks = node.op == "output" or node.name in self.pinned or node in asked
            if asks and (node.op == "output" or self._grads[node]):
                asked.update(node.all_input_nodes)
            elif node.op == "call_function" and not asks:
                self._grads[node] = False

    def placeholders(self) -> list[Node]:
        """Return parameters, buffers, constants and inputs."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    def outputs(self) -> list[Node]:
        """Return the tensors that the model returns."""
        (output,) = (node for node in self.fx.nodes if node.op == "output")
        return [node for node in output.all_input_nodes if is_tensor(node)]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the sizes of a tensor."""
        if node not in self._shapes:
            self._shapes[node] = self.shape_of(node.meta["val"])
        return self._shapes[node]

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """Return the sizes of a captured tensor."""
        return self.graph.shape(value, self.ops_batch)

    def samples_dim(self, node: Node) -> int | None:
        """Return the dim whose size is a multiple of the batch, or None."""
        if node not in self._samples:
            value = node.meta.get("val")
            dim = self.samples_dim_of(value) if isinstance(value, Tensor) else None
            self._samples[node] = dim
        return self._samples[node]

    def samples_dim_of(self, value: Tensor) -> int | None:
        """Return the dim of a captured tensor whose size is a multiple of the batch, or None."""
        symbol = self.graph.symbol
        if symbol is None:
            return None
        sizes: dict[int, Any] = {
            d: size.node.expr  # type: ignore[attr-defined]  # torch.Size says int
            for d, size in enumerate(value.shape)
            if isinstance(size, torch.SymInt)
        }
        following = [d for d, size in sizes.items() if symbol in size.free_symbols]
        if len(following) != 1 or not (sizes[following[0]] / symbol).is_Integer:
            return None
        return following[0]

    def last_reads(self) -> dict[Node, int]:
        """Return the position of the last call that reads each node; outputs are read last."""
        readers = [call.node for call in self.calls]
        readers += [node for node in self.fx.nodes if node.op == "output"]
        last: dict[Node, int] = {}
        for i, reader in enumerate(readers):
            last |= dict.fromkeys(reader.all_input_nodes, i)
        return last

    def live_behind(self) -> list[list[Node]]:
        """Return, for each call, the values that exist behind it and are read later.

        Inputs are among them. Parameters, buffers and numbers are not: every stage has its own.
        """
        place = {call.node: i for i, call in enumerate(self.calls)}
        live: list[list[Node]] = [[] for _ in self.calls]
        for source, end in self.last_reads().items():
            is_value = source.op == "call_function" or self.graph.is_input(source.name)
            if is_value and (is_tensor(source) or is_tuple(source)):
                for i in range(place.get(source, 0), min(end, len(self.calls))):
                    live[i].append(source)
        return live

    def num_bytes(self, node: Node) -> int:
        """Return the bytes of a tensor."""
        return self.value(node).num_bytes

    def value(self, node: Node) -> Value:
        """Return what the cost of redistributing a tensor depends on."""
        if node not in self._values:
            itemsize, has_grad = node.meta["val"].itemsize, self.has_grad(node)
            self._values[node] = Value(self.shape(node), itemsize, has_grad, self.batch, self.world)
        return self._values[node]


@dataclass(frozen=True, eq=False)
class Call:
    """One op of a program."""

    program: Program
    node: Node

    @property
    def world(self) -> int:
        """Ranks of the `tp` axis."""
        return self.program.world

    @property
    def packet(self) -> Any:
        """The op without its overload; rules are registered by it."""
        return packet_of(self.node)

    @property
    def results(self) -> list[Tensor]:
        """What it makes, as it was captured: one tensor or several."""
        return tensors_of_node(self.node)

    @functools.cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The values, parameters and buffers that it reads, each once."""
        return tuple(n for n in self.node.all_input_nodes if is_tensor(n))

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """Arguments by their names in the op's schema, defaults filled in."""
        return arguments_of(self.node.target, self.node.args, self.node.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the sizes of a tensor."""
        return self.program.shape(node)

    @property
    def out(self) -> tuple[int, ...]:
        """Sizes of its result."""
        return self.program.shape(self.node)

    def samples(self, node: Node | None = None) -> Samples | None:
        """Return the split by samples of a tensor, of the result by default, where it has one."""
        dim = self.program.samples_dim(node or self.node)
        return None if dim is None or not self.has_samples else Samples(dim)

    @property
    def has_samples(self) -> bool:
        """Whether every rank can have a sample."""
        return self.program.batch >= self.world

    def ints(self, name: str, num: int) -> list[int]:
        """Return an argument that is one number or `num` numbers."""
        value = self.given[name]
        values = list(value) if isinstance(value, Sequence) else [value]
        return values * num if len(values) == 1 else values

    def even(self, dim: int, size: int | None = None) -> Shard | None:
        """Return the even split of a dim of the result, unless a rank would have nothing."""
        size = self.out[dim] if size is None else size
        return Shard.even(dim, size, self.world) if size >= self.world else None
