"""A split model in words: what is split, what is sent, and its code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx, nn

from meshuffle.layout.assign import Assignment
from meshuffle.layout.traffic import Traffic


def summary(assignment: Assignment, stages: Sequence[Traffic], kept_fraction: float) -> str:
    """Return what is split, and what a step sends, in a few lines.

    Args:
        assignment: the layouts.
        stages: what each pipeline stage sends.
        kept_fraction: the part of the model's parameters that this rank keeps.
    """
    tp = assignment.program.world
    sent = sum(s.forward + s.backward for stage in stages for s in stage.sent)
    reduced = sum(stage.reduced_bytes for stage in stages)
    lines = [
        f"tp={tp}: {100 * assignment.sharded_fraction():.1f} % of the FLOPs are split, "
        f"{100 * kept_fraction:.1f} % of the parameters are on this rank, a step sends "
        f"{size_text(sent)} for values and {size_text(reduced)} for gradients"
    ]
    if len(stages) > 1:
        crossing = ", ".join(str(len(stage.leaving)) for stage in stages[:-1])
        lines.append(f"{len(stages)} pipeline stages; tensors that cross each cut: {crossing}")
    alone = assignment.whole_flops() if tp > 1 else []
    if alone:
        names = ", ".join(f"{name} ({100 * share:.1f} %)" for name, share in alone[:4])
        lines.append(f"on every rank: {names}{' …' if len(alone) > 4 else ''}")
    return "\n".join(lines)


def size_text(num_bytes: int) -> str:
    """Return bytes as a person reads them.

    >>> size_text(4_700_000)
    '4.7 MB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def code(modules: Sequence[fx.GraphModule], root: nn.Module, home: str) -> str:
    """Return the code, a line per call; a redistribution names both of its layouts.

    Args:
        modules: one per stage.
        root: holds the redistributions, under `home`.
    """
    text = "\n".join(str(written.code) for written in modules)
    lines = []
    for line in re.sub(r";  [\w =]+ = None", "", text).strip().splitlines():
        called = re.search(rf"self\.({home}(?:_eval)?\.\w+)\(", line)
        note = f"  # {root.get_submodule(called[1]).extra_repr()}" if called else ""
        lines.append(line.rstrip() + note)
    return "\n".join(lines)
