"""From a trained model to a file that other runtimes execute, with proof that nothing changed.

A format is one module with an `Export` function, and one entry in `EXPORTERS`. The modules are
imported when they are asked for, since each brings its own toolchain.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from meshuffle.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from meshuffle.deploy.parity import Parity
    from meshuffle.train.weights import Card

__all__ = ["EXPORTERS", "LATER", "Export", "Exporter", "find_exporter"]


class Export(Protocol):
    """Writes a model to `path` in one format, once the file agrees with the model."""

    def __call__(
        self,
        model: nn.Module,
        card: Card,
        path: Path,
        images_NCHW: Tensor,
        *,
        tolerance: float = ...,
    ) -> Parity:
        """Return how well the file agrees; see `deploy.parity` for `images_NCHW`, `tolerance`."""


@dataclass(frozen=True)
class Exporter:
    """A format: the `suffix` of its files, and its `Export` as `module:function`."""

    suffix: str
    target: str

    def load(self) -> Export:
        """Import the module and return its function."""
        module, _, function = self.target.partition(":")
        export: Export = getattr(import_module(module), function)
        return export


EXPORTERS = {"onnx": Exporter(".onnx", "meshuffle.deploy.onnx:export_onnx")}

LATER = ("openvino", "executorch", "litert", "pt2")
"""Formats of a later version."""


def find_exporter(name: str) -> Exporter:
    """Return the exporter of a format.

    Raises:
        ConfigError: an unknown format, or one of `LATER`.
    """
    if name in EXPORTERS:
        return EXPORTERS[name]
    known = ", ".join(EXPORTERS)
    if name in LATER:
        raise ConfigError(f"export to {name} comes in a later version; this one writes {known}")
    near = did_you_mean(name, (*EXPORTERS, *LATER))
    raise ConfigError(f"unknown export format {name!r}{near}; this version writes {known}")
