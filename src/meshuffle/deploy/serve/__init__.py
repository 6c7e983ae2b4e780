"""A trained model as an HTTP service; needs the extra `serve`.

    supervisor: binds, measures, accepts ──connections──▶ replicas, one process each
    replica:    HTTP ──upload: limits──▶ bytes ──engine.read, in several threads──▶ views
                     ──batching──▶ engine.answer ──▶ predictions as JSON

A replica computes what `meshuffle predict` computes: it uses the same decoding, preprocessing and
task. `require` looks for the packages before anything here is imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from meshuffle.errors import ConfigError

REPLICA = "meshuffle.deploy.serve.replica"
"""The module that a replica's process runs."""

_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn[standard]",
    "httptools": "uvicorn[standard]",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def require() -> None:
    """Raise `ConfigError` if a package is missing, with the command that installs it."""
    missing = dict.fromkeys(pip for module, pip in _PACKAGES.items() if find_spec(module) is None)
    if missing:
        raise ConfigError(f"serve needs {' and '.join(missing)}: pip install 'meshuffle[serve]'")
