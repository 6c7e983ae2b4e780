"""Export to ONNX: torch.export's program, translated by torch's exporter, run by ONNX Runtime.

The file takes `input`, float32 [batch, 3, H, W], normalised as the card says, and returns
`logits`, float32 [batch, C], or what the task's outputs are; the batch is dynamic. Its metadata
holds `model`, `classes` and `preprocess` to read, and the whole card under `meshuffle`. The opset
is the exporter's default (20 in torch 2.15), and `Parity.runtime` names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle.deploy.parity import TOLERANCE, Parity, check_parity, on_cpu, parity_batches
from meshuffle.errors import ModelError
from meshuffle.train.files import replaced
from meshuffle.train.tasks import make_task
from meshuffle.train.weights import Card

_LOG_ERRORS = 3  # ONNX Runtime's severity: below it are notes on the host's devices


def export_onnx(
    model: nn.Module,
    card: Card,
    path: Path,
    images_NCHW: Tensor,
    *,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Write `model` to `path` as one ONNX file, once it agrees with the model.

    It is written under a temporary name; after an error `path` is what it was before.

    Args:
        model: on any device and in any mode; it stays as it is. Up to 2 GB of weights.
        card: its classes and preprocessing go into the file.
        images_NCHW: uint8 RGB [N, 3, H, W], N ≥ 1, real images for the comparison.
        tolerance: largest error as a share of the largest |logit|, above 0.

    Returns:
        How far ONNX Runtime's outputs are from the model's on batches of 1, 2 and 5 images.

    Raises:
        ModelError: the model cannot be exported, for example with its batch size baked in.
        ParityError: the file computes something else; it is removed.
    """
    task = make_task(card)
    model = on_cpu(task.deployed(model))
    batches = parity_batches(images_NCHW, card.preprocess)
    program = _translate(model, batches[1], task.outputs)
    _describe(program, card)
    with replaced(path) as temporary:
        temporary.write_bytes(program.SerializeToString())
        return check_parity(
            model,
            _runner(temporary, task.outputs),
            batches,
            temporary,
            runtime=f"ONNX Runtime {onnxruntime.__version__}, opset {_opset(program)}",
            tolerance=tolerance,
            argmax=task.argmax,
        )


def _translate(model: nn.Module, example_NCHW: Tensor, outputs: str) -> onnx.ModelProto:
    """Return the ONNX model; the example has two images, since torch.export bakes in a 1.

    It is captured here: torch.onnx.export would try three ways, with a report on each.
    """
    batch = torch.export.Dim("batch")
    try:
        captured = torch.export.export(model, (example_NCHW,), dynamic_shapes=({0: batch},))
        program: Any = torch.onnx.export(
            captured, dynamo=True, input_names=["input"], output_names=[outputs], verbose=False
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{type(model).__name__} cannot be exported: {reason[:400]}") from error
    return program.model_proto


def _describe(program: onnx.ModelProto, card: Card) -> None:
    """Put the card into the file, and take out where on this machine each node was traced."""
    graph = program.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    metadata = {
        "model": card.model,
        "classes": json.dumps(card.classes),
        "preprocess": json.dumps(card.preprocess.to_dict()),
        "meshuffle": card.to_json(),
    }
    onnx.helper.set_model_props(program, metadata)


def _runner(path: Path, outputs: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        logits_NC: NDArray[np.float32] = session.run([outputs], {"input": x_NCHW})[0]
        return logits_NC

    return run


def _opset(program: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in program.opset_import if not entry.domain)
