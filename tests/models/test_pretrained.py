"""Folders that transformers' `save_pretrained` wrote are opened by what config.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from meshuffle.errors import ModelError, RunError
from meshuffle.infer.predict import predict
from meshuffle.models.outputs import with_main_output
from meshuffle.models.pretrained import _preprocess, saved_pretrained
from meshuffle.weights import load_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer of three classes, saved as transformers saves."""
    path = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, id2label={0: "ant", 1: "bee", 2: "fly"},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "size": {"height": 32, "width": 32},
                "resample": 2,
            }
        )
    )
    return path


def test_it_computes_what_transformers_does(folder: Path) -> None:
    network, card = load_model(folder)
    assert card.model == "transformers:vit" and card.classes == ("ant", "bee", "fly")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(with_main_output(network)(x), theirs(x).logits)
    assert card.preprocess.size == (32, 32) and card.preprocess.mean == (0.5, 0.5, 0.5)


def test_predict_names_its_classes(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (found,) = predict(folder, [tmp_path / "a.png"])
    assert found["label"] in ("ant", "bee", "fly")


def test_a_body_without_a_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig.from_pretrained(folder)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"no classifier's weights: 2 are missing, classifier\.bias"):
        load_model(tmp_path)


def test_broken_and_other_folders(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert saved_pretrained(path) is None
    (tmp_path / "config.json").write_text('{"of": "another program"}')
    assert saved_pretrained(path) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json: no JSON"):
        saved_pretrained(path)


def test_preprocessing_is_that_of_the_file() -> None:
    assert _preprocess({}).size == (224, 224)
    clip = _preprocess({"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3})
    assert clip.size == (224, 224) and clip.resize == 256 and clip.interpolation == "bicubic"
    convnext = _preprocess({"size": {"shortest_edge": 224}, "crop_pct": 0.875})
    assert convnext.size == (224, 224) and convnext.resize == 256
    plain = _preprocess({"size": 32, "do_normalize": False, "image_mean": [0.5] * 3})
    assert plain.mean == (0.0, 0.0, 0.0) and plain.std == (1.0, 1.0, 1.0)


def test_a_config_of_another_program_does_not_hinder_a_model_that_is_named(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of another program"}')
    network, _ = load_model(tmp_path, "torchvision:resnet18")
    torch.testing.assert_close(network.state_dict()["fc.weight"], model.fc.weight.detach())
    with pytest.raises(ModelError, match="no model type 'of another program'"):
        load_model(tmp_path)
