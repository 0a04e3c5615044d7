# Each target makes .venv itself. Needed: make, and python3 of a version that SUPPORTED names.
PYTHON ?= python3
SUPPORTED := 3.11, 3.12 or 3.13
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo demo-real study-language test test-slow bench lint docs
.DELETE_ON_ERROR:

# Two workers with one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

demo: $(STAMP)
	scripts/demo.sh

demo-real: $(STAMP)
	scripts/demo_real.sh

study-language: $(STAMP)
	scripts/study_language.sh

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST)

bench: $(STAMP)
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python scripts/write_cli_docs.py

# The stamp appears last. An installation that broke off leaves .venv/installing behind, and a
# .venv that has no working pip of a supported Python is of no use: both begin afresh.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(IS_SUPPORTED)' || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1)," \
	  "and Python $(SUPPORTED) is needed. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@if [ -e .venv/installing ] || ! $(BIN)/python -c '$(IS_SUPPORTED)' 2>/dev/null \
	  || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "$(PYTHON) -m venv --clear .venv"; $(PYTHON) -m venv --clear .venv; fi
	@touch .venv/installing
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@mv .venv/installing $@
