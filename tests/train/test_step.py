"""One step computes the gradient of the mean over all samples, however they are cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.comm.exchange import GroupExchange
from meshuffle.data import AugmentConfig, Batch, Preprocess, mix_batch
from meshuffle.parallel.data_parallel import DataParallel
from meshuffle.tasks.card import Card
from meshuffle.tasks.classify import Classify
from meshuffle.train.step import Step, seed_step, sum_over_ranks

NUM_CLASSES, SIZE, LR = 3, 4, 0.5
CARD = Card("none", tuple("abc"), Preprocess(crop=SIZE, resize=SIZE))


def make_step(accumulate: int = 1, augment: AugmentConfig | None = None, clip: float = 0.0) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, NUM_CLASSES)).double()
    group = dist.group.WORLD
    assert group is not None

    def forward(x: Tensor) -> Tensor:
        return model(x.double())

    return Step(
        model=model,
        forward=forward,
        optimizer=torch.optim.SGD(model.parameters(), LR),
        parallel=DataParallel(model, group),
        task=Classify(CARD, label_smoothing=0.1),
        preprocess=Preprocess(crop=SIZE, resize=SIZE),
        augment=augment or AugmentConfig(),
        device=torch.device("cpu"),
        num_micro_batches=accumulate,
        clip_norm=clip,
    )


def make_batch(num: int, broken: tuple[int, ...] = ()) -> Batch:
    """`num` positions, of which those in `broken` have left."""
    kept = [i for i in range(num) if i not in broken]
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (num, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    ids = torch.tensor(kept)
    return Batch(images[kept], ids % NUM_CLASSES, ids, 1000 + ids, ids, [f"{i}" for i in broken])


def do(step: Step, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    micro = step.micro_batches(batch)
    sums = step.run(micro, [len(m) for m in micro], LR)
    return {k: v.clone() for k, v in step.model.state_dict().items()}, sums


def by_hand(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """One gradient of the mean loss, in plain torch."""
    step = make_step()
    x = step.preprocess.normalise(batch.images).double()
    logits = step.model(x)
    loss = F.cross_entropy(logits, batch.targets, label_smoothing=0.1)
    loss.backward()
    with torch.no_grad():
        for parameter in step.model.parameters():
            assert parameter.grad is not None
            parameter -= LR * parameter.grad
    correct = (logits.argmax(1) == batch.targets).sum()
    sums = [len(batch) * float(loss.detach()), float(correct), float(len(batch))]
    return step.model.state_dict(), torch.tensor(sums, dtype=torch.float64)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        # Images are normalised in float32, whose last bit depends on how a batch is cut.
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num", "accumulate", "broken"),
    [(8, 1, ()), (8, 3, ()), (5, 4, ()), (2, 3, ()), (8, 3, (0, 1, 2)), (7, 2, (3, 6))],
)
def test_accumulation_equals_one_gradient(
    alone: None, num: int, accumulate: int, broken: tuple[int, ...]
) -> None:
    """Uneven and empty micro-batches, and broken images, weigh each sample the same."""
    batch = make_batch(num, broken)
    found, sums = do(make_step(accumulate), batch)
    expected, expected_sums = by_hand(batch)
    same(found, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-8)


def test_micro_batches_are_cut_by_position(alone: None) -> None:
    """A broken image shortens its own micro-batch, so the others hold what they always hold."""
    micro = make_step(2).micro_batches(make_batch(6, broken=(1,)))
    assert [m.indices.tolist() for m in micro] == [[0, 2], [3, 4, 5]]
    assert [m.positions.tolist() for m in micro] == [[0, 2], [0, 1, 2]]


def test_a_batch_without_a_readable_image_changes_nothing(alone: None) -> None:
    step = make_step(2)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    after, sums = do(step, make_batch(3, broken=(0, 1, 2)))
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert sums.tolist() == [0, 0, 0]


def test_mixup_pairs_stay_together(alone: None) -> None:
    """Micro-batches are multiples of a pair, so accumulation does not change the mixing."""
    augment = AugmentConfig(mixup=0.5)
    whole, _ = do(make_step(1, augment), make_batch(6))
    cut, _ = do(make_step(2, augment), make_batch(6))
    same(cut, whole)
    plain, _ = do(make_step(1), make_batch(6))
    assert not torch.equal(plain["1.weight"], whole["1.weight"])


def test_mixed_targets_are_counted_by_the_larger_share() -> None:
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.0, 0.8]])
    logits = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert int(Classify(CARD).score_sum(logits, soft)) == 1


def test_soft_targets_have_the_expected_loss() -> None:
    batch = make_batch(4)
    _, soft = mix_batch(
        batch.images.float(), batch.targets, NUM_CLASSES, AugmentConfig(mixup=1.0), batch.draws
    )
    assert soft.sum(1).tolist() == pytest.approx([1] * 4)
    logits = torch.randn(4, NUM_CLASSES)
    expected = -(soft * logits.log_softmax(1)).sum()
    torch.testing.assert_close(Classify(CARD).loss_sum(logits, soft), expected)


def test_clipping_limits_the_update(alone: None) -> None:
    start = {k: v.clone() for k, v in make_step().model.state_dict().items()}
    after, _ = do(make_step(clip=1e-3), make_batch(8))
    moved = sum(float((after[k] - start[k]).square().sum()) for k in start) ** 0.5
    assert moved == pytest.approx(LR * 1e-3, rel=1e-3)


def test_seeds_differ_by_step_and_rank() -> None:
    draws = set()
    for seed in (0, 1):
        for step in range(3):
            for rank in range(2):
                seed_step(seed, step, rank)
                draws.add(float(torch.rand(())))
    assert len(draws) == 12


def test_sums_over_one_rank(alone: None) -> None:
    group = dist.group.WORLD
    assert group is not None
    assert sum_over_ranks([1.0, 2.5], GroupExchange(group)) == [1.0, 2.5]
