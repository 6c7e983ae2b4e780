"""The exported model: a module on the CPU, its program, real inputs, and the file's metadata."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from meshuffle.data import Preprocess
from meshuffle.errors import DataError, ModelError
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card

BATCH_SIZES = (1, 2, 5)
"""The sizes of the compared batches: a batch size baked into the graph fails on one of them."""


class Subject:
    """A model as every format takes it; formats with the same largest batch share one capture.

    Args:
        network: on any device and in any mode; it is not changed.
        card: its classes and preprocessing go into the file.
        images_NCHW: real images for the comparison, uint8 RGB [N, 3, H, W], N ≥ 1.
        decoded: include what users need after the network, such as the boxes of a detector.

    Attributes:
        module: computes what the file should compute; on the CPU, in float32 and eval mode.
        batches: its inputs for the comparison: 1, 2 and 5 images, or other inputs of the task.
        takes_images: whether `batches` are images.
        sides: names of the dims 1, 2, … of the inputs whose size is open.
        plain: the subject without preprocessing, if this one has preprocessing.
        views: inputs of `plain` for the same images.
        outputs: name of the outputs in the file.
        argmax: whether the answer is the index of the largest output along dim 1.

    Raises:
        DataError: the images do not fit.
    """

    def __init__(
        self, network: nn.Module, card: Card, images_NCHW: Tensor, *, decoded: bool = True
    ) -> None:
        task = make_task(card)
        self.card = card
        self.module = on_cpu(task.deployed(network) if decoded else network)
        self.outputs = task.outputs if decoded else "outputs"
        self.argmax = task.argmax
        given = [task.deployed_inputs(num) for num in BATCH_SIZES] if decoded else []
        self.batches = [x for x in given if x is not None]
        self.takes_images = not self.batches
        if self.takes_images:
            self.batches = parity_batches(images_NCHW, card.preprocess)
        shape = ", ".join(map(str, self.batches[0].shape[1:]))
        kind = "normalised" if self.takes_images else "of a normal distribution"
        self.input = f"float32 [batch, {shape}], {kind}"
        self.sides: tuple[str, ...] = ()
        self.plain: Subject | None = None
        self.views: list[Tensor] = []
        self._preprocessed: Callable[[nn.Module], nn.Module] | None = None
        self._programs: dict[int | None, ExportedProgram] = {}

    @property
    def example(self) -> Tensor:
        """The inputs to capture with: two images, because torch.export bakes in a batch of 1."""
        return self.batches[1]

    def with_preprocessing(
        self,
        preprocessed: Callable[[nn.Module], nn.Module],
        batches: list[Tensor],
        views: list[Tensor],
        *,
        any_size: bool,
    ) -> Subject:
        """Return the same model for images, uint8 [N, H, W, 3].

        Args:
            preprocessed: puts the preprocessing in front of a network.
            batches: batches of 1, 2 and 5 images.
            views: the same images as inputs of the plain module.
            any_size: whether H and W are open.
        """
        made = copy.copy(self)
        made.module, made.batches = preprocessed(self.module).eval(), batches
        made.plain, made.views, made._preprocessed = self, views, preprocessed
        made.sides = ("height", "width") if any_size else ()
        sizes = "height, width" if any_size else ", ".join(map(str, batches[0].shape[1:3]))
        made.input, made._programs = f"uint8 [batch, {sizes}, 3], RGB", {}
        return made

    @property
    def shape(self) -> list[int | None]:
        """The shape of the inputs, with None for open sizes."""
        return [None, *[None for _ in self.sides], *self.example.shape[1 + len(self.sides) :]]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a file: the card under `meshuffle`, and its main parts to read."""
        return {
            "model": self.card.model,
            "classes": json.dumps(self.card.classes),
            "preprocess": json.dumps(self.card.preprocess.to_dict()),
            "input": self.input,
            "meshuffle": self.card.to_json(),
        }

    def program(self, max_batch: int | None = None) -> ExportedProgram:
        """Return the module as torch.export's program, with a dynamic batch of at most `max_batch`.

        It is captured with `max_batch` images, because some toolchains take the size of the
        example as the upper bound.

        Raises:
            ModelError: the module cannot be captured, for example if its batch size is baked in.
        """
        if max_batch not in self._programs:
            self._programs[max_batch] = self.captured(self.module, max_batch)
        return self._programs[max_batch]

    def preprocessed(self, network: nn.Module) -> nn.Module:
        """Return `network` behind the subject's preprocessing, if there is one."""
        return network if self._preprocessed is None else self._preprocessed(network)

    def preprocessing(self) -> ExportedProgram:
        """Return the program of the preprocessing alone: from images to the network's inputs."""
        return self.captured(self.preprocessed(nn.Identity()))

    def captured(self, module: nn.Module, max_batch: int | None = None) -> ExportedProgram:
        """Return the program of `module`, which takes the same inputs as the subject."""
        example = self.example
        if max_batch:
            example = example[:1].repeat(max_batch, *[1] * (example.ndim - 1))
        dims = {0: torch.export.Dim("batch", max=max_batch)}
        dims |= {i: torch.export.Dim(name) for i, name in enumerate(self.sides, 1)}
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(dims,))
        except (RuntimeError, ValueError) as error:
            raise self.refusal(error) from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
        return program

    def refusal(self, error: Exception, where: str = "") -> ModelError:
        """Return the error that says in one line why the module cannot be exported."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return ModelError(f"{type(self.module).__name__} cannot be exported{where}: {reason[:400]}")


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in float32, eval mode and without gradients."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def parity_batches(images_NCHW: Tensor, preprocess: Preprocess) -> list[Tensor]:
    """Return normalised float32 batches of 1, 2 and 5 images, each with images of its own.

    Args:
        images_NCHW: real images, uint8 RGB [N, 3, H, W]; they are repeated if N < 8.

    Raises:
        DataError: there is no image, or they are not uint8 [N, 3, H, W].
    """
    shape = tuple(images_NCHW.shape)
    if images_NCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or not shape[0]:
        raise DataError(
            f"export checks its file on real images: at least one, as uint8 [N, 3, H, W]; "
            f"got {images_NCHW.dtype} {list(shape)}"
        )
    picks = (torch.arange(sum(BATCH_SIZES)) % shape[0]).split(BATCH_SIZES)
    return [preprocess.normalise(images_NCHW[pick].cpu()).contiguous() for pick in picks]
