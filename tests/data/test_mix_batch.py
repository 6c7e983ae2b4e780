import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from meshuffle.data import AugmentConfig, mix_batch, shard_bounds
from meshuffle.data.augment import seeded
from meshuffle.data.mix import _MIX
from meshuffle.data.seeds import draw63

MIXUP, CUTMIX = AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)
BOTH = AugmentConfig(mixup=0.4, cutmix=1.0)
CONFIGS = [MIXUP, CUTMIX, BOTH]
NUM_CLASSES = 5


def batch(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num, 3, 9, 7, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (num,), generator=generator)
    return images, labels, torch.randint(0, 2**62, (num,), generator=generator)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (MIXUP, v2.MixUp(alpha=0.4, num_classes=NUM_CLASSES)),
        (CUTMIX, v2.CutMix(alpha=1.0, num_classes=NUM_CLASSES)),
    ],
)
def test_each_pair_is_mixed_as_torchvision_mixes_it(config, theirs):
    images, labels, draws = batch(8)
    mixed, soft = mix_batch(images, labels, NUM_CLASSES, config, draws)
    for i in range(0, 8, 2):
        with seeded(int(draw63(_MIX, int(draws[i]))[0])):
            pair, pair_soft = theirs(images[i : i + 2], labels[i : i + 2])
        torch.testing.assert_close(mixed[i : i + 2], pair)
        torch.testing.assert_close(soft[i : i + 2], pair_soft)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 21), st.integers(1, 5), st.sampled_from(CONFIGS), st.booleans())
def test_ranks_compute_what_one_process_computes(num, world, config, channels_last):
    images, labels, draws = batch(num)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    whole, whole_soft = mix_batch(images, labels, NUM_CLASSES, config, draws)
    parts = [
        mix_batch(images[a:b], labels[a:b], NUM_CLASSES, config, draws[a:b])
        for a, b in shard_bounds(num, world, unit=2)
    ]
    assert torch.equal(torch.cat([mixed for mixed, _ in parts]), whole)
    assert torch.equal(torch.cat([soft for _, soft in parts]), whole_soft)


def test_pairs_that_straddle_ranks_would_differ():
    """The planted fault: without `unit=2` the property above does not hold."""
    images, labels, draws = batch(6)
    whole, _ = mix_batch(images, labels, NUM_CLASSES, MIXUP, draws)
    parts = [
        mix_batch(images[a:b], labels[a:b], NUM_CLASSES, MIXUP, draws[a:b])[0]
        for a, b in shard_bounds(6, 2)
    ]
    assert not torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_broken_image_leaves_the_other_pairs_alone(config):
    images, labels, draws = batch(6)
    whole, whole_soft = mix_batch(images, labels, NUM_CLASSES, config, draws)
    kept = torch.tensor([0, 2, 3, 4, 5])
    mixed, soft = mix_batch(
        images[kept], labels[kept], NUM_CLASSES, config, draws[kept], positions=kept
    )
    assert torch.equal(mixed[1:], whole[2:])
    assert torch.equal(soft[1:], whole_soft[2:])
    assert torch.equal(mixed[0], images[0])  # its partner is missing
    assert soft[0].sum() == 1 == soft[0].max()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_labels_sum_to_one_and_the_input_is_kept(config, memory_format):
    images, labels, draws = batch(7)
    images = images.to(memory_format=memory_format)
    before = images.clone()
    mixed, soft = mix_batch(images, labels, NUM_CLASSES, config, draws)
    torch.testing.assert_close(soft.sum(1), torch.ones(7))
    assert torch.equal(images, before)
    assert mixed.is_contiguous(memory_format=memory_format)
    assert not torch.equal(mixed[:6], images[:6])
    assert torch.equal(mixed[6], images[6])  # the odd one out


def test_cutmix_labels_are_the_parts_of_the_area():
    images = torch.zeros(2, 1, 10, 10)
    images[1] = 1
    labels = torch.tensor([0, 1])
    for draw in range(20):
        mixed, soft = mix_batch(images, labels, 2, CUTMIX, torch.tensor([draw, 0]))
        torch.testing.assert_close(soft[:, 1], mixed.mean((1, 2, 3)))


def test_both_takes_each_of_them_sometimes():
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    kinds = set()
    for draw in range(40):
        mixed, _ = mix_batch(images, torch.tensor([0, 1]), 2, BOTH, torch.tensor([draw, 0]))
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_nothing_to_mix():
    images, labels, draws = batch(4)
    same, soft = mix_batch(images, labels, NUM_CLASSES, AugmentConfig(), draws)
    assert same is images
    assert torch.equal(soft.argmax(1), labels)
    empty, empty_soft = mix_batch(images[:0], labels[:0], NUM_CLASSES, MIXUP, draws[:0])
    assert empty.shape == (0, 3, 9, 7) and empty_soft.shape == (0, NUM_CLASSES)
