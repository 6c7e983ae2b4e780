"""Classification, multi-label and regression: losses and metrics against torch and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score
from torch.nn import functional as F

from meshuffle.data import Preprocess
from meshuffle.errors import ConfigError, ModelError
from meshuffle.tasks import TASKS, find_task, make_task
from meshuffle.tasks.base import Task
from meshuffle.tasks.card import Card

NAMES = ("ant", "bee", "cat")


def task_of(name: str, smoothing: float = 0.0, **kept: Any) -> Task:
    card = Card("shufflenet_v2_x0_5", NAMES, Preprocess(32, 32), task=name, settings=kept)
    return make_task(card, label_smoothing=smoothing)


SCALE = {"mean": [10.0, 0.0, -3.0], "std": [2.0, 1.0, 0.5]}


def sample(name: str, num: int, seed: int = 0) -> tuple[Task, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(num, 3, generator=generator)
    if name == "classify":
        return task_of(name), outputs, torch.randint(0, 3, (num,), generator=generator)
    if name == "multilabel":
        targets = torch.randint(0, 2, (num, 3), generator=generator).float()
        return task_of(name), outputs, targets
    targets = torch.randn(num, 3, generator=generator) * 3 + 5
    return task_of(name, **SCALE), outputs, targets


def test_maps_are_no_classes():
    """As a segmenter's plain weights give them to `predict`."""
    with pytest.raises(ModelError, match="gives 2×4×5 numbers for an image, not one per class"):
        task_of("classify").answer(torch.zeros(1, 2, 4, 5))


PLAIN = ("classify", "multilabel", "regress")


@pytest.mark.parametrize("name", PLAIN)
@given(num=st.integers(2, 12), cut=st.integers(1, 11))
@settings(max_examples=20)
def test_a_batch_is_the_sum_of_its_parts(name: str, num: int, cut: int) -> None:
    task, outputs, targets = sample(name, num)
    cut = min(cut, num - 1)
    parts = [(outputs[:cut], targets[:cut]), (outputs[cut:], targets[cut:])]
    for kind in (task.loss_sum, task.score_sum):
        whole = float(kind(outputs.double(), targets))
        assert whole == pytest.approx(sum(float(kind(o.double(), t)) for o, t in parts))
    assert float(task.judge(outputs, targets)["losses"].sum()) == pytest.approx(
        float(task.loss_sum(outputs, targets)), rel=1e-5
    )


def test_multilabel_is_binary_cross_entropy_and_scikit_learns_precision() -> None:
    task, outputs, targets = sample("multilabel", 40)
    mean = F.binary_cross_entropy_with_logits(outputs, targets)
    assert float(task.loss_sum(outputs, targets)) / 40 == pytest.approx(float(mean))
    rows = {key: value.numpy() for key, value in task.judge(outputs, targets).items()}
    found = task.conclude(rows)
    truth, said = targets.numpy(), outputs.sigmoid().numpy()
    assert found["map"] == pytest.approx(100 * average_precision_score(truth, said))
    assert found["f1"] == pytest.approx(100 * f1_score(truth, said > 0.5, average="micro"))
    said_of = task.prediction(rows, 3, (1, 1))
    assert [e["label"] for e in said_of["labels"]] == [
        NAMES[i] for i in np.argsort(-said[3]) if said[3, i] > 0.5
    ]
    assert task.sentence(said_of)


def test_a_class_that_never_occurs_has_no_precision() -> None:
    task = task_of("multilabel")
    rows = {
        "targets": np.array([[1, 0, 0], [0, 1, 0]], np.uint8),
        "probabilities": np.array([[0.9, 0.1, 0.2], [0.1, 0.8, 0.1]], np.float32),
    }
    assert task.conclude(rows) == {"map": 100.0, "f1": 100.0}


def test_regression_is_in_the_targets_units() -> None:
    task, outputs, targets = sample("regress", 50)
    rows = {key: value.numpy() for key, value in task.judge(outputs, targets).items()}
    expected = outputs * torch.tensor(SCALE["std"]) + torch.tensor(SCALE["mean"])
    np.testing.assert_allclose(rows["values"], expected.numpy(), rtol=1e-6)
    found = task.conclude(rows)
    assert found["r2"] == pytest.approx(r2_score(rows["targets"], rows["values"]), rel=1e-5)
    errors = mean_absolute_error(rows["targets"], rows["values"], multioutput="raw_values")
    assert found["mae"] == pytest.approx(errors.mean(), rel=1e-5)
    assert found["mae_bee"] == pytest.approx(errors[1], rel=1e-5)
    standard = (targets - torch.tensor(SCALE["mean"])) / torch.tensor(SCALE["std"])
    mean = F.mse_loss(outputs, standard)
    assert float(task.loss_sum(outputs, targets)) / 50 == pytest.approx(float(mean), rel=1e-5)
    said = task.prediction(rows, 0, (1, 1))["values"]
    assert list(said) == list(NAMES)


def test_class_weights_are_torchs() -> None:
    weights = {"ant": 0.5, "bee": 2.0, "cat": 1.0}
    task, (_, outputs, targets) = (
        task_of("classify", 0.1, class_weights=weights),
        sample("classify", 9),
    )
    expected = F.cross_entropy(
        outputs,
        targets,
        weight=torch.tensor([0.5, 2.0, 1.0]),
        label_smoothing=0.1,
        reduction="sum",
    )
    assert float(task.loss_sum(outputs, targets)) == pytest.approx(float(expected))
    rows = task.judge(outputs, targets)
    assert float(rows["objectives"].sum()) == pytest.approx(float(expected), rel=1e-5)


def test_the_better_score_is_the_higher_one_whatever_the_metric() -> None:
    task = task_of("regress", **SCALE)
    assert task.score({"r2": 0.5}) > task.score({"r2": -1.0}) > task.score({})
    assert task.is_chance(1.0, 1.0, 10) and not task.is_chance(0.9, 1.0, 10)


def test_names() -> None:
    assert [find_task(name).name for name in PLAIN] == list(PLAIN)
    assert set(PLAIN) < set(TASKS)
    with pytest.raises(ConfigError, match="no such task; did you mean 'classify'"):
        find_task("clasify")
