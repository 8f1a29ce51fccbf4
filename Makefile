PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build, by exact pin: a plain requirement would download gigabytes of GPU libraries.
TORCH ?= torch==2.13.0

.PHONY: test demo quality style clean

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_text_classification.py $(DEMO_ARGS)

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
