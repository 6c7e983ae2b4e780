"""Folders of transformers' `save_pretrained`: config.json says what the weights beside it are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from meshuffle.data import Preprocess
from meshuffle.errors import RunError
from meshuffle.models.hub import classifier_of, known_values
from meshuffle.models.published import Published

FILES = ("model.safetensors", "pytorch_model.bin")
_DERIVED = ("stage_names", "out_features", "out_indices", "architectures", "model_type")
_RESAMPLE: Mapping[int, Literal["nearest", "bilinear", "bicubic"]] = {
    0: "nearest",
    2: "bilinear",
    3: "bicubic",
}


def saved_pretrained(path: Path) -> Published | None:
    """Return the model of a weights file of such a folder; None where it lies in no such folder.

    Names of the classes are those of the configuration, and the preprocessing is that of
    preprocessor_config.json, or ImageNet's where there is none.

    transformers reads the tensors: the keys in the file are often those of an older version.

    Raises:
        RunError: config.json cannot be read, or the weights are not all there. ModelError:
            transformers is missing, or lacks the type.
    """
    config = _read(path.with_name("config.json")) if path.name in FILES else {}
    kind, labels = config.get("model_type"), config.get("id2label", {})
    if not kind:
        return None
    usual = known_values(kind)
    knobs = {
        name: value
        for name, value in config.items()
        if name in usual and value != usual[name] and not name.startswith(("_", *_DERIVED))
    }
    for name in ("id2label", "label2id", "num_labels", "dtype", "torch_dtype", "use_cache"):
        knobs.pop(name, None)
    classes = tuple(labels[key] for key in sorted(labels, key=int)) or ("0", "1")
    return Published(
        f"transformers:{kind}",
        knobs,
        len(classes),
        _tensors(path.parent, classifier_of(kind)),
        _preprocess(_read(path.with_name("preprocessor_config.json"))),
        classes,
        f"transformers' {kind} in {path.parent.name}",
    )


def _tensors(folder: Path, kind: Any) -> dict[str, Tensor]:
    try:
        model, told = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"{folder}: transformers cannot read it ({reason})") from None
    if absent := sorted(told["missing_keys"]):
        raise RunError(
            f"{folder}: no classifier's weights: {len(absent)} are missing, {absent[0]} first"
        )
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: no JSON ({error})") from None
    return values


def _preprocess(said: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing that transformers' image processor describes."""
    if not said:
        return Preprocess.imagenet()
    size, crop = said.get("size", 224), said.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    values: dict[str, Any] = {
        "mean": tuple(said.get("image_mean", (0.0,) * 3)),
        "std": tuple(said.get("image_std", (1.0,) * 3)),
        "scale": said.get("rescale_factor", 1 / 255),
        "interpolation": _RESAMPLE.get(said.get("resample", 2), "bilinear"),
    }
    if not said.get("do_normalize", True):
        values |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    edge = size.get("shortest_edge")
    if edge is None:
        return Preprocess((size["height"], size["width"]), None, fit="stretch", **values)
    if crop and said.get("do_center_crop", True):
        return Preprocess((crop["height"], crop["width"]), edge, **values)
    share = said.get("crop_pct") or 1.0 if edge < 384 else 1.0  # as its ConvNextImageProcessor
    return Preprocess(edge, round(edge / share), **values)
