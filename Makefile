# `make up` runs the system on this machine, `make test` checks everything. `make` alone lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup up test lint fmt check lock clean

BIN := .venv/bin
SOURCES := libs services tests migrations
# Where torch for CPUs comes from if pip does not find it by itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Options of `make up`, for instance ARGS="--gateway-port 9000 --no-demo".
ARGS ?=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create or update .venv from the lock; does nothing when it is current
	@TORCH_INDEX='$(TORCH_INDEX)' PYTHON='$(PYTHON)' bash tools/setup.sh

up: setup ## Run a whole system on this machine until Ctrl-C (options in ARGS="…")
	@exec $(BIN)/stoker up $(ARGS)

test: setup lint ## Everything: linters, types, all tests with real NATS, PostgreSQL and vLLM
	$(BIN)/python -m pytest --durations=15

lint: setup ## Style, formatting, types, import rules
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy libs services
	$(BIN)/lint-imports

fmt: setup ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: lint ## Before a commit: lint and unit tests, in seconds
	$(BIN)/python -m pytest -q tests/unit tests/architecture

lock: ## Resolve requirements/cpu.txt anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra local --extra cpu --extra dev --python-version 3.11 --universal \
	  --generate-hashes --no-emit-index-url --no-header -q -o requirements/cpu.txt
	@if grep -nE '^--|://' requirements/cpu.txt; then echo 'requirements/cpu.txt must name no index or URL' >&2; exit 1; fi

clean: ## Remove what tools leave behind (not .venv, not the demo model in .cache)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find libs services tests migrations -name __pycache__ -type d -prune -exec rm -rf {} +
