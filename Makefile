# One word per job; `make` alone lists them. Everything runs in .venv, which `make venv` builds once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow test-ants label deploy release lint format demo train-hippocampus train-hippocampus-labels train-brain train-vessels clean

help: ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## build .venv with the tested versions of everything (PYTHON=python3.12 picks another Python)

# torch goes first and by its exact version: later requirements then accept it instead of choosing a build themselves.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@echo "Building $(VENV): a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt $(TORCH) setuptools
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[all,test]'
	@touch $@

test: $(STAMP) ## run the tests, without the slow ones
	@$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(STAMP) ## run the slow tests only
	@$(BIN)/python -m pytest -q -m slow

# ANTs stays out of the project's own environment: it is an oracle, not a dependency.
test-ants: ## check that ANTs makes the same of our transforms, in an environment of its own (.venv-ants)
	@test -x .venv-ants/bin/python || $(PYTHON) -m venv .venv-ants
	@.venv-ants/bin/python -m pip install -qq $(TORCH) setuptools
	@.venv-ants/bin/python -m pip install -qq --no-build-isolation -e '.[all,test]' antspyx==0.6.3
	@.venv-ants/bin/python -m pytest -q tests/test_ants.py

# MONAI Label goes last and without what it asks for: that would bring other versions of numpy, jsonschema and torch.
label: ## serve the bundle and our app by MONAI Label and drive both, in an environment of its own (.venv-label)
	@test -x .venv-label/bin/python || $(PYTHON) -m venv .venv-label
	@.venv-label/bin/python -m pip install -qq -c constraints.txt $(TORCH) setuptools
	@.venv-label/bin/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[all,test]'
	@.venv-label/bin/python -m pip install -qq -c constraints.txt -r bundle/docs/hosts/label_requirements.txt
	@.venv-label/bin/python -m pip install -qq --no-deps monailabel==0.8.5 pydicom-seg==0.4.1 numpymaxflow==0.0.7 girder-client==5.0.21
	@.venv-label/bin/python bundle/docs/hosts/label_torchvision.py
	@.venv-label/bin/python -m pytest -q tests/test_label.py

# `git archive`: what is committed and nothing else, in a folder named after the model.
release: ## make dist/equireg.zip, the bundle as MONAI and the model zoo unpack it
	@mkdir -p dist
	@git archive --format=zip --prefix=equireg/ --output=dist/equireg.zip HEAD:bundle
	@echo dist/equireg.zip

# The SDK asks for packages of the GPU that a CPU does without, several GB: hence --no-deps, and a list of the others,
# which go first, as every Python of an environment with Holoscan wants one of them when it starts.
deploy: ## run the MONAI Deploy application end to end, in an environment of its own (.venv-deploy)
	@test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	@.venv-deploy/bin/python -m pip install -qq $(TORCH) setuptools
	@.venv-deploy/bin/python -m pip install -qq -c constraints.txt -r bundle/docs/hosts/deploy/requirements.txt
	@.venv-deploy/bin/python -m pip install -qq --no-deps monai-deploy-app-sdk==4.0.0 holoscan-cu13==4.6.0
	@.venv-deploy/bin/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[all,test]'
	@.venv-deploy/bin/python -m pytest -q tests/test_deploy.py

lint: $(STAMP) ## check style, formatting and types
	@$(BIN)/python -m ruff check bundle tests
	@$(BIN)/python -m ruff format --check bundle tests
	@$(BIN)/python -m mypy

format: $(STAMP) ## put the code into the house style
	@$(BIN)/python -m ruff check --fix bundle tests
	@$(BIN)/python -m ruff format bundle tests

demo: $(STAMP) ## train a short run, register a pair, and write pictures to demo_output
	@$(BIN)/python bundle/docs/demo.py --output_dir demo_output

data = $(if $(DATA),$(abspath $(DATA)),$(error say where the images are: make $@ DATA=folder))

# The recipes of the shipped weights. DATA is a folder that holds Task04_Hippocampus, or the retina masks.
train-hippocampus: $(STAMP) ## train the weights `hippocampus`: make train-hippocampus DATA=...
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash bundle/docs/results/train_hippocampus.sh "$(data)/Task04_Hippocampus" output/hippocampus

train-hippocampus-labels: $(STAMP) ## train the weights `hippocampus_labels`: make train-hippocampus-labels DATA=...
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash bundle/docs/results/train_hippocampus_labels.sh "$(data)/Task04_Hippocampus" output/hippocampus_labels

train-brain: $(STAMP) ## train the weights `brain` from label maps: make train-brain DATA=...
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash bundle/docs/results/train_brain.sh "$(data)/brain_synthseg_labels_2mm" output/brain

train-vessels: $(STAMP) ## train the weights `vessels`: make train-vessels DATA=...
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash bundle/docs/results/train_vessels.sh "$(data)" output/vessels

clean: ## remove .venv and everything the other jobs leave behind
	@rm -rf $(VENV) .venv-ants .venv-label .venv-deploy build dist demo_output .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find bundle tests -name __pycache__ -type d -prune -exec rm -rf {} +
