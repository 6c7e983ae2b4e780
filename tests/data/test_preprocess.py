import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from torchvision.models import ShuffleNet_V2_X1_0_Weights
from torchvision.transforms import v2

from meshuffle.data import Preprocess
from meshuffle.data.base import ArraySource, Data
from meshuffle.errors import ConfigError

FORMATS = [torch.contiguous_format, torch.channels_last]


def by_hand(preprocess: Preprocess, images: torch.Tensor) -> torch.Tensor:
    values = images.double()[:, [0, 1, 2] if preprocess.channels == "RGB" else [2, 1, 0]]
    mean = torch.tensor(preprocess.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(preprocess.std, dtype=torch.float64).view(3, 1, 1)
    return (values * preprocess.scale - mean) / std


def test_imagenet_is_torchvisions_evaluation_transform():
    image = noise(1, (300, 401))
    theirs = ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.transforms()(image)
    preprocess = Preprocess.imagenet()
    ours = preprocess.normalise(preprocess.to_uint8(image)[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("preprocess", [Preprocess.imagenet(), Preprocess.authors()])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (0, 3, 4, 4), (1, 3, 1, 1), (3, 3, 1, 6)])
def test_normalise(preprocess, memory_format, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(memory_format=memory_format)
    before = images.clone()
    values = preprocess.normalise(images)
    assert values.dtype == torch.float32
    assert values.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(values.double(), by_hand(preprocess, images), rtol=1e-6, atol=1e-5)
    assert torch.equal(images, before)


def test_float_input_is_not_overwritten():
    images = torch.full((1, 3, 2, 2), 100.0)
    Preprocess.imagenet().normalise(images)
    assert images.eq(100).all()


def test_authors_have_bytes_in_the_order_blue_green_red():
    red = Image.new("RGB", (300, 300), (200, 100, 50))
    preprocess = Preprocess.authors()
    values = preprocess.normalise(preprocess.to_uint8(red)[None])
    assert values.shape == (1, 3, 224, 224)
    assert values[0, :, 0, 0].tolist() == [50.0, 100.0, 200.0]


def test_wrong_channel_order_is_noticed():
    """The planted fault: the numbers differ when the order is forgotten."""
    image = noise(2, (256, 256))
    authors = Preprocess.authors()
    forgot = Preprocess.from_dict({**authors.to_dict(), "channels": "RGB"})
    x = authors.to_uint8(image)[None]
    assert not torch.equal(authors.normalise(x), forgot.normalise(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([None, 8, 20, 33]))
def test_every_size_of_image_gives_the_crop(width, height, resize):
    preprocess = Preprocess(crop=(16, 20), resize=resize)
    view = preprocess.to_uint8(Image.new("RGB", (width, height), "white"))
    assert view.shape == (3, 16, 20)
    assert view.dtype == torch.uint8


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 900)])
def test_strips_do_not_explode(size):
    view = Preprocess.imagenet().to_uint8(Image.new("RGB", size, (9, 8, 7)))
    assert view[:, 112, 112].tolist() == [9, 8, 7]


def test_geometry_equals_torchvision_for_odd_sizes():
    image = noise(3, (41, 67))
    steps = [v2.Resize(37, antialias=True), v2.CenterCrop((30, 24)), v2.PILToTensor()]
    ours = Preprocess(crop=(30, 24), resize=37).to_uint8(image)
    assert torch.equal(ours, v2.Compose(steps)(image))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_interpolation_is_used(interpolation):
    image = noise(4, (40, 40))
    view = Preprocess(crop=20, resize=20, interpolation=interpolation).to_uint8(image)
    method = Image.Resampling[interpolation.upper()]
    expected = np.asarray(image.resize((20, 20), method)).transpose(2, 0, 1)
    np.testing.assert_array_equal(view.numpy(), expected)


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(), Preprocess.imagenet(96), Preprocess.authors(), Preprocess((8, 9), None)],
)
def test_survives_json(preprocess):
    stored = json.dumps(preprocess.to_dict())
    assert Preprocess.from_dict(json.loads(stored)) == preprocess


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"cropp": 3}, "unknown preprocessing key 'cropp'; did you mean 'crop'?"),
        ({"crop": 0}, "must be ≥ 1"),
        ({"crop": [1, 2, 3]}, "must be ≥ 1"),
        ({"resize": 0}, "must be ≥ 1"),
        ({"std": [1, 0, 1]}, "std and scale > 0"),
        ({"mean": [1, 0]}, "must be 3, 3 and 1 numbers"),
        ({"scale": 0.0}, "std and scale > 0"),
        ({"channels": "GBR"}, "'GBR'"),
        ({"interpolation": "cubic"}, "'cubic'"),
    ],
)
def test_values_out_of_range(values, text):
    with pytest.raises(ConfigError, match=r".") as caught:
        Preprocess.from_dict(values)
    assert text in str(caught.value)


def data_of(style: str, input_size: int) -> Data:
    source = ArraySource("x", ("a", "b"), np.zeros((0, 8, 8), np.uint8), np.zeros(0, np.int64))
    return Data("x", ("a", "b"), {"train": source}, input_size, style, (0.1,) * 3, (0.2,) * 3)


def test_for_data():
    symbols = Preprocess.for_data(data_of("symbols", 48))
    assert (symbols.size, symbols.resize, symbols.mean) == ((48, 48), 48, (0.1, 0.1, 0.1))
    photos = Preprocess.for_data(data_of("photos", 224))
    assert (photos.size, photos.resize) == ((224, 224), 256)
    assert Preprocess.for_data(data_of("photos", 224), size=64).resize == 73


def test_mean_colour_in_bytes():
    assert Preprocess.imagenet().mean_bytes == (124, 116, 104)
    bgr = Preprocess(channels="BGR", scale=1.0, mean=(10, 20, 30), std=(1, 1, 1))
    assert bgr.mean_bytes == (30, 20, 10)


@pytest.mark.gpu
def test_normalise_on_a_gpu():
    images = torch.randint(0, 256, (4, 3, 9, 8), dtype=torch.uint8)
    preprocess = Preprocess.imagenet()
    for memory_format in FORMATS:
        there = images.to("cuda", memory_format=memory_format)
        values = preprocess.normalise(there)
        assert values.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(values.cpu(), preprocess.normalise(images))
