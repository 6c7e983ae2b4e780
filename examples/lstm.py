"""An LSTM on the characters of a text, its batch split over two ranks.

    torchrun --nproc-per-node 2 examples/lstm.py tinyshakespeare.txt

A recurrent layer is split by samples; the embedding and the classifier may be split otherwise. The
plan says so in its summary.
"""

from __future__ import annotations

import torch
from text import batches, read_text
from torch import Tensor, nn

import meshuffle

BATCH, LENGTH, STEPS = 16, 64, 200


class CharacterModel(nn.Module):
    """Embedding, two recurrent layers, classifier."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.recurrent = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (N, L, 256) for ids (N, L)."""
        hidden, _ = self.recurrent(self.embedding(ids))
        return self.classifier(hidden)


def main() -> None:
    torch.manual_seed(0)
    text = read_text()
    example, _ = next(batches(text, BATCH, LENGTH, 1))
    model = meshuffle.parallelize(CharacterModel(), example=example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, (x, y) in enumerate(batches(text, BATCH, LENGTH, STEPS)):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.is_main and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if model.is_main:
        print(model.summary())


if __name__ == "__main__":
    main()
