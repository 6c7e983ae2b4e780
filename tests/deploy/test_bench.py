import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from meshuffle.cli import main
from meshuffle.data import Preprocess
from meshuffle.deploy.bench import run as bench_run
from meshuffle.deploy.bench import show
from meshuffle.deploy.bench.backends import BACKENDS, find_backends
from meshuffle.deploy.bench.run import Report, Row, bench
from meshuffle.deploy.bench.subject import BenchSubject, open_subject
from meshuffle.deploy.bench.worker import Worker
from meshuffle.errors import ConfigError, MeshuffleError, ModelError
from meshuffle.infer.predict import evaluate
from meshuffle.models import create_model
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import save_weights


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file and a data set of two classes of flat colours."""
    folder = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, name in enumerate(("dark", "light")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(120 * label, 120 * label + 110, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{i}.png")
    network = create_model("shufflenet_v2_x0_5", num_classes=2, seed=1)
    card = Card(
        "shufflenet_v2_x0_5", ("dark", "light"), Preprocess(crop=32, resize=36),
        data=str(folder / "photos"),
    )  # fmt: skip
    save_weights(folder / "weights.safetensors", network.state_dict(), card)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TRY_S", "_LATENCY_S", "_RATE_S"):
        monkeypatch.setattr(bench_run, name, 0.01)


def test_each_backend_has_a_row_with_the_accuracy_that_eval_finds(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = home / "weights.safetensors"
    arguments = ["bench", str(weights), "--backends", "onnx,openvino", "--rounds", "2", "--json"]
    assert main([*arguments, "--out", str(home / "out")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["backend"] for row in rows] == ["eager", "onnx", "openvino"]
    judged, _ = evaluate(weights)
    for row in rows:
        assert row["accuracy"] == pytest.approx(judged.metrics["top1"], abs=1e-3)
        assert row["agreement"] == 100
        assert row["latency_p95_ms"] >= row["latency_ms"] > 0
        assert min(row[key] for key in ("images_per_s", "file_bytes", "load_s", "peak_bytes")) > 0
    eager, onnx, _ = rows
    assert onnx["peak_bytes"] < eager["peak_bytes"]  # its process knows no torch
    with (home / "out" / "bench.csv").open(newline="") as file:
        assert [row["backend"] for row in csv.DictReader(file)] == ["eager", "onnx", "openvino"]
    with Image.open(home / "out" / "bench.png") as picture:
        assert picture.width > 500


def test_a_bare_model_has_no_accuracy_and_random_weights(home: Path) -> None:
    found = bench(
        "shufflenet_v2_x0_5", backends=["onnx"], rounds=1, images=4, input_size=32,
        data=str(home / "photos"),
    )  # fmt: skip
    assert [row.accuracy for row in found.rows] == [None, None]
    assert "random weights" in found.images
    assert [row.agreement for row in found.rows] == [100, 100]


def test_a_backend_that_fails_is_left_out_with_the_reason(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs(self: Worker, path: Path) -> None:
        if self.name == "onnx":
            raise MeshuffleError("onnx: its process died (exit -9)")
        plain(self, path)

    plain = Worker.outputs
    monkeypatch.setattr(Worker, "outputs", outputs)
    found = bench(str(home / "weights.safetensors"), backends=["onnx", "openvino"], rounds=1)
    assert [row.backend for row in found.rows] == ["eager", "openvino"]
    assert found.missing == {"onnx": "onnx: its process died (exit -9)"}
    assert "onnx: left out: onnx: its process died" in show.table(found)


def test_a_killed_worker_is_told(home: Path) -> None:
    subject = open_subject(
        str(home / "weights.safetensors"), num=2, data=None, model=None, input_size=None
    )
    np.save(home / "images.npy", subject.x_NCHW)
    job = bench_run.Job(BACKENDS[0], home / "weights.safetensors", home / "images.npy", 1)
    worker = Worker(job)
    worker._process.kill()
    worker._process.join()
    with pytest.raises(MeshuffleError, match=r"eager: its process died \(exit -9\)"):
        worker.time(1, 0.01)
    worker.close()


def row(name: str, rate: float, agreement: float) -> Row:
    return Row(name, rate, 8, 1.0, 2.0, 3.0, 90.0, agreement, 10, 0.1, 10, 2, "none 1.0")


def test_the_best_agrees() -> None:
    rows = (row("eager", 100, 100), row("onnx", 300, 99.5), row("onnx-int8", 900, 98.9))
    report = Report(rows, {}, "m", "4 images of d", "top-1", "cpu × 2", 3.0)
    assert report.best.backend == "onnx"
    assert "best: onnx, 300 images/s, 3.0 times eager" in show.table(report)
    assert "others were at work" in show.table(report)
    assert "others" not in show.table(dataclasses.replace(report, load=0.1))


def test_agreement_is_per_image() -> None:
    def subject(task: str) -> BenchSubject:
        card = Card("shufflenet_v2_x0_5", ("a", "b"), Preprocess(crop=32, resize=32), task)
        x = np.zeros((4, 3, 32, 32), np.float32)
        views = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        return BenchSubject(torch.nn.Identity(), card, "", x, views, None, None)

    reference = np.array([[1, 0], [0, 1], [2, 1], [5, 0]], np.float32)
    other = reference.copy()
    other[1] = [3, 1]
    assert subject("classify").agreement(other, reference) == 75
    other[0] *= 1.005
    assert subject("multilabel").agreement(other, reference) == 75
    other[0] *= 1.02
    assert subject("multilabel").agreement(other, reference) == 50


def test_wrong_options_are_one_line(home: Path) -> None:
    weights = str(home / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"unknown backend 'onx'.*onnx"):
        find_backends(["onx"])
    with pytest.raises(ConfigError, match=r"--rounds \(=0\) must be at least 1"):
        bench(weights, rounds=0)
    with pytest.raises(ConfigError, match="brings its own"):
        bench(weights, input_size=64)
    with pytest.raises(ModelError, match="shufflenet_v9"):
        bench("shufflenet_v9")


def test_a_gan_has_no_bench(tmp_path: Path) -> None:
    preprocess, knobs = Preprocess(crop=8, resize=8), {"width": 8, "noise": 4}
    card = Card("shufflenet_v2_x0_5", ("a",), preprocess, task="generate", knobs=knobs)
    weights = tmp_path / "best.safetensors"
    save_weights(weights, make_task(card).network(0).state_dict(), card)
    with pytest.raises(
        ConfigError, match="a generate model takes no images, so bench cannot run it"
    ):
        bench(str(weights))
