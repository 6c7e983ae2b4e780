"""Training throughput: the obvious alternatives and ours, in turn, on this machine.

    python benchmarks/train_throughput.py [--json] [--steps 60] [--warmup 20] [--batch 64]

    A  torchvision's shufflenet_v2_x1_0 in a plain PyTorch loop, one process, all threads
    B  the same under DistributedDataParallel, one process per core (or GPU), local batch norm
    C  Meshuffle's shufflenet_v2_x1_0 in its own training step, with the plan that `--plan auto`
       takes here: batch norm over the whole batch, channels-last, uneven batches handled;
       compiled where a C++ compiler is installed, as in a long run (`--compile off`: eager)

All start from the same weights and train on the same uint8 images, 3×224×224, already in memory.
The processes stay alive and take turns, A B C A B C …, so that a slow minute of a shared machine
hits all three; the timed steps are split over the turns. Prints medians and ratios and appends to
results/train_throughput.csv. `ours / max(torchvision, ddp)` is the figure to watch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from rows import append

NUM_TURNS = 6
NUM_BATCHES = 4
SIZE = 224
LR = 0.02
NUM_COMPARED = 20
_open: list[Any] = []  # the process group of this process, until it ends


class Contestant:
    """The processes of A, B or C, which run steps when they are told."""

    def __init__(self, name: str, num_ranks: int, threads: int, options: argparse.Namespace):
        self.name, self.label = name, f"{num_ranks} × {threads} threads"
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.processes = []
        for rank in range(num_ranks):
            environment = os.environ | {
                "OMP_NUM_THREADS": str(threads),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(num_ranks),
            }
            command = [sys.executable, __file__, "--worker", name, "--batch", str(options.batch)]
            command += ["--device", options.device, "--compile", options.compile]
            command += ["--precision", options.precision]
            pipe = subprocess.PIPE
            self.processes.append(
                subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
            )
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0
        self.first_step_s = 0.0

    def run(self, num_steps: int, timed: bool) -> None:
        """Run `num_steps` steps and collect rank 0's times and the ranks' summed losses."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{num_steps}\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        if not self.losses:
            self.first_step_s = answers[0]["step_s"][0]
        self.losses += [sum(step) for step in zip(*(a["losses"] for a in answers), strict=True)]
        self.peak_bytes = sum(a["peak_bytes"] for a in answers)
        if timed:
            self.step_s += answers[0]["step_s"]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a process of {self.name} died; its message stands above")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def make_batches(batch: int) -> list[tuple[Any, Any]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, SIZE, SIZE)
    return [
        (
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            torch.randint(0, 1000, (batch,), generator=generator),
        )
        for _ in range(NUM_BATCHES)
    ]


def plain_steps(name: str, batch: int, device: Any, precision: str) -> Any:
    """A and B: return a function that does step `i` and returns this rank's share of the loss."""
    import torch
    import torch.distributed as dist
    import torchvision

    from meshuffle.comm.device import autocast

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.manual_seed(0)
    model: Any = torchvision.models.shufflenet_v2_x1_0().to(device)
    if name == "ddp":
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)
    part = slice(rank * batch // world, (rank + 1) * batch // world)
    batches = [(x[part].to(device), y[part].to(device)) for x, y in make_batches(batch)]
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def step(i: int) -> Any:
        images, labels = batches[i % NUM_BATCHES]
        x = (images.float() / 255 - mean) / std
        with autocast(device, precision):  # type: ignore[arg-type]
            logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach() / world

    return step


def our_steps(batch: int, device: Any, compile_mode: str, precision: str) -> Any:
    """C: the training step of `meshuffle train`."""
    import torch
    import torch.distributed as dist
    import torchvision

    from meshuffle.comm.exchange import make_exchange
    from meshuffle.comm.group import process_group, rank_env
    from meshuffle.config import TrainConfig
    from meshuffle.data import AugmentConfig, Batch, Preprocess, shard_bounds
    from meshuffle.planner.plan import Plan
    from meshuffle.tasks.card import Card
    from meshuffle.train.compiling import compiled
    from meshuffle.train.defaults import resolve
    from meshuffle.train.state import augment_values, build_state
    from meshuffle.train.step import sum_over_ranks

    env = rank_env()
    assert env is not None
    _open.append(process_group(env, device))
    group = _open[0].__enter__()
    control = make_exchange(dist.new_group(backend="gloo"), torch.device("cpu"), True)
    config = TrainConfig(
        data="-", batch=batch, lr=LR, weight_decay=0.0, label_smoothing=0.0, precision=precision
    )
    config = resolve(config, 1_281_167, SIZE, augment_values(AugmentConfig()))
    card = Card("shufflenet_v2_x1_0", tuple(map(str, range(1000))), Preprocess.imagenet(SIZE))
    state = build_state(config, Plan(dp=env.world), card, env, device, group)
    torch.manual_seed(0)
    state.model.load_state_dict(torchvision.models.shufflenet_v2_x1_0().state_dict())
    if compile_mode == "on":
        state.step.forward = compiled(state.model)
    start, stop = shard_bounds(batch, env.world)[env.rank]
    none = torch.zeros(stop - start, dtype=torch.int64)
    batches = [
        Batch(
            x[start:stop].contiguous(memory_format=torch.channels_last).to(device),
            *(y[start:stop], none, none, torch.arange(stop - start)),
            skipped=[],
        )
        for x, y in make_batches(batch)
    ]

    def step(i: int) -> Any:
        micro_batches = state.step.micro_batches(batches[i % NUM_BATCHES])
        counts = sum_over_ranks([float(len(m)) for m in micro_batches], control)
        sums = state.step.run(micro_batches, [round(c) for c in counts], LR)
        return sums[0] / batch

    return step


def work(options: argparse.Namespace) -> None:
    """Be one process of a contestant: read numbers of steps, run them, answer in JSON."""
    import torch

    from meshuffle.comm.device import peak_memory_bytes, pick_device, synchronize
    from meshuffle.comm.heap import keep_freed_pages

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = pick_device(options.device, int(os.environ["LOCAL_RANK"]))
    if options.worker == "ours":
        keep_freed_pages()
        step = our_steps(options.batch, device, options.compile, options.precision)
    else:
        step = plain_steps(options.worker, options.batch, device, options.precision)
    done = 0
    for line in sys.stdin:
        step_s, losses = [], []
        for _ in range(int(line)):
            began = time.perf_counter()
            losses.append(step(done))
            synchronize(device)
            step_s.append(time.perf_counter() - began)
            done += 1
        peak = peak_memory_bytes(device)
        answer = {"step_s": step_s, "losses": [float(x) for x in losses], "peak_bytes": peak}
        print(json.dumps(answer), flush=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the contest; returns what `--json` prints."""
    from meshuffle.comm.device import num_accelerators, num_cores

    cores, gpus = num_cores(), num_accelerators() if options.device != "cpu" else 0
    ranks = gpus or cores
    our_ranks = options.ranks or ranks
    contestants = [
        Contestant("torchvision", 1, cores, options),
        Contestant("ddp", ranks, max(1, cores // ranks), options),
        Contestant("ours", our_ranks, max(1, cores // our_ranks), options),
    ]
    try:
        for contestant in contestants:
            contestant.run(options.warmup, timed=False)
        per_turn = max(1, options.steps // NUM_TURNS)
        for turn in range(NUM_TURNS):
            for contestant in contestants:
                contestant.run(per_turn, timed=True)
            print(f"turn {turn + 1} of {NUM_TURNS}", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    return summary(contestants, options.batch)


def summary(contestants: list[Contestant], batch: int) -> dict[str, Any]:
    speed = {c.name: batch / statistics.median(c.step_s) for c in contestants}
    losses = {c.name: c.losses[:NUM_COMPARED] for c in contestants}
    difference = max(
        abs(a - c) / abs(a) for a, c in zip(losses["torchvision"], losses["ours"], strict=True)
    )
    return {
        **{name: round(value, 2) for name, value in speed.items()},
        "ratio": round(speed["ours"] / max(speed["torchvision"], speed["ddp"]), 3),
        "loss_difference": round(difference, 6),
        "peak_gb": {c.name: round(c.peak_bytes / 1e9, 2) for c in contestants},
        "first_step_s": {c.name: round(c.first_step_s, 1) for c in contestants},
        "ranks": {c.name: c.label for c in contestants},
        "losses": {name: [round(x, 5) for x in values] for name, values in losses.items()},
    }


def record(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Append one line to the results, with versions and machine."""
    import torch
    import torchvision

    row = {
        "date": datetime.date.today().isoformat(),
        "torchvision_images_per_s": result["torchvision"],
        "ddp_images_per_s": result["ddp"],
        "ours_images_per_s": result["ours"],
        "ratio": result["ratio"],
        "loss_difference": result["loss_difference"],
        "ours_peak_gb": result["peak_gb"]["ours"],
        "torchvision_peak_gb": result["peak_gb"]["torchvision"],
        "ours_ranks": result["ranks"]["ours"],
        "batch": options.batch,
        "precision": options.precision,
        "compile": options.compile,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": f"{options.device} {platform.machine()} {cpu_features()}",
        "load": round(os.getloadavg()[0], 2),
    }
    append("train_throughput", [row])


def cpu_features() -> str:
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()} × {os.cpu_count()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--ranks", type=int, help="ranks of C; default one per core or GPU")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.compile == "auto":
        from meshuffle.train.compiling import compiler_missing

        options.compile = "off" if compiler_missing() else "on"
    result = compare(options)
    if not options.no_record:
        record(result, options)
    if options.json:
        print(json.dumps(result))
        return None
    print(f"{'':<14}{'images/s':>10}{'peak GB':>10}{'first step s':>14}  ranks")
    for name in ("torchvision", "ddp", "ours"):
        print(
            f"{name:<14}{result[name]:>10.1f}{result['peak_gb'][name]:>10.2f}"
            f"{result['first_step_s'][name]:>14.1f}  {result['ranks'][name]}"
        )
    print(f"ratio ours / max(torchvision, ddp): {result['ratio']:.2f}")
    print(
        f"largest difference of the loss, A and C, {NUM_COMPARED} steps: "
        f"{100 * result['loss_difference']:.2f} %"
    )
    return None


if __name__ == "__main__":
    main()
