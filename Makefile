# Two commands do everything on a fresh machine with Python 3.11 and a C compiler:
#   make demo    the main job on real text: a run killed again and again equals one that was not
#   make test    all tests
# Both make their own virtual environment on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .oldest/site-packages
# the oldest accelerate calls the device of a CPU rank "cpu:0", which torch.load of the host's own Trainer refuses
HOST_ALONE := --deselect tests/adapters/test_other_ranks.py::test_two_ranks_of_ours_go_on_in_the_hosts_own

.PHONY: demo test check lint types layers fast sweep stock-trainers oldest clean

demo: $(READY)
	$(BIN)/unbroken demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

check: lint types layers test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not sweep"

sweep: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m sweep

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

stock-trainers: $(READY)  # writes docs/stock-trainers.md; about five minutes
	$(BIN)/python benchmarks/stock_trainers.py

oldest: $(READY)  # the adapter's tests with the oldest versions that it fits; not in CI
	$(BIN)/python -m pip install --quiet --upgrade --target $(OLDEST) transformers==5.3.0
	$(BIN)/python -m pip install --quiet --upgrade --target $(OLDEST) --no-deps accelerate==1.10.0
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not stock" tests/adapters --ignore tests/adapters/test_fsdp.py $(HOST_ALONE)

clean:
	rm -rf $(VENV) .oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis runs
