"""Random numbers that are the same under every plan.

Each is a hash of (seed, step, micro-batch, number of the call, index of the element in the whole
tensor), so that a rank draws its part alone, and one device draws the same. The index counts
samples first, over all replicas: what a sample gets does not depend on who else is in the batch.
The hash is splitmix64's, in int64 arithmetic that wraps round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshuffle.data.seeds import draw63
from meshuffle.errors import ModelError
from meshuffle.graph.node import arguments_of
from meshuffle.graph.random_ops import draws_numbers, is_random
from meshuffle.layout.layout import Layout, Samples, Shard, even_size
from meshuffle.layout.program import Call

aten = torch.ops.aten

_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_MASK_53 = (1 << 53) - 1


def draw_key(seed: int, step: int, micro_batch: int = 0) -> int:
    """Return the key of one forward pass."""
    return int(draw63(seed, step, micro_batch)[0])


def random_bits(
    shape: Sequence[int],
    key: Tensor,
    draw: int,
    samples_dim: int | None,
    *,
    first_row: Tensor | int = 0,
    own: Mapping[int, Tensor] | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Return 53 random bits per element, int64 of `shape`.

    Args:
        shape: sizes of this rank's part.
        key: () int64, the key of the forward pass.
        draw: number of the call.
        samples_dim: the dim that holds the batch, if there is one.
        first_row: index of its first row in the whole batch.
        own: the indices that this rank holds, by dim; it holds all of other dims.
        sizes: sizes of the whole tensor; needed where `own` is given.
    """
    own, whole, num = own or {}, list(sizes or shape), len(shape)
    index: Any = 0
    stride = 1
    for dim in [*(d for d in reversed(range(num)) if d != samples_dim), samples_dim]:
        if dim is None:
            continue
        place = own[dim] if dim in own else torch.arange(shape[dim], device=key.device)
        if dim == samples_dim:
            place = place + first_row
        index = index + (place * stride).view([-1 if d == dim else 1 for d in range(num)])
        stride *= whole[dim]
    start = _mix(key + _wrapped(_GAMMA * (draw + 1)))
    return ((_mix(_mix(index * _GAMMA + start)) >> 11) & _MASK_53).expand(list(shape))


def _wrapped(number: int) -> int:
    """Return a number modulo 2⁶⁴, as a signed one."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def below(bits: Tensor, probability: float) -> Tensor:
    """Return where a uniform number in [0, 1) is below `probability`; bool."""
    return bits < int(probability * (1 << 53))


def uniform(bits: Tensor) -> Tensor:
    """Return uniform numbers in (0, 1), float64."""
    return (bits.double() + 0.5) / (1 << 53)


def normal(bits: Tensor) -> Tensor:
    """Return numbers of the standard normal distribution, float64."""
    return torch.special.ndtri(uniform(bits))


def keep_mask(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return dropout's factors: 0, or 1 / (1 − p)."""
    if p >= 1:
        return torch.zeros_like(bits, dtype=dtype)
    return below(bits, 1 - p).to(dtype) / (1 - p)


class DrawNumbers:
    """Numbers the random calls of a forward pass, the same when a part of it is computed again.

    Activation checkpointing puts torch's generator back before it recomputes, so the state of the
    generator tells which call it is. Compiled code has its numbers from when it was traced.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def next(self) -> int:
        """Return the number of the call that is made now."""
        if torch.compiler.is_compiling():
            state = str(len(self._known)).encode()
        else:
            state = torch.get_rng_state().numpy().tobytes()
            torch.rand(())  # the next call finds another state
        return self._known.setdefault(state, len(self._known))


class DrawState:
    """What random numbers of a forward pass depend on; shared by all modules of a rank.

    Attributes:
        key: () int64, see `draw_key`.
        first_sample: () int64, index of this replica's first sample in the whole batch.
        samples: samples of this replica; `KeyedDropout` needs them, and the `numbers` of its calls.
    """

    def __init__(self) -> None:
        self.key = torch.zeros((), dtype=torch.int64)
        self.first_sample = torch.zeros((), dtype=torch.int64)
        self.samples, self.numbers = 0, DrawNumbers()

    def set(self, key: int, first_sample: int = 0, samples: int = 0) -> None:
        """Set the key of the next forward pass."""
        self.key.fill_(key)
        self.first_sample.fill_(first_sample)
        self.samples, self.numbers = samples, DrawNumbers()

    def advance(self, first_sample: int = 0, samples: int = 0) -> None:
        """Go on to the key of another forward pass, in the same way on all ranks."""
        self.set(int(_mix(self.key + _GAMMA)), first_sample, samples)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.key, self.first_sample = self.key.to(device), self.first_sample.to(device)


class Draw(nn.Module):
    """Draws one call's numbers for this rank's part of a tensor.

    Args:
        number: number of the call.
        sizes: sizes of the whole tensor; that of `samples_dim` does not matter.
        samples_dim: the dim that holds the batch, with `rows` rows per sample.
        own: the indices that this rank holds of a dim that is split.
        part: (rank, world) where the samples are split over the `tp` axis.
        dtype: of the numbers that are drawn.
    """

    state: DrawState

    def __init__(
        self,
        number: int,
        sizes: Sequence[int],
        samples_dim: int | None,
        rows: int = 1,
        own: Mapping[int, Sequence[int]] | None = None,
        part: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.number, self.sizes, self.samples_dim = number, list(sizes), samples_dim
        self.rows, self.part, self.dtype = rows, part, dtype
        self.own = {
            dim: torch.tensor(index, dtype=torch.int64) for dim, index in (own or {}).items()
        }

    def bits(self, shape: Sequence[int], batch: int) -> Tensor:
        """Return the bits of a part of `shape`, of a step of `batch` samples."""
        key, dim = self.state.key, self.samples_dim
        first = self.state.first_sample
        if self.part is not None:
            rank, world = self.part
            first = first + sum(even_size(before, world, batch) for before in range(rank))
        own = {dim: index.to(key.device) for dim, index in self.own.items()}
        row = first * self.rows
        return random_bits(shape, key, self.number, dim, first_row=row, own=own, sizes=self.sizes)

    def extra_repr(self) -> str:
        """Say which call it is."""
        return f"number {self.number}"


class Dropout(Draw):
    """Dropout of single elements."""

    def forward(self, x: Tensor, p: float, batch: int) -> Tensor:
        """Return `x` with a share `p` of its elements at 0, the others scaled."""
        return x * keep_mask(self.bits(x.shape, batch), p, x.dtype)


class FeatureDropout(Draw):
    """Dropout of whole channels: (N, C, …)."""

    def forward(self, x: Tensor, p: float, batch: int) -> Tensor:
        """Return `x` with a share `p` of its channels at 0, the others scaled."""
        shape = [*x.shape[:2], *(1 for _ in x.shape[2:])]
        return x * keep_mask(self.bits(shape, batch), p, x.dtype)


class Bernoulli(Draw):
    """Ones with probability `p`, else zeros."""

    def forward(self, x: Tensor, p: float, batch: int) -> Tensor:
        """Return them in the shape and dtype of `x`."""
        return below(self.bits(x.shape, batch), p).to(x.dtype)


class Uniform(Draw):
    """Numbers between 0 and 1."""

    def forward(self, like: Tensor | Sequence[int], batch: int) -> Tensor:
        """Return them in a shape, or in that of a tensor."""
        shape = like.shape if isinstance(like, Tensor) else like
        return uniform(self.bits(shape, batch)).to(self.dtype)


class Normal(Draw):
    """Numbers of mean 0 and variance 1."""

    def forward(self, like: Tensor | Sequence[int], batch: int) -> Tensor:
        """Return them in a shape, or in that of a tensor."""
        shape = like.shape if isinstance(like, Tensor) else like
        return normal(self.bits(shape, batch)).to(self.dtype)


class Attention(Draw):
    """Scaled dot-product attention with dropout of its weights."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool,
        scale: float | None, grouped: bool, batch: int
    ) -> Tensor:  # fmt: skip
        """Return (…, L, F) of q (…, L, E), k (…, S, E), v (…, S, F)."""
        if grouped:  # several heads of q share one of k and v
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
        weights = scores.softmax(-1)
        return (weights * keep_mask(self.bits(weights.shape, batch), p, q.dtype)) @ v


_KINDS: dict[Any, tuple[type[Draw], tuple[str, ...]]] = {
    aten.dropout: (Dropout, ("input", "p")),
    aten.feature_dropout: (FeatureDropout, ("input", "p")),
    aten.bernoulli: (Bernoulli, ("self", "p")),
    aten.scaled_dot_product_attention: (
        Attention,
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    ),
    aten.rand: (Uniform, ("size",)),
    aten.rand_like: (Uniform, ("self",)),
    aten.randn: (Normal, ("size",)),
    aten.randn_like: (Normal, ("self",)),
}


def draw_module(call: Call, layout: Layout, rank: int) -> tuple[Any, tuple[str, ...]]:
    """Return the module that draws for `rank` in place of a call, and which arguments it takes.

    Args:
        call: one that draws.
        layout: layout of its result.

    Raises:
        ModelError: its numbers cannot be drawn in parts.
    """
    packet = call.packet
    if packet not in _KINDS:
        raise ModelError(
            f"{call.node.target} draws random numbers in a way that no plan keeps equal; "
            "switch it off, or use dropout"
        )
    kind, names = _KINDS[packet]
    sizes, dim = list(call.out), call.program.samples_dim(call.node)
    if kind is FeatureDropout:
        sizes[2:] = [1] * len(sizes[2:])
    elif kind is Attention:  # of its weights
        sizes[-1] = call.shape(call["key"])[-2]
    rows = call.out[dim] // call.program.batch if dim is not None else 1
    own = {}
    if isinstance(layout, Shard) and sizes[layout.dim] == call.out[layout.dim]:
        own[layout.dim] = layout.owners[rank]
    part = (rank, call.world) if isinstance(layout, Samples) else None
    dtype = call.results[0].dtype
    return kind(call.node.meta["draw"], sizes, dim, rows, own, part, dtype), names


_DISTRIBUTIONS = {
    **dict.fromkeys([aten.rand, aten.rand_like], uniform),
    **dict.fromkeys([aten.randn, aten.randn_like], normal),
}


class ReferenceDraws(TorchDispatchMode):
    """Makes a model that runs on one device draw the same numbers.

    Args:
        key: key of the forward pass.
        samples_dims: the dim that holds the batch, of each call that draws, in their order; None
            is dim 0 for all.
    """

    def __init__(self, key: int, samples_dims: Sequence[int | None] | None) -> None:
        super().__init__()
        self.key, self.samples_dims = torch.tensor(key), samples_dims
        self._numbers = DrawNumbers()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Draw in place of torch where the op is one that does."""
        given = arguments_of(func, args, kwargs or {}) if is_random(func) else {}
        if not is_random(func) or not draws_numbers(given):
            return func(*args, **(kwargs or {}))
        if func is aten.bernoulli_.float:
            return args[0].copy_(below(self._bits(args[0]), given["p"]))
        if func is aten.native_dropout.default:
            mask = below(self._bits(args[0]), 1 - given["p"])
            return args[0] * mask / (1 - given["p"]), mask
        if func.overloadpacket in _DISTRIBUTIONS:
            drawn = func(*args, **(kwargs or {}))
            return drawn.copy_(_DISTRIBUTIONS[func.overloadpacket](self._bits(drawn)))
        raise ModelError(
            f"{func} draws random numbers in a way that no plan keeps equal; "
            "use dropout, or draw them outside of the model"
        )

    def _bits(self, x: Tensor) -> Tensor:
        number = self._numbers.next()
        dims = self.samples_dims
        if dims is not None and number >= len(dims):
            raise ModelError("the model drew more random numbers than when it was captured")
        dim = 0 if dims is None else dims[number]
        return random_bits(x.shape, self.key.to(x.device), number, dim)


class KeyedDropout(nn.Dropout):
    """Dropout that draws what `Dropout` draws, in a model that is run as it is written.

    Its calls are numbered in their order. So a model whose only random ops are `nn.Dropout` gets
    the masks that it has under every plan. Dim 0 holds the samples.
    """

    state: DrawState

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input` (N, …) in train mode."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(input)
        state = self.state
        number = state.numbers.next()
        rows = max(1, input.shape[0] // max(1, state.samples))
        first_row = state.first_sample * rows
        bits = random_bits(input.shape, state.key, number, 0, first_row=first_row)
        return input * keep_mask(bits, self.p, input.dtype)


def key_dropout(model: nn.Module, state: DrawState) -> nn.Module:
    """Turn every `nn.Dropout` of `model` into a `KeyedDropout`, in place; returns `model`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = KeyedDropout
        if isinstance(module, KeyedDropout):
            module.state = state
    return model
