# make quickstart   set up, train CaCo on real images on the CPU, evaluate, make a page of it
# make compare      train the small configuration of every method, two at a time; table, picture
# make check        format, lint, types, and the quick tests
# make test         set up, build, and run all tests
# make dist         a source distribution and a wheel in dist/
# make clean        remove the environment, the build and the quickstart's run
#
# VENV (.venv), PYTHON (python3), TORCH (the pinned pair below) and WORKERS (2 test processes) can be set on the command
# line.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.11.0 torchvision==0.26.0
RUN ?= runs/quickstart
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
# One file runs in one process, because its tests share what they build; tests/conftest.py orders the files.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready

.PHONY: quickstart compare check lint types quick test dist setup build clean

quickstart: build
	@echo "[3/3] training on the embedded Fashion-MNIST subset, two to four minutes; a run in $(RUN) continues"
	$(PY) -m caco_fast train --config quickstart --resume auto run.folder=$(RUN)

compare: build
	@echo "[3/3] the small configuration of every method, two at a time; runs in runs/compare/methods continue"
	$(PY) tools/compare.py methods --jobs 2

check: lint types quick

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | sort | \
		xargs $(VENV)/bin/clang-format --fallback-style=none --dry-run --Werror

types: setup
	$(PY) -m mypy

quick: setup
	$(PYTEST) -q -m "not slow"

test: build
	@echo "[3/3] all tests"
	$(PYTEST)

dist: setup
	$(PIP) -q build
	$(PY) -m build --no-isolation

build: setup
	@echo "[2/3] python setup.py build_ext"
	$(PY) setup.py -q build_ext

setup: $(READY)

$(READY): pyproject.toml
	@echo "[1/3] environment in $(VENV): torch is some 3 GB to fetch the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: found Python %d.%d, expected 3.10 or newer; name one with PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -q --upgrade pip "setuptools>=77" wheel
	$(PIP) $(TORCH)
	$(PIP) -q ninja "pybind11>=2.13"
	$(PIP) -q --no-build-isolation -e ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist runs/quickstart *.egg-info caco_fast/*.so
