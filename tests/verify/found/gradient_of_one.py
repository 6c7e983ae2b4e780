"""Of two that read a value, one keeps statistics alone: no gradient comes back from it.

--plan tp=3:spatial --input 5:int --batch 5
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.conv, self.kept = nn.Conv2d(6, 6, 1), nn.BatchNorm1d(6)
        self.head = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x) + self.norm(x.flip(1)).relu()
        x = x.transpose(1, 2).unflatten(2, (5, 1))
        self.kept(self.conv(x).sum(3).mean(2))
        return self.head(torch.tanh(x.narrow(1, 0, 5)).mean((2, 3)))
