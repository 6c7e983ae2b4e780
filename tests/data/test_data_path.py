"""The whole path, from a data set's text to what the network sees, on several ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshuffle.data import (
    AugmentConfig,
    EpochSampler,
    Preprocess,
    augmentation_for,
    build_train_transform,
    eval_loader,
    mix_batch,
    open_data,
    shard_bounds,
    subset,
    train_loader,
)
from meshuffle.data.base import ArraySource, View, split_off_val, stratified_split

SMALL = Preprocess(crop=(8, 8), resize=9)
MIXED = AugmentConfig(random_resized_crop=0.4, flip=0.5, mixup=0.3, cutmix=1.0)


def network_input(source, config, world, *, unit=2, batch_size=6, epoch=1, start_step=0):
    """(images, soft labels) of the global batches, put together from the ranks' parts."""
    transform = build_train_transform(config, SMALL)
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(
            len(source), batch_size, rank, world, seed=5, repeats=config.repeats, unit=unit
        )
        batches = train_loader(source, transform, sampler, epoch, start_step=start_step)
        ranks.append([mixed(batch, config, len(source.classes)) for batch in batches])
    steps = zip(*ranks, strict=True)
    return [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)) for parts in steps]


def mixed(batch, config, num_classes):
    images = SMALL.normalise(batch.images)
    return mix_batch(images, batch.targets, num_classes, config, batch.draws, batch.positions)


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.fixture
def photos(make_folder):
    """17 images of which three are broken, one of them the first of a pair."""
    root = make_folder({"a": 9, "b": 8})
    for name in ("a/002.png", "a/007.png", "b/004.png"):
        (root / name).write_bytes(b"")
    return open_data(str(root), need=("test",)).splits["test"]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_number_of_ranks_changes_no_bit(photos, world):
    one = network_input(photos, MIXED, 1)
    assert sum(len(images) for images, _ in one) == 14
    assert equal(network_input(photos, MIXED, world), one)


def test_nor_with_repeated_augmentation(photos):
    config = dataclasses.replace(MIXED, repeats=2)
    assert equal(network_input(photos, config, 3), network_input(photos, config, 1))


def test_ranks_that_split_pairs_would_be_noticed(photos):
    """The planted fault: `unit=1` lets a pair straddle two ranks."""
    assert not equal(network_input(photos, MIXED, 2, unit=1), network_input(photos, MIXED, 1))


def test_a_forgotten_position_would_be_noticed(photos, monkeypatch):
    """The planted fault: pairs counted in what is left after broken images went."""
    right = network_input(photos, MIXED, 1)
    forgetful = lambda batch, config, num: mix_batch(  # noqa: E731
        SMALL.normalise(batch.images), batch.targets, num, config, batch.draws
    )
    monkeypatch.setitem(globals(), "mixed", forgetful)
    assert not equal(network_input(photos, MIXED, 1), right)


def test_resume_in_mid_epoch(photos):
    assert equal(network_input(photos, MIXED, 2, start_step=1), network_input(photos, MIXED, 2)[1:])


def test_epochs_differ(photos):
    assert not equal(
        network_input(photos, MIXED, 1, epoch=0), network_input(photos, MIXED, 1, epoch=1)
    )


def test_digits_from_text_to_numbers():
    data = open_data("digits")
    preprocess = Preprocess.for_data(data)
    train = data.splits["train"]
    transform = build_train_transform(augmentation_for(data), preprocess)
    batch = next(train_loader(train, transform, EpochSampler(len(train), 64), 0))
    values = preprocess.normalise(batch.images)
    assert values.shape == (62, 3, 48, 48)  # 1295 images in 21 even batches
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert abs(values.mean()) < 0.5 and 0.5 < values.std() < 1.5


def test_training_and_evaluation_agree_without_augmentation():
    """What is trained is what is evaluated: the same geometry, the same numbers."""
    data = open_data("digits")
    preprocess = Preprocess.for_data(data)
    val = data.splits["val"]
    plain = build_train_transform(AugmentConfig(), preprocess)
    sampler = EpochSampler(len(val), 50, shuffle=False)
    for a, b in zip(
        train_loader(val, plain, sampler, 0),
        eval_loader(val, preprocess, batch_size=50),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


# --- splits and views ------------------------------------------------------------------------


def numbered(num: int, num_classes: int) -> ArraySource:
    """A source whose image i is a single grey pixel of value i."""
    classes = tuple(map(str, range(num_classes)))
    pixels = np.arange(num, dtype=np.uint8).reshape(num, 1, 1)
    return ArraySource("n", classes, pixels, np.arange(num) % num_classes)


@given(
    st.lists(st.integers(0, 4), max_size=80),
    st.floats(0.01, 0.5),
    st.integers(0, 2**40),
)
def test_splits_are_a_partition_with_the_right_shares(labels, fraction, seed):
    array = np.array(labels, dtype=np.int64)
    rest, part = stratified_split(array, fraction, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist()) and part.tolist() == sorted(part.tolist())
    for label in set(labels):
        of_class, taken = labels.count(label), int((array[part] == label).sum())
        assert of_class - taken >= 1
        assert taken >= min(1, of_class - 1)
        assert abs(taken - of_class * fraction) <= 1


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_splits_follow_their_seed(first, second):
    labels = np.arange(200) % 2
    same = np.array_equal(
        stratified_split(labels, 0.5, first)[1], stratified_split(labels, 0.5, second)[1]
    )
    assert same == (first == second)


def test_views_of_views_keep_names_and_pixels():
    source = numbered(20, 2)
    view = subset(subset(source, np.arange(10, 20)), np.array([5, 0]))
    assert [view.name(i) for i in range(2)] == ["n[15]", "n[10]"]
    assert [view.image(i).getpixel((0, 0))[0] for i in range(2)] == [15, 10]
    assert [view.content(i) for i in range(2)] == [b"\x0f", b"\x0a"]
    assert view.labels.tolist() == [1, 0]
    assert view.in_memory and view.classes == ("0", "1")


def test_split_off_val():
    splits = split_off_val(numbered(40, 4), 0.25, seed=1)
    assert {name: np.bincount(view.labels).tolist() for name, view in splits.items()} == {
        "train": [8] * 4,
        "val": [2] * 4,
    }
    assert all(isinstance(view, View) for view in splits.values())


def test_shards_of_a_view_are_its_images():
    view = subset(numbered(30, 3), np.arange(0, 30, 2))
    parts = [view.indices[a:b] for a, b in shard_bounds(len(view), 4)]
    assert np.concatenate(parts).tolist() == list(range(0, 30, 2))
