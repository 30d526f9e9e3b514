# make train | pinn | test | lint | bench | profile | reliability; each sets up .venv by itself.
# PYTHON chooses the interpreter, ARGS is passed on. Tests run on every core; those that ARGS chooses start sooner in one
# process, unless `-n auto` is among it.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
# Nothing that is not in a lock file, nothing whose hash differs, nothing built from source.
LOCKED := $(PY) -m pip install --quiet --require-hashes --no-deps --only-binary :all:

.PHONY: setup train pinn test lint bench profile bench-small reliability clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml $(wildcard requirements/*.txt) $(wildcard csrc/*)
	@echo "== setting up .venv (a few minutes the first time)"
	test -x $(PY) || $(PYTHON) -m venv .venv
	@# The CPU build where pip is given one by its configuration, else the index's with its CUDA packages.
	$(LOCKED) -r requirements/torch-cpu.txt 2>/dev/null || $(LOCKED) -r requirements/torch.txt
	$(LOCKED) -r requirements/dev.txt
	$(PY) -m pip check
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

train: setup
	$(PY) -m bench.train $(ARGS)

pinn: setup
	$(PY) -m bench.pinn.demo $(ARGS)

test: setup
	$(PY) -m pytest $(or $(ARGS),-n auto --dist worksteal)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup
	$(PY) -m pytest bench --benchmark-enable $(ARGS)

profile: setup
	$(PY) -m bench.steps.profile $(ARGS)

bench-small: setup
	PYTHON=$(PY) bench/small.sh $(DATA_DIR)

reliability: setup
	$(PY) -m bench.reliability $(ARGS)

clean:
	rm -rf .venv build *.egg-info fngd_kernels/*.so
