# make test: the suite.  make sweep: the main job.  make lint: style and types.  PYTHON=python3.12 make test works too.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: test lint sweep readme
test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

sweep: $(VENV)/installed
	$(RUN) -m experiments.perplexity --config=configs/perplexity.py --workdir=runs/sweep

readme: $(VENV)/installed
	$(RUN) -m experiments.report
