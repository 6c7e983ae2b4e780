"""Models of everyday kinds are computed exactly under every plan, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshuffle.errors import ModelError
from meshuffle.graph import capture
from meshuffle.parallel.module import Parallel
from meshuffle.verify.api import verify
from tests.ranks import PYTHON_PATH
from tests.verify import everyday

IMAGE = "3x16x16"


def test_each_kind_under_each_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    plans = ("tp=2:channel", "tp=2:batch", "pp=2,mb=2", "dp=2")
    cases = [(kind, plan, IMAGE, 5) for kind in everyday.IMAGES for plan in plans]
    cases += [(everyday.Average, plan, IMAGE, 5) for plan in ("tp=2:batch", "tp=2", "pp=2,mb=1")]
    cases += [(everyday.Frequent, plan, "6:int", 5) for plan in ("tp=2:batch", "tp=2:channel")]
    cases += [(everyday.Causal, plan, "6:int", 5) for plan in ("tp=2", "pp=2")]
    cases += [(everyday.Grouped, "tp=2:channel", "6x32", 5)]
    cases += [(everyday.Centred, "tp=2:batch", "16", 5)]
    wrong = {
        f"{kind.__name__} {plan}": verdict.error or verdict.failed_tensors
        for (kind, plan, *_), verdict in zip(cases, verify(cases), strict=True)
        if not verdict.passed
    }
    assert not wrong


def test_what_no_program_holds_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    plans = ("dp=2", "dp=2:shard", "pp=1,mb=2")
    cases = [(kind, plan, IMAGE, 5) for kind in everyday.AS_WRITTEN for plan in plans]
    for case, verdict in zip(cases, verify(cases), strict=True):
        assert verdict.passed and verdict.as_written, (case, verdict)
    why = "Python state that its forward changes (step) and 1 more"
    assert why in verdict.as_written


def test_python_state_is_found_and_left_alone() -> None:
    model, x = everyday.Counted().train(), torch.randn(4, 3, 8, 8)
    with pytest.raises(ModelError, match=r"Python state that its forward changes \(step\)"):
        capture(model, x)
    assert (model.step, model.size, model.seen) == (0, 0, [0])
    sized = everyday.Sized().train()
    capture(sized, x)
    assert sized.size == 7


def test_what_is_unfrozen_later_is_refused() -> None:
    model, x = everyday.Base().train(), torch.randn(4, 3, 8, 8)
    model.stem.weight.requires_grad_(False)
    split = Parallel(model, (x,), 1, 0)
    split(x)
    split.stem.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"stem\.weight is to be trained now"):
        split(x)


def test_replicas_of_what_mixes_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    kinds = {
        everyday.Centred: ("16", "aten.mean.dim in its forward"),
        everyday.Average: (IMAGE, "aten.mean.dim in its forward"),
        everyday.Frequent: ("6:int", "aten.embedding.default in table"),
        everyday.Rows: ("6x16", "aten.reshape.default in its forward"),
        everyday.Instance: (IMAGE, "aten.instance_norm.default in norm"),
    }
    cases = [(kind, "dp=2", given, 6) for kind, (given, _) in kinds.items()]
    for (kind, *_), verdict in zip(cases, verify(cases), strict=True):
        assert verdict.exit_code == 2
        expected = f"{kind.__name__} mixes the samples of a batch: {kinds[kind][1]}. Plan dp=2"
        assert str(verdict.error).startswith(expected), verdict.error


def test_a_frozen_part_stays_frozen() -> None:
    model = everyday.NormTwice().train()
    model.norm.eval()
    split = Parallel(model, (torch.randn(4, 3, 8, 8),), 1, 0)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(split(x), model(x))
    assert int(split.norm.num_batches_tracked) == 0


def test_a_traced_part_keeps_its_mode() -> None:
    """A copy of torch.fx's modules forgets that it was in eval mode."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(torch.fx.symbolic_trace(body), nn.ReLU()).eval()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(Parallel(model, (x,), 1, 0)(x), model(x))


class Scaled(everyday.Base):
    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.tensor(2.0)
        return x * torch.tensor(3.0)


def test_train_and_eval_mode_have_constants_of_their_own() -> None:
    model, x = Scaled().train(), torch.randn(4, 3, 8, 8)
    split = Parallel(model, (x,), 1, 0)
    torch.testing.assert_close(split(x), model(x))
    torch.testing.assert_close(split.eval()(x), model.eval()(x))
    assert set(split.state_dict()) == set(model.state_dict())


class Stable(everyday.Base):
    def __init__(self) -> None:
        super().__init__()
        self.exact = nn.Conv2d(8, 8, 3)

    def middle(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.exact(x.float()).tanh()


def test_a_part_without_autocast_keeps_its_precision() -> None:
    model, x = Stable().train(), torch.randn(4, 3, 8, 8)
    split = Parallel(model, (x,), 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x), split(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def hooked(kind: str) -> nn.Module:
    model = everyday.Base()
    if kind == "module":
        model.stem.register_full_backward_hook(lambda *_: None)
    elif kind == "parameter":
        model.stem.weight.register_hook(torch.neg)
    else:
        model.stem.weight.register_post_accumulate_grad_hook(lambda _: None)
    return model


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (everyday.Reversed(), r"a function with its own backward \(tests.*Reverse\)"),
        (everyday.Watched(), r"a gradient hook \(.*neg\) on a value of its forward"),
        (hooked("module"), r"a backward hook \(.*lambda>\) of stem"),
        (hooked("parameter"), r"a gradient hook \(.*neg\) of the parameter stem.weight"),
        (hooked("accumulated"), r"a gradient hook \(.*lambda>\) of the parameter stem.weight"),
    ],
)
def test_what_a_model_does_to_its_gradients_is_not_lost_in_silence(
    model: nn.Module, what: str
) -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(ModelError, match=f"{what}, which plans with tp or pp would lose; dp=N"):
        Parallel(model.train(), (x,), 1, 0)
    capture(model, x, train=False)  # no gradients there
