# The two commands of the README are `make demo` and `make test`; both make what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format docs full clean

# One stamp for each set of extras: the install runs again when what it depends on changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[torch,rtx]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[torch,rtx,dask,dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	mkdir -p demo
	$(BIN)/pi05c export --random --config pi05_tiny --seed 0 -o demo/model.onnx
	$(BIN)/pi05c demo/model.onnx --passes default --target sm120 -o demo/engine
	$(BIN)/pi05c verify demo/engine

test: check
	$(BIN)/pi05c golden check golden
	$(BIN)/python -m pytest -n 2 tests

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p pi05c
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One page a pass, of docstrings and golden texts.
docs: $(VENV)/.test
	$(BIN)/python -m pi05c.passdocs golden docs/passes

# The real size: 3.35 billion parameters, about 20 GB of disk, 15 minutes on two cores.
full: $(VENV)/.demo
	mkdir -p full
	$(BIN)/python benchmarks/full_size.py full

clean:
	rm -rf demo full build dist *.egg-info
