import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.data.seeds import draw63, hash64, shuffled


def test_numbers_are_the_same_on_every_machine():
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]  # splitmix64's first number for seed 0
    assert shuffled(10, 1, 2).tolist() == [1, 3, 7, 9, 2, 8, 6, 4, 5, 0]
    assert draw63(7, -1, np.arange(3)).tolist() == [
        4037586493124842486,
        6200900428546051961,
        3099835102875553154,
    ]


@given(st.integers(0, 500), st.integers(-(2**70), 2**70))
def test_shuffled_is_a_permutation(num, seed):
    assert sorted(shuffled(num, seed).tolist()) == list(range(num))


@given(st.integers(), st.integers(0, 10**9))
def test_draws_are_valid_seeds(seed, index):
    (draw,) = draw63(seed, index).tolist()
    assert 0 <= draw < 2**63


def test_one_element_of_an_array_is_the_scalar_hash():
    assert hash64(3, np.arange(100))[42] == hash64(3, 42)[0]


def test_order_and_number_of_parts_matter():
    values = [hash64(*parts)[0] for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2)]]
    assert len(set(values)) == len(values)


def test_no_collision_and_no_bias():
    values = hash64(0, np.arange(200_000))
    assert len(np.unique(values)) == len(values)
    bits = [(values >> np.uint64(i)) & np.uint64(1) for i in range(64)]
    assert all(abs(bit.mean() - 0.5) < 0.006 for bit in bits)


def test_neighbouring_keys_give_unrelated_orders():
    first, second = shuffled(1000, 0, 0), shuffled(1000, 0, 1)
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
