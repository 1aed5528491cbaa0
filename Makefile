# One environment in .venv, made from constraints.txt; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
CORE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp) CMakeLists.txt

.PHONY: help demo test lint pytest bench sanitize wheel clean

help:
	@echo "make demo      set up, build, and teach a small model arithmetic from its outcome reward alone"
	@echo "make test      set up, build, lint, type-check and test"
	@echo "make bench     the operations against plain PyTorch, as ratios measured in one run"
	@echo "make sanitize  the compiled core under the address and undefined-behaviour sanitizers"
	@echo "make wheel     a wheel in dist/, checked in an environment of its own"
	@echo "make clean     remove what the above made"

.venv/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bandit_rft needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt scikit-build-core pybind11 cmake ninja
	touch $@

.venv/.built: .venv/.dependencies $(CORE)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

demo: .venv/.built
	$(BIN)/bandit-rft train --preset demo

test: lint pytest

lint: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: .venv/.built
	$(BIN)/python -m pytest

bench: .venv/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only

sanitize: .venv/.dependencies
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DBANDIT_RFT_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/core_test

wheel: .venv/.dependencies
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
