"""Records what the package computes, to show that a change of its code changed no number.

    python tests/record_numbers.py OUT.json          # records; a part that is there is kept
    python tests/record_numbers.py OUT.json --against BEFORE.json

Through the command line and the public names alone, so that it outlives the code behind them. The
bits are those of one machine and one thread: compare two records of the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STEPS = 5
RECIPES = ("shapes_geneval", "shapes_grpo", "shapes_entropy")
TIMED = ("time/", "throughput/", "memory/", "images_per_s", "tokens_per_s")
"""Beginnings of the names of metrics that no two runs share."""


def stage(*arguments: str) -> str:
    """What the command prints; its failure is one here."""
    done = subprocess.run(
        [sys.executable, "-m", "stage_rl", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"stage {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def runs(folder: Path) -> dict[str, Any]:
    """The metrics of each step, and the exported tensors of the last run in both layouts."""
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        for dtype in ("float32", "mixed"):
            run = folder / f"{recipe}-{dtype}"
            stage(
                *("train", recipe, f"steps={STEPS}", f"run.dir={run}", "evaluation=null"),
                *(f"training.dtype={dtype}", f"rollout.dtype={dtype}", "probe.every=2"),
            )
            lines = (run / "metrics.jsonl").read_text().splitlines()
            found[run.name] = [json.loads(line) for line in lines]
            found[f"{run.name} samples"] = _digest(*sorted((run / "samples").glob("*.npz")))
    for layout in ("transformers", "deepseek"):
        out = folder / layout
        stage("export", str(folder / "shapes_geneval-mixed"), str(out), "--layout", layout)
        found[f"export {layout}"] = _tensors(out)
    return found


def tokens(_: Path) -> dict[str, Any]:
    """The likeliest tokens of a few prompts, with guidance and without."""
    from stage_rl import sample

    prompts = ["a photo of a red circle", "a photo of three stars and a blue heart"]
    return {
        f"{dtype}, guidance {scale}": sample(
            "shapes", prompts, temperature=0, guidance_scale=scale, dtype=dtype
        ).tokens_NT.tolist()
        for dtype in ("float32", "mixed")
        for scale in (1.0, 2.5)
    }


def benchmarks(folder: Path) -> dict[str, Any]:
    """The tables of every benchmark on a few prompts."""
    text = stage("eval", "--smoke", "--benchmark", "all", "--out", str(folder / "smoke"))
    return {"tables": text.splitlines()}


def recipes(_: Path) -> dict[str, Any]:
    """Every recipe as it is resolved."""
    names = [line.split()[0] for line in stage("recipes").splitlines() if line.strip()]
    return {name: stage("train", name, "--dry-run").splitlines() for name in names}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "recipes": recipes,
    "tokens": tokens,
    "runs": runs,
    "benchmarks": benchmarks,
}


def _digest(*files: Path) -> str:
    """Of the arrays, not of the archives, which hold times."""
    import numpy as np

    found = hashlib.sha256()
    for file in files:
        with np.load(file) as arrays:
            for name in sorted(arrays):
                found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def _tensors(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in sorted(tensors.keys()):
                found[name] = hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest()
    assert found, f"{folder} holds no tensor"
    return found


def _differences(before: Any, after: Any, where: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = dict.fromkeys([*before, *after])
        return [
            line
            for key in keys
            if not key.startswith(TIMED)
            for line in _differences(before.get(key), after.get(key), f"{where}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for place, pair in enumerate(zip(before, after, strict=True))
            for line in _differences(*pair, f"{where}[{place}]")
        ]
    if before == after:
        return []
    return [f"{where}: {str(before)[:200]} -> {str(after)[:200]}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[*PARTS])
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.parts:
        if name not in found:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = json.loads(json.dumps(PARTS[name](Path(folder))))
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.against:
        before = json.loads(options.against.read_text())
        lines = [
            line
            for name in options.parts
            for line in _differences(before.get(name), found.get(name), name)
        ]
        print("\n".join(lines) or "no difference")
        raise SystemExit(bool(lines))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
