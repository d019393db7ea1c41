# The embedded model. `make mini` trains it from scratch and resumes where it stopped;
# `make mini-report` measures every gate on prompts held out.
.PHONY: mini mini-report

mini: install
	$(BIN)/python -m mini make $(ARGS)

mini-report: install
	$(BIN)/python -m mini report $(ARGS)
