"""Models that other packages define: torchvision's, timm's, transformers', the caller's own.

Nothing here reaches the network: weights are always random.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torchvision.models
from torch import nn

from meshuffle.errors import ModelError, did_you_mean

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

# In training these two return a tuple of three logits unless told otherwise, and they warn
# about their initialisation unless it is asked for.
_PLAIN_INCEPTION: Mapping[str, Any] = {"aux_logits": False, "init_weights": True}
_TORCHVISION_DEFAULTS = {"googlenet": _PLAIN_INCEPTION, "inception_v3": _PLAIN_INCEPTION}


def create_torchvision(name: str, num_classes: int | None, knobs: Mapping[str, Any]) -> nn.Module:
    """Return torchvision's classification model `name`, with random weights.

    Raises:
        ModelError: an unknown name, or knobs that its constructor does not take.
    """
    _require_known("torchvision", name, torchvision.models.list_models(module=torchvision.models))
    arguments = {**_TORCHVISION_DEFAULTS.get(name, {}), **_without_none(num_classes), **knobs}
    return build_with(
        f"torchvision:{name}",
        lambda **given: torchvision.models.get_model(name, weights=None, **given),
        arguments,
    )


def create_timm(name: str, num_classes: int | None, knobs: Mapping[str, Any]) -> nn.Module:
    """Return timm's model `name`, with random weights; `in_channels` is timm's `in_chans`.

    Raises:
        ModelError: timm is not installed, an unknown name, or knobs that do not fit.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"timm:{name} needs timm, which is not installed: pip install 'meshuffle[hub]'"
        ) from error
    if not timm.is_model(name):
        _require_known("timm", name, timm.list_models())
    arguments = {**_without_none(num_classes), **knobs}
    if "in_channels" in arguments:
        arguments["in_chans"] = arguments.pop("in_channels")
    return build_with(
        f"timm:{name}",
        lambda **given: timm.create_model(name, pretrained=False, **given),
        arguments,
    )


def create_transformers(name: str, num_classes: int | None, knobs: Mapping[str, Any]) -> nn.Module:
    """Return the model of Hugging Face's type `name` (`gpt2`, `bert`, …), in its default size.

    Built from the type's default configuration; knobs change its values (`num_hidden_layers=2`),
    and `num_classes` gives it a classifier, of images where the type has one, else of sequences.
    Keeps no cache of keys and values.

    Raises:
        ModelError: transformers is not installed, an unknown type, or knobs that do not fit.
    """
    known = known_values(name)
    from transformers import AutoConfig, AutoModel

    for knob in knobs:  # a configuration would take any
        if knob not in known:
            raise ModelError(
                f"transformers:{name} has no value `{knob}` (={knobs[knob]!r}) in its "
                f"configuration{did_you_mean(knob, known)}"
            )

    def build(**given: Any) -> nn.Module:
        config = AutoConfig.for_model(name, **given)
        config.use_cache = False
        kind = AutoModel if num_classes is None else classifier_of(name)
        made: nn.Module = kind.from_config(config)
        return made.train()

    labels = {} if num_classes is None else {"num_labels": num_classes}
    return build_with(f"transformers:{name}", build, {**labels, **knobs})


def known_values(name: str) -> dict[str, Any]:
    """Return the default configuration of transformers' type `name`.

    Raises:
        ModelError: transformers is not installed, or an unknown type.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise ModelError(
            f"transformers:{name} needs transformers: pip install 'meshuffle[hub]'"
        ) from error
    _require_known("transformers", name, sorted(CONFIG_MAPPING), "model type")
    known: dict[str, Any] = AutoConfig.for_model(name).to_dict()
    return known


def classifier_of(name: str) -> Any:
    """Return transformers' class that makes classifiers of this type: of images, or of sequences.

    Args:
        name: a type that `known_values` knows.
    """
    from transformers import CONFIG_MAPPING
    from transformers import AutoModelForImageClassification as OfImages
    from transformers import AutoModelForSequenceClassification as OfSequences

    return OfImages if CONFIG_MAPPING[name] in OfImages._model_mapping else OfSequences


def create_from_factory(name: str, num_classes: int | None, knobs: Mapping[str, Any]) -> nn.Module:
    """Import `package.module:function` and return the module that the function makes.

    The import runs code, so this is for names that a person typed, never for one read from
    a file. The current directory counts as a place to import from, behind all others.

    Args:
        name: `package.module:function`.
        num_classes: passed on where the function takes it; for None, 1000 where it must have one.
        knobs: passed on.

    Raises:
        ModelError: nothing there to import, arguments that the function does not take, or a
            result that is no `nn.Module`.
    """
    module_name, function_name = name.split(":")
    factory = _import_factory(module_name, function_name)
    own = inspect.signature(factory).parameters.get("num_classes")
    if num_classes is None and own is not None and own.default is own.empty:
        num_classes = 1000  # as torchvision's and timm's have
    arguments = {**_without_none(num_classes), **knobs}
    unknown = sorted(set(arguments) - _accepted(factory, arguments))
    if "num_classes" in unknown and "num_classes" not in knobs:  # its outputs are checked later
        unknown.remove("num_classes")
        del arguments["num_classes"]
    if unknown:
        given = ", ".join(f"`{knob}` (={arguments[knob]!r})" for knob in unknown)
        raise ModelError(f"{name} does not take {given}; add it to the function's parameters")
    model = build_with(name, factory, arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; it must return an nn.Module")
    return model


def _import_factory(module_name: str, function_name: str) -> Callable[..., nn.Module]:
    """Return the function, or say which of its two names is not there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists and fails on an import of its own is another fault.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"importing {module_name} failed: {error}") from error
        raise ModelError(
            f"there is no module {error.name} for the model {module_name}:{function_name}; it is "
            f"looked for among the installed packages and in {here}"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ModelError(
            f"module {module_name} has no function {function_name}"
            f"{did_you_mean(function_name, [key for key in vars(module) if key[0] != '_'])}"
        )
    return factory


def _accepted(factory: Callable[..., nn.Module], arguments: Iterable[str]) -> set[str]:
    """Return the names among `arguments` that `factory` takes; all where it takes `**any`."""
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return set(arguments)
    return {name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}


def build_with(
    name: str, factory: Callable[..., nn.Module], arguments: Mapping[str, Any]
) -> nn.Module:
    """Return `factory(**arguments)`.

    Raises:
        ModelError: in place of a TypeError or ValueError, with the arguments that caused it.
    """
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        if not arguments:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ModelError(f"{name} cannot be made with {given}: {error}") from error


def _without_none(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _require_known(
    package: str, name: str, known: list[str], what: str = "classification model"
) -> None:
    """Raise ModelError, with the nearest name, unless `name` is known."""
    if name not in known:
        raise ModelError(
            f"{package} has no {what} {name!r} ({len(known)} are known){did_you_mean(name, known)}"
        )
