"""Any image classifier, split over the ranks, in a training loop of one's own.

    torchrun --nproc-per-node 2 examples/image_classifier.py torchvision:resnet50
    torchrun --nproc-per-node 2 examples/image_classifier.py torchvision:vgg16 tp=2:channel
    torchrun --nproc-per-node 4 examples/image_classifier.py shufflenet_v1_x1_0_g8 tp=4:channel

The images are random and few: the loss falls because the model learns them by heart.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

import meshuffle

BATCH, SIZE, CLASSES, STEPS = 16, 64, 10, 10


def main() -> None:
    torch.manual_seed(0)
    name = sys.argv[1] if len(sys.argv) > 1 else "shufflenet_v1_x1_0_g8"
    plan = sys.argv[2] if len(sys.argv) > 2 else ""
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))

    network = meshuffle.create_model(name, num_classes=CLASSES)
    model = meshuffle.parallelize(network, example=images, plan=plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(STEPS):
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.is_main:
            seconds = time.perf_counter() - began
            print(f"step {step}  loss {loss.item():.4f}  {seconds:.2f} s", flush=True)
    if model.is_main:
        print(model.summary())


if __name__ == "__main__":
    main()
