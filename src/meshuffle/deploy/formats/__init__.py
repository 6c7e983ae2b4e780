"""The file formats by name: each is a module with a class, and an entry in `FORMATS`.

A module is imported when its format is requested, and imports its toolchain when it needs it.
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
"""The name of each format, which is also that of its module, and its class."""


def find_format(name: str) -> Format:
    """Return the format called `name`; its packages need not be installed, see `Format.require`.

    Raises:
        ConfigError: no format has this name.
    """
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS)
        raise ConfigError(
            f"unknown export format {name!r}{hint}; this version writes {', '.join(FORMATS)}"
        )
    made: Format = getattr(import_module(f"{__name__}.{name}"), FORMATS[name])()
    return made
