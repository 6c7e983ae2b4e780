"""`BatchNorm` beside a rank without samples is torch's: outputs, gradients, running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshuffle.comm.exchange import Exchange
from meshuffle.parallel.batch_norm import (
    BatchNorm,
    global_statistics,
    local_norm,
    synchronise_batch_norm,
)

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class BesideAnEmptyRank(Exchange):
    """Stands for two ranks, the other of which has no sample: all its numbers are zero."""

    def __init__(self) -> None:
        self.world, self.rank = 2, 0

    def all_gather(self, vector: Tensor) -> Tensor:
        return torch.stack([vector, torch.zeros_like(vector)])


def exchange() -> Exchange:
    return BesideAnEmptyRank()


def run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two training steps, an evaluation, and all that they leave behind."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for step in range(2):
        own = (x + step).detach().requires_grad_()
        y = layer(own)
        (y * torch.randn_like(y)).sum().backward()
        found |= {f"y{step}": y.detach(), f"gx{step}": own.grad}
    found["eval"] = layer.eval()(x).detach()
    found |= {f"g.{name}": p.grad for name, p in layer.named_parameters()}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 4, 5, 3)])
@pytest.mark.parametrize(
    "knobs", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_it_is_torchs(shape: tuple[int, ...], knobs: dict[str, Any]) -> None:
    x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
    plain = KINDS[len(shape)](3, **knobs).double()
    ours = KINDS[len(shape)](3, **knobs).double()
    for layer in (plain, ours):
        for i, parameter in enumerate(layer.parameters()):
            nn.init.constant_(parameter, 0.5 + i)
    synchronise_batch_norm(ours, exchange())
    assert type(ours) is BatchNorm
    found, expected = run(ours, x), run(plain, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(layout: torch.memory_format) -> None:
    layer = synchronise_batch_norm(nn.BatchNorm2d(3), exchange())
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=layout)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=layout)


def test_bf16_input_keeps_float32_statistics() -> None:
    layer = synchronise_batch_norm(nn.BatchNorm2d(3), exchange())
    x = torch.randn(8, 3, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(nn.Conv2d(3, 3, 1)(x))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32  # type: ignore[union-attr]
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_names_and_parameters_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    synchronise_batch_norm(model, exchange())
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys


def test_frozen_layers_use_their_running_statistics() -> None:
    layer = synchronise_batch_norm(nn.BatchNorm2d(3), exchange())
    layer.eval()
    x = 5 + torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer(x), x / (1 + 1e-5) ** 0.5)
    assert layer.num_batches_tracked == 0


def test_too_few_dims_are_refused() -> None:
    layer = synchronise_batch_norm(nn.BatchNorm1d(3), exchange())
    with pytest.raises(ValueError, match="at least 2 dims"):
        layer(torch.zeros(3))


class Together(Exchange):
    """Stands for ranks whose vectors are known; rank 0 asks."""

    def __init__(self, others: list[Tensor]) -> None:
        self.world, self.rank, self.others = 1 + len(others), 0, others

    def all_gather(self, vector: Tensor) -> Tensor:
        return torch.stack([vector, *self.others])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    st.floats(-1e4, 1e4),
    st.integers(0, 1 << 16),
)
def test_moments_combine_however_the_batch_is_cut(sizes: list[int], mean: float, seed: int) -> None:
    """Also with empty parts, and with a mean that is large against the deviation."""
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(sum(sizes), 2, 3, generator=generator, dtype=torch.float64)
    parts = list(x.split(sizes))
    vectors = [moments(part) for part in parts]
    found = global_statistics(parts[0], Together(vectors[1:]))
    expected = torch.var_mean(x, dim=(0, 2), correction=0)
    torch.testing.assert_close(found[0], expected[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], expected[0], rtol=1e-6, atol=1e-9)
    assert float(found[2]) == x.numel() / 2


def moments(part: Tensor) -> Tensor:
    """[mean, variance, count] of one rank, by torch alone."""
    if not len(part):
        return torch.zeros(5, dtype=torch.float64)
    var, mean = torch.var_mean(part, dim=(0, 2), correction=0)
    count = torch.tensor([part.numel() / 2], dtype=torch.float64)
    return torch.cat((mean, var, count))


def test_one_value_between_a_forward_and_its_backward() -> None:
    """As in a pipeline whose last micro-batch has one image where a channel is 1 × 1."""
    mean, var = torch.full((3,), 2.0), torch.full((3,), 4.0)
    several, one = torch.randn(4, 3, 1, 1, requires_grad=True), torch.full((1, 3, 1, 1), 7.0)
    first = local_norm(several, None, None, mean, var, 0.1, 1e-5, False)
    before = mean.clone(), var.clone()
    alone = local_norm(one.requires_grad_(), None, None, mean, var, 0.1, 1e-5, False)
    torch.testing.assert_close(mean, 0.9 * before[0] + 0.1 * 7)
    torch.testing.assert_close(var, 0.9 * before[1])
    (first.square().sum() + alone.sum()).backward()
    torch.testing.assert_close(alone, torch.zeros_like(one), rtol=0, atol=1e-3)
    assert one.grad is not None and several.grad is not None
    torch.testing.assert_close(one.grad, torch.zeros_like(one), rtol=0, atol=1e-3)
