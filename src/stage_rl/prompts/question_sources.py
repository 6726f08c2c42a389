"""Where question files come from: the published files of each benchmark, in the user's clone.

Read as data; a template that stands in a Python file is taken from it as a literal, never run.
Counts and hashes are those of the named commit, so another version is an `InputError`.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.questions import (
    Header,
    Question,
    QuestionRecord,
    check_records,
    content_of,
    read_questions,
)
from stage_rl.settings import did_you_mean


@dataclass(frozen=True)
class Source:
    """The published files of one benchmark, and how they become records."""

    repository: str
    """With its commit, where the files were read."""
    licence: str
    images_per_prompt: int
    num_prompts: int
    num_questions: int | None
    """None: not known."""
    files: Mapping[str, str]
    """sha256 by glob below the clone: of all files of it together, by name; that of its Git blob
    where no other is known; "": not known."""
    records: Callable[[Path], Iterator[QuestionRecord]]
    template: Callable[[Path], str] | None = None


def convert_questions(name: str, clone: Path) -> tuple[Header, tuple[QuestionRecord, ...]]:
    """A benchmark's questions out of a clone of its repository; an `InputError` where it is
    another version, or a file is missing or broken.
    """
    if name not in SOURCES:
        raise InputError(f"questions: unknown '{name}'; {did_you_mean(name, SOURCES)}")
    source = SOURCES[name]
    found = {pattern: _digest(clone, pattern) for pattern in source.files}
    for pattern, expected in source.files.items():
        if expected.startswith(BLOB):
            found[pattern] = BLOB + _blob(clone / pattern)
        if expected and found[pattern] != expected:
            raise InputError(
                f"{clone / pattern}: sum {found[pattern]}, expected {expected}; check out "
                f"{source.repository}"
            )
    try:
        records = tuple(source.records(clone))
    except (AttributeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{clone}: its rows have another form ({reason}); check out {source.repository}"
        ) from error
    check_records(records, str(clone))
    for what, number, expected in (
        ("prompts", len(records), source.num_prompts),
        ("questions", sum(len(one.questions) for one in records), source.num_questions),
    ):
        if expected is not None and number != expected:
            raise InputError(f"{clone}: {number} {what}, expected {expected}; check out the whole")
    header = Header(
        benchmark=name,
        source=source.repository,
        licence=source.licence,
        images_per_prompt=source.images_per_prompt,
        prompts=len(records),
        sha256=found,
        content=content_of(records),
        template=source.template(clone) if source.template else None,
    )
    return header, records


def _digest(clone: Path, pattern: str) -> str:
    files = sorted(clone.glob(pattern))
    if not files:
        raise InputError(f"{clone}: has no {pattern}; write the folder of the clone")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


BLOB = "git blob "


def _blob(file: Path) -> str:
    """The name that Git gives the content of a file."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def unlike_published(path: Path) -> str | None:
    """In what a question file is not what `convert_questions` writes, in words; None: in nothing
    that is known.
    """
    header, records = read_questions(path)
    source = SOURCES.get(header.benchmark)
    known = {name: found for name, found in source.files.items() if found} if source else {}
    if source is None or header.source != source.repository:
        return f"its questions are those of {header.source}"
    if any(header.sha256.get(name) != found for name, found in known.items()):
        return f"its questions are of another version than {source.repository}"
    if header.content != content_of(records):
        return "its questions were changed after they were written"
    if len(known) < len(source.files):
        return "whether its questions are the published ones is not known"
    return None


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield f"{file}:{number}", _json(line, f"{file}:{number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error


def _table(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream)
        for row in rows:
            yield f"{file}:{rows.line_num}", row


# GenEval 2: each prompt's atoms, counts by their word and the others by yes.

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _geneval2(clone: Path) -> Iterator[QuestionRecord]:
    for where, row in _json_lines(clone / "geneval2_data.jsonl"):
        questions = [
            Question(
                id=number,
                text=text,
                expected=answer,
                answers=_number_forms(answer, where) if text.startswith("How many") else (),
                group=skill,
            )
            for number, ((text, answer), skill) in enumerate(
                zip(row["vqa_list"], row["skills"], strict=True), 1
            )
        ]
        yield QuestionRecord(
            id=where.rpartition(":")[2],
            text=row["prompt"],
            groups={"atoms": str(row["atom_count"])},
            questions=tuple(questions),
        )


def _number_forms(word: str, where: str) -> tuple[str, ...]:
    if word not in NUMBERS:
        raise InputError(f"{where}: the count '{word}' is not a word from one to ten")
    forms = (word, word.capitalize(), str(NUMBERS.index(word) + 1))
    return (*forms, *(f" {form}" for form in forms))


# DPG-Bench: propositions that depend on each other.


def _dpg(clone: Path) -> Iterator[QuestionRecord]:
    questions: dict[str, list[Question]] = {}
    for where, row in _table(clone / "dpg_bench/dpg_bench.csv"):
        try:
            parents = [int(one) for one in row["dependency"].split(",")]
            number = int(row["proposition_id"])
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: no proposition_id or dependency ({error})") from error
        questions.setdefault(row["item_id"], []).append(
            Question(
                id=number,
                text=row["question_natural_language"].strip(),
                parents=tuple(one for one in parents if one),
                group=row["tuple"].split("(")[0].strip(),
            )
        )
    for file in sorted((clone / "dpg_bench/prompts").glob("*.txt")):
        if file.stem not in questions:
            raise InputError(f"{file}: dpg_bench.csv has no question about it")
        yield QuestionRecord(
            id=file.stem,
            text=file.read_text(encoding="utf-8").strip(),
            questions=tuple(questions[file.stem]),
        )


# WISE: one verdict of an auditor, who is told what is to be seen.

WISE_CATEGORIES = (
    ("Culture", 400),
    ("Time", 520),
    ("Space", 640),
    ("Biology", 760),
    ("Physics", 880),
    ("Chemistry", 1000),
)
"""Last prompt_id of each."""


def _wise(clone: Path) -> Iterator[QuestionRecord]:
    rows: list[dict[str, Any]] = []
    for file in sorted((clone / "data_verified").glob("*_verified.json")):
        rows += _json(file.read_text(encoding="utf-8"), str(file))
    for row in sorted(rows, key=lambda row: row["prompt_id"]):
        category = next(name for name, last in WISE_CATEGORIES if row["prompt_id"] <= last)
        yield QuestionRecord(
            id=str(row["prompt_id"]),
            text=row["Prompt"],
            groups={"category": category, "subcategory": row["Subcategory"]},
            questions=(Question(id=1, text=row["Prompt"], expected="1", group=category),),
            fields={"explanation": row["Explanation"]},
        )


def _wise_template(clone: Path) -> str:
    """The f-string of vllm_eval.py, its two fields renamed."""
    file = clone / "vllm_eval.py"
    for node in ast.walk(_syntax(file)):
        if isinstance(node, ast.JoinedStr):
            text = _unparsed(node)
            if hashlib.sha256(text.encode()).hexdigest() == WISE_TEMPLATE:
                text = text.replace("{prompt_data['Prompt']}", "{prompt}")
                return text.replace("{prompt_data['Explanation']}", "{explanation}")
    raise InputError(f"{file}: no template with sha256 {WISE_TEMPLATE}; check out its commit")


WISE_TEMPLATE = "b72932ce0313711651a182fc57a89c66393f9e4d7030ce24ca2c403f1aec1ae2"


def _unparsed(node: ast.JoinedStr) -> str:
    """The text of an f-string with its fields as they are written."""
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            parts.append("{" + ast.unparse(part.value) + "}")
    return "".join(parts)


def _syntax(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file}: cannot be read as Python ({error})") from error


# OneIG-Bench, English: dependent questions about three categories; the text of another.

ONEIG_CATEGORIES = {
    "anime": "Anime_Stylization",
    "human": "Portrait",
    "object": "General_Object",
}


def _oneig_alignment(clone: Path) -> Iterator[QuestionRecord]:
    texts = {
        (row["category"], row["id"]): row["prompt_en"]
        for _, row in _table(clone / "OneIG-Bench.csv")
    }
    for name, category in ONEIG_CATEGORIES.items():
        file = clone / f"scripts/alignment/Q_D/{name}.json"
        for id_, given in _json(file.read_text(encoding="utf-8"), str(file)).items():
            where = f"{file}: {id_}"
            asked, parents = (
                _json(given[key], where) if isinstance(given[key], str) else given[key]
                for key in ("question", "dependency")
            )
            questions = [
                Question(
                    id=int(number),
                    text=text,
                    parents=tuple(one for one in parents[number] if one),
                    group=name,
                )
                for number, text in asked.items()
            ]
            yield QuestionRecord(
                id=f"{name}-{id_}",
                text=texts[category, id_],
                groups={"category": name},
                questions=tuple(questions),
            )


def _oneig_text(clone: Path) -> Iterator[QuestionRecord]:
    for _, row in _table(clone / "scripts/text/text_content.csv"):
        # A Python list in a string, which the published script compares as it stands.
        yield QuestionRecord(
            id=row["id"], text=row["prompt_en"], fields={"text": row["text_content"]}
        )


# LongText-Bench, and the short texts of CVTG-2K.


def _longtext(clone: Path) -> Iterator[QuestionRecord]:
    for _, row in _json_lines(clone / "textbench/text_prompts.jsonl"):
        yield QuestionRecord(
            id=str(row["prompt_id"]),
            text=row["prompt"],
            groups={"category": row["category"], "length": row["length"]},
            fields={"text": " ".join(row["text"])},
        )


CVTG_PROMPTS = [200, 301, 300, 201, 200, 299, 302, 197]
"""Of 2 to 5 texts each, in CVTG and in CVTG-Style."""

CVTG_WORDS = 16_206


def _cvtg(clone: Path) -> Iterator[QuestionRecord]:
    """No sum of the files is known, so prompts and words are counted."""
    prompts, num_words = [], 0
    for file in sorted(clone.glob("CVTG*/[2-5].json")):
        content = _json(file.read_text(encoding="utf-8"), str(file))
        for number, row in enumerate(content["data_list"], 1):
            if not {"prompt", "index"} <= row.keys():
                raise InputError(f"{file}: entry {number} has no prompt or no index")
            words = " ".join(re.findall(r"'(.*?)'", row["prompt"])).lower().split()
            num_words += len(words)
            yield QuestionRecord(
                id=f"{file.parent.name}-{file.stem}-{row['index']}",
                text=row["prompt"],
                groups={"regions": file.stem, "set": file.parent.name},
                fields={"text": " ".join(words)},
            )
        prompts.append(len(content["data_list"]))
    if (prompts, num_words) != (CVTG_PROMPTS, CVTG_WORDS):
        raise InputError(
            f"{clone}: {prompts} prompts with {num_words} words, expected {CVTG_PROMPTS} with "
            f"{CVTG_WORDS}; get the whole of dnkdnk/CVTG-2K"
        )


# UniGenBench++, English and short: test points with what they mean.


def _unigenbench(clone: Path) -> Iterator[QuestionRecord]:
    meanings = ast.literal_eval(_assigned(clone / UNIGENBENCH_CODE, "EXPLANATION_DICT_EN"))
    for where, row in _table(clone / "data/test_prompts_en.csv"):
        points = _json(row["sub_dims_en"], where)
        names, described = points["Testpoints"], points["Testpoint Description"]
        questions = [
            Question(id=number, text=text, expected="1", group=name)
            for number, (name, text) in enumerate(zip(names, described, strict=True), 1)
        ]
        explanation = "".join(f"\n{name}: {meanings[name]}" for name in names)
        told = "".join(f"\n{name}: {text}" for name, text in zip(names, described, strict=True))
        yield QuestionRecord(
            id=row["index"],
            text=row["prompt_en"],
            groups={"category": points["Primary Categories"]},
            questions=tuple(questions),
            fields={
                "testpoint": str(names),
                "explanation": f"Checkpoints Defination:「{explanation}\n」",
                "test_explanation": f"Checkpoints Description:「{told}\n」",
            },
        )


UNIGENBENCH_CODE = "eval/src/eval_common.py"


def _unigenbench_template(clone: Path) -> str:
    return _template(clone / UNIGENBENCH_CODE, "SYSTEM_PROMPT_EN_TEMPLATE", UNIGENBENCH_TEMPLATE)


UNIGENBENCH_TEMPLATE = "9554ee938feaaf928d9086ba959e19063bcb027be086821d7dcb45e55ad40f14"


def _assigned(file: Path, name: str) -> ast.expr:
    """What a Python file assigns to a name at its top level."""
    for node in _syntax(file).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            return node.value
    raise InputError(f"{file}: assigns no {name}; check out its commit")


def _template(file: Path, name: str, sha256: str) -> str:
    text = str(ast.literal_eval(_assigned(file, name)))
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise InputError(f"{file}: {name} has sha256 {found}, expected {sha256}")
    return text


# TIIF-Bench testmini: every prompt short and long, all questions of an image at once.


def _tiif(clone: Path) -> Iterator[QuestionRecord]:
    for file in sorted((clone / "data/testmini_prompts").glob("*.jsonl")):
        name = file.name.replace("_prompts", "_eval_prompts")
        asked = list(_json_lines(clone / "data/testmini_eval_prompts" / name))
        for (where, prompt), (_, given) in zip(_json_lines(file), asked, strict=True):
            questions = [
                Question(id=number, text=text.strip(), expected=answer.strip().lower())
                for number, (text, answer) in enumerate(
                    zip(given["yn_question_list"], given["yn_answer_list"], strict=True), 1
                )
            ]
            for length in ("short", "long"):
                yield QuestionRecord(
                    id=f"{prompt['type']}-{where.rpartition(':')[2]}-{length}",
                    text=prompt[f"{length}_description"],
                    groups={"attribute": prompt["type"], "length": length},
                    questions=tuple(questions),
                )


def _tiif_template(clone: Path) -> str:
    text = _template(clone / "eval/eval_with_vlm.py", "raw_prompt", TIIF_TEMPLATE)
    return text.replace("##YNQuestions##", "{questions}")


TIIF_TEMPLATE = "d31a2a63260a75b36ebfe6d80e75a77206adb3c1c2c01d07e6d10ae6c8b90743"

NO_LICENCE = "no licence file"

SOURCES: Mapping[str, Source] = {
    "geneval2": Source(
        "github.com/facebookresearch/GenEval2 at a6e82d2",
        "CC BY-NC 4.0",
        images_per_prompt=1,
        num_prompts=800,
        num_questions=6012,
        files={
            "geneval2_data.jsonl": (
                "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43"
            )
        },
        records=_geneval2,
    ),
    "dpg": Source(
        "github.com/TencentQQGYLab/ELLA at 3c228f1",
        "Apache-2.0",
        images_per_prompt=4,
        num_prompts=1065,
        num_questions=None,
        files={
            "dpg_bench/dpg_bench.csv": "git blob 98457fc9901943f51ff9a30367250fc292533bed",
            "dpg_bench/prompts/*.txt": (
                "094188dfe3e52517d20cebbfb7a47b5fb5e35376a1e344d76e377944cc6efc30"
            ),
        },
        records=_dpg,
    ),
    "wise": Source(
        "github.com/PKU-YuanGroup/WISE at eb51174",
        NO_LICENCE,
        images_per_prompt=1,
        num_prompts=1000,
        num_questions=1000,
        files={
            "data_verified/*_verified.json": (
                "82ae531f4aa2fbbe87ebf85b0dc5f773f03b96b5467d889a80232ee6719e92d8"
            )
        },
        records=_wise,
        template=_wise_template,
    ),
    "oneig_alignment": Source(
        "github.com/OneIG-Bench/OneIG-Benchmark at 41b4983",
        NO_LICENCE,
        images_per_prompt=4,
        num_prompts=695,
        num_questions=11_231,
        files={
            "OneIG-Bench.csv": ("e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1"),
            # anime, human and object, without the Chinese ones beside them, NAME_zh.
            "scripts/alignment/Q_D/[aho]*[!h].json": (
                "4e789cc3a7d703a6b5f6079ee4a93f2c33a9a24a583d0e292d11f5a269582954"
            ),
        },
        records=_oneig_alignment,
    ),
    "oneig_text": Source(
        "github.com/OneIG-Bench/OneIG-Benchmark at 41b4983",
        NO_LICENCE,
        images_per_prompt=4,
        num_prompts=200,
        num_questions=0,
        files={
            "scripts/text/text_content.csv": (
                "ffbf0b588c617b77caf1e9a733496ff5b4704b6534df5fba13201a83f21e0512"
            )
        },
        records=_oneig_text,
    ),
    "longtext": Source(
        "github.com/X-Omni-Team/X-Omni at 2b8237b",
        "Apache-2.0",
        images_per_prompt=4,
        num_prompts=160,
        num_questions=0,
        files={
            "textbench/text_prompts.jsonl": (
                "a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8"
            )
        },
        records=_longtext,
    ),
    "cvtg": Source(
        "huggingface.co/datasets/dnkdnk/CVTG-2K",
        "not stated",
        images_per_prompt=1,
        num_prompts=2000,
        num_questions=0,
        files={"CVTG*/[2-5].json": ""},
        records=_cvtg,
    ),
    "unigenbench": Source(
        "github.com/CodeGoat24/UniGenBench at 49d0bce",
        "CC BY 4.0",
        images_per_prompt=4,
        num_prompts=600,
        num_questions=1813,
        files={
            "data/test_prompts_en.csv": (
                "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459"
            ),
            UNIGENBENCH_CODE: "c26c91cc65be7ed4234f07a310eed8812888c83b8b83b1934b77b1f48c463eb9",
        },
        records=_unigenbench,
        template=_unigenbench_template,
    ),
    "tiif": Source(
        "github.com/A113N-W3I/TIIF-Bench at 3aae750",
        NO_LICENCE,
        images_per_prompt=1,
        num_prompts=554,
        num_questions=2892,
        files={
            "data/testmini_prompts/*.jsonl": (
                "eca36f7c68301ee76f85a534966162726e49c5f11f22a0a4cdbba371f291ed75"
            ),
            "data/testmini_eval_prompts/*.jsonl": (
                "467b543f36cbe811cfef85f2a0d988739705dfaba04b1e0b1a09be81e8b416ab"
            ),
        },
        records=_tiif,
        template=_tiif_template,
    ),
}
"""By name of the benchmark, for `stage data questions NAME`."""
