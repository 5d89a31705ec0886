# Nothing needs to be installed before either command; both use .venv.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types bench clean

demo: .venv/ready
	$(BIN)/agentkit models pull smollm2-135m
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/agentkit models pull smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	rm -rf build/installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/ready
	$(BIN)/agentkit models pull smollm2-135m
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/drafts.py
	$(BIN)/python bench/invariance.py
	$(BIN)/python bench/sparse.py
	$(BIN)/python bench/sessions.py
	$(BIN)/python bench/accuracy.py
	$(BIN)/python bench/schemas.py
	$(BIN)/python bench/bfcl.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "agentkit needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + ": run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
