"""`meshuffle verify`: does a parallel run compute what one device computes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Force, Json, doc
from meshuffle.errors import MeshuffleError
from meshuffle.planner.plan import parse_plan

if TYPE_CHECKING:
    from meshuffle.verify.api import Verdict


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(verify)


def verify(
    *,
    model: Annotated[
        str,
        Parameter(
            help="One of our models, torchvision:NAME, timm:NAME, transformers:TYPE or "
            "package.module:function."
        ),
    ],
    plan: Annotated[
        str, doc("Plan to verify, for example tp=2, tp=2:channel, dp=2,tp=2 or tp=2,pp=2:zbv,mb=4.")
    ],
    input: Annotated[
        str,
        Parameter(
            help="Shape of one sample: 3x64x64 (image), 16000 (waveform) or 128:int (token ids); "
            "several inputs are joined by commas."
        ),
    ] = "3x64x64",
    batch: Annotated[int, doc("Global batch size, over all ranks.")] = 8,
    dtype: Annotated[Literal["float64", "float32"], doc("Precision of both runs.")] = "float64",
    seed: Annotated[int, doc("Seed of weights, inputs and random masks.")] = 0,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Train three steps under a plan and on one device, and compare every tensor."""
    from meshuffle.verify.api import verify as run_verification

    (verdict,) = run_verification([(model, plan, input)], dtype=dtype, batch=batch, seed=seed)
    if verdict.error is not None:
        error = MeshuffleError(verdict.error)
        error.exit_code = verdict.exit_code
        raise error
    return Answer(verdict.to_dict(), "" if json else _text(verdict), exit_code=verdict.exit_code)


def _text(verdict: Verdict) -> str:
    """Return the summary, the worst tensors, and the ops that are not split."""
    sent, measured = verdict.sent_bytes_predicted or 0, verdict.sent_bytes_measured or 0
    said = "UNDECIDED" if verdict.undecided else "equal" if verdict.passed else "NOT EQUAL"
    predicted = "not predicted" if verdict.sent_bytes_predicted is None else f"predicted {sent:,}"
    lines = [
        f"{said}: {verdict.model} under {verdict.plan} and on one device, {verdict.dtype}",
        _shares(verdict),
        f"sent by all ranks in a forward and backward: {measured:,} bytes, {predicted}",
    ]
    if verdict.undecided:
        lines.append(
            "one device's own rounding makes as much here; a larger --input or --batch may decide"
        )
    if verdict.float32_only:
        lines.append(f"in float32 alone, since a kernel lacks float64: {verdict.float32_only}")
    if verdict.as_written:
        lines.append(f"the model runs as it is written, since {verdict.as_written}")
    if verdict.num_floor_tensors:
        lines.append(
            f"{verdict.num_floor_tensors} tensors judged by the floor or the reference's own noise"
        )
    if verdict.median_ratio is not None:
        lines.append(
            f"error over that of one device: median {verdict.median_ratio:.2f}, "
            f"worst {verdict.worst_ratio:.2f}"
        )
    if verdict.first_diverging:
        lines.append(f"first differs at {verdict.first_diverging}")
    lines.append(_worst_table(verdict))
    if verdict.whole_ops and parse_plan(verdict.plan).tp > 1:
        lines.append(f"{verdict.num_whole_ops} ops run whole on every rank:")
        lines += [f"  {share:.1%} {op} in {module}" for module, op, share in verdict.whole_ops]
    return "\n".join(lines)


def _shares(verdict: Verdict) -> str:
    """Return each rank's share of the FLOPs (where layers are split) and of the parameters."""
    kept = f"{verdict.parameter_bytes_fraction or 0:.1%} of the parameters"
    if parse_plan(verdict.plan).tp == 1:
        return f"the largest rank holds {kept}"
    return (
        f"{verdict.sharded_flops_fraction or 0:.1%} of FLOPs in split ops; the busiest rank has "
        f"{verdict.busiest_over_mean:.2f} of the mean, and {kept}"
    )


def _worst_table(verdict: Verdict) -> str:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column("worst tensors", overflow="fold")
    table.add_column("relative error", justify="right")
    table.add_column("")
    for name, error in verdict.worst_tensors:
        why = "undecided" if verdict.undecided else "failed"
        failed = why if name in verdict.failed_tensors else ""
        table.add_row(name, f"{error:.1e}", failed)
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip("\n")
