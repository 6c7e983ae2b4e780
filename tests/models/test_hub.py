import sys

import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import create_model

FACTORIES = """
import torch
from torch import nn

def tiny(num_classes=10, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, num_classes))

def anything(**knobs):
    return nn.Linear(knobs.get("size", 3), knobs.get("num_classes", 2))

def needy(num_classes):
    return nn.Linear(3, num_classes)

def fixed():
    return nn.Linear(3, 2)

def number(num_classes=2):
    return num_classes

def picky(num_classes=2):
    raise ValueError("I never work")

not_a_function = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Put a module in the current directory, as a user has it; return its name."""
    (tmp_path / "shufflenet_factories.py").write_text(FACTORIES)
    (tmp_path / "broken_factories.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "shufflenet_factories"
    sys.modules.pop("shufflenet_factories", None)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_torchvision_with_a_new_head(name):
    model = create_model(f"torchvision:{name}", num_classes=7, seed=0).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_models_with_auxiliary_heads_return_plain_logits(name):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}", num_classes=7)
        assert model.train()(torch.empty(2, 3, 128, 128)).shape == (2, 7)


def test_torchvision_takes_its_own_knobs():
    model = create_model("torchvision:shufflenet_v2_x0_5", num_classes=4)
    assert model.fc.out_features == 4
    assert create_model("torchvision:mobilenet_v2", dropout=0.4).classifier[0].p == 0.4


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("torchvision:resnet17", {}, "did you mean 'resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "no classification model"),
        ("torchvision:resnet18", {"wings": 2}, "torchvision:resnet18 cannot be made with wings=2"),
        ("torchvision:", {}, "no classification model ''"),
    ],
)
def test_torchvision_refuses(name, knobs, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, **knobs)


def test_timm_with_a_new_head_and_input():
    pytest.importorskip("timm", reason="timm is an extra")
    model = create_model("timm:resnet18", num_classes=7, seed=0, in_channels=1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet_18", "did you mean 'resnet"),
        ("timm:hf-hub:someone/model", "no classification"),
    ],
)
def test_timm_refuses_what_it_does_not_know_and_the_network(name, message):
    pytest.importorskip("timm", reason="timm is an extra")
    with pytest.raises(ModelError, match=message):
        create_model(name)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'meshuffle\[hub\]'"):
        create_model("timm:resnet18")


def test_a_factory_of_the_current_directory(factories):
    model = create_model(f"{factories}:tiny", num_classes=3, hidden=5, seed=0)
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 3)
    again = create_model(f"{factories}:tiny", num_classes=3, hidden=5, seed=0)
    assert torch.equal(model[2].weight, again[2].weight)


def test_a_factory_that_takes_anything(factories):
    assert create_model(f"{factories}:anything", num_classes=4, size=6).weight.shape == (4, 6)


def test_a_factory_that_must_have_num_classes(factories):
    """As `predict FILE --model` builds it, before it has seen how many there are."""
    assert create_model(f"{factories}:needy").weight.shape == (1000, 3)
    assert create_model(f"{factories}:needy", num_classes=4).weight.shape == (4, 3)


def test_a_factory_without_num_classes_keeps_its_own(factories):
    assert isinstance(create_model(f"{factories}:fixed"), nn.Linear)
    assert isinstance(create_model(f"{factories}:fixed", num_classes=5), nn.Linear)
    with pytest.raises(ModelError, match=r"does not take `colour` \(='red'\); add it"):
        create_model(f"{factories}:fixed", num_classes=5, colour="red")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "returned a int; it must return an nn.Module"),
        ("picky", "cannot be made with num_classes=5: I never work"),
        ("tinny", "has no function tinny; did you mean 'tiny'"),
        ("not_a_function", "has no function not_a_function"),
    ],
)
def test_a_factory_that_does_not_fit(factories, name, message):
    with pytest.raises(ModelError, match=message):
        create_model(f"{factories}:{name}", num_classes=5)


def test_modules_that_cannot_be_imported(factories):
    with pytest.raises(ModelError, match=r"no module nowhere for the model nowhere\.at:all"):
        create_model("nowhere.at:all")
    with pytest.raises(ModelError, match=r"importing broken_factories failed: .*missing"):
        create_model("broken_factories:tiny")
