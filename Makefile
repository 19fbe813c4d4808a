# make quickstart   set up, then train and prove a drafter for the embedded target
# make test         set up, then lint and tests
# make card         regenerate model_cards/quickstart from the quickstart run

PYTHON ?= python3
VENV ?= .venv
# torch first and pinned: a machine with a CPU build at hand then takes no CUDA packages.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

.PHONY: quickstart test card

quickstart: $(READY)
	$(VENV)/bin/python -m peagle fit --config configs/quickstart.yaml

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

card: $(READY)
	$(VENV)/bin/python -m callbacks.card outputs/quickstart outputs/quickstart/drafter model_cards/quickstart

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), 'peagle needs Python 3.11 or 3.12: make PYTHON=python3.11'"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable '.[test,dev]'
	touch $@
