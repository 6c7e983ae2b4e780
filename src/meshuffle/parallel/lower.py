"""From an assignment to one rank's code: the program on parts, with redistributions between.

Pure: rank and world are plain numbers, without a process group, so that a plan can be lowered,
printed and counted anywhere. Every rank walks the same choices: all agree on each collective.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.errors import ModelError
from meshuffle.graph.node import is_in_place, is_tensor, is_tuple
from meshuffle.graph.runtime_ops import WithoutAutocast, fraction, without_autocast
from meshuffle.kernels.rewrite import rewrite
from meshuffle.layout.assign import Assignment
from meshuffle.layout.layout import (
    Layout,
    Partial,
    Replicate,
    Samples,
    Shard,
    Split,
    Varying,
    even_size,
)
from meshuffle.layout.program import Call
from meshuffle.layout.redistribution import Redistribution, Value, cheapest_path
from meshuffle.layout.rule import Emitter
from meshuffle.layout.storage import Storage
from meshuffle.layout.traffic import Crossing, Sent, gradient_bytes, statistics_bytes
from meshuffle.parallel import random_masks
from meshuffle.parallel.batch_norm import SyncNorm, local_norm
from meshuffle.parallel.code import StageCode, drop_unread
from meshuffle.parallel.redistribute import Redistribute

aten = torch.ops.aten

_NORM = ("input", "weight", "bias", "running_mean", "running_var")


def lower(assignment: Assignment, rank: int) -> StageCode:
    """Return what `rank` of the `tp` axis runs; see `lower_stages`."""
    return lower_stages(assignment, rank, ())[0]


def lower_stages(
    assignment: Assignment,
    rank: int,
    cuts: Sequence[int],
    *,
    replicas: int = 1,
    device: torch.device | None = None,
    stored: Mapping[str, Layout] | None = None,
) -> list[StageCode]:
    """Return what `rank` of the `tp` axis runs in each pipeline stage.

    Args:
        assignment: the layouts of the whole model.
        rank: 0 … tp − 1.
        cuts: how many calls of the program lie in front of each cut.
        replicas: ranks of the `dp` axis: batch norm joins their statistics too.
        device: replaces the devices that the program names; None is the CPU.
        stored: layouts that parameters and buffers have already, else whole; None chooses them.

    Raises:
        ModelError: an op draws random numbers in a way that cannot be kept equal.
    """
    program, device = assignment.program, device or torch.device("cpu")
    storage, numbers = Storage(assignment, stored), dict[str, int]()
    live = program.live_behind() if cuts else []
    codes: list[StageCode] = []
    for first, last in itertools.pairwise([0, *cuts, len(program.calls)]):
        lowering = _Lowering(assignment, rank, replicas, device, storage, numbers)
        leaving = live[last - 1] if last < len(program.calls) else None
        codes.append(lowering.run(first, last, codes[-1].leaving if codes else None, leaving))
    return codes


class _Lowering(Emitter):
    def __init__(
        self,
        assignment: Assignment,
        rank: int,
        replicas: int,
        device: torch.device,
        storage: Storage,
        numbers: dict[str, int],
    ) -> None:
        self.assignment, self.rank, self.replicas = assignment, rank, replicas
        self.program, self.device = assignment.program, device
        self.world = self.program.world
        self.code = StageCode()
        self.env: dict[Node, dict[Layout, Any]] = {}
        self._numbers = numbers
        self._sizes: dict[Any, Node] = {}
        self._numbers_of: dict[Node, Node] = {}
        in_place = (call.node for call in self.program.calls if is_in_place(call.node))
        self._changing = self.program.pinned | {node.args[0].name for node in in_place}  # type: ignore[union-attr]
        self._storage = storage
        self._batch: Node | None = None
        self._without_autocast, self._goes_back = False, True

    def run(
        self,
        first: int,
        last: int,
        arriving: Sequence[Crossing] | None,
        leaving: Sequence[Node] | None,
    ) -> StageCode:
        """Write calls `first` … `last` − 1.

        Args:
            arriving: values from the stage before; None where the caller passes the model's inputs.
            leaving: values that the next stage needs; None where the model's outputs are returned.
        """
        self._take_in(arriving)
        for node in self.program.placeholders():
            if not self.program.graph.is_input(node.name):
                name = self.program.graph.names[node.name]
                layout = self._storage.layouts.get(node, Replicate())
                self.env[node] = {layout: self.code.graph.get_attr(name)}
        for call in self.program.calls[first:last]:
            self._write(call)
        self._goes_back = True
        if leaving is None:
            (output,) = (node for node in self.program.fx.nodes if node.op == "output")
            self.code.graph.output(self._local(output.args[0], {}))
        else:
            self.code.graph.output(tuple(self._send_on(node) for node in leaving))
        rewrite(self.code.graph)
        drop_unread(self.code.graph)
        self._note_names()
        return self.code

    def _take_in(self, arriving: Sequence[Crossing] | None) -> None:
        graph = self.code.graph
        if arriving is None:
            for node in self.program.placeholders():
                if self.program.graph.is_input(node.name):
                    self.env[node] = {Replicate(): graph.placeholder(node.name)}
            return
        self._batch = graph.placeholder("num_samples")
        for crossing in arriving:
            name = crossing.node.name
            self.env[crossing.node] = {crossing.layout: graph.placeholder(f"{name}_given")}

    def _send_on(self, node: Node) -> Any:
        """Return a value as it goes to the next stage: as it was made, or summed if that exists."""
        forms = self.env[node]
        made = next(iter(forms))
        layout = Replicate() if isinstance(made, Partial) and Replicate() in forms else made
        self.code.leaving.append(Crossing(node, layout, self.program.has_grad(node)))
        return forms[layout]

    def _note_names(self) -> None:
        """Note what is read here, how it is kept, and what its gradients are."""
        self.code.names = {n.target for n in self.code.graph.nodes if n.op == "get_attr"}
        for node in self.program.placeholders():
            name = self.program.graph.names.get(node.name)
            if name not in self.code.names:
                continue
            layout = self._storage.layouts.get(node)
            if isinstance(layout, Shard):
                self.code.stored[name] = layout
            if node in self._storage.used_in_parts:
                self.code.summed_over_tp.add(name)
                value = self.program.value(node)
                self.code.reduced_bytes += gradient_bytes(value, Varying())

    # Values

    def _obtain(self, node: Node, layout: Layout) -> Any:
        """Return this rank's value of `node` in `layout`, converted where it is not there yet."""
        if not is_tensor(node):
            return self._number(node)
        forms, value = dict(self.env[node]), self.program.value(node)
        if layout in forms:
            return forms[layout]
        if not (goes_back := self._goes_back or not value.has_grad):
            value = replace(value, has_grad=False)
        if (
            node.op == "placeholder"
            and node not in self._storage.used_both_ways
            and Replicate() in forms
        ):
            forms = {Varying(): forms[Replicate()], **forms}
        path = cheapest_path(value, list(forms), layout)
        assert path is not None, f"no path from {list(forms)} to {layout} for {node.name}"
        for step in path:
            forms[step.target] = self._convert(node, value, step, forms[step.source])
        result = forms[layout]
        if node.name not in self._changing and goes_back:
            self.env[node].update(forms)
        return result

    def _convert(self, node: Node, value: Value, step: Redistribution, x: Any) -> Any:
        if isinstance(step.source, Replicate) and not value.has_grad:
            if isinstance(step.target, Varying):
                return x
            if not isinstance(step.target, Partial):  # no gradient is to be made whole
                step = Redistribution(Varying(), step.target)
        name = self.add_module(step.name, Redistribute(step, value, self.rank))
        if step.name != "take":
            self.code.sent.append(Sent(name, node.name, step.forward, step.backward))
        return self.code.graph.call_module(name, (x, self.batch))

    @property
    def batch(self) -> Any:
        """The samples of the step, as a value of the code."""
        if self._batch is None:
            if self.program.graph.symbol is None:
                return self.program.batch
            first = next(n for n in self.env if self.program.graph.is_input(n.name))
            dim = self.program.samples_dim(first) or 0
            x = self.env[first][Replicate()]
            after = [n for n in self.code.graph.nodes if n.op == "placeholder"][-1]
            with self.code.graph.inserting_after(after):
                self._batch = self.code.graph.call_function(aten.sym_size.int, (x, dim))
        return self._batch

    def _number(self, node: Node) -> Any:
        """Return a number that the program computes from the batch."""
        value = node.meta.get("val")
        if isinstance(value, int | float | bool):
            return value
        symbol = self.program.graph.symbol
        if isinstance(value, torch.SymInt) and (value.node.expr / symbol).is_Integer:
            return self._sized(value.node.expr, None)
        if node not in self._numbers_of:  # half of the batch, its root: as the program has it
            self._numbers_of[node] = self.call(node.target, *self._local(node.args, {}))
        return self._numbers_of[node]

    def _sized(self, expression: Any, layout: Layout | None) -> Any:
        """Return a size, of the samples of this rank only where `layout` splits them."""
        if isinstance(expression, int) or expression.is_number:
            return int(expression)
        key = (expression, isinstance(layout, Samples))
        if key not in self._sizes:
            ratio = expression / self.program.graph.symbol
            if not ratio.is_Integer:
                raise ModelError(f"the size {expression} is no multiple of the batch")
            count = self.batch
            if isinstance(layout, Samples):
                count = self.call(even_size, self.rank, self.world, count)
            self._sizes[key] = count if ratio == 1 else self.call(operator.mul, count, int(ratio))
        return self._sizes[key]

    # Calls

    def _write(self, call: Call) -> None:
        node = call.node
        if node.target is operator.getitem:
            source, i = node.args
            self.env[node] = {layouts[i]: given[i] for layouts, given in self.env[source].items()}  # type: ignore[index]
            return
        if not is_tensor(node) and not is_tuple(node):
            return  # a number; computed where it is used
        choice = self.assignment.choices[node.name]
        self.current, self.choice = call, choice
        self._without_autocast = node.meta.get("autocast") is False
        self._goes_back = self.program.has_grad(node)
        given = {
            source: self._obtain(source, layout)
            for source, layout in zip(call.inputs, choice.inputs, strict=True)
        }
        self.given = {k: self._local(v, given) for k, v in call.given.items()}
        self._args = self._local((node.args, node.kwargs), given)
        result: Any
        if "draw" in node.meta:
            result = self._draw(call)
        elif call.packet is aten.batch_norm and call["training"]:
            result = self._batch_norm(call)
        else:
            result = choice.local(self) if choice.local is not None else self.again()
        if not is_tensor(node):
            num = len(node.meta["val"])
            if isinstance(result, Node):
                result = [self.call(operator.getitem, result, i) for i in range(num)]
            self.env[node] = {choice.output: list(result)}  # type: ignore[dict-item]
            return
        self.env[node] = {choice.output: result}  # type: ignore[dict-item]
        if isinstance(result, Node):
            self.code.sources[result.name] = (node.name, choice.output)  # type: ignore[assignment]

    def _local(self, argument: Any, given: dict[Node, Any]) -> Any:
        """Return an argument with this rank's values, sizes and device."""

        def one(x: Any) -> Any:
            if isinstance(x, Node):
                return given[x] if x in given else self._obtain(x, Replicate())
            return self.device if isinstance(x, torch.device) else x

        return pytree.tree_map(one, argument)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a function."""
        return self._add(target, args, kwargs)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        schema = getattr(target, "_schema", None)
        if self._without_autocast and schema is not None and not schema.is_mutable:
            target, args = without_autocast, (target, *args)
        return self.code.graph.call_function(target, args, kwargs)

    def again(self, /, **changes: Any) -> Node:
        """Add the op itself, with some arguments changed."""
        node = self.current.node
        if not changes:
            args, kwargs = self._args
            return self._add(self._in_place(args) or node.target, args, kwargs)
        schema = getattr(node.target, "_schema", None)
        given = {**self.given, **changes}
        if schema is None:
            return self._add(node.target, (), given)
        args = tuple(given[a.name] for a in schema.arguments if not a.kwarg_only)
        kwargs = {a.name: given[a.name] for a in schema.arguments if a.kwarg_only}
        return self._add(node.target, args, kwargs)

    def _in_place(self, args: Sequence[Any]) -> Any:
        """Return the op that the model calls on this rank's own value, where that changes it."""
        made: Any = args[0] if args else None
        calls = isinstance(made, Node) and made.op in ("call_function", "call_module")
        if not calls or isinstance(self.code.modules.get(str(made.target)), Redistribute):
            return None  # autograd lets nothing change what a stage, or a redistribution, is given
        return self.current.node.meta.get("in_place")

    def sizes(self, *, exact: bool = False) -> list[Any]:
        """Return the sizes of this rank's part of the result; see `Emitter`."""
        node, layout = self.current.node, self.choice.output
        assert not isinstance(layout, tuple)
        sizes: list[Any] = []
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(layout, Shard) and layout.dim == dim:
                sizes.append(len(layout.owners[self.rank]))
            elif isinstance(size, int):
                sizes.append(size)
            elif not exact and -1 not in sizes:
                sizes.append(-1)
            else:
                own = layout if getattr(layout, "dim", None) == dim else None
                sizes.append(self._sized(size.node.expr, own))
        return sizes

    def fraction_of(self, layout: Split, size: int) -> Any:
        """Return this rank's part of a dim, as a fraction."""
        if isinstance(layout, Shard):
            return len(layout.owners[self.rank]) / size
        count = self.call(even_size, self.rank, self.world, self.batch)
        return self.call(fraction, count, self.batch)

    def add_module(self, kind: str, module: nn.Module) -> str:
        """Keep a module under `kind` and a number; returns its name."""
        number = self._numbers[kind] = self._numbers.get(kind, -1) + 1
        name = f"{kind}_{number}" if number else kind
        self.code.modules[name] = module
        return name

    # Ops that are not the same call on a part

    def _batch_norm(self, call: Call) -> Node:
        layout, given = self.choice.output, self.given
        over_tp = isinstance(layout, Samples) or (
            self.choice.split is not None and getattr(layout, "dim", 1) != 1
        )
        tensors = [given[key] for key in _NORM]
        if not over_tp and self.replicas == 1:
            numbers = [given[key] for key in ("momentum", "eps", "cudnn_enabled")]
            return self.call(local_norm, *tensors, *numbers)
        norm = SyncNorm(over_tp, given["momentum"], given["eps"])
        name = self.add_module("batch_norm_sync", norm)
        self.code.sent.append(self._norm_bytes(name, call, over_tp))
        return self.code.graph.call_module(name, tuple(tensors))

    def _norm_bytes(self, name: str, call: Call, over_tp: bool) -> Sent:
        """Count the exchange of one replica's ranks with all that they exchange with."""
        x = call["input"]
        others = self.replicas * (self.world if over_tp else 1) - 1
        in_parts = isinstance(self.choice.output, Shard) and not over_tp
        channels = call.shape(x)[1] * (1 if in_parts else self.world)
        forward, backward = statistics_bytes(channels, x.meta["val"].itemsize, self.world, others)
        has_grad = int(self.program.has_grad(call.node))
        return Sent(name, call.node.name, forward, has_grad * backward, is_statistics=True)

    def _draw(self, call: Call) -> Node:
        layout = self.choice.output
        assert not isinstance(layout, tuple)
        module, names = random_masks.draw_module(call, layout, self.rank)
        kind = type(module).__name__.lower()
        name = self.add_module(kind, WithoutAutocast(module) if self._without_autocast else module)
        args = [self.sizes(exact=True) if key == "size" else self.given[key] for key in names]
        return self.code.graph.call_module(name, (*args, self.batch))
