"""A trained model as an HTTP service; needs the extra `serve`.

    supervisor: binds, measures, accepts ──connections──▶ replicas, one process each
    replica:    HTTP ──upload: limits──▶ bytes ──engine.read, a thread each──▶ views
                     ──batching──▶ engine.answer ──▶ what the task predicts, as JSON

A replica computes what `meshuffle predict` computes: the same decoding, preprocessing and task.
Nothing here is imported before `require` has looked for its packages.
"""

from __future__ import annotations

from importlib.util import find_spec

from meshuffle.errors import ConfigError

REPLICA = "meshuffle.deploy.serve.replica"
"""The module of the processes that answer."""

_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn[standard]",
    "httptools": "uvicorn[standard]",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def require() -> None:
    """Raise `ConfigError` where a package is missing, with the command that helps."""
    missing = dict.fromkeys(pip for module, pip in _PACKAGES.items() if find_spec(module) is None)
    if missing:
        raise ConfigError(f"serve needs {' and '.join(missing)}: pip install 'meshuffle[serve]'")
