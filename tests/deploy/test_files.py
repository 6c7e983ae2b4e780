"""Every format: its file computes what the model does, says what it is, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from meshuffle.deploy.api import write_file
from meshuffle.deploy.formats import FORMATS, find_format
from meshuffle.deploy.formats.base import Format, Precision, Run
from meshuffle.deploy.formats.onnx import Onnx
from meshuffle.errors import ConfigError, MeshuffleError, ModelError, ParityError
from meshuffle.tasks.card import Card
from tests.deploy.networks import (
    CLASSES,
    PREPROCESS,
    TINY,
    make_card,
    make_images,
    make_network,
    small,
)

HERE = tuple(name for name in FORMATS if name != "litert")  # that has an environment of its own
SLOW = {
    ("executorch", "shufflenet_v1_x0_25_g3"),
    ("executorch", "shufflenet_v2plus_small"),
    ("pt2", "shufflenet_v2plus_small"),
}
CASES = [
    pytest.param(form, name, marks=[pytest.mark.slow] if (form, name) in SLOW else [])
    for form in HERE
    if form != "onnx"  # test_onnx.py
    for name in [*TINY, "all permutations"]
]


@pytest.mark.parametrize(("name", "network"), CASES)
def test_the_file_computes_what_the_model_does_at_any_batch_size(
    tmp_path: Path, name: str, network: str
) -> None:
    form, model = find_format(name), make_network(network)
    path = tmp_path / f"model{form.suffix}"
    parity = write_file(form, model, make_card(network), path, make_images())
    assert parity.batch_sizes == (1, 2, 5)
    assert parity.max_relative_error < 1e-5
    assert parity.top1_agreement == 100.0
    assert parity.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    run = form.open(path, threads=1)
    for num_images in (1, 3, 37):
        x_NCHW = PREPROCESS.normalise(make_images(num_images)).contiguous()
        with torch.no_grad():
            expected = model.eval()(x_NCHW).numpy()
        assert np.abs(run(x_NCHW.numpy()) - expected).max() < 1e-5


@pytest.fixture(scope="module", params=HERE)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Format, Path]:
    form = find_format(request.param)
    path = tmp_path_factory.mktemp("export") / "deep" / f"model{form.suffix}"
    write_file(form, small(), make_card(), path, make_images())
    return form, path


def test_the_file_says_what_it_is(written: tuple[Format, Path]) -> None:
    form, path = written
    said = form.metadata(path)
    assert Card.from_json(said["meshuffle"]) == make_card()
    assert said["model"] == "small"
    assert tuple(json.loads(said["classes"])) == CLASSES
    assert json.loads(said["preprocess"]) == PREPROCESS.to_dict()
    assert said["input"] == "float32 [batch, 3, 32, 32], normalised"


def test_nothing_of_this_machine_is_in_the_file(written: tuple[Format, Path]) -> None:
    for file in written[1].parent.iterdir():
        content = file.read_bytes()
        assert str(Path.cwd()).encode() not in content
        assert b"site-packages" not in content


def test_the_outputs_are_of_the_caller(written: tuple[Format, Path]) -> None:
    run = written[0].open(written[1])
    x = PREPROCESS.normalise(make_images(4)).contiguous().numpy()
    first = run(x[:2])
    kept = first.copy()
    run(x[2:])
    assert np.array_equal(first, kept)


def test_a_precision_that_a_format_lacks_is_refused(written: tuple[Format, Path]) -> None:
    form, path = written
    if "bfloat16" in form.precisions:
        outputs = form.open(path, precision="bfloat16")(np.ones((2, 3, 32, 32), np.float32))
        assert outputs.dtype == np.float32
        return
    with pytest.raises(ConfigError, match=f"^{form.name} does not compute in bfloat16; it knows"):
        form.open(path, precision="bfloat16")


def _swapped(run: Run) -> Run:
    def swapped(x: NDArray[Any]) -> NDArray[np.float32]:
        return run(x)[:, ::-1]

    return swapped


@pytest.mark.parametrize("name", HERE)
def test_a_file_that_differs_never_replaces_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    form, fired = find_format(name), []
    path = tmp_path / f"model{form.suffix}"
    path.write_bytes(b"the old file")
    load = type(form).load

    def faulty(self: Format, path: Path, threads: int, precision: Precision) -> Run:
        fired.append(name)
        return _swapped(load(self, path, threads, precision))

    monkeypatch.setattr(type(form), "load", faulty)
    with pytest.raises(ParityError, match="Nothing was written"):
        write_file(form, small(), make_card(), path, make_images())
    assert fired
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", HERE)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    form = find_format(name)
    path = tmp_path / f"model{form.suffix}"
    path.write_bytes(b"the old file")

    def full(self: Format, subject: object, path: Path) -> None:
        path.write_bytes(b"half a")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(type(form), "write", full)
    with pytest.raises(MeshuffleError, match=r"^cannot write to .*: No space left on device"):
        write_file(form, small(), make_card(), path, make_images())
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", HERE)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "model"
    with pytest.raises(MeshuffleError, match=r"^cannot write to .*file"):
        write_file(find_format(name), small(), make_card(), path, make_images())


def test_a_toolchain_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Format, subject: object, path: Path) -> None:
        raise KeyError("no rule\nfor aten.roll")

    monkeypatch.setattr(Onnx, "write", fail)
    with pytest.raises(ModelError, match=r"^Sequential cannot be exported to onnx: .*no rule"):
        write_file(Onnx(), small(), make_card(), tmp_path / "model.onnx", make_images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("openvino", "export to openvino needs openvino: pip install 'meshuffle[openvino]'"),
        (
            "executorch",
            "export to executorch needs executorch and torchao: "
            "pip install 'meshuffle[executorch]'",
        ),
        (
            "litert",
            f"export to litert needs litert-torch, which needs torch below 2.15 (here "
            f"{torch.__version__.partition('+')[0]}): in an environment of its own, pip install "
            "'meshuffle[litert]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    form = find_format(name)
    monkeypatch.setattr(f"{type(form).__module__}.find_spec", lambda _: None, raising=False)
    monkeypatch.setattr("meshuffle.deploy.formats.base.find_spec", lambda _: None)
    for ask in (form.require, lambda: form.open(Path("model"))):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert str(caught.value).replace("+cpu", "") == line


def test_raw_outputs_are_those_of_the_network(tmp_path: Path) -> None:
    class Halved(nn.Module):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            return x_NCHW.mean((2, 3))[:, :2]

    card = Card(
        model="small",
        classes=("a", "b"),
        preprocess=PREPROCESS,
        task="regress",
        settings={"mean": [5.0, 7.0], "std": [2.0, 3.0]},
    )
    x = PREPROCESS.normalise(make_images(3)).contiguous().numpy()
    found = {}
    for decoded in (True, False):
        path = tmp_path / f"{decoded}.onnx"
        write_file(Onnx(), Halved(), card, path, make_images(), decoded=decoded)
        found[decoded] = Onnx().open(path)(x)
    np.testing.assert_allclose(found[True], found[False] * [2, 3] + [5, 7], rtol=1e-5)
