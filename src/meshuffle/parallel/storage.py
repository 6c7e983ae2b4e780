"""How a rank keeps parameters and buffers, and what their gradients are."""

from __future__ import annotations

from torch.fx import Node

from meshuffle.layout.assign import Assignment
from meshuffle.layout.call import Program
from meshuffle.layout.layout import Layout, Partial, Replicate, Shard


class Storage:
    """In which layout each parameter and buffer is kept, and what its gradient is.

    One that every op reads in the same part is kept in that part. A gradient is whole on each
    rank where the parameter is used whole, a term of a sum where ranks use it in different parts;
    in a parameter that is `mixed`, each use in parts sums its own.
    """

    def __init__(self, assignment: Assignment, stored: dict[str, Layout]) -> None:
        program = assignment.program
        uses: dict[Node, set[Layout]] = {}
        for call in program.calls:
            choice = assignment.choices.get(call.node.name)
            layouts = choice.inputs if choice else (Replicate(),) * len(call.inputs)
            for source, layout in zip(call.inputs, layouts, strict=True):
                if source.op == "placeholder":
                    uses.setdefault(source, set()).add(layout)
        uses |= {node: {Replicate()} for node in program.outputs() if node.op == "placeholder"}
        self.layouts: dict[Node, Layout] = {}
        self.partial: set[Node] = set()
        self.mixed: set[Node] = set()
        for node, used in uses.items():
            self._decide(node, used, stored.get(program.graph.names.get(node.name, "")), program)

    def _decide(
        self, node: Node, layouts: set[Layout], stored: Layout | None, program: Program
    ) -> None:
        if program.graph.is_input(node.name):
            return
        if stored is None and len(layouts) == 1:
            (only,) = layouts
            stored = only if isinstance(only, Shard) else None
        if isinstance(stored, Shard):
            self.layouts[node] = stored
            return
        if not program.has_grad(node):
            return
        in_part = {x for x in layouts if not isinstance(x, Replicate | Partial)}
        if in_part and in_part != layouts:
            self.mixed.add(node)
        elif in_part:
            self.partial.add(node)
