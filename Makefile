# The two commands of the README are `make demo` and `make test`; both make what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow versions real-graphs fuzz check format docs bench clean

# One stamp for each set of extras: the install runs again when what it depends on changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[torch,rtx]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[torch,rtx,dask,lerobot,dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	mkdir -p demo
	$(BIN)/pi05c export --random --config pi05_tiny --seed 0 -o demo/model.onnx
	$(BIN)/pi05c demo/model.onnx --passes default --target sm120 -o demo/engine
	$(BIN)/pi05c verify demo/engine

test: check
	$(BIN)/pi05c golden check golden
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=40 tests

# More recipes, calibration sets and passes than `make test` has the time for.
slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests

# The oldest version of each dependency (constraints-oldest.txt) and the newest, with Python 3.10 and 3.12 where they are
# on the PATH or pyenv has them, else with $(PYTHON). Without torch, which is large and which only the export needs: tests
# that need it skip themselves. The tests are those of what versions decide: reading and writing graphs, the texts and
# numbers of passes, onnxruntime's operators, TensorRT-RTX's builder, and the command line.
VERSIONS := oldest newest
OLDEST_PYTHON = $(call python,3.10)
NEWEST_PYTHON = $(call python,3.12)
python = $(firstword $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python) $(PYTHON))

.venv-oldest/.done: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[rtx,lerobot]' $(TESTING)
	touch $@

.venv-newest/.done: FORCE
	test -x .venv-newest/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[rtx,lerobot]' $(TESTING)
	touch $@

TESTING := pytest pytest-xdist hypothesis
VERSION_TESTS := tests/graph tests/cases tests/backend tests/passes/test_golden.py tests/passes/test_refusals.py \
	tests/passes/test_pipeline.py tests/passes/test_onnx_corpus.py \
	$(patsubst %,tests/driver/test_%.py,cli compile failures lerobot report polygraphy)

FORCE:

versions: $(VERSIONS:%=.venv-%/.done)
	for version in $(VERSIONS); do \
		.venv-$$version/bin/python --version && .venv-$$version/bin/python -m pip list --disable-pip-version-check && \
		.venv-$$version/bin/python -m pytest -n 2 --dist worksteal $(VERSION_TESTS) || exit 1; \
	done

# Graphs of others (docs/real-graphs.md), which it compiles anew: fifteen minutes, with packages that only this needs.
REAL := .venv-real

$(REAL)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(REAL)
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,rtx]' \
		transformers silero-vad magika rapidocr-onnxruntime skl2onnx onnxconverter-common
	touch $@

real-graphs: $(REAL)/.done
	$(REAL)/bin/python benchmarks/real_graphs.py build/real-graphs docs/real-graphs.md

# Twenty times as many generated graphs as in `make test`, other ones each time; then ten minutes of bytes that look for
# a way through the loader. Atheris has wheels for Python 3.11 and later on Linux.
fuzz: $(VENV)/.fuzz
	PI05C_FUZZ=20 $(BIN)/python -m pytest -n 2 tests/passes/test_generated.py tests/passes/test_mutated.py \
		tests/graph/test_generated_files.py tests/driver/test_spoiled.py
	$(BIN)/python tests/fuzz/loader.py build/fuzz -max_total_time=600 -rss_limit_mb=4096

$(VENV)/.fuzz: constraints.txt $(VENV)/.test
	$(PIP) atheris
	touch $@

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

# The real size: 3.35 billion parameters, 25 GB of disk, half an hour on two cores. The peers have a virtual environment of
# their own; nvidia-modelopt is installed without its dependencies, which would bring CUDA.
PEERS := .venv-peers
MODELOPT := torch==2.13.0 onnx onnxruntime onnx-graphsurgeon onnxscript onnxconverter-common polygraphy nvidia-ml-py \
	pulp regex huggingface_hub cppimport lief ninja pydantic rich scipy tqdm safetensors pyyaml omegaconf

$(PEERS)/.done:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet onnxslim==0.1.98 $(MODELOPT)
	$(PEERS)/bin/python -m pip install --quiet --no-deps nvidia-modelopt==0.47.0
	touch $@

bench: $(VENV)/.demo $(PEERS)/.done
	mkdir -p full
	$(BIN)/python benchmarks/full_size.py full --peers $(PEERS)/bin/python
	$(BIN)/python benchmarks/growth.py -o full/growth.json

clean:
	rm -rf demo full .venv-peers .venv-oldest .venv-newest .venv-real build dist *.egg-info
