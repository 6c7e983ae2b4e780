"""A benchmark's report as a table, as CSV, and as a picture."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.figure import Figure

from meshuffle.deploy.bench.run import AGREEMENT, Report, Row
from meshuffle.files import disk_errors, replaced

_HEADER = (
    f"{'backend':<16}{'images/s':>10}{'± %':>6}{'batch':>7}{'ms':>9}{'p95 ms':>9}"
    f"{'accuracy':>10}{'agrees %':>10}{'MB':>8}{'load s':>8}{'RAM MB':>8}"
)


def table(report: Report) -> str:
    """Return the report as text: the rows, the backends left out, and the conditions."""
    lines = [_HEADER, *map(_line, report.rows)]
    lines += [f"{name}: left out: {reason}" for name, reason in report.missing.items()]
    threads, busy = report.rows[0].threads, report.load
    lines += [
        f"{report.model} on {report.images}; accuracy is {report.metric}; ms at batch 1",
        f"{report.machine}, {threads} threads, busy with {busy:.1f} cores before it began"
        + (": others were at work, so repeat it" if busy > 0.5 else ""),
        "; ".join(dict.fromkeys(row.runtime for row in report.rows)),
        best_line(report),
    ]
    return "\n".join(lines)


def best_line(report: Report) -> str:
    """Return the line that names the best backend."""
    row, eager = report.best, report.rows[0]
    gain = row.images_per_s / eager.images_per_s
    return (
        f"best: {row.backend}, {row.images_per_s:.0f} images/s, {gain:.1f} times eager, of those "
        f"that agree with it on {AGREEMENT:.0f} % at least"
    )


def _line(row: Row) -> str:
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.2f}"
    return (
        f"{row.backend:<16}{row.images_per_s:>10.1f}{row.spread / 2:>6.1f}{row.batch:>7}"
        f"{row.latency_ms:>9.2f}{row.latency_p95_ms:>9.2f}{accuracy:>10}{row.agreement:>10.2f}"
        f"{row.file_bytes / 1e6:>8.2f}{row.load_s:>8.1f}{row.peak_bytes / 1e6:>8.0f}"
    )


def save(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `bench.csv` and `bench.png` to `folder`; returns their paths.

    Raises:
        MeshuffleError: the disk refuses them; older files are unchanged.
    """
    text = io.StringIO()
    columns = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, [*columns, "model", "images", "machine", "load"])
    writer.writeheader()
    shared = {key: getattr(report, key) for key in ("model", "images", "machine", "load")}
    writer.writerows({**asdict(row), **shared} for row in report.rows)
    picture = io.BytesIO()
    draw(report).savefig(picture, format="png", dpi=150)
    paths = folder / "bench.csv", folder / "bench.png"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(
            paths, (text.getvalue().encode(), picture.getvalue()), strict=True
        ):
            with replaced(path) as temporary:
                temporary.write_bytes(content)
    return paths


def draw(report: Report) -> Figure:
    """Return a bar chart of images/s and latency of each backend, the fastest on top."""
    rows = sorted(report.rows, key=lambda row: row.images_per_s)
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(rows)), layout="constrained")
    rates, latencies = figure.subplots(1, 2, sharey=True)
    names = [row.backend for row in rows]
    agrees = [row.agreement >= AGREEMENT for row in rows]
    colours = ["#2563eb" if fine else "#c3cad5" for fine in agrees]
    drawn = rates.barh(names, [row.images_per_s for row in rows], color=colours)
    rates.bar_label(drawn, [f" {row.images_per_s:.0f}  (batch {row.batch})" for row in rows])
    drawn = latencies.barh(names, [row.latency_ms for row in rows], color=colours)
    latencies.bar_label(
        drawn, [f" {row.latency_ms:.1f}  (p95 {row.latency_p95_ms:.1f})" for row in rows]
    )
    for axes, title in ((rates, "images/s, the more the better"), (latencies, "ms for one image")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.margins(x=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    grey = "" if all(agrees) else f"\ngrey: agrees with eager on less than {AGREEMENT:.0f} %"
    figure.suptitle(f"{report.model}, {report.images}, {report.machine}{grey}", fontsize=10)
    return figure
