"""A real service: its start, its replicas' lives and ends, and clients that mean no good."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from meshuffle.cli import main
from tests.deploy.serving import (
    Served,
    error_of,
    make_weights,
    noise,
    photos,
    red,
    rss_bytes,
    served,
    until,
)

ASK = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("serve") / "classify.safetensors")


@pytest.fixture(scope="module")
def service(weights: Path) -> Iterator[Served]:
    """Two replicas, one thread each, small limits."""
    limits = ("--max-body-mb", "1", "--max-megapixels", "2", "--time-limit", "5")
    with served(weights, "--replicas", "2", *limits) as one:
        yield one


def head_of(port: int, data: bytes, *, parts: int = 1, pause_s: float = 0.0) -> bytes:
    """Send bytes and return what comes back until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        try:
            for i in range(parts):
                client.sendall(data[len(data) * i // parts : len(data) * (i + 1) // parts])
                time.sleep(pause_s)
            answer = b""
            while part := client.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            return b""
    return answer


def test_it_tells_what_it_serves_and_spreads_the_load(service: Served) -> None:
    assert service.told["backend"] == "torch" and service.told["replicas"] == 2
    assert service.told["limits"]["body_bytes"] == 1_000_000
    assert service.told["layouts"] == {"2 × 1 thread": 0.0}  # given, and so not measured
    clients = [httpx.Client(base_url=service.url) for _ in range(8)]
    for client in clients:
        assert client.post("/predict", content=red()).status_code == 200
    assert "meshuffle_images_total 8.0" in clients[0].get("/metrics").text  # of both replicas
    assert len(service.replicas()) == 2
    for client in clients:
        client.close()


def test_heads_that_do_not_end_and_bodies_that_do_not_come(service: Served) -> None:
    """A client cannot hold a connection by sending little, nor fill memory by sending much."""
    slow = ASK % 100
    with ThreadPoolExecutor() as pool:
        nothing = pool.submit(head_of, service.port, b"")
        half = pool.submit(head_of, service.port, slow[:30])
        drops = pool.submit(head_of, service.port, slow[:40], parts=40, pause_s=0.1)
        body = pool.submit(head_of, service.port, slow + b"x")
        endless = pool.submit(head_of, service.port, b"GET /" + b"a" * 3_000_000)
        many = pool.submit(head_of, service.port, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500_000)
        assert nothing.result() == half.result() == drops.result() == b""
        assert body.result().startswith(b"HTTP/1.1 504 ")
        assert endless.result() == many.result() == b""
    assert httpx.get(service.url + "/ready").status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_has_come(service: Served) -> None:
    answer = httpx.post(service.url + "/predict", content=bytes(3_000_000))
    assert "1,000,000 bytes" in error_of(answer, 413)
    chunked = httpx.post(service.url + "/predict", content=iter([bytes(500_000)] * 3))
    error_of(chunked, 413)
    endless = head_of(service.port, ASK % 10**12 + bytes(5_000_000))
    assert endless.startswith(b"HTTP/1.1 413 ") or not endless


def test_what_is_no_http(service: Served) -> None:
    answer = head_of(service.port, b"\x16\x03\x01 hello\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["status"] == 400
    assert httpx.get(service.url + "/health").status_code == 200


def hostile_body(number: int) -> tuple[bytes, dict[str, str]]:
    """Return random bytes, a broken image, or a broken form."""
    rng = random.Random(number)
    kinds = ["image/png", "image/jpeg", "application/octet-stream", "multipart/form-data"]
    form = "multipart/form-data; boundary=b"
    content = rng.choice(list(photos_once.values()))
    kind = rng.choice(("noise", "cut", "flipped", "form", "type"))
    if kind == "noise":
        return noise(rng.randrange(3000), number), {"content-type": rng.choice(kinds)}
    if kind == "cut":
        return content[: rng.randrange(len(content))], {"content-type": rng.choice(kinds)}
    if kind == "flipped":
        broken = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken), {"content-type": "image/jpeg"}
    if kind == "form":
        parts = b"--b\r\nContent-Disposition: form-data; name=a; filename=%s\r\n\r\n%s\r\n--b--\r\n"
        body = parts % (noise(rng.randrange(9), number), content[: rng.randrange(5000)])
        return body[: rng.randrange(len(body) + 1)], {"content-type": form}
    return content, {"content-type": noise(8, number).hex()}


photos_once = {name: part for name, part in photos().items() if name != "china.jpg"}


def attack(service: Served, num: int, begin: int = 0) -> None:
    """Send hostile bodies over a few connections; none may be a fault of the service."""

    def send(numbers: range) -> None:
        with httpx.Client(base_url=service.url, timeout=20) as client:
            for number in numbers:
                body, headers = hostile_body(number)
                answer = client.post("/predict", content=body, headers=headers)
                if answer.status_code != 200:
                    assert answer.status_code in (400, 413, 415, 422), answer.text
                    error_of(answer, answer.status_code)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, (range(begin + i, begin + num, 4) for i in range(4))))


def test_hostile_bodies(service: Served) -> None:
    before = service.replicas()
    attack(service, 300)
    assert service.replicas() == before


@pytest.mark.slow
def test_ten_thousand_hostile_bodies_and_memory_stays_flat(service: Served) -> None:
    attack(service, 2000)
    pids = service.replicas()
    before = sum(map(rss_bytes, pids))
    attack(service, 10_000, 2000)
    assert service.replicas() == pids
    assert sum(map(rss_bytes, pids)) < before + 30e6


def test_a_replica_that_is_killed_is_replaced_and_the_service_goes_on(service: Served) -> None:
    before = service.replicas()
    os.kill(before[0], signal.SIGKILL)
    for _ in range(5):  # the other one answers meanwhile
        assert httpx.post(service.url + "/predict", content=red()).status_code == 200
    until(lambda: len(service.replicas()) == 2 and before[0] not in service.replicas())

    def both_ready() -> bool:
        answers = [httpx.get(service.url + "/ready").status_code for _ in range(4)]
        return set(answers) == {200}

    until(both_ready)
    assert httpx.post(service.url + "/predict", content=red()).status_code == 200


def test_kills_under_load_cost_no_client_a_wrong_answer(service: Served) -> None:
    """Each request ends: with a prediction, a 503, or a closed connection (clients retry)."""
    answers: Counter[object] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = httpx.post(service.url + "/predict", content=red(300, 300), timeout=30)
                answers[answer.status_code] += 1
            except httpx.TransportError as error:
                answers["timeout" if isinstance(error, httpx.TimeoutException) else "closed"] += 1

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask) for _ in range(8)]
        try:
            for _ in range(3):
                before, victim = answers.total(), service.replicas()[0]
                until(lambda before=before: answers.total() > before + 20)  # type: ignore[misc]
                os.kill(victim, signal.SIGKILL)
                until(
                    lambda victim=victim: (  # type: ignore[misc]
                        len(service.replicas()) == 2 and victim not in service.replicas()
                    )
                )
        finally:
            stop.set()
        for client in clients:
            client.result(60)
    assert answers.keys() <= {200, 503, "closed"} and answers[200] > 60, answers


def ask_until_the_end(service: Served, failed: list[str], answered: list[int]) -> None:
    """Ask without a pause until nobody listens; each request that was sent must be answered."""
    while True:
        try:
            answer = httpx.post(service.url + "/predict", content=red(300, 300))
            assert answer.status_code == 200, answer.text
            answered.append(answer.status_code)
        except httpx.ConnectError:  # after the end
            return
        except (httpx.HTTPError, AssertionError) as error:
            failed.append(repr(error))


def test_stopping_answers_what_was_accepted(weights: Path) -> None:
    """Six clients ask all the time, a seventh has sent half a request, when SIGTERM comes."""
    body = red()
    failed: list[str] = []
    answered: list[int] = []
    with served(weights, "--replicas", "2") as service:
        arguments = (service, failed, answered)
        threads = [threading.Thread(target=ask_until_the_end, args=arguments) for _ in range(6)]
        for thread in threads:
            thread.start()
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
            client.sendall(ASK % len(body) + body[:20])
            until(lambda: len(answered) > 6)
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            client.sendall(body[20:])
            answer = b""
            while part := client.recv(65536):
                answer += part
        for thread in threads:
            thread.join()
        code, said = service.stop()
    assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer
    assert not failed
    assert code == 0 and "stopping" in said and "Traceback" not in said


def test_what_cannot_be_served(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: in use on 127.0.0.1" in fails(str(weights), "--port", port)
    assert "no such address" in fails(str(weights), "--host", "no such host")
    assert "must be in 0 … 65535" in fails(str(weights), "--port", "70000")
    assert "No such file" in fails(str(weights), "--token-file", str(tmp_path / "none"))
    (tmp_path / "token").write_text("two words")
    assert "one word" in fails(str(weights), "--token-file", str(tmp_path / "token"))
    assert "did you mean 'onnx'" in fails(str(weights), "--backend", "onxn")
    assert "must be above 0" in fails(str(weights), "--max-images", "0")
    assert "no such run folder" in fails(str(tmp_path / "nowhere"))


def test_a_missing_package_is_named(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meshuffle.deploy.serve.find_spec", lambda name: None)
    assert main(["serve", str(weights)]) == 2
    assert "pip install 'meshuffle[serve]'" in capsys.readouterr().err


def test_when_the_supervisor_is_killed_the_replicas_end(service: Served) -> None:
    """The last one: it ends the service of this file."""
    replicas = service.replicas()
    service.process.kill()
    service.process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in replicas), 20)
