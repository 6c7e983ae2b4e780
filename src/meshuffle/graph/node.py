"""Facts of one fx node: which op it calls, with what, and whose memory its value lies in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree


def packet_of(node: Node) -> Any:
    """Return the op that a node calls without its overload, as `torch.ops.aten.conv2d`.

    What has no overloads, as a Python function, is returned itself.
    """
    return getattr(node.target, "_overloadpacket", node.target)


def is_tensor(node: Node) -> bool:
    """Tell whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_tuple(node: Node) -> bool:
    """Tell whether a node's value is several tensors, as that of `chunk` is."""
    return isinstance(node.meta.get("val"), tuple | list)


def tensors_of_node(node: Node) -> list[Tensor]:
    """Return the captured tensors of a node's value: none, one or several."""
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]


def module_of(node: Node) -> str:
    """Return the dotted path of the module that made a call; empty at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn_module")]
    return paths[-1] if paths else ""


def memory_owners(nodes: Sequence[Node]) -> dict[Node, Node]:
    """Return the node whose memory each value lies in: views and in-place ops have another's."""
    owners: dict[Node, Node] = {}
    for node in nodes:
        base = _aliased_input(node)
        owners[node] = node if base is None else owners.get(base, base)
    return owners


def _aliased_input(node: Node) -> Node | None:
    """Return the input whose memory the value of `node` shares, by the op's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        first = node.args[0] if node.args else None  # operator.getitem: a part of a tuple
        return first if isinstance(first, Node) and tensors_of_node(node) else None
    returns = [value.alias_info for value in node.target._schema.returns]
    for i, argument in enumerate(node.target._schema.arguments):
        info = argument.alias_info
        if info is None:
            continue
        into_list = "*" in info.after_set  # split, chunk, unbind
        if not into_list and not any(r and r.before_set & info.before_set for r in returns):
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, Node):
            return given
    return None


def arguments_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `op` by their names in its schema, defaults filled in."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return {**dict(zip(inspect.signature(op).parameters, args, strict=False)), **kwargs}
    defaults = {a.name: kwargs.get(a.name, a.default_value) for a in schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False))


def is_in_place(node: Node) -> bool:
    """Tell whether a call changes one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def updates_statistics(node: Node) -> bool:
    """Tell whether a call is a norm that updates running statistics: its schema does not say so."""
    if packet_of(node) not in (torch.ops.aten.batch_norm, torch.ops.aten.instance_norm):
        return False
    given = arguments_of(node.target, node.args, node.kwargs)
    in_training = given.get("training", given.get("use_input_stats"))
    return bool(in_training) and given["running_mean"] is not None


def original(node: Node) -> Node:
    """Return the value that `node` is after in-place calls; itself where there are none."""
    while is_in_place(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
