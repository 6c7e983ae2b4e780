"""Published weights: their keys tell who made them.

    tensors ──recognise──▶ model and knobs, tensors under its keys, preprocessing, classes

Another maker is one more entry in `MAKERS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn

from meshuffle.data import Preprocess
from meshuffle.data.base import shortened
from meshuffle.errors import ModelError
from meshuffle.models.foreign import is_counter
from meshuffle.models.heads import classifier_of
from meshuffle.models.registry import create_model, list_models

IMAGENET_CLASSES = 1000
_BRANCHES = (("branch_proj", "branch1"), ("branch_main", "branch2"))
"""The names of the branches of V2 units: the authors' and ours."""


@dataclass(frozen=True)
class Published:
    """The model that a file of plain tensors belongs to.

    Attributes:
        model: name for `create_model`.
        knobs: knobs for `create_model`.
        num_classes: outputs of its classifier.
        tensors: the tensors under the model's own keys.
        preprocess: the preprocessing that the weights were trained with.
        classes: names of the classes, or () if they are unknown.
        source: the maker of the weights, for messages.
    """

    model: str
    knobs: dict[str, Any]
    num_classes: int
    tensors: dict[str, Tensor]
    preprocess: Preprocess
    classes: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Maker:
    """A publisher of weights for a family of our models.

    Attributes:
        name: name for messages.
        sign: pattern of a key that only these files have.
        models: pattern of our names (see `list_models`).
        knobs: knobs of the model that the weights need.
        renames: (pattern, replacement) from their keys to ours; the first match applies.
        preprocess: returns the preprocessing of a model, by its name.
    """

    name: str
    sign: str
    models: str
    preprocess: Callable[[str], Preprocess]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()

    def names(self) -> list[str]:
        """Return the names of our models that the weights may belong to."""
        return [info.name for info in list_models(self.models)]

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under our keys."""
        return {self._renamed(key): tensor for key, tensor in tensors.items()}

    def _renamed(self, key: str) -> str:
        for pattern, replacement in self.renames:
            ours, num = re.subn(pattern, replacement, key)
            if num:
                return ours
        return key


def _units(*depths: int) -> Iterable[tuple[str, str]]:
    """Yield renames of units that are numbered across stages of these depths."""
    number = 0
    for stage, depth in enumerate(depths, 2):
        for unit in range(depth):
            for theirs, ours in _BRANCHES:
                yield rf"^features\.{number}\.{theirs}\.", f"stage{stage}.{unit}.{ours}."
            number += 1


def _torchvision(name: str) -> Preprocess:
    """Return the preprocessing with which torchvision evaluates its default weights."""
    preset: Any = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Preprocess(
        crop=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=preset.mean,
        std=preset.std,
    )


def _timm(name: str) -> Preprocess:
    """Return the preprocessing of timm's default weights."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None:
        return Preprocess.imagenet()
    side = config.input_size[-1]
    return Preprocess(
        crop=side,
        resize=int(side / config.crop_pct),
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )


_AUTHORS = {"order": "authors", "permutation": "inverse"}
MAKERS = (
    Maker(
        "the authors' ShuffleNet V1 (shuffle behind the depthwise convolution, BGR 0…255)",
        r"features\.0\.branch_main_1\.0\.weight",
        "shufflenet_v1_x*_g[38]",
        lambda _: Preprocess.authors(),
        _AUTHORS,
    ),
    Maker(
        "the authors' ShuffleNet V2+ (BGR 0…255)",
        r"LastSE\.SE_opr\.1\.weight",
        "shufflenet_v2plus_*",
        lambda _: Preprocess.authors(),
    ),
    Maker(
        "the authors' ShuffleNet V2 (shuffle in front of the split, BGR 0…255)",
        r"(features\.0|stage2\.0)\.branch_main\.0\.weight",
        "shufflenet_v2_x?_?",
        lambda _: Preprocess.authors(),
        _AUTHORS,
        (
            *_units(4, 8, 4),
            *((rf"^(stage\d\.\d+)\.{a}\.", rf"\1.{b}.") for a, b in _BRANCHES),
            (r"^first_conv\.", "conv1."),
            (r"^conv_last\.", "conv5."),
            (r"^classifier\.0\.", "fc."),
        ),
    ),
    Maker(
        "torchvision's ShuffleNet V2",
        r"stage2\.0\.branch1\.0\.weight",
        "shufflenet_v2_x?_?",
        _torchvision,
    ),
)
"""The known makers; the first whose sign matches is taken."""


def unwrap(
    tensors: Mapping[str, Tensor], model: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors under the model's own keys, and the prefix that was taken off them.

    Wrappers put a prefix in front of all keys: `module.` (DDP, averages), `_orig_mod.`
    (torch.compile), the names of attributes (Lightning). It is taken off, and the few tensors
    beside the model (counters, a loss's weights) are left out, where the rest has the keys of a
    known maker or of `model`. Of several parts (`encoder_q.` and `encoder_k.`) the one is taken
    that has most keys of `model`; of equal ones the first, which training scripts go on with. What
    a `backbone.` lacks is taken from the `head.` beside it (MMPretrain). Numbered keys are those
    of `nn.Sequential(*model.children())`.
    """
    given, prefix = dict(tensors), ""
    forms = [(given, prefix)]
    while first := _common(given):
        given = {k.removeprefix(first): v for k, v in given.items() if k.startswith(first)}
        prefix += first
        forms.append((given, prefix))
    own = create_model(model).state_dict() if model else {}
    for first in dict.fromkeys(f"{key.partition('.')[0]}." for key in given if own and "." in key):
        part = {k.removeprefix(first): v for k, v in given.items() if k.startswith(first)}
        forms.append((part, prefix + first))
    forms = [(_in_order(part, own), prefix) for part, prefix in forms]
    found, prefix = max(
        forms, key=lambda f: (len(own.keys() & f[0].keys()), _maker_of(f[0]) is not None)
    )
    heads = {
        k: t for k in own.keys() - found.keys() for n, t in tensors.items() if n == f"head.{k}"
    }
    return {**found, **heads}, f"{prefix}, head." if prefix and heads else prefix


def _in_order(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `nn.Sequential(*model.children())` under the model's own keys.

    Its numbers stand for the first parts of the keys, in the model's order; the last children are
    often left out. Other tensors are returned as they are.
    """
    pairs = list(zip(own.items(), tensors.items(), strict=False))
    if not tensors or len(pairs) < len(tensors):
        return tensors
    for (name, value), (key, tensor) in pairs:
        number, _, rest = key.partition(".")
        alike = rest == name.partition(".")[2] and tensor.shape[1:] == value.shape[1:]
        if not (number.isdecimal() and alike):
            return tensors
    return {name: tensor for (name, _), (_, tensor) in pairs}


def _common(tensors: Mapping[str, Tensor]) -> str:
    """Return the first part, with its dot, that 3 in 4 keys share, counters aside; else ""."""
    keys = [key for key, tensor in tensors.items() if not is_counter(key, tensor)]
    firsts = Counter(f"{key.partition('.')[0]}." for key in keys if "." in key)
    return next((one for one, num in firsts.most_common(1) if num >= 0.75 * len(keys)), "")


def _maker_of(tensors: Mapping[str, Tensor]) -> Maker | None:
    """Return the first maker whose sign is among the keys."""
    return next((m for m in MAKERS if any(re.fullmatch(m.sign, key) for key in tensors)), None)


def recognise(tensors: Mapping[str, Tensor], model: str | None = None) -> Published:
    """Return the model that a state dict without a card belongs to.

    Args:
        tensors: keys without a wrapper's prefix, see `unwrap`.
        model: the name of the model, if the caller knows it; then no other is tried, and shapes
            are checked when the tensors are loaded.

    Raises:
        ModelError: no known maker uses these keys, or no size of a family has these shapes.
    """
    maker = _maker_of(tensors)
    if maker is None or model not in (None, *maker.names()):
        if model is None:
            what = "the keys do not show which model it is"
            keys = shortened(list(tensors), 3)
            how = "--model, for example --model timm:resnet18, or your own"
            if "model.0.conv.weight" in tensors:
                what, how = "the keys are a YOLO's, and Meshuffle has no such model", "your own"
            raise ModelError(
                f"{what}; give {how} --model package.module:function (its keys: {keys})"
            )
        return _plain(tensors, model)
    ours, knobs = maker.renamed(tensors), dict(maker.knobs)
    for name in maker.names() if model is None else [model]:
        with torch.device("meta"):
            network = create_model(name, **knobs)
        found, num_classes = _completed(ours, network)
        if model or _fits(found, network):
            preprocess, classes = maker.preprocess(name), _imagenet_classes(num_classes)
            return Published(name, knobs, num_classes, found, preprocess, classes, maker.name)
    raise ModelError(
        f"the keys are those of {maker.name}, but none of {', '.join(maker.names())} has "
        "these shapes; give --model NAME to see what differs"
    )


def _plain(tensors: Mapping[str, Tensor], model: str) -> Published:
    """Return tensors under the model's own keys, with the preprocessing of its package."""
    found, num_classes = _completed(tensors, create_model(model))
    package, _, name = model.rpartition(":")
    presets = {"torchvision": _torchvision, "timm": _timm}
    preprocess = presets[package](name) if package in presets else Preprocess.imagenet()
    classes = _imagenet_classes(num_classes) if package in presets else ()
    source = f"{package}'s {name}" if package in presets else f"plain weights of {model}"
    return Published(model, {}, num_classes, found, preprocess, classes, source)


def _completed(tensors: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Return the tensors, with zeros for those that old files lack, and the number of classes."""
    found, own, head = dict(tensors), network.state_dict(), _head(network)
    sizes = [len(found[key]) for key in own if key.startswith(head) and key in found]
    num_classes = sizes[0] if sizes else IMAGENET_CLASSES
    for key, tensor in own.items():
        norm, _, last = key.rpartition(".")
        if key not in found and last == "num_batches_tracked" and f"{norm}.running_mean" in found:
            found[key] = torch.zeros((), dtype=torch.int64)
        elif key not in found and sizes and key == f"{head}bias":
            found[key] = torch.zeros(num_classes, dtype=tensor.dtype)
    return found, num_classes


def _fits(tensors: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Return whether keys and shapes are the model's, with any number of classes."""
    head, own = _head(network), network.state_dict()
    return own.keys() == tensors.keys() and all(
        tensors[key].shape == tensor.shape or key.startswith(head) for key, tensor in own.items()
    )


def _head(network: nn.Module) -> str:
    return f"{classifier_of(network)[-1]}."


def _imagenet_classes(num_classes: int) -> tuple[str, ...]:
    """Return ImageNet's names; two names occur twice, and the second occurrence gets a number."""
    if num_classes != IMAGENET_CLASSES:
        return ()
    names = torchvision.models.ShuffleNet_V2_X1_0_Weights.DEFAULT.meta["categories"]
    return tuple(n if names.index(n) == i else f"{n} ({i})" for i, n in enumerate(names))
