"""A small GPT-2 of Hugging Face, split over two ranks, on the characters of a text.

    torchrun --nproc-per-node 2 examples/gpt2.py tinyshakespeare.txt
    torchrun --nproc-per-node 4 examples/gpt2.py tinyshakespeare.txt tp=2,pp=2,mb=4

Nothing of the model is rewritten: heads of attention and columns of the MLP go to the ranks, its
dropout draws the same masks on any number of them. Needs transformers.
"""

from __future__ import annotations

import sys

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


def make(num_layers: int = 2) -> nn.Module:
    """Return the model with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=num_layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Logits(GPT2LMHeadModel(config)).train()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next character, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    text = read_text()
    example, _ = next(batches(text, BATCH, LENGTH, 1))
    plan = sys.argv[2] if len(sys.argv) > 2 else ""
    model = meshuffle.parallelize(make(), example=example, plan=plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (x, y) in enumerate(batches(text, BATCH, LENGTH, STEPS)):
        optimizer.zero_grad()
        loss = model.forward_backward(x, y, loss_of)
        optimizer.step()
        if model.is_main and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if model.is_main:
        print(model.summary())


if __name__ == "__main__":
    main()
