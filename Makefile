# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
PYTHON312 ?= python3.12
# What kernels-aot compiles with; 0.11.2 wants PYTHON=python3.12.
JAX ?= 0.10.2
TOKENS ?= 52000
MODEL ?= .cache/demo-model
# What `make serve` and `make chat` are told of MODEL: nothing, unless it is given.
CHOSEN := $(if $(filter file,$(origin MODEL)),,--model $(MODEL))
PORT ?= 8000
# Processes that run the tests; each file's tests run in one of them.
WORKERS ?= 2
# Random requests to each route, by `make fuzz`.
CASES ?= 2000
BIN := .venv/bin
# Packages with the hashes of their files, in .requirements/; then the project itself, which has none, by what they brought.
HASHED := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement
ITSELF := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
# What has no hashes there: the versions of constraints.txt.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -p no:benchmark

# The GPU extra follows the driver: CUDA 13 needs driver 580 or newer.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | cut -d. -f1 | grep -xE '[0-9]+' | head -n 1)
CUDA := $(if $(DRIVER),$(shell [ "$(DRIVER)" -ge 580 ] 2>/dev/null && echo cuda13 || echo cuda12))

.PHONY: help install demo serve chat test test-slow fuzz test-clients test-cluster test-frameworks coverage notebooks \
	kernels-interpreted kernels-aot \
	gpu-bench bench-small audit sbom lock lint lint-deploy clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 21

install: .venv/.installed ## make .venv and install tokenzero into it, for the GPU if there is one

demo: .venv/.installed $(if $(filter %.gguf,$(MODEL)),$(MODEL),$(MODEL)/config.json) ## serve a 52K-token agent prompt in three arms and print the table
	$(BIN)/python -m experiments.demo --model $(MODEL) --tokens $(TOKENS)

serve: .venv/.installed ## serve SmolLM2-135M-Instruct, fetched once (93 MB), or MODEL, on PORT
	$(BIN)/python -m experiments.trained_model $(CHOSEN) --port $(PORT)

chat: .venv/.installed ## talk to the same in the terminal, with the cache's figures after each answer
	$(BIN)/python -m experiments.chat $(CHOSEN)

test: .venv/.installed-test ## run the tests, in WORKERS processes
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: .venv/.installed-test ## run the tests that take over a minute each
	$(BIN)/python -m pytest -m slow

fuzz: .venv/.installed-fuzz ## send CASES random requests to each route, and a million random texts and bodies to parsers and rules
	FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -m fuzz --timeout 7200

test-clients: .venv/.installed-clients ## run Claude Code, Codex, four more agents and Chromium on the server; fetches 2 GB from npm, once
	$(BIN)/python -m pytest -m clients tests/clients

test-cluster: .venv/.installed-cluster ## run several replicas with Ray, and one server's tests on them
	$(BIN)/python -m pytest -m cluster tests/serve/cluster

test-frameworks: .venv/.installed-clients .venv-frameworks/.installed ## run agent frameworks on the server, each a tool loop and a structured answer
	$(BIN)/python -m pytest -m clients tests/clients/test_frameworks.py

coverage: .venv/.installed-test ## run the tests and print what they cover, by wing; fails below the floors
	rm -f .cache/coverage*
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=
	$(BIN)/python -m tests.helpers.coverage_by_wing

notebooks: .venv/.installed-notebooks ## run all notebooks anew, and what they measure that is not measured yet
	$(BIN)/jupytext --to ipynb --execute --run-path . notebooks/*.py

# NPROC is the size of XLA's thread pool, in which the interpreter's warpgroups wait for each other: two starve.
kernels-interpreted: ## run the GPU kernels in the interpreter, for numbers and races; wants JAX 0.11, so Python 3.12
	$(PYTHON312) -m venv .venv-312
	.venv-312/bin/pip install --quiet --disable-pip-version-check jax==0.11.2 absl-py flax jaxtyping rich pytest pytest-timeout
	NPROC=16 .venv-312/bin/python -m pytest --noconftest tests/model/test_kernels.py

kernels-aot: ## compile the GPU kernels for H200s without one, and check spills, shared memory and what devices send
	$(PYTHON) -m venv .venv-aot-$(JAX)
	.venv-aot-$(JAX)/bin/pip install --quiet --disable-pip-version-check jax==$(JAX) absl-py flax jaxtyping rich
	.venv-aot-$(JAX)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda13-plugin==$(JAX) jax-cuda13-pjrt==$(JAX) nvidia-cuda-nvcc nvidia-nvvm
	.venv-aot-$(JAX)/bin/python -m experiments.gpu.aot

gpu-bench: .venv/.installed ## measure the kernels and an 8B-shaped model on this machine's GPU
	$(BIN)/python -m experiments.gpu_bench

bench-small: .venv/.installed-test ## time the small steps of a request's host path, each by itself
	$(BIN)/python -m pytest experiments/bench/micro.py --benchmark-time-unit=us \
		--benchmark-columns=min,median,iqr,rounds

audit: .venv/.installed .venv-audit/.installed ## look up known vulnerabilities of what is installed
	@.venv-audit/bin/python .requirements/audit.py

sbom: .venv/.installed .venv-audit/.installed ## write what is installed to .cache/sbom.cdx.json (CycloneDX)
	@mkdir -p .cache
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
		--output-file .cache/sbom.cdx.json $(BIN)/python

lock: .venv-audit/.installed ## renew .requirements/, after a change of pyproject.toml or constraints.txt
	.venv-audit/bin/python .requirements/lock.py

# systemd-analyze checks that the command is there, so another one stands for it.
lint-deploy: .venv-audit/.installed ## check the files of serve/deploy with hadolint, kubernetes-validate and systemd-analyze
	.venv-audit/bin/hadolint serve/deploy/Dockerfile
	.venv-audit/bin/kubernetes-validate --strict --quiet serve/deploy/kubernetes.yaml
	@mkdir -p .cache && sed 's#/opt/tokenzero/bin/tokenzero#/bin/true#' serve/deploy/tokenzero.service > .cache/tokenzero.service
	@if command -v systemd-analyze >/dev/null; then systemd-analyze verify .cache/tokenzero.service && \
		systemd-analyze security --offline=true --threshold=20 .cache/tokenzero.service | tail -n 1; \
	else echo "systemd-analyze is not here: tokenzero.service was not checked"; fi

lint: .venv/.installed-test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the other targets made, but for results
	rm -rf .venv .venv-312 .venv-aot-* .venv-audit .venv-frameworks .cache

$(MODEL)/config.json: | .venv/.installed
	$(BIN)/python -m experiments.demo_model $(MODEL)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed: pyproject.toml .requirements/base.txt $(CUDA:%=.requirements/%.txt) | .venv/bin/python
	$(HASHED) .requirements/base.txt $(CUDA:%=--requirement .requirements/%.txt)
	$(ITSELF)
	@touch $@

.venv/.installed-clients: pyproject.toml constraints.txt .venv/.installed-test
	$(PIP) --editable '.[clients]'
	@touch $@

.venv/.installed-cluster: pyproject.toml constraints.txt .venv/.installed-test
	$(PIP) --editable '.[cluster]'
	@touch $@

# torch for CPUs where pip finds it: a tenth of the size of PyPI's.
.venv/.installed-test: .requirements/test.txt .requirements/torch.txt .requirements/torch-cpu.txt .venv/.installed
	$(HASHED) .requirements/torch-cpu.txt 2>/dev/null || $(HASHED) .requirements/torch.txt
	@touch $@

.venv/.installed-fuzz: .requirements/fuzz.txt .venv/.installed-test
	$(HASHED) .requirements/fuzz.txt
	@touch $@

.venv-audit/.installed: .requirements/audit.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

# Resolved by uv: with pip, frameworks that pin one another take many minutes.
.venv-frameworks/.installed: tests/clients/frameworks.txt
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/pip install --quiet --disable-pip-version-check uv
	.venv-frameworks/bin/uv pip install --quiet --python .venv-frameworks/bin/python --requirement $<
	@touch $@

.venv/.installed-notebooks: pyproject.toml constraints.txt .venv/.installed
	$(PIP) --editable '.[notebooks]'
	@touch $@
