# Everything from a fresh clone: `make quickstart` and `make test` set up what they need, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint schema clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv with the pinned packages (the others do it when needed)

# Torch goes first: the pinned version is then there before any other package can ask for its own choice.
# For the CPU build where the package index has several, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: rlbal needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,deepspeed]"
	@touch $@

quickstart: $(READY) ## Warm-start a tiny model, train it by RL, compare before and after (minutes on 2 cores)
	$(BIN)/rlbal train recipes/quickstart.yaml --overwrite

# One thread each: the tests' models are tiny, and several processes share the cores.
test: export OMP_NUM_THREADS ?= 1
test: $(READY) ## Run all tests
	$(BIN)/python -m pytest

lint: $(READY) ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

schema: $(READY) ## Regenerate the recipe schema that editors use
	$(BIN)/rlbal recipes --schema > recipes/recipe.schema.json.new
	mv recipes/recipe.schema.json.new recipes/recipe.schema.json

clean: ## Remove the virtual environment, caches and build output; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
