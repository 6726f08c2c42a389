"""The small files of a run folder, read without importing anything that they name.

The folder may be anyone's: what is used of a file is checked here, and one that holds something
else is an `InputError` that names it. Loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stage_rl.errors import InputError
from stage_rl.files import LARGEST_METRIC, MOST_STEPS

Number = Annotated[float, Field(gt=-LARGEST_METRIC, lt=LARGEST_METRIC)]
Whole = Annotated[int, Field(ge=0, lt=MOST_STEPS)]


class _Open(BaseModel):
    """A mapping of which a part is used; the rest may be anything."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Settings(_Open):
    """recipe.json."""

    steps: Whole
    name: str = ""
    seed: int = 0


class Status(_Open):
    """status.json."""

    recipe: str = ""
    overrides: list[str] = []
    state: str = ""
    why: str = ""


class Environment(_Open):
    """environment.json."""

    python: str
    processor: str = ""
    packages: dict[str, str]
    devices: list[str]


class Row(_Open):
    """A score, or a difference of two."""

    mean: Number
    interval: tuple[Number, Number] | None = None


Rows = dict[str, dict[str, Row]]
"""By measure and task."""


class Side(_Open):
    """What one model scored."""

    summary: Rows


class Scores(_Open):
    """evaluation.json."""

    base: Side
    trained: Side
    difference: Rows


class Drawn(_Open):
    """An image of a picture; `box` is its place, which former versions do not say."""

    prompt: str
    box: tuple[Whole, Whole, Whole, Whole] | None = None


class Scored(Drawn):
    """One of images/STEP.json."""

    reward: Number | None
    reason: str


class Half(_Open):
    """The base's image, or that of the trained policy."""

    value: Number | None
    box: tuple[Whole, Whole, Whole, Whole]


class Pair(_Open):
    """Two images of one prompt."""

    prompt: str
    task: str
    image: Whole
    base: Half
    trained: Half


class Pairs(_Open):
    """before_after.json."""

    images: list[Pair]


FORMS = {
    "recipe.json": TypeAdapter(Settings),
    "status.json": TypeAdapter(Status),
    "environment.json": TypeAdapter(Environment),
    "evaluation.json": TypeAdapter(Scores),
    "before_after.json": TypeAdapter(Pairs),
    "images": TypeAdapter(list[Scored]),
    "fixed": TypeAdapter(list[Drawn]),
}
"""By the name of a file, or of the folder whose files all are so."""


def record_of(file: Path) -> Any:
    """What a file of a run holds, in the form that `FORMS` has for it; empty where there is none.

    Raises InputError for one that cannot be read, or that holds something else.
    """
    form: TypeAdapter[Any] = FORMS.get(file.name) or FORMS[file.parent.name]
    try:
        return form.dump_python(form.validate_json(file.read_bytes()), exclude_unset=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        why = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
    raise InputError(f"{file}: cannot be read ({' '.join(why.split())}); restore it or remove it")
