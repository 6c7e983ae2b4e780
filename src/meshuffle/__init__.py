"""Meshuffle: plan, prove and run parallel training of any PyTorch model; ShuffleNet first.

The names below are imported when they are first used, so that `import meshuffle` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from meshuffle.config import TrainConfig
    from meshuffle.deploy.api import export
    from meshuffle.graph import capture
    from meshuffle.infer.predict import evaluate, predict
    from meshuffle.models import create_model, list_models
    from meshuffle.parallel.api import parallelize
    from meshuffle.train.api import resume, train
    from meshuffle.verify.api import verify

__all__ = [
    "TrainConfig",
    "capture",
    "create_model",
    "evaluate",
    "export",
    "list_models",
    "parallelize",
    "predict",
    "resume",
    "train",
    "verify",
]

_HOMES = {
    "TrainConfig": "meshuffle.config",
    "capture": "meshuffle.graph",
    "create_model": "meshuffle.models",
    "evaluate": "meshuffle.infer.predict",
    "export": "meshuffle.deploy.api",
    "list_models": "meshuffle.models",
    "parallelize": "meshuffle.parallel.api",
    "predict": "meshuffle.infer.predict",
    "resume": "meshuffle.train.api",
}


def __getattr__(name: str) -> Any:
    if name in ("train", "verify"):  # folders that can be called
        return import_module(f"meshuffle.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'meshuffle' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
