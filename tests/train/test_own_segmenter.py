"""A person's own segmenter, such as a U-Net, trains without a head of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.config import TrainConfig
from meshuffle.errors import ModelError
from meshuffle.infer.predict import evaluate
from meshuffle.models.segmenter import create_segmenter
from meshuffle.train.api import train
from meshuffle.weights import load_model


class Halving(nn.Module):
    """Its maps have half the size of the image, in a dict as torchvision's."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.last(self.body(x))}


class Classifier(nn.Module):
    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def three_maps() -> nn.Module:
    return Halving(3)


@pytest.fixture
def squares(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "squares" / kind).mkdir(parents=True)
    for i in range(12):
        mask = np.zeros((32, 32), np.uint8)
        x, y = rng.integers(0, 20, 2)
        mask[y : y + 12, x : x + 12] = 1
        image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8) + 150 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"squares/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"squares/masks/{i}.png")
    return f"masks:{tmp_path / 'squares'}"


def config(data: str, tmp_path: Path, model: str, **more: object) -> TrainConfig:
    settings = {"data": data, "task": "segment", "epochs": 1, "plan": "dp=1", "compile": "off"}
    return TrainConfig(**settings, model=model, out=str(tmp_path / "run"), **more)  # type: ignore[arg-type]


def test_the_maps_of_the_model_are_the_answer(squares: str, tmp_path: Path) -> None:
    name = f"{__name__}:Halving"
    run = Path(train(config(squares, tmp_path, name))["run"])
    network, card = load_model(run, name)
    assert card.settings["head"] == "none"
    assert set(network.state_dict()) == set(Halving().state_dict())  # under the model's own names
    x = torch.rand(2, 3, 16, 12)
    expected = F.interpolate(network.forward(x)["out"], (16, 12), mode="bilinear")
    torch.testing.assert_close(network(x), expected)
    found, _ = evaluate(run, model=name)
    assert found.metrics["miou"] >= 0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Classifier", r"Classifier returns 2×2 for 2 images; segment needs a map for each of 2"),
        ("three_maps", r"has 3 outputs for 2 classes"),
    ],
)
def test_what_is_no_segmenter_is_refused(
    squares: str, tmp_path: Path, model: str, expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        train(config(squares, tmp_path, f"{__name__}:{model}"))
    assert not (tmp_path / "run").exists()


def lraspp(num_classes: int) -> nn.Module:
    make = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    model: nn.Module = make(weights=None, weights_backbone=None, num_classes=num_classes)
    return model


def test_torchvisions_segmenters_by_a_function() -> None:
    model = create_segmenter("none", f"{__name__}:lraspp", 4, seed=0).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4, 64, 64)
