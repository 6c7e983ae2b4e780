"""What is exported: a module on the CPU, its program, real inputs, and what its file says."""

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

INPUT = "input"
"""Name of the input in every file."""

BATCH_SIZES = (1, 2, 5)
"""A batch size that was baked into the graph shows in at least one of these."""


class Subject:
    """A model as every format takes it; captured once for all that share a largest batch.

    Args:
        network: on any device and in any mode; it stays as it is.
        card: its classes and preprocessing go into the file.
        images_NCHW: uint8 RGB [N, 3, H, W], N ≥ 1, real images for the comparison.
        decoded: what users need behind the network is part of it, as boxes of a detector.

    Attributes:
        module: what the file is to compute, on the CPU, in float32 and eval mode.
        batches: its inputs for the comparison, 1, 2 and 5 images, or what the task takes instead;
            `takes_images` says which.
        sides: names of the dims 1, 2, … of the inputs whose size is open.
        plain: of a module with preprocessing, the subject without it; `views` are the inputs of
            that one, of the same images.
        outputs: name of the outputs in the file; `argmax`: the largest along dim 1 is the answer.

    Raises:
        DataError: unfit images.
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
        """Inputs to capture with: two images, since torch.export bakes in a 1."""
        return self.batches[1]

    def with_preprocessing(
        self,
        preprocessed: Callable[[nn.Module], nn.Module],
        batches: list[Tensor],
        views: list[Tensor],
        *,
        any_size: bool,
    ) -> Subject:
        """Return the same for images, uint8 [N, H, W, 3].

        Args:
            preprocessed: puts the preprocessing in front of a network.
            batches: images, 1, 2 and 5; views: the inputs of the plain module of the same ones.
            any_size: H and W are open.
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
        """The shape of the inputs; None is open."""
        fixed = self.example.shape[1 + len(self.sides) :]
        return [None, *[None for _ in self.sides], *fixed]

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of itself: the card under `meshuffle`, and its main parts to read."""
        return {
            "model": self.card.model,
            "classes": json.dumps(self.card.classes),
            "preprocess": json.dumps(self.card.preprocess.to_dict()),
            "input": self.input,
            "meshuffle": self.card.to_json(),
        }

    def program(self, max_batch: int | None = None) -> ExportedProgram:
        """Return the module as torch.export's program, with a dynamic batch of at most `max_batch`.

        It is captured with as many images: toolchains that decide by the size of the example take
        it for the upper bound.

        Raises:
            ModelError: it cannot be captured, for example with its batch size baked in.
        """
        if max_batch not in self._programs:
            self._programs[max_batch] = self.captured(self.module, max_batch)
        return self._programs[max_batch]

    def preprocessed(self, network: nn.Module) -> nn.Module:
        """Return `network` behind the subject's preprocessing, where it has one."""
        return network if self._preprocessed is None else self._preprocessed(network)

    def captured(self, module: nn.Module, max_batch: int | None = None) -> ExportedProgram:
        """Return the program of `module`, which takes what the subject's own takes."""
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
            node.meta.pop("stack_trace", None)  # paths of this machine
        return program

    def refusal(self, error: Exception, where: str = "") -> ModelError:
        """Return the error that says why the module cannot be exported, in a line."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return ModelError(f"{type(self.module).__name__} cannot be exported{where}: {reason[:400]}")


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in float32, eval mode and without gradients."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def parity_batches(images_NCHW: Tensor, preprocess: Preprocess) -> list[Tensor]:
    """Return normalised float32 batches of 1, 2 and 5 images, each with images of its own.

    Args:
        images_NCHW: uint8 RGB [N, 3, H, W] of real images; used again in turn where N < 8.

    Raises:
        DataError: no image, or not uint8 [N, 3, H, W].
    """
    shape = tuple(images_NCHW.shape)
    if images_NCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or not shape[0]:
        raise DataError(
            f"export checks its file on real images: at least one, as uint8 [N, 3, H, W]; "
            f"got {images_NCHW.dtype} {list(shape)}"
        )
    picks = (torch.arange(sum(BATCH_SIZES)) % shape[0]).split(BATCH_SIZES)
    return [preprocess.normalise(images_NCHW[pick].cpu()).contiguous() for pick in picks]
