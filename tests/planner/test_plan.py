from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.errors import PlanError
from meshuffle.planner.plan import SCHEDULES, Plan, parse_plan

sizes = st.integers(1, 64)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        dp=draw(sizes),
        tp=draw(sizes),
        pp=draw(sizes),
        dp_kind=draw(st.sampled_from([None, "shard", "central"])),
        tp_kind=draw(st.sampled_from([None, "channel", "spatial", "batch"])),
        pp_kind=draw(st.sampled_from([None, *SCHEDULES])),
        mb=draw(st.none() | sizes),
        threads=draw(st.none() | sizes),
    )


@given(plans())
def test_text_and_back(plan: Plan) -> None:
    assert parse_plan(str(plan)) == plan


@given(plans(), st.none() | st.floats(0.1, 1e6))
def test_json_and_back(tmp_path_factory: pytest.TempPathFactory, plan: Plan, ms: float) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    values = {**plan.to_dict(), "predicted_step_ms": ms}
    path.write_text(json.dumps(values))
    found = parse_plan(str(path))
    assert found == plan
    assert found.predicted_step_ms == ms


def test_defaults() -> None:
    assert parse_plan("") == Plan()
    assert parse_plan("pp=4").num_micro_batches == 8
    assert parse_plan("pp=4,mb=6").num_micro_batches == 6
    assert parse_plan("dp=2, tp=3,pp=4").num_ranks == 24
    assert str(Plan()) == "dp=1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dp=2,dp=3", "stands twice"),
        ("dp", "cannot read 'dp'"),
        ("dp=0", "at least 1"),
        ("dq=2", "the parts are dp, tp, pp"),
        ("tp=2:chanel", "did you mean 'channel'"),
        ("mb=2:channel", "followed by nothing"),
        ("dp=-1", "cannot read"),
        ("dp=two", "cannot read"),
        ("no-such-plan.json", "No such file"),
    ],
)
def test_bad_text(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        parse_plan(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "one JSON object"),
        ("{", "not JSON"),
        ('{"dp": "2"}', "whole number"),
        ('{"dp": true}', "whole number"),
        ('{"ranks": 2}', "unknown key"),
        ('{"dp_kind": "shards"}', "did you mean 'shard'"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=says):
        parse_plan(str(path))


def test_cuts_are_kept_in_json_and_must_be_names(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan(pp=2, cuts=("add_3",)).to_dict()))
    assert parse_plan(str(path)).cuts == ("add_3",)
    path.write_text(json.dumps({"pp": 2, "cuts": [3]}))
    with pytest.raises(PlanError, match=r"cuts=\[3\] must be a list of names"):
        parse_plan(str(path))
