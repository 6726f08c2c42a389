"""Models of 16 tokens and a few thousand parameters: a folder, and the published sizes."""

import pytest

from stage_rl.bench import models
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.shapes.prompts import WORDS

TINY = JanusSize(width=32, layers=2, heads=2, mlp=48, codebook_size=64, image_size=16)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A policy that knows the words of the shapes world."""
    folder = tmp_path_factory.mktemp("bench")
    save_janus(*build_janus(TINY, words=WORDS, seed=0), folder)
    return folder


@pytest.fixture
def tiny_published(monkeypatch):
    """Tiny models under the names janus-1b and janus-7b."""
    for name in models.SIZES:
        monkeypatch.setitem(models.SIZES, name, TINY)
