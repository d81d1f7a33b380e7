# Targets for people; `make help` lists them. Everything is installed in a virtual environment of its own.

VENV ?= .venv
PYTHON ?= python3
# Installed first and by version: what a bare `torch` resolves to can be a build for GPUs, which pulls in gigabytes of
# CUDA packages on a CPU machine. Where a package index offers a CPU build of this version, pip prefers it.
TORCH ?= torch==2.13.0
MODEL ?=
ARGS ?=
RESULT ?= benchmarks/results/gpu.json

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that spin while they wait slow down whoever shares the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test kernels lint format gpu readme wheel clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1|\2/' | column -t -s '|'

demo: $(STAMP) ## generate with the 8-bit cache and compare it with others (MODEL=hub id or directory)
	@$(BIN)/python examples/demo.py $(MODEL) $(ARGS)

test: $(STAMP) ## run the tests (ARGS=... goes to pytest)
	@$(BIN)/python -m pytest -q -n 2 $(ARGS)

kernels: $(STAMP) ## the long form of what is proved of the GPU kernels without a GPU (minutes)
	@$(BIN)/python -m pytest -q -n 2 -m kernels tests/test_triton_*.py $(ARGS)

lint: $(STAMP) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu: ## on a machine with a GPU and torch: test there and measure (RESULT=file, ARGS=--only ...); installs nothing
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --json $(RESULT) $(ARGS)

readme: $(STAMP) ## write the README's tables and the pages and pictures of results from benchmarks/results
	@$(BIN)/python benchmarks/readme.py

wheel: $(STAMP) ## a wheel for this kind of machine, with the CPU kernels built (dist/; on Linux)
	@rm -rf build
	@$(BIN)/python -c "from hf_kvquant.ops.cpu import build; build.prebuild()"
	@$(BIN)/pip wheel -q --no-deps --wheel-dir dist . --config-settings=--build-option=--plat-name=$$($(BIN)/python -c \
	  "import sysconfig; print(sysconfig.get_platform().replace('-', '_').replace('.', '_'))")
	@rm -rf hf_kvquant/ops/cpu/prebuilt build
	@ls dist/*.whl

clean: ## remove the virtual environments and everything generated
	@rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq "$(TORCH)"
	@$(BIN)/pip install -qq -e ".[dev]"
	@touch $@
