"""A layout for every op: the assignment that sends the fewest bytes.

Computing a large value whole on every rank, so as to send a small one, is no gain. The bytes of
whole values therefore count too, at a sixteenth of sent ones: memory is that much faster.

The search walks over the program five times:

1. Backwards, it collects the layouts that readers of each value would like. So a convolution in
   front of a shuffle learns which groups come behind it.
2. Forwards, it lists the choices of each op, given those wishes and what can arrive.
3. and 4. It repeats both walks, because how one operand arrives is how another is wanted: a unit's
   output in the layout of the residual that it is added to.
5. Forwards, it searches over states. A state says in which layouts the values exist that are still
   to be read, and how many bytes were sent so far. Where two paths lead to the same state the
   cheaper one stays, and of all states the best few.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

from torch.fx import Node

import meshuffle.layout.rules  # noqa: F401  # registers them
from meshuffle.errors import PlanError
from meshuffle.graph import Graph
from meshuffle.graph.node import is_tensor
from meshuffle.layout.layout import Layout, Replicate, Shard, Window, even_size, unique
from meshuffle.layout.program import Call, Program
from meshuffle.layout.redistribution import cheapest_path
from meshuffle.layout.rule import Choice, legal, replicated
from meshuffle.layout.traffic import gradient_bytes

_MOST_WANTED, _MOST_POSSIBLE, _MOST_CHOICES, _BEAM = 6, 10, 24, 24
_SMALL = 0.002  # of all FLOPs: such an op may run whole on every rank where that sends less
_LARGE, _SENT = 1 << 20, 16  # a whole value counts by full MB; 16 of its bytes are as one sent

Layouts = Layout | tuple[Layout, ...]


@dataclass
class Assignment:
    """Which choice each op takes.

    Attributes:
        program: the ops.
        choices: by the name of the op's value.
        flops: FLOPs of each op that has some, all ranks together, by name.
    """

    program: Program
    choices: dict[str, Choice]
    flops: dict[str, int] = field(default_factory=dict)

    def sharded_fraction(self) -> float:
        """Return the fraction of FLOPs in ops of which each rank does a part."""
        total = sum(self.flops.values())
        split = sum(f for name, f in self.flops.items() if self.choices[name].split is not None)
        return split / total if total else 0.0

    def whole_flops(self) -> list[tuple[str, float]]:
        """Return ops that every rank computes whole, and their part of the FLOPs, largest first."""
        total = sum(self.flops.values())
        alone = [name for name in self.flops if self.choices[name].split is None]
        return sorted(((n, self.flops[n] / total) for n in alone), key=lambda pair: -pair[1])

    def imbalance(self) -> float:
        """Return the busiest rank's FLOPs over the mean."""
        world = self.program.world
        load = [Fraction(0)] * world
        for name, flops in self.flops.items():
            for rank, fraction in enumerate(self.work_fractions(name)):
                load[rank] += fraction * flops
        return float(max(load) * world / sum(load)) if any(load) else 1.0

    def work_fractions(self, name: str) -> list[Fraction]:
        """Return the fraction of an op's work that each rank does; 1 where all do all of it."""
        return _work_fractions(self.choices[name], self.program.batch, self.program.world)

    def resized(self, batch: int) -> Assignment:
        """Return the same choices for another number of samples; `flops` stay as they are."""
        program = Program(self.program.graph, batch, self.program.world)
        return replace(self, program=program)


def _work_fractions(choice: Choice, batch: int, world: int) -> list[Fraction]:
    if choice.split is None:
        return [Fraction(1)] * world
    if isinstance(choice.split, Shard):
        return [Fraction(len(part), choice.split.size) for part in choice.split.owners]
    return [Fraction(even_size(rank, world, batch), batch) for rank in range(world)]


def assign(
    graph: Graph,
    world: int,
    *,
    batch: int | None = None,
    prefer: str | None = None,
    stored: Mapping[str, Layout] | None = None,
    must_split: bool = True,
) -> Assignment:
    """Return the assignment that sends the fewest bytes, as far as the search sees.

    Every op that computes something worth mentioning is split, if it has a rule.

    Args:
        graph: what to lay out.
        world: ranks of the `tp` axis.
        batch: samples of a step; None is the example's.
        prefer: `channel`, `spatial` or `batch`: ops that can be split so are.
        stored: layouts that parameters and buffers have already, by the model's names.
        must_split: False where the model has been split in its other mode.

    Raises:
        PlanError: no op of the model can be split in `world`.
    """
    program = Program(graph, graph.batch if batch is None else batch, world)
    search = _Search(program, prefer, stored or {})
    choices = search.run()
    if (
        must_split
        and world > 1
        and not any(choice.split is not None for choice in choices.values())
    ):
        raise PlanError(
            f"tp={world}: no op of this model can be split in {world}; use a smaller tp, or dp"
        )
    flops = {name: f for name, f in search.flops.items() if name in choices and f}
    return Assignment(program, choices, flops)


class _State(NamedTuple):
    """A point of the search, behind one of the calls.

    Attributes:
        cost: (cost, bytes of whole values) so far.
        forms: the layouts in which each live value exists.
        parent: the state behind the call before.
        choice: the choice that led from there to here.
    """

    cost: tuple[int, int]
    forms: tuple[Any, ...]
    parent: Any
    choice: Choice | None


class _Search:
    def __init__(self, program: Program, prefer: str | None, stored: Mapping[str, Layout]) -> None:
        self.program, self.prefer = program, prefer
        graph = program.graph
        self.flops = {op.name: op.flops for op in graph.ops(program.ops_batch)}
        self.total_flops = sum(self.flops.values())
        self.stored = {
            node: stored[graph.names[node.name]]
            for node in program.placeholders()
            if graph.names.get(node.name) in stored
        }
        self.wanted: dict[Node, list[Any]] = {}
        self.possible: dict[Node, list[Any]] = {}
        self._paths: dict[Any, tuple[int, Any] | None] = {}

    def run(self) -> dict[str, Choice]:
        """Return the cheapest choice of each op, by name."""
        for _ in range(2):
            self.wanted.clear()
            for call in reversed(self.program.calls):
                self._want(call)
            choices = {call.node: self._choices(call) for call in self.program.calls}
        return self._beam(choices)

    # Walks 1 and 3

    def _want(self, call: Call) -> None:
        node, wanted = call.node, self.wanted.get(call.node, [])
        if node.target is operator.getitem:
            source, i = node.args
            assert isinstance(source, Node) and isinstance(i, int)
            pieces = self.wanted.setdefault(source, [])
            for k, layout in enumerate(wanted[:_MOST_WANTED]):
                while len(pieces) <= k:
                    pieces.append({})
                pieces[k][i] = layout
            return
        if wanted and isinstance(wanted[0], dict):
            wanted = self.wanted[node] = _completed(wanted, len(node.meta["val"]))
        arriving = [self.possible.get(source, ()) for source in call.inputs]
        for choice in legal(call, wanted, arriving):
            for source, layout in zip(call.inputs, choice.inputs, strict=True):
                known = self.wanted.setdefault(source, [])
                if isinstance(layout, Window):  # no value is made so; few rows of even parts move
                    layout = call.even(layout.dim, call.shape(source)[layout.dim])
                if isinstance(layout, Shard) and layout not in known and len(known) < _MOST_WANTED:
                    known.append(layout)

    # Walks 2 and 4

    def _choices(self, call: Call) -> list[Choice]:
        node = call.node
        if node.target is operator.getitem:
            source, i = node.args
            given = self.possible.get(source, [])  # type: ignore[arg-type]
            self.possible[node] = list(unique(layouts[i] for layouts in given))
            return []
        whole = replicated(call)
        arriving = [self.possible.get(source, []) for source in call.inputs]
        choices = legal(call, self.wanted.get(node, []), arriving)
        choices = self._preferred(node, choices, whole)[:_MOST_CHOICES]
        outputs: dict[Any, None] = dict.fromkeys(choice.output for choice in choices)
        self.possible[node] = [o for o in outputs if o != whole.output][:_MOST_POSSIBLE]
        return choices

    def _preferred(self, node: Node, choices: list[Choice], whole: Choice) -> list[Choice]:
        """Return what the search may take: sharded and balanced where the op has work to do."""
        flops = self.flops.get(node.name, 0)
        if not flops or not choices:
            return [*choices, whole]
        batch, world = self.program.batch, self.program.world
        busiest = [max(_work_fractions(choice, batch, world)) for choice in choices]
        most = min(busiest) * 5 / 4
        balanced = [c for c, share in zip(choices, busiest, strict=True) if share <= most]
        if self.prefer and any(choice.kind == self.prefer for choice in balanced):
            return [choice for choice in balanced if choice.kind == self.prefer]
        return [*balanced, whole] if flops <= _SMALL * self.total_flops else balanced

    # Walk 5

    def _beam(self, choices: Mapping[Node, list[Choice]]) -> dict[str, Choice]:
        last = self.program.last_reads()
        live: list[Node] = []
        states = [_State((0, 0), (), None, None)]
        order: list[Node] = []
        for i, call in enumerate(self.program.calls):
            node = call.node
            place = {n: j for j, n in enumerate(live)}
            stay = [j for j, n in enumerate(live) if last.get(n, -1) > i]
            is_read = last.get(node, -1) > i
            reached: dict[Any, _State] = {}
            for state in states:
                for option in self._options(call, choices, state, place):
                    cost, forms, output, choice = option
                    kept = tuple(forms[j] for j in stay)
                    kept = (*kept, frozenset((output,))) if is_read else kept
                    known = reached.get(kept)
                    if known is None or cost < known.cost:
                        reached[kept] = _State(cost, kept, state, choice)
            live = [live[j] for j in stay] + ([node] if is_read else [])
            order.append(node)
            states = heapq.nsmallest(_BEAM, reached.values(), key=lambda s: s.cost)
            if not states:
                raise PlanError(f"no layout of {node.name} follows from those of its inputs")
        best = self._end(states, live)
        taken: dict[str, Choice] = {}
        for node in reversed(order):
            if best.choice is not None:
                taken[node.name] = best.choice
            best = best.parent
        return taken

    def _options(
        self,
        call: Call,
        choices: Mapping[Node, list[Choice]],
        state: _State,
        place: dict[Node, int],
    ) -> Iterator[tuple[tuple[int, int], list[Any], Layouts, Choice | None]]:
        node = call.node
        if node.target is operator.getitem:
            source, i = node.args
            (output,) = state.forms[place[source]]  # type: ignore[index]
            yield state.cost, list(state.forms), output[i], None
            return
        for choice in choices[node]:
            forms = list(state.forms)
            cost, whole = state.cost[0] + _SENT * choice.sent_bytes, state.cost[1]
            if choice.split is None and is_tensor(node):
                num_bytes = self.program.num_bytes(node)
                cost, whole = cost + num_bytes // _LARGE * _LARGE, whole + num_bytes
            for source, layout in zip(call.inputs, choice.inputs, strict=True):
                j = place.get(source)
                path = self._path(source, None if j is None else forms[j], layout)
                if path is None:
                    break
                cost += _SENT * path[0]
                if j is not None:
                    forms[j] = path[1]
            else:
                yield (cost, whole), forms, choice.output, choice

    def _path(self, source: Node, forms: Any, layout: Layout) -> tuple[int, Any] | None:
        """Return the bytes of having a value in `layout`, and the layouts in which it then is."""
        key = (source, forms, layout)
        if key not in self._paths:
            self._paths[key] = self._find_path(source, forms, layout)
        return self._paths[key]

    def _find_path(self, source: Node, forms: Any, layout: Layout) -> tuple[int, Any] | None:
        value = self.program.value(source)
        if forms is None:
            if source in self.stored:
                forms = frozenset((self.stored[source],))
            else:
                return gradient_bytes(value, layout), None
        path = cheapest_path(value, forms, layout)
        if path is None:
            return None
        return sum(s.sent_bytes for s in path), forms | {s.target for s in path}

    def _end(self, states: Sequence[_State], live: Sequence[Node]) -> _State:
        """Return the state from which the outputs are made whole at the lowest cost."""

        def total(state: _State) -> tuple[int, int]:
            paths = [
                self._path(node, forms, Replicate())
                for node, forms in zip(live, state.forms, strict=True)
                if node in outputs
            ]
            sent = sum(path[0] if path else 1 << 60 for path in paths)
            return state.cost[0] + _SENT * sent, state.cost[1]

        outputs = set(self.program.outputs())
        return min(states, key=total)


def _completed(wanted: Sequence[Mapping[int, Layout]], num: int) -> list[tuple[Layout, ...]]:
    """Return what is wanted of several results together, where something is wanted of each."""
    first = {i: next((w[i] for w in wanted if i in w), None) for i in range(num)}
    filled = [tuple(pieces.get(i, first[i]) for i in range(num)) for pieces in wanted]
    return [whole for whole in filled if None not in whole]  # type: ignore[misc]
