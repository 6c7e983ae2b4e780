import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models import ShuffleNetV2Plus, count_macs, count_parameters, create_model
from meshuffle.models.shufflenet_v2plus import HardSqueezeExcite, ShuffleUnitV2Plus

TINY = {"stage_channels": (24, 28, 32, 36), "depths": (1, 2, 1, 2), "num_classes": 5}
TINY_BLOCKS = (3, "xception", 5, 7, 3, "xception")

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(**knobs) -> ShuffleNetV2Plus:
    with torch.device("meta"):
        return ShuffleNetV2Plus(**knobs)


@pytest.mark.parametrize(
    # The authors' repository; parameters rounded there to one digit behind the point.
    ("size", "macs", "parameters"),
    [("small", 156, 5.1), ("medium", 222, 5.6), ("large", 360, 6.7)],
)
def test_complexity_is_the_authors(size, macs, parameters):
    with torch.device("meta"):
        model = create_model(f"shufflenet_v2plus_{size}")
    assert count_macs(model, (3, 224, 224)) / 1e6 == pytest.approx(macs, rel=0.005)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=0.1)


def keys_below(model: nn.Module, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix)]


def conv_norm_keys(*positions: int) -> list[str]:
    """Return the keys of convolutions at `positions`, each with a batch norm behind it."""
    return [
        key for i in positions for key in (f"{i}.weight", *(f"{i + 1}.{part}" for part in NORM))
    ]


def test_keys_are_the_authors():
    model = on_meta()
    assert keys_below(model, "first_conv.") == conv_norm_keys(0)
    assert keys_below(model, "features.0.branch_main.") == conv_norm_keys(0, 3, 5)
    assert keys_below(model, "features.0.branch_proj.") == conv_norm_keys(0, 2)
    assert keys_below(model, "features.2.branch_main.") == conv_norm_keys(0, 2, 5, 7, 10, 12)
    assert keys_below(model, "features.8.branch_main.8.SE_opr.") == [*conv_norm_keys(1), "4.weight"]
    assert keys_below(model, "features.18.branch_main.15.SE_opr.") == [
        *conv_norm_keys(1),
        "4.weight",
    ]
    assert keys_below(model, "features.1.branch_proj") == []
    assert keys_below(model, "conv_last.") == conv_norm_keys(0)
    assert keys_below(model, "LastSE.SE_opr.") == [*conv_norm_keys(1), "4.weight"]
    assert keys_below(model, "fc.") == keys_below(model, "classifier.") == ["0.weight"]


def test_relu_without_se_comes_first_then_hard_swish_then_se():
    model = on_meta()

    def kinds(i: int) -> tuple[bool, bool]:
        modules = list(model.features[i].modules())
        return tuple(
            any(isinstance(m, kind) for m in modules) for kind in (nn.Hardswish, HardSqueezeExcite)
        )

    assert [kinds(i) for i in (0, 3, 4, 7, 8, 19)] == [
        *[(False, False)] * 2,
        *[(True, False)] * 2,
        *[(True, True)] * 2,
    ]
    assert not any(isinstance(m, HardSqueezeExcite) for m in on_meta(se=False).features.modules())


@pytest.mark.parametrize("block", [3, 5, 7, "xception"])
def test_a_stride_1_unit_keeps_the_even_channels_and_works_on_the_odd_ones(block):
    unit = ShuffleUnitV2Plus(16, 16, block=block, stride=1, se=True).eval()
    x = torch.randn(2, 16, 7, 7)
    y = unit(x)
    assert torch.equal(y[:, :8], x[:, 0::2])
    torch.testing.assert_close(y[:, 8:], unit.branch_main(x[:, 1::2]))


@pytest.mark.parametrize("block", [3, 5, 7, "xception"])
def test_a_stride_2_unit_halves_the_map_and_keeps_the_channels_of_its_input(block):
    unit = ShuffleUnitV2Plus(16, 36, block=block, stride=2).eval()
    x = torch.randn(2, 16, 7, 7)
    y = unit(x)
    assert y.shape == (2, 36, 4, 4)
    torch.testing.assert_close(y[:, :16], unit.branch_proj(x))


def test_the_gate_is_the_authors_formula():
    gate = HardSqueezeExcite(8).eval()
    x = torch.randn(2, 8, 3, 3)
    attention = gate.SE_opr(x)
    torch.testing.assert_close(gate(x), x * torch.clamp(attention + 3, 0, 6) / 6)


def test_blocks_per_unit_one_for_all_and_by_the_map():
    model = ShuffleNetV2Plus(kernel_size=TINY_BLOCKS, **TINY)
    lengths = [
        sum(isinstance(m, nn.ReLU | nn.Hardswish) for m in u.branch_main) for u in model.features
    ]
    assert lengths == [2, 3, 2, 2, 2, 3]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    fives = on_meta(kernel_size=5)
    assert {unit.branch_main[3].kernel_size[0] for unit in fives.features} == {5}
    auto = on_meta(kernel_size="auto")
    sizes = [unit.branch_main[3].kernel_size[0] for unit in auto.features]
    assert sizes == [*[7] * 5, *[5] * 4, *[3] * 11]


def test_the_permutation_changes_the_numbers_and_not_the_keys():
    logits = []
    for permutation in ("inverse", "paper", "random"):
        torch.manual_seed(0)
        model = ShuffleNetV2Plus(permutation=permutation, kernel_size=3, **TINY).eval()
        torch.manual_seed(1)
        logits.append(model(torch.randn(2, 3, 32, 32)))
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, "`kernel_size` has 20 entries .* needs 4"),
        ({"stage_channels": (36, 104, 208)}, "`stage_channels` has 3 entries"),
        ({"stage_channels": (16, 104, 208, 416)}, r"`out_channels` \(=16\) must be above"),
        ({"kernel_size": 6}, r"`kernel_size` \(=6\) must be odd"),
        ({"kernel_size": [*[3] * 19, "exception"]}, "'exception'; it must be a number or 'xcep"),
        ({"kernel_size": [*[3] * 19, 4]}, r"`kernel_size` \(=4\)"),
        ({"kernel_size": "xception"}, "`kernel_size` is 'xception'"),
        ({"dropout": -0.2}, "`dropout`"),
        ({"num_classes": 0}, "`num_classes`"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_with_their_values(knobs, message):
    with pytest.raises(ModelError, match=message):
        on_meta(**knobs)
