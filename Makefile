# Every target works alone on a fresh machine with Python >= 3.11 and a network: it makes `.venv`, installs what it
# needs there once, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_IMAGE := outputs/demo.png
RUFF := $(shell sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
SETTINGS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(SETTINGS) $(BIN)/python -m pytest -n 2 --dist loadgroup
LOWEST := .venv-lowest
# Versions of the lower bounds have wheels for Python 3.11 and 3.12.
LOWEST_PYTHON ?= $(PYTHON)
LOWEST_PYTEST := $(SETTINGS) $(LOWEST)/bin/python -m pytest -n 2 --dist loadgroup
# What depends on the versions of other libraries: goldens, checkpoints in a fresh process, compilation, export,
# pipelines, Trainer, processors, LLaVA, dual encoders, converters, image and parquet files. Left out, because they ask
# about this library's own code or take long, and run with the newest versions: Hugging Face's common suite (it belongs
# to one version of transformers), several processes, commands, evaluation, figures, notebooks, documentation, fuzzing,
# the explorer (the extra `app`), long training runs. Exporters skip: they need torch 2.11.
LOWEST_TESTS := \
	$(addprefix tests/matrix/test_,compile.py export.py llava_swapped.py llava_tower.py precision.py) \
	$(addprefix tests/matrix/test_,quantization_lora.py save_load.py training.py variants.py) \
	$(addprefix tests/,dual_encoders llava models training/test_data.py training/test_trainer.py utils vit_sources) \
	$(addprefix tests/test_,checkpoints.py conversion.py embedding.py hub.py lowest.py quiet.py)
LOWEST_SLOW := $(addprefix tests/matrix/test_,compile.py export.py llava_swapped.py save_load.py training.py variants.py)

# Fifteen times the cases of the normal run are more than 10,000.
FUZZ ?= 15
ifndef FUZZ_SEED
FUZZ_SEED := $(shell $(PYTHON) -c 'import random; print(random.randrange(2**32))')
endif

.PHONY: demo frontier test test-fast test-lowest soak fuzz quality benchmark docs

# Ask the bundled checkpoints what the sample photographs show, at a few token budgets each.
demo: $(VENV)/.installed
	$(BIN)/polyscale demo --output $(DEMO_IMAGE)

# Top-1 accuracy by tokens, operations and milliseconds of every bundled checkpoint that has the classes of DATA, against
# token merging, smaller images, the plain ViTs in CONTROL (folders) and the accuracies in REFERENCE (NAME=PERCENT). Where
# DATA has other names for the classes: LABEL_MAP, a JSON file. LIMIT: a random sample of so many images.
MERGE ?= 48 32 16 8
SHRINK ?= 48 40 32 24 16
frontier: $(VENV)/.installed
	@test -n "$(DATA)" || { echo "make frontier DATA=FOLDER: name a data set with the checkpoints' classes" >&2; exit 2; }
	$(BIN)/polyscale evaluate --bundled --speed $(CONTROL:%=--control %) $(REFERENCE:%=--reference %) \
		$(LABEL_MAP:%=--label-map %) $(LIMIT:%=--limit %) \
		$(if $(MERGE),--merge-to $(MERGE)) $(if $(SHRINK),--shrink-to $(SHRINK)) \
		--output $(or $(OUTPUT),outputs/frontier) "$(DATA)"

# All tests.
test: $(VENV)/.installed-dev
	$(PYTEST)

# A hundred kills of a training run, each of which must go on from its last whole checkpoint.
soak: $(VENV)/.installed-dev
	POLYSCALE_KILLS=100 $(SETTINGS) $(BIN)/python -m pytest tests/training/test_kills.py

# Without the slow ones.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

# With the lowest version of every dependency that pyproject.toml allows, in an environment of its own.
test-lowest: $(LOWEST)/.installed
	$(LOWEST_PYTEST) -m "not slow" $(LOWEST_TESTS)
	$(LOWEST_PYTEST) -m slow $(LOWEST_SLOW)

# Random and hostile input to everything public, from a seed that is printed.
fuzz: $(VENV)/.installed-dev
	@echo "The same cases again: make fuzz FUZZ=$(FUZZ) FUZZ_SEED=$(FUZZ_SEED)"
	POLYSCALE_FUZZ=$(FUZZ) $(PYTEST) tests/fuzz --hypothesis-seed=$(FUZZ_SEED)

# Lint and format, with the pinned ruff.
quality: $(VENV)/.installed-ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The documentation site, into site/. A broken link fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Speed against timm and transformers, side by side.
benchmark: $(VENV)/.installed-dev
	for family in flexivit quadtree_vit sparseformer s2_vision; do \
		$(BIN)/python benchmarks/$$family.py || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polyscale needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-ruff

$(VENV)/.installed-ruff: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install '$(RUFF)'
	touch $@

$(LOWEST)/.installed: pyproject.toml tests/lowest.py
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	touch $@

# The site reads the sources without importing them, so it needs nothing that a model needs.
$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(DOCS)
	touch $@
