"""The outputs as they are: of no `--task`, but what `predict --features` keeps of each image."""

from __future__ import annotations

from torch import Tensor

from meshuffle.train.task import Rows, Task


class FeatureRows(Task):
    """Keeps the network's outputs; for evaluation alone."""

    name = "features"

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `features` float32 (N, F)."""
        return {"losses": outputs.new_zeros(len(outputs)), "features": outputs}

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return nothing."""
        return {}
