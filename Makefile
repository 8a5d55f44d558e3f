# Everything here needs python3 (3.10 or newer) and make; no root, no running server.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

# `make demo ARGS=--keep`, `make test ARGS="-k breaker -x"`
ARGS ?=

# Tests wait for real processes more than they compute.
JOBS ?= 4
PARALLEL := -n $(JOBS) --dist worksteal

# the directories of `make test`
QUICK_TESTS := $(wildcard tests/unit tests/contract tests/model tests/chaos tests/integration)
# `make chaos SEEDS=20 TASKS=2000 BROKER=redis`, redis, valkey or rabbitmq; BASELINE=1: plain Celery beside it
SEEDS ?= 20
TASKS ?= 2000
BROKER ?= valkey
BASELINE ?=
BENCHMARKS := $(basename $(notdir $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))
# 1: a skipped test is a failed test
TEST_ALL_STRICT ?=
STRICT := $(if $(filter 1,$(TEST_ALL_STRICT)),-p tests.support.strict_skips)

.DEFAULT_GOAL := help
.PHONY: help venv demo up down docs example lint types test test-all matrix chaos bench clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## a virtual environment in .venv with everything a contributor needs

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer, please: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv ## the outage drill: a real outage on a real stack, and a verdict; ARGS=--keep leaves it running
	@$(BIN)/python -m workers.drill $(ARGS)

up: venv ## start the stack: Valkey, flaky HTTP service, two workers, beat, Flower
	@$(BIN)/python -m workers.stack up

down: venv ## stop every stack of this checkout
	@$(BIN)/python -m workers.stack down

example: venv ## a project with all that it needs, started: NAME=django or NAME=fastapi
	@$(BIN)/python -m examples.run $(NAME)

docs: venv ## the manual, into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: venv ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv ## mypy --strict
	$(BIN)/mypy --strict

test: lint types ## what a contributor must pass: lint, types, all tests that need nothing installed
	$(PYTEST) $(QUICK_TESTS) $(PARALLEL) -m "not rabbitmq and not chromium and not prometheus and not chaos" $(STRICT) $(ARGS)

test-all: lint types ## make test and what needs more: skipped, with the reason, where its server or browser is not installed
	$(PYTEST) tests $(PARALLEL) -rs $(STRICT) $(ARGS)

matrix: venv ## the quick tests with older versions of Celery, kombu, redis-py, Flower and Python; ARGS="'redis-py 7'"
	$(BIN)/python -m tests.matrix $(ARGS)

chaos: venv ## random faults, every task accounted for; SEEDS=20 TASKS=2000 BROKER=redis|valkey|rabbitmq BASELINE=1
	$(BIN)/python -m tests.chaos --seeds $(SEEDS) --tasks $(TASKS) --broker $(BROKER) $(if $(BASELINE),--baseline) $(ARGS)

bench: venv ## the benchmarks, one after the other
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

clean: ## stop the stacks and remove what was made, the virtual environment included
	@if [ -x $(BIN)/python ] && [ -d .run ]; then $(BIN)/python -m workers.stack down; fi
	rm -rf .run .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
