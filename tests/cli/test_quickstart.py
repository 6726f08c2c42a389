"""docs/quickstart.md and docs/tour.ipynb, run from top to bottom with a tiny model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from stage_rl import settings

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.S)


@pytest.fixture
def tiny_world(tmp_path, tiny_shapes_folder, monkeypatch):
    """An empty working folder, where `shapes` is a tiny model of random weights."""
    monkeypatch.setitem(settings.SHIPPED_MODELS, "shapes", str(tiny_shapes_folder))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_quickstart_does_what_it_says(tiny_world, stage, monkeypatch):
    blocks = BLOCK.findall((DOCS / "quickstart.md").read_text())
    commands = []
    for kind, text in blocks:
        if kind:
            (tiny_world / re.match(r"# (\S+)\n", text)[1]).write_text(text)
            continue
        for line in text.strip().splitlines():
            program, *arguments = shlex.split(line.replace("shapes_geneval", "shapes_smoke"))
            if program == "stage":
                commands.append(arguments[0])
                done = stage(*arguments, *SMALLER.get(arguments[-1], ()))
                assert done.exit_code == 0, (line, done.output, done.exception)
    assert {"train", "sample", "runs", "report", "compare", "export"} == set(commands)
    for name in ("before.png", "after.png", "runs/first/report.html", "exported/config.json"):
        assert (tiny_world / name).stat().st_size > 0
    draw_by_the_card(tiny_world / "exported", monkeypatch)
    steps = (tiny_world / "runs/mine/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(4))


def draw_by_the_card(folder, monkeypatch):
    """Runs the code of an exported model's card, which knows transformers alone."""
    code = (folder / "README.md").read_text().split("## Draw\n\n```python\n")[1].split("```")[0]
    assert "stage_rl" not in code
    monkeypatch.chdir(folder)
    exec(code, {})
    with Image.open("drawn.png") as picture:
        assert picture.size == (48, 48)
        assert len(picture.getcolors(48 * 48)) > 10


SMALLER = {
    "run.dir=runs/smoke": ("evaluation=null",),
    "run.dir=runs/mine": ("steps=3", "probe.every=0", "run.log_images_every=0"),
    "run.save_every=1": ("steps=4",),
}
"""By the last word of a command what stands behind it: the last setting of a key counts."""


def test_every_cell_of_the_tour_runs(tiny_world):
    cells = json.loads((DOCS / "tour.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["rewards"]) == 2
    assert [score.value is not None for score in names["scores"]] == [True] * 4
    assert (tiny_world / "exported-tour" / "README.md").exists()
