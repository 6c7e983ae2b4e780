"""`predict --plan auto`: the number of replicas that is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from meshuffle.comm.device import num_cores
from meshuffle.comm.forking import fork_server
from meshuffle.comm.group import rank_env
from meshuffle.deploy.serve.backends import TORCH, Backend
from meshuffle.deploy.serve.measure import layouts, measured, nearly_fastest
from meshuffle.planner.plan import Plan
from meshuffle.weights import open_weights, require_repeated

WORTH_IMAGES = 2000
"""With fewer images, measuring and starting ranks takes longer than it can save."""

_BATCH = 16


def spread_over(
    target: Path, model: str | None, num_images: int, batch: int, say: Callable[[str], None]
) -> Plan:
    """Return the fastest plan for many images: a replica per GPU, or as measured on the CPU.

    Args:
        target, model: see `load_model`.
        batch: images at a time, over all replicas.
        say: called with a line about each step.

    Raises:
        RunError, ModelError: the weights do not exist or cannot be used.
    """
    env = rank_env()
    if env is not None:
        return Plan(dp=env.world)
    if num_images < WORTH_IMAGES:
        return Plan()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    possible = [one for one in layouts(num_cores(), num_gpus) if one.replicas <= batch]
    if num_gpus or len(possible) < 2:
        return Plan(dp=min(max(1, num_gpus), batch))
    card = open_weights(target, model).card
    require_repeated(card.model, model)
    say("measuring how many processes are fastest")
    fork_server(measured.__module__)
    backend = Backend(TORCH, str(target), model)
    size = card.preprocess.size
    speeds = {one: measured(backend, one, (_BATCH,), size)[_BATCH] for one in possible}
    # Each replica must start and load the weights, so fewer are better.
    best = min(nearly_fastest(speeds), key=lambda one: one.replicas)
    listed = ", ".join(f"{one} {speed:.0f}" for one, speed in speeds.items())
    say(f"plan dp={best.replicas}, images/s without decoding: {listed}")
    return Plan(dp=best.replicas, threads=best.threads)
