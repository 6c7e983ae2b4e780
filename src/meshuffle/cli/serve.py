"""`meshuffle serve`: a model as an HTTP service, with a page to try it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from meshuffle.cli.options import Debug, Force, Json, Model, doc, say, say_remarks

Remeasure = Annotated[
    bool, Parameter(negative=(), help="Measure again instead of reusing an earlier start's speeds.")
]
WindowMs = Annotated[float, doc("Milliseconds that a batch waits for images being decoded.")]


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(serve)


def serve(
    target: Path,
    /,
    *,
    host: Annotated[str, doc("Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, doc("Port; 0 takes a free one.")] = 8000,
    backend: Annotated[
        str, doc("torch, onnx or openvino; auto: the fastest installed one.")
    ] = "auto",
    replicas: Annotated[int | None, doc("Replicas (processes); default: measured.")] = None,
    threads: Annotated[int | None, doc("CPU threads per replica; default: measured.")] = None,
    batch: Annotated[
        int | None, doc("Largest number of images in a batch; default: measured.")
    ] = None,
    remeasure: Remeasure = False,
    window_ms: WindowMs = 2.0,
    plan: Annotated[
        str | None, doc("Split a network that fits no single device over ranks: tp=2, pp=2.")
    ] = None,
    token_file: Annotated[
        Path | None, doc("File with the token that clients must send; or set MESHUFFLE_TOKEN.")
    ] = None,
    max_body_mb: Annotated[float, doc("Largest request body, MB.")] = 16.0,
    max_megapixels: Annotated[float, doc("Largest image, megapixels.")] = 25.0,
    max_images: Annotated[int, doc("Most images in a request.")] = 32,
    max_requests: Annotated[int, doc("Most requests at the same time.")] = 128,
    time_limit: Annotated[float, doc("Longest time of a request, seconds.")] = 10.0,
    model: Model = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve predictions over HTTP until Ctrl-C or SIGTERM.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for its published weights.
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
        remeasure=remeasure,
        window_ms=window_ms,
        limits=Limits(
            round(max_body_mb * 1e6),
            round(max_megapixels * 1e6),
            *(max_images, max_requests, time_limit),
        ),
        token=start.read_token(token_file),
        model=model,
        plan=parse_plan(plan or "dp=1"),
    )
    say_remarks(target, model)
    start.serve(target, options, say=say, ready=lambda facts: _print(facts, options, json))


def _print(facts: dict[str, Any], options: Any, as_json: bool) -> None:
    """Print address, model and layout when the service is ready; the verb ends much later."""
    import json

    text = json.dumps(facts) if as_json else "\n".join(_lines(facts, options))
    print(text, flush=True)  # noqa: T201


def _lines(facts: dict[str, Any], options: Any) -> list[str]:
    alone, together = _speeds(facts["images_per_s"]), _speeds(facts["layouts"])
    threads = "thread" if facts["threads"] == 1 else "threads"
    ranks = f"{facts['ranks']} ranks × " if facts["ranks"] > 1 else ""
    return [
        f"{facts['url']}  the page; /docs the API, /metrics for Prometheus",
        f"model    {facts['model']}, {facts['task']}, {facts['classes']} classes",
        f"backend  {facts['backend']}{alone and f' (images/s alone: {alone})'}",
        f"replicas {facts['replicas']} × {ranks}{facts['threads']} {threads}"
        f"{together and f' (images/s together: {together})'}",
        f"batches  at most {facts['batch']} images, window {facts['window_ms']:g} ms",
        f"limits   {options.limits}",
        f"token    {'needed' if facts['token'] else 'none: anyone can send requests'}",
    ]


def _speeds(measured: dict[str, float]) -> str:
    """Return the measured speeds as text; empty where nothing was measured."""
    return ", ".join(f"{name} {speed:.0f}" for name, speed in measured.items() if speed)
