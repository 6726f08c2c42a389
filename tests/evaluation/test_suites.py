"""What a benchmark measures, what is held against the paper, and what cannot be."""

import hashlib
from pathlib import Path

import pytest

from stage_rl.evaluation.published import departures, statements
from stage_rl.evaluation.published_figures import FIGURES, PUBLISHED
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.results import ImageScore, Setup
from stage_rl.evaluation.suites import (
    ALL,
    GENEVAL,
    HPS,
    T2I_COMPBENCH,
    find_suite,
    find_suites,
    own_settings,
    parse_overrides,
    scorers_of,
)
from stage_rl.policies.emu3 import Emu3Policy
from stage_rl.policies.janus import JanusPolicy
from stage_rl.policies.llamagen import LlamaGenPolicy
from stage_rl.rewards import ocr
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.rewards.detectors import openmmlab
from stage_rl.rewards.detectors.openmmlab import is_official
from stage_rl.rewards.external import MPLUG_SCORER
from stage_rl.shapes.suite import SHAPES_GENEVAL
from stage_rl.types import Prompt

JPEG = ("hps.jpeg_quality=75",)
HEAD = ("aesthetic.head=none",)


def said(benchmark, ours, settings=(), *, others=(), smoke=False, missing=0.0, **changes):
    """What follows a table where the rewards have these settings beside the benchmark's."""
    drawn = {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 0} | changes
    suite = find_suite(benchmark)
    scorers = scorers_of(suite, parse_overrides(settings), smoke=smoke)
    configs = {name: config for name, (_, config) in scorers.items()}
    shown = {name: config.model_dump(mode="json") for name, config in configs.items()}
    known = departures(
        Setup(benchmark, "", scorers=shown, **drawn),
        smoke=smoke,
        scorers=configs,
        own=own_settings(suite, scorers),
        missing=missing,
        others=others,
    )
    return statements(benchmark, ours, known, smoke=smoke)


@pytest.mark.parametrize(
    ("family", "suite", "drawn"),
    [
        (JanusPolicy, GENEVAL, (5.0, 0)),
        (LlamaGenPolicy, GENEVAL, (7.5, 1000)),
        (Emu3Policy, GENEVAL, (3.0, 2048)),
        (LlamaGenPolicy, SHAPES_GENEVAL, (2.5, 1000)),
    ],
)
def test_a_benchmark_without_a_scale_of_its_own_is_drawn_with_the_family_s(family, suite, drawn):
    sampling = Request().sampling(suite, family)
    assert (sampling.guidance_scale, sampling.top_k) == drawn
    assert Request(guidance_scale=2.0).sampling(suite, family).guidance_scale == 2


def test_published_figures_stand_beside_ours():
    lines = said("hps", {"hps": {"overall": 29.123}}, JPEG)
    assert lines[:2] == ["", "published (STAGE, arXiv 2509.25027):"]
    assert [line.split() for line in lines[2:]] == [
        ["hps", "overall"],
        ["this", "model", "29.12"],
        ["Janus-Pro-7B", "28.64"],
    ]
    # A measure that was not taken has none; a benchmark that is not the paper's says nothing.
    assert (
        sum(line.startswith("published") for line in said("drawbench", {"pickscore": {}}, HEAD))
        == 1
    )
    assert said("shapes-geneval", {"gold": {}}, others=["x"]) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guidance_scale": 3.0}, "drawn with guidance 3, the paper's is 5"),
        ({"temperature": 0.5}, "drawn at temperature 0.5, the paper's is 1"),
        ({"top_k": 9}, "drawn from the 9 likeliest tokens, the paper's from all"),
        ({"others": ["not all"]}, "the published protocol: not all"),
        ({"settings": ()}, "the paper scores JPEG files of quality 75; add hps.jpeg_quality=75"),
        ({"settings": ("hps.path=x/y",)}, "hps.path=x/y is not known to be xswu/HPSv2"),
        ({"settings": ("hps=null", "h.kind=hps_v3")}, "left out: hps"),
    ],
)
def test_another_protocol_is_said_below_the_figures(changes, reason):
    lines = said("hps", {"hps": {"overall": 29.0}}, **{"settings": JPEG} | changes)
    assert lines[-1].startswith("not the published protocol: ")
    assert reason in lines[-1]
    assert any("28.64" in line for line in lines)


def test_hps_v3_stands_beside_figures_of_other_prompts():
    lines = said("hps", {"hps_v3": {"overall": 9.0}}, ("hps_v3.kind=hps_v3", *JPEG))
    assert ["Kolors", "10.55"] in [line.split() for line in lines]
    assert "not the published protocol (hps_v3): its published figures are of" in lines[-1]
    assert not any("HPDv3" in line for line in said("hps", {"hps": {}}, JPEG))


def test_a_smoke_run_is_held_against_nothing():
    (line,) = said("hps", {"hps": {"overall": 0.5}}, JPEG, smoke=True)
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


def test_settings_nearer_to_the_paper_are_no_departure():
    own, release = (
        "\n".join(said("t2i-compbench", {"score": {}}, settings))
        for settings in ((), ("spatial.compat=release", "depth.compat=release"))
    )
    assert "'on top of' can hold" in own
    assert "its axes are in order" in own
    assert "compat" not in release
    other = said("t2i-compbench", {"score": {}}, ("spatial.threshold=0.5",))[-1]
    assert "spatial.threshold=0.5, the benchmark has " in other


def test_the_evaluators_own_detector_is_known_by_its_sum(tmp_path, monkeypatch):
    file = tmp_path / "x.pth"
    file.write_bytes(b"weights")
    assert not is_official(str(file))
    sums = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(openmmlab, "OFFICIAL_SHA256", sums[:8])

    def last(**settings):
        texts = [f"geneval.detector.{key}={value}" for key, value in settings.items()]
        return said("geneval", {"correct": {"overall": 0.8}}, texts)[-1]

    own = last(path=file, batch_size=2)
    assert own == (
        "not the published protocol: CLIP tells colours in fp32, there under fp16 autocast"
    )
    assert "not the evaluator's own" in last(path="weights/other.pth")
    # Other settings are told one by one; the weights are the evaluator's own all the same.
    for settings, told in (
        ({"jpeg_quality": 75}, "detector.jpeg_quality=75, the benchmark has null"),
        ({"clip": "x/y"}, "detector.clip=x/y is not known to be openai/clip"),
    ):
        line = last(path=file, **settings)
        assert told in line
        assert "not the evaluator's own" not in line
    assert (
        "geneval.threshold=0.25, the benchmark has 0.3"
        in said("geneval", {}, ["geneval.threshold=0.25"])[-1]
    )


def test_the_published_tables_add_up():
    # GenEval's overall is the mean of the six tasks, to the digits that are printed.
    table = PUBLISHED["geneval", "correct"]
    assert table.columns[0] == "overall"
    for figures in table.models.values():
        overall, *tasks = figures.split()
        if "-" not in tasks:
            assert float(overall) == pytest.approx(sum(map(float, tasks)) / 6, abs=0.011)
    for table in PUBLISHED.values():
        assert table.source
        assert all(len(row.split()) == len(table.columns) for row in table.models.values())
    # WISE's overall is the weighted sum, UniGenBench's the mean of its ten.
    for figures in PUBLISHED["wise", FIGURES].models.values():
        if "-" not in figures.split():
            overall, culture, *others = map(float, figures.split())
            assert overall == pytest.approx(0.4 * culture + 0.12 * sum(others), abs=1e-4)
    models = PUBLISHED["unigenbench", FIGURES].models
    overall, *ten = map(float, models["Janus-Pro"].split())
    assert overall == pytest.approx(sum(ten) / 10, abs=0.005)


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


def test_the_published_judge_is_no_departure():
    lines = said("geneval2", {FIGURES: {"GM": 12.345, "AM": 40.0}}, guidance_scale=1.0, top_k=5)
    assert not any("not the published" in line for line in lines)
    assert [line.split() for line in lines if line.startswith("this model")] == [
        ["this", "model", "12.35", "40"]
    ]
    # A column of the user's own stands before the suite's and is no judge of it.
    added = said("wise", {}, ["mine.kind=external", "mine.command=[x]", "judge.batch_size=2"])
    assert added[-1] == "not the published protocol: the judge answers without vLLM"
    assert not any(
        "judged by" in line for line in said("dpg", {}, [f"judge.command=[py, {MPLUG_SCORER}]"])
    )


@pytest.mark.parametrize(
    ("benchmark", "settings", "reason"),
    [
        ("geneval2", ["path=x/y"], "by x/y, the published figures by Qwen3-VL-8B-Instruct, bf16"),
        ("geneval2", ["mode=yes_share"], "mode=yes_share, the benchmark has token_probability"),
        ("geneval2", ["dtype=float16"], "judge.dtype=float16, the benchmark has bfloat16"),
        ("oneig-alignment", ["answers=[yep,Yep]"], 'judge.answers=["yep", "Yep"], the benchmark'),
        ("dpg", ["command=[py,/x/mplug_scorer.py]"], "judged by /x/mplug_scorer.py, the published"),
        ("dpg", ["kind=vqa_score"], "judge.kind=vqa_score, the benchmark has external"),
        ("unigenbench", ["path=x/3B"], "judged by x/3B, the published figures by Gemini-2.5-Pro"),
        ("unigenbench", [], "judged by CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1, the"),
        ("cvtg", [], "judged by rapidocr 3, the published figures by PaddleOCR 2.10: not compar"),
        (
            "oneig-text",
            [],
            "greedy, there as the checkpoint's own settings say; a transcription may",
        ),
    ],
)
def test_another_judge_or_way_to_ask_than_the_published_is_said(benchmark, settings, reason):
    lines = said(benchmark, {}, [f"judge.{text}" for text in settings])
    assert reason in lines[-1]


def test_a_copy_of_the_program_that_comes_with_the_package_is_that_program(tmp_path):
    copy = tmp_path / "judge.py"
    copy.write_bytes(Path(MPLUG_SCORER).read_bytes())
    assert "judged by" not in said("dpg", {}, [f"judge.command=[py, {copy}]"])[-1]
    copy.write_text("print()")
    assert f"judged by {copy}, the" in said("dpg", {}, [f"judge.command=[py, {copy}]"])[-1]


@pytest.mark.parametrize(("version", "is_published"), [("2.10.0", True), ("3.7.0", False)])
def test_texts_are_read_as_published_by_paddleocr_2_alone(version, is_published, monkeypatch):
    monkeypatch.setattr(ocr.importlib.metadata, "version", lambda name: version)
    cvtg = said("cvtg", {}, ["ocr.engine=paddleocr"])
    assert any("judged by paddleocr 3, the pub" in line for line in cvtg) is not is_published
    assert any("not the published" in line for line in cvtg) is not is_published
    told = said("ocr", {}, ["ocr.engine=paddleocr"])
    assert any("than PaddleOCR 2 reads" in line for line in told) is not is_published
    # CVTG-2K's script turns lines that are upside down.
    other = said("cvtg", {}, ["ocr.engine=paddleocr", "ocr.turned=false"])[-1]
    assert "ocr.turned=false, the benchmark has true" in other


def test_clip_scores_of_cvtg_stand_beside_published_ones():
    lines = [line.split() for line in said("cvtg", {"clip": {"overall": 0.75}})]
    assert ["this", "model", "0.75"] in lines
    assert ["Qwen-Image", "0.8017"] in lines


def test_a_copy_of_the_judge_on_disk_may_be_the_same(tmp_path):
    last = said("geneval2", {}, [f"judge.path={tmp_path}"])[-1]
    assert last.endswith("bf16: comparable if that is Qwen/Qwen3-VL-8B-Instruct")


def test_too_many_images_without_a_score_void_the_comparison():
    assert "2.0% of the images have no score" in said("wise", {}, missing=0.02)[-1]
    assert "no score" not in said("wise", {}, missing=0.01)[-1]


def test_another_kind_of_scorer_takes_none_of_the_settings_of_the_one_it_replaces():
    overrides = parse_overrides(["judge.kind=judge", "judge.path=x/y", "judge.mode=yes_share"])
    (_, config) = scorers_of(find_suite("dpg"), overrides, smoke=False)["judge"]
    assert (config.kind, config.model_dump()["path"]) == ("judge", "x/y")


def test_prompt_sets_that_come_with_the_package_have_the_size_they_name():
    for suite in find_suites(["all"]):
        prompt_set = suite.prompt_set
        assert prompt_set.size is not None
        if prompt_set.load is not None:
            assert len(prompt_set.prompts(None)) == prompt_set.size
    # No two sets share a random stream.
    firsts = {suite.prompt_set.first_index: suite.prompt_set.name for suite in find_suites(["all"])}
    assert len(firsts) == len({suite.prompt_set.name for suite in find_suites(["all"])})
