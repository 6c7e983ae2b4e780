"""Dropout of a model that is run as it is written, with the masks that it has under every plan."""

from __future__ import annotations

from torch import Tensor, nn

from meshuffle.parallel.draws import DrawState, keep_mask, random_bits


class KeyedDropout(nn.Dropout):
    """Dropout that draws what `draws.Dropout` draws, in a model run as it is written.

    Its calls are numbered in their order, so a model's masks are those of every plan where all
    that it draws is drawn here; dim 0 holds the samples.
    """

    state: DrawState

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input` (N, …) in train mode."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(input)
        state = self.state
        number, state.calls = state.calls, state.calls + 1
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
