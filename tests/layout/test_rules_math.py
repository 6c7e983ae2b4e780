"""Matrix products, attention, norms, sums, recurrent layers, and all that is element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.layout import Partial
from tests.layout.harness import Apply, check, few, ok

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention


def r(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


@pytest.mark.parametrize("lead", [(), (5,), (5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(lead: tuple[int, ...], bias: bool) -> None:
    """Every dim of the result, and the summed one: column and row."""
    checked = check(nn.Linear(8, 6, bias), r(4, *lead, 8), op=aten.linear, world=3)
    assert ok(checked, *range(len(lead) + 2)).has(Partial)


@given(
    st.tuples(st.sampled_from([1, 3]), st.integers(2, 5), st.integers(2, 5), st.integers(2, 5)),
    st.sampled_from([(1, 3), (3,), (1,), (1, 1), ()]),
    st.integers(2, 3),
    st.integers(0, 99),
)
@few(15)
def test_matmul_with_dims_that_spread(
    sizes: tuple[int, int, int, int], lead: tuple[int, ...], world: int, seed: int
) -> None:
    heads, m, k, n = sizes
    x, held = r(4, heads, m, k), r(*lead, k, n)
    checked = check(Apply(torch.matmul, held), x, op=aten.matmul, world=world, seed=seed)
    ok(checked, 0)


@pytest.mark.parametrize(
    ("function", "op", "inputs", "held", "dims"),
    [
        (lambda a: a @ a, aten.matmul, (r(4, 3, 5, 5),), (), (0, 1)),
        (lambda a: a @ a.transpose(-1, -2), aten.matmul, (r(4, 3, 5, 6),), (), (0, 1, 2, 3)),
        (lambda a: a @ a.t(), aten.matmul, (r(4, 6),), (), ()),
        (torch.bmm, aten.bmm, (r(4, 5, 6), r(4, 6, 3)), (), (0, 1, 2)),
        (
            lambda x, w, b: torch.addmm(b, x, w),
            aten.addmm,
            (r(4, 6),),
            (r(6, 8), r(8)),
            (0, 1),
        ),
        (lambda x, w, b: torch.addmm(b, x, w), aten.addmm, (r(4, 6),), (r(6, 8), r(1)), (0, 1)),
        (
            lambda x, w: torch.einsum("bchw,co->bohw", x, w),
            aten.einsum,
            (r(4, 8, 3, 5),),
            (r(8, 6),),
            (0, 1, 2, 3),
        ),
        (
            lambda x, w: torch.einsum("bic,ijk->bjc", x, w),
            aten.einsum,
            (r(4, 6, 5),),
            (r(6, 5, 4),),
            (0, 1, 2),
        ),
    ],
)
def test_products(function: Any, op: Any, inputs: Any, held: Any, dims: tuple[int, ...]) -> None:
    ok(check(Apply(function, *held), *inputs, op=op), *dims)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dims: int, causal: bool) -> None:
    sizes = (4, 4)[: dims - 2]
    inputs = [r(*sizes, 5, 6), r(*sizes, 7, 6), r(*sizes, 7, 8)]
    model = Apply(lambda q, k, v: sdpa(q, k, v, is_causal=causal))
    checked = ok(check(model, *inputs, op=aten.scaled_dot_product_attention), 0, dims - 1)
    assert (dims - 2 in checked.dims()) != causal  # queries, where each sees all keys
    assert dims == 3 or 1 in checked.dims()  # heads


@pytest.mark.parametrize("mask", [(5, 7), (7,), (1, 4, 5, 7), (1, 1, 5, 7), (4, 1, 1, 7)])
def test_attention_with_a_mask(mask: tuple[int, ...]) -> None:
    held = (r(*mask) > 0) | (torch.arange(7) == 3)
    if len(mask) == 1:
        held = held.expand(5, 7)
    inputs = [r(4, 4, 5, 6), r(4, 4, 7, 6), r(4, 4, 7, 6)]
    model = Apply(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), held)
    split_by_samples = [] if mask[0] == 4 else [0]
    ok(check(model, *inputs, op=aten.scaled_dot_product_attention), 1, 2, *split_by_samples)


def test_attention_to_itself() -> None:
    op = aten.scaled_dot_product_attention
    ok(check(Apply(lambda x: sdpa(x, x, x)), r(4, 4, 5, 6), op=op), 0, 1)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 1, 2)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize(
    ("model", "op", "sizes", "train", "dims"),
    [
        (batch_norm(8), aten.batch_norm, (4, 8, 5, 6), False, (0, 1, 2, 3)),
        (batch_norm(8), aten.batch_norm, (4, 8, 5, 6), True, (1,)),
        (nn.BatchNorm1d(8, affine=False), aten.batch_norm, (4, 8), False, (0, 1)),
        (nn.GroupNorm(4, 8), aten.group_norm, (4, 8, 5, 6), True, (0, 1)),
        (nn.InstanceNorm2d(8, affine=True), aten.instance_norm, (4, 8, 5, 6), True, (0, 1)),
        (nn.LayerNorm(8), aten.layer_norm, (4, 5, 8), True, (0, 1)),
        (nn.LayerNorm((5, 6)), aten.layer_norm, (4, 8, 5, 6), True, (0, 1)),
        (nn.RMSNorm(8), aten.rms_norm, (4, 5, 8), True, (0, 1)),
        (nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True), aten.lstm, (4, 3, 5), True, (0,)),
        (nn.GRU(5, 6, batch_first=True), aten.gru, (4, 3, 5), True, (0,)),
        (nn.Dropout(0.5), aten.dropout, (4, 5, 6), False, (0, 1, 2)),
        (nn.PReLU(), aten.prelu, (4, 6, 5), True, (0, 1, 2)),
        (nn.PReLU(6), aten.prelu, (4, 6, 6), True, (0, 1, 2)),
        (nn.PReLU(6), aten.prelu, (4, 6), True, (0, 1)),
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_layers(
    model: nn.Module, op: Any, sizes: Any, train: bool, dims: tuple[int, ...], world: int
) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for seed in range(2):
        ok(check(model, r(*sizes), op=op, world=world, train=train, seed=seed), *dims)


@given(
    st.sampled_from(["mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm"]),
    st.sets(st.integers(-4, 3), min_size=1, max_size=2).filter(
        lambda dims: len({d % 4 for d in dims}) == len(dims)
    ),
    st.booleans(),
    st.integers(0, 99),
)
@few(25)
def test_reductions(name: str, dims: set[int], keeps: bool, seed: int) -> None:
    op = {"norm": aten.linalg_vector_norm}.get(name, getattr(aten, name))
    model = Apply(lambda x: getattr(torch, name)(x, dim=tuple(dims), keepdim=keeps))
    stay = [d for d in range(4) if d not in {d % 4 for d in dims}]
    expected = stay if keeps else range(len(stay))
    checked = ok(check(model, r(4, 6, 5, 3), op=op, seed=seed), *expected)
    assert checked.has(Partial) == (name in ("mean", "sum"))


@pytest.mark.parametrize(
    ("function", "op", "dims"),
    [
        (lambda x: x.mean(), aten.mean, ()),
        (lambda x: x.sum(), aten.sum, ()),
        (lambda x: x.max(1), aten.max, (0, 1, 2)),
        (lambda x: x.argmax(1, keepdim=True), aten.argmax, (0, 2, 3)),
        (lambda x: x.prod(2), aten.prod, (0, 1, 2)),
        (lambda x: x.softmax(-2), aten.softmax, (0, 1, 3)),
        (lambda x: x.log_softmax(1), aten.log_softmax, (0, 2, 3)),
        (lambda x: F.glu(x, 1), aten.glu, (0, 2, 3)),
        (lambda x: x.topk(2, -1), aten.topk, (0, 1, 2)),
        (lambda x: x.sort(stable=True, dim=1), aten.sort, (0, 2, 3)),
        (lambda x: x.cumsum(1), aten.cumsum, (0, 2, 3)),
        (lambda x: x.flip(-1), aten.flip, (0, 1, 2)),
        (lambda x: x.roll((1, 2), (2, 3)), aten.roll, (0, 1)),
        (lambda x: F.pad(x, (1, 2, 0, 1)), aten.pad, (0, 1, 2, 3)),
        (lambda x: F.pad(x, (-1, 2)), aten.pad, (0, 1, 2)),
    ],
)
def test_along_some_dims(function: Callable[..., Any], op: Any, dims: tuple[int, ...]) -> None:
    for other_batch in (0, 5):
        ok(check(Apply(function), r(4, 6, 5, 4), op=op, other_batch=other_batch), *dims)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [(lambda x: x.mean(0), (4, 6)), (lambda x: x.mean(), (4, 6, 5))],
)
def test_a_rank_without_a_sample_adds_nothing_to_a_mean(
    function: Callable[..., Any], sizes: Any
) -> None:
    ok(check(Apply(function), r(*sizes), op=aten.mean, other_batch=1))


@given(
    st.sampled_from([aten.add, aten.sub, aten.mul, aten.div, aten.maximum, aten.atan2]),
    st.sampled_from([(6, 5, 3), (1, 6, 1, 3), (5, 1), (1,), (), (1, 1, 5, 3)]),
    st.integers(2, 3),
    st.integers(0, 99),
)
@few(15)
def test_operands_that_spread(op: Any, sizes: tuple[int, ...], world: int, seed: int) -> None:
    function = getattr(torch, op.__name__)
    checked = check(Apply(function, r(*sizes)), r(4, 6, 5, 3), op=op, world=world, seed=seed)
    ok(checked, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("function", "op", "inputs", "held", "dims"),
    [
        (torch.max, aten.max, (r(4, 6, 5), r(4, 6, 5)), (), (0, 1, 2)),
        (lambda x, y: x[:, :, None] * y[:, None], aten.mul, (r(4, 6), r(4, 5)), (), (0, 1, 2)),
        (lambda x, p: torch.where(p > 0, x, p), aten.where, (r(4, 6, 5),), (r(6, 1),), (0, 1, 2)),
        (lambda x, m: x.masked_fill(m > 0, 2.0), aten.masked_fill, (r(4, 6, 5),), (r(5),), (0, 1)),
        (lambda x, y: x.type_as(y), aten.type_as, (r(4, 6, 5),), (torch.ones(3),), (0, 1, 2)),
        (lambda x: torch.where(x > 0, x, 0.0), aten.where, (r(4, 6),), (), (0, 1)),
        (lambda x, y: torch.lerp(x, y, 0.3), aten.lerp, (r(4, 6), r(4, 6)), (), (0, 1)),
        (lambda x: x + torch.zeros(x.shape[0], 6), aten.zeros, (r(4, 6),), (), (0, 1)),
        (lambda x: x[:, None] + x.new_ones(x.shape[0], 3, 6), aten.new_ones, (r(4, 6),), (), (0,)),
        (
            lambda x: torch.full((2 * x.shape[0], 6), 2.0).sum() + x,
            aten.full,
            (r(4, 6),),
            (),
            (0, 1),
        ),
    ],
)
def test_element_by_element(
    function: Any, op: Any, inputs: Any, held: Any, dims: tuple[int, ...]
) -> None:
    for other_batch in (0, 7):
        ok(check(Apply(function, *held), *inputs, op=op, other_batch=other_batch), *dims)


def test_terms_of_sums_are_added() -> None:
    model = Apply(lambda x, y: torch.add(x, y, alpha=3))
    assert ok(check(model, r(4, 6, 5), r(4, 6, 5), op=aten.add), 0, 1, 2).has(Partial)
