"""Every schedule does all the work once, in an order that never waits for itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.errors import PlanError
from meshuffle.planner.plan import SCHEDULES
from meshuffle.planner.schedules import Action, Schedule, bubble, make_schedule


@given(st.sampled_from(SCHEDULES), st.integers(2, 5), st.integers(1, 12))
def test_all_work_is_done_once_and_micro_batches_go_forward_in_order(
    kind: str, pp: int, num: int
) -> None:
    try:
        schedule = make_schedule(kind, pp, num)
    except PlanError as error:
        assert f"pp={pp}" in str(error) and kind not in ("gpipe", "1f1b")
        return
    assert {schedule.ranks.count(rank) for rank in range(pp)} == {schedule.num_stages // pp}
    for rank, order in enumerate(schedule.orders):
        for stage in schedule.stages_of(rank):
            own = [(work, i) for s, work, i in order if s == stage]
            assert [i for work, i in own if work == "F"] == list(range(num))
            assert sorted(i for work, i in own if work in "BI") == list(range(num))
            split = sorted(i for work, i in own if work == "I")
            assert split == sorted(i for work, i in own if work == "W")
        assert {action.stage for action in order} == set(schedule.stages_of(rank))
    assert 0 <= bubble(schedule) < 1


def test_bubbles_are_those_of_the_papers() -> None:
    pp, num = 4, 8
    plain = (pp - 1) / (num + pp - 1)
    assert bubble(make_schedule("gpipe", pp, num)) == pytest.approx(plain)
    assert bubble(make_schedule(None, pp, num)) == pytest.approx(plain)
    interleaved = bubble(make_schedule("interleaved-1f1b", pp, num))
    assert interleaved == pytest.approx((pp - 1) / (2 * num + pp - 1))
    assert bubble(make_schedule("zbv", pp, num)) < interleaved


def test_a_first_stage_of_1f1b_keeps_no_more_micro_batches_than_stages() -> None:
    order = make_schedule("1f1b", 4, 16).orders[0]
    kept = most = 0
    for action in order:
        kept += 1 if action.work == "F" else -1
        most = max(most, kept)
    assert most == 4


def test_a_schedule_that_waits_for_itself_is_seen() -> None:
    orders = ((Action(0, "B", 0), Action(0, "F", 0)), (Action(1, "F", 0), Action(1, "B", 0)))
    with pytest.raises(PlanError, match="waits for itself at 0B0"):
        bubble(Schedule(orders, (0, 1)))


def test_a_number_of_micro_batches_that_does_not_do() -> None:
    with pytest.raises(PlanError, match=r"pp=4:interleaved-1f1b,mb=9.*pp=4:1f1b"):
        make_schedule("interleaved-1f1b", 4, 9)
