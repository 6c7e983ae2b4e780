"""Constants of float32 in a model that is checked in float64.

--plan tp=2 --input 6x8 --batch 5
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(8, 8), torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * torch.tensor(2.0) + self.scale
