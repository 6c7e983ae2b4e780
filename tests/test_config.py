"""Settings: files, their errors, the round trip, what is chosen, and repeating a run."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.cli import main
from meshuffle.config import TrainConfig, check, parse_knobs, read_config, save_interval, to_toml
from meshuffle.errors import ConfigError, RunError
from meshuffle.files import write_text
from meshuffle.infer.predict import evaluate
from meshuffle.train.api import describe_config, train
from meshuffle.train.defaults import resolve
from meshuffle.train.run import make_run_folder
from meshuffle.weights import read_weights


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'"),
        ("early-stopp = 3", "unknown key 'early-stopp'; did you mean 'early_stop'"),
        ('epochs = "three"', "epochs = 'three': expected int"),
        ("epochs = true", "expected int"),
        ("epochs = 2.5", "expected int"),
        ('strict = "yes"', "expected bool"),
        ('schedule = "cosin"', "schedule = 'cosin'"),
        ("step_epochs = [1, 2.5]", "step_epochs"),
        ("knobs = 3", "knobs = 3: expected dict"),
        ("epochs = = 3", "not TOML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="directory"):
        read_config(tmp_path)


def test_keys_in_both_spellings(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('from = "run"\ninput-size = 64\nlr = 1\n[knobs]\ngroups = 3\n')
    found = read_config(path)
    assert found == {"from_": "run", "input_size": 64, "lr": 1.0, "knobs": {"groups": "3"}}
    assert type(found["lr"]) is float


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.binary(max_size=12).map(os.fsdecode)
numbers = st.none() | st.floats(0, 1e9)


@given(
    data=texts,
    out=st.none() | texts,
    knobs=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), texts, max_size=3),
    lr=numbers,
    epochs=st.none() | st.integers(1, 10**9),
    steps=st.lists(st.integers(0, 500), max_size=3),
    strict=st.booleans(),
)
def test_toml_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    data: str,
    out: str | None,
    knobs: dict[str, str],
    lr: float | None,
    epochs: int | None,
    steps: list[int],
    strict: bool,
) -> None:
    config = TrainConfig(
        data=data,
        out=out,
        knobs=knobs,
        lr=lr,
        epochs=epochs,
        step_epochs=tuple(steps),
        strict=strict,
    )
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    write_text(path, to_toml(config, {}))
    assert TrainConfig(**read_config(path)) == config


def test_a_path_that_is_not_utf_8_trains(small: TrainConfig, tmp_path: Path) -> None:
    """On a terminal that is strict about UTF-8, too; the file repeats the run."""
    data = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"p\xffh"))  # noqa: PTH118
    try:
        shutil.copytree(small.data, data)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "meshuffle", "train", data, "--out", str(small.out)]
    small = dataclasses.replace(small, epochs=1)
    for name in ("model", "epochs", "batch", "input_size", "plan", "compile", "workers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(small, name))]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    run = Path(str(small.out))
    assert done.stdout.splitlines()[0] == os.fsencode(run)
    assert read_config(run / "config.toml")["data"] == data
    assert evaluate(run)[0].num_samples > 0
    with pytest.raises(RunError, match=r"p\\xffh-run': TensorBoard cannot write to a folder whose"):
        make_run_folder(dataclasses.replace(small, out=data + "-run"))


def test_every_value_has_its_origin(small: TrainConfig) -> None:
    values, text = describe_config(small, {"epochs": "flag", "batch": "file"})
    assert values["epochs"] == {"value": 3, "origin": "flag"}
    assert values["batch"]["origin"] == "file"
    assert values["lr"]["origin"] == "chosen"
    assert "arXiv" in values["lr"]["reason"]
    assert all(value["origin"] != "chosen" or value["reason"] for value in values.values())
    assert values["momentum"]["origin"] == "default"
    assert "epochs = 3  # flag" in text.splitlines()
    assert all(
        " # " in line or line.startswith(("#", "[")) or not line or "=" in line
        for line in text.splitlines()
    )


@pytest.mark.parametrize(
    ("num_train", "batch", "epochs"),
    [(1, 16, 100), (200, 16, 100), (1440, 32, 73), (100_000, 256, 20), (1_000_000, 256, 100)],
)
def test_defaults_follow_the_number_of_images(num_train: int, batch: int, epochs: int) -> None:
    found, _ = resolve(TrainConfig(data="x"), num_train, 224, {})
    assert (found.batch, found.epochs, found.input_size) == (batch, epochs, 224)
    assert found.lr == pytest.approx(0.5 * (batch / 1024) ** 0.75, rel=1e-2)
    assert found.weight_decay == 4e-5
    assert found.warmup_epochs == pytest.approx(min(5, 0.1 * epochs), abs=0.01)


def test_what_is_given_is_kept() -> None:
    given_values = TrainConfig(lr=0.0, weight_decay=0.0, epochs=7, batch=5, warmup_epochs=0.0)
    found, reasons = resolve(given_values, 10_000, 64, {"flip": 0.5})
    assert "lr" not in reasons and "flip" in reasons
    for name in ("lr", "weight_decay", "epochs", "batch", "warmup_epochs"):
        assert getattr(found, name) == getattr(given_values, name)
    assert found.flip == 0.5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"batch": -4}, "--batch -4"),
        ({"lr": math.nan}, "--lr nan"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"ema": 1.5}, "--ema 1.5"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"freeze": "backbon"}, "did you mean 'backbone'"),
        ({"schedule": "step"}, "needs --step-epochs"),
        ({"step_epochs": (3,)}, "no effect with --schedule cosine"),
        ({"unfreeze_epoch": 3}, "no effect without --freeze"),
        ({"save_every": "often"}, "--save-every often"),
        ({"timeout": math.inf}, "--timeout inf: must be a finite number"),
        ({"timeout": 1e12}, r"--timeout 1e\+12: must be at most 1e\+09 seconds"),
        ({"lr": math.inf}, "--lr inf: must be a finite"),
        ({"clip_norm": math.inf}, "--clip-norm inf"),
        ({"clip_norm": math.nan}, "--clip-norm nan"),
        ({"weight_decay": math.inf}, "--weight-decay inf"),
        ({"affine_degrees": math.nan}, "--affine-degrees nan"),
        ({"save_every": "infm"}, "--save-every infm"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(dataclasses.replace(TrainConfig(), **values))


@pytest.mark.parametrize("text", ["", "m", "0", "-5", "0m", "1h", "2.5", "ten"])
def test_bad_save_intervals(text: str) -> None:
    with pytest.raises(ConfigError, match="10m, or a number of steps"):
        save_interval(text)


def test_good_save_intervals() -> None:
    assert save_interval("0.5m") == (30.0, 0)
    assert save_interval("7") == (math.inf, 7)


def test_knobs_are_json_or_text() -> None:
    assert parse_knobs({"a": "1", "b": "true", "c": "[1, 2]", "d": "x"}) == {
        "a": 1,
        "b": True,
        "c": [1, 2],
        "d": "x",
    }


def test_the_config_of_a_run_repeats_it(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with a relative path to the data, through the command line."""
    data = Path(small.data)
    monkeypatch.chdir(data.parent)
    config = dataclasses.replace(small, data=data.name, epochs=2, mixup=0.2, ema=0.5)
    first = Path(train(config)["run"])
    monkeypatch.chdir(tmp_path)
    again = tmp_path / "again"
    assert main(["train", "--config", str(first / "config.toml"), "--out", str(again)]) == 0
    for name in ("best", "last"):
        a, _ = read_weights(first / "weights" / f"{name}.safetensors")
        b, _ = read_weights(again / "weights" / f"{name}.safetensors")
        assert all(torch.equal(a[key], b[key]) for key in a)
    expected = {**read_config(first / "config.toml")}
    assert read_config(again / "config.toml") == expected
    assert "# file" in (again / "config.toml").read_text()
