"""The ways to execute the network in a replica: torch, or a file that agrees with it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle import __version__
from meshuffle.deploy.api import write_file
from meshuffle.deploy.formats import FORMATS, find_format
from meshuffle.deploy.formats.base import Run
from meshuffle.deploy.serve.split import SplitNetwork, members_of
from meshuffle.errors import ConfigError, did_you_mean
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks.card import Card
from meshuffle.weights import find_weights, load_model, split_key

TORCH = "torch"
_FILES = ("onnx", "openvino")
_NUM_IMAGES = 8


@dataclass(frozen=True)
class Backend:
    """A way to execute the network, as plain data, so that any process can open it.

    Attributes:
        name: `torch`, or the name of a file format.
        source: path of the weights for torch, and of the exported file otherwise.
        model: repeats the name of a `package.module:function` model.
        device: `cpu`, or `cuda`, which gives each rank a GPU of its own.
        plan: how the ranks of a replica compute together; only torch takes more than one rank.
    """

    name: str
    source: str
    model: str | None = None
    device: str = "cpu"
    plan: str = "dp=1"

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes uint8 images (N, h, w, 3) and returns what `Task.answer` takes.

        It does if ranks share an image: each normalises its part, and the masks are gathered.
        """
        return parse_plan(self.plan).num_ranks > 1

    def blank(self, num: int, size: tuple[int, int]) -> NDArray[Any]:
        """Return `num` blank inputs for images of `size` (height, width)."""
        if self.takes_pixels:
            return np.zeros((num, *size, 3), np.uint8)
        return np.zeros((num, 3, *size), np.float32)

    def open(self, threads: int, index: int = 0) -> Run:
        """Return the function that executes it in this process, for replica number `index`."""
        if self.name != TORCH:
            torch.set_num_threads(1)  # little work is left to torch
            return find_format(self.name).open(Path(self.source), threads=threads)
        num_gpus = torch.cuda.device_count() if self.device == "cuda" else 0
        given = (self.source, self.model, self.plan)
        members = members_of(*given, threads=threads, index=index, num_gpus=num_gpus)
        if len(members) > 1:
            return SplitNetwork(members, _torch_run)
        torch.set_num_threads(threads)
        network, _ = load_model(Path(self.source), self.model)
        return _torch_run(network, torch.device(members[0].device))

    def __str__(self) -> str:
        split = "" if self.plan == "dp=1" else f", {self.plan}"
        return (self.name if self.device == "cpu" else f"{self.name} on {self.device}") + split


def _torch_run(network: nn.Module, device: torch.device) -> Run:
    """Return the function that executes `network` as `evaluate` does: channels-last, float32."""
    network = network.to(device).requires_grad_(False)

    @torch.inference_mode()
    def run(x: NDArray[Any]) -> NDArray[Any]:
        x_NCHW = torch.from_numpy(x).to(device)
        if x.dtype == np.uint8:
            x_NCHW = x_NCHW.permute(0, 3, 1, 2)
        outputs = network(x_NCHW.contiguous(memory_format=torch.channels_last))
        outputs = outputs.float() if outputs.is_floating_point() else outputs
        found: NDArray[Any] = outputs.cpu().numpy()
        return found

    return run


def candidates(choice: str, num_gpus: int) -> list[str]:
    """Return the names of the backends to measure.

    Args:
        choice: value of `--backend`; `auto` is every installed one, or torch if there are GPUs.

    Raises:
        ConfigError: the backend is unknown or not installed.
    """
    known = (TORCH, *(name for name in _FILES if name in FORMATS))
    if choice in known:
        if choice != TORCH:
            find_format(choice).require()
        return [choice]
    if choice != "auto":
        hint = did_you_mean(choice, ("auto", *known))
        raise ConfigError(f"--backend {choice}: there are auto, {', '.join(known)}{hint}")
    return [TORCH] if num_gpus else [name for name in known if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        if name != TORCH:
            find_format(name).require()
    except ConfigError:
        return False
    return True


def prepare(
    name: str, target: Path, model: str | None, scratch: Path, say: Callable[[str], None]
) -> Backend:
    """Return a backend whose file exists and agrees with the network.

    The file is kept in the run's folder, named by the digest of the weights, and reused.

    Args:
        scratch: folder for the file if the folder of the weights cannot be written.

    Raises:
        ParityError: the file computes something else.
        ModelError: the format cannot express the network.
    """
    weights = find_weights(target)
    if name == TORCH:
        gpu = torch.cuda.is_available()
        return Backend(TORCH, str(target), model, "cuda" if gpu else "cpu")
    form = find_format(name)
    folder = serve_folder(target)
    file = f"{digest_of(weights, split_key(target)[1])}{form.suffix}"
    if not (folder / file).exists():
        say(f"writing the network for {name} and comparing it")
        network, card = load_model(target, model)
        folder = folder if is_writable(folder) else scratch
        write_file(form, network, card, folder / file, _sample_images(card), decoded=False)
    return Backend(name, str(folder / file))


def digest_of(weights: Path, key: str | None = None) -> str:
    """Return a digest of the weights and of the versions that write their file."""
    text = f"{__version__} {torch.__version__} {key or ''}"
    state = hashlib.sha256(text.encode())
    with weights.open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
    return state.hexdigest()[:16]


def serve_folder(target: Path) -> Path:
    """Return the folder for files that services of these weights share."""
    return (target if target.is_dir() else find_weights(target).parent) / "export" / "serve"


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, which is made if it is absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return os.access(folder, os.W_OK)
    except OSError:
        return False


def _sample_images(card: Card) -> Tensor:
    """Return smooth random images, uint8 [N, 3, H, W], to compare the file and the network on."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((_NUM_IMAGES, 3, 8, 8), generator=generator) * 255
    fine = nn.functional.interpolate(coarse, card.preprocess.size, mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)
