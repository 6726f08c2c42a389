import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from stage_rl.errors import InputError, RecipeError
from stage_rl.prompts.files import (
    as_prompts,
    load_prompts,
    prompt_order,
    prompts_of_step,
    validate_metadata,
)
from stage_rl.prompts.geneval import (
    CLASSES,
    COLORS,
    GENEVAL,
    MIXES,
    TASKS,
    Vocabulary,
    geneval_prompts,
    record_at,
    space,
    training_mix,
)
from stage_rl.prompts.sets import GenEvalPromptsConfig
from stage_rl.types import Prompt

PUBLISHED = Path(__file__).parent / "data" / "geneval" / "evaluation_metadata.jsonl"
SHAPES = Vocabulary(("circle", "square", "cross"), colors=("red", "orange"), max_count=3)
EVALUATION = {record["prompt"] for record in geneval_prompts()}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_seed_43_gives_the_published_file_byte_for_byte():
    assert jsonl(geneval_prompts(43, 100)) == PUBLISHED.read_text()


@pytest.mark.parametrize(
    ("seed", "num_per_task", "digest"),
    [(7, 20, "410a99c9ccc5b290"), (0, 100, "bbc19624ad80f7dd")],
)
def test_other_seeds_give_what_the_published_script_gives(seed, num_per_task, digest):
    # The digests are of the files that prompts/create_prompts.py of djghosh13/geneval writes.
    text = jsonl(geneval_prompts(seed, num_per_task))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_another_vocabulary_gets_the_same_wording():
    records = geneval_prompts(0, 30, vocabulary=SHAPES)
    texts = {record["prompt"] for record in records}
    assert {"a photo of a cross", "a photo of two crosses", "a photo of an orange circle"} <= texts
    assert {record["tag"] for record in records} == set(TASKS)
    for record in records:
        validate_metadata(record, where="built", classes=SHAPES.classes, colors=SHAPES.colors)


def test_the_spaces_have_the_sizes_counted_by_hand():
    # 80; 80 * 79; 80 * 3; 79 * 10; 80 * 79 * 4; 79 * 78 * 10 * 9
    sizes = {task: _size(task) for task in TASKS}
    assert list(sizes.values()) == [80, 6320, 240, 790, 25280, 554580]


def _size(task, vocabulary=GENEVAL):
    size = 1
    for choices in space(task, vocabulary):
        size *= choices
    return size


@pytest.mark.parametrize("task", TASKS)
def test_every_place_of_a_space_is_another_prompt_of_its_task(task):
    records = [record_at(task, i, SHAPES) for i in range(_size(task, SHAPES))]
    assert {record["tag"] for record in records} == {task}
    assert len({record["prompt"] for record in records}) == len(records)
    for record in records:
        names = [clause["class"] for clause in record["include"]]
        assert len(set(names)) == len(names)


def test_nobody_is_given_a_colour():
    assert "person" in CLASSES
    assert "person" not in GENEVAL.colored
    assert set(GENEVAL.colored) == set(CLASSES) - {"person"}


def test_flow_grpo_shares_are_the_published_counts():
    # 50,000 x (1, 5, 1, 7, 3) / 17 = 2941.18, 14705.88, 2941.18, 20588.24, 8823.53; the floors sum
    # to 49,998 and the two left over go to the remainders .88 (counting) and .53 (color_attr).
    mix = training_mix(MIXES["flow_grpo"], 50_000, seed=0, exclude=EVALUATION)
    assert Counter(record["tag"] for record in mix) == {
        "two_object": 2941,
        "counting": 14706,
        "colors": 2941,
        "position": 20588,
        "color_attr": 8824,
    }


def test_the_stage_mix_has_the_papers_ratio():
    mix = training_mix(MIXES["stage"], 180, seed=1, exclude=EVALUATION)
    counts = Counter(record["tag"] for record in mix)
    assert [counts[task] for task in TASKS] == [0, 10, 70, 10, 40, 50]


def test_a_mix_holds_no_evaluation_prompt_and_repeats_evenly():
    # 240 counting prompts less the 80 of the evaluation leave 160; 480 draws take each three times.
    mix = training_mix({"counting": 1}, 480, seed=0, exclude=EVALUATION)
    times = Counter(record["prompt"] for record in mix)
    assert not EVALUATION & times.keys()
    assert len(times) == 160
    assert set(times.values()) == {3}


def test_a_mix_repeats_no_prompt_before_it_must():
    mix = training_mix({"color_attr": 1}, 3000, seed=0, exclude=EVALUATION)
    assert len({record["prompt"] for record in mix}) == 3000


def test_a_mix_depends_on_the_seed_alone():
    def texts(seed):
        mix = training_mix(MIXES["stage"], 90, seed=seed, exclude=EVALUATION)
        return [record["prompt"] for record in mix]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


@pytest.mark.parametrize(
    ("ratios", "num_prompts", "message"),
    [
        ({"couting": 1}, 5, "unknown task 'couting'; did you mean 'counting'?"),
        ({"counting": -1}, 5, "counting: ratio -1; write a number from 0 up"),
        ({"counting": float("nan")}, 5, "counting: ratio nan"),
        ({"counting": float("inf")}, 5, "counting: ratio inf"),
        ({"counting": 0, "colors": 0}, 5, "every ratio is 0"),
        ({}, 5, "every ratio is 0"),
        ({"counting": 1}, 0, "num_prompts is 0; write at least 1"),
    ],
)
def test_a_wrong_mix_is_a_recipe_error(ratios, num_prompts, message):
    with pytest.raises(RecipeError, match="training mix: ") as caught:
        training_mix(ratios, num_prompts, seed=0, exclude=())
    assert message in str(caught.value)


def test_a_task_with_evaluation_prompts_only_is_a_recipe_error():
    everything = {record_at("single_object", i)["prompt"] for i in range(80)}
    with pytest.raises(RecipeError, match="single_object: every prompt is an evaluation prompt"):
        training_mix({"single_object": 1}, 4, seed=0, exclude=everything)


def test_the_published_file_loads_as_it_is():
    prompts = load_prompts(PUBLISHED, classes=CLASSES, colors=COLORS)
    assert prompts == as_prompts(geneval_prompts())
    assert [prompt.index for prompt in prompts] == list(range(553))


def test_plain_text_is_one_prompt_per_line(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a red dog \nzwei Hunde, größer\n", encoding="utf-8")
    assert load_prompts(file) == (Prompt("a red dog", 0), Prompt("zwei Hunde, größer", 1))


def test_none_is_dropped_and_numbers_are_cast(tmp_path):
    dog = {"class": "dog", "count": "3", "color": None, "position": None}
    cat = {"class": "cat", "count": 1, "position": ["below", "0"]}
    record = {"tag": "position", "include": [dog, cat], "exclude": None, "prompt": "p", "id": 7}
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record))
    assert load_prompts(file)[0].metadata == {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 3},
            {"class": "cat", "count": 1, "position": ["below", 0]},
        ],
        "prompt": "p",
        "id": 7,
    }


def line(**changes):
    record = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    return json.dumps({**record, **changes})


def clause(**changes):
    return line(include=[{"class": "cat", "count": 1}, {"class": "dog", "count": 1, **changes}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(tag="cuonting"), "tag: unknown 'cuonting'; did you mean 'counting'?"),
        (line(tag=None), "tag: unknown None; write one of: single_object, "),
        (line(include=[]), "include: no clause"),
        (line(include={"class": "dog"}), "include: not a list of clauses"),
        (line(include=["dog"]), "include.0: not a clause"),
        (clause(**{"class": "dgo"}), "include.1.class: unknown 'dgo'; did you mean 'dog'?"),
        (clause(color="rde"), "include.1.color: unknown 'rde'; did you mean 'red'?"),
        (clause(**{"class": ""}), "include.1.class: '' is not a name"),
        (clause(colour="red"), "include.1: key: unknown 'colour'; did you mean 'color'?"),
        (clause(count=0), "include.1.count: 0; write 1 or more"),
        (clause(count=-2), "include.1.count: -2; write 1 or more"),
        (clause(count="-2"), "include.1.count: -2; write 1 or more"),
        (clause(count=1.5), "include.1.count: 1.5 is not a whole number"),
        (clause(count=True), "include.1.count: True is not a whole number"),
        (clause(count="two"), "include.1.count: 'two' is not a whole number"),
        (clause(count=None), "include.1.count: None is not a whole number"),
        (clause(position=["below", 1]), "include.1.position: index 1 is not an earlier"),
        (clause(position=["below", 2]), "index 2 is not an earlier include clause; one of 0 to 0"),
        (clause(position=["below", -1]), "index -1 is not an earlier include clause"),
        (clause(position=["beneath", 0]), "include.1.position: unknown 'beneath'"),
        (clause(position="below"), "'below'; write [relation, index of an earlier clause]"),
        (line(exclude=[{"class": "dog", "count": 0}]), "exclude.0.count: 0; write 1 or more"),
        (line(prompt="  "), "empty prompt; write a text under 'prompt'"),
        (line(prompt=3), "empty prompt; write a text under 'prompt'"),
        ("", "empty prompt; write a text or remove the line"),
        ("{'tag': 1}", "not JSON: "),
        ("[1]", "not a JSON object"),
        ('{"tag": "counting", "tag": "colors"}', "key 'tag' is written twice; keep one"),
        (
            '{"tag": "counting", "include": [{"class": "dog", "count": 1, "count": 2}]}',
            "key 'count' is written twice; keep one",
        ),
    ],
)
def test_a_wrong_line_is_named_with_file_and_line(tmp_path, text, message):
    file = tmp_path / "set.jsonl"
    file.write_text(f"{line()}\n{text}\n")
    with pytest.raises(InputError) as caught:
        load_prompts(file, classes=CLASSES, colors=COLORS)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_is_anything_where_no_vocabulary_is_given(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text(clause(**{"class": "gnu", "color": "beige"}))
    assert load_prompts(file)[0].metadata["include"][1]["class"] == "gnu"


def test_an_empty_line_of_text_is_named(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a dog\n\na cat\n")
    with pytest.raises(InputError, match=r"mine\.txt:2: empty prompt"):
        load_prompts(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="none\\.txt: no such file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_prompts(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="empty\\.txt: holds no prompts"):
        load_prompts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6n")
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 text \(byte 2\)"):
        load_prompts(tmp_path / "latin.txt")


PROMPTS = tuple(Prompt(f"p{i}", i) for i in range(11))


def test_an_epoch_takes_no_prompt_twice():
    # 11 prompts, 3 a step: epochs of 3 steps, so steps 3, 4, 5 are the second epoch.
    steps = [prompts_of_step(PROMPTS, step=s, prompts_per_step=3, seed=5) for s in (3, 4, 5)]
    assert len({prompt.index for step in steps for prompt in step}) == 9


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(prompt_order(11, epoch=epoch, seed=seed)) for epoch in range(4) for seed in range(4)
    }
    assert len(orders) == 16
    assert all(sorted(order) == list(range(11)) for order in orders)


def test_over_many_epochs_every_prompt_is_taken_about_as_often():
    # 3 of 4 are taken in each of 400 epochs: 300 +- sqrt(400 * 3/4 * 1/4) = 8.7 times each.
    taken = Counter(
        prompt.index
        for step in range(400)
        for prompt in prompts_of_step(PROMPTS[:4], step=step, prompts_per_step=3, seed=0)
    )
    assert all(abs(times - 300) < 45 for times in taken.values())


def test_a_step_takes_the_same_prompts_wherever_it_is_asked_for():
    # Step 1000 (2 steps an epoch) is the first of epoch 500. NumPy promises the bits of Philox.
    step = prompts_of_step(PROMPTS, step=1000, prompts_per_step=4, seed=2)
    assert [prompt.index for prompt in step] == [3, 9, 8, 4]
    assert step == tuple(PROMPTS[i] for i in prompt_order(11, epoch=500, seed=2)[:4])


def test_a_step_of_more_prompts_than_there_are_is_a_recipe_error():
    with pytest.raises(RecipeError, match="takes 12 prompts but the set has 11"):
        prompts_of_step(PROMPTS, step=0, prompts_per_step=12, seed=0)


def test_prompts_do_not_import_torch():
    code = "import sys, stage_rl.prompts.config; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def config(**fields):
    return GenEvalPromptsConfig.model_validate(fields)


def test_a_recipe_names_a_mix_its_own_ratios_or_a_file():
    stage = config(mix="stage", num_prompts=18).build()
    assert Counter(p.metadata["tag"] for p in stage)["counting"] == 7
    own = config(ratios={"counting": 1, "colors": 2.0}, num_prompts=3, seed=1).build()
    assert Counter(p.metadata["tag"] for p in own) == {"counting": 1, "colors": 2}
    assert [p.index for p in own] == [0, 1, 2]
    assert len(config(path=str(PUBLISHED)).build()) == 553


def test_a_prompts_recipe_survives_being_written_and_read():
    one = config(path="x.txt")
    fields = one.model_dump(exclude={"kind"})
    assert config(**fields) == one
    assert one.kind == "geneval"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing given; write one of mix, ratios, path"),
        ({"mix": "stage", "path": "x"}, "mix and path given; write one of mix, ratios, path"),
        ({"ratios": {"counting": 0}}, "all are 0; give at least one task a positive ratio"),
        ({"ratios": {"couting": 1}}, "did you mean 'counting'?"),
        ({"ratios": {"counting": -1}}, "greater than or equal to 0"),
        ({"ratios": {"counting": float("nan")}}, "finite number"),
        ({"mix": "flow"}, "'stage' or 'flow_grpo'"),
        ({"mix": "stage", "num_prompts": 0}, "greater than or equal to 1"),
        ({"mix": "stage", "seed": -1}, "greater than or equal to 0"),
    ],
)
def test_a_wrong_prompts_recipe_is_refused(fields, message):
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    assert message in str(caught.value)


def test_prompts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPTS[0].text = "another"
