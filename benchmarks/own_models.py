"""Networks as people bring them, trained under plans: does a plan change what is learned?

    python benchmarks/own_models.py [--seeds 0 1 2] [--plans dp=1 dp=2 tp=2]

Each is written as its author's script has it, not for Meshuffle: a LeNet that flattens with
`view`, an AlexNet, a U-Net, a network with an auxiliary output, one of functions and bare
parameters alone, and torchvision's MNASNet. Classifiers learn scikit-learn's digits under so much
noise that none gets them all, half of them (898) for validation; the U-Net learns drawn squares.
Prints the metric on the validation split per seed, and appends to results/own_models.csv: for each
plan, its largest and its mean difference to dp=1 of the same seeds, beside the range of dp=1 over
the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from rows import append

HERE = Path(__file__).parent
NOISE = 80  # standard deviation, of 255
MODELS = {
    "own_models:LeNet": ("noisy", ["--input-size", "32", "--epochs", "8"]),
    "own_models:AlexNet": ("noisy", ["--input-size", "64", "--epochs", "6"]),
    "own_models:Auxiliary": ("noisy", ["--input-size", "32", "--epochs", "8"]),
    "own_models:functional": ("noisy", ["--input-size", "32", "--epochs", "8"]),
    "own_models:mnasnet": ("noisy", ["--input-size", "64", "--epochs", "10"]),
    "own_models:UNet": ("squares", ["--task", "segment", "--input-size", "64", "--epochs", "20"]),
}
COLUMNS = (
    *("model", "data", "plan", "seeds", "metric", "values", "to_dp1", "mean_to_dp1", "dp1_range"),
    "torch",
)


class LeNet(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class AlexNet(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 7, stride=2, padding=2), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(3, 2), nn.Conv2d(32, 96, 5, padding=2), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(3, 2), nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(128, 96, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(96 * 9, 256), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(256, num_classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), 96 * 9))


class Auxiliary(nn.Module):
    """As GoogLeNet: two outputs in training, one in evaluation."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU())
        self.aux, self.fc = nn.Linear(24, num_classes), nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = self.stem(x)
        late = self.body(early)
        logits = self.fc(late.mean((2, 3)))
        return (logits, self.aux(early.mean((2, 3)))) if self.training else logits


class _Functional(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        sizes = {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (num_classes, 32 * 8 * 8)}
        self.params = nn.ParameterDict(
            {
                k: nn.Parameter(torch.randn(s) * (2 / np.prod(s[1:])) ** 0.5)
                for k, s in sizes.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        p = self.params
        x = F.relu(F.conv2d(x, p["w1"], stride=2, padding=1))
        x = F.relu(F.conv2d(x, p["w2"], stride=2, padding=1))
        x = torch.flatten(F.dropout(x, 0.2, training=self.training), 1)
        return F.linear(x, p["w3"])


def functional(num_classes: int = 10) -> nn.Module:
    """A port from a library of functions: parameters in a dictionary, no layers."""
    return _Functional(num_classes)


def mnasnet(num_classes: int = 10) -> nn.Module:
    """torchvision's, with the momentum of other networks.

    Its batch norms' own, 0.0003, needs thousands of steps before evaluation means anything.
    """
    model = torchvision.models.mnasnet0_5(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = _twice(3, 8), _twice(8, 16), _twice(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.right2, self.right1 = _twice(32, 16), _twice(16, 8)
        self.out = nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.down3(F.max_pool2d(b, 2))
        b = self.right2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.right1(torch.cat([a, self.up1(b)], 1)))


def add_noise(home: Path) -> str:
    """Write scikit-learn's digits with noise, as folders of classes, every second one to `val`."""
    rng, digits = np.random.default_rng(0), load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = home / ("val" if i % 2 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        noisy = np.clip(image * 16 + rng.normal(0, NOISE, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:04d}.png")
    return str(home)


def draw_squares(home: Path) -> str:
    """Write 120 noisy images with a square, and masks of it."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (home / kind).mkdir(parents=True)
    for i in range(120):
        image = rng.integers(0, 160, (64, 64, 3), dtype=np.uint8)
        (x, y), side = rng.integers(2, 34, 2), int(rng.integers(12, 28))
        image[y : y + side, x : x + side, :2] += np.uint8(60)
        mask = np.zeros((64, 64), np.uint8)
        mask[y : y + side, x : x + side] = 1
        Image.fromarray(image).save(home / "images" / f"{i:03d}.png")
        Image.fromarray(mask).save(home / "masks" / f"{i:03d}.png")
    return f"masks:{home}"


def train(model: str, data: str, options: list[str], plan: str, seed: int, out: Path) -> float:
    command = [sys.executable, "-m", "meshuffle", "train", data, "--model", model, "--plan", plan]
    command += ["--seed", str(seed), "--compile", "off", "--json", "--out", str(out), *options]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    found = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{model} under {plan}: {found.stderr[-1500:]}")
    metrics = json.loads(found.stdout.strip().splitlines()[-1])["metrics"]["val"]
    return metrics["miou" if "segment" in options else "top1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--plans", nargs="+", default=["dp=1", "dp=2", "tp=2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        homes = {
            "noisy": add_noise(Path(folder) / "noisy"),
            "squares": draw_squares(Path(folder) / "squares"),
        }
        for model in asked.models:
            data, options = MODELS[model]
            alone: list[float] = []
            for plan in asked.plans:
                values = [
                    train(
                        model, homes[data], options, plan, s, Path(folder) / f"{model}-{plan}-{s}"
                    )
                    for s in asked.seeds
                ]
                alone = alone or values
                apart = [a - b for a, b in zip(values, alone, strict=True)]
                row = {
                    "model": model, "data": data, "plan": plan, "seeds": len(values),
                    "metric": "miou" if "segment" in options else "top1",
                    "values": " ".join(f"{value:.2f}" for value in values),
                    "to_dp1": round(max(map(abs, apart)), 2),
                    "mean_to_dp1": round(sum(apart) / len(apart), 2),
                    "dp1_range": round(max(alone) - min(alone), 2), "torch": torch.__version__,
                }  # fmt: skip
                append("own_models", [row], COLUMNS)
                print(*row.values(), sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
