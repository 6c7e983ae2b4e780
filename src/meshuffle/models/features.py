"""The feature maps of a classifier at several strides: what detectors and segmenters stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from meshuffle.errors import ConfigError, ModelError, did_you_mean
from meshuffle.models.registry import create_model, seeded

T = TypeVar("T", bound=nn.Module)
H = TypeVar("H")

BACKBONE = "features.body."
"""Where a model that stands on `Features` has the parameters of its backbone."""

_PROBE = 128  # pixels: four strides of two and more can be told apart


def backbone_prefix(model: nn.Module) -> str:
    """Return `BACKBONE` where the parameters of a backbone have it in front, else nothing."""
    return BACKBONE if any(name.startswith(BACKBONE) for name in model.state_dict()) else ""


class Features(nn.Module):
    """A backbone without its classifier; gives one feature map per stride.

    The map of a stride is the last one of that size in the order of the forward, which is the end
    of the stage. Parameters keep the backbone's names, under `body.`; what only the classifier
    needs is gone.

    Args:
        model: any classifier that torch.fx can trace, for images of any size.
        strides: of the maps, ascending: 4, 8, 16 or 32.

    Raises:
        ModelError: it cannot be traced, or has no map of such a stride.
    """

    def __init__(self, model: nn.Module, strides: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        self.strides = tuple(strides)
        nodes = _last_nodes(model)
        if missing := [stride for stride in strides if stride not in nodes]:
            raise ModelError(
                f"{type(model).__name__} has no feature map of stride {missing[0]}; "
                f"it has {', '.join(map(str, sorted(nodes)))}"
            )
        wanted = {nodes[stride][0]: str(stride) for stride in strides}
        self.body = create_feature_extractor(
            model, return_nodes=wanted, tracer_kwargs=_opaque(model), suppress_diff_warning=True
        )
        self.channels = tuple(nodes[stride][1] for stride in strides)

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        """Return the maps in the order of the strides: (N, channels[i], H/stride, W/stride)."""
        maps: dict[str, Tensor] = self.body(x_NCHW)
        return [maps[str(stride)] for stride in self.strides]


def _last_nodes(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Return {stride: (name of the last node with a map of that stride, its channels)}."""
    try:
        opaque = _opaque(model)
        _, names = get_graph_node_names(model, opaque, suppress_diff_warning=True)
        every = create_feature_extractor(
            model, return_nodes=names, tracer_kwargs=opaque, suppress_diff_warning=True
        ).eval()
        with torch.no_grad():
            outputs: dict[str, Any] = every(torch.zeros(1, 3, _PROBE, _PROBE))
    except Exception as error:  # noqa: BLE001  # whatever tracing foreign code may raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{type(model).__name__} cannot be a backbone: it cannot be traced at "
            f"{_PROBE}×{_PROBE} ({reason})"
        ) from None
    found: dict[int, tuple[str, int]] = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3] > 1:
            stride = _PROBE // value.shape[2]
            if stride * value.shape[2] == _PROBE and stride > 1:
                found[stride] = (name, value.shape[1])
    return found


def _opaque(model: nn.Module) -> dict[str, Any]:
    """Let torch.fx take our units as they are: they look at the memory format of their input."""
    kinds = {type(m) for m in model.modules() if m is not model}
    return {"leaf_modules": [k for k in kinds if k.__module__.startswith(__package__ or "")]}


def build_on(
    build: Callable[[nn.Module], T], model: str, *, seed: int, knobs: Mapping[str, Any] | None
) -> T:
    """Return what `build` makes of the registry's `model`, all with random weights.

    Args:
        model, knobs: see `create_model`; the classifier is thrown away.
        seed: the same one gives the same weights; the global random state stays as it was.
    """
    with seeded(seed):
        return build(create_model(model, num_classes=1000, **(knobs or {})))


def find_named(heads: Mapping[str, H], name: str, task: str) -> H:
    """Return the head of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in heads:
        hint = did_you_mean(name, heads)
        raise ConfigError(f"--head {name}: {task} knows {' and '.join(heads)}{hint}")
    return heads[name]
