"""Inputs by the thousand: each is taken, or refused with one line of an error that a user can read.

`make test` tries 30 of each of six kinds, the slow tests 2,500. The same ones every time.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_reward import Toy

from stage_rl import cli
from stage_rl.config import load_recipe
from stage_rl.errors import CheckpointError, InputError, RecipeError
from stage_rl.prompts.files import read_prompts
from stage_rl.rewards.protocol import png_base64
from stage_rl.serving.limits import Limits, MemoryBudget, Refusal
from stage_rl.serving.service import RewardService, decode
from stage_rl.training.checkpoint import Progress, TrainState, read_checkpoint, save_checkpoint

SEVERAL = [30, pytest.param(2500, marks=pytest.mark.slow)]
"""Examples of one kind of input."""

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "~", "0", "010", "1e999", "${oc.env:NO}", "${a}", "a:b", "os:nope", "\x00"]
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def tried(number, *strategies):
    """Calls a function with so many inputs, the same ones at every time."""

    def run(function):
        options = {"derandomize": True, "database": None, "deadline": None}
        checks = {"suppress_health_check": list(HealthCheck)}
        settings(max_examples=number, **options, **checks)(given(*strategies)(function))()

    return run


def one_line(error):
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 2000


@st.composite
def damaged(draw, good):
    """Bytes with some cut out, put in or changed."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 4, 50]))
        data[place : place + length] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("number", SEVERAL)
def test_recipes(number, tiny_recipe):
    text, file = tiny_recipe.read_bytes(), tiny_recipe.with_name("fuzzed.yaml")
    sections = [
        "steps",
        "seed",
        "run",
        "rollout",
        "algorithm",
        "optimizer",
        "rewards",
        "evaluation",
    ]
    keys = st.sampled_from(sections) | st.text(max_size=8)

    @tried(number, st.one_of(damaged(text), st.dictionaries(keys, TREES, max_size=3)))
    def read(given):
        written = given if isinstance(given, bytes) else text + json.dumps(given)[1:-1].encode()
        if isinstance(given, dict):  # laid over the good recipe, in flow style
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in given.items()]
            written = text + "\n".join(lines).encode()
        file.write_bytes(written)
        try:
            load_recipe(file)
        except RecipeError as error:
            one_line(error)


@pytest.mark.parametrize("number", SEVERAL)
def test_overrides(number, tiny_recipe):
    sections = st.sampled_from(
        ["steps", "rollout.group_size", "rewards.0", "rewards.9.x", "run.dir"]
    )
    values = TREES.map(json.dumps) | st.text(max_size=20)

    @tried(number, sections | st.text(max_size=12), values)
    def read(key, value):
        try:
            load_recipe(tiny_recipe, [f"{key}={value}"])
        except RecipeError as error:
            one_line(error)


@pytest.mark.parametrize("number", SEVERAL)
def test_prompt_files(number, tmp_path):
    good = b'{"prompt": "a red circle", "n": [1, {"x": null}]}\n{"prompt": "two"}\n'
    table = b'prompt,tag\n"a, b",c\nd,e\n'
    content = damaged(good) | damaged(table) | st.binary(max_size=60) | TREES.map(as_json)

    @tried(number, st.sampled_from(["a.txt", "a.json", "a.jsonl", "a.csv"]), content)
    def read(name, data):
        (tmp_path / name).write_bytes(data)
        try:
            assert all(text.strip() for _, text, _ in read_prompts(tmp_path / name))
        except InputError as error:
            one_line(error)


def as_json(tree):
    return json.dumps(tree).encode()


@pytest.mark.parametrize("number", SEVERAL)
def test_requests(number):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    item = {"prompt": "a", "index": 0, "metadata": {"place": 1}, "image_png": png_base64(image)}
    limits = Limits(image_pixels=1000, request_pixels=4000)
    service = RewardService(Toy(name="toy"), None, limits=limits, budget=MemoryBudget(10**6))
    file = base64.b64decode(item["image_png"])
    bodies = st.one_of(
        damaged(json.dumps({"items": [item, item]}).encode()),
        damaged(file).map(
            lambda png: question({**item, "image_png": base64.b64encode(png).decode()})
        ),
        st.dictionaries(st.sampled_from(sorted(item)), TREES).map(
            lambda x: question({**item, **x})
        ),
        TREES.map(as_json),
        st.binary(max_size=40),
    )

    @tried(number, bodies)
    def answer(body):
        try:
            prompts, files, pixels = service._read(body)
            images_NHWC = decode(files)
            assert images_NHWC.shape[0] == len(prompts)
            assert images_NHWC.size == 3 * pixels
        except Refusal as refusal:
            one_line(refusal)


def as_text(png):
    return base64.b64encode(png).decode()


def question(item):
    return json.dumps({"items": [item]}).encode()


@pytest.mark.parametrize("number", SEVERAL)
def test_checkpoints(number, tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    state = Progress(1, {"equal_reward_steps": 0}, "base")
    folder = save_checkpoint(tmp_path, TrainState(module, optimizer), state=state)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    choices = [st.tuples(st.just(name), damaged(files[name])) for name in files]

    @tried(number, st.one_of(*choices), st.booleans())
    def read(changed, sealed):
        for name, data in {**files, changed[0]: changed[1]}.items():
            (folder / name).write_bytes(data)
        if sealed and changed[0] != "manifest.json":
            sums = {
                name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
            }
            del sums["manifest.json"]
            (folder / "manifest.json").write_text(json.dumps(sums))
        fresh = torch.nn.Linear(2, 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of other versions of pickle
                found = read_checkpoint(folder)
                found.load_policy(fresh)
                found.load_optimizer(torch.optim.AdamW(fresh.parameters()), fresh)
        except CheckpointError as error:
            one_line(error)
        else:
            name, data = changed
            is_spacing = name == "manifest.json" and json.loads(data) == json.loads(files[name])
            assert sealed or is_spacing or data == files[name]


def called(arguments):
    """Exit code and error stream of the command line, called in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stage", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                cli.main()
            except SystemExit as end:
                return end.code, said.getvalue()
    raise AssertionError


def in_process(arguments):
    """The same of a process of its own."""
    folders = (Path(cli.__file__).parents[2], Path(__file__).parent, Path.cwd())
    done = subprocess.run(
        [sys.executable, "-m", "stage_rl", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("number", "call"),
    [
        (30, called),
        pytest.param(2500, called, marks=pytest.mark.slow),
        pytest.param(15, in_process, marks=pytest.mark.slow),
    ],
)
def test_exit_codes_of_the_command_line(number, call, tiny_recipe, monkeypatch):
    monkeypatch.chdir(tiny_recipe.parent)
    text, file = tiny_recipe.read_bytes(), tiny_recipe.with_name("fuzzed.yaml")
    prompts = tiny_recipe.with_name("prompts.jsonl")
    good = b'{"prompt": "a red circle", "n": [1, {"x": null}]}\n{"prompt": "two"}\n'
    # What no command line can hold: a NUL, and what has no bytes.
    words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
    trees = TREES.map(json.dumps).filter(lambda text: "\0" not in text)
    keys = st.sampled_from(["steps", "seed", "rollout.group_size", "rewards.0", "run.dir"])
    verbs = st.sampled_from(["train", "sample", "eval", "data", "report", "runs", "--help"])
    lines = st.one_of(
        st.tuples(st.just("train"), st.just(file), words),
        st.tuples(st.just("train"), st.just(file), st.builds("{}={}".format, keys, trees)),
        st.tuples(st.just("data"), st.just("check"), st.just(prompts), st.just("geneval")),
        st.lists(verbs | words, max_size=3).map(tuple),
    )

    @tried(number, lines, damaged(text) | st.just(text), damaged(good) | st.just(good))
    def run(arguments, recipe, listed):
        file.write_bytes(recipe)
        prompts.write_bytes(listed)
        if arguments[:1] == ("train",):
            arguments = (*arguments, "--dry-run")
        code, said = call(arguments)
        assert code in (0, 1, 2), (arguments, code)
        assert "Traceback" not in said
        if code:
            help_page = "Usage: " in said
            assert help_page or (said.startswith("error: ") and said.count("\n") == 1), said
