"""Refuse to train batch norms on one value per channel, before anything is written.

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


def refuse_single_values(
    model: nn.Module, frozen: list[str], config: TrainConfig, plan: Plan, num_train: int
) -> None:
    """Raise if a batch norm of `model` sees one value per channel in the smallest step.

    Args:
        model: whole, on the CPU; it is not changed.
        frozen: modules that keep their batch statistics, if they are not unfrozen later.
        num_train: images of the training split.

    Raises:
        ConfigError: names the layer, the batch, and what to do.
    """
    assert config.batch is not None and config.input_size is not None
    sampler = EpochSampler(num_train, config.batch, repeats=config.repeats or 1)
    least = sampler.num_distinct * sampler.repeats // max(1, sampler.steps_per_epoch)
    joined = max(1, least // num_micro_batches(config, plan))
    own = joined if plan.tp * plan.pp > 1 else max(1, joined // plan.dp)
    if own > 1 or config.task in STEPS:
        return
    tried = copy.deepcopy(model).train()
    if config.unfreeze_epoch:
        frozen = freeze(tried, "none", norms=bool(config.freeze_norm))
    hold_frozen(tried, frozen)
    found: list[str] = []

    names = {norm: name for name, norm in tried.named_modules()}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        num = joined if type(norm) in _JOINED else own
        if norm.training and num * inputs[0].numel() // inputs[0].shape[1] == 2:  # of two images
            found.append(names[norm])

    for norm in names:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_pre_hook(note)
    with torch.no_grad():
        tried(torch.zeros(2, 3, config.input_size, config.input_size))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        num = num_micro_batches(config, plan)
        fewer = f"fewer micro-batches than {num} (mb, --accumulate), " if num > 1 else ""
        raise ConfigError(
            f"--batch {config.batch} under plan {plan}: the smallest of its batches gives the "
            f"batch norm {found[0]}{more} a single value per channel (1 image, 1×1 map at "
            f"--input-size {config.input_size}), from which it learns nothing; use a larger "
            f"--batch, {fewer}or a larger --input-size"
        )
