"""A weight is changed in one stage and read in a later one.

--plan pp=2,mb=1 --input 6x8 --batch 5
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.1, 0.1)
        return self.last(torch.cat([self.first(x).relu(), self.first(x).tanh()], 1))
