import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import retinanet, ssdlite
from torchvision.models.detection.image_list import ImageList

from meshuffle.errors import ConfigError, ModelError
from meshuffle.models import classifier_of, create_model, layer_names
from meshuffle.models.detections import MAX_DETECTIONS, Decoded, detections
from meshuffle.models.detector import HEADS, anchors_for, create_detector

SMALL = {"width": 0.25, "depths": (1, 1, 1), "head_channels": 32}
MODEL = "shufflenet_v2_x0_5"
SIDES = {"ssdlite": (20, 10, 5, 3, 2, 1), "fpn": (40, 20, 10, 5, 3)}
both_heads = pytest.mark.parametrize("head", HEADS)


def small_detector(head, num_classes=3, seed=0):
    return create_detector(head, MODEL, num_classes, seed=seed, knobs=SMALL)


def maps_of(sides, channels=1):
    return [torch.randn(2, channels, side, side) for side in sides]


def torchvision_anchors(head):
    if head == "ssdlite":
        maker = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None
        ).anchor_generator
    else:
        maker = retinanet._default_anchorgen()
    images = ImageList(torch.empty(1, 3, 320, 320), [(320, 320)])
    return maker(images, maps_of(SIDES[head]))[0]


@both_heads
def test_the_anchors_of_320_pixels_are_torchvisions(head):
    ours = anchors_for(head, (320, 320)) * 320
    torch.testing.assert_close(ours, torchvision_anchors(head), rtol=0, atol=1e-4)


@both_heads
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 160), (320, 320)])
def test_there_is_an_output_for_each_anchor(head, size):
    model = small_detector(head).eval()
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, *size))
    assert outputs.shape == (2, len(anchors_for(head, size)), 3 + model.background + 4)
    assert outputs.isfinite().all()


@both_heads
def test_the_anchors_of_a_tall_input_reach_from_edge_to_edge(head):
    anchors = anchors_for(head, (128, 64))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert 0 <= centres.min() < 0.1
    assert (centres.amax(0) > 0.85).all()
    assert centres.max() <= 1


def copied(theirs, ours):
    """Give their module our tensors: in the same order, whatever the names."""
    own = theirs.state_dict()
    values = [value for module in ours for value in module.state_dict().values()]
    assert [value.shape for value in values] == [value.shape for value in own.values()]
    theirs.load_state_dict(dict(zip(own, values, strict=True)))
    return theirs.eval()


def test_ssdlites_heads_compute_what_torchvisions_do():
    model = small_detector("ssdlite").eval()
    channels = [*model.features.channels, 512, 256, 256, 128]
    theirs = ssdlite.SSDLiteHead(channels, [6] * 6, 4, nn.BatchNorm2d)
    theirs = copied(theirs, [model.class_heads, model.box_heads])
    images = torch.randn(2, 3, 64, 64)
    maps = model.features(images)
    for extra in model.extras:
        maps.append(extra(maps[-1]))
    assert [x.shape[1] for x in maps] == channels
    outputs, wanted = model(images), theirs(maps)
    torch.testing.assert_close(outputs[..., :-4], wanted["cls_logits"])
    torch.testing.assert_close(outputs[..., -4:], wanted["bbox_regression"])


def test_fpns_head_computes_what_retinanets_does():
    model = small_detector("fpn").eval()
    norm = lambda channels: nn.GroupNorm(16, channels)  # noqa: E731
    theirs = retinanet.RetinaNetHead(96, 9, 3, norm_layer=norm)
    # Theirs holds each tower in front of its last layer, as ours does.
    parts = [model.class_tower, model.class_logits, model.box_tower, model.box_deltas]
    theirs = copied(theirs, parts)
    maps = maps_of((8, 4, 2, 1, 1), 96)
    wanted = theirs(maps)
    model.pyramid.forward = lambda _: dict(enumerate(maps))
    outputs = model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(outputs[..., :-4], wanted["cls_logits"])
    torch.testing.assert_close(outputs[..., -4:], wanted["bbox_regression"])


@both_heads
def test_the_same_seed_gives_the_same_weights_and_nothing_else_moves(head):
    before = torch.get_rng_state()
    first, same, other = (small_detector(head, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(
        first["features.body.conv1.0.weight"], other["features.body.conv1.0.weight"]
    )


@both_heads
def test_the_backbone_keeps_its_names_and_its_weights_of_the_seed(head):
    backbone = create_model(MODEL, seed=3, num_classes=1000, **SMALL)
    model = create_detector(head, MODEL, 3, seed=3, knobs=SMALL)
    classifier = tuple(f"{name}." for name in classifier_of(backbone))
    own = model.state_dict()
    for key, value in backbone.state_dict().items():
        if not key.startswith(classifier):
            assert torch.equal(own[f"features.body.{key}"], value), key


@both_heads
def test_what_is_no_backbone_is_the_head(head):
    model = small_detector(head)
    heads = tuple(f"{name}." for name in classifier_of(model))
    for key in model.state_dict():
        assert key.startswith(heads) != key.startswith("features.body."), key
    assert {"features", *classifier_of(model)} <= set(layer_names(model))


@both_heads
def test_all_of_it_trains(head):
    model = small_detector(head)
    assert all(module.training for module in model.modules())
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@both_heads
def test_no_image_gives_no_row_and_a_gradient(head):
    model = small_detector(head)
    outputs = model(torch.zeros(0, 3, 64, 64))
    assert outputs.shape == (0, len(anchors_for(head, (64, 64))), 7 + model.background)
    outputs.sum().backward()


@both_heads
def test_channels_last_changes_nothing(head):
    model = small_detector(head).eval()
    images = torch.randn(2, 3, 64, 64)
    wanted = model(images)
    model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@both_heads
def test_an_exported_detector_takes_any_batch(head):
    model = small_detector(head).eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=batch)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 64, 64)
        torch.testing.assert_close(program.module()(images), model(images))


@both_heads
def test_torch_compile_sees_one_graph(head):
    model = small_detector(head).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "shufflenet_v1_x0_25_g3"])
@both_heads
def test_other_backbones_do_as_well(head, name):
    model = create_detector(head, name, 2, seed=0).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64)).shape[1] == len(anchors_for(head, (64, 64)))


def test_a_model_without_the_maps_is_refused():
    shallow = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ModelError, match="no feature map of stride 16"):
        HEADS["ssdlite"](shallow, 2)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="--head fpm: detect knows ssdlite and fpn; did you mean"):
        create_detector("fpm", MODEL, 2, seed=0)
    with pytest.raises(ConfigError, match=r"300×64 pixels.*multiples of 32.*288×64"):
        anchors_for("ssdlite", (300, 64))


@both_heads
def test_anchors_made_in_inference_mode_are_of_use_in_training(head):
    anchors_for.cache_clear()
    with torch.inference_mode():
        anchors = anchors_for(head, (64, 64))
    assert not anchors.is_inference()
    assert anchors_for(head, (64, 64)) is anchors


def perfect(head, objects, num_classes, size=(64, 64)):
    """Return the outputs of one image that say exactly `objects` (class, box), [A, K + 4]."""
    kind, anchors = HEADS[head], anchors_for(head, size)
    outputs = torch.zeros(len(anchors), num_classes + kind.background + 4)
    outputs[:, :-4] = -20
    if kind.background:
        outputs[:, 0] = 0
    free = torch.ones(len(anchors), dtype=torch.bool)
    for score, (label, box) in zip((9.0, 8.0, 7.0), objects, strict=False):
        box = torch.tensor([box])
        overlap = torchvision.ops.box_iou(box, anchors)[0]
        best = int((overlap * free).argmax())
        free[best] = False
        outputs[best, label + kind.background] = score
        outputs[best, -4:] = kind.coder.encode_single(box, anchors[best : best + 1])[0]
    return outputs


OBJECTS = [(2, (0.1, 0.2, 0.5, 0.6)), (0, (0.4, 0.0, 1.0, 0.9)), (2, (0.6, 0.6, 0.8, 0.95))]


@both_heads
def test_perfect_outputs_give_the_boxes(head):
    outputs = torch.stack([perfect(head, OBJECTS, 3), perfect(head, OBJECTS[:1], 3)])
    found = detections(head, outputs, anchors_for(head, (64, 64)))
    assert found.shape == (2, 3, 6)
    boxes = torch.tensor([box for _, box in OBJECTS])
    torch.testing.assert_close(found[0, :, :4], boxes, rtol=0, atol=1e-5)
    assert found[0, :, 5].tolist() == [2, 0, 2]
    assert (found[0, :, 4] > 0.99).all()
    torch.testing.assert_close(found[1, 0], found[0, 0])
    assert (found[1, 1:] == -1).all()


@both_heads
def test_of_boxes_that_overlap_the_best_of_each_class_stays(head):
    box, near = (0.1, 0.2, 0.5, 0.6), (0.11, 0.2, 0.51, 0.6)
    outputs = perfect(head, [(1, box), (1, near), (2, box)], 3)[None]
    found = detections(head, outputs, anchors_for(head, (64, 64)))[0]
    assert found[:, 5].tolist() == [1, 2]
    torch.testing.assert_close(found[0, :4], torch.tensor(box), rtol=0, atol=1e-5)


@both_heads
def test_there_are_at_most_100_boxes_and_none_below_the_floor(head):
    anchors = anchors_for(head, (320, 320))
    torch.manual_seed(0)
    outputs = torch.randn(1, len(anchors), 8 + HEADS[head].background)
    found = detections(head, outputs, anchors)
    assert found.shape == (1, MAX_DETECTIONS, 6)
    assert (found[..., 4].diff() <= 0).all()
    assert ((found[..., :4] >= 0) & (found[..., :4] <= 1)).all()
    outputs[..., :-4] = -10
    outputs[..., 0] = 10 if HEADS[head].background else -10
    assert detections(head, outputs, anchors).shape == (1, 0, 6)
    assert detections(head, outputs[:0], anchors).shape == (0, 0, 6)


@pytest.mark.parametrize("head", ["ssdlite", "fpn"])
def test_an_exported_file_has_every_box_that_is_found(head: str) -> None:
    """`Decoded` is the same decoding, before suppression."""
    network = create_detector(head, "shufflenet_v2_x0_5", 3, seed=0, knobs={}).eval()
    anchors = anchors_for(head, (64, 64))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = network(x)
        outputs[..., : outputs.shape[2] - 4] *= 20  # an untrained network is sure of nothing
        raw = nn.Module()
        raw.forward = lambda _: outputs  # type: ignore[method-assign]
        every = Decoded(raw, head, anchors)(x)
        found = detections(head, outputs, anchors)
    assert every.shape == (2, len(anchors), 7)
    for i in range(2):
        for row in found[i][found[i, :, 4] >= 0][:10]:
            same = (every[i, :, :4] - row[:4]).abs().sum(1) < 1e-5
            assert (every[i, same, 4 + int(row[5])] - row[4]).abs().min() < 1e-5
