# Each target starts from a bare checkout and a Python: it makes its environment, installs, and runs.
# pip reads PIP_CONSTRAINT and its other settings from the environment by itself.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
EMOJI_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python

# Small tensors on a few cores: two threads, and none of them spinning while it waits.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-kill emoji check format lint types contracts docs test-gpu mutants bench bench-gpu clean

demo: $(VENV)/.installed-demo
	$(PY) examples/digits.py $(DEMO_ARGS)

test: export HF_HUB_OFFLINE = 1
test: $(VENV)/.installed-dev
	$(PY) -m pytest $(PYTEST_ARGS)

# Hundreds of kills and thousands of damaged files; `make test` has a small share of them.
test-kill: export HF_HUB_OFFLINE = 1
test-kill: $(VENV)/.installed-dev
	$(PY) -m pytest tests/faults -m slow $(PYTEST_ARGS)

emoji: export HF_HUB_OFFLINE = 1
emoji: $(VENV)/.installed-emoji
	$(PY) examples/emoji.py $(EMOJI_ARGS)

check: format lint types contracts

format lint types contracts: $(VENV)/.installed-dev

format:
	$(BIN)/ruff format --check

lint:
	$(BIN)/ruff check

types:
	$(BIN)/pyright --pythonpath $(PY)

contracts:
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	rm -rf docs/reference # made from the modules; a page of a removed one would stay
	$(BIN)/sphinx-build -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(VENV)/.installed-dev
	$(PY) -m pytest tests -m gpu $(PYTEST_ARGS)

mutants: export HF_HUB_OFFLINE = 1
mutants: $(VENV)/.installed-dev
	$(PY) tests/mutants.py

bench: $(VENV)/.installed-dev
	set -e; for name in clipping handoff order parity rng; do echo "== $$name"; $(PY) "benchmarks/$$name.py"; done

bench-gpu: $(VENV)/.installed-dev  # needs a CUDA device
	set -e; for name in step sampling full_size; do echo "== $$name"; $(PY) "benchmarks/$$name.py"; done

clean:
	rm -rf .venv dist build docs/_build docs/reference .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(PY):
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra; a change of pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	$(PY) -m pip install --editable '.[$*]'
	touch $@
