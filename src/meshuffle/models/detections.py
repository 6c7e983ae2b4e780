"""From a detector's outputs to boxes: scores, suppression of overlaps, and the best boxes.

Shape suffixes: N images, A anchors, K logits, C classes, D detections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from meshuffle.models.detector import Detector, find_head

SCORE_FLOOR = 0.05  # an output below it is no detection
MAX_CANDIDATES = 400  # per class, before suppression
MAX_DETECTIONS = 100  # per image
NMS_IOU = 0.5  # if two boxes of a class overlap more, only the better one stays


class Decoded(nn.Module):
    """A detector whose outputs are boxes, as an exported file computes them.

    It returns the boxes of all anchors; suppression needs a sort, which not every runtime has.

    Args:
        network: (N, 3, h, w) → (N, A, K + 4).
        head, anchors_A4: see `detections`.
    """

    anchors_A4: Tensor

    def __init__(self, network: nn.Module, head: str, anchors_A4: Tensor) -> None:
        super().__init__()
        self.network, self.kind = network, find_head(head)
        self.register_buffer("anchors_A4", anchors_A4)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, A, 4 + C): x1, y1, x2, y2 as shares of the input, and a score per class."""
        outputs_NAK = self.network(x_NCHW)
        deltas_NA4 = outputs_NAK[..., -4:]
        num = deltas_NA4.shape[0]
        anchors = self.anchors_A4.repeat(num, 1)
        boxes = self.kind.coder.decode_single(deltas_NA4.flatten(0, 1), anchors)
        scores_NAC = self.kind.scores(outputs_NAK[..., :-4])
        return torch.cat((boxes.clamp(0, 1).view_as(deltas_NA4), scores_NAC), 2)


def detections(head: str, outputs_NAK: Tensor, anchors_A4: Tensor) -> Tensor:
    """Return the detected boxes of N images, (N, D, 6), best first.

    A row is x1, y1, x2, y2 (0 … 1), score, class; missing rows are −1. D ≤ 100 is the largest
    number of boxes in an image. Scores are above 0.05; if boxes of one class overlap by an IoU of
    more than 0.5, only the best one stays.

    Args:
        outputs_NAK: outputs of the detector, float (N, A, K + 4).
        anchors_A4: see `anchors_for`.
    """
    kind = find_head(head)
    return _padded([_detections(kind, outputs_AK, anchors_A4) for outputs_AK in outputs_NAK])


def best_boxes(decoded_NAC: Tensor) -> Tensor:
    """Return what `detections` returns, from the outputs of `Decoded`, (N, A, 4 + C)."""
    return _padded([_best(rows_AC[:, 4:], rows_AC[:, :4].__getitem__) for rows_AC in decoded_NAC])


def _padded(found: list[Tensor]) -> Tensor:
    """Return the boxes of N images as (N, D, 6); missing rows are −1."""
    if not found:
        return torch.zeros(0, 0, 6)
    return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def _detections(kind: type[Detector], outputs_AK: Tensor, anchors_A4: Tensor) -> Tensor:
    def boxes(indices: Tensor) -> Tensor:
        return kind.coder.decode_single(outputs_AK[indices, -4:], anchors_A4[indices]).clamp(0, 1)

    return _best(kind.scores(outputs_AK[:, :-4]), boxes)


def _best(scores_AC: Tensor, boxes_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one image's boxes, best first; `boxes_of` maps indices of anchors to boxes."""
    likely = (scores_AC > SCORE_FLOOR).any(0).nonzero()[:, 0]
    scores, indices = scores_AC[:, likely].T.topk(min(MAX_CANDIDATES, len(scores_AC)))
    kept = scores > SCORE_FLOOR
    scores, indices = scores[kept], indices[kept]
    classes = likely[kept.nonzero()[:, 0]]
    boxes = boxes_of(indices)
    best = batched_nms(boxes, scores, classes, NMS_IOU)[:MAX_DETECTIONS]
    return torch.cat((boxes, scores[:, None], classes[:, None].to(boxes.dtype)), 1)[best]
