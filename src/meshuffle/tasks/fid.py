"""The Fréchet distance between real and generated images, in the features of a classifier.

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

between two normal distributions with the means and covariances of the features (Fréchet 1957;
arXiv 1706.08500 for images). The published numbers are of one Inception v3; ours are of a
ShuffleNet, a trained one where a run is given, and compare with numbers of the same network only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.data import Preprocess
from meshuffle.errors import ConfigError
from meshuffle.files import expanded
from meshuffle.models import classifier_of, create_model
from meshuffle.tasks.base import LoadNetwork
from meshuffle.tasks.card import Card

_MODEL, _FEATURES, _SIZE, _SEED = "shufflenet_v2_x0_5", 32, 64, 0
_TEXTURES = 64
_TASKS = ("classify", "multilabel", "regress")  # whose model ends in pooled features and a head


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return d² between the features of two sets of images, in float64.

    The trace of (Σ₁ Σ₂)^½ is that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: its eigenvalues are
    real and not negative, also where a covariance is singular, as with fewer images than features.

    Args:
        a, b: (N, F) and (M, F), N and M at least 1.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _moments(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean (F,), and the covariance (F, F) of N − 1 degrees of freedom."""
    mean = x.mean(0, dtype=np.float64)
    centred = x.astype(np.float64) - mean
    return mean, centred.T @ centred / max(1, len(x) - 1)


class Critic(nn.Module):
    """The pooled features of a classifier; always in eval mode, and nothing of it is trained.

    Its weights are buffers: they travel with the run, but no optimiser and no gradient sees them.

    Args:
        network: the classifier; its head is taken off.
        own: its preprocessing, at whose size it looks at the images.
        given: that of the images it gets.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, own: Preprocess, given: Preprocess) -> None:
        super().__init__()
        for name in classifier_of(network):
            network.set_submodule(name, nn.Identity())
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.network, self.size = network, own.size
        self.flips = own.channels != given.channels
        std, mean = torch.tensor(given.std), torch.tensor(given.mean)
        if self.flips:
            std, mean = std.flip(0), mean.flip(0)
        scale = own.scale / given.scale
        own_std, own_mean = torch.tensor(own.std), torch.tensor(own.mean)
        factor, shift = scale * std / own_std, (scale * mean - own_mean) / own_std
        self.register_buffer("factor", factor[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return features (N, F) of images (N, 3, h, w), normalised as `given` has it."""
        x_NCHW = x_NCHW.flip(1) if self.flips else x_NCHW
        if x_NCHW.shape[2:] != self.size:
            x_NCHW = F.interpolate(x_NCHW, self.size, mode="bilinear", antialias=True)
        features: Tensor = self.network(x_NCHW * self.factor + self.shift)
        return features.flatten(1)


def random_critic(given: Preprocess) -> Critic:
    """Return a critic that has learned nothing: a ShuffleNet V2 0.5× of fixed random weights.

    It looks at 64×64 pixels and has 32 features: few, as the distance between two halves of one
    set grows with features / images (0.4 for 900 digits, 1.9 for 180; shifted by 2 of 16 pixels
    they are at 4.8; with 64 features 1.4, 8.0 and 10). Its batch norms have the statistics of
    random textures, without which the maps would fade from layer to layer. It says less than a
    trained one: of two generators of digits it preferred the one that people would not.
    """
    network = create_model(_MODEL, num_classes=1, seed=_SEED, head_channels=_FEATURES)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(_textures())
    return Critic(network, Preprocess(crop=_SIZE, resize=_SIZE), given)


def _textures() -> Tensor:
    """Return noise of all scales, float32 (64, 3, 64, 64), of mean 0 and deviation 1."""
    generator = torch.Generator(device="cpu").manual_seed(_SEED)
    x_NCHW = torch.zeros(_TEXTURES, 3, _SIZE, _SIZE)
    side = 1
    while side <= _SIZE:
        noise = torch.randn(_TEXTURES, 3, side, side, generator=generator)
        x_NCHW += F.interpolate(noise, (_SIZE, _SIZE), mode="bilinear")
        side *= 2
    return x_NCHW / math.sqrt(math.log2(_SIZE) + 1)


def critic_settings(run: str, load: LoadNetwork) -> dict[str, str]:
    """Return what a run remembers of the classifier whose features it uses: path and card.

    Raises:
        RunError, ModelError: the weights of the run cannot be opened.
        ConfigError: its model does not end in pooled features.
    """
    path = expanded(run).resolve()
    _, card = load(path, None)
    if card.task not in _TASKS:
        raise ConfigError(f"--knobs.features {run}: a {card.task} model; give {', '.join(_TASKS)}")
    return {"run": str(path), "card": card.to_json()}


def make_critic(
    settings: dict[str, str] | None, given: Preprocess, load: LoadNetwork | None
) -> Critic:
    """Return the critic of a run.

    Args:
        settings: of `critic_settings`; None is the random one.
        given: of the images it gets.
        load: opens the classifier; the random critic needs none.

    Where the classifier's files are gone, its weights come with the run's own.
    """
    if settings is None:
        return random_critic(given)
    assert load is not None, "features of a classifier: its weights must be opened"
    network, card = load(Path(settings["run"]), Card.from_json(settings["card"]))
    return Critic(network, card.preprocess, given)
