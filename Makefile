# Every target makes its own environment in .venv; nothing else has to be installed but Python 3.10+ and gcc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEMO_ARGUMENTS ?=
SOURCES := setup.py pyproject.toml constraints.txt inflight_edge/scoring/_cpu.pyx $(wildcard csrc/*)

.PHONY: demo test test-arm check lint format clean

demo: $(VENV)/installed
	$(BIN)/inflight-edge demo $(DEMO_ARGUMENTS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

# Needs apt, or gcc-aarch64-linux-gnu, qemu-user and mmdebstrap; keeps what it makes in ARM_CACHE, .arm unless told.
test-arm:
	PYTHON=$(PYTHON) tests/arm/run.sh

check: lint test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf $(VENV) .arm build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f inflight_edge/scoring/*.so inflight_edge/scoring/_cpu.c
