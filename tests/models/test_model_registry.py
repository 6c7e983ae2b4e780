import dataclasses

import pytest
import torch
from torch import nn

import meshuffle.models as models
from meshuffle.errors import ModelError
from meshuffle.models import create_model, list_models, registry

NAMES = [info.name for info in list_models()]


def test_the_public_names_are_pinned():
    assert models.__all__ == [
        "ChannelShuffle",
        "ModelInfo",
        "ShuffleNetV1",
        "ShuffleNetV2",
        "ShuffleNetV2Plus",
        "channel_permutation",
        "classifier_of",
        "count_macs",
        "count_parameters",
        "create_model",
        "layer_names",
        "list_models",
    ]


def test_all_names_are_there_once():
    assert len(NAMES) == len(set(NAMES)) == 5 * 5 * 2 + 4 * 2 + 2 + 3
    for name in (
        "shufflenet_v1_x0_25_g1",
        "shufflenet_v1_x1_0_g8",
        "shufflenet_v1_x0_5_g3_se",
        "shufflenet_v2_x1_0",
        "shufflenet_v2_x2_0_se",
        "shufflenet_v2_50",
        "shufflenet_v2_164_se",
        "shufflenet_v2plus_small",
    ):
        assert name in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    assert isinstance(model, nn.Module)
    assert model.training


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("shufflenet_v2_*", 10), ("v2plus", 3), ("*_g8", 5), ("nothing", 0), ("shufflenet_v2_50", 1)],
)
def test_patterns(pattern, count):
    assert len(list_models(pattern)) == count


def test_listing_builds_nothing(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    assert list_models()[0].name in repr(list_models()[0])


def test_sizes_are_counted_from_the_model():
    info = list_models("shufflenet_v2_x0_5")[0]
    assert (info.parameters, round(info.macs / 1e6)) == (1_366_792, 40)
    assert info.published_top1 == 60.3
    assert (info.weights, info.source) == ("torchvision", "arXiv 1807.11164")
    with torch.device("meta"):
        wider = dataclasses.replace(info, build=lambda: create_model("shufflenet_v2_x1_0"))
        assert wider.parameters == 2_278_604


def test_published_figures_are_accuracies():
    published = {info.name: info.published_top1 for info in list_models()}
    assert published["shufflenet_v1_x1_0_g3"] == 67.4
    assert published["shufflenet_v2_164_se"] == 81.44
    assert published["shufflenet_v1_x1_0_g3_se"] is None
    assert all(value is None or 40 < value < 82 for value in published.values())


def test_a_seed_repeats_the_weights_and_disturbs_nothing():
    state = torch.random.get_rng_state()
    first, second = (create_model("shufflenet_v2_x0_5", seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = create_model("shufflenet_v2_x0_5", seed=5)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_the_state_comes_back_when_building_fails():
    state = torch.random.get_rng_state()
    with pytest.raises(ModelError):
        create_model("shufflenet_v2_x0_5", seed=4, kernel_size=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_seed_draws_from_the_global_state():
    torch.manual_seed(1)
    first = create_model("shufflenet_v1_x0_25_g1")
    torch.manual_seed(1)
    second = create_model("shufflenet_v1_x0_25_g1")
    third = create_model("shufflenet_v1_x0_25_g1")
    assert torch.equal(first.classifier[0].weight, second.classifier[0].weight)
    assert not torch.equal(second.classifier[0].weight, third.classifier[0].weight)


def test_knobs_override_what_the_name_says():
    model = create_model("shufflenet_v1_x1_0_g8", groups=3, width=0.5, num_classes=5)
    assert model.features[1].branch_main_1[0].in_channels == 120
    assert model.classifier[0].out_features == 5


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("shufflenet_v2_x1", {}, "unknown model .*did you mean 'shufflenet_v2_x1_"),
        ("shufflenet_v1_x1_0", {}, "did you mean 'shufflenet_v1_x1_0_g"),
        ("resnet18", {}, "torchvision:NAME"),
        ("", {}, "unknown model ''"),
        (":", {}, "unknown model ':'"),
        ("shufflenet_v2_x1_0", {"kernel": 3}, "no knob `kernel`.*did you mean 'kernel_size'"),
        ("shufflenet_v2_x1_0", {"groups": 3}, r"no knob `groups` \(=3\); it has branches"),
        ("shufflenet_v1_x1_0_g3", {"branches": 2}, "no knob `branches`"),
        ("shufflenet_v1_x1_0_g3", {"groups": "3"}, "cannot be made with groups='3'"),
        ("shufflenet_v2_x1_0", {"depths": 4}, "cannot be made with depths=4"),
        ("transformers:bart2", {}, "transformers has no model type 'bart2'.*did you mean 'bart'"),
        (
            "transformers:bert",
            {"hidden_sizes": 1},
            "no value `hidden_sizes`.*did you mean 'hidden_size'",
        ),
    ],
)
def test_names_and_knobs_that_are_unknown(name, knobs, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, **knobs)


def test_the_family_tables_hold_what_the_names_say():
    infos = {info.name: info for info in registry.list_models("shufflenet_v1")}
    assert {info.family for info in infos.values()} == {"shufflenet_v1"}
    assert infos["shufflenet_v1_x0_5_g3"].weights == "authors"
    assert infos["shufflenet_v1_x0_5_g4"].weights == ""
