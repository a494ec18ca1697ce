# Targets carry their help text after "##"; `make` alone prints them.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH ?= *
# For which the wheels carry the native core; a torch that is not named builds its own.
TORCHES ?= 2.11.0 2.12.0 2.12.1 2.13.0 2.14.0 2.14.1 2.15.0
VERSION ?=

VENV := .venv
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CONSTRAINTS := constraints.txt
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLUGINS := build/test-plugins
CALLS := tests/dispatch tests/transforms tests/kernels/test_rms_norm.py \
  $(patsubst %,tests/test_%.py,adopt chains op overload prepare refusals registry signatures upstream_pains) \
  --ignore=tests/dispatch/test_native_build.py --ignore=tests/transforms/test_fingerprint.py  # in processes of their own
AGAIN := $(MAKE) --no-print-directory  # under this name, as a dry run runs lines with $(MAKE)
# Most of these start processes.
BESIDE := tests/plugins tests/cli tests/docs tests/testing/test_plugin_kit.py tests/test_examples.py tests/test_readme.py
# The suite that each plugin's TestPlugin is, run once: on all of them, from their wheels.
FROM_WHEELS := tests/plugins/test_wheels.py
WHEELS := build/wheels
CORE := $(BIN)/python -m opkit build --native
OF_CORE := tests/dispatch/test_native_path.py tests/dispatch/test_native_life.py
NATIVE := find opkit kernels plugins examples tests -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) 2>/dev/null

.DEFAULT_GOAL := help
.PHONY: help demo test beside lint docs bench soak sanitize test-torch bench-torch wheels carry carry-torch clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## show what opkit does, on this machine (sets everything up first)
	-@$(CORE)
	$(BIN)/python examples/demo/run.py

test: $(READY) $(PLUGINS)/.ready ## run every test (sets everything up first), or some: make test PYTEST_ARGS="-x -k NAME"
	@if ls $(VENV)/lib/python3*/site-packages | grep -qi '^opkit_.*dist-info'; then \
	  echo "== taking installed plugins out of $(VENV): the tests start without any"; \
	  ls $(VENV)/lib/python3*/site-packages | sed -n 's/^\(opkit_.*\)-[^-]*\.dist-info$$/\1/p' \
	    | xargs $(PIP) uninstall --quiet --yes; \
	fi
	@$(CORE)
	@mkdir -p build; status=0; \
	[ -n "$(PYTEST_ARGS)" ] || { \
	  echo "== meanwhile, on another core: $(notdir $(BESIDE)), plugins, calls through the native core"; \
	  echo "   what they print follows, and is in build/test-beside.log"; \
	  $(AGAIN) beside > build/test-beside.log 2>&1 & beside=$$!; \
	  trap 'kill $$beside' INT TERM; \
	}; \
	echo "== tests, and the examples in the docstrings"; \
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),$(BESIDE:%=--ignore=%)) || status=$$?; \
	[ -n "$(PYTEST_ARGS)" ] || { \
	  wait $$beside || status=$$?; \
	  cat build/test-beside.log; \
	}; \
	exit $$status

# What `test` runs beside the other tests.
beside:
	@status=0; \
	for tests in plugins/*/tests $(FROM_WHEELS); do \
	  echo "== $$tests"; \
	  PYTHONPATH=$(CURDIR)/$(PLUGINS):$(CURDIR)/$(PLUGINS)-needs \
	    $(BIN)/python -m pytest "$$tests" -k "not TestPlugin" || status=$$?; \
	done; \
	echo "== $(BESIDE)"; \
	$(BIN)/python -m pytest $(BESIDE) --ignore=$(FROM_WHEELS) || status=$$?; \
	echo "== tests of calls, through the native core"; \
	OPKIT_NATIVE=1 $(BIN)/python -m pytest $(CALLS) || status=$$?; \
	exit $$status

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	@echo "clang-format --dry-run"; $(NATIVE) | xargs -r $(BIN)/clang-format --dry-run -Werror

docs: $(READY) ## build the documentation, which opens from its folder, too (needs Python 3.11)
	@rm -rf build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file tests/docs/mkdocs.yml
	@echo "build/site/index.html"

bench: $(READY) ## measure opkit against its peers (minutes), or some of it: make bench BENCH=call
	@$(CORE)
	@for script in tests/benchmarks/$(if $(filter *,$(BENCH)),[!_]*,$(BENCH)).py; do \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

soak: $(READY) ## run the long campaigns: 5000 examples of each property, builders killed at random, kernels under ASan
	$(BIN)/python -m pytest -m "soak or hypothesis" --hypothesis-profile=soak $(PYTEST_ARGS)
	$(call under,address$(comma)undefined,asan ubsan,tests/kernels -k "not inductor")

sanitize: $(READY) ## run the native core's tests under AddressSanitizer and UBSan, those with threads under ThreadSanitizer
	$(call under,address$(comma)undefined,asan ubsan,$(OF_CORE))
	$(call under,thread,tsan,$(OF_CORE) -k "thread and not interpreter")

test-torch: ## run every test on another torch, in an environment of its own: make test-torch VERSION=2.15.0
	$(call on_other_torch,test)

bench-torch: ## measure on another torch, likewise: make bench-torch VERSION=2.15.0 BENCH=call
	$(call on_other_torch,bench)

wheels: $(READY) ## build a wheel in dist/ that carries the native core for some torches: make wheels TORCHES="2.13.0 2.15.0"
	@rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	@cp -r opkit opkit_boot.py kernels pyproject.toml setup.py README.md LICENSE $(WHEELS)
	+@for version in $(TORCHES); do \
	  [ $$version = $(TORCH) ] && how=carry || how="carry-torch VERSION=$$version"; \
	  $(MAKE) --no-print-directory $$how || exit 1; \
	done
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist ./$(WHEELS)
	@ls -l dist/*.whl

carry: $(READY)
	@echo "== the native core for torch $(TORCH)"
	@PYTHONPATH=$(CURDIR)/$(WHEELS) $(BIN)/python -m opkit.dispatch.native $(WHEELS)/opkit/dispatch/native/prebuilt

carry-torch:
	$(call on_other_torch,carry)

clean: ## remove the virtual environments and everything built
	rm -rf $(VENV) .torch-* build dist *.egg-info plugins/*/build plugins/*/*.egg-info demo-output
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Builds the core and kernels with sanitizers, in a cache of its own, and runs tests in a Python that has these
# preloaded. What else compiles with CXX, as Inductor does, takes no flags there.
# Python and torch are not built with them: what they never free is no finding, and order that they keep is unseen.
comma := ,
define under
@echo "== $(1)"
@OPKIT_CACHE_DIR=$(CURDIR)/build/sanitize-$(firstword $(2)) CXX="$(CXX) -fsanitize=$(1) -fno-omit-frame-pointer -g1" \
  $(CORE)
@OPKIT_CACHE_DIR=$(CURDIR)/build/sanitize-$(firstword $(2)) OPKIT_NATIVE=1 \
  CXX="$(CXX) -fsanitize=$(1) -fno-omit-frame-pointer -g1" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  LD_PRELOAD="$(foreach name,$(2),$(shell $(CXX) -print-file-name=lib$(name).so))" \
  $(BIN)/python -m pytest -s $(3) $(PYTEST_ARGS)
endef

# CUDA's libraries come in the versions that this torch asks for, everything else as in constraints.txt.
define on_other_torch
@[ -n "$(VERSION)" ] || { echo "VERSION is missing: make $@ VERSION=2.15.0" >&2; exit 1; }
@mkdir -p build
@sed 's/^torch==.*/torch==$(VERSION)/; /^nvidia-/d' constraints.txt > build/constraints-torch-$(VERSION).txt
+@$(MAKE) --no-print-directory $(1) VENV=.torch-$(VERSION) TORCH=$(VERSION) \
  CONSTRAINTS=build/constraints-torch-$(VERSION).txt PLUGINS=build/test-plugins-torch-$(VERSION)
endef

# The stamp is written last, so an interrupted set-up is taken up again.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found=missing; \
	  echo "opkit needs Python 3.10 or newer and '$(PYTHON)' is $$found: name another one, as in make test PYTHON=python3.11." >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "opkit compiles kernels and there is no C++ compiler: install g++ or clang, or set CXX." >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { \
	  echo "== creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "== installing torch $(TORCH) into $(VENV), the largest part"
	$(PIP) install -c $(CONSTRAINTS) torch==$(TORCH)
	@echo "== installing opkit and what its tests and tools need"
	$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# The plugins live outside the virtual environment, so that only their own tests see them.
$(PLUGINS)/.ready: $(READY) $(PLUGINS)-needs/.ready $(shell find plugins -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*' 2>/dev/null)
	@rm -rf $(PLUGINS) && mkdir -p $(PLUGINS)
	@plugins=$$(for file in plugins/*/pyproject.toml; do [ -f "$$file" ] && echo "./$$(dirname $$file)"; done); \
	[ -z "$$plugins" ] || { \
	  echo "== installing" $$plugins "for their own tests"; \
	  $(PIP) install --no-deps -c $(CONSTRAINTS) --target $(PLUGINS) $$plugins; }
	@touch $@

# Large, so not installed anew with each change of a plugin. A torch for CUDA has brought the triton that it needs.
$(PLUGINS)-needs/.ready: $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)
	@echo "== installing what the plugins need for their own tests"
	$(PIP) install --no-deps -c $(CONSTRAINTS) --target $(@D) numba llvmlite jax jaxlib opt_einsum \
	  $$($(BIN)/python -c 'import triton' 2>/dev/null || echo triton)
	@touch $@
