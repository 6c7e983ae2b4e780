"""Losses of detectors: which anchor answers for which object, and how far its outputs are off.

Everything is per image, so that any split of a batch adds up.

Shape suffixes: N images, A anchors, K logits, M objects, P matched anchors of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from meshuffle.models.detector import find_head

_NEGATIVES = 3  # per matched anchor, the hardest


def detection_losses(
    head: str, outputs_NAK: Tensor, targets_NM5: Tensor, anchors_A4: Tensor
) -> Tensor:
    """Return the loss of each image, (N,), in the dtype of the outputs.

    Of `ssdlite`, smooth L1 of the matched anchors' deltas, and cross-entropy of those and of the 3
    hardest others for each, over their number (arXiv 1512.02325). torchvision divides by the
    matched anchors of the whole batch: there a sample's loss depends on its neighbours. An image
    without objects has 3 hard anchors (torchvision: none, so that it teaches nothing).
    Of `fpn`, L1 of the matched anchors' deltas, and focal loss of all anchors but those that fit
    badly, over the number of matched ones (arXiv 1708.02002), as in torchvision.

    Args:
        outputs_NAK: (N, A, K + 4), see `Detector`.
        targets_NM5: class, x1, y1, x2, y2 (0 … 1); rows of −1 are padding, and an object without
            area counts nothing.
        anchors_A4: see `anchors_for`.
    """
    kind, how = find_head(head), _LOSSES[head]
    anchors_A4 = anchors_A4.to(outputs_NAK.device)
    matches_NA = match(how.matcher, anchors_A4, targets_NM5)
    n_P, a_P = (matches_NA >= 0).nonzero(as_tuple=True)
    objects_P5 = targets_NM5[n_P, matches_NA[n_P, a_P]].to(outputs_NAK.dtype)
    found = _Found(matches_NA, n_P, a_P, objects_P5[:, 0].long() + kind.background)
    wanted_P4 = kind.coder.encode_single(objects_P5[:, 1:], anchors_A4[a_P].to(objects_P5.dtype))
    deltas_P4 = outputs_NAK[n_P, a_P, -4:]
    boxes_N = found.placed(how.box_loss(deltas_P4, wanted_P4, reduction="none").sum(1)).sum(1)
    classes_N = how.class_loss(outputs_NAK[..., :-4], found)
    return (boxes_N + classes_N) / found.num_matched.clamp_min(1)


@dataclass(frozen=True)
class _Found:
    """Which anchors are matched: `matches_NA` says with which object, −1 none, −2 ignore."""

    matches_NA: Tensor
    n_P: Tensor
    a_P: Tensor
    logits_P: Tensor
    """The logit of the object's class, int64."""

    @property
    def num_matched(self) -> Tensor:
        """Matched anchors of each image, (N,)."""
        return (self.matches_NA >= 0).sum(1)

    def placed(self, values_P: Tensor) -> Tensor:
        """Return (N, A), 0 where nothing is matched; sums of it repeat bit by bit."""
        zeros_NA = values_P.new_zeros(self.matches_NA.shape)
        return zeros_NA.index_put((self.n_P, self.a_P), values_P)


@torch.no_grad()
def match(matcher: Callable[[Tensor], Tensor], anchors_A4: Tensor, targets_NM5: Tensor) -> Tensor:
    """Return which row of its image's targets each anchor answers for, int64 (N, A).

    Args:
        matcher: torchvision's; gets the IoU of objects and anchors, gives −1 or less for none.
    """
    num_images, num_anchors = len(targets_NM5), len(anchors_A4)
    matches_NA = torch.full((num_images, num_anchors), -1, device=anchors_A4.device)
    has_area_NM = (targets_NM5[..., 3:] > targets_NM5[..., 1:3]).all(-1)  # and is no padding
    for matches_A, targets_M5, has_area_M in zip(matches_NA, targets_NM5, has_area_NM, strict=True):
        rows = has_area_M.nonzero()[:, 0]
        if len(rows):
            found_A = matcher(box_iou(targets_M5[rows, 1:].to(anchors_A4), anchors_A4))
            matches_A.copy_(torch.where(found_A >= 0, rows[found_A.clamp_min(0)], found_A))
    return matches_NA


def _softmax_loss(logits_NAK: Tensor, found: _Found) -> Tensor:
    """Return the summed cross-entropy of the matched and of the hardest other anchors, (N,)."""
    labels_NA = found.placed(found.logits_P)
    flat = F.cross_entropy(logits_NAK.flatten(0, 1), labels_NA.flatten(), reduction="none")
    losses_NA = flat.view(labels_NA.shape)
    is_matched_NA = found.matches_NA >= 0
    with torch.no_grad():
        order_NA = losses_NA.masked_fill(is_matched_NA, -1).argsort(
            dim=1, descending=True, stable=True
        )
        num_hard_N1 = (_NEGATIVES * found.num_matched.clamp_min(1))[:, None]
        is_hard_NA = (order_NA.argsort(1) < num_hard_N1) & ~is_matched_NA
    return (losses_NA * (is_matched_NA | is_hard_NA)).sum(1)


def _focal_loss(logits_NAK: Tensor, found: _Found) -> Tensor:
    """Return the summed focal loss of the anchors that fit well or not at all, (N,)."""
    one_NAK = torch.zeros_like(logits_NAK)
    one_NAK[found.n_P, found.a_P, found.logits_P] = 1
    losses_NA = sigmoid_focal_loss(logits_NAK, one_NAK, reduction="none").sum(2)
    counts_NA = found.matches_NA != Matcher.BETWEEN_THRESHOLDS
    return (losses_NA * counts_NA).sum(1)


@dataclass(frozen=True)
class _Losses:
    matcher: Callable[[Tensor], Tensor]
    box_loss: Callable[..., Tensor]
    class_loss: Callable[[Tensor, _Found], Tensor]


_IOU: Mapping[str, Any] = {"high_threshold": 0.5, "low_threshold": 0.4}
_LOSSES: Mapping[str, _Losses] = {
    "ssdlite": _Losses(SSDMatcher(0.5), F.smooth_l1_loss, _softmax_loss),
    "fpn": _Losses(Matcher(**_IOU, allow_low_quality_matches=True), F.l1_loss, _focal_loss),
}
