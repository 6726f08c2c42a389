"""One reward of a server: which images are refused, which requests share a call of the reward."""

import asyncio
import base64
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.base import Score
from stage_rl.rewards.protocol import Drawing
from stage_rl.serving.limits import Limits, Metrics, Refusal
from stage_rl.serving.service import Batcher, decode, png_files
from stage_rl.types import Prompt

LIMITS = Limits(image_pixels=100, request_pixels=150)
PIXELS_HWC = np.random.default_rng(0).integers(0, 256, (10, 10, 3), np.uint8)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def made(width, height, *, bits=8, color=2, data=b"\0"):
    """A PNG that claims a size, whatever it holds."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def read(*files):
    """What `png_files` makes of a request with these files."""
    items = [Drawing(prompt="a", image_png=base64.b64encode(file).decode()) for file in files]
    return png_files(items, LIMITS)


GOOD = png(Image.fromarray(PIXELS_HWC))


@pytest.mark.parametrize("options", [{}, {"compress_level": 0}, {"compress_level": 9}])
def test_pixels_arrive_as_they_are(options):
    files, pixels = read(png(Image.fromarray(PIXELS_HWC), **options))
    assert pixels == 100
    assert (decode(files) == PIXELS_HWC).all()


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        ([GOOD, b""], 422, r"items\.1\.image_png: is not a PNG"),
        ([GOOD, b"GIF89a" + bytes(40)], 422, r"items\.1\.image_png: is not a PNG"),
        ([png(Image.new("L", (4, 4)))], 422, r"items\.0\.image_png: is not 8-bit RGB"),
        ([png(Image.new("RGBA", (4, 4)))], 422, "is not 8-bit RGB"),
        ([png(Image.new("P", (4, 4)))], 422, "is not 8-bit RGB"),
        ([made(4, 4, bits=16)], 422, "is not 8-bit RGB"),
        ([made(0, 4)], 422, "has no pixels"),
        ([GOOD, GOOD], 413, "200 pixels; send at most 150 in a request"),
        ([GOOD, png(Image.new("RGB", (5, 5)))], 422, "images of several sizes"),
        # Less than 20 kB that would be 900 million pixels.
        ([made(30_000, 30_000, data=bytes(10**7))], 413, "30000 x 30000; send at most 100 pixels"),
    ],
)
def test_what_is_no_rgb_png_or_too_large_is_refused_by_its_header(files, status, message):
    with pytest.raises(Refusal, match=message) as caught:
        read(*files)
    assert caught.value.status_code == status


@pytest.mark.parametrize("file", [made(4, 4), GOOD[:-30], GOOD[:40]])
def test_a_broken_png_is_refused_when_it_is_decoded(file):
    files, _ = read(file)
    with pytest.raises(Refusal, match="is a broken PNG"):
        decode(files)


def test_a_png_with_a_second_size_is_refused_before_anything_is_decoded():
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 8, 2, 0, 0, 0))
    good = made(4, 4, data=bytes(52))
    file = good[:33] + huge + good[33:]
    with pytest.raises(Refusal, match=r"items\.0\.image_png: has two headers") as caught:
        read(file)
    assert caught.value.status_code == 422


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_what_unpacks_to_more_than_its_pixels_is_refused(name):
    good = made(4, 4, data=bytes(52))
    file = good[:33] + chunk(name, b"a\0\0" + zlib.compress(bytes(10**6))) + good[33:]
    with pytest.raises(Refusal, match=r"items\.0\.image_png: holds compressed text"):
        read(file)


def test_a_png_of_400_million_pixels_is_a_refusal_where_the_limits_allow_it():
    with pytest.raises(Refusal, match="is a broken PNG"):
        decode([made(20_000, 20_000)])


def test_data_beyond_the_claimed_size_is_not_decoded():
    # 4 rows of a filter byte and 4 x 3 bytes are 52; the rest of the 10 MB is left packed.
    files, _ = read(made(4, 4, data=bytes(10**7)))
    assert decode(files).shape == (1, 4, 4, 3)


def test_damage_anywhere_is_refused_or_harmless():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(500):
        damaged = bytearray(GOOD)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(read(bytes(damaged))[0])
            outcomes.add("decoded")
        except Refusal as refusal:
            outcomes.add(refusal.code)
    assert {"image", "pixels"} <= outcomes <= {"image", "pixels", "decoded"}


def job(*texts, side=2):
    """Images and prompts of one request."""
    prompts = [Prompt(text, index) for index, text in enumerate(texts)]
    return np.zeros((len(texts), side, side, 3), np.uint8), prompts


class Recorder:
    """Scores a prompt by its text as a number, and keeps the texts of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, images_NHWC, prompts):
        assert len(images_NHWC) == len(prompts)
        self.calls.append([prompt.text for prompt in prompts])
        if "exit" in self.calls[-1]:
            raise SystemExit(3)
        return [Score(float(prompt.text), prompt.text) for prompt in prompts]


def run(jobs, *, reward, batch_size=4, delay_s=0.05):
    """The values, or the error, of jobs that arrive at once."""

    async def all_jobs():
        batcher = Batcher("r", reward, batch_size=batch_size, delay_s=delay_s, metrics=Metrics())
        calling = asyncio.create_task(batcher.run())
        asked = [batcher.score(*job) for job in jobs]
        outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
        assert batcher.num_waiting == 0
        calling.cancel()
        return outcomes

    return [
        outcome if isinstance(outcome, Exception) else [score.value for score in outcome]
        for outcome in asyncio.run(all_jobs())
    ]


@pytest.mark.parametrize(
    ("jobs", "options", "calls"),
    [
        # 2 + 1, then the last 1 fits beside them and the 3 do not.
        ([job(*"12"), job("1"), job(*"123"), job("1")], {}, ["1211", "123"]),
        # A request above the batch size is one call.
        ([job(*"123456"), job("1")], {}, ["123456", "1"]),
        # A full batch does not wait.
        ([job(*"12"), job(*"34")], {"delay_s": 60}, ["1234"]),
        # Images of several sizes do not share a call.
        ([job(str(side), side=side) for side in (2, 3, 2)], {}, ["22", "3"]),
        # A batch size of 0: nothing is shared.
        ([job("1")] * 3, {"batch_size": 0, "delay_s": 60}, ["1"] * 3),
    ],
)
def test_requests_share_calls_where_they_fit_and_keep_their_scores(jobs, options, calls):
    reward = Recorder()
    values = run(jobs, reward=reward, **options)
    assert ["".join(call) for call in reward.calls] == calls
    assert values == [[float(prompt.text) for prompt in prompts] for _, prompts in jobs]


@pytest.mark.parametrize(("text", "error"), [("bad", ValueError), ("exit", RuntimeError)])
def test_a_failure_is_that_of_its_request_alone(text, error):
    reward = Recorder()
    first, second, third = run([job("1"), job(text), job("3")], reward=reward)
    assert (first, third) == ([1], [3])
    assert isinstance(second, error)
    assert reward.calls == [["1", text, "3"], ["1"], [text], ["3"]]


def refuse(images_NHWC, prompts):
    raise InputError("no such model")


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (refuse, InputError, "no such model"),
        (lambda images, prompts: [Score(1, "")], RewardError, "1 scores for 2 images"),
    ],
)
def test_an_error_of_the_reward_stays_what_it_is(reward, error, message):
    (outcome,) = run([job("1", "2")], reward=reward)
    assert isinstance(outcome, error)
    assert message in str(outcome)
