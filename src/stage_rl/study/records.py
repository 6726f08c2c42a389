"""What results.json of a study holds.

The file may be anyone's: what is used of it is checked here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from stage_rl.errors import InputError
from stage_rl.run_records import Number, Whole


class _Open(BaseModel):
    """A mapping of which a part is used; the rest may be anything."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class ArmRecord(_Open):
    """An arm of the study file."""

    recipe: str | None = None
    overrides: list[str] = []


class StudyRecord(_Open):
    """The study file."""

    name: str = ""
    recipe: str = ""
    overrides: list[str] = []
    cells: dict[str, list[str]]
    arms: dict[str, ArmRecord]
    endpoint: str = "validation/gold"
    contrasts: list[tuple[str, str]] = []
    compared: list[tuple[str, str]] = []
    lines: list[tuple[str, str]] = []


class RunRecord(_Open):
    """One run."""

    cell: str
    arm: str
    seed: int
    recipe: str = ""
    overrides: list[str] = []
    steps: Whole
    failed: str
    diverged: bool | None = None
    """Whether a failed run diverged; former versions do not say."""
    series: dict[str, tuple[list[Whole], list[Number | None]]]

    @model_validator(mode="after")
    def _one_value_a_step(self) -> Self:
        for name, (steps, values) in self.series.items():
            if len(steps) != len(values):
                raise ValueError(f"{name} has {len(steps)} steps and {len(values)} values")
        return self


class _Results(_Open):
    study: StudyRecord
    base: dict[str, dict[str, float]]
    runs: list[RunRecord]


def read_results(folder: Path) -> dict[str, Any]:
    """FOLDER/results.json; an `InputError` where there is none, or something else."""
    file = folder / "results.json"
    try:
        found = _Results.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name the folder of a study") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise InputError(
            f"{file}: is not what a study writes ({' '.join(why.split())}); run the study again"
        ) from error
    return {
        "study": found.study.model_dump(mode="json"),
        "base": found.base,
        "runs": [run.model_dump(mode="json", exclude_unset=True) for run in found.runs],
    }
