"""In eval mode nothing is left that could be split.

--plan tp=2:batch --input 5:int --batch 7
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 6), nn.BatchNorm1d(5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        self.norm(x.mean(2))
        return torch.tanh(x)
