"""Weights that others published, as `eval`, `predict` and `train --from` take them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from meshuffle.config import TrainConfig, read_config
from meshuffle.errors import DataError, ModelError
from meshuffle.infer.predict import evaluate, predict
from meshuffle.models import create_model
from meshuffle.train.resolve import resolve_run
from meshuffle.train.run import prepare
from meshuffle.weights import load_model

AUTHORS = Path(__file__).parents[1].parent / "shared" / "data" / "shufflenetv1-authors"
WEIGHTS = AUTHORS / "shufflenetv1_g3_0.5x.pth.tar"
GOLDEN = AUTHORS / "golden_32_images.npz"


@pytest.mark.skipif(
    not (WEIGHTS.exists() and GOLDEN.exists()), reason=f"the authors' V1 files are not in {AUTHORS}"
)
def test_the_authors_v1_from_bytes_to_logits() -> None:
    network, card = load_model(WEIGHTS)
    with np.load(GOLDEN) as golden:
        pixels, logits = torch.from_numpy(golden["rgb_u8_nhwc"]), torch.from_numpy(golden["logits"])
    images = pixels.permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        found = network(card.preprocess.normalise(images))
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
        wrong = dataclasses.replace(card.preprocess, channels="RGB")
        assert (network(wrong.normalise(images)) - logits).abs().max() > 1


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """torchvision's layout, of two classes."""
    path = tmp_path / "weights.pth"
    torch.save(create_model("shufflenet_v2_x0_5", num_classes=2, seed=0).state_dict(), path)
    return path


def test_classes_are_the_datas_where_the_weights_name_none(
    plain: Path, photos: Path, tmp_path: Path
) -> None:
    found, used = evaluate(plain, data=str(photos), split="train")
    assert found.classes == ("blue", "red")
    assert used.endswith("by torchvision's ShuffleNet V2, which name no classes: output i is taken "
                         "for the data's i-th")  # fmt: skip
    image = next(p for p in photos.rglob("*") if p.is_file() and p.suffix in (".jpg", ".png"))
    (row,) = predict(plain, [image])
    assert row["label"] in ("0", "1")
    torch.save(create_model("shufflenet_v2_x0_5", num_classes=3).state_dict(), tmp_path / "3.pth")
    with pytest.raises(DataError, match=r"has 2 classes and the weights, .* have 3 outputs; train"):
        evaluate(tmp_path / "3.pth", data=str(photos))
    with pytest.raises(DataError, match="give --data"):
        evaluate(plain)


def test_train_takes_the_model_and_the_numbers_of_the_weights(photos: Path, tmp_path: Path) -> None:
    knobs = {"order": "authors", "permutation": "inverse"}
    path = tmp_path / "v1.pth"
    torch.save(create_model("shufflenet_v1_x0_5_g3", num_classes=9, **knobs).state_dict(), path)
    config = TrainConfig(
        data=str(photos), from_=str(path), epochs=1, plan="dp=1", out=str(tmp_path / "run")
    )
    run = prepare(config, {"from_": "flag"}).run
    written = read_config(run / "config.toml")
    assert written["model"] == "shufflenet_v1_x0_5_g3" and written["knobs"] == knobs
    assert "# chosen" in next(
        line for line in (run / "config.toml").read_text().splitlines() if line.startswith("model")
    )
    other = dataclasses.replace(config, model="shufflenet_v2_x0_5")
    chosen = resolve_run(other, {"model": "flag"}).config
    assert (chosen.model, chosen.knobs) == ("shufflenet_v2_x0_5", {})
    same = dataclasses.replace(config, model="shufflenet_v1_x0_5_g3", knobs={"order": "paper"})
    assert resolve_run(same, {}).config.knobs == {"order": "paper", "permutation": "inverse"}


def test_weights_of_nobody_need_the_models_name(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save(create_model("torchvision:squeezenet1_1", num_classes=2).state_dict(), path)
    with pytest.raises(ModelError, match=r"plain\.pth: .* give --model, for example"):
        load_model(path)
    found, used = evaluate(path, data=str(photos), model="torchvision:squeezenet1_1")
    assert found.num_samples and "torchvision's squeezenet1_1" in used
