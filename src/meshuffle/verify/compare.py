"""Whether two runs computed the same: the criteria of DESIGN section 4.1, on norms alone.

    a parallel, b reference, S root mean square of all elements of a kind (gradients, …), ε = 1e-9

    float64    ‖a − b‖ ≤ ε·‖b‖ + 0.01·ε·S·√numel, or ‖a − b‖ ≤ 4·(the reference's own difference
               under another order of summation, or with its weights rounded to a neighbour);
               beyond 1e-7·(‖b‖ + 0.01·S·√numel) such noise leaves it undecided
    float32    ‖a − b‖ over the same of one device in float32, b in float64: median ≤ 1.5 and
               worst ≤ 4 over tensors above the floor ‖b‖ > 0.01·S·√numel

Tensors of whole numbers must be equal. Every figure is a 2-norm over all elements.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RELATIVE, FLOOR = 1e-9, 0.01
NOISE_FACTOR, MOST_EXCUSED = 4.0, 1e-7
MEDIAN_RATIO, WORST_RATIO = 1.5, 4.0
EPSILON_32 = 2.0**-23


@dataclass(frozen=True)
class Norm:
    """A tensor of the reference.

    Attributes:
        value: ‖b‖.
        numel: elements.
        exact: whole numbers, truth values, or a buffer that nothing changes.
    """

    value: float
    numel: int
    exact: bool = False


@dataclass
class Report:
    """The results of one rank, as plain data.

    Attributes:
        stage, replica: the rank's place on the `pp` and the `dp` axis.
        squared: ‖a − b‖² of its part of each tensor, by `kind/name`.
        over_tp, over_dp: tensors of which each `tp` rank, each replica has a part of its own.
        sent_bytes_predicted: in one forward and backward, of a replica; by its first rank.
        sent_bytes_measured: bytes that this rank sent, as a fraction.
        layout_facts: what a `Verdict` says about the layouts, by its names; alike on all ranks.
        parameter_bytes_fraction: the part of the parameters that this rank keeps.
        as_written: why the model was not captured, but run as it is written.
    """

    stage: int
    replica: int
    squared: Mapping[str, float]
    over_tp: Collection[str] = ()
    over_dp: Collection[str] = ()
    sent_bytes_predicted: int = 0
    sent_bytes_measured: str = "0"
    layout_facts: Mapping[str, Any] = field(default_factory=dict)
    parameter_bytes_fraction: float = 1.0
    as_written: str = ""
    seconds: float = 0.0


@dataclass
class Judgement:
    """The judgement of a run by the criteria.

    Attributes:
        errors: ‖a − b‖ / (‖b‖ + 0.01·S·√numel) of each tensor.
        failed: tensors that are not equal.
        near: tensors that are equal only by the floor or by the reference's own noise; in float32,
            tensors below the floor.
        excused: tensors that are equal only by more of that noise than rounding should make.
        median_ratio, worst_ratio: error over that of one device, in float32.
    """

    errors: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    median_ratio: float | None = None
    worst_ratio: float | None = None

    @property
    def passed(self) -> bool:
        """All tensors are equal as defined."""
        return not self.failed and (self.median_ratio or 0.0) <= MEDIAN_RATIO

    def worst(self, num: int = 1) -> list[tuple[str, float]]:
        """Return the tensors with the largest errors, those that failed first."""
        ranked = sorted(self.errors.items(), key=lambda e: (e[0] not in self.failed, -e[1]))
        return ranked[:num]


def kind_of(key: str) -> str:
    """Return `gradients` of `gradients/conv.weight`."""
    return key.partition("/")[0]


def merge(reports: Sequence[Report]) -> dict[str, float]:
    """Return ‖a − b‖ of whole tensors; where several ranks have the same, that of the worst.

    Args:
        reports: the reports of all ranks, each with the tensors of its pipeline stages.
    """
    differences: dict[str, float] = {}
    for key in {key for report in reports for key in report.squared}:
        holders = [report for report in reports if key in report.squared]
        over_tp = sum if key in holders[0].over_tp else max
        over_dp = sum if key in holders[0].over_dp else max
        by_stage: dict[int, dict[int, list[float]]] = {}
        for report in holders:
            replicas = by_stage.setdefault(report.stage, {})
            replicas.setdefault(report.replica, []).append(report.squared[key])
        total = max(over_dp(map(over_tp, replicas.values())) for replicas in by_stage.values())
        is_finite = all(math.isfinite(report.squared[key]) for report in holders)
        differences[key] = math.sqrt(total) if is_finite else math.inf
    return differences


def scales(norms: Mapping[str, Norm]) -> dict[str, float]:
    """Return S of each kind; whole numbers do not count."""
    sizes = {}
    for kind in {kind_of(key) for key in norms}:
        same = [n for key, n in norms.items() if kind_of(key) == kind and not n.exact]
        numel = sum(n.numel for n in same)
        sizes[kind] = math.sqrt(sum(n.value**2 for n in same) / numel) if numel else 0.0
    return sizes


def judge(
    differences: Mapping[str, float],
    norms: Mapping[str, Norm],
    noise: Mapping[str, float] | None = None,
) -> Judgement:
    """Judge a float64 run.

    Args:
        differences: ‖a − b‖ by `kind/name`, of every tensor of the reference.
        norms: the reference's tensors.
        noise: the reference's own difference; None where it has not been measured.
    """
    result, rows = _begin(differences, norms)
    for key, difference, size, floor in rows:
        excused = max(RELATIVE * (size + floor), NOISE_FACTOR * (noise or {}).get(key, 0.0))
        if not difference <= excused:
            result.failed.append(key)
        elif difference > RELATIVE * size:
            result.near.append(key)
            if difference > MOST_EXCUSED * (size + floor):
                result.excused.append(key)
    return result


def judge_float32(
    differences: Mapping[str, float], norms: Mapping[str, Norm], own: Mapping[str, float]
) -> Judgement:
    """Judge a float32 run.

    Args:
        differences: ‖a − b‖ with b in float64.
        norms: the tensors of the reference in float64.
        own: ‖c − b‖ with c of one device in float32, the largest over orders of summation;
            what is below half a unit in the last place of ‖b‖ counts as that.
    """
    result, rows = _begin(differences, norms)
    ratios: dict[str, float] = {}
    for key, difference, size, floor in rows:
        error = max(own[key], EPSILON_32 / 2 * size)
        if size > floor:
            ratios[key] = difference / error if error else 0.0 if not difference else math.inf
        else:
            result.near.append(key)
            if not difference <= WORST_RATIO * error + floor:
                result.failed.append(key)
    result.failed += [key for key, ratio in ratios.items() if not ratio <= WORST_RATIO]
    if ratios:
        result.median_ratio = statistics.median(ratios.values())
        result.worst_ratio = max(ratios.values())
    return result


def _begin(
    differences: Mapping[str, float], norms: Mapping[str, Norm]
) -> tuple[Judgement, list[tuple[str, float, float, float]]]:
    """Return a judgement with all errors in which whole numbers are judged, and rows to judge.

    A row is (key, ‖a − b‖, ‖b‖, 0.01·S·√numel).
    """
    result, rows, size = Judgement(), [], scales(norms)
    for key, norm in norms.items():
        difference = differences.get(key, math.inf)
        floor = 0.0 if norm.exact else FLOOR * size[kind_of(key)] * math.sqrt(norm.numel)
        scale = 0.0 if norm.exact else norm.value + floor
        result.errors[key] = difference / scale if scale else difference and math.inf
        if not norm.exact:
            rows.append((key, difference, norm.value, floor))
        elif difference:
            result.failed.append(key)
    return result, rows
