"""A tiny GAN, images for it, and its step, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm.exchange import make_exchange
from meshuffle.config import TrainConfig
from meshuffle.data import AugmentConfig, Batch, Preprocess
from meshuffle.models import create_model
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.data_parallel import DataParallel, Mode
from meshuffle.parallel.random_masks import draw_key
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.tasks.gan import Gan
from meshuffle.tasks.generate import Generate
from meshuffle.train.gan_step import GanStep
from meshuffle.train.optimiser import build_optimizer
from meshuffle.weights import load_or_build, save_weights

SIZE, WIDTH, NOISE = 8, 4, 6
PREPROCESS = Preprocess(crop=SIZE, resize=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def card(**more: Any) -> Card:
    knobs = {"width": WIDTH, "noise": NOISE}
    values = {"model": "shufflenet_v2_x1_0", "classes": ("a",), "preprocess": PREPROCESS}
    return Card(**{**values, "task": "generate", "knobs": knobs, **more})


def task(**more: Any) -> Generate:
    made = make_task(card(**more), load=load_or_build)
    assert isinstance(made, Generate)
    return made


def gan(**more: Any) -> Gan:
    made = task(**more).network(0)
    assert isinstance(made, Gan)
    return made


def photos(num: int, seed: int = 0, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)


def saved_classifier(path: Path) -> nn.Module:
    knobs: dict[str, Any] = {"width": 0.25, "depths": [1, 1, 1], "head_channels": 24}
    network = create_model("shufflenet_v2_x0_5", num_classes=3, seed=5, **knobs).eval()
    own = Preprocess(crop=32, resize=36, mean=(0.2, 0.3, 0.4), std=(0.3, 0.3, 0.2))
    saved = Card("shufflenet_v2_x0_5", ("a", "b", "c"), own, knobs=knobs)
    save_weights(path, network.state_dict(), saved)
    return network


def make_step(
    group: dist.ProcessGroup, mode: Mode = "replicate", optimizer: str = "sgd", **more: Any
) -> GanStep:
    model = gan().double().train()
    synchronise_batch_norm(model, make_exchange(group, torch.device("cpu"), True))
    config = TrainConfig(optimizer=optimizer, lr=0.1, weight_decay=0.01)  # type: ignore[arg-type]
    return GanStep(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, config),
        parallel=DataParallel(model, group, mode),
        task=task(),
        preprocess=PREPROCESS,
        augment=AugmentConfig(),
        device=torch.device("cpu"),
        channels_last=False,
        **more,
    )


def make_batch(start: int, stop: int, num: int = 7) -> Batch:
    ids = torch.arange(start, stop)
    return Batch(photos(num)[start:stop], torch.zeros_like(ids), ids, ids, ids - start, [])


def train(step: GanStep, bounds: list[tuple[int, int]], lr: float = 0.05) -> dict[str, Tensor]:
    """Two steps on micro-batches of samples start … stop, of 7 each; the state and the sums."""
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(2):
        micro = [make_batch(*bound) for bound in bounds]
        draws = [(draw_key(3, i, m), start) for m, (start, _) in enumerate(bounds)]
        sums += step.run(micro, [7] * len(bounds), lr, draws)
    return {**{k: v.clone() for k, v in step.model.state_dict().items()}, "sums": sums}
