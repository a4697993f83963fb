# For a new user: `make train`, `make test` and, for a cluster, `make up`. Everything lives below this folder, but for what servers
# hold, which lies in the user's cache.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Data sets, runs, samples and the MLflow database of `make train`.
ROOT   ?= $(CURDIR)/yard
PRESET ?= digits
FLAGS  ?=
PORT   ?= 5000

.PHONY: train test test-ray test-others test-faults lint audit ui up down clean

train: $(VENV)/.installed  ## real images → trained network → samples → score → pictures
	$(BIN)/python jobs/train.py $(PRESET) --root $(ROOT) $(FLAGS)

test: $(VENV)/.installed-test  ## the whole suite, in two processes at once
	$(MAKE) -j2 test-ray test-others

test-ray: $(VENV)/.installed-test  # one cluster at a time
	$(BIN)/python -m pytest -m ray

test-others: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not ray"

test-faults: $(VENV)/.installed-test  ## what docs/faults.md promises: kills, hangs, lost nodes, bad storage
	$(BIN)/python -m pytest tests/faults tests/jobs/test_road.py tests/jobs/test_s3_road.py \
		tests/pipelines/test_exactness.py tests/pipelines/test_foreman.py tests/pipelines/test_watch.py \
		tests/pipelines/test_checkpoints.py tests/pipelines/test_saver.py tests/pipelines/test_fit.py \
		tests/pipelines/test_plan.py tests/pipelines/test_outage.py tests/pipelines/test_layouts.py \
		tests/jobs/test_bad_input.py

lint: $(VENV)/.installed-test  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(VENV)/.installed-test  ## what is pinned: known vulnerabilities, and what the registry has taken back
	$(BIN)/python infra/audit.py constraints.txt

ui: $(VENV)/.installed  ## compare runs at http://127.0.0.1:5000, or another PORT
	exec env MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --backend-store-uri sqlite:///$(ROOT)/mlflow.db --host 127.0.0.1 --port $(PORT)

up: $(VENV)/.installed-server  ## a cluster on this machine: S3, PostgreSQL, MLflow and three nodes of Ray
	STACK_BIN=$(abspath $(BIN)) infra/local/up >/dev/null  # which holds secrets
	infra/local/stack.sh status

down:  ## stop it; what it holds stays
	infra/local/down

clean:  ## remove what the jobs made; the environment stays
	rm -rf $(ROOT)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing 2.3 GB below $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-server: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[server]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
