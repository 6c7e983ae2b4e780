"""Mixup and CutMix within pairs of neighbours, so that the number of ranks changes nothing.

torchvision mixes a batch with itself rolled by one, which ties a sample to whatever the
rank's batch holds beside it. Here the samples at positions 2k and 2k + 1 of the global batch
mix with each other, by the numbers that torchvision's transforms draw, seeded by the draw of
the first of them. Ranks that take multiples of 2 samples (`EpochSampler(unit=2)`) so compute
bit for bit what one process computes. A sample whose partner is missing stays unmixed.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from meshuffle.data.augment import AugmentConfig, seeded
from meshuffle.data.seeds import draw63

Box = tuple[int, int, int, int]  # x1, y1, x2, y2
_MIX = 3  # separates this use of a draw from the sample's own augmentation


def mix_batch(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: AugmentConfig,
    draws: Tensor,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (mixed images, soft labels [N, num_classes] float32).

    `images`: float [N, C, H, W]; `labels`, `draws`: int64 [N] as in a `Batch`, or `labels` that
    are soft already, float32 [N, num_classes]; `positions`: int64 [N], increasing, the places in
    this rank's part of the batch, from which broken images may be missing; by default 0 … N − 1.
    """
    soft = one_hot(labels, num_classes).float() if labels.ndim == 1 else labels
    pairs = _pairs(torch.arange(len(labels)) if positions is None else positions)
    if not pairs or not config.mixes:
        return images, soft
    partner = torch.arange(len(labels))
    amount = torch.ones(len(labels))  # of the sample itself in each pixel
    share = torch.ones(len(labels))  # of the sample's own label
    boxes: dict[int, Box] = {}  # what the two of a pair exchange
    for i, draw in zip(pairs, draws[pairs].tolist(), strict=True):
        partner[i], partner[i + 1] = i + 1, i
        amount[i : i + 2], boxes[i], share[i : i + 2] = _draw(config, draw, images)
    partner, share = partner.to(images.device), share.to(images.device)[:, None]
    weight = amount.to(images)[:, None, None, None]
    mixed = torch.lerp(images[partner], images, weight) if config.mixup else images.clone()
    for i, (x1, y1, x2, y2) in boxes.items():
        swapped = images[i : i + 2, :, y1:y2, x1:x2].flip(0)
        mixed[i : i + 2, :, y1:y2, x1:x2] = swapped
    return mixed, torch.lerp(soft[partner], soft, share)


def _pairs(positions: Tensor) -> list[int]:
    """Return each i where samples i and i + 1 sit at positions 2k and 2k + 1."""
    return [i for i, (a, b) in enumerate(pairwise(positions.tolist())) if a % 2 == 0 and b == a + 1]


def _draw(config: AugmentConfig, draw: int, images: Tensor) -> tuple[float, Box, float]:
    """Return (amount in each pixel, box to exchange, share of the own label) for one pair."""
    with seeded(int(draw63(_MIX, draw)[0])):
        both = config.mixup > 0 and config.cutmix > 0
        if config.mixup > 0 and (not both or torch.rand(()) < 0.5):
            lam = _transform(v2.MixUp, config.mixup).make_params([])["lam"]
            return lam, (0, 0, 0, 0), lam
        params = _transform(v2.CutMix, config.cutmix).make_params([images])
        return 1.0, params["box"], params["lam_adjusted"]


@lru_cache
def _transform(kind: type[v2.Transform], alpha: float) -> v2.Transform:
    return kind(alpha=alpha, num_classes=2)  # drawing ignores the number of classes
