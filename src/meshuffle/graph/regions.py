"""Regions that a model runs without gradients or without autocast, put among its other calls.

torch.export hands over each region as one call of a graph of its own. What it meant must not be
lost: what enters a region of `torch.no_grad()` is detached there, as nothing that is computed of
it has a gradient then; calls of a region with autocast off keep a note, `meta["autocast"]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from meshuffle.graph.node import original

higher_order, aten = torch.ops.higher_order, torch.ops.aten


def inline_regions(module: fx.GraphModule, *, without_grad: bool = False) -> None:
    """Replace each region of `module` by its calls.

    Args:
        module: a program that torch.export captured; it is changed.
        without_grad: it is itself a region without gradients.

    Raises:
        NotImplementedError: a region switches on what was off around it: autocast, where dtypes
            would depend on where a call runs, or gradients.
    """
    for node in list(module.graph.nodes):
        if node.target is higher_order.wrap_with_set_grad_enabled:
            is_enabled, part, *given = node.args
            if is_enabled and without_grad:
                raise NotImplementedError("the model computes gradients within torch.no_grad()")
            _inline(module, node, part, given, without_grad=not is_enabled)
        elif node.target is higher_order.wrap_with_autocast:
            _, _, is_enabled, _, part, *given = node.args
            if is_enabled:
                raise NotImplementedError("the model switches autocast on in its forward")
            _inline(module, node, part, given, without_autocast=True)


def _inline(
    module: fx.GraphModule,
    node: Node,
    part: Any,
    given: list[Any],
    *,
    without_grad: bool = False,
    without_autocast: bool = False,
) -> None:
    region = module.get_submodule(part.target)
    assert isinstance(region, fx.GraphModule)
    inline_regions(region, without_grad=without_grad)
    places = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(places, given, strict=True))
    with module.graph.inserting_before(node):
        for place in places if without_grad else ():
            value = copies[place]
            if isinstance(value, Node) and _may_have_grad(value):
                copies[place] = module.graph.call_function(aten.detach.default, (value,))
                copies[place].meta = {**node.meta, "val": value.meta["val"]}
        for call in region.graph.nodes:
            if call.op not in ("placeholder", "output"):
                copies[call] = module.graph.node_copy(call, copies.__getitem__)
                if without_autocast:
                    copies[call].meta["autocast"] = False
    (output,) = (inner for inner in region.graph.nodes if inner.op == "output")
    outer = dict(zip(places, given, strict=True))
    for user in list(node.users):  # each takes one of the results
        result = output.args[0][user.args[1]]
        changed = original(result)  # what was changed in place is still the value from outside
        user.replace_all_uses_with(outer[changed] if changed in outer else copies[result])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not part.users:
        module.graph.erase_node(part)


def _may_have_grad(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return node.op != "placeholder" or value.requires_grad
