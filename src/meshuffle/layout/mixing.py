"""Whether a model mixes the samples of a batch, so that a part of the batch does not do.

An op whose rule can split it by samples does not. Where there are other ops, as in a move of
samples that a later op takes back, the model is run on a few samples and on one less: what it
returns for a sample, and what it keeps in buffers, must not depend on the others. Batch norm mixes
samples too, but its statistics are joined over replicas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

import meshuffle.layout.rules  # noqa: F401  # registers them
from meshuffle.errors import ModelError
from meshuffle.graph import Graph
from meshuffle.graph.node import arguments_of, is_in_place, memory_owners, module_of, packet_of
from meshuffle.layout.layout import Replicate, Samples
from meshuffle.layout.program import Call, Program
from meshuffle.layout.rule import legal

aten = torch.ops.aten
_SAMPLES = 3


def mixing_call(graph: Graph) -> tuple[str, str] | None:
    """Return (module, op) of the first call that mixes samples; None where none does.

    A model that fixes its batch is not looked at.
    """
    if graph.symbol is None:
        return None
    program = Program(graph, _SAMPLES, 2)
    suspects = [call for call in program.calls if call.results and _may_mix(call)]
    if not suspects or (not any(map(_surely_mixes, suspects)) and _is_per_sample(program)):
        return None
    return module_of(suspects[0].node), str(suspects[0].node.target)


def is_per_sample(graph: Graph) -> bool:
    """Tell whether a forward can be cut by samples: none depends on others, no state changes."""
    calls = Program(graph, _SAMPLES, 2).calls
    joint = any(c.packet is aten.batch_norm and c["training"] for c in calls)
    owners = memory_owners([*graph.nodes()])
    changes = any(is_in_place(n) and owners[n].op == "placeholder" for n in graph.nodes())
    return not joint and not changes and mixing_call(graph) is None


def refuse_mixing(graph: Graph, model: str, plan: str) -> None:
    """Refuse a plan that gives a part of the batch to a model that needs all of it.

    Args:
        model, plan: for the message.

    Raises:
        ModelError: names the op, its module and the plans that are exact.
    """
    found = mixing_call(graph)
    if found is not None:
        module, op = found
        raise ModelError(
            f"{model} mixes the samples of a batch: {op} in {module or 'its forward'}. Plan {plan} "
            "computes parts of a batch apart, with other results; exact are tp=N and pp=N,mb=1"
        )


def _may_mix(call: Call) -> bool:
    """Tell whether an op reads samples and its rule does not let ranks compute theirs alone."""
    reads = [i for i, node in enumerate(call.inputs) if _follows(call.program, node.meta["val"])]
    if not reads or (call.packet is aten.batch_norm and call["training"]):
        return False
    if _surely_mixes(call):
        return True
    if "draw" in call.node.meta:  # each element's number depends on its sample
        return False
    given = [call.program.samples_dim(node) for node in call.inputs]
    made = [call.program.samples_dim_of(value) for value in call.results]
    if None in made or None in [given[i] for i in reads]:
        return True
    outputs = tuple(Samples(dim) for dim in made if dim is not None)
    arriving = [[Replicate() if dim is None else Samples(dim)] for dim in given]
    return not any(
        all(choice.inputs[i] == arriving[i][0] for i in reads)
        and choice.output in (outputs, outputs[0])
        for choice in legal(call, [outputs if len(outputs) > 1 else outputs[0]], arriving)
    )


def _surely_mixes(call: Call) -> bool:
    """Tell of ops whose outputs do not show it: a gradient or a running statistic does."""
    if call.packet is aten.instance_norm:
        return call["running_mean"] is not None and bool(call["use_input_stats"])
    return call.packet is aten.embedding and bool(call["scale_grad_by_freq"])


def _follows(program: Program, value: Any) -> bool:
    """Tell whether a tensor has a size that depends on the batch."""
    symbol = program.graph.symbol
    sizes = value.shape if isinstance(value, Tensor) else ()
    return any(isinstance(n, torch.SymInt) and symbol in n.node.expr.free_symbols for n in sizes)


@torch.no_grad()
def _is_per_sample(program: Program) -> bool:
    """Run the program, with random weights, on some samples and on fewer, and compare."""
    graph, generator = program.graph, torch.Generator().manual_seed(0)
    nodes = list(graph.nodes("placeholder"))
    owners = memory_owners([*graph.nodes()])
    changed = {owners[node].name for node in graph.nodes() if is_in_place(node)}
    given = [_drawn(graph, node, generator) for node in nodes]
    results = []
    for num in (_SAMPLES, _SAMPLES - 1):
        own = []
        for node, x in zip(nodes, given, strict=True):
            if graph.is_input(node.name):
                x = x.narrow(program.samples_dim(node) or 0, 0, num)
            own.append(x.clone() if graph.is_input(node.name) or node.name in changed else x)
        outputs = _tensors(_Plain(graph.program.graph_module).run(*own))
        kept = [x for node, x in zip(nodes, own, strict=True) if node.name in changed]
        results.append([*outputs, *kept])
    return all(_begins_with(whole, part) for whole, part in zip(*results, strict=True))


def _drawn(graph: Graph, node: Node, generator: torch.Generator) -> Tensor:
    known = graph.constants.get(graph.names.get(node.name, ""))
    if known is not None:
        return known
    value = node.meta["val"]
    drawn = torch.rand(graph.shape(value, _SAMPLES), generator=generator) * 2
    return drawn.to(value.dtype)


def _begins_with(whole: Tensor, part: Tensor) -> bool:
    """Tell whether `part` is the beginning of `whole` along the one dim in which they differ."""
    dims = [d for d in range(part.ndim) if whole.shape[d] != part.shape[d]]
    if len(dims) > 1:
        return False
    for dim in dims:
        whole = whole.narrow(dim, 0, part.shape[dim])
    a, b = (
        (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double().nan_to_num()
        for x in (whole, part)
    )
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, 1e-3, 1e-4 * scale)


class _Plain(fx.Interpreter):
    """Runs a program without batch statistics and random numbers."""

    def run_node(self, n: Node) -> Any:
        """Run one call."""
        packet, (args, kwargs) = packet_of(n), self.fetch_args_kwargs_from_env(n)
        if packet is aten._assert_tensor_metadata:
            return None
        if packet in (aten.batch_norm, aten.dropout, aten.feature_dropout):
            return args[0]
        if "draw" not in n.meta:
            return super().run_node(n)
        given = arguments_of(n.target, args, kwargs)
        dropouts = given.keys() & {"dropout", "dropout_p"}  # of recurrent layers, of attention
        result = n.target(**given | dict.fromkeys(dropouts, 0.0))  # type: ignore[operator]
        return result if dropouts else torch.full_like(result, 0.5)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
