# Every target works first, alone, from a clean clone: it makes .venv and installs into it what is missing.
#
#   make report    run the main lesson strictly and write reports/resnet/
#   make check     check style, spelling, and what is made from the notebooks, in seconds
#   make test      run the check and every test: all notebooks, then tests/
#   make lab       open the lessons in JupyterLab
#   make docs      build README.md and the website in _docs/
#   make lessons   run all lessons afresh and save them with their outputs
#   make peers     make .venv-peers, with fastai, which the speed report measures itself against
#   make hooks     let git of this clone merge notebooks, and check them before a commit
#   make clean     remove what the targets above built, .venv included; reports and lessons stay
#
# Choices, given on the command line:
#   PYTHON=python3.12                                     the Python that makes .venv (3.11, 3.12 or 3.13)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu      take torch and torchvision, which must come from one
#                                                         place, from here: on Linux the plain ones bring CUDA

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

# Each of the workers that run notebooks side by side gets its share of the cores.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
THREADS := $(shell echo $$(( $(CORES) > $(WORKERS) ? $(CORES) / $(WORKERS) : 1 )))
SHARED_CORES := OMP_NUM_THREADS=$(THREADS) TF_NUM_INTRAOP_THREADS=$(THREADS) TF_NUM_INTEROP_THREADS=1
QUIET := COURSE_ML_PROGRESS=0 HF_HUB_OFFLINE=1

# Tests and saved lessons start from an empty cache, so nothing that is left over can hide a failure.
EMPTY_CACHE := export COURSE_ML_HOME="$$(mktemp -d)"; trap 'rm -rf "$$COURSE_ML_HOME"' EXIT

BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv-peers/installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install report check test lab docs lessons peers hooks clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "course_ml needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev,keras,pdf]'
	touch $@

report: $(INSTALLED)
	course-ml report resnet --force
	@echo "The report: $(CURDIR)/reports/resnet/report.html"

check: $(INSTALLED)
	python tools/check.py

test: check
	$(EMPTY_CACHE); $(QUIET) $(SHARED_CORES) nbdev_test --n_workers $(WORKERS) --timing
	$(EMPTY_CACHE); $(QUIET) $(SHARED_CORES) python -m pytest tests -n $(WORKERS) --dist worksteal

lab: $(INSTALLED)
	jupyter lab nbs

docs: $(INSTALLED)
	python tools/docs.py readme
	python tools/docs.py site

lessons: $(INSTALLED)
	$(EMPTY_CACHE); python tools/lessons.py

# fastai's companions cannot be installed together with those of nbdev, so it gets an environment of its own.
peers: $(PEERS)

$(PEERS): tools/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --upgrade pip
	.venv-peers/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r tools/peers/requirements.txt
	touch $@

# .gitconfig names the program that merges notebooks; .githooks holds what runs before a commit and after a merge.
hooks: $(INSTALLED)
	git config --local include.path ../.gitconfig
	git config --local core.hooksPath .githooks

clean:
	rm -rf .venv .venv-peers _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/.hypothesis nbs/.last_checked nbs/nbdev.yml nbs/sidebar.yml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
