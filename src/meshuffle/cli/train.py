"""`meshuffle train`: settings from flags and a file, then a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, Parameter

from meshuffle.cli import Answer, from_main
from meshuffle.cli.options import DATA_HELP, Debug, Force, Json, doc
from meshuffle.config import FIELDS, Origin, TrainConfig, check, config_key, read_config
from meshuffle.errors import ConfigError

_flags: set[str] = set()


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(train)
    app.config = (_note_flags,)


def _note_flags(app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
    """Remember which settings were given on the command line, not by default or in a file."""
    _flags.clear()
    _flags.update(
        argument.keys[0] if argument.keys else argument.field_info.name
        for argument in arguments
        if argument.tokens
    )


def train(
    data: Annotated[str | None, Parameter(help=DATA_HELP)] = None,
    /,
    *,
    settings: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),  # noqa: B008
    config: Annotated[Path | None, doc("Read settings from a TOML file.")] = None,
    resume: Annotated[Path | None, doc("Continue the run in this folder.")] = None,
    show_config: Annotated[
        bool, Parameter(negative=(), help="Print each setting and its origin, without training.")
    ] = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer | None:
    """Train a model on images, on every core or GPU of this machine.

    A setting for which no default is shown depends on the data, the task and the machine;
    --show-config prints its value.
    """
    if json:
        os.environ["MESHUFFLE_QUIET_STDOUT"] = "1"
    if resume is not None:
        return _resume(resume, data, config, settings)
    settings, origins = _merged(settings, config, data)
    if show_config:
        from meshuffle.train.api import describe_config

        return Answer(*describe_config(settings, origins))
    from meshuffle.train.api import train as run_training

    result = run_training(settings, origins)
    return from_main(Answer(result, result["run"]))


def _resume(
    run: Path, data: str | None, config: Path | None, settings: TrainConfig
) -> Answer | None:
    own_code = "model" in _flags and ":" in settings.model  # repeated, to allow its import
    given = sorted((_flags & set(FIELDS)) - {"data", "plan"} - ({"model"} if own_code else set()))
    given = [f"--{config_key(name).replace('_', '-')}" for name in given]
    given += ["--config"] if config else []
    given += [data] if data else []
    if given:
        raise ConfigError(
            "--resume continues a run with its own settings, all but --plan; leave out: "
            f"{', '.join(given)}"
        )
    from meshuffle.train.api import resume as run_resume

    result = run_resume(
        run,
        model=settings.model if own_code else None,
        plan=settings.plan if "plan" in _flags else None,
    )
    return from_main(Answer(result, result["run"]))


def _merged(
    settings: TrainConfig, config: Path | None, data: str | None
) -> tuple[TrainConfig, dict[str, Origin]]:
    """Merge defaults, file and flags (the later wins); return each value's origin too."""
    from_file = read_config(config) if config else {}
    flags = {name: getattr(settings, name) for name in _flags & set(FIELDS) - {"data"}}
    if data is not None:
        flags["data"] = data
    values: dict[str, Any] = {**from_file, **flags}
    origins: dict[str, Origin] = dict.fromkeys(from_file, "file")
    origins |= dict.fromkeys(flags, "flag")
    if not values.get("data"):
        raise ConfigError("DATA is missing: meshuffle train DATA, for example: train digits")
    merged = check(dataclasses.replace(TrainConfig(), **values))
    if origins.get("model") == "file" and ":" in merged.model:
        from meshuffle.weights import require_repeated

        require_repeated(merged.model, None)
    return merged, origins
