# SPDX-License-Identifier: Apache-2.0
# For GNU make 3.81 (macOS) and later. Paths are relative, so that the folder's own path may
# contain spaces.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help html test planted listings lint serve run lab notebooks bench studies referee gpu clean distclean venv

# Given on the command line or in the environment; .ci/venv.sh reads PYTHON and REQUIREMENTS.
#   PYTHON        the interpreter that makes .venv
#   REQUIREMENTS  the file with the pins
#   KINDS         words of the mistakes that `make planted` plants; all without it
#   NB            the notebook that `make run` runs
SPHINXOPTS ?=
PYTESTARGS ?=
PORT ?= 8000
GPUSTEPS ?=
KINDS ?=
CHECKOUT ?=
REFEREEOPTS ?=
NB ?=
LABOPTS ?=

# What another active environment would bring in. IPython, for one, puts VIRTUAL_ENV on its path.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX JUPYTER_PATH
# The reader's own IPython start-up files stay out of the notebooks.
export IPYTHONDIR := $(CURDIR)/_build/ipython

PY := .venv/bin/python
SPHINXFLAGS := -j auto $(SPHINXOPTS) . _build/html

help: ## print this list
	@echo "Usage: make <target>"
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1=\2/p' Makefile | \
		while IFS='=' read -r target text; do printf '  %-10s  %s\n' "$$target" "$$text"; done
	@echo
	@echo "Variables: PYTHON=python3.12  SPHINXOPTS=...  PYTESTARGS=\"-k loss\"  PORT=8000  NB=custom_dpo"

html: venv ## execute what changed, build the site into _build/html; a warning is an error
	@$(PY) -m sphinx -W --keep-going $(SPHINXFLAGS)
	@$(PY) -c 'from pathlib import Path; page = Path("_build/html/index.html").resolve(); \
		print("The site: %s\n          %s" % (page, page.as_uri()))'

test: venv ## run the tests, on all cores
	@$(PY) -m pytest -n auto --dist loadfile $(PYTESTARGS)

planted: venv ## plant the mistakes of tests/planted in a copy; each has a check that must see it
	@$(PY) tests/planted/plant.py $(KINDS)

listings: venv ## run every listing of the pages as a reader copies it; name the slow ones
	@LISTINGS=all $(PY) -m pytest tests/docs/test_listings.py --durations=0 --durations-min=5 \
		$(PYTESTARGS)

# Needs no network: the wheels in .venv hold pyright and the Node.js that runs it.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: export PYRIGHT_PYTHON_GLOBAL_NODE := 0
lint: venv ## check style, formatting, spelling and types; ruff check --fix and ruff format mend much of it
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m codespell_lib docs notebooks nemo_rl_ref benchmarks configs conf.py Makefile *.md
	@$(PY) -m pyright

serve: venv ## build the site, serve it on localhost, rebuild it after each change
	@$(PY) -m sphinx_autobuild --port $(PORT) --ignore _build --re-ignore '__pycache__|[.]pyc$$' \
		$(SPHINXFLAGS)

run: venv ## run one notebook, make run NB=custom_dpo, and write it with its outputs to _build/run
	@$(PY) docs/_ext/run_notebook.py $(if $(NB),"$(NB)")

# The kernel finds the package in this folder: it is not installed in .venv.
lab: notebooks ## open the notebooks in JupyterLab, which the first time is installed into .venv
	@$(PY) -c "import jupyterlab" 2>/dev/null || \
		$(PY) -m pip install -r requirements.txt -r requirements-lab.txt
	@PYTHONPATH="$(CURDIR)" JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab --LabApp.default_url=/lab/tree/_build/ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LABOPTS)

notebooks: venv ## write each notebook as .ipynb, not executed, into _build/ipynb
	@mkdir -p _build/ipynb
	@for notebook in notebooks/*.py; do \
		name=$${notebook##*/}; \
		$(PY) -m jupytext --quiet --to ipynb --output "_build/ipynb/$${name%.py}.ipynb" \
			"$$notebook" || exit 1; \
		echo "_build/ipynb/$${name%.py}.ipynb"; \
	done

bench: venv ## run the benchmarks, benchmarks/bench_*.py
	@for script in benchmarks/bench_*.py; do \
		[ -f "$$script" ] || { echo "error: no script in benchmarks" >&2; exit 1; }; \
		echo "$$script"; $(PY) "$$script" || exit 1; \
	done

studies: venv ## run the searches that the site shows, one to two hours; goes on where it was stopped
	@for script in pool samplers batch modelled; do \
		echo "benchmarks/search_$$script.py"; \
		OMP_NUM_THREADS=1 $(PY) "benchmarks/search_$$script.py" || exit 1; \
	done

referee: venv ## run NeMo RL's own loops and unit tests beside ours: CHECKOUT=/path/to/NeMo-RL
	@[ -n "$(CHECKOUT)" ] || { echo "error: say where NeMo RL is: CHECKOUT=/path/to/NeMo-RL" >&2; exit 1; }
	@$(PY) tests/referee --checkout "$(CHECKOUT)" $(REFEREEOPTS)

gpu: venv ## on a GPU: test the kernels, execute the notebooks, run the benchmarks
	@$(PY) .ci/gpu.py $(GPUSTEPS)

clean: ## remove what was built; .venv stays
	@rm -rf _build build .pytest_cache .hypothesis .coverage htmlcov ./*.egg-info
	@find . -name .venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	@rm -rf .venv .venv.old .venv.lock

venv: ## make .venv and install requirements.txt, if that is not done yet
	@sh .ci/venv.sh
