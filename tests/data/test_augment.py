import pickle

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from torchvision.transforms import v2

from meshuffle.data import AugmentConfig, EvalTransform, Preprocess, build_train_transform
from meshuffle.data.augment import augmentation_for, seeded
from meshuffle.data.base import ArraySource, Data
from meshuffle.errors import ConfigError

SMALL = Preprocess(crop=(20, 24), resize=26)
CONFIGS = {
    "crop": AugmentConfig(random_resized_crop=0.1),
    "flip": AugmentConfig(flip=0.5),
    "rotate": AugmentConfig(affine_degrees=30),
    "translate": AugmentConfig(affine_translate=0.2),
    "zoom": AugmentConfig(affine_scale=0.3),
    "trivial": AugmentConfig(trivial_augment=True),
    "erase": AugmentConfig(random_erasing=1.0),
    "all": AugmentConfig(0.3, 0.5, 10, 0.1, 0.1, True, 0.5),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@each_config
def test_a_view_is_a_function_of_its_draw(config):
    transform = build_train_transform(config, SMALL)
    image = noise(1, (40, 31))
    views = [transform(image, draw) for draw in range(12)]
    torch.rand(17)
    np.random.default_rng()
    again = [transform(image, draw) for draw in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert all(view.shape == (3, 20, 24) and view.dtype == torch.uint8 for view in views)
    assert len({view.numpy().tobytes() for view in views}) >= 2


@each_config
def test_the_callers_random_state_is_untouched(config):
    transform = build_train_transform(config, SMALL)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    transform(noise(2), 99)
    assert torch.equal(torch.rand(4), expected)


@each_config
def test_transforms_travel_to_workers(config):
    transform = build_train_transform(config, SMALL)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(noise(3), 7), transform(noise(3), 7))


def test_nothing_is_the_evaluation_view():
    image = noise(4, (50, 40))
    expected = SMALL.to_uint8(image)
    assert torch.equal(build_train_transform(AugmentConfig(), SMALL)(image, 3), expected)
    assert torch.equal(EvalTransform(SMALL)(image, 3), expected)


def test_each_draw_of_63_bits_is_taken():
    transform = build_train_transform(CONFIGS["all"], SMALL)
    for draw in (0, 2**31, 2**63 - 1):
        assert transform(noise(5), draw).shape == (3, 20, 24)


def test_views_equal_torchvisions_own_pipeline():
    """We skip v2's handling of nested inputs; the numbers are the same."""
    config = AugmentConfig(0.3, affine_degrees=10, affine_translate=0.1, affine_scale=0.1)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop((20, 24), scale=(0.3, 1.0)),
            v2.RandomAffine(
                10, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
            ),
            v2.PILToTensor(),
        ]
    )
    image = noise(6, (50, 40))
    for draw in range(5):
        torch.manual_seed(draw)
        assert torch.equal(build_train_transform(config, SMALL)(image, draw), theirs(image))


def test_flips_happen_about_half_of_the_time():
    image = noise(7, (26, 26))
    plain = SMALL.to_uint8(image)
    transform = build_train_transform(AugmentConfig(flip=0.5), SMALL)
    views = [transform(image, draw) for draw in range(200)]
    flipped = [torch.equal(view, plain.flip(2)) for view in views]
    assert all(f or torch.equal(v, plain) for f, v in zip(flipped, views, strict=True))
    assert 70 < sum(flipped) < 130


def test_erasing_leaves_the_mean_colour():
    transform = build_train_transform(AugmentConfig(random_erasing=1.0), SMALL)
    view = transform(Image.new("RGB", (26, 26), "white"), 1)
    colours = {tuple(pixel) for pixel in view.flatten(1).T.tolist()}
    assert colours == {(255, 255, 255), SMALL.mean_bytes}


def test_seeded_restores_after_an_error():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(3):
        _ = torch.rand(1), 1 / 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"flip": 1.5}, "flip (=1.5) must be in 0 … 1"),
        ({"random_resized_crop": 0.0}, "random_resized_crop (=0.0)"),
        ({"affine_scale": 1.0}, "affine_scale (=1.0)"),
        ({"affine_degrees": -3}, "affine_degrees (=-3)"),
        ({"mixup": -0.1}, "mixup (=-0.1)"),
        ({"cutmix": -1}, "cutmix (=-1)"),
        ({"repeats": 0}, "repeats (=0)"),
        ({"random_erasing": 2}, "random_erasing (=2)"),
        ({"flip": float("nan")}, "flip (=nan)"),
    ],
)
def test_values_out_of_range(values, text):
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(**values)
    assert text in str(caught.value)


def data_of(style: str, num: int) -> Data:
    source = ArraySource("x", ("a",), np.zeros((num, 1, 1), np.uint8), np.zeros(num, np.int64))
    return Data("x", ("a",), {"train": source}, 32, style)


def test_defaults_suit_the_images():
    assert augmentation_for(data_of("symbols", 5)).flip == 0
    assert augmentation_for(data_of("symbols", 5)).affine
    assert augmentation_for(data_of("thumbnails", 5)).flip == 0.5
    few, many = (
        augmentation_for(data_of("photos", 200)),
        augmentation_for(data_of("photos", 10_000)),
    )
    assert few.random_resized_crop and not few.trivial_augment
    assert many.trivial_augment and many.random_resized_crop < few.random_resized_crop
    assert not AugmentConfig().mixes and AugmentConfig(cutmix=1).mixes
