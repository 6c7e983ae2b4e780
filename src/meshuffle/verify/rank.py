"""What a rank of a verification does: train for three steps, and compare with the reference.

`python -m meshuffle.verify FOLDER` is what torchrun starts. The ranks stay together over all jobs
of the folder. What fails alike on all ranks, before they talk, ends one job; any other error
ends the launch, since the others would wait for this rank, and the parent starts the rest again.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.dist.group import RankEnv, process_group, rank_env
from meshuffle.dist.sent_bytes import SentBytes
from meshuffle.errors import InputError, PlanError, RankFailed, in_words
from meshuffle.layout.assign import Assignment
from meshuffle.layout.call import Program
from meshuffle.parallel.draws import draw_key
from meshuffle.parallel.gradients import sum_gradients
from meshuffle.parallel.lower import lower
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan
from meshuffle.verify.job import (
    MOMENTUM,
    NUM_STEPS,
    Job,
    build_model,
    checked_plan,
    loss_of,
    make_inputs,
    rows_of,
    samples_of,
    tensors_of,
)
from meshuffle.verify.reference import Reference, squared_difference


@dataclass
class Report:
    """What a rank tells the parent of a job; plain data.

    Attributes:
        replica, rank: place on the axes `dp` and `tp`.
        squared: ‖a − b‖² of its part of each tensor, by `kind/name`.
        over_tp, over_dp: see `compare.RankReport`.
        sent_bytes_measured: of this rank, in one forward and backward, as a fraction.
        sent_bytes_predicted: of this rank's replica.
        sharded_fraction, imbalance: see `Assignment`.
        parameter_bytes: that this rank keeps, and those of the whole model.
        whole_ops: (module, op, share of all FLOPs) of ops that every rank does all of.
        error: why there is nothing else here; `exit_code` is that of errors.py.
    """

    replica: int = 0
    rank: int = 0
    squared: dict[str, float] = field(default_factory=dict)
    over_tp: list[str] = field(default_factory=list)
    over_dp: list[str] = field(default_factory=list)
    sent_bytes_measured: str = "0"
    sent_bytes_predicted: int = 0
    sharded_fraction: float = 0.0
    imbalance: float = 1.0
    parameter_bytes: tuple[int, int] = (0, 0)
    whole_ops: list[tuple[str, str, float]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    exit_code: int = 1


class Run:
    """One rank's part of a job.

    Args:
        job: what to check.
        reference: its result on one device.
        ranks: the mesh of the plan.
    """

    def __init__(self, job: Job, reference: Reference, plan: Plan, ranks: Ranks) -> None:
        self.job, self.reference, self.plan, self.ranks = job, reference, plan, ranks
        self.where = "capture"
        model = build_model(job, job.torch_dtype)
        inputs = make_inputs(job, model, job.torch_dtype)
        samples = [samples_of(job, plan, replica) for replica in range(plan.dp)]
        self.samples = samples[ranks.dp_rank]
        self.inputs = [x[self.samples] for x in inputs]
        self.num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
        # All replicas take the layouts of the smallest one: their parts must match.
        example = tuple(x[samples[-1]] for x in inputs)
        self.module = Parallel(
            model, example, plan.tp, ranks.tp_rank, prefer=plan.tp_kind, dp=plan.dp
        )
        if (
            len(samples[0]) != len(samples[-1])
            and self.module.assignment.program.graph.symbol is None
        ):
            raise PlanError(
                f"plan '{job.plan}': the model fixes its batch, so that {plan.dp} replicas need a "
                f"batch that is a multiple of {plan.dp}, not {job.batch}"
            )
        self._load()
        self.module.bind(ranks)
        self._note_calls()

    def _load(self) -> None:
        start = {k: k for k in self.reference.keys if k.startswith("initial/")}
        whole = {k.removeprefix("initial/"): self.reference[k] for k in start}
        self.module.load_whole(whole)

    def _note_calls(self) -> None:
        """Keep the name of the last conversion, for the message if it fails."""
        for name, module in self.module.named_modules():
            if name.startswith("tp"):
                module.register_forward_pre_hook(lambda _, __, name=name: self._at(name))

    def _at(self, name: str) -> None:
        self.where = name

    def train(self) -> tuple[dict[str, Tensor], SentBytes]:
        """Train for three steps; return the kinds `outputs`, `loss`, `gradients`, and the bytes."""
        facts = self.reference.facts
        trained = self.trained()
        optimizer = torch.optim.SGD(trained.values(), lr=facts.learning_rate, momentum=MOMENTUM)
        found: dict[str, Tensor] = {}
        losses, counted = [], SentBytes()
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            with counted if step == 0 else SentBytes():
                outputs, loss = self.forward(step)
                self.where += ", then backward"
                loss.backward()
            self.where = "sum of gradients"
            sum_gradients(self.module, self.ranks)
            losses.append(loss.detach())
            if step == 0:
                found |= {f"outputs/{i}": x.detach().clone() for i, x in enumerate(outputs)}
                for name, p in trained.items():
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    found[f"gradients/{name}"] = grad.clone()
            optimizer.step()
        total = torch.stack(losses)
        dist.all_reduce(total, group=self.ranks.dp)
        found |= {f"loss/{i}": x for i, x in enumerate(total, 1)}
        return found, counted

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters by the reference's names."""
        known = dict(self.module.named_parameters(remove_duplicate=False))
        keys = (key for key in self.reference.norms if key.startswith("parameters/"))
        return {
            key.removeprefix("parameters/"): known[key.removeprefix("parameters/")] for key in keys
        }

    def forward(self, step: int) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of this replica, and its part of the loss."""
        self.where = f"step {step + 1}"
        first = int(self.samples[0])
        self.ranks.draws.set(draw_key(self.job.seed, step), first)
        outputs = tensors_of(self.module(*self.inputs))
        return outputs, loss_of(outputs, self.reference.facts.output_dims, self.samples, self.job)

    def check(self) -> Report:
        """Train, compare, and tell."""
        found, counted = self.train()
        found |= {f"parameters/{name}": p for name, p in self.trained().items()}
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        for key in self.reference.norms:
            if key.startswith("buffers/"):
                found[key] = buffers[key.removeprefix("buffers/")]
        assignment = self.module.assignment
        report = Report(
            self.ranks.dp_rank,
            self.ranks.tp_rank,
            sent_bytes_measured=str(counted.by_label["values"]),
            sent_bytes_predicted=self.predicted(),
            sharded_fraction=assignment.sharded_fraction(),
            imbalance=assignment.imbalance(),
            whole_ops=_whole_ops(assignment),
        )
        own = sum(p.numel() * p.itemsize for p in self.module.parameters())
        report.parameter_bytes = (own, self.num_bytes)
        for key in self.reference.norms:
            expected = self._part(key)
            if key not in found or found[key].shape != expected.shape:
                raise RankFailed(f"{key} is {_shape(found.get(key))}, not {_shape(expected)}")
            report.squared[key] = squared_difference(found[key], expected)
            kind, _, name = key.partition("/")
            if name in self.module.shards and kind not in ("outputs", "loss"):
                report.over_tp.append(key)
            elif kind == "outputs":
                report.over_dp.append(key)
        return report

    def _part(self, key: str) -> Tensor:
        """Return what this rank should have of a tensor of the reference."""
        kind, _, name = key.partition("/")
        whole = self.reference[key]
        if kind == "outputs":
            dim = self.reference.facts.output_dims[int(name)]
            return rows_of(whole, dim, self.samples, self.job.batch)
        return whole if kind == "loss" else self.module.cut(name, whole)

    def predicted(self) -> int:
        """Return the bytes that this replica's ranks send in a forward and a backward."""
        code, assignment = self.module.lowered, self.module.assignment
        if len(self.samples) != assignment.program.batch:
            again = resized(assignment, len(self.samples))
            code = lower(again, self.ranks.tp_rank, replicas=self.plan.dp)
        return sum(sent.forward + sent.backward for sent in code.sent)


def resized(assignment: Assignment, batch: int) -> Assignment:
    """Return the same choices for another number of samples."""
    from meshuffle.layout.convert import Value

    program = Program(assignment.program.graph, batch, assignment.program.world)
    nodes = {node.name: node for node in program.fx.nodes}
    values = {
        name: Value(
            program.shape(nodes[name]),
            value.itemsize,
            value.has_grad,
            batch,
            value.world,
            stored=value.stored,
        )
        for name, value in assignment.values.items()
    }
    return Assignment(program, assignment.choices, values, assignment.flops)


def _whole_ops(assignment: Assignment) -> list[tuple[str, str, float]]:
    """Return (module, op, share of FLOPs) of ops that run whole on every rank, largest first."""
    total = sum(assignment.flops.values())
    ops = {op.name: op for op in assignment.program.graph.ops(assignment.program.ops_batch)}
    whole = [n for n in assignment.flops if assignment.choices[n].split is None]
    whole.sort(key=lambda name: -assignment.flops[name])
    return [(ops[n].module, ops[n].target, assignment.flops[n] / total) for n in whole]


def _shape(x: Tensor | None) -> str:
    return "absent" if x is None else "×".join(map(str, x.shape)) or "a number"


Work = Callable[[Run], Any]


class Team:
    """This rank among the others, over many jobs."""

    def __init__(self, env: RankEnv, timeout_s: float) -> None:
        self.env, self.timeout_s = env, timeout_s
        self._meshes: dict[tuple[int, int], Ranks] = {}

    def mesh(self, plan: Plan) -> Ranks:
        """Return the groups of a plan; made once."""
        key = (plan.dp, plan.tp)
        if key not in self._meshes:
            ranks = self._meshes[key] = join(plan, torch.device("cpu"))
            for group in (ranks.dp, ranks.tp):
                group.set_timeout(datetime.timedelta(seconds=self.timeout_s))
        return self._meshes[key]

    def run(self, job: Job, reference: Path, work: Work) -> Any:
        """Do one job; return what `work` does, or a report of why it cannot be done."""
        plan = checked_plan(job)
        torch.set_num_threads(plan.threads or 1)
        run: Run | None = None
        failed: tuple[str, int] | None = None
        ranks = self.mesh(plan)
        try:
            run = Run(job, Reference(reference), plan, ranks)
        except Exception as error:  # noqa: BLE001  # told to the other ranks, and to the parent
            failed = in_words(error), 2 if isinstance(error, InputError) else 1
        told: list[Any] = [None] * self.env.world
        dist.all_gather_object(told, failed)
        first = next((t for t in told if t is not None), None)
        if first is not None:
            return Report(ranks.dp_rank, ranks.tp_rank, error=first[0], exit_code=first[1])
        assert run is not None
        try:
            return work(run)
        except Exception as error:
            rank, world = self.env.rank, self.env.world
            text = str(error).partition("\n")[0] or type(error).__name__
            raise RankFailed(f"rank {rank} of {world} at {run.where}: {text}") from error


def work_through(folder: Path, work: Work) -> None:
    """Do all jobs of a folder, and write what comes of each to `NUMBER.RANK.json`."""
    env = rank_env() or RankEnv()
    told = json.loads((folder / "jobs.json").read_text())
    sys.path.extend(path for path in told["path"] if path not in sys.path)
    with process_group(env, torch.device("cpu"), told["timeout_s"]):
        team = Team(env, told["timeout_s"])
        for number, job, path in told["jobs"]:
            began = time.monotonic()
            found = team.run(Job(**job), Path(path), work)
            if isinstance(found, Report):
                found.seconds = time.monotonic() - began
                found = asdict(found)
            target = folder / f"{number}.{env.rank}.json"
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(found))
            temporary.replace(target)
        dist.barrier()
