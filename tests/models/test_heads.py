import pytest
import torch
import torchvision
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import classifier_of, create_model, layer_names, list_models


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v1_x0_5_g3", "shufflenet_v2_x0_5", "shufflenet_v2_50", "shufflenet_v2plus_small"],
)
def test_the_head_of_ours_is_what_num_classes_changes(name):
    with torch.device("meta"):
        few, many = (create_model(name, num_classes=n).state_dict() for n in (5, 9))
        (head,) = classifier_of(create_model(name))
    changed = {key for key in few if few[key].shape != many[key].shape}
    assert changed == {key for key in few if key.startswith(f"{head}.")}


def test_every_model_of_ours_has_a_head():
    for info in list_models():
        assert info.build.func.head_names


# RegNet cannot be built on the meta device.
TORCHVISION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith("regnet")
]
ONE_PER_KIND_OF_HEAD = {
    *("alexnet", "convnext_tiny", "efficientnet_b0", "googlenet", "mobilenet_v3_small"),
    *("resnet18", "squeezenet1_0", "swin_t", "vgg11", "vit_b_32", "maxvit_t", "densenet121"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ONE_PER_KIND_OF_HEAD else pytest.mark.slow)
        for name in TORCHVISION
    ],
)
def test_the_head_of_torchvisions_has_num_classes_outputs(name):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}", num_classes=7)
    (head,) = classifier_of(model)
    module = model.get_submodule(head)
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert outputs == 7


@pytest.mark.parametrize(
    ("name", "heads"),
    [("resnet18", ["fc"]), ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])],
)
def test_timm_says_it_itself(name, heads):
    pytest.importorskip("timm", reason="timm is an extra")
    assert classifier_of(create_model(f"timm:{name}", num_classes=7)) == heads


def test_a_model_without_layers_has_no_head():
    with pytest.raises(ModelError, match="Flatten has no linear layer"):
        classifier_of(nn.Flatten())


def test_layers_of_v2_are_its_stages_behind_their_units():
    model = create_model("shufflenet_v2_x0_5", depths=(1, 2, 1))
    assert layer_names(model) == [
        *("conv1", "stage2.0", "stage2", "stage3.0", "stage3.1", "stage3", "stage4.0", "stage4"),
        *("conv5", "fc"),
    ]


def test_layers_of_v1_are_its_units():
    model = create_model("shufflenet_v1_x0_5_g3", depths=(1, 1, 1))
    units = [f"features.{i}" for i in range(3)]
    assert layer_names(model) == ["first_conv", *units, "features", "classifier"]


@pytest.mark.parametrize(
    "name", ["shufflenet_v1_x0_5_g3", "shufflenet_v2_x0_5", "shufflenet_v2plus_small"]
)
def test_the_layers_cover_every_parameter_in_the_order_in_which_they_run(name):
    model = create_model(name, num_classes=5).eval()
    names = layer_names(model)
    for parameter, _ in model.named_parameters():
        assert any(parameter.startswith(f"{layer}.") for layer in names)
    finished: list[str] = []
    for layer in names:
        model.get_submodule(layer).register_forward_hook(
            lambda *_, layer=layer: finished.append(layer)
        )
    model(torch.randn(1, 3, 32, 32))
    assert finished == names
