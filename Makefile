# `make` alone lists the commands; each sets up .venv by itself when it is missing or its requirements changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/tiny
LAB_ARGS ?=
GPU_ARGS ?=
# Before a command: it trains only for moments, on one thread beside its twin; a learner's progress is left alone.
APART = home=$$(mktemp -d); trap 'rm -rf "$$home"' EXIT; export OMP_NUM_THREADS=1 MINIDS_FAST=1 MINIDS_HOME="$$home";

help:
	@echo "make setup     the environment in $(VENV)"
	@echo "make lab       the lessons in JupyterLab (LAB_ARGS=--no-browser prints the address)"
	@echo "make test      all tests, and the notebooks"
	@echo "make train     five minutes of preset tiny into $(OUT)"
	@echo "make lessons   lessons/ and solutions/ built again from solutions/*.py; changed solutions are run"
	@echo "make bench     speed beside transformers, and the ladder of techniques, on this machine: 15 minutes"
	@echo "make gpu       the tests that need a GPU, then its benchmarks, recorded (GPU_ARGS=--help lists what can be chosen)"

$(READY): requirements.txt pyproject.toml minids/lab/jupyter_conf/ipython_kernel_config.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@mkdir -p $(VENV)/etc/ipython
	@cp minids/lab/jupyter_conf/ipython_kernel_config.py $(VENV)/etc/ipython/
	@touch $@

setup: $(READY)

lab: $(READY)
	-@$(BIN)/python -m minids.lab.landing
	JUPYTER_CONFIG_PATH="$(CURDIR)/minids/lab/jupyter_conf" $(BIN)/python -m jupyterlab $(LAB_ARGS)

test: $(READY)
	$(BIN)/python -m ruff check minids tests solutions/*.py
	$(BIN)/python -m ruff format --check minids tests
	$(BIN)/python -m minids.lab.build --check
	$(APART) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests
	$(APART) $(BIN)/python -m pytest -q --nbval-lax --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg \
		--nbval-cell-timeout 300 --nbval-kernel-startup-timeout 300 -n 2 --dist loadscope solutions

train: $(READY)
	$(BIN)/python -m minids.train --preset tiny --minutes 5 --out $(OUT)

lessons: $(READY)
	$(BIN)/python -m minids.lab.build --execute

bench: $(READY)
	$(BIN)/python -m minids.bench --minutes 12

gpu: $(READY)
	$(BIN)/python tests/gpu_run.py $(GPU_ARGS)

.PHONY: help setup lab test train lessons bench gpu
