"""One check: its model, inputs and loss, made alike in the reference and on every rank.

All of it follows from plain data: weights and inputs are drawn in float32 by the seed and then
cast, so that every dtype sees the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from meshuffle.comm.device import num_cores
from meshuffle.data.sampler import shard_bounds
from meshuffle.errors import ConfigError, ModelError, PlanError
from meshuffle.models import create_model
from meshuffle.planner.plan import Plan, parse_plan
from meshuffle.planner.schedules import make_schedule

_MOST_RANKS = 16  # a rank takes 400 MB before it has a model

Model = str | Callable[[], nn.Module]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What is to be checked; see `api.verify`.

    Attributes:
        model: a name that `create_model` takes.
        reference_dtype: of what one device computes; float32 where a kernel lacks float64.
    """

    model: str
    plan: str
    input: str
    batch: int
    dtype: str
    seed: int
    reference_dtype: str = "float64"

    @property
    def reference_key(self) -> tuple[Any, ...]:
        """What the reference depends on: the plan only by which sample is in which micro-batch."""
        plan = self.checked_plan()
        cut = (plan.dp, plan.num_micro_batches) if plan.num_micro_batches > 1 else ()
        own = (self.model, self.input, self.batch, self.dtype, self.seed, self.threads)
        return (*own, self.reference_dtype, *cut)

    @property
    def threads(self) -> int:
        """Threads of each rank, and of the reference: their number is an order of summation."""
        return parse_plan(self.plan).threads or 1

    @property
    def last_batch(self) -> int:
        """Samples of the last step: one less than the others have, where that leaves enough."""
        enough = self.batch >= 4 * parse_plan(self.plan).num_micro_batches
        return self.batch - 1 if enough else self.batch

    def micro_batches(self, batch: int | None = None) -> list[list[Tensor]]:
        """Return the samples of each micro-batch: for each replica their indices in the batch.

        A replica has consecutive samples, and its micro-batches consecutive ones of those. Batch
        norm sees a micro-batch of all replicas together.

        Args:
            batch: samples of the step; None is the usual number.
        """
        plan = parse_plan(self.plan)
        samples: list[list[Tensor]] = [[] for _ in range(plan.num_micro_batches)]
        for start, stop in shard_bounds(self.batch if batch is None else batch, plan.dp):
            for i, (a, b) in enumerate(shard_bounds(stop - start, plan.num_micro_batches)):
                samples[i].append(torch.arange(start + a, start + b))
        return samples

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the parallel run."""
        return DTYPES[self.dtype]

    def checked_plan(self) -> Plan:
        """Return the parsed plan.

        Raises:
            PlanError: it does not parse, has parts that cannot be verified, or does not fit.
        """
        plan, where = parse_plan(self.plan), f"plan '{self.plan}'"
        if plan.dp_kind == "central" and plan.is_split:
            raise PlanError(f"{where}: central updates know no tp and no pp; use dp={plan.dp}")
        most = max(_MOST_RANKS, _MOST_RANKS // 2 * num_cores())
        if plan.num_ranks > most:
            raise PlanError(
                f"{where}: verify runs all {plan.num_ranks} ranks on this host, of {num_cores()} "
                f"cores; at most {most} here"
            )
        make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
        num = plan.dp * plan.num_micro_batches
        least = self.batch // num
        lacking, part = (1, "micro-batch") if plan.num_micro_batches > 1 else (2, "replica")
        if least < lacking:
            raise PlanError(
                f"{where}: a batch of {self.batch} leaves a {part} {least} samples; each of the "
                f"{num} needs {lacking} (--batch {lacking * num})"
            )
        if plan.tp_kind == "batch" and least < plan.tp:
            raise PlanError(
                f"{where}: {least} samples of a replica cannot be split over {plan.tp} ranks "
                f"(--batch {num * plan.tp})"
            )
        return plan


def name_of(model: Model) -> str:
    """Return the name by which ranks make `model`.

    Raises:
        ModelError: a function that cannot be imported by its name.
    """
    if isinstance(model, str):
        return model
    name = getattr(model, "__qualname__", repr(model))
    if not name.isidentifier():
        raise ModelError(f"ranks cannot import {name}; define the factory at a module's top level")
    return f"{model.__module__}:{name}"


def build_model(job: Job, dtype: torch.dtype, *, filled: bool = True) -> nn.Module:
    """Return the model in train mode, with the weights of the seed.

    Args:
        filled: False leaves parameters as they come, in memory that is not touched: a rank loads
            its parts of the reference's. What else a model makes has its values.
    """
    with contextlib.nullcontext() if filled else _Unfilled():
        model = create_model(job.model, seed=job.seed).train()
    for parameter in () if filled else model.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    return model.double() if dtype == torch.float64 else model.float()  # complex numbers stay so


class _Unfilled(TorchFunctionMode):
    """Skips what a constructor writes into parameters in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the parameter as it is, or what the function returns."""
        kwargs = kwargs or {}
        name, target = getattr(func, "__name__", ""), args[0] if args else kwargs.get("tensor")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if writes and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


class RaisedCasts(TorchFunctionMode):
    """Turns a model's own casts to float32 into casts to float64, for checks in float64.

    A model that computes a part of itself in float32 (softmax or norms of a Llama) would differ by
    float32's rounding under any other order of summation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with float64 wherever float32 is asked for."""
        if func is torch.empty_strided:  # how torch.export copies a tensor that exists
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        given = (args, kwargs or {})
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, given)
        return func(*args, **kwargs)


@contextlib.contextmanager
def raised_casts(dtype: torch.dtype) -> Iterator[None]:
    """Let a model run, or be captured, to be checked in `dtype`; constants are raised too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with RaisedCasts() if dtype == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def make_inputs(job: Job, model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the whole batch: normal random numbers, or token ids below the vocabulary.

    Raises:
        ConfigError: the text cannot be read.
        ModelError: token ids for a model that has no vocabulary.
    """
    generator, made = torch.Generator().manual_seed(job.seed + 1), []
    for text in job.input.split(","):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(:int)?", text):
            raise ConfigError(
                f"input '{text}': write 3x64x64 for an image, 16000 for a waveform, 128:int for "
                "tokens"
            )
        sizes, is_int, _ = text.partition(":int")
        shape = (job.batch, *map(int, sizes.split("x")))
        made.append(
            torch.randint(_vocabulary(model), shape, generator=generator)
            if is_int
            else torch.randn(shape, generator=generator).to(dtype)
        )
    return tuple(made)


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    known = getattr(config, "vocab_size", None)
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    size = known if isinstance(known, int) else next(tables, None)
    if size is None:
        raise ModelError("token ids are asked for, but the model has no nn.Embedding; see --input")
    return size


@contextlib.contextmanager
def names_of_norms(model: nn.Module, num: int) -> Iterator[None]:
    """Name the batch norm that torch refuses a single value per channel."""
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        norm = entered[-1] if entered else "a batch norm"
        raise ModelError(
            f"{norm} has one value per channel in a micro-batch of {num}, which torch refuses; use "
            "a larger --batch or --input, or fewer micro-batches (mb)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors that a model returned, in order."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def rows_of(whole: Tensor, dim: int | None, samples: Tensor, batch: int) -> Tensor:
    """Return the rows that belong to some samples; all of it where `dim` is None.

    Args:
        whole: with `batch` samples along `dim`, each of one or several consecutive rows.
        samples: indices.
    """
    if dim is None:
        return whole
    rows = whole.shape[dim] // batch
    index = (samples[:, None] * rows + torch.arange(rows)).flatten()
    return whole.index_select(dim, index)


def join_rows(
    parts: Sequence[Tensor], dim: int | None, samples: Sequence[Tensor], batch: int
) -> Tensor:
    """Return the whole of which each part has some samples; a stack of those that have no dim.

    Args:
        parts: one for each of `samples`.
        samples: indices in the whole; of `batch`, or of the replica that they are.

    Raises:
        ModelError: parts without a dim have different sizes, as samples × samples have.
    """
    if dim is None and len({x.shape for x in parts}) > 1:
        raise ModelError(
            f"an output has the sizes {' and '.join(str(list(x.shape)) for x in parts)} for parts "
            "of a batch, which do not make up the whole; use a plan with dp=1 and mb=1"
        )
    if dim is None:
        return parts[0] if len(parts) == 1 else torch.stack(list(parts))
    order = torch.argsort(torch.cat(list(samples)))
    return rows_of(torch.cat(list(parts), dim), dim, order, batch)


def loss_of(
    outputs: Sequence[Tensor], dims: Sequence[int | None], samples: Tensor, job: Job
) -> Tensor:
    """Return these samples' part of the loss, which is a mean over the whole batch.

    Cross-entropy on random labels where the model returns one (N, classes), otherwise a random
    projection of every floating output.

    Args:
        outputs: for `samples`.
        dims: the dim that holds the batch, for each output.
        samples: indices in the whole batch.
    """
    generator = torch.Generator().manual_seed(job.seed + 2)
    floating = [(x, dim) for x, dim in zip(outputs, dims, strict=True) if x.is_floating_point()]
    if not floating:
        raise ModelError("the model returns no floating tensor, so there is nothing to train")
    if len(outputs) == 1 and outputs[0].ndim == 2 and dims[0] == 0 and outputs[0].shape[1] > 1:
        labels = torch.randint(outputs[0].shape[1], (job.batch,), generator=generator)
        if len(outputs[0]) == len(samples):
            return F.cross_entropy(outputs[0], labels[samples], reduction="sum") / job.batch
    total = outputs[0].new_zeros(())
    for x, dim in floating:
        shape = list(x.shape)
        if dim is not None:
            shape[dim] = shape[dim] // len(samples) * job.batch
        factors = torch.randn(shape, generator=generator).to(x.dtype)
        weight = len(samples) / job.batch if dim is None else 1.0
        projected = (x * rows_of(factors, dim, samples, job.batch)).sum()
        total = total + weight * projected / math.sqrt(math.prod(shape) * job.batch)
    return total
