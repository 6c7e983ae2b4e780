"""`meshuffle models`: Meshuffle's own models, with their size and published accuracy."""

from __future__ import annotations

from cyclopts import App

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(models)


def models(pattern: str | None = None, /, *, json: Json = False, debug: Debug = False) -> Answer:
    """List our models, with counted parameters and MACs and published accuracy.

    Parameters
    ----------
    pattern
        Part of a name, or a shell pattern such as "*_v1_*_g8".
    """
    from meshuffle.errors import ModelError
    from meshuffle.models import list_models

    found = list_models(pattern)
    if not found:
        raise ModelError(f"no model of ours matches {pattern!r}; `meshuffle models` lists all")
    keys = ("name", "parameters", "macs", "published_top1", "weights", "source")
    values = [{key: getattr(info, key) for key in keys} for info in found]
    lines = [f"{'name':<30}{'parameters':>12}{'MACs':>9}{'top-1 %':>9}  {'weights':<12}source"]
    for value in values:
        top1 = "" if value["published_top1"] is None else f"{value['published_top1']:.1f}"
        lines.append(
            f"{value['name']:<30}{value['parameters']:>12,}{value['macs'] / 1e6:>8,.0f}M"
            f"{top1:>9}  {value['weights']:<12}{value['source']}"
        )
    lines.append(
        "also: torchvision:NAME, timm:NAME, package.module:function. "
        "MACs for 3×224×224; top-1 on ImageNet as published."
    )
    return Answer(values, "\n".join(lines))
