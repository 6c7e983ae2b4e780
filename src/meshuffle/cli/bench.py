"""`meshuffle bench`: the same model in every runtime that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json, Model, doc, say


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(bench)


def bench(
    target: str,
    /,
    *,
    backends: Annotated[
        str, doc("Backends joined by commas, for example onnx,openvino-int8; default: all.")
    ] = "",
    best: Annotated[
        bool,
        Parameter(
            negative=(), help="Show only the fastest backend that agrees with PyTorch on 99 %."
        ),
    ] = False,
    threads: Annotated[int, doc("CPU threads per backend; 0: one per core.")] = 0,
    rounds: Annotated[int, doc("Rounds of measurement; backends take turns.")] = 5,
    images: Annotated[int, doc("Number of images for accuracy and agreement.")] = 256,
    data: Annotated[
        str | None, doc("Data set of the images; default: the run's, or digits.")
    ] = None,
    input_size: Annotated[
        int | None, doc("Input side of a model given by name, pixels; default 224.")
    ] = None,
    out: Annotated[
        Path | None, doc("Folder for bench.csv and bench.png; default RUN/bench.")
    ] = None,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Measure speed, size, memory and accuracy of a model in every runtime that is installed.

    Parameters
    ----------
    target
        A run folder, a weights file, or the name of a model, which gets random weights.
    """
    from dataclasses import asdict

    from meshuffle.deploy.bench import show
    from meshuffle.deploy.bench.run import bench as run_bench

    report = run_bench(
        target,
        backends=[name for name in backends.split(",") if name],
        threads=threads,
        rounds=rounds,
        images=images,
        data=data,
        model=model,
        input_size=input_size,
        say=say,
    )
    path = Path(target)
    home = path if path.is_dir() else path.parent if path.exists() else Path()
    written = show.save(report, out or home / "bench")
    rows = [report.best] if best else list(report.rows)
    text = show.best_line(report) if best else show.table(report)
    return Answer([asdict(row) for row in rows], "\n".join([text, *map(str, written)]))
