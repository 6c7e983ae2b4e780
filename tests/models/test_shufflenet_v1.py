from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import ChannelShuffle, ShuffleNetV1, count_macs, count_parameters
from meshuffle.models.shufflenet_v1 import STAGE_CHANNELS, ShuffleUnitV1, bottleneck_channels

AUTHORS = Path(__file__).parents[2].parent / "shared" / "data" / "shufflenetv1-authors"
WEIGHTS = AUTHORS / "shufflenetv1_g3_0.5x.pth.tar"
GOLDEN = AUTHORS / "golden_32_images.npz"
needs_authors_files = pytest.mark.skipif(
    not (WEIGHTS.exists() and GOLDEN.exists()), reason=f"the authors' V1 files are not in {AUTHORS}"
)

TINY = {"width": 0.25, "depths": (1, 2, 1), "num_classes": 5}

# Complexity at 224 px in millions. 1×: table 1 of the paper; 0.5× and 0.25×: table 2, one figure
# for all groups, but 40 for g=8 at 0.5×, where the authors' repository states it; the rest: the
# authors' repository.
PUBLISHED_MACS = {
    **{(1.0, g): macs for g, macs in {1: 143, 2: 140, 3: 137, 4: 133, 8: 137}.items()},
    **{(0.5, g): macs for g, macs in {1: 38, 2: 38, 3: 38, 4: 38, 8: 40}.items()},
    **{(0.25, g): 13 for g in (4, 8)},
    **{(1.5, 3): 292, (1.5, 8): 290, (2.0, 3): 524, (2.0, 8): 522},
}


def on_meta(**knobs) -> ShuffleNetV1:
    with torch.device("meta"):
        return ShuffleNetV1(**knobs)


@pytest.mark.parametrize(("width", "groups"), PUBLISHED_MACS)
def test_macs_are_the_published_ones_within_5_percent(width, groups):
    macs = count_macs(on_meta(groups=groups, width=width), (3, 224, 224)) / 1e6
    assert macs == pytest.approx(PUBLISHED_MACS[width, groups], rel=0.05)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_quarter_of_the_width_misses_the_published_13_million_as_documented(groups):
    macs = count_macs(on_meta(groups=groups, width=0.25), (3, 224, 224)) / 1e6
    assert 10.5 < macs < 12
    wider = on_meta(groups=groups, width=0.25, stem_channels=12)
    assert count_macs(wider, (3, 224, 224)) / 1e6 == pytest.approx(13, rel=0.07)


@pytest.mark.parametrize(
    ("width", "groups", "millions"),
    # The authors' repository, rounded there to one digit behind the point.
    [
        *((2.0, 3, 5.4), (2.0, 8, 6.5), (1.5, 3, 3.4), (1.5, 8, 4.3)),
        *((1.0, 3, 1.9), (1.0, 8, 2.4), (0.5, 3, 0.7), (0.5, 8, 1.0)),
    ],
)
def test_parameters_are_the_authors(width, groups, millions):
    parameters = count_parameters(on_meta(groups=groups, width=width))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.0501)


def test_se_adds_the_complexity_that_the_paper_states():
    with_se = count_macs(on_meta(groups=3, width=2.0, se=True), (3, 224, 224)) / 1e6
    assert with_se == pytest.approx(527, rel=0.01)


@pytest.mark.parametrize(
    ("groups", "width", "stem", "stages"),
    [
        (3, 0.5, 12, (120, 240, 480)),
        (8, 0.5, 16, (192, 384, 768)),
        (3, 1.5, 24, (360, 720, 1440)),
        (8, 2.0, 48, (768, 1536, 3072)),
        (4, 0.25, 8, (68, 136, 272)),
    ],
)
def test_the_rounding_rule(groups, width, stem, stages):
    model = on_meta(groups=groups, width=width)
    assert model.first_conv[0].out_channels == stem
    inputs = [unit.branch_main_1[0].in_channels for unit in model.features]
    assert (inputs[1], inputs[5], inputs[13]) == stages


@pytest.mark.parametrize("groups", STAGE_CHANNELS)
@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 0.3])
def test_every_width_divides_by_every_number_of_groups(groups, width):
    for unit in on_meta(groups=groups, width=width).features:
        for conv in (unit.branch_main_1[0], unit.branch_main_2[0]):
            assert conv.in_channels % conv.groups == conv.out_channels % conv.groups == 0


def test_the_bottleneck_is_rounded_up():
    assert [bottleneck_channels(200, 2), bottleneck_channels(68, 4)] == [50, 20]


def _authors_images() -> torch.Tensor:
    """Return the 32 golden images as BGR, 0…255, (32, 3, 224, 224)."""
    rgb_NHWC = torch.from_numpy(np.load(GOLDEN)["rgb_u8_nhwc"])
    return rgb_NHWC.permute(0, 3, 1, 2).flip(1).float().contiguous()


def _authors_model(**knobs) -> ShuffleNetV1:
    saved = torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    model = ShuffleNetV1(groups=3, width=0.5, **knobs).eval()
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()})
    return model


@needs_authors_files
class TestAuthorsWeights:
    @torch.inference_mode()
    def test_logits_equal_the_golden_ones(self):
        model = _authors_model(order="authors", permutation="inverse")
        golden = torch.from_numpy(np.load(GOLDEN)["logits"])
        images = _authors_images()
        torch.testing.assert_close(model(images), golden, rtol=0, atol=1e-4)
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), golden, rtol=0, atol=1e-4)

    @torch.inference_mode()
    @pytest.mark.parametrize(
        ("order", "permutation", "rgb"),
        [("authors", "inverse", True), ("authors", "paper", False), ("paper", "inverse", False)],
    )
    def test_each_departure_changes_them(self, order, permutation, rgb):
        model = _authors_model(order=order, permutation=permutation)
        golden = torch.from_numpy(np.load(GOLDEN)["logits"])[:4]
        images = _authors_images()[:4]
        logits = model(images.flip(1) if rgb else images)
        assert (logits - golden).abs().max() > 1

    def test_there_are_as_many_parameters(self):
        assert count_parameters(_authors_model()) == 717_324


def _unit(order: str, **knobs) -> ShuffleUnitV1:
    torch.manual_seed(0)
    unit = ShuffleUnitV1(24, 24, groups=3, stride=1, order=order, **knobs).eval()
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return unit


def test_the_unit_computes_the_formula_of_the_paper():
    unit = _unit("paper")
    x = torch.randn(2, 24, 5, 5)
    conv1, norm1, _, conv2, norm2, _ = unit.branch_main_1
    y = torch.relu(norm1(conv1(x)))
    y = y.view(2, 3, 2, 5, 5).transpose(1, 2).reshape(2, 6, 5, 5)
    y = unit.branch_main_2(norm2(conv2(y)))
    torch.testing.assert_close(unit(x), torch.relu(x + y))


def test_the_authors_shuffle_behind_the_depthwise_convolution():
    unit = _unit("authors", permutation="inverse")
    x = torch.randn(2, 24, 5, 5)
    conv1, norm1, _, conv2, norm2, _ = unit.branch_main_1
    y = norm2(conv2(torch.relu(norm1(conv1(x)))))
    y = y.view(2, 2, 3, 5, 5).transpose(1, 2).reshape(2, 6, 5, 5)
    torch.testing.assert_close(unit(x), torch.relu(x + unit.branch_main_2(y)))


def test_both_orders_agree_once_the_depthwise_weights_are_permuted():
    """Depthwise commutes with a channel permutation: DESIGN section 3.1 rests on it."""
    paper, authors = _unit("paper"), _unit("authors")
    authors.load_state_dict(paper.state_dict())
    perm = list(next(m for m in paper.modules() if isinstance(m, ChannelShuffle)).permutation)
    with torch.no_grad():
        for name in ("3.weight", "4.weight", "4.bias", "4.running_mean", "4.running_var"):
            key = f"branch_main_1.{name}"
            authors.state_dict()[key][perm] = paper.state_dict()[key]
    x = torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(authors(x), paper(x))


def test_orders_and_permutations_share_their_keys():
    keys = [
        list(on_meta(groups=3, order=order, permutation=permutation, se=False).state_dict())
        for order in ("paper", "authors")
        for permutation in ("paper", "inverse", "random")
    ]
    assert all(key == keys[0] for key in keys)
    assert "classifier.0.bias" not in keys[0]


def test_se_is_in_every_unit_and_scales_its_branch():
    model = ShuffleNetV1(groups=3, se=True, **TINY).eval()
    gates = [unit.se.expand for unit in model.features]
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    for gate in gates:
        nn.init.constant_(gate.bias, -50)
    assert not torch.allclose(model(x), before)
    unit = model.features[2]
    features = torch.rand(1, 120, 4, 4)
    torch.testing.assert_close(unit(features), features)


def test_kernel_sizes_per_unit_and_by_the_map():
    given = ShuffleNetV1(groups=3, kernel_size=(3, 5, 7, 3), **TINY)
    assert [unit.branch_main_1[3].kernel_size[0] for unit in given.features] == [3, 5, 7, 3]
    auto = on_meta(groups=3, kernel_size="auto", input_size=224)
    assert [u.branch_main_1[3].kernel_size[0] for u in auto.features] == [7, *[5] * 4, *[3] * 11]
    small = on_meta(groups=3, kernel_size="auto", input_size=48)
    assert {unit.branch_main_1[3].kernel_size[0] for unit in small.features} == {3}


def test_random_permutations_differ_between_units_and_follow_the_seed():
    def permutations(seed):
        model = ShuffleNetV1(groups=3, permutation="random", permutation_seed=seed, **TINY)
        return [m.permutation for m in model.modules() if isinstance(m, ChannelShuffle)]

    assert permutations(1) == permutations(1)
    assert permutations(1) != permutations(2)
    assert permutations(1)[1] != permutations(1)[2]


def test_a_given_permutation_needs_stages_of_equal_width():
    perm = [5, 4, 3, 2, 1, 0]
    knobs = {"groups": 3, "stem_channels": 12, "depths": (1, 1, 1)}
    with pytest.raises(ModelError, match="a list of 6"):
        ShuffleNetV1(stage_channels=(24, 48, 96), permutation=perm, **knobs)
    unit = ShuffleUnitV1(24, 24, groups=3, stride=1, permutation=perm)
    assert unit(torch.randn(2, 24, 4, 4)).shape == (2, 24, 4, 4)


def test_drop_path_skips_branches_in_training_only():
    model = ShuffleNetV1(groups=3, drop_path=0.9, width=0.25, depths=(1, 9, 1), num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_depths_and_widths_can_be_given():
    model = ShuffleNetV1(groups=2, stage_channels=(40, 80, 160), depths=(1, 2, 3), in_channels=1)
    assert len(model.features) == 6
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"groups": 5}, r"`groups` \(=5\) is none of 1, 2, 3, 4, 8"),
        ({"groups": 0}, r"`groups` \(=0\) must be at least 1"),
        ({"width": 0}, r"`width` \(=0\) must be above 0"),
        ({"order": "author"}, "did you mean 'authors'"),
        ({"permutation": "papers"}, "did you mean 'paper'"),
        ({"kernel_size": 4}, r"`kernel_size` \(=4\) must be odd"),
        ({"kernel_size": [3, 3]}, "2 entries; the model has 16 units"),
        ({"depths": (4, 8)}, "`depths` has 2 entries"),
        ({"stem_channels": 0}, r"`stem_channels` \(=0\)"),
        ({"stage_channels": (240, 480, -3)}, r"`stage_channels` \(=-3\)"),
        ({"stage_channels": (240, 480)}, "`stage_channels` has 2 entries"),
        ({"groups": 3, "stem_channels": 25}, r"`branch_channels` \(=215\) .* `groups` \(=3\)"),
        ({"dropout": 1.0}, r"`dropout` \(=1.0\)"),
        ({"drop_path": -0.1}, r"`drop_path` \(=-0.1\)"),
        ({"num_classes": 0}, r"`num_classes` \(=0\)"),
        ({"in_channels": 0}, r"`in_channels` \(=0\)"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_with_their_values(knobs, message):
    with pytest.raises(ModelError, match=message):
        on_meta(**knobs)
