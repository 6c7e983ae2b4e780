"""What lowering writes: one rank's calls, and what they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from meshuffle.graph.capture import named_tensors, tied_names
from meshuffle.graph.node import is_in_place, updates_statistics
from meshuffle.layout.layout import Layout, Shard
from meshuffle.layout.traffic import Traffic
from meshuffle.parallel.batch_norm import local_norm


@dataclass
class StageCode(Traffic):
    """One rank's program, or its part of one pipeline stage, and what it sends.

    It takes in what the stage before sends, behind the number of samples.

    Attributes:
        graph: calls on this rank's parts; parameters by the model's own names.
        modules: redistributions and random masks that it calls, by name.
        stored: the layout of each parameter and buffer that is not whole, by the model's name.
        summed_over_tp: parameters whose gradient on this rank is a term of a sum over the `tp`
            axis.
        sources: for each value of `graph`, by name, the program's value and its layout.
        names: the parameters, buffers and constants that it reads.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    stored: dict[str, Shard] = field(default_factory=dict)
    summed_over_tp: set[str] = field(default_factory=set)
    sources: dict[str, tuple[str, Layout]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def drop_unread(graph: fx.Graph) -> None:
    """Drop calls that turned out to be read by nobody; state is never dropped."""
    for node in reversed(list(graph.nodes)):
        idle = node.op in ("call_function", "get_attr") and not node.users
        keeps = node.op == "call_function" and (is_in_place(node) or updates_statistics(node))
        if idle and not keeps and node.target is not local_norm:
            graph.erase_node(node)


def stages_of(model: nn.Module, codes: Sequence[StageCode]) -> dict[str, frozenset[int]]:
    """Return the stages that read each parameter, buffer and constant, by all of its names."""
    stages: dict[str, frozenset[int]] = {}
    for stage, code in enumerate(codes):
        for name in code.names:
            stages[name] = stages.get(name, frozenset()) | {stage}
    tied, names = tied_names(model), dict(named_tensors(model))
    return stages | {n: stages.get(tied.get(n, n), frozenset((0,))) for n in names}
