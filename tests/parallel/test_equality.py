"""Data parallel computes what one process computes on the whole batch (DESIGN section 4.1)."""

from __future__ import annotations

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


def train_three_steps(
    group: dist.ProcessGroup, batch: int, mode: data_parallel.Mode, shared: bool, fault: str = ""
) -> dict[str, Any]:
    """Three steps of SGD with momentum on this rank's part of one batch."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    plant(fault, rank)
    exchange = (SharedExchange if shared else GroupExchange)(group)
    model = synchronise_batch_norm(make_model(), exchange)
    parallel = DataParallel(model, group, mode, bucket_bytes=1 << 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = make_batch(batch)
    start, stop = shard_bounds(batch, world)[rank]
    found: dict[str, Any] = {"loss": []}
    for step in range(3):
        optimizer.zero_grad()
        parallel.expect_last_backward()
        loss = F.cross_entropy(model(x[start:stop]), y[start:stop], reduction="sum") / batch
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


def reference(batch: int) -> dict[str, Any]:
    """One process, torch's own batch norm, the whole batch."""
    model = make_model()
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


@pytest.mark.parametrize(
    "fault", ["skip the gradients' all-reduce", "mean for sum", "local statistics", "stale buffer"]
)
def test_planted_faults_are_found(fault: str) -> None:
    expected = reference(8)
    found = run_ranks(train_three_steps, 2, 8, "replicate", True, fault)
    assert worst(found[0]["state"], expected["state"]) > 1e-4
