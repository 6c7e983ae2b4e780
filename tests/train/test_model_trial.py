"""Models of other people train as they are, or one line says why not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from meshuffle.config import TrainConfig, read_config
from meshuffle.deploy.api import export
from meshuffle.errors import ModelError, PlanError
from meshuffle.infer.predict import evaluate, predict
from meshuffle.report.record import read_record
from meshuffle.train.api import resume, train
from meshuffle.weights import build_model, load_model
from tests.train import foreign

MODELS = "tests.train.foreign"


def of(small: TrainConfig, name: str, **changes: object) -> TrainConfig:
    values = {"model": f"{MODELS}:{name}", "knobs": {}, "epochs": 1, **changes}
    return dataclasses.replace(small, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lenet", "order"])
def test_a_network_that_needs_contiguous_memory_trains(small: TrainConfig, name: str) -> None:
    run = Path(train(of(small, name))["run"])
    assert read_config(run / "config.toml")["channels_last"] is False
    _, card = load_model(run, f"{MODELS}:{name}")
    assert card.channels_last is False
    found, _ = evaluate(run, model=f"{MODELS}:{name}")
    rows = predict(run, [Path(small.data) / "val"], model=f"{MODELS}:{name}")
    assert len(rows) == found.num_samples == 12
    assert 100 * sum(r["label"] in r["file"] for r in rows) / 12 == pytest.approx(
        found.metrics["top1"], abs=1e-4
    )


def test_a_view_is_exported_and_split_too(small: TrainConfig) -> None:
    run = Path(train(of(small, "lenet", plan="tp=2:channel,threads=1"))["run"])
    _, parity = export(run, model=f"{MODELS}:lenet")["onnx"]
    assert parity.max_relative_error < 1e-4


def test_what_others_take_stays_channels_last(small: TrainConfig) -> None:
    run = Path(train(of(small, "pair"))["run"])
    assert read_config(run / "config.toml")["channels_last"] is True


@pytest.mark.parametrize(("name", "unused"), [("pair", "output 1"), ("named", "aux")])
def test_the_main_output_is_learned_and_the_others_are_named(
    small: TrainConfig, capsys: pytest.CaptureFixture[str], name: str, unused: str
) -> None:
    run = Path(train(of(small, name))["run"])
    assert f"the loss uses the main output alone; unused: {unused}" in capsys.readouterr().out
    found, _ = evaluate(run, model=f"{MODELS}:{name}")
    assert found.num_samples == 12
    trained = load_model(run, f"{MODELS}:{name}")[0].state_dict()
    first = build_model(load_model(run, f"{MODELS}:{name}")[1], f"{MODELS}:{name}").state_dict()
    assert torch.equal(trained["aux.weight"], first["aux.weight"])
    assert not torch.equal(trained["fc.weight"], first["fc.weight"])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("five", r"five has 5 outputs for 2 classes \(blue, red\); let the function take num_clas"),
        ("infinite", "infinite returns NaN or infinity for random images of 3×32×32"),
        ("odd", "the model returns left, right, and none is the main output"),
        ("broken", r"broken on images of 3×32×32: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_what_cannot_train_is_refused_before_a_run_folder(
    small: TrainConfig, name: str, line: str
) -> None:
    with pytest.raises(ModelError, match=line):
        train(of(small, name))
    assert not Path(str(small.out)).exists()


def test_a_function_without_num_classes_trains_where_its_outputs_fit(small: TrainConfig) -> None:
    assert train(of(small, "two"))["metrics"]["val"]["top1"] >= 0


def test_a_model_whose_layers_have_versions_is_judged(small: TrainConfig) -> None:
    run = Path(train(of(small, "versioned", ema=0.5))["run"])
    found, _ = evaluate(run, model=f"{MODELS}:versioned")
    assert found.num_samples == 12
    again = train(of(small, "versioned", from_=str(run), out=f"{small.out}-again"))
    assert again["metrics"]["val"]["top1"] >= 0


def test_channels_last_that_was_asked_for_is_refused_where_it_differs(small: TrainConfig) -> None:
    with pytest.raises(ModelError, match=r"--channels-last: tests\.train\.foreign:order does not"):
        train(of(small, "order", channels_last=True))


def test_a_module_object_trains_and_has_the_best_weights(small: TrainConfig) -> None:
    network = foreign.LeNet(2)
    first = network.fc.weight.detach().clone()
    run = Path(train(dataclasses.replace(small, knobs={}, plan="auto"), model=network)["run"])
    assert not torch.equal(network.fc.weight, first)
    found, _ = evaluate(run, model=network)
    rows = predict(run, [Path(small.data) / "val"], model=network)
    hits = sum(row["label"] in row["file"] for row in rows)
    assert found.metrics["top1"] == pytest.approx(100 * hits / len(rows))
    again = foreign.LeNet(2)
    resume(run, model=again)
    assert torch.equal(again.fc.weight, network.fc.weight)
    with pytest.raises(ModelError, match="a LeNet object of a program; pass model=OBJECT"):
        evaluate(run)
    with pytest.raises(PlanError, match="dp=2: a module object trains on one rank"):
        train(dataclasses.replace(small, plan="dp=2"), model=network)


@pytest.mark.parametrize("name", ["lenet", "pair"])
def test_two_replicas_learn_what_one_learns(small: TrainConfig, name: str, tmp_path: Path) -> None:
    """LeNet needs contiguous memory; of the pair, the unused head has no gradient anywhere."""
    losses = []
    for plan in ("dp=1,threads=1", "dp=2,threads=1"):
        out = str(tmp_path / plan.partition(",")[0])
        run = Path(train(of(small, name, plan=plan, out=out))["run"])
        losses.append(float(read_record(run).epochs[0]["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
