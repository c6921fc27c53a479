# Each target sets up what it needs; a second run is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo eval-smoke bench-video test test-slow lint format docs clean

help:
	@echo "make demo       ask the embedded VLM about pictures at several keep ratios (sets itself up)"
	@echo "make eval-smoke lmms-eval end to end, offline, on the embedded VLM"
	@echo "make bench-video video QA over video methods and keep ratios"
	@echo "make test       lint, types and the quick tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make docs       rebuild the generated pages and tables"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/tokprune demo --json out/demo.json --overlays out

eval-smoke: setup
	$(BIN)/python -m tools.eval_smoke --out out/eval_smoke

bench-video: setup
	$(BIN)/python benchmarks/video_qa.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python benchmarks/encoder_tables.py
	$(BIN)/python -m tools.pages

clean:
	rm -rf $(VENV) out build dist *.egg-info
