# make test: the suite.  make test-weekly: its long tests.  make sweep: the main job.  make lint: style and types.  PYTHON=python3.12 make test works too.
# make aot-tpu, make aot-cuda: the kernels compiled for devices that are not here; each installs into a folder of its own.
# make docs: the pages as a site, in site/; every warning is an error.
# make device: on a machine with a GPU or TPU and jax for it, parity of the kernels, then their speed. DEVICE=gpu or tpu.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: test test-weekly lint sweep pages docs aot-tpu aot-cuda device
test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile

test-weekly: $(VENV)/installed
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile -m weekly

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

sweep: $(VENV)/installed
	$(RUN) -m experiments.perplexity --config=configs/perplexity.py --workdir=runs/sweep

pages: $(VENV)/installed
	$(RUN) -m experiments.pages

docs: .venv-docs/installed
	.venv-docs/bin/python -m mkdocs build --strict --quiet

# libtpu takes a lock for a device that is not there: two processes may both have it.
aot-tpu aot-cuda: aot-%: .venv-%/installed
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu .venv-$*/bin/python -m $(AOT_$*) --workdir=runs/aot

AOT_tpu := experiments.aot --config=configs/aot.py:tpu
AOT_cuda := experiments.aot_cuda --config=configs/aot_cuda.py
EXTRA_tpu := tpu
EXTRA_cuda := aot-cuda
EXTRA_docs := docs

.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[$(EXTRA_$*)]'
	touch $@

DEVICE ?= gpu
device:
	$(PYTHON) -m pytest -p no:cacheprovider tests/pallas_kernels
	$(PYTHON) -m experiments.throughput --config=configs/throughput.py:$(DEVICE) --workdir=runs/device
