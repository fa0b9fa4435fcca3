# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
RECIPE ?= recipes/shapes_data_slimming.yaml
# Overrides for any training target, such as ARGS="trainer.max_epochs=2 data.args.root=DIR".
ARGS ?=
# One process a core, one thread in each; a process that is through takes over tests of one that is not.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 8 --dist worksteal --doctest-modules dance_seg datamodules tests

.DEFAULT_GOAL := help
.PHONY: help setup demo adaptive search distill four-rows test test-all chaos fuzz check format goldens train clean

help:  ## list the targets
	@grep -hE '^[a-zA-Z_%-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install the package with its extras (again only when versions changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; run: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup  ## dense twin and data-slimmed run on drawn street scenes, compared on pictures (under 5 minutes on 2 cores)
	$(RUN) -m tools.train recipes/shapes_dense.yaml name=demo_dense $(ARGS)
	$(RUN) -m tools.train recipes/shapes_data_slimming.yaml name=demo_data_slimming $(ARGS)
	$(RUN) -m tools.compare runs/demo_dense runs/demo_data_slimming --out runs/demo

adaptive: setup  ## a network whose easy images stop early: trained, calibrated, scored on drawn street scenes (under 6 minutes)
	$(RUN) -m tools.train recipes/shapes_ranet.yaml $(ARGS)
	$(RUN) -m tools.calibrate runs/shapes_ranet --budget 0.5
	$(RUN) -m tools.evaluate runs/shapes_ranet --split test

search: setup  ## a family of networks trained at once, the best within a budget found and trained on, on drawn scenes (under 8 minutes)
	$(RUN) -m tools.train recipes/shapes_multi_stage.yaml $(ARGS)
	$(RUN) -m tools.search runs/shapes_multi_stage --budget-macs 1e8 --initial 20 --iterations 4 --children 8 --control data.args.statistics_images=32
	$(RUN) -m tools.train runs/shapes_multi_stage_found/recipe.yaml trainer.max_epochs=8 optimizer.lr=5e-4 $(ARGS)
	$(RUN) -m tools.calibrate runs/shapes_multi_stage_found_trained --budget-macs 1e8
	$(RUN) -m tools.evaluate runs/shapes_multi_stage_found_trained --split test

distill: setup  ## a student follows a drawn street, taught by a small teacher (under 5 minutes on 2 cores)
	$(RUN) -m tools.distill_video recipes/video_shapes.yaml $(ARGS)

test: setup  ## the tests, one representative of each family (under 15 minutes on 2 cores)
	$(PYTEST) -m "not slow"

test-all: setup  ## every test, the whole matrix included (under 75 minutes on 2 cores)
	$(PYTEST)

chaos: setup  ## kill trainings 100 times each, dense and DANCE, in one process and in two; all must end alike (20 minutes)
	$(RUN) -m tools.chaos recipes/shapes_dense.yaml recipes/shapes_dance.yaml --processes 1 2 --kills 100 $(ARGS)

fuzz: setup  ## 100,000 hostile inputs for every reader of files: ARGS="--inputs N --seconds S --seed K --readers recipe label"
	$(RUN) -m tools.fuzz $(ARGS)

check: setup  ## format, lint, types and import rules
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/test_layers.py

format: setup  ## format the code and mend what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

goldens: setup  ## write the golden figures anew; review the difference before committing it
	$(RUN) -m pytest -q tests/test_goldens.py --rewrite-goldens

train: setup  ## train RECIPE=recipes/... with ARGS="key=value ..."
	$(RUN) -m tools.train $(RECIPE) $(ARGS)

train-%: setup  ## train recipes/%.yaml, such as make train-camvid_data_slimming ARGS="data.args.root=DIR"
	$(RUN) -m tools.train recipes/$*.yaml $(ARGS)

bench-%: setup  ## measure a benchmark: pipeline, complexity, evaluator, epoch, slimming, adaptive, basisnet, supernet, front, export, startup, distill or durability
	$(RUN) -m tools.bench.$* $(ARGS)

four-rows: setup  ## dense, data, network, both and their controls on CamVid: ROOT=DIR ARGS="--seeds 0 1 key=value ..." (hours)
	$(RUN) -m tools.bench.four_rows $(if $(ROOT),--root '$(ROOT)') $(ARGS)

clean:  ## remove what tests and tools cached here; runs/ stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
