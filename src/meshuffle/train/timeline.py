"""`--trace`: a few steps of all ranks as one file for Perfetto or chrome://tracing.

`trace.json` has a process per rank with four lanes: whole steps; what the rank computes; what it
says to others (of the sum of gradients, the part that it waits for); and what it waits for idly:
data, and the stage next to its own. Where a collective is quick for one rank and slow for another,
the difference is a wait too.

The first steps are left out, and those in which `--compile auto` is still trying. Hooks are in
place during a traced step alone. Inside of compiled code there are none.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from meshuffle.comm import collectives
from meshuffle.comm.device import num_cores
from meshuffle.comm.exchange import GroupExchange, SharedExchange
from meshuffle.data import Batch
from meshuffle.files import write_text
from meshuffle.parallel.place import Place, place_of
from meshuffle.parallel.runner import Runner
from meshuffle.planner.schedules import Action
from meshuffle.train.loop import Loop
from meshuffle.train.spans import Label, Span, Spans, clock_ahead_ns
from meshuffle.train.step import Step

WARM_STEPS, TRACED_STEPS = 3, 5
LANES = ("step", "compute", "communication", "idle")
FILE = "trace.json"


@contextmanager
def traced(loop: Loop) -> Iterator[None]:
    """Trace the first steps inside a `with` block, where `--trace` asks for it."""
    if not loop.state.config.trace:
        yield
        return
    timeline = Timeline(loop)
    try:
        yield
        timeline.finish()
    finally:
        timeline.close()


class Timeline:
    """Stands around the steps of a loop until enough of them have been recorded."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._do = loop, loop._step
        self._spans = Spans(loop.state.step.device)
        self._steps: list[tuple[int, list[Span]]] = []
        self._num_seen, self._last = 0, (-1, 0)  # the epoch and the end of the last step
        self._is_done = False
        loop._step = self._step  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave the loop as it was."""
        self._spans.remove()
        self._loop.__dict__.pop("_step", None)

    def finish(self) -> None:
        """Write what has been recorded, if that has not been done; all ranks call it."""
        if self._is_done:
            return
        self._is_done = True
        self.close()
        loop = self._loop
        if not self._steps:
            loop.watch.event(f"no {FILE}: the run has too few steps ({self._num_seen})")
            return
        one_host = loop.env.local_world >= loop.env.world
        ahead_ns = 0 if one_host else clock_ahead_ns(loop.control)
        own = [(step, _moved(spans, -ahead_ns)) for step, spans in self._steps]
        rows: list[Any] | None = [None] * loop.env.world if loop.env.is_main else None
        dist.gather_object(own, rows, dst=0, group=loop.control)
        if rows is not None:
            path = loop.run / FILE
            write_text(path, json.dumps(_as_trace(rows, loop)))
            loop.watch.event(f"traced {len(own)} steps: {path} (open it in ui.perfetto.dev)")

    def _step(self, batch: Batch | None) -> None:
        loop, began = self._loop, time.perf_counter_ns()
        progress, self._num_seen = loop.state.progress, self._num_seen + 1
        is_due = batch is not None and self._num_seen > WARM_STEPS and _has_chosen(loop)
        number, epoch = progress.step, progress.epoch
        if is_due:
            _place_hooks(self._spans, loop)
        try:
            self._do(batch)
        finally:
            self._spans.remove()
        ended = time.perf_counter_ns()
        if is_due:
            if self._last[0] == epoch:
                self._spans.add(Span("idle", "wait for data", self._last[1], began, {}))
            self._spans.add(Span("step", f"step {number}", began, ended, {}))
            self._steps.append((number, self._spans.take()))
        self._last = epoch, time.perf_counter_ns()
        if len(self._steps) == TRACED_STEPS:
            self.finish()


def _has_chosen(loop: Loop) -> bool:
    """Whether the steps from now on are those of the rest of the run."""
    return loop.state.step.pipeline is not None or loop.compile.decided is not None


def _place_hooks(spans: Spans, loop: Loop) -> None:
    step = loop.state.step
    if step.pipeline is not None:
        _hook_pipeline(spans, step.pipeline)
    else:
        for name in ("_forward", "_backward"):
            spans.hook(step, name, "compute", _numbered(name.strip("_")))
    spans.hook(step, "_inputs", "compute", _numbered("inputs"))
    spans.hook(step, "_update", "compute", _named("update"))
    _hook_collectives(spans, step, loop)


def _hook_pipeline(spans: Spans, pipeline: Runner) -> None:
    def action(_: Any, action: Action) -> Label:
        notes = {"stage": action.stage, "work": action.work, "micro_batch": action.micro_batch}
        return str(action), notes

    def wait(step: Any, way: str, sender: int, i: int) -> Label | None:
        if (way, sender, i) in step.here:  # from a stage of this rank
            return None
        return f"wait for {sender}{way}{i}", {"stage": sender, "micro_batch": i}

    spans.hook(pipeline, "_do", "compute", action)
    spans.hook(pipeline, "_arrived", "idle", wait)
    spans.hook(pipeline, "sum_tied", "communication", _named("sum of tied gradients"))


def _hook_collectives(spans: Spans, step: Step, loop: Loop) -> None:
    def exchange(which: Any, *_: Any) -> Label:
        return "agree" if which is loop.exchange else "batch norm", {}

    for kind in (GroupExchange, SharedExchange):
        spans.hook(kind, "all_gather", "communication", exchange)
    spans.hook(step.parallel, "reduce_gradients", "communication", _named("sum of gradients"))
    if step.parallel.mode != "replicate":
        spans.hook(step.parallel, "share_update", "communication", _named("broadcast"))
    if not loop.compile.is_compiled:  # a hook would have the code compiled anew
        for name in ("all_reduce", "all_to_all", "swap"):
            spans.hook(collectives, name, "communication", _named(name.replace("_", "-")))


def _named(name: str) -> Callable[..., Label]:
    return lambda *_, **__: (name, {})


def _numbered(name: str) -> Callable[..., Label]:
    """Return labels with the number of the call in this step: that of the micro-batch."""
    numbers = itertools.count()
    return lambda *_, **__: (name, {"micro_batch": next(numbers)})


def _moved(spans: Sequence[Span], by_ns: int) -> list[Span]:
    return [s._replace(begin_ns=s.begin_ns + by_ns, end_ns=s.end_ns + by_ns) for s in spans]


def _as_trace(rows: Sequence[Sequence[tuple[int, Sequence[Span]]]], loop: Loop) -> dict[str, Any]:
    """Return the trace-event format's object; times in microseconds from the first span on.

    Source: "Trace Event Format", the Chromium project.
    """
    plan, env = loop.state.plan, loop.env
    first = min(span.begin_ns for row in rows for _, spans in row for span in spans)
    events: list[dict[str, Any]] = []
    places = [place_of(plan, type(env)(rank, env.world)) for rank in range(env.world)]
    for rank, (row, place) in enumerate(zip(rows, places, strict=True)):
        events += _names(rank, place, _stages_of(loop, place))
        for step, spans in row:
            events += [_event(rank, step, span, first) for span in spans]
    about = {
        "plan": str(plan),
        "model": loop.state.config.model,
        "cores": num_cores(),
        "ranks_per_host": env.local_world,
        "places": [{"dp": p.dp_rank, "tp": p.tp_rank, "pp": p.pp_rank} for p in places],
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _stages_of(loop: Loop, place: Place) -> tuple[int, ...]:
    pipeline = loop.state.step.pipeline
    return pipeline.schedule.stages_of(place.pp_rank) if pipeline else ()


def _names(rank: int, place: Place, stages: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield what the viewer calls a rank and its lanes, and their order."""
    word = "stages" if len(stages) > 1 else "stage"
    parts = [f"{word} {' and '.join(map(str, stages))}"] if stages else []
    parts += [f"dp {place.dp_rank}"] if place.dp > 1 else []
    parts += [f"tp {place.tp_rank}"] if place.tp > 1 else []
    name = f"rank {rank}" + (f": {', '.join(parts)}" if parts else "")
    yield _about("process_name", rank, 0, name=name)
    yield _about("process_sort_index", rank, 0, sort_index=rank)
    for number, lane in enumerate(LANES):
        yield _about("thread_name", rank, number, name=lane)
        yield _about("thread_sort_index", rank, number, sort_index=number)


def _about(what: str, rank: int, lane: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": values}


def _event(rank: int, step: int, span: Span, first_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.lane,
        "pid": rank,
        "tid": LANES.index(span.lane),
        "ts": (span.begin_ns - first_ns) / 1000,
        "dur": (span.end_ns - span.begin_ns) / 1000,
        "args": {"step": step, **span.notes},
    }
