# Every target sets itself up: a virtual environment in .venv, made once and used again.
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS is handed to pip, for example
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a CPU build of PyTorch.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BIN := .venv/bin

.PHONY: demo test test-oldest-hub lint docs clean help

help:
	@echo "make demo   adapt a pretrained Vision Mamba to handwritten digits on this CPU"
	@echo "make test   run the tests; GPU tests run where there is a GPU"
	@echo "make lint   ruff and mypy"
	@echo "make test-oldest-hub   the Hub tests with the oldest client allowed"
	@echo "make docs   build the documentation into site/"

demo: .venv/ready-examples
	$(BIN)/python examples/quickstart.py

test: .venv/ready-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# the oldest huggingface_hub that pyproject.toml allows, beside the newest in .venv
test-oldest-hub: .venv/ready-test
	$(BIN)/python -m pip install --quiet --upgrade --target .venv/oldest-hub huggingface_hub==0.25.0
	SVP_PEFT_TEST_HUB_PATH=.venv/oldest-hub $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_hub.py

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .mkdocs.yml

clean:
	rm -rf .venv site build dist .pytest_cache .ruff_cache .mypy_cache

# one stamp per set of extras: a later edit of pyproject.toml installs again
.venv/bin/pip: # made last, so a venv that was interrupted is made again
	$(PYTHON) -m venv .venv

.venv/ready-examples: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[examples,cpu]"
	@touch $@

.venv/ready-test: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[test]"
	@touch $@ .venv/ready-examples

.venv/ready-dev: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[dev]"
	@touch $@ .venv/ready-test .venv/ready-examples
