# make run: install, then the studio on the embedded model.
# make test: install, then all tests that need no GPU.  make test-fast: the unit tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard *.py) audio core docs lofi mini models nvim runtime tests web

.PHONY: install run fetch test test-fast coverage check docs format bench clean
.PHONY: newest lowest space

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,mini,int8]'
	@touch $@

run: install
	$(BIN)/python app.py --model mini $(ARGS)

fetch: install
	$(BIN)/python app.py fetch $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# No browser, no process of its own, no model that takes longer than a second.
test-fast: install
	$(BIN)/python -m pytest tests/unit tests/test_house.py --numprocesses 2 \
		-m "not gpu and not long and not slow" $(ARGS)

coverage: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report term $(ARGS)

check: install
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/vulture
	$(BIN)/pyright
	@! command -v luacheck >/dev/null || (cd nvim && luacheck -q .)
	@! command -v stylua >/dev/null || (cd nvim && stylua --check .)

format: install
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# What is generated from the code: the diagram, the table of errors.
docs: install
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python docs/write_errors.py

# Other environments than the pinned one: the newest versions that the ranges allow, the lowest,
# and what a Space installs.
newest lowest space: install
	$(BIN)/python tests/environments/make.py $@

bench: install
	$(BIN)/python bench.py $(ARGS)

clean:
	rm -rf .venv .venv-*

-include mini/mini.mk
