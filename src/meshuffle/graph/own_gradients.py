"""What a model does to its gradients itself, which a captured program does not hold.

A backward that a class of the model defines, and hooks on gradients: capturing would leave them
out without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from meshuffle.errors import CaptureError


@contextmanager
def own_gradients() -> Iterator[list[str]]:
    """Note, while a model is captured, its functions with a backward and its hooks on values."""
    found: list[str] = []
    apply, register = vars(Function)["apply"], Tensor.register_hook

    def noting_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:  # it computes without gradients, and again in its backward
            run, _, *given = args
            return run(*given)
        if not cls.__module__.startswith("torch."):
            found.append(f"a function with its own backward ({cls.__module__}.{cls.__qualname__})")
        return apply.__get__(None, cls)(*args, **kwargs)

    def noting_register(self: Tensor, hook: Callable[..., Any]) -> Any:
        found.append(f"a gradient hook ({_name(hook)}) on a value of its forward")
        return register(self, hook)

    with (
        mock.patch.object(Function, "apply", classmethod(noting_apply)),
        mock.patch.object(Tensor, "register_hook", noting_register),
    ):
        yield found


def refuse_own_gradients(model: nn.Module, found: list[str] | None = None) -> None:
    """Refuse a model that changes its gradients by itself.

    Args:
        model: its modules and parameters may have hooks.
        found: what `own_gradients` noted.

    Raises:
        CaptureError: it does; names what, and the plans that keep it.
    """
    lost = list(dict.fromkeys(found or []))  # torch.export runs a model several times
    for name, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        lost += [f"a backward hook ({_name(h)}) of {name or 'the model'}" for h in hooks]
    for name, parameter in model.named_parameters():
        hooks = [*(parameter._backward_hooks or {}).values()]
        hooks += [*(getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()]
        lost += [f"a gradient hook ({_name(h)}) of the parameter {name}" for h in hooks]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CaptureError(
            f"{type(model).__name__} has {lost[0]}{more}, which plans with tp or pp would lose; "
            "dp=N keeps it, or remove it"
        )


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
