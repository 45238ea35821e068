# Two commands from a fresh clone: `make study` and `make test`. Each sets up .venv by itself, once.
SHELL := /bin/bash
BIN := .venv/bin
STUDY ?= configs/studies/cifar10_cpu.yaml
UI_PORT ?= 5000
TEST_WORKERS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help install study test prove ui lint types clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: .venv/.installed  ## set up .venv (the other targets do it by themselves)

.venv/.installed: pyproject.toml constraints.txt install.sh
	@./install.sh

study: .venv/.installed  ## train and evaluate the CPU study on CIFAR-10, fit its laws (STUDY=file for another)
	@$(BIN)/python -m data_pipeline.prepare cifar10 --out data/cifar10
	@$(BIN)/python -m cluster.study run $(STUDY)

ui: .venv/.installed  ## open the MLflow UI on loopback (UI_PORT=5000)
	@$(BIN)/python -m cluster.ui --port $(UI_PORT)

test: .venv/.installed  ## the test suite, file by file in two processes (TEST_WORKERS=1 for one)
	$(BIN)/python -m pytest -m "not prove" -n $(TEST_WORKERS) --dist loadfile

prove: .venv/.installed  ## the long proofs
	$(BIN)/python -m pytest -m prove

lint: .venv/.installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed  ## mypy
	$(BIN)/mypy

clean:  ## remove caches (not data, runs or .venv)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build ./*.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
