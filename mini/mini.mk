# The embedded model. `make mini` makes it from nothing and goes on where it stood;
# `make mini-report` measures every gate on prompts held out.
.PHONY: mini mini-report
PYTHON ?= .venv/bin/python

mini:
	$(PYTHON) -m mini make

mini-report:
	$(PYTHON) -m mini report
