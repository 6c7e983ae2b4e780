"""A small wav2vec 2.0 of Hugging Face that hears which of four tones was played, on two ranks.

    torchrun --nproc-per-node 2 examples/wav2vec2.py

Convolutions in one dimension, group norm, attention: split without a line about any of them.
Needs transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import meshuffle

BATCH, SAMPLES, STEPS = 16, 4000, 60
TONES = (220.0, 330.0, 440.0, 660.0)


class Logits(nn.Module):
    """The model's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, waves: Tensor) -> Tensor:
        """Return (N, 4) for waves (N, samples)."""
        return self.model(waves).logits


def tones(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noisy tones (N, samples) and which they are (N,), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(SAMPLES) / 16000
    for _ in range(steps):
        label = torch.randint(len(TONES), (BATCH,), generator=generator)
        phase = torch.rand(BATCH, 1, generator=generator)
        wave = torch.sin(2 * math.pi * (torch.tensor(TONES)[label, None] * time + phase))
        yield wave + 0.3 * torch.randn(BATCH, SAMPLES, generator=generator), label


def main() -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        conv_dim=(64,) * 7,
        classifier_proj_size=64,
        num_labels=len(TONES),
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    example, _ = next(tones(1))
    network = Logits(Wav2Vec2ForSequenceClassification(config)).train()
    model = meshuffle.parallelize(network, example=example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (waves, label) in enumerate(tones(STEPS)):
        loss = nn.functional.cross_entropy(model(waves), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.is_main and step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if model.is_main:
        print(model.summary())


if __name__ == "__main__":
    main()
