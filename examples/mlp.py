"""A two-layer perceptron in two parts, with a training loop of one's own.

    torchrun --nproc-per-node 2 examples/mlp.py

Each rank holds half of the hidden units. The plan is found, not given: the first layer is split by
columns, the second by rows, and one all-reduce is all that is sent (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

import torch
from torch import nn

import meshuffle


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 1))
    x = torch.randn(256, 64)
    y = x[:, :8].prod(1, keepdim=True).tanh() + x[:, 8:9]

    model = meshuffle.parallelize(model, example=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.is_main and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    if model.is_main:
        print(model.summary())
        print(model.code)


if __name__ == "__main__":
    main()
