# The commands of this project. `make demo` and `make test` set up what they need first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test coverage test-system parts-test compose-test ray-test gpu-bundle docs workflows dist release-check \
	release-notes check format-check format lint types clean

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

test-system:  ## Install what some tests need from the system (Debian, Ubuntu): a browser and PostgreSQL.
	.ci/system-packages

parts-test: install  ## Install each extra alone in a fresh environment and import all of its modules.
	PYTHON=$(PYTHON) .ci/install-parts

compose-test: install  ## Run the Compose stack on a Docker engine: a killed replica, a stopped trainer, two rounds of the loop.
	PLAUDIT_COMPOSE_TEST=1 $(BIN)/pytest tests/compose/test_compose.py tests/compose/test_loop.py -s

ray-test: install  ## Run the reward service on a Ray cluster of two local nodes. Installs Ray into .venv.
	$(BIN)/pip install -q -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/deploy/test_ray.py -s

gpu-bundle: install  ## Collect what benchmarks/gpu needs on a machine without a network, in .gpu-bundle/.
	PYTHONPATH=services:trainer $(BIN)/python -m benchmarks.gpu.bundle

docs: install  ## Build the documentation in build/docs/html. A warning is an error.
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -j auto -b html docs build/docs/html

workflows: install  ## Check .github/workflows with zizmor, and with actionlint where it is installed.
	$(BIN)/zizmor --offline --quiet .github/workflows
	@if command -v actionlint >/dev/null; then actionlint; else echo "actionlint is not installed: skipped"; fi

dist: install  ## Build the sdist and the wheel in dist/.
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

release-check: install  ## Check that TAG is the version in pyproject.toml and has a dated section in CHANGELOG.md.
	$(BIN)/python .ci/release.py check "$(TAG)"

release-notes: install
	$(BIN)/python .ci/release.py notes "$(TAG)"

check: install format-check lint types workflows docs test  ## All of these must pass before a commit.

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
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
