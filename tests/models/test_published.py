"""Published weights: whose they are, and that the model computes what their makers' does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meshuffle.data import Preprocess
from meshuffle.errors import ModelError
from meshuffle.models import create_model, list_models
from meshuffle.models.published import MAKERS, recognise

AUTHORS = Path(__file__).parents[2].parent / "shared" / "data" / "shufflenetv1-authors"
WEIGHTS = AUTHORS / "shufflenetv1_g3_0.5x.pth.tar"
NAMES_V2 = [f"shufflenet_v2_{size}" for size in ("x0_5", "x1_0", "x1_5", "x2_0")]


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"the authors' V1 files are not in {AUTHORS}")
def test_the_authors_file_is_recognised() -> None:
    saved = torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    found = recognise({key.removeprefix("module."): value for key, value in saved.items()})
    assert found.model == "shufflenet_v1_x0_5_g3"
    assert found.knobs == {"order": "authors", "permutation": "inverse"}
    assert found.preprocess == Preprocess.authors()
    assert found.num_classes == len(found.classes) == len(set(found.classes)) == 1000
    assert found.classes[:2] == ("tench", "goldfish")


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.name.split(" (")[0])
def test_every_size_is_found_by_its_shapes(maker) -> None:
    for name in [info.name for info in list_models(maker.models)][::3]:
        with torch.device("meta"):
            tensors = create_model(name, num_classes=7, **maker.knobs).state_dict()
        if maker.renames:
            tensors = as_the_authors_name_them(tensors)
        found = recognise(tensors)
        assert (found.model, found.num_classes, found.classes) == (name, 7, ())
        assert found.source == maker.name
        with torch.device("meta"):
            own = create_model(name, num_classes=7, **found.knobs).state_dict()
        assert {k: v.shape for k, v in found.tensors.items()} == {
            k: v.shape for k, v in own.items()
        }


def as_the_authors_name_them(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of our V2 under the authors' keys, which have no bias at the end."""
    renamed, starts = {}, {"stage2": 0, "stage3": 4, "stage4": 12}
    for key, value in tensors.items():
        top, _, rest = key.partition(".")
        if top in starts:
            unit, branch, rest = rest.split(".", 2)
            branch = {"branch1": "branch_proj", "branch2": "branch_main"}.get(branch, branch)
            renamed[f"features.{starts[top] + int(unit)}.{branch}.{rest}"] = value
        elif key != "fc.bias":
            theirs = {"conv1": "first_conv", "conv5": "conv_last", "fc": "classifier.0"}[top]
            renamed[f"{theirs}.{rest}"] = value
    return renamed


@pytest.mark.parametrize("name", NAMES_V2)
def test_the_authors_v2_computes_what_their_network_does(name: str) -> None:
    """Against an interpreter of their weights, which knows nothing of our modules."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, order="authors", permutation="inverse").double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.nn.init.zeros_(model.fc.bias)
    theirs = as_the_authors_name_them(model.state_dict())
    found = recognise(theirs)
    assert found.model == name and found.preprocess == Preprocess.authors()
    ours = create_model(name, num_classes=5, **found.knobs).double().eval()
    ours.load_state_dict(found.tensors)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = their_logits(theirs, x)
        torch.testing.assert_close(ours(x), expected)
        as_stored = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(as_stored), expected)
        plain = create_model(name, num_classes=5, order="authors").double().eval()
        plain.load_state_dict(found.tensors)
        assert (plain(x) - expected).abs().max() > 1e-3, "the permutation must matter"


def their_logits(w: dict[str, Tensor], x: Tensor) -> Tensor:
    def conv_norm(x: Tensor, key: str, i: int, stride: int = 1) -> Tensor:
        weight = w[f"{key}.{i}.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        norm = [w[f"{key}.{i + 1}.{part}"] for part in ("running_mean", "running_var")]
        return F.batch_norm(x, *norm, w[f"{key}.{i + 1}.weight"], w[f"{key}.{i + 1}.bias"])

    x = F.max_pool2d(conv_norm(x, "first_conv", 0, 2).relu(), 3, 2, 1)
    for number in range(16):
        unit = f"features.{number}"
        stride = 2 if f"{unit}.branch_proj.0.weight" in w else 1
        kept = active = x
        if stride == 1:
            kept, active = x[:, 0::2], x[:, 1::2]
        y = conv_norm(active, f"{unit}.branch_main", 0).relu()
        y = conv_norm(y, f"{unit}.branch_main", 3, stride)
        y = conv_norm(y, f"{unit}.branch_main", 5).relu()
        if stride == 2:
            kept = conv_norm(kept, f"{unit}.branch_proj", 0, 2)
            kept = conv_norm(kept, f"{unit}.branch_proj", 2).relu()
        x = torch.cat((kept, y), 1)
    x = conv_norm(x, "conv_last", 0).relu().mean((2, 3))
    return x @ w["classifier.0.weight"].T


def test_keys_by_stage_are_the_authors_too() -> None:
    with torch.device("meta"):
        model = create_model("shufflenet_v2_x1_0", order="authors", permutation="inverse")
    tensors = {
        key.replace(".branch1.", ".branch_proj.").replace(".branch2.", ".branch_main."): value
        for key, value in model.state_dict().items()
    }
    tensors = {
        k.replace("conv1.", "first_conv.").replace("conv5.", "conv_last."): v
        for k, v in tensors.items()
    }
    found = recognise(tensors)
    assert found.model == "shufflenet_v2_x1_0" and found.tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "crop", "resize", "interpolation"),
    [
        ("torchvision:shufflenet_v2_x2_0", 224, 232, "bilinear"),
        ("torchvision:regnet_y_400mf", 224, 232, "bilinear"),
        ("timm:resnet18", 224, 235, "bicubic"),
    ],
)
def test_packages_bring_their_preprocessing(
    name: str, crop: int, resize: int, interpolation: str
) -> None:
    pytest.importorskip("timm")
    found = recognise(create_model(name).state_dict(), name)
    preprocess = found.preprocess
    assert (preprocess.size, preprocess.resize) == ((crop, crop), resize)
    assert preprocess.interpolation == interpolation
    assert len(found.classes) == 1000


def test_old_files_know_no_number_of_batches() -> None:
    tensors = create_model("shufflenet_v2_x0_5").state_dict()
    old = {key: value for key, value in tensors.items() if "num_batches" not in key}
    assert recognise(old).tensors.keys() == tensors.keys()


def test_what_cannot_be_told() -> None:
    with pytest.raises(ModelError, match=r"give --model, for example .*keys: weight, bias\)"):
        recognise(torch.nn.Linear(2, 2).state_dict())
    other = create_model("shufflenet_v2_x0_5", depths=(1, 2, 1)).state_dict()
    with pytest.raises(ModelError, match=r"keys are those of torchvision's .* none of .*x2_0"):
        recognise(other)
