# make demo and make test are all that a clean machine with Python 3.11 or newer needs; both build .venv first.
TORCH ?= torch==2.13.0
# The first Python of at least 3.11 that runs and can make environments: a name on the PATH may be a shim without a Python behind it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: demo test lint docs notebooks clean

demo: $(BIN)/.installed
	$(BIN)/perturbprob demo --out demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)

lint: $(BIN)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(BIN)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

notebooks: $(BIN)/.installed
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# torch goes first: left to pip's resolver, Linux gets a CUDA build of several GB.
$(BIN)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python of at least 3.11 with venv was found: install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[plots,test]"
	touch $@

$(BIN)/.installed-docs: $(BIN)/.installed
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@

clean:
	rm -rf demo dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
