"""A small GPT-2 of Hugging Face, split over two ranks, on the characters of a text.

    torchrun --nproc-per-node 2 examples/gpt2.py tinyshakespeare.txt

Nothing of the model is rewritten: heads of attention and columns of the MLP go to the ranks, its
dropout draws the same masks on any number of them. Needs transformers.
"""

from __future__ import annotations

import torch
from text import batches, read_text
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import meshuffle

BATCH, LENGTH, STEPS = 16, 64, 200


class Logits(nn.Module):
    """The model's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return (N, L, 256) for ids (N, L)."""
        return self.model(ids, use_cache=False).logits


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    text = read_text()
    example, _ = next(batches(text, BATCH, LENGTH, 1))
    model = meshuffle.parallelize(Logits(GPT2LMHeadModel(config)).train(), example=example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
