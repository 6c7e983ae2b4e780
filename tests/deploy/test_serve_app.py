"""What a service answers: predictions as `predict` makes them, and each refusal in its form."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from meshuffle.deploy.serve.answers import answer_of
from meshuffle.deploy.serve.backends import Backend
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.service import Service
from meshuffle.infer.predict import predict
from tests.deploy.serving import (
    error_of,
    make_weights,
    many_scans,
    noise,
    photos,
    red,
    with_service,
)

TASKS = ("classify", "detect", "segment", "multilabel", "regress")
PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("serve") / "classify.safetensors")


def close(found: Any, expected: Any) -> bool:
    """Whether plain data are equal, numbers nearly so: batches of other sizes round otherwise."""
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-3, abs=2e-3))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close(found[k], expected[k]) for k in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_predict(task: str, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w.safetensors", task)
    files = []
    for name, content in photos().items():
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    expected = predict(weights, files, pictures=tmp_path / "drawn")

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        parts = [("image", (path.name, path.read_bytes())) for path in files]
        answer = await client.post("/predict?mask=1", files=parts)
        assert answer.status_code == 200
        answer_of(task).model_validate(answer.json())
        assert answer.json()["task"] == task
        for told, said in zip(answer.json()["predictions"], expected, strict=True):
            mask = told.pop("mask", None)
            assert (mask is not None) == ("mask" in said)
            if mask is not None:
                same_masks(base64.b64decode(mask), Path(said["mask"]))
            said = {k: v for k, v in said.items() if k not in ("text", "picture", "mask")}
            assert close(told, {**said, "file": Path(said["file"]).name}), (told, said)
        if task == "detect":
            assert any(told["boxes"] for told in answer.json()["predictions"])

    with_service(weights, work)


def same_masks(content: bytes, file: Path) -> None:
    found, expected = (np.asarray(Image.open(f)) for f in (io.BytesIO(content), file))
    assert found.shape == expected.shape
    assert (found == expected).mean() > 0.999  # a pixel between two classes may fall either way


def test_raw_bytes_and_multipart_say_the_same(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        content = photos()["flower.png"]
        raw = await client.post("/predict", content=content, headers=PNG)
        form = await client.post("/predict", files={"anything": ("körper.png", content)})
        bare = await client.post("/predict", content=content)
        (a,), (b,), (c,) = (x.json()["predictions"] for x in (raw, form, bare))
        assert (a.pop("file"), b.pop("file"), c.pop("file")) == ("body", "körper.png", "body")
        assert close(a, b) and close(a, c)

    with_service(weights, work)


def test_many_at_once_get_their_own_answers(weights: Path) -> None:
    """Batches mix requests; each gets what it would get alone."""
    contents = list(photos().values())

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        async def ask(content: bytes) -> Any:
            answer = await client.post("/predict", content=content)
            (prediction,) = answer.json()["predictions"]
            return prediction

        alone = [await ask(content) for content in contents]
        together = await asyncio.gather(*(ask(content) for content in contents * 5))
        assert all(close(found, alone[i % len(contents)]) for i, found in enumerate(together))

    with_service(weights, work)


REFUSALS = [
    (b"", {}, 400, "empty"),
    (b"x", {"content-type": "multipart/form-data"}, 400, "boundary"),
    (b"--b\r\nno header", {"content-type": "multipart/form-data; boundary=b"}, 400, "malformed"),
    (b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}, 400, "without a part"),
    (b"{}", {"content-type": "application/json"}, 415, "application/json"),
    (red(), {"content-type": "application/x-www-form-urlencoded"}, 415, "image/jpeg"),
    (red(), {**PNG, "content-encoding": "gzip"}, 415, "gzip"),
    (b"MZ" + bytes(200), PNG, 415, "not a JPEG"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", PNG, 415, "not a JPEG"),
    (red()[:60], PNG, 422, "truncated"),
    (photos()["china.jpg"][:30], {}, 422, "header is broken"),
    (photos()["china.jpg"][:9000], {}, 422, "truncated"),
    (many_scans(200), {}, 422, "scans"),
    (red(2000, 600), PNG, 413, "1,200,000 pixels"),
    (noise(100_001, 0), PNG, 413, "larger than 100,000 bytes"),
]


@pytest.mark.parametrize(("body", "headers", "status", "says"), REFUSALS)
def test_what_is_refused(
    body: bytes, headers: dict[str, str], status: int, says: str, weights: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        answer = await client.post("/predict", content=body, headers=headers)
        assert says in error_of(answer, status)

    with_service(weights, work, limits=Limits(body_bytes=100_000, pixels=1_000_000))


def test_a_broken_image_among_others_is_named(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        parts = [("image", (f"{i}.png", red())) for i in range(3)]
        parts[1] = ("image", ("bad\nname.png", red()[:60]))
        answer = await client.post("/predict", files=parts)
        assert error_of(answer, 422).startswith("bad")
        parts = [("image", (f"{i}.png", red())) for i in range(5)]
        answer = await client.post("/predict", files=parts)
        assert "more than 4 images" in error_of(answer, 413)

    with_service(weights, work, limits=Limits(images=4))


def test_a_body_without_a_length_is_read_to_the_limit_and_no_further(weights: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        answer = await client.post("/predict", content=endless(), headers=PNG)
        error_of(answer, 413)

    # httpx's transport for tests would read it whole; this one asks for each part.
    async def parts(client: httpx.AsyncClient, service: Service) -> None:
        app = client._transport.app  # type: ignore[attr-defined]
        statuses = []
        body = endless()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(body), "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict"}
        scope |= {"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http"}  # type: ignore[dict-item]
        await app(scope, receive, send)
        assert statuses[0] == 413
        assert sent <= 12_000

    with_service(weights, parts, limits=Limits(body_bytes=10_000))


def test_paths_and_methods_that_do_not_exist(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        assert "/predict" in error_of(await client.get("/nothing"), 404)
        error_of(await client.get("/predict/"), 404)
        answer = await client.get("/predict")
        assert "only POST" in error_of(answer, 405)
        assert answer.headers["allow"] == "POST"
        answer = await client.post("/predict?mask=maybe", content=red())
        assert error_of(answer, 422).startswith("mask: ")

    with_service(weights, work)


def test_a_token_guards_what_computes(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic eA=="}):
            answer = await client.post("/predict", content=red(), headers=headers)
            error_of(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            error_of(await client.get("/metrics", headers=headers), 401)
        good = {"authorization": "Bearer s3cret"}
        assert (await client.post("/predict", content=red(), headers=good)).status_code == 200
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert "s3cret" not in (await client.get("/openapi.json")).text

    with_service(weights, work, token="s3cret")


def test_not_ready_before_the_model_and_after_the_end(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        answer = await client.post("/predict", content=red())
        assert "starting" in error_of(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
        error_of(await client.get("/ready"), 503)
        assert (await client.get("/health")).json() == {"status": "ok"}
        service.state = "stopping"
        assert "stopping" in error_of(await client.get("/ready"), 503)

    with_service(weights, work, begin=False)


def held(gate: threading.Event, weights: Path) -> Any:
    """Return a network that waits for a gate."""
    run = Backend("torch", str(weights)).open(1)

    def waiting(x: NDArray[Any]) -> NDArray[np.float32]:
        gate.wait(20)
        return run(x)

    return waiting


def test_more_requests_than_may_be_are_sent_away_and_the_others_answered(weights: Path) -> None:
    gate = threading.Event()

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        async def ask() -> httpx.Response:
            return await client.post("/predict", content=red())

        asked = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.2)
        answer = await ask()
        error_of(answer, 429)
        assert answer.headers["retry-after"] == "1"
        gate.set()
        assert [a.status_code for a in await asyncio.gather(*asked)] == [200] * 3
        assert (await ask()).status_code == 200

    with_service(weights, work, run=held(gate, weights), limits=Limits(requests=3))


def test_a_request_that_takes_too_long(weights: Path) -> None:
    gate = threading.Event()

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        answer = await client.post("/predict", content=red())
        assert "longer than 0.2 s" in error_of(answer, 504)
        gate.set()
        assert (await client.post("/predict", content=red())).status_code == 200

    with_service(weights, work, run=held(gate, weights), limits=Limits(seconds=0.2))


def test_a_fault_is_logged_and_told_without_its_traceback(weights: Path) -> None:
    def broken(x: NDArray[Any]) -> NDArray[np.float32]:
        raise RuntimeError("secret path /home")

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        client._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
        answer = await client.post("/predict", content=red())
        assert "secret" not in error_of(answer, 500)
        counted = (await client.get("/metrics")).text
        assert 'meshuffle_requests_total{path="/predict",status="500"} 1.0' in counted

    with_service(weights, work, run=broken)


def test_metrics_and_what_is_served(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        await client.post("/predict", files=[("a", ("a", red())), ("b", ("b", red()))])
        await client.post("/predict", content=b"")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert "meshuffle_images_total 2.0" in answer.text
        assert 'meshuffle_requests_total{path="/predict",status="200"} 1.0' in answer.text
        assert 'meshuffle_requests_total{path="/predict",status="400"} 1.0' in answer.text
        assert "meshuffle_requests_in_flight 0.0" in answer.text
        model = (await client.get("/model")).json()
        assert model["task"] == "classify" and model["classes"][4] == "\udcff"
        assert len(model["colours"]) == len(model["classes"])

    with_service(weights, work)


def test_pages_are_whole_and_may_load_nothing_else(weights: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Service) -> None:
        for path in ("/", "/docs"):
            answer = await client.get(path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "http://" not in answer.text and "https://" not in answer.text
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert json.dumps(sorted(paths)) in json.dumps(
            [["/health", "/metrics", "/model", "/predict", "/ready"]]
        )
        assert all(path in answer.text for path in paths)

    with_service(weights, work)
