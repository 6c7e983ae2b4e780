"""When memory runs out, the largest batch that fits is found and named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from meshuffle.comm.device import is_out_of_memory
from meshuffle.config import TrainConfig
from meshuffle.errors import OutOfMemory
from meshuffle.models import ShuffleNetV2
from meshuffle.train.api import train


@pytest.fixture
def at_most(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a forward pass of more than so many images fail as the CPU's allocator does."""

    def limit(num: int) -> None:
        forward = ShuffleNetV2.forward

        def failing(self: nn.Module, x: Tensor) -> Tensor:
            if len(x) > num:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
            return forward(self, x)  # type: ignore[arg-type]

        monkeypatch.setattr(ShuffleNetV2, "forward", failing)

    return limit


@pytest.mark.parametrize("fits", [1, 5, 6])
def test_the_largest_batch_is_named(
    small: TrainConfig, at_most: Callable[[int], None], fits: int
) -> None:
    at_most(fits)
    accumulate = math.ceil(7 / fits)  # 26 images in batches of at most 8: 7, 6, 7, 6
    with pytest.raises(OutOfMemory, match=f"largest that fits is {fits}: use --batch {fits}") as e:
        train(small)
    assert f"--accumulate {accumulate}" in str(e.value)
    assert "7 images of 32×32 per rank" in str(e.value)
    assert e.value.exit_code == 1


def test_the_advice_works(small: TrainConfig, at_most: Callable[[int], None]) -> None:
    """The evaluation takes no more images at a time than training does."""
    at_most(3)
    with pytest.raises(OutOfMemory, match="--accumulate 3"):
        train(small)
    config = dataclasses.replace(small, epochs=1, accumulate=3, out=f"{small.out}-again")
    assert train(config)["metrics"]["val"]


def test_not_even_one(small: TrainConfig, at_most: Callable[[int], None]) -> None:
    at_most(0)
    with pytest.raises(OutOfMemory, match="not even 1 image fits"):
        train(small)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
