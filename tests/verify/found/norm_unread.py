"""Nobody reads the norm's output, but its statistics are kept.

--plan dp=2/tp=2:batch --input 4x6x6 --batch 6
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.head(torch.tanh(x).mean((2, 3)))
