PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build, by exact pin: a plain requirement would download gigabytes of GPU libraries.
TORCH ?= torch==2.13.0

# A folder of <name>/{train,test}.parquet, for bench-full (ag_news, imdb) and accuracy.
DATA ?=

.PHONY: test test-slow test-browser test-data demo docs bench bench-full bench-gpu bench-reranking bench-embedding bench-serving accuracy quality style clean

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Two processes: the models are too small for two threads.
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# Training, processes and servers, for minutes.
test-slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 1800 $(PYTEST_ARGS)

# Needs Chromium and its driver.
test-browser: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-data: $(VENV)/.installed
	@test -n "$(DATA)" || { echo 'usage: make test-data DATA=folder'; exit 2; }
	HF_HUB_OFFLINE=1 DATA="$(abspath $(DATA))" $(BIN)/python -m pytest -m data $(PYTEST_ARGS)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_text_classification.py $(DEMO_ARGS)

bench: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/run.py benchmarks/experiments/quick/*.json --output build/benchmarks/results
	$(BIN)/python benchmarks/report.py build/benchmarks/results build/benchmarks

bench-full: $(VENV)/.installed
	@test -n "$(DATA)" || { echo 'usage: make bench-full DATA=folder [BENCH_ARGS="--resume"]'; exit 2; }
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/run.py benchmarks/experiments/*.json --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

# Needs CUDA, and a torch for it in PYTHON's environment: the one above is for the CPU.
bench-gpu:
	HF_HUB_OFFLINE=1 PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

# The model is trained once, and kept in build/reranking; the last step times, on a machine that does nothing else.
bench-reranking: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reranking.py train $(BENCH_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reranking.py quality $(BENCH_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reranking.py timing $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

bench-embedding: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/embedding.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

# Of a trained and tuned model, on a machine that does nothing else.
bench-serving: $(VENV)/.installed
	@test -n "$(CHECKPOINT)" && test -n "$(DATA)" || { echo 'usage: make bench-serving CHECKPOINT=folder DATA=folder'; exit 2; }
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/serving.py http "$(CHECKPOINT)" --data "$(DATA)" $(BENCH_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/serving.py ray "$(CHECKPOINT)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

# A day on two cores; what is in the work folder already is not made again.
WORK ?= build/accuracy
accuracy: $(VENV)/.installed
	@test -n "$(DATA)" || { echo 'usage: make accuracy DATA=folder [WORK=folder]'; exit 2; }
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/accuracy/run.py --data "$(DATA)" --work "$(WORK)" --threads 2
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/accuracy/timing.py --data "$(DATA)" --work "$(WORK)"
	$(BIN)/python benchmarks/accuracy/figures.py --work "$(WORK)"
	$(BIN)/python benchmarks/accuracy/routers.py --work "$(WORK)"
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/paper/run.py benchmarks/paper/ag_news.json --data "$(DATA)" --resume
	$(BIN)/python benchmarks/report.py

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
