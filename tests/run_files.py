"""Reads what a run wrote, for tests that compare runs."""

import json

from safetensors.torch import load_file

CLOCKED = ("time/", "memory/", "images_per_s", "tokens_per_s", "throughput/")
"""Metrics that differ from run to run."""


def parameters_of(run, step):
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "policy.safetensors")


def steps_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(lines):
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines]
