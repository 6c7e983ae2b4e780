"""What every file format can do: write a captured model, open the file, say what is in it.

Nothing here imports torch: a process that only opens a file needs the file's runtime alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from meshuffle.errors import ConfigError

if TYPE_CHECKING:
    from meshuffle.deploy.subject import Subject

Run = Callable[[NDArray[Any]], NDArray[Any]]
"""Inputs of N images to their outputs [N, …], float32.

The inputs are float32 [N, 3, H, W], normalised; or, with preprocessing inside, uint8 RGB
[N, H, W, 3].
"""

Precision = Literal["float32", "bfloat16"]

INPUT = "input"
"""The name of the input in every file."""


class Calibration(Protocol):
    """Real inputs, from which an eight-bit file learns the range of each tensor."""

    def inputs(self, batch: int = 1) -> Iterator[NDArray[np.float32]]:
        """Yield them, `batch` images at a time."""


class Format(ABC):
    """A file format and the runtime that executes it.

    Attributes:
        name: of `--to`.
        suffix: of its files.
        packages: that it needs besides Meshuffle's own: what pip calls it → what Python imports.
        int8_packages: the same, for `write_int8`.
        extra: Meshuffle's extra that brings them.
        precisions: in which `open` can compute.
        max_batch: the largest that its files take at once; None is any.
        any_size: files with preprocessing take images of any size.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[Mapping[str, str]] = {}
    int8_packages: ClassVar[Mapping[str, str]] = {}
    extra: ClassVar[str] = ""
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    max_batch: ClassVar[int | None] = None
    any_size: ClassVar[bool] = True

    @abstractmethod
    def write(self, subject: Subject, path: Path) -> None:
        """Write the model to `path`, and what belongs to it beside, in a folder of its own."""

    def write_int8(self, subject: Subject, path: Path, calibration: Calibration) -> None:
        """Write the model with eight-bit weights and activations.

        Args:
            calibration: inputs of the network, `subject.plain` where there is preprocessing, which
                stays as it is.
        """
        raise NotImplementedError

    @abstractmethod
    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return what executes the file, up to `max_batch` images; see `open`."""

    @abstractmethod
    def metadata(self, path: Path) -> dict[str, str]:
        """Return what the file says of itself; see `Subject.metadata`."""

    @abstractmethod
    def runtime(self, path: Path) -> str:
        """Return what executes the file, with its version."""

    def open(self, path: Path, threads: int = 0, precision: Precision = "float32") -> Run:
        """Return what executes the file at `path`.

        Args:
            threads: of the CPU, ≥ 0; 0 is the runtime's choice.
            precision: of the arithmetic; inputs and outputs stay float32.

        Raises:
            ConfigError: it is not installed, or does not know the precision.
        """
        self.require()
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise ConfigError(f"{self.name} does not compute in {precision}; it knows {known}")
        run = self.load(path, threads, precision)
        return run if self.max_batch is None else _in_pieces(run, self.max_batch)

    def require(self, int8: bool = False) -> None:
        """Raise `ConfigError` where a package is missing, with the command that helps."""
        if int8 and type(self).write_int8 is Format.write_int8:
            raise ConfigError(f"--int8: {self.name} has none here; onnx, openvino, executorch have")
        packages = {**self.packages, **(self.int8_packages if int8 else {})}
        missing = [pip for pip, module in packages.items() if find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"export to {self.name} needs {' and '.join(missing)}: "
                f"pip install 'meshuffle[{self.extra}]'"
            )


def _in_pieces(run: Run, most: int) -> Run:
    """Return `run` for batches of any size, of which it sees `most` images at a time."""

    def in_pieces(x: NDArray[Any]) -> NDArray[np.float32]:
        if len(x) <= most:
            return run(x)
        return np.concatenate([run(x[i : i + most]) for i in range(0, len(x), most)])

    return in_pieces
