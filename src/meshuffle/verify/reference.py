"""What one device computes: the model itself, not captured code, on the whole batch.

Three steps of SGD with momentum; kept are the outputs and gradients of the first, the losses of
all, and the parameters and buffers behind the last. The random numbers are those of the plans.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.errors import ModelError
from meshuffle.graph import Graph, capture
from meshuffle.graph.draws import number_draws
from meshuffle.layout.call import Program
from meshuffle.parallel.draws import ReferenceDraws, draw_key
from meshuffle.verify.compare import Norm, largest
from meshuffle.verify.job import (
    MOMENTUM,
    NUM_STEPS,
    RELATIVE_STEP,
    Job,
    build_model,
    loss_of,
    make_inputs,
    rows_of,
    tensors_of,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """What ranks must know of a reference beside its tensors.

    Attributes:
        output_dims: of each tensor that the model returns, the dim that holds the batch.
        draw_dims: the same of each call that draws random numbers.
        learning_rate: such that the first step changes the parameters by 1 %.
    """

    output_dims: list[int | None]
    draw_dims: list[int | None]
    learning_rate: float = 0.0


class Reference:
    """A reference on disk.

    Args:
        path: of a safetensors file with `kind/name` tensors; kinds are `initial`, `outputs`,
            `loss`, `gradients`, `parameters` and `buffers`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.keys = frozenset(file.keys())
            told = file.metadata()
        self.facts = Facts(**json.loads(told["facts"]))
        self.norms = {key: Norm(**norm) for key, norm in json.loads(told["norms"]).items()}

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def make_reference(job: Job, path: Path) -> Reference:
    """Run the reference of `job` in float64 and save it.

    Raises:
        ModelError: the model cannot be captured, or draws random numbers of its own.
    """
    model = build_model(job, torch.float64)
    inputs = make_inputs(job, model, torch.float64)
    facts = _facts(_captured(model, inputs), job.batch)
    before = {name: x.clone() for name, x in model.named_buffers()}
    found, rate = _run(job, model, inputs, facts)
    still = {f"buffers/{n}" for n, x in model.named_buffers() if torch.equal(x, before[n])}
    facts = Facts(facts.output_dims, facts.draw_dims, rate)
    norms = {key: _norm(x) for key, x in found.items() if not key.startswith("initial/")}
    norms |= {key: replace(norms[key], exact=True) for key in still & set(norms)}
    told = {
        "facts": json.dumps(asdict(facts)),
        "norms": json.dumps({key: asdict(norm) for key, norm in norms.items()}),
    }
    save_file({k: x.contiguous().clone() for k, x in found.items()}, path, metadata=told)
    return Reference(path)


def own_difference(job: Job, reference: Reference) -> dict[str, float]:
    """Return ‖a − b‖ of what one device computes in the dtype of `job` in other ways.

    These are: channels-last; a permuted batch where nothing is random; and the same again where
    the dtype is not the reference's.
    """
    facts, dtype = reference.facts, job.torch_dtype
    identity = torch.arange(job.batch)
    runs: list[tuple[Tensor, bool]] = [] if dtype == torch.float64 else [(identity, False)]
    model = build_model(job, dtype)
    inputs = make_inputs(job, model, dtype)
    if any(x.ndim == 4 for x in inputs):
        runs.append((identity, True))
    if not facts.draw_dims and all(dim is not None for dim in facts.output_dims):
        permuted = torch.randperm(job.batch, generator=torch.Generator().manual_seed(job.seed + 3))
        runs.append((permuted, False))
    found = []
    for order, channels_last in runs:
        model = build_model(job, dtype)
        tensors, _ = _run(job, model, inputs, facts, order, channels_last)
        squares = {k: squared_difference(tensors[k], reference[k]) for k in reference.norms}
        found.append({key: math.sqrt(squared) for key, squared in squares.items()})
    return largest(found)


def squared_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖²; infinities are equal to themselves."""
    a, b = a.detach(), b.detach()
    wide = torch.complex128 if b.is_complex() else torch.float64
    difference = torch.where(a == b, 0, a.to(wide) - b.to(wide))
    return float(difference.abs().square().sum())


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    """Capture without torch's own words on what it cannot capture; the error has them."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return capture(model, inputs, train=True)
    finally:
        logging.disable(logging.NOTSET)


def _facts(graph: Graph, batch: int) -> Facts:
    program = Program(graph, batch, 1)
    number_draws(graph.program.graph.nodes)
    drawing = [node for node in graph.nodes() if "draw" in node.meta]
    (output,) = graph.nodes("output")
    returned = [node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, Node)]
    values = [node.meta["val"] for node in returned if isinstance(node.meta["val"], Tensor)]
    return Facts(
        [program.samples_dim_of(value) for value in values],
        [program.samples_dim_of(node.meta["val"]) for node in drawing],
    )


def _run(
    job: Job,
    model: nn.Module,
    inputs: Sequence[Tensor],
    facts: Facts,
    order: Tensor | None = None,
    channels_last: bool = False,
) -> tuple[Tensors, float]:
    """Train for three steps; return the tensors, and the learning rate.

    Args:
        order: of the samples; results are put back in order.
        channels_last: lay 4-d tensors out in memory so.
    """
    order = torch.arange(job.batch) if order is None else order
    inputs = [x[order] for x in inputs]
    found = {f"initial/{name}": x.detach().clone() for name, x in model.state_dict().items()}
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        inputs = [
            x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
        ]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), facts.learning_rate, momentum=MOMENTUM)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad(set_to_none=False)
        with reference_draws(job, facts, step):
            outputs = tensors_of(model(*inputs))
        loss = loss_of(outputs, facts.output_dims, order, job)
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            found |= _first_step(outputs, trained, facts, order)
            rate = facts.learning_rate or _learning_rate(trained)
            optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    found |= {f"loss/{i}": x for i, x in enumerate(losses, 1)}
    found |= {f"parameters/{name}": p.detach() for name, p in trained.items()}
    found |= {f"buffers/{name}": x for name, x in model.named_buffers()}
    return found, rate


def reference_draws(
    job: Job, facts: Facts, step: int
) -> contextlib.AbstractContextManager[ReferenceDraws]:
    """Return what makes a model draw the numbers of a step."""
    return ReferenceDraws(draw_key(job.seed, step), facts.draw_dims)


def _first_step(
    outputs: Sequence[Tensor], trained: dict[str, nn.Parameter], facts: Facts, order: Tensor
) -> Tensors:
    found: Tensors = {}
    back = torch.argsort(order)
    for i, (x, dim) in enumerate(zip(outputs, facts.output_dims, strict=True)):
        found[f"outputs/{i}"] = rows_of(x.detach(), dim, back, len(order)).clone()
    for name, p in trained.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[f"gradients/{name}"] = grad.detach().clone()
    return found


def _learning_rate(trained: dict[str, nn.Parameter]) -> float:
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in trained.values()))
    grads = [p.grad for p in trained.values() if p.grad is not None]
    slope = math.sqrt(sum(float(g.square().sum()) for g in grads))
    if not math.isfinite(slope):
        raise ModelError("the model's gradients on one device are not finite; nothing to compare")
    return RELATIVE_STEP * size / slope if slope else RELATIVE_STEP


def _norm(x: Tensor) -> Norm:
    """Return the norm of the finite elements: masks may hold infinities."""
    wide = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
    squared = float(torch.where(wide.isfinite(), wide, 0).abs().square().sum())
    return Norm(squared, x.numel(), not (x.is_floating_point() or x.is_complex()))
