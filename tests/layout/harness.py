"""One op at a time, under every choice of its rule, on ranks that are numbers: no process group.

`check` captures a small model, asks the rule of one of its ops for all choices, lowers the model
once per choice (all other ops run whole), runs each rank's code up to the op, puts the ranks'
results together as the choice says, and compares them with the op on the whole, and so the
gradients. The program is that of a model of which nothing is trained, so that all that an op reads
is taken out of whole tensors, without a collective.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis import Phase, settings
from torch import Tensor, fx, nn
from torch.fx import Node

from meshuffle.graph import capture
from meshuffle.graph.node import is_tensor, is_tuple, packet_of
from meshuffle.layout.assign import Assignment
from meshuffle.layout.layout import (
    Layout,
    Owners,
    Partial,
    Replicate,
    Samples,
    Shard,
    Varying,
    Window,
)
from meshuffle.layout.program import Call, Program
from meshuffle.layout.rule import Choice, legal, replicated
from meshuffle.layout.storage import Storage
from meshuffle.parallel.code import StageCode
from meshuffle.parallel.lower import _Lowering
from meshuffle.parallel.redistribute import Redistribute
from tests.layout.differences import differs, gradients_differ, joined


def few(examples: int) -> settings:
    """Return hypothesis settings: so many examples, and the first that fails as it is."""
    return settings(max_examples=examples, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Apply(nn.Module):
    """A function of its inputs, and of tensors that it holds as buffers."""

    def __init__(self, function: Callable[..., Any], *held: Tensor) -> None:
        super().__init__()
        self.function, self.num = function, len(held)
        for i, tensor in enumerate(held):
            self.register_buffer(f"held{i}", tensor)

    def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
        inputs = [x for x in (a, b, c, d) if x is not None]
        return self.function(*inputs, *(getattr(self, f"held{i}") for i in range(self.num)))


@dataclass
class Checked:
    """What `check` saw: choices that passed, and faults of those that did not."""

    passed: list[Choice] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def dims(self) -> set[int]:
        """Return the dims of the first result that some choice splits."""
        outputs = [c.output[0] if isinstance(c.output, tuple) else c.output for c in self.passed]
        return {o.dim for o in outputs if isinstance(o, Shard | Samples)}

    def has(self, kind: type[Layout]) -> bool:
        """Tell whether some choice has a result of this kind of layout."""
        return any(isinstance(c.output, kind) for c in self.passed)


def check(
    model: nn.Module,
    *inputs: Tensor,
    op: Any,
    world: int = 2,
    train: bool = False,
    seed: int = 0,
    other_batch: int = 0,
) -> Checked:
    """Try every choice of the rule of the first call of `op`.

    Args:
        model: as a whole; its parameters are frozen.
        inputs: batch in dim 0.
        op: ATen's packet, or a function.
        world: ranks.
        train: in train mode.
        seed: of the layouts that readers want and that arrive.
        other_batch: samples to run with, where not those of `inputs`.
    """
    program = captured(model, inputs, world, train)
    (call, *_) = (c for c in program.calls if packet_of(c.node) is op)
    for parameter in model.parameters():
        parameter.requires_grad_()  # the program says otherwise
    ran = [x[:1].expand(other_batch, *x.shape[1:]).clone() for x in inputs] if other_batch else []
    for i, x in enumerate(ran):
        if x.is_floating_point():
            x += torch.arange(x.numel()).view(x.shape).remainder(7) * (i + 1)
    given = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in ran or inputs)
    tensors = {name: t.clone() for name, t in whole_tensors(program, model).items()}
    whole = run_program(program, tensors, given)[call.node]
    checked = Checked()
    for choice in choices_of(call, random.Random(seed)):
        fault = improper(call, choice)
        if communicates(call, choice):
            continue
        fault = fault or compared(call, choice, whole, model, given)
        if fault:
            checked.faults.append(f"{op}: {choice.inputs} → {choice.output}: {fault}")
        else:
            checked.passed.append(choice)
    return checked


def ok(checked: Checked, *dims: int) -> Checked:
    """Require no fault, and a choice that splits each of these dims of the result."""
    assert not checked.faults, "\n".join(checked.faults)
    assert checked.passed, "the rule yields nothing"
    assert checked.dims() >= set(dims), f"only {checked.dims()} of {set(dims)} are split"
    return checked


def captured(model: nn.Module, inputs: Sequence[Tensor], world: int, train: bool) -> Program:
    """Return a frozen model's program."""
    model.double().train(train).requires_grad_(False)
    return Program(capture(model, inputs, train=train), inputs[0].shape[0], world)


# What a rule is asked


def random_owners(size: int, world: int, rng: random.Random) -> Iterator[Owners]:
    """Yield partitions in which each rank has something: even, uneven, in blocks, at random."""
    if size < world:
        return
    yield Shard.even(0, size, world).owners
    ends = sorted(rng.sample(range(1, size), world - 1))
    bounds = [0, *ends, size]
    yield Shard.blocks(0, [bounds[r + 1] - bounds[r] for r in range(world)]).owners
    for block in range(1, size // world + 1):
        if size % block == 0:
            numbers = list(range(size // block))
            rng.shuffle(numbers)
            ends = sorted(rng.sample(range(1, len(numbers)), world - 1))
            bounds = [0, *ends, len(numbers)]
            yield tuple(
                tuple(
                    n * block + i for n in numbers[bounds[r] : bounds[r + 1]] for i in range(block)
                )
                for r in range(world)
            )


def layouts_of(program: Program, value: Tensor, rng: random.Random) -> list[Layout]:
    """Return layouts in which a tensor may be wanted or arrive."""
    sizes, world, samples = program.shape_of(value), program.world, program.samples_dim_of(value)
    found: list[Layout] = [] if samples is None else [Samples(samples)]
    for dim, size in enumerate(sizes):
        if isinstance(value.shape[dim], int):
            found += [Shard(dim, owners) for owners in random_owners(size, world, rng)]
    return found


def choices_of(call: Call, rng: random.Random) -> list[Choice]:
    """Return all that the rule says to random layouts of the results and of the inputs."""
    program = call.program

    def of(value: Tensor) -> list[Layout]:
        return layouts_of(program, value, rng)

    each = [of(result) for result in call.results]
    wanted: list[Any] = each[0]
    if is_tuple(call.node):
        shortest = min(map(len, each))
        wanted = [tuple(layouts[k] for layouts in each) for k in range(shortest)]
        wanted += [(layout,) * len(each) for layout in each[0]]
        sizes = [program.shape_of(result) for result in call.results]
        wanted = [w for w in wanted if all(map(fits, w, sizes))]
    arriving = [[*of(n.meta["val"]), Replicate(), Varying(), Partial()] for n in call.inputs]
    return legal(call, wanted, arriving)


def fits(layout: Layout, sizes: Sequence[int]) -> bool:
    """Tell whether a tensor of these sizes can lie so."""
    if isinstance(layout, Shard):
        return layout.dim < len(sizes) and layout.size == sizes[layout.dim]
    if isinstance(layout, Window):
        return max(i for part in layout.needs for i in part) < sizes[layout.dim]
    return not isinstance(layout, Samples) or layout.dim < len(sizes)


def improper(call: Call, choice: Choice) -> str | None:
    """Say what is wrong with a choice before anything is computed."""
    if len(choice.inputs) != len(call.inputs):
        return "not one layout per input"
    outputs = choice.output if isinstance(choice.output, tuple) else (choice.output,)
    values = call.results
    if len(outputs) != len(values):
        return "not one layout per result"
    pairs = [*zip(choice.inputs, [n.meta["val"] for n in call.inputs], strict=True)]
    for layout, value in [*pairs, *zip(outputs, values, strict=True)]:
        sizes = call.program.shape_of(value)
        if not fits(layout, sizes):
            return f"{layout} of {sizes}"
        samples = call.program.samples_dim_of(value)
        if isinstance(layout, Samples) and layout.dim != samples:
            return f"{layout}, but samples are in dim {samples}"
        if isinstance(layout, Shard | Window):
            if not isinstance(value.shape[layout.dim], int):
                return f"{layout} cuts the batch, whose size is not known"
            if not all(layout.owners if isinstance(layout, Shard) else layout.needs):
                return f"{layout}: a rank has nothing"
    if any(isinstance(output, Window) for output in outputs):
        return "a result is no window"
    return None


def communicates(call: Call, choice: Choice) -> bool:
    """Tell whether the op itself needs other ranks: batch norm of a batch that is split."""
    return choice.sent_bytes > 0


# Running


class Run(fx.Interpreter):
    """Runs a graph on tensors by name, and keeps every value."""

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        root = nn.ModuleDict(modules)
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.tensors = tensors

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[target]


def whole_tensors(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, buffers and constants by the model's names."""
    known = dict(model.named_parameters(remove_duplicate=False))
    known |= dict(model.named_buffers(remove_duplicate=False))
    constants = program.graph.program.constants
    return {n: known[n] if n in known else constants[n] for n in program.graph.names.values()}


def run_program(
    program: Program, tensors: Mapping[str, Tensor], inputs: Iterable[Tensor]
) -> dict[Node, Any]:
    """Return every value of the functional program."""
    names, given = program.graph.names, iter(inputs)
    args = [
        tensors[names[n.name]] if n.name in names else next(given) for n in program.placeholders()
    ]
    run = Run(program.fx, tensors)
    run.run(*args)
    return run.env | dict(zip(program.placeholders(), args, strict=True))


class _Term(nn.Module):
    """In place of `divide`: here one process adds up the gradients of all ranks."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def forward(self, x: Tensor, _: int) -> Tensor:
        return x / self.world


def is_division(module: nn.Module) -> bool:
    return isinstance(module, Redistribute) and module.step.name == "divide"


def lowered(call: Call, choice: Choice, rank: int) -> StageCode:
    """Return a rank's code that ends with the op."""
    program = call.program
    choices = {
        c.node.name: replicated(c) for c in program.calls if is_tensor(c.node) or is_tuple(c.node)
    }
    choices[call.node.name] = choice
    assignment = Assignment(program, choices)
    storage = Storage(assignment, None)
    lowering = _Lowering(assignment, rank, 1, torch.device("cpu"), storage, {})
    with mock.patch("meshuffle.parallel.lower.drop_unread"):  # the op's result may be unread
        code = lowering.run(0, len(program.calls), None, None)
    local = lowering.env[call.node][choice.output]  # type: ignore[index]
    (output,) = (node for node in code.graph.nodes if node.op == "output")
    output.args = (local,)
    for node in reversed(list(code.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            code.graph.erase_node(node)
    return code


def compared(
    call: Call, choice: Choice, whole: Any, model: nn.Module, inputs: Sequence[Tensor]
) -> str | None:
    """Run all ranks and say how their results, put together, differ from the whole."""
    parts = []
    for rank in range(call.world):
        try:
            code = lowered(call, choice, rank)
            tensors = {
                name: part_of(t, code.stored.get(name), rank).clone()
                for name, t in whole_tensors(call.program, model).items()
            }
            modules = {
                name: _Term(call.world) if is_division(module) else module
                for name, module in code.modules.items()
            }
            parts.append(Run(code.graph, tensors, modules).run(*inputs))
        except Exception as error:  # noqa: BLE001  # whatever a rule leads to is a fault of it
            return f"rank {rank}: {type(error).__name__}: {error}"
    if isinstance(choice.output, tuple):
        pieces = zip(choice.output, zip(*parts, strict=True), whole, strict=True)
    else:
        pieces = zip([choice.output], [parts], [whole], strict=True)
    leaves = [x for x in (*inputs, *model.parameters()) if x.requires_grad]
    for layout, locals_, expected in pieces:
        try:
            found = joined(layout, locals_, expected, inputs[0].shape[0])
        except ValueError as error:
            return str(error)
        fault = differs(found, expected)
        if not fault and expected.requires_grad and leaves:
            fault = gradients_differ(found, expected, leaves)
        if fault:
            return fault
    return None


def part_of(whole: Tensor, layout: Shard | None, rank: int) -> Tensor:
    """Return a rank's part."""
    if layout is None:
        return whole
    return whole.index_select(layout.dim, torch.tensor(layout.owners[rank]))
