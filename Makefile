# `make help` lists the targets. Needs nothing but python3 (3.11 or newer), make and pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of torch `test-newest` takes this one: a newer one from PyPI brings gigabytes of CUDA libraries along. TORCH=torch asks for it.
TORCH ?= torch==2.13.0
# TRANSFORMERS=git+https://github.com/huggingface/transformers puts its main branch on top of the newest versions.
TRANSFORMERS ?=
NEWEST := .venv-newest/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest newest coverage lint format docs bench package clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## pre-train a small ELECTRA on text found on this machine
	$(BIN)/hf-pretrain rtd --config trainers/recipes/demo.yaml --output_dir demo-output --overwrite_output_dir true

# A file of tests stays on one worker, which makes its fixtures once.
test: lint ## lint, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: lint ## lint, then run every test, the slow ones and those for a GPU too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ""

coverage: .venv/.installed ## run the tests, and show which lines of the library none of them runs
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report term-missing:skip-covered

test-newest: newest ## run the tests on the newest versions that pyproject.toml allows, in an environment of their own
	$(NEWEST) -m pytest -n 2 --dist loadfile

# Not a file: what was newest last week need not be so today. With nothing newer this takes seconds.
newest: | $(NEWEST)
	$(NEWEST) -m pip --disable-pip-version-check install --upgrade --upgrade-strategy eager '$(TORCH)' setuptools
	$(NEWEST) -m pip --disable-pip-version-check install --upgrade --upgrade-strategy eager --no-build-isolation -e '.[test]' '$(TORCH)' $(TRANSFORMERS)

lint: .venv/.installed ## style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: .venv/.installed ## rewrite the code in the style that lint asks for
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: .venv/.installed ## write the tables of the documents, then build the site into site/
	$(BIN)/python docs/make_tables.py
	$(BIN)/python -m mkdocs build --strict

bench: .venv/.installed ## run the benchmarks, one after the other
	@for program in benchmarks/collators.py benchmarks/packing.py benchmarks/training_steps.py; do echo "== $$program"; $(BIN)/python $$program || exit 1; done

package: ## build wheel and sdist, install each in an environment of its own, and run the README from there
	PYTHON='$(PYTHON)' .ci/package

clean: ## remove what runs and builds have left, but not the environments
	rm -rf build dist site *.egg-info demo-output .coverage .pytest_cache .mypy_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## remove the environments too
	rm -rf .venv .venv-newest

# Written last, so that an installation that was cut short is taken up again and a whole one is never repeated.
.venv/.installed: pyproject.toml setup.py constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt torch==2.13.0 setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Debian ships a venv that cannot install pip: then the pip beside $(PYTHON) installs one into the environment.
.venv/bin/python $(NEWEST):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@) || { $(PYTHON) -m venv --without-pip $(patsubst %/bin/python,%,$@) && $(PYTHON) -m pip --python $@ install pip; }
