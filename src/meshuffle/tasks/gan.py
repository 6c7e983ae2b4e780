"""A GAN: both networks in one module, and their losses; `train/gan_step.py` updates them.

    discriminator   real x, made G(z₁)    Σ relu(1 − D(x)) + relu(1 + D(G(z₁)))
    generator       G(z₂)                 −Σ D(G(z₂))

Both sums go over the samples of all ranks and are divided by their number. This is the hinge loss
(arXiv 1705.02894) with spectral norm in the discriminator (1802.05957) and Adam without momentum
(β₁ = 0, 1805.08318). Tried on scikit-learn's digits at 16 pixels, 2000 steps of batch 32 at rate
0.001: the distance to the real ones, which is 0.12 in pixels between two halves of these, still
fell, to 1.5; with batch norm in the discriminator it swung from 3 to 4, with group norm from 1.5
to 2.0, and the discriminator was right on nearly all images; with the logistic loss it won at once.

z is a hash of seed, step, micro-batch and the sample's number in the whole batch, so that any
number of ranks draws the same.

Shape suffixes: N images, Z numbers of noise, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.data import Preprocess
from meshuffle.models.gan import Discriminator, Generator
from meshuffle.parallel.random_masks import random_bits
from meshuffle.tasks.fid import Critic

FOR_DISCRIMINATOR, FOR_GENERATOR, _FOR_EVALUATION, _PIXELS = range(4)
"""Which of the random numbers of one key."""


class Gan(nn.Module):
    """The generator, the discriminator, and a critic that measures them.

    In train mode it is the discriminator: images → logits (N, 1). In eval mode each image gets a
    generated one beside it, whose noise is a hash of the image's pixels, so that it is the same in
    any batch and on any rank; outputs are (N, 2 + 2F + 3·H·W): the logits of both, their features,
    and the generated image, 0 … 255.

    Args:
        preprocess: how images are normalised.
    """

    factor: Tensor
    shift: Tensor

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        critic: Critic,
        preprocess: Preprocess,
    ) -> None:
        super().__init__()
        self.generator, self.discriminator, self.critic = generator, discriminator, critic
        std, mean = torch.tensor(preprocess.std), torch.tensor(preprocess.mean)
        factor, shift = std / preprocess.scale, mean / preprocess.scale
        self.flips = preprocess.channels != "RGB"
        self.register_buffer("factor", factor[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, 1), or in eval mode all that there is to know; see the class."""
        logits_N1: Tensor = self.discriminator(x_NCHW)
        if self.training:
            return logits_N1
        made_NCHW = self.make(self.noise_for(x_NCHW))
        columns = [logits_N1, self.discriminator(made_NCHW)]
        columns += [self.critic(x_NCHW), self.critic(made_NCHW)]
        return torch.cat([*columns, self.to_bytes(made_NCHW).flatten(1)], 1)

    def make(self, z_NZ: Tensor) -> Tensor:
        """Return images (N, 3, H, W) of noise, normalised as real ones are."""
        made_NCHW: Tensor = self.generator(z_NZ)
        return ((made_NCHW + 1) * 127.5 - self.shift) / self.factor

    def to_bytes(self, x_NCHW: Tensor) -> Tensor:
        """Return normalised images as whole numbers 0 … 255 of the same dtype, in RGB."""
        bytes_NCHW = (x_NCHW * self.factor + self.shift).round().clamp(0, 255)
        return bytes_NCHW.flip(1) if self.flips else bytes_NCHW

    def noise_for(self, x_NCHW: Tensor) -> Tensor:
        """Return the noise (N, Z) that belongs to images."""
        pixels_NP = self.to_bytes(x_NCHW).flatten(1).long()
        start = torch.zeros((), dtype=torch.int64, device=x_NCHW.device)
        weights_P = random_bits(pixels_NP.shape[1:], start, _PIXELS, None)
        key_N1 = (pixels_NP * weights_P).sum(1, keepdim=True)
        shape = (x_NCHW.shape[0], self.generator.noise)
        same_row = {0: torch.zeros(shape[0], dtype=torch.int64, device=x_NCHW.device)}
        return normals(random_bits(shape, key_N1, _FOR_EVALUATION, 0, own=same_row), x_NCHW.dtype)

    def noise(self, key: int, num: int, draw: int = 0, first: int = 0) -> Tensor:
        """Return noise (num, Z) for the samples `first` … of a whole batch with this key."""
        some = self.discriminator.last.weight
        start = torch.tensor(key, device=some.device)
        bits_NZ = random_bits((num, self.generator.noise), start, draw, 0, first_row=first)
        return normals(bits_NZ, some.dtype)


def normals(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return normally distributed numbers, each of 53 random bits."""
    exact, digits = (torch.float32, 23) if bits.device.type == "mps" else (torch.float64, 52)
    shares = ((bits >> (53 - digits)).to(exact) + 0.5) / (1 << digits)
    return ((2 * shares - 1).erfinv() * 2**0.5).to(dtype)


def hinge(real_logits: Tensor, made_logits: Tensor) -> Tensor:
    """Return the discriminator's loss of each sample, (N,); logits are (N, 1)."""
    return (F.relu(1 - real_logits) + F.relu(1 + made_logits))[:, 0]


def told_apart(real_logits: Tensor, made_logits: Tensor) -> Tensor:
    """Return 1 where the real image has the higher logit, 0 where the made one has, (N,)."""
    return ((real_logits - made_logits).sign()[:, 0].float() + 1) / 2


def images_in(outputs: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the parts of what `Gan` gives in eval mode.

    These are `real_logits` and `made_logits` (N, 1), `real_features` and `made_features` (N, F),
    and `samples` uint8 (N, 3, H, W).
    """
    height, width = size
    num_features = (outputs.shape[1] - 2 - 3 * height * width) // 2
    real, made, real_f, made_f, samples = outputs.split(
        [1, 1, num_features, num_features, 3 * height * width], 1
    )
    found: dict[str, Any] = {"real_logits": real, "made_logits": made}
    found |= {"real_features": real_f, "made_features": made_f}
    return found | {"samples": samples.to(torch.uint8).unflatten(1, (3, height, width))}
