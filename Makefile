# One command each; the first one that runs sets up .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two of pytest's processes: one for the tests that spawn ranks, one for the others (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

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
	$(PYTEST) -m "not slow and not long and not gpu" $(TEST_ARGS)

# pytest exits with 5 where no test is marked slow.
test-slow: $(VENV)/ready
	$(PYTEST) -m "slow and not long and not gpu" $(TEST_ARGS) || [ $$? -eq 5 ]

# Every kernel configuration compiled for every GPU, and kernels interpreted on large grids: hours.
test-long: $(VENV)/ready
	$(PYTEST) -m "long and not gpu" $(TEST_ARGS)

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
