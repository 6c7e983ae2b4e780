"""LiteRT (formerly TensorFlow Lite): a `.tflite` for phones, which takes one image at a time.

litert-torch needs torch below 2.15 and therefore an environment of its own. The metadata are in a
side-car, `model.tflite.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.formats.base import Format, Precision, Run
from meshuffle.errors import ConfigError

if TYPE_CHECKING:
    from meshuffle.deploy.subject import Subject


class LiteRt(Format):
    """A file for one image, because the converter cannot reshape a batch of open size."""

    name = "litert"
    suffix = ".tflite"
    packages: ClassVar[Mapping[str, str]] = {"litert-torch": "litert_torch"}
    extra = "litert"
    max_batch = 1
    any_size = False

    def require(self, int8: bool = False) -> None:
        """Raise `ConfigError` if litert-torch is missing, which this torch may not allow."""
        if int8:
            super().require(int8)
        if find_spec("litert_torch") is None:
            raise ConfigError(
                f"export to litert needs litert-torch, which needs torch below 2.15 (here "
                f"{version('torch')}): in an environment of its own, pip install "
                f"'meshuffle[{self.extra}]'"
            )

    def write(self, subject: Subject, path: Path) -> None:
        """Convert the module for one image, and write the side-car."""
        import litert_torch

        litert_torch.convert(subject.module, (subject.batches[0],)).export(str(path))
        _side_car(path).write_text(json.dumps(subject.metadata, indent=2))

    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that runs an interpreter."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads or None)
        interpreter.allocate_tensors()
        (image,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()

        def run(x: NDArray[Any]) -> NDArray[np.float32]:
            interpreter.set_tensor(image["index"], x)
            interpreter.invoke()
            outputs: NDArray[np.float32] = interpreter.get_tensor(answer["index"])
            return outputs

        return run

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the content of the side-car."""
        metadata: dict[str, str] = json.loads(_side_car(path).read_text())
        return metadata

    def runtime(self, path: Path) -> str:
        """Return LiteRT's version."""
        return f"LiteRT {version('ai-edge-litert')}"


def _side_car(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
