# Everything a newcomer needs: `make quickstart` and `make test`. Windows has no make: see the README for the plain commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests of one file share servers and runs, so a file stays together.
AT_ONCE := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# The tests start a thousand processes: each would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check services audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one with PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes the first time)"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.installed-audit: $(VENV)/.installed
	@$(PIP) --constraint constraints.txt --editable '.[audit]'
	@touch $@

setup: $(VENV)/.installed-dev ## install into .venv, nothing else

quickstart: $(VENV)/.installed ## train, register and evaluate a tiny GPT-2 on this machine: about three minutes
	@$(BIN)/gpt2 train quickstart

services: $(VENV)/.installed ## Prefect and MLflow with their pages, and two workers; Ctrl-C ends all. OPTIONS="--host …"
	@exec $(BIN)/gpt2 services $(OPTIONS)

check: $(VENV)/.installed-dev ## lint, types, import floors and the fast tests: two minutes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest $(AT_ONCE) -m "not slow" -q

test: $(VENV)/.installed-dev ## every check and every test: half an hour on two cores
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest $(AT_ONCE) --durations=15

audit: $(VENV)/.installed-audit ## ask whether a vulnerability is known of what is installed; waivers are in tools/audit.toml
	@$(BIN)/python tools/audit.py

clean: ## remove runs and the default storage; the environment stays
	rm -rf runs storage
