# make            says what there is
# make test       sets everything up and passes all tests
# make reproduce  sets everything up and answers the question on three text tasks and one class of
#                 functions, in minutes; LTV_SEEDS=2 trains every vector twice and says how far two
#                 trainings agree
# make study      the same on five text tasks and four classes of functions, in full
# make analyses   every analysis, PRESET=smoke in minutes, PRESET=small as README quotes them, and
#                 PRESET=paper on a GPU; analyses/README.md says what each of them tests
# make reliability  damages files, kills and interrupts commands, fills disks: what must never happen
#                 is counted; RELIABILITY="--kills 20 --inputs 1000" for less of it, or "--only
#                 template:123" for one damaged file again
#
# What is done is noted in a stamp file inside the environment it was done for, and only when it
# succeeded: a second call redoes nothing, an interrupted one goes on where it stopped.

PYTHON ?= python3
MODEL = smollm2-135m
LTV_SEEDS ?= 1
PRESET ?= smoke
RELIABILITY ?= --kills 200 --inputs 10000
JOBS ?= 2
# What calls transformer-lens, and studies from end to end; what stands above sees a lens, and is the
# same. What the first environment has checked of types need not be checked twice.
TL4_TESTS = $(addprefix tests/,lens models scores/test_mediation.py scores/test_patching.py \
	scores/test_paths.py vectors/test_fit.py studies/test_text_study.py \
	studies/test_regression_study.py test_pretrained.py)
PYTHON_RUN = .venv/bin/python

# What both studies run, in the folders $(1)/text, $(1)/regression and $(1)/both; they resume, and
# end with the same summary over both modalities.
define STUDIES
	$(PYTHON_RUN) -m analyses.regression_study --seed 0 --out $(1)/regression $(REGRESSION_SIZE)
	$(PYTHON_RUN) -m analyses.text_study --model $(MODEL) --seed 0 --out $(1)/text $(TEXT_SIZE)
	$(PYTHON_RUN) -m analyses.modalities --text $(1)/text --regression $(1)/regression \
		--out $(1)/both
	@echo "Tables, figures and manifests are in $(1)/text, $(1)/regression and $(1)/both"
	@echo "Open $(1)/text/report.html and $(1)/regression/report.html in a browser"
endef

ENVIRONMENTS = .venv .venv-tl4
PIP_INSTALL = bin/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help setup setup-tl4 check test docs reliability reproduce study analyses clean

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
# Processes of one thread each: several of several threads would be in each other's way. Where no
# Chromium is installed, tests that need one say so in a line.
test: export OMP_NUM_THREADS = 1
test: PYTEST = bin/python -m pytest --numprocesses $(JOBS) --dist worksteal
test: setup setup-tl4 check  ## all checks and tests, JOBS=2 at once; and with transformer-lens 4 what calls it
	@failed=0; .venv/$(PYTEST) || failed=1; \
	echo "And with transformer-lens 4:"; \
	.venv-tl4/$(PYTEST) -o addopts=--import-mode=importlib -o cache_dir=.venv-tl4/cache $(TL4_TESTS) \
	    || failed=1; exit $$failed

docs: .venv/.installed  ## the documentation as pages, docs/_build/html; needs no network
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html in a browser"

reliability: setup  ## damaged files, kills, interrupts, full disks; a quarter of an hour, not in test
	PYTHONPATH=scripts:tests $(PYTHON_RUN) -m reliability $(RELIABILITY)

reproduce: TEXT_SIZE = --tasks present-past,singular-plural,country-nationality \
	--ltv-seeds $(LTV_SEEDS) --control-draws 1 --n-means 50 --n-validation 16 --n-test 20 \
	--steps 40
reproduce: REGRESSION_SIZE = --functions linear --ltv-seeds $(LTV_SEEDS) --steps 100 \
	--n-test 128 --shifts none
reproduce: export HF_HUB_OFFLINE = 1
reproduce: setup  ## learned heads against function-vector heads: three text tasks, linear regression
	$(call STUDIES,runs/reproduce)

study: export HF_HUB_OFFLINE = 1
study: setup  ## the same in full, whose tables the documentation quotes: five text tasks, four function classes
	$(call STUDIES,runs/study)

# Those that read the runs of others come behind them.
ANALYSES = text_study regression_study modalities rivals transfer ablation whole_answers patching \
	approximation error_ratio weight_travel
analyses: export HF_HUB_OFFLINE = $(if $(filter paper,$(PRESET)),0,1)
analyses: setup  ## every analysis in runs/PRESET, with PRESET=smoke, small or paper
	@set -e; for name in $(ANALYSES); do \
	    echo "analyses.$$name"; $(PYTHON_RUN) -m analyses.$$name --preset $(PRESET); done

clean:  ## remove environments and caches; keeps runs/ and the downloaded model
	rm -rf $(ENVIRONMENTS) .pytest_cache .mypy_cache .ruff_cache build dist docs/_build
	find analyses docs notebooks scripts tests tvlens -name __pycache__ -type d -prune -exec rm -rf {} +

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
