# make quickstart   the whole path on the embedded world: starter, classifier, policy, test
# make test         the test suite
# make test-fast    the test suite without what is marked as slow
# make ablation     each part of the quickstart's policy exchanged for another; goes on where it stopped
# make lint         ruff, mypy, and the words of docstrings and names
# make vllm-test    the policy stage through a real vLLM server, in an environment of its own
SEED ?= 0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := $(BIN)/python main.py
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: help quickstart test test-fast ablation vllm-test lint format clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

# Made anew only when the requirements change.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.12 ...')"
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

quickstart: $(READY)  ## Starter, reward classifier, policy and its test on the embedded world (SEED=0)
	$(RUN) fit --config configs/quickstart/starter.yaml --seed_everything $(SEED)
	$(RUN) predict --config configs/quickstart/starter.yaml --seed_everything $(SEED) --ckpt_path last
	$(RUN) fit --config configs/quickstart/reward.yaml --seed_everything $(SEED)
	$(RUN) fit --config configs/quickstart/policy.yaml --seed_everything $(SEED)
	$(RUN) test --config configs/quickstart/policy.yaml --seed_everything $(SEED) --ckpt_path last

test: $(READY)  ## The test suite, a process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)  ## The test suite without what is marked as slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow"

ablation: $(READY)  ## Each part of the quickstart's policy exchanged for another, three seeds (an hour; goes on where it stopped)
	$(BIN)/python benchmarks/ablation.py

# What is pinned there is complete, and the server's requirements have no place in the project's own environment.
$(VLLM_READY): benchmarks/vllm_server/requirements.txt
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r benchmarks/vllm_server/requirements.txt
	touch $@

vllm-test: $(READY) $(VLLM_READY)  ## The policy stage through a real vLLM server on this machine (3 GB of packages)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vllm_quickstart.py --python $(VLLM_VENV)/bin/python

lint: $(READY)  ## Style, types and words
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --config-file setup.cfg
	$(BIN)/python tools/check_words.py

format: $(READY)  ## Put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove the environments, not the outputs
	rm -rf $(VENV) $(VLLM_VENV)
