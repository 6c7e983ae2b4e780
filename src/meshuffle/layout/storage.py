"""How a rank keeps parameters and buffers, and what their gradients are."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from meshuffle.layout.assign import Assignment
from meshuffle.layout.layout import Layout, Partial, Replicate, Shard


class Storage:
    """In which layout each parameter and buffer is kept, and what its gradient is.

    A parameter that every op reads in the same part is kept in that part alone. Other parameters
    are kept whole. The gradient of one that is used whole is whole on each rank; the gradient of
    one of which ranks use different parts is a term of a sum.

    Attributes:
        layouts: the layout of each parameter and buffer that is kept in parts.
        used_in_parts: whole parameters of which each rank uses a part.
        used_both_ways: parameters that are used whole and in parts; each use in parts sums its own
            gradient.

    Args:
        stored: layouts in which they are kept already, by name, whole where it lacks them. None
            chooses them.
    """

    def __init__(self, assignment: Assignment, stored: Mapping[str, Layout] | None) -> None:
        program = assignment.program
        self.layouts: dict[Node, Layout] = {}
        self.used_in_parts: set[Node] = set()
        self.used_both_ways: set[Node] = set()
        for node, used in _uses(assignment).items():
            name = program.graph.names[node.name]
            layout = stored.get(name) if stored is not None else next(iter(used))
            if isinstance(layout, Shard) and (stored is not None or len(used) == 1):
                self.layouts[node] = layout
            elif program.has_grad(node):
                in_parts = {x for x in used if not isinstance(x, Replicate | Partial)}
                if in_parts:
                    (self.used_in_parts if in_parts == used else self.used_both_ways).add(node)


def _uses(assignment: Assignment) -> dict[Node, set[Layout]]:
    """Return in which layouts each parameter, buffer and constant is read."""
    program = assignment.program
    uses: dict[Node, set[Layout]] = {}
    for call in program.calls:
        choice = assignment.choices.get(call.node.name)
        layouts = choice.inputs if choice else (Replicate(),) * len(call.inputs)
        for source, layout in zip(call.inputs, layouts, strict=True):
            if source.name in program.graph.names:
                uses.setdefault(source, set()).add(layout)
    for node in program.outputs():
        if node.name in program.graph.names:
            uses.setdefault(node, set()).add(Replicate())
    return uses
