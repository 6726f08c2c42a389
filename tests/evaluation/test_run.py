"""Benchmarks from prompts to tables, on a tiny random policy and made-up scores."""

import json
import math
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_rl.config import load_recipe, load_reward
from stage_rl.errors import InputError, RewardError, Stopped
from stage_rl.evaluation import run
from stage_rl.evaluation.aggregation import WISE_WEIGHTS, dependency_graph
from stage_rl.evaluation.request import Request, asked_of, evaluation_of
from stage_rl.evaluation.run import run_suites, skipped
from stage_rl.evaluation.scores import folder_name
from stage_rl.evaluation.suites import ALL, PromptSet, find_suite, parse_overrides, scorers_of
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.training.loop import train

PER_PROMPT = {
    "geneval": 12 * 2,
    "t2i_compbench": 17 * 2,
    "hps": 8,
    "drawbench": 4,
    "ocr": 4,
    "geneval2": 4,
    "dpg": 6,
    "wise": 6,
    "oneig_alignment": 6,
    "oneig_text": 4,
    "longtext": 4,
    "cvtg": 2,
    "unigenbench": 10,
    "tiif": 11,
}
"""Images of a smoke run, by prompt set."""
CALLS = []


class PlainConfig(RewardConfig):
    """Scores an image by its brightness, and fails as often as it is told."""

    failures: int = 0
    password: str = ""

    def build(self, device):
        left = [self.failures]

        def score(images_NHWC, prompts):
            CALLS.append(len(prompts))
            if left[0]:
                left[0] -= 1
                raise ValueError("not today")
            return [Score(float(image.float().mean()), "brightness") for image in images_NHWC]

        return score


PLAIN = f"{__name__}:PlainConfig"


@pytest.fixture(autouse=True)
def _no_calls_yet():
    CALLS.clear()


@pytest.fixture
def few(monkeypatch):
    """Four prompts with two images each, so that a test takes a second."""
    real = PromptSet.prompts
    monkeypatch.setattr(PromptSet, "prompts", lambda *args, **more: real(*args, **more)[:4])


@pytest.fixture(scope="module")
def smoke(tiny_shapes, tmp_path_factory):
    """A whole smoke run: its folder and its results by benchmark."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    request = Request(out=out, smoke=True, dtype="float32", guidance_scale=2.0)
    results = run_suites(lambda: tiny_shapes, ["all"], request, model="tiny")
    return request, {one.benchmark: one for one in results}


def diversity(tiny_shapes, **fields):
    """The benchmark that is quickest to score; its own scorer gives way to others."""
    request = Request(**{"smoke": True, "dtype": "float32", "guidance_scale": 1.0} | fields)
    return run_suites(lambda: tiny_shapes, ["diversity"], request, model="tiny")[0]


def png_bytes(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("samples/*.png"))
    }


def test_a_smoke_run_goes_through_every_benchmark(smoke):
    request, results = smoke
    assert tuple(results) == ALL
    for name, one in results.items():
        suite = find_suite(name)
        assert set(one.by_task) <= set(one.scores)
        number = PER_PROMPT[suite.prompt_set.name]
        for scores in one.scores.values():
            # A made-up judge is unreadable now and then.
            assert len(scores) == number if suite.aggregate is None else 0 < len(scores) <= number
        assert "a smoke run: the prompts are the shapes world's" in one.table()
        figures = json.loads((request.out / f"{name}.json").read_text())
        assert figures.pop("environment")["packages"]["torch"]
        assert figures == json.loads(json.dumps(one.to_json()))
        with Image.open(request.out / f"{name}.png") as picture:
            assert picture.size[0] >= 192
        assert figures["bootstrap"].keys() == one.scores.keys()
    assert set(results["geneval"].scores) == {"correct", "strict", "reward"}
    assert {one.task for one in results["t2i-compbench"].scores["score"]} == {
        *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial"),
        "complex",
    }
    # Benchmarks of one prompt set share its images.
    folders = (request.out / "images").iterdir()
    assert sorted(folder.name for folder in folders) == sorted(PER_PROMPT)
    for name, number in PER_PROMPT.items():
        assert len(list((request.out / "images" / name).glob("*/samples/*.png"))) == number


def test_the_figures_of_a_judge_are_those_that_papers_print(smoke):
    _, results = smoke
    for name, figure in (
        *(("geneval2", "GM"), ("dpg", "overall"), ("wise", "overall"), ("oneig-text", "ED")),
        *(("oneig-alignment", "overall"), ("longtext", "words read"), ("cvtg", "NED")),
        *(("unigenbench", "overall"), ("tiif", "short")),
    ):
        assert figure in results[name].figures, name
        assert 0 <= results[name].figures["answers missing"] < 0.5
    # Every question about an image has one answer: 6 categories, one auditor.
    shares = {"answers missing", "images without a score"}
    assert set(results["wise"].figures) == {"overall", *WISE_WEIGHTS, *shares}
    wise = results["wise"]
    assert wise.figures["images without a score"] == 1 - len(wise.scores["score"]) / 6
    assert "mean of images" in wise.table()
    assert "overall" in results["geneval"].table()


def test_a_changed_aggregation_asks_no_judge_again(smoke, tiny_shapes, monkeypatch):
    request, results = smoke

    def never(*_args, **_options):
        raise AssertionError("the answers are there")

    monkeypatch.setattr(run, "Engine", never)
    monkeypatch.setattr(run, "made_up_reward", never)
    other = replace(find_suite("dpg"), aggregate=partial(dependency_graph, scale=1))
    monkeypatch.setattr(run, "find_suites", lambda names: [other])
    (again,) = run_suites(lambda: tiny_shapes, ["dpg"], request, model="tiny")
    assert again.scores == results["dpg"].scores
    assert again.figures["entity"] == pytest.approx(results["dpg"].figures["entity"] / 100)


def test_a_judge_that_is_interrupted_goes_on_with_what_is_missing(few, tiny_shapes, tmp_path):
    request = Request(out=tmp_path, smoke=True, dtype="float32", guidance_scale=1.0)
    (whole,) = run_suites(lambda: tiny_shapes, ["wise"], request, model="tiny")
    files = sorted((tmp_path / "scores" / "wise").glob("*/*.json"))
    kept = {file: file.stat().st_mtime_ns for file in files[1:]}
    files[0].unlink()  # as if it had been stopped before
    (again,) = run_suites(lambda: tiny_shapes, ["wise"], request, model="tiny")
    assert again == whole
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == kept


def test_what_is_there_is_neither_drawn_nor_scored_again(smoke, tiny_shapes, monkeypatch):
    request, results = smoke

    def never(*_args, **_options):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(run, "Engine", never)
    monkeypatch.setattr(RewardConfig, "build", never)
    again = run_suites(lambda: tiny_shapes, ["geneval", "ocr"], request, model="tiny")
    assert again == [results["geneval"], results["ocr"]]


def test_a_folder_in_which_nothing_came_to_be_is_free_for_the_corrected_command(smoke, tmp_path):
    folder = smoke[0].out / "images" / "geneval"
    (tmp_path / "wrong").mkdir()
    for images in (tmp_path / "wrong", folder):
        request = Request(out=tmp_path / "scores", images=images, smoke=True)
        if images != folder:
            with pytest.raises(InputError, match="holds no images in a known layout"):
                run_suites(None, ["diversity"], request, model="external")
            assert not (tmp_path / "scores").exists()
    (results,) = run_suites(None, ["diversity"], request, model="external")
    # What was cut off is said, or scored again.
    scored = next((tmp_path / "scores" / "scores").rglob("*.json"))
    scored.write_text(scored.read_text()[:20])
    (again,) = run_suites(None, ["diversity"], request, model="external")
    assert again.scores == results.scores
    (tmp_path / "scores" / "setup.json").write_text('{"mod')
    with pytest.raises(InputError, match=r"setup\.json: is cut off or damaged; name another"):
        run_suites(None, ["diversity"], request, model="external")


def test_the_official_folder_layout_is_scored_like_ones_own(smoke, tmp_path):
    request, results = smoke
    folder = request.out / "images" / "geneval"
    record = json.loads((folder / "00003" / "metadata.jsonl").read_text())
    assert {"tag", "include", "prompt"} <= record.keys()
    external = Request(out=tmp_path / "scores", images=folder, smoke=True)
    (scored,) = run_suites(None, ["diversity"], external, model="external")
    assert scored.scores == results["diversity"].scores
    assert f"24 images of {folder}" in scored.table()
    # One image less: its prompt has no pair, and the table says that images are missing.
    fewer = tmp_path / "fewer"
    shutil.copytree(folder, fewer)
    shutil.rmtree(fewer / "00000")
    partial = Request(out=tmp_path / "other", images=fewer, smoke=True)
    (scored,) = run_suites(None, ["diversity"], partial, model="external")
    assert "11 of 12 prompts" in scored.table()
    assert "not all images of the benchmark are there" in scored.table()


def test_more_images_are_added_and_one_that_changed_is_scored_again(few, tiny_shapes, tmp_path):
    diversity(tiny_shapes, out=tmp_path)
    before = png_bytes(tmp_path)
    first = diversity(tiny_shapes, out=tmp_path, images_per_prompt=3)
    after = png_bytes(tmp_path)
    assert len(first.scores["diversity"]) == len(after) == 12
    assert before.items() <= after.items()
    file = tmp_path / "images" / "geneval" / "00000" / "samples" / "0001.png"
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(file)
    second = diversity(tiny_shapes, out=tmp_path, images_per_prompt=3)
    pairs = zip(first.scores["diversity"], second.scores["diversity"], strict=True)
    assert {one.prompt for one, other in pairs if one != other} == {0}
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="is not an image that can be read"):
        diversity(tiny_shapes, out=tmp_path, images_per_prompt=3)


def test_an_interrupted_run_goes_on_where_it_stopped(few, tiny_shapes, tmp_path, monkeypatch):
    whole = diversity(tiny_shapes, out=tmp_path / "whole")
    received = []
    real = run.rollout

    def draws_once(*args, **options):
        received.append(2)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, "IMAGES_AT_ONCE", 4)  # 2 prompts of 2 images
        patch.setattr(run, "rollout", draws_once)
        patch.setattr(run, "stop_signals", lambda: nullcontext(received))
        with pytest.raises(Stopped, match="stopped; run the same command again to go on"):
            diversity(tiny_shapes, out=tmp_path / "parts")
    assert len(png_bytes(tmp_path / "parts")) == 4
    assert not list((tmp_path / "parts").rglob("*.tmp*"))
    # A prompt of which one image is there gets the other.
    (tmp_path / "parts" / "images" / "geneval" / "00001" / "samples" / "0000.png").unlink()
    parts = diversity(tiny_shapes, out=tmp_path / "parts")
    assert png_bytes(tmp_path / "parts") == png_bytes(tmp_path / "whole")
    assert parts.scores == whole.scores


class _Rank:
    """One of two ranks in one process, which wait for each other."""

    size = 2

    def __init__(self, rank, barrier):
        self.rank, self.first, self.wait = rank, rank == 0, barrier.wait

    def broadcast_object(self, make):
        if self.first:
            make()
        self.wait()


def test_two_ranks_share_the_prompts_and_get_the_same_results(
    few, tiny_shapes, tmp_path, monkeypatch
):
    plain = parse_overrides([f"bright.kind={PLAIN}", "diversity=null"])
    alone = diversity(tiny_shapes, out=tmp_path / "alone", scorers=plain)
    drawn = []
    real = run.rollout

    def counted(engine, prompts, **options):
        drawn.append(len(prompts))
        return real(engine, prompts, **options)

    monkeypatch.setattr(run, "rollout", counted)
    request = Request(
        smoke=True, dtype="float32", guidance_scale=1.0, out=tmp_path / "two", scorers=plain
    )
    barrier, results = threading.Barrier(2, timeout=60), {}

    def run_rank(rank):
        results[rank] = run_suites(
            lambda: tiny_shapes, ["diversity"], request, model="tiny", world=_Rank(rank, barrier)
        )[0]

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [2, 2]  # of 4 prompts
    assert results[0] == results[1]
    assert results[0].scores == alone.scores
    assert png_bytes(tmp_path / "two") == png_bytes(tmp_path / "alone")


def test_images_of_another_temperature_lie_elsewhere(few, tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = {t: diversity(tiny_shapes, temperature=t) for t in (0.0, 1.0)}
    assert "guidance 1, temperature 0, seed 0" in results[0.0].table()
    different_images = {len(set(png_bytes(p).values())) for p in tmp_path.glob("*/*/images/*/*")}
    assert different_images == {1, 2}  # of a prompt's two: the likeliest tokens have no chance
    assert len(list((tmp_path / "evaluations").iterdir())) == 2


def test_a_folder_of_other_images_is_refused(few, tiny_shapes, tmp_path):
    diversity(tiny_shapes, out=tmp_path / "a")
    with pytest.raises(InputError, match="was made with another seed; name another --out"):
        diversity(tiny_shapes, out=tmp_path / "a", seed=1)
    with pytest.raises(InputError, match="was made with another temperature; name another"):
        diversity(tiny_shapes, out=tmp_path / "a", temperature=0.5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and not the folder of an evaluation"):
        diversity(tiny_shapes, out=tmp_path / "b")
    record = tmp_path / "a" / "images" / "geneval" / "00000" / "metadata.jsonl"
    record.write_text('{"prompt": "another"}')
    (record.parent / "samples" / "0000.png").unlink()
    with pytest.raises(InputError, match="holds the images of 'another', not of"):
        diversity(tiny_shapes, out=tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(few, tmp_path):
    def never():
        raise AssertionError("the model is loaded")

    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "in" / "it", tmp_path / ("x" * 300)):
        request = Request(out=out, smoke=True)
        with pytest.raises(InputError, match=r"cannot be written to \(.*\); name another --out"):
            run_suites(never, ["diversity"], request, model="tiny")
    with pytest.raises(AssertionError, match="is loaded"):
        run_suites(never, ["diversity"], Request(out=tmp_path / "a/b", smoke=True), model="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reward_of_ones_own_adds_a_measure(few, tiny_shapes, tmp_path):
    settings = parse_overrides([f"bright.kind={PLAIN}", "bright.failures=1", "diversity=null"])
    result = diversity(tiny_shapes, out=tmp_path, scorers=settings)
    assert set(result.scores) == {"bright"}
    # 8 images in one call, which failed once and was asked again.
    assert CALLS == [8, 8]
    assert "left out: diversity" in result.table()
    assert result.setup.scorers["bright"]["failures"] == 1


def test_numbers_that_training_takes_are_kept(few, tiny_shapes, tmp_path, monkeypatch):
    kinds = (np.float32, np.int64, Fraction)

    def score(images_NHWC, prompts):
        extras = {"half": Fraction(1, 2), "nan": math.nan, "inf": np.float32("inf")}
        return [Score(kinds[i % 3](i), "", extras) for i in range(len(images_NHWC))]

    monkeypatch.setattr(PlainConfig, "build", lambda self, device: score)
    settings = parse_overrides([f"bright.kind={PLAIN}", "diversity=null"])
    first = diversity(tiny_shapes, out=tmp_path, scorers=settings)
    assert [one.value for one in first.scores["bright"]] == list(range(8))
    (folder,) = (tmp_path / "scores" / "geneval").iterdir()
    kept = json.loads((folder / "00000.json").read_text())["scores"][1]
    assert (kept["value"], kept["extras"]) == (1.0, {"half": 0.5, "nan": None, "inf": None})
    read = []
    monkeypatch.setattr(PlainConfig, "build", None)  # nothing is asked again
    monkeypatch.setattr(PlainConfig, "reread", lambda self, _, score: read.append(score) or score)
    assert diversity(tiny_shapes, out=tmp_path, scorers=settings) == first
    assert read
    assert all(math.isnan(score.extras["nan"]) for score in read)


def test_what_changes_no_score_asks_nobody_again():
    def hashed(kind, *settings):
        return folder_name(load_reward(kind, settings)).rpartition("-")[2]

    geneval = ("detector={kind: mask2former}",)
    assert hashed("geneval", *geneval, "detector.batch_size=1", "name=x") == hashed(
        "geneval", *geneval, "timeout_s=5"
    )
    assert hashed("geneval", *geneval, "threshold=0.2") != hashed("geneval", *geneval)
    judge = ("path=x/y", "mode=score_line")
    assert hashed("judge", *judge, "batch_size=1") == hashed("judge", *judge)
    # Replies are kept and read anew; probabilities are of the right answer, and a text that was
    # cut off counts as it was read.
    assert hashed("judge", *judge, "tries=1", "numbers=[5]") == hashed("judge", *judge)
    assert hashed("judge", *judge, "max_new_tokens=9") == hashed("judge", *judge)
    assert hashed("judge", *judge, "system=x") != hashed("judge", *judge)
    for mode, setting in (("token_probability", "answers=[x]"), ("read_text", "max_new_tokens=9")):
        own = ("path=x/y", f"mode={mode}")
        assert hashed("judge", *own, setting) != hashed("judge", *own)
    assert hashed("ocr", "processes=2", "threads=2") == hashed("ocr")
    assert hashed("external", "command=[x]", "cwd=y") == hashed("external", "command=[x]")
    assert hashed("external", "command=[y]") != hashed("external", "command=[x]")


def test_a_secret_is_read_where_it_is_used_and_written_as_a_reference(
    few, tiny_shapes, tmp_path, monkeypatch
):
    given = [f"bright.kind={PLAIN}", "bright.password=${oc.env:PASSWORD}", "diversity=null"]
    settings = parse_overrides(given)
    with pytest.raises(InputError, match=r"diversity: bright: .*PASSWORD.* not found.*; set it"):
        diversity(tiny_shapes, out=tmp_path / "x", scorers=settings)
    monkeypatch.setenv("PASSWORD", "hunter2")
    wrong = parse_overrides([f"bright.kind={PLAIN}", "bright.weight=${oc.env:PASSWORD}"])
    with pytest.raises(InputError) as caught:
        diversity(tiny_shapes, out=tmp_path / "x", scorers=wrong)
    reference = "expected a number, not '${oc.env:PASSWORD}'"
    assert f"diversity: bright.weight: {reference}" in str(caught.value)
    seen = []
    monkeypatch.setattr(PlainConfig, "build", lambda self, device: seen.append(self) or _bright)
    result = diversity(tiny_shapes, out=tmp_path, scorers=settings)
    assert {one.password for one in seen} == {"hunter2"}
    assert result.setup.scorers["bright"]["password"] == "${oc.env:PASSWORD}"
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not any(b"hunter2" in data for data in [*written, result.table().encode()])
    # A recipe's are resolved when it is read, and written as references all the same.
    scorers = f"{{bright: {{kind: '{PLAIN}', password: '${{oc.env:PASSWORD}}'}}}}"
    evaluation = evaluation_of(load_recipe("shapes_smoke", [f"evaluation.scorers={scorers}"]))
    assert evaluation is not None
    asked = asked_of(evaluation)
    assert asked["scorers"]["bright"]["password"] == "${oc.env:PASSWORD}"
    known = scorers_of(find_suite("diversity"), evaluation.scorers, smoke=True)
    assert known["bright"][1].password == "hunter2"
    scorers = "{gold: {weight: '${oc.env:PASSWORD}'}}"
    with pytest.raises(InputError) as caught:
        train(load_recipe("shapes_smoke", [f"evaluation.scorers={scorers}"]))
    assert f"shapes-geneval: gold.weight: {reference}" in str(caught.value)


def _bright(images_NHWC, prompts):
    return [Score(float(image.float().mean()), "brightness") for image in images_NHWC]


def test_a_reward_that_fails_twice_ends_the_run_and_keeps_what_is_scored(
    few, tiny_shapes, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "IMAGES_AT_ONCE", 4)
    settings = parse_overrides([f"bright.kind={PLAIN}", "bright.failures=2", "diversity=null"])
    with pytest.raises(RewardError, match=r"reward 'bright' failed twice on .*not today"):
        diversity(tiny_shapes, out=tmp_path, scorers=settings)
    assert CALLS == [4, 4]
    assert not list(Path(tmp_path).rglob("scores/**/*.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["hsp.path=x"], "hsp: no scorer of that name; did you mean 'hps'?"),
        (["hps"], "hps: is not a setting of a scorer; write SCORER.key=value"),
        (["hps=3"], "hps: write hps.key=value, or hps=null to leave it out"),
        (["hps.pth=x"], "hps: hps.pth: unknown key; did you mean 'path'?; hps=null leaves it out"),
        (["hps.jpeg_quality=500"], "hps: hps.jpeg_quality: 500 is out of range"),
        (["new.kind=hsp"], "did you mean 'hps'?"),
    ],
)
def test_a_wrong_setting_is_one_line_before_the_model_is_loaded(tmp_path, settings, message):
    with pytest.raises(InputError) as caught:  # noqa: PT012
        request = Request(out=tmp_path, smoke=True, scorers=parse_overrides(settings))
        run_suites(None, ["hps"], request, model="none")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_cannot_be_found_are_named(tmp_path):
    for data, text in ((None, "--data is not given"), (tmp_path, "has no ocr/test.txt")):
        with pytest.raises(InputError, match=text):
            run_suites(None, ["ocr"], Request(data=data), model="none")
    lines = skipped(["all"], Request(data=tmp_path))
    assert [line.split()[0] for line in lines] == [
        *("t2i-compbench", "hps", "drawbench", "ocr", "geneval2", "dpg", "wise"),
        *("oneig-alignment", "oneig-text", "longtext", "cvtg", "unigenbench", "tiif"),
    ]
    # The prompts of this one come with the package, its judge does not.
    assert "longtext is not run: Qwen/Qwen2.5-VL-7B-Instruct is not on this machine" in lines
    (tmp_path / "model.safetensors").touch()
    there = Request(data=tmp_path, scorers={"judge": {"path": str(tmp_path)}})
    assert not any(line.startswith("longtext") for line in skipped(["all"], there))
    # What reads and what answers is looked for before anything is drawn.
    for where in ("ocr/test.txt", "questions/dpg.jsonl", "drawbench/prompts.csv"):
        (tmp_path / where).parent.mkdir()
        (tmp_path / where).touch()
    lines = skipped(["all"], Request(data=tmp_path, scorers={"ocr": {"engine": "paddleocr"}}))
    assert "ocr is not run: package paddleocr is not on this machine" in lines
    assert "dpg is not run: program 'mplug/bin/python' is not on this machine" in lines
    # A wrong setting, as of a head that is not named, is an error and no lack.
    assert not any("drawbench" in line for line in lines)
    assert skipped(["ocr"], Request()) == []
    with pytest.raises(InputError, match="unknown 'genevl'"):
        run_suites(None, ["genevl"], Request(), model="none")
