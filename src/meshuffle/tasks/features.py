"""The outputs as they are: of no `--task`, but what `predict --features` keeps of each image."""

from __future__ import annotations

from torch import Tensor

from meshuffle.tasks.base import Task


class FeatureRows(Task):
    """Keeps the network's outputs; for answers alone."""

    name = "features"

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `features` float32 (N, F)."""
        return {"features": outputs}
