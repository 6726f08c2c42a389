"""Questions about images: what is asked, how answers are read, and when a loss is an alarm."""

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stage_rl.api import evaluate_understanding
from stage_rl.errors import InputError
from stage_rl.evaluation import understanding
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.understanding import (
    BENCHMARKS,
    YES_NO,
    Answers,
    Item,
    UnderstandingReport,
    answer_all,
    find_understanding,
)
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.shapes.prompts import WORDS

SETS = ("random", "popular", "adversarial")


def items(number, *, row="adversarial", right="yes"):
    return tuple(
        Item(f"{row}-{n}", row, f"{n // 2}.jpg", "Is it?", YES_NO, right, str(n))
        for n in range(number)
    )


def report(before, after):
    """Of questions whose right answer is yes, by a letter for each answer."""
    words = {"y": "yes", "n": "no"}
    asked = items(len(before))
    base, trained = (
        Answers(name, "pope", asked, tuple(words[one] for one in given), len(asked))
        for name, given in (("base", before), ("trained", after))
    )
    return UnderstandingReport(trained, "published", base)


def test_the_figures_are_those_of_popes_own_script():
    asked = (*items(3), *items(5, right="no")[3:])
    answers = Answers("x", "pope", asked, ("yes", "yes", "no", "yes", "no"), 5)
    # 2 hits, 3 said yes, 3 are yes, 5 questions, of which 3 right.
    expected = {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3}
    assert answers.figures()["adversarial"] == pytest.approx(expected | {"share of yes": 0.6})
    two = Answers("x", "pope", (*items(1), *items(1, row="popular")), ("yes", "no"), 2)
    assert two.figures()["mean"]["accuracy"] == 0.5


def test_the_difference_is_paired_and_its_test_is_exact():
    change, interval, p = report("y" * 40, "n" * 8 + "y" * 32).difference()
    assert change == pytest.approx(-8 / 40)
    assert p == pytest.approx(2 * 0.5**8)
    assert interval is not None
    assert interval[0] < change < interval[1] < 0
    assert report("yn" * 4, "yn" * 4).difference()[2] == 1


def test_a_question_of_all_three_sets_is_tested_once():
    # Of ten questions eight are lost; each of them stands in every set.
    asked = tuple(item for row in SETS for item in items(10, row=row))
    answers = [
        Answers(name, "pope", asked, tuple(given * 3), 30)
        for name, given in (("base", ["yes"] * 10), ("trained", ["no"] * 8 + ["yes"] * 2))
    ]
    one = UnderstandingReport(answers[1], "published", answers[0])
    change, _, p = one.difference()
    assert (change, p) == (pytest.approx(-0.8), pytest.approx(2 * 0.5**8))
    assert "McNemar p 0.00781 (adversarial)" in one.table()
    assert one.to_json()["mcnemar_of"] == "adversarial"


@pytest.mark.parametrize(("lost", "alarm"), [(0, False), (1, False), (20, True)])
def test_an_alarm_needs_a_loss_beyond_a_point(lost, alarm):
    one = report("y" * 100, "n" * lost + "y" * (100 - lost))
    assert one.is_harmed is alarm
    assert ("ALARM" in one.table()) is alarm
    assert json.loads(json.dumps(one.to_json()))["is_harmed"] is alarm


def test_pope_asks_three_thousand_questions_of_each_set_half_of_them_yes():
    asked = BENCHMARKS["pope"].items(None)
    for row in SETS:
        some = [item for item in asked if item.row == row]
        assert len(some) == 3000
        assert sum(item.right == "yes" for item in some) == 1500
    assert asked[0].text == (
        "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    )


class Stub:
    """A policy that says yes to bright images."""

    understands = True
    device = torch.device("cpu")
    asked = 0

    class processor:
        @staticmethod
        def tokenizer(text, **_):
            return {"input_ids": [("yes", "no", "A", "B").index(text)] if text in "yesnoAB" else []}

    processor.tokenizer.unk_token_id = None  # type: ignore[attr-defined]

    def answer_logits(self, image_HWC, question):
        self.asked += 1
        bright = float(image_HWC.float().mean()) - 128
        return torch.tensor([bright, 0.0, bright, 0.0])


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(understanding, "base_digest", lambda policy: "x")
    return Stub()


def ask(policy, name, folder, **more):
    return answer_all(policy, name, model="m", data=folder, out=folder / "out", mixed=False, **more)


def test_answers_are_kept_and_only_what_is_missing_is_asked(tmp_path, stub, monkeypatch):
    folder = tmp_path / "coco/val2014"
    folder.mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (4, 4), "white" if n else "black").save(folder / f"{n}.jpg")
    known = replace(BENCHMARKS["pope"], items=lambda data: items(6))
    monkeypatch.setitem(understanding.BENCHMARKS, "pope", known)  # type: ignore[arg-type]
    assert ask(stub, "pope", tmp_path, limit=2).given == ("no", "no")
    assert ask(stub, "pope", tmp_path).given == ("no", "no", "yes", "yes", "yes", "yes")
    assert stub.asked == 6
    # What was cut off, or is no answer, is asked again.
    (file,) = (tmp_path / "out").glob("pope-*.json")
    text = file.read_text()
    for damaged in (text[:20], text.replace('"yes"', "[1]")):
        file.write_text(damaged)
        assert ask(stub, "pope", tmp_path).given[2:] == ("yes",) * 4
    assert stub.asked == 6 + 6 + 4
    # Another question is another answer.
    other = tuple(replace(item, text="What?") for item in items(6))
    monkeypatch.setitem(understanding.BENCHMARKS, "pope", replace(known, items=lambda _: other))
    ask(stub, "pope", tmp_path, limit=1)
    assert stub.asked == 17
    # What was answered before a picture is missing is kept.
    (folder / "2.jpg").unlink()
    monkeypatch.setattr(understanding, "base_digest", lambda policy: "other weights")
    with pytest.raises(InputError, match=r"has no coco/val2014/2\.jpg"):
        ask(stub, "pope", tmp_path)
    newest = max((tmp_path / "out").glob("pope-*.json"), key=lambda file: file.stat().st_mtime_ns)
    assert len(json.loads(newest.read_text())) == 4


def test_every_picture_is_looked_for_before_a_model_is_loaded(tmp_path, monkeypatch):
    known = replace(BENCHMARKS["pope"], items=lambda data: items(6))
    monkeypatch.setitem(understanding.BENCHMARKS, "pope", known)  # type: ignore[arg-type]
    (tmp_path / "val2014").mkdir()
    for n in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "val2014" / f"{n}.jpg")
    request = Request(data=tmp_path, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"has no coco/val2014/2\.jpg"):
        evaluate_understanding("no/model", "pope", request)
    # The first four questions are about the two that are there.
    with pytest.raises(InputError, match="no/model"):
        evaluate_understanding("no/model", "pope", replace(request, images_per_task=4))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written to \(.*\); name another --out"):
        evaluate_understanding(
            "no/model", "pope", Request(tmp_path / "file/out", tmp_path, images_per_task=4)
        )
    assert not (tmp_path / "out").exists()
    (tmp_path / "val2014/2.jpg").write_bytes(b"cut off")
    with pytest.raises(InputError, match="pope: cannot identify image file"):
        evaluate_understanding("no/model", "pope", request)


def test_a_question_of_mmbench_is_right_in_all_its_variants(tmp_path, stub):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "mmbench").mkdir()
    rows = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage",
        f"7\tWhat?\tLook.\tcat\tdog\t\t\tA\tx\t{picture}",
        "8\tWhich?\t\tcat\tdog\t\t\tA\tx\t7",
        "1000007\tWhat?\tLook.\tdog\tcat\t\t\tB\tx\t7",
    ]
    (tmp_path / "mmbench/MMBench_DEV_EN.tsv").write_text("\n".join(rows) + "\n")
    answers = ask(stub, "mmbench", tmp_path)
    assert answers.items[0].text.splitlines()[:4] == ["Look.", "What?", "A. cat", "B. dog"]
    assert answers.given == ("A", "A", "A")  # 7 is wrong in its other order
    assert answers.figures()["mean"] == {"accuracy": 0.5}
    # The first question has two variants, wherever in the file the second stands.
    first = ask(stub, "mmbench", tmp_path, limit=1)
    assert [item.id for item in first.items] == ["7", "1000007"]
    assert first.figures()["mean"] == {"accuracy": 0}
    said = [UnderstandingReport(one, "x").table() for one in (first, answers)]
    assert "1 of 2 questions; not the whole benchmark" in said[0]
    assert "not the whole" not in said[1]
    assert (first.to_json()["asked"], first.to_json()["questions"]) == (1, 2)


def test_a_family_without_eyes_and_an_unknown_name_are_refused(stub, tmp_path):
    stub.understands = False
    with pytest.raises(InputError, match="m: Stub answers no questions about images"):
        ask(stub, "pope", tmp_path)
    with pytest.raises(InputError, match="did you mean 'pope'"):
        find_understanding("poep")


def test_janus_answers_from_image_and_question(tiny_shapes):
    image_HWC = torch.randint(256, (48, 48, 3), dtype=torch.uint8)
    logits_V = tiny_shapes.answer_logits(image_HWC, "a red circle")
    # By hand: the image's features stand in the places of its tokens.
    processor, model = tiny_shapes.processor, tiny_shapes.module.model
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": f"{processor.image_token}\na red circle"}],
            }
        ],
        add_generation_prompt=True,
    )
    picture = Image.fromarray(image_HWC.numpy())
    inputs = processor(text=[text], images=[picture], generation_mode="text")
    ids = inputs["input_ids"][0]
    places = ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert int(places.sum()) == processor.num_image_tokens
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        features = model.aligner(model.vision_model(inputs["pixel_values"])[0])
        embeds[places] = features.flatten(0, -2)
        states = model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0, -1]
        expected_V = tiny_shapes.module.lm_head(states)
    torch.testing.assert_close(logits_V, expected_V)
    other_V = tiny_shapes.answer_logits(255 - image_HWC, "a red circle")
    assert not torch.allclose(logits_V, other_V)


def test_a_model_is_asked_before_and_after_by_its_folder(tmp_path):
    size = JanusSize(width=16, layers=1, heads=2, mlp=16, codebook_size=32)
    for seed in (0, 1):
        save_janus(*build_janus(size, words=[*WORDS, *YES_NO], seed=seed), tmp_path / str(seed))
    asked = BENCHMARKS["pope"].items(None)
    for image in {next(item.image for item in asked if item.row == row) for row in SETS}:
        (tmp_path / "val2014").mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), "red").save(tmp_path / "val2014" / image)
    request = Request(data=tmp_path, out=tmp_path / "out", images_per_task=2, dtype="float32")
    (before, after) = (str(tmp_path / name) for name in "01")
    one = evaluate_understanding(after, "pope", request, against=before)
    assert one.answers.figures().keys() == {*SETS, "mean"}
    assert len(one.answers.given) == 6
    assert "McNemar p" in one.table()
    assert len(list((tmp_path / "out").glob("pope-*.json"))) == 2
