# Everything sets itself up: a virtual environment in .venv with the pinned set of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint format docs readme picture evidence benchmarks clean help

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/: *.*## /\t/' | expand -t 14

demo: .venv/.run ## compare decoders and samplers on the reference models; prints the report's path last
	@rm -rf runs/demo
	@$(BIN)/python -m steersman compare decoding --methods greedy,momentum-decoding,no-repeat-ngram,nucleus \
	  --count 8 --new-tokens 48 --seeds 5 --out runs/demo/decoding
	@$(BIN)/python -m steersman compare sampling --subject digits --methods ddim,pndm,dpm-solver-pp \
	  --calls 5,10,20 --samples 128 --seeds 5 --out runs/demo/sampling

test: .venv/.dev ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.dev ## style, layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.dev ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: .venv/.dev ## the README's table, from the cards
	$(BIN)/python docs/render.py

picture: .venv/.dev ## the README's picture, from a comparison that it runs
	@rm -rf runs/picture
	OMP_NUM_THREADS=1 $(BIN)/python -m steersman compare sampling --subject digits --seeds 5 --samples 256 --calls 5,10,20 \
	  --methods ddim,pndm,dpm-solver-pp,UniPCMultistepScheduler --out runs/picture
	$(BIN)/python docs/picture.py runs/picture

evidence: .venv/.dev ## judge every method's claims anew and write evidence/results/ (METHODS="a b", SCALE=quick, SEED=0)
	$(BIN)/python evidence/run.py --scale $(or $(SCALE),quick) --seed $(or $(SEED),0) $(METHODS)

benchmarks: .venv/.dev ## ratios against peers, measured in one run, in benchmarks/results/
	for script in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:           ## throw away what was made
	rm -rf .venv runs site dist build

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steersman needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt packages/steersman-reference/pyproject.toml
	@echo "installing the pinned set (once; a few minutes)"
	$(PIP) --editable packages/steersman-reference --editable '.[all]'
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) --editable packages/steersman-reference --editable '.[dev]'
	@touch $@
