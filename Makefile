# Every target does its own set-up: .venv with the pinned packages of requirements/, and the compiled library.
#   OP=rms_norm            only this op, for test, bench, fuzz and mutants
#   ARGS="..."             more arguments for the program behind the target
#   PYTHON=, TORCH=        the interpreter, and which torch: see requirements/venv.sh
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR)
export PYTHON TORCH
# Where there is no card, the library in this folder has no use for CUDA kernels, whose compilation takes minutes.
export GENAI_KERNELS_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)
CPP := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv-run venv-dev: venv-%:
	@requirements/venv.sh $*
# The library, in genai_kernels/. Only what changed is compiled again.
library-run library-dev: library-%: venv-%
	@flock .venv.lock $(PY) setup.py -q build_ext --inplace > .venv/build.log 2>&1 || { cat .venv/build.log; exit 1; }

demo: library-run  ## models trained beside eager, served, adapted, painting; CHAPTER=painting: only that
	$(PY) -m genai_kernels demo $(if $(CHAPTER),--chapter $(CHAPTER)) $(ARGS)

llama: library-run  ## train the small Llama of python_models/checkpoints on the standard library: a quarter of an hour
	$(PY) -m python_models.llama_train $(ARGS)

dev: library-dev  ## an environment to work in
	@echo "ready: source .venv/bin/activate"

# Those of the GPU kernels run in processes of one thread each: the simulator, Triton's interpreter and compilers.
GPU_TESTS := $(wildcard tests/test_cuda_*.py tests/test_hopper_*.py tests/test_triton*.py)
PYTEST = $(PY) -m pytest -m "not slow" $(if $(OP),--op=$(OP))
test: library-dev  ## the test suite
	$(PYTEST) -n auto --dist worksteal --ignore=tests/packaging $(addprefix --ignore=,$(GPU_TESTS)) $(ARGS)
	OMP_NUM_THREADS=1 $(PYTEST) -n auto --dist worksteal $(GPU_TESTS) || [ $$? = 5 -a -n "$(OP)" ]

exhaustive: library-dev  ## every non-positive float through exp, on every instruction set: a few minutes
	$(PY) -m pytest -m slow tests/ops $(ARGS)

packaging: venv-dev  ## the wheel, the sdist and the editable install, built and tried in environments of their own
	$(PY) -m pytest --durations=5 tests/packaging $(ARGS)

device-artefacts: venv-dev  ## the library with CUDA kernels and the smoke program, to carry to a GPU machine
	GENAI_KERNELS_CUDA=1 $(PY) setup.py -q build_ext --inplace
	$(PY) -m benchmarks.device.smoke_build

bench: library-run  ## ours and the peers in one run, every op
	$(PY) -m benchmarks.run $(if $(OP),--op $(OP)) $(ARGS)

check: venv-dev  ## linters, types and formats; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(CPP)

format: venv-dev  ## what `check` would complain about, mended where a tool can
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format --quiet .
	.venv/bin/clang-format -i $(CPP)

fuzz: library-dev  ## the long run of the fuzzers: kernels under sanitizers, calls through the dispatcher
	$(PY) -m tests.fuzz $(if $(OP),--op $(OP)) $(ARGS)

mutants: library-dev  ## planted faults, and the share of them that the tests catch
	$(PY) -m tests.mutants $(if $(OP),--op $(OP)) $(ARGS)
	$(if $(OP),,$(PY) tests/runtime/planted_faults.py)

clean:  ## everything that was made here
	rm -rf .venv .venv.lock build dist *.egg-info genai_kernels/_*.so demo_report .benchmarks
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help venv-run venv-dev library-run library-dev demo llama dev test exhaustive packaging device-artefacts bench check format fuzz mutants clean
