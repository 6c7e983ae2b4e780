"""A small BERT of Hugging Face that fills in masked characters, split over two ranks.

    torchrun --nproc-per-node 2 examples/bert.py tinyshakespeare.txt

Nothing of the model is rewritten: heads of attention and columns of the MLP go to the ranks, its
dropout draws the same masks on any number of them. Needs transformers.
"""

from __future__ import annotations

import torch
from text import batches, read_text
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import meshuffle

BATCH, LENGTH, STEPS = 16, 64, 200
MASK = 256


class Logits(nn.Module):
    """The model's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return (N, L, 257) for ids (N, L)."""
        return self.model(ids).logits


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=257,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
    )
    text = read_text()
    example, _ = next(batches(text, BATCH, LENGTH, 1))
    model = meshuffle.parallelize(Logits(BertForMaskedLM(config)).train(), example=example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)  # the same masks on every rank
    for step, (x, _) in enumerate(batches(text, BATCH, LENGTH, STEPS)):
        hidden = torch.rand(x.shape, generator=generator) < 0.15
        logits = model(x.masked_fill(hidden, MASK))
        loss = nn.functional.cross_entropy(logits[hidden], x[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.is_main and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if model.is_main:
        print(model.summary())


if __name__ == "__main__":
    main()
