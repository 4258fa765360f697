# Every target works alone on a fresh machine with Python >= 3.10 and a network: it makes `.venv`, installs what it
# needs there once, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_PICTURE := outputs/demo.png
RUFF := $(shell sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: demo test test-fast quality benchmark

# Classify the sample photographs with the bundled checkpoint at each patch size.
demo: $(VENV)/.installed
	$(BIN)/polyscale classify --output $(DEMO_PICTURE)

# All tests.
test: $(VENV)/.installed-dev
	$(PYTEST)

# Without the slow ones.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

# Lint and format, with the pinned ruff.
quality: $(VENV)/.installed-ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Speed against timm and transformers, side by side.
benchmark: $(VENV)/.installed-dev
	for family in flexivit quadtree_vit sparseformer s2_vision; do \
		$(BIN)/python benchmarks/$$family.py || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "polyscale needs Python 3.10 or newer")'
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
