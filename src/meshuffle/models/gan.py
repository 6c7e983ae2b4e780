"""A small GAN of ShuffleNet V2 units: a generator, and a discriminator that judges its images.

    z (N, Z) ──dense──▶ 4×4 ──grow──▶ 8×8 ──grow──▶ … ──3×3, tanh──▶ images (N, 3, s, s)
    images ──3×3──▶ s×s ──halve──▶ s/2 … ──halve──▶ 4×4 ──mean, linear──▶ logit (N, 1)

A growing unit is a V2 unit that doubles the map by nearest neighbours in front of its depthwise
convolutions, where the discriminator's units halve it. In both networks the number of channels is
`width` at full size and doubles with each halving. Sources of the scheme: arXiv 1511.06434
(DCGAN), 1807.11164 (V2).

Shape suffixes: N images, Z numbers of noise, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from meshuffle.errors import ModelError
from meshuffle.models.knobs import require_at_least
from meshuffle.models.layers import conv
from meshuffle.models.shufflenet_v2 import ShuffleUnitV2

NOISE = 64
WIDTH = 32
_SMALLEST = 4  # pixels of the side of the smallest map


class GrowingUnit(ShuffleUnitV2):
    """A V2 unit that doubles the map: all of x goes through both of its branches.

    Args:
        in_channels, out_channels: must differ; `out_channels` must be even.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, stride=1)
        for branch in (self.branch1, self.branch2):
            assert isinstance(branch, nn.Sequential)
            first = next(i for i, m in enumerate(branch) if _is_depthwise(m))
            branch.insert(first, nn.Upsample(scale_factor=2, mode="nearest"))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


class Generator(nn.Module):
    """The network that makes images from noise.

    Args:
        size: side of the images in pixels: 8, 16, 32, 64 and so on.
        width: channels at full size.
        noise: Z.

    Raises:
        ModelError: a value does not fit.
    """

    def __init__(self, size: int = 32, width: int = WIDTH, noise: int = NOISE) -> None:
        super().__init__()
        require_at_least("noise", noise, 1)
        channels = _channels(size, width)[::-1]
        self.noise = noise
        self.dense = nn.Sequential(
            nn.Linear(noise, channels[0] * _SMALLEST**2, bias=False),
            nn.Unflatten(1, (channels[0], _SMALLEST, _SMALLEST)),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        units: list[nn.Module] = []
        for in_channels, out_channels in pairwise(channels):
            units.append(GrowingUnit(in_channels, out_channels))
            units.append(ShuffleUnitV2(out_channels, out_channels, stride=1))
        self.units = nn.Sequential(*units)
        self.last = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z_NZ: Tensor) -> Tensor:
        """Return images (N, 3, size, size) in −1 … 1."""
        return torch.tanh(self.last(self.units(self.dense(z_NZ))))


class Discriminator(nn.Module):
    """The network that judges images: a higher logit means that an image looks more real.

    It has no batch norm. Instead every weight is divided by its largest singular value (arXiv
    1802.05957), so that a logit depends on one image alone and changes smoothly between real and
    made ones. The trained weights are `….parametrizations.weight.original`.

    Args:
        size, width: see `Generator`.
    """

    def __init__(self, size: int = 32, width: int = WIDTH) -> None:
        super().__init__()
        channels = _channels(size, width)
        self.stem = nn.Sequential(conv(3, channels[0], 3), nn.ReLU(inplace=True))
        units: list[nn.Module] = []
        for in_channels, out_channels in pairwise(channels):
            units.append(ShuffleUnitV2(in_channels, out_channels, stride=2))
            units.append(ShuffleUnitV2(out_channels, out_channels, stride=1))
        self.units = nn.Sequential(*units)
        self.last = nn.Linear(channels[-1], 1)
        _use_spectral_norm(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, 1) of images (N, 3, size, size)."""
        return self.last(self.units(self.stem(x_NCHW)).mean((2, 3)))


class SpectralNorm(nn.Module):
    """Divides a weight (O, …) by its largest singular value as a matrix of O rows.

    The power method estimates it, with one iteration per forward in train mode. Unlike torch's own
    module it keeps only the left vector, of any length, so that an average of it over many steps is
    as good as the last one; and it computes in float32 under autocast.
    """

    u: Tensor
    _FIRST_ITERATIONS = 15

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", torch.randn(len(weight), dtype=weight.dtype))
        with torch.no_grad():
            for _ in range(self._FIRST_ITERATIONS):
                self.u.copy_(_next(weight.flatten(1), self.u))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, with a largest singular value of about 1."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix_OI = weight.flatten(1)
            with torch.no_grad():
                u_O = self.u
                if self.training:
                    u_O = _next(matrix_OI, u_O)
                    self.u.copy_(u_O)
                u_O = F.normalize(u_O, dim=0)
                v_I = F.normalize(u_O @ matrix_OI, dim=0)
            return weight / (u_O @ matrix_OI @ v_I)


def _next(matrix_OI: Tensor, u_O: Tensor) -> Tensor:
    return F.normalize(matrix_OI @ F.normalize(u_O @ matrix_OI, dim=0), dim=0)


def _use_spectral_norm(model: nn.Module) -> None:
    """Remove all batch norms of `model`, and add spectral norm to all its weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                parametrize.register_parametrization(child, "weight", SpectralNorm(child.weight))


def _channels(size: int, width: int) -> list[int]:
    """Return the channels of each map, from full size to the smallest."""
    require_at_least("width", width, 2)
    if width % 2:
        raise ModelError(f"`width` (={width}) must be even: V2 units have two halves")
    num = (size // _SMALLEST).bit_length() - 1
    if num < 1 or size != _SMALLEST << num:
        raise ModelError(
            f"`size` (={size}) must be 8, 16, 32, 64, … pixels: the map doubles from 4"
        )
    return [width << i for i in range(num + 1)]


class LevelGenerator(nn.Module):
    """A generator whose images are RGB levels 0 … 255, not rounded.

    Args:
        flips: whether the generator makes BGR.
    """

    def __init__(self, generator: Generator, flips: bool = False) -> None:
        super().__init__()
        self.generator, self.flips = generator, flips

    def forward(self, z_NZ: Tensor) -> Tensor:
        """Return images (N, 3, H, W) of noise."""
        made_NCHW: Tensor = (self.generator(z_NZ) + 1) * 127.5
        return made_NCHW.flip(1) if self.flips else made_NCHW
