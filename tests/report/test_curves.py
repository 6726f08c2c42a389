"""Curves of runs and studies: the numbers beside each figure, against those it was drawn from."""

import csv
import json
import math

import pytest

from stage_rl.errors import InputError
from stage_rl.report.curves import curves, frontier, scores
from stage_rl.report.figures import paper_style
from stage_rl.study.tables import RunResult

STEPS = [10, 20, 30]
KLS = [0.01, 0.09, 0.04]


def a_run(arm, seed, golds, cell="hot"):
    series = {
        "validation/gold": [STEPS, golds],
        "probe/kl": [STEPS, KLS],
        "probe/entropy_drift": [STEPS, [0.0, 0.1, None]],
        "entropy/policy": [STEPS, [3.0, 2.0, 1.0]],
        "entropy/gap": [STEPS, [0.0, 0.5, -0.5]],
    }
    run = {"cell": cell, "arm": arm, "seed": seed, "steps": STEPS[-1], "failed": ""}
    return run | {"series": series}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study of two arms in one cell, one of them in another cell too."""
    folder = tmp_path_factory.mktemp("study")
    runs = [
        a_run("grpo", 1, [0.2, 0.4, 0.6]),
        a_run("grpo", 2, [0.4, 0.4, 0.2]),
        a_run("stage", 1, [0.5, 0.6, 0.7]),
        a_run("grpo", 1, [0.1, 0.1, 0.1], cell="cold"),
    ]
    about = {"cells": {"hot": [], "cold": [], "empty": []}, "arms": {"grpo": {}, "stage": {}}}
    results = {"study": about, "base": {"hot": {"validation/gold": 0.3}}, "runs": runs}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def a_run_folder(tmp_path, tiny_recipe):
    """A function that makes the folder of a run from rows of its metrics."""
    from stage_rl.config import load_recipe, resolved_json

    def make(name, rows, *overrides):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.json").write_text(resolved_json(load_recipe(tiny_recipe, overrides)))
        lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        return folder

    return make


def drawn(out, make, *inputs, **options):
    """The rows beside a figure, after a look at its pictures."""
    with paper_style():
        files = make(list(inputs), **options).write(out)
    assert all(file.stat().st_size > 1000 for file in files[:-1])
    with files[-1].open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, *columns, **chosen):
    return [
        tuple(float(row[column]) for column in columns)
        for row in rows
        if all(row[key] == value for key, value in chosen.items())
    ]


def test_scores_are_means_over_seeds_from_the_base_on(study, tmp_path):
    rows = drawn(tmp_path / "a.pdf", scores, study)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    hot = numbers(rows, "step", "mean", "standard_error", "runs", cell="hot", arm="grpo")
    # Of 0.2 and 0.4: 0.3 +- 0.2 / sqrt 2 / sqrt 2 = 0.1; of 0.6 and 0.2: 0.4 +- 0.2.
    wanted = [(0, 0.3, 0, 1), (10, 0.3, 0.1, 2), (20, 0.4, 0, 2), (30, 0.4, 0.2, 2)]
    assert hot == [pytest.approx(row) for row in wanted]
    # No base is known there; the arm that did not run has no row.
    assert numbers(rows, "step", cell="cold") == [(10,), (20,), (30,)]
    assert {row["arm"] for row in rows if row["cell"] == "cold"} == {"grpo"}


def test_curves_have_the_entropies_of_policy_and_reference_and_the_probe(study, tmp_path):
    rows = drawn(tmp_path / "a.png", curves, study, window=1, cell="hot", arms=["stage"])
    of = {name: numbers(rows, "step", "mean", metric=name) for name in {r["metric"] for r in rows}}
    assert of == {
        "entropy/policy": [(10, 3.0), (20, 2.0), (30, 1.0)],
        "entropy/reference": [(10, 3.0), (20, 1.5), (30, 1.5)],
        "probe/entropy_drift": [(10, 0.0), (20, 0.1)],
        "probe/kl": list(zip(STEPS, KLS, strict=True)),
    }
    smooth = drawn(tmp_path / "b.png", curves, study, window=3, cell="hot", arms=["stage"])
    # Ends count twice: (3 + 3 + 2) / 3. The probe is not smoothed.
    assert numbers(smooth, "mean", metric="entropy/policy")[0] == pytest.approx((8 / 3,))
    assert numbers(smooth, "mean", metric="probe/kl")[1] == (0.09,)


def test_the_frontier_is_read_at_the_root_of_the_divergence(study, tmp_path):
    rows = drawn(tmp_path / "a.png", frontier, study, cell="hot", labels=["GRPO", "STAGE"])
    own = numbers(rows, "root_kl", "validation/gold", arm="STAGE", seed="1")
    wanted = [(0, 0.3), (0.1, 0.5), (0.3, 0.6), (0.2, 0.7)]
    assert own == [pytest.approx(pair) for pair in wanted]
    mean = dict(numbers(rows, "root_kl", "validation/gold", arm="GRPO", seed="mean"))
    errors = dict(numbers(rows, "root_kl", "standard_error", arm="GRPO", seed="mean"))
    assert max(mean) < 0.3
    for root, score in mean.items():
        # First passages: from 0.3 at 0 to 0.2 and 0.4 at 0.1, both to 0.4 at 0.3.
        first = 0.3 - root if root <= 0.1 else 0.1 + root
        second = 0.3 + root if root <= 0.1 else 0.4
        assert score == pytest.approx((first + second) / 2)
        assert errors[root] == pytest.approx(abs(second - first) / math.sqrt(2) / math.sqrt(2))


@pytest.mark.parametrize(
    "names", [("GRPO", "STAGE"), ("beta_matched_in_the_healthy_cell", "x" * 30)]
)
def test_the_names_of_arms_end_within_the_figure(study, names):
    with paper_style():
        figure = frontier([study], labels=list(names)).figure
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_runs_of_one_recipe_and_several_seeds_are_one_curve(a_run_folder, tmp_path):
    runs = [
        a_run_folder("a", [{"reward/mean": 1.0}, {"reward/mean": 2.0}], "seed=1"),
        a_run_folder("b", [{"reward/mean": 3.0}], "seed=2", "run.save_every=7"),
        a_run_folder("c", [{"reward/mean": 5.0}], "optimizer.lr=0.5"),
    ]
    rows = drawn(tmp_path / "x.png", scores, *runs, window=1)
    assert numbers(rows, "step", "mean", "runs", arm="tiny") == [(1, 2.0, 2), (2, 2.0, 1)]
    assert numbers(rows, "mean", arm="tiny optimizer.lr=0.5 seed=0") == []
    assert numbers(rows, "mean", arm="tiny optimizer.lr=0.5") == [(5.0,)]


def test_metrics_of_a_run_are_its_own(a_run_folder):
    from stage_rl.study.run import read_series

    folder = a_run_folder("a", [{"kl/mean": 0.25}, {"kl/mean": None}, {"kl/mean": 1 / 3}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "kl/me')  # a stop cut it short
    run = RunResult(0, "", read_series(folder / "metrics.jsonl"))
    assert run.values("kl/mean") == ([1, 3], [0.25, 0.333333])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (scores, {"cell": "hott"}, "--cell: unknown 'hott'; did you mean 'hot'"),
        (scores, {"arms": ["stag"]}, "--arm: unknown 'stag'; did you mean 'stage'"),
        (scores, {"labels": ["one"]}, "--label: 1 for 2 curves; write its own for each"),
        (scores, {"labels": ["one", "one"]}, "--label: 2 for 2 curves; write its own for each"),
        (scores, {"metrics": ["probe/k"]}, "--metric: unknown 'probe/k'; did you mean 'probe/kl'"),
        (frontier, {"score": "validation/x"}, "no run has validation/x and probe/kl; train with"),
    ],
)
def test_a_wrong_name_is_answered(study, make, options, message):
    with pytest.raises(InputError, match=message):
        make([study], **options)


def test_a_folder_of_neither_is_refused(tmp_path, a_run_folder):
    with pytest.raises(InputError, match="holds neither a run nor the results of a study"):
        curves([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no run has entropy/policy or entropy/gap or kl/mean"):
        curves([a_run_folder("a", [{"reward/mean": 1.0}])])
