"""The file formats by name: a module with a class each, and one entry in `FORMATS`.

The modules are imported when they are asked for, and import their toolchains when they work.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from meshuffle.deploy.formats.base import Format
from meshuffle.errors import ConfigError, did_you_mean

__all__ = ["FORMATS", "Format", "find_format"]

FORMATS: Mapping[str, str] = {
    "onnx": "Onnx",
    "openvino": "OpenVino",
    "executorch": "ExecuTorch",
    "litert": "LiteRt",
    "pt2": "Pt2",
}
"""Name, which is also that of the module, and its class."""


def find_format(name: str) -> Format:
    """Return a format; its packages need not be installed, see `Format.require`.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS)
        raise ConfigError(
            f"unknown export format {name!r}{hint}; this version writes {', '.join(FORMATS)}"
        )
    made: Format = getattr(import_module(f"{__name__}.{name}"), FORMATS[name])()
    return made
