# The commands of this project. `make demo` and `make test` set up what they need first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test coverage parts-test compose-test ray-test gpu-bundle check format lint types clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(BIN)/.installed  ## Create .venv with the trainer, the reward service and the development tools.

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[reward,trainer,dev]'
	touch $@

demo: install  ## Train a small language model to write positive reviews; the result is runs/demo/report.html.
	$(BIN)/plaudit demo --output-dir runs/demo

test: install  ## Run the test suite without the tests marked slow, one worker for each core.
	$(BIN)/pytest -q -n auto --dist worksteal -m 'not slow'

coverage: install  ## Run the whole test suite and report its code coverage, child processes included.
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n auto --dist worksteal
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

parts-test: install  ## Install each extra alone in a fresh environment and import all of its modules.
	PYTHON=$(PYTHON) .ci/install-parts

compose-test: install  ## Run the Compose stack on a Docker engine: a killed replica, a stopped trainer, two rounds of the loop.
	PLAUDIT_COMPOSE_TEST=1 $(BIN)/pytest tests/compose/test_compose.py tests/compose/test_loop.py -s

ray-test: install  ## Run the reward service on a Ray cluster of two local nodes. Installs Ray into .venv.
	$(BIN)/pip install -q -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/deploy/test_ray.py -s

gpu-bundle: install  ## Collect what benchmarks/gpu needs on a machine without a network, in .gpu-bundle/.
	PYTHONPATH=services:trainer $(BIN)/python -m benchmarks.gpu.bundle

check: install format-check lint types test  ## Run formatting, lint, type checks and tests: all must pass before a commit.

format-check: install
	$(BIN)/ruff format --check .

format: install  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

clean:  ## Remove the environment and caches, but keep runs/.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
