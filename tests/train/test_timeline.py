"""`--trace`: one file of all ranks, every action once a step, and nothing left behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshuffle.comm import collectives
from meshuffle.comm.exchange import GroupExchange, SharedExchange
from meshuffle.config import TrainConfig
from meshuffle.infer.images import open_split
from meshuffle.infer.predict import evaluate
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.planner.plan import parse_plan
from meshuffle.planner.schedules import make_schedule
from meshuffle.report import pipeline_diagram, report
from meshuffle.report.pipeline_diagram import Trace, measured_bubble, read_trace, timeline_of
from meshuffle.train.api import train
from meshuffle.train.loop import Loop
from meshuffle.train.rank import train_rank
from meshuffle.train.run import prepare
from meshuffle.train.spans import Spans, clock_ahead_ns
from meshuffle.train.step import Step
from meshuffle.train.timeline import LANES, TRACED_STEPS, WARM_STEPS
from meshuffle.weights import load_model
from tests.conftest import SMALL
from tests.launched import WRITE_REPORT
from tests.ranks import as_launched, run_ranks

PLANS = {
    "1f1b": "pp=2,mb=4",
    "zbv": "pp=2:zbv,mb=4",
    "tp": "tp=2:channel,mb=2",
    "central": "dp=2:central",
    "untraced": "pp=2,mb=4",
}
PLANS_OF_4 = {"stages of replicas": "dp=2,pp=2,mb=2"}
TRACED = [name for name in (*PLANS, *PLANS_OF_4) if name != "untraced"]
HOOKED = [(Loop, "_step"), (Pipeline, "_do"), (Pipeline, "_arrived"), (Pipeline, "sum_tied")]
HOOKED += [(Step, name) for name in ("_forward", "_backward", "_inputs", "_update")]  # type: ignore[misc]
HOOKED += [(SharedExchange, "all_gather"), (GroupExchange, "all_gather")]  # type: ignore[list-item]
ORIGINALS = [getattr(owner, name) for owner, name in HOOKED]
MOVES = [getattr(collectives, name) for name in ("all_reduce", "all_to_all", "swap")]


def new_run(photos: Path, plan: str, out: Path, **changes: Any) -> Path:
    config = TrainConfig(
        data=str(photos),
        model="shufflenet_v2_x0_5",
        knobs=SMALL,
        plan=plan,
        epochs=3,
        batch=8,
        input_size=32,
        workers=0,
        compile="off",
        trace=True,
        out=str(out),
    )
    return prepare(dataclasses.replace(config, **changes), {}).run


def train_traced(group: dist.ProcessGroup, runs: list[str]) -> list[int]:
    """Train run folders as one rank; returns how many objects were replaced while they trained."""
    as_launched(group)
    report.write_report = lambda *_, **__: None  # type: ignore[assignment]  # seconds each
    replaced: list[int] = []
    hook = Spans.hook

    def counted(self: Spans, owner: Any, name: str, *others: Any) -> None:
        replaced[-1] += 1
        hook(self, owner, name, *others)

    Spans.hook = counted  # type: ignore[method-assign]
    for run in runs:
        replaced.append(0)
        train_rank(Path(run))
        assert [getattr(owner, name) for owner, name in HOOKED] == ORIGINALS
        assert [getattr(collectives, f.__name__) for f in MOVES] == MOVES
    return replaced


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, found = tmp_path_factory.mktemp("traced"), {}
    for plans in (PLANS, PLANS_OF_4):
        own = {
            name: new_run(photos, plan, home / name, trace=name != "untraced")
            for name, plan in plans.items()
        }
        world = parse_plan(next(iter(plans.values()))).num_ranks
        for hooks in run_ranks(train_traced, world, [str(run) for run in own.values()]):
            assert [count > 0 for count in hooks] == [name != "untraced" for name in own]
        found |= own
    return found


def events_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("name", TRACED)
def test_the_format(runs: dict[str, Path], name: str) -> None:
    """As the trace-event format asks; each rank has a name and four lanes."""
    events, plan = events_of(runs[name]), parse_plan((PLANS | PLANS_OF_4)[name])
    ranks = range(plan.num_ranks)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [text.split(":")[0] for text in names.values()] == [f"rank {rank}" for rank in ranks]
    lanes = [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"]
    assert lanes == list(itertools.product(ranks, LANES))
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["ph"] for e in events} == {"M", "X"}
    assert min(e["ts"] for e in spans) == 0
    assert all(e["dur"] >= 0 and e["tid"] == LANES.index(e["cat"]) for e in spans)
    steps = Counter((e["pid"], e["args"]["step"]) for e in spans if e["cat"] == "step")
    wanted = range(WARM_STEPS, WARM_STEPS + TRACED_STEPS)
    assert steps == Counter(itertools.product(ranks, wanted))


def test_who_the_ranks_are(runs: dict[str, Path]) -> None:
    names = {
        name: [e["args"]["name"] for e in events_of(runs[name]) if e["name"] == "process_name"]
        for name in ("stages of replicas", "zbv", "tp")
    }
    assert names["stages of replicas"][1:3] == ["rank 1: stage 0, dp 1", "rank 2: stage 1, dp 0"]
    assert names["zbv"] == ["rank 0: stages 0 and 3", "rank 1: stages 1 and 2"]
    assert names["tp"] == ["rank 0: tp 0", "rank 1: tp 1"]


@pytest.mark.parametrize("name", TRACED)
def test_spans_of_a_lane_follow_one_another(runs: dict[str, Path], name: str) -> None:
    lanes = defaultdict(list)
    for e in events_of(runs[name]):
        if e["ph"] == "X":
            lanes[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"], e["name"]))
    for spans in lanes.values():
        for before, after in itertools.pairwise(sorted(spans)):
            assert before[1] <= after[0] + 1e-3, (before, after)  # microseconds, as floats


@pytest.mark.parametrize("name", [n for n in TRACED if "pp" in (PLANS | PLANS_OF_4)[n]])
def test_every_scheduled_action_once_a_step(runs: dict[str, Path], name: str) -> None:
    plan = parse_plan((PLANS | PLANS_OF_4)[name])
    schedule = make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
    events = [e for e in events_of(runs[name]) if e["ph"] == "X"]
    trace = read_trace(runs[name] / "trace.json")
    assert trace is not None
    whole = pipeline_diagram._whole_steps(trace, schedule)
    assert len(whole) >= TRACED_STEPS - 2  # not those at the end of an epoch, of two images
    for step, rank in itertools.product(whole, range(plan.num_ranks)):
        own = [e for e in events if (e["args"]["step"], e["pid"]) == (step, rank)]
        done = sorted((e for e in own if "work" in e["args"]), key=lambda e: e["ts"])
        order = schedule.orders[rank // plan.dp]
        assert [e["name"] for e in done] == [str(action) for action in order]
        for e in done:
            assert e["name"] == "{stage}{work}{micro_batch}".format(**e["args"])
        assert {"update", "inputs"} < {e["name"] for e in own if e["cat"] == "compute"}
        assert any(re.match(r"wait for \d[FB]\d", e["name"]) for e in own if e["cat"] == "idle")
        assert 0 < measured_bubble(trace, step) < 1


def test_no_action_begins_before_what_it_needs(runs: dict[str, Path]) -> None:
    """The clocks of the ranks agree: a stage's forward begins after that of the stage before."""
    spans = [e for e in events_of(runs["1f1b"]) if "work" in e.get("args", {})]
    times = {(e["args"]["step"], e["name"]): (e["ts"], e["ts"] + e["dur"]) for e in spans}
    pairs = [(key, (key[0], key[1].replace("0F", "1F"))) for key in times if "0F" in key[1]]
    pairs += [(key, (key[0], key[1].replace("1B", "0B"))) for key in times if "1B" in key[1]]
    assert len(pairs) > 20
    assert all(times[first][0] < times[second][0] for first, second in pairs)


def test_a_plain_step(runs: dict[str, Path]) -> None:
    names = Counter(
        (e["cat"], e["name"]) for e in events_of(runs["tp"]) if e["ph"] == "X" and e["pid"] == 1
    )
    assert names["compute", "forward"] == names["compute", "backward"]
    assert names["compute", "forward"] > TRACED_STEPS  # two micro-batches
    assert names["communication", "sum of gradients"] == TRACED_STEPS
    kinds = {name for lane, name in names if lane == "communication"}
    assert kinds & {"all-reduce", "all-to-all", "swap"}
    broadcasts = [e for e in events_of(runs["central"]) if e["name"] == "broadcast"]
    assert len(broadcasts) == 2 * TRACED_STEPS
    assert any(e["name"] == "wait for data" for e in events_of(runs["tp"]))


def test_without_the_option_nothing_is_written(runs: dict[str, Path]) -> None:
    assert not (runs["untraced"] / "trace.json").exists()
    assert timeline_of(runs["untraced"]) is None


@pytest.mark.parametrize("name", ["1f1b", "tp", "stages of replicas"])
def test_the_report_shows_it(runs: dict[str, Path], name: str) -> None:
    shown = timeline_of(runs[name])
    assert shown is not None and shown.picture.light != shown.picture.dark
    assert (runs[name] / "plots" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    if name == "tp":
        assert shown.title == "Timeline"
    else:
        assert re.search(r"Measured bubble \d+\.\d % \(median of \d steps\), schedule", shown.note)


def test_the_report_has_a_section_for_it(runs: dict[str, Path]) -> None:
    run = runs["1f1b"]
    source, _, card = open_split(None, None, load_model(run)[1])
    page = WRITE_REPORT(run, evaluate(run)[0], source, card).read_text()
    assert "<h2>Pipeline</h2>" in page and "Measured bubble" in page


def test_a_run_that_is_too_short_says_so(
    small: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dataclasses.replace(small, epochs=1, batch=13, trace=True))["run"])
    assert "no trace.json: the run has too few steps (2)" in capfd.readouterr().out
    assert not (run / "trace.json").exists()


# The parts


class Worker:
    def work(self, seconds: float) -> float:
        self.wait()
        time.sleep(seconds)
        return seconds

    def wait(self) -> None:
        time.sleep(0.02)

    def fail(self) -> None:
        raise ValueError("no")


def test_a_hook_records_and_goes() -> None:
    worker, spans = Worker(), Spans(torch.device("cpu"))
    spans.hook(worker, "work", "compute", lambda seconds: (f"{seconds}", {"a": 1}))
    spans.hook(worker, "wait", "idle", lambda: ("wait", {}))
    spans.hook(worker, "fail", "compute", lambda: ("fail", {}))
    spans.hook(Worker, "work", "compute", lambda *_: None)
    assert worker.work(0.03) == 0.03
    with pytest.raises(ValueError, match="no"):
        worker.fail()
    spans.remove()
    assert not vars(worker)
    assert worker.work(0.0) == 0.0
    wait, work, fail = spans.take()
    assert (work.name, work.notes, fail.name) == ("0.03", {"a": 1}, "fail")
    assert wait.begin_ns < wait.end_ns == work.begin_ns  # the wait is no work
    assert 0.03 <= (work.end_ns - work.begin_ns) / 1e9 < 1
    assert spans.take() == []


def ahead(group: dist.ProcessGroup, by_ns: int) -> int:
    late = by_ns if dist.get_rank(group) == 1 else 0
    return clock_ahead_ns(group, lambda: time.perf_counter_ns() + late)


def test_clocks_of_several_hosts() -> None:
    first, second = run_ranks(ahead, 2, 5_000_000_000)
    assert first == 0
    assert second == pytest.approx(5_000_000_000, abs=5_000_000)


def test_the_bubble_of_a_known_trace() -> None:
    """Two replicas of two ranks, of which one rank each works 3 and 1 of 4 ms."""
    spans = []
    for rank, (begin, length) in enumerate([(0, 3000), (0, 3000), (3000, 1000), (3000, 1000)]):
        notes = {"stage": rank // 2, "work": "F", "micro_batch": 0}
        spans.append({"pid": rank, "ts": begin, "dur": length, "args": notes})
    places = [{"dp": rank % 2, "tp": 0, "pp": rank // 2} for rank in range(4)]
    assert measured_bubble(Trace({0: spans}, {"places": places}), 0) == 0.5


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{}]}', '{"traceEvents": []}'])
def test_a_broken_trace_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    assert read_trace(tmp_path / "trace.json") is None
    assert timeline_of(tmp_path) is None


def test_many_ranks_show_the_first_replica() -> None:
    places = [{"dp": r // 2 % 8, "tp": r % 2, "pp": r // 16} for r in range(64)]
    trace = SimpleNamespace(num_ranks=64, about={"places": places})
    assert pipeline_diagram._shown(trace) == [0, 16, 32, 48]  # type: ignore[arg-type]
