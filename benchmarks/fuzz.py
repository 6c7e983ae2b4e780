"""Random small models under random plans: does each compute what one device computes?

    python benchmarks/fuzz.py [--programs 100] [--seed 0] [--failures FOLDER] [--no-row]
                              [--again FILE…]

hypothesis draws programs (see `programs.py`), each with three plans of 2 and 3 ranks; verify
compares outputs, gradients, buffers and parameters of three steps in float64, and the outputs in
eval mode behind them. A program that differs or ends in an unexpected error is shrunk by leaving
out steps, and written to FOLDER as a Python file that says how it fails; so is the first program
that is refused for each reason, as it is. --again runs such files. Appends a row to
results/fuzz.csv. Ranks are forks of this process, which captures a program once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import verify_zoo  # its ranks are forks, and a model is captured once
from meshuffle.errors import InputError, RankFailed, in_words
from meshuffle.verify import api, reference
from meshuffle.verify.job import Job, build_model, make_inputs, raised_casts, tensors_of
from meshuffle.verify.rank import Run
from programs import KINDS, Program, programs
from rows import append

AT_ONCE, TIMEOUT_S = 20, 30
_OF_A_RUN = 8
ENGINE = ("graph", "layout", "planner", "parallel", "verify")
_ONE_DEVICE = "one device cannot run it"


def make_reference(job: Job, path: Path) -> reference.Reference:
    """Return the reference.

    Raises:
        InputError: one device cannot do it, so that the program is none.
    """
    try:
        model = build_model(job, torch.float64)
        for replicas in job.micro_batches():
            parts = [x[torch.cat(replicas)] for x in make_inputs(job, model, torch.float64)]
            torch.stack([x.sum() for x in tensors_of(model(*parts))]).sum().backward()
    except Exception as error:
        raise InputError(f"{_ONE_DEVICE}: {in_words(error)}") from error
    return reference.make_reference(job, path)


def captured_reference(job: Job, path: Path) -> reference.Reference:
    """Return `make_reference`, behind a capture in both modes that the ranks will have."""
    model = build_model(job, torch.float64, filled=False)
    inputs = make_inputs(job, model, torch.float64)
    for mode in (True, False):
        try:
            with raised_casts(torch.float64):
                verify_zoo.capture_once(model, inputs, train=mode)
        except Exception:  # noqa: BLE001  # the reference says it, or the ranks
            break
    result: reference.Reference = verify_zoo.in_fork(make_reference)(job, path)
    return result


def check(run: Run) -> dict[str, Any]:
    """Do what verify's ranks do.

    Raises:
        RankFailed: the rank does not come to an end.
    """

    def give_up(*_: Any) -> None:
        raise RankFailed(f"timed out after {TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * TIMEOUT_S)
    with raised_casts(run.job.torch_dtype):
        run.module.eval().train()  # both codes exist, and one does not disturb the other
    report = run.check()
    signal.alarm(0)
    return report


api.make_reference = captured_reference
verify_zoo.WORKS["check"] = check


class File:
    """A program in a file, as `write` leaves them: how it is to be run is in its docstring."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps = path, ()
        found = re.search(r"--plan (\S+) --input (\S+) --batch (\d+)", path.read_text())
        assert found is not None, f"{path} does not say how to run it"
        self.plans, self.inputs, self.batch = found[1].split("/"), found[2], int(found[3])

    def source(self) -> str:
        """Return the file."""
        return self.path.read_text()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a program under one of its plans.

    Attributes:
        result: `equal`, `differs`, `refused`, `crashed`, `hangs` or `invalid`, where one device
            cannot run it.
        reason: what differs first, or the error without what is the program's own.
        text: the whole of it.
    """

    program: Program | File
    plan: str
    result: str
    reason: str = ""
    text: str = ""

    @property
    def is_fault(self) -> bool:
        """The engine's, or the generator's."""
        return self.result in ("differs", "crashed", "hangs")

    def is_like(self, other: Outcome) -> bool:
        """Tell whether the same went wrong."""
        same = self.result == other.result
        return same and (self.result == "differs" or self.reason == other.reason)


class Runner:
    """Verifies programs, which lie as modules in a folder that ranks import from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        sys.path.insert(0, str(folder))

    def run(self, some: Sequence[Program | File]) -> list[Outcome]:
        """Verify programs under their plans, in as few launches as there are numbers of ranks."""
        cases, known = [], []
        for program in some:
            name = f"fuzzed_{next(self.numbers)}"
            (self.folder / f"{name}.py").write_text(program.source())
            for plan in program.plans:
                cases.append((f"{name}:Model", plan, program.inputs, program.batch))
                known.append((program, plan))
        importlib.invalidate_caches()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts = api.verify(cases, timeout_s=TIMEOUT_S)
        for name in {case[0].partition(":")[0] for case in cases}:
            sys.modules.pop(name, None)
        verify_zoo.forget()
        return [_outcome(*key, verdict) for key, verdict in zip(known, verdicts, strict=True)]

    def shrink(self, outcome: Outcome) -> Outcome:
        """Return the same fault of the smallest program that leaving out parts leads to."""
        if not outcome.program.steps:
            return outcome
        while smaller := _smaller(dataclasses.replace(outcome.program, plans=(outcome.plan,))):
            alike = [o for o in self.run(smaller) if o.is_like(outcome)]
            if not alike:
                return outcome
            steps = [
                step
                for step in outcome.program.steps
                if all(step in o.program.steps for o in alike)
            ]
            both = dataclasses.replace(alike[0].program, steps=tuple(steps))
            together = [o for o in self.run([both]) if o.is_like(outcome)] if len(alike) > 1 else []
            outcome = (together or alike)[0]
        return outcome


def _smaller(program: Program) -> list[Program]:
    """Return programs with a part less, or a simpler one."""
    steps = program.steps
    parts = [steps[:i] + steps[i + 1 :] for i in range(len(steps))]
    found = [dataclasses.replace(program, steps=part) for part in parts]
    if program.has_head:
        found.append(dataclasses.replace(program, has_head=False))
    if program.start:
        found.append(dataclasses.replace(program, start=0))
    return found


def _outcome(program: Program | File, plan: str, verdict: api.Verdict) -> Outcome:
    text = verdict.error or ""
    if verdict.passed:
        return Outcome(program, plan, "equal")
    if _ONE_DEVICE in text:
        return Outcome(program, plan, "invalid", text.partition(": ")[2][:100], text)
    if verdict.error:
        result = "hangs" if re.search("[Tt]ime(d )?out", text) else "crashed"
        return Outcome(
            program, plan, "refused" if verdict.exit_code == 2 else result, _plain(text), text
        )
    if not verdict.failed_tensors:
        sent = f"{verdict.sent_bytes_predicted} bytes predicted, {verdict.sent_bytes_measured} sent"
        return Outcome(program, plan, "differs", "bytes", sent)
    first = verdict.first_diverging or ""
    worst = f"{verdict.worst_tensor} by {verdict.worst_relative_error:.1e}; first {first}"
    return Outcome(program, plan, "differs", _plain(first), worst)


def _plain(text: str) -> str:
    """Return an error without the numbers and names that are of one program."""
    text = re.sub(r"[Pp]lan '?[a-z]\w*=\S+", "plan", text)
    text = re.sub(r"\bin (f\d+\S*|its forward)", "", text)
    return re.sub(r"\d+", "N", text)[:160]


def drawn(num: int, number: int) -> list[Program]:
    """Return the programs of a seed.

    hypothesis begins with simple ones, and behind ten it varies what it has drawn: of its runs,
    each of which has a seed of its own, those between are taken.
    """
    made: list[Program] = []
    for i in range(0, num, _OF_A_RUN):
        made += _drawn_together(number << 32 | i)[-_OF_A_RUN:]
    return made[:num]


def _drawn_together(number: int) -> list[Program]:
    made: list[Program] = []

    @seed(number)
    @settings(
        max_examples=_OF_A_RUN + 2,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def keep(program: Program) -> None:
        made.append(program)

    keep()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="skip as many")
    parser.add_argument("--again", nargs="*", type=Path, default=[], help="files of programs")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--no-row", action="store_true")
    options = parser.parse_args()
    made = [*map(File, options.again), *drawn(options.programs, options.seed)[options.first :]]
    began, outcomes, shrunk = time.monotonic(), [], set()
    with tempfile.TemporaryDirectory(prefix="meshuffle-fuzz-") as folder:
        runner = Runner(Path(folder))
        for first in range(0, len(made), AT_ONCE):
            outcomes += runner.run(made[first : first + AT_ONCE])
            for outcome in outcomes[-3 * AT_ONCE :]:
                if outcome.result != "equal" and (outcome.result, outcome.reason) not in shrunk:
                    shrunk.add((outcome.result, outcome.reason))
                    outcome = runner.shrink(outcome) if outcome.is_fault else outcome
                    write(outcome, options.failures, len(shrunk))
            print(f"{first + AT_ONCE}: {_counts(outcomes)}", file=sys.stderr, flush=True)
    row = summary(outcomes, time.monotonic() - began)
    print_table(row, outcomes)
    if not options.no_row:
        append(
            "fuzz",
            [{"seed": options.seed, **row, "torch": torch.__version__, "engine": engine_hash()}],
        )
    return int(any(outcome.is_fault for outcome in outcomes))


def write(outcome: Outcome, folder: Path, number: int) -> None:
    """Write a fault as a Python file that can be sent with a bug report."""
    folder.mkdir(parents=True, exist_ok=True)
    program, name = outcome.program, f"{outcome.result}_{number}"
    head = (
        f'"""{outcome.result}: {outcome.text}\n\n    meshuffle verify --model {name}:Model '
        f'--plan {outcome.plan} --input {program.inputs} --batch {program.batch}\n"""\n\n'
    )
    file = folder / f"{name}.py"
    file.write_text(f"{head}{program.source()}\n\n# {program}\n")
    print(f"{file}: {outcome.plan}: {outcome.text}", file=sys.stderr, flush=True)


def _counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.result for outcome in outcomes).most_common())


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the figures of a run."""
    results = ("equal", "differs", "crashed", "hangs", "refused", "invalid")
    counts, made = _counts(outcomes), {id(o.program): o.program for o in outcomes}
    refused = {id(o.program) for o in outcomes if o.result == "refused"}
    kinds = Counter(kind for p in made.values() for kind in {step.kind for step in p.steps})
    return {
        "programs": len(made),
        "cases": len(outcomes),
        **{result: counts.get(result, 0) for result in results},
        "programs_refused": len(refused),
        "rarest_kind_percent": round(100 * min(kinds[k] for k in KINDS) / len(made), 1),
        "s_per_program": round(seconds / len(made), 2),
    }


def print_table(row: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Print the figures, each reason with its count, and the share of each kind of step."""
    for key, value in row.items():
        print(f"{key:<20} {value}")
    reasons = Counter((o.result, o.reason) for o in outcomes if o.result != "equal")
    for (result, reason), count in reasons.most_common():
        print(f"{count:6}  {result}: {reason}")
    made = {id(o.program): o.program for o in outcomes}.values()
    kinds = Counter(kind for p in made for kind in {step.kind for step in p.steps})
    print(", ".join(f"{kind} {100 * kinds[kind] / len(made):.0f} %" for kind in KINDS))


def engine_hash() -> str:
    """Return a hash of the engine's files."""
    source, digest = Path(api.__file__).parents[1], hashlib.sha256()
    for path in sorted(path for folder in ENGINE for path in (source / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    torch.set_num_threads(1)  # what is to be forked must not have started threads
    raise SystemExit(main())
