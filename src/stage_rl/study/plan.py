"""A study: arms x cells x seeds around one recipe, from one YAML file.

A run of the study is `stage train RECIPE` with the overrides of the study, the cell and the arm, in
this order, and a seed. All arms of a seed share prompts, order and random streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from stage_rl.config import explain, load_recipe, read_yaml
from stage_rl.errors import InputError
from stage_rl.settings import Seed, Settings, did_you_mean, validation_error

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Overrides = tuple[str, ...]
RunKey = tuple[str, str, int]
"""Cell, arm and seed."""


class Arm(Settings):
    """One way to train, compared with the others."""

    overrides: Overrides = ()
    """Settings as dotted.key=value."""
    recipe: str | None = None
    """Recipe of this arm; null: that of the study."""
    cells: tuple[Name, ...] | None = None
    """Cells it runs in; null: all."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Its seeds; null: those of the study."""
    note: str = ""
    """What it is, for the tables."""


class Study(Settings):
    """What is compared, and how."""

    name: Name
    """Folder of the study under studies/ where none is given; the file's stem by default."""
    recipe: str
    """Recipe of all runs."""
    overrides: Overrides = ()
    """Settings of all runs."""
    cells: Annotated[dict[Name, list[str]], Field(min_length=1)]
    """Settings of each cell, such as a learning rate and beta."""
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    """What is compared in each cell."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Seeds of every arm that names none."""
    endpoint: str = "validation/gold"
    """Metric whose mean over the last fifth of the evaluations is tested."""
    reuse: tuple[Name, ...] = ()
    """Studies in folders beside this one's whose finished runs are taken over where recipe,
    overrides and seed are the same, and not repeated; so are the scores of the base."""
    contrasts: tuple[Annotated[list[Name], Field(min_length=2, max_length=2)], ...] = ()
    """Pairs of arms that are tested, Holm-corrected within a cell: (new, old)."""
    compared: tuple[Annotated[list[Name], Field(min_length=2, max_length=2)], ...] = ()
    """Other pairs whose differences are shown, without a test."""
    lines: tuple[Annotated[list[Name], Field(min_length=2, max_length=2)], ...] = ()
    """Pairs of arms that are one method at two strengths. The line between their ends over the root
    of K is what the other arms' endpoint is compared with at equal divergence."""

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for key in ("contrasts", "compared", "lines"):
            for number, pair in enumerate(getattr(self, key)):
                if pair[0] == pair[1]:
                    text = f"is '{pair[0]}' twice; write two arms"
                    raise validation_error(f"{key}.{number}", text)
                for arm in pair:
                    if arm not in self.arms:
                        raise validation_error(
                            f"{key}.{number}", f"no arm is named '{arm}'; add it"
                        )
        for name, arm in self.arms.items():
            for cell in arm.cells or ():
                if cell not in self.cells:
                    raise validation_error(
                        f"arms.{name}.cells", f"no cell is named '{cell}'; add it"
                    )
        return self

    def runs(self) -> Iterator[StudyRun]:
        """All runs, seed by seed and in it cell by cell: an early stop leaves whole seeds."""
        seeds = dict.fromkeys(s for arm in self.arms.values() for s in arm.seeds or self.seeds)
        for seed in seeds:
            for cell, of_cell in self.cells.items():
                for name, arm in self.arms.items():
                    if seed not in (arm.seeds or self.seeds) or cell not in (arm.cells or (cell,)):
                        continue
                    overrides = (*self.overrides, *of_cell, *arm.overrides, f"seed={seed}")
                    yield StudyRun(cell, name, seed, arm.recipe or self.recipe, overrides)


class StudyRun(NamedTuple):
    """One training of a study."""

    cell: str
    arm: str
    seed: int
    recipe: str
    overrides: Overrides

    @property
    def key(self) -> RunKey:
        """What tells it from the other runs of a study."""
        return self.cell, self.arm, self.seed

    def folder(self, study: Path) -> Path:
        """Its run folder."""
        return study / "runs" / self.cell / self.arm / str(self.seed)

    def __str__(self) -> str:
        return f"{self.cell}/{self.arm}/{self.seed}"


def built_in_studies() -> list[str]:
    """Names of the studies that come with the package."""
    files = resources.files("stage_rl.studies").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def load_study(name_or_file: str | Path) -> Study:
    """A built-in study or a file, every run's recipe and overrides checked; a fault is an
    `InputError`.
    """
    file = Path(name_or_file)
    if not file.suffix:
        if file.name not in (known := built_in_studies()):
            hint = did_you_mean(file.name, known)
            raise InputError(f"{file}: unknown study; {hint} (or a path that ends in .yaml)")
        file = Path(str(resources.files("stage_rl.studies") / f"{file.name}.yaml"))
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a study file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text; name a study file") from error
    try:
        tree = OmegaConf.to_container(read_yaml(text, str(file)))
    except RecursionError as error:
        raise InputError(f"{file}: is nested too deeply; write fewer levels") from error
    assert isinstance(tree, dict)
    tree.setdefault("name", file.stem)
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error)}") from error
    seen = set()
    for run in study.runs():
        if (run.recipe, run.cell, run.arm) not in seen:
            seen.add((run.recipe, run.cell, run.arm))
            load_recipe(run.recipe, run.overrides)
    return study
