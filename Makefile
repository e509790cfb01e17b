# The first Python on the path that is new enough; `make PYTHON=/path/to/python venv` overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Alone and first: an open range such as torch>=2.11 could otherwise settle on another, far larger build.
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all check format wheel

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

venv: $(STAMP) ## create or update .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "whalepy needs Python 3.11 or newer on the path"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[hf,dev]" --constraint constraints.txt
	touch $@

demo: $(STAMP) ## train a small GPT-2 on four CPU ranks, and compare with one process
	$(BIN)/python examples/demo.py

# One process of tests per core, each with its own pool of ranks; more than four would want too much memory.
PYTEST := $(BIN)/python -m pytest -q -rs --numprocesses auto --maxprocesses 4 --dist worksteal

test: export OMP_NUM_THREADS = 1
test: $(STAMP) ## run the tests, without the slow ones
	$(PYTEST) -m "not slow" tests

test-all: export OMP_NUM_THREADS = 1
test-all: $(STAMP) ## run every test
	$(PYTEST) tests

check: $(STAMP) ## lint, formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP) ## build dist/whalepy-*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
