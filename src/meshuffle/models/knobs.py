"""Checks and rules that the knobs of all model families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from meshuffle.errors import ModelError, did_you_mean

Auto = Literal["auto"]
PerUnit = int | Sequence[int] | Auto
"""One number for every unit, one number per unit, or "auto": chosen from the map's side."""

Order = Literal["paper", "authors"]
"""The place of the shuffle in a unit: the paper's, or that of the authors' released weights."""

T = TypeVar("T")


def auto_kernel_size(map_side: int) -> int:
    """Return the depthwise kernel for a square map of `map_side` pixels: 3 (≤14), 5 (≤28) or 7.

    Two things grow with the side of the map: how far apart the pixels of one object are, and
    how little of a large kernel falls on padding (a 7×7 window on a 7×7 map sees padding in
    48 of its 49 places). The depthwise convolution is a few percent of a unit's work.

    >>> [auto_kernel_size(side) for side in (7, 14, 28, 56)]
    [3, 3, 5, 7]
    """
    return 3 if map_side <= 14 else 5 if map_side <= 28 else 7


def auto_num_branches(map_side: int) -> int:
    """Return the parallel branches for a map of `map_side` pixels: 1 (≤7), 2 (≤14) or 3.

    Branch i (from 1) stacks i depthwise convolutions, so a larger map is seen at more scales.
    The width follows: see `branch_widths`.

    >>> [auto_num_branches(side) for side in (7, 14, 28, 56)]
    [1, 2, 3, 3]
    """
    return 1 if map_side <= 7 else 2 if map_side <= 14 else 3


def branch_widths(num_channels: int, num_branches: int) -> tuple[int, ...]:
    """Split `num_channels` over the branches: each takes half of what is left, the last the rest.

    So a unit's output keeps its width, and the deeper branches, which cost more, are narrower.

    Raises:
        ModelError: too few channels for one per branch.

    >>> branch_widths(58, 3)
    (29, 15, 14)
    """
    widths, left = [], num_channels
    for _ in range(num_branches - 1):
        widths.append(left - left // 2)
        left //= 2
    if left < 1:
        raise ModelError(
            f"`branches` (={num_branches}) is too many for a unit of {num_channels} channels: "
            f"each branch takes half of what is left"
        )
    return (*widths, left)


def most_branches(num_channels: int) -> int:
    """Return how many branches `num_channels` suffice for, one channel for the last.

    >>> [most_branches(channels) for channels in (1, 3, 4, 58)]
    [1, 2, 3, 6]
    """
    return num_channels.bit_length()


def per_unit(
    name: str, value: PerUnit, map_sides: Sequence[int], rule: Callable[[int], int]
) -> tuple[int, ...]:
    """Return one number per unit from a number, a sequence, or "auto" (`rule(map_side)`).

    Raises:
        ModelError: another text, or a sequence whose length is not the number of units.
    """
    if isinstance(value, int):
        return (value,) * len(map_sides)
    if isinstance(value, str):
        if value != "auto":
            raise ModelError(f"`{name}` is {value!r}; it must be a number, a sequence or 'auto'")
        return tuple(rule(side) for side in map_sides)
    if len(value) != len(map_sides):
        raise ModelError(
            f"`{name}` has {len(value)} entries; the model has {len(map_sides)} units, "
            f"and each needs one"
        )
    return tuple(value)


def unit_map_sides(
    input_size: int, stem_stride: int, depths: Sequence[int], strides: Sequence[int]
) -> tuple[int, ...]:
    """Return the side of the map that enters each unit, for a square input of `input_size` px.

    >>> unit_map_sides(224, 4, (2, 2), (2, 2))
    (56, 28, 28, 14)
    """
    require_at_least("input_size", input_size, 1)
    side, sides = -(-input_size // stem_stride), []
    for depth, stride in zip(depths, strides, strict=True):
        sides.append(side)
        side = -(-side // stride)
        sides.extend([side] * (depth - 1))
    return tuple(sides)


def require_at_least(name: str, value: int, lowest: int) -> None:
    """Raise ModelError unless `value` ≥ `lowest`."""
    if value < lowest:
        raise ModelError(f"`{name}` (={value}) must be at least {lowest}")


def require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raise ModelError unless `value` is a multiple of `by`."""
    if by < 1 or value % by:
        raise ModelError(f"`{name}` (={value}) must be divisible by `{by_name}` (={by})")


def require_fraction(name: str, value: float) -> None:
    """Raise ModelError unless 0 ≤ `value` < 1."""
    if not 0 <= value < 1:
        raise ModelError(f"`{name}` (={value}) must be at least 0 and below 1")


def require_kernels(sizes: Sequence[int]) -> None:
    """Raise ModelError unless every size is odd and positive, so that padding keeps the map."""
    for size in sizes:
        if size < 1 or size % 2 == 0:
            raise ModelError(f"`kernel_size` (={size}) must be odd and at least 1")


def require_depths(depths: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return `depths` as a tuple, or raise ModelError unless each of the stages has a unit."""
    require_length("depths", depths, num_stages)
    for depth in depths:
        require_at_least("depths", depth, 1)
    return tuple(depths)


def require_length(name: str, values: Sequence[T], length: int) -> None:
    """Raise ModelError unless `values` has `length` entries."""
    if len(values) != length:
        raise ModelError(f"`{name}` has {len(values)} entries {tuple(values)}; it needs {length}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ModelError, with the nearest choice, unless `value` is one of `choices`."""
    if value not in choices:
        raise ModelError(
            f"`{name}` is {value!r}; it must be one of {', '.join(choices)}"
            f"{did_you_mean(value, choices)}"
        )


def scaled_channels(channels: Sequence[int], width: float, multiple: int) -> tuple[int, ...]:
    """Multiply each by `width` and round up to a multiple of `multiple`.

    Raises:
        ModelError: `width` or a number of channels is not positive.

    >>> scaled_channels((200, 400), 0.25, 4)
    (52, 100)
    """
    if not width > 0:
        raise ModelError(f"`width` (={width}) must be above 0")
    for count in channels:
        require_at_least("stage_channels", count, 1)
    return tuple(round_up(int(count * width + 0.5), multiple) for count in channels)


def round_up(value: int, multiple: int) -> int:
    """Return the lowest positive multiple of `multiple` that is at least `value`."""
    return max(multiple, -(-value // multiple) * multiple)
