"""The report's picture of a traced step: who computed what when, beside what the schedule plans.

A run with a pipeline has a row per rank, and a box per forward or backward of a micro-batch,
coloured by stage. Another run shows what each rank computed and communicated. Reading `trace.json`
is lenient, as with all records.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from meshuffle.errors import PlanError
from meshuffle.files import replaced
from meshuffle.planner.plan import parse_plan
from meshuffle.planner.schedules import Schedule, bubble, make_schedule, timed
from meshuffle.report import page
from meshuffle.report.plots import DARK, LIGHT, Theme, png

_WIDTH, _ROW, _DPI = 10.3, 0.29, 160  # inches: as wide as the page
_MOST_RANKS = 16
_STAGES = ("#2563eb", "#d9730d", "#0f9d76", "#b83280", "#7c5cd6", "#a17c00", "#0e8fb3", "#c2413b")
_KINDS = {
    "wait for data": "#c4cad3",
    "inputs": "#7b8494",
    "forward": "#7fa8f5",
    "backward": "#2563eb",
    "update": "#0f9d76",
}
_TALKS = "#d9730d"
_LIGHTER = {"F": 0.5, "B": 0.0, "I": 0.0, "W": 0.28}  # how much of the paper is in a box


@dataclass(frozen=True)
class Box:
    """A piece of a rank's row; times in milliseconds, or in forwards of a stage.

    Attributes:
        low: whether it lies in the lower third, where communication is shown.
    """

    row: int
    begin: float
    end: float
    colour: str
    lighter: float = 0.0
    text: str = ""
    low: bool = False


@dataclass(frozen=True)
class Trace:
    """What a `trace.json` holds: `spans` of a step by its number, and who the ranks are."""

    spans: Mapping[int, Sequence[Mapping[str, Any]]]
    about: Mapping[str, Any]

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return len(self.about["places"])


def read_trace(path: Path) -> Trace | None:
    """Return the trace, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for event in found["traceEvents"]:
            if event["ph"] == "X":
                steps.setdefault(int(event["args"]["step"]), []).append(event)
        about = {"cores": 0, "ranks_per_host": 0, **found["otherData"]}
        parse_plan(about["plan"])
        return Trace(steps, about) if steps and about["places"] else None
    except (OSError, ValueError, KeyError, TypeError, PlanError):
        return None


@dataclass(frozen=True)
class Timeline:
    """The section of the report."""

    title: str
    note: str
    picture: page.Picture


def timeline_of(run: Path) -> Timeline | None:
    """Return the section of the report, None without a trace; writes `plots/timeline.png`."""
    trace = read_trace(run / "trace.json")
    if trace is None:
        return None
    plan = parse_plan(trace.about["plan"])
    if plan.pp > 1:
        schedule = make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
        shares = {step: measured_bubble(trace, step) for step in _whole_steps(trace, schedule)}
        return _pipeline(run, trace, schedule, shares, plan.pp_kind or "1f1b") if shares else None
    return _plain(run, trace)


def _whole_steps(trace: Trace, schedule: Schedule) -> list[int]:
    """Return the steps with as many micro-batches as the plan has."""
    num = sum(map(len, schedule.orders)) * trace.num_ranks // len(schedule.orders)
    return [step for step in trace.spans if len(_actions(trace, step)) == num]


def _actions(trace: Trace, step: int) -> list[Mapping[str, Any]]:
    return [span for span in trace.spans[step] if "work" in span["args"]]


def measured_bubble(trace: Trace, step: int) -> float:
    """Return the share of the ranks' time between a replica's first and last action that is none.

    The time of several replicas is added up.
    """
    replicas: dict[int, list[Mapping[str, Any]]] = {}
    for span in _actions(trace, step):
        replicas.setdefault(trace.about["places"][span["pid"]]["dp"], []).append(span)
    busy = lasting = 0.0
    for spans in replicas.values():
        length = max(s["ts"] + s["dur"] for s in spans) - min(s["ts"] for s in spans)
        lasting += length * len({s["pid"] for s in spans})
        busy += sum(s["dur"] for s in spans)
    return 1 - busy / lasting


def _pipeline(
    run: Path, trace: Trace, schedule: Schedule, shares: Mapping[int, float], name: str
) -> Timeline:
    step = sorted(shares, key=lambda step: shares[step])[(len(shares) - 1) // 2]
    spans, ranks = _actions(trace, step), _shown(trace)
    start = min(span["ts"] for span in spans)
    boxes = [
        _action_box(ranks.index(s["pid"]), _ms(s["ts"] - start), _ms(s["dur"]), s["args"])
        for s in spans
        if s["pid"] in ranks
    ]
    planned = [
        _action_box(schedule.ranks[action.stage], begin, end - begin, action._asdict())
        for action, (begin, end) in timed(schedule).items()
    ]
    measured, theory = statistics.median(shares.values()), bubble(schedule)
    num = len(schedule.orders)
    panels = [
        (f"Measured, step {step}: bubble {100 * shares[step]:.1f} %", "ms", boxes, _labels(trace)),
        (
            f"Schedule {name}: bubble {100 * theory:.1f} %",
            "forwards of a stage, where all stages take the same",
            planned,
            [f"pp {rank}" for rank in range(num)],
        ),
    ]
    legend = [(f"stage {i}", _STAGES[i % len(_STAGES)]) for i in range(schedule.num_stages)]
    picture = _pictures(run, panels, legend[:16], "A step of the pipeline, and its schedule")
    works = {action.work for order in schedule.orders for action in order}
    split = ", W its later half, to the weights, in between" if "W" in works else ""
    note = (
        f"Measured bubble {100 * measured:.1f} % (median of {len(shares)} steps), "
        f"schedule {100 * theory:.1f} %. Numbers are micro-batches; forward is light, backward "
        f"full{split}; where a row is empty the rank waits.{_crowded(trace)}"
    )
    return Timeline("Pipeline", note, picture)


def _action_box(row: int, begin: float, length: float, action: Mapping[str, Any]) -> Box:
    colour = _STAGES[action["stage"] % len(_STAGES)]
    lighter = _LIGHTER.get(action["work"], 0.0)
    return Box(row, begin, begin + length, colour, lighter, str(action["micro_batch"]))


def _plain(run: Path, trace: Trace) -> Timeline:
    def length(step: int) -> float:
        return sum(s["dur"] for s in trace.spans[step] if s["cat"] == "step" and s["pid"] == 0)

    ordered = sorted(trace.spans, key=length)
    step, ranks = ordered[(len(ordered) - 1) // 2], _shown(trace)
    spans = [s for s in trace.spans[step] if s["cat"] != "step" and s["pid"] in ranks]
    start = min(s["ts"] for s in spans)
    boxes = []
    for s in spans:
        talks, begin = s["cat"] == "communication", _ms(s["ts"] - start)
        colour = _TALKS if talks else _KINDS.get(s["name"], _KINDS["inputs"])
        row = ranks.index(s["pid"])
        boxes.append(Box(row, begin, begin + _ms(s["dur"]), colour, low=talks))
    panels = [(f"Step {step}", "ms", boxes, _labels(trace))]
    legend = [*_KINDS.items(), ("communication, waits for other ranks included", _TALKS)]
    picture = _pictures(run, panels, legend, "What each rank did in a step")
    note = f"The median of {len(ordered)} traced steps.{_crowded(trace)}"
    return Timeline("Timeline", note, picture)


def _ms(microseconds: float) -> float:
    return microseconds / 1000


def _shown(trace: Trace) -> list[int]:
    """Return the ranks to draw: all, or of many those of the first replica that speak for it."""
    ranks, places = list(range(trace.num_ranks)), trace.about["places"]
    if len(ranks) > _MOST_RANKS:
        first = [rank for rank in ranks if places[rank]["dp"] == places[rank]["tp"] == 0]
        ranks = first if len(first) > 1 else ranks
    return ranks[:_MOST_RANKS]


def _labels(trace: Trace) -> list[str]:
    return [f"rank {rank}" for rank in _shown(trace)]


def _crowded(trace: Trace) -> str:
    cores, ranks = trace.about["cores"], trace.about["ranks_per_host"]
    if not 0 < cores < ranks:
        return ""
    return (
        f" {ranks} ranks shared {cores} cores here: each computes while others would wait, so "
        "times are longer and the bubble is another than with a core for each."
    )


# Drawing

Panel = tuple[str, str, Sequence[Box], Sequence[str]]
"""Title, what the axis counts, boxes, and the names of the rows."""


def _pictures(
    run: Path, panels: Sequence[Panel], legend: Sequence[tuple[str, str]], description: str
) -> page.Picture:
    light, dark = (draw(panels, legend, theme) for theme in (LIGHT, DARK))
    with replaced(run / "plots" / "timeline.png") as temporary:
        temporary.write_bytes(light)
    return page.Picture.of(light, dark, description)


def draw(panels: Sequence[Panel], legend: Sequence[tuple[str, str]], theme: Theme) -> bytes:
    """Return the PNG of panels, one below the other; `legend`: names and colours."""
    above, below = 0.42, 0.46
    top = 0.0 if len(legend) <= 8 else 0.3  # a short legend stands beside the first title
    heights = [_ROW * len(rows) for _, _, _, rows in panels]
    total = top + sum(height + above + below for height in heights)
    figure = Figure(figsize=(_WIDTH, total), dpi=_DPI, facecolor=theme.paper)
    y = total - top
    for (title, unit, boxes, rows), height in zip(panels, heights, strict=True):
        y -= above + height
        axes = figure.add_axes((0.062, y / total, 0.93, height / total))
        _draw_rows(axes, boxes, len(rows), theme)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.set_xlabel(unit, color=theme.muted, fontsize=8.5)
        style: Any = {"color": theme.ink, "fontsize": 10, "fontweight": "bold", "va": "bottom"}
        figure.text(0.004, (y + height + 0.1) / total, title, **style)
        y -= below
    _draw_legend(figure, legend, 1 - (0.04 if top else 0.16) / total, theme)
    return png(figure)


def _draw_rows(axes: Axes, boxes: Sequence[Box], num_rows: int, theme: Theme) -> None:
    last = max((box.end for box in boxes), default=1.0)
    for row in range(num_rows):
        axes.add_patch(Rectangle((0, row + 0.07), last, 0.86, color=theme.grid, alpha=0.55, lw=0))
    has_low = any(box.low for box in boxes)
    for box in boxes:
        _draw_box(axes, box, last, has_low, theme)
    axes.set_xlim(0, last)
    axes.set_ylim(num_rows, 0)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, pad=4)


def _draw_box(axes: Axes, box: Box, last: float, has_low: bool, theme: Theme) -> None:
    paper, shade = ("#ffffff", 0.0) if theme is LIGHT else ("#13161b", 0.08)
    fill, width = _mixed(box.colour, paper, box.lighter + shade), box.end - box.begin
    bottom, height = _extent(box, has_low)
    line = 0.5 if width > 0.004 * last else 0.0
    axes.add_patch(
        Rectangle((box.begin, bottom), width, height, facecolor=fill, edgecolor=paper, lw=line)
    )
    if box.text and width > 0.007 * len(box.text) * last:
        red, green, blue = to_rgb(fill)
        ink = "#1b1f24" if red + green + blue > 1.75 else "#ffffff"
        x, y = box.begin + width / 2, bottom + height / 2
        axes.text(x, y, box.text, color=ink, fontsize=7, ha="center", va="center_baseline")


def _extent(box: Box, has_low: bool) -> tuple[float, float]:
    """Return where a box begins in its row, from above, and its height."""
    if not has_low:
        return box.row + 0.07, 0.86
    return (box.row + 0.66, 0.27) if box.low else (box.row + 0.07, 0.56)


def _draw_legend(figure: Figure, legend: Iterable[tuple[str, str]], y: float, theme: Theme) -> None:
    patches = [Patch(color=colour, label=name) for name, colour in legend]
    figure.legend(
        handles=patches, loc="upper right", bbox_to_anchor=(0.995, y), ncols=len(patches),
        frameon=False, fontsize=8.5, labelcolor=theme.ink, handlelength=0.9, handleheight=0.9,
        columnspacing=1.2, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def _mixed(colour: str, paper: str, share: float) -> str:
    """Return a colour with a share of the paper in it."""
    pairs = zip(to_rgb(colour), to_rgb(paper), strict=True)
    red, green, blue = ((1 - share) * a + share * b for a, b in pairs)
    return to_hex((red, green, blue))
