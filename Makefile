# make quickstart   set up, train CaCo on real images on the CPU, evaluate
# make test         the same set-up, then all tests
# make clean        remove the environment, the build and the quickstart's run
#
# VENV (.venv), PYTHON (python3) and TORCH (the pinned pair below) can be set on the command line.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.11.0 torchvision==0.26.0
RUN ?= runs/quickstart

PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: quickstart test setup build clean

quickstart: build
	@echo "[3/3] training on the embedded Fashion-MNIST subset, two to four minutes; a run in $(RUN) is gone on with"
	$(PY) tools/train.py --config caco_fast/configs/quickstart.yaml --resume auto run.folder=$(RUN)

test: build
	@echo "[3/3] all tests"
	$(PY) -m pytest

build: $(READY)
	@echo "[2/3] python setup.py build_ext"
	$(PY) setup.py -q build_ext

setup: $(READY)

$(READY): pyproject.toml
	@echo "[1/3] environment in $(VENV): torch is some 3 GB to fetch the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is wanted, PYTHON=python3.12 names one")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --disable-pip-version-check -q ninja "pybind11>=2.13"
	$(PY) -m pip install --disable-pip-version-check -q --no-build-isolation -e ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build runs/quickstart *.egg-info caco_fast/*.so
