# `make up` runs the system on this machine, `make test` checks everything. `make` alone lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup up test lint fmt check tools fuzz lock clean

BIN := .venv/bin
SOURCES := libs services tests migrations
# Where torch for CPUs comes from if pip does not find it by itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# cpu | gpu: which build of vLLM the environment gets.
ENGINE ?= cpu
FUZZ_S ?= 300
# Options of `make up`, for instance ARGS="--gateway-port 9000 --no-demo".
ARGS ?=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create or update .venv from the lock; does nothing when it is current
	@TORCH_INDEX='$(TORCH_INDEX)' PYTHON='$(PYTHON)' ENGINE='$(ENGINE)' bash tools/setup.sh

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

tools: setup ## What only some commands need: rivals for `stoker bench load`, the fuzzer
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/tools.txt

fuzz: tools ## Fuzz the parser of safetensors headers for FUZZ_S seconds (300)
	$(BIN)/python tests/fuzz/fuzz_header.py -max_total_time=$(FUZZ_S)

COMPILE := $(BIN)/uv pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q
LOCK := $(COMPILE) pyproject.toml --extra local --extra dev

lock: ## Resolve requirements/*.txt anew from pyproject.toml
	$(LOCK) --extra cpu --universal -o requirements/cpu.txt
	$(LOCK) --extra gpu --no-config --python-platform x86_64-manylinux_2_28 -o requirements/gpu.txt
	$(COMPILE) --group tools --universal -c requirements/cpu.txt -o requirements/tools.txt
	@if grep -nE '^--|://' requirements/*.txt; then echo 'requirements/*.txt must name no index or URL' >&2; exit 1; fi

clean: ## Remove what tools leave behind (not .venv, not the demo model in .cache)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find libs services tests migrations -name __pycache__ -type d -prune -exec rm -rf {} +
