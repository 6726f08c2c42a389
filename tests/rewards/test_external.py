"""The external-process reward: what is sent, what is accepted, and every way to fail."""

import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards import external
from stage_rl.rewards.external import ExternalRewardConfig
from stage_rl.types import Prompt

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "deqa_scorer.py"
MPLUG = Path(external.MPLUG_SCORER)
PROMPTS = [Prompt(f"prompt {i}", i, {"place": i}) for i in range(5)]

BRIGHTNESS = """
import base64, io, json, sys
from PIL import Image
for line in sys.stdin:
    request = json.loads(line)
    if "image" in request:
        image = Image.open(request["image"])
    else:
        image = Image.open(io.BytesIO(base64.b64decode(request["image_png"])))
    pixel = image.getpixel((0, 0))
    print(json.dumps({"id": request["id"], "score": pixel[0] / 255, "why": str(pixel),
        "extras": {"place": request["metadata"]["place"]}}), flush=True)
"""
BACKWARDS = """
import json, sys
requests = [json.loads(next(sys.stdin)) for _ in range(5)]
print("", flush=True)
for request in reversed(requests):
    print(json.dumps({"id": request["id"], "score": float(request["prompt"][-1])}), flush=True)
next(sys.stdin, None)
"""


def images(count=5):
    """Image n has (50 n, 0, 7) everywhere."""
    images_NHWC = torch.zeros(count, 4, 4, 3, dtype=torch.uint8)
    images_NHWC[..., 0] = torch.arange(count)[:, None, None] * 50
    images_NHWC[..., 2] = 7
    return images_NHWC


@pytest.fixture
def program(tmp_path):
    """Builds the reward of a Python program; it is ended with the test."""
    built = []

    def build(code, **settings):
        file = tmp_path / f"scorer{len(built)}.py"
        file.write_text(textwrap.dedent(code))
        config = ExternalRewardConfig(command=(sys.executable, str(file)), **settings)
        built.append(config.build(CPU))
        return built[-1]

    yield build
    for reward in built:
        reward.close()


@pytest.mark.parametrize("form", ["files", "base64"])
def test_images_prompts_and_metadata_arrive_and_scores_come_back(program, form):
    scores = program(BRIGHTNESS, images=form, batch_size=2)(images(), PROMPTS)
    assert [score.value for score in scores] == [50 * n / 255 for n in range(5)]
    assert [score.extras["place"] for score in scores] == list(range(5))
    assert scores[1].why == "(50, 0, 7)"


ANSWERS = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    says = {{"id": request["id"], "why": request.get("image", ""), {says}}}
    print(json.dumps(says), flush=True)
"""


def test_answers_may_come_in_any_order(program):
    scores = program(BACKWARDS)(images(), PROMPTS)
    assert [score.value for score in scores] == [0, 1, 2, 3, 4]


def test_the_program_is_started_once_and_ends_with_its_reward_and_so_do_its_files(program):
    reward = program(ANSWERS.format(says='"score": os.getpid()'), batch_size=2)
    scores = [score for _ in range(2) for score in reward(images(), PROMPTS)]
    (pid,) = {int(score.value) for score in scores}
    assert not any(Path(score.why).exists() for score in scores)
    os.kill(pid, 0)
    reward.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_score_is_none_and_an_image_that_could_not_be_scored_fails_alone(program):
    says = '**({"error": "too dark"} if request["metadata"]["place"] else {"score": None})'
    reward = program(ANSWERS.format(says=says))
    with pytest.raises(RuntimeError, match="could not score an image: too dark") as caught:
        reward(images(2), PROMPTS[:2])
    # Not the user's mistake, so the judge asks again group by group and drops one group.
    assert not isinstance(caught.value, RewardError)
    assert reward(images(1), PROMPTS[:1])[0].value is None


def test_a_program_that_died_is_started_again_once(program, tmp_path):
    flag = f"pathlib.Path({str(tmp_path / 'died')!r})"
    dies = f"import pathlib, sys\nif not {flag}.exists():\n    {flag}.touch()\n    sys.exit(1)"
    reward = program(dies + ANSWERS.format(says='"score": 1'))
    assert [score.value for score in reward(images(), PROMPTS)] == [1] * 5


def test_a_program_that_dies_twice_is_an_error_with_its_last_words(program):
    dies = "import sys; sys.stderr.write('no GPU left\\n'); sys.exit(3)"
    with pytest.raises(RewardError, match=r"ended with exit status 3 \(no GPU left\), for the sec"):
        program(dies)(images(), PROMPTS)


def test_a_program_that_says_nothing_is_an_error_even_if_it_never_reads(program, monkeypatch):
    monkeypatch.setattr(external, "STOP_S", 0.1)
    reward = program("import time; time.sleep(60)", images="base64", timeout_s=0.3)
    large = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)  # more than a pipe holds
    with pytest.raises(RewardError, match=r"gave no answer for 0\.3 s"):
        reward(large, PROMPTS[:2])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("loading the model", "which is not JSON; print messages to stderr"),
        ("[1]", "not an object"),
        ('{"id": 7, "score": 1}', "its id was not asked for"),
        ('{"id": 0}', "no score; write a number"),
        ('{"id": 0, "score": "high"}', "no score; write a number"),
        ('{"id": 0, "score": true}', "no score; write a number"),
        ('{"id": 0, "score": 1, "why": 2}', "why is not a text"),
        ('{"id": 0, "score": 1, "extras": {"a": "b"}}', "extras is not an object of numbers"),
        ('{"id": 0, "score": 1}\n{"id": 0, "score": 1}', "answered twice"),
    ],
)
def test_a_line_that_is_no_answer_is_an_error_that_shows_it(program, answer, message):
    reward = program(f"import sys; next(sys.stdin); print({answer!r}, flush=True); input()")
    with pytest.raises(RewardError) as caught:
        reward(images(2), PROMPTS[:2])
    assert f"wrote '{answer.splitlines()[-1]}'" in str(caught.value)
    assert message in str(caught.value)


def test_a_program_that_is_not_there_is_told_at_once():
    with pytest.raises(InputError, match="no program 'no-such-program'"):
        ExternalRewardConfig(command=("no-such-program",)).build(CPU)
    with pytest.raises(InputError, match="no folder '/no/such'"):
        ExternalRewardConfig(command=(sys.executable,), cwd="/no/such").build(CPU)


FAKES = {
    "torch": """
        import contextlib
        float16 = "float16"
        inference_mode = contextlib.nullcontext
        """,
    "transformers": """
        class AutoModelForCausalLM:
            @staticmethod
            def from_pretrained(path, **options):
                assert path == "zhiyuanyou/DeQA-Score-Mix3"
                print("Loading checkpoint shards")
                return AutoModelForCausalLM()

            def score(self, images):
                if images[0].getpixel((0, 0))[0] > 150:
                    raise ValueError("too bright")
                return [4.0 for _ in images]
        """,
}


def test_the_judge_of_dpg_answers_every_question_of_a_prompt(tmp_path, monkeypatch):
    folder = tmp_path / "modelscope"
    (folder / "utils").mkdir(parents=True)
    for name in ("__init__.py", "utils/__init__.py"):
        (folder / name).touch()
    (folder / "utils/constant.py").write_text("class Tasks: visual_question_answering = 'vqa'")
    answer = "{'text': 'yes' if 'cat' in asked['question'] else 'no'}"
    (folder / "pipelines.py").write_text(
        f"def pipeline(task, model, device): return lambda asked: {answer}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    questions = [{"id": i, "text": text} for i, text in enumerate(("a cat?", "a dog?"))]
    reward = ExternalRewardConfig(command=(sys.executable, str(MPLUG))).build(CPU)
    try:
        (score,) = reward(images(1), [Prompt("a cat", 0, {"questions": questions})])
    finally:
        reward.close()
    assert (score.value, score.replies) == (0.5, ("yes", "no"))
    assert score.extras == {"q0": 1, "q1": 0}


def test_the_documented_example_speaks_the_protocol(tmp_path, monkeypatch):
    for name, code in FAKES.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = ExternalRewardConfig(command=(sys.executable, str(EXAMPLE))).build(CPU)
    try:
        scores = reward(images(3), PROMPTS[:3])
        with pytest.raises(RuntimeError, match="ValueError: too bright"):
            reward(images(5), PROMPTS)
    finally:
        reward.close()
    assert [(score.value, score.why) for score in scores] == [(4.0, "quality 4.00 of 5")] * 3
