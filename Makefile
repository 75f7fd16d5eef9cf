# Everything a newcomer needs: `make quickstart` and `make test`. Each sets up .venv first when it must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# A test uses one processor. The tests of a file stay together: they share fixtures, and one file checks at its end what they found.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(READY)  ## create .venv and install prefopt with its pinned dependencies

quickstart: $(READY)  ## the main job in small: a model, SFT, pairs, DPO, and what it changed (a few minutes)
	@$(BIN)/prefopt quickstart

test: $(READY)  ## all tests but the slow ones, in two processes (`make test JOBS=4`: in four)
	@$(PYTEST) -m "not slow"

test-all: $(READY)  ## all tests
	@$(PYTEST)

lint: $(READY)  ## linter, format, types, import contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## write the generated pages anew
	@$(BIN)/python -m prefopt.cli.pages
	@$(BIN)/python -m tests.models.architectures

clean:  ## delete what make created, .venv and runs included
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "prefopt needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: apt install python3-venv"; exit 1; }
	@echo "Installing prefopt and its pinned dependencies into $(VENV) (once; torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
