"""The base of every settings class, and the mechanism that lets a recipe name a component.

A component is one frozen settings class with a `build` method, and the object it builds. Where a
recipe expects a family (policy, prompts, reward, detector) it writes a mapping with a `kind`, a
built-in name or `module:Class`; the class behind the kind validates the rest of the mapping.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    computed_field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stage_rl import registry
from stage_rl.errors import RecipeError

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Every = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def near_or_all(name: str, known: Iterable[str]) -> str:
    """What to write instead of a wrong name: the near one, else the allowed ones."""
    names = list(known)
    if not names:
        return "none is allowed here"
    near = difflib.get_close_matches(name, names, n=1) or [
        n for n in names if name and n.startswith(name)
    ]
    return f"did you mean '{near[0]}'?" if near else f"write one of: {', '.join(names)}"


def complaint(key: str, text: str) -> PydanticCustomError:
    """A validation error about `key` (relative, dotted) of the mapping that is being read."""
    return PydanticCustomError("stage", "{text}", {"text": text, "key": key})


class Settings(BaseModel):
    """A frozen, strict mapping: an unknown key, a wrong type, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        polymorphic_serialization=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _read_mapping(cls, data: Any) -> Any:
        """Refuses unknown keys; sequences become tuples, which strict YAML and JSON lack."""
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                hint = near_or_all(str(key), cls.model_fields)
                raise complaint(str(key), f"unknown key; {hint}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


class Component(Settings):
    """A settings class that a recipe names by `kind`; a base of a family sets `family`."""

    family: ClassVar[str]

    @computed_field
    @property
    def kind(self) -> str:
        """The built-in name of this class, else module:Class."""
        return registry.name_of(self.family, type(self))

    @model_validator(mode="wrap")
    @classmethod
    def _pick_class(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """On the base of a family, hands the mapping to the class behind its kind."""
        if "family" not in vars(cls) or not isinstance(data, dict):
            return handler(data)
        fields = dict(data)
        kind = fields.pop("kind", None)
        if not isinstance(kind, str):
            names = ", ".join(registry.BUILT_IN[cls.family])
            raise complaint("kind", f"is required; write one of: {names}, or module:Class")
        try:
            picked = registry.resolve(cls.family, kind)
        except RecipeError as error:
            raise complaint("kind", str(error)) from error
        if not (isinstance(picked, type) and issubclass(picked, cls)):
            raise complaint("kind", f"'{kind}' is no {cls.__name__}; name a subclass of it")
        return picked.model_validate(fields)
