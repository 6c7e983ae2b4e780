"""Find the classifier and the layers of a model, for example for `--freeze`."""

from __future__ import annotations

from torch import Tensor, nn

from meshuffle.errors import ModelError


def classifier_of(model: nn.Module) -> list[str]:
    """Return the names of the modules that turn features into logits: the head.

    It uses `head_names` (our models), else `get_classifier()` (timm's), else the last linear layer,
    or the last convolution of a model without linear layers (SqueezeNet).

    Raises:
        ModelError: the model has none of these.
    """
    named = getattr(model, "head_names", None)
    if named is not None:
        return list(named)
    if callable(getattr(model, "get_classifier", None)):
        heads = model.get_classifier()  # type: ignore[operator]  # a method of timm's models
        heads = heads if isinstance(heads, (tuple, list)) else (heads,)
        names = [name for name, module in model.named_modules() if any(module is h for h in heads)]
        if names:
            return names
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1:]
    raise ModelError(
        f"{type(model).__name__} has no linear layer and no convolution, so no classifier is known"
    )


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the layers that can be frozen, in forward order.

    These are the children that have parameters. A Sequential whose elements are themselves
    made of modules, such as `features`, is listed behind its elements (`features.0`, …,
    `features`), so that freezing everything up to a name, the name included, means what it says.
    """
    names: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            names += [
                f"{name}.{key}"
                for key, element in child.named_children()
                if any(True for _ in element.children()) and _has_parameters(element)
            ]
        if _has_parameters(child):
            names.append(name)
    return names


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class Pooled(nn.Module):
    """A classifier that returns the input of its head instead of logits: features (N, F).

    If the head is a convolution, its input is averaged over space.

    Args:
        model: its forward is unchanged; `classifier_of` finds its head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._seen: Tensor | None = None
        model.get_submodule(classifier_of(model)[0]).register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return features (N, F) of images (N, 3, H, W)."""
        self.model(x_NCHW)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen.flatten(2).mean(2) if seen.ndim > 2 else seen
