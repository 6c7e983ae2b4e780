"""`meshuffle predict`: what the weights of a run see in images."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json, Model


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(predict)


def predict(
    target: Path,
    images: list[Path],
    /,
    *,
    model: Model = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Predict the class of images.

    Parameters
    ----------
    target
        A run folder, or a weights file of one.
    images
        Image files, or folders of them.
    """
    from meshuffle.train.api import predict as run_prediction

    values = run_prediction(target, images, model=model)
    broken = [value for value in values if "error" in value]
    lines = [
        f"{value['file']}: {value['error']}"
        if "error" in value
        else f"{value['file']}: {value['label']} ({100 * value['probability']:.1f} %)"
        for value in values
    ]
    if broken:
        lines.append(f"{len(broken)} of {len(values)} images could not be read")
    return Answer(values, "\n".join(lines), exit_code=2 if broken else 0)
