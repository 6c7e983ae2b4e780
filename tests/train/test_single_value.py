"""Batch norms that would see one value per channel are refused before a run folder is made."""

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
from meshuffle.train.single_value import refuse_single_values


def test_a_batch_of_one_is_refused(small: TrainConfig) -> None:
    says = (
        r"--batch 1 under plan dp=1,threads=1: .* batch norm stage4\.0\.branch1\.1 and \d more a "
        r"single value per channel \(1 image, 1×1 map at --input-size 32\), .* a larger --batch"
    )
    with pytest.raises(ConfigError, match=says):
        train(dataclasses.replace(small, batch=1))
    assert not Path(small.out or "").exists()


class OwnNorm(nn.BatchNorm2d):
    """Its statistics are not joined over the replicas."""


@pytest.mark.parametrize(
    ("values", "plan", "num_train", "refused"),
    [
        ({"batch": 1}, "dp=1", 26, True),
        ({"batch": 1, "input_size": 64}, "dp=1", 26, False),  # the last maps are 2×2
        ({"batch": 2}, "dp=1", 26, False),
        ({"batch": 2}, "dp=1", 27, True),  # one of the batches has one image
        ({"batch": 3}, "dp=1", 27, False),
        ({"batch": 2}, "dp=2", 26, False),  # joined over the replicas
        ({"batch": 4, "accumulate": 4}, "dp=1", 26, True),
        ({"batch": 4, "accumulate": 2}, "dp=2", 28, False),
        ({"batch": 4}, "pp=2,mb=4", 28, True),
        ({"batch": 1, "freeze_norm": True}, "dp=1", 26, False),
        ({"batch": 1, "freeze": "until:conv5"}, "dp=1", 26, False),
        ({"batch": 1, "freeze": "until:conv5", "unfreeze_epoch": 2}, "dp=1", 26, True),
    ],
)
def test_what_counts(
    small: TrainConfig, values: dict[str, Any], plan: str, num_train: int, refused: bool
) -> None:
    config = dataclasses.replace(small, **values)
    model = create_model("shufflenet_v2_x0_5", num_classes=2, depths=[1, 1, 1], head_channels=16)
    frozen = freeze(model, config.freeze or "none", norms=bool(config.freeze_norm))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if refused:
        with pytest.raises(ConfigError, match="single value"):
            refuse_single_values(model, frozen, config, parse_plan(plan), num_train)
    else:
        refuse_single_values(model, frozen, config, parse_plan(plan), num_train)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_norms_that_are_not_joined_count_per_rank(small: TrainConfig) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), OwnNorm(3), Last())
    config = dataclasses.replace(small, batch=2)
    refuse_single_values(model, [], config, parse_plan("dp=1"), 26)
    with pytest.raises(ConfigError, match="batch norm 1 a single value"):
        refuse_single_values(model, [], config, parse_plan("dp=2"), 26)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)
