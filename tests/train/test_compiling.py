"""Whether a run compiles: what auto decides, and what is said without a compiler."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from meshuffle.comm.exchange import Exchange, GroupExchange
from meshuffle.config import TrainConfig
from meshuffle.errors import ConfigError
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.train import compiling
from meshuffle.train.compiling import CompileChoice
from meshuffle.train.watch import SilentWatch

NUM_TIMED = 25
MODEL = nn.Identity()


class Listener(SilentWatch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, text: str) -> None:
        self.lines.append(text)

    def step(self, values: Mapping[str, float], advance: int) -> None: ...


@pytest.fixture
def exchange(alone: None) -> Exchange:
    assert dist.group.WORLD is not None
    return GroupExchange(dist.group.WORLD)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    monkeypatch.setattr(compiling, "compiled", lambda model: "compiled")
    monkeypatch.setattr(compiling, "compiler_missing", lambda: "")
    return Listener()


def choice(mode: str = "auto", decided: bool | None = None, **values: Any) -> CompileChoice:
    return CompileChoice(TrainConfig(compile=mode, **values), decided)  # type: ignore[arg-type]


def take_steps(
    compile_choice: CompileChoice, listener: Listener, exchange: Exchange, seconds: float, left: int
) -> list[Any]:
    """Take as many steps as one timing needs; return what was called."""
    called = []
    for _ in range(NUM_TIMED):
        called.append(compile_choice.forward(MODEL, 8, listener))
        compile_choice.timed(seconds, left, exchange)
    return called


def test_a_short_run_stays_eager(listener: Listener, exchange: Exchange) -> None:
    auto = choice()
    assert set(take_steps(auto, listener, exchange, 0.1, left=1000)) == {MODEL}
    assert auto.decided is False
    assert listener.lines == []


@pytest.mark.parametrize(("compiled_s", "verdict"), [(0.1, True), (0.6, False)])
def test_a_long_run_tries_and_takes_the_faster(
    listener: Listener, exchange: Exchange, compiled_s: float, verdict: bool
) -> None:
    auto = choice()
    assert set(take_steps(auto, listener, exchange, 0.5, left=10_000)) == {MODEL}
    assert auto.decided is None
    assert set(take_steps(auto, listener, exchange, compiled_s, left=10_000)) == {"compiled"}
    assert auto.decided is verdict
    assert auto.forward(MODEL, 8, listener) is ("compiled" if verdict else MODEL)
    assert [line.split(":")[0] for line in listener.lines] == [
        "compiling the model",
        "--compile auto",
    ]


def test_a_smaller_batch_runs_eagerly(listener: Listener) -> None:
    on = choice("on")
    assert on.forward(MODEL, 8, listener) == "compiled"
    assert on.forward(MODEL, 3, listener) is MODEL


def test_off_and_deterministic_never_try(listener: Listener, exchange: Exchange) -> None:
    for never in (choice("off"), choice(deterministic=True), choice(decided=False)):
        assert set(take_steps(never, listener, exchange, 9.0, left=10_000)) == {MODEL}
        assert never.decided is False


def test_a_resumed_run_keeps_its_decision(listener: Listener) -> None:
    assert choice(decided=True).forward(MODEL, 8, listener) == "compiled"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    listener = Listener()
    auto = choice()
    for _ in range(3):
        assert auto.forward(MODEL, 8, listener) is MODEL
    assert listener.lines == [
        "--compile auto: no C++ compiler (g++ or clang++) is installed, so this run is eager"
    ]
    with pytest.raises(ConfigError, match="--compile on: no C"):
        choice("on")
    assert choice("off").note == ""


def test_on_without_a_compiler_leaves_no_run_folder(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from meshuffle.train.api import train

    monkeypatch.setattr(compiling, "compiler_missing", lambda: "no C++ compiler")
    with pytest.raises(ConfigError, match="no C"):
        train(dataclasses.replace(small, compile="on"))
    assert not (tmp_path / "run").exists()


def test_the_compiled_model_keeps_its_names() -> None:
    """Parameters stay the model's own: what is saved does not know of the compilation."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    compiled = compiling.compiled(model)
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert list(model.state_dict()) == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    ]


class SameOnAll(Exchange):
    """Stands for ranks that all hold the same samples."""

    def __init__(self, world: int) -> None:
        self.world, self.rank = world, 0

    def all_gather(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.stack([vector] * self.world)


class Pooled(nn.Module):
    """What `compiled` treats on its own: batch norm over the ranks, and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1)


@pytest.mark.skipif(bool(compiling.compiler_missing()), reason=compiling.compiler_missing())
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_computes_what_eager_does(world: int) -> None:
    """One step in float64: output, gradients and running statistics, from the same start."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    eager = synchronise_batch_norm(Pooled().double(), SameOnAll(world))
    model = copy.deepcopy(eager)
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    pairs = ((compiling.compiled(model), model, found), (eager, eager, expected))
    for forward, owner, values in pairs:
        own = x.clone().requires_grad_()
        y = forward(own)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        values |= {"y": y.detach(), "gx": own.grad}
        values |= {f"g.{name}": p.grad for name, p in owner.named_parameters()}
        values |= dict(owner.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
