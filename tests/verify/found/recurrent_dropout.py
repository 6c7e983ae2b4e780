"""Dropout between recurrent layers; in eval mode they are cut alike.

--plan tp=2:batch/pp=2,mb=2 --input 5x8 --batch 7
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, 3, dropout=0.3, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, 2, dropout=0.3)
        self.rnn = nn.RNN(4, 6, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, (states, _) = self.lstm(x)
        x = torch.tanh(self.gru(x.transpose(0, 1))[0].transpose(0, 1))
        y, last = self.rnn(x)
        return y, states.transpose(0, 1).flatten(1), last[-1]
