"""Parts that recipes of the tests are made of, a tiny Janus, and the marker of GPU tests."""

import importlib
import os
import signal
from pathlib import Path

import pytest

# Tests send themselves what a shell has ignored for what runs in the background, and nohup.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as processors: a thread each, before torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What Numba keeps on disk has no lock against two processes that compile different types.
    kept = Path(__file__).parents[1] / ".pytest_cache" / "numba" / os.environ["PYTEST_XDIST_WORKER"]
    os.environ.setdefault("NUMBA_CACHE_DIR", str(kept))

PARTS = '''
from stage_rl.policies.base import PolicyConfig
from stage_rl.prompts.files import PromptsConfig
from stage_rl.rewards.base import DetectorConfig, RewardConfig
from stage_rl.types import Prompt


class TinyPolicy(PolicyConfig):
    width: int = 8
    """Width of the model."""

    def build(self, device):
        return self.width


class TinyPrompts(PromptsConfig):
    def build(self):
        return (Prompt("a red circle"),)


class TinyDetector(DetectorConfig):
    threshold: float = 0.5

    def build(self, device):
        return self.threshold


class TinyReward(RewardConfig):
    detector: DetectorConfig

    def build(self, device):
        return self.detector.build(device)
'''

RECIPE = """# A recipe for tests.
steps: 10
policy: {kind: tiny_parts:TinyPolicy}
prompts: {kind: tiny_parts:TinyPrompts}
rewards:
  - kind: tiny_parts:TinyReward
    detector: {kind: tiny_parts:TinyDetector}
"""

TINY_WORDS = (
    *("a", "the", "photo", "of", "red", "green", "blue", "square", "circle", "star"),
    *("two", "three", "and", "above", "below", ",", "."),
)


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not importlib.import_module("torch").cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def tiny_parts(tmp_path, monkeypatch):
    """A folder on the import path with `tiny_parts.py`, components that need no torch."""
    (tmp_path / "tiny_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_recipe(tiny_parts):
    """The file of a small complete recipe, beside its parts."""
    file = tiny_parts / "tiny.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def tiny_janus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Janus folder: 16 image tokens, 64 codes, images of 16 x 16, 2 layers of width 32."""
    import torch

    from stage_rl.shapes.model import JanusSize, build_janus, save_janus

    size = JanusSize(
        width=32,
        layers=2,
        heads=2,
        mlp=48,
        codebook_size=64,
        image_size=16,
        max_positions=48,
    )
    model, processor = build_janus(size, words=TINY_WORDS, seed=0)
    # At its initial scale a random model says the same everywhere; this one has opinions.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "vision_model" not in name:
                parameter.mul_(8)
    folder = tmp_path_factory.mktemp("janus")
    save_janus(model, processor, folder)
    return folder


@pytest.fixture
def tiny_janus(tiny_janus_folder: Path):
    """A fresh policy of that folder, on the CPU, with the default trainable part."""
    import torch

    from stage_rl.policies.janus import JanusConfig

    return JanusConfig(path=str(tiny_janus_folder)).build(torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Janus folder that knows the words of the shapes world and draws 48 x 48; random weights."""
    from stage_rl.shapes.model import JanusSize, build_janus, save_janus
    from stage_rl.shapes.prompts import WORDS

    size = JanusSize(width=16, layers=1, heads=2, mlp=16, codebook_size=32)
    folder = tmp_path_factory.mktemp("shapes")
    save_janus(*build_janus(size, words=WORDS, seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shapes(tiny_shapes_folder: Path):
    """The policy of that folder, on the CPU; nothing changes it."""
    import torch

    from stage_rl.policies.janus import JanusConfig

    return JanusConfig(path=str(tiny_shapes_folder), trainable=()).build(torch.device("cpu"))


@pytest.fixture(scope="session")
def original_janus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Janus of tests/data/janus_original in DeepSeek's files: a pickle of tensors."""
    import shutil

    import torch
    from safetensors.torch import load_file

    source = Path(__file__).parent / "data" / "janus_original"
    folder = tmp_path_factory.mktemp("original")
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
    for name in (*names, "processor_config.json", "preprocessor_config.json"):
        shutil.copy(source / name, folder)
    torch.save(load_file(source / "weights.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def tiny_llamagen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaGen folder: 16 image tokens, 50 codes, images of 8 x 8, 3 layers of width 64."""
    from tiny_llamagen import write_llamagen

    folder = tmp_path_factory.mktemp("llamagen")
    write_llamagen(folder, TINY_WORDS)
    return folder


@pytest.fixture(scope="session")
def emu3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Emu3 folder: 12 image tokens on 3 rows, 40 codes, images of 32 x 24."""
    from tiny_emu3 import write_emu3

    folder = tmp_path_factory.mktemp("emu3")
    write_emu3(folder)
    return folder


@pytest.fixture
def tiny_emu3(emu3_folder: Path):
    """A fresh policy of that folder, on the CPU, with the default trainable part."""
    from tiny_emu3 import load_emu3

    return load_emu3(emu3_folder)


@pytest.fixture
def tiny_llamagen(tiny_llamagen_folder: Path):
    """A fresh policy of that folder, on the CPU, with the default trainable part."""
    import torch

    from stage_rl.policies.llamagen import LlamaGenConfig

    return LlamaGenConfig(path=str(tiny_llamagen_folder)).build(torch.device("cpu"))
