# The two commands of the README. Each makes .venv and installs into it; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/installed
FOR_TESTS := .venv/installed-dev

.PHONY: train test floor

train: $(INSTALLED)
	$(BIN)/stage train shapes_geneval

test: $(FOR_TESTS)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not slow"

# The tests at the oldest versions that pyproject.toml allows, in .venv-floor. Of torch the version
# that CI runs: older ones come for GPUs alone.
floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not slow"

.venv-floor/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-floor
	grep -oE '"[a-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"' | grep -vE '^(torch|setuptools)>' \
		| sed 's/>=/==/' > .venv-floor/floors.txt
	grep '^torch==' constraints.txt >> .venv-floor/floors.txt
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-floor/floors.txt -e '.[dev]'
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[cpu,report]'
	touch $@

# It holds what `train` needs too, and says so.
$(FOR_TESTS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	touch $(INSTALLED) $@
