"""`verify`: many checks with few launches, each with a verdict."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from meshuffle.dist.launch import torchrun
from meshuffle.errors import InputError, Interrupted, RankFailed, in_words
from meshuffle.verify.compare import (
    Judgement,
    RankReport,
    judge,
    judge_float32,
    kind_of,
    merge,
)
from meshuffle.verify.job import DTYPES, Job, Model, checked_plan, name_of
from meshuffle.verify.reference import Reference, make_reference, own_difference
from meshuffle.verify.trace import first_diverging, make_trace, trace_path

_MOST_REFERENCE_BYTES = 8 << 30
_NUM_WORST, _NUM_WHOLE_OPS = 5, 5
_RANK_MODULE = "meshuffle.verify"

Case = tuple[Model, str, str] | tuple[Model, str, str, int]
"""(model, plan, input) or (model, plan, input, batch)."""


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        passed: all tensors are equal as DESIGN 4.1 defines it, and the bytes were predicted.
        model, plan, dtype: of the case.
        worst_relative_error: the largest ‖a − b‖ / (‖b‖ + 0.01·S·√numel).
        worst_tensor: its `kind/name`; of those that failed, if any did.
        num_floor_tensors: tensors judged by the floor or by the reference's noise.
        sharded_flops_fraction: share of FLOPs in ops of which each rank does a part, 0 … 1.
        sent_bytes_predicted, sent_bytes_measured: by all ranks in one forward and backward,
            without the sums of parameter gradients.
        busiest_over_mean: FLOPs of the busiest rank over the mean.
        parameter_bytes_fraction: parameters kept by the rank that keeps most, over the model's.
        worst_tensors: the few worst, with their errors.
        failed_tensors: all that are not equal.
        floor_tensors: those of `num_floor_tensors`.
        first_diverging: where a run that failed first differs, in the order of computation.
        whole_ops: (module, op, share of FLOPs) of the largest ops that run whole on every rank.
        num_whole_ops: how many those are.
        median_ratio, worst_ratio: error over that of one device; float32 only.
        seconds: of the ranks.
        error: why nothing was compared; `exit_code` is then 1 or 2 as in errors.py.
    """

    passed: bool
    model: str
    plan: str
    dtype: str
    worst_relative_error: float | None = None
    worst_tensor: str | None = None
    num_floor_tensors: int = 0
    sharded_flops_fraction: float | None = None
    sent_bytes_predicted: int | None = None
    sent_bytes_measured: int | float | None = None
    busiest_over_mean: float | None = None
    parameter_bytes_fraction: float | None = None
    worst_tensors: list[tuple[str, float]] = field(default_factory=list)
    failed_tensors: list[str] = field(default_factory=list)
    floor_tensors: list[str] = field(default_factory=list)
    first_diverging: str | None = None
    whole_ops: list[tuple[str, str, float]] = field(default_factory=list)
    num_whole_ops: int = 0
    median_ratio: float | None = None
    worst_ratio: float | None = None
    seconds: float = 0.0
    error: str | None = None
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def verify(
    cases: Iterable[Case],
    *,
    dtype: str = "float64",
    batch: int = 8,
    seed: int = 0,
    timeout_s: float = 120,
) -> list[Verdict]:
    """Check that parallel runs compute what one device computes; return a verdict per case.

    Each case trains for three steps on one device and on the ranks of its plan, on this host's
    CPU cores. Cases of one number of ranks share a launch, and those that differ in the plan alone
    share a reference.

    Args:
        cases: (model, plan, input) or (model, plan, input, batch): a name that `create_model`
            takes or a function that ranks can import, a plan text, and the sizes of a sample:
            `3x64x64`, `16000`, `128:int` for token ids, several inputs with commas between.
        dtype: `float64` or `float32`, see `compare`.
        batch: samples of a step over all replicas, where a case does not say.
        seed: of weights, inputs and random masks.
        timeout_s: how long a rank waits for the others, seconds.

    Raises:
        InputError: an unknown dtype. What is wrong with one case is in its verdict.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}': verify takes {' and '.join(DTYPES)}")
    with tempfile.TemporaryDirectory(prefix="meshuffle-verify-") as folder:
        session = _Session(Path(folder), timeout_s)
        for model, plan, text, *own in cases:
            session.add(model, plan, text, dtype, own[0] if own else batch, seed)
        return session.run()


@dataclass
class _Entry:
    """A case on its way to its verdict."""

    number: int
    job: Job
    verdict: Verdict | None = None
    world: int = 0


class _Session:
    """The cases of one call of `verify`, and the files that ranks read and write."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.entries: list[_Entry] = []
        self._references: dict[Any, Reference | Exception] = {}

    def add(self, model: Model, plan: str, text: str, dtype: str, batch: int, seed: int) -> None:
        """Take in a case."""
        job = Job(model if isinstance(model, str) else repr(model), plan, text, batch, dtype, seed)
        entry = _Entry(len(self.entries), job)
        self.entries.append(entry)
        try:
            entry.job = Job(name_of(model), plan, text, batch, dtype, seed)
            entry.world = checked_plan(entry.job).num_ranks
        except InputError as error:
            entry.verdict = _failed(job, error)

    def run(self) -> list[Verdict]:
        """Launch, judge, and look closer at what failed."""
        for world in sorted({entry.world for entry in self.entries if entry.verdict is None}):
            todo = [e for e in self.entries if e.world == world and e.verdict is None]
            while todo:
                todo = self._some(world, todo)
        return [entry.verdict for entry in self.entries if entry.verdict is not None]

    def _some(self, world: int, todo: Sequence[_Entry]) -> list[_Entry]:
        """Make references until they fill the disk's share, run their cases; return the rest."""
        ready = []
        for entry in todo:
            used = sum(r.path.stat().st_size for r in self._kept())
            if used > _MOST_REFERENCE_BYTES and entry.job.reference_key not in self._references:
                continue
            reference = self._reference(entry.job)
            if isinstance(reference, Reference):
                ready.append(entry)
            else:
                entry.verdict = _failed(entry.job, reference)
        for number, reports in self._launch("check", world, ready).items():
            entry = self.entries[number]
            entry.verdict = self._judge(entry.job, reports)
        self._trace(world, [e for e in ready if e.verdict and _diverged(e.verdict)])
        rest = [entry for entry in todo if entry.verdict is None]
        if rest:
            self._forget()
        return rest

    def _kept(self) -> list[Reference]:
        return [r for r in self._references.values() if isinstance(r, Reference)]

    def _forget(self) -> None:
        for reference in self._kept():
            reference.path.unlink()
            trace_path(reference).unlink(missing_ok=True)
        self._references.clear()

    def _reference(self, job: Job) -> Reference | Exception:
        key = job.reference_key
        if key not in self._references:
            path = self.folder / f"reference-{len(self._references)}.safetensors"
            try:
                self._references[key] = make_reference(job, path)
            except Exception as error:  # noqa: BLE001  # of one case; the others go on
                self._references[key] = error
        return self._references[key]

    def _launch(
        self, work: str, world: int, entries: Sequence[_Entry]
    ) -> dict[int, list[dict[str, Any]]]:
        """Run jobs on `world` ranks; return the ranks' reports of each, by its number.

        A job in which a rank fails gets one report that says so; the jobs behind it are launched
        again.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        left = list(entries)
        while left:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            paths = [self._references[e.job.reference_key].path for e in left]  # type: ignore[union-attr]
            jobs = [
                (e.number, asdict(e.job), str(path)) for e, path in zip(left, paths, strict=True)
            ]
            told = {"timeout_s": self.timeout_s, "jobs": jobs, "path": sys.path}
            (folder / "jobs.json").write_text(json.dumps(told))
            failure: RankFailed | None = None
            try:
                torchrun(_RANK_MODULE, [str(folder), work], world, threads=1)
            except Interrupted:
                raise
            except RankFailed as error:
                failure = error
            for entry in list(left):
                files = [folder / f"{entry.number}.{rank}.json" for rank in range(world)]
                if not all(file.exists() for file in files):
                    break
                found[entry.number] = [json.loads(file.read_text()) for file in files]
                left.remove(entry)
            if left:
                assert failure is not None
                error_report = {"error": in_words(failure), "exit_code": 1}
                found[left.pop(0).number] = [error_report]
        return found

    def _judge(self, job: Job, reports: Sequence[dict[str, Any]]) -> Verdict:
        broken = next((r for r in reports if r.get("error")), None)
        if broken is not None:
            error, exit_code = broken["error"], broken["exit_code"]
            return Verdict(False, job.model, job.plan, job.dtype, error=error, exit_code=exit_code)
        reference = self._references[job.reference_key]
        assert isinstance(reference, Reference)
        differences = merge(
            RankReport(r["replica"], r["squared"], frozenset(r["over_tp"]), frozenset(r["over_dp"]))
            for r in reports
        )
        return _verdict(job, reports, _judgement(job, reference, differences))

    def _trace(self, world: int, entries: Sequence[_Entry]) -> None:
        """Find out where runs that failed first differ."""
        for entry in entries:
            reference = self._references[entry.job.reference_key]
            assert isinstance(reference, Reference)
            if not trace_path(reference).exists():
                make_trace(entry.job, reference)
        for number, reports in self._launch("trace", world, entries).items():
            verdict = self.entries[number].verdict
            assert verdict is not None
            try:
                verdict.first_diverging = first_diverging(reports) or verdict.failed_tensors[0]
            except RankFailed as error:
                known = verdict.failed_tensors[0]
                verdict.first_diverging = f"{known} (no closer look: {error})"


def _judgement(job: Job, reference: Reference, differences: dict[str, float]) -> Judgement:
    norms = reference.norms
    if job.dtype == "float32":
        return judge_float32(differences, norms, own_difference(job, reference))
    first = judge(differences, norms)
    worst = max(first.errors.values(), default=0.0)
    if first.passed or worst > 1e-4:  # rounding is not what that is
        return first
    return judge(differences, norms, own_difference(job, reference))


def _verdict(job: Job, reports: Sequence[dict[str, Any]], judgement: Judgement) -> Verdict:
    predicted = sum(r["sent_bytes_predicted"] for r in reports if r["rank"] == 0)
    measured = sum((Fraction(r["sent_bytes_measured"]) for r in reports), Fraction(0))
    one = reports[0]
    worst = judgement.worst(_NUM_WORST)
    passed = judgement.passed and predicted == measured
    near = judgement.by_floor + judgement.by_noise
    return Verdict(
        passed=passed,
        model=job.model,
        plan=job.plan,
        dtype=job.dtype,
        worst_relative_error=worst[0][1],
        worst_tensor=worst[0][0],
        num_floor_tensors=len(near),
        sharded_flops_fraction=one["sharded_fraction"],
        sent_bytes_predicted=predicted,
        sent_bytes_measured=int(measured) if measured.denominator == 1 else float(measured),
        busiest_over_mean=one["imbalance"],
        parameter_bytes_fraction=max(r["parameter_bytes"][0] for r in reports)
        / max(1, one["parameter_bytes"][1]),
        worst_tensors=worst,
        failed_tensors=sorted(judgement.failed, key=_by_computation),
        floor_tensors=near,
        whole_ops=[tuple(op) for op in one["whole_ops"][:_NUM_WHOLE_OPS]],
        num_whole_ops=len(one["whole_ops"]),
        median_ratio=judgement.median_ratio,
        worst_ratio=judgement.worst_ratio,
        seconds=max(r["seconds"] for r in reports),
        exit_code=0 if passed else 1,
    )


_ORDER = ("outputs", "loss", "loss/1", "gradients", "loss/2", "loss/3", "buffers", "parameters")


def _by_computation(key: str) -> tuple[int, str]:
    return _ORDER.index(key if key in _ORDER else kind_of(key)), key


def _failed(job: Job, error: Exception) -> Verdict:
    exit_code = getattr(error, "exit_code", 1)
    return Verdict(
        False, job.model, job.plan, job.dtype, error=in_words(error), exit_code=exit_code
    )


def _diverged(verdict: Verdict) -> bool:
    return verdict.error is None and bool(verdict.failed_tensors)
