# One command each; the first one that runs sets up .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-long lint types bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[hf,dev,triton]"
	touch $@

# A Llama on two processes and on one, trained on real text; fails if the losses part.
demo: $(VENV)/ready
	$(BIN)/spcompile train models:llama --nproc 2 --dump demo-graphs $(DEMO_ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not long and not gpu" $(TEST_ARGS)

# pytest exits with 5 where no test is marked slow.
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow and not long and not gpu" $(TEST_ARGS) || [ $$? -eq 5 ]

# Every kernel configuration compiled for every GPU, and kernels interpreted on large grids: hours.
test-long: $(VENV)/ready
	$(BIN)/python -m pytest -m "long and not gpu" $(TEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# On an installed copy: type checkers do not follow the mapping of passes/ to spcompile.passes.
types: $(VENV)/ready
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p spcompile

bench: $(VENV)/ready
	$(BIN)/python benchmarks/scaling_cpu.py

clean:
	rm -rf $(VENV) build dist demo-graphs *.egg-info
