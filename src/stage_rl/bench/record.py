"""What a benchmark leaves, and docs/performance.md, which is made from it.

The records of `benchmarks/` are committed, one file for each row of the page: a row whose file is
not there says that it is not measured. `stage bench show --into docs/performance.md` writes them
between the two marks of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stage_rl.bench.base import BenchResult, machine
from stage_rl.distributed import versions_of
from stage_rl.errors import InputError

FOLDER = "benchmarks"
NOT_MEASURED = "not measured"
BEGIN, END = "<!-- stage bench show: begin -->", "<!-- stage bench show: end -->"
PACKAGES = ("stage-rl", "transformers", "triton", "torchao", "numba", "numpy")
"""Beside torch; a record names those that are installed."""

CPU_ROWS = {
    "cpu-rollout": "stage bench rollout --rounds 5",
    "cpu-step": "stage bench step --rounds 5",
    "cpu-busy": "stage bench busy --rounds 5",
    "cpu-mismatch": "stage bench mismatch",
    "cpu-reweight": "stage bench reweight",
    "cpu-logprobs": "stage bench logprobs",
    "cpu-memory": "stage bench memory",
    "cpu-fsdp2": "stage bench fsdp2",
    "cpu-decode-attention": "stage bench decode-attention",
    "cpu-draw": "stage bench draw",
    "amx-rollout": "stage bench rollout --rounds 5",
    "amx-step": "stage bench step --rounds 5",
    "amx-busy": "stage bench busy --rounds 5",
    "amx-mismatch": "stage bench mismatch",
}
"""Names of files without suffix, and the commands that make them with --json FILE; `amx` on a
processor with matrix units for bf16.
"""
GPU_ROWS = {
    "gpu-correctness": "stage bench gpu --part correctness",
    "gpu-rollout": "stage bench gpu --part rollout",
    "gpu-train-1b": "stage bench gpu --part train-1b",
    "gpu-step-7b": "stage bench gpu --part step-7b",
    "gpu-decode-attention": "stage bench decode-attention",
    "gpu-draw": "stage bench draw",
    "gpu-scale": "stage bench scale --model janus-1b --image-sizes 256,384",
}
"""The parts of `stage bench gpu` write their files themselves."""

PREDICTED = (
    ("7B, 64 images drawn, s", "5.9 (6.5 not pipelined)", "gpu-rollout", "rollout-7b_mixed_s"),
    ("share of the byte limit, 7B", "74%", "gpu-rollout", "rollout-7b_mixed_byte_limit_share"),
    ("1B, 64 images drawn, s", "2.3 (2.6 not pipelined)", "gpu-rollout", "rollout-1b_mixed_s"),
    ("share of the byte limit, 1B", "62%", "gpu-rollout", "rollout-1b_mixed_byte_limit_share"),
    ("7B token: attention, ms", "5.2", "gpu-rollout", "profile-7b_attention_ms"),
    ("7B token: matmuls, ms", "3.75", "gpu-rollout", "profile-7b_matmul_ms"),
    ("7B token: norms, rotation, gate, ms", "1.02", "gpu-rollout", "profile-7b_small_ms"),
    ("7B token: sampling and the rest, ms", "0.17", "gpu-rollout", "profile-7b_other_ms"),
    ("7B, a step, s", "12", "gpu-step-7b", "full_step_trainer_ms"),
)
"""Made before any measurement, for one H200: what, how much, and the measure that tells."""
MS = 1e-3


def record_of(
    name: str, bar: str, settings: Mapping[str, Any], result: BenchResult
) -> dict[str, Any]:
    """All that a benchmark found, with what it ran on and the command that ran it."""
    return {
        "name": name,
        "bar": bar,
        "settings": dict(settings),
        "command": " ".join(["stage", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | {"packages": versions_of(PACKAGES), "driver": _driver()},
        "headline": result.headline,
        "reached": result.reached,
        "measures": dict(result.measures),
        "table": list(result.table),
    }


def _driver() -> str | None:
    """Of the GPU; None without one, or where the system does not say."""
    said = Path("/proc/driver/nvidia/version")
    if not torch.cuda.is_available() or not said.exists():
        return None
    return said.read_text(encoding="utf-8").splitlines()[0]


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the page's rows by name; those that are not there are left out."""
    if not folder.is_dir():
        raise InputError(f"--folder {folder}: no such folder; name the one with the records")
    found = {}
    for name in CPU_ROWS | GPU_ROWS:
        file = folder / f"{name}.json"
        if file.exists():
            try:
                found[name] = json.loads(file.read_text("utf-8"))
            except ValueError as error:
                raise InputError(f"{file}: is no JSON ({error}); measure it again") from error
    return found


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands between the marks of docs/performance.md."""
    parts = [
        "## Measured on a CPU",
        *_machines(records, CPU_ROWS),
        _rows(records, CPU_ROWS),
        *_tables(records, CPU_ROWS),
        "## Measured on a GPU",
        *_machines(records, GPU_ROWS),
        _rows(records, GPU_ROWS),
        *_tables(records, GPU_ROWS),
        "Predictions for one H200, made before any measurement:",
        _predictions(records),
    ]
    return "\n\n".join(parts)


def into_page(text: str, tables: str, *, file: Path) -> str:
    """A page with other tables between its marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{file}: has no place for the tables; write {BEGIN} and {END} into it")
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}"


def _machines(records: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> list[str]:
    """What the rows were measured on, a sentence for each machine and day."""
    lines: dict[str, list[str]] = {}
    for name in rows:
        if name in records:
            found = records[name]["machine"]
            versions = ", ".join(f"{n} {v}" for n, v in found["packages"].items())
            gpu = f"{found['gpu']}, {found['driver']}; " if found["gpu"] else ""
            text = f"{gpu}{found['cpu']}, {found['cores']} cores, {found['threads']} threads; "
            text += f"torch {found['torch']}, {versions}; {records[name]['date']}"
            lines.setdefault(text, []).append(f"`{name}`")
    return [f"{', '.join(names)}: {text}." for text, names in lines.items()]


def _rows(records: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> str:
    lines = ["| file | command | bar | measured |", "|---|---|---|---|"]
    for name, command in rows.items():
        found = records.get(name)
        bar = found["bar"] if found else ""
        lines.append(f"| `{name}` | `{command}` | {bar} | {_verdict(found)} |")
    return "\n".join(lines)


def _verdict(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOT_MEASURED
    verdicts = {True: "bar reached", False: "bar **missed**", None: "no bar for these sizes"}
    return f"{found['headline']}; {verdicts[found['reached']]}"


def _tables(records: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> list[str]:
    parts = []
    for name in rows:
        if name in records and records[name]["table"]:
            lines = [f"`{records[name]['command']}`", "", "```", *records[name]["table"], "```"]
            parts.append("\n".join(lines))
    return parts


def _predictions(records: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | predicted | measured |", "|---|---|---|"]
    for what, value, name, key in PREDICTED:
        found = records.get(name, {"measures": {}})["measures"].get(key)
        lines.append(
            f"| {what} | {value} | {NOT_MEASURED if found is None else _shown(found, key)} |"
        )
    return "\n".join(lines)


def _shown(value: float, key: str) -> str:
    """As the prediction of the same row is written."""
    if key.endswith("share"):
        return f"{value:.0%}"
    if key.endswith("step_trainer_ms"):
        return f"{value * MS:.1f}"
    return f"{value:.2f}"
