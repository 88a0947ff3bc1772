# Two commands do everything: `make soup` (environment, install, the main job) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra overrides for the main job: make soup ARGS="sweep.size=4"
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help soup test test-fast lint format docs clean

help:
	@echo "make soup       environment, install, then: python train.py +soup=greedy"
	@echo "make test       environment, install, then linters, types, layers and every test"
	@echo "make test-fast  the same without the slow tests"
	@echo "make docs       the API reference and the catalogue of methods, in build/docs"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "soups needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml soups/merging/_loops.c | $(BIN)/python
	@echo "Installing into $(VENV)/; the first time this takes some minutes, most of it torch."
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[train]'
	@touch $@

$(VENV)/.all: pyproject.toml soups/merging/_loops.c | $(BIN)/python
	@echo "Installing into $(VENV)/; the first time this takes some minutes, most of it torch."
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[all]'
	@touch $@ $(VENV)/.train

soup: $(VENV)/.train
	$(BIN)/python train.py +soup=greedy $(ARGS)

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# Two workers, a file each at a time; one thread in each, so that they do not fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=15

test: lint
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m 'not slow'

docs: $(VENV)/.all
	$(BIN)/python docs/build.py build/docs

format: $(VENV)/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
