"""In eval mode a batch counts once.

--plan pp=2,mb=2 --input 4x6x6 --batch 6
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.first, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.head(torch.relu(self.first(x) + self.seen).mean((2, 3)))
