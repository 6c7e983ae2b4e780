import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.errors import ModelError
from meshuffle.models import knobs


def test_the_kernel_grows_with_the_map():
    sizes = [knobs.auto_kernel_size(side) for side in range(1, 60)]
    assert sizes == sorted(sizes)
    assert [knobs.auto_kernel_size(side) for side in (14, 15, 28, 29)] == [3, 5, 5, 7]


def test_the_branches_grow_with_the_map():
    counts = [knobs.auto_num_branches(side) for side in range(1, 60)]
    assert counts == sorted(counts)
    assert [knobs.auto_num_branches(side) for side in (7, 8, 14, 15)] == [1, 2, 2, 3]


@given(st.integers(8, 500), st.integers(1, 4))
def test_branch_widths_share_all_channels_and_never_grow(channels, num_branches):
    widths = knobs.branch_widths(channels, num_branches)
    assert len(widths) == num_branches
    assert sum(widths) == channels
    assert min(widths) >= 1
    assert list(widths) == sorted(widths, reverse=True)


def test_too_many_branches_are_refused_with_the_values():
    with pytest.raises(ModelError, match=r"`branches` \(=4\) .* 5 channels"):
        knobs.branch_widths(5, 4)


@pytest.mark.parametrize(
    ("value", "expected"), [(5, (5, 5, 5)), ([3, 5, 7], (3, 5, 7)), ("auto", (7, 5, 3))]
)
def test_per_unit_takes_a_number_a_sequence_or_auto(value, expected):
    assert knobs.per_unit("kernel_size", value, (56, 28, 14), knobs.auto_kernel_size) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [([3, 5], "`kernel_size` has 2 entries; the model has 3"), ("big", "`kernel_size` is 'big'")],
)
def test_per_unit_refuses_the_rest(value, message):
    with pytest.raises(ModelError, match=message):
        knobs.per_unit("kernel_size", value, (56, 28, 14), knobs.auto_kernel_size)


def test_map_sides_follow_the_strides_and_round_up():
    assert knobs.unit_map_sides(224, 4, (4, 8, 4), (2, 2, 2)) == (
        *(56, 28, 28, 28),
        *(28, 14, 14, 14, 14, 14, 14, 14),
        *(14, 7, 7, 7),
    )
    assert knobs.unit_map_sides(33, 4, (1, 1), (1, 2)) == (9, 9)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_round_up_is_the_lowest_multiple_that_holds_the_value(value, multiple):
    rounded = knobs.round_up(value, multiple)
    assert rounded % multiple == 0
    assert rounded - multiple < value <= rounded


def test_no_channels_round_up_to_one_multiple():
    assert knobs.round_up(0, 4) == 4


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ModelError, match="`width`"):
        knobs.scaled_channels((24,), width, 1)


def test_the_checks_name_what_and_how_much():
    with pytest.raises(ModelError, match=r"`in_channels` \(=24\) .* `groups` \(=5\)"):
        knobs.require_divisible("in_channels", 24, "groups", 5)
    with pytest.raises(ModelError, match=r"`groups` \(=0\)"):
        knobs.require_divisible("in_channels", 24, "groups", 0)
    with pytest.raises(ModelError, match=r"`kernel_size` \(=4\) must be odd"):
        knobs.require_kernels((3, 4))
    with pytest.raises(ModelError, match=r"`depths` has 2 entries \(4, 8\); it needs 3"):
        knobs.require_depths((4, 8), 3)
    with pytest.raises(ModelError, match=r"`depths` \(=0\) must be at least 1"):
        knobs.require_depths((4, 0, 4), 3)
    with pytest.raises(ModelError, match=r"`dropout` \(=1\) must be at least 0 and below 1"):
        knobs.require_fraction("dropout", 1)
    with pytest.raises(ModelError, match=r"`order` is 'papr'.*did you mean 'paper'"):
        knobs.require_choice("order", "papr", ("paper", "authors"))
