"""Does training harm what a policy understands? POPE and MMBench through its own text side.

A question about an image is answered by the likeliest of its choices as the first token of the
reply. Models are compared question by question.

Shape suffixes: H x W pixels, C colour channels, V vocabulary.
"""

from __future__ import annotations

import base64
import csv
import functools
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from scipy.stats import binomtest
from torch import Tensor

from stage_rl.console import progress, stop_signals
from stage_rl.errors import InputError, Stopped
from stage_rl.evaluation.results import ImageScore, Interval, aligned, bootstrap_intervals
from stage_rl.files import read_record, replace_text
from stage_rl.policies.base import Policy
from stage_rl.policies.digest import base_digest
from stage_rl.rewards.vqa import tokens_of
from stage_rl.settings import did_you_mean

HARM = 0.01
"""Loss of accuracy that is no longer an accident where the whole interval lies beyond it."""

QUESTIONS_AT_ONCE = 50
"""Answers after which they are written and a stop is heard."""


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    id: str
    row: str
    """The row of the table."""
    image: str
    """What the picture is loaded by; questions about one image resemble each other."""
    text: str
    choices: tuple[str, ...]
    right: str
    question: str
    """The same for all variants of a question, of which every one must be right."""


@dataclass(frozen=True)
class Understanding:
    """One benchmark of understanding."""

    name: str
    items: Callable[[Path | None], Sequence[Item]]
    picture: Callable[[Path | None, str], Image.Image]
    published: str
    size: str
    """Its questions, in words."""
    tested: str
    """The row of McNemar's test, which takes every question for one of its own: POPE asks half of
    the same questions in all three sets."""


@dataclass(frozen=True)
class Answers:
    """What a model said to every question."""

    model: str
    benchmark: str
    items: tuple[Item, ...]
    given: tuple[str, ...]
    """The choice that was taken, question by question."""
    all_questions: int
    """How many the benchmark has, variants aside; fewer may have been asked."""

    def rights(self) -> dict[str, list[bool]]:
        """By row, whether each question was answered right, in all its variants."""
        rows: dict[str, list[bool]] = {}
        for (row, _), right in _by_question(self).items():
            rows.setdefault(row, []).append(right)
        return rows

    def figures(self) -> dict[str, dict[str, float]]:
        """Accuracy of each row and, where the answers are yes and no, precision, recall, F1 and
        the share of yes; then their mean over the rows.
        """
        table = {row: {"accuracy": sum(right) / len(right)} for row, right in self.rights().items()}
        for row, figures in table.items():
            pairs = [
                (item.right, answer)
                for item, answer in zip(self.items, self.given, strict=True)
                if item.row == row and item.choices == YES_NO
            ]
            figures |= _yes_figures(pairs) if pairs else {}
        names = next(iter(table.values()))
        means = {name: sum(row[name] for row in table.values()) / len(table) for name in names}
        return {**table, "mean": means}

    def to_json(self) -> dict[str, Any]:
        """As plain values: the figures, and each answer by the id of its question."""
        given = {item.id: answer for item, answer in zip(self.items, self.given, strict=True)}
        record = {"model": self.model, "figures": self.figures(), "answers": given}
        return {**record, "questions": self.all_questions, "asked": len(_by_question(self))}


@dataclass(frozen=True)
class UnderstandingReport:
    """One model, or a trained one beside its base, on one benchmark."""

    answers: Answers
    published: str
    base: Answers | None = None

    @property
    def benchmark(self) -> str:
        return self.answers.benchmark

    def difference(self) -> tuple[float, Interval, float]:
        """Trained minus base in accuracy, its paired 95 % interval by drawing images again, and
        the p of McNemar's exact test on the questions of the tested row that only one of them
        answers right.
        """
        assert self.base is not None, "there is no base"
        before, after = self.base, self.answers
        assert before.items == after.items, "answers to other questions cannot be paired"
        images = {image: n for n, image in enumerate(dict.fromkeys(i.image for i in after.items))}
        was, is_ = _by_question(before), _by_question(after)
        image_of = {(item.row, item.question): item.image for item in after.items}
        changes = [
            ImageScore("all", images[image_of[key]], n, float(is_[key]) - float(was[key]))
            for n, key in enumerate(is_)
        ]
        tested = [key for key in is_ if key[0] == self._tested]
        lost = sum(was[key] and not is_[key] for key in tested)
        won = sum(is_[key] and not was[key] for key in tested)
        p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
        mean = sum(one.value for one in changes) / len(changes)
        return mean, bootstrap_intervals(changes, pooled=True)["overall"], p

    @property
    def _tested(self) -> str:
        return find_understanding(self.benchmark).tested

    @property
    def is_harmed(self) -> bool:
        """Whether the whole interval lies beyond a loss of one point."""
        interval = self.difference()[1] if self.base is not None else None
        return interval is not None and interval[1] < -HARM

    def table(self) -> str:
        """The figures by row, the paired difference, and the published ones."""
        lines: list[str] = []
        for one in (self.base, self.answers):
            if one is not None:
                figures = one.figures()
                names = list(figures["mean"])
                rows = [[row, *(f"{v[name]:.4f}" for name in names)] for row, v in figures.items()]
                lines += [f"{one.model}: {self.benchmark}", *aligned([["", *names], *rows]), ""]
        if self.base is not None:
            change, interval, p = self.difference()
            shown = "not known" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
            lines.append(
                f"accuracy {change:+.4f}, 95 % interval {shown}; McNemar p {p:.3g} ({self._tested})"
            )
        if self.is_harmed:
            lines.append("ALARM: understanding is lost, by more than one point")
        number, all_of_them = len(_by_question(self.answers)), self.answers.all_questions
        if number < all_of_them:
            lines.append(f"{number} of {all_of_them} questions; not the whole benchmark")
        return "\n".join([*lines, self.published])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        record: dict[str, Any] = {"benchmark": self.benchmark, "trained": self.answers.to_json()}
        if self.base is not None:
            change, interval, p = self.difference()
            record |= {"base": self.base.to_json(), "difference": change, "interval": interval}
            record |= {"mcnemar_p": p, "mcnemar_of": self._tested, "is_harmed": self.is_harmed}
        return record


def _by_question(answers: Answers) -> dict[tuple[str, str], bool]:
    right: dict[tuple[str, str], bool] = {}
    for item, given in zip(answers.items, answers.given, strict=True):
        key = (item.row, item.question)
        right[key] = right.get(key, True) and given == item.right
    return right


def _yes_figures(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of pairs of the right and the given answer; as POPE's own script computes them."""
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    says, asks = (sum(pair[n] == "yes" for pair in pairs) for n in (1, 0))
    precision, recall = hits / says if says else 0.0, hits / asks if asks else 0.0
    both = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / both if both else 0.0,
        "share of yes": says / len(pairs),
    }


def find_understanding(name: str) -> Understanding:
    """The benchmark of a name; an unknown one is an `InputError`."""
    if name not in BENCHMARKS:
        raise InputError(f"benchmark: unknown '{name}'; {did_you_mean(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def check_pictures(name: str, data: Path | None, limit: int | None = None) -> None:
    """Finds every picture that will be asked about; one that is not there, or none, is an
    `InputError`.
    """
    benchmark = find_understanding(name)
    for image in dict.fromkeys(item.image for item in _first(benchmark.items(data), limit)):
        try:
            benchmark.picture(data, image).close()
        except UnidentifiedImageError as error:
            raise InputError(f"{name}: {error}; get it again") from error


def answer_all(
    policy: Policy,
    name: str,
    *,
    model: str,
    data: Path | None,
    out: Path,
    limit: int | None = None,
    mixed: bool = True,
) -> Answers:
    """A policy's answers to a benchmark, or to the first `limit` questions of each row.

    Answers are kept in `out` and not asked for again, unless their file was cut off; `mixed`
    computes matmuls in bf16. A family that does not read images, or a missing file, is an
    `InputError`. Raises `Stopped` after Ctrl-C or SIGTERM.
    """
    benchmark = find_understanding(name)
    if not policy.understands:
        raise InputError(f"{model}: {type(policy).__name__} answers no questions about images")
    known = benchmark.items(data)
    items = _first(known, limit)
    asked = [(item.id, item.image, item.text, item.choices) for item in known]
    about = json.dumps([model, base_digest(policy), mixed, str(policy.device.type), asked])
    file = out / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.json"
    found = read_record(file) or {}
    kept = {item.id: found[item.id] for item in known if found.get(item.id) in item.choices}
    rest = iter([item for item in items if item.id not in kept])
    with stop_signals() as signals, progress(f"{model}: {name}", len(items)) as advance:
        advance(sum(item.id in kept for item in items))
        while some := list(islice(rest, QUESTIONS_AT_ONCE)):
            if signals:
                raise Stopped(
                    f"{file}: stopped; run the same command again to go on",
                    signal_number=signals[0],
                )
            try:
                for item in some:
                    picture = benchmark.picture(data, item.image)
                    kept[item.id] = _answer(policy, picture, item, mixed)
            finally:
                out.mkdir(parents=True, exist_ok=True)
                replace_text(file, json.dumps(kept) + "\n")
            advance(len(some))
    given = tuple(kept[item.id] for item in items)
    return Answers(model, name, tuple(items), given, len({(i.row, i.question) for i in known}))


def _first(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first questions of each row in all their variants, which may lie anywhere in a file."""
    taken: dict[str, set[str]] = {}
    for item in items:
        some = taken.setdefault(item.row, set())
        if limit is None or len(some) < limit:
            some.add(item.question)
    return [item for item in items if item.question in taken[item.row]]


def _answer(policy: Policy, picture: Image.Image, item: Item, mixed: bool) -> str:
    """The likeliest choice, by all spellings of it that are one token."""
    image_HWC = torch.from_numpy(np.array(picture.convert("RGB")))
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=mixed):
        logits_V = policy.answer_logits(image_HWC, item.text)
    return max(item.choices, key=lambda choice: _weight(policy, logits_V, choice))


def _weight(policy: Policy, logits_V: Tensor, choice: str) -> float:
    spellings = [choice, choice.capitalize(), f" {choice}", f" {choice.capitalize()}"]
    return float(logits_V[tokens_of(policy.processor.tokenizer, spellings)].logsumexp(0))


# POPE (arXiv 2305.10355): is an object in a photograph of COCO?

YES_NO = ("yes", "no")

COCO = ("coco/val2014", "val2014")
"""Folders of COCO's images."""

ONE_WORD = "Answer the question using a single word or phrase."


def _pope_items(data: Path | None) -> list[Item]:
    file = resources.files("stage_rl") / "evaluation" / "questions" / "pope.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    return [
        Item(
            id=f"{row['set']}-{row['question_id']}",
            row=row["set"],
            image=row["image"],
            text=f"{row['text']}\n{ONE_WORD}",
            choices=YES_NO,
            right=row["label"],
            question=str(row["question_id"]),
        )
        for row in rows
    ]


def _coco_picture(data: Path | None, name: str) -> Image.Image:
    for folder in (*COCO, "."):
        file = (data or Path()) / folder / name
        if data is not None and file.exists():
            return Image.open(file)
    where = f"{data}: has no coco/val2014/{name}" if data else "is not given"
    raise InputError(f"--data {where}; write the folder with COCO's val2014 images")


# MMBench (arXiv 2307.06281): one of four choices, asked in every order of the choices.

MMBENCH_FILE = "mmbench/MMBench_DEV_EN.tsv"

LETTER = "Answer with the option's letter from the given choices directly."

CIRCULAR = 1_000_000
"""Variants of a question have its index and a multiple of this."""


def _mmbench_items(data: Path | None) -> list[Item]:
    return [_mmbench_item(row) for row in _mmbench_rows(data)]


def _mmbench_item(row: Mapping[str, str]) -> Item:
    letters = tuple(letter for letter in "ABCD" if row.get(letter, "").strip())
    hint = row.get("hint", "").strip()
    return Item(
        id=row["index"],
        row="dev",
        image=str(int(row["index"]) % CIRCULAR),
        text="\n".join(
            [
                *([hint] if hint else []),
                row["question"],
                *(f"{letter}. {row[letter]}" for letter in letters),
                LETTER,
            ]
        ),
        choices=letters,
        right=row["answer"].strip(),
        question=str(int(row["index"]) % CIRCULAR),
    )


def _mmbench_rows(data: Path | None) -> Iterator[dict[str, str]]:
    file = (data or Path()) / MMBENCH_FILE
    if data is None or not file.exists():
        where = f"{data}: has no {MMBENCH_FILE}" if data else "is not given"
        raise InputError(f"--data {where}; write the folder of VLMEvalKit's file")
    csv.field_size_limit(1 << 30)  # pictures stand in the table
    with file.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream, delimiter="\t")


def _mmbench_picture(data: Path | None, index: str) -> Image.Image:
    pictures = _mmbench_pictures(data)
    return Image.open(io.BytesIO(base64.b64decode(pictures[index])))


@functools.cache
def _mmbench_pictures(data: Path | None) -> dict[str, str]:
    """The base64 picture of each question; a short cell names the row whose picture it shares."""
    cells = {row["index"]: row["image"] for row in _mmbench_rows(data)}
    return {i: cells.get(cell, cell) if len(cell) <= 64 else cell for i, cell in cells.items()}


BAND = (
    "published, by other prompts, so a rough band alone: Janus-Pro-1B {}, Janus-Pro-7B {} "
    "(arXiv 2501.17811)"
)

BENCHMARKS: Mapping[str, Understanding] = {
    "pope": Understanding(
        "pope",
        _pope_items,
        _coco_picture,
        BAND.format("86.2", "87.4"),
        size="3 x 3000",
        tested="adversarial",
    ),
    "mmbench": Understanding(
        "mmbench",
        _mmbench_items,
        _mmbench_picture,
        BAND.format("75.5", "79.2"),
        size="dev",
        tested="dev",
    ),
}
"""By name; `stage eval MODEL --benchmark NAME --against BASE`."""
