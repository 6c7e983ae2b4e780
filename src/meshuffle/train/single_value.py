"""Batch norms that would see one value per channel, found before anything is written.

Such a norm puts out its bias, whatever the image, and moves its running variance towards 0.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import EpochSampler
from meshuffle.errors import ConfigError
from meshuffle.planner.plan import Plan
from meshuffle.train.optimiser import freeze, hold_frozen
from meshuffle.train.split import num_micro_batches
from meshuffle.train.state import STEPS

_JOINED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Classes whose statistics are joined over the replicas; subclasses have a forward of their own."""


def check_values(
    model: nn.Module, frozen: list[str], config: TrainConfig, plan: Plan, num_train: int
) -> list[str]:
    """Return a line where a batch norm sees one value per channel in some micro-batches.

    Args:
        model: whole, on the CPU; it is not changed.
        frozen: modules that keep their batch statistics, if they are not unfrozen later.
        num_train: images of the training split.

    Raises:
        ConfigError: it does so in all of them; names the layer, the batch, and what to do.
    """
    assert config.batch is not None
    sampler = EpochSampler(num_train, config.batch, repeats=config.repeats or 1)
    num, steps = num_micro_batches(config, plan), max(1, sampler.steps_per_epoch)
    parts = steps * num  # micro-batches of an epoch, over which its images are spread evenly
    num_images = sampler.num_distinct * sampler.repeats
    replicas = plan.dp if not plan.is_split else 1  # with statistics of their own, if not ours
    if num_images // (parts * replicas) > 1 or config.task in STEPS:
        return []
    fewest = _fewest_values(model, frozen, config)

    def single(images: int) -> list[str]:
        own = max(1, images // replicas)
        return [name for name, (n, joined) in fewest.items() if n * (images if joined else own) < 2]

    always = single(-(-num_images // parts))
    found = always or single(max(1, num_images // parts))
    if not found:
        return []
    where = "every step" if always else "some steps"
    norms = f"the batch norm {found[0]} has"
    if len(found) > 1:
        norms = f"the batch norm {found[0]} and {len(found) - 1} more have"
    fewer = f", fewer micro-batches than {num} (mb, --accumulate)," if num > 1 else ""
    text = (
        f"--batch {config.batch} under plan {plan}: in {where} {norms} "
        f"a single value per channel (1 image, 1×1 map at --input-size {config.input_size}), "
        f"from which it learns nothing; use a larger --batch{fewer} or a larger --input-size"
    )
    if always:
        raise ConfigError(text)
    return [text]


def _fewest_values(
    model: nn.Module, frozen: list[str], config: TrainConfig
) -> dict[str, tuple[int, bool]]:
    """Return, by batch norm, the values per channel of an image, and whether replicas join them."""
    assert config.input_size is not None
    tried = copy.deepcopy(model).train()
    if config.unfreeze_epoch:
        frozen = freeze(tried, "none", norms=bool(config.freeze_norm))
    hold_frozen(tried, frozen)
    names = {norm: name for name, norm in tried.named_modules()}
    found: dict[str, tuple[int, bool]] = {}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm.training:
            num = inputs[0].numel() // inputs[0].shape[1] // 2
            found[names[norm]] = num, type(norm) in _JOINED

    for norm in names:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_pre_hook(note)
    with torch.no_grad():
        tried(torch.zeros(2, 3, config.input_size, config.input_size))
    return found
