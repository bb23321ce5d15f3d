# On a machine with python3, make and g++, GPU or none, these are enough:
#
#   make demo     install into .venv, fuse a standard ResNet, compare it with eager PyTorch, time both
#   make test     install likewise, then lint, types and the tests: some ten minutes on two cores
#   make test-full    all tests: sanitizers, planted bugs, wheels, every model, long trainings
#   make docs     install likewise, then build the pages of docs/ into site/
#
# On a machine with a GPU and its own torch, where nothing is installed (docs/gpu.md):
#
#   make gpu      tests, benchmarks, tables and a report within minutes; again goes on; files in OUT=out/gpu
#
# Settings: PYTHON=python3.12 (which interpreter), VENV=.venv (where to install), TEST=tests/ops (which tests),
# PYTEST_ARGS="-x -k name", JOBS=2 (test processes); and the build's environment variables, in CONTRIBUTING.md.

PYTHON ?= python3
VENV ?= .venv
TEST ?=
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)
TIER ?= -m "not slow"
# `make compat`: which torch releases ("newest" is what pip finds today), and the quick suite that they run.
COMPAT_TORCH ?= 2.13.0 newest
COMPAT_TESTS ?= tests

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install -c requirements/constraints.txt
NATIVE := $(shell find csrc -name '*.[ch]*' -o -name '*.inl')
FORMATTED := $(filter %.h %.cpp %.inl %.cu %.cuh,$(NATIVE) $(shell find tests -type f))
TOOLKIT := cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help demo test test-full mutants docs bench bench-compare build lint format pytest compat dist clean gpu
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	@echo "Also: mutants, bench, bench-compare BASE=commit, build, lint, format, pytest, compat, dist, clean."

demo: $(VENV)/.built
	$(PY) examples/demo.py

# The libraries for GPUs are compiled, linked and loaded by the tests even where there is none, so they want a toolkit and
# CUTLASS's headers.
test: $(VENV)/.toolkit
	@$(MAKE) --no-print-directory $(VENV)/.built
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory pytest

test-full: $(VENV)/.toolkit
	@$(MAKE) --no-print-directory $(VENV)/.built $(VENV)/.models
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory pytest TIER=

# Plants mistakes in a copy of the tree, one at a time, and shows which tests notice.
mutants: $(VENV)/.built
	$(PY) -m tests.mutants $(MUTANTS_ARGS)

docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

build: $(VENV)/.built

pytest: $(VENV)/.built
	$(PY) -m pytest -n $(JOBS) $(TIER) $(PYTEST_ARGS) $(TEST)

lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)
	$(PY) -m mypy

format: $(VENV)/.built
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

# Each step leaves a stamp in the environment, so that a second run has nothing to do.
$(VENV)/.created:
	@sh requirements/make_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(VENV)/.torch: $(VENV)/.created requirements/constraints.txt
	$(PIP_INSTALL) torch setuptools ninja
	@touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py resfuse/_build.py $(NATIVE)
	@echo "Installing resfuse with what its demo and tests need, and compiling (some minutes) ..."
	$(PIP_INSTALL) -q --no-build-isolation -e '.[demo,bench,test,lint,docs]'
	@$(PY) -m resfuse._extension
	@touch $@

$(VENV)/.toolkit: $(VENV)/.torch
	@if $(PY) -I resfuse/_build.py 2>&1 | grep 'no CUDA toolkit was found'; then \
	  if $(PIP_INSTALL) '$(TOOLKIT)'; then rm -f $(VENV)/.built; \
	  else echo "make: no CUDA toolkit could be installed, so the CUDA library will be neither built nor tested"; fi; fi
	@if $(PY) -I resfuse/_build.py 2>&1 | grep "CUTLASS's headers were not found"; then \
	  if $(PIP_INSTALL) --no-deps nvidia-cutlass; then rm -f $(VENV)/.built; \
	  else echo "make: CUTLASS could not be installed, so the library for Hopper will be neither built nor tested"; fi; fi
	@touch $@

# The libraries whose models the slow tests fuse.
$(VENV)/.models: $(VENV)/.built
	$(PIP_INSTALL) -q --no-build-isolation -e '.[test-models]'
	@touch $@

# On a machine that does nothing else; benchmarks/README.md says how to read the results.
bench: $(VENV)/.built
	$(PY) -m benchmarks

# COMPARE_ARGS: see `python -m benchmarks.compare --help`.
bench-compare: $(VENV)/.built
	@test -n "$(BASE)" || { echo "make: name the commit to compare with: make bench-compare BASE=HEAD~1" >&2; exit 2; }
	$(PY) -m benchmarks.compare $(BASE) $(COMPARE_ARGS)

# With $(PYTHON) as it is, and the torch that it has.
OUT ?= out/gpu
gpu:
	@$(PYTHON) -m tools.gpu_run --output $(OUT) $(GPU_ARGS)

# The binaries built above, unchanged, under other releases of torch.
compat: $(VENV)/.built
	@sha256sum resfuse/*.abi3.so
	@set -e; for version in $(COMPAT_TORCH); do \
	  venv=$(VENV)-torch-$$version; \
	  if [ $$version = newest ]; then torch=torch; upgrade=--upgrade; else torch=torch==$$version; upgrade=; fi; \
	  [ -x $$venv/bin/python ] || sh requirements/make_venv.sh "$(PYTHON)" $$venv; \
	  $$venv/bin/python -m pip install -q $$upgrade $$torch; \
	  $$venv/bin/python -m pip install -q 'numpy<2.4' rich pytest pytest-xdist hypothesis; \
	  if $$venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	    $$venv/bin/python -m pip install -q torchvision timm; \
	  else echo "a CPU-only torch, which the registry's torchvision does not load in: its tests are skipped"; fi; \
	  $$venv/bin/python -c 'import torch; print("== torch", torch.__version__)'; \
	  $$venv/bin/python -m resfuse._extension; \
	  $$venv/bin/python -m pytest -q -n $(JOBS) -m 'not slow' $(COMPAT_TESTS); \
	done
	@sha256sum resfuse/*.abi3.so

dist: $(VENV)/.built
	$(PY) -m build --no-isolation

clean:
	rm -rf build dist site *.egg-info resfuse/*.so resfuse/_build_info.json $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find resfuse tests -name __pycache__ -type d -prune -exec rm -rf {} +
