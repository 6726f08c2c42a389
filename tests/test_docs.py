"""Files and names that README and docs point at exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILE = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|yaml|md))\b")
NAME = re.compile(r"\bstage_rl(?:\.\w+)+")
FILES = [f"/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("[!.]*/**/*.*")]
YOURS = {"janus_rewards.yaml"}
"""What a command of a document stands for."""


def examples(text):
    """The names of the files that code blocks of a text are, by their first line."""
    return set(re.findall(r"```python\n# (\w+\.py)\n", text))


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_every_file_that_is_named_exists(doc):
    text = doc.read_text(encoding="utf-8")
    named = set(FILE.findall(text)) - examples(text) - YOURS
    assert [file for file in named if not any(f.endswith(f"/{file}") for f in FILES)] == []


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_every_dotted_name_exists(doc):
    for name in NAME.findall(doc.read_text(encoding="utf-8")):
        found, parts = importlib.import_module("stage_rl"), name.split(".")[1:]
        for depth, part in enumerate(parts, start=1):
            if not hasattr(found, part):
                importlib.import_module(".".join(["stage_rl", *parts[:depth]]))
            found = getattr(found, part)
