# Every target makes .venv on its first run and reuses it. Needs Python 3.10 or newer, gcc/g++ and git; cmake and ninja come
# from pip. Variables: PYTHON (which interpreter makes .venv), MASKACCEL_CUDA=0|1, MAX_JOBS, PYTEST_ARGS, DEMO_ARGS,
# CACHING_ARGS, GPU_ARGS, BUNDLE_ARGS, OUT.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --disable-pip-version-check --no-warn-script-location -qq
# cmake and ninja of the environment, before any of the system
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_NO_INPUT := 1

.PHONY: help demo test bench caching wheel gpu gpu-bundle lint docs native inspect clean

help:
	@echo "make demo     patch the trained example, sample with and without, write demo.png and demo.json"
	@echo "make test     build the native library, run the tests"
	@echo "make bench    CPU microbenchmarks into benchmarks/results (OUT=folder for another place)"
	@echo "make caching  quality against speed of caching methods on the trained example, beside other libraries (hours)"
	@echo "make wheel    the wheel into dist/"
	@echo "make gpu      GPU checks and benchmarks with the machine's own Python and torch (GPU_ARGS='--budget 540')"
	@echo "make gpu-bundle  .wheels/: what make gpu needs on a machine without network, CUDA kernels included (GPU_PYTHON=3.12"
	@echo "              GPU_ARCHS=90a, GPU_VARIANTS=1: variants of the attention too, BUNDLE_ARGS; needs nvcc)"
	@echo "make lint     ruff and mypy"
	@echo "make docs     the site into site/"
	@echo "make native   the native library into maskaccel/lib (MASKACCEL_CUDA=1: with CUDA kernels)"
	@echo "make inspect  the developer module for looking at compiled kernels (needs nvcc)"
	@echo "make clean    remove what builds made; .venv stays"

# torch first and alone: nothing after it may choose another. No torchvision: it would bring a torch of its own choice.
$(VENV)/.torch: requirements/torch.txt requirements/build.txt
	@echo "== $(VENV): torch and build tools"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "maskaccel needs Python 3.10 or newer")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/torch.txt
	$(PIP) -r requirements/build.txt
	touch $@

$(VENV)/.base: $(VENV)/.torch requirements/runtime.txt requirements/test.txt requirements/triton.txt pyproject.toml setup.py
	@echo "== $(VENV): runtime and test packages"
	$(PIP) -r requirements/torch.txt -r requirements/runtime.txt -r requirements/test.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) -r requirements/triton.txt
	MASKACCEL_BUILD=pure $(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.lint: $(VENV)/.base requirements/lint.txt
	$(PIP) -r requirements/lint.txt
	touch $@

$(VENV)/.bench: $(VENV)/.base requirements/bench.txt
	$(PIP) -r requirements/torch.txt -r requirements/bench.txt
	touch $@

$(VENV)/.docs: $(VENV)/.base requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	touch $@

$(VENV)/.cuda: $(VENV)/.torch requirements/cuda.txt
	$(PIP) --no-deps -r requirements/cuda.txt
	touch $@

# Not a stamp: ninja knows better what changed.
native: $(VENV)/.base $(if $(filter 1,$(MASKACCEL_CUDA)),$(VENV)/.cuda)
	@echo "== native library"
	$(PY) setup.py --quiet build_ext --inplace

demo: native
	$(PY) -m maskaccel demo $(DEMO_ARGS)

# One thread for each of the two workers: more would wait for each other. The CUTLASS headers are for the host emulation
# of the CUDA kernels.
test: native $(VENV)/.cuda
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(PYTEST_ARGS)

OUT ?= benchmarks/results
bench: native
	$(PY) -m maskaccel.bench --suite cpu --out $(OUT)
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-disable-gc -q $(PYTEST_ARGS)

# One thread: processor time then says what a run costs, whoever else uses the machine. Continues where it stopped.
caching: native $(VENV)/.bench
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.caching quality $(CACHING_ARGS)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.caching timing $(CACHING_ARGS)
	$(PY) -m benchmarks.caching report $(CACHING_ARGS)

wheel: $(VENV)/.base $(if $(filter 1,$(MASKACCEL_CUDA)),$(VENV)/.cuda)
	@echo "== wheel"
	rm -rf dist build/lib build/bdist.* build/wheelhouse
	$(PY) -m pip wheel --disable-pip-version-check -qq --no-build-isolation --no-deps -w build/wheelhouse .
	$(PY) tools/audit_wheel.py --repair dist build/wheelhouse/*.whl

gpu:
	$(PYTHON) tools/gpu_bundle.py run benchmarks/gpu/run.py $(GPU_ARGS)

GPU_PYTHON ?= 3.12
GPU_ARCHS ?= 90a
# Status 1 of build_variants.py: some spill or were left out, as it said; the others travel.
gpu-bundle: $(VENV)/.base $(VENV)/.cuda
	@echo "== native library for $(GPU_ARCHS)"
	MASKACCEL_CUDA=1 MASKACCEL_CUDA_ARCHS="$(GPU_ARCHS)" $(PY) setup.py --quiet build_ext --inplace
	$(if $(filter 1,$(GPU_VARIANTS)),$(PY) tools/build_variants.py --jobs $(or $(MAX_JOBS),1) || test $$? = 1)
	$(PY) tools/gpu_bundle.py pack --python $(GPU_PYTHON) $(BUNDLE_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

inspect: $(VENV)/.base $(VENV)/.cuda
	$(PY) csrc/inspect/build.py

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .benchmarks maskaccel/lib/*.so *.egg-info
