# Everything here runs from a fresh clone: each target first makes the .venv it needs.
# No Docker, JVM or running service is wanted, except by test-kafka, test-faults and bench.

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
STAMP := .venv/.installed
PIP_COMPILE := .cache/pip-tools/bin/pip-compile
LOCK := config/requirements.lock

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
SEED ?= 20261122
SEEDS ?= 2000
# A row with a million events or fifty kills takes longer than a test that hangs.
FAULTS := -m faults -o faulthandler_timeout=1200
.PHONY: help venv demo test test-kafka test-faults bench check format lock clean

help: ## say what there is (this text)
	@echo "Start here:"
	@echo "  make demo        watch real users enter and leave segments; nothing else needs to run"
	@echo "  make test        see the tests pass, on embedded servers"
	@echo
	@echo "All targets:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done
	@echo
	@echo "Commands, after 'make venv': $(BIN)/stream-app --help"

venv: $(STAMP) ## install the package and its locked dependencies into .venv

# What is compiled is compiled anew when it changes.
$(STAMP): pyproject.toml $(LOCK) $(wildcard config/packaging/*.py stream_app/core/*.py)
	@echo "Installing into .venv, about a minute the first time ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## run the service on a real grocery year, broker and store included
	$(BIN)/stream-app demo

# First what is compiled, as it is written; then all that needs servers, and the core again, compiled.
test: $(STAMP) ## run all tests; broker and store: named by the environment, else Docker's, else embedded
	$(BIN)/python -m pytest -p tests.interpreted stream_app tests/unit tests/laws/test_fold_agrees_with_oracle.py
	$(BIN)/python -m pytest tests/unit/core tests/laws tests/simulation tests/contract tests/integration tests/e2e tests/faults/test_proxy.py

test-kafka: $(STAMP) ## run what touches servers on Apache Kafka (needs Java 17 and Maven) and redis-server
	TEST_BACKEND=apache $(BIN)/python -m pytest tests/contract tests/integration tests/e2e

test-faults: $(STAMP) ## try every fault, embedded and on Apache Kafka (as test-kafka); SEED=n; writes tests/faults/README.md
	rm -rf .cache/faults
	failed=0; \
	FAULT_SEEDS=$(SEEDS) TEST_BACKEND=embedded FAULT_ROWS=.cache/faults/embedded.json FAULT_SEED=$(SEED) \
		$(BIN)/python -m pytest -v $(FAULTS) tests || failed=1; \
	TEST_BACKEND=apache FAULT_ROWS=.cache/faults/apache.json FAULT_SEED=$(SEED) \
		$(BIN)/python -m pytest -v $(FAULTS) tests --ignore tests/simulation || failed=1; \
	$(BIN)/python -m tests.faults.table .cache/faults/embedded.json .cache/faults/apache.json && exit $$failed

bench: $(STAMP) ## race the service against its peers (as test-kafka); BENCH=--quick; writes .cache/bench
	$(BIN)/python -m tests.bench $(BENCH)

check: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(PIP_COMPILE) ## choose versions anew where pyproject.toml asks for it; UPGRADE=--upgrade for all of them
	$(PIP_COMPILE) --quiet --all-extras --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links $(UPGRADE) -o $(LOCK) pyproject.toml

$(PIP_COMPILE):
	$(PYTHON) -m venv .cache/pip-tools
	.cache/pip-tools/bin/python -m pip install --quiet pip-tools==7.6.2

clean: ## remove what was built here: .venv and .cache too
	rm -rf .venv .cache build dist *.so stream_app/core/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find stream_app tests -name __pycache__ -type d -prune -exec rm -rf {} +
