# One place for every command: the desk and CI both call these targets, so CI is never laxer.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types tests matrix test-avx2 times check clean

# The first interpreter that really runs: version-manager shims can be on PATH without a Python behind them.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# Where the default package index offers only CUDA builds of torch: make setup TORCH_INDEX=<index of CPU builds>.
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt
CODE := compress kernels calib tests benchmarks examples
# One thread a worker, commands that tests start included: two workers of two threads wait for each other.
# Workers take the files in the order of tests/conftest.py, not those with most tests first.
# Compiled modules are kept, whatever the environment says: each of the processes that tests start would compile them.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(READY)  ## make .venv and install the project into it; does nothing when it is up to date

# torch goes first and alone, so that its pin decides the build; the pinned setuptools then builds the project itself.
# The editable install stays in setuptools' default mode: the other modes break type checkers or uninstalled runs.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it or run: make setup PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)  ## train a small network on digits, quantize it to 4 bits, time both
	$(BIN)/python examples/digits.py demo
	$(BIN)/compress quantize demo/model.pt --bits 4 --calib demo/calib.npz --eval demo/test.npz --out demo/model-w4a8 --overwrite
	$(BIN)/compress export demo/model.pt --out demo/model-fp32.onnx --overwrite
	$(BIN)/compress bench demo/model-fp32.onnx demo/model-w4a8/model.onnx

test: setup lint types tests  ## setup, lint, types and every test but the matrix

lint: $(READY)  ## ruff: rules and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(READY)  ## mypy
	$(BIN)/mypy

tests: $(READY)  ## every test but the matrix, slow ones included
	$(PYTEST) -m "not matrix"

matrix: $(READY)  ## what is large: whole sweeps, long fuzzing, kills at random moments (SHARE=2/4: the second quarter)
	$(PYTEST) --dist worksteal -m matrix $(if $(SHARE),--share $(SHARE))

test-avx2: $(READY)  ## files on kernels without VNNI: processors that qemu emulates
	@command -v qemu-x86_64-static >/dev/null || command -v qemu-x86_64 >/dev/null || \
		{ echo "qemu-x86_64-static was not found; Debian and Ubuntu have it: apt-get install qemu-user-static"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m avx2 tests/emulated

times: $(READY)  ## every test, and the slowest of them
	$(PYTEST) --durations 60 --durations-min 1 --limit-time

check: lint types  ## before each commit: lint, types and the fast tests
	$(PYTEST) -m "not slow and not real and not matrix"

clean:  ## remove what was built; keeps .venv
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
