import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.data.sampler import EpochSampler, shard_bounds
from meshuffle.errors import ConfigError

sizes = st.integers(0, 200)
worlds = st.integers(1, 9)
units = st.integers(1, 4)


def global_batches(epoch=0, start_step=0, *, world=1, **options):
    """The ranks' parts of each batch, put together again in the order of the ranks."""
    samplers = [EpochSampler(rank=rank, world=world, **options) for rank in range(world)]
    parts = zip(*(s.batches(epoch, start_step) for s in samplers), strict=True)
    return [list(itertools.chain(*of_step)) for of_step in parts]


@given(sizes, worlds, units)
def test_bounds_cover_everything_once_and_in_order(num, world, unit):
    bounds = shard_bounds(num, world, unit)
    assert len(bounds) == world
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(num))


@given(sizes, worlds, units)
def test_bounds_are_balanced_and_never_split_a_unit(num, world, unit):
    bounds = shard_bounds(num, world, unit)
    lengths = [-(-(stop - start) // unit) for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1
    assert all(start % unit == 0 or start == num for start, _ in bounds)


@given(sizes, st.integers(1, 64), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(num, batch, seed, epoch):
    batches = global_batches(epoch, num_samples=num, batch_size=batch, seed=seed)
    assert sorted(key.index for keys in batches for key in keys) == list(range(num))


@given(sizes, st.integers(1, 64), worlds, units, st.integers(0, 5))
def test_ranks_together_see_what_one_process_sees(num, batch, world, unit, epoch):
    options = {"num_samples": num, "batch_size": batch, "seed": 3, "unit": unit}
    assert global_batches(epoch, world=world, **options) == global_batches(epoch, **options)


@given(sizes, st.integers(1, 64), worlds, st.integers(0, 10))
def test_resuming_gives_the_tail(num, batch, world, start):
    sampler = EpochSampler(num, batch, rank=world - 1, world=world, seed=1)
    assert list(sampler.batches(2, start)) == list(sampler.batches(2))[start:]


@given(sizes, st.integers(1, 20), st.integers(1, 4), worlds)
def test_the_number_of_steps_is_known_in_advance(num, distinct, repeats, world):
    options = {"num_samples": num, "batch_size": distinct * repeats, "repeats": repeats}
    sampler = EpochSampler(**options)
    batches = global_batches(world=world, **options)
    assert len(batches) == sampler.steps_per_epoch
    assert all(len(keys) <= sampler.batch_size for keys in batches)


@given(sizes, st.integers(1, 64), worlds, units)
def test_no_batch_is_a_short_tail(num, batch, world, unit):
    lengths = list(
        map(len, global_batches(num_samples=num, batch_size=batch, world=world, unit=unit))
    )
    step = unit if batch % unit == 0 else 1
    assert max(lengths, default=0) <= batch
    assert max(lengths, default=0) - min(lengths, default=0) <= 2 * step - 1
    assert all(length % step == 0 for length in lengths[:-1])


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 4), st.integers(0, 3))
def test_copies_of_an_image_share_a_batch_and_nothing_else(num, distinct, repeats, epoch):
    batches = global_batches(epoch, num_samples=num, batch_size=distinct * repeats, repeats=repeats)
    seen = set()
    for keys in batches:
        indices = [key.index for key in keys]
        assert all(indices.count(index) == repeats for index in indices)
        assert not seen & set(indices)
        seen |= set(indices)
    assert len(seen) == max(1, num // repeats)
    draws = [key.draw for keys in batches for key in keys]
    assert len(set(draws)) == len(draws)


def test_neighbours_are_different_images_under_repeats():
    (batch, *_) = global_batches(num_samples=64, batch_size=16, repeats=2)
    pairs = [(batch[i].index, batch[i + 1].index) for i in range(0, 16, 2)]
    assert all(a != b for a, b in pairs)


def test_draws_belong_to_seed_epoch_and_sample():
    def draws(seed, epoch):
        sampler = EpochSampler(20, 7, seed=seed)
        return {key.index: key.draw for keys in sampler.batches(epoch) for key in keys}

    assert draws(0, 0) == draws(0, 0)
    assert not set(draws(0, 0).values()) & set(draws(0, 1).values())
    assert not set(draws(0, 0).values()) & set(draws(1, 0).values())


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        (keys,) = EpochSampler(50, 50, seed=seed).batches(epoch)
        return [key.index for key in keys]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_without_shuffling_the_order_is_the_sources():
    batches = global_batches(num_samples=5, batch_size=2, shuffle=False)
    assert [[key.index for key in keys] for keys in batches] == [[0, 1], [2, 3], [4]]


def test_a_small_batch_leaves_ranks_empty_but_in_step():
    samplers = [EpochSampler(5, 4, rank=rank, world=4) for rank in range(4)]
    lengths = [[len(keys) for keys in sampler.batches(0)] for sampler in samplers]
    assert lengths == [[1, 1], [1, 1], [1, 0], [0, 0]]


def test_million_samples_start_fast():
    first = next(EpochSampler(1_281_167, 256, world=8, rank=7).batches(0))
    assert len(first) == 32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 10, "repeats": 3}, "batch size (=10) must be divisible by repeats (=3)"),
        ({"rank": 2, "world": 2}, "rank (=2) must be in 0 … 1"),
        ({"num_samples": -1}, "num_samples=-1"),
    ],
)
def test_values_out_of_range(options, text):
    with pytest.raises(ConfigError) as caught:
        EpochSampler(**{"num_samples": 10, "batch_size": 4} | options)
    assert text in str(caught.value)
