"""Optimiser, learning rate, freezing and averaged weights: small parts without state of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meshuffle.config import TrainConfig
from meshuffle.errors import ConfigError, did_you_mean
from meshuffle.models import classifier_of, layer_names
from meshuffle.models.features import backbone_prefix
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks


def rate_factors(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Return the factors on the learning rate by parameter name; those that are 1 are left out.

    The head has the rate itself, the body `--body-lr` of it, and each layer away from the head
    once more `--layer-decay` (as ELECTRA's, arXiv 2003.10555).

    Args:
        model: whole.
    """
    body_lr = 1.0 if config.body_lr is None else config.body_lr
    if body_lr == config.layer_decay == 1:
        return {}
    heads = tuple(f"{name}." for name in classifier_of(model))
    layers = [f"{name}." for name in _body_layers(model)]
    factors = {}
    for name, _ in model.named_parameters():
        if not name.startswith(heads):
            place = next((i for i, layer in enumerate(layers) if name.startswith(layer)), 0)
            factors[name] = body_lr * config.layer_decay ** (len(layers) - place)
    return factors


def _body_layers(model: nn.Module) -> list[str]:
    """Return the layers in front of the head, in forward order."""
    prefix = backbone_prefix(model)
    body = model.get_submodule(prefix.removesuffix("."))
    heads = classifier_of(model)
    return [prefix + name for name in layer_names(body) if prefix + name not in heads]


def build_optimizer(
    model: nn.Module, config: TrainConfig, factors: Mapping[str, float] | None = None
) -> Optimizer:
    """Return the optimiser of the trainable parameters of `model`.

    Weight decay acts on weights of two or more dims, never on norms and biases. A stage of a
    pipeline may have nothing to train. Each group says in `factor` what its rate is multiplied by.

    Args:
        factors: of the whole model, see `rate_factors`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    by_rate: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = ((factors or {}).get(name, 1.0), parameter.ndim > 1)
            by_rate.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "weight_decay": config.weight_decay if decays else 0.0,
            "factor": factor,
        }
        for (factor, decays), members in by_rate.items()
        if members or factor == 1.0
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    lr = config.lr or 0.0
    if config.optimizer in (None, "sgd"):
        nesterov = config.momentum > 0
        return SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    kind = Adam if config.optimizer == "adam" else AdamW
    return kind(groups, lr=lr, fused=fused)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up, then the schedule."""
    assert config.lr is not None and config.epochs is not None
    total = config.epochs * steps_per_epoch
    warmup = min(round((config.warmup_epochs or 0) * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "step":
        falls = sum(step // steps_per_epoch >= epoch for epoch in config.step_epochs)
        return config.lr * config.step_factor**falls
    return config.lr


def freeze(model: nn.Module, choice: str, *, norms: bool = False) -> list[str]:
    """Freeze what `choice` says; returns the names of the modules that stay frozen.

    Args:
        choice: `none`, `backbone` (all but the classifier) or `until:LAYER` (the layers in
            forward order up to and with LAYER).
        norms: all batch norms of the body too.

    Raises:
        ConfigError: LAYER is not one of the model's, or nothing is left to train.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if choice == "none":
        frozen = []
    elif choice == "backbone":
        heads = classifier_of(model)
        kept = {id(p) for name in heads for p in _part(model, name).parameters()}
        frozen = [name for name, module in model.named_modules() if _outside(module, kept)]
    else:
        frozen = _layers_until(model, choice.removeprefix("until:"))
    if norms:
        frozen += _body_norms(model)
    for name in frozen:
        _part(model, name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        why = "the model has" if choice == "none" else f"--freeze {choice}: leaves"
        raise ConfigError(f"{why} no parameter to train")
    return frozen


def _body_norms(model: nn.Module) -> list[str]:
    """Return the batch norms outside the head, whose own have no statistics to keep."""
    heads = {id(part) for name in classifier_of(model) for part in _part(model, name).modules()}
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and id(part) not in heads
    ]


def _part(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _outside(module: nn.Module, kept: set[int]) -> bool:
    """Whether `module` has parameters or buffers, and no parameter that is kept."""
    has_state = bool(module.state_dict())
    return has_state and not any(id(p) in kept for p in module.parameters())


def _layers_until(model: nn.Module, last: str) -> list[str]:
    names = layer_names(model)
    if last not in names:
        raise ConfigError(
            f"--freeze until:{last}: no such layer{did_you_mean(last, names)}; "
            f"layers in order: {', '.join(names)}"
        )
    return names[: names.index(last) + 1]


def hold_frozen(model: nn.Module, frozen: list[str]) -> None:
    """Put frozen modules into eval mode, so that their batch statistics stay as they are."""
    for name in frozen:
        _part(model, name).eval()


def keep_frozen(model: nn.Module, frozen: list[str]) -> None:
    """Put frozen modules into eval mode for good, whatever mode `model` is put into later."""
    for name in frozen:
        part = _part(model, name).eval()
        part.train = _no_change.__get__(part)  # type: ignore[method-assign]


def _no_change(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def average(model: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of `model`, buffers too.

    The average starts as a copy of the first step's weights. The decay after t steps is
    min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage, so that a short
    run's average is not one of weights that were hardly trained.
    """

    def update(averages: Any, values: Any, num: Any) -> None:
        t = int(num)
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(averages, values, num)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def clip_gradients(model: nn.Module, max_norm: float, ranks: Ranks | None = None) -> Tensor | None:
    """Scale all gradients so that their global norm is at most `max_norm`; 0 does nothing.

    Returns the norm that they had. All ranks of a split model call it: a whole gradient counts
    once, one in parts with all of them.
    """
    if not max_norm:
        return None
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    if ranks is None or not isinstance(model, Parallel) or ranks.in_replica.world == 1:
        return torch.nn.utils.clip_grad_norm_([p for _, p in named], max_norm)
    counted = [
        p
        for name, p in named
        if (name in model.shards or ranks.tp_rank == 0)
        and min(model.stages_of[name]) in model.stages  # of a tied one, the first
    ]
    norm = ranks.in_replica.all_sum(_square(counted, ranks)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for _, parameter in named:
        parameter.grad.mul_(scale.to(parameter.grad))  # type: ignore[union-attr]
    return norm


def _square(parameters: list[nn.Parameter], ranks: Ranks) -> Tensor:
    """Return the squared norm of the parameters' gradients, float64 (1,)."""
    squares = [torch.linalg.vector_norm(p.grad, dtype=torch.float64).square() for p in parameters]
    zero = torch.zeros(1, dtype=torch.float64, device=ranks.draw_state.key.device)
    return sum(squares, zero)
