"""Learning rate, groups, freezing, averaging, clipping."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from meshuffle.config import TrainConfig, parse_knobs
from meshuffle.errors import ConfigError
from meshuffle.models import create_model
from meshuffle.train.api import train
from meshuffle.train.checkpoint.checkpoint import load_optimizer, optimizer_tensors
from meshuffle.train.optimiser import (
    average,
    build_optimizer,
    clip_gradients,
    freeze,
    hold_frozen,
    learning_rate,
    rate_factors,
)
from meshuffle.weights import read_weights
from tests.conftest import SMALL

RESOLVED = TrainConfig(lr=1.0, epochs=10, weight_decay=0.1)
BASE = TrainConfig(lr=1.0, epochs=10, warmup_epochs=2.0, weight_decay=0.1)
STEPS = 5  # per epoch


def rates(config: TrainConfig) -> list[float]:
    assert config.epochs is not None
    return [learning_rate(config, step, STEPS) for step in range(config.epochs * STEPS)]


def test_warm_up_is_linear_and_never_zero() -> None:
    found = rates(BASE)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10] == 1.0


def test_cosine_and_linear_end_near_zero() -> None:
    for schedule in ("cosine", "linear"):
        found = rates(dataclasses.replace(BASE, schedule=schedule))
        assert found[10:] == sorted(found[10:], reverse=True)
        assert 0 < found[-1] < 0.03
    cosine, linear = (
        rates(dataclasses.replace(BASE, schedule=s, warmup_epochs=0.0))[25]
        for s in ("cosine", "linear")
    )
    assert cosine == pytest.approx(0.5)
    assert linear == pytest.approx(0.5)


def test_step_and_constant() -> None:
    config = dataclasses.replace(BASE, schedule="step", step_epochs=(4, 6), warmup_epochs=0.0)
    found = rates(config)
    assert (found[19], found[20], found[30]) == pytest.approx((1.0, 0.1, 0.01))
    assert set(rates(dataclasses.replace(BASE, schedule="constant"))[10:]) == {1.0}


def test_a_warm_up_longer_than_the_run() -> None:
    found = rates(dataclasses.replace(BASE, epochs=1, warmup_epochs=50.0))
    assert all(0 < rate <= 1 for rate in found)


def small_model() -> nn.Module:
    return create_model(
        "shufflenet_v2_x0_5", num_classes=3, seed=0, depths=[1, 1, 1], head_channels=16
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_norms_and_biases_do_not_decay(optimizer: str) -> None:
    model = small_model()
    built = build_optimizer(model, dataclasses.replace(BASE, optimizer=optimizer))  # type: ignore[arg-type]
    decays = {id(p): g["weight_decay"] for g in built.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or parameter.ndim == 1
        assert decays[id(parameter)] == (0.0 if plain else 0.1), name
    assert len(decays) == len(list(model.parameters()))


def test_freeze_backbone_leaves_the_head() -> None:
    model = small_model()
    frozen = freeze(model, "backbone")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    hold_frozen(model.train(), frozen)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_freeze_until_a_layer_and_undo() -> None:
    model = small_model()
    freeze(model, "until:stage2")
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"stage3", "stage4", "conv5", "fc"}
    assert freeze(model, "none") == []
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("choice", "says"),
    [("until:stage22", "did you mean 'stage2"), ("until:fc", "leaves no parameter to train")],
)
def test_impossible_freezes(choice: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        freeze(small_model(), choice)


def test_frozen_layers_stay_as_they_are_in_a_run(small: TrainConfig) -> None:
    """Weights and batch statistics, over a run that starts from another run."""
    first = train(dataclasses.replace(small, epochs=1))["run"]
    config = dataclasses.replace(small, epochs=2, from_=first, freeze="backbone")
    second = train(dataclasses.replace(config, out=f"{small.out}-2"))["run"]
    before, _ = read_weights(Path(first) / "weights" / "best.safetensors")
    after, _ = read_weights(Path(second) / "weights" / "last.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_average_follows_parameters_and_buffers() -> None:
    model = nn.BatchNorm1d(2)
    shadow = average(model, 0.125)
    shadow.update_parameters(model)  # torch copies at the first call
    with torch.no_grad():
        model.weight.fill_(9.0)
        model.running_mean.fill_(8.0)  # type: ignore[union-attr]
    shadow.update_parameters(model)
    assert shadow.module.weight.tolist() == [8.0, 8.0]
    assert shadow.module.running_mean.tolist() == [7.0, 7.0]


def test_the_decay_of_the_average_grows_to_what_was_asked() -> None:
    """min(d, (1 + t) / (10 + t)): after 3 steps at d = 0.9999 the start is not nearly all of it."""
    model = nn.Linear(1, 1, bias=False)
    shadow, expected = average(model, 0.3), float(model.weight.detach())
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(float(step**2))
        shadow.update_parameters(model)
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * step**2
        assert float(shadow.module.weight.detach()) == pytest.approx(expected)


def test_clip() -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert clip_gradients(model, 0.0) is None
    norm = clip_gradients(model, 1.0)
    assert norm is not None
    assert float(norm) == pytest.approx(3 * 6**0.5)
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert total == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimiser_state_is_restored_in_the_parameters_memory_format(optimizer: str) -> None:
    """A fused optimiser reads state in memory order: another format would mix elements up."""
    config = dataclasses.replace(BASE, optimizer=optimizer)  # type: ignore[arg-type]
    models = [nn.Conv2d(3, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    optimizers = [build_optimizer(model, config) for model in models]

    def step(number: int) -> None:
        grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(7))
        models[number].weight.grad = grad.contiguous(memory_format=torch.channels_last)
        optimizers[number].step()

    step(0)
    stored = {
        k: v.contiguous().clone() for k, v in optimizer_tensors(models[0], optimizers[0]).items()
    }
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(models[1], optimizers[1], stored)
    for number in range(2):
        step(number)
    assert torch.equal(models[0].weight, models[1].weight)
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    state = optimizers[1].state[models[1].weight][key]
    assert state.is_contiguous(memory_format=torch.channels_last)


def test_the_body_trains_at_a_lower_rate_and_less_with_each_layer() -> None:
    model = create_model("shufflenet_v2_x0_5", num_classes=3)
    config = dataclasses.replace(RESOLVED, body_lr=0.1, layer_decay=0.5)
    factors = rate_factors(model, config)
    assert not any(name.startswith("fc.") for name in factors)
    assert factors["conv5.0.weight"] == 0.1 * 0.5
    assert factors["stage4.3.branch2.0.weight"] < factors["conv5.0.weight"]
    assert factors["conv1.0.weight"] == min(factors.values())
    optimizer = build_optimizer(model, config, factors)
    of = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    assert of == {id(p): factors.get(name, 1.0) for name, p in model.named_parameters()}
    assert rate_factors(model, RESOLVED) == {}


def test_frozen_batch_norms_stay_in_a_run_while_the_rest_learns(small: TrainConfig) -> None:
    config = dataclasses.replace(small, epochs=1, freeze_norm=True)
    run = Path(train(config)["run"])
    after, _ = read_weights(run / "weights" / "last.safetensors")
    start = create_model("shufflenet_v2_x0_5", num_classes=2, seed=0, **parse_knobs(SMALL))
    for name, tensor in start.state_dict().items():
        same = torch.equal(after[name], tensor)
        is_norm = "running" in name or (tensor.ndim == 1 and name != "fc.bias")
        assert same == is_norm or name.endswith("num_batches_tracked"), name
