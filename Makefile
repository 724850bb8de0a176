# Every target makes its own environment in .venv; nothing else has to be installed but Python 3.10+ and gcc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEMO_ARGUMENTS ?=
SOURCES := setup.py pyproject.toml constraints.txt inflight_edge/scoring/_cpu.pyx $(wildcard csrc/*)

.PHONY: demo test check lint format bench clean

demo: $(VENV)/installed
	$(BIN)/inflight-edge demo $(DEMO_ARGUMENTS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: lint test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.latency --json benchmarks/results/latency.json

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[calibration]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt -e '.[calibration,dev]'
	touch $@

clean:
	rm -rf $(VENV) build benchmarks/latency/build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f inflight_edge/scoring/*.so inflight_edge/scoring/_cpu.c
