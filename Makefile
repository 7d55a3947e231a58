# One command each; the first one that runs sets up .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two of pytest's processes: one for the tests that spawn ranks, one for the others (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
# Every process that the tests start would compile the package and the tests to bytecode again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-manual lint types docs bench coverage clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[hf,dev,triton]"
	touch $@

# A Llama on two processes and on one, trained on real text; fails if the losses part.
demo: $(VENV)/ready
	$(BIN)/spcompile train models:llama --nproc 2 --dump demo-graphs $(DEMO_ARGS)

# Of tests marked thinned(n) one case in n runs, chosen by the number of commits: docs/testing.md.
# TEST_ARGS="--thinning-seed 7" gives that number, TEST_ARGS=--all-cases leaves nothing out.
test: $(VENV)/ready
	$(PYTEST) -m "not slow and not manual" $(TEST_ARGS)

test-slow: $(VENV)/ready
	$(PYTEST) -m "slow and not manual" $(TEST_ARGS)

# Every kernel configuration compiled for every GPU, and kernels interpreted on large grids: hours.
test-manual: $(VENV)/ready
	$(PYTEST) -m manual $(TEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# On an installed copy: type checkers do not follow the mapping of passes/ to spcompile.passes.
types: $(VENV)/ready
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p spcompile

# docs/ as a site, into build/site; a link that leads nowhere fails.
docs: $(VENV)/ready
	$(BIN)/python -m mkdocs build

bench: $(VENV)/ready
	$(BIN)/python benchmarks/scaling_cpu.py

# Models of transformers and of the packages of packages.txt against themselves, two ranks each: hours. Writes docs/coverage.md.
coverage: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps -r benchmarks/coverage/packages.txt
	$(BIN)/python benchmarks/coverage $(COVERAGE_ARGS)

clean:
	rm -rf $(VENV) build dist demo-graphs *.egg-info
