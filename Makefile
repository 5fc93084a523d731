# Everything a newcomer types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo claims test test-slow test-browser check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install ELMD with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

demo: $(READY)  ## the whole method on the tiny world: train, generate, score, report (about 7 minutes on 2 cores)
	$(BIN)/python -m elmd.train experiment=demo
	$(BIN)/python -m elmd.evaluate experiment=demo
	$(BIN)/python -m elmd.report runs/experiments/demo

claims: $(READY)  ## the claims of docs/results.md: 3 seeds, the full model and five ablations (about an hour, resumable)
	$(BIN)/python -m elmd.train -m experiment=demo_claims
	$(BIN)/python -m elmd.train -m experiment=demo_claims stage=rep ablation=none vision.shuffle=true
	$(BIN)/python -m elmd.evaluate -m experiment=demo_claims
	$(BIN)/python scripts/demo_claims.py runs/experiments/demo_claims

check: $(READY)  ## lint, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## check, and the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-slow: $(READY)  ## the whole tiny chain and the other long tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

test-browser: $(READY)  ## the rating page in a browser: takes chromium or google-chrome on the PATH
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs tests/human/test_human_browser.py

bench: $(READY)  ## speed against what one would otherwise run, as ratios (about 30 minutes on an idle machine)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

clean:  ## remove .venv and caches; results in runs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist
