"""What a benchmark compares: one entry is one row."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from meshuffle.deploy.formats import find_format
from meshuffle.deploy.formats.base import Precision
from meshuffle.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Backend:
    """A way to execute a model.

    Attributes:
        name: of its row.
        format: of its file; None is PyTorch itself.
        precision: of the arithmetic.
        int8: its weights and activations are quantised.
        compiled: by torch.compile.
    """

    name: str
    format: str | None = None
    precision: Precision = "float32"
    int8: bool = False
    compiled: bool = False

    def require(self) -> None:
        """Raise `ConfigError` where it cannot run here."""
        if self.format is not None:
            find_format(self.format).require(self.int8)
        if self.precision == "bfloat16" and not has_bfloat16():
            raise ConfigError("this CPU does not multiply in bfloat16")


BACKENDS = (
    Backend("eager"),
    Backend("compile", compiled=True),
    Backend("onnx", "onnx"),
    Backend("onnx-int8", "onnx", int8=True),
    Backend("openvino", "openvino"),
    Backend("openvino-bf16", "openvino", "bfloat16"),
    Backend("openvino-int8", "openvino", int8=True),
    Backend("executorch", "executorch"),
    Backend("executorch-int8", "executorch", int8=True),
)


def find_backends(names: Iterable[str] = ()) -> list[Backend]:
    """Return those with these names, eager always first; all where none is given.

    Raises:
        ConfigError: there is none of a name.
    """
    known = {backend.name: backend for backend in BACKENDS}
    asked = [name.strip() for name in names]
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"unknown backend {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    return [one for one in BACKENDS if not asked or one.name in ("eager", *asked)]


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere runtimes compute in float32 instead."""
    if platform.machine() in ("arm64", "aarch64"):
        return True
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags
