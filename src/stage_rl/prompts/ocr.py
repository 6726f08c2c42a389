"""Prompts that ask for written text: the text in quotes is the target of the OCR reward.

github.com/yifan123/flow_grpo, dataset/ocr: one prompt per line, exactly one text in double quotes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import Record, with_article
from stage_rl.prompts.reading import JSON_LINES, read_lines, read_records, read_table, text_of
from stage_rl.types import Prompt

LEVELS = (("Easy", 5), ("Medium", 10))
"""Longest target of a level, in characters without spaces; longer ones are Hard."""
BUCKET_COLUMNS = ("prompt_raw", "target_text")
THINGS = ("sign", "poster", "book cover", "mug", "neon sign", "shop window", "banner", "T-shirt")
WORDS = (
    *("open", "sale", "coffee", "welcome", "exit", "music", "garden", "north", "hello", "summer"),
    *("bakery", "library", "pizza", "museum", "station", "forever", "stage", "market", "ocean"),
)


def load_ocr(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file with their target and level; a fault is an `InputError`.

    The file is plain text, JSON lines with `prompt`, or CSV with the columns prompt_raw and
    target_text, as the published length buckets are.
    """
    path = Path(path)
    if path.suffix == ".csv":
        rows = read_table(path, BUCKET_COLUMNS)
        records = [(where, _bucketed(row, where)) for where, row in rows]
    elif path.suffix in JSON_LINES:
        records = [(where, {**r, "prompt": text_of(r, where)}) for where, r in read_records(path)]
    else:
        records = [(where, {"prompt": line}) for where, line in read_lines(path)]
    if not records:
        raise InputError(f"{path}: holds no prompts")
    return tuple(_prompt(record, where, i) for i, (where, record) in enumerate(records))


def synthetic_ocr(num_prompts: int, seed: int) -> tuple[Prompt, ...]:
    """Made-up prompts of one or two common words, for trying things out; marked as synthetic."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(num_prompts):
        words = rng.choice(WORDS, size=int(rng.integers(1, 3)), replace=False)
        text = f'{with_article(str(rng.choice(THINGS)))} that says "{" ".join(words).title()}"'
        record = {"prompt": text[0].upper() + text[1:], "synthetic": True}
        prompts.append(_prompt(record, "synthetic", index))
    return tuple(prompts)


def target_of(text: str, where: str) -> str:
    """What stands between the two double quotes of a prompt; else an `InputError`."""
    parts = text.split('"')
    if len(parts) != 3:
        raise InputError(f'{where}: {len(parts) - 1} double quotes; write one text in "quotes"')
    if not parts[1].replace(" ", ""):
        raise InputError(f"{where}: the quotes are empty; write the text to be drawn")
    return parts[1]


def level_of(target: str) -> str:
    """Easy, Medium or Hard, by the length of the target without spaces."""
    length = len(target.replace(" ", ""))
    return next((level for level, longest in LEVELS if length <= longest), "Hard")


def _bucketed(row: Record, where: str) -> Record:
    text = text_of(row, where, "prompt_raw")
    target, quoted = row.get("target_text"), target_of(text, where)
    if target != quoted.strip():
        raise InputError(f"{where}: target_text is {target!r}, but the prompt quotes {quoted!r}")
    return {"prompt": text}


def _prompt(record: Record, where: str, index: int) -> Prompt:
    target = target_of(record["prompt"], where)
    return Prompt(record["prompt"], index, {**record, "target": target, "level": level_of(target)})
