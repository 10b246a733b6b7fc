# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A test process for each core, up to four (each takes some 2 GB); tests/conftest.py gives each one thread.
PYTEST := $(BIN)/python -m pytest tests -n logical --maxprocesses 4 --dist worksteal

.PHONY: install demo test test-all quick lint docs clean

install: $(STAMP)

# The stamp is written last: an interrupted installation is taken up again, not taken for done.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python recipes/demo/run.py

test: install
	$(PYTEST) -m "not wide"

# The wide matrices too: every family, format and recipe through everything.
test-all: install
	$(PYTEST)

# Between edits: no slow test, and one case of each test.
quick: install
	$(PYTEST) --quick

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The site, into site/; the first warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(STAMP) mkdocs.yml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $(VENV)/.docs

clean:
	rm -rf $(VENV) build site *.egg-info
