# make compare   sets up and runs the main job        make test       sets up and passes the tests
# make test-all  the tests with the whole transparency matrix (hours on 2 cores)
# Flags for the main job: make compare ARGS="--network impala --width 2"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.tested-set

.PHONY: compare test test-all checks

compare: $(READY)
	$(BIN)/mpdqn compare $(ARGS)

test: checks
	$(BIN)/pytest -q -m "not matrix"

test-all: checks
	$(BIN)/pytest -q

checks: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"mpdqn needs Python 3.11 or newer, but $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.11 …")'
	@echo "Setting up .venv with the tested set of packages (about 6 GB, 2 minutes) …"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
