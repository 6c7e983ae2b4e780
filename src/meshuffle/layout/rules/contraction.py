"""Matrix products and their kin, as sums over labelled dims.

A label of the result splits the operands that carry it, and the result. A label that is summed
over splits the operands, and each rank has a term of the sum: column and row of Megatron, heads
of attention and the rest are the same rule.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from meshuffle.layout.layout import Layout, Partial, Samples, Shard, Varying, splits, unique
from meshuffle.layout.program import Call
from meshuffle.layout.rule import Choice, Kind, rule

aten = torch.ops.aten
Arriving = Sequence[Sequence[Layout]]


@dataclass
class Product:
    """Labels of each operand's dims and of the result's; `added` operands are no factors.

    `fixed` labels cannot be split; `channels` are those that a plan text calls channel.
    """

    operands: list[tuple[Node, str]]
    out: str
    added: list[tuple[Node, str]]
    fixed: str = ""
    channels: str = ""


def choices(
    call: Call, product: Product, wanted: Sequence[Layout], arriving: Arriving
) -> Iterator[Choice]:
    """Yield a choice per label and per way to split it."""
    arrives = dict(zip(call.inputs, arriving, strict=True))
    labels = dict.fromkeys(product.out + "".join(text for _, text in product.operands))
    for label in labels:
        if label not in product.fixed:
            for layout in _ways(call, product, label, wanted, arrives):
                yield from _choice(call, product, label, layout)


def _ways(
    call: Call, product: Product, label: str, wanted: Sequence[Layout], arrives: Any
) -> Iterator[Shard | Samples]:
    """Yield ways to split a label, each as a layout of dim 0."""
    every = [*product.operands, *product.added]
    holders = [(node, text) for node, text in every if label in text]
    found: list[Layout | None] = []
    for layout in splits(wanted):
        if label in product.out and product.out.index(label) == layout.dim:
            found.append(layout.on(0))
    for node, text in holders:
        for layout in splits(arrives.get(node, ())):
            if text.index(label) == layout.dim:
                found.append(layout.on(0))
        if call.program.samples_dim(node) == text.index(label):
            if call.has_samples:
                yield Samples(0)
            return
    sizes = {call.shape(node)[text.index(label)] for node, text in holders}
    size = max(sizes)
    found.append(call.even(0, size))
    for way in unique(found):
        if isinstance(way, Shard) and way.size == size:
            yield way


def _choice(call: Call, product: Product, label: str, layout: Shard | Samples) -> Iterator[Choice]:
    given: dict[Any, Layout] = {}
    every = [*product.operands, *product.added]
    for node, text in every:
        spreads = label in text and call.shape(node)[text.index(label)] == 1
        holds = label in text and not spreads
        needed: Layout = layout.on(text.index(label)) if holds else Varying()
        if given.setdefault(node, needed) != needed:
            return  # one tensor stands twice and would lie in two ways
    kind: Kind = "batch" if isinstance(layout, Samples) else "spatial"
    if label in product.channels and kind != "batch":
        kind = "channel"
    if label in product.out:
        result = layout.on(product.out.index(label))
        yield Choice(call.lie(given, Varying()), result, result, kind)
        return
    # Each rank has a term of the sum; what is added is shared out among the terms.
    for node, _ in product.added:
        if node in dict(product.operands):
            return
        given[node] = Partial()
    first = next((n, t) for n, t in product.operands if label in t)
    split = layout.on(first[1].index(label))
    yield Choice(call.lie(given, Varying()), Partial(), split, kind)


@rule(aten.linear)
def linear(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """x (…, I) · weight (O, I) + bias (O)."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    lead = string.ascii_lowercase[: len(call.shape(x)) - 1]
    if len(call.shape(weight)) != 2:
        return
    operands = [(x, lead + "I"), (weight, "OI")]
    product = Product(operands, lead + "O", [(bias, "O")] if bias is not None else [])
    product.channels = "IO"
    yield from choices(call, product, wanted, arriving)


@rule(aten.matmul, aten.bmm, aten.mm)
def matmul(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """a (…, M, K) · b (…, K, N), leading dims spread."""
    a, b = call["self"], call["mat2"] if "mat2" in call.given else call["other"]
    num_a, num_b = len(call.shape(a)), len(call.shape(b))
    if num_a < 2 or num_b < 2:
        return
    lead = string.ascii_lowercase[: max(num_a, num_b) - 2]
    product = Product(
        [(a, lead[len(lead) - num_a + 2 :] + "MK"), (b, lead[len(lead) - num_b + 2 :] + "KN")],
        lead + "MN",
        [],
        channels=lead + "KN",
    )
    yield from choices(call, product, wanted, arriving)


@rule(aten.addmm)
def addmm(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """bias (N) + a (M, K) · b (K, N): the linear layer of GPT-2."""
    bias, a, b = call["self"], call["mat1"], call["mat2"]
    if len(call.shape(bias)) != 1 or call["beta"] != 1 or call["alpha"] != 1:
        return
    product = Product([(a, "MK"), (b, "KN")], "MN", [(bias, "N")], channels="KN")
    yield from choices(call, product, wanted, arriving)


@rule(aten.einsum)
def einsum(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """As its equation says, where it spells every dim."""
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(term)) < len(term) for term in terms):
        return
    operands = list(zip(call["tensors"], terms, strict=True))
    product = Product(operands, out, [], channels=left.replace(",", ""))
    yield from choices(call, product, wanted, arriving)


@rule(aten.scaled_dot_product_attention)
def attention(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """q (…, L, E), k (…, S, E), v (…, S, F): samples, heads, or queries."""
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    if call["enable_gqa"]:
        return
    lead = string.ascii_lowercase[: len(call.out) - 2]
    spelt = [(q, "LE"), (k, "SE"), (v, "SF"), (mask, "LS")]
    operands = [
        (node, lead[len(lead) + 2 - len(call.shape(node)) :] + text)
        for node, text in spelt
        if node is not None
    ]
    fixed = "SE" + ("L" if call["is_causal"] else "") + ("F" if call["dropout_p"] else "")
    product = Product(operands, lead + "LF", [], fixed=fixed, channels=lead + "F")
    yield from choices(call, product, wanted, arriving)


@rule(aten.embedding)
def embedding(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """weight (V, E) at indices (…): the features, or any dim of the indices."""
    weight, indices = call["weight"], call["indices"]
    num = len(call.shape(indices))
    found = [*wanted, *arriving[call.inputs.index(indices)], call.samples(), call.even(num)]
    for layout in splits(found):
        if layout.dim < num:
            inputs = call.lie({weight: Varying(), indices: layout}, Varying())
        else:
            inputs = call.lie({weight: layout.on(1), indices: Varying()}, Varying())
        yield Choice(inputs, layout, layout)


@rule(aten.index)
def index(call: Call, wanted: Sequence[Layout], arriving: Arriving) -> Iterator[Choice]:
    """x[ids] on its first dim: dims of x behind it stay."""
    x, ids = call["self"], list(call["indices"])
    if len(ids) != 1 or ids[0] is None or ids[0] is x:
        return
    extra = len(call.shape(ids[0])) - 1
    back = [layout.on(layout.dim - extra) for layout in splits(wanted) if layout.dim > extra]
    for layout in splits([*back, *arriving[call.inputs.index(x)]]):
        if layout.dim >= 1:
            result = layout.on(layout.dim + extra)
            yield Choice(call.lie({x: layout}, Varying()), result, result)
