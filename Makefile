# Every target sets up what it needs by itself; .venv is made once and refreshed when a lock file changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo-release
PYTEST_FLAGS ?=
TEST_PROCESSES ?= 2
CHAOS_FLAGS ?=
PEERS_FLAGS ?=

.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(VENV)/.run: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.test: requirements-test.lock $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.lock
	@touch $@

demo: $(VENV)/.run ## Convert the shipped model to GPTQ and AWQ, publish to demo-release/, verify what was published
	@mkdir -p $(DEMO_DIR)
	$(BIN)/bitmill plan jobs/demo/model --variant gptq-w4-g128 --variant awq-w4-g128 --samples 32
	$(BIN)/bitmill convert jobs/demo/model --variant gptq-w4-g128 --variant awq-w4-g128 --samples 32 \
	    --release demo/bitmill-demo --to $(DEMO_DIR) --work-dir $(DEMO_DIR)/work
	$(BIN)/bitmill verify $(DEMO_DIR)/releases/demo/bitmill-demo-gptq-w4-g128
	$(BIN)/bitmill verify $(DEMO_DIR)/releases/demo/bitmill-demo-awq-w4-g128

# In the order of the folders: files of few and long tests come first, and short ones fill the end.
test: $(VENV)/.test ## Run the tests, two files at a time; TEST_PROCESSES=1 for one
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-engines: $(VENV)/.test ## Load releases in real engines; installs their environments on first use (gigabytes)
	$(BIN)/python -m pytest -m engines tests/engines $(PYTEST_FLAGS)

# In a folder of its own: beside it torch and transformers import more, and nothing else here is for a GPU.
$(VENV)/triton: tests/kernels/triton.txt $(VENV)/.test
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

test-kernels: $(VENV)/triton ## Run the GPU's loops in Triton's interpreter, and compile them; installs a gigabyte on first use
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -m kernels tests/kernels $(PYTEST_FLAGS)

chaos: $(VENV)/.run ## Kill a long conversion 30 times and compare bytes; CHAOS_FLAGS="--kills 60 --seed 1" to change it
	$(BIN)/python benchmarks/chaos.py $(CHAOS_FLAGS)

peers: $(VENV)/.run ## Bitmill against other tools, installed on first use (gigabytes); PEERS_FLAGS="--model FOLDER --repeat 3"
	$(BIN)/python -m benchmarks.peers $(PEERS_FLAGS)

check: $(VENV)/.test ## Format, lint and types
	$(BIN)/ruff format --check pipeline jobs tests benchmarks
	$(BIN)/ruff check pipeline jobs tests benchmarks
	$(BIN)/mypy

docs: $(VENV)/.test ## Write docs/reference from the spec models and --help
	$(BIN)/python -m jobs.cli.reference docs/reference

lock: $(VENV)/.test ## Write the lock files anew
	$(BIN)/pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --no-emit-find-links --no-emit-index-url --strip-extras -o requirements.lock pyproject.toml
	$(BIN)/pip-compile --quiet --no-emit-find-links --no-emit-index-url --strip-extras --extra test -o requirements-test.lock pyproject.toml
	sed -i 's/^torch==\([0-9.]*\)+.*/torch==\1/' requirements.lock requirements-test.lock  # the pin, not the build

clean: ## Remove what the targets made here
	rm -rf $(VENV) $(DEMO_DIR) peers *.egg-info

.PHONY: help demo test test-engines test-kernels chaos peers check docs lock clean
