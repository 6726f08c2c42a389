"""What a benchmark measures, what is held against the paper, and what cannot be."""

import pytest

from stage_rl.evaluation.published import FIGURES, JUDGED, PUBLISHED, departures, statements
from stage_rl.evaluation.results import ImageScore, Setup
from stage_rl.evaluation.suites import (
    ALL,
    GENEVAL,
    HPS,
    T2I_COMPBENCH,
    find_suite,
    find_suites,
    parse_overrides,
    scorers_of,
)
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.rewards.clip import HpsConfig
from stage_rl.types import Prompt

SCORERS = {"hps": HpsConfig.model_validate({"jpeg_quality": 75})}


def said(benchmark, ours, *, guidance_scale=5.0, temperature=1.0, top_k=0, **changes):
    drawn = {"temperature": temperature, "top_k": top_k}
    setup = Setup(benchmark, "", guidance_scale, 0, "mixed", **drawn)
    known = {"complete": True, "smoke": False, "scorers": {}, "left_out": ()} | changes
    return statements(benchmark, ours, departures(setup, **known), smoke=known["smoke"])


def test_published_figures_stand_beside_ours():
    lines = said("hps", {"hps": {"overall": 29.123}}, scorers=SCORERS)
    assert lines[:2] == ["", "published (STAGE, arXiv 2509.25027):"]
    assert [line.split() for line in lines[2:]] == [
        ["hps", "overall"],
        ["this", "model", "29.12"],
        ["Janus-Pro-7B", "28.64"],
    ]
    # A measure that was not taken has none; a benchmark that is not the paper's says nothing.
    assert sum("published" in line for line in said("drawbench", {"pickscore": {}})) == 1
    assert said("shapes-geneval", {"gold": {}}, complete=False) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guidance_scale": 3.0}, "drawn with guidance 3, the paper's is 5"),
        ({"temperature": 0.5}, "drawn at temperature 0.5, the paper's is 1"),
        ({"top_k": 9}, "drawn from the 9 likeliest tokens, the paper's from all"),
        ({"complete": False}, "not all images of the benchmark are there"),
        ({"left_out": ["x"]}, "left out: x"),
        (
            {"scorers": {"hps": HpsConfig.model_validate({})}},
            "the paper scores JPEG files of quality 75; add hps.jpeg_quality=75",
        ),
    ],
)
def test_another_protocol_is_said_below_the_figures(changes, reason):
    lines = said("hps", {"hps": {"overall": 29.0}}, **{"scorers": SCORERS} | changes)
    assert lines[-1].startswith("not the published protocol: ")
    assert reason in lines[-1]
    assert any("28.64" in line for line in lines)


def test_a_smoke_run_is_held_against_nothing():
    (line,) = said("hps", {"hps": {"overall": 0.5}}, scorers=SCORERS, smoke=True)
    assert "a smoke run" in line


def test_what_differs_is_said_row_by_row():
    lines = said("t2i-compbench", {"score": {"color": 0.5}}, temperature=0.5)
    stage = next(line for line in lines if line.startswith("STAGE")).split()
    assert stage == [
        "STAGE",
        *["0.7463", "0.4388", "0.6443", "0.3053", "0.3667", "0.5278", "0.3107", "0.3779"],
    ]
    for begin in (
        *("(color, shape, texture): BLIP", "(numeracy): GroundingDINO", "(spatial): "),
        "protocol: drawn at temperature 0.5",
    ):
        assert any(begin in line for line in lines)


@pytest.mark.parametrize(
    ("detector", "is_own"),
    [
        ({"path": "a/model"}, False),
        ({"path": "weights/x.pth", "batch_size": 2}, True),
        ({"path": "weights/x.pth", "shortest_side": 600}, False),
        ({"path": "weights/x.pth", "jpeg_quality": 75}, False),
    ],
)
def test_the_evaluators_own_detector_is_no_departure(detector, is_own):
    settings = {"kind": "geneval", "detector": {"kind": "mask2former", **detector}}
    scorers = {"geneval": RewardConfig.model_validate(settings)}
    last = said("geneval", {"correct": {"overall": 0.8}}, scorers=scorers)[-1]
    assert ("not the evaluator's own" not in last) == is_own


def test_the_published_tables_add_up():
    # GenEval's overall is the mean of the six tasks, to the digits that are printed.
    columns, models = PUBLISHED["geneval", "correct"]
    assert columns.split()[0] == "overall"
    for figures in models.values():
        overall, *tasks = figures.split()
        if "-" not in tasks:
            assert float(overall) == pytest.approx(sum(map(float, tasks)) / 6, abs=0.011)
    for names, rows in PUBLISHED.values():
        assert all(len(figures.split()) == len(names.split()) for figures in rows.values())


def test_every_benchmark_names_scorers_that_exist():
    for suite in find_suites(["shapes-geneval", "all"]):
        for scorer in suite.scorers.values():
            assert RewardConfig.model_validate({**scorer.settings, **scorer.smoke_settings})
        assert suite is find_suite(suite.name)
    assert next(suite.name for suite in find_suites(["ocr", "all"])) == "ocr"
    assert len(find_suites(["ocr", "all"])) == len(ALL)


def part(name):
    return Prompt("x", 0, {"category": "complex", "complex_part": name, "spatial_info": {}})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("spatial", ["attributes", "spatial"]),
        ("action", ["attributes", "clip"]),
        ("all", ["attributes", "spatial", "clip"]),
    ],
)
def test_a_complex_prompt_is_the_mean_of_what_its_part_asks(name, asked):
    suite = T2I_COMPBENCH
    scorers = [key for key, scorer in suite.scorers.items() if scorer.asks(part(name))]
    assert scorers == asked
    values = dict(zip(asked, (0.2, 0.6, 0.1), strict=False))
    scores = {key: Score(value, "") for key, value in values.items()}
    # (0.2 + 0.6) / 2 = 0.4; with all three (0.2 + 0.6 + 0.1) / 3 = 0.3.
    expected = 0.3 if name == "all" else 0.4
    assert suite.measures_of(part(name), scores) == {"score": pytest.approx(expected)}


def scores(task, *by_prompt):
    return [
        ImageScore(task, prompt, image, value)
        for prompt, values in enumerate(by_prompt)
        for image, value in enumerate(values)
    ]


def test_geneval_counts_images_and_prompts_with_any_correct():
    assert GENEVAL.figures_of(scores("colors", [1.0, 0.0], [0.0, 0.0])) == {
        "images correct": 0.25,
        "prompts with any correct": 0.5,
    }


def test_hps_deviates_over_ten_parts_of_each_style():
    # Parts of two prompts with means 0, 1, 0, 1, ...: their deviation is 1/2; photo has none.
    anime = scores("anime", *([float(i // 2 % 2)] for i in range(20)))
    photo = scores("photo", *([3.0] for _ in range(20)))
    assert HPS.figures_of([*anime, *photo]) == {"deviation over ten parts": 0.25}


def test_hps_is_reported_a_hundredfold():
    measures = HPS.measures_of(Prompt("x"), {"hps": Score(0.2864, "")})
    assert measures == {"hps": pytest.approx(28.64)}


def test_another_judge_than_the_published_one_is_said():
    def lines(judge):
        known = {"kind": "judge", "mode": "token_probability", "template": "{question}"}
        scorers = {"judge": RewardConfig.model_validate(known | {"path": judge})}
        return said("geneval2", {FIGURES: {"GM": 12.345, "AM": 40.0}}, scorers=scorers)

    same = lines("Qwen/Qwen3-VL-8B-Instruct")
    assert not any("not comparable" in line for line in same)
    assert [line.split() for line in same if line.startswith("this model")] == [
        ["this", "model", "12.35", "40"]
    ]
    assert "judged by x/y, the published figures by Qwen3-VL-8B-Instruct" in lines("x/y")[-1]
    # A column of the user's own stands before the suite's and is no judge of it.
    added = {"mine": RewardConfig.model_validate({"kind": "external", "command": ["true"]})}
    assert not any("judged by" in line for line in said("wise", {}, scorers=added))
    # A program is DPG's judge; a model in its place is another.
    external = RewardConfig.model_validate({"kind": "external", "command": ["true"]})
    assert not any("judged by" in line for line in said("dpg", {}, scorers={"judge": external}))
    assert "2.0% of the answers are missing" in said("wise", {}, missing=0.02)[-1]
    assert "missing" not in said("wise", {}, missing=0.01)[-1]


def test_another_kind_of_scorer_takes_none_of_the_settings_of_the_one_it_replaces():
    overrides = parse_overrides(["judge.kind=judge", "judge.path=x/y", "judge.mode=yes_share"])
    (_, config) = scorers_of(find_suite("dpg"), overrides, smoke=False)["judge"]
    assert (config.kind, config.model_dump()["path"]) == ("judge", "x/y")


def test_judged_tables_have_a_cell_for_every_column():
    for name, table in JUDGED.items():
        assert find_suite(name).aggregate is not None
        for figures in table.models.values():
            assert len(figures.split()) == len(table.columns)
    # WISE's overall is the weighted sum, UniGenBench's the mean of its ten.
    for figures in JUDGED["wise"].models.values():
        overall, culture, *others = map(float, figures.split())
        assert overall == pytest.approx(0.4 * culture + 0.12 * sum(others), abs=1e-4)
    overall, *ten = map(float, JUDGED["unigenbench"].models["Janus-Pro"].split())
    assert overall == pytest.approx(sum(ten) / 10, abs=0.005)


def test_prompt_sets_that_come_with_the_package_have_the_size_they_name():
    for suite in find_suites(["all"]):
        prompt_set = suite.prompt_set
        assert prompt_set.size is not None
        if prompt_set.load is not None:
            assert len(prompt_set.prompts(None)) == prompt_set.size
    # No two sets share a random stream.
    firsts = {suite.prompt_set.first_index: suite.prompt_set.name for suite in find_suites(["all"])}
    assert len(firsts) == len({suite.prompt_set.name for suite in find_suites(["all"])})
