"""Channel permutations: the one place where Meshuffle reorders channels.

Convention: a permutation `perm` is a tuple, and output channel `j` reads input channel
`perm[j]`. Let C be the number of channels and g the number of groups:

    kind        channels are viewed as, then transposed     perm[j]
    "paper"     (g, C/g), as arXiv 1707.01083 and torchvision (j mod g) · C/g + j div g
    "inverse"   (C/g, g), as the authors' released weights    (j mod C/g) · g + j div (C/g)
    "random"    drawn from a generator of its own, by `seed`
    a sequence  used as given, once it is known to be a bijection

Shape suffixes: N batch, C channels, H height, W width, D = C/2.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshuffle.data.base import shortened
from meshuffle.errors import ModelError, did_you_mean

PERMUTATION_KINDS = ("paper", "inverse", "random")

Permutation = str | Sequence[int]
"""One of `PERMUTATION_KINDS`, or an explicit list: output channel j reads input `list[j]`."""


def channel_permutation(
    kind: Permutation, num_channels: int, groups: int, seed: int = 0
) -> tuple[int, ...]:
    """Return the permutation as a tuple: output channel `j` reads input channel `perm[j]`.

    Args:
        kind: "paper", "inverse", "random", or an explicit list of `num_channels` indices.
        num_channels: channels of the tensor to permute, at least 1.
        groups: groups of the neighbouring convolutions; must divide `num_channels` for
            "paper" and "inverse", and is unused otherwise.
        seed: of "random", which touches no global generator.

    Raises:
        ModelError: an unknown kind, a division with a remainder, or a list that is no bijection.

    >>> channel_permutation("paper", 6, 2)
    (0, 3, 1, 4, 2, 5)
    >>> channel_permutation("inverse", 6, 2)
    (0, 2, 4, 1, 3, 5)
    """
    if not isinstance(kind, str):
        return _checked_bijection(kind, num_channels)
    if kind not in PERMUTATION_KINDS:
        raise ModelError(
            f"`permutation` is {kind!r}; it must be one of {', '.join(PERMUTATION_KINDS)}, or a "
            f"list of channel indices{did_you_mean(kind, PERMUTATION_KINDS)}"
        )
    if kind == "random":
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return tuple(torch.randperm(num_channels, generator=generator, device="cpu").tolist())
    if groups < 1 or num_channels % groups:
        raise ModelError(
            f"`num_channels` (={num_channels}) must be divisible by `groups` (={groups}) "
            f"for the {kind!r} permutation"
        )
    rows = groups if kind == "paper" else num_channels // groups
    columns = num_channels // rows
    return tuple((j % rows) * columns + j // rows for j in range(num_channels))


def _checked_bijection(perm: Sequence[int], num_channels: int) -> tuple[int, ...]:
    """Return `perm` as a tuple, or say which index is out of range, repeated or missing."""
    try:
        given = tuple(operator.index(channel) for channel in perm)
    except TypeError as error:
        raise ModelError(f"`permutation` must be a list of channel indices: {error}") from error
    counts = dict.fromkeys(range(num_channels), 0)
    outside = sorted({channel for channel in given if channel not in counts})
    for channel in given:
        if channel in counts:
            counts[channel] += 1
    repeated = [channel for channel, count in counts.items() if count > 1]
    missing = [channel for channel, count in counts.items() if count == 0]
    faults = [
        f"{shortened([*map(str, channels)])} {what}"
        for channels, what in (
            (outside, "out of range"),
            (repeated, "repeated"),
            (missing, "missing"),
        )
        if channels
    ]
    if faults:
        raise ModelError(
            f"`permutation` (a list of {len(given)}) must hold each index in "
            f"0…{num_channels - 1} once: {', '.join(faults)}; correct the list, or name one of "
            f"{', '.join(PERMUTATION_KINDS)}"
        )
    return given


class ChannelShuffle(nn.Module):
    """Permute the channels of x (N, C, H, W), in the memory format in which x arrives.

    It has no parameters and no persistent buffers, so it never shows in a `state_dict`.
    "paper" and "inverse" run as unflatten, transpose and flatten, which exports with a
    symbolic batch and costs one copy; other permutations run as `index_select`.

    Args:
        num_channels, groups, permutation, seed: see `channel_permutation`.
    """

    def __init__(
        self, num_channels: int, groups: int, permutation: Permutation = "paper", seed: int = 0
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.permutation = channel_permutation(permutation, num_channels, groups, seed)
        self.rows = self._rows_of(permutation, groups)
        self.is_identity = self.permutation == tuple(range(num_channels))
        self.register_buffer("index", None, persistent=False)
        if self.rows is None and not self.is_identity:
            self.index = torch.tensor(self.permutation)

    def _rows_of(self, permutation: Permutation, groups: int) -> int | None:
        """Return r where the permutation is "view as (r, C/r), transpose", otherwise None."""
        rows = {"paper": groups, "inverse": self.num_channels // max(groups, 1)}
        return rows.get(permutation) if isinstance(permutation, str) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as every module does; then refill `index`, which `to_empty` leaves as garbage."""
        super()._apply(fn, recurse)
        if self.index is not None:
            self.index = torch.tensor(self.permutation, device=self.index.device)
        return self

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return y (N, C, H, W) with `y[:, j] = x[:, perm[j]]`."""
        if self.is_identity:
            return x_NCHW
        if self.rows is None:
            return x_NCHW.index_select(1, self.index)
        return transposed_channels(x_NCHW, self.rows)

    def join(self, a_NDHW: Tensor, b_NDHW: Tensor) -> Tensor:
        """Return `forward(cat((a, b), dim=1))` for two halves, in one copy for the paper's.

        With two groups the paper's permutation takes one channel of each half in turn, which
        is a stack along a new last channel dimension.
        """
        if self.rows != 2 or self.is_identity:
            return self(torch.cat((a_NDHW, b_NDHW), dim=1))
        return _interleaved(a_NDHW, b_NDHW)

    def join_halves(self, a_NDHW: Tensor, b_NDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of `join(a, b)`, each whole in memory.

        What follows (convolutions, batch norms and all their gradients) is then free of strided
        slices; in channels-last that saves a tenth of a training step on CPU.
        """
        if self.rows == 2 and not self.is_identity:
            return interleaved_halves(a_NDHW, b_NDHW)
        first, second = self.join(a_NDHW, b_NDHW).chunk(2, dim=1)
        return first, second

    def split(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of `forward(x)`, as views where the permutation allows it.

        With two groups the inverse permutation puts the even channels in front of the odd ones.
        """
        half = self.num_channels // 2
        if self.rows == half and not self.is_identity:
            even_NDHW, odd_NDHW = x_NCHW.unflatten(1, (half, 2)).unbind(2)
            return even_NDHW, odd_NDHW
        y_NCHW = self(x_NCHW)
        return y_NCHW[:, :half], y_NCHW[:, half:]

    def extra_repr(self) -> str:
        """Say the number of channels and how the permutation runs."""
        how = "index" if self.rows is None else f"({self.rows}, {self.num_channels // self.rows})"
        return f"{self.num_channels}, {'identity' if self.is_identity else how}"


def transposed_channels(x_NCHW: Tensor, rows: int) -> Tensor:
    """Return `x` with its channels, written in rows, read by columns; in its memory format."""
    shape = (rows, x_NCHW.shape[1] // rows)
    if _is_channels_last(x_NCHW):
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        y_NHWC = x_NHWC.unflatten(3, shape).transpose(3, 4).flatten(3)
        return y_NHWC.permute(0, 3, 1, 2)
    return x_NCHW.unflatten(1, shape).transpose(1, 2).flatten(1, 2)


def interleaved_halves(a_NDHW: Tensor, b_NDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of the channels a₀ b₀ a₁ b₁ …, each whole in memory where that pays."""
    is_even = a_NDHW.shape[1] % 2 == 0
    if is_even and _is_channels_last(b_NDHW) and not torch.compiler.is_compiling():
        halves: tuple[Tensor, Tensor] = _Interleave.apply(a_NDHW, b_NDHW)
        return halves
    first, second = _interleaved(a_NDHW, b_NDHW).chunk(2, dim=1)
    return first, second


def _interleaved(a_NDHW: Tensor, b_NDHW: Tensor) -> Tensor:
    if _is_channels_last(b_NDHW):
        a_NHWD, b_NHWD = a_NDHW.permute(0, 2, 3, 1), b_NDHW.permute(0, 2, 3, 1)
        return torch.stack((a_NHWD, b_NHWD), dim=4).flatten(3).permute(0, 3, 1, 2)
    return torch.stack((a_NDHW, b_NDHW), dim=2).flatten(1, 2)


class _Interleave(Function):
    """(a, b) → the halves of a₀ b₀ a₁ b₁ …, in channels-last; gradients come back whole too."""

    @staticmethod
    def forward(ctx: Any, a_NDHW: Tensor, b_NDHW: Tensor) -> tuple[Tensor, Tensor]:
        middle = a_NDHW.shape[1] // 2
        parts = (slice(0, middle), slice(middle, None))
        first, second = (_alternate(a_NDHW[:, part], b_NDHW[:, part]) for part in parts)
        return first, second

    @staticmethod
    def backward(ctx: Any, *grads_NDHW: Tensor) -> tuple[Tensor, Tensor]:
        a_NDHW, b_NDHW = (_halves_of(grads_NDHW, start) for start in (0, 1))
        return a_NDHW, b_NDHW


def _alternate(even_NEHW: Tensor, odd_NEHW: Tensor) -> Tensor:
    """Return a new channels-last tensor with `even` at channels 0, 2, … and `odd` at 1, 3, …"""
    batch, num_even, height, width = even_NEHW.shape
    y_NHWD = even_NEHW.new_empty(batch, height, width, 2 * num_even)
    y_NDHW = y_NHWD.permute(0, 3, 1, 2)
    y_NDHW[:, 0::2], y_NDHW[:, 1::2] = even_NEHW, odd_NEHW
    return y_NDHW


def _halves_of(grads_NDHW: tuple[Tensor, ...], start: int) -> Tensor:
    """Return channels start, start + 2, … of both gradients, one behind the other."""
    batch, num_channels, height, width = grads_NDHW[0].shape
    middle = num_channels // 2
    y_NHWD = grads_NDHW[0].new_empty(batch, height, width, num_channels)
    y_NDHW = y_NHWD.permute(0, 3, 1, 2)
    y_NDHW[:, :middle], y_NDHW[:, middle:] = (grad[:, start::2] for grad in grads_NDHW)
    return y_NDHW


def _is_channels_last(x_NCHW: Tensor) -> bool:
    """Tell whether neighbouring channels are neighbours in memory."""
    return x_NCHW.ndim == 4 and x_NCHW.stride(1) == 1
