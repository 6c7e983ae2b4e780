"""`meshuffle predict`: what the weights of a run see in images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from meshuffle.cli import Answer, from_main
from meshuffle.cli.options import Debug, Json, Model, Spread


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(predict)


def predict(
    target: Path,
    images: list[Path],
    /,
    *,
    out: Annotated[
        Path | None, Parameter(help="Folder for the images with the prediction drawn on them.")
    ] = None,
    batch: Annotated[int, Parameter(help="Images at a time.")] = 64,
    plan: Spread = "dp=1",
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer | None:
    """Predict what the weights have learned to say of images.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for what torchvision publishes.
    images
        Image files, or folders of them.
    """
    from meshuffle.train.inference import predict as run_prediction

    values = run_prediction(target, images, batch=batch, model=model, plan=plan, pictures=out)
    broken = [value for value in values if "error" in value]
    lines = [f"{value['file']}: {value.get('error') or value.pop('text')}" for value in values]
    if broken:
        lines.append(f"{len(broken)} of {len(values)} images could not be read")
    return from_main(Answer(values, "\n".join(lines), exit_code=2 if broken else 0))
