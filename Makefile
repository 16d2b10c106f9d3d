# Everything a person does here, from a fresh clone with only Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
# Keeps mkdocs-material from printing a banner about another project.
export NO_MKDOCS_2_WARNING := 1
# A driver means a GPU: then the GPU kernels are installed too.
SERVE_EXTRAS := $(if $(shell command -v nvidia-smi),[gpu],)

.PHONY: help serve shell test lint check docs docs-serve train format clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: .venv/serve ## serve the built-in model, or MODEL=path-or-hub-name, with ARGS="--port 8000 ..."
	$(BIN)/python -m minisgl.launch $(MODEL) $(ARGS)

shell: .venv/serve ## chat with it in this terminal instead
	$(BIN)/python -m minisgl.shell $(MODEL) $(ARGS)

test: lint check docs ## everything that must pass before a change lands: lint, types, layers, tests, docs

lint: .venv/dev ## ruff (lint and format), mypy --strict, the layering of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: .venv/dev ## the tests alone
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

docs: .venv/dev ## build the site into site/, executing every lesson
	$(BIN)/mkdocs build --strict

docs-serve: .venv/dev ## read the site at http://127.0.0.1:8000 and see edits at once
	$(BIN)/mkdocs serve

train: .venv/dev ## train the built-in model again (one GPU, under ten minutes)
	$(BIN)/python -m minisgl.builtin.train

format: .venv/dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what make made
	rm -rf .venv site build *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/serve: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e ".$(SERVE_EXTRAS)"
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e ".[dev,docs]"
	@touch $@
