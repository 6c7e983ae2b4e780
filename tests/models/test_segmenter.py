"""Segmenters: the dilated backbone computes what the plain one does, and the heads fit on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from meshuffle.comm.exchange import Exchange
from meshuffle.errors import ConfigError, ModelError
from meshuffle.graph.capture import capture
from meshuffle.models import classifier_of, create_model
from meshuffle.models.dilation import dilate
from meshuffle.models.features import Features
from meshuffle.models.segmenter import HEADS, Segmenter, create_segmenter
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.train.optimiser import freeze

LOCAL: list[tuple[str, dict[str, Any]]] = [
    ("shufflenet_v1_x0_25_g3", {}),
    ("shufflenet_v1_x0_25_g3", {"kernel_size": 5, "order": "authors"}),
    ("shufflenet_v2_x0_5", {}),
    ("shufflenet_v2_x0_5", {"branches": 3, "depths": (1, 2, 2)}),
    ("shufflenet_v2_x0_5", {"residual": True, "depths": (1, 1, 2)}),
    ("shufflenet_v2_50", {"width": 0.1, "depths": (1, 1, 1, 2)}),
    ("shufflenet_v2plus_small", {"se": False}),
    ("torchvision:resnet18", {}),
    ("torchvision:mobilenet_v2", {}),
    ("timm:resnet26d", {}),
]
"""Backbones of which every number depends on a neighbourhood alone; not with SE."""


def living(name: str, **knobs: Any) -> nn.Module:
    """A model in eval mode whose batch norms know their maps, so that no map fades to nothing."""
    model = create_model(name, num_classes=3, seed=0, **knobs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize(("name", "knobs"), LOCAL, ids=lambda v: str(v))
def test_the_old_pixels_keep_their_numbers(name: str, knobs: dict[str, Any]) -> None:
    plain = living(name, **knobs)
    dilated = copy.deepcopy(plain)
    dilate(dilated)
    assert list(dilated.state_dict()) == list(plain.state_dict())
    old, new = Features(plain, (32,)).eval().double(), Features(dilated, (16,)).eval().double()
    for height, width in ((64, 96), (96, 160)):  # even and odd numbers of pixels in the old map
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        (expected,), (found,) = old(x), new(x)
        assert found.shape[2:] == (height // 16, width // 16)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found[:, :, ::2, ::2], expected, rtol=1e-9, atol=1e-11)


def test_the_maps_in_front_stay() -> None:
    plain = living("shufflenet_v2_x0_5")
    dilated = copy.deepcopy(plain)
    dilate(dilated)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        Features(dilated, (8,)).eval()(x)[0], Features(plain, (8,)).eval()(x)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "googlenet", "vgg11", "convnext_tiny"])
def test_pools_and_even_kernels_keep_the_old_pixels(name: str) -> None:
    test_the_old_pixels_keep_their_numbers(f"torchvision:{name}", {})


def test_every_window_is_taken() -> None:
    """Even kernels, pools of all kinds, and windows that torch cannot pad by themselves."""

    def windows() -> nn.Sequential:
        torch.manual_seed(0)
        front = nn.Conv2d(3, 4, 16, stride=16)
        return nn.Sequential(front, *parts, nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())

    for parts in (
        [nn.Conv2d(4, 4, 2, stride=2)],
        [nn.Conv2d(4, 4, 4, stride=2, padding=1)],
        [nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2)],
        [nn.MaxPool2d(2)],
        [nn.AvgPool2d(2)],
        [nn.AvgPool2d(3, 2, 1)],
        [nn.MaxPool2d(3, 2, ceil_mode=True)],
        [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1)],
        [nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding="same")],
        [nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))],
    ):
        plain = windows()
        dilated = copy.deepcopy(plain)
        dilate(dilated)
        x = torch.randn(2, 3, 128, 128)
        expected = plain[:-1](x)
        found = dilated[:-1](x)
        assert found.shape[2:] == (8, 8), parts
        torch.testing.assert_close(found[:, :, ::2, ::2], expected, msg=str(parts))


def test_a_module_that_is_used_twice_is_dilated_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.MaxPool2d(2), shared, nn.ReLU(), shared)
    dilate(model)
    assert shared.dilation == (2, 2) and shared.padding == (2, 2)


def test_a_backbone_without_the_map_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Conv2d(4, 4, 3, padding=1))
    dilate(model)
    assert model[1].dilation == (1, 1)


def test_modes_stay() -> None:
    model = create_model("shufflenet_v2_x0_5", num_classes=3, seed=0)
    model.get_submodule("stage2").eval()
    modes = [module.training for module in model.modules()]
    before = {name: b.clone() for name, b in model.named_buffers()}
    dilate(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Halved(), r"1 \(Halved\) makes a map of stride 32"),
        (nn.Sequential(Halved()), r"1.0 \(Halved\) makes a map of stride 32"),
        (
            nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1)),
            r"1.1 \(AvgPool2d\) cannot be dilated: a mean takes all",
        ),
        (
            nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            r"1.1 \(Conv2d\) cannot be dilated: padding_mode 'reflect'",
        ),
        (
            nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)),
            r"1.1 \(Conv2d\) makes a map of stride 32",
        ),
        (nn.AvgPool2d(4, 2, 1), r"1 \(AvgPool2d\) .* does not keep the size"),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(v[-1] if isinstance(v, nn.Sequential) else v),
)
def test_what_is_in_the_way_is_named(part: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), part, nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ModelError, match=message):
        dilate(model)


def test_a_shared_window_on_two_maps_is_refused() -> None:
    pool = nn.MaxPool2d(2)
    with pytest.raises(ModelError, match="maps of several sizes"):
        dilate(nn.Sequential(nn.Conv2d(3, 4, 8, 8), pool, pool))


def test_backbones_that_take_no_such_image_are_refused() -> None:
    with pytest.raises(ModelError, match=r"VisionTransformer .* takes no image of 128×128"):
        dilate(create_model("torchvision:vit_b_16", num_classes=3, seed=0))
    with pytest.raises(ModelError, match=r"SwinTransformer cannot be dilated: .*stride 32"):
        dilate(create_model("torchvision:swin_t", num_classes=3, seed=0))


SMALL = {"width": 0.25, "depths": (1, 1, 2), "head_channels": 16}


def small(head: str, num_classes: int = 5, seed: int = 0) -> Segmenter:
    return create_segmenter(head, "shufflenet_v2_x0_5", num_classes, seed=seed, knobs=SMALL)


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (80, 112), (33, 70)])
def test_there_is_a_logit_per_class_and_pixel(head: str, size: tuple[int, int]) -> None:
    logits = small(head)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size) and logits.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["shufflenet_v1_x0_25_g3", "shufflenet_v2plus_small", "torchvision:resnet18"]
)
def test_other_backbones(head: str, name: str) -> None:
    model = create_segmenter(head, name, 4, seed=0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4, 64, 64)
    names = {name.removeprefix("features.body.") for name in model.state_dict()}
    backbone = create_model(name, num_classes=1000, seed=0).state_dict()
    assert len(names & backbone.keys()) > 0.8 * len(backbone)


def test_a_seed_gives_the_weights_and_leaves_the_global_state(head: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, other = small(head).state_dict(), small(head).state_dict(), small(head, seed=1)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = [n for n, t in other.state_dict().items() if not torch.equal(t, first[n])]
    assert any(n.startswith("features") for n in changed)
    assert any(n.startswith("classifier") for n in changed)


def test_the_head_is_what_trains_on_a_frozen_backbone(head: str) -> None:
    model = small(head)
    assert classifier_of(model) == ["classifier"]
    freeze(model, "backbone")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("class")}


def test_the_head_is_torchvisions() -> None:
    own = {name for name in small("lraspp").state_dict() if name.startswith("classifier")}
    theirs = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
    assert own == {name for name in theirs if name.startswith("classifier")}


def test_channels_last_gives_the_same_in_its_format(head: str) -> None:
    model, x = small(head).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_export_takes_any_batch(head: str) -> None:
    model, x = small(head).eval(), torch.randn(5, 3, 64, 96)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for num in (1, 2, 5):
        torch.testing.assert_close(exported(x[:num]), model(x[:num]))


def test_no_batch_size_is_fixed_in_training() -> None:
    """So that a plan can cut the batch; the image pooling asks for its size."""
    graph = capture(small("deeplabv3"), torch.zeros(3, 3, 64, 64)).program.graph
    image = graph.find_nodes(op="placeholder")[-1].meta["val"]
    assert isinstance(image.shape[0], torch.SymInt) and image.shape[1:] == (3, 64, 64)


def test_it_compiles_in_one_piece() -> None:
    model, x = small("deeplabv3"), torch.randn(2, 3, 64, 64)
    model.classifier.eval()  # without its dropout
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


class Alone(Exchange):
    def __init__(self) -> None:
        self.world, self.rank = 1, 0

    def all_gather(self, vector: Tensor) -> Tensor:
        return vector[None]


def test_a_batch_of_one_trains_as_in_the_loop(head: str) -> None:
    """There, every batch norm is ours, which knows what to do with one value per channel."""
    plain, looped = small(head).double(), small(head).double()
    synchronise_batch_norm(looped, Alone())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for model in (plain, looped):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(x).square().sum().backward()
    named = dict(looped.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, named[name].grad, msg=name)
    for name, buffer in plain.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(buffer, looped.get_buffer(name), msg=name)


def test_an_empty_batch_passes(head: str) -> None:
    """A rank may have no sample of a micro-batch."""
    model = synchronise_batch_norm(small(head).eval(), Alone())
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 5, 64, 64)


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--head lraspq: segment knows lraspp and deeplab"):
        small("lraspq")
    with pytest.raises(ModelError, match="stride 8"):
        Segmenter(nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten()), 3)
