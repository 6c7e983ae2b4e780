"""torch.compile, where it pays.

With `auto` the first steps run eagerly and are timed. Where the rest of the run is long against
what compiling costs (minutes), the next steps run compiled and are timed too, and the faster
way stays. Those are steps of the training, so nothing is thrown away. Batches of another size
than the usual one (the last of an epoch) run eagerly: no second compilation.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meshuffle.comm.device import inductor_reduces_slowly
from meshuffle.comm.exchange import Exchange
from meshuffle.config import TrainConfig
from meshuffle.errors import ConfigError
from meshuffle.kernels.max_pool import max_pool2d
from meshuffle.parallel.batch_norm import BatchNorm
from meshuffle.train.step import sum_over_ranks
from meshuffle.train.watch import Watch

_WARM_STEPS, _TIMED_STEPS = 5, 20
_WORTHWHILE_S = 1200.0  # the rest of the run, against a compilation of one to two minutes


def compiler_missing() -> str:
    """Return what torch.compile lacks on this host, or the empty string."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(name):
            return ""
    return "no C++ compiler (g++ or clang++) is installed"


class CompileChoice:
    """Gives the loop the forward to call, and finds out which one that should be.

    Args:
        config: `compile` says on, off or auto; `deterministic` keeps auto from trying.
        decided: what an earlier part of the same run decided, or None.
    """

    def __init__(self, config: TrainConfig, decided: bool | None) -> None:
        wanted = {"on": True, "off": False, "auto": decided}[config.compile]
        missing = compiler_missing() if wanted is not False else ""
        if config.compile == "on" and missing:
            raise ConfigError(f"--compile on: {missing}; use --compile auto or off")
        self.note = f"--compile auto: {missing}, so this run is eager" if missing else ""
        self.decided = False if missing or (config.deterministic and wanted is None) else wanted
        self._trying = False
        self._model: nn.Module | None = None
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._usual: int | None = None
        self._seconds: list[float] = []
        self._eager_s = 0.0
        self._watch: Watch | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether steps of the usual size run compiled now."""
        return bool(self.decided or self._trying)

    def forward(self, model: nn.Module, num: int, watch: Watch) -> Callable[[Tensor], Tensor]:
        """Return what to call on a step of `num` samples, over all ranks.

        All ranks call the same: compiled code may exchange in another order than eager code.
        """
        self._watch = watch
        if self.note:
            watch.event(self.note)
            self.note = ""
        self._usual = self._usual or num
        if not self.is_compiled or num != self._usual:
            return model
        if self._compiled is None or self._model is not model:
            self._model, self._compiled = model, compiled(model)
        return self._compiled

    def timed(self, seconds: float, steps_left: int, control: Exchange) -> None:
        """Take the time of a step into account; all ranks decide at the same step."""
        if self.decided is not None:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < _WARM_STEPS + _TIMED_STEPS:
            return
        own = statistics.median(self._seconds[_WARM_STEPS:])
        main = [own if control.rank == 0 else 0.0]
        step_s = sum_over_ranks(main, control)[0]
        self._seconds = []
        if self._trying:
            self._finish_trial(step_s)
        elif step_s * steps_left < _WORTHWHILE_S:
            self.decided = False
        else:
            self._trying, self._eager_s = True, step_s
            self._say(f"compiling the model: {step_s * steps_left / 60:.0f} minutes are left")

    def _finish_trial(self, step_s: float) -> None:
        self._trying, self.decided = False, step_s < self._eager_s
        verdict = "compiled" if self.decided else "eager"
        times = f"{1000 * step_s:.0f} ms a step compiled, {1000 * self._eager_s:.0f} ms eager"
        self._say(f"--compile auto: {times}; going on {verdict}")

    def _say(self, text: str) -> None:
        if self._watch is not None:
            self._watch.event(text)


def compiled(model: nn.Module) -> Any:
    """Return `model` compiled for one shape of input; parameters stay the model's own.

    On a CPU inductor's batch-norm reductions and its backward of max pooling are several times
    slower than ATen's (dev/LOG.md), so those stay ATen's.
    """
    parameter = next(model.parameters(), None)
    if parameter is not None and inductor_reduces_slowly(parameter.device):
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.keeps_reductions = True
            elif type(module) is nn.MaxPool2d and not module.return_indices:
                module.__class__ = _MaxPool2d
    return torch.compile(model, dynamic=False)


class _MaxPool2d(nn.MaxPool2d):
    """Max pooling that a compiled model calls as it is, forward and backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool `input` (N, C, H, W)."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        return max_pool2d(input, *sizes, ceil_mode=self.ceil_mode)
