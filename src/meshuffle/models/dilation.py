"""Keep the map of stride 16 to the end of a backbone, by convolutions with holes (à trous).

What made the map of stride 32 moves by one pixel now, and all that follows looks at every second
pixel: at the pixels of the old map the numbers stay the same, and three of four are new between
them. What depends on a whole map, as squeeze-and-excitation does, sees more pixels.

Sources: arXiv 1412.7062 (DeepLab), 1706.05587 section 3 (DeepLabv3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from meshuffle.errors import ModelError
from meshuffle.models.layers import evaluating

_PROBE = 128  # pixels
_KEPT, _LOST = 16, 32  # strides
_RATE = 2  # of the holes

Pair = tuple[int, int]
Window = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


@dataclass(frozen=True)
class _Call:
    """One call of a module: the strides of its input and of its output; 0 is no map."""

    name: str
    module: nn.Module
    before: int
    after: int

    @property
    def where(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


def dilate(model: nn.Module) -> None:
    """Let `model` end in a map of stride 16 in place of 32, in place; names and weights stay.

    Every convolution and pooling that makes the map of stride 32 takes stride 1, and those behind
    it are dilated by 2. Has no effect on a model without such a map.

    Args:
        model: takes images (N, 3, H, W); as it was built, not traced or split.

    Raises:
        ModelError: something else makes that map or works on it; the message names it. The
            model is of no use then.
    """
    name = type(model).__name__
    calls = _calls(model, f"it takes no image of {_PROBE}×{_PROBE} pixels")
    for call in {call.module: call for call in calls}.values():
        if isinstance(call.module, Window):
            _dilate_window(call, calls)
    lost = {(call.module, False) for call in calls if call.before == _LOST}
    lost |= {(call.module, True) for call in calls if call.after == _LOST}
    for call in _calls(model, "its branches no longer have maps of one size") if lost else []:
        for stride, is_output in ((call.before, False), (call.after, True)):
            if stride == _LOST and (call.module, is_output) in lost:
                what = "makes" if is_output else "gets"
                raise ModelError(
                    f"{name} cannot be dilated: {call.where} {what} a map of stride {_LOST}, and "
                    f"not by the stride of a convolution or pooling; use another backbone"
                )


def _dilate_window(call: _Call, calls: list[_Call]) -> None:
    window = cast(Window, call.module)
    strides = {(c.before, c.after) for c in calls if c.module is window}
    makes, works_on = (_KEPT, _LOST) in strides, (_LOST, _LOST) in strides
    if not (makes or works_on):
        return
    if len(strides) > 1:
        raise ModelError(f"{call.where} cannot be dilated: it is used on maps of several sizes")
    kernel, rate = _pair(window.kernel_size), _pair(getattr(window, "dilation", 1))
    left = _left(window)
    if makes:
        window.stride = (1, 1)
    elif max(kernel) > 1:
        if isinstance(window, nn.AvgPool2d):
            raise ModelError(f"{call.where} cannot be dilated: a mean takes all of its pixels")
        rate, left = _times(rate, _RATE), _times(left, _RATE)
        window.dilation = rate
    spans = [r * (k - 1) for r, k in zip(rate, kernel, strict=True)]
    _pad(call, left, (spans[0] - left[0], spans[1] - left[1]))


def _left(window: Window) -> Pair:
    """Return how many pixels are put above and to the left of a map."""
    if not isinstance(window.padding, str):
        return _pair(window.padding)
    if window.padding == "valid":
        return (0, 0)
    rate, kernel = _pair(window.dilation), _pair(window.kernel_size)
    return (rate[0] * (kernel[0] - 1) // 2, rate[1] * (kernel[1] - 1) // 2)


def _pad(call: _Call, left: Pair, right: Pair) -> None:
    """Pad a window of stride 1 so that the map keeps its size and its pixels their places."""
    window = cast(Window, call.module)
    if isinstance(window, nn.Conv2d) and window.padding_mode != "zeros":
        raise ModelError(f"{call.where} cannot be dilated: padding_mode {window.padding_mode!r}")
    if left == right and _takes(window, left):
        window.padding = left
        return
    kind = _EDGED.get(type(window))
    if kind is None or (kind is _AvgPool2d and max(left)):
        raise ModelError(
            f"{call.where} cannot be dilated: with kernel {window.kernel_size} and padding "
            f"{window.padding} it does not keep the size of a map"
        )
    window.padding = (0, 0)
    window.edge = (left[1], right[1], left[0], right[0])  # type: ignore[assignment]
    window.__class__ = kind


def _takes(window: Window, padding: Pair) -> bool:
    """Whether torch lets a window pad by so much."""
    if isinstance(window, nn.Conv2d):
        return True
    return all(2 * p <= k for p, k in zip(padding, _pair(window.kernel_size), strict=True))


class _Conv2d(nn.Conv2d):
    """A convolution that pads its sides differently: `edge` is left, right, top, bottom."""

    edge: list[int]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.edge))


class _MaxPool2d(nn.MaxPool2d):
    edge: list[int]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.edge, value=float("-inf")))


class _AvgPool2d(nn.AvgPool2d):
    """Does so below and to the right, where the old pixels never look."""

    edge: list[int]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.edge, mode="replicate"))


_EDGED: dict[type, Any] = {
    nn.Conv2d: _Conv2d,
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
}


def _calls(model: nn.Module, fault: str) -> list[_Call]:
    """Return the calls of all modules in an evaluation of one image, in the order they end.

    Args:
        fault: what it means where that fails.
    """
    calls: list[_Call] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before = _stride(inputs[0]) if inputs else 0
            calls.append(_Call(name, module, before, _stride(output)))

        return hook

    hooks: list[RemovableHandle] = [
        module.register_forward_hook(record(name)) for name, module in model.named_modules() if name
    ]
    some = next(iter(model.parameters()), torch.empty(0))
    try:
        with evaluating(model):
            model(some.new_zeros(1, 3, _PROBE, _PROBE))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{type(model).__name__} cannot be dilated: {fault} ({reason})") from None
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _stride(value: Any) -> int:
    """Return the stride of a map (N, C, H, W), or 0 where it is none."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[2] != value.shape[3]:
        return 0
    size = value.shape[2]
    return _PROBE // size if size > 1 and _PROBE % size == 0 else 0


def _pair(value: Any) -> Pair:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _times(pair: Pair, factor: int) -> Pair:
    return pair[0] * factor, pair[1] * factor
