"""What torchrun starts as ranks: `python -m meshuffle.verify FOLDER check|trace`."""

from __future__ import annotations

import sys
from pathlib import Path

from meshuffle.comm.launch import end_with_parent, report_failure
from meshuffle.verify.rank import Run, work_through
from meshuffle.verify.trace import trace

_WORKS = {"check": Run.check, "trace": trace}


def main() -> int:
    """Run as one of torchrun's ranks; the exit code says how it ended."""
    end_with_parent()
    try:
        work_through(Path(sys.argv[1]), _WORKS[sys.argv[2]])
    except Exception as error:  # noqa: BLE001  # the launcher says it, in one line
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
