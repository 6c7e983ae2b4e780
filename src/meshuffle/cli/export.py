"""`meshuffle export`: files for other runtimes, each compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json, Model, doc, say_remarks


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(export)


def export(
    target: Path,
    /,
    *,
    to: Annotated[
        str, doc("Formats joined by commas: onnx, openvino, executorch, litert, pt2.")
    ] = "onnx",
    out: Annotated[Path | None, doc("Folder for the files; default RUN/export.")] = None,
    data: Annotated[str | None, doc("Data set for the checks; default: the run's.")] = None,
    with_preprocessing: Annotated[
        bool, Parameter(negative=(), help="Put preprocessing into the file: it takes uint8 images.")
    ] = False,
    int8: Annotated[
        bool, Parameter(negative=(), help="Write eight-bit files, calibrated on training images.")
    ] = False,
    max_drop: Annotated[
        float | None, doc("Points of the metric that int8 may lose on val; default 1.")
    ] = None,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Export the best weights of a run and check each file on real images.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for its published weights.
    """
    from dataclasses import asdict

    from meshuffle.deploy.api import export as run_export

    say_remarks(target, model)
    written = run_export(
        target,
        to.split(","),
        out=out,
        data=data,
        model=model,
        int8=int8,
        max_drop=max_drop,
        preprocessing=with_preprocessing,
    )
    value = {name: {"file": str(path), **asdict(p)} for name, (path, p) in written.items()}
    return Answer(value, "\n".join(f"{path}: {parity}" for path, parity in written.values()))
