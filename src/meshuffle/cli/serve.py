"""`meshuffle serve`: a model as an HTTP service, with a page to try it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from meshuffle.cli.options import Debug, Json, Model, say


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(serve)


def serve(
    target: Path,
    /,
    *,
    host: Annotated[str, Parameter(help="Address to bind; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 finds a free one.")] = 8000,
    backend: Annotated[
        str, Parameter(help="torch, onnx or openvino; auto: the fastest of those installed.")
    ] = "auto",
    replicas: Annotated[int | None, Parameter(help="Processes; by default measured.")] = None,
    threads: Annotated[int | None, Parameter(help="Of each; by default measured.")] = None,
    batch: Annotated[int | None, Parameter(help="At most; by default measured.")] = None,
    window_ms: Annotated[
        float, Parameter(help="How long an image may wait for others that are being decoded.")
    ] = 2.0,
    plan: Annotated[
        str | None,
        Parameter(help="Splits the network over ranks: tp=2, pp=2; for what no device holds."),
    ] = None,
    token_file: Annotated[
        Path | None,
        Parameter(help="Holds the bearer token that clients must send; or set MESHUFFLE_TOKEN."),
    ] = None,
    max_body_mb: Annotated[float, Parameter(help="Of a request.")] = 16.0,
    max_megapixels: Annotated[float, Parameter(help="Of an image.")] = 25.0,
    max_images: Annotated[int, Parameter(help="Of a request.")] = 32,
    max_requests: Annotated[int, Parameter(help="At the same time.")] = 128,
    time_limit: Annotated[float, Parameter(help="Seconds of a request.")] = 10.0,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer what the weights predict of images, over HTTP, until Ctrl-C or SIGTERM.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for what torchvision publishes.
    """
    from meshuffle.deploy.serve import REPLICA, require

    require()
    from meshuffle.comm.forking import fork_server

    fork_server(REPLICA)
    from meshuffle.deploy.serve import start
    from meshuffle.deploy.serve.limits import Limits
    from meshuffle.planner.plan import parse_plan

    options = start.Options(
        host=host,
        port=port,
        backend=backend,
        replicas=replicas,
        threads=threads,
        batch=batch,
        window_ms=window_ms,
        limits=Limits(
            body_bytes=round(max_body_mb * 1e6),
            pixels=round(max_megapixels * 1e6),
            images=max_images,
            requests=max_requests,
            seconds=time_limit,
        ),
        token=start.read_token(token_file),
        model=model,
        plan=parse_plan(plan or "dp=1"),
    )
    start.serve(target, options, say=say, ready=lambda told: _print(told, options, json))


def _print(told: dict[str, Any], options: Any, as_json: bool) -> None:
    """Print what is served, once it is; the verb itself ends much later."""
    import json

    text = json.dumps(told) if as_json else "\n".join(_lines(told, options))
    print(text, flush=True)  # noqa: T201


def _lines(told: dict[str, Any], options: Any) -> list[str]:
    alone, together = _speeds(told["images_per_s"]), _speeds(told["layouts"])
    threads = "thread" if told["threads"] == 1 else "threads"
    ranks = f"{told['ranks']} ranks × " if told["ranks"] > 1 else ""
    return [
        f"{told['url']}  the page; /docs the API, /metrics for Prometheus",
        f"model    {told['model']}, {told['task']}, {told['classes']} classes",
        f"backend  {told['backend']}{alone and f' (images/s alone: {alone})'}",
        f"replicas {told['replicas']} × {ranks}{told['threads']} {threads}"
        f"{together and f' (images/s together: {together})'}",
        f"batches  at most {told['batch']} images, window {told['window_ms']:g} ms",
        f"limits   {options.limits}",
        f"token    {'needed' if told['token'] else 'none: whoever reaches the port may ask'}",
    ]


def _speeds(found: dict[str, float]) -> str:
    """Return what was measured, in words; empty where nothing was."""
    return ", ".join(f"{name} {speed:.0f}" for name, speed in found.items() if speed)
