# `make help` lists the targets. Packages come from whatever index pip is configured for.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

REQUIREMENTS := setup.py pyproject.toml constraints.txt
# The folder itself is listed too: its time changes when a module is removed.
SOURCES := modeling_snn_bert $(wildcard modeling_snn_bert/*.py modeling_snn_bert/*/*.py csrc/*)

# Each stamp says that its step was done after its prerequisites last changed.
EXAMPLES_STAMP := $(VENV)/.installed-examples
TESTS_STAMP := $(VENV)/.installed-tests
PACKAGE_STAMP := $(VENV)/.installed-package

# setuptools would put modules that are long gone from the sources into the package, if it found them in build/.
REMOVE_BUILD := rm -rf build dist snn_bert.egg-info

.DEFAULT_GOAL := help
# pip installs must not run side by side in one environment.
.NOTPARALLEL:
.PHONY: help demo test lint bench docs wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 make ... takes another Python (3.10 or newer) for a new environment in $(VENV)."

# Training allocates and frees large tensors all the time. With these settings glibc keeps the memory, which saves the
# page faults (some tenth of the time).
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

demo: $(EXAMPLES_STAMP) $(PACKAGE_STAMP) ## Run examples/quickstart.py; its results go to outputs/quickstart
	$(KEEP_MEMORY) $(BIN)/python examples/quickstart.py

# The `pytest` command, unlike `python -m pytest`, leaves the working directory off sys.path, so the tests see the
# installed package; tests/test_packaging.py checks that where SNN_BERT_TEST_INSTALLED is set.
test: lint ## Run the linters, then all tests on the installed package
	OMP_NUM_THREADS=1 SNN_BERT_TEST_INSTALLED=1 $(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(TESTS_STAMP) $(PACKAGE_STAMP) ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(EXAMPLES_STAMP) $(PACKAGE_STAMP) ## Run benchmarks/run.py; tables as JSON go to outputs/benchmarks
	$(PIP_INSTALL) --no-deps spikingjelly loguru
	$(KEEP_MEMORY) $(BIN)/python benchmarks/run.py $(BENCH_ARGS)

docs: $(TESTS_STAMP) $(PACKAGE_STAMP) ## Build guides and API reference as a site, in outputs/docs
	$(BIN)/python docs/build_site.py outputs/docs

wheel: | $(BIN)/python ## Build the wheel with compiled CPU kernels, to outputs/wheels; ARCHITECTURE=aarch64 builds it for ARM
	$(PIP_INSTALL) auditwheel
	$(BIN)/python build_wheel.py $(if $(ARCHITECTURE),--architecture $(ARCHITECTURE))

clean: ## Remove the environment, build products and caches
	rm -rf $(VENV) build dist snn_bert.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, but '$(PYTHON)' is not: set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXAMPLES_STAMP): $(REQUIREMENTS) | $(BIN)/python
	$(REMOVE_BUILD)
	$(PIP_INSTALL) ".[examples]"
	$(REMOVE_BUILD)
	touch $@ $(PACKAGE_STAMP)

$(TESTS_STAMP): $(REQUIREMENTS) | $(BIN)/python
	$(REMOVE_BUILD)
	$(PIP_INSTALL) ".[tests]"
	$(REMOVE_BUILD)
	touch $@ $(EXAMPLES_STAMP) $(PACKAGE_STAMP)

$(PACKAGE_STAMP): $(SOURCES) setup.py | $(BIN)/python
	$(REMOVE_BUILD)
	$(PIP_INSTALL) --no-deps --force-reinstall .
	$(REMOVE_BUILD)
	touch $@
