# make compare   sets up and runs the main job        make test       sets up and passes the tests
# make test-all  the tests, then the whole transparency matrix (hours on 2 cores); stopped, it goes on where it was
# make test-oldest  the transparency suite on the oldest torch of the stated range, in .venv-oldest; likewise
# Flags for the main job: make compare ARGS="--network impala --width 2"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.tested-set
OLDEST := 2.11.0
JOBS ?= 3
# One process more than two cores, as some tests wait. A file's tests stay in one: they share what is slow to make. Printed
# at the end: the slowest.
PARALLEL := -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: compare test test-all test-oldest checks

compare: $(READY)
	$(BIN)/mpdqn compare $(ARGS)

test: checks
	$(BIN)/pytest $(PARALLEL) -m "not matrix"

test-all: test
	$(BIN)/pytest -q -m matrix --passed results/test-all.jsonl

test-oldest: .venv-oldest/.tested-set
	.venv-oldest/bin/pytest -q -m "not matrix" --passed results/test-oldest.jsonl \
	  tests/test_transparency.py tests/test_teeth.py tests/pipeline tests/schedule

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

# torch brings its own CUDA libraries and triton; the rest is the tested set.
.venv-oldest/.tested-set: pyproject.toml constraints.txt
	@echo "Setting up .venv-oldest with torch $(OLDEST) (about 6 GB, 2 minutes) …"
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(torch|triton|cuda-.*|nvidia-.*)==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c .venv-oldest/constraints.txt "torch==$(OLDEST)" -e ".[dev]"
	@touch $@
