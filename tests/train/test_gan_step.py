"""Noise is the same on any ranks, and a step is two updates, whoever has the samples."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from meshuffle.config import TrainConfig
from meshuffle.parallel.data_parallel import DataParallel, Mode
from meshuffle.parallel.random_masks import draw_key
from meshuffle.train.gan_step import BETAS
from meshuffle.train.optimiser import build_optimizer
from tests.ranks import run_ranks
from tests.tasks.gans import PREPROCESS, gan, make_batch, make_step, photos, train

SMALL_GAN = gan().eval()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, (1 << 63) - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_ranks_draw_their_parts_of_the_same_noise(key: int, sizes: list[int]) -> None:
    model, starts = SMALL_GAN, np.cumsum([0, *sizes]).tolist()
    parts = [model.noise(key, num, 1, first) for num, first in zip(sizes, starts, strict=False)]
    assert torch.equal(torch.cat(parts), model.noise(key, sum(sizes), 1))


def test_noise_is_normal_and_its_draws_differ() -> None:
    draws = [SMALL_GAN.noise(key, 4000, draw) for key in (1, 2) for draw in (0, 1)]
    for z in draws:
        assert z.dtype == torch.float32
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    numbers = torch.stack([z.flatten() for z in draws])
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.03


def test_the_noise_of_an_image_is_its_own() -> None:
    """It knows neither the batch nor how images are normalised, and a byte changes all of it."""
    images = photos(5)
    z = SMALL_GAN.noise_for(PREPROCESS.normalise(images))
    assert torch.equal(SMALL_GAN.noise_for(PREPROCESS.normalise(images[3:4]))[0], z[3])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(SMALL_GAN.noise_for(PREPROCESS.normalise(channels_last)), z)
    images[3, 0, 0, 0] ^= 1
    other = SMALL_GAN.noise_for(PREPROCESS.normalise(images))
    assert not (other[3] == z[3]).any() and torch.equal(other[:3], z[:3])


def test_made_images_are_normalised_as_real_ones() -> None:
    made = SMALL_GAN.make(SMALL_GAN.noise(0, 3))
    pixels = SMALL_GAN.to_bytes(made)
    assert pixels.min() >= 0 and pixels.max() <= 255
    torch.testing.assert_close(
        PREPROCESS.normalise(pixels.to(torch.uint8)), made, rtol=0, atol=0.6 / 255 / 0.2
    )


def by_hand(num_steps: int = 2, lr: float = 0.05) -> dict[str, Tensor]:
    """The same in plain torch: two networks, two optimisers."""
    model = gan().double().train()
    config = TrainConfig(optimizer="sgd", lr=lr, weight_decay=0.01)
    optimizers = [build_optimizer(m, config) for m in (model.discriminator, model.generator)]
    x = PREPROCESS.normalise(photos(7)).double()
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(num_steps):
        key = draw_key(3, i)
        made = model.make(model.noise(key, 7, 0)).detach()
        real_logits, made_logits = model.discriminator(x), model.discriminator(made)
        loss = F.relu(1 - real_logits).mean() + F.relu(1 + made_logits).mean()
        model.zero_grad()
        loss.backward()
        optimizers[0].step()
        right = float((real_logits > made_logits).sum())
        sums += torch.tensor([7 * float(loss.detach()), right, 7.0]).double()
        loss = -model.discriminator(model.make(model.noise(key, 7, 1))).mean()
        model.zero_grad()
        loss.backward()
        optimizers[1].step()
    return {**model.state_dict(), "sums": sums}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = {"rtol": 100 * tolerance, "atol": tolerance}
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_two_updates(alone: None) -> None:
    assert dist.group.WORLD is not None
    found, expected = train(make_step(dist.group.WORLD), [(0, 7)]), by_hand()
    for name in ("sums",):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    same(found, expected, 1e-6)
    start = gan().double().state_dict()
    moved = {name.partition(".")[0] for name in start if not torch.equal(found[name], start[name])}
    assert moved == {"generator", "discriminator"}


def test_no_gradient_is_left_behind(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    train(step, [(0, 7)])
    assert all(p.grad is None and p.requires_grad for p in step.model.parameters())


def test_each_phase_leaves_the_other_network_alone(alone: None) -> None:
    """Nor does the optimiser's momentum or weight decay touch it."""
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD, optimizer="adam")
    train(step, [(0, 7)])
    before = copy.deepcopy(dict(step.model.named_parameters()))
    step._phase("generator", lambda i: step._generate(7, 1, 0).sum(), [0], 0.1)
    changed = {
        n.partition(".")[0] for n, p in step.model.named_parameters() if p.ne(before[n]).any()
    }
    assert changed == {"generator"}
    assert {group["betas"] for group in step.optimizer.param_groups} == {BETAS}
    steps = {int(state["step"]) for state in step.optimizer.state.values()}
    assert steps == {2, 3}


def test_a_batch_without_samples_changes_nothing(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    assert step.run([make_batch(0, 0)], [0], 0.1).tolist() == [0, 0, 0]
    assert all(torch.equal(step.model.state_dict()[k], v) for k, v in before.items())


def test_micro_batches_accumulate_one_gradient(alone: None) -> None:
    """Of networks in eval mode, whose batch norm does not know the micro-batch."""
    assert dist.group.WORLD is not None
    results = []
    for bounds in ([(0, 7)], [(0, 3), (3, 3), (3, 7)]):
        step = make_step(dist.group.WORLD, num_micro_batches=len(bounds))
        step.model.generator.eval()
        step.model.discriminator.eval()
        micro = [make_batch(*bound) for bound in bounds]
        counts = [stop - start for start, stop in bounds]
        draws = [(draw_key(3, 0), start) for start, _ in bounds]  # one key, as of one batch
        sums = step.run(micro, counts, 0.05, draws)
        results.append({**step.model.state_dict(), "sums": sums})
    same(results[1], results[0])


def test_it_needs_no_draws_to_be_timed(alone: None) -> None:
    assert dist.group.WORLD is not None
    sums = make_step(dist.group.WORLD).run([make_batch(0, 7)], [7], 0.0)
    assert sums[2] == 7 and bool(sums.isfinite().all())


def test_other_buckets_are_made_for_another_reducer(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    train(step, [(0, 7)])
    step.parallel.close()
    step.parallel = DataParallel(step.model, dist.group.WORLD)
    first = step._reducers["generator"]
    train(step, [(0, 7)])
    assert step._reducers["generator"] is not first


Part = tuple[int, int]


def on_ranks(
    group: dist.ProcessGroup, cases: list[tuple[Mode, list[Part]]]
) -> list[dict[str, Tensor]]:
    """Two steps of each case on this rank's part."""
    rank = dist.get_rank(group)
    return [train(make_step(group, mode), [parts[rank]]) for mode, parts in cases]


def test_any_number_of_ranks_does_the_same(alone: None) -> None:
    """Also with uneven parts, and where a rank has no sample at all."""
    assert dist.group.WORLD is not None
    expected = train(make_step(dist.group.WORLD), [(0, 7)])
    cases: list[tuple[Mode, list[Part]]] = [
        ("replicate", [(0, 4), (4, 7)]),
        ("replicate", [(0, 7), (7, 7)]),
        ("central", [(0, 4), (4, 7)]),
        ("shard", [(0, 2), (2, 7)]),
    ]
    ranks = run_ranks(on_ranks, 2, cases)
    for first, second in zip(*ranks, strict=True):
        sums = first.pop("sums") + second.pop("sums")
        same(first, second, 1e-12)
        same({**first, "sums": sums}, expected)
