"""Which layouts are legal for which op: one small file per family; an unlisted op runs whole."""

from meshuffle.layout.rules import along, contraction, conv, make, movement, pointwise, pool

__all__ = ["along", "contraction", "conv", "make", "movement", "pointwise", "pool"]
