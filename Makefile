# make demo   makes an environment, installs tl_loops, writes report.html for the embedded model;
#             with the newest TransformerLens, or with that of TL=3.9
# make test   the same with the test extras, then runs every test with TransformerLens 3.9 (in two
#             passes: tests/conftest.py says what each checks), and those that are marked both_lines
#             with 4.3
# make fuzz   680 damaged checkpoints, many random configs and calls, odd arguments, and kills and
#             interrupts at 200 moments each, of which make test runs a sample
# make lint   ruff and pyright
# make notebooks   runs the scripts of demos/ into notebooks
# make dist   builds the wheel and the sdist in dist/, installs each in a clean folder and runs the
#             example of the README there
# make docs   builds the documentation in site/; a warning or a dead link is an error

# Which TransformerLens, by its first two numbers: for the demo the newest, else 3.9, unless TL says.
ifneq ($(filter-out demo,$(MAKECMDGOALS)),)
TL ?= 3.9
endif
PYTHON ?= python3
VENV ?= .venv$(if $(TL),-tl$(TL))
BIN = $(VENV)/bin
# Byte code is compiled when a module is first imported: most of what is installed never is.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	-c .constraints.txt
TRANSFORMER_LENS = 'transformer-lens$(if $(TL),==$(TL).*)'
# A file of tests stays in one process, which makes its models once; the slow files start first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Many processes of a run import the same files, which are compiled once.
unexport PYTHONDONTWRITEBYTECODE

KILLS = $(shell grep -rl "import .*N_MOMENTS" tests --include="test_*.py")

.PHONY: demo test test-outer test-inner test-tl4 both-lines environments tl4-environment fuzz lint \
	docs dist notebooks clean

demo: $(VENV)/.base
	$(BIN)/tl-loops report --out report.html
	@echo "The report is in $(CURDIR)/report.html: open it in a browser."

test:
	$(MAKE) test-outer
	$(MAKE) test-inner
	$(MAKE) test-tl4

test-outer: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not inner"

test-inner: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m inner --check-types=all

# With make -j 2 both are made at once.
environments: $(VENV)/.dev tl4-environment

tl4-environment:
	$(MAKE) .venv-tl4.3/.test TL=4.3 VENV=.venv-tl4.3

test-tl4:
	$(MAKE) both-lines TL=4.3 VENV=.venv-tl4.3

both-lines: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m both_lines

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz.checkpoints --full
	FUZZ_EXAMPLES=300 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/differential tests/fuzz
	KILL_EXAMPLES=200 $(BIN)/python -m pytest $(PYTEST_ARGS) $(KILLS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

notebooks: $(VENV)/.dev
	for script in $$(grep -l "^# jupyter:" demos/*.py); do \
		$(BIN)/jupytext --to ipynb --execute $$script || exit 1; done

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist
	$(BIN)/python -m tests.dist dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(None if (3, 10) <= v <= (3, 13) else \
	"tl_loops needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d; call make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an open requirement would fetch the largest build there is.
$(VENV)/.torch: .constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.test: EXTRAS = [test]
$(VENV)/.dev: EXTRAS = [test,dev,docs]
$(VENV)/.base $(VENV)/.test $(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP_INSTALL) $(TRANSFORMER_LENS) -e '.$(EXTRAS)'
	@touch $@

clean:
	rm -rf .venv .venv-tl* build dist site report.html
