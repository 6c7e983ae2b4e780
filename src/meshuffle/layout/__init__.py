"""How tensors lie over the ranks of the `tp` axis; which layouts each op allows, at what cost."""

from meshuffle.layout.assign import Assignment, assign
from meshuffle.layout.layout import Layout, Partial, Replicate, Samples, Shard, Varying, Window

__all__ = [
    "Assignment",
    "Layout",
    "Partial",
    "Replicate",
    "Samples",
    "Shard",
    "Varying",
    "Window",
    "assign",
]
