"""What a rank of a verification does: train for three steps, and compare with the reference.

`python -m meshuffle.verify FOLDER` is what torchrun starts. The ranks stay together over all jobs
of the folder. An error that all ranks meet alike, before they communicate, ends one job. Any
other error ends the launch, since the others would wait for this rank; the parent then launches
the rest again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.group import RankEnv, process_group, rank_env
from meshuffle.comm.sent_bytes import SentBytes
from meshuffle.errors import InputError, PlanError, RankFailed, in_words
from meshuffle.layout.traffic import predicted_bytes
from meshuffle.parallel.build import build
from meshuffle.parallel.data_parallel import MODES, DataParallel
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.random_masks import draw_key
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.parallel.replica import Replica
from meshuffle.planner.plan import Plan
from meshuffle.verify.compare import Report
from meshuffle.verify.job import (
    Job,
    build_model,
    join_rows,
    loss_of,
    make_inputs,
    raised_casts,
    rows_of,
    tensors_of,
)
from meshuffle.verify.reference import NUM_STEPS, Reference, squared_difference, train

_NUM_WHOLE_OPS = 5


@dataclass(frozen=True)
class Part:
    """What a replica has of a step.

    Attributes:
        samples: its samples of each micro-batch.
        firsts: how many samples of a micro-batch are of replicas before it.
        inputs: of each micro-batch.
    """

    samples: list[Tensor]
    firsts: list[int]
    inputs: list[tuple[Tensor, ...]]


class Run:
    """One rank's part of a job.

    Args:
        job: what to check.
        reference: its result on one device.
        plan: the job's plan.
        ranks: the mesh of the plan.
    """

    def __init__(self, job: Job, reference: Reference, plan: Plan, ranks: Ranks) -> None:
        self.job, self.reference, self.plan, self.ranks = job, reference, plan, ranks
        self.where = "capture"
        model = build_model(job, job.torch_dtype, filled=False)
        inputs = make_inputs(job, model, job.torch_dtype)
        self.steps = [self._part_of_step(inputs, size) for size in reference.facts.sizes]
        self.parts, self.firsts = self.steps[0].samples, self.steps[0].firsts
        self.samples = torch.cat(self.parts)
        self.inputs = tuple(x[self.samples] for x in inputs)
        self.num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
        sizes = {len(part) for replicas in job.micro_batches() for part in replicas}
        # All replicas take the layouts and cuts of the smallest one: their parts must match.
        example = tuple(x[: max(2, min(sizes))] for x in inputs)
        cpu = torch.device("cpu")
        with raised_casts(job.torch_dtype):
            self.module = build(model, example, plan, ranks, cpu, always_pipeline=True)
        assert self.module.pipeline is not None
        self.pipeline = self.module.pipeline
        self.captured = self.module if isinstance(self.module, Parallel) else None
        is_fixed = self.captured and self.captured.assignment.program.graph.symbol is None
        if is_fixed and len(sizes) > 1:
            num = plan.dp * plan.num_micro_batches
            raise PlanError(
                f"plan '{job.plan}': the model fixes its batch, so that {plan.dp} replicas and "
                f"{plan.num_micro_batches} micro-batches need a batch that is a multiple of {num}, "
                f"not {job.batch}"
            )
        own = self.module.state_dict()
        self.module.load_whole({name: reference[f"initial/{name}"] for name in own})
        for name, part in self.module.named_modules():  # an error names the last redistribution
            if name.startswith("tp"):
                part.register_forward_pre_hook(lambda *_, name=name: setattr(self, "where", name))
        self.parallel = DataParallel(
            self.module,
            ranks.dp,
            MODES[plan.dp_kind],
            terms=self.module.summed_over_tp,
            every=ranks.every,
        )

    def _part_of_step(self, inputs: Sequence[Tensor], size: int) -> Part:
        own, parts = self.ranks.dp_rank, self.job.micro_batches(size)
        samples = [replicas[own] for replicas in parts]
        firsts = [sum(map(len, replicas[:own])) for replicas in parts]
        return Part(samples, firsts, [tuple(x[part] for x in inputs) for part in samples])

    def train(self) -> tuple[dict[str, float], SentBytes]:
        """Train for three steps; return ‖a − b‖² of each tensor, and the bytes of the first.

        Batch norms exchange through the process group in the first, where bytes are counted, and
        then as `train` lets ranks of one host do.
        """
        facts, counted = self.reference.facts, SentBytes()
        known = dict(self.module.named_parameters(remove_duplicate=False))
        names = [name for name in self.reference.names("parameters") if name in known]
        squared: dict[str, float] = {}

        def run_step(step: int) -> tuple[list[Tensor], Tensor]:
            if step == 1:
                self.module.join_norms(*self.ranks.on_host)
            with counted if step == 0 else contextlib.nullcontext():
                outputs, loss = self.run_micro_batches(step)
            self.where = "sum of gradients"
            self.parallel.reduce_gradients()
            self.pipeline.sum_tied()
            dist.all_reduce(loss, group=self.ranks.dp)
            return outputs, loss

        def see(kind: str, tensors: Mapping[str, Tensor]) -> None:
            if kind in ("loss", "eval") and not self.pipeline.has_last:
                return
            for name in self.reference.names(kind):
                key = f"{kind}/{name}"
                if name not in tensors and not self._expects(key):
                    continue
                value, expected = tensors.get(name), self._part(key)
                if value is None or value.shape != expected.shape:
                    raise RankFailed(f"{key} is {_shape(value)}, not {_shape(expected)}")
                squared[key] = squared_difference(value, expected)

        trained = {name: known[name] for name in names}
        train(trained, run_step, facts.learning_rate, see, self.parallel)
        see("buffers", dict(self.module.named_buffers(remove_duplicate=False)))
        if facts.eval_dims is not None:
            see("eval", {f"{i}": x for i, x in enumerate(self.evaluate())})
        return squared, counted

    @torch.no_grad()
    def evaluate(self) -> list[Tensor]:
        """Return the outputs for this replica's batch in eval mode."""
        self.where = "eval mode"
        self._draw(NUM_STEPS, 0, int(self.samples[0]), len(self.samples))
        with raised_casts(self.job.torch_dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, as in the reference
            outputs = tensors_of(self.module.eval()(*self.inputs))
        self.module.train()
        return outputs

    def run_micro_batches(self, step: int, num: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Go forward and backward; return the outputs and the loss, on the last stage's ranks.

        Args:
            num: how many micro-batches; None is all.
        """
        facts, job, own = self.reference.facts, self.job, self.steps[step]
        losses, outputs = [], {}

        def loss(i: int, result: Any) -> Tensor:
            outputs[i] = [x.detach() for x in tensors_of(result)]
            losses.append(loss_of(tensors_of(result), facts.output_dims, own.samples[i], job))
            self.where += ", then backward"
            return losses[-1]

        def prepare(i: int) -> None:
            self.where = f"step {step + 1}, micro-batch {i + 1}"
            self._draw(step, i, own.firsts[i], len(own.samples[i]))

        sizes = [len(part) for part in own.samples[:num]]
        before_last = self.parallel.expect_last_backward
        with self._casting():
            self.pipeline.train(sizes, own.inputs.__getitem__, loss, prepare, before_last)
        if not outputs:
            return [], torch.zeros((), dtype=job.torch_dtype)
        first = min(int(part[0]) for part in own.samples if len(part)) if sum(sizes) else 0
        places = [part - first for part in own.samples[:num]]
        of_outputs = zip(*(outputs[i] for i in range(len(sizes))), strict=True)
        joined = [
            join_rows(parts, dim, places, sum(sizes))
            for parts, dim in zip(of_outputs, facts.output_dims, strict=True)
        ]
        return joined, torch.stack(losses).sum().detach()

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        """Return what the model's own code runs in, forward and backward; captured code has it."""
        return contextlib.nullcontext() if self.captured else raised_casts(self.job.torch_dtype)

    def _draw(self, step: int, i: int, first: int, num: int) -> None:
        self.ranks.draw_state.set(draw_key(self.job.seed, step, i), first, num)

    def check(self) -> dict[str, Any]:
        """Train, compare, and return a `Report` as plain data."""
        squared, counted = self.train()
        apart = [key for key in squared if key.startswith(("outputs/", "eval/"))]
        state = [key for key in squared if key not in apart and not key.startswith("loss/")]
        own = sum(p.numel() * p.itemsize for p in self.module.parameters())
        report = Report(
            self.ranks.pp_rank,
            self.ranks.dp_rank,
            squared,
            over_tp=[key for key in state if key.partition("/")[2] in self.module.shards],
            over_dp=apart,
            sent_bytes_predicted=self.predicted() if self.ranks.is_first else 0,
            sent_bytes_measured=str(counted.by_label["values"] + counted.by_label["stages"]),
            layout_facts=self._layout_facts(),
            as_written=self.module.why if isinstance(self.module, Replica) else "",
            parameter_bytes_fraction=own / max(1, self.num_bytes),
        )
        return vars(report)

    def _layout_facts(self) -> dict[str, Any]:
        if self.captured is None:
            return {"whole_ops": []}
        assignment = self.captured.assignment
        ops = {op.name: op for op in assignment.program.graph.ops(assignment.program.ops_batch)}
        whole = assignment.whole_flops()
        largest = [(ops[n].module, ops[n].target, part) for n, part in whole[:_NUM_WHOLE_OPS]]
        return {
            "sharded_flops_fraction": assignment.sharded_fraction(),
            "busiest_over_mean": assignment.imbalance(),
            "whole_ops": largest,
            "num_whole_ops": len(whole),
        }

    def _part(self, key: str) -> Tensor:
        """Return what this rank should have of a tensor of the reference."""
        kind, _, name = key.partition("/")
        whole = self.reference[key]
        dims = {"outputs": self.reference.facts.output_dims, "eval": self.reference.facts.eval_dims}
        if of_outputs := dims.get(kind):
            return rows_of(whole, of_outputs[int(name)], self.samples, self.job.batch)
        return whole if kind == "loss" else self.module.part_of(name, whole)

    def _expects(self, key: str) -> bool:
        """Tell whether a tensor of the reference is of this rank's stages."""
        kind, _, name = key.partition("/")
        if kind in ("outputs", "loss", "eval"):
            return self.pipeline.has_last
        return self.module.has(name)

    def predicted(self) -> int:
        """Return the bytes that this replica's ranks send in a step, in all stages."""
        module, schedule = self.captured, self.pipeline.schedule
        if module is None:
            return 0
        program, sizes = module.assignment.program, map(len, self.parts)
        return sum(
            predicted_bytes(
                module.stage_codes_for(size),
                schedule.ranks,
                program,
                size,
                schedule.split_backwards(i),
            )
            for i, size in enumerate(sizes)
        )


def _shape(x: Tensor | None) -> str:
    return "absent" if x is None else "×".join(map(str, x.shape)) or "a number"


Work = Callable[[Run], dict[str, Any]]


def run_job(job: Job, reference: Path, plan: Plan, ranks: Ranks, work: Work) -> dict[str, Any]:
    """Do one job; return what `work` does, or `error` and `exit_code` where it cannot be done."""
    torch.set_num_threads(job.threads)
    run: Run | None = None
    failed: dict[str, Any] | None = None
    try:
        run = Run(job, Reference(reference), plan, ranks)
    except Exception as error:  # noqa: BLE001  # sent to the other ranks, and to the parent
        failed = {"error": in_words(error), "exit_code": 2 if isinstance(error, InputError) else 1}
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failed)
    failed = next((t for t in failures if t is not None), None)
    if failed is not None:
        return failed
    assert run is not None
    try:
        return work(run)
    except Exception as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        where = f"rank {dist.get_rank()} of {len(failures)} at {run.where}"
        raise RankFailed(f"{where}: {text}") from error


def work_through(folder: Path, work: Work) -> None:
    """Do all jobs of a folder, and write what comes of each to `NUMBER.RANK.json`."""
    env = rank_env() or RankEnv()
    settings = json.loads((folder / "jobs.json").read_text())
    sys.path.extend(path for path in settings["path"] if path not in sys.path)
    meshes: dict[tuple[int, int, int], Ranks] = {}
    with process_group(env, torch.device("cpu"), settings["timeout_s"]):
        for number, (values, path) in enumerate(settings["jobs"]):
            began, job = time.monotonic(), Job(**values)
            plan = job.checked_plan()
            axes = (plan.pp, plan.dp, plan.tp)
            if axes not in meshes:
                ranks = meshes[axes] = join(plan, torch.device("cpu"))
                for group in (ranks.pp, ranks.dp, ranks.tp, ranks.every):
                    group.set_timeout(datetime.timedelta(seconds=settings["timeout_s"]))
            report = run_job(job, Path(path), plan, meshes[axes], work)
            report["seconds"] = time.monotonic() - began
            target = folder / f"{number}.{env.rank}.json"
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(report))
            temporary.replace(target)
        dist.barrier()
