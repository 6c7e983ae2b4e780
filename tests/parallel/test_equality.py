"""Data parallel computes what one process computes on the whole batch (DESIGN section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.comm.exchange import GroupExchange, SharedExchange
from meshuffle.data import shard_bounds
from meshuffle.models import create_model
from meshuffle.parallel import batch_norm, data_parallel
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.data_parallel import DataParallel
from tests.ranks import run_ranks

NUM_CLASSES = 5


def make_model() -> nn.Module:
    return create_model("shufflenet_v2_x0_5", num_classes=NUM_CLASSES, seed=1).double()


def make_batch(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, 64, 64, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, NUM_CLASSES, (batch,), generator=generator)


class Fused(nn.BatchNorm2d):
    """A norm with its activation in one layer, as timm's."""

    def forward(self, input: Tensor) -> Tensor:
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(input, *tensors, self.training, 0.2, self.eps).relu()


class Own(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


def make_fused() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 5, 4), Fused(6), nn.Conv2d(6, 6, 3), Own(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, NUM_CLASSES)).double()


def train_three_steps(
    group: dist.ProcessGroup,
    batch: int,
    mode: data_parallel.Mode,
    shared: bool,
    fault: str = "",
    make: Callable[[], nn.Module] = make_model,
    compiles: bool = False,
) -> dict[str, Any]:
    """Three steps of SGD with momentum on this rank's part of one batch."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    plant(fault, rank)
    exchange = (SharedExchange if shared else GroupExchange)(group)
    model = synchronise_batch_norm(make(), exchange)
    compiled = torch.compile(model, dynamic=False) if compiles else model
    parallel = DataParallel(model, group, mode, bucket_bytes=1 << 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = make_batch(batch)
    start, stop = shard_bounds(batch, world)[rank]
    found: dict[str, Any] = {"loss": []}
    for step in range(3):
        optimizer.zero_grad()
        parallel.expect_last_backward()
        forward = compiled if step else model
        loss = F.cross_entropy(forward(x[start:stop]), y[start:stop], reduction="sum") / batch
        loss.backward()
        parallel.reduce_gradients()
        if step == 0:
            found["grads"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        if parallel.updates_here:
            parallel.drop_others()
            optimizer.step()
        parallel.share_update()
        found["loss"].append(float(loss.detach()))
    found["state"] = {k: v.clone() for k, v in model.state_dict().items()}
    found["kept"] = [name for name, p in model.named_parameters() if optimizer.state.get(p)]
    return found


def plant(fault: str, rank: int) -> None:
    """Break one thing, as DESIGN section 4.2 asks; each says that it fired."""
    if fault == "skip the gradients' all-reduce":
        DataParallel.reduce_gradients = lambda self: setattr(self, "_next", 0)  # type: ignore[method-assign]
        DataParallel._launch = lambda self, bucket: None  # type: ignore[method-assign]
        DataParallel._launch_ready = lambda self: None  # type: ignore[method-assign]
    if fault == "mean for sum":
        unpack = data_parallel.Bucket.unpack

        def halved(self: Any) -> None:
            self.flat /= 2
            unpack(self)

        data_parallel.Bucket.unpack = halved  # type: ignore[method-assign]
    if fault == "local statistics":
        whole = batch_norm.global_statistics
        own = GroupExchange(dist.new_group([rank], use_local_synchronization=True))
        batch_norm.global_statistics = lambda x, exchange: whole(x, own)
    if fault == "stale buffer":
        batch_norm.update_running = lambda *_: None


def reference(batch: int, make: Callable[[], nn.Module] = make_model) -> dict[str, Any]:
    """One process, torch's own batch norm, the whole batch."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = make_batch(batch)
    found: dict[str, Any] = {"loss": []}
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if step == 0:
            found["grads"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        found["loss"].append(float(loss.detach()))
    found["state"] = model.state_dict()
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return max ‖a−b‖ / (‖b‖ + 0.01·S·√numel), the figure of DESIGN section 4.1."""
    expected = {k: v.double() for k, v in expected.items()}
    total = sum(v.square().sum() for v in expected.values())
    scale = (total / sum(v.numel() for v in expected.values())).sqrt()
    return max(
        float((found[k] - v).norm() / (v.norm() + 0.01 * scale * v.numel() ** 0.5))
        for k, v in expected.items()
    )


@pytest.mark.parametrize(
    ("world", "batch", "mode", "shared"),
    [
        (2, 8, "replicate", False),
        (2, 7, "central", True),
        (3, 10, "shard", False),
        (3, 7, "replicate", True),
        (3, 2, "replicate", False),
    ],
)
def test_ranks_equal_one_process(world: int, batch: int, mode: str, shared: bool) -> None:
    """Even, uneven, and with a rank that has no sample at all."""
    expected = reference(batch)
    found = run_ranks(train_three_steps, world, batch, mode, shared)
    for step in range(3):
        assert sum(f["loss"][step] for f in found) == pytest.approx(expected["loss"][step], 1e-9)
    for rank in found:
        assert worst(rank["state"], expected["state"]) < 1e-8
    if mode == "shard":
        kept = [rank["kept"] for rank in found]
        assert all(kept) and sorted(n for names in kept for n in names) == sorted(expected["grads"])
    updating = found[:1] if mode == "central" else found
    for rank in updating:
        assert worst(rank["grads"], expected["grads"]) < 1e-8


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_norms_of_any_class_see_the_whole_batch(compiles: bool) -> None:
    expected = reference(7, make_fused)
    found = run_ranks(train_three_steps, 2, 7, "replicate", False, "", make_fused, compiles)
    for rank in found:
        assert worst(rank["state"], expected["state"]) < 1e-8
        assert worst(rank["grads"], expected["grads"]) < 1e-8


@pytest.mark.parametrize(
    "fault", ["skip the gradients' all-reduce", "mean for sum", "local statistics", "stale buffer"]
)
def test_planted_faults_are_found(fault: str) -> None:
    expected = reference(8)
    found = run_ranks(train_three_steps, 2, 8, "replicate", True, fault)
    assert worst(found[0]["state"], expected["state"]) > 1e-4
