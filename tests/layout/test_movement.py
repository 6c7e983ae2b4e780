"""Maps read from ids are the permutations that the models document, and reshapes by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from meshuffle.graph import Graph, capture
from meshuffle.layout import Shard
from meshuffle.layout.movement import is_movement, moved_owners, origins
from meshuffle.models import create_model
from meshuffle.models.permutation import ChannelShuffle, channel_permutation


def captured(model: nn.Module, *shape: int) -> Graph:
    return capture(model, torch.empty(2, *shape))


def output_of(graph: Graph) -> Node:
    (output,) = graph.nodes("output")
    return output.all_input_nodes[-1]


class Between(nn.Module):
    """A chain of movements with a computed source in front."""

    def __init__(self, move: nn.Module) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x * 2)


@pytest.mark.parametrize("kind", ["paper", "inverse"])
@pytest.mark.parametrize("groups", [2, 3])
def test_the_channel_shuffle(kind: str, groups: int) -> None:
    graph = captured(Between(ChannelShuffle(12, groups, kind)), 12, 3, 5)
    found = origins(graph, output_of(graph), 1, {"mul": 1})
    assert found == tuple(("mul", i) for i in channel_permutation(kind, 12, groups))
    # Nothing is left of a map's rows where channels are mixed into them.
    assert origins(graph, output_of(graph), 2, {"mul": 1}) is None
    rows = origins(graph, output_of(graph), 2, {"mul": 2})
    assert rows == tuple(("mul", i) for i in range(3))


def sources_of(node: Node) -> list[Node]:
    """The values that are computed, in front of the movements that lead to `node`."""
    if not is_movement(node):
        return [node]
    found: list[Node] = []
    for before in node.all_input_nodes:
        if isinstance(before.meta.get("val"), Tensor | tuple | list):
            found += [source for source in sources_of(before) if source not in found]
    return found


def test_every_shuffle_of_v2_is_one_map() -> None:
    """Split, concat, shuffle and split again: each convolution's input channels have one origin."""
    graph = captured(create_model("shufflenet_v2_x0_5"), 3, 64, 64)
    num_joined = 0
    for node in graph.nodes():
        if not str(node.target).startswith("aten.conv2d") or not is_movement(node.args[0]):
            continue
        sources = sources_of(node.args[0])
        found = origins(graph, node.args[0], 1, {source.name: 1 for source in sources})
        assert found is not None
        channels = graph.shape(node.args[0].meta["val"])[1]
        assert len(set(found)) == len(found) == channels
        num_joined += len({name for name, _ in found}) > 1
    assert num_joined >= 13


class Flattened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(x + 1).flatten(1), (x - 1)[:, 1:3].flatten(1)], 1)


def test_flatten_in_front_of_a_classifier() -> None:
    graph = captured(Flattened(), 4, 2, 2)
    sources = {"add": 1, "sub": 1}
    found = origins(graph, output_of(graph), 1, sources)
    assert found == tuple(
        [("add", c) for c in range(4) for _ in range(4)]
        + [("sub", c) for c in (1, 2) for _ in range(4)]
    )
    halves = Shard.even(1, 4, 2).owners
    owners = moved_owners(found, {"add": halves, "sub": halves})
    assert owners == ((*range(8), *range(16, 20)), (*range(8, 16), *range(20, 24)))
    assert origins(graph, output_of(graph), 1, {"add": 1}) is None  # the other source is unknown


@settings(max_examples=15)
@given(st.data())
def test_any_chain_moves_values_as_its_map_says(data: st.DataObject) -> None:
    """Random transposes, splits and joins: ids and values agree along the channels."""
    names = data.draw(st.lists(st.sampled_from(["shuffle", "flip", "halve", "roll"]), max_size=5))

    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0
            for name in names:
                if name == "shuffle":
                    y = y.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
                elif name == "flip":
                    y = y.flip(1)
                elif name == "halve":
                    a, b = y.chunk(2, 1)
                    y = torch.cat([b, a], 1)
                else:
                    y = torch.roll(y, 5, 1)
            return y

    x = torch.randn(2, 12, 2)
    graph = captured(Chain(), 12, 2)
    found = origins(graph, output_of(graph), 1, {"mul": 1})
    assert found is not None
    assert torch.equal(Chain()(x), x[:, [index for _, index in found]])
