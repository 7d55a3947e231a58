# One command each; the first one that runs sets up .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint types docs clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf,dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/spcompile train models:llama --nproc 2 $(DEMO_ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy -p spcompile

clean:
	rm -rf $(VENV) build dist *.egg-info
