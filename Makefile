# make            says what there is
# make test       sets everything up and passes all tests
# make reproduce  sets everything up and runs the studies of both modalities; LTV_SEEDS=2 trains every
#                 vector twice and says how far two trainings agree, and
#                 FUNCTIONS=linear,sparse-linear,relu,tree studies every shipped regression model
#
# What is done is noted in a stamp file inside the environment it was done for, and only when it
# succeeded: a second call redoes nothing, an interrupted one goes on where it stopped.

PYTHON ?= python3
MODEL = smollm2-135m
STUDY_TASKS = present-past,singular-plural,country-nationality,verb-gerund,capitalize-word
STUDY_RUN = runs/text
REGRESSION_RUN = runs/regression
BOTH_RUN = runs/both
FUNCTIONS ?= linear
LTV_SEEDS ?= 1
PYTHON_RUN = .venv/bin/python
STUDY = $(PYTHON_RUN) analyses/text_study.py --model $(MODEL) --tasks $(STUDY_TASKS) \
	--ltv-seeds $(LTV_SEEDS) --control-draws 1 --seed 0 --out $(STUDY_RUN)
REGRESSION_STUDY = $(PYTHON_RUN) analyses/regression_study.py --functions $(FUNCTIONS) \
	--ltv-seeds $(LTV_SEEDS) --n-test 128 --shifts none,skewed \
	--seed 0 --out $(REGRESSION_RUN)
BOTH = $(PYTHON_RUN) analyses/modalities.py --text $(STUDY_RUN) --regression $(REGRESSION_RUN) \
	--out $(BOTH_RUN)

ENVIRONMENTS = .venv .venv-tl4
PIP_INSTALL = bin/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help setup setup-tl4 check test reproduce clean

help:  ## say what there is
	@echo "make TARGET, with PYTHON=python3.12 or the like to choose the Python (3.10 or newer):"
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14 | sed 's/^/  /'

setup: .venv/.installed  ## environment in .venv, and the bundled model in the user's cache
	@.venv/bin/python -c "from tvlens.models.catalogue import main; main('$(MODEL)')"

setup-tl4: .venv-tl4/.installed  ## second environment in .venv-tl4, with transformer-lens 4

check: .venv/.installed  ## lint, formatting, types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# No test may need a network, so none gets the chance to use a model hub.
test: export HF_HUB_OFFLINE = 1
test: setup setup-tl4 check  ## all checks and tests, the tests in both environments
	.venv/bin/python -m pytest
	.venv-tl4/bin/python -m pytest

reproduce: export HF_HUB_OFFLINE = 1
reproduce: setup  ## learned heads against function-vector heads, on text and on regression
	$(REGRESSION_STUDY)
	$(STUDY)
	$(BOTH)
	@echo "Tables, figures and manifests are in $(STUDY_RUN), $(REGRESSION_RUN) and $(BOTH_RUN)"

clean:  ## remove environments and caches; keeps runs/ and the downloaded model
	rm -rf $(ENVIRONMENTS) .pytest_cache .mypy_cache .ruff_cache build dist
	find analyses notebooks scripts tests tvlens -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that works is kept, whichever Python made it; one that does not is made anew.
$(ENVIRONMENTS:%=%/.made): %/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "tvlens needs Python 3.10 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$*/bin/python -m pip --version > /dev/null 2>&1 || { \
	    echo "Making $*"; rm -rf $*; $(PYTHON) -m venv $*; }
	@touch $@

# First and by itself, because it is by far the largest: a later failure does not repeat it.
$(ENVIRONMENTS:%=%/.torch): %/.torch: %/.made
	@echo "Installing torch into $*"
	@$*/$(PIP_INSTALL) -c constraints.txt torch
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml constraints.txt
.venv-tl4/.installed: .venv-tl4/.torch pyproject.toml constraints-tl4.txt
$(ENVIRONMENTS:%=%/.installed): %/.installed:
	@echo "Installing tvlens and what it needs into $*"
	@$*/$(PIP_INSTALL) -c $(filter constraints%,$^) -e '.[dev]'
	@touch $@
