PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=# e.g. --extra-index-url https://download.pytorch.org/whl/cpu for a small CPU build of torch
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo ab gate test check smoke sweep zoo eval-zoo bench calibrate clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/ditcache: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch -e '.[dev]'
	@touch $@

setup: $(BIN)/ditcache  ## a virtual environment in .venv with the tested versions

demo: setup  ## four captions without and with a cache: videos, table, contact sheet
	$(BIN)/ditcache generate model=tiny cache=taylorseer prompts=demo compare=true

ab: setup  ## a cache against none: table and page
	$(BIN)/ditcache ab-test cache=taylorseer

gate: setup  ## the same as a gate: exit code 1 if quality or speed is missed
	$(BIN)/ditcache ab-test cache=taylorseer gate.min_psnr=38 gate.min_worst_psnr=30 gate.min_ssim=0.99 gate.min_speedup=1.2

# Two halves side by side, a thread each: models this small gain nothing from a second thread.
test: export OMP_NUM_THREADS = 1
test: setup  ## the test suite (CPU, ten minutes)
	@$(BIN)/python -m pytest tests/cache tests/bridge > $(VENV)/test-cache.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest --ignore tests/cache --ignore tests/bridge; others=$$?; \
	wait $$half; cache=$$?; echo "tests/cache, tests/bridge:"; cat $(VENV)/test-cache.log; \
	[ $$others = 0 ] && [ $$cache = 0 ]

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: setup  ## one video, no cache
	$(BIN)/ditcache generate model=tiny

sweep: setup  ## three intervals: table, CSV, Pareto front
	$(BIN)/ditcache ab-test -m cache=taylorseer cache.policy.every=2,3,4

zoo: setup  ## train the embedded models again (hours); resumes where it stopped
	$(BIN)/torchrun --nproc-per-node 2 scripts/train_zoo.py
	$(BIN)/torchrun --nproc-per-node 2 scripts/train_siblings.py

eval-zoo: setup  ## measure how well the embedded models follow captions (minutes)
	$(BIN)/python scripts/eval_zoo.py
	$(BIN)/python scripts/eval_siblings.py

bench: setup  ## our policies, diffusers' hooks and cache-dit side by side (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python scripts/bench_policies.py
	$(BIN)/python scripts/bench_overhead.py

calibrate: setup  ## measure the embedded model's calibration again (minutes)
	$(BIN)/ditcache calibrate model=tiny

clean:  ## remove the environment and tool caches, keep outputs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
