import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import ChannelShuffle, ShuffleNetV2, count_macs, create_model
from meshuffle.models.shufflenet_v2 import MultiBranch, ShuffleUnitV2

TINY = {"stage_channels": (16, 32, 64), "depths": (1, 2, 1), "head_channels": 64, "num_classes": 5}
TORCHVISION = {"x0_5": 1_366_792, "x1_0": 2_278_604, "x1_5": 3_503_624, "x2_0": 7_393_996}


def on_meta(**knobs) -> ShuffleNetV2:
    with torch.device("meta"):
        return ShuffleNetV2(**knobs)


def units_of(model: ShuffleNetV2) -> list[ShuffleUnitV2]:
    return [module for module in model.modules() if isinstance(module, ShuffleUnitV2)]


def torchvision_pair(size: str) -> tuple[nn.Module, nn.Module]:
    """Return ours and torchvision's, built from the same seed."""
    ours = create_model(f"shufflenet_v2_{size}", num_classes=10, seed=3)
    theirs = create_model(f"torchvision:shufflenet_v2_{size}", num_classes=10, seed=3)
    return ours, theirs


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("size", TORCHVISION)
def test_keys_order_and_initial_values_are_torchvisions(size):
    assert_same(*torchvision_pair(size))


@pytest.mark.parametrize("size", TORCHVISION)
@pytest.mark.parametrize("training", [True, False])
def test_output_loss_gradients_and_buffers_are_torchvisions(size, training):
    ours, theirs = torchvision_pair(size)
    ours.train(training)
    theirs.train(training)
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([1, 2, 9])
    logits = [model(images) for model in (ours, theirs)]
    losses = [nn.functional.cross_entropy(out, labels) for out in logits]
    for loss in losses:
        loss.backward()
    assert torch.equal(*logits)
    assert torch.equal(*losses)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), name
    assert_same(ours, theirs)


def test_channels_last_agrees_with_torchvision_to_rounding():
    ours, theirs = (model.double().eval() for model in torchvision_pair("x0_5"))
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    own = ours(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(own, theirs(images), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("permutation", ["inverse", "random"])
def test_another_permutation_is_not_torchvisions(permutation):
    _, theirs = torchvision_pair("x0_5")
    ours = create_model("shufflenet_v2_x0_5", num_classes=10, permutation=permutation)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 64, 64)
    # In training the batch norms lift the differences far above rounding.
    assert not torch.allclose(ours(images), theirs(images), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("shufflenet_v2_x0_5", 41e6),
        ("shufflenet_v2_x1_0", 146e6),
        ("shufflenet_v2_x1_5", 299e6),
        ("shufflenet_v2_x2_0", 591e6),
        ("shufflenet_v2_x2_0_se", 597e6),
        ("shufflenet_v2_50", 2.3e9),
        ("shufflenet_v2_164_se", 12.7e9),
    ],
)
def test_macs_are_the_papers_within_5_percent(name, published):
    with torch.device("meta"):
        model = create_model(name)
    assert count_macs(model, (3, 224, 224)) == pytest.approx(published, rel=0.05)


def test_164_counts_its_layers():
    """Three per unit, three in the stem, the 1×1 convolution and the classifier."""
    with torch.device("meta"):
        model = create_model("shufflenet_v2_164_se")
    assert 3 * len(units_of(model)) + 3 + 2 == 164


def test_the_unit_computes_the_formula_of_the_paper():
    unit = ShuffleUnitV2(16, 16, stride=1).eval()
    x = torch.randn(2, 16, 5, 5)
    joined = torch.cat((x[:, :8], unit.branch2(x[:, 8:])), dim=1)
    expected = joined.view(2, 2, 8, 5, 5).transpose(1, 2).reshape(2, 16, 5, 5)
    torch.testing.assert_close(unit(x), expected)


def test_the_residual_unit_adds_its_half():
    unit = ShuffleUnitV2(16, 16, stride=1, residual=True, permutation=list(range(16))).eval()
    x = torch.randn(2, 16, 5, 5)
    y = unit(x)
    assert torch.equal(y[:, :8], x[:, :8])
    torch.testing.assert_close(y[:, 8:], torch.relu(x[:, 8:] + unit.branch2(x[:, 8:])))
    assert not isinstance(unit.branch2[-1], nn.ReLU)


def test_a_unit_that_shrinks_adds_nothing():
    plain = ShuffleUnitV2(16, 32, stride=2)
    residual = ShuffleUnitV2(16, 32, stride=2, residual=True)
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(plain.eval()(x), residual.eval()(x))


def test_se_scales_the_branch_only():
    unit = ShuffleUnitV2(16, 16, stride=1, se=True, permutation=list(range(16))).eval()
    nn.init.constant_(unit.se.expand.bias, -100)
    x = torch.randn(2, 16, 5, 5)
    y = unit(x)
    assert torch.equal(y[:, :8], x[:, :8])
    torch.testing.assert_close(y[:, 8:], torch.zeros(2, 8, 5, 5))


def test_four_stages_begin_on_the_map_of_the_max_pool():
    model = ShuffleNetV2(stage_channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), head_channels=16)
    assert model.stage_names == ("stage1", "stage2", "stage3", "stage4")
    sides = []
    for name in model.stage_names:
        getattr(model, name).register_forward_hook(lambda m, i, y: sides.append(y.shape[-1]))
    model(torch.randn(2, 3, 64, 64))
    assert sides == [16, 8, 4, 2]


def test_branches_by_the_map():
    units = units_of(on_meta(branches="auto"))
    counts = [len(u.branch2.paths) if isinstance(u.branch2, MultiBranch) else 1 for u in units]
    assert counts == [*[3] * 5, *[2] * 8, *[1] * 3]


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_share_the_width_and_deepen(stride):
    branch = MultiBranch(8, 14, 3, stride, 3)
    convs = [[m for m in path if isinstance(m, nn.Conv2d)] for path in branch.paths]
    assert [path[-1].out_channels for path in convs] == [7, 4, 3]
    assert [len(path) - 2 for path in convs] == [1, 2, 3]
    side = 6 // stride
    assert branch(torch.randn(2, 8, 6, 6)).shape == (2, 14, side, side)


def test_one_branch_is_the_ordinary_unit():
    assert list(on_meta(branches=1).state_dict()) == list(on_meta().state_dict())


def test_branches_per_unit_compute_and_learn():
    model = ShuffleNetV2(branches=(1, 2, 3, 1), se=True, **TINY)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_kernel_sizes_per_unit_and_by_the_map():
    given = units_of(ShuffleNetV2(kernel_size=(3, 5, 7, 3), **TINY))
    assert [unit.branch2[3].kernel_size[0] for unit in given] == [3, 5, 7, 3]
    assert [unit.branch1[0].kernel_size[0] for unit in given if len(unit.branch1)] == [3, 5, 3]
    auto = units_of(on_meta(kernel_size="auto"))
    assert [unit.branch2[3].kernel_size[0] for unit in auto] == [7, *[5] * 4, *[3] * 11]


def test_width_scales_the_stages_to_even_numbers():
    model = on_meta(width=0.37)
    outs = [unit.shuffle.num_channels for unit in units_of(model)]
    assert sorted(set(outs)) == [44, 86, 172]


def test_a_given_permutation_fits_stages_of_equal_width():
    perm = [*range(1, 16), 0]
    knobs = {"stage_channels": (16, 16, 16), "depths": (1, 1, 1), "head_channels": 8}
    model = ShuffleNetV2(permutation=perm, **knobs)
    shuffles = [m.permutation for m in model.modules() if isinstance(m, ChannelShuffle)]
    assert shuffles == [tuple(perm)] * 3
    with pytest.raises(ModelError, match="a list of 16"):
        on_meta(permutation=perm, stage_channels=(16, 32, 16))


def test_drop_path_skips_branches_in_training_only():
    model = ShuffleNetV2(
        residual=True, drop_path=0.9, stage_channels=(16, 16, 16), depths=(1, 6, 6), num_classes=5
    )
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_acts_in_training_only_and_draws_nothing_at_zero():
    model = ShuffleNetV2(dropout=0.5, **TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    plain = ShuffleNetV2(**TINY)
    state = torch.random.get_rng_state()
    plain(x)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"stage_channels": (116, 232)}, "`stage_channels` has 2 entries"),
        ({"depths": (4, 8, 4, 4)}, "`depths` has 4 entries"),
        ({"stem_channels": ()}, "stem_channels"),
        ({"stem_channels": (0,)}, r"`stem_channels` \(=0\)"),
        ({"head_channels": 0}, r"`head_channels` \(=0\)"),
        ({"stage_channels": (116, 0, 464)}, r"`stage_channels` \(=0\)"),
        ({"kernel_size": 2}, r"`kernel_size` \(=2\) must be odd"),
        ({"kernel_size": "automatic"}, "`kernel_size` is 'automatic'"),
        ({"branches": 0}, r"`branches` \(=0\) must be at least 1"),
        ({"branches": 8}, r"`branches` \(=8\) is too many for a unit of 58 channels"),
        ({"branches": [1, 2]}, "`branches` has 2 entries; the model has 16 units"),
        ({"drop_path": 0.1}, "needs `residual=True`"),
        ({"dropout": 2.0}, r"`dropout` \(=2.0\)"),
        ({"width": -1.0}, "`width`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"permutation": "inverted"}, "did you mean 'inverse'"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_with_their_values(knobs, message):
    with pytest.raises(ModelError, match=message):
        on_meta(**knobs)
