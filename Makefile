# make demo | test | test-all | test-trl | lint | docs | bench | clean
#
# Needs make and a python3 (3.10 or newer). Everything else is installed into .venv, once.
#   make demo TORCH=torch==2.12.0              another torch, or a wheel's path, or "torch --pre"
#   make demo DEMO="--loss triplet --steps 8"  other arguments for the example
#   make test PYTEST="tests/test_packaging.py" other arguments for pytest
#   make test-trl TRL=trl==1.16.0              the trainers with another TRL

TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two processes of one thread each: torch's own threads gain little on tests this small.
PARALLEL ?= -n 2 --dist loadfile

# The oldest that pyproject.toml allows.
TRL ?= trl==1.16.0
# A trainer says at its import that it is not tried with another TRL; here it is.
WITH_TRL := -W "ignore:alignment.trl is written for" -W "ignore:distill.trl is written for" \
	tests/alignment/test_trl*.py tests/distill/test_trainer.py tests/distill/test_gkd.py

.PHONY: demo test test-all test-trl lint format docs bench clean

demo: $(VENV)/demo.installed
	$(BIN)/python examples/train_embeddings.py $(DEMO)

test: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-all: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --slow=all $(PYTEST)

# TRL alone, in a folder in front of the installed packages.
test-trl: $(VENV)/dev.installed
	@rm -rf $(VENV)/trl
	@$(PIP) --no-deps --target $(VENV)/trl '$(TRL)'
	PYTHONPATH=$(VENV)/trl OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(WITH_TRL) $(PYTEST)

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.installed
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

clean:
	rm -rf $(VENV) runs build dist docs/_build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The environment. Its torch is named in torch.txt; when another is asked for, the environment is made anew.
ifneq ($(strip $(shell cat $(VENV)/torch.txt 2>/dev/null)),$(strip $(TORCH)))
.PHONY: $(VENV)/torch.txt
endif

$(VENV)/torch.txt:
	@test -n "$(PYTHON)" || { echo "No python3 of version 3.10 or newer found; name one: make PYTHON=..."; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) and $(TORCH)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | xargs $(PIP)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/kept.txt
	@echo '$(strip $(TORCH))' > $@

# One stamp an extra. kept.txt holds pip to the torch that is there.
$(VENV)/%.installed: $(VENV)/torch.txt pyproject.toml
	@echo "Installing the project with [$*] into $(VENV) (minutes, the first time)"
	@$(PIP) --constraint $(VENV)/kept.txt --editable '.[$*]'
	@touch $@
.PRECIOUS: $(VENV)/%.installed
