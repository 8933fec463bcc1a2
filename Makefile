# Needs Python 3.11 or newer with pip, and nothing else. `make study` and `make test` build .venv on first use.

PYTHON ?= python3
VENV := .venv
# What every command here runs with; `make test JOBS=1` runs the tests in one process.
BIN := $(VENV)/bin
JOBS ?= auto
PEER := .venv-trl
# More options of the benchmark, for example BENCH="--only sft grpo".
BENCH ?=
STUDY ?= examples/arithmetic.yaml
OUT ?= runs/$(basename $(notdir $(STUDY)))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help study test test-all check bench clean

help:
	@echo "make study     train a small real model six ways and report which won (12 minutes on 2 cores with bf16, 30 without)"
	@echo "make test      fast tests"
	@echo "make test-all  every test, also the slow ones and those that need the real model"
	@echo "make check     lint, formatting, types, doctests, import rules"
	@echo "make bench     speed and memory against TRL and transformers, side by side (two hours on 2 cores with bf16, three without)"
	@echo "make clean     remove the environments and caches (runs/ stays)"

# Stamps: an install runs again only when the environment is new or its two inputs changed.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crosstrain needs Python 3.11 or newer; name one, for example: make study PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not create $(VENV): this Python lacks the venv module" >&2; exit 2; }
	@touch $@

$(VENV)/installed-demo: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing crosstrain (the first time takes a few minutes)"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing crosstrain with its test tools (the first time takes a few minutes)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

study: $(VENV)/installed-demo
	@$(BIN)/crosstrain study $(STUDY) --out $(OUT)
	@echo "report: $(abspath $(OUT))/report.html"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "" tests src

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest src tests/test_imports.py

# TRL runs in an environment of its own, as its users have it.
$(PEER)/installed: $(VENV)/created constraints.txt
	@echo "installing TRL in $(PEER)"
	@$(PYTHON) -m venv $(PEER)
	@$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt trl
	@touch $@

bench: $(VENV)/installed-dev $(PEER)/installed
	@$(BIN)/python -m benchmarks --peer-python $(PEER)/bin/python $(BENCH)

clean:
	rm -rf $(VENV) $(PEER) .pytest_cache .mypy_cache .ruff_cache .hypothesis
