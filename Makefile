PYTHON ?= python3
VENV ?= .venv

.DEFAULT_GOAL := help
.PHONY: help install quickstart test slow load parity beam benchmark lint bazel lock

# TensorFlow's notes (CPU features, ends of data sets) would bury what a run prints: 2 keeps its
# errors. What it says at its import nevertheless, experiments/program.py holds back.
export TF_CPP_MIN_LOG_LEVEL ?= 2

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(VENV)/.installed  ## Create $(VENV) with exactly the locked packages

quickstart: $(VENV)/.installed  ## Pretrain and evaluate on embedded photographs, on a CPU
	$(VENV)/bin/python experiments/run.py --flagfile=quickstart.flags

test: $(VENV)/.installed  ## Run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal tests

slow: $(VENV)/.installed  ## Run the slow tests: kills, several processes, large files, large networks
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow tests

load: $(VENV)/.installed  ## Send 2000 requests to an exported encoder, some malformed
	$(VENV)/bin/python -m pytest -s tests/serving_load.py

# PyTorch and ONNX are no dependencies of the package, and Beam's packages conflict with the lock:
# what needs them has an environment of its own.
# The tests are skipped where these are not: the first line fails instead.
parity: $(VENV)-parity/.installed  ## Compare steps and weights with PyTorch, exports with ONNX
	$(VENV)-parity/bin/python -c "import torch, tf2onnx, onnxruntime, usearch.index"
	$(VENV)-parity/bin/python -m pytest tests/torch_parity_test.py tests/export_test.py \
	    tests/search_test.py -k "torch_parity or onnx or usearch"

beam: $(VENV)-beam/.installed  ## Embed a folder by Apache Beam, in two processes
	$(VENV)-beam/bin/python -c "import apache_beam"
	$(VENV)-beam/bin/python -m pytest tests/embed_beam_test.py

benchmark: $(VENV)/.installed $(VENV)-benchmark/.installed  ## Race PyTorch; ONLY=views,knn chooses, ROUNDS=2 is brief
	PYTHONPATH=. $(VENV)/bin/python benchmarks/against_pytorch.py \
	    --torch_python=$(VENV)-benchmark/bin/python $(if $(ONLY),--only=$(ONLY)) \
	    $(if $(ROUNDS),--rounds=$(ROUNDS))

lint: $(VENV)/.installed  ## Check style and imports
	$(VENV)/bin/ruff check .

bazel: $(VENV)/.installed  ## Check the Bazel graph offline, with Debian's bazel-bootstrap
	PATH="$(abspath $(VENV))/bin:$$PATH" tools/check_bazel_graph.sh

# Needs no more than the environment's python: a lock that does not install must stay repairable.
lock: $(VENV)/bin/python  ## Compile requirements_lock.txt from requirements.txt, pyproject.toml
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --extra test \
	    --custom-compile-command "make lock" --output-file requirements_lock.txt --quiet pyproject.toml

$(VENV)/bin/python $(VENV)-parity/bin/python $(VENV)-beam/bin/python $(VENV)-benchmark/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' || { \
	    echo "isd_tf needs Python 3.11 or newer. Received: PYTHON=$(PYTHON)," \
	         "which is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot create environments: ensurepip is missing." \
	         "On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

$(VENV)/.installed: requirements_lock.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --require-hashes -r requirements_lock.txt
	touch $@

$(VENV)-parity/.installed: requirements_lock.txt tests/parity_requirements.txt | $(VENV)-parity/bin/python
	$(VENV)-parity/bin/python -m pip install --require-hashes -r requirements_lock.txt
	$(VENV)-parity/bin/python -m pip install -r tests/parity_requirements.txt
	touch $@

$(VENV)-beam/.installed: requirements.txt tests/beam_requirements.txt | $(VENV)-beam/bin/python
	$(VENV)-beam/bin/python -m pip install -r requirements.txt -r tests/beam_requirements.txt
	touch $@

$(VENV)-benchmark/.installed: benchmarks/requirements.txt | $(VENV)-benchmark/bin/python
	$(VENV)-benchmark/bin/python -m pip install -r benchmarks/requirements.txt
	touch $@
