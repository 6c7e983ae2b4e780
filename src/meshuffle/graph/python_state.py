"""What a model counts in Python while it runs, which a captured program does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

State = dict[tuple[nn.Module, str], Any]


@contextmanager
def changed_state(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Give what names the numbers, and lengths of lists, that the last forward has changed.

    The next forward then begins with what this one has left; torch.export puts them back after
    each. Behind the block they are what they were: a model that is captured has not run.
    """
    before, left = _state(model), {}
    begun: State = {}
    begin = model.register_forward_pre_hook(lambda *_: begun.update(_state(model)))
    end = model.register_forward_hook(lambda *_: left.update(_state(model)))

    def changed() -> list[str]:
        names = {module: name for name, module in model.named_modules()}
        found = [key for key, value in left.items() if key in begun and begun[key] != value]
        _put_back(left)
        paths = [f"{names[module]}.{name}".lstrip(".") for module, name in found]
        return [f"Python state that its forward changes ({path})" for path in paths]

    try:
        yield changed
    finally:
        begin.remove()
        end.remove()
        _put_back(before)


def _state(model: nn.Module) -> State:
    return {
        (module, key): len(value) if isinstance(value, list) else value
        for module in model.modules()
        for key, value in vars(module).items()
        if type(value) in (int, float, list) and not key.startswith("_")
    }


def _put_back(state: State) -> None:
    for (module, key), value in state.items():
        kept = vars(module)[key]
        if isinstance(kept, list):
            del kept[value:]
        else:
            vars(module)[key] = value
