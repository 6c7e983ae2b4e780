"""`meshuffle export`: a file for other runtimes, with proof that it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json, Model


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(export)


def export(
    target: Path,
    /,
    *,
    to: Annotated[
        str, Parameter(help="Any of onnx, openvino, executorch, litert, pt2, with commas.")
    ] = "onnx",
    out: Annotated[Path | None, Parameter(help="Folder; default RUN/export.")] = None,
    data: Annotated[str | None, Parameter(help="Images for the checks; default the run's.")] = None,
    with_preprocessing: Annotated[
        bool, Parameter(negative=(), help="The file takes uint8 images of any size.")
    ] = False,
    int8: Annotated[
        bool, Parameter(negative=(), help="Eight-bit files, calibrated on training images.")
    ] = False,
    max_drop: Annotated[
        float | None,
        Parameter(help="Points that int8 may lose on the validation split; default 1."),
    ] = None,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Export the best weights of a run and check the file on real images.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for what torchvision publishes.
    """
    from dataclasses import asdict

    from meshuffle.deploy.api import export as run_export

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
