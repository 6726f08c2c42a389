"""`stage data`: the training file it writes, and the overlap it finds."""

import json
from collections import Counter


def test_a_training_mix_is_written_and_holds_no_evaluation_prompt(tmp_path, stage):
    out = tmp_path / "train.jsonl"
    done = stage("data", "geneval", "--out", out, "--num-prompts", 90, "--seed", 3)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    # 0:1:7:1:4:5 of 18, five times.
    assert Counter(record["tag"] for record in records) == {
        "two_object": 5,
        "counting": 35,
        "colors": 5,
        "position": 20,
        "color_attr": 25,
    }
    assert done.stdout.startswith(f"{out}: 90 prompts, ")
    checked = stage("data", "check", f"geneval:{out}", "geneval")
    assert checked.exit_code == 0, checked.output
    assert checked.stdout == "none of the 553 evaluation prompts is among 90 prompts\n"


def test_an_overlap_is_named_and_ends_with_1(tmp_path, run_main, stage):
    out = tmp_path / "evaluation.jsonl"
    assert stage("data", "geneval", "--out", out, "--evaluation").exit_code == 0
    code, printed = run_main("data", "check", out, "geneval")
    assert code == 1
    assert "553 of 553 evaluation prompts are in the training set (553 word for word" in printed
    plain = tmp_path / "mine.txt"
    plain.write_text("A photo of a bench.\n")
    assert run_main("data", "check", plain, "geneval")[0] == 1


def test_wrong_files_are_one_line(tmp_path, run_main):
    missing = tmp_path / "none.jsonl"
    assert run_main("data", "check", missing, "geneval") == (
        2,
        f"error: {missing}: no such file\n",
    )
    code, printed = run_main("data", "geneval", "--out", tmp_path)
    assert code == 1
    assert "Is a directory; name another file" in printed
