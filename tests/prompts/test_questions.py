"""Question files: what comes with the package, what is read from a clone, and what is refused."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import stage_rl
from stage_rl.errors import InputError
from stage_rl.prompts import question_sources
from stage_rl.prompts.files import PromptsConfig
from stage_rl.prompts.question_sources import (
    SOURCES,
    UNIGENBENCH_TEMPLATE,
    convert_questions,
    unlike_published,
)
from stage_rl.prompts.questions import questions_of, read_questions, write_questions

SHIPPED = Path(stage_rl.__file__).parent / "evaluation" / "questions"

CLONES = {
    "geneval2": "GenEval2",
    "dpg": "ELLA",
    "wise": "WISE",
    "oneig_alignment": "OneIG-Benchmark",
    "oneig_text": "OneIG-Benchmark",
    "longtext": "X-Omni",
    "cvtg": "CVTG-2K",
    "unigenbench": "UniGenBench",
    "tiif": "TIIF-Bench",
}


def dpg_clone(folder: Path, *, dependency: str = "1") -> Path:
    """The published layout with one prompt and two questions."""
    (folder / "dpg_bench/prompts").mkdir(parents=True)
    (folder / "dpg_bench/prompts/7.txt").write_text("a red cat\n")
    columns = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed"
    (folder / "dpg_bench/dpg_bench.csv").write_text(
        f"{columns},tuple,question_natural_language\n"
        "7,a red cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
        f'7,a red cat,,2,"{dependency}",attribute,color,"attribute - color (cat, red)",Is it red?\n'
    )
    return folder


@pytest.fixture
def one_prompt(monkeypatch):
    files = dict.fromkeys(SOURCES["dpg"].files, "")
    source = replace(SOURCES["dpg"], num_prompts=1, files=files)
    monkeypatch.setitem(SOURCES, "dpg", source)  # pyright: ignore[reportArgumentType]


def test_what_comes_with_the_package_is_whole_and_names_its_licence():
    header, records = read_questions(SHIPPED / "unigenbench.jsonl.gz")
    assert (len(records), sum(len(one.questions) for one in records)) == (600, 1813)
    assert len({question.group for one in records for question in one.questions}) == 27
    assert header.licence == "CC BY 4.0"
    assert header.template is not None
    assert hashlib.sha256(header.template.encode()).hexdigest() == UNIGENBENCH_TEMPLATE
    header, records = read_questions(SHIPPED / "longtext.jsonl.gz")
    assert (len(records), header.licence) == (160, "Apache-2.0")
    assert records[0].fields["text"].startswith("FRESH BREWS, EVERY MORNING, EVERY DAY Locally")


def test_questions_keep_their_parents_on_the_way_to_a_prompt(tmp_path, one_prompt):
    header, records = convert_questions("dpg", dpg_clone(tmp_path))
    write_questions(tmp_path / "dpg.jsonl.gz", header, records)
    settings = {"kind": "questions", "path": str(tmp_path / "dpg.jsonl.gz")}
    (prompt,) = PromptsConfig.model_validate(settings).build()
    assert prompt.text == "a red cat"
    cat, red = questions_of(prompt)
    assert (cat.parents, red.parents, red.group) == ((), (1,), "attribute - color")
    json.dumps(dict(prompt.metadata))  # for programs that are asked about it


def test_a_parent_that_is_not_there_is_named(tmp_path, one_prompt):
    with pytest.raises(InputError, match="prompt '7': question 2 depends on 5"):
        convert_questions("dpg", dpg_clone(tmp_path, dependency="1, 5"))


def test_another_version_is_refused_with_what_was_found(tmp_path):
    (tmp_path / "geneval2_data.jsonl").write_text("{}\n")
    expected = SOURCES["geneval2"].files["geneval2_data.jsonl"]
    with pytest.raises(InputError, match=rf"geneval2_data.jsonl: sum \w+, expected {expected}"):
        convert_questions("geneval2", tmp_path)
    with pytest.raises(InputError, match=r"sum git blob [0-9a-f]{40}, expected git blob 98457fc99"):
        convert_questions("dpg", dpg_clone(tmp_path))


def test_a_file_by_hand_or_of_another_benchmark_is_no_published_one(tmp_path, one_prompt):
    header, records = convert_questions("dpg", dpg_clone(tmp_path))
    file = tmp_path / "dpg.jsonl"
    write_questions(file, header, records)
    assert unlike_published(file) == "whether its questions are the published ones is not known"
    text = file.read_text()
    file.write_text(text.replace("Is it red?", "Is it blue?"))
    assert unlike_published(file) == "its questions were changed after they were written"
    file.write_text(text.replace("ELLA at 3c228f1", "ELLA at 0000000"))
    assert str(unlike_published(file)).endswith(
        "those of github.com/TencentQQGYLab/ELLA at 0000000"
    )
    settings = {"kind": "questions", "path": str(file), "benchmark": "wise"}
    with pytest.raises(InputError, match=r"dpg\.jsonl: holds the questions of 'dpg'; write those"):
        PromptsConfig.model_validate(settings).build()
    file.write_text(text.replace('"parents": [1]', '"parents": [5]'))
    with pytest.raises(InputError, match=r"dpg\.jsonl: prompt '7': question 2 depends on 5"):
        read_questions(file)


def test_a_row_of_another_form_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "CVTG").mkdir()
    (tmp_path / "CVTG/2.json").write_text('{"data_list": [{"prompt": "x"}]}')
    with pytest.raises(InputError, match=r"CVTG/2\.json: entry 1 has no prompt or no index"):
        convert_questions("cvtg", tmp_path)
    (tmp_path / "CVTG/2.json").write_text('{"data": []}')
    with pytest.raises(
        InputError, match=r"rows have another form \(KeyError: 'data_list'\); check"
    ):
        convert_questions("cvtg", tmp_path)
    # Git's own name of the content "hello" and a line feed.
    (tmp_path / "x").write_text("hello\n")
    assert question_sources._blob(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_texts_of_another_number_of_prompts_or_words_are_not_cvtgs(tmp_path):
    # 1,999 prompts of eight words and one of the 214 that are left of 16,206.
    sizes = {"CVTG": (200, 301, 300, 201), "CVTG-Style": (200, 299, 302, 197)}
    for name, numbers in sizes.items():
        (tmp_path / name).mkdir()
        for regions, number in zip((2, 3, 4, 5), numbers, strict=True):
            prompts = ["a sign 'a b c d' over 'e f g h'"] * number
            if (name, regions) == ("CVTG", 2):
                prompts[0] = f"a sign '{'x ' * 214}'"
            rows = [{"index": i, "prompt": text} for i, text in enumerate(prompts)]
            (tmp_path / name / f"{regions}.json").write_text(json.dumps({"data_list": rows}))
    header, records = convert_questions("cvtg", tmp_path)
    assert (header.prompts, len(records[0].fields["text"].split())) == (2000, 214)
    file = tmp_path / "CVTG/2.json"
    file.write_text(file.read_text().replace("x x", "x"))
    with pytest.raises(InputError, match=r"with 16099 words, expected \[200, 301.*16206"):
        convert_questions("cvtg", tmp_path)
    (tmp_path / "CVTG-Style/5.json").unlink()
    with pytest.raises(InputError, match=r"200, 299, 302\] prompts with"):
        convert_questions("cvtg", tmp_path)


def test_a_broken_line_is_named_by_its_number(tmp_path):
    file = tmp_path / "broken.jsonl"
    header = {"benchmark": "x", "source": "x", "licence": "x", "images_per_prompt": 1, "prompts": 1}
    file.write_text(f'{json.dumps(header)}\n{{"id": "1" "text": "a"}}\n')
    with pytest.raises(InputError, match=r"broken\.jsonl:2: not JSON"):
        read_questions(file)
    file.write_text(f'{json.dumps(header)}\n{{"id": "1", "txt": "a"}}\n')
    with pytest.raises(InputError, match=r"broken\.jsonl:2: .*unknown key.*'text'"):
        read_questions(file)


@pytest.mark.skipif("STAGE_BENCHMARK_CLONES" not in os.environ, reason="names no folder of clones")
@pytest.mark.parametrize("name", SOURCES)
def test_a_published_repository_is_read_whole(name):
    clone = Path(os.environ["STAGE_BENCHMARK_CLONES"]) / CLONES[name]
    if not all(list(clone.glob(pattern)) for pattern in SOURCES[name].files):
        pytest.skip(f"{clone} has not all files")
    header, records = convert_questions(name, clone)
    shipped = SHIPPED / f"{name}.jsonl.gz"
    if shipped.exists():
        assert read_questions(shipped) == (header, records)
