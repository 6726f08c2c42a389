"""Images as JPEG leaves them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from stage_rl.config import load_reward
from stage_rl.rewards.selftest import as_jpeg
from stage_rl.types import Prompt


def noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 40, 56, 3), generator=generator, dtype=torch.uint8)


def test_images_are_what_a_file_of_that_quality_holds():
    file = io.BytesIO()
    Image.fromarray(noise()[1].numpy()).save(file, "JPEG", quality=75)
    wanted = torch.from_numpy(np.array(Image.open(file)))
    assert torch.equal(as_jpeg(noise(), 75)[1], wanted)
    assert not torch.equal(wanted, noise()[1])


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        ("clip_score", ["path=tiny"], "jpeg_quality"),
        (
            "geneval",
            ["detector.kind=mask2former", "detector.path=tiny", "detector.clip=tiny"],
            "detector.jpeg_quality",
        ),
    ],
)
def test_a_reward_looks_at_the_compressed_images(kind, settings, key):
    record = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    prompts = [Prompt("a photo of a cat", i, record) for i in range(2)]
    if kind == "geneval":
        sides = ["detector.shortest_side=64", "detector.longest_side=96"]
        settings = [*settings, *sides, "detector.min_score=0.01", "threshold=0.02"]
    plain = load_reward(kind, settings).build(torch.device("cpu"))
    compressed = load_reward(kind, [*settings, f"{key}=20"]).build(torch.device("cpu"))
    assert compressed(noise(), prompts) == plain(as_jpeg(noise(), 20), prompts)
