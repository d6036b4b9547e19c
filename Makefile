# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0

.PHONY: help demo test test-all accuracy docs clean

help:
	@echo "make demo      install, then plan, run and diff a tiny training run on this machine"
	@echo "make test      install, then lint, type-check and test"
	@echo "make test-all  the same with the slow tests and new random inputs"
	@echo "make accuracy  regenerate docs/accuracy.md: about 40 minutes on an idle machine"
	@echo "make docs      regenerate docs/commands.md and the output in README.md"

demo: $(STAMP)
	@$(VENV)/bin/forerun demo

test: $(STAMP)
	@scripts/check

test-all: $(STAMP)
	@scripts/check -m "not gpu" --hypothesis-profile random

accuracy: $(STAMP)
	@$(VENV)/bin/forerun profile
	@$(VENV)/bin/python benchmarks/bench_cpu_families.py --model tiny-1m --rounds 2 --steps 5
	@$(VENV)/bin/python benchmarks/fit_stacks.py tests/validation/published_dev.csv --report docs/accuracy.md

docs: $(STAMP)
	@scripts/docs --demo

clean:
	rm -rf $(VENV)

# torch goes first: the rest then keeps the version that is there.
$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (torch is large: minutes without a package cache) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[run,fast,dev]'
	@touch $(STAMP)
