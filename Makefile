# `make` lists the targets. Python and the device are chosen so: make test PYTHON=python3.12; make device DEVICE=tpu
PYTHON ?= python3
DEVICE ?= gpu
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help
help:  ## lists the targets
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / {printf "make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV) (about 1.5 GB; some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: sweep test test-weekly lint pages docs aot-tpu aot-cuda device
sweep: $(VENV)/installed  ## scores a 135M-parameter model under seven caches: a table and runs/sweep/pareto.png
	@echo "scoring seven caches (some minutes on two cores; a second run goes on where the first stopped)"
	$(RUN) -m experiments.perplexity --config=configs/perplexity.py --workdir=runs/sweep

test: $(VENV)/installed  ## the test suite
	@echo "running the tests (25 to 45 minutes on two cores)"
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile

test-weekly: $(VENV)/installed  ## the long tests that the suite leaves out
	@echo "running the weekly tests (hours on two cores)"
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile -m weekly

lint: $(VENV)/installed  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

pages: $(VENV)/installed  ## writes the tables of README and docs from results/*.jsonl, and draws their pictures
	$(RUN) -m experiments.pages

docs: .venv-docs/installed  ## the pages as a site, in site/; every warning is an error
	.venv-docs/bin/python -m mkdocs build --strict --quiet

# libtpu takes a lock for a device that is not there: two processes may both have it.
aot-tpu aot-cuda: aot-%: .venv-%/installed  ## compiles the kernels for TPUs or GPUs that are not here
	@echo "compiling for devices that are not here (up to an hour)"
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu .venv-$*/bin/python -m $(AOT_$*) --workdir=runs/aot

AOT_tpu := experiments.aot --config=configs/aot.py:tpu
AOT_cuda := experiments.aot_cuda --config=configs/aot_cuda.py
EXTRA_tpu := tpu
EXTRA_cuda := aot-cuda
EXTRA_docs := docs

.venv-%/installed: pyproject.toml
	@echo "installing into .venv-$* (some minutes the first time)"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[$(EXTRA_$*)]'
	touch $@

device:  ## on a machine with a GPU or TPU, and jax for it: parity of the kernels, then their speed
	$(PYTHON) -m pytest -p no:cacheprovider tests/pallas_kernels
	$(PYTHON) -m experiments.throughput --config=configs/throughput.py:$(DEVICE) --workdir=runs/device
