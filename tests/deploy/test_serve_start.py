"""What a service chooses at its start: backend, batch, layout, and where its files are."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from meshuffle.deploy.serve import backends, start
from meshuffle.deploy.serve.backends import Backend, candidates, prepare
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.measure import Choice, Layout, best_batch, best_layout, layouts
from meshuffle.deploy.serve.starting import refusing
from meshuffle.errors import ConfigError, ParityError
from meshuffle.weights import open_weights
from tests.deploy.serving import error_of, make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("start") / "w.safetensors")


def test_nearly_as_fast_is_good_enough() -> None:
    assert best_batch({1: 50.0, 4: 97.0, 16: 100.0}) == 4
    assert best_batch({1: 99.0, 4: 97.0, 16: 100.0}) == 1
    found = [Layout(4, 1, 96.0), Layout(2, 2, 100.0), Layout(1, 4, 50.0)]
    assert best_layout(found).replicas == 4
    assert best_layout([Layout(2, 1, 10.0), Layout(1, 2, 100.0)]).replicas == 1


def test_layouts_use_all_cores_or_a_gpu_each() -> None:
    assert [(one.replicas, one.threads) for one in layouts(6, 0)] == [(6, 1), (3, 2), (1, 4)]
    assert [(one.replicas, one.threads) for one in layouts(1, 0)] == [(1, 1)]
    assert [(one.replicas, one.threads) for one in layouts(8, 2)] == [(2, 4)]


def test_candidates() -> None:
    assert candidates("torch", 0) == ["torch"]
    assert {"torch", "onnx"} <= set(candidates("auto", 0))
    assert candidates("auto", 1) == ["torch"]
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        candidates("troch", 0)


def test_a_file_is_written_once_and_again_for_other_weights(weights: Path, tmp_path: Path) -> None:
    said: list[str] = []
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(weights.read_bytes())
    one = prepare("onnx", copy, None, tmp_path / "scratch", said.append)
    again = prepare("onnx", copy, None, tmp_path / "scratch", said.append)
    assert one == again and len(said) == 1
    assert Path(one.source).parent == tmp_path / "export" / "serve"
    x = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    expected = Backend("torch", str(copy)).open(1)(x)
    np.testing.assert_allclose(one.open(1)(x), expected, rtol=1e-3, atol=1e-3)
    digest = backends.digest_of(copy)
    copy.write_bytes(copy.read_bytes() + b" ")
    assert backends.digest_of(copy) != digest


def test_where_no_folder_can_be_made_the_file_goes_to_the_scratch_folder(
    weights: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(weights.read_bytes())
    (tmp_path / "export").write_text("a file where the folder would be")
    made = prepare("onnx", copy, None, tmp_path / "scratch", lambda line: None)
    assert Path(made.source).parent == tmp_path / "scratch"
    assert made.open(1)(np.zeros((1, 3, 64, 64), np.float32)).shape[0] == 1
    assert (tmp_path / "export").read_text() == "a file where the folder would be"


def test_a_backend_that_fails_is_left_out(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"torch": 10.0, "onnx": 30.0}
    said: list[str] = []

    def fake_prepare(name: str, *_: object) -> Backend:
        if name == "openvino":
            raise ParityError("it computes something else")
        return Backend(name, "file")

    def fake_measured(
        backend: Backend, layout: Layout, batches: Sequence[int], *_: object
    ) -> dict[int, float]:
        return dict.fromkeys(batches, speeds[backend.name] * layout.replicas)

    monkeypatch.setattr(start, "prepare", fake_prepare)
    monkeypatch.setattr(start, "measured", fake_measured)
    monkeypatch.setattr(start, "num_cores", lambda: 4)
    card = open_weights(weights).card
    arguments = (weights, card, start.Options(), tmp_path, 0, said.append)
    choice = start.choose(["torch", "onnx", "openvino"], *arguments)
    assert (choice.backend.name, choice.batch) == ("onnx", 1)
    assert (choice.layout.replicas, choice.layout.images_per_s) == (4, 120.0)
    assert choice.speeds == speeds
    assert "without openvino: it computes something else" in said
    with pytest.raises(ParityError):
        start.choose(["openvino"], *arguments)


@pytest.mark.parametrize("can_write", [True, False])
def test_a_second_start_reuses_the_measurements(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_write: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    copy = tmp_path / "run" / "w.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(weights.read_bytes())
    if not can_write:
        (copy.parent / "export").write_text("a file where the folder would be")
    said: list[str] = []
    layout = Layout(2, 1, 9.0)
    chosen = Choice(Backend("torch", str(copy)), layout, 4, {"torch": 5.0}, [layout])
    num_measured = 0

    def disk_is_full(*_: object) -> None:
        raise OSError("disk full")

    def choose(*_: object) -> Choice:
        nonlocal num_measured
        num_measured += 1
        return chosen

    def begin(names: Sequence[str] = ("torch", "onnx"), **options: Any) -> int:
        """Return how often it was measured, all starts together."""
        card, asked = open_weights(copy).card, start.Options(**options)
        arguments = (copy, card, asked, tmp_path, 0, said.append)
        assert start.choose_once(list(names), *arguments) == chosen
        return num_measured

    monkeypatch.setattr(start, "choose", choose)
    assert [begin(), begin()] == [1, 1]
    assert len(said) == 1 and "reusing the measurements of 20" in said[0]
    assert begin(remeasure=True) == 2
    assert begin(batch=4) == 3  # other options
    assert begin(["torch"]) == 4  # other backends
    monkeypatch.setattr("meshuffle.deploy.serve.remember.num_cores", lambda: 77)
    assert [begin(), begin()] == [5, 5]
    for file in tmp_path.rglob("measured-*.json"):
        file.write_text(file.read_text()[:40])
    assert [begin(), begin()] == [6, 6]
    monkeypatch.setattr("meshuffle.deploy.serve.remember.write_json", disk_is_full)
    assert begin(batch=2) == 7 and "will measure again: disk full" in said[-1]
    assert begin(["torch"], batch=4, replicas=2) == begin(["torch"], batch=4, replicas=2) - 1


def test_while_it_starts_it_answers_503_and_keeps_the_port() -> None:
    with start.bound("127.0.0.1", 0) as listener:
        url = start.url_of(listener)
        with refusing(listener, Limits()), httpx.Client(base_url=url, timeout=20) as client:
            assert client.get("/health").json() == {"status": "ok"}
            for path in ("/", "/ready", "/model", "/nowhere"):
                answer = client.get(path)
                assert error_of(answer, 503) == "the service is starting"
                assert int(answer.headers["retry-after"]) > 0
            error_of(client.post("/predict", content=bytes(3_000_000)), 503)
            silent = socket.create_connection(listener.getsockname()[:2], timeout=20)
            client.get("/health")
        with silent:
            assert silent.recv(1) == b""  # closed: it would hold up the start
        with socket.create_connection(listener.getsockname()[:2], timeout=20):
            listener.setblocking(True)
            listener.accept()[0].close()


def test_serve_listens_before_it_measures(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def choose(*_: object) -> Choice:
        url = said[-1].split()[2].rstrip(";")
        assert httpx.get(f"{url}/health").status_code == 200
        error_of(httpx.get(f"{url}/ready"), 503)
        raise ParityError("seen")

    monkeypatch.setattr(start, "choose_once", choose)
    with pytest.raises(ParityError, match="seen"):
        start.serve(weights, start.Options(port=0), say=said.append, ready=lambda facts: None)


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(start.TOKEN_VARIABLE, raising=False)
    assert start.read_token(None) is None
    monkeypatch.setenv(start.TOKEN_VARIABLE, "from-environment")
    assert start.read_token(None) == "from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert start.read_token(tmp_path / "token") == "from-file"
    assert "from-file" not in repr(start.Options(token="from-file"))
    monkeypatch.setenv(start.TOKEN_VARIABLE, "")
    with pytest.raises(ConfigError, match="one word"):
        start.read_token(None)


@pytest.mark.slow
def test_a_start_with_everything_measured(weights: Path) -> None:
    command = [sys.executable, "-m", "meshuffle", "serve", str(weights), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(7)]
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0 and not out
    assert lines[0].startswith("http://127.0.0.1:") and "torch" in lines[2]
    assert "measuring onnx" in said and lines[6].startswith("token")
