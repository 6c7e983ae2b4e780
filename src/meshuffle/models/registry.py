"""All models by name: ours, torchvision's, timm's, and the caller's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from meshuffle.errors import ModelError, did_you_mean
from meshuffle.models.counting import count_macs, count_parameters
from meshuffle.models.given import PREFIX, copy_given
from meshuffle.models.hub import (
    FACTORY,
    build_with,
    create_from_factory,
    create_timm,
    create_torchvision,
    create_transformers,
)
from meshuffle.models.shufflenet_v1 import STAGE_CHANNELS, ShuffleNetV1
from meshuffle.models.shufflenet_v2 import ShuffleNetV2
from meshuffle.models.shufflenet_v2plus import ShuffleNetV2Plus

V1_PAPER = "arXiv 1707.01083"
V2_PAPER = "arXiv 1807.11164"
AUTHORS_REPOSITORY = "github.com/megvii-model/ShuffleNet-Series"

# Top-1 errors in percent on ImageNet, one centre crop of 224 px.
_V1_ERRORS = {
    (width, groups): error
    for width, errors in (
        (1.0, (33.6, 32.7, 32.6, 32.8, 32.4)),
        (0.5, (45.1, 44.4, 43.2, 41.6, 42.3)),
        (0.25, (57.1, 56.8, 55.0, 54.2, 52.7)),
    )
    for groups, error in zip(STAGE_CHANNELS, errors, strict=True)
}
_V1_AUTHORS_ERRORS = {(1.5, 3): 28.4, (1.5, 8): 29.0, (2.0, 3): 25.9, (2.0, 8): 27.1}
_V1_WIDTHS = (0.25, 0.5, 1.0, 1.5, 2.0)

_V2_SIZES: Mapping[str, tuple[dict[str, Any], float]] = {
    "x0_5": ({"stage_channels": (48, 96, 192)}, 39.7),
    "x1_0": ({"stage_channels": (116, 232, 464)}, 30.6),
    "x1_5": ({"stage_channels": (176, 352, 704)}, 27.4),
    "x2_0": ({"stage_channels": (244, 488, 976), "head_channels": 2048}, 25.1),
}
_V2_SE_ERRORS = {"x2_0": 24.6}
_V2_LARGE: Mapping[str, tuple[dict[str, Any], float]] = {
    "50": (
        {
            "stage_channels": (244, 488, 976, 1952),
            "depths": (3, 4, 6, 3),
            "stem_channels": (64,),
            "head_channels": 2048,
        },
        22.8,
    ),
    "164_se": (
        {
            "stage_channels": (340, 680, 1360, 2720),
            "depths": (10, 10, 23, 10),
            "stem_channels": (64, 64, 128),
            "head_channels": 2048,
            "se": True,
            "residual": True,
        },
        18.56,
    ),
}
_V2PLUS_SIZES = {
    "small": ((36, 104, 208, 416), 25.9),
    "medium": ((48, 128, 256, 512), 24.3),
    "large": ((68, 168, 336, 672), 22.9),
}


@dataclass(frozen=True)
class ModelInfo:
    """One of our models: its name, its size, and what is published of it.

    `parameters` and `macs` are counted from the model when they are first asked for, on the
    meta device.

    Args:
        name: what `create_model` takes.
        family: shufflenet_v1, shufflenet_v2 or shufflenet_v2plus.
        build: makes the model; takes the family's knobs.
        published_top1: ImageNet accuracy in percent that `source` states, or None.
        weights: where published weights exist: "torchvision", "authors" or "".
        source: the paper or repository of the architecture and of `published_top1`.
        input_size: channels, height and width for which `macs` holds.
    """

    name: str
    family: str
    build: Callable[..., nn.Module] = field(repr=False, compare=False)
    published_top1: float | None
    weights: str
    source: str
    input_size: tuple[int, int, int] = (3, 224, 224)

    @cached_property
    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    @cached_property
    def parameters(self) -> int:
        """The number of parameters, with 1000 classes."""
        return count_parameters(self._on_meta)

    @cached_property
    def macs(self) -> int:
        """The multiply-accumulates for one image of `input_size`."""
        return count_macs(self._on_meta, self.input_size)


def create_model(
    name: str, *, num_classes: int | None = None, seed: int | None = None, **knobs: Any
) -> nn.Module:
    """Return the model called `name`, with random weights, in training mode.

    Args:
        name: one of ours (see `list_models`), `torchvision:NAME`, `timm:NAME`,
            `transformers:TYPE`, or `package.module:function`, which is imported.
        num_classes: outputs of the classifier; None leaves the model's own default.
        seed: of the initialisation: the same seed gives the same weights, and the global
            random state stays as it was. None draws from the global state.
        knobs: keyword arguments of the model's class or factory, such as `groups`, `width`,
            `kernel_size`, `permutation` or `in_channels`.

    Raises:
        ModelError: an unknown name, unknown knobs, or knobs that do not fit together.
    """
    build = _builder(name)
    with seeded(seed):
        return build(num_classes, knobs)


def list_models(pattern: str | None = None) -> list[ModelInfo]:
    """Return our models, those first that are smaller within a family; nothing is built yet.

    Args:
        pattern: a shell pattern such as "*_v1_*_g8", or a part of a name; None for all.
    """
    if pattern is None:
        return list(_MODELS.values())
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return [info for info in _MODELS.values() if fnmatch(info.name, wanted)]


Build = Callable[[int | None, Mapping[str, Any]], nn.Module]


_HUBS = {
    "torchvision": create_torchvision,
    "timm": create_timm,
    "transformers": create_transformers,
}


def is_foreign(name: str) -> bool:
    """Whether `name` is that of a person's own code: `package.module:function`, or an object."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in _HUBS


def _builder(name: str) -> Build:
    """Return what builds `name` from (num_classes, knobs), or raise ModelError."""
    if name in _MODELS:
        return partial(_create_own, _MODELS[name])
    source, colon, rest = name.partition(":")
    if source == PREFIX and colon:
        return lambda num_classes, knobs: copy_given(name)
    if source in _HUBS and colon:
        return partial(_HUBS[source], rest)
    if FACTORY.fullmatch(name):
        return partial(create_from_factory, name)
    longer = [known for known in _MODELS if name and known.startswith(name)]
    raise ModelError(
        f"unknown model {name!r}; `meshuffle models` lists ours, and torchvision:NAME, timm:NAME, "
        "transformers:TYPE and package.module:function are taken too"
        f"{did_you_mean(name, longer or _MODELS)}"
    )


def _create_own(info: ModelInfo, num_classes: int | None, knobs: Mapping[str, Any]) -> nn.Module:
    """Build one of our models, once every knob is known to its family."""
    known = sorted(inspect.signature(info.build).parameters)
    for knob in knobs:
        if knob not in known:
            raise ModelError(
                f"{info.name} has no knob `{knob}` (={knobs[knob]!r}); it has "
                f"{', '.join(known)}{did_you_mean(knob, known)}"
            )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return build_with(info.name, info.build, {**classes, **knobs})


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the CPU's global generator inside, and put it back afterwards; None: leave it alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _v1_models() -> Iterator[ModelInfo]:
    for width in _V1_WIDTHS:
        for groups in STAGE_CHANNELS:
            error = _V1_ERRORS.get((width, groups))
            authors_error = _V1_AUTHORS_ERRORS.get((width, groups))
            for se in (False, True):
                yield ModelInfo(
                    name=f"shufflenet_v1_x{_tag(width)}_g{groups}{'_se' if se else ''}",
                    family="shufflenet_v1",
                    build=partial(ShuffleNetV1, groups=groups, width=width, se=se),
                    published_top1=None if se else _accuracy(error or authors_error),
                    weights="authors" if groups in (3, 8) and width >= 0.5 and not se else "",
                    source=AUTHORS_REPOSITORY if authors_error and not se else V1_PAPER,
                )


def _v2_models() -> Iterator[ModelInfo]:
    for size, (knobs, error) in _V2_SIZES.items():
        for se in (False, True):
            yield ModelInfo(
                name=f"shufflenet_v2_{size}{'_se' if se else ''}",
                family="shufflenet_v2",
                build=partial(ShuffleNetV2, **knobs, se=se),
                published_top1=_accuracy(_V2_SE_ERRORS.get(size) if se else error),
                weights="" if se else "torchvision",
                source=V2_PAPER,
            )
    for size, (knobs, error) in _V2_LARGE.items():
        yield ModelInfo(
            name=f"shufflenet_v2_{size}",
            family="shufflenet_v2",
            build=partial(ShuffleNetV2, **knobs),
            published_top1=_accuracy(error),
            weights="",
            source=V2_PAPER,
        )


def _v2plus_models() -> Iterator[ModelInfo]:
    for size, (stage_channels, error) in _V2PLUS_SIZES.items():
        yield ModelInfo(
            name=f"shufflenet_v2plus_{size}",
            family="shufflenet_v2plus",
            build=partial(ShuffleNetV2Plus, stage_channels=stage_channels),
            published_top1=_accuracy(error),
            weights="authors",
            source=AUTHORS_REPOSITORY,
        )


def _tag(width: float) -> str:
    """Return 0.5 as "0_5"."""
    return str(width).replace(".", "_")


def _accuracy(error: float | None) -> float | None:
    """Return the accuracy in percent that belongs to an error in percent."""
    return None if error is None else round(100 - error, 2)


_MODELS: dict[str, ModelInfo] = {
    info.name: info for models in (_v1_models, _v2_models, _v2plus_models) for info in models()
}
