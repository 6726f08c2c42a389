"""Files and names that README and docs point at exist; tables are those of committed results."""

import importlib
import re
from pathlib import Path

import pytest

from stage_rl.bench.record import into_page, page, read_records
from stage_rl.study.run import read_results
from stage_rl.study.tables import merge_results, study_tables

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILE = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|yaml|md))\b")
NAME = re.compile(r"\bstage_rl(?:\.\w+)+")
FILES = [f"/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("[!.]*/**/*.*")]
STUDIES = sorted(file.parent for file in ROOT.glob("studies/*/results.json"))
YOURS = {"janus_rewards.yaml", "leaves.py", "mine.yaml", "recipe.yaml", "RUN/recipe.yaml"}
"""What a command of a document stands for, and what a run writes."""


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


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_tables_of_a_study_are_those_of_its_results(folder):
    shown = {line.rstrip() for line in (ROOT / "docs/results.md").read_text().splitlines()}
    tables = study_tables(merge_results([read_results(folder)])).splitlines()
    assert [line for line in tables if line.rstrip() not in shown] == []


def test_the_tables_of_performance_are_those_of_the_committed_records():
    file = ROOT / "docs/performance.md"
    text = file.read_text(encoding="utf-8")
    assert into_page(text, page(read_records(ROOT / "benchmarks")), file=file) == text
