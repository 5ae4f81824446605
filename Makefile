# Every target sets up .venv first, and again only when pyproject.toml has changed.
#   make quickstart     one round on the embedded world: sample, score, rank, train, evaluate, report
#   make test           the test suite;  make test-gpu: what needs a CUDA device
#   make docs           docs/config.md from the config's schema, and the list of rewards from their classes
#   make docs-site      the documentation as a site, in build/docs; a link that leads nowhere is an error
#   make lint           ruff, mypy, import contracts, scripts and Dockerfile
#   make wheel-test     tests of packaging, config, command line and data files against the built wheel
#   make oracles        packages that tests compare with (60 MB), in folders of their own; part of `make test`
#   make browser-test   tests of pages in a real browser (chromium; CHROMIUM=PATH names one)
#   make soak           the long form of tests whose short form is part of `make test`
#   make hostile        thousands of hostile inputs, by class; prints the table of docs/security.md (an hour)
#   make kills          100 kills and 20 signals at random moments in training and data stages; part of make test are 26
#   make test-ray       tests on a Ray cluster of this machine; installs Ray (0.2 GB) into a folder of its own
#   make step-cost      kernels, bytes and host time of a step, counted without a GPU; tests hold them to bounds
#   make bench          the list of benchmarks;  make bench NAME=objectives ARGS=--tiny: run one (benchmarks/README.md)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ORACLES := $(VENV)/oracles
HPSV3 := $(VENV)/oracles-hpsv3
RAY := $(VENV)/ray
ROOT := $(CURDIR)
SITE := $(ROOT)/build/site
VIEW := $(ROOT)/build/view
EMPTY := $(ROOT)/build/empty
SOURCES := $(shell find diffalign rewards pipelines configs -type f -not -path '*/__pycache__/*') pyproject.toml setup.py LICENSE README.md
WHEEL_TESTS := tests/packaging tests/config tests/cli tests/testbed tests/report

.PHONY: setup oracles quickstart test test-gpu test-ray browser-test lint view wheel wheel-test soak hostile bench step-cost kills clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffalign needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing diffalign and its tools into $(VENV): about 3 GB, some minutes"
	$(BIN)/python -m pip install --quiet --editable ".[train,test,dev]"
	touch $(STAMP)

# Without their dependencies, which do not go with ours; what they lack when they are imported, tests/helpers/oracles.py lends them.
# hpsv3 has a folder of its own, since it brings the transformers it pins; tests run it in a process of its own.
oracles: $(ORACLES)/.installed $(HPSV3)/.installed
$(ORACLES)/.installed: tests/helpers/oracles.txt | $(STAMP)
$(HPSV3)/.installed: tests/helpers/oracles-hpsv3.txt | $(STAMP)
$(ORACLES)/.installed $(HPSV3)/.installed:
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --require-hashes --target $(@D) -r $<
	touch $@

quickstart: $(STAMP)
	$(BIN)/diffalign testbed quickstart

# The numbers of these tests are a CPU's; a GPU has its own, which compare with them.
# Some tests wait, for a time limit or for another process: with one worker more than cores, up to four, no core waits.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4)))
test: $(STAMP) oracles
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile --ignore tests/browser

browser-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/browser

test-gpu: $(STAMP)
	$(BIN)/pytest -q tests/gpu

# Ray stays out of .venv: tests/cluster skips without it.
test-ray: $(STAMP) $(RAY)/.installed
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH=$(ROOT)/$(RAY) $(BIN)/pytest -q tests/cluster tests/scoring/test_same_numbers.py
$(RAY)/.installed: pyproject.toml | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-compile --target $(@D) "ray[client]>=2.60"
	touch $@

# The wheel unpacked into a folder of its own. Its tests start in an empty folder: the checkout's root would shadow it.
# build/lib is deleted first because setuptools packs whatever an earlier build left there.
wheel: $(SITE)/.built
$(SITE)/.built: $(STAMP) $(SOURCES)
	rm -rf build dist
	mkdir -p $(EMPTY)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(SITE) dist/*.whl
	touch $@

# The package as it installs, without building it: links to every child of diffalign/ and to the folders at the top that
# pyproject.toml maps into the package. Made new each time: a link to a deleted file would hide that an import is broken.
view:
	rm -rf $(VIEW)
	mkdir -p $(VIEW)/diffalign
	cd $(VIEW)/diffalign && ln -s ../../../diffalign/* ../../../rewards ../../../pipelines ../../../configs .

# mypy starts in the view and names files from there; sed puts the mapped folders back to the top of the repository.
lint: SHELL := /bin/bash
lint: $(STAMP) view
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	set -o pipefail; cd $(VIEW) && \
		$(ROOT)/$(BIN)/mypy --config-file $(ROOT)/pyproject.toml --cache-dir $(ROOT)/.mypy_cache -p diffalign | \
		sed -E 's#^diffalign/(rewards|pipelines|configs)/#\1/#'
	cd $(VIEW) && PYTHONPATH=$(VIEW) $(ROOT)/$(BIN)/lint-imports --config $(ROOT)/pyproject.toml --cache-dir $(ROOT)/.import_linter_cache
	$(BIN)/shellcheck docs/cluster/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

wheel-test: $(SITE)/.built
	cd $(EMPTY) && PYTHONPATH=$(SITE) DIFFALIGN_SITE=$(SITE) $(ROOT)/$(BIN)/python -P -m pytest -q -c $(ROOT)/pyproject.toml $(addprefix $(ROOT)/,$(WHEEL_TESTS))

soak: $(STAMP) oracles
	DIFFALIGN_SOAK=1 $(BIN)/pytest -q -m soak -o timeout=0

hostile: $(STAMP)
	PYTHONPATH=$(ROOT)/tests:$(ROOT) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/hostile/classes.py $(ARGS)

kills: $(STAMP)
	DIFFALIGN_KILLS=long $(BIN)/pytest -q tests/reliability/test_kills.py -o timeout=0

bench: $(STAMP) $(if $(filter scoring_speed,$(NAME)),oracles)
	@$(BIN)/python benchmarks $(NAME) $(ARGS)

step-cost: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_cost.py $(ARGS)

# The page of all config keys, from the schema, and the list of rewards, from their classes; tests compare them.
.PHONY: docs
docs: $(STAMP)
	$(BIN)/python -m diffalign.config.commented > docs/config.md
	$(BIN)/python -m diffalign.scoring.list_rewards

# Also without a network: nothing is fetched while it is built, and its pages load nothing from elsewhere.
.PHONY: docs-site
docs-site: $(STAMP) view
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find diffalign rewards pipelines configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
