"""The backends that a benchmark compares; each is one row of its table."""

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
        name: name of its row.
        format: format of its file; None is PyTorch itself.
        precision: precision of the arithmetic.
        int8: whether weights and activations are quantised.
        compiled: whether torch.compile compiles the network.
    """

    name: str
    format: str | None = None
    precision: Precision = "float32"
    int8: bool = False
    compiled: bool = False

    def require(self) -> None:
        """Raise `ConfigError` if it cannot run on this machine."""
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
    """Return eager and the backends with these names, in order; without names, all of them.

    Raises:
        ConfigError: no backend has such a name.
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
    """Return whether the CPU has bfloat16 instructions; without, runtimes compute in float32."""
    if platform.machine() in ("arm64", "aarch64"):
        return True
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags
