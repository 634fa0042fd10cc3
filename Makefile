# make train: sets up, then trains on the embedded digits.    make test: sets up, then checks everything.
# make compare: sets up, then trains the systems of a comparison and writes a page of them.
PYTHON ?= python3
PROCESSES ?= 1
RECIPE ?= digits-vaegan-ternary
COMPARISON ?= compare-digits
ARGS ?=

BIN := .venv/bin
THREADS := $(shell n=$$(nproc); echo $$(( n > $(PROCESSES) ? n / $(PROCESSES) : 1 )))
# One process needs no launcher, whose own imports take as long as the trainer's.
LAUNCH := PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(filter-out 1,$(PROCESSES)),accelerate launch --quiet \
	--config_file launch/accelerate.yaml --multi_gpu --num_processes $(PROCESSES) \
	--num_cpu_threads_per_process $(THREADS),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} python)

.PHONY: train compare bench test test-slow test-gpu test-slurm lint docs setup ready data board

train: setup
	@$(LAUNCH) trainer/main.py --config launch/recipes/$(RECIPE).yaml $(ARGS)

compare: setup
	$(BIN)/python -m trainer.compare --config launch/recipes/$(COMPARISON).yaml $(ARGS)

# `make bench ARGS="step growth"` measures these only; `make bench ARGS=--help` lists all.
bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# Three processes on two cores: for a fifth of their time tests wait for other processes. Those that they start would
# compile the project each, if bytecode were not written.
test: setup lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n 3 --dist worksteal $(ARGS)

test-slow: setup
	$(BIN)/pytest -q -m slow $(ARGS)

test-gpu: setup
	$(BIN)/pytest -q -m gpu -rs $(ARGS)

test-slurm: setup
	sh tests/slurm/install.sh
	$(BIN)/pytest -q -m slurm -rs $(ARGS)

lint: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run launch/*.sh launch/*/*.sh tests/slurm/*.sh
	$(BIN)/hadolint launch/container/Dockerfile

# Strict: a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Where there is flock, a second make waits for the first.
setup:
	@$(if $(shell command -v flock),flock .setup.lock) $(MAKE) --no-print-directory ready

ready: .venv/.done datasets/digits
	@:

data: datasets/digits

.venv/.done: pyproject.toml constraints.txt launch/setup.sh
	sh launch/setup.sh "$(PYTHON)"
	touch $@

datasets/digits: | .venv/.done
	$(BIN)/python -m data.prepare digits $@

board: setup
	$(BIN)/tensorboard --logdir runs
