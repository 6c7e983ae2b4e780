"""ONNX: torch.export's program, translated by torch's exporter, run by ONNX Runtime.

The opset is the exporter's default (20 in torch 2.15), and `runtime` names it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.formats.base import INPUT, Calibration, Format, Precision, Run

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

    from meshuffle.deploy.subject import Subject

_VIEW, _FRONT = "preprocess/view", "preprocess/"  # output, and prefix, of the preprocessing
_LOG_ERRORS = 3  # ONNX Runtime's severity; below it are notes on the devices of the machine


class Onnx(Format):
    """One file of up to 2 GB of weights."""

    name = "onnx"
    suffix = ".onnx"

    def write(self, subject: Subject, path: Path) -> None:
        """Translate the captured program, because torch would try three ways on a module."""
        program = _translate(subject.program(), subject.outputs)
        _describe(program, subject.metadata)
        path.write_bytes(program.SerializeToString())

    def write_int8(self, subject: Subject, path: Path, calibration: Calibration) -> None:
        """Quantise with ONNX Runtime, with one scale per output channel of a weight.

        Weights have seven bits, because with eight processors without VNNI overflow (top-1 fell
        from 98.6 to 90.5 % on digits).
        """
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # In another folder, because every file beside `path` is kept.
        with tempfile.TemporaryDirectory() as folder:
            plain, folded, quantised = (Path(folder, f"{i}.onnx") for i in range(3))
            self.write(subject.plain or subject, plain)
            quant_pre_process(plain, folded)
            quantize_static(
                folded,
                quantised,
                _Reader(INPUT, calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
            program = onnx.load(quantised)
        if subject.plain is not None:
            front = _translate(subject.preprocessing(), _VIEW)
            program = _joined(front, program)
        _describe(program, subject.metadata)
        path.write_bytes(program.SerializeToString())

    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that runs a session on the CPU."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(x: NDArray[Any]) -> NDArray[np.float32]:
            outputs: NDArray[np.float32] = session.run(None, {name: x})[0]
            return outputs

        return run

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the file's `metadata_props`."""
        import onnx

        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}

    def runtime(self, path: Path) -> str:
        """Return ONNX Runtime's version and the file's opset."""
        import onnx
        import onnxruntime

        entries = onnx.load(path).opset_import
        opset = next(int(entry.version) for entry in entries if not entry.domain)
        return f"ONNX Runtime {onnxruntime.__version__}, opset {opset}"


class _Reader:
    """The calibration images in the form that ONNX Runtime reads."""

    def __init__(self, name: str, calibration: Calibration) -> None:
        self._name, self._inputs = name, calibration.inputs()

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next image, or None."""
        x = next(self._inputs, None)
        return None if x is None else {self._name: x}


def _translate(program: ExportedProgram, outputs: str) -> onnx.ModelProto:
    import torch

    translated: Any = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[outputs], verbose=False
    )
    return translated.model_proto


def _joined(front: onnx.ModelProto, back: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model that passes the output of `front` to `back`."""
    from onnx import compose

    front = compose.add_prefix(front, _FRONT, rename_inputs=False, rename_outputs=False)
    front.ir_version = back.ir_version
    return compose.merge_models(front, back, io_map=[(_VIEW, INPUT)])


def _describe(program: onnx.ModelProto, metadata: dict[str, str]) -> None:
    """Put the metadata into the file, and remove the paths of this machine."""
    from onnx.helper import set_model_props

    graph = program.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    set_model_props(program, metadata)
