"""Print code lines per folder, and fail above a budget.

A code line carries code: docstrings, comments and blank lines are free, so that nobody saves by
writing less about it. Budgets are in `pyproject.toml`, `[tool.meshuffle.budgets]`; an issue that
adds features raises them and says so. A file above 400 lines in all must give its reason on one of
its first lines, with `Length:`.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path
from statistics import median

from mypy.main import process_options

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "meshuffle"
ENGINE = ("graph", "layout", "planner", "parallel", "verify")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
_FREE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that carry code.

    >>> sorted(code_lines('def f():\\n    "Docstring."\\n\\n    return 1  # comment\\n'))
    [1, 4]
    """
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docs.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _FREE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docs


def long_functions(text: str, lines: set[int]) -> list[str]:
    """Return the functions with more code lines than allowed, as `name (lines)`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
            if size > MAX_FUNCTION_LINES:
                found.append(f"{node.name} ({size})")
    return found


def unread_files() -> list[str]:
    """Return which files below src/ ruff or mypy does not read, as errors."""
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--show-files", "src"]
    shown = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources, _ = process_options(["--config-file", str(ROOT / "pyproject.toml")])
    read = {
        "ruff": {(ROOT / line.strip()).resolve() for line in shown.splitlines() if line.strip()},
        "mypy": {Path(source.path).resolve() for source in sources if source.path},
    }
    files = sorted(path.resolve() for path in (ROOT / "src").rglob("*.py"))
    return [
        f"{tool} does not read {f}" for tool, seen in read.items() for f in files if f not in seen
    ]


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["meshuffle"]
    budgets: dict[str, int] = settings["budgets"]
    errors: list[str] = []
    folders: Counter[str] = Counter()
    sizes = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        lines, name = code_lines(text), path.relative_to(ROOT)
        parts = path.relative_to(PACKAGE).parts
        folders[parts[0] if len(parts) > 1 else "(top)"] += len(lines)
        sizes.append(len(text.splitlines()))
        if sizes[-1] > MAX_FILE_LINES and "Length:" not in "".join(text.splitlines()[:8]):
            errors.append(f"{name} has {sizes[-1]} lines, above {MAX_FILE_LINES}")
        for function in long_functions(text, lines):
            errors.append(f"{name}: {function} is above {MAX_FUNCTION_LINES} code lines")
    tests = sum(len(code_lines(path.read_text())) for path in (ROOT / "tests").rglob("*.py"))
    totals = {
        "engine": sum(folders[name] for name in ENGINE),
        "all": sum(folders.values()),
    }
    for name, count in sorted(folders.items()):
        print(f"{count:6,}  {name}")
    print(f"{totals['engine']:6,}  engine ({', '.join(ENGINE)}); budget {budgets['engine']:,}")
    print(f"{totals['all']:6,}  all code; budget {budgets['all']:,}; tests {tests:,}; ", end="")
    print(f"median file {median(sizes):.0f} lines in all")
    for name, budget in budgets.items():
        count = totals[name] if name in totals else folders[name]
        if count > budget:
            errors.append(f"{name} has {count:,} code lines, above its budget of {budget:,}")
    if tests < totals["all"] / 2:
        errors.append(f"tests have {tests:,} code lines, less than half of the code")
    errors += unread_files()
    for error in errors:
        print(f"error: {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
