"""Which prompts a step takes, and files that cannot be read."""

import os
from pathlib import Path

import pytest

from stage_rl.errors import InputError, RecipeError
from stage_rl.prompts.files import prompt_order, prompts_of_step, read_lines, read_prompts
from stage_rl.types import Prompt

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


def test_a_step_takes_the_same_prompts_wherever_it_is_asked_for():
    # Step 1000 (2 steps an epoch) is the first of epoch 500. NumPy promises the bits of Philox.
    step = prompts_of_step(PROMPTS, step=1000, prompts_per_step=4, seed=2)
    assert [prompt.index for prompt in step] == [3, 9, 8, 4]
    assert step == tuple(PROMPTS[i] for i in prompt_order(11, epoch=500, seed=2)[:4])


def test_a_step_of_more_prompts_than_there_are_is_a_recipe_error():
    with pytest.raises(RecipeError, match="takes 12 prompts but the set has 11"):
        prompts_of_step(PROMPTS, step=0, prompts_per_step=12, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": no such file"),
        (b"", ": holds no prompts"),
        (b"a dog\n\na cat\n", ":2: empty prompt; write a text or remove the line"),
        (b"gr\xf6n", ": not UTF-8 text (byte 2)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_lines(file)
    assert str(caught.value) == f"{file}{message}"
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_lines(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "prompt,prompt\na,b\n",
            r"a\.csv:1: several columns are named 'prompt'; keep one",
        ),
        ("a.jsonl", '{\n"prompt": "a"\n}\n', r"a\.jsonl:1: a JSON object that does not end here"),
        (
            "a.jsonl",
            '{"prompt": "a \\ud800"}',
            r"a\.jsonl:1: 'a \\ud800' is no Unicode text; write",
        ),
        ("a.json", "[" * 100_000, r"a\.json: is nested too deeply"),
        (
            "a.jsonl",
            '{"prompt": "a", "n": ' + "9" * 5000 + "}",
            r"a\.jsonl:1: not JSON: a number",
        ),
    ],
)
def test_what_no_reader_takes_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_prompts(tmp_path / name))


def test_a_device_or_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(InputError, match="is not a plain file; name one"):
            read_lines(path)
