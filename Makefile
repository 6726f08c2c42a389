# The two commands of the README. Each makes .venv and installs into it; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/installed
FOR_TESTS := .venv/installed-dev

.PHONY: train test

train: $(INSTALLED)
	$(BIN)/stage train shapes_geneval

test: $(FOR_TESTS)
	$(BIN)/python -m pytest -m "not slow"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

# It holds what `train` needs too, and says so.
$(FOR_TESTS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	touch $(INSTALLED) $@
