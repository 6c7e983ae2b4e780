"""Peak bytes of tensors per rank of a pipeline, against one device that takes the whole batch.

    python benchmarks/pipeline_memory.py [NAME] [--pp 4] [--schedule 1f1b] [--batch 32] [--mb 8]

Nothing is computed: every rank's step, forward, backward and SGD with momentum, runs in turn on
fake tensors in a fake process group, under torch's MemTracker. Prints a table and appends to
results/pipeline_memory.csv.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from meshuffle.models import create_model
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import join
from meshuffle.planner.costs import estimated
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import make_schedule
from rows import append

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", default="torchvision:resnet152")
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mb", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    images = torch.empty(options.batch, 3, options.size, options.size, device="meta")
    one = whole_step(options.name, images)
    print(f"one device, batch {options.batch}: {one / 1e9:.2f} GB", flush=True)
    rows = []
    plan = Plan(pp=options.pp, pp_kind=options.schedule, mb=options.mb)
    for rank in range(options.pp):
        peak = stage_step(options.name, images, plan, rank)
        rows.append(
            {
                **{"model": options.name, "plan": str(plan), "batch": options.batch},
                **{"size": options.size, "rank": rank, "peak_bytes": peak},
                **{"one_device_bytes": one, "share": round(peak / one, 4)},
                "torch": torch.__version__,
            }
        )
        print(f"rank {rank} of {plan}: {peak / 1e9:.2f} GB, {peak / one:.3f}", flush=True)
    append("pipeline_memory", rows)


def whole_step(name: str, images: Tensor) -> int:
    """Return the peak bytes of a step of the whole batch on one device."""
    model = create_model(name).train()
    return peak_of(model, lambda: loss_of(model(torch.empty_like(images, device="cpu"))).backward())


def stage_step(name: str, images: Tensor, plan: Plan, rank: int) -> int:
    """Return the peak bytes of a step on one rank of a pipeline."""
    dist.init_process_group("fake", store=HashStore(), rank=rank, world_size=plan.num_ranks)
    try:
        ranks = join(plan, CPU)
        schedule = make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
        part = Parallel(
            create_model(name).train(),
            (images[: len(images) // plan.num_micro_batches],),
            *(1, 0),
            num_stages=schedule.num_stages,
            stages=schedule.stages_of(rank),
            costs=estimated,
        ).bind(ranks)
        pipeline = Pipeline(part, ranks, schedule, edge_groups=False)
        sizes = [len(x) for x in images.tensor_split(plan.num_micro_batches)]

        def inputs(i: int) -> tuple[Tensor]:
            return (torch.empty(sizes[i], *images.shape[1:]),)

        return peak_of(
            part, lambda: pipeline.train(sizes, inputs, lambda _, y: loss_of(y) / len(sizes))
        )
    finally:
        dist.destroy_process_group()


def loss_of(outputs: Any) -> Tensor:
    return outputs.square().mean()


def peak_of(model: nn.Module, step: Any) -> int:
    """Return the peak bytes of the second step, when gradients and momenta exist."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        make_fake(model, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                step()
                optimizer.step()
                optimizer.zero_grad()
    return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = mode.from_tensor(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


if __name__ == "__main__":
    main()
