# Every target makes its own environment in .venv; nothing else has to be installed but Python 3.10+ and gcc.
PYTHON ?= python3
VENV := .venv
TRITON := .triton
BIN := $(VENV)/bin
# --no-compile: what is imported is compiled then, of everything else nothing.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
DEMO_ARGUMENTS ?=
PREFIX ?= /usr/local
PYX := inflight_edge/_preprocess.pyx inflight_edge/scoring/_cpu.pyx inflight_edge/scoring/_cuda.pyx
SOURCES := setup.py pyproject.toml constraints.txt $(PYX) $(wildcard csrc/*.c csrc/*.h csrc/*.cu)

SECONDS ?= 60

# The environments are made by pip, one at a time.
.NOTPARALLEL:

.PHONY: demo test test-slow test-gpu test-arm test-triton fuzz check lint format bench install-c clean

demo: $(VENV)/installed
	$(BIN)/inflight-edge demo $(DEMO_ARGUMENTS)

# A file's tests in one process; more processes than eight would mostly import torch.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The tests that `make test` leaves out because they take minutes.
test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

# On a machine with an NVIDIA GPU and nvcc: builds pycuda, and fails rather than leaving the CUDA scorer out. Then one
# report of a bundle in all precisions, to send back. JetPack's TensorRT is the system's: make .venv there first, by
# `python3 -m venv --system-site-packages .venv`.
test-gpu: $(VENV)/installed-dev
	INFLIGHT_EDGE_CUDA=1 $(PIP) -c constraints.txt -e '.[calibration,cuda,dev]'
	$(BIN)/python -m pytest -m gpu -s
	$(BIN)/inflight-edge demo --quiet --out demo
	$(BIN)/inflight-edge calibrate demo/classifier.pt2 --data demo/clean.npz --pattern demo/patterns.safetensors \
		--precision fp32,fp16,int8 --quiet --force --out demo/precisions
	$(BIN)/inflight-edge doctor --run demo/precisions --report gpu-report.json

# Needs apt, or gcc-aarch64-linux-gnu, qemu-user and mmdebstrap; keeps what it makes in ARM_CACHE, .arm unless told.
test-arm:
	PYTHON=$(PYTHON) tests/arm/run.sh

# The real tritonserver, Python backend, on the CPU: the server of the wheel nvidia-pytriton in .triton, which needs its
# own NumPy; the models there run this checkout's code.
test-triton: $(VENV)/installed-dev $(TRITON)/installed
	TRITON_ENV=$(TRITON) $(BIN)/python -m pytest -m triton

# All fuzzers one after another, each for SECONDS; needs clang with libFuzzer.  Keeps what it finds in tests/fuzz/build.
fuzz: $(VENV)/installed-dev
	$(PIP) 'atheris>=2.3'
	$(MAKE) -f tests/fuzz/Makefile PYTHON=$(BIN)/python SECONDS=$(SECONDS) c python

check: lint test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.latency --json benchmarks/results/latency.json

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# libinflight.so, libinflight.a, inflight.h and a pkg-config file; needs gcc alone.
install-c:
	$(MAKE) -f csrc/Makefile PREFIX='$(PREFIX)' install

# Neither after the other: that would build the extensions twice.
$(VENV)/installed: EXTRAS := calibration
$(VENV)/installed-dev: EXTRAS := calibration,dev
$(VENV)/installed $(VENV)/installed-dev: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(VENV)/installed $@

$(TRITON)/installed: $(SOURCES) $(wildcard inflight_edge/*.py inflight_edge/*/*.py)
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip --disable-pip-version-check install --quiet nvidia-pytriton==0.7.0 onnxruntime safetensors
	INFLIGHT_EDGE_CUDA=0 $(TRITON)/bin/python -m pip --disable-pip-version-check install --quiet \
		--force-reinstall --no-deps .
	touch $@

clean:
	rm -rf $(VENV) $(TRITON) .arm build csrc/build benchmarks/latency/build tests/fuzz/build dist *.egg-info demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f inflight_edge/*.so inflight_edge/scoring/*.so
	rm -f inflight_edge/_preprocess.c inflight_edge/scoring/_cpu.c inflight_edge/scoring/_cuda.c
