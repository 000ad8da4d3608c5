# make demo | test | test-all | test-oldest | sample | lint | format | plots | docs | bench | dist | clean
#
# Needs make and a python3 (3.10 or newer). Everything else is installed into .venv, once.
#   make demo TORCH=torch==2.12.0              another torch, or a wheel's path, or "torch --pre"
#   make demo DEMO="--loss triplet --steps 8"  other arguments for the example
#   make test PYTEST="tests/test_packaging.py" other arguments for pytest
#
# A cell of docs/compatibility.md, in an environment of its own; each of these may be left out:
#   make test VENV=.venv-cell PYTHON=python3.12 TORCH=torch==2.11.0 ST=sentence-transformers==5.7.0 TRL=trl==1.16.0 \
#       TRANSFORMERS=transformers==5.10.2 PYTEST="$(make sample)"

TORCH ?= torch==2.13.0
# The newest that pyproject.toml allows, where nothing is said.
ST ?=
TRL ?=
TRANSFORMERS ?=
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two processes of one thread each: torch's own threads gain little on tests this small.
PARALLEL ?= -n 2 --dist loadfile
RUN = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(if $(TRL),$(UNTRIED))

# The oldest libraries that pyproject.toml allows; tests/test_packaging.py holds the two together.
OLDEST := sentence-transformers==5.7.0 trl==1.16.0
# What a cell is tried with: what depends on versions most, compiled steps, the library's classes beside ours, language
# models and a trainer of TRL's (skipped without TRL).
SAMPLE := --slow=none tests/engine/test_loss.py tests/losses/test_st_compatibility.py tests/test_causal_lm.py \
	tests/distill/test_gkd.py
# A trainer says at its import that it is not tried with another TRL; here it is.
UNTRIED := -W "ignore:alignment.trl is written for" -W "ignore:distill.trl is written for"

.PHONY: demo test test-all test-oldest sample lint format plots docs bench dist clean

demo: $(VENV)/demo.installed
	$(BIN)/python examples/train_embeddings.py $(DEMO)

test: $(VENV)/dev.installed
	$(RUN) $(PYTEST)

test-all: $(VENV)/dev.installed
	$(RUN) --slow=all $(PYTEST)

# The oldest libraries alone, in a folder in front of the installed packages: seconds instead of an environment.
test-oldest: $(VENV)/oldest.txt
	PYTHONPATH=$(VENV)/oldest $(RUN) $(UNTRIED) $(SAMPLE) $(PYTEST)

sample:
	@echo '$(SAMPLE)'

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plots: $(VENV)/docs.installed
	$(BIN)/python benchmarks/plots.py --out docs/_plots

docs: plots
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build
	@echo "docs/_build/index.html"

bench: $(VENV)/bench.installed
	$(BIN)/python benchmarks/embedding.py
	$(BIN)/python benchmarks/contrastive.py
	$(BIN)/python benchmarks/token_losses.py
	$(BIN)/python benchmarks/preference.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/trainers.py
	$(BIN)/python benchmarks/swap.py
	$(BIN)/python benchmarks/small.py

dist: $(VENV)/dev.installed
	@$(PIP) build
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) runs build dist docs/_build docs/_plots *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The environment. What was asked for is in torch.txt; when that changes, the environment is made anew.
CELL := $(strip $(TORCH) $(ST) $(TRL) $(TRANSFORMERS) $(if $(filter-out file,$(origin PYTHON)),$(PYTHON)))
ifneq ($(strip $(shell cat $(VENV)/torch.txt 2>/dev/null)),$(CELL))
.PHONY: $(VENV)/torch.txt
endif

$(VENV)/torch.txt:
	@test -n "$(PYTHON)" || { echo "No python3 of version 3.10 or newer found; name one: make PYTHON=..."; exit 1; }
	@echo "Making $(VENV) with $(PYTHON): $(CELL)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | xargs $(PIP)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/kept.txt
	@printf '%s\n' $(ST) $(TRL) $(TRANSFORMERS) >> $(VENV)/kept.txt
	@echo '$(CELL)' > $@

# One stamp an extra. kept.txt holds pip to the torch that is there, and to what was asked for.
$(VENV)/%.installed: $(VENV)/torch.txt pyproject.toml
	@echo "Installing the project with [$*] into $(VENV) (minutes, the first time)"
	@$(PIP) --constraint $(VENV)/kept.txt --editable '.[$*]'
	@touch $@
.PRECIOUS: $(VENV)/%.installed

$(VENV)/oldest.txt: $(VENV)/dev.installed Makefile
	@rm -rf $(VENV)/oldest
	@$(PIP) --no-deps --target $(VENV)/oldest $(OLDEST)
	@echo '$(OLDEST)' > $@
