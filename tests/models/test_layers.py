import pytest
import torch
from torch import nn

from meshuffle.errors import ModelError
from meshuffle.models.layers import SqueezeExcite, conv, conv_bn_relu, depthwise, dropout_layer


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_stride_shrinks_the_map(kernel_size, stride):
    for side in (1, 7, 8):
        y = conv(2, 4, kernel_size, stride)(torch.randn(1, 2, side, side))
        assert y.shape == (1, 4, -(-side // stride), -(-side // stride))


def test_a_depthwise_convolution_keeps_channels_apart():
    layer = depthwise(4, 3, 1)
    assert layer.weight.shape == (4, 1, 3, 3)
    x = torch.zeros(1, 4, 5, 5)
    x[:, 2] = 1
    touched = layer(x).abs().sum((0, 2, 3)) > 0
    assert touched.tolist() == [False, False, True, False]


def test_convolutions_in_front_of_a_norm_have_no_bias():
    layer, norm, relu = conv_bn_relu(3, 8, 3, stride=2, groups=1)
    assert layer.bias is None
    assert norm.num_features == 8
    assert relu.inplace


def test_squeeze_and_excitation_by_the_formula():
    se = SqueezeExcite(8, reduction=4)
    x = torch.randn(2, 8, 3, 5)
    mean = x.mean((2, 3))
    hidden = torch.relu(nn.functional.linear(mean, se.reduce.weight.flatten(1), se.reduce.bias))
    gate = torch.sigmoid(nn.functional.linear(hidden, se.expand.weight.flatten(1), se.expand.bias))
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(32, 16, 2), (8, 16, 1), (9, 4, 2)])
def test_the_hidden_layer_has_at_least_one_channel(channels, reduction, hidden):
    assert SqueezeExcite(channels, reduction).reduce.out_channels == hidden


def test_a_reduction_of_nothing_is_refused():
    with pytest.raises(ModelError, match=r"`reduction` \(=0\)"):
        SqueezeExcite(8, 0)


def test_dropout_is_a_layer_only_where_it_does_something():
    assert isinstance(dropout_layer(0.0), nn.Identity)
    assert dropout_layer(0.3).p == 0.3
    for probability in (-0.1, 1.0, float("nan")):
        with pytest.raises(ModelError, match="`dropout`"):
            dropout_layer(probability)
