"""Ways to run the command line, and stand-ins for what its verbs call."""

import subprocess
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from stage_rl import cli

RUN = """
import sys
from stage_rl.cli import main
sys.argv = ["stage", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "scipy"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.fixture
def stage():
    """Runs a verb in this process."""

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def stage_process():
    """Runs a verb in a process of its own, which fails where torch was loaded."""

    def run(*arguments, folder=None):
        command = [sys.executable, "-c", RUN, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)

    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs main(); returns its exit code and what it wrote to the error stream."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["stage", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with one name in place of a real one."""

    def put(module, name, value):
        replacement = ModuleType(module)
        setattr(replacement, name, value)
        monkeypatch.setitem(sys.modules, module, replacement)

    return put
