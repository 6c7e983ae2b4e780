# Two commands matter: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-all check format clean

help:
	@echo "make demo      train on handwritten digits, evaluate, predict, export; prints the report"
	@echo "make test      the tests: 23 minutes on 2 cores"
	@echo "make test-all  the slow ones too"
	@echo "make check     ruff, types, import contracts, line counts"

setup: $(VENV)/.installed

# Made again when the project's dependencies change.
$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: apt install python3.11 python3-venv, or make PYTHON=python3"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV) || { echo "error: python3-venv is missing: apt install python3-venv"; exit 1; }; }
	@echo "installing the project (PyTorch is large: a few minutes on a slow line)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/demo.sh

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0

test-all: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 -m 'not gpu' \
		--hypothesis-profile all

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/line_counts.py

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
