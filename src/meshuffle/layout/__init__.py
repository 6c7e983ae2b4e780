"""How a tensor lies over the ranks of the `tp` axis, and what it takes to lay it otherwise."""

from meshuffle.layout.layout import Layout, Partial, Replicate, Shard
from meshuffle.layout.transfer import routes, sent_elements

__all__ = ["Layout", "Partial", "Replicate", "Shard", "routes", "sent_elements"]
