"""`meshuffle doctor`: what this machine has, and what is missing."""

from __future__ import annotations

from cyclopts import App

from meshuffle.cli import Answer
from meshuffle.cli.options import Debug, Json


def register(app: App) -> None:
    """Add the verb to `app`."""
    app.command(doctor)


def doctor(*, json: Json = False, debug: Debug = False) -> Answer:
    """Show what this machine has: versions, devices, backends, compiler, disk."""
    import importlib.util
    import shutil

    import torch.distributed as dist

    from meshuffle.comm.device import num_accelerators
    from meshuffle.train.compiling import compiler_missing
    from meshuffle.train.watch import environment

    facts = {key: value for key, value in environment().items() if value and key != "command"}
    facts |= {
        "accelerators": num_accelerators(),
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "torch.compile": compiler_missing() or "available",
        "timm": importlib.util.find_spec("timm") is not None,
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    width = max(map(len, facts))
    return Answer(facts, "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))
