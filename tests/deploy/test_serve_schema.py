"""schemathesis asks what OpenAPI describes, well and badly; answers must be as described."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.serving import Served, make_weights, served

pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("schema")
    (folder / "token").write_text("s3cret")
    weights = make_weights(folder / "w.safetensors", "segment")
    with served(weights, "--replicas", "1", "--token-file", str(folder / "token")) as one:
        yield one


@pytest.mark.parametrize("examples", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_service_is_as_openapi_says(service: Served, examples: int, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    command += [f"{service.url}/openapi.json", "--header", "Authorization: Bearer s3cret"]
    # A schema cannot say that bytes are an image: most that fit it are rightly refused.
    command += ["--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", str(examples), "--generation-database", "none"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-5000:]
    assert "5 passed" in found.stdout
