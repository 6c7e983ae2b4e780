"""OpenVINO: an `.xml` and a `.bin` beside it, which its own reader makes of torch.export's program.

The weights stay float32. The metadata are in `rt_info`, under `meshuffle`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.formats.base import INPUT, Calibration, Format, Precision, Run
from meshuffle.files import disk_errors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from meshuffle.deploy.subject import Subject

_SECTION = "meshuffle"
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino(Format):
    """Two files, which must stay together."""

    name = "openvino"
    suffix = ".xml"
    packages: ClassVar[Mapping[str, str]] = {"openvino": "openvino"}
    int8_packages: ClassVar[Mapping[str, str]] = {"nncf": "nncf"}
    extra = "openvino"
    precisions = ("float32", "bfloat16")

    def write(self, subject: Subject, path: Path) -> None:
        """Convert the captured program, name its input and output, and fix the other sizes."""
        _save(_converted(subject, subject.program()), subject, path)

    def write_int8(self, subject: Subject, path: Path, calibration: Calibration) -> None:
        """Quantise with NNCF."""
        # NNCF imports it, and it warns where there is no CUDA
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import nncf

        inputs = list(calibration.inputs())
        nncf.set_log_level(logging.ERROR)
        data = nncf.Dataset(inputs)
        network = subject.plain or subject
        model = nncf.quantize(_converted(network, network.program()), data, subset_size=len(inputs))
        if subject.plain is not None:
            model = _joined(_converted(subject, subject.preprocessing()), model)
        _save(model, subject, path)

    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that runs the model, compiled for the CPU and for low latency."""
        import openvino

        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

        def run(x: NDArray[Any]) -> NDArray[np.float32]:
            request.infer([x], share_inputs=True)
            outputs: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
            return outputs

        return run

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the entries of `rt_info` under `meshuffle`."""
        import openvino

        section = openvino.Core().read_model(path).get_rt_info()[_SECTION]
        return {key: str(entry.value) for key, entry in section.items()}

    def runtime(self, path: Path) -> str:
        """Return OpenVINO's version."""
        import openvino

        return f"OpenVINO {openvino.__version__.partition('-')[0]}"


def _converted(subject: Subject, program: ExportedProgram) -> Any:
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({subject.outputs})
    model.reshape({INPUT: [-1 if n is None else n for n in subject.shape]})
    return model


def _joined(front: Any, back: Any) -> Any:
    """Return the model that passes the output of `front` to `back`."""
    import openvino

    (result,), (entry,) = front.get_results(), back.get_parameters()
    entry.output(0).replace(result.input_value(0))
    return openvino.Model(back.get_results(), front.get_parameters())


def _save(model: Any, subject: Subject, path: Path) -> None:
    import openvino

    for key, text in subject.metadata.items():
        model.set_rt_info(text, [_SECTION, key])
    with disk_errors(path.parent, RuntimeError):
        openvino.save_model(model, path, compress_to_fp16=False)
