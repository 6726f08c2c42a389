"""A benchmark with a judge from its question file to its figures, with a tiny random judge."""

import gzip
import json
import shutil

import pytest
from PIL import Image
from tiny_vlms import save_vlm

from stage_rl.errors import InputError
from stage_rl.evaluation import run
from stage_rl.evaluation.judged import CVTG, GENEVAL2, ONEIG_TEXT
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.run import run_suite, run_suites
from stage_rl.evaluation.smoke import MadeUpChat, smoke_prompts
from stage_rl.evaluation.suites import ALL, PromptSet, Scorer, find_suite
from stage_rl.prompts.questions import Header, Question, QuestionRecord, write_questions
from stage_rl.rewards.base import Score
from stage_rl.rewards.vlm import judge
from stage_rl.rewards.vlm.chat import Reply
from stage_rl.rewards.vlm.judge import JudgeReward, JudgeRewardConfig


@pytest.fixture
def data(tmp_path):
    """A folder with a question file of two prompts."""
    records = [
        QuestionRecord(
            id=str(n),
            text=f"a photo of a red {thing}",
            groups={"atoms": str(3 + n)},
            questions=(
                Question(id=1, text="Is it red?", group="attribute", expected="Yes"),
                Question(id=2, text=f"Is it a {thing}?", group="object", expected="Yes"),
            ),
        )
        for n, thing in enumerate(("circle", "square"))
    ]
    header = Header(
        benchmark="geneval2", source="x", licence="x", images_per_prompt=1, prompts=len(records)
    )
    (tmp_path / "questions").mkdir()
    write_questions(tmp_path / "questions/geneval2.jsonl.gz", header, records)
    return tmp_path


def test_a_tiny_judge_answers_a_benchmark_once(data, tiny_shapes):
    save_vlm("qwen3_vl", data / "judge")
    tiny = {"path": str(data / "judge"), "dtype": "float32", "answers": ["Yes", "yes"]}
    out = data / "out"
    request = Request(
        out=out, data=data, dtype="float32", guidance_scale=1.0, scorers={"judge": tiny}
    )

    def results():
        return run_suites(lambda: tiny_shapes, ["geneval2"], request, model="tiny")[0]

    first = results()
    files = sorted((out / "scores" / "geneval2").glob("judge-*/*.json"))
    answers = [json.loads(file.read_text())["scores"][0]["extras"] for file in files]
    assert [set(one) for one in answers] == [{"q0", "q1", "missing"}] * 2
    gm = [100 * (one["q0"] * one["q1"]) ** 0.5 for one in answers]
    assert first.figures["GM"] == pytest.approx(sum(gm) / 2)
    assert [one.value for one in first.scores["score"]] == pytest.approx(gm)
    assert first.figures["answers missing"] == 0
    assert "GM, 3 atoms" in first.figures
    # A question file of two prompts and a judge of random weights are not the benchmark.
    (line,) = [line for line in first.statements if line.startswith("not the published")]
    assert "not all images" in line
    assert f"judged by {tiny['path']}, the published figures by Qwen3-VL" in line
    assert "whether its questions" not in line
    assert "its questions are those of x" in line
    assert "judge.dtype=float32, the benchmark has bfloat16" in line
    stamps = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert results() == first
    assert files[1].stat().st_mtime_ns == stamps[1]


def test_every_judged_benchmark_runs_with_a_tiny_random_judge(tmp_path, tiny_shapes, monkeypatch):
    save_vlm("qwen3_vl", tmp_path / "judge")

    def tiny(name, verdicts, config):
        small = {"path": str(tmp_path / "judge"), "dtype": "float32", "tries": 1}
        limits = {"max_new_tokens": 4, "answers": ("Yes", "yes")}
        return config.model_copy(update=small | limits).build(tiny_shapes.device)

    real = PromptSet.prompts
    monkeypatch.setattr(PromptSet, "prompts", lambda *args, **more: real(*args, **more)[:2])
    monkeypatch.setattr(run, "made_up_reward", tiny)
    request = Request(smoke=True, dtype="float32", guidance_scale=1.0, images_per_prompt=1)
    figures = {}
    for name in ALL:
        suite = find_suite(name)
        if suite.scorers.get("judge", Scorer({"kind": ""})).settings["kind"] != "judge":
            continue
        figures[name] = run_suite(tiny_shapes, name, request).figures
    # Probabilities, words and texts can be read of anybody; a form takes a judge that knows it.
    unread = {name for name, found in figures.items() if found["answers missing"] == 1}
    assert unread == {"wise", "unigenbench", "tiif"}
    assert all(figures[name]["images without a score"] == 1 for name in unread)
    assert set(figures) - unread == {"geneval2", "oneig-alignment", "oneig-text", "longtext"}
    assert 0 < figures["geneval2"]["GM"] < 100
    assert figures["oneig-alignment"]["overall"] == figures["longtext"]["words read"] == 0


def test_replies_that_were_kept_are_read_anew(data, tiny_shapes, monkeypatch):
    suite, asked = find_suite("wise"), []
    prompts = smoke_prompts("wise")[:2]
    monkeypatch.setattr(PromptSet, "prompts", lambda *args, **more: prompts)
    out = data / "wise"
    request = Request(out=out, smoke=True, dtype="float32", guidance_scale=1.0)

    def says(name, verdicts, config):
        asked.append(name)

        class Judge(JudgeReward):
            def _replies(self, images, requests, longest):
                return [Reply("Verdict: right")] * len(requests)

        return Judge(MadeUpChat(), config)

    monkeypatch.setattr(run, "made_up_reward", says)

    job = run._job(suite, request)
    kept = run._Run(tiny_shapes, request, "tiny", out)
    assert kept.results_of(job).figures["answers missing"] == 1
    # A reader that knows more makes an answer of what was said, and asks nobody.
    monkeypatch.setattr(judge, "read_score", lambda reply, numbers: [float("right" in reply)])
    again = kept.results_of(job)
    assert again.figures["answers missing"] == 0
    assert [one.value for one in again.scores["score"]] == [1, 1]
    assert asked == ["judge"]


def test_more_tries_ask_again_where_an_answer_is_missing_alone(data, monkeypatch):
    asked = []

    class Judge(JudgeReward):
        def _replies(self, images, requests, longest):
            asked.extend((one.text, longest) for one in requests)
            cut = [longest < 200 and "square" in one.text for one in requests]
            return [Reply("" if one else "Yes", is_cut=one) for one in cut]

    monkeypatch.setattr(
        JudgeRewardConfig, "build", lambda config, device: Judge(MadeUpChat(), config)
    )
    images = data / "images"
    for n, thing in enumerate(("circle", "square")):
        (images / f"{n:05d}/samples").mkdir(parents=True)
        record = json.dumps({"prompt": f"a photo of a red {thing}"})
        (images / f"{n:05d}/metadata.jsonl").write_text(record)
        Image.new("RGB", (8, 8), "red").save(images / f"{n:05d}/samples/0.png")

    def missing(**settings):
        own = {"mode": "reply_equals", "template": "{question}", "answers": ["Yes"], **settings}
        request = Request(out=data / "out", data=data, images=images, scorers={"judge": own})
        asked.clear()
        (results,) = run_suites(None, ["geneval2"], request, model="x")
        return results.figures["answers missing"]

    assert missing(tries=1) == 0.25  # of four questions the one about the square
    assert [longest for _, longest in asked] == [128] * 4
    # Three tries, the last one four times as long; two questions of the second prompt alone.
    assert missing() == 0
    assert [longest for _, longest in asked] == [128, 128, 256]
    # Nor do readers, what is printed beside, or a copy of the files ask anybody again.
    assert missing(answers=["No"]) == missing(tries=9, max_new_tokens=4) == 0
    images.rename(data / "before")
    shutil.copytree(data / "before", images, copy_function=shutil.copyfile)
    assert missing() == 0
    assert asked == []
    file = data / "questions/geneval2.jsonl.gz"
    text = gzip.decompress(file.read_bytes()).decode().replace('"attribute"', '"colour"')
    file.write_bytes(gzip.compress(text.encode()))
    assert missing() == 0
    assert asked == []
    file.write_bytes(gzip.compress(text.replace("Is it red?", "Is it blue?").encode()))
    assert missing() == 0
    assert len(asked) == 5


def test_a_benchmark_without_its_questions_says_where_they_go(tmp_path):
    with pytest.raises(InputError, match=r"has no questions/geneval2\.jsonl"):
        run_suites(None, ["geneval2"], Request(data=tmp_path), model="none")


def test_an_image_with_an_answer_missing_has_no_score(data):
    (prompt, _) = GENEVAL2.prompt_set.prompts(data)
    whole = Score(0.5, "", {"q0": 0.25, "q1": 1.0})
    assert GENEVAL2.measures_of(prompt, {"judge": whole}) == {"score": 50}
    assert GENEVAL2.measures_of(prompt, {"judge": Score(None, "", {"q0": 0.25})}) == {}


def test_what_was_read_makes_the_score_of_an_image():
    (prompt, *_) = ONEIG_TEXT.prompt_set.prompts(None, smoke=True)
    assert prompt.metadata["fields"]["text"] == "red circle"
    read = Score(1.0, "", replies=("red circle",))
    assert ONEIG_TEXT.measures_of(prompt, {"judge": read}) == {"score": 1}
    # 1 of 2 words, whatever the reward itself made of it; CLIPScore is 2.5 times the cosine.
    (prompt, *_) = CVTG.prompt_set.prompts(None, smoke=True)
    scores = {"ocr": Score(0.0, "", replies=("RED", "x")), "clip": Score(0.3, "")}
    assert CVTG.measures_of(prompt, scores) == {"score": 0.5, "clip": 0.75}
