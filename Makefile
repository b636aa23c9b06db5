# `make train` and `make test` each set up what they need on a fresh machine with Python 3.11+.
# To use an environment of your own, see the plain pip commands in README.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
ARGS   ?=

.PHONY: help setup train test lint notebooks pytest faults mutants export readme gallery lab docs browser bench benchmarks latent avatars quality watched classifiers ship clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Make .venv and install the package with its extras (quick the second time)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"diffusion_model needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}. Name another: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,interop,eval,wandb,hf,avatars]'
	@touch $@

train: $(READY)  ## Train the quick-start model (about 4 minutes on two CPU cores) and draw samples
	$(BIN)/diffusion-train --config quickstart --resume $(ARGS)

test: lint pytest  ## Run the linter, every notebook (as Jupyter does), every test and the guard

lint: $(READY)  ## Look for likely mistakes and lines of more than 100 columns (quick)
	$(BIN)/ruff check

# Each notebook in a process of its own, so that none can lean on what another left behind.
notebooks: $(READY)  ## Run every notebook by nbdev alone (quicker than all of `make test`)
	@find nbs -name '*.ipynb' -not -path '*/.*' | sort | \
	  OMP_NUM_THREADS=1 xargs -P $(JOBS) -I{} sh -c \
	  '$(BIN)/nbdev-test {} --n-workers 0 >{}.log 2>&1; code=$$?; \
	   if [ $$code = 0 ]; then echo "passed {}"; else echo "FAILED {}"; cat {}.log; fi; rm -f {}.log; exit $$code'

pytest: $(READY)  ## Run the tests and the guard (exports equal notebooks, clean, within size)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

faults: $(READY)  ## Run every test of a fault (kills, full disks, bad files, ...); print both tables
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "fault or mended"

mutants: $(READY)  ## Plant small mistakes, one at a time: do the notebooks and tests notice? (hours)
	$(BIN)/python tests/mutants.py --jobs $(JOBS) $(ARGS)

export: $(READY)  ## Write the package, README.md and llms.txt from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/python tests/shrink.py
	$(BIN)/nbdev-clean
	$(BIN)/python tests/pages.py

readme: $(READY)  ## Write README.md, sidebar and llms.txt from the index page and the models' cards
	$(BIN)/python tests/pages.py

gallery: $(READY)  ## Draw the first page's picture of the models of the package; then `make readme`
	$(BIN)/python tests/gallery.py
	$(BIN)/python tests/pages.py

lab: $(READY)  ## Open the notebooks in Jupyter
	$(BIN)/jupyter lab nbs

docs: $(READY)  ## Build the documentation site (needs Quarto)
	$(BIN)/nbdev-docs

browser: $(READY)  ## Move sliders of lessons in a real browser (skipped without Chromium)
	$(BIN)/python tests/browser.py $(ARGS)

# A word about the two: `bench` asks how fast we are, beside other libraries, each variant in turn;
# `benchmarks` asks what solvers, saving, judging, the quick start and shipped models cost and are worth.
bench: $(READY)  ## Measure speed beside other libraries: training, sampling, data (within 15 minutes)
	@$(BIN)/python -c 'from importlib.util import find_spec; \
	  assert all(map(find_spec, ("diffusers", "denoising_diffusion_pytorch", "smalldiffusion")))' \
	  2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python benchmarks/train.py --peers $(ARGS)
	$(BIN)/python benchmarks/sample.py --peers $(ARGS)
	$(BIN)/python benchmarks/data.py

benchmarks: train  ## Measure solvers, the trainer, judging, the quick start, its stem, shipped models (about 40 minutes)
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/preset.py
	$(BIN)/python benchmarks/shipped.py

latent: $(READY)  ## Measure pixels against latents at equal time (over an hour; ARGS='--data FOLDER')
	$(BIN)/python benchmarks/latent.py --out outputs/pixels_or_latents $(ARGS)

quality: $(READY)  ## Ten minutes of one core on Fashion-MNIST: FD (ARGS='--root DIR --peers', two hours)
	$(BIN)/python benchmarks/quality.py --out outputs/quality $(ARGS)

watched: $(READY)  ## Make the pictures of lessons 26 and 31 anew: the quick start, watched (5 minutes)
	$(BIN)/python benchmarks/watched.py --pictures nbs/images $(ARGS)

avatars: $(READY)  ## Judge a model of avatars by prompts it has never seen (minutes; ARGS='outputs/avatars')
	$(BIN)/python benchmarks/avatars.py $(ARGS)

classifiers: $(READY)  ## Train the six classifiers whose features are shipped (ARGS='--root DIR')
	OMP_NUM_THREADS=1 $(BIN)/python tests/classifiers.py $(ARGS)

ship: $(READY)  ## Make a model of the package of a run (ARGS='RUN NAME --about ...')
	$(BIN)/python tests/ship.py $(ARGS)

clean:  ## Remove what builds and tests leave behind (not .venv, not your runs)
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .ruff_cache .hypothesis
