"""Batch norms that would see one value per channel: refused, or said where it is in some steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.errors import ConfigError
from meshuffle.models import create_model
from meshuffle.planner.plan import parse_plan
from meshuffle.train.api import train
from meshuffle.train.optimiser import freeze
from meshuffle.train.single_value import check_values


def test_a_batch_of_one_is_refused(small: TrainConfig) -> None:
    says = (
        r"--batch 1 under plan dp=1,threads=1: .* batch norm stage4\.0\.branch1\.1 and \d more "
        r"have a single value per channel \(1 image, 1×1 map at --input-size 32\), .* "
        r"larger --batch"
    )
    with pytest.raises(ConfigError, match=says):
        train(dataclasses.replace(small, batch=1))
    assert not Path(small.out or "").exists()


class OwnNorm(nn.BatchNorm2d):
    """Its statistics are not joined over the replicas."""


@pytest.mark.parametrize(
    ("values", "plan", "num_train", "steps"),
    [
        ({"batch": 1}, "dp=1", 26, "every"),
        ({"batch": 1, "input_size": 64}, "dp=1", 26, None),  # the last maps are 2×2
        ({"batch": 2}, "dp=1", 26, None),
        ({"batch": 2}, "dp=1", 27, "some"),  # one of the batches has one image
        ({"batch": 3}, "dp=1", 27, None),
        ({"batch": 2}, "dp=2", 26, None),  # joined over the replicas
        ({"batch": 4, "accumulate": 4}, "dp=1", 28, "every"),
        ({"batch": 4, "accumulate": 2}, "dp=2", 28, None),
        ({"batch": 4}, "pp=2,mb=4", 28, "every"),
        ({"batch": 8}, "pp=2,mb=4", 26, "some"),
        ({"batch": 4, "accumulate": 8, "input_size": 64}, "dp=1", 28, None),  # some are empty
        ({"batch": 1, "freeze_norm": True}, "dp=1", 26, None),
        ({"batch": 1, "freeze": "until:conv5"}, "dp=1", 26, None),
        ({"batch": 1, "freeze": "until:conv5", "unfreeze_epoch": 2}, "dp=1", 26, "every"),
    ],
)
def test_what_counts(
    small: TrainConfig, values: dict[str, Any], plan: str, num_train: int, steps: str | None
) -> None:
    config = dataclasses.replace(small, **values)
    model = create_model("shufflenet_v2_x0_5", num_classes=2, depths=[1, 1, 1], head_channels=16)
    frozen = freeze(model, config.freeze or "none", norms=bool(config.freeze_norm))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        lines = check_values(model, frozen, config, parse_plan(plan), num_train)
        assert len(lines) == bool(steps) and all(f"in {steps} step" in line for line in lines)
    except ConfigError as error:
        assert steps == "every" and "in every step" in str(error)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_norms_that_are_not_joined_count_per_rank(small: TrainConfig) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), OwnNorm(3), Last())
    config = dataclasses.replace(small, batch=2)
    assert not check_values(model, [], config, parse_plan("dp=1"), 26)
    with pytest.raises(ConfigError, match="batch norm 1 has a single value"):
        check_values(model, [], config, parse_plan("dp=2"), 26)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)
