# make book        run every chapter that changed, check all, render them to _build/html
# make test        lint, types, unit tests, documentation examples, notebooks against their committed outputs
# make notebooks   run the committed notebooks again, in place (only=02 for one)
# make bench       measure speed and memory, print the table, record it in benchmarks/results.json
# make train       train the miniature with the recipe for this machine
# make clean       remove what the commands above built; .venv stays
#
# Each installs what it needs into .venv the first time: nothing is expected but Python 3.11, pip and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin

# The book and the tests use only what is in the repository; offline they must not even try. `embedlens book` does not set this.
export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONNOUSERSITE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.PHONY: book test lint types unit notebook-test notebooks bench train clean

book: $(VENV)/package.stamp
	$(BIN)/embedlens book

test: lint types unit notebook-test

lint: $(VENV)/package.stamp
	$(BIN)/ruff check .

types: $(VENV)/package.stamp
	$(BIN)/mypy

# One process a core, one thread each: more threads would only get in each other's way.
unit: $(VENV)/package.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# The runs lie in _build/runs; `make book` uses the same ones.
notebook-test: $(VENV)/package.stamp
	$(BIN)/embedlens book --no-render
	$(BIN)/pytest -o addopts="" -q tests/check_notebooks.py

notebooks: $(VENV)/package.stamp
	$(BIN)/embedlens book --refresh $(only)

# Times mean something only on a machine that has nothing else to do.
bench: $(VENV)/package.stamp
	$(BIN)/python -m benchmarks

# glibc gives every large tensor back to the system; where tcmalloc is installed, training is faster with it.
train: $(VENV)/package.stamp
	LD_PRELOAD="$(firstword $(wildcard /usr/lib/*/libtcmalloc.so.4))" $(BIN)/python -m training

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache

$(VENV)/lock.stamp: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "requirements.lock is for Python 3.11, this is %d.%d: run make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	touch $@

$(VENV)/package.stamp: $(VENV)/lock.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
