# make demo   train a small Griffin on Shakespeare and see it write: a few minutes on two CPU cores
# make serve  OpenAI's API and a chat page for the demo's model
# make test   the tests that are quick;  make slow: the others;  make lint: style, types, layers
# make docs   the documentation site, into site/: warnings are errors

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# pip keeps no record of what it was asked for: a stamp per set of packages says when it was last done.
DEMO := .venv/.installed-train
SERVE := .venv/.installed-serve
DEV := .venv/.installed-dev
DOCS := .venv/.installed-docs
INPUTS := pyproject.toml constraints.txt

.PHONY: demo serve test slow lint docs

# A finished or interrupted demo is not overwritten: the next one gets a folder of its own.
demo: $(DEMO)
	@run=runs/shakespeare; number=1; \
	while [ -e $$run ]; do number=$$((number + 1)); run=runs/shakespeare-$$number; done; \
	$(BIN)/griffin train recipes/shakespeare.py --run $$run

serve: $(SERVE)
	@test -e runs/shakespeare/model || { echo "make demo trains the model first"; exit 2; }
	$(BIN)/griffin serve runs/shakespeare/model

test: $(DEV)
	$(BIN)/pytest -n 2 -m "not slow"

slow: $(DEV)
	$(BIN)/pytest -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# (mkdocs 1 prints that mkdocs 2 will be another program.)
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("griffin needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

$(DEMO): $(INPUTS) | $(BIN)/pip
	$(INSTALL) -e ".[train]"
	@touch $@

$(SERVE): $(INPUTS) | $(BIN)/pip
	$(INSTALL) -e ".[serve]"
	@touch $@

$(DEV): $(INPUTS) | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $@ $(DEMO) $(SERVE)

$(DOCS): $(INPUTS) | $(BIN)/pip
	$(INSTALL) -e ".[docs,transformers]"
	@touch $@

# The Gemma tokenizer for the tests that compare with it; not part of the project.
.cache/gemma.model: | $(BIN)/pip
	$(BIN)/pip download --quiet --no-deps --python-version 3.12 --only-binary=:all: -d .cache maxtext==0.2.5
	$(BIN)/python -c 'import zipfile, glob; z = zipfile.ZipFile(glob.glob(".cache/maxtext-*.whl")[0]); \
	open("$@", "wb").write(z.read("maxtext/assets/tokenizers/tokenizer.gemma"))'
	rm .cache/maxtext-*.whl
