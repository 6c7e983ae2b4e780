"""The generator and the discriminator: shapes, units, gradients, seeds, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.comm.exchange import Exchange
from meshuffle.errors import ModelError
from meshuffle.models.gan import Discriminator, Generator, GrowingUnit, SpectralNorm
from meshuffle.models.shufflenet_v2 import ShuffleUnitV2
from meshuffle.parallel.batch_norm import synchronise_batch_norm

WIDTH = 4


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_sizes(size: int) -> None:
    images = Generator(size, WIDTH, noise=5)(torch.randn(3, 5))
    assert images.shape == (3, 3, size, size)
    assert images.abs().max() <= 1 and images.std() > 1e-3
    assert Discriminator(size, WIDTH)(images).shape == (3, 1)


def test_a_growing_unit_is_a_unit_behind_a_grown_map() -> None:
    """1×1 convolutions and batch norm do not see whether every pixel is there four times."""
    torch.manual_seed(0)
    growing, plain = GrowingUnit(8, 4).double(), ShuffleUnitV2(8, 4, stride=1).double()
    weights = list(growing.state_dict().values())
    plain.load_state_dict(dict(zip(plain.state_dict(), weights, strict=True)))
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    grown = F.interpolate(x, scale_factor=2, mode="nearest")
    found = growing(x)
    assert found.shape == (2, 4, 6, 10)
    torch.testing.assert_close(found, plain(grown))


def test_the_smallest_map_decides_the_work() -> None:
    """The point of growing late: the 1×1 convolutions in front run on a quarter of the pixels."""
    unit = GrowingUnit(8, 4)
    sides = {}
    for name, module in unit.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, x, y, name=name: sides.__setitem__(name, y.shape[2])
            )
    unit(torch.randn(1, 8, 4, 4))
    assert sorted(sides.values()) == [4, 8, 8, 8, 8]


def test_every_parameter_learns() -> None:
    generator, discriminator = Generator(16, WIDTH), Discriminator(16, WIDTH)
    (discriminator(generator(torch.randn(6, 64))) * torch.randn(6, 1)).sum().backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_there_are_no_convolution_biases_that_batch_norm_eats() -> None:
    names = {name for name, _ in Generator(16, WIDTH).named_parameters() if "bias" in name}
    norms = {n for n, m in Generator(16, WIDTH).named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert names == {f"{name}.bias" for name in norms} | {"last.bias"}


def test_weights_have_a_largest_singular_value_of_one() -> None:
    discriminator = Discriminator(16, WIDTH)
    for _ in range(30):
        discriminator(torch.zeros(1, 3, 16, 16))
    found = 0
    for module in discriminator.eval().modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
            torch.testing.assert_close(largest, torch.ones(()), rtol=0.03, atol=0)
            found += 1
    assert found > 10
    assert not any(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules())


def test_the_spectral_norm_is_torchs() -> None:
    """Its value and its gradient, at the same vectors."""
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    theirs = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 6, 3, bias=False).double())
    own = SpectralNorm(weight).double().eval()
    torch_norm = theirs.parametrizations.weight[0]  # type: ignore[index,union-attr]
    torch_norm.eval()
    own.u.copy_(torch_norm._u)
    torch_norm._v.copy_(F.normalize(torch_norm._u @ weight.detach().flatten(1), dim=0))
    direction = torch.randn_like(weight)
    gradients = []
    for norm in (own, torch_norm):
        value = norm(weight)
        gradients.append((value, *torch.autograd.grad((value * direction).sum(), weight)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_length_of_the_vector_does_not_matter() -> None:
    """That of an average of vectors is below 1."""
    norm, weight = SpectralNorm(torch.eye(4, 5)).eval(), torch.randn(4, 5)
    expected = norm(weight)
    norm.u.mul_(0.1)
    torch.testing.assert_close(norm(weight), expected)


def test_eval_mode_changes_nothing() -> None:
    discriminator, x = Discriminator(16, WIDTH).eval(), torch.randn(2, 3, 16, 16)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    assert torch.equal(discriminator(x), discriminator(x))
    assert all(torch.equal(v, before[k]) for k, v in discriminator.state_dict().items())


def test_a_logit_depends_on_its_image_alone() -> None:
    discriminator, x = Discriminator(16, WIDTH), torch.randn(4, 3, 16, 16)
    whole = discriminator.eval()(x)
    torch.testing.assert_close(discriminator(x[2:3]), whole[2:3])


def test_half_precision_keeps_the_norm_in_float32() -> None:
    norm = SpectralNorm(torch.randn(4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(4, 5)).dtype == torch.float32
    assert norm.u.dtype == torch.float32


def test_channels_last_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    discriminator, generator = Discriminator(16, WIDTH).eval(), Generator(16, WIDTH).eval()
    z = torch.randn(2, 64)
    expected, images = discriminator(x), generator(z)
    for model in (discriminator, generator):
        model.to(memory_format=torch.channels_last)
    found = discriminator(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    made = generator(z)
    assert made.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made, images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Generator(16, WIDTH), torch.randn(5, 64)),
        (Discriminator(16, WIDTH), torch.randn(5, 3, 16, 16)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_export_takes_any_batch(model: nn.Module, x: Tensor) -> None:
    model.eval()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for num in (1, 2, 5):
        torch.testing.assert_close(exported(x[:num]), model(x[:num]))


class BesideSamples(Exchange):
    """Stands for another rank that has all the samples."""

    def __init__(self) -> None:
        self.world, self.rank = 2, 0

    def all_gather(self, vector: Tensor) -> Tensor:
        other = torch.ones_like(vector)
        return torch.stack([vector, other])


def test_a_rank_without_samples_takes_part() -> None:
    generator, discriminator = Generator(16, WIDTH), Discriminator(16, WIDTH)
    for model in (generator, discriminator):
        synchronise_batch_norm(model, BesideSamples())
    logits = discriminator(generator(torch.zeros(0, 64)))
    logits.sum().backward()
    assert logits.shape == (0, 1)
    assert all(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize("size", [0, 4, 12, 33, -8])
def test_sizes_that_do_not_double(size: int) -> None:
    for kind in (Generator, Discriminator):
        with pytest.raises(ModelError, match=rf"`size` \(={size}\) must be 8, 16, 32"):
            kind(size, WIDTH)


def test_other_faults() -> None:
    with pytest.raises(ModelError, match=r"`width` \(=3\) must be even"):
        Generator(16, 3)
    with pytest.raises(ModelError, match="width"):
        Discriminator(16, 0)
    with pytest.raises(ModelError, match="noise"):
        Generator(16, 4, 0)
