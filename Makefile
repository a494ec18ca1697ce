# Targets carry their help text after "##"; `make` alone prints them.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLUGINS := build/test-plugins
NATIVE := find opkit kernels plugins examples tests -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) 2>/dev/null

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench soak clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## show what opkit does, on this machine (sets everything up first)
	$(BIN)/python examples/demo/run.py

test: $(READY) $(PLUGINS)/.ready ## run every test (sets everything up first), or some: make test PYTEST_ARGS="-x -k NAME"
	@if ls $(VENV)/lib/python3*/site-packages | grep -qi '^opkit_.*dist-info'; then \
	  echo "== taking installed plugins out of $(VENV): the tests start without any"; \
	  ls $(VENV)/lib/python3*/site-packages | sed -n 's/^\(opkit_.*\)-[^-]*\.dist-info$$/\1/p' \
	    | xargs $(PIP) uninstall --quiet --yes; \
	fi
	@status=0; \
	for tests in $(if $(PYTEST_ARGS),,plugins/*/tests); do \
	  [ -d "$$tests" ] || continue; \
	  echo "== $$tests"; \
	  PYTHONPATH=$(CURDIR)/$(PLUGINS) $(BIN)/python -m pytest "$$tests" || status=$$?; \
	done; \
	echo "== tests, and the examples in the docstrings"; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) || status=$$?; \
	exit $$status

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	@echo "clang-format --dry-run"; $(NATIVE) | xargs -r $(BIN)/clang-format --dry-run -Werror

bench: $(READY) ## measure opkit against its peers (minutes)
	@for script in tests/benchmarks/[!_]*.py; do \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

soak: $(READY) ## run the long campaigns: property tests with 5000 examples each, builders killed at random
	$(BIN)/python -m pytest -m "soak or hypothesis" --hypothesis-profile=soak $(PYTEST_ARGS)

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info plugins/*/build plugins/*/*.egg-info demo-output
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found=missing; \
	  echo "opkit needs Python 3.10 or newer and '$(PYTHON)' is $$found: name another one, as in make test PYTHON=python3.11." >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "opkit compiles kernels and there is no C++ compiler: install g++ or clang, or set CXX." >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { \
	  echo "== creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "== installing $$(grep ^torch== constraints.txt), the largest part"
	$(PIP) install -c constraints.txt $$(grep ^torch== constraints.txt)
	@echo "== installing opkit and what its tests and tools need"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# The plugins live outside the virtual environment, so that only their own tests see them.
$(PLUGINS)/.ready: $(READY) $(shell find plugins -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*' 2>/dev/null)
	@rm -rf $(PLUGINS) && mkdir -p $(PLUGINS)
	@plugins=$$(for file in plugins/*/pyproject.toml; do [ -f "$$file" ] && echo "./$$(dirname $$file)"; done); \
	[ -z "$$plugins" ] || { \
	  echo "== installing" $$plugins "for their own tests"; \
	  $(PIP) install --no-deps -c constraints.txt --target $(PLUGINS) numba llvmlite $$plugins; }
	@touch $@
