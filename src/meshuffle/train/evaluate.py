"""Every sample of a split once, over all ranks: metrics, confusion, and what each sample got."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.data import Batch, Preprocess

_TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split of N readable samples, ordered by their index.

    Attributes:
        classes: C names.
        indices: position in the source, int64 (N,).
        labels: int64 (N,).
        losses: cross-entropy in nats, float32 (N,).
        top_classes: the K = min(5, C) likeliest classes, best first, int64 (N, K).
        top_probabilities: their softmax probabilities, float32 (N, K).
        objective: mean of the loss that training minimises, label smoothing included.
        skipped: messages of the images that could not be read.
    """

    classes: tuple[str, ...]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    losses: NDArray[np.float32]
    top_classes: NDArray[np.int64]
    top_probabilities: NDArray[np.float32]
    objective: float = float("nan")
    skipped: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples that were read and counted."""
        return len(self.labels)

    @property
    def metrics(self) -> dict[str, float]:
        """`top1` and `top5` in percent (`top5` from 6 classes on), and the mean `loss`."""
        if not self.num_samples:
            return {}
        hits = self.top_classes == self.labels[:, None]
        metrics = {"top1": 100.0 * float(hits[:, 0].mean())}
        if len(self.classes) > _TOP:
            metrics["top5"] = 100.0 * float(hits.any(1).mean())
        return {**metrics, "loss": float(self.losses.mean(dtype=np.float64))}

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How often class i (row) was taken for class j (column), int64 (C, C)."""
        num_classes = len(self.classes)
        flat = self.labels * num_classes + self.top_classes[:, 0]
        return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: tuple[str, ...],
    preprocess: Preprocess,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    speaks: bool = True,
    channels_last: bool = True,
    label_smoothing: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `model` in eval mode over this rank's `batches`; all ranks get the same result.

    Always in float32, whatever it is trained in: as `eval`, `predict` and `export` compute.

    Args:
        batches: what `eval_loader` yields.
        group: the ranks that share the split; None is this one alone.
        speaks: False where another rank has the same batches, and reports them.
        label_smoothing: of the training, for `objective`.
        progress: called with the number of samples of each finished batch.
    """
    was_training = model.training
    model.eval()
    pieces: list[tuple[Tensor, ...]] = []
    skipped: list[str] = []
    for batch in batches:
        skipped += batch.skipped
        if len(batch):
            logits = _logits(model, batch.images, preprocess, device, channels_last)
            pieces.append(
                (batch.indices, batch.labels, *_judge(logits, batch.labels, label_smoothing))
            )
        if progress:
            progress(len(batch))
    model.train(was_training)
    return _gather(pieces if speaks else [], skipped, classes, group)


def _logits(
    model: nn.Module,
    images: Tensor,
    preprocess: Preprocess,
    device: torch.device,
    channels_last: bool,
) -> Tensor:
    x_NCHW = preprocess.normalise(images.to(device, non_blocking=True))
    if channels_last:
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    logits: Tensor = model(x_NCHW)
    return logits.float().cpu()


def _judge(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    losses, objectives = (
        F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        for smoothing in (0.0, label_smoothing)
    )
    probabilities, classes = logits.softmax(1).topk(min(_TOP, logits.shape[1]))
    return losses, classes, probabilities, objectives


def _gather(
    pieces: list[tuple[Tensor, ...]],
    skipped: list[str],
    classes: tuple[str, ...],
    group: dist.ProcessGroup | None,
) -> Evaluation:
    """Bring all ranks' rows together, ordered by index."""
    own = [torch.cat(column).numpy() for column in zip(*pieces, strict=True)]
    shares = [(own, skipped)]
    if group is not None and dist.get_world_size(group) > 1:
        shares = [([], [])] * dist.get_world_size(group)
        dist.all_gather_object(shares, (own, skipped), group=group)
    rows = [share for share, _ in shares if share]
    top = min(_TOP, len(classes))
    if rows:
        columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    else:
        none, no_top = np.zeros(0, np.int64), np.zeros((0, top), np.int64)
        no_loss = none.astype(np.float32)
        columns = [none, none, no_loss, no_top, no_top.astype(np.float32), no_loss]
    order = np.argsort(columns[0], kind="stable")
    messages = tuple(dict.fromkeys(message for _, part in shares for message in part))
    *rows_of, objectives = (column[order] for column in columns)
    objective = float(objectives.mean(dtype=np.float64)) if len(objectives) else float("nan")
    indices, labels, losses, top_classes, probabilities = rows_of
    return Evaluation(
        classes, indices, labels, losses, top_classes, probabilities, objective, messages
    )
