"""Matrix products and their kin, by the labels of their dims, and lookups in a table."""

from __future__ import annotations

import string

import torch

from meshuffle.layout.layout import splits
from meshuffle.layout.rule import Choices, Query, rule
from meshuffle.layout.rules.labels import Labelled, choices

aten = torch.ops.aten


@rule(aten.linear)
def linear(call: Query) -> Choices:
    """x (…, I) · weight (O, I) + bias (O)."""
    x, weight = call["input"], call["weight"]
    lead = string.ascii_lowercase[: len(call.shape(x)) - 1]
    if len(call.shape(weight)) == 2:
        operands, added = [(x, lead + "I"), (weight, "OI")], [(call["bias"], "O")]
        yield from choices(call, Labelled(operands, lead + "O", added, channels="IO"))


@rule(aten.matmul, aten.bmm, aten.mm)
def matmul(call: Query) -> Choices:
    """a (…, M, K) · b (…, K, N), leading dims spread."""
    a, b = call["self"], call["mat2"] if "mat2" in call.given else call["other"]
    num_a, num_b = len(call.shape(a)), len(call.shape(b))
    if num_a < 2 or num_b < 2:
        return
    lead = string.ascii_lowercase[: max(num_a, num_b) - 2]
    labels_a, labels_b = lead[len(lead) - num_a + 2 :] + "MK", lead[len(lead) - num_b + 2 :] + "KN"
    op = Labelled([(a, labels_a), (b, labels_b)], lead + "MN", channels=lead + "KN")
    yield from choices(call, op)


@rule(aten.addmm)
def addmm(call: Query) -> Choices:
    """bias (N) + a (M, K) · b (K, N): the linear layer of GPT-2."""
    bias, a, b = call["self"], call["mat1"], call["mat2"]
    if len(call.shape(bias)) == 1 and call["beta"] == call["alpha"] == 1:
        op = Labelled([(a, "MK"), (b, "KN")], "MN", [(bias, "N")], channels="KN")
        yield from choices(call, op)


@rule(aten.einsum)
def einsum(call: Query) -> Choices:
    """As its equation says, where it spells every dim."""
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(term)) < len(term) for term in terms):
        return
    operands = list(zip(call["tensors"], terms, strict=True))
    yield from choices(call, Labelled(operands, out, channels=left.replace(",", "")))


@rule(aten.scaled_dot_product_attention)
def attention(call: Query) -> Choices:
    """q (…, L, E), k (…, S, E), v (…, S, F): samples, heads, or queries."""
    if call["enable_gqa"]:
        return
    lead = string.ascii_lowercase[: len(call.out) - 2]
    labels = {"query": "LE", "key": "SE", "value": "SF", "attn_mask": "LS"}
    operands = [
        (call[name], lead[len(lead) + 2 - len(call.shape(call[name])) :] + text)
        for name, text in labels.items()
        if call[name] is not None
    ]
    fixed = "SE" + ("L" if call["is_causal"] else "") + ("F" if call["dropout_p"] else "")
    yield from choices(call, Labelled(operands, lead + "LF", fixed=fixed, channels=lead + "F"))


@rule(aten.embedding)
def embedding(call: Query) -> Choices:
    """weight (V, E) at indices (…): the features, or any dim of the indices.

    Where a row's gradient depends on how often its index occurs, all indices are needed.
    """
    weight, indices = call["weight"], call["indices"]
    features = len(call.shape(indices))
    tried = [*call.wanted, *call.arriving[indices], call.samples(), call.even(features)]
    for layout in splits(tried):
        if layout.dim < features and call["scale_grad_by_freq"]:
            continue
        given = {indices: layout} if layout.dim < features else {weight: layout.on(1)}
        yield call.choice(given, layout, layout)


@rule(aten.index)
def index(call: Query) -> Choices:
    """x[ids] on its first dim: dims of x behind it stay."""
    x, ids = call["self"], list(call["indices"])
    if len(ids) != 1 or ids[0] is None or ids[0] is x:
        return
    extra = len(call.shape(ids[0])) - 1
    back = [layout.on(layout.dim - extra) for layout in splits(call.wanted) if layout.dim > extra]
    for layout in splits([*back, *call.arriving[x]]):
        if layout.dim >= 1:
            result = layout.on(layout.dim + extra)
            yield call.choice({x: layout}, result, result)
