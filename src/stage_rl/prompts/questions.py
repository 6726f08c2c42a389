"""Question files: prompts with what a judge is asked about their images.

JSON lines, compressed where the name ends in .gz. The first record says what the file is, each
other one is a prompt. `stage data questions` writes them (`prompts/question_sources.py`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from stage_rl.errors import InputError
from stage_rl.prompts.files import PromptsConfig
from stage_rl.settings import Settings
from stage_rl.types import Prompt


class Header(Settings):
    """What a question file is and where it comes from."""

    benchmark: str
    source: str
    """Repository and commit."""
    licence: str
    images_per_prompt: int = Field(ge=1)
    """As published."""
    prompts: int = Field(ge=1)
    """How many records follow."""
    sha256: dict[str, str] = Field(default_factory=dict)
    """Of the published files it was made from."""
    content: str = ""
    """SHA-256 of the records as they were written, so that a change by hand is seen."""
    template: str | None = None
    """What the judge is told: {prompt}, {question}, {questions} and the fields of a record."""


class Question(Settings):
    """One question about the image of a prompt."""

    id: int
    text: str
    expected: str = "yes"
    """The right answer."""
    answers: tuple[str, ...] = ()
    """Spellings of the right answer; none: those of the judge."""
    parents: tuple[int, ...] = ()
    """Questions without whose right answer this one cannot be right."""
    group: str = ""
    """What it asks about, for the tables."""


class QuestionRecord(Settings):
    """One prompt with its questions."""

    id: str
    text: str = Field(min_length=1)
    groups: dict[str, str] = Field(default_factory=dict)
    """The prompt's place in the tables, by axis."""
    questions: tuple[Question, ...] = ()
    fields: dict[str, Any] = Field(default_factory=dict)
    """What the template or the aggregation reads besides."""


class QuestionsPromptsConfig(PromptsConfig):
    """The prompts of a question file, with their questions."""

    path: str
    """JSON lines with a header, as `stage data questions` writes them; .gz is read too."""
    benchmark: str | None = None
    """The benchmark that the file must be of; null: any."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts. Metadata: id, groups, questions, fields, the header's template, and as
        `target` the text to be read, where there is one.
        """
        header, records = read_questions(Path(self.path))
        if self.benchmark not in (None, header.benchmark):
            raise InputError(
                f"{self.path}: holds the questions of '{header.benchmark}'; write those of "
                f"'{self.benchmark}' with `stage data questions`"
            )
        prompts = []
        for index, one in enumerate(records):
            metadata = one.model_dump(mode="json", exclude={"text"})
            if header.template is not None:
                metadata["template"] = header.template
            if "text" in one.fields:
                metadata["target"] = one.fields["text"]
            prompts.append(Prompt(one.text, index, metadata))
        return tuple(prompts)


def questions_of(prompt: Prompt) -> tuple[Question, ...]:
    """The questions in a prompt's metadata; none where it has none."""
    return tuple(Question.model_validate(one) for one in prompt.metadata.get("questions", ()))


def read_questions(path: Path) -> tuple[Header, tuple[QuestionRecord, ...]]:
    """Header and records; whatever is wrong is an `InputError` that begins with FILE:LINE."""
    lines = _read(path).splitlines()
    if not lines:
        raise InputError(f"{path}: is empty; write it with `stage data questions`")
    header = _parse(Header, lines[0], f"{path}:1")
    records = tuple(
        _parse(QuestionRecord, line, f"{path}:{number}") for number, line in enumerate(lines[1:], 2)
    )
    if len(records) != header.prompts:
        raise InputError(
            f"{path}: {len(records)} prompts, its header says {header.prompts}; write it again"
        )
    check_records(records, str(path))
    return header, records


def write_questions(path: Path, header: Header, records: Iterable[QuestionRecord]) -> None:
    """Writes a question file; the same content gives the same bytes."""
    listed = tuple(records)
    header = header.model_copy(update={"content": content_of(listed)})
    data = "".join(_line(one) for one in (header, *listed)).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def content_of(records: Iterable[QuestionRecord]) -> str:
    """The SHA-256 of records as they are written."""
    return hashlib.sha256("".join(map(_line, records)).encode()).hexdigest()


def _line(row: Settings) -> str:
    plain = row.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(plain, ensure_ascii=False) + "\n"


def check_records(records: Sequence[QuestionRecord], where: str) -> None:
    """That ids are written once and parents exist; else an `InputError`."""
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise InputError(f"{where}: prompt '{record.id}' is there twice; keep one")
        seen.add(record.id)
        ids = [question.id for question in record.questions]
        if len(set(ids)) != len(ids):
            raise InputError(f"{where}: prompt '{record.id}': a question's id is written twice")
        for question in record.questions:
            unknown = set(question.parents) - set(ids)
            if unknown:
                raise InputError(
                    f"{where}: prompt '{record.id}': question {question.id} depends on "
                    f"{min(unknown)}, which is not there"
                )


Row = TypeVar("Row", bound=Settings)


def _parse(row_class: type[Row], line: str, where: str) -> Row:
    try:
        row: Mapping[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    try:
        return row_class.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("key", "")
        raise InputError(f"{where}: {key}: {first['msg']}") from error


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; write it with `stage data questions`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
