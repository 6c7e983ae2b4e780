"""What one device computes: the model itself, not captured code, on the whole batch.

It trains for three steps of SGD with momentum, the last of them on one sample less. The outputs and
gradients of the first step, the losses of all, the parameters and buffers after the last, and what
it returns in eval mode then, are passed on when they exist, so that no copy of the model is kept.
The random numbers are those of the plans.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from meshuffle.errors import CaptureError, ModelError
from meshuffle.graph import Graph, capture
from meshuffle.graph.random_ops import number_draws
from meshuffle.layout.program import Program
from meshuffle.parallel.data_parallel import DataParallel
from meshuffle.parallel.random_masks import ReferenceDraws, draw_key
from meshuffle.verify.compare import Norm, kind_of
from meshuffle.verify.job import (
    DTYPES,
    Job,
    build_model,
    join_rows,
    loss_of,
    make_inputs,
    names_of_norms,
    raised_casts,
    tensors_of,
)

NUM_STEPS, MOMENTUM, RELATIVE_STEP = 3, 0.9, 0.01
_FACTS = "facts.json"

Tensors = Mapping[str, Tensor]
See = Callable[[str, Tensors], None]
"""Takes a kind (`outputs`, `gradients`, …) and its tensors by name, which are valid until then."""


@dataclass(frozen=True)
class Facts:
    """What ranks must know of a reference beside its tensors.

    Attributes:
        output_dims: the dim that holds the batch, for each tensor that the model returns.
        draw_dims: the dim that holds the batch, for each call that draws random numbers; None is
            dim 0 for all.
        sizes: samples of each step.
        eval_dims: `output_dims` in eval mode; None where that cannot be captured.
        learning_rate: the rate at which the first step changes the parameters by 1 %.
    """

    output_dims: list[int | None]
    draw_dims: list[int | None] | None
    sizes: Sequence[int]
    eval_dims: list[int | None] | None = None
    learning_rate: float | None = None


class Reference:
    """A reference on disk.

    Args:
        path: a folder with a safetensors file per kind: `initial`, `outputs`, `loss`,
            `gradients`, `parameters` and `buffers`. A trace lies beside them.

    Attributes:
        noise: the results of `own_difference` so far, by its number of rounded runs.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.trace_path = path, path / "trace.safetensors"
        self.noise: dict[int, dict[str, float]] = {}
        saved = json.loads((path / _FACTS).read_text())
        self.facts = Facts(**saved["facts"])
        self.norms = {key: Norm(**norm) for key, norm in saved["norms"].items()}

    def __getitem__(self, key: str) -> Tensor:
        kind, _, name = key.partition("/")
        with safe_open(self.path / f"{kind}.safetensors", "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind's tensors."""
        return [key.partition("/")[2] for key in self.norms if kind_of(key) == kind]


def make_reference(job: Job, path: Path) -> Reference:
    """Run the reference of `job`, in float64 where it can, and save it in the folder `path`.

    Raises:
        CaptureError: the plan needs it captured, and that cannot be done.
        ModelError: it draws random numbers of its own, or a batch norm has a single value.
    """
    dtype = DTYPES[job.reference_dtype]
    model = build_model(job, dtype)
    inputs = make_inputs(job, model, dtype)
    first = torch.cat(job.micro_batches()[0])
    example = tuple(x[first] if len(first) > 1 else x[:2] for x in inputs)
    facts = _facts(job, model, example)
    before = {name: x.clone() for name, x in model.named_buffers()}
    norms: dict[str, Norm] = {}

    def see(kind: str, tensors: Tensors) -> None:
        for name, x in tensors.items():
            still = kind == "buffers" and torch.equal(x, before[name])
            norms[f"{kind}/{name}"] = _norm(x, still)
        _save(tensors, path / f"{kind}.safetensors")

    _save(model.state_dict(), path / "initial.safetensors")
    rate = _run(job, model, inputs, facts, see)
    saved = {
        "facts": asdict(replace(facts, learning_rate=rate)),
        "norms": {key: asdict(norm) for key, norm in norms.items()},
    }
    (path / _FACTS).write_text(json.dumps(saved))
    return Reference(path)


def _save(tensors: Tensors, path: Path) -> None:
    """Write tensors; those that share memory, or have gaps in it, are copied."""
    places = {name: x.untyped_storage().data_ptr() for name, x in tensors.items()}
    shared = {place for place, count in Counter(places.values()).items() if count > 1}
    whole = {name: x.detach().contiguous() for name, x in tensors.items()}
    save_file({n: x.clone() if places[n] in shared else x for n, x in whole.items()}, path)


def own_difference(job: Job, reference: Reference, *, num_rounded: int = 0) -> dict[str, float]:
    """Return ‖a − b‖ of what one device computes in the dtype of `job` in other ways.

    These are: channels-last; a permuted batch where nothing is random; and the same again where
    the dtype is not the reference's.

    Args:
        num_rounded: further runs, each with weights that are rounded at random to a neighbour:
            a ReLU whose input is as small as that switches in some of them.
    """
    facts, dtype = reference.facts, job.torch_dtype
    same: list[tuple[torch.Generator | None, bool]] = [(None, False)]
    runs = [] if dtype == torch.float64 else same
    inputs = make_inputs(job, build_model(job, dtype), dtype)
    if any(x.ndim == 4 for x in inputs):
        runs.append((None, True))
    dims = [*facts.output_dims, *(facts.eval_dims or [])]
    if facts.draw_dims == [] and None not in dims:
        runs.append((torch.Generator().manual_seed(job.seed + 3), False))
    runs += same * num_rounded
    generator = torch.Generator().manual_seed(job.seed + 4)
    largest: dict[str, float] = {}

    def see(kind: str, tensors: Tensors) -> None:
        for name, x in tensors.items():
            key = f"{kind}/{name}"
            difference = math.sqrt(squared_difference(x, reference[key]))
            largest[key] = max(largest.get(key, 0.0), difference)

    for i, (permute, channels_last) in enumerate(runs):
        model, given = build_model(job, dtype), inputs
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
            given = tuple(_channels_last(x) for x in given)
        if i >= len(runs) - num_rounded:
            _round_at_random(model, generator)
        _run(job, model, given, facts, see, permute)
    return largest


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@torch.no_grad()
def _round_at_random(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        far = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
        parameter.copy_(torch.nextafter(parameter, far))


def squared_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖²; infinities are equal to themselves."""
    a, b = a.detach(), b.detach()
    wide = torch.complex128 if b.is_complex() else torch.float64
    difference = torch.where(a == b, 0, a.to(wide) - b.to(wide))
    return float(difference.abs().square().sum())


def _captured(
    job: Job, model: nn.Module, inputs: tuple[Tensor, ...], *, train: bool = True
) -> Graph:
    with raised_casts(DTYPES[job.reference_dtype]):
        return capture(model, inputs, train=train)


def _facts(job: Job, model: nn.Module, example: tuple[Tensor, ...]) -> Facts:
    """Return the facts of a model; of one that cannot be captured, as they show when it runs."""
    sizes = [job.batch, job.batch, job.last_batch]
    try:
        graph = _captured(job, model, example)
    except CaptureError:
        if job.checked_plan().is_split:
            raise
        return Facts(_dims_seen(model, example), None, sizes, _dims_seen(model, example))
    if graph.symbol is None:
        sizes[-1] = job.batch
    outputs, draws = _dims(graph, len(example[0]))
    try:
        in_eval = _dims(_captured(job, model, example, train=False), len(example[0]))[0]
    except CaptureError:
        in_eval = None
    return Facts(outputs, draws, sizes, in_eval)


def _dims(graph: Graph, batch: int) -> tuple[list[int | None], list[int | None]]:
    """Return the dims that hold the batch, of outputs and of random draws."""
    program = Program(graph, batch, 1)
    number_draws(graph.program.graph.nodes)
    drawing = [node for node in graph.nodes() if "draw" in node.meta]
    (output,) = graph.nodes("output")
    returned = [node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, Node)]
    values = [node.meta["val"] for node in returned if isinstance(node.meta["val"], Tensor)]
    return (
        [program.samples_dim_of(value) for value in values],
        [program.samples_dim_of(node.meta["val"]) for node in drawing],
    )


@torch.no_grad()
def _dims_seen(model: nn.Module, example: tuple[Tensor, ...]) -> list[int | None]:
    """Return the dims that hold the batch, of outputs: those that are shorter for fewer samples."""
    plain = copy.deepcopy(model).eval()
    whole, fewer = (tensors_of(plain(*(x[:n] for x in example))) for n in (None, -1))
    pairs = [zip(a.shape, b.shape, strict=True) for a, b in zip(whole, fewer, strict=True)]
    return [next((d for d, (a, b) in enumerate(pair) if a != b), None) for pair in pairs]


def _run(
    job: Job,
    model: nn.Module,
    inputs: Sequence[Tensor],
    facts: Facts,
    see: See,
    permute: torch.Generator | None = None,
) -> float:
    """Train for three steps; return the learning rate.

    Args:
        permute: changes the order of the samples in their micro-batches; results are put back.
    """

    def forward(samples: Tensor, draws: ReferenceDraws) -> list[Tensor]:
        with raised_casts(dtype), draws, names_of_norms(model, len(samples)):
            return tensors_of(model(*(_rows(x, samples) for x in inputs)))

    def run_step(step: int) -> tuple[list[Tensor], Tensor]:
        losses, outputs_of_parts = [], []
        parts = [torch.cat(replicas) for replicas in job.micro_batches(facts.sizes[step])]
        if permute is not None:
            parts = [part[torch.randperm(len(part), generator=permute)] for part in parts]
        for i, samples in enumerate(parts):
            draws = reference_draws(job, facts, step, i)
            outputs = forward(samples, draws)
            losses.append(loss_of(outputs, facts.output_dims, samples, job))
            outputs_of_parts.append([x.detach() for x in outputs])
            if not losses[-1].requires_grad:  # a model without parameters
                continue
            with raised_casts(dtype), draws:  # activation checkpointing computes a part again
                losses[-1].backward()
        joined = [
            join_rows(outputs, dim, parts, facts.sizes[step])
            for outputs, dim in zip(
                zip(*outputs_of_parts, strict=True), facts.output_dims, strict=True
            )
        ]
        return joined, torch.stack(losses).sum().detach()

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: x.shape for name, x in model.named_buffers()}
    rate = train(trained, run_step, facts.learning_rate, see)
    # One that the forward makes anew for another size of input is no state (timm's convit).
    see("buffers", {n: x for n, x in model.named_buffers() if x.shape == shapes.get(n)})
    if facts.eval_dims is not None:
        model.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, of checkpoints without gradients
            outputs = forward(torch.arange(job.batch), reference_draws(job, facts, NUM_STEPS))
        see("eval", {f"{i}": x for i, x in enumerate(outputs)})
    return rate


def _rows(x: Tensor, samples: Tensor) -> Tensor:
    """Return some samples, in the memory format of `x`."""
    if torch.equal(samples, torch.arange(len(x))):
        return x
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return _channels_last(x[samples]) if is_last else x[samples]


def reference_draws(job: Job, facts: Facts, step: int, micro_batch: int = 0) -> ReferenceDraws:
    """Return what makes a model draw the numbers of a micro-batch."""
    dims = facts.draw_dims if step < NUM_STEPS else None
    return ReferenceDraws(draw_key(job.seed, step, micro_batch), dims)


def train(
    trained: Mapping[str, nn.Parameter],
    run_step: Callable[[int], tuple[list[Tensor], Tensor]],
    rate: float | None,
    see: See,
    parallel: DataParallel | None = None,
) -> float:
    """Train for three steps; return the learning rate.

    Args:
        trained: parameters by name.
        parallel: keeps replicas equal; `run_step` sums its gradients.
        run_step: returns the outputs and the loss of a step; gradients are then complete.
        rate: the learning rate, or None to choose it by the first step.
        see: is called with `outputs`, `gradients`, `loss` and `parameters`.
    """
    groups = [{"params": list(trained.values())}]  # none, on a stage that has no parameters
    optimizer = torch.optim.SGD(groups, 0.0, momentum=MOMENTUM)
    losses = {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        outputs, loss = run_step(step)
        losses[f"{step + 1}"] = loss.detach()
        if step == 0:
            see("outputs", {str(i): x.detach() for i, x in enumerate(outputs)})
            grads = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in trained.items()
            }
            if parallel is None or parallel.updates_here:  # elsewhere they are not complete
                see("gradients", grads)
            rate = _learning_rate(trained) if rate is None else rate
            optimizer.param_groups[0]["lr"] = rate
        if parallel is None:
            optimizer.step()
            continue
        if parallel.updates_here:
            parallel.drop_others()
            optimizer.step()
        parallel.share_update()
    optimizer.zero_grad()
    optimizer.state.clear()
    see("loss", losses)
    see("parameters", {name: p.detach() for name, p in trained.items()})
    assert rate is not None
    return rate


def _learning_rate(trained: Mapping[str, nn.Parameter]) -> float:
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in trained.values()))
    grads = [p.grad for p in trained.values() if p.grad is not None]
    slope = math.sqrt(sum(float(g.square().sum()) for g in grads))
    if not math.isfinite(slope):
        raise ModelError("the model's gradients on one device are not finite; nothing to compare")
    return RELATIVE_STEP * size / slope if slope else RELATIVE_STEP


def _norm(x: Tensor, is_constant: bool) -> Norm:
    """Return the norm of the finite elements: masks may hold infinities."""
    wide = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
    squared = float(torch.where(wide.isfinite(), wide, 0).abs().square().sum())
    whole_numbers = not (x.is_floating_point() or x.is_complex())
    return Norm(math.sqrt(squared), x.numel(), is_constant or whole_numbers)
