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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.data.sampler import shard_bounds
from meshuffle.dist.group import RankEnv, process_group, rank_env
from meshuffle.dist.sent_bytes import SentBytes
from meshuffle.errors import InputError, PlanError, RankFailed, in_words
from meshuffle.parallel.draws import draw_key
from meshuffle.parallel.gradients import sum_gradients
from meshuffle.parallel.lower import lower
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan
from meshuffle.verify.compare import Report
from meshuffle.verify.job import Job, build_model, loss_of, make_inputs, rows_of, tensors_of
from meshuffle.verify.reference import Reference, squared_difference, train


class Run:
    """One rank's part of a job.

    Args:
        job: what to check.
        reference: its result on one device.
        plan: of the job.
        ranks: the mesh of the plan.
    """

    def __init__(self, job: Job, reference: Reference, plan: Plan, ranks: Ranks) -> None:
        self.job, self.reference, self.plan, self.ranks = job, reference, plan, ranks
        self.where = "capture"
        model = build_model(job, job.torch_dtype)
        inputs = make_inputs(job, model, job.torch_dtype)
        samples = [torch.arange(*bounds) for bounds in shard_bounds(job.batch, plan.dp)]
        self.samples = samples[ranks.dp_rank]
        self.inputs = [x[self.samples] for x in inputs]
        self.num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
        # All replicas take the layouts of the smallest one: their parts must match.
        example = tuple(x[samples[-1]] for x in inputs)
        self.module = Parallel(
            model, example, plan.tp, ranks.tp_rank, prefer=plan.tp_kind, dp=plan.dp
        )
        is_fixed = self.module.assignment.program.graph.symbol is None
        if is_fixed and len(samples[0]) != len(samples[-1]):
            raise PlanError(
                f"plan '{job.plan}': the model fixes its batch, so that {plan.dp} replicas need a "
                f"batch that is a multiple of {plan.dp}, not {job.batch}"
            )
        start = reference.names("initial")
        self.module.load_whole({name: reference[f"initial/{name}"] for name in start})
        self.module.bind(ranks)
        for name, part in self.module.named_modules():  # the last conversion, for an error
            if name.startswith("tp"):
                part.register_forward_pre_hook(lambda *_, name=name: setattr(self, "where", name))

    def train(self) -> tuple[dict[str, Tensor], SentBytes]:
        """Train for three steps; return tensors by `kind/name`, and the bytes of the first."""
        facts, counted = self.reference.facts, SentBytes()
        known = dict(self.module.named_parameters(remove_duplicate=False))
        trained = {name: known[name] for name in self.reference.names("parameters")}

        def run_step(step: int) -> tuple[list[Tensor], Tensor]:
            self.where = f"step {step + 1}"
            self.ranks.draws.set(draw_key(self.job.seed, step), int(self.samples[0]))
            with counted if step == 0 else SentBytes():
                outputs = tensors_of(self.module(*self.inputs))
                loss = loss_of(outputs, facts.output_dims, self.samples, self.job)
                self.where += ", then backward"
                loss.backward()
            self.where = "sum of gradients"
            sum_gradients(self.module, self.ranks)
            return outputs, loss

        found, _ = train(trained, run_step, facts.learning_rate)
        for key in [key for key in found if key.startswith("loss/")]:
            dist.all_reduce(found[key], group=self.ranks.dp)
        found |= {f"parameters/{name}": p for name, p in trained.items()}
        buffers = self.module.named_buffers(remove_duplicate=False)
        return found | {f"buffers/{name}": x for name, x in buffers}, counted

    def check(self) -> dict[str, Any]:
        """Train, compare, and return a `Report` as plain data."""
        found, counted = self.train()
        squared: dict[str, float] = {}
        for key in self.reference.norms:
            expected = self._part(key)
            if key not in found or found[key].shape != expected.shape:
                raise RankFailed(f"{key} is {_shape(found.get(key))}, not {_shape(expected)}")
            squared[key] = squared_difference(found[key], expected)
        state = [key for key in squared if not key.startswith(("outputs/", "loss/"))]
        own = sum(p.numel() * p.itemsize for p in self.module.parameters())
        assignment = self.module.assignment
        ops = {op.name: op for op in assignment.program.graph.ops(assignment.program.ops_batch)}
        report = Report(
            self.ranks.dp_rank,
            squared,
            over_tp=[key for key in state if key.partition("/")[2] in self.module.shards],
            over_dp=[key for key in squared if key.startswith("outputs/")],
            sent_bytes_predicted=self.predicted() if self.ranks.tp_rank == 0 else 0,
            sent_bytes_measured=str(counted.by_label["values"]),
            sharded_fraction=assignment.sharded_fraction(),
            imbalance=assignment.imbalance(),
            whole_ops=[
                (ops[name].module, ops[name].target, share)
                for name, share in assignment.whole_flops()
            ],
            parameter_bytes_fraction=own / max(1, self.num_bytes),
        )
        return vars(report)

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
            again = assignment.resized(len(self.samples))
            code = lower(again, self.ranks.tp_rank, replicas=self.plan.dp)
        return sum(sent.forward + sent.backward for sent in code.sent)


def _shape(x: Tensor | None) -> str:
    return "absent" if x is None else "×".join(map(str, x.shape)) or "a number"


Work = Callable[[Run], dict[str, Any]]


def run_job(job: Job, reference: Path, plan: Plan, ranks: Ranks, work: Work) -> dict[str, Any]:
    """Do one job; return what `work` does, or `error` and `exit_code` where it cannot be done."""
    torch.set_num_threads(plan.threads or 1)
    run: Run | None = None
    failed: dict[str, Any] | None = None
    try:
        run = Run(job, Reference(reference), plan, ranks)
    except Exception as error:  # noqa: BLE001  # told to the other ranks, and to the parent
        failed = {"error": in_words(error), "exit_code": 2 if isinstance(error, InputError) else 1}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, failed)
    failed = next((t for t in told if t is not None), None)
    if failed is not None:
        return failed
    assert run is not None
    try:
        return work(run)
    except Exception as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        where = f"rank {dist.get_rank()} of {len(told)} at {run.where}"
        raise RankFailed(f"{where}: {text}") from error


def work_through(folder: Path, work: Work) -> None:
    """Do all jobs of a folder, and write what comes of each to `NUMBER.RANK.json`."""
    env = rank_env() or RankEnv()
    told = json.loads((folder / "jobs.json").read_text())
    sys.path.extend(path for path in told["path"] if path not in sys.path)
    meshes: dict[tuple[int, int], Ranks] = {}
    with process_group(env, torch.device("cpu"), told["timeout_s"]):
        for number, (values, path) in enumerate(told["jobs"]):
            began, job = time.monotonic(), Job(**values)
            plan = job.checked_plan()
            if (plan.dp, plan.tp) not in meshes:
                ranks = meshes[plan.dp, plan.tp] = join(plan, torch.device("cpu"))
                for group in (ranks.dp, ranks.tp):
                    group.set_timeout(datetime.timedelta(seconds=told["timeout_s"]))
            found = run_job(job, Path(path), plan, meshes[plan.dp, plan.tp], work)
            found["seconds"] = time.monotonic() - began
            target = folder / f"{number}.{env.rank}.json"
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(found))
            temporary.replace(target)
        dist.barrier()
