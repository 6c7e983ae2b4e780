"""Print lines of code per folder, and fail where a file is too long without saying why.

A file above 400 lines must give its reason on its first lines: a line with `Length:`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
LIMIT = 400
ENGINE = ("graph", "layout", "planner", "parallel", "verify")
ENGINE_LIMIT = 8320  # DESIGN aims at about 6000; 1400 of these lines are rules, 1100 pipelines


def main() -> int:
    counts = {p: len(p.read_text().splitlines()) for p in sorted((ROOT / "src").rglob("*.py"))}
    tests = sum(len(p.read_text().splitlines()) for p in (ROOT / "tests").rglob("*.py"))
    folders: dict[str, int] = {}
    for path, count in counts.items():
        part = path.relative_to(ROOT / "src" / "meshuffle").parts
        folder = part[0] if len(part) > 1 else "(top)"
        folders[folder] = folders.get(folder, 0) + count
    for folder, count in sorted(folders.items()):
        print(f"{count:6,}  {folder}")
    engine = sum(folders.get(name, 0) for name in ENGINE)
    total = sum(counts.values())
    print(f"{total:6,}  all code; engine {engine:,}; tests {tests:,}; ", end="")
    print(f"median file {median(counts.values()):.0f} lines")
    too_long = [
        path
        for path, count in counts.items()
        if count > LIMIT and "Length:" not in "".join(path.read_text().splitlines()[:8])
    ]
    for path in too_long:
        print(f"error: {path.relative_to(ROOT)} has {counts[path]} lines, above {LIMIT}")
    if engine > ENGINE_LIMIT:
        print(f"error: the engine has {engine} lines, above {ENGINE_LIMIT}")
    return 1 if too_long or engine > ENGINE_LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
