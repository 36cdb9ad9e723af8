# What can be done with this checkout; `make` alone lists it.
#
#   PYTHON       interpreter that makes the environment, 3.10 or newer: make test PYTHON=python3.11
#   TORCH_INDEX  package index that torch comes from (a Jetson's, a CUDA one, or
#                https://download.pytorch.org/whl/cpu); without it, from where pip looks anyway

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults check bench format install doctor audit clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.11 names the interpreter, TORCH_INDEX=URL the package index for torch."

demo: $(STAMP) ## run a fleet of emulated devices over MQTT, with all defaults, and name the report
	$(BIN)/pwff emulate

test: $(STAMP) ## run every test but those of test-faults, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults"

test-faults: $(STAMP) ## kill, cut and spoil a run in every way, on a real mosquitto
	$(BIN)/python -m pytest -m faults tests/faults

check: $(STAMP) ## hold style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## run every benchmark; each prints its table
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

format: $(STAMP) ## put the code into its form, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(STAMP) ## make the environment in .venv

doctor: $(STAMP) ## say what is installed, what works and what to install
	$(BIN)/pwff doctor

audit: $(STAMP) ## ask PyPI whether a weakness of an installed package is known
	@"$(PYTHON)" -m venv build/audit
	@build/audit/bin/python -m pip --disable-pip-version-check --quiet install pip-audit
	build/audit/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"

clean: ## remove the environment and all caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again when what is to be installed has changed. With TORCH_INDEX, the pinned torch is taken
# if that index has it, else its newest; whichever it is stays through the second step.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no '$(PYTHON)'; name an interpreter: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "'$(PYTHON)' is older than Python 3.10; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV); torch is large, so the first time takes some minutes."
	@"$(PYTHON)" -m venv $(VENV)
	@if [ -z "$(TORCH_INDEX)" ]; then cp constraints.txt $(PINS); else \
	  { $(PIP) install --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)" \
	    || $(PIP) install --index-url "$(TORCH_INDEX)" torch; } \
	  && grep -v '^torch==' constraints.txt > $(PINS) \
	  && $(PIP) freeze | grep '^torch==' >> $(PINS); fi
	@$(PIP) install -c $(PINS) -e '.[dev]'
	@touch $(STAMP)
