"""docs/metrics.md names every metric that a run writes."""

import fnmatch
import re
from pathlib import Path

import pytest
from run_files import steps_of

from stage_rl.evaluation.results import ImageScore, Results
from stage_rl.training import monitor
from stage_rl.training.loop import train

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    """The names of the table's first column; NAME and PHASE stand for any word."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    names = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows))
    return [re.sub(r"NAME|PHASE", "*", name) for name in names]


class Constant:
    def run(self, policy, setup, *, name, engine):
        scores = {"gold": (ImageScore("task", 0, 0, 0.5),)}
        return Results(name, setup, scores, ("gold",))


@pytest.fixture
def full_run(recipe, monkeypatch):
    monkeypatch.setitem(monitor.BENCHMARKS, "shapes-geneval", Constant())
    return train(
        recipe(
            "steps=2",
            "evaluation={benchmark: shapes-geneval, every: 1}",
            "rollout.resample_equal_groups=1",
            "algorithm.importance_sampling=truncated",
            "tripwires.kl=1e-9",
        )
    )


def test_every_metric_of_a_run_is_in_the_table(full_run):
    names, written = documented(), set().union(*steps_of(full_run))
    missing = [n for n in written if not any(fnmatch.fnmatchcase(n, known) for known in names)]
    assert missing == []
    groups = {name.partition("/")[0] for name in written}
    assert groups >= {"resample", "validation", "tripwires", "mismatch", "throughput", "memory"}


def test_every_exact_name_of_the_table_is_written_by_some_run(full_run):
    written = set().union(*steps_of(full_run))
    unwritten = {n for n in documented() if "*" not in n and n not in written}
    assert unwritten <= {"memory/process_gib"}  # absent on a machine with a GPU
