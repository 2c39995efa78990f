# Two commands do everything: `make serve` runs the default deployment, `make test` runs all checks and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/smollm2-cpu.yaml

.PHONY: serve test check unit format clean help

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.installed  ## Install, prepare the default model, and serve it on 127.0.0.1:8000.
	$(BIN)/warmgraph serve $(CONFIG)

test: check  ## Install what is missing, run every check and every test.
	$(BIN)/pytest

check: $(VENV)/.installed-dev  ## Formatting, lint, types and the import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

unit: $(VENV)/.installed-dev  ## Only the fast tests that need no torch.
	$(BIN)/pytest tests/unit

format: $(VENV)/.installed-dev  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and caches of this folder.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "warmgraph needs Python 3.11 or newer; run make with PYTHON=python3.12, say."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $(VENV)/.installed $@
