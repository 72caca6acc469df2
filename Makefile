# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
TOKENS ?= 52000
MODEL ?= .cache/demo-model
PORT ?= 8000
BIN := .venv/bin

# The GPU extra follows the driver: CUDA 13 needs driver 580 or newer.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | cut -d. -f1 | grep -xE '[0-9]+' | head -n 1)
CUDA := $(if $(DRIVER),$(shell [ "$(DRIVER)" -ge 580 ] 2>/dev/null && echo ,cuda13 || echo ,cuda12))

.PHONY: help install demo serve test test-slow test-clients notebooks kernels-aot gpu-bench lint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: .venv/.installed ## make .venv and install tokenzero into it, for the GPU if there is one

demo: .venv/.installed $(MODEL)/config.json ## serve a 52K-token agent prompt in three arms and print the table
	$(BIN)/python -m experiments.demo --model $(MODEL) --tokens $(TOKENS)

serve: .venv/.installed $(MODEL)/config.json ## serve the demo model on PORT
	$(BIN)/python -m serve --model $(MODEL) --port $(PORT)

test: .venv/.installed-test ## run the tests
	$(BIN)/python -m pytest

test-slow: .venv/.installed-test ## run the tests that take over a minute each
	$(BIN)/python -m pytest -m slow

test-clients: .venv/.installed-test ## run Claude Code and Codex on the server; fetches 900 MB from npm, once
	$(BIN)/python -m pytest -m clients tests/clients

notebooks: .venv/.installed-notebooks ## run all notebooks anew, and what they measure that is not measured yet
	$(BIN)/jupytext --to ipynb --execute --run-path . notebooks/*.py

kernels-aot: ## compile the GPU kernels for an H200 without one, and check spills and shared memory
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet jax==0.10.2 absl-py flax rich
	.venv-aot/bin/pip install --quiet --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc nvidia-nvvm
	.venv-aot/bin/python -m experiments.kernels_aot

gpu-bench: .venv/.installed ## measure the kernels and an 8B-shaped model on this machine's GPU
	$(BIN)/python -m experiments.gpu_bench

lint: .venv/.installed-test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the other targets made, but for results
	rm -rf .venv .venv-aot .cache

$(MODEL)/config.json: | .venv/.installed
	$(BIN)/python -m experiments.demo_model $(MODEL)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[experiments$(CUDA)]'
	@touch $@

.venv/.installed-test: pyproject.toml .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

.venv/.installed-notebooks: pyproject.toml .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	@touch $@
