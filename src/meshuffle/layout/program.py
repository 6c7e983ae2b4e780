"""What a rule sees of one op, and what it says about it: `Call` in, `Choice`s out."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from meshuffle.graph import Graph
from meshuffle.graph.functional import functional_program, reorder
from meshuffle.graph.graph import arguments_of
from meshuffle.layout.layout import Layout, Replicate, Samples, Shard, Split, Varying, Window

aten = torch.ops.aten

_CONSTANT = (
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.detach, aten.bernoulli),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like),
    *(aten.zero, aten.sign, aten.floor, aten.ceil, aten.round),
)
"""Ops through which no gradient flows, whatever they read; `fill` of a number is one by meaning."""
Kind = Literal["channel", "spatial", "batch", "any"]


@dataclass(frozen=True)
class Choice:
    """One legal way to compute an op on all ranks.

    Attributes:
        inputs: how each tensor of `Call.inputs` must lie.
        output: how the result then lies; of an op with several results, one each.
        split: the layout whose parts divide the work; None where every rank does all of it.
        kind: the dimension that it prefers, as a plan text names it.
        local: writes the rank's computation where it is not the same call on the rank's parts.
        sent_bytes: what the op itself sends, over all ranks, forward and backward.
    """

    inputs: tuple[Layout, ...]
    output: Layout | tuple[Layout, ...]
    split: Split | None
    kind: Kind = "any"
    local: Callable[[Emitter], Any] | None = field(default=None, compare=False)
    sent_bytes: int = 0


class Emitter(ABC):
    """Writes calls of one rank's module; `parallel.lower` makes it, rules use it.

    Attributes:
        given: the op's arguments by name, with the rank's values in place of tensors.
        rank: along the `tp` axis.
    """

    given: dict[str, Any]
    rank: int

    @abstractmethod
    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a function."""

    @abstractmethod
    def again(self, /, **changes: Any) -> Node:
        """Add the op itself, with some arguments changed."""

    @abstractmethod
    def sizes(self, *, exact: bool = False) -> list[Any]:
        """Return the sizes of the rank's part of the result.

        One that follows the batch is −1, or where `exact` a value of the module.
        """

    @abstractmethod
    def share(self, layout: Split, size: int) -> Any:
        """Return the rank's part of a dim of `size`, as a fraction."""

    def take(self, x: Node, dim: int, positions: Sequence[int]) -> Node:
        """Add what takes some of the rank's own positions of a dim."""
        first, last = positions[0], positions[-1]
        if list(positions) == list(range(first, last + 1)):
            return self.call(aten.slice.Tensor, x, dim, first, last + 1)
        return self.call(reorder, x, dim, tuple(positions))


class Program:
    """A Graph's functional program at one batch size, on `world` ranks of the `tp` axis.

    Attributes:
        calls: what is computed, in order.
        pinned: names of calls that must run whole on every rank.
    """

    def __init__(self, graph: Graph, batch: int, world: int) -> None:
        self.graph, self.batch, self.world = graph, batch, world
        self.fx, self.pinned = functional_program(graph)
        self.calls = [Call(self, node) for node in self.fx.nodes if node.op == "call_function"]
        self._shapes: dict[Node, tuple[int, ...]] = {}
        self._samples: dict[Node, int | None] = {}
        self._grads: dict[Node, bool] = {}
        for node in self.fx.nodes:
            self.has_grad(node)  # from front to back: no deep recursion

    @property
    def ops_batch(self) -> int | None:
        """The batch to ask the Graph for: None where the model fixes it."""
        return self.batch if self.graph.symbol is not None else None

    def has_grad(self, node: Node) -> bool:
        """Tell whether a gradient flows into a value: it depends on a trained parameter."""
        if node not in self._grads:
            value = node.meta.get("val")
            floating = isinstance(value, Tensor | tuple | list) and (
                not isinstance(value, Tensor) or value.is_floating_point()
            )
            if node.op == "placeholder":
                self._grads[node] = self.graph.is_trained(node.name)
            elif getattr(node.target, "_overloadpacket", None) in _CONSTANT:
                self._grads[node] = False
            else:
                self._grads[node] = floating and any(map(self.has_grad, node.all_input_nodes))
        return self._grads[node]

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
            self._samples[node] = self._find_samples(node)
        return self._samples[node]

    def _find_samples(self, node: Node) -> int | None:
        value = node.meta.get("val")
        return self.samples_dim_of(value) if isinstance(value, Tensor) else None

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

    def num_bytes(self, node: Node) -> int:
        """Return the bytes of a tensor."""
        return math.prod(self.shape(node)) * int(node.meta["val"].itemsize)


@dataclass(frozen=True, eq=False)
class Call:
    """One op of a program."""

    program: Program
    node: Node

    @property
    def world(self) -> int:
        """Ranks of the `tp` axis."""
        return self.program.world

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

    def lie(self, layouts: Mapping[Any, Layout | None], rest: Layout) -> tuple[Layout, ...]:
        """Return one layout per input, `rest` for those that are not listed."""
        return tuple(layouts.get(node) or rest for node in self.inputs)


def is_tensor(node: Node) -> bool:
    """Tell whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


Rule = Callable[[Call, Sequence[Layout], Sequence[Sequence[Layout]]], Iterable[Choice]]
"""(call, layouts that readers of the result want, layouts in which each input may arrive)."""

RULES: dict[Any, Rule] = {}
"""By ATen's packet, for example `torch.ops.aten.conv2d`."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated rule for some ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def legal(call: Call, wanted: Sequence[Any], arriving: Sequence[Sequence[Layout]]) -> list[Choice]:
    """Return the choices of the op's rule, each once; none of an op that has no rule.

    Those that fix who has which sample are left out: how many there are is not known.
    """
    packet = getattr(call.node.target, "_overloadpacket", call.node.target)
    if packet not in RULES or call.node.name in call.program.pinned or call.world == 1:
        return []
    found = dict.fromkeys(RULES[packet](call, wanted, arriving))
    return [choice for choice in found if _keeps_batch(call, choice)]


def _keeps_batch(call: Call, choice: Choice) -> bool:
    """Tell whether dims that follow the batch are split by samples, and no others."""
    outputs = choice.output if isinstance(choice.output, tuple) else (choice.output,)
    result = call.node.meta["val"]
    results = [result] if isinstance(result, Tensor) else list(result)
    values = [*(node.meta["val"] for node in call.inputs), *results]
    for value, layout in zip(values, [*choice.inputs, *outputs], strict=True):
        if isinstance(layout, Samples) and not (
            call.has_samples and layout.dim == call.program.samples_dim_of(value)
        ):
            return False
        if isinstance(layout, Shard | Window) and not isinstance(value.shape[layout.dim], int):
            return False
    return True


def replicated(call: Call, num_outputs: int | None) -> Choice:
    """Return the choice that is legal for every op: all of it on every rank."""
    output = Replicate() if num_outputs is None else (Replicate(),) * num_outputs
    return Choice((Replicate(),) * len(call.inputs), output, None)


def unique(layouts: Iterable[Layout | None]) -> Iterator[Layout]:
    """Yield each layout once; leave Nones out."""
    seen = set()
    for layout in layouts:
        if layout is not None and layout not in seen:
            seen.add(layout)
            yield layout


def splits(layouts: Iterable[Layout | None]) -> Iterator[Split]:
    """Yield those that give each rank a part of its own, each once."""
    for layout in unique(layouts):
        if isinstance(layout, Shard | Samples):
            yield layout


def broadcast(layout: Shard | Samples, out: Sequence[int], shape: Sequence[int]) -> Layout:
    """Return how an operand of `shape` must lie where the result of `out` lies as `layout`."""
    dim = layout.dim - (len(out) - len(shape))
    if dim < 0 or shape[dim] != out[layout.dim]:
        return Varying()  # spreads there; or gives but its dtype, as in `type_as`
    return layout.on(dim)


def raised(layout: Layout, out: Sequence[int], shape: Sequence[int]) -> Layout | None:
    """Return how the result lies where an operand of `shape` that spreads over it does so."""
    if not isinstance(layout, Shard | Samples):
        return None
    dim = layout.dim + len(out) - len(shape)
    return layout.on(dim) if dim >= 0 and out[dim] == shape[layout.dim] else None


def kind_of(layout: Layout, num_dims: int, channel_dim: int = 1) -> Kind:
    """Return what a plan text calls a split of `layout.dim`."""
    if isinstance(layout, Samples):
        return "batch"
    dim = getattr(layout, "dim", 0)
    return "channel" if dim == channel_dim % num_dims else "spatial"
