"""Checkpoints as other programs save them: `torch.save` files with the weights somewhere inside.

    file ──load, weights only──▶ content ──choose──▶ tensors, and lines about the rest

Reading runs no code: torch's unpickler builds tensors and the plain types of `_inert`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import pathlib
import re
import shlex
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshuffle.data.base import shortened
from meshuffle.data.image import IS_POINTER, POINTER
from meshuffle.errors import RunError, did_you_mean

_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params")
"""Where training scripts keep the weights; averaged ones are read on request, by `?key=`."""
_LIGHTNING = ("fabric.utilities.data", "pytorch.utilities.parsing", "utilities.parsing")
_WANTED = "wanted: safetensors, or a state_dict that torch.save wrote"
_CODE = "if you trust the file, save its weights alone, in Python: "
_NO_MODEL = " of a model that Meshuffle lacks (--model package.module:function must build it)"
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "meshuffle")
_SIGNS = {
    rb"\s*\Z": "an empty file",
    POINTER: IS_POINTER,
    rb"\s*<": "a web page instead of the file; download it again",
    rb"\x89HDF": "an HDF5 file, as Keras writes",
    rb"PK": "a zip archive that is cut off, damaged, or not torch's",
    rb"\x80[\x00-\x05]": "a Python pickle that torch.save did not write",
    rb"[\t-\r -~]+\Z": "a text file",
    rb"": "damaged, or another program's",
}
"""How files begin that are no weights, and what they are; the first that matches."""


def _as_dict(*_: Any) -> dict[Any, Any]:
    """Stands for `defaultdict`: torch's unpickler fills dicts of the exact class only."""
    return {}


def _as_list(*_: Any) -> list[Any]:
    """Stands for `deque`, as above."""
    return []


def _inert() -> list[Any]:
    """Return the types that hold values and do nothing, with the names that files have for them."""
    plain = (int, float, bool, str, list, dict, tuple, frozenset, slice, range)
    times = (datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone)
    dtypes = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    found: list[Any] = [*plain, *times, argparse.Namespace, types.SimpleNamespace]
    found += [np.ndarray, np.dtype, torch.torch_version.TorchVersion]
    found += [(_as_dict, "collections.defaultdict"), (_as_list, "collections.deque")]
    found += [kind for kind in dtypes if kind is not np.dtypes.ObjectDType]
    for core in ("numpy.core", "numpy._core"):
        found += [(scalar, f"{core}.multiarray.scalar"), (array, f"{core}.multiarray._reconstruct")]
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        for module in ("pathlib", "pathlib._local"):  # a path of another system is none here
            found.append((pathlib.PurePath, f"{module}.{name}"))
    found.append((types.SimpleNamespace, "fastcore.foundation.L"))  # fastai's lists
    for package in ("lightning", "pytorch_lightning", "lightning_fabric"):
        found += [(OrderedDict, f"{package}.{module}.AttributeDict") for module in _LIGHTNING]
    return found


def read_torch(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a `torch.save` file, and lines about what else is in it.

    Args:
        key: where in the file's dict the weights are, or how the names of those wanted begin; None
            takes the usual names.

    Raises:
        RunError: the file is broken, holds code, or has no weights there.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise RunError(f"{path}: expected a state_dict, found {type(content).__name__}; {_WANTED}")
    if {"state", "param_groups"} <= content.keys():
        raise RunError(f"{path}: an optimizer's state; give the file of the model's weights")
    parts = _parts(content)
    whole = key
    if key not in parts:
        whole = next((name for k in _KEYS for name in parts if name.split(".")[-1] == k), None)
        if whole is None and not _has_weights(content) and (key is None or len(parts) == 1):
            whole = _only(path, parts)
    chosen = content if whole is None else parts[whole]
    if key not in (None, whole):
        chosen = below(path, chosen, key, parts)
    lines = []
    if others := [name for name in parts if name != whole]:
        how = " or ".join(shlex.quote(f"{path}?key={name}") for name in others[:3])
        lines.append(f"{path}: took the weights of {whole or 'its top level'!r}; for others: {how}")
    tensors = {name: value for name, value in chosen.items() if isinstance(value, Tensor)}
    if any("_packed_params" in str(n) or getattr(v, "is_quantized", 0) for n, v in chosen.items()):
        raise RunError(
            f"{path}: quantized to integers; give the weights from before the conversion"
        )
    if rest := [str(name) for name in chosen if name not in tensors]:
        lines.append(left_out(path, rest, "are no tensors"))
    return tensors, lines


def below(
    path: Path, tensors: Mapping[str, Any], key: str, parts: Collection[str] = ()
) -> dict[str, Any]:
    """Return the tensors whose names begin with `key` and a dot, under the rest of their names.

    Raises:
        RunError: there are none; it names the `parts` of the file that `key` may be instead.
    """
    start = f"{key}."
    found = {k.removeprefix(start): v for k, v in tensors.items() if str(k).startswith(start)}
    if not found:
        there = f"it has {', '.join(parts)}" if parts else "it has no parts"
        raise RunError(f"{path}: no weights under {key!r}{did_you_mean(key, parts)}; {there}")
    return found


def left_out(path: Path, names: list[str], why: str) -> str:
    """Return the line that counts what was left out, with the first names."""
    return f"{path}: left out {len(names)} that {why}: {shortened(names, 8)}"


def is_counter(key: str, tensor: Tensor) -> bool:
    """Whether a tensor is a number that a wrapper keeps beside the model, such as `n_averaged`."""
    return "." not in key and not tensor.ndim


def _parts(content: Mapping[Any, Any], depth: int = 2) -> dict[str, Mapping[str, Any]]:
    """Return the dicts of weights within a dict, by name; one in another is `outer.inner`."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, part in content.items():
        if _has_weights(part):
            found[str(name)] = part
        elif depth > 1 and isinstance(part, Mapping):
            found |= {f"{name}.{inner}": value for inner, value in _parts(part, depth - 1).items()}
    return found


def _has_weights(part: object) -> bool:
    return isinstance(part, Mapping) and any(
        isinstance(value, Tensor) and isinstance(name, str) and not is_counter(name, value)
        for name, value in part.items()
    )


def _only(path: Path, parts: Mapping[str, Any]) -> str:
    if not parts:
        raise RunError(f"{path}: no tensors in it, nor under its keys; {_WANTED}")
    if len(parts) > 1:
        how = " or ".join(shlex.quote(f"{path}?key={name}") for name in [*parts][:9])
        raise RunError(f"{path}: holds weights under several keys; say which: {how}")
    return next(iter(parts))


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(_inert()), warnings.catch_warnings(action="ignore"):
        try:
            if not _is_script(path):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes of any kind make unpicklers raise any
            raise _refusal(path, str(error)) from error
    raise RunError(
        f"{path}: a TorchScript archive, which is code; {_CODE}c = torch.jit.load({str(path)!r}"
        f', "cpu"); torch.save(c.state_dict(), {_new_name(path)!r})'
    )


def _refusal(path: Path, text: str) -> RunError:
    """Return the error of a file that torch does not read; `text` is torch's."""
    names = re.findall(r"GLOBAL ([\w.]*\w)", text)
    with contextlib.suppress(Exception):  # it knows less of pickles than torch.load
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        names = sorted(found, key=lambda name: (name not in names, name))
    if not names:
        return RunError(f"{path}: not a readable weights file: {kind_of(path)}; {_WANTED}")
    what, how = f"holds {shortened(names, 3)}", 'c.get("state_dict", c.get("model", c))'
    code = 'c = torch.load({!r}, "cpu", weights_only=False)'
    if names[0] == "fastai.learner.Learner":
        what, how = "an exported fastai Learner", "c.model.state_dict()"
        code = "from fastai.learner import load_learner; c = load_learner({!r})"
    elif any(name.startswith("torch.nn.modules.") for name in names):
        what = f"holds a whole pickled module ({names[0]})"
        what += "" if names[0].partition(".")[0] in _PACKAGES else _NO_MODEL
        how = '(c["model"] if isinstance(c, dict) else c).state_dict()'
    return RunError(
        f"{path}: {what}, which is code and not weights alone; {_CODE}{code.format(str(path))}; "
        f"torch.save({how}, {_new_name(path)!r})"
    )


def kind_of(path: Path) -> str:
    """Return what a file that cannot be read seems to be."""
    with path.open("rb") as file:
        start = file.read(64)
    return next(kind for sign, kind in _SIGNS.items() if re.match(sign, start))


def _new_name(path: Path) -> str:
    return str(path.with_name(f"{path.stem}-weights.pth"))


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
