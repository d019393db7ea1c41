# make run: install, then the studio on the embedded model.  make test: install, then all tests
# that need no GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PAGES := $(wildcard *.py) audio core lofi mini models nvim runtime tests web

.PHONY: install run fetch test check format bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,mini]'
	@touch $@

run: install
	$(BIN)/python app.py --model mini $(ARGS)

fetch: install
	$(BIN)/python app.py fetch $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

check: install
	$(BIN)/ruff format --check $(PAGES)
	$(BIN)/ruff check $(PAGES)
	@! command -v luacheck >/dev/null || (cd nvim && luacheck -q .)
	@! command -v stylua >/dev/null || (cd nvim && stylua --check .)

format: install
	$(BIN)/ruff format $(PAGES)
	$(BIN)/ruff check --fix $(PAGES)

bench: install
	$(BIN)/python bench.py $(ARGS)

clean:
	rm -rf $(VENV)

-include mini/mini.mk
