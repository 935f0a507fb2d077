# Every target does its own set-up: a virtual environment in .venv with the pinned versions of constraints.txt.
# The set-up runs once, and again only when pyproject.toml or constraints.txt change.
#
#   PYTHON=python3.12       another interpreter (3.11 or newer)
#   TORCH=torch==2.13.0     another build of torch, installed before everything else
#   PIP_ARGS="…"            further arguments of pip, such as an index with CPU-only builds of torch
#   JOBS=1                  how many processes run the tests
#   REF=0af10fb             the commit whose code `make bench-round` measures beside today's; REF= for today's alone
#   ARGS="…"                further arguments of `fedloom demo`, such as ARGS="--method fedit --rounds 5"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
REF ?= 0af10fb
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt
RUN_READY := $(VENV)/ready-to-run
DEV_READY := $(VENV)/ready-to-develop

.DEFAULT_GOAL := help
.PHONY: help demo test lint format check-slow check-gpu bench-round soak soak-processes docs docs-serve pages screenshots front front-real base-model data base-wordnet data-docstrings charts clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 17

demo: $(RUN_READY) ## Train a small federation with real bytes, as it goes on screen; leaves runs/demo
	$(BIN)/fedloom demo $(ARGS)

test: $(DEV_READY) lint ## Everything that must hold before a change is taken
	$(BIN)/python -m pytest -rs --numprocesses $(JOBS) --dist worksteal

lint: $(DEV_READY) ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY) ## Lay the code out anew
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check-slow: $(DEV_READY) ## The tests that take minutes: a million fuzzed payloads, thousands of adapter folders, kill -9 of every process, ten minutes of soak
	$(BIN)/python -m pytest -m slow

check-gpu: $(DEV_READY) ## The tests on a CUDA device, and what leaves it after training; says so where there is none
	$(BIN)/python -m pytest -m gpu -rs tests/lora/test_devices.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m benchmarks device && $(BIN)/python -m benchmarks aggregate --device cuda --all-modules; \
	else echo "no CUDA device here: nothing on a GPU was measured"; fi

bench-round: $(DEV_READY) ## What was asked of the whole round, old code (REF=commit) against new; says first how long; prints the table of docs/benchmarks/rounds.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --markdown goals $(REF) $(ARGS)

soak: $(DEV_READY) ## 20 sites, 50 rounds, a fault in every round, a minute of CPU; writes docs/benchmarks/soak.md (ARGS="--seed 7")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks soak --page docs/benchmarks/soak.md $(ARGS)

soak-processes: $(DEV_READY) ## The same with real processes, 4 sites, 8 rounds, some ten minutes (ARGS="--sites 6 --rounds 20")
	$(BIN)/python -m benchmarks soak --processes --sites 4 --rounds 8 $(ARGS)

docs: $(DEV_READY) ## Build the documentation as a site; leaves build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(DEV_READY) ## Show the documentation at http://127.0.0.1:8000 while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

pages: $(DEV_READY) ## Write what comes from the code and from docs/front.csv: methods with their pictures, settings, the tables of the front
	$(BIN)/python -m scripts.make_method_pages
	$(BIN)/python -m scripts.make_settings_page
	$(BIN)/python -m scripts.make_front_tables

screenshots: $(DEV_READY) ## Take the pictures of docs/page.md from runs that it plays, with Chromium; leaves docs/pictures
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.make_screenshots $(ARGS)

front: $(RUN_READY) ## Score against bytes at several budgets, two testbeds; says first how long; leaves docs/front.png and docs/front.csv
	$(BIN)/python -m experiments front --jobs 2 --out runs/front
	cp runs/front/front.png runs/front/front.csv docs/
	$(BIN)/python -m scripts.make_front_tables

front-real: $(RUN_READY) ## The same on the testbeds of real text, a night of 2 cores; goes on after a break; leaves docs/front-real.png
	test -d experiments/testbeds/docstrings || $(BIN)/python -m experiments data docstrings
	$(BIN)/python -m experiments front --testbeds wordnet,docstrings --jobs 2 --out runs/front-real $(ARGS)
	cp runs/front-real/front.png docs/front-real.png
	cp runs/front-real/front.csv docs/
	$(BIN)/python -m scripts.make_front_tables

base-model: $(RUN_READY) ## Pre-train the shipped base model anew (about 10 minutes on 2 cores)
	$(BIN)/python scripts/make_base_model.py

data: $(RUN_READY) ## Write the shipped training and held-out data anew
	$(BIN)/python scripts/make_data.py

base-wordnet: $(RUN_READY) ## Pre-train the base model of the real-text testbeds, or go on (in sittings; needs Debian 12); leaves runs/base/model
	$(BIN)/python -m experiments base

data-docstrings: $(DEV_READY) ## Write the data of the testbed docstrings from the libraries that are installed
	$(BIN)/python -m experiments data docstrings

charts: ## Bundle anew what the page of a run draws with, from npm; needs Node
	scripts/charts/bundle.sh

clean: ## Remove the environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: fedloom needs Python 3.11 or newer; say which with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch goes first, so that nothing below can draw in another build of it.
$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) --editable ".[fast]"
	@touch $@

$(DEV_READY): $(RUN_READY)
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
