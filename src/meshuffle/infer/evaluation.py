"""Every sample of a split once, over all ranks: what each got, and the metrics of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle.data import Batch, Preprocess
from meshuffle.tasks.base import Task


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split of N readable samples, ordered by their index.

    Attributes:
        task: its name.
        classes: C names.
        indices: position in the source, int64 (N,).
        rows: what the task keeps of each sample, N rows each: see its `judge`, whose `losses` are
            float32; of samples without targets, its `answer`. Empty where nothing was read.
        metrics: of the task, and the mean `loss`; empty where nothing was read or has targets.
        skipped: messages of the images that could not be read.
    """

    task: str
    classes: tuple[str, ...]
    indices: NDArray[np.int64]
    rows: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples that were read and counted."""
        return len(self.indices)

    @property
    def objective(self) -> float:
        """Mean of the loss that training minimises, label smoothing included; nan of nothing."""
        rows = self.rows.get("objectives", self.rows.get("losses"))
        if rows is None or not len(rows):
            return float("nan")
        return float(rows.mean(dtype=np.float64))


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    preprocess: Preprocess | None,
    device: torch.device,
    *,
    labelled: bool = True,
    group: dist.ProcessGroup | None = None,
    is_output_rank: bool = True,
    channels_last: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `model` in eval mode over this rank's `batches`; all ranks get the same result.

    Always in float32, whatever it is trained in: as `eval`, `predict` and `export` compute.

    Args:
        batches: what `eval_loader` yields.
        preprocess: how images are normalised; None where `model` takes them as they are, uint8.
        labelled: False where the targets are nothing, and the task's answers are asked for.
        group: the ranks that share the split; None is this one alone.
        is_output_rank: False where another rank has the same batches, and reports them.
        progress: called with the number of samples of each finished batch.
    """
    was_training = model.training
    model.eval()
    pieces: list[dict[str, Tensor]] = []
    skipped: list[str] = []
    for batch in batches:
        skipped += batch.skipped
        if len(batch):
            outputs = _outputs(model, batch.images, preprocess, device, channels_last)
            if is_output_rank:
                rows = task.judge(outputs, batch.targets) if labelled else task.answer(outputs)
                pieces.append({"indices": batch.indices, **rows})
        if progress:
            progress(len(batch))
    model.train(was_training)
    return _gather(pieces, skipped, task, group)


def _outputs(
    model: nn.Module,
    images: Tensor,
    preprocess: Preprocess | None,
    device: torch.device,
    channels_last: bool,
) -> Tensor:
    """Return the outputs on the CPU, numbers as float32."""
    x_NCHW = images.to(device, non_blocking=True)
    if preprocess is not None:
        x_NCHW = preprocess.normalise(x_NCHW)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_NCHW = x_NCHW.contiguous(memory_format=layout)
    outputs: Tensor = model(x_NCHW)
    return (outputs.float() if outputs.is_floating_point() else outputs).cpu()


def _gather(
    pieces: list[dict[str, Tensor]],
    skipped: list[str],
    task: Task,
    group: dist.ProcessGroup | None,
) -> Evaluation:
    """Bring all ranks' rows together, ordered by index, and let the task conclude."""
    own = joined([{name: column.numpy() for name, column in piece.items()} for piece in pieces])
    shares = [(own, skipped)]
    if group is not None and dist.get_world_size(group) > 1:
        shares = [({}, [])] * dist.get_world_size(group)
        dist.all_gather_object(shares, (own, skipped), group=group)
    messages = tuple(dict.fromkeys(message for _, part in shares for message in part))
    rows = joined([share for share, _ in shares if share])
    classes = task.card.classes
    if not rows:
        return Evaluation(task.name, classes, np.zeros(0, np.int64), skipped=messages)
    order = np.argsort(rows["indices"], kind="stable")
    rows = {name: column[order] for name, column in rows.items()}
    indices = rows.pop("indices")
    metrics: dict[str, float] = {}
    if "losses" in rows:
        metrics = {**task.conclude(rows), "loss": float(rows["losses"].mean(dtype=np.float64))}
    return Evaluation(task.name, classes, indices, rows, metrics, messages)


def joined(pieces: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join columns by rows; where their other dims differ, the shorter are padded with −1."""
    if not pieces:
        return {}
    return {name: _stacked([piece[name] for piece in pieces]) for name in pieces[0]}


def _stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return np.concatenate(parts)
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for part in parts:
        missing = [(0, 0), *((0, m - n) for m, n in zip(full, part.shape[1:], strict=True))]
        padded.append(np.pad(part, missing, constant_values=-1))
    return np.concatenate(padded)
