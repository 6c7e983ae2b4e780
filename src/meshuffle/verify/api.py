"""`verify`: many checks with few launches, each with a verdict."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from meshuffle.comm.launch import torchrun
from meshuffle.errors import CaptureError, InputError, RankFailed, in_words
from meshuffle.verify.compare import Judgement, Report, judge, judge_float32, kind_of, merge
from meshuffle.verify.job import DTYPES, Job, Model, name_of
from meshuffle.verify.reference import Reference, make_reference, own_difference
from meshuffle.verify.trace import first_diverging, make_trace

_MOST_REFERENCE_BYTES = 8 << 30
_NUM_WORST = 5
_NUM_ROUNDED = 8
_MOST_NOISE = 1e-2  # in float64: what is further off is not rounding
_RANK_MODULE = "meshuffle.verify"

Case = tuple[Model, str, str] | tuple[Model, str, str, int]
"""(model, plan, input) or (model, plan, input, batch)."""


@dataclass
class Verdict:
    """The result of a check.

    Attributes:
        passed: all tensors are equal as DESIGN 4.1 defines it, and the bytes were predicted.
        model, plan, dtype: the case.
        worst_relative_error: the largest ‖a − b‖ / (‖b‖ + 0.01·S·√numel).
        worst_tensor: its `kind/name`; of those that failed, if any did.
        num_floor_tensors: tensors judged by the floor or by the reference's noise.
        sharded_flops_fraction: fraction of FLOPs in ops of which each rank does a part, 0 … 1.
        sent_bytes_predicted, sent_bytes_measured: by all ranks in one forward and backward,
            without the sums of parameter gradients.
        busiest_over_mean: FLOPs of the busiest rank over the mean.
        parameter_bytes_fraction: parameters kept by the rank that keeps most, over the model's.
        worst_tensors: the few worst, with their errors.
        failed_tensors: all that are not equal.
        floor_tensors: those of `num_floor_tensors`.
        first_diverging: where a run that failed first differs, in the order of computation.
        whole_ops: (module, op, fraction of FLOPs) of the largest ops that all ranks run whole.
        num_whole_ops: how many those are.
        median_ratio, worst_ratio: error over that of one device; float32 only.
        seconds: how long the ranks took.
        undecided: equal only by more than 1e-7 of one device's own rounding, so it has not passed.
        float32_only: what a kernel says that lacks float64; both runs were in float32 then.
        as_written: why the model was not captured, but ran as it is written (plans of dp alone).
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
    undecided: bool = False
    float32_only: str = ""
    as_written: str = ""
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
        seed: seed of weights, inputs and random masks.
        timeout_s: how long a rank waits for the others, seconds.

    Raises:
        InputError: an unknown dtype. What is wrong with one case is in its verdict.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}': verify takes {' and '.join(DTYPES)}")
    with tempfile.TemporaryDirectory(prefix="meshuffle-verify-") as folder:
        entries = [
            _entry(model, Job(str(model), plan, text, own[0] if own else batch, dtype, seed))
            for model, plan, text, *own in cases
        ]
        _Session(Path(folder), timeout_s).run([entry for entry in entries if entry.world])
        return [entry.verdict for entry in entries]


@dataclass
class _Entry:
    """A case on its way to its verdict; `world` is 0 where it cannot be launched."""

    job: Job
    world: int = 0
    float32_only: str = ""
    reference: Reference = field(init=False)
    verdict: Verdict = field(init=False)

    def fail(self, error: str, exit_code: int) -> None:
        job = self.job
        self.verdict = Verdict(False, job.model, job.plan, job.dtype)
        self.verdict.error, self.verdict.exit_code = error, exit_code


def _entry(model: Model, job: Job) -> _Entry:
    entry = _Entry(job)
    try:
        entry.job = replace(job, model=name_of(model))
        entry.world = job.checked_plan().num_ranks
    except InputError as error:
        entry.fail(in_words(error), error.exit_code)
    return entry


class _Session:
    """What the cases of one call of `verify` share: references, and the files of launches."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.references: dict[Any, Reference | Exception] = {}

    def run(self, entries: Iterable[_Entry]) -> None:
        """Launch the cases of each number of ranks, as many as their references fit on the disk."""
        ordered = sorted(entries, key=lambda entry: (entry.world, entry.job.reference_key))
        for _, same in itertools.groupby(ordered, key=lambda entry: entry.world):
            ready: list[_Entry] = []
            for entry in same:
                files = self.folder.glob("reference-*/*")
                used = sum(file.stat().st_size for file in files)
                if used > _MOST_REFERENCE_BYTES and entry.job.reference_key not in self.references:
                    self._check(ready)
                    ready = []
                    self.references.clear()
                    for path in self.folder.glob("reference-*"):
                        shutil.rmtree(path)
                reference = self._reference(entry.job)
                if entry.job.dtype == "float64" and "Double" in str(reference):  # its kernels
                    entry.float32_only = str(reference).partition("\n")[0]
                    entry.job = replace(entry.job, dtype="float32", reference_dtype="float32")
                    reference = self._reference(entry.job)
                if isinstance(reference, Reference):
                    entry.reference = reference
                    ready.append(entry)
                else:
                    entry.fail(in_words(reference), getattr(reference, "exit_code", 1))
            self._check(ready)

    def _reference(self, job: Job) -> Reference | Exception:
        key = job.reference_key
        known = self.references.get(key)
        if known is None or isinstance(known, CaptureError):  # with dp alone it runs
            path = Path(tempfile.mkdtemp(prefix="reference-", dir=self.folder))
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(job.threads)
                self.references[key] = make_reference(job, path)
            except Exception as error:  # noqa: BLE001  # of one case; the others go on
                self.references[key] = error
            finally:
                torch.set_num_threads(threads)
        return self.references[key]

    def _check(self, entries: Sequence[_Entry]) -> None:
        """Run and judge cases of one number of ranks, and look closer at those that differ."""
        for entry, reports in zip(entries, self._launch("check", entries), strict=True):
            if "error" in reports[0]:
                entry.fail(reports[0]["error"], reports[0]["exit_code"])
            else:
                own = [Report(**report) for report in reports]
                entry.verdict = _verdict(entry.job, entry.reference, own)
                entry.verdict.float32_only = entry.float32_only
        differing = [e for e in entries if e.verdict.failed_tensors and _has_trace(e)]
        for entry, reports in zip(differing, self._launch("trace", differing), strict=True):
            first = entry.verdict.failed_tensors[0]
            if "error" in reports[0]:
                first += f" (no closer look: {reports[0]['error']})"
            else:
                first = first_diverging(reports) or first
            entry.verdict.first_diverging = first

    def _launch(self, work: str, entries: Sequence[_Entry]) -> list[list[dict[str, Any]]]:
        """Do the jobs on ranks; return the ranks' reports on each.

        A job in which a rank fails gets one report that says so; the jobs behind it are launched
        again.
        """
        reports: list[list[dict[str, Any]]] = []
        while left := entries[len(reports) :]:
            folder, world = Path(tempfile.mkdtemp(dir=self.folder)), left[0].world
            jobs = [(asdict(entry.job), str(entry.reference.path)) for entry in left]
            settings = {"timeout_s": self.timeout_s, "jobs": jobs, "path": sys.path}
            (folder / "jobs.json").write_text(json.dumps(settings))
            failure: RankFailed | None = None
            try:
                torchrun(_RANK_MODULE, [str(folder), work], world, threads=1)
            except RankFailed as error:
                failure = error
            for number in range(len(left)):
                files = [folder / f"{number}.{rank}.json" for rank in range(world)]
                if not all(file.exists() for file in files):
                    assert failure is not None
                    reports.append([{"error": in_words(failure), "exit_code": 1}])
                    break
                reports.append([json.loads(file.read_text()) for file in files])
        return reports


def _has_trace(entry: _Entry) -> bool:
    """Make the trace of a reference where there is none yet; a verdict says where that fails."""
    entry.verdict.first_diverging = entry.verdict.failed_tensors[0]
    if entry.verdict.as_written:
        return False
    try:
        if not entry.reference.trace_path.exists():
            make_trace(entry.job, entry.reference)
    except Exception as error:  # noqa: BLE001  # the verdict stands without it
        first = entry.verdict.failed_tensors[0]
        entry.verdict.first_diverging = f"{first} (no closer look: {in_words(error)})"
        return False
    return True


def _verdict(job: Job, reference: Reference, reports: Sequence[Report]) -> Verdict:
    judgement = _judgement(job, reference, merge(reports))
    predicted = sum(report.sent_bytes_predicted for report in reports)
    measured = sum((Fraction(report.sent_bytes_measured) for report in reports), Fraction(0))
    worst = judgement.worst(_NUM_WORST)
    as_written = reports[0].as_written  # then nobody predicts what it sends
    undecided = judgement.passed and bool(judgement.excused)
    passed = judgement.passed and not undecided and (predicted == measured or bool(as_written))
    layout_facts = dict(reports[0].layout_facts)
    layout_facts["whole_ops"] = [tuple(op) for op in layout_facts["whole_ops"]]
    return Verdict(
        passed=passed,
        model=job.model,
        plan=job.plan,
        dtype=job.dtype,
        worst_relative_error=worst[0][1],
        worst_tensor=worst[0][0],
        num_floor_tensors=len(judgement.near),
        sent_bytes_predicted=None if as_written else predicted,
        sent_bytes_measured=int(measured) if measured.denominator == 1 else float(measured),
        parameter_bytes_fraction=max(report.parameter_bytes_fraction for report in reports),
        worst_tensors=worst,
        failed_tensors=sorted([*judgement.failed, *judgement.excused], key=_by_computation),
        floor_tensors=judgement.near,
        median_ratio=judgement.median_ratio,
        worst_ratio=judgement.worst_ratio,
        seconds=max(report.seconds for report in reports),
        undecided=undecided,
        as_written=as_written,
        exit_code=0 if passed else 1,
        **layout_facts,
    )


def _judgement(job: Job, reference: Reference, differences: dict[str, float]) -> Judgement:
    """Judge; where that fails, measure what one device's own rounding does, and judge again."""
    if job.dtype == "float64":
        judgement = judge(differences, reference.norms)
        if judgement.passed or max(judgement.errors.values(), default=0.0) > _MOST_NOISE:
            return judgement
    for num_rounded in (0, _NUM_ROUNDED):
        if num_rounded not in reference.noise:  # of all plans that are compared with it
            noise = own_difference(job, reference, num_rounded=num_rounded)
            reference.noise[num_rounded] = noise
        judged = judge if job.dtype == "float64" else judge_float32
        judgement = judged(differences, reference.norms, reference.noise[num_rounded])
        if judgement.passed:
            break
    return judgement


_ORDER = (
    *("outputs", "loss", "loss/1", "gradients", "loss/2", "loss/3", "buffers", "parameters"),
    "eval",
)


def _by_computation(key: str) -> tuple[int, str]:
    return _ORDER.index(key if key in _ORDER else kind_of(key)), key
