"""The harness sees what is wrong: faults planted in rules, and rules that say nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from meshuffle.layout.layout import Partial, Shard, Varying
from meshuffle.layout.rule import RULES
from meshuffle.layout.rules import contraction, conv, groups, movement, pool, window
from tests.layout.harness import Apply, check, ok

aten = torch.ops.aten


def conv_model(**arguments: Any) -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, **arguments)


def x() -> torch.Tensor:
    return torch.randn(4, 8, 9, 7, dtype=torch.float64)


def test_a_rule_that_yields_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.conv2d, lambda *_: [])
    with pytest.raises(AssertionError, match="yields nothing"):
        ok(check(conv_model(), x(), op=aten.conv2d))


def test_a_rule_that_forgets_a_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_space", lambda *_: [])
    with pytest.raises(AssertionError, match=r"only \{0, 1\} of"):
        ok(check(conv_model(), x(), op=aten.conv2d), 0, 1, 2)


def shifted_window(layout: Any, kernel: Any) -> Any:
    """What each rank needs, one row too low; where the image ends, as it should be."""
    needed, pads = whole_window(layout, kernel)
    parts = [tuple(i - 1 if i and part[0] else i for i in part) for part in needed.needs]
    return window.Window(needed.dim, tuple(parts)), pads


def swapped_owners(groups: Any, size: int) -> Any:
    parts = block_indices(groups, size)
    return (parts[1], parts[0], *parts[2:]) if size == 2 else parts


def one_row_short(kernel: Any, first: int, last: int) -> tuple[int, int]:
    start, stop = adjoint_needs(kernel, first, last)
    return start, max(start, stop - (first > 0))


def next_sources(*args: Any) -> Any:
    """The row behind the one that is seen."""
    index, weights = pool_terms(*args)
    return (index + 1).clamp(max=args[4] - 1), weights


def of_the_sizes(op: Any, constants: Any, d: int, num: int, size: int, dtype: Any) -> Any:
    """The scale that the sizes have, where another is given."""
    out = tuple(int(size * scale) if scale != 1 else 1 for scale in constants[-1])
    return pool_terms(op, (out, *constants[1:-1], None), d, num, size, dtype)


def no_gradient(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return pool_weighted(x.detach(), *args)


adjoint_needs, pool_terms, pool_weighted = conv._Adjoint.needs, pool._terms, pool.weighted
block_indices = groups._indices
whole_window = window.window


def changed(rule: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    """Return the rule with every choice changed, where it is one of those meant."""

    def run(*args: Any) -> Any:
        for choice in rule(*args):
            yield replace(choice, **{k: change(choice) for k, change in changes.items()})

    return run


def bias_whole(choice: Any) -> Any:
    return tuple(Varying() if isinstance(layout, Partial) else layout for layout in choice.inputs)


def backwards(choice: Any) -> Any:
    output = choice.output
    return Shard(output.dim, output.owners[::-1]) if isinstance(output, Shard) else output


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], nn.Module, Any]] = {
    "a window shifted by one": (
        lambda patch: patch.setattr(window, "window", shifted_window),
        conv_model(),
        aten.conv2d,
    ),
    "a pool's window shifted by one": (
        lambda patch: patch.setattr(window, "window", shifted_window),
        nn.MaxPool2d(3, 2, 1),
        aten.max_pool2d,
    ),
    "a transposed convolution's window one row short": (
        lambda patch: patch.setattr(conv._Adjoint, "needs", one_row_short),
        nn.ConvTranspose2d(8, 4, 3, 2, 1),
        aten.conv_transpose2d,
    ),
    "wrong sources of interpolated rows": (
        lambda patch: patch.setattr(pool, "_terms", next_sources),
        nn.Upsample(scale_factor=1.7),
        aten.upsample_nearest2d,
    ),
    "interpolated rows of another scale": (
        lambda patch: patch.setattr(pool, "_terms", of_the_sizes),
        nn.Upsample(scale_factor=1.7, mode="bilinear"),
        aten.upsample_bilinear2d,
    ),
    "a resize through which no gradient flows": (
        lambda patch: patch.setattr(pool, "weighted", no_gradient),
        nn.Upsample((5, 6), mode="bilinear"),
        aten.upsample_bilinear2d,
    ),
    "wrong owners of groups": (
        lambda patch: patch.setattr(groups, "_indices", swapped_owners),
        nn.Conv2d(8, 12, 3, groups=4),
        aten.conv2d,
    ),
    "all groups on each rank": (
        lambda patch: patch.setattr(conv, "own_number", lambda *_: lambda emit: emit.again()),
        conv_model(groups=4),
        aten.conv2d,
    ),
    "the bias in every term": (
        lambda patch: patch.setitem(
            RULES, aten.linear, changed(contraction.linear, inputs=bias_whole)
        ),
        nn.Linear(7, 6),
        aten.linear,
    ),
    "zeros round a maximum": (
        lambda patch: patch.setattr(pool.math, "inf", 0.0),
        nn.Sequential(nn.LogSigmoid(), nn.MaxPool2d(3, 1, 1)),
        aten.max_pool2d,
    ),
    "results on each other's ranks": (
        lambda patch: patch.setitem(RULES, aten.cat, changed(movement.cat, output=backwards)),
        Apply(lambda x: torch.cat([x, x * 2], 1)),
        aten.cat,
    ),
    "pieces joined in the wrong order": (
        lambda patch: patch.setattr(
            movement._Pieces,
            "__call__",
            lambda self, emit: list(reversed(moves_pieces(self, emit))),
        ),
        Apply(lambda x: x.chunk(2, 1)),
        aten.chunk,
    ),
}
moves_pieces = movement._Pieces.__call__


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, model, op = FAULTS[fault]
    assert not check(model, x(), op=op).faults
    plant(monkeypatch)
    assert check(model, x(), op=op).faults
