"""Whether two runs computed the same: the criteria of DESIGN section 4.1, on norms alone.

    a parallel, b reference, S root mean square of all elements of a kind (gradients, …), ε = 1e-9

    float64    ‖a − b‖ ≤ ε·‖b‖ + 0.01·ε·S·√numel, or ‖a − b‖ ≤ 4·(the reference's own difference
               under another order of summation)
    float32    ‖a − b‖ over the same of one device in float32, b in float64: median ≤ 1.5 and
               worst ≤ 4 over tensors above the floor ‖b‖ > 0.01·S·√numel

Tensors of whole numbers must be equal. Every figure is a 2-norm over all elements.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

RELATIVE, FLOOR = 1e-9, 0.01
NOISE_FACTOR = 4.0
MEDIAN_RATIO, WORST_RATIO = 1.5, 4.0
EPSILON_32 = 2.0**-23


@dataclass(frozen=True)
class Norm:
    """A tensor of the reference.

    Attributes:
        squared: ‖b‖².
        numel: elements.
        exact: whole numbers, or truth values.
    """

    squared: float
    numel: int
    exact: bool = False

    @property
    def value(self) -> float:
        """‖b‖."""
        return math.sqrt(self.squared)


@dataclass(frozen=True)
class RankReport:
    """What one rank found: ‖a − b‖² of its part of each tensor, by `kind/name`.

    Attributes:
        replica: place on the `dp` axis.
        squared: by tensor.
        over_tp: tensors of which each `tp` rank has a part of its own.
        over_dp: tensors of which each replica has a part of its own.
    """

    replica: int
    squared: Mapping[str, float]
    over_tp: frozenset[str] = frozenset()
    over_dp: frozenset[str] = frozenset()


@dataclass
class Judgement:
    """What the criteria say.

    Attributes:
        passed: all tensors are equal as defined.
        errors: ‖a − b‖ / (‖b‖ + 0.01·S·√numel) of each tensor.
        failed: tensors that are not equal.
        by_floor: tensors that are equal only by the floor, or below it.
        by_noise: tensors that are equal only by the reference's own noise.
        median_ratio, worst_ratio: of float32.
    """

    passed: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    by_floor: list[str] = field(default_factory=list)
    by_noise: list[str] = field(default_factory=list)
    median_ratio: float | None = None
    worst_ratio: float | None = None

    def worst(self, num: int = 1) -> list[tuple[str, float]]:
        """Return the tensors with the largest errors, those that failed first."""
        ranked = sorted(self.errors.items(), key=lambda e: (e[0] not in self.failed, -e[1]))
        return ranked[:num]


def kind_of(key: str) -> str:
    """Return `gradients` of `gradients/conv.weight`."""
    return key.partition("/")[0]


def merge(reports: Iterable[RankReport]) -> dict[str, float]:
    """Return ‖a − b‖ of whole tensors; where several ranks have the same, that of the worst."""
    tensors: dict[str, dict[int, float]] = {}
    over_dp: set[str] = set()
    for report in reports:
        over_dp |= report.over_dp
        for key, squared in report.squared.items():
            replicas = tensors.setdefault(key, {})
            known = replicas.get(report.replica, 0.0)
            is_part = key in report.over_tp
            replicas[report.replica] = known + squared if is_part else _worse(known, squared)
    found = {}
    for key, replicas in tensors.items():
        total = 0.0
        for squared in replicas.values():
            total = total + squared if key in over_dp else _worse(total, squared)
        found[key] = math.sqrt(total) if math.isfinite(total) else math.inf
    return found


def _worse(a: float, b: float) -> float:
    return math.inf if math.isnan(a) or math.isnan(b) else max(a, b)


def scales(norms: Mapping[str, Norm]) -> dict[str, float]:
    """Return S of each kind; whole numbers do not count."""
    found = {}
    for kind in {kind_of(key) for key in norms}:
        same = [n for key, n in norms.items() if kind_of(key) == kind and not n.exact]
        numel = sum(n.numel for n in same)
        found[kind] = math.sqrt(sum(n.squared for n in same) / numel) if numel else 0.0
    return found


def judge(
    differences: Mapping[str, float],
    norms: Mapping[str, Norm],
    noise: Mapping[str, float] | None = None,
) -> Judgement:
    """Judge a float64 run.

    Args:
        differences: ‖a − b‖ by `kind/name`, of every tensor of the reference.
        norms: of the reference.
        noise: the reference's own difference; None where it has not been measured.
    """
    result, floors = _with_errors(differences, norms)
    for key, norm in norms.items():
        difference = differences.get(key, math.inf)
        if norm.exact or difference <= RELATIVE * norm.value:
            continue
        if difference <= RELATIVE * (norm.value + floors[key]):
            result.by_floor.append(key)
        elif difference <= NOISE_FACTOR * (noise or {}).get(key, 0.0):
            result.by_noise.append(key)
        else:
            result.failed.append(key)
    result.passed = not result.failed
    return result


def judge_float32(
    differences: Mapping[str, float], norms: Mapping[str, Norm], own: Mapping[str, float]
) -> Judgement:
    """Judge a float32 run.

    Args:
        differences: ‖a − b‖ with b in float64.
        norms: of the reference in float64.
        own: ‖c − b‖ with c of one device in float32, the largest over orders of summation;
            what is below half a unit in the last place of ‖b‖ counts as that.
    """
    result, floors = _with_errors(differences, norms)
    ratios: dict[str, float] = {}
    for key, norm in norms.items():
        if norm.exact:
            continue
        difference = differences.get(key, math.inf)
        error = max(own[key], EPSILON_32 / 2 * norm.value)
        if norm.value > floors[key]:
            ratios[key] = difference / error if error else 0.0 if not difference else math.inf
        else:
            result.by_floor.append(key)
            if not difference <= WORST_RATIO * error + floors[key]:
                result.failed.append(key)
    result.failed += [key for key, ratio in ratios.items() if not ratio <= WORST_RATIO]
    if ratios:
        result.median_ratio = statistics.median(ratios.values())
        result.worst_ratio = max(ratios.values())
    result.passed = not result.failed and (result.median_ratio or 0.0) <= MEDIAN_RATIO
    return result


def _with_errors(
    differences: Mapping[str, float], norms: Mapping[str, Norm]
) -> tuple[Judgement, dict[str, float]]:
    """Return a judgement with the errors, and whole numbers judged; and 0.01·S·√numel of each."""
    size = scales(norms)
    floors = {key: FLOOR * size[kind_of(key)] * math.sqrt(n.numel) for key, n in norms.items()}
    result = Judgement()
    for key, norm in norms.items():
        difference = differences.get(key, math.inf)
        if norm.exact:
            result.errors[key] = difference and math.inf
            if difference:
                result.failed.append(key)
            continue
        scale = norm.value + floors[key]
        result.errors[key] = difference / scale if scale else difference and math.inf
    return result, floors


def largest(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each tensor's largest difference over several runs."""
    return {key: max(run.get(key, 0.0) for run in runs) for key in {k for r in runs for k in r}}
