"""Metrics against scikit-learn; ranks together equal one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.data import ArraySource, Batch, Preprocess, eval_loader
from meshuffle.infer.evaluation import Evaluation, evaluate_batches
from meshuffle.report.confusion import confusion
from meshuffle.tasks.card import Card
from meshuffle.tasks.classify import Classify
from tests.ranks import run_ranks

CLASSES = tuple("abcdefgh")
NUM, SIZE = 61, 6
PREPROCESS = Preprocess(crop=SIZE, resize=SIZE)
TASK = Classify(Card("none", CLASSES, PREPROCESS))


def source() -> ArraySource:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (NUM, SIZE, SIZE, 3), dtype=np.uint8)
    return ArraySource("noise", CLASSES, pixels, rng.integers(0, len(CLASSES), NUM))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, len(CLASSES))
    )


def run(rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> Evaluation:
    batches = eval_loader(source(), PREPROCESS, batch_size=8, rank=rank, world=world)
    device = torch.device("cpu")
    return evaluate_batches(model(), batches, TASK, PREPROCESS, device, group=group)


def test_metrics_are_those_of_scikit_learn() -> None:
    # Here, so that the ranks below need not import it.
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

    found, data = run(), source()
    network = model().eval()
    images = torch.from_numpy(data.pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        probabilities = network(PREPROCESS.normalise(images)).double().softmax(1).numpy()
    labels, guessed = data.labels, probabilities.argmax(1)
    every = range(len(CLASSES))
    assert found.num_samples == NUM
    assert found.metrics["top1"] == pytest.approx(100 * accuracy_score(labels, guessed))
    top5 = top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    assert found.metrics["top5"] == pytest.approx(100 * top5)
    assert found.metrics["loss"] == pytest.approx(log_loss(labels, probabilities, labels=every))
    assert (confusion(found.rows, 8) == confusion_matrix(labels, guessed, labels=every)).all()
    assert found.rows["top_probabilities"][:, 0] == pytest.approx(probabilities.max(1), rel=1e-5)


def one_of(group: dist.ProcessGroup) -> Evaluation:
    return run(dist.get_rank(group), dist.get_world_size(group), group)


def test_ranks_together_equal_one() -> None:
    expected = run()
    for found in run_ranks(one_of, 2):
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
        assert (found.indices == np.arange(NUM)).all()
        assert found.rows.keys() == expected.rows.keys()
        assert (found.rows["labels"] == expected.rows["labels"]).all()
        assert (found.rows["top_classes"] == expected.rows["top_classes"]).all()


def test_five_classes_have_no_top5() -> None:
    five = Classify(Card("none", CLASSES[:5], PREPROCESS))
    rows = {"labels": np.zeros(1, np.int64), "top_classes": np.zeros((1, 5), np.int64)}
    assert five.conclude(rows) == {"top1": 100.0}


def batch_of(num: int, skipped: list[str]) -> Batch:
    images = torch.zeros(num, 3, SIZE, SIZE, dtype=torch.uint8)
    ids = torch.arange(num)
    return Batch(images, ids % 2, ids, ids, ids, skipped)


def test_empty_and_unreadable() -> None:
    device = torch.device("cpu")
    batches = [batch_of(0, ["a: broken", "b: broken"]), batch_of(0, ["a: broken"])]
    found = evaluate_batches(model(), batches, TASK, PREPROCESS, device)
    assert (found.num_samples, found.metrics) == (0, {})
    assert found.skipped == ("a: broken", "b: broken")
    assert np.isnan(found.objective)
    assert evaluate_batches(model(), [], TASK, PREPROCESS, device).metrics == {}


def test_the_mode_of_the_model_comes_back() -> None:
    network, seen = model().train(), []
    batches = [batch_of(3, [])]
    evaluate_batches(network, batches, TASK, PREPROCESS, torch.device("cpu"), progress=seen.append)
    assert network.training
    assert seen == [3]
    assert network[1].running_mean.abs().sum() == 0  # type: ignore[index,union-attr]


class Silent(Classify):
    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        raise AssertionError("this rank's rows are another's")


def test_a_rank_that_is_not_asked_does_not_judge() -> None:
    batches = eval_loader(source(), PREPROCESS, batch_size=8)
    device, task = torch.device("cpu"), Silent(TASK.card)
    found = evaluate_batches(model(), batches, task, PREPROCESS, device, is_output_rank=False)
    assert found.num_samples == 0 and found.metrics == {}


def test_answers_need_no_targets() -> None:
    batches = eval_loader(source(), PREPROCESS, batch_size=8)
    device, task = torch.device("cpu"), Silent(TASK.card)
    found, expected = (
        evaluate_batches(model(), batches, task, PREPROCESS, device, labelled=False),
        run(),
    )
    assert found.metrics == {} and found.rows.keys() == {"top_classes", "top_probabilities"}
    for name, rows in found.rows.items():
        assert np.array_equal(rows, expected.rows[name])
