"""What a model computes, op by op, and what each op costs: `capture(model, example) -> Graph`."""

from meshuffle.graph.capture import capture
from meshuffle.graph.graph import Graph, Op

__all__ = ["Graph", "Op", "capture"]
