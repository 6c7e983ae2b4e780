"""What a model returns: one tensor, or several in torchvision's and transformers' conventions.

tensor                      itself
dict (or ModelOutput)       `out`, `logits`, or its only tensor
tuple or list               its first tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from meshuffle.errors import ModelError

_MAIN = ("out", "logits")


def name_of_main(output: Any) -> Any:
    """Return the key or the position of the main output; None where `output` is a tensor.

    Raises:
        ModelError: none of the outputs is the main one by these conventions.
    """
    if isinstance(output, Tensor):
        return None
    names = _tensors(output)
    for name in _MAIN if isinstance(output, Mapping) else names[:1]:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    shown = ", ".join(map(str, names)) or type(output).__name__
    raise ModelError(
        f"the model returns {shown}, and none is the main output; return a tensor, a tuple that "
        f"begins with it, or a dict with {' or '.join(_MAIN)}"
    )


def unused_outputs(output: Any) -> list[str]:
    """Return the names of the tensors beside the main output."""
    main = name_of_main(output)
    if main is None:
        return []
    kind = "" if isinstance(output, Mapping) else "output "
    return [f"{kind}{name}" for name in _tensors(output) if name != main]


def with_main_output(model: nn.Module) -> nn.Module:
    """Let calls of `model` return its main output alone; its names and its code stay."""
    model.register_forward_hook(_main_output)
    return model


def _main_output(_: nn.Module, __: Any, output: Any) -> Any:
    name = name_of_main(output)
    return output if name is None else output[name]


def _tensors(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return [name for name, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, tuple | list):
        return [i for i, value in enumerate(output) if isinstance(value, Tensor)]
    return []
