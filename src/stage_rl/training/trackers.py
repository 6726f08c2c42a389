"""Experiment trackers beside the run folder: TensorBoard, Weights & Biases, Trackio, or one's own.

A recipe names them (`trackers: [tensorboard]`) by short name or `module:Class`; a package that no
recipe names is never imported. They get what metrics.jsonl gets, under the same names, the image
grids, and the recipe. A tracker that fails says so once and is left out: the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from stage_rl.config import describe, values_to_show
from stage_rl.errors import InputError
from stage_rl.files import replace_text
from stage_rl.recipe import Recipe
from stage_rl.settings import resolve

log = logging.getLogger(__name__)

OnStep = Callable[[int, Mapping[str, float]], object]

PROJECT = "stage-rl"
"""Where WANDB_PROJECT or TRACKIO_PROJECT names none."""


class Tracker(Protocol):
    """What a tracker does; its class is called with the run folder and the recipe."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of a step."""

    def log_image(self, step: int, image: Image.Image, caption: str) -> None:
        """Takes the image grid of a step; the caption names its prompts."""

    def close(self) -> None:
        """Is called at the end, also that of a run which failed."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    package = "tensorboard"

    def __init__(self, run: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))
        text = describe(recipe).replace("\n", "\n    ")  # indented: Markdown's code
        self._writer.add_text("recipe", f"    {text}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, image: Image.Image, caption: str) -> None:
        pixels_HWC = np.asarray(image.convert("RGB"))
        self._writer.add_image("images", pixels_HWC, step, dataformats="HWC")
        self._writer.add_text("images/prompts", caption, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, which its own environment variables (WANDB_...) set up."""

    package = "wandb"

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self._api = importlib.import_module(self.package)
        config, name = values_to_show(recipe), f"{run.name}-{_identity(run)}"
        self._api.init(name=name, config=config, resume="allow", **self._place(run))

    def _place(self, run: Path) -> dict[str, Any]:
        return {"id": _identity(run), "dir": str(run), **_project("WANDB_PROJECT")}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._api.log(dict(numbers), step=step)

    def log_image(self, step: int, image: Image.Image, caption: str) -> None:
        self._api.log({"images": self._api.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._api.finish()


class Trackio(Wandb):
    """A run of Trackio, whose functions are called as those of Weights & Biases; the name is what
    it knows a run by.
    """

    package = "trackio"

    def _place(self, run: Path) -> dict[str, Any]:
        return _project("TRACKIO_PROJECT")


def _project(variable: str) -> dict[str, str]:
    return {"project": os.environ.get(variable) or PROJECT}


def _identity(run: Path) -> str:
    """A random name, kept in the run folder: a resumed run is one run, and runs of one name, of two
    people or of two folders, are two.
    """
    file = run / "tracker_id"
    if not file.exists():
        replace_text(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def check_trackers(names: Sequence[str]) -> None:
    """An `InputError` for a tracker whose package is not installed."""
    for name in names:
        package = getattr(resolve("tracker", name), "package", None)
        if package and importlib.util.find_spec(package) is None:
            raise InputError(
                f"trackers: {package} is not installed; run pip install 'stage-rl[{package}]', or "
                f"leave '{name}' out"
            )


@contextmanager
def tracked(
    recipe: Recipe, run: Path, on_step: OnStep | None = None, *, quiet: bool = False
) -> Iterator[OnStep]:
    """A function that hands a step to the recipe's trackers, unless `quiet`, and to `on_step`."""
    trackers = _Trackers(() if quiet else recipe.trackers, recipe, run)

    def each(step: int, numbers: Mapping[str, float]) -> None:
        trackers.log(step, numbers)
        if on_step:
            on_step(step, numbers)

    try:
        yield each
    finally:
        trackers.close()


class _Trackers:
    """Those that have not failed."""

    def __init__(self, names: Sequence[str], recipe: Recipe, run: Path) -> None:
        self._run = run
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._guarded(name):
                self._open[name] = resolve("tracker", name)(run, recipe)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        picture = self._run / "images" / f"{step:06d}.png"
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log(step, numbers)
                if picture.exists():
                    with Image.open(picture) as image:
                        tracker.log_image(step, image, _prompts_of(picture))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leaves a tracker out that fails or exits: it is anyone's program."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._open.pop(name, None)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("tracker %s failed and is left out, the run goes on (%s)", name, text)


def _prompts_of(picture: Path) -> str:
    """The prompts of a grid, as the file beside it says."""
    records = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    return "; ".join(dict.fromkeys(record["prompt"] for record in records))
