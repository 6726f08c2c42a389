# The two commands of the README. Each makes .venv and installs into it; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: train test

train: $(INSTALLED)
	$(BIN)/stage train shapes_geneval

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
