"""Make images like those of a data set: a GAN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.data.preprocess import Preprocess
from meshuffle.errors import ConfigError, ModelError, did_you_mean
from meshuffle.models.gan import NOISE, WIDTH, Discriminator, Generator, LevelGenerator
from meshuffle.parallel.random_masks import draw_key
from meshuffle.tasks.base import LoadNetwork, Metric, Rows, Task
from meshuffle.tasks.box_picture import enlarged
from meshuffle.tasks.fid import critic_settings, frechet_distance, make_critic
from meshuffle.tasks.gan import Gan, hinge, images_in, told_apart

KEPT_SIDE = 32
"""Pixels of the side of a generated image that evaluation keeps for pictures."""
_KNOBS = ("width", "noise", "features")
SHOWN = 16
"""Generated images on a sheet."""
_GAP = 2


class Generate(Task):
    """A generator and a discriminator, both of ShuffleNet V2 units; see `tasks/gan.py`.

    `fid` is the Fréchet distance between the images of a split and as many generated ones, in the
    features of a classifier: of the run `--knobs.features RUN`, or else of a ShuffleNet V2 with
    fixed random weights (see `tasks/fid.py`). The lower the better; with fewer images it is
    larger. `told_apart` is the share of pairs, a real image and a made one, in which the
    discriminator prefers the real one: at 50 it guesses. The knobs `width` and `noise` are those
    of `Generator`.

    Shape suffixes: N images, F features, C channels, H height, W width.
    """

    name = "generate"
    built = "GAN of ShuffleNet V2 units"
    outputs = "images"
    metrics = (Metric("fid", "FID", "", 2, lower=True), Metric("told_apart", "told apart"))
    running = Metric("told_apart", "told apart")
    splits = ()
    defaults: ClassVar[Mapping[str, Any]] = {
        "label_smoothing": 0.0,
        "optimizer": "adam",
        "lr": 0.0007,
        "body_lr": 1.0,
        **{"affine_degrees": 0.0, "affine_translate": 0.0, "affine_scale": 0.0},
        **{"crop_scale": 0.0, "trivial_augment": False, "erasing": 0.0},
    }
    """SGD does not train a GAN; and what changes the images would be learned like them."""

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return the classifier whose features are used, where one is given.

        Raises:
            ConfigError: an input size that does not halve to 4 pixels, or settings that have no
                meaning here; RunError: no such run.
        """
        kept = super().settings(config, data, load)
        _refuse_others(config)
        height, width = Preprocess.for_data(data, config.input_size).size
        sizes = [4 << i for i in range(1, 9)]
        if height != width or height not in sizes:
            near = min(sizes, key=lambda size: abs(math.log(size / max(1, height))))
            raise ConfigError(
                f"an input of {height}×{width} pixels: a generator doubles from 4; "
                f"set --input-size {near}"
            )
        if run := config.knobs.get("features"):
            kept["features"] = critic_settings(run, load)
        return kept

    def network(self, seed: int) -> nn.Module:
        """Return both networks, and the critic: images (N, 3, h, w) → logits (N, 1); see `Gan`."""
        card, knobs = self.card, self.card.knobs
        size, width = card.preprocess.size[0], knobs.get("width", WIDTH)
        critic = make_critic(card.settings.get("features"), card.preprocess, self.load)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                generator = Generator(size, width, knobs.get("noise", NOISE))
                discriminator = Discriminator(size, width)
        except TypeError as error:
            raise ModelError(
                f"knobs {knobs}: width and noise are whole numbers ({error})"
            ) from None
        return Gan(generator, discriminator, critic, card.preprocess)

    def check_outputs(self, outputs: Tensor, name: str) -> None:
        """Accept all: the head is made here."""

    def deployed(self, network: nn.Module) -> nn.Module:
        """Return the generator: noise (N, Z) → images (N, 3, h, w), RGB, 0 … 255, not rounded."""
        assert isinstance(network, Gan)
        return LevelGenerator(network.generator, network.flips)

    def deployed_inputs(self, num: int) -> Tensor:
        """Return noise, (num, Z) normal numbers."""
        generator = torch.Generator().manual_seed(num)
        return torch.randn((num, self.card.knobs.get("noise", NOISE)), generator=generator)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the discriminator's loss of real images, summed; a step has others besides."""
        return torch.relu(1 - outputs[:, 0]).sum()

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `real_logits` (N,) and `samples`, the made images, uint8 (N, 3, h, w)."""
        parts = images_in(outputs, self.card.preprocess.size)
        return {"real_logits": parts["real_logits"][:, 0], "samples": parts["samples"]}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the discriminator's `losses`, and what is known of each image and its made one.

        `real_logits`, `made_logits` (N,), `real_features`, `made_features` (N, F) float32,
        `told_apart` (N,), and `samples`, the made images, uint8 (N, 3, h, w), of at most 32 × 32
        pixels.
        """
        parts = images_in(outputs, self.card.preprocess.size)
        logits = parts.pop("real_logits"), parts.pop("made_logits")
        step = max(1, parts["samples"].shape[2] // KEPT_SIDE)
        parts["samples"] = parts["samples"][:, :, step // 2 :: step, step // 2 :: step]
        return {
            "losses": hinge(*logits),
            "told_apart": told_apart(*logits),
            "real_logits": logits[0][:, 0],
            "made_logits": logits[1][:, 0],
            **parts,
        }

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `fid`, and `told_apart` in percent."""
        return {
            "fid": frechet_distance(rows["real_features"], rows["made_features"]),
            "told_apart": 100 * float(rows["told_apart"].mean(dtype=np.float64)),
        }

    def blank(self) -> NDArray[np.int64]:
        """Return label 0."""
        return np.zeros((), np.int64)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return the discriminator's logit, `realness`."""
        return {"realness": float(rows["real_logits"][i])}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `realness +0.83`."""
        return f"realness {prediction['realness']:+.2f}"

    def picture(self, image: Image.Image, rows: Rows, i: int, truth: Any = None) -> Image.Image:
        """Return a sheet of 16 generated images, from that of sample i on."""
        order = (np.arange(min(SHOWN, len(rows["samples"]))) + i) % len(rows["samples"])
        return sheet(rows["samples"][order])

    def sample(self, model: nn.Module, num: int, seed: int = 0) -> Image.Image:
        """Return a sheet of `num` generated images; the same seed gives the same ones."""
        assert isinstance(model, Gan)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            made_NCHW = model.to_bytes(model.make(model.noise(draw_key(seed, 0), num)))
        model.train(was_training)
        return sheet(made_NCHW.to(torch.uint8).cpu().numpy())


def _refuse_others(config: TrainConfig) -> None:
    """Raise ConfigError where a setting has no meaning for a GAN."""
    if config.model != type(config).model:
        raise ConfigError(f"--model {config.model}: generate has two networks of its own")
    for knob in config.knobs:
        if knob not in _KNOBS:
            hint = did_you_mean(knob, _KNOBS)
            raise ConfigError(f"--knobs.{knob}: generate knows {', '.join(_KNOBS)}{hint}")
    if config.dropout is not None:
        raise ConfigError(f"--dropout {config.dropout}: generate has none")
    if config.freeze not in (None, "none"):
        raise ConfigError(f"--freeze {config.freeze}: generate trains all of both networks")


def sheet(images: NDArray[np.uint8]) -> Image.Image:
    """Return images (N, 3, h, w) on one sheet that is about square, small ones enlarged."""
    num, _, height, width = images.shape
    columns = max(1, math.ceil(math.sqrt(num)))
    rows = math.ceil(num / columns)
    canvas = Image.new(
        "RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white"
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        place = (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
        canvas.paste(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), place)
    return enlarged(canvas)
