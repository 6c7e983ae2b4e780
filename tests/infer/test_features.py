"""Features in front of the head, and the images that are near by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from meshuffle.cli import main
from meshuffle.data import Preprocess, decode_image
from meshuffle.infer.features import features, nearest
from meshuffle.models import create_model
from meshuffle.models.heads import Pooled
from meshuffle.tasks.card import Card
from meshuffle.weights import save_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = create_model("shufflenet_v2_x0_5", num_classes=3, seed=1)
    card = Card("shufflenet_v2_x0_5", ("a", "b", "c"), Preprocess(32, 32))
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card)
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("name", "width"),
    [("shufflenet_v2_x0_5", 1024), ("shufflenet_v1_x0_5_g3", 480), ("torchvision:resnet18", 512),
     ("torchvision:squeezenet1_1", 512), ("torchvision:mobilenet_v3_small", 1024)],
)  # fmt: skip
def test_the_head_makes_the_logits_of_them(name: str, width: int) -> None:
    model = create_model(name, num_classes=4, seed=0).eval()
    x = torch.rand(2, 3, 64, 64)
    found = Pooled(model)(x)
    assert found.shape == (2, width)
    if hasattr(model, "fc"):
        torch.testing.assert_close(model.fc(found), model(x))


def test_features_are_in_the_order_of_the_images(weights: Path, photos: Path) -> None:
    images = sorted((photos / "val" / "red").glob("*.png"))
    found, files, skipped = features(weights, images, batch=4)
    assert found.shape == (6, 1024) and files == [str(path) for path in images] and not skipped
    model = create_model("shufflenet_v2_x0_5", num_classes=3, seed=1).eval()
    view = Preprocess(32, 32)
    x = view.normalise(view.to_uint8(decode_image(str(images[4])))[None])
    with torch.no_grad():
        expected = Pooled(model)(x)[0]
    np.testing.assert_allclose(found[4], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_nearest_of_a_copy_is_its_original(weights: Path, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    Image.open(photos / "val" / "blue" / "2.png").save(copy)
    rows, _ = nearest(weights, [copy, photos / "val" / "red" / "0.png"], photos / "val")
    assert rows[0]["nearest"][0]["file"] == str(photos / "val" / "blue" / "2.png")
    assert rows[0]["nearest"][0]["similarity"] == pytest.approx(1)
    assert len(rows[0]["nearest"]) == 5
    assert all("red/0.png" not in near["file"] for near in rows[1]["nearest"])


def test_the_verb(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "f.npy", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    folder = str(photos / "val" / "red")
    assert main(["predict", str(weights), folder, "--features", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == 1024
    assert np.load(out).shape == (6, 1024)
    arguments = ["predict", str(weights), str(broken), folder, "--nearest", str(photos / "val")]
    assert main(arguments) == 2
    shown = capsys.readouterr().out
    assert "skipped" in shown and shown.count("blue") + shown.count("red") > 30
    assert main(["predict", str(weights), str(broken), "--features", str(out)]) == 2
    assert "none of 1 images can be read" in capsys.readouterr().err
    assert main([*arguments, "--features", str(out)]) == 2
    assert "give one of them" in capsys.readouterr().err
