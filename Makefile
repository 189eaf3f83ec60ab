# `make` alone lists the commands; each sets up .venv by itself when it is missing or its requirements changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/tiny
LAB_ARGS ?=

help:
	@echo "make setup     the environment in $(VENV)"
	@echo "make lab       the lessons in JupyterLab (LAB_ARGS=--no-browser only prints the address)"
	@echo "make test      all tests, and the notebooks"
	@echo "make train     five minutes of preset tiny into $(OUT)"
	@echo "make lessons   lessons/ and solutions/ built again from solutions/*.py"
	@echo "make bench     speed beside transformers, on this machine"
	@echo "make gpu       the tests that need a GPU"

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

setup: $(READY)

lab: $(READY)
	JUPYTER_CONFIG_PATH=minids/lab/jupyter_conf $(BIN)/python -m jupyter lab --ip=127.0.0.1 $(LAB_ARGS) lessons/01_transformer.ipynb

test: $(READY)
	$(BIN)/python -m ruff check minids tests solutions/*.py
	$(BIN)/python -m ruff format --check minids tests
	$(BIN)/python -m minids.lab.build --check
	$(BIN)/python -m pytest -q tests
	$(BIN)/python -m pytest -q --nbval-lax solutions lessons

train: $(READY)
	$(BIN)/python -m minids.train --preset tiny --minutes 5 --out $(OUT)

lessons: $(READY)
	$(BIN)/python -m minids.lab.build

bench: $(READY)
	$(BIN)/python -m minids.bench

gpu: $(READY)
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: torch finds no CUDA GPU here')"
	$(BIN)/python -m pytest -q -m gpu tests

.PHONY: help setup lab test train lessons bench gpu
