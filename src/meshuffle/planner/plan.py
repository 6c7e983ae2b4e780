"""A Plan as text, as plain data, and as JSON.

Grammar (DESIGN section 2), every part optional, in any order:

    dp=N[:shard|:central] , tp=N[:channel|:spatial|:batch] , pp=N[:SCHEDULE] , mb=N , threads=N
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshuffle.errors import PlanError, did_you_mean

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zero-bubble", "zbv", "dualpipev")
_KINDS: dict[str, tuple[str, ...]] = {
    "dp": ("shard", "central"),
    "tp": ("channel", "spatial", "batch"),
    "pp": SCHEDULES,
    "mb": (),
    "threads": (),
}


@dataclass(frozen=True)
class Plan:
    """How a model is spread over the ranks.

    Attributes:
        dp, tp, pp: ranks along each mesh axis; their product is the number of ranks.
        dp_kind: None replicates; `shard` or `central` as in the grammar.
        tp_kind: the dimension that layouts prefer; None chooses per op.
        pp_kind: the schedule; None is the default one.
        mb: micro-batches per step; None is 2·pp where pp > 1, else 1.
        threads: CPU threads of each rank; None shares the cores evenly.
        cuts: for each stage but the first, the value that its first call makes; empty where the
            cuts are to be chosen.
        predicted_step_ms: milliseconds of a step, where they were predicted or timed.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    dp_kind: str | None = None
    tp_kind: str | None = None
    pp_kind: str | None = None
    mb: int | None = None
    threads: int | None = None
    cuts: tuple[str, ...] = field(default=(), compare=False)
    predicted_step_ms: float | None = field(default=None, compare=False)

    @property
    def num_ranks(self) -> int:
        """dp · tp · pp."""
        return self.dp * self.tp * self.pp

    @property
    def is_split(self) -> bool:
        """Whether a replica has several ranks."""
        return self.tp * self.pp > 1

    @property
    def num_micro_batches(self) -> int:
        """`mb`, or its default."""
        return self.mb or (2 * self.pp if self.pp > 1 else 1)

    def __str__(self) -> str:
        """The shortest text that parses to this plan."""
        parts = []
        for axis in ("dp", "tp", "pp"):
            size, kind = getattr(self, axis), getattr(self, f"{axis}_kind")
            if size > 1 or kind or axis == "dp":
                parts.append(f"{axis}={size}" + (f":{kind}" if kind else ""))
        parts += [f"{k}={v}" for k, v in (("mb", self.mb), ("threads", self.threads)) if v]
        return ",".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `plan.json`; `text` is for people."""
        return {"text": str(self), **dataclasses.asdict(self)}


def parse_plan(text: str) -> Plan:
    """Return the Plan that `text` says: the grammar of this module, or a `plan.json` file.

    >>> parse_plan("dp=2:central,threads=1")
    Plan(dp=2, tp=1, pp=1, dp_kind='central', tp_kind=None, pp_kind=None, mb=None, threads=1)

    Raises:
        PlanError: says which part is wrong, and how it should look.
    """
    if text.endswith(".json"):
        return read_plan(Path(text))
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\d+)(?::([\w-]+))?", part)
        if not match:
            raise PlanError(
                f"plan '{text}': cannot read '{part}'; write parts such as dp=2, tp=2:channel, mb=8"
            )
        key, number, kind = match.groups()
        if key not in _KINDS:
            known = ", ".join(_KINDS)
            raise PlanError(f"plan '{text}': unknown part '{key}'; the parts are {known}")
        if key in values:
            raise PlanError(f"plan '{text}': '{key}' stands twice")
        values[key] = int(number)
        if kind is not None:
            values[f"{key}_kind"] = kind
    return _checked(values, f"plan '{text}'")


def read_plan(path: Path) -> Plan:
    """Read a `plan.json`, which a person may have edited.

    Raises:
        PlanError: the file is missing, is not JSON, or has keys or values that no plan has.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"plan {path}: {error.strerror}; give a plan text or a file") from None
    except ValueError as error:
        raise PlanError(f"plan {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise PlanError(f"plan {path}: expected one JSON object, found {type(values).__name__}")
    values.pop("text", None)
    return _checked({k: v for k, v in values.items() if v is not None}, f"plan {path}")


def _checked(values: dict[str, Any], where: str) -> Plan:
    known = [field.name for field in dataclasses.fields(Plan)]
    for key, value in list(values.items()):
        if key.endswith("_kind") and not _KINDS.get(key.removesuffix("_kind"), ("",)):
            raise PlanError(f"{where}: {key.removesuffix('_kind')}=N is followed by nothing")
        if key not in known:
            raise PlanError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")
        if key == "predicted_step_ms":
            continue
        if key == "cuts":
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise PlanError(f"{where}: cuts={value} must be a list of names of values")
            values["cuts"] = tuple(value)
            continue
        axis, _, is_kind = key.partition("_")
        if is_kind and value not in _KINDS[axis]:
            choices = ", ".join(_KINDS[axis]) or "nothing"
            hint = did_you_mean(str(value), _KINDS[axis])
            raise PlanError(f"{where}: {axis}=N can be followed by {choices}; not '{value}'{hint}")
        if not is_kind and (type(value) is not int or value < 1):
            raise PlanError(f"{where}: {key}={value} must be a whole number of at least 1")
    return Plan(**values)
