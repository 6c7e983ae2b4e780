"""The Graph: torch.export's program, and per op its shapes, FLOPs, bytes and liveness.

Shapes hold the batch as a symbol; `Graph.ops(batch)` puts a number in its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from meshuffle.errors import ModelError
from meshuffle.graph.flops import flops_of
from meshuffle.graph.node import is_in_place, memory_owners, module_of, tensors_of_node


@dataclass(frozen=True)
class Op:
    """One call of the program at one batch size.

    Attributes:
        name: name of the op's value, unique in the Graph.
        target: the op that is called, for example `aten.conv2d.default`.
        module: dotted path of the module that made the call; empty at the root.
        inputs: names of the values, parameters and buffers that it reads, each once.
        shapes: sizes of its tensors: one, or several for `chunk` and the like.
        dtype: dtype of the first tensor; None where the value is a number.
        flops: 2 per multiply-add of convolutions, matrix products and attention, as
            `torch.utils.flop_counter` has it; 0 for all else.
        read_bytes, written_bytes: bytes of the tensors that it reads and makes; 0 for a view.
        parameter_bytes: the part of `read_bytes` that is parameters.
        last_use: position of the last op that reads the memory of its value.
        owner: name of the value whose memory it shares; its own where it allocates.
    """

    name: str
    target: str
    module: str
    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    flops: int
    read_bytes: int
    written_bytes: int
    parameter_bytes: int
    last_use: int
    owner: str


class Graph:
    """What a model computes, with the cost of each op.

    Args:
        program: what torch.export returned; its `graph` is the one IR for planning, lowering and
            export.
        batch: samples of the example that the model was captured with.
        training: whether the model was captured in train mode.
        tied: the first name of each parameter or buffer that has several, by the others.
    """

    def __init__(
        self,
        program: ExportedProgram,
        batch: int,
        training: bool,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.batch, self.training = program, batch, training
        tied = tied or {}
        self.names: dict[str, str] = {}
        """The model's own name of each parameter, buffer and constant, by placeholder."""
        self.constants: dict[str, Tensor] = {}
        """Tensors that the program holds and the model does not register, by the same names."""
        self._kinds: dict[str, InputKind] = {}
        for spec in program.graph_signature.input_specs:
            self._kinds[spec.arg.name] = spec.kind
            if spec.kind == InputKind.CONSTANT_TENSOR:  # train and eval mode may have others
                self.names[spec.arg.name] = name = f"{spec.target}{'' if training else '_eval'}"
                self.constants[name] = program.constants[spec.target]
            elif spec.target is not None:
                self.names[spec.arg.name] = tied.get(spec.target, spec.target)
        self.symbol = self._find_symbol()
        self._ops: dict[int | None, tuple[Op, ...]] = {}

    def is_trained(self, name: str) -> bool:
        """Tell whether a placeholder is a parameter that has a gradient."""
        if self._kinds.get(name) != InputKind.PARAMETER:
            return False
        return bool(self.program.state_dict[self.names[name]].requires_grad)

    def is_input(self, name: str) -> bool:
        """Tell whether a placeholder is what the caller passes."""
        return self._kinds.get(name) == InputKind.USER_INPUT

    def _find_symbol(self) -> Any:
        """Return the batch as a sympy symbol, or None where the model fixes it."""
        for node in self.nodes("placeholder"):
            value = node.meta.get("val")
            if self._kinds[node.name] == InputKind.USER_INPUT and isinstance(value, Tensor):
                size = value.shape[0]
                expression = size.node.expr if isinstance(size, torch.SymInt) else None
                return None if expression is None or expression.is_number else expression
        return None

    def nodes(self, op: str = "call_function") -> Iterator[Node]:
        """Return the fx nodes of one kind, in order."""
        return (node for node in self.program.graph.nodes if node.op == op)

    def inputs(self) -> Iterator[Tensor]:
        """Return the tensors that the caller passes, as they were captured."""
        for node in self.nodes("placeholder"):
            if self._kinds[node.name] == InputKind.USER_INPUT:
                yield node.meta["val"]

    def shape(self, value: Tensor, batch: int | None = None) -> tuple[int, ...]:
        """Return the shape of a node's `meta["val"]` with `batch` samples."""
        return tuple(self.number(size, batch) for size in value.shape)

    def number(self, size: int | torch.SymInt, batch: int | None = None) -> int:
        """Return `size` with `batch` samples; None is the batch of the example.

        Raises:
            ModelError: the Graph is of one fixed batch, or `size` depends on the data.
        """
        batch = self.batch if batch is None else batch
        if self.symbol is None and batch != self.batch:
            raise ModelError(
                f"this model was captured with {self.batch} samples and fixes that number; "
                f"capture it again with {batch}"
            )
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if self.symbol is not None:
            expression = expression.subs(self.symbol, batch)
        if not expression.is_number:
            raise ModelError(f"the size {size.node.expr} depends on the values of the input")
        return int(expression)

    def ops(self, batch: int | None = None) -> tuple[Op, ...]:
        """Return all calls in order, with their costs for `batch` samples."""
        if batch not in self._ops:
            nodes = list(self.nodes())
            owners = memory_owners(nodes)
            last_uses = _last_uses(nodes, owners, self._outputs())
            self._ops[batch] = tuple(self._op(n, batch, owners[n], last_uses) for n in nodes)
        return self._ops[batch]

    def _outputs(self) -> list[Node]:
        return [node for output in self.nodes("output") for node in output.all_input_nodes]

    def _op(self, node: Node, batch: int | None, owner: Node, last_uses: Mapping[Node, int]) -> Op:
        outputs = tensors_of_node(node)
        shapes = tuple(self.shape(value, batch) for value in outputs)
        inputs = list(dict.fromkeys(node.all_input_nodes))
        allocates = owner is node or is_in_place(node)
        read = {n: self._num_bytes(n, batch) for n in inputs} if allocates else {}
        parameters = [n for n in read if self._kinds.get(n.name) == InputKind.PARAMETER]
        return Op(
            name=node.name,
            target=str(node.target),
            module=module_of(node),
            inputs=tuple(n.name for n in inputs),
            shapes=shapes,
            dtype=outputs[0].dtype if outputs else None,
            flops=flops_of(node, functools.partial(self.concrete, batch=batch)),
            read_bytes=sum(read.values()),
            written_bytes=self._num_bytes(node, batch) if allocates else 0,
            parameter_bytes=sum(read[n] for n in parameters),
            last_use=last_uses[owner],
            owner=owner.name,
        )

    def concrete(self, argument: Any, batch: int | None) -> Any:
        """Return a node's argument with shapes in place of tensors and numbers of symbols."""
        if isinstance(argument, Node):
            argument = argument.meta.get("val")
        if isinstance(argument, Tensor):
            return self.shape(argument, batch)
        if isinstance(argument, torch.SymInt):
            return self.number(argument, batch)
        return argument

    def _num_bytes(self, node: Node, batch: int | None) -> int:
        return sum(math.prod(self.shape(x, batch)) * x.itemsize for x in tensors_of_node(node))

    def live_bytes(self, batch: int | None = None) -> list[int]:
        """Return, after each op, the bytes of values that it or a later op still reads.

        Parameters, buffers and inputs are not counted; nothing is kept for a backward pass.
        """
        ops = self.ops(batch)
        change = [0] * (len(ops) + 1)
        for position, op in enumerate(ops):
            if op.owner == op.name:
                change[position] += op.written_bytes
                change[op.last_use + 1] -= op.written_bytes
        live, total = [], 0
        for difference in change[:-1]:
            total += difference
            live.append(total)
        return live

    def parameter_bytes(self) -> int:
        """Return the bytes of all parameters."""
        return sum(
            self._num_bytes(node, None)
            for node in self.nodes("placeholder")
            if self._kinds[node.name] == InputKind.PARAMETER
        )

    def __str__(self) -> str:
        """Return a line per op: name, call, shapes, MFLOPs, module."""
        rows = [
            (
                op.name,
                op.target.removesuffix(".default"),
                " ".join("×".join(map(str, shape)) for shape in op.shapes),
                f"{op.flops / 1e6:.3f}" if op.flops else "",
                op.module,
            )
            for op in self.ops()
        ]
        head = ("value", "op", "shape", "MFLOPs", "module")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        template = "  ".join(f"{{:<{width}}}" for width in widths)
        return "\n".join(template.format(*row).rstrip() for row in [head, *rows])


def _last_uses(
    nodes: Sequence[Node], owners: Mapping[Node, Node], outputs: Sequence[Node]
) -> dict[Node, int]:
    """Return the position of the last op that reads each owner's memory, by any of its views."""
    last: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        for used in [node, *node.all_input_nodes]:
            last[owners.get(used, used)] = position
    for node in outputs:
        last[owners.get(node, node)] = len(nodes) - 1
    return last
