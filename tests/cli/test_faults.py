"""docs/faults.md: the commands that showed a fault say what the page shows, and its tests exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stage_rl import cli

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", re.M)
NAMED = re.compile(r"`((?:[\w/]+\.py)?)::(test_\w+)`")
SHELL = re.compile(r"[;>$]|LC_ALL")
"""A command that is a shell's, or changes what a process starts with."""


def shown(code, said):
    """What the page shows of a command that failed: its last line and the exit code."""
    return f"{said.splitlines()[-1]}\nexit code {code}\n" if code else ""


@pytest.fixture
def shell(tmp_path):
    """Runs a line with bash, where `stage` is a process of its own."""
    folders = map(str, (Path(cli.__file__).parents[2], TESTS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    stage = f'stage() {{ {sys.executable} -m stage_rl "$@"; }}\n'

    def run(line):
        done = subprocess.run(
            ["bash", "-c", stage + line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("section", re.findall(r"```console\n(.*?)```", PAGE, re.S))
def test_a_command_says_what_the_page_shows(section, tmp_path, shell, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, wanted in COMMAND.findall(section):
        *before, words = re.split(r"(?=\bstage )", line, maxsplit=1)
        if SHELL.search(line) or not words.startswith("stage "):
            assert shown(*shell(line)) == wanted, line
            continue
        with pytest.MonkeyPatch.context() as patch:
            for assignment in shlex.split("".join(before)):
                patch.setenv(*assignment.split("="))
            assert shown(*run_main(*shlex.split(words)[1:])) == wanted, line


def test_the_tests_that_are_named_exist():
    file, number = "", 0
    for place, name in NAMED.findall(PAGE):
        file, number = place or file, number + 1
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), (file, name)
    assert number > 20


def test_the_floors_that_keep_faults_out_are_named():
    project = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"h11>=0.16,' in project
    assert '"pillow>=11.3"' in project
