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
    to: Annotated[str, Parameter(help="Formats, joined by commas; today: onnx.")] = "onnx",
    out: Annotated[Path | None, Parameter(help="Folder; default RUN/export.")] = None,
    data: Annotated[str | None, Parameter(help="Images for the parity check.")] = None,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Export the best weights of a run and check the file on real images.

    Parameters
    ----------
    target
        A run folder, or a weights file of one.
    """
    from meshuffle.deploy import export as run_export

    parities = run_export(target, to.split(","), out=out, data=data, model=model)
    value = {name: parity.to_dict() for name, parity in parities.items()}
    return Answer(value, "\n".join(str(parity) for parity in parities.values()))
