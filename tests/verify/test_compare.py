"""The criteria of DESIGN 4.1, on numbers alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.verify.compare import Norm, Report, judge, judge_float32, merge, scales

sizes = st.floats(1e-3, 1e3)


@given(sizes, st.integers(1, 1000), st.floats(0, 3))
def test_the_bound_is_relative_plus_a_floor(norm: float, numel: int, part: float) -> None:
    """One tensor: S·√numel is its own norm, so that the bound is 1.01e-9 of it."""
    difference = part * 1e-9 * norm
    judgement = judge({"gradients/w": difference}, {"gradients/w": Norm(norm, numel)})
    assert judgement.passed == (part <= 1.01 + 1e-12)
    assert judgement.worst()[0][1] == pytest.approx(difference / (1.01 * norm))
    assert bool(judgement.near) == (judgement.passed and part > 1 + 1e-12)


def test_a_tensor_of_noise_is_judged_by_the_floor() -> None:
    """A bias in front of a batch norm: zero by mathematics, 100 % off in practice."""
    norms = {"gradients/w": Norm(10.0, 100), "gradients/bias": Norm(1e-15, 4)}
    differences = {"gradients/w": 0.0, "gradients/bias": 1e-15}
    judgement = judge(differences, norms)
    assert judgement.passed and judgement.near == ["gradients/bias"]
    assert not judge(differences | {"gradients/bias": 1e-10}, norms).passed


def test_the_references_own_noise_excuses_four_times_itself() -> None:
    norms = {"outputs/0": Norm(1.0, 1)}
    assert not judge({"outputs/0": 5e-9}, norms).passed
    excused = judge({"outputs/0": 5e-9}, norms, {"outputs/0": 1.3e-9})
    assert excused.passed and excused.near == ["outputs/0"]
    assert not judge({"outputs/0": 5e-9}, norms, {"outputs/0": 1.2e-9}).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_fails(bad: float) -> None:
    merged = merge([Report(0, 0, {"outputs/0": bad}), Report(0, 0, {"outputs/0": 0.0})])
    assert merged == {"outputs/0": math.inf}
    assert not judge(merged, {"outputs/0": Norm(1.0, 1)}).passed


def test_a_tensor_that_nobody_compared_fails() -> None:
    assert judge({}, {"outputs/0": Norm(1.0, 1)}).failed == ["outputs/0"]


def test_whole_numbers_must_be_equal_and_do_not_set_the_scale() -> None:
    norms = {"buffers/ids": Norm(1e12, 4, exact=True), "buffers/mean": Norm(2.0, 4)}
    assert scales(norms) == {"buffers": 1.0}
    assert judge({"buffers/ids": 0.0, "buffers/mean": 0.0}, norms).passed
    assert judge({"buffers/ids": 1e-6, "buffers/mean": 0.0}, norms).failed == ["buffers/ids"]


def test_parts_are_added_and_copies_are_compared() -> None:
    split = frozenset({"gradients/split"})
    ranks = [
        Report(0, replica, {"gradients/split": a, "outputs/0": b}, split, frozenset({"outputs/0"}))
        for replica, a, b in [(0, 9.0, 4.0), (0, 16.0, 1.0), (1, 1.0, 5.0), (1, 0.0, 0.0)]
    ]
    assert merge(ranks) == {"gradients/split": 5.0, "outputs/0": 3.0}


def test_each_stage_tells_of_its_own_tensors_and_both_of_a_tied_one() -> None:
    reports = [
        Report(0, 0, {"gradients/a": 4.0, "gradients/tied": 9.0}),
        Report(1, 0, {"gradients/b": 1.0, "gradients/tied": 16.0}),
    ]
    assert merge(reports) == {"gradients/a": 2.0, "gradients/b": 1.0, "gradients/tied": 4.0}


def test_float32_is_judged_by_ratios_above_the_floor() -> None:
    norms = {f"gradients/{i}": Norm(1.0, 1) for i in range(3)} | {"gradients/b": Norm(1e-10, 1)}
    own = dict.fromkeys(norms, 1e-6)
    fine = dict.fromkeys(norms, 1.2e-6)
    judgement = judge_float32(fine, norms, own)
    assert judgement.passed and judgement.near == ["gradients/b"]
    assert judgement.median_ratio == pytest.approx(1.2)
    assert not judge_float32(fine | {"gradients/0": 4.1e-6}, norms, own).passed
    assert not judge_float32(dict.fromkeys(norms, 1.6e-6), norms, own).passed
    assert not judge_float32(fine | {"gradients/b": 0.1}, norms, own).passed


def test_one_device_without_an_error_excuses_half_a_unit_in_the_last_place() -> None:
    norms = {"loss/1": Norm(1.0, 1)}
    assert judge_float32({"loss/1": 2.0**-24}, norms, {"loss/1": 0.0}).passed
    assert not judge_float32({"loss/1": 2.0**-21}, norms, {"loss/1": 0.0}).passed
