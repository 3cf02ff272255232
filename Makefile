# make quickstart   the whole path on the embedded world: starter, classifier, policy, test
# make test         the test suite
# make lint         ruff and mypy
SEED ?= 0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := $(BIN)/python main.py

.PHONY: help quickstart test lint format clean

help:  ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 14

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

test: $(READY)  ## The test suite
	$(BIN)/python -m pytest

lint: $(READY)  ## Style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --config-file setup.cfg

format: $(READY)  ## Put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove the environment, not the outputs
	rm -rf $(VENV)
