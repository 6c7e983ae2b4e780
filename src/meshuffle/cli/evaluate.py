"""`meshuffle eval`: the metrics of a run's weights on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App

from meshuffle.cli import Answer, from_main
from meshuffle.cli.options import Debug, Force, Json, Model, Spread, doc, say_remarks


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(evaluate, name="eval")


def evaluate(
    target: Path,
    /,
    *,
    data: Annotated[str | None, doc("Data set to evaluate on; default: the run's.")] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None,
        doc("Split to evaluate; default: test where the data has one, else val."),
    ] = None,
    batch: Annotated[int, doc("Images per batch.")] = 64,
    plan: Spread = "dp=1",
    model: Model = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer | None:
    """Evaluate the best weights of a run, or a weights file.

    Parameters
    ----------
    target
        A run folder, a weights file, or torchvision:NAME for its published weights.
    """
    from meshuffle.infer.predict import evaluate as run_evaluation
    from meshuffle.tasks import find_task

    say_remarks(target, model)
    evaluation, used = run_evaluation(
        target, data=data, split=split, batch=batch, model=model, plan=plan
    )
    metrics = {key: round(value, 6) for key, value in evaluation.metrics.items()}
    value = {"task": evaluation.task, "num_samples": evaluation.num_samples, "metrics": metrics}
    shown = find_task(evaluation.task).metrics_text(metrics)
    text = f"{used}: {shown}, loss {metrics['loss']:.4f} on {evaluation.num_samples} images"
    skipped = [f"skipped: {message}" for message in evaluation.skipped]
    return from_main(Answer(value | {"skipped_inputs": len(skipped)}, "\n".join([*skipped, text])))
