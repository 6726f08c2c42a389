"""Records of benchmarks, and the page that is made from them."""

import json
from pathlib import Path

import pytest

from stage_rl.bench.base import BenchResult
from stage_rl.bench.record import BEGIN, END, into_page, page, read_records, record_of
from stage_rl.errors import InputError


def test_a_row_without_a_record_is_not_measured_and_one_with_a_record_is_shown(tmp_path):
    result = BenchResult("2.5x", True, {"speedup": 2.5}, ("  a", "1 2"))
    record = record_of("rollout", ">= 2x", {"rounds": 5}, result)
    (tmp_path / "cpu-rollout.json").write_text(json.dumps(record))
    slow = BenchResult("", False, {"rollout-7b_mixed_s": 6.125, "profile-7b_attention_ms": 5.5})
    (tmp_path / "gpu-rollout.json").write_text(json.dumps(record_of("gpu", "all", {}, slow)))
    text = page(read_records(tmp_path))
    assert (
        "| `cpu-rollout` | `stage bench rollout --rounds 5` | >= 2x | 2.5x; bar reached |" in text
    )
    assert "| `cpu-step` | `stage bench step --rounds 5` |  | not measured |" in text
    assert "```\n  a\n1 2\n```" in text
    assert "| 7B, 64 images drawn, s | 5.9 (6.5 not pipelined) | 6.12 |" in text
    assert "| 7B token: attention, ms | 5.2 | 5.50 |" in text
    assert "| 1B, 64 images drawn, s | 2.3 (2.6 not pipelined) | not measured |" in text
    assert f"torch {record['machine']['torch']}" in text


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(tmp_path):
    text = f"head\n{BEGIN}\nold\n{END}\ntail\n"
    new = into_page(text, "new", file=tmp_path)
    assert new == f"head\n{BEGIN}\n\nnew\n\n{END}\ntail\n"
    assert into_page(new, "new", file=tmp_path) == new
    with pytest.raises(InputError, match="has no place for the tables"):
        into_page("head", "new", file=tmp_path)


def test_a_folder_that_is_not_there_and_a_file_cut_short_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_records(Path(tmp_path, "absent"))
    (tmp_path / "gpu-rollout.json").write_text('{"name"')
    with pytest.raises(InputError, match=r"gpu-rollout\.json: is no JSON"):
        read_records(tmp_path)
