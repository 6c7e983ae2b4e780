"""Build a model without initialising it, because its weights are read next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    (
        *(Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_),
        *(Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.copy_),  # behind the others, to scale
    )
)
"""Functions that fill parameters, in addition to those of `torch.nn.init`."""


class Unfilled(TorchFunctionMode):
    """Skips functions that fill parameters, so that these take neither time nor memory.

    Every parameter must be loaded afterwards, because its content is undefined.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the parameter as it is, or what `func` returns."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        fills = func in _FILLS or getattr(func, "__module__", None) == nn.init.__name__
        if fills and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **kwargs)
