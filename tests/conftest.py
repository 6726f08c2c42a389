"""Parts that recipes of the tests are made of, and the marker of tests that need a GPU."""

import importlib

import pytest

PARTS = '''
from stage_rl.schema import DetectorConfig, PolicyConfig, PromptsConfig, RewardConfig
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
