"""What `capture` finds in a model: costs against torch's counter, aliases, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from meshuffle.errors import ModelError
from meshuffle.graph import Graph, capture
from meshuffle.models import create_model


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """Return what torch's counter sees of a forward pass, without computing it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(*(x.to("meta") for x in inputs))
    return counter.get_total_flops()


def flops(graph: Graph, batch: int | None = None) -> int:
    return sum(op.flops for op in graph.ops(batch))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(14, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Products(nn.Module):
    """Every way to multiply that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        y = torch.einsum("b...j,bkj->b...k", y, y) + torch.bmm(y, y.transpose(1, 2))
        heads = y[:, None].expand(-1, 2, -1, -1)
        return F.scaled_dot_product_attention(heads, heads, heads) @ y[:, None]


CASES = {
    "v1": (lambda: create_model("shufflenet_v1_x0_25_g3"), (3, 64, 64)),
    "v2": (lambda: create_model("shufflenet_v2_x0_5"), (3, 64, 64)),
    "v2plus": (lambda: create_model("shufflenet_v2plus_small"), (3, 64, 64)),
    "swin": (lambda: create_model("torchvision:swin_t"), (3, 64, 64)),
    "convnext": (lambda: create_model("torchvision:convnext_tiny"), (3, 64, 64)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.Conv2d(6, 6, 3, groups=3)
        ),
        (4, 9, 8),
    ),
    "one and three dims": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Unflatten(2, (2, 2, 3)), nn.Conv3d(6, 2, 2)),
        (4, 14),
    ),
    "recurrent": (Recurrent, (6, 5)),
    "products": (Products, (5, 4)),
}


@pytest.mark.parametrize(
    ("case", "train"), [*((case, True) for case in CASES), ("v2", False), ("recurrent", False)]
)
def test_flops_are_those_of_torchs_counter(case: str, train: bool) -> None:
    build, shape = CASES[case]
    model = build().train(train)
    graph = capture(model, torch.empty(2, *shape), train=train)
    assert graph.symbol is not None
    assert flops(graph) == counted(model, torch.empty(2, *shape)) > 0
    assert flops(graph, 6) == 3 * flops(graph)


@settings(max_examples=10)
@given(batch=st.integers(2, 9), size=st.sampled_from([32, 64]))
def test_costs_of_another_batch_are_those_of_a_capture_with_it(batch: int, size: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    graph = capture(model, torch.empty(3, 3, size, size))
    other = capture(model, torch.empty(batch, 3, size, size))
    assert graph.ops(batch) == other.ops()
    assert graph.live_bytes(batch) == other.live_bytes()


class Aliases(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x * 2  # 0: 40 bytes a sample
        b = a.view(-1, 5, 2)  # 1: a's memory
        c = b + 1  # 2: 40 bytes
        c.relu_()  # 3: c's memory
        left, right = c.chunk(2, dim=1)  # c's memory
        return left.sum(1) + b.sum((1, 2))[:, None] + right.sum(1)


def test_views_and_in_place_ops_share_memory() -> None:
    graph = capture(Aliases(), torch.empty(2, 10))
    ops = {op.name: op for op in graph.ops()}
    first, relu = ops["mul"], ops["relu_"]
    assert ops["view"].owner == "mul"
    assert ops["view"].read_bytes == ops["view"].written_bytes == 0
    assert relu.owner == "add"
    assert relu.read_bytes == relu.written_bytes == 80
    positions = {name: i for i, name in enumerate(ops)}
    assert first.last_use == positions["sum_2"]  # through the view
    parts = [op for op in graph.ops() if op.target.endswith("getitem>")]
    assert len(parts) == 2
    assert {op.owner for op in parts} == {"add"}
    assert ops["add"].last_use == positions["sum_3"]  # through the second part
    assert graph.live_bytes()[:3] == [80, 80, 160]


def test_bytes_of_a_linear_layer() -> None:
    graph = capture(nn.Linear(10, 3), torch.empty(2, 10))
    (op,) = graph.ops()
    assert op.parameter_bytes == graph.parameter_bytes() == 4 * 33
    assert (op.read_bytes, op.written_bytes) == (4 * (33 + 20), 4 * 6)
    assert set(op.inputs) == {"p_weight", "p_bias", "input"}
    assert graph.names == {"p_weight": "weight", "p_bias": "bias"}
    assert "linear" in str(graph)


def test_modes_and_buffers_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    capture(model, torch.randn(2, 3, 8, 8))
    assert model[0].training and not model[1].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_it_needs_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20)  # 4 TB
        graph = capture(model, torch.empty(2, 1 << 20))
    assert graph.parameter_bytes() == 4 * ((1 << 40) + (1 << 20))


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 1)


def test_what_cannot_be_captured() -> None:
    with pytest.raises(ModelError, match="cannot capture Undecided: "):
        capture(Undecided(), torch.empty(2, 3))
    with pytest.raises(ModelError, match="at least 2"):
        capture(nn.ReLU(), torch.empty(1, 3))
    with pytest.raises(ModelError, match=r"batches of \[2, 3\]"):
        capture(nn.ReLU(), (torch.empty(2, 3), torch.empty(3, 3)))


def test_a_model_that_fixes_the_batch() -> None:
    graph = capture(FixedBatch(), torch.empty(2, 3))
    assert graph.symbol is None
    assert graph.ops()[-1].shapes == ((2, 3),)
    with pytest.raises(ModelError, match="fixes that number"):
        graph.ops(4)


class WithoutAutocast(nn.Module):
    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.first, self.last, self.enabled = nn.Linear(4, 4), nn.Linear(4, 2), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            y, z = self.first(x), x.tanh()
        return self.last(y * z)


def test_calls_with_autocast_switched_off_are_calls_like_others() -> None:
    graph = capture(WithoutAutocast(enabled=False), torch.empty(3, 4))
    assert [op.target for op in graph.ops()].count("aten.linear.default") == 2
    assert graph.program.graph_module(*_arguments(graph)) is not None


def test_autocast_inside_of_a_model_is_refused() -> None:
    with pytest.raises(ModelError, match="switches autocast on in its forward"):
        capture(WithoutAutocast(enabled=True), torch.empty(3, 4))


def _arguments(graph: Graph) -> list[Tensor]:
    return [torch.ones(graph.shape(n.meta["val"])) for n in graph.nodes("placeholder")]


class Copying(nn.Module):
    """Copies of another shape: into a new tensor, whose result is read; and a table made anew.

    `grows` is read before it is made anew: that is state, and its write stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("row", torch.zeros(4))
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("grows", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.empty(3, 4).copy_(self.row + 1)
        self.table = torch.arange(4.0)
        self.grows = torch.cat([self.grows, x.mean(0, keepdim=True)])
        return (self.linear(x) + self.table + self.grows.sum(0)) @ wide.T


def test_only_a_write_to_a_buffer_that_nobody_reads_is_left_out() -> None:
    graph = capture(Copying(), torch.zeros(2, 4))
    copies = [n for n in graph.program.graph.nodes if n.target is torch.ops.aten.copy_.default]
    assert len(copies) == 2
    assert "b_table" not in {copy.args[0].name for copy in copies}
