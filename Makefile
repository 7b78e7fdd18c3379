# `make demo` and `make test` do everything on a fresh machine with Python 3.11.
PY ?= python3.11
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: setup demo test check bench
.DELETE_ON_ERROR:

setup: $(VENV)/.stamp-$(EXTRAS)

$(VENV)/.stamp-$(EXTRAS): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$(EXTRAS)]'  # Python compiles what is used
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# Slow (about an hour) and only meaningful on a quiet machine. litgpt gets a venv of its own: its pins clash with ours.
bench: setup
	$(BIN)/python scripts/bench/loss.py
	$(BIN)/python scripts/bench/prepare.py
	$(BIN)/python scripts/bench/save.py
	$(BIN)/python scripts/bench/pretrain.py
