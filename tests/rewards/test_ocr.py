"""The OCR reward: its formula with no engine, then a real one on drawn text."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stage_rl.errors import InputError
from stage_rl.rewards import ocr
from stage_rl.rewards.base import Score
from stage_rl.rewards.check import check_reward
from stage_rl.rewards.judge import WeightedReward
from stage_rl.rewards.ocr import (
    Line,
    OcrReward,
    OcrRewardConfig,
    ParallelReader,
    garbled,
    paddleocr,
    rapidocr,
    similarity,
    target_of,
    text_image,
    text_of,
)
from stage_rl.types import Prompt

CPU = torch.device("cpu")
TEXTS = ("Hello World", "Spring Collection 2024", "Forever Yours", "42", "Bonjour", "STAGE")


def stacked(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize(
    ("text", "released", "paper"),
    [
        ("Hello World", 1.0, 1.0),
        ("Helo World", 0.9, 0.9),
        ("xxHelloWorldyy", 1.0, 0.6),  # four letters too many of ten
        ("", 0.0, 0.0),
        ("abcdefghijklmnopqrstuvwxyz", 0.0, 0.0),
        ("Hello", 0.5, 0.5),
        ("Hello Wor1d", 0.9, 0.9),
        ("World Hello", 0.2, 0.2),
        ("Hello, World!", 0.8, 0.8),
        ("hELLO wORLD", 1.0, 1.0),
    ],
)
def test_the_score_is_the_published_one(text, released, paper):
    assert similarity(text, "Hello World") == pytest.approx(released)
    assert similarity(text, "Hello World", allow_more=False) == pytest.approx(paper)


def test_the_target_is_that_of_the_metadata_else_the_first_quoted_text():
    assert target_of(Prompt('a sign "Open" on a "door"')) == "Open"
    assert target_of(Prompt('a sign "Open"', 0, {"target": "Shut"})) == "Shut"
    reason = OcrRewardConfig().unsupported_reason
    assert reason(Prompt('a sign "Open"')) is None
    for text in ("a sign", 'a sign "Open'):
        assert "double quotes" in reason(Prompt(text))
    assert "is empty" in reason(Prompt('a sign " "'))


def test_lines_count_above_the_confidence_and_in_order():
    lines = [Line("B", 0.9), Line("x", 0.0), Line("A", 0.4)]
    assert text_of(lines) == "BA"
    assert text_of(lines, 0.4) == "B"


@pytest.mark.parametrize(("compat", "pixel"), [("fixed", [0, 0, 255]), ("release", [255, 0, 0])])
def test_engines_get_blue_first_in_the_fixed_form_alone(compat, pixel):
    seen = []

    def read(pictures):
        seen.extend(pictures)
        return [[Line("Open", 1.0)] for _ in pictures]

    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 2, 2, 3)
    (score,) = OcrReward(read, compat)(red, [Prompt('"open"')])
    assert seen[0][0, 0].tolist() == pixel
    assert score == Score(1.0, "reads 'Open' for 'open'", replies=("Open",))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("the network is unreachable")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def reader():
    return rapidocr()


def test_drawn_words_are_read_without_a_network_and_their_strokes_in_disorder_are_not(no_network):
    reward = OcrRewardConfig().build(CPU)
    prompts = [Prompt(f'a sign that says "{text}"') for text in TEXTS]
    pictures = [text_image(text) for text in TEXTS]
    legible = reward(stacked(pictures), prompts)
    assert min(score.value for score in legible) >= 0.9, legible
    disordered = reward(stacked([garbled(picture) for picture in pictures]), prompts)
    assert max(score.value for score in disordered) <= 0.3, disordered


def test_a_letter_too_few_costs_its_share_and_no_text_is_worth_0(reader):
    drawn = [text_image("Hello World"), text_image("Helo World")]
    blank = np.full_like(np.asarray(drawn[0]), 255)
    scores = OcrReward(reader)(stacked([*drawn, blank]), [Prompt('"Hello World"')] * 3)
    assert [score.value for score in scores] == [1.0, 0.9, 0.0]
    assert scores[2].why == "reads '' for 'Hello World'"
    outcomes = check_reward(OcrRewardConfig(), WeightedReward("ocr", 1.0, OcrReward(reader)))
    assert [outcome.is_right for outcome in outcomes] == [True, True]


def test_a_line_upside_down_is_turned_on_demand():
    page = np.asarray(text_image("Open Today").rotate(180))[..., ::-1].copy()
    as_it_is, turned = (rapidocr(turned=turned)([page])[0] for turned in (False, True))
    assert [line.text for line in turned] == ["Open Today"]
    assert [line.text for line in as_it_is] != ["Open Today"]


def test_a_missing_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rapidocr is not installed; run pip install 'stage-rl\["):
        rapidocr()


READERS = '''
import os
import signal

from stage_rl.rewards.ocr import Line


def echo():
    """Reads the process it runs in and the brightness of a picture."""
    return lambda pictures: [[Line(f"{os.getpid()} {p.max()}", 1.0)] for p in pictures]


def mortal():
    return lambda pictures: os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def readers(tmp_path, monkeypatch):
    (tmp_path / "echo_readers.py").write_text(READERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("echo_readers")
    del sys.modules["echo_readers"]


PICTURES = [np.full((4, 4, 3), value, np.uint8) for value in range(6)]


def test_processes_read_every_picture_in_order_and_a_dead_one_is_an_error_that_new_ones_follow(
    readers,
):
    reader = ParallelReader(readers.mortal, processes=2)
    with pytest.raises(RuntimeError, match="a worker process of the OCR reward died"):
        reader(PICTURES)
    reader._make = readers.echo
    try:
        lines, again = ([page[0].text.split() for page in reader(PICTURES)] for _ in range(2))
    finally:
        reader.close()
    assert [int(value) for _, value in lines] == list(range(6))
    workers = {int(pid) for pid, _ in lines + again}
    assert os.getpid() not in workers
    assert len(workers) <= 2


KILLED = """
import os, signal
import numpy as np
from echo_readers import echo
from stage_rl.rewards.ocr import ParallelReader

if __name__ == "__main__":
    pages = ParallelReader(echo, processes=2)([np.zeros((4, 4, 3), np.uint8)] * 4)
    print(*{page[0].text.split()[0] for page in pages}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def runs(pid):
    """Whether a process is there; one that only waits to be reaped has no command line."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.exists() and file.read_bytes() != b""


def test_processes_end_with_a_trainer_that_is_killed(readers, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    # stderr to a file: a pipe would stay open as long as the workers live.
    with (tmp_path / "stderr").open("w") as stderr:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, stderr=stderr
        )
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert workers
    deadline = time.monotonic() + 20
    while any(runs(pid) for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)


@pytest.mark.slow
def test_processes_with_a_real_engine_read_what_one_reads(reader):
    reward = OcrRewardConfig(processes=2).build(CPU)
    prompts = [Prompt(f'"{text}"') for text in TEXTS]
    pictures = stacked([text_image(text) for text in TEXTS])
    try:
        assert reward(pictures, prompts) == OcrReward(reader)(pictures, prompts)
    finally:
        reward.reader.close()


PAGES = iter([[[[[0, 0]], ("Open", 0.9)], [[[0, 1]], ("now", 0.8)]], None])


@pytest.mark.parametrize(
    ("version", "answers", "device", "pages"),
    [
        (
            *("2.9.1", {"ocr": lambda picture, cls: [next(PAGES)]}, {"use_gpu": False}),
            [[Line("Open", 0.9), Line("now", 0.8)], []],
        ),
        (
            "3.7.0",
            {"predict": lambda picture: [{"rec_texts": ["Open"], "rec_scores": [0.9]}]},
            {"device": "cpu"},
            [[Line("Open", 0.9)]] * 2,
        ),
    ],
)
def test_each_version_of_paddleocr_is_asked_as_it_wants(
    monkeypatch, version, answers, device, pages
):
    calls = []

    def build(**options):
        calls.append(options)
        return SimpleNamespace(**answers)

    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=build))
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ocr.importlib.metadata, "version", lambda name: version)
    assert paddleocr(language="en")(PICTURES[:2]) == pages
    assert device.items() <= calls[0].items()
    # Lines upside down are turned on demand.
    paddleocr(turned=True)
    (switch,) = {"use_angle_cls", "use_textline_orientation"} & calls[0].keys()
    assert [one[switch] for one in calls] == [False, True]
