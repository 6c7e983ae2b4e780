"""The ONNX file computes what the model computes, at every batch size, or is not written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from meshuffle.data import Preprocess
from meshuffle.deploy.api import write_file
from meshuffle.deploy.formats import onnx as onnx_export
from meshuffle.deploy.formats.onnx import Onnx
from meshuffle.deploy.parity import Parity
from meshuffle.deploy.subject import parity_batches
from meshuffle.errors import DataError, ModelError, ParityError
from meshuffle.models import create_model
from meshuffle.tasks.card import Card
from tests.deploy.networks import (
    CLASSES,
    PREPROCESS,
    SIZE,
    TINY,
    alive,
    make_card,
    make_images,
    make_network,
    small,
)


class FixedBatch(nn.Module):
    """Bakes its batch size of two into the graph."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.reshape(2, -1)[:, : len(CLASSES)]


def logits_of(path: Path, images_NCHW: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x_NCHW = PREPROCESS.normalise(images_NCHW).contiguous().numpy()
    return np.asarray(session.run(["logits"], {"input": x_NCHW})[0])


@pytest.mark.parametrize("name", [*TINY, "all permutations"])
def test_the_file_computes_what_the_model_does_at_any_batch_size(tmp_path: Path, name: str) -> None:
    model = make_network(name)
    parity = write_file(Onnx(), model, make_card(name), tmp_path / "model.onnx", make_images())
    assert parity.batch_sizes == (1, 2, 5)
    assert parity.max_relative_error < 1e-5
    assert parity.top1_agreement == 100.0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # no external data
    assert parity.file_bytes == (tmp_path / "model.onnx").stat().st_size
    model.eval()
    for num_images in (1, 3, 7):
        images = make_images(num_images)
        with torch.no_grad():
            expected = model(PREPROCESS.normalise(images)).numpy()
        assert expected.std(0).mean() > 1e-3 or num_images == 1  # the images matter
        assert np.abs(logits_of(tmp_path / "model.onnx", images) - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("permutation", ["paper", "inverse", "random"])
@pytest.mark.parametrize(
    "name", ["shufflenet_v1_x0_5_g3_se", "shufflenet_v2_x1_0_se", "shufflenet_v2plus_medium"]
)
def test_whole_models_are_as_exact_as_float32_is(
    tmp_path: Path, name: str, permutation: str
) -> None:
    """The file is no further from the float64 model than 4 × the float32 model is."""
    model = alive(create_model(name, num_classes=4, seed=0, permutation=permutation)).eval()
    parity = write_file(Onnx(), model, make_card(name), tmp_path / "model.onnx", make_images())
    assert parity.top1_agreement == 100.0
    images = make_images(16)
    x_NCHW = PREPROCESS.normalise(images)
    with torch.no_grad():
        float32 = model(x_NCHW).numpy()
        float64 = model.double()(x_NCHW.double()).numpy()
    found = logits_of(tmp_path / "model.onnx", images)
    assert np.abs(found - float64).max() <= 4 * np.abs(float32 - float64).max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parity]:
    path = tmp_path_factory.mktemp("export") / "deep" / "model.onnx"
    return path, write_file(Onnx(), small(), make_card(), path, make_images())


def test_the_file_says_what_it_is(exported: tuple[Path, Parity]) -> None:
    path, parity = exported
    program = onnx.load(path)
    (image,), (logits,) = program.graph.input, program.graph.output
    assert (image.name, logits.name) == ("input", "logits")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    dims = image.type.tensor_type.shape.dim
    assert dims[0].dim_param and [dim.dim_value for dim in dims[1:]] == [3, SIZE, SIZE]
    metadata = {entry.key: entry.value for entry in program.metadata_props}
    assert metadata["model"] == "small"
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert Preprocess.from_dict(json.loads(metadata["preprocess"])) == PREPROCESS
    assert Card.from_json(metadata["meshuffle"]) == make_card()
    opset = next(entry.version for entry in program.opset_import if not entry.domain)
    assert parity.runtime == f"ONNX Runtime {onnxruntime.__version__}, opset {opset}"


def test_nothing_of_this_machine_is_in_the_file(exported: tuple[Path, Parity]) -> None:
    content = exported[0].read_bytes()
    for trace in (b".py", str(Path.cwd()).encode(), b"site-packages"):
        assert trace not in content


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = small().to(torch.float64).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_file(Onnx(), model, make_card(), tmp_path / "model.onnx", make_images())
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float64 and torch.equal(tensor, before[name])


def test_images_are_taken_in_turn() -> None:
    batches = parity_batches(make_images(3), PREPROCESS)
    assert [tuple(x.shape) for x in batches] == [(n, 3, SIZE, SIZE) for n in (1, 2, 5)]
    rows, images = torch.cat(batches), PREPROCESS.normalise(make_images(3))
    for i, row in enumerate(rows):
        assert torch.equal(row, images[i % 3])


@pytest.mark.parametrize(
    "images",
    [make_images(0), make_images().float(), make_images()[0], make_images()[:, :1]],
    ids=["none", "float", "one without a batch", "grey"],
)
def test_images_of_another_kind_are_refused(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(DataError, match=r"at least one, as uint8 \[N, 3, H, W\]; got torch"):
        write_file(Onnx(), small(), make_card(), tmp_path / "model.onnx", images)


def _wrong_weight(program: onnx.ModelProto) -> None:
    weight = program.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def _one_class_less(program: onnx.ModelProto) -> None:
    graph = program.graph
    start, end = (
        onnx.numpy_helper.from_array(np.array([value]), name)
        for name, value in (("s", 0), ("e", 3))
    )
    axis = onnx.numpy_helper.from_array(np.array([1]), "a")
    graph.initializer.extend([start, end, axis])
    graph.node[-1].output[0] = "all"
    graph.node.append(onnx.helper.make_node("Slice", ["all", "s", "e", "a"], ["logits"]))
    del graph.output[0].type.tensor_type.shape.dim[:]
    graph.output[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize(
    ("fault", "message"),
    [(_wrong_weight, "may be at most 0.0001"), (_one_class_less, r"\[1, 3\], the model \[1, 4\]")],
)
def test_a_file_that_differs_never_replaces_a_good_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[onnx.ModelProto], None],
    message: str,
) -> None:
    path, fired = tmp_path / "model.onnx", []
    path.write_bytes(b"the old file")
    translate = onnx_export._translate

    def faulty(captured: ExportedProgram, outputs: str) -> onnx.ModelProto:
        program = translate(captured, outputs)
        fault(program)
        fired.append(fault)
        return program

    monkeypatch.setattr(onnx_export, "_translate", faulty)
    with pytest.raises(ParityError, match=message):
        write_file(Onnx(), small(), make_card(), path, make_images())
    assert fired
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_an_error_above_a_tiny_tolerance_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"may be at most 1e-12\. Nothing was written"):
        write_file(
            Onnx(), small(), make_card(), tmp_path / "model.onnx", make_images(), tolerance=1e-12
        )
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_numbers_are_no_agreement(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model[2].bias[0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(ParityError, match="max error nan"):
        write_file(Onnx(), model, make_card(), tmp_path / "model.onnx", make_images())


def test_a_batch_size_in_the_graph_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^FixedBatch cannot be exported: .*batch") as caught:
        write_file(Onnx(), FixedBatch(), make_card(), tmp_path / "model.onnx", make_images())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_it_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_file(Onnx(), small(), make_card(), tmp_path / "model.onnx", make_images())
    assert capfd.readouterr() == ("", "")


def test_parity_is_one_line_to_print(exported: tuple[Path, Parity]) -> None:
    parity = exported[1]
    assert str(parity) == (
        f"max error {parity.max_abs_error:.1e} (relative {parity.max_relative_error:.1e}), "
        f"top-1 agreement 100 % on batches of 1, 2, 5 ({parity.runtime})"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        parity.file_bytes = 0  # type: ignore[misc]
