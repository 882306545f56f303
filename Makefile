# Every target sets up what it needs in .venv; nothing has to be installed or activated first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Stages call `python`; this is the one they get.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help demo ui test test-all test-fast soak docs check format clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# Networks this small gain nothing from a second thread, and two wait for each other when another program takes a core.
demo: $(READY)  ## Search, discretize, retrain and evaluate a vision transformer on handwritten digits
	OMP_NUM_THREADS=1 dvc repro
	@echo "Compare runs: make ui"

ui: $(READY)  ## Open MLflow on the runs so far
	@echo "Runs: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=tanglenas&workflowType=machine_learning"
	mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

PYTEST := OMP_NUM_THREADS=1 pytest --numprocesses auto --maxprocesses 4
test: $(READY) check  ## Check style and types, and run the tests, one process for each core
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not exhaustive"

test-all: $(READY) check  ## Run every test, with all pairs of spaces and optimizers, before a release
	$(PYTEST) --dist loadfile --no-loadscope-reorder --hypothesis-profile all

test-fast: $(READY)  ## Run the tests without processes of their own, on a few spaces and optimizers
	$(PYTEST) -m "not slow and not exhaustive" --hypothesis-profile fast

KILLS ?= 100
soak: $(READY)  ## Kill stages at KILLS random moments (100) and compare what they leave with undisturbed runs
	OMP_NUM_THREADS=1 python tests/support/kills.py $(KILLS)

docs: $(READY)  ## Build the documentation site into build/site, with every link checked
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

check: $(READY)  ## Check style and types
	ruff check .
	ruff format --check .
	mypy

format: $(READY)  ## Put the code into shape
	ruff check --fix .
	ruff format .

clean:  ## Remove outputs, runs and caches (not the environment)
	rm -rf build/site out metrics mlflow.db mlartifacts .tanglenas dvc.lock .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
