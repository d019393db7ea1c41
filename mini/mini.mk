# The embedded model. `make mini` makes it from nothing and goes on where it stood;
# `make mini-report` measures every gate on prompts held out.
.PHONY: mini mini-report

mini: install
	$(BIN)/python -m mini make $(ARGS)

mini-report: install
	$(BIN)/python -m mini report $(ARGS)
