"""From a model to its Graph, by torch.export.

The program is the *training* IR: ATen ops as the model calls them, neither decomposed nor
functional, so that a convolution is one op and so is a batch norm, in train and in eval mode.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from meshuffle.errors import CaptureError, ModelError
from meshuffle.graph.graph import Graph
from meshuffle.graph.own_gradients import own_gradients, refuse_own_gradients
from meshuffle.graph.python_state import changed_state
from meshuffle.graph.recurrent import part_recurrent_layers
from meshuffle.graph.regions import inline_regions


def capture(model: nn.Module, example: Tensor | Sequence[Tensor], *, train: bool = True) -> Graph:
    """Return the Graph of `model`, with the batch as a symbol.

    Nothing is computed and nothing of the model changes; 1 to 4 seconds.

    Args:
        model: on any device, `meta` too.
        example: the input or inputs, batch in dim 0, at least 2 samples (torch.export takes a
            size of 1 for a constant). Only shapes and dtypes count.
        train: capture what the model does in train mode, otherwise in eval mode.

    Raises:
        CaptureError: torch.export cannot capture it, or the program would lose a part of it.
        ModelError: inputs of different or too small batches.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    sizes = {x.shape[0] if x.ndim else 0 for x in inputs}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ModelError(
            f"the inputs have batches of {sorted(sizes)} samples; all must have the same, of "
            "at least 2"
        )
    with _in_mode(model, train), _in_silence():
        try:
            with own_gradients() as found, _given_masks(), changed_state(model) as changed:
                program = _export(model, inputs, Dim.AUTO)
                if len(program.range_constraints) > 1:  # inputs whose batches nothing ties
                    program = _export(model, inputs, Dim("batch", min=2))
                if changed():  # a size that is kept changes once
                    _export(model, inputs, Dim.AUTO)
                    found += changed()
            inline_regions(program.graph_module)
            _leave_caches(program.graph_module.graph)
            part_recurrent_layers(program.graph_module.graph)
        except Exception as error:
            name = type(model).__name__
            raise CaptureError(
                f"torch.export cannot capture {name}: {_first_line(error)}; parallelism within "
                "its layers needs that, dp=N does not"
            ) from error
    if train:
        refuse_own_gradients(model, found)
    return Graph(program, batch=min(sizes), training=train, tied=tied_names(model))


@contextmanager
def _in_silence() -> Iterator[None]:
    """Keep torch's own words back: its warnings are about its internals, an error has the rest."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _given_masks() -> Iterator[None]:
    """Let nn.TransformerEncoder take the mask that it is given, and not ask if it is causal.

    What it would ask depends on values, and makes a difference in speed only.
    """

    def asked(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    with mock.patch("torch.nn.modules.transformer._detect_is_causal_mask", asked):
        yield


def _export(model: nn.Module, inputs: tuple[Tensor, ...], batch: Any) -> ExportedProgram:
    shapes: tuple[Any, ...] = tuple({0: batch} for _ in inputs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        first = next(i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL)
        shapes = (*shapes[:first], shapes[first:])
    return export(model, inputs, dynamic_shapes=shapes, strict=False)


def _leave_caches(graph: fx.Graph) -> None:
    """Drop the write to a buffer that is made anew in another shape and never read.

    It depends on the size of the input alone (timm's ConViT); torch writes it by `copy_`.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        buffer, value = node.args
        alone = buffer.op == "placeholder" and set(buffer.users) == {node} and not node.users
        if alone and buffer.meta["val"].shape != value.meta["val"].shape:
            graph.erase_node(node)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of parameters, then buffers; a tied one under each of its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of each tensor that has several, by the others."""
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in named_tensors(model) if first.setdefault(id(t), n) != n}


@contextmanager
def _in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Put `model` in train or eval mode inside, and each module back in its own afterwards.

    A model that is in that mode stays as it is: some of its parts may be frozen in the other.
    """
    modes = {module: module.training for module in model.modules()}
    if model.training != train:
        model.train(train)
    try:
        with torch.enable_grad():  # regions without gradients would be lost in one
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
